"""Probes: inputs altered in one respect, to see whether the candidate reacts as the source model does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer

# A smaller response to token types or padding, as a share of the output, is too small to be measured.
_LEAST_RESPONSE = 1e-3
# Responses must be this many times the error that rounding to a coarse grid makes in a sum over all elements.
_SUMMED_ERRORS = 10.0
# A smaller leak is not an ignored mask.
_LEAST_LEAK = 0.01


def measure_mask(measurements: Measurements, reference: Model, candidate: Model, cases: Sequence[Case]) -> None:
    """Measure how much masked tokens change the outputs: padding against real tokens in the same places.

    `mask_leak` is the candidate's rel_l2 between the two, minus the reference's; the worst of all cases, or NaN if
    the candidate does not answer one with finite numbers. `mask_ignored` is the share of the change that the
    candidate shows, of the change that the reference shows without its mask: <dc, dr> / <dr, dr>. Rounding errors,
    which are part of `mask_leak`, point in random directions, so they hardly count.
    """
    if not cases:
        measurements.notes.append("mask_respected was not judged: rows this short have no room for padding.")
        return
    leaks: list[float] = []
    shares: list[float] = []
    for case in cases:
        mask = case.inputs["attention_mask"].astype(bool)
        # A real token in a masked place changes the answer of a model that looks there.
        row_ids = case.inputs["input_ids"][0][mask[0]]
        altered_ids = np.where(mask, case.inputs["input_ids"], row_ids[len(row_ids) // 2])
        altered_inputs = case.inputs | {"input_ids": altered_ids}
        leaks.append(_leak(reference, candidate, case.inputs, altered_inputs, mask))
        shares += _ignored_shares(
            measurements, reference, candidate, case.inputs, altered_inputs, mask, leak=leaks[-1]
        )
    measurements.scalars["mask_leak"] = float(np.max(leaks))
    measurements.scalars["mask_ignored"] = float(np.max(shares, initial=0.0))


def measure_padding(measurements: Measurements, reference: Model, candidate: Model, cases: Sequence[Case]) -> None:
    """Measure how much the padding of signals changes the outputs: silence against noise in masked places.

    `mask_leak` and `mask_ignored` as in `measure_mask`, over batches of signals of different lengths.
    """
    leaks: list[float] = []
    shares: list[float] = []
    for case in cases:
        name = next(name for name in case.inputs if name != "attention_mask")
        noise = np.random.default_rng(5).standard_normal(case.inputs[name].shape, dtype=np.float32)
        mask = case.inputs["attention_mask"].astype(bool)
        mask = mask.reshape(*mask.shape, *[1] * (noise.ndim - 2))
        altered_inputs = case.inputs | {name: np.where(mask, case.inputs[name], noise)}
        frames = case.mask.astype(bool)
        leaks.append(_leak(reference, candidate, case.inputs, altered_inputs, frames))
        shares += _ignored_shares(
            measurements, reference, candidate, case.inputs, altered_inputs, frames, leak=leaks[-1]
        )
    measurements.scalars["mask_leak"] = float(np.max(leaks))
    measurements.scalars["mask_ignored"] = float(np.max(shares, initial=0.0))


def measure_token_types(
    measurements: Measurements, reference: Model, candidate: Model, cases: Sequence[Case]
) -> None:
    """Measure whether token types change the candidate as they change the reference, in rows of several lengths.

    `token_type_error` = |1 - <dc, dr> / <dr, dr>|, where d is the answer with token types minus the answer
    without. It is 1 if the candidate ignores them, and NaN if it does not answer; the worst of all cases counts.
    Rounding errors point in random directions, so they hardly count, however small the response is. Omitted, with
    a note, if the source model hardly responds.
    """
    errors: list[float] = []
    for case in cases:
        zero_types = np.zeros_like(case.inputs["token_type_ids"])
        types = zero_types.copy()
        types[:, types.shape[1] // 2 :] = 1
        calls = [case.inputs | {"token_type_ids": values} for values in (types, zero_types)]
        errors += [
            abs(1.0 - slope)
            for slope in _slopes(measurements, [reference(inputs) for inputs in calls], candidate, calls)
        ]
    if errors:
        measurements.scalars["token_type_error"] = float(np.max(errors))
    elif cases:
        measurements.notes.append(
            "token_types_respected was not judged: the source model hardly responds to them."
        )


def _leak(reference: Model, candidate: Model, inputs: Arrays, altered_inputs: Arrays, mask: Any) -> float:
    """Return how much more the alteration changes the candidate than the reference; NaN without two answers."""
    answer, altered_answer = (candidate_answer(candidate, arrays)[0] for arrays in (inputs, altered_inputs))
    leak = _change(answer, altered_answer, mask) - _change(reference(inputs), reference(altered_inputs), mask)
    return max(0.0, leak) if np.isfinite(leak) else float("nan")


def _ignored_shares(
    measurements: Measurements,
    reference: Model,
    candidate: Model,
    inputs: Arrays,
    altered_inputs: Arrays,
    mask: Any,
    *,
    leak: float,
) -> list[float]:
    """Return how much of the change without a mask the candidate shows where the mask is true, for each output."""
    if leak < _LEAST_LEAK:
        return []
    unmasked = {"attention_mask": np.ones_like(inputs["attention_mask"])}
    calls = (altered_inputs, inputs)
    return _slopes(measurements, [reference(call | unmasked) for call in calls], candidate, calls, mask)


def _slopes(
    measurements: Measurements,
    expected_pair: Sequence[Arrays],
    candidate: Model,
    calls: Sequence[Arrays],
    mask: Any = None,
) -> list[float]:
    """Return <dc, dr> / <dr, dr> for each output that responds: d is the first answer minus the second one.

    Args:
        measurements: Measurements with the error that the candidate's number format makes, if it is a coarse one.
        expected_pair: The reference's answers.
        candidate: The compiled model.
        calls: The two calls of the compiled model.
        mask: Positions that count. None: all.
    """
    before, before_altered = expected_pair
    after, after_altered = (candidate_answer(candidate, inputs)[0] for inputs in calls)
    slopes = []
    for name, value in before.items():
        expected = _masked(np.asarray(value, np.float64) - before_altered[name], mask)
        summed_error = measurements.grid.get("typical_error", 0.0) / np.sqrt(expected.size)
        least_share = max(_LEAST_RESPONSE, _SUMMED_ERRORS * summed_error)
        if np.linalg.norm(expected) <= least_share * np.linalg.norm(_masked(before_altered[name], mask)):
            continue
        if any(name not in answer or answer[name].shape != value.shape for answer in (after, after_altered)):
            slopes.append(float("nan"))
        else:
            actual = _masked(np.asarray(after[name], np.float64) - after_altered[name], mask)
            slopes.append(float(np.vdot(expected, actual) / np.vdot(expected, expected)))
    return slopes


def _change(before: Arrays, after: Arrays, mask: Any) -> float:
    """Return the worst output's rel_l2 where the mask is true; NaN if a value is NaN or an answer is missing."""
    if not before or before.keys() != after.keys():
        return float("nan")
    # numpy's maximum, unlike max(), never drops a NaN.
    return float(
        np.max([metrics.rel_l2(_masked(before[name], mask), _masked(after[name], mask)) for name in before])
    )


def _masked(values: Any, mask: Any) -> Any:
    return values[mask] if mask is not None and values.shape[: mask.ndim] == mask.shape else values
