"""Outputs of the modules of a source model in one call, and the tensors of a compiled graph that equal them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.validation.measure.metrics import rel_l2

# Elements of a tensor that are compared; of a larger one, so many are drawn.
_MOST_ELEMENTS = 2**16
# Elements of all outputs that are kept until the model has answered.
_MOST_HELD_ELEMENTS = 2**26
# A tensor whose few first elements are further away than this is not compared as a whole.
_FEW_ELEMENTS, _NEAR = 512, 0.7


@dataclass(eq=False)
class ModuleCall:
    """One call of a module of the source model.

    Attributes:
        name: Name of the module in the model; "" is the model itself. A later call of it has its number.
        kind: Class of the module.
        called_at: Line of Python that calls the module.
        has_weights: The module, or one inside of it, has parameters.
        inputs: Shape of each tensor that the module gets.
        statistics: Least, largest and mean element of the first of them, and their standard deviation.
        outputs: Number of tensors of floating-point numbers in the output.
        shape: Shape of the first of them; () without one.
        values: Elements of that tensor that are compared, flat.
        other_values: The same elements in other forms that a graph may have: without the bias, and as a later
            operation leaves them that changes the tensor in place.
        is_masked: Padding is left out of `values`.
        children: Calls that the module makes, in their order.
        readers: Calls that get this output unchanged.
        floor: rel_l2 of the output to itself, computed in another precision; 0 if it was not measured.
        nearest: rel_l2 to the nearest tensor of the compiled graph.
    """

    name: str
    kind: str
    called_at: str
    has_weights: bool = True
    inputs: tuple[tuple[int, ...], ...] = ()
    statistics: dict[str, float] = field(default_factory=dict)
    outputs: int = 0
    shape: tuple[int, ...] = ()
    values: NDArray[Any] | None = None
    other_values: list[NDArray[Any]] = field(default_factory=list)
    is_masked: bool = False
    children: list[ModuleCall] = field(default_factory=list)
    readers: list[ModuleCall] = field(default_factory=list)
    floor: float = 0.0
    nearest: float = float("inf")

    @property
    def size(self) -> int:
        """Number of elements of the output."""
        return int(np.prod(self.shape)) if self.shape else 0

    @property
    def pattern(self) -> str:
        """Name without its numbers, which all layers of a model share."""
        return re.sub(r"\d+", "*", self.name)

    def walk(self) -> Iterator[ModuleCall]:
        """Yield this call and all below it, in the order in which they end."""
        for child in self.children:
            yield from child.walk()
        yield self


class Positions:
    """Chooses the elements of a tensor that are compared.

    Args:
        mask: 1 where a position of the batch counts, shape (rows, length); None if all do.
    """

    def __init__(self, mask: NDArray[Any] | None):
        self._mask = None if mask is None or mask.ndim != 2 or mask.all() else mask.astype(bool)
        self._cache: dict[tuple[int, bool], NDArray[Any]] = {}

    def hides(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape has a row for each position, some of which are padding."""
        return self._mask is not None and tuple(shape[:2]) == self._mask.shape

    def of(self, size: int, is_masked: bool) -> NDArray[Any]:
        """Return the flat positions in a tensor of `size` elements."""
        key = (size, is_masked)
        if key not in self._cache:
            positions = np.arange(size)
            if is_masked and self._mask is not None:
                positions = positions[np.repeat(self._mask.ravel(), size // self._mask.size)]
            if positions.size > _MOST_ELEMENTS:
                chosen = np.random.default_rng(0).choice(positions.size, _MOST_ELEMENTS, replace=False)
                positions = positions[np.sort(chosen)]
            self._cache[key] = positions
        return self._cache[key]


def trace_modules(model: Any, inputs: Mapping[str, Any], positions: Positions) -> ModuleCall:
    """Run a model and return the tree of its calls.

    Args:
        model: The transformers model.
        inputs: Inputs by name, as tensors.
        positions: Chooses the elements that are kept of each output.
    """
    import torch

    # Parametrizations compute weights, which a graph keeps as constants.
    names = {module: name for name, module in model.named_modules() if "parametrizations" not in name.split(".")}
    counts: dict[str, int] = {}
    stack: list[ModuleCall] = []
    roots: list[ModuleCall] = []
    held: list[tuple[ModuleCall, Any, NDArray[Any]]] = []

    def before(module: Any, arguments: tuple[Any, ...], named_arguments: dict[str, Any]) -> None:
        name = names[module]
        counts[name] = counts.get(name, 0) + 1
        suffix = f" (call {counts[name]})" if counts[name] > 1 else ""
        has_weights = next(module.parameters(), None) is not None
        call = ModuleCall(f"{name}{suffix}", type(module).__name__, _caller(), has_weights)
        tensors = [value for value in (*arguments, *named_arguments.values()) if isinstance(value, torch.Tensor)]
        call.inputs = tuple(tuple(tensor.shape) for tensor in tensors)
        call.statistics = _statistics(tensors[0]) if tensors else {}
        for tensor in _tensors([*arguments, *named_arguments.values()]):
            writer = getattr(tensor, "_compileflow_call", None)
            if writer is not None:
                writer.readers.append(call)
        (stack[-1].children if stack else roots).append(call)
        stack.append(call)

    def after(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        tensors = _tensors(output)
        call.outputs = len(tensors)
        if not tensors:
            return
        tensor = tensors[0]
        call.shape = tuple(tensor.shape)
        call.is_masked = positions.hides(call.shape)
        chosen = positions.of(call.size, call.is_masked)
        call.values = _flat(tensor)[chosen]
        bias = getattr(module, "bias", None)
        if isinstance(module, torch.nn.Linear) and bias is not None:
            call.other_values.append(_flat(tensor - bias)[chosen])
        tensor._compileflow_call = call
        if sum(call.size for call, _, _ in held) < _MOST_HELD_ELEMENTS:
            held.append((call, tensor, chosen))

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for call, tensor, chosen in held:
        final = _flat(tensor)[chosen]
        if not np.array_equal(final, call.values):  # type: ignore[arg-type]
            call.other_values.append(final)
    return roots[0]


def set_floors(call: ModuleCall, other: ModuleCall) -> None:
    """Set the floor of each call from the same call of a model that computes in another precision."""
    for one, another in zip(call.walk(), other.walk(), strict=True):
        if one.values is not None and another.values is not None and one.shape == another.shape:
            one.floor = rel_l2(one.values, another.values)


class Matcher:
    """Finds, for each call, the tensor of a compiled graph that is nearest to its output."""

    def __init__(self, root: ModuleCall, positions: Positions):
        self._positions = positions
        self._forms: dict[tuple[int, bool], list[tuple[ModuleCall, NDArray[Any], NDArray[Any]]]] = {}
        for call in root.walk():
            for values in (call.values, *call.other_values):
                if values is not None and values.any():
                    few = values[:: max(1, values.size // _FEW_ELEMENTS)]
                    self._forms.setdefault((call.size, call.is_masked), []).append((call, values, few))

    def add(self, tensors: Arrays) -> None:
        """Compare tensors of the graph with the outputs that have as many elements."""
        for array in tensors.values():
            for is_masked in (False, True):
                forms = self._forms.get((array.size, is_masked))
                if forms:
                    values = array.reshape(-1)[self._positions.of(array.size, is_masked)].astype(np.float64)
                    self._compare(forms, values)

    @staticmethod
    def _compare(forms: list[tuple[ModuleCall, NDArray[Any], NDArray[Any]]], values: NDArray[Any]) -> None:
        few_values = values[:: max(1, values.size // _FEW_ELEMENTS)]
        for call, reference, few in forms:
            if not few.any() or rel_l2(few, few_values) < _NEAR:
                call.nearest = min(call.nearest, rel_l2(reference, values))


def _caller() -> str:
    """Return the line of Python that calls a module, without the folders above its package."""
    own = (str(Path("torch", "nn", "modules", "module.py")), __file__)
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(own):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    parts = path.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 1
    return f"{'/'.join(parts[start:])}:{frame.f_lineno}"


def _tensors(output: Any) -> list[Any]:
    """Return the tensors of floating-point numbers in an output."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _flat(tensor: Any) -> NDArray[Any]:
    return np.asarray(tensor.detach().double().reshape(-1).numpy())


def _statistics(tensor: Any) -> dict[str, float]:
    values = tensor.double()
    if not values.numel():
        return {}
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
    }
