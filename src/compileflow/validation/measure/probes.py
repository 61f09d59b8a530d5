"""Probes: inputs altered in one respect, to see whether the candidate reacts as the source model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import first_line
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.text import CaseBuilder
from compileflow.validation.measure import metrics
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer

# A smaller response to token types, as a share of the output, is too small to be measured.
_LEAST_RESPONSE = 1e-3


def measure_mask(
    measurements: Measurements, reference: Model, candidate: Model, builder: CaseBuilder, texts: Sequence[str]
) -> None:
    """Measure how much masked tokens change the outputs: padding against real tokens in the same places.

    `mask_leak` is the candidate's rel_l2 between the two, minus the reference's; NaN if the candidate does not
    answer with finite numbers.
    """
    padding_length = min(4, builder.max_length - builder.shortest)
    if padding_length < 1:
        measurements.notes.append("mask_respected was not judged: rows this short have no room for padding.")
        return
    rows = [builder.encode(text, max_length=builder.max_length - padding_length) for text in texts]
    inputs = {
        name: np.pad(
            value,
            ((0, 0), (0, padding_length)),
            constant_values=builder.pad_token_id if name == "input_ids" else 0,
        )
        for name, value in builder.collate(rows).items()
    }
    mask = inputs["attention_mask"].astype(bool)
    # A real token in a masked place changes the answer of a model that looks there.
    token = inputs["input_ids"][0, mask[0].sum() // 2]
    altered_inputs = inputs | {"input_ids": np.where(mask, inputs["input_ids"], token)}
    _measure_leak(measurements, reference, candidate, inputs, altered_inputs, mask)


def measure_padding(measurements: Measurements, reference: Model, candidate: Model, case: Case) -> None:
    """Measure how much the padding of a signal changes the outputs: silence against noise in masked places.

    `mask_leak` as in `measure_mask`, over one batch of signals of different lengths.
    """
    inputs = case.inputs
    name = next(name for name in inputs if name != "attention_mask")
    noise = np.random.default_rng(5).standard_normal(inputs[name].shape, dtype=np.float32)
    mask = inputs["attention_mask"].astype(bool)
    mask = mask.reshape(*mask.shape, *[1] * (noise.ndim - 2))
    altered_inputs = inputs | {name: np.where(mask, inputs[name], noise)}
    _measure_leak(measurements, reference, candidate, inputs, altered_inputs, case.mask.astype(bool))


def measure_token_types(
    measurements: Measurements, reference: Model, candidate: Model, builder: CaseBuilder, texts: Sequence[str]
) -> None:
    """Measure whether token types change the candidate as they change the reference.

    `token_type_error` = |1 - <dc, dr> / <dr, dr>|, where d is the answer with token types minus the answer
    without. It is 1 if the candidate ignores them, and NaN if it does not answer. Rounding errors point in
    random directions, so they hardly count, however small the response is. Omitted, with a note, if the source
    model hardly responds.
    """
    if "token_type_ids" not in builder.input_names:
        return
    longest = min(64, builder.max_length)
    length = max((edge for edge in builder.edges if edge <= longest), default=min(builder.max_length, 32))
    row = builder.encode(" ".join(texts), max_length=length)
    size = len(row["input_ids"])
    types = [0] * (size // 2) + [1] * (size - size // 2)
    with_types = builder.collate([row | {"token_type_ids": types}])
    zero_types = with_types | {"token_type_ids": np.zeros_like(with_types["token_type_ids"])}
    before, before_without = reference(with_types), reference(zero_types)
    after, after_without = (candidate_answer(candidate, inputs)[0] for inputs in (with_types, zero_types))
    errors = []
    for name, value in before.items():
        expected = np.asarray(value, np.float64) - before_without[name]
        if np.linalg.norm(expected) < _LEAST_RESPONSE * np.linalg.norm(before_without[name]):
            continue
        if any(name not in answer or answer[name].shape != value.shape for answer in (after, after_without)):
            errors.append(float("nan"))
        else:
            actual = np.asarray(after[name], np.float64) - after_without[name]
            errors.append(abs(1.0 - float(np.vdot(expected, actual) / np.vdot(expected, expected))))
    if errors:
        measurements.scalars["token_type_error"] = float(np.max(errors))
    else:
        measurements.notes.append(
            "token_types_respected was not judged: the source model hardly responds to them."
        )


def measure_noise(
    measurements: Measurements,
    variants: dict[str, Callable[[Case], Arrays]],
    reference: Model,
    cases: Sequence[Case],
) -> None:
    """Measure how far the source model is from itself in another precision, batch or thread count.

    Args:
        measurements: Gets `noise`: the worst of all variants, and the rel_l2 of each as `rel_l2 (name)`.
        variants: Name of each variant, and the function that runs a case in it.
        reference: Source model as it is compared with the candidate.
        cases: A few natural cases.
    """
    noise = {"max_abs_diff": 0.0, "rel_l2": 0.0}
    for name, run in variants.items():
        variant_rel_l2 = 0.0
        for case in cases:
            expected = reference(case.inputs)
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
                break
            mask = case.mask.astype(bool)
            for output in expected:
                row = metrics.compare(_masked(expected[output], mask), _masked(actual[output], mask))
                variant_rel_l2 = max(variant_rel_l2, float(row["rel_l2"]))
                noise["max_abs_diff"] = max(noise["max_abs_diff"], float(row["max_abs_diff"]))
        noise["rel_l2"] = max(noise["rel_l2"], variant_rel_l2)
        noise[f"rel_l2 ({name})"] = variant_rel_l2
    # rel_l2 is infinite if the source model answers exact zeros; a multiple of that says nothing.
    measurements.noise |= {name: value for name, value in noise.items() if np.isfinite(value)}


def _measure_leak(
    measurements: Measurements,
    reference: Model,
    candidate: Model,
    inputs: Arrays,
    altered_inputs: Arrays,
    mask: Any,
) -> None:
    answer, altered_answer = (candidate_answer(candidate, arrays)[0] for arrays in (inputs, altered_inputs))
    leak = _change(answer, altered_answer, mask) - _change(reference(inputs), reference(altered_inputs), mask)
    measurements.scalars["mask_leak"] = max(0.0, leak) if np.isfinite(leak) else float("nan")


def _change(before: Arrays, after: Arrays, mask: Any) -> float:
    """Return the worst output's rel_l2 where the mask is true; NaN if a value is NaN or an answer is missing."""
    if not before or before.keys() != after.keys():
        return float("nan")
    # numpy's maximum, unlike max(), never drops a NaN.
    return float(
        np.max([metrics.rel_l2(_masked(before[name], mask), _masked(after[name], mask)) for name in before])
    )


def _masked(values: Any, mask: Any) -> Any:
    return values[mask] if values.shape[: mask.ndim] == mask.shape else values
