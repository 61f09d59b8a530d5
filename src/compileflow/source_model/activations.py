"""Activations that the files of sentence-transformers name: the usual ones with NumPy, all others with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.errors import LoadError, MissingPackageError

Floats = NDArray[np.float32]

_USUAL: Mapping[str, Callable[[Floats], Floats]] = {
    "Identity": lambda values: values,
    "ReLU": lambda values: np.maximum(values, 0),
    # exp of large numbers overflows to infinity, whose inverse is the right answer.
    "Sigmoid": lambda values: np.asarray(1 / (1 + np.exp(-values)), dtype=np.float32),
    "Tanh": np.tanh,
}


@dataclass(frozen=True)
class Activation:
    """An activation of torch.nn without weights.

    Attributes:
        name: Name of the class.
        module: The module; None for activations that NumPy computes.
    """

    name: str
    module: Any = field(default=None, repr=False, compare=False)

    def __call__(self, values: Floats) -> Floats:
        """Apply the activation to an array; the last axis holds the numbers of one text."""
        if self.module is not None:
            # Some activations read the axis of texts.
            return in_torch(self.module, np.atleast_2d(values)).reshape(values.shape)
        with np.errstate(over="ignore"):
            return _USUAL[self.name](values)


def in_torch(function: Callable[[Any], Any], values: Floats) -> Floats:
    """Apply a function of tensors to an array.

    Raises:
        MissingPackageError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            "A function of tensors needs torch, which is not installed.",
            hint="Run: pip install 'compileflow[hf]'.",
        ) from error
    with torch.inference_mode():
        return np.asarray(function(torch.from_numpy(np.ascontiguousarray(values))).float().numpy())


def softmax(logits: Floats) -> Floats:
    """Return probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def activation_function(path: str, place: str) -> Activation:
    """Return an activation of torch.nn by its path, as sentence-transformers writes it.

    Raises:
        LoadError: The path names another class, or an activation with weights.
        MissingPackageError: The activation needs torch, which is not installed.
    """
    name = path.rpartition(".")[2] if path.startswith("torch.nn.") else ""
    if name in _USUAL:
        return Activation(name)
    module = _module(name, place) if name else None
    if module is None:
        raise LoadError(
            f"{place} has the activation {path!r}; expected one of torch.nn without weights.",
            hint="Compile for another task, and use sentence-transformers for the rest.",
        )
    return Activation(name, module)


def _module(name: str, place: str) -> Any:
    """Return a module of torch.nn without weights; None if there is none of that name."""
    try:
        from torch import nn
    except ImportError as error:
        raise MissingPackageError(
            f"{place} has the activation {name}, which needs torch.", hint="Run: pip install 'compileflow[hf]'."
        ) from error
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    try:
        module = kind()
    except TypeError:
        return None
    return None if module.state_dict() else module.eval()
