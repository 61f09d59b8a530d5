"""The first difference between two answers of models or pipelines, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def first_difference(candidate: Any, reference: Any, tolerance: tuple[float, float], path: str) -> str | None:
    """Return the first difference between two answers in words; None if there is none."""
    if type(candidate) is not type(reference):
        return f"{path}: expected {_described(reference)}, got {_described(candidate)}"
    if isinstance(reference, Mapping):
        if list(candidate) != list(reference):
            return f"{path}: expected the keys {list(reference)}, got {list(candidate)}"
        parts = [(f"{path}[{name!r}]", candidate[name], value) for name, value in reference.items()]
    elif isinstance(reference, list | tuple):
        if len(candidate) != len(reference):
            return f"{path}: expected {len(reference)} entries, got {len(candidate)}"
        parts = [(f"{path}[{index}]", candidate[index], value) for index, value in enumerate(reference)]
    elif hasattr(reference, "getpixel"):
        # Grey levels are rounded, and may be one apart.
        values, expected = (np.asarray(image, np.float32) for image in (candidate, reference))
        return _array_difference(values, expected, (1, 0), path)
    elif isinstance(reference, np.ndarray) or hasattr(reference, "detach"):
        return _array_difference(candidate, reference, tolerance, path)
    elif isinstance(reference, float | np.floating):
        return _array_difference(np.asarray(candidate), np.asarray(reference), tolerance, path)
    else:
        return None if candidate == reference else f"{path}: expected {reference!r}, got {candidate!r}"
    differences = (first_difference(value, expected, tolerance, place) for place, value, expected in parts)
    return next((difference for difference in differences if difference is not None), None)


def _array_difference(candidate: Any, reference: Any, tolerance: tuple[float, float], path: str) -> str | None:
    if (candidate.dtype, tuple(candidate.shape)) != (reference.dtype, tuple(reference.shape)):
        return f"{path}: expected {_described(reference)}, got {_described(candidate)}"
    values, expected = np.asarray(candidate), np.asarray(reference)
    atol, rtol = tolerance if expected.dtype.kind == "f" else (0.0, 0.0)
    close = np.isclose(values, expected, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return None
    index = tuple(int(position) for position in np.argwhere(~close)[0])
    place = f"{path}[{', '.join(map(str, index))}]" if index else path
    count = f" ({int((~close).sum())} of {close.size} elements differ)" if index else ""
    limit = f"{atol:g}" + (f" + {rtol:g} * |expected|" if rtol else "")
    return f"{place}: expected {expected[index]}, got {values[index]}, tolerance {limit}{count}"


def _described(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {value.dtype} with shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"
