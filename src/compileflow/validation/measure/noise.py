"""Noise: how far the source model is from itself, and what rounding to a number format does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.errors import first_line
from compileflow.spec import Precision
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.compare_outputs import compared_rows
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.measurements import Measurements, Model
from compileflow.validation.measure.tendencies import Tendencies

# Differences whose noise is measured per output.
_DIFFERENCES = ("max_abs_diff", "scaled_diff", "peak_error", "rel_l2", "one_minus_cosine")
# Bits of weights and of the inputs of layers. Weights have 7: targets reduce their range for CPUs without VNNI.
_WEIGHT_BITS, _INPUT_BITS = 7, 8
# Weights that share a scale at int4.
_GROUP_SIZE = 64
_TINY = 1e-30
# Answers must differ between examples by this multiple of what rounding changes.
_LEAST_RESPONSE = 3.0


def measure_noise(
    measurements: Measurements,
    variants: Mapping[str, Callable[[Case], Arrays]],
    reference: Model,
    cases: Sequence[Case],
) -> None:
    """Measure how far the source model is from itself in another precision, batch, thread count or attention.

    Args:
        measurements: Gets `noise`: the worst of all variants, and the rel_l2 of each as `rel_l2 (name)`; `floors`:
            the worst of all variants per output; and in each comparison `noise_multiple`.
        variants: Name of each variant, and the function that runs a case in it.
        reference: Source model as it is compared with the candidate.
        cases: A few natural cases.
    """
    noise = {"max_abs_diff": 0.0, "rel_l2": 0.0}
    scales = metrics.scales_of(measurements.comparisons)
    floors: dict[str, dict[str, float]] = {}
    answers = [reference(case.inputs) for case in cases]
    for name, run in variants.items():
        noise[f"rel_l2 ({name})"] = 0.0
        for case, expected in zip(cases, answers, strict=True):
            try:
                actual = run(case)
            except MemoryError:
                raise
            # Not every model runs in another precision, or one row at a time.
            except Exception as error:  # noqa: BLE001
                measurements.notes.append(
                    f"The noise of the source model was not measured ({name}): {type(error).__name__}: "
                    f"{first_line(error)}."
                )
                del noise[f"rel_l2 ({name})"]
                break
            rows = [row for output in expected for row in _rows(case, output, expected[output], actual[output])]
            metrics.relate_to_scale(rows, scales)
            for row in rows:
                _raise_floor(floors, row)
                noise["max_abs_diff"] = max(noise["max_abs_diff"], row["max_abs_diff"])
                noise["rel_l2"] = max(noise["rel_l2"], row["rel_l2"])
                noise[f"rel_l2 ({name})"] = max(noise[f"rel_l2 ({name})"], row["rel_l2"])
    # rel_l2 is infinite if the source model answers exact zeros; a multiple of that says nothing.
    measurements.noise |= {name: value for name, value in noise.items() if np.isfinite(value)}
    measurements.floors |= floors
    for row in measurements.comparisons:
        floor_rel_l2 = floors.get(row["output"], {}).get("rel_l2", 0.0)
        row["noise_multiple"] = row["rel_l2"] / floor_rel_l2 if floor_rel_l2 > 0.0 else None


def measure_grid(
    measurements: Measurements,
    rounded: Model,
    reference: Model,
    *,
    outputs: Sequence[TensorRecord],
    decisions: Decisions,
    cases: Sequence[Case],
) -> None:
    """Measure what a coarse grid of numbers alone does to the source model's answers and decisions.

    Args:
        measurements: Gets `grid`: the figures of the rounded model, compared with the source model; and
            `grid_floors`: its largest differences, per output.
        rounded: Source model with rounded weights and inputs of its layers.
        reference: Source model as it is compared with the candidate.
        outputs: Records of the outputs.
        decisions: Collects the decisions of the rounded model.
        cases: Natural cases, and those that repeat special tokens.
    """
    grid, tendencies = Measurements(), Tendencies()
    for case in cases:
        expected, actual = reference(case.inputs), rounded(case.inputs)
        for record in outputs:
            grid.comparisons += compared_rows(case, record, expected[record.name], actual[record.name], "")
        if case.family == "agreement":
            decisions.add(case, expected, actual)
            tendencies.add(case, outputs, expected, actual)
    metrics.relate_to_scale(grid.comparisons, metrics.scales_of(grid.comparisons))
    grid.rates.extend((*decisions.rates(), *decisions.scores.rates()))
    grid.scalars |= decisions.scalars() | decisions.scores.scalars() | tendencies.scalars(grid.comparisons)
    measurements.grid = grid.figures()
    for row in grid.comparisons:
        _raise_floor(measurements.grid_floors, row)
    share = measurements.scalars.pop("response_share", 0.0)
    least_share = _LEAST_RESPONSE * measurements.grid.get("typical_error", 0.0)
    if share < least_share and measurements.scalars.pop("response_error", None) is not None:
        measurements.notes.append(
            "response_error was not judged: the source model's answers differ by less between examples than the "
            "numbers of int8."
        )


@contextmanager
def rounded_to(model: Any, precision: Precision) -> Iterator[None]:
    """Round the numbers of a model to the format of a precision while the block runs."""
    import torch

    if precision.is_integer:
        with _rounded_to_integers(model, precision):
            yield
    else:
        with _rounded_to_type(model, {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[precision]):
            yield


@contextmanager
def _rounded_to_type(model: Any, dtype: Any) -> Iterator[None]:
    """Round the parameters, inputs and outputs of the innermost modules to a floating-point type.

    Products are summed in fp32, as CPUs do. The parameters are rounded when a module is called, so that memory
    never holds the model twice.
    """
    import torch

    plain_parameters: dict[Any, dict[str, Any]] = {}

    def rounded(value: Any) -> Any:
        is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype).to(value.dtype) if is_real else value

    def round_module(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        parameters = dict(module.named_parameters(recurse=False))
        plain_parameters[module] = {name: parameter.data for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.data = rounded(parameter.data)
        return tuple(map(rounded, arguments))

    def restore(module: Any, _: Any, output: Any) -> Any:
        for name, values in plain_parameters.pop(module).items():
            getattr(module, name).data = values
        return tuple(map(rounded, output)) if type(output) is tuple else rounded(output)

    handles = []
    for module in model.modules():
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(round_module))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded_to_integers(model: Any, precision: Precision) -> Iterator[None]:
    """Round the weights and the inputs of a model's layers to the grid of int8 or int4 while the block runs.

    Weights get 63 steps up to the largest one of each output channel, inputs 255 steps from the smallest to the
    largest one in the call, as dynamic quantization does. At int4, weights get 7 steps up to the largest one of
    each group, except those of embeddings and of the last layer. The weights are rounded when a layer is called,
    so that memory never holds the model twice.
    """
    import torch

    plain_weights: dict[Any, Any] = {}
    find_last = getattr(model, "get_output_embeddings", lambda: None)
    last_layer = find_last()

    def round_layer(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        plain_weights[layer] = weight = layer.weight.data
        is_coarse = precision is Precision.INT4 and type(layer) is torch.nn.Linear and layer is not last_layer
        layer.weight.data = _on_grid(weight, 4, _GROUP_SIZE) if is_coarse else _on_grid(weight, _WEIGHT_BITS)
        if isinstance(layer, torch.nn.Embedding) or not arguments:
            return None
        values = arguments[0]
        span = values.max().clamp_min(0) - values.min().clamp_max(0)
        step = (span / (2**_INPUT_BITS - 1)).clamp_min(_TINY)
        return (torch.round(values / step) * step, *arguments[1:])

    def restore(layer: Any, *_: Any) -> None:
        layer.weight.data = plain_weights.pop(layer)

    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding)
    handles = []
    for layer in model.modules():
        if isinstance(layer, layers):
            handles.append(layer.register_forward_pre_hook(round_layer))
            handles.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_grid(weight: Any, bits: int, group_size: int = 0) -> Any:
    """Round a weight to so many bits, with one scale for each channel, or for each group of a channel."""
    rows = weight.flatten(1)
    if group_size and rows.shape[1] % group_size == 0:
        rows = rows.reshape(-1, group_size)
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / step.clamp_min(_TINY)).round() * step).reshape(weight.shape)


def _raise_floor(floors: dict[str, dict[str, float]], row: Mapping[str, Any]) -> None:
    """Let the floor of a row's output be at least the row's differences."""
    floor = floors.setdefault(row["output"], dict.fromkeys(_DIFFERENCES, 0.0))
    floor |= {key: max(floor[key], row[key]) for key in _DIFFERENCES if np.isfinite(row[key])}


def _rows(case: Case, output: str, expected: Any, actual: Any) -> list[dict[str, Any]]:
    """Compare one output row by row, without padding."""
    mask = case.mask.astype(bool)
    if expected.shape != actual.shape or len(expected) != len(mask):
        return [{"output": output} | metrics.compare(expected, actual)]
    is_masked = expected.shape[: mask.ndim] == mask.shape
    return [
        {"output": output}
        | metrics.compare(*(values[row][mask[row]] if is_masked else values[row] for values in (expected, actual)))
        for row in range(len(mask))
    ]
