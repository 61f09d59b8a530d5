"""The source model, run in ways that show how much rounding alone changes its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import MeasurementError, first_line
from compileflow.serving.padding import join_rows, take_rows
from compileflow.source_model.interface import SourceModel
from compileflow.validation import measure as measuring
from compileflow.validation.cases import Case
from compileflow.validation.evidence import Evidence
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.reference_answers import ReferenceAnswers

# Natural batches, and families of generated ones, on which the source model is run with rounded numbers.
_GRID_CASES = 12
_GRID_FAMILIES = ("batch", "length", "text")


def source_function(source_model: SourceModel) -> Callable[[Arrays], Arrays]:
    """Return the source model as a function; if it fails, the error says that it was the source model."""

    def run(inputs: Arrays) -> Arrays:
        try:
            return source_model.run(inputs)
        except MemoryError:
            raise
        except Exception as error:
            rows, length = next(iter(inputs.values())).shape[:2]
            raise MeasurementError(
                f"The source model itself fails on {rows} rows of length {length}: {type(error).__name__}: "
                f"{first_line(error)}.",
                hint="Check that the model and its tokenizer belong together.",
            ) from error

    return run


def measure_rounded(
    measurements: Measurements,
    source_model: SourceModel,
    decisions: Decisions,
    evidence: Evidence,
    answers: ReferenceAnswers,
) -> None:
    """Measure the source model with numbers rounded to the precision, on natural text and generated rows."""
    precision = decisions.precision

    def rounded(inputs: Arrays) -> Arrays:
        with measuring.rounded_to(source_model.model, precision):
            return source_model.run(inputs)

    pools = (decisions.pools[0], decisions.pools[0])
    # The source model fails on some special tokens; those were left out.
    compared_names = {row["case"] for row in measurements.comparisons}
    generated = [case for case in evidence.generated if case.name in compared_names]
    special = [case for case in generated if case.family == "special"]
    # Short rows round worse than natural text. At int8, such differences only warn.
    others = [case for case in generated if case.family in _GRID_FAMILIES and not precision.is_integer]
    measuring.measure_grid(
        measurements,
        answers.remembered(rounded, f"rounded to {precision.value}"),
        answers.remembered(source_function(source_model)),
        outputs=source_model.outputs,
        decisions=Decisions(
            decisions.task,
            labels=decisions.labels,
            multi_label=decisions.multi_label,
            pools=pools,
            precision=precision,
        ),
        cases=[*evidence.natural[:: math.ceil(len(evidence.natural) / _GRID_CASES)], *others, *special],
    )
    if decisions.task.generates:
        # Rows that are read piece by piece round as whole rows do.
        floors = [floor["rel_l2"] for floor in measurements.grid_floors.values() if "rel_l2" in floor]
        measurements.grid["piece_error"] = max(floors, default=0.0)


def noise_variants(
    source_model: SourceModel, threads: int, answers: ReferenceAnswers
) -> dict[str, Callable[[Case], Arrays]]:
    """Return functions that run the source model in ways that should all give the same answer."""
    import copy

    import torch

    @cache
    def float64_model() -> Any:
        return copy.deepcopy(source_model.model).double()

    def in_float64(case: Case) -> Arrays:
        with torch.inference_mode():
            tensors = {name: torch.as_tensor(value) for name, value in case.inputs.items()}
            answer = float64_model()(
                **{
                    name: tensor.double() if tensor.is_floating_point() else tensor
                    for name, tensor in tensors.items()
                }
            )
        return {record.name: answer[record.name].numpy() for record in source_model.outputs}

    def row_by_row(case: Case) -> Arrays:
        records = [record for record in source_model.inputs if record.name in case.inputs]
        rows = [
            source_model.run(take_rows(records, case.inputs, slice(row, row + 1)))
            for row in range(len(case.texts))
        ]
        return join_rows(source_model.outputs, rows)

    def with_one_thread(case: Case) -> Arrays:
        torch.set_num_threads(1)
        try:
            return source_model.run(case.inputs)
        finally:
            torch.set_num_threads(threads)

    def with_eager_attention(case: Case) -> Arrays:
        source_model.model.set_attn_implementation("eager")
        try:
            return source_model.run(case.inputs)
        finally:
            source_model.model.set_attn_implementation(source_model.attention)

    variants: dict[str, Callable[[Case], Arrays]] = {"float64": in_float64, "row by row": row_by_row}
    if threads > 1:
        variants["one thread"] = with_one_thread
    if source_model.attention == "sdpa":
        variants["eager attention"] = with_eager_attention

    def remembered(way: str, run: Callable[[Case], Arrays]) -> Callable[[Case], Arrays]:
        return lambda case: answers.answer(case.inputs, lambda: run(case), way)

    return {way: remembered(way, run) for way, run in variants.items()}
