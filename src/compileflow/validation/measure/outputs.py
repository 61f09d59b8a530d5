"""Measure a compiled model against its source model: numbers only, no judgement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.errors import MeasurementError
from compileflow.validation.measure import metrics
from compileflow.validation.cases.text import Case, CaseBuilder
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.latency import Latency, time_pairs

Model = Callable[[Arrays], Arrays]

# Below this share of the output, switching the token types changes too little to be measured.
_LEAST_RESPONSE = 1e-3


@dataclass
class Measurements:
    """Everything that was measured.

    Attributes:
        comparisons: One row an example and output: `metrics.compare` with case, family, output and text.
        rates: One row an example and metric: `metric`, `hits`, `trials`.
        scalars: One number a metric.
        noise: The source model's own noise: `max_abs_diff` and `rel_l2` between runs that should be equal.
        latencies: Paired timings, the first of them the headline.
    """

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    latencies: list[Latency] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the few numbers that a registry keeps."""
        found = dict(self.scalars)
        for name in ("max_abs_diff", "rel_l2", "one_minus_cosine"):
            values = [float(row[name]) for row in self.comparisons]
            if values and np.isfinite(values).all():
                found[name] = max(values)
        for metric in sorted({row["metric"] for row in self.rates}):
            rows = [row for row in self.rates if row["metric"] == metric]
            found[metric] = sum(row["hits"] for row in rows) / sum(row["trials"] for row in rows)
        if self.latencies:
            headline = asdict(self.latencies[0])
            found |= {f"latency_{name}": value for name, value in headline.items() if name != "shape"}
        return {name: value for name, value in found.items() if np.isfinite(value)}


def measure(
    reference: Model,
    candidate: Model,
    *,
    outputs: Sequence[TensorRecord],
    decisions: Decisions,
    cases: Sequence[Case],
    progress: Callable[[str], None],
) -> Measurements:
    """Run both models on every case and compare output by output, example by example.

    Raises:
        MeasurementError: the source model itself fails or answers NaN or infinity, or a case has no example.
    """
    found = Measurements()
    for number, case in enumerate(cases):
        if number % 10 == 0:
            progress(f"comparing case {number + 1} of {len(cases)}: {case.name}")
        expected = _reference_answer(reference, case)
        actual, trouble = candidate_answer(candidate, case.inputs)
        for record in outputs:
            _compare_output(found, case, record, expected[record.name], actual.get(record.name), trouble)
        if case.family == "agreement" and not trouble:
            decisions.add(case, expected, actual)
    if not any(case.family == "agreement" for case in cases):
        raise MeasurementError("There is no natural example.", hint="Give some, one a line.")
    found.rates.extend(decisions.rates())
    found.scalars.update(decisions.scalars())
    return found


def measure_mask(
    found: Measurements, reference: Model, candidate: Model, builder: CaseBuilder, texts: list[str]
) -> None:
    """Measure how much masked-out tokens change the rest: padding against other tokens in the same places.

    `mask_leak` is the candidate's rel_l2 between the two, less the reference's own; NaN when the candidate
    answers no finite numbers.
    """
    spare = min(4, builder.max_length - 1)
    rows = [builder.encode(text, max_length=builder.max_length - spare) for text in texts]
    inputs = {
        name: np.pad(
            value, ((0, 0), (0, spare)), constant_values=builder.pad_token_id if name == "input_ids" else 0
        )
        for name, value in builder.collate(rows).items()
    }
    kept = inputs["attention_mask"].astype(bool)
    # A real token in a masked place: whoever looks there answers differently.
    stranger = inputs["input_ids"][0, kept[0].sum() // 2]
    strange = inputs | {"input_ids": np.where(kept, inputs["input_ids"], stranger)}
    one, two = (candidate_answer(candidate, each)[0] for each in (inputs, strange))
    leak = _change(one, two, kept) - _change(reference(inputs), reference(strange), kept)
    found.scalars["mask_leak"] = max(0.0, leak) if np.isfinite(leak) else float("nan")


def measure_token_types(
    found: Measurements, reference: Model, candidate: Model, builder: CaseBuilder, texts: list[str]
) -> None:
    """Measure whether token types change the candidate as they change the reference.

    `token_type_error` = |1 - <dc, dr> / <dr, dr>|, where d is the answer with token types less the one
    without: 1 when the candidate ignores them, NaN when it does not answer. Rounding, which points anywhere,
    hardly counts in it, however small the response. Left out, with a note, when the source model hardly
    responds.
    """
    if "token_type_ids" not in builder.input_names:
        return
    longest = min(64, builder.max_length)
    length = max((edge for edge in builder.edges if edge <= longest), default=min(builder.max_length, 32))
    stream = " ".join(texts)
    row = builder.encode(stream, max_length=length)
    size = len(row["input_ids"])
    with_types = builder.collate([row | {"token_type_ids": [0] * (size // 2) + [1] * (size - size // 2)}])
    without = with_types | {"token_type_ids": np.zeros_like(with_types["token_type_ids"])}
    before, before_without = reference(with_types), reference(without)
    after, after_without = (candidate_answer(candidate, each)[0] for each in (with_types, without))
    errors = []
    for name, value in before.items():
        expected = np.asarray(value, np.float64) - before_without[name]
        if np.linalg.norm(expected) < _LEAST_RESPONSE * np.linalg.norm(before_without[name]):
            continue
        if any(name not in each or each[name].shape != value.shape for each in (after, after_without)):
            errors.append(float("nan"))
        else:
            actual = np.asarray(after[name], np.float64) - after_without[name]
            errors.append(abs(1.0 - float(np.vdot(expected, actual) / np.vdot(expected, expected))))
    if errors:
        found.scalars["token_type_error"] = float(np.max(errors))
    else:
        found.notes.append("token_types_respected was not judged: the source model hardly responds to them.")


def measure_padding(found: Measurements, reference: Model, candidate: Model, case: Case) -> None:
    """Measure how much of a signal's padding is heard: silence against noise where the mask says nothing is.

    `mask_leak` as in `measure_mask`, over a batch of signals of different lengths.
    """
    inputs = case.inputs
    counted = inputs["attention_mask"].astype(bool)
    name = next(name for name in inputs if name != "attention_mask")
    noise = np.random.default_rng(5).standard_normal(inputs[name].shape, dtype=np.float32)
    heard = counted.reshape(*counted.shape, *[1] * (noise.ndim - 2))
    strange = inputs | {name: np.where(heard, inputs[name], noise)}
    kept = case.mask.astype(bool)
    one, two = (candidate_answer(candidate, each)[0] for each in (inputs, strange))
    leak = _change(one, two, kept) - _change(reference(inputs), reference(strange), kept)
    found.scalars["mask_leak"] = max(0.0, leak) if np.isfinite(leak) else float("nan")


def measure_noise(
    found: Measurements,
    variants: dict[str, Callable[[Case], Arrays]],
    reference: Model,
    cases: Sequence[Case],
) -> None:
    """Measure how far the source model is from itself: other precision, other batch, other thread count.

    Args:
        found: Gets `noise`, the worst of all variants, and each variant's rel_l2 as `rel_l2 (name)`.
        variants: Name to a run of the same case in another way.
        reference: The source model as it is compared with.
        cases: A few natural cases.
    """
    worst = {"max_abs_diff": 0.0, "rel_l2": 0.0}
    for name, run in variants.items():
        each = 0.0
        for case in cases:
            expected, actual = reference(case.inputs), run(case)
            kept = case.mask.astype(bool)
            for output in expected:
                row = metrics.compare(_kept(expected[output], kept), _kept(actual[output], kept))
                each = max(each, float(row["rel_l2"]))
                worst["max_abs_diff"] = max(worst["max_abs_diff"], float(row["max_abs_diff"]))
        worst["rel_l2"] = max(worst["rel_l2"], each)
        worst[f"rel_l2 ({name})"] = each
    # Infinite where the source model answers exact zeros; there is no multiple of that.
    found.noise |= {name: value for name, value in worst.items() if np.isfinite(value)}


def measure_latency(
    found: Measurements,
    reference: Model,
    candidate: Model,
    timed: Callable[[int, int], Arrays],
    *,
    shapes: Sequence[tuple[int, int]],
    pairs: int,
) -> None:
    """Time both models at each shape, (batch size, length); one without an answer becomes a note."""
    for batch_size, length in shapes:
        inputs = timed(batch_size, length)
        # The examples may be too short for it.
        shape = f"{batch_size} x {inputs['input_ids'].shape[1] if 'input_ids' in inputs else length}"
        trouble = candidate_answer(candidate, inputs)[1]
        if trouble:
            found.notes.append(f"{shape} was not timed: {trouble}")
            continue
        found.latencies.append(
            time_pairs(
                shape,
                partial(reference, inputs),
                partial(candidate, inputs),
                pairs=pairs,
                budget_s=8.0,
            )
        )
    if found.latencies:
        found.scalars["latency_ratio"] = found.latencies[0].ratio


def _change(before: Arrays, after: Arrays, kept: Any) -> float:
    """Return the worst output's rel_l2 where tokens count; NaN where one is NaN, or an answer is missing."""
    if not before or before.keys() != after.keys():
        return float("nan")
    # numpy's maximum, unlike max(), never drops a NaN.
    return float(np.max([metrics.rel_l2(_kept(before[n], kept), _kept(after[n], kept)) for n in before]))


def _reference_answer(reference: Model, case: Case) -> Arrays:
    try:
        return reference(case.inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise MeasurementError(
            f"The source model itself fails on the case {case.name!r}: {error}",
            hint="Check the model and its tokenizer: do they belong together?",
        ) from error


def candidate_answer(candidate: Model, inputs: Arrays) -> tuple[Arrays, str]:
    """A candidate that raises has answered wrongly; the words go into the report."""
    try:
        return candidate(inputs), ""
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - runtimes' own errors have no common base but this
        return {}, f"{type(error).__name__}: {error}"


def _compare_output(
    found: Measurements, case: Case, record: TensorRecord, expected: Any, actual: Any, trouble: str
) -> None:
    if not np.isfinite(expected[_real(record, case)]).all():
        raise MeasurementError(
            f"The source model itself answers NaN or infinity on the case {case.name!r}.",
            hint="Mend the source model first.",
        )
    for index, text in enumerate(case.texts):
        kept = case.mask[index].astype(bool)
        before = expected[index][kept] if _per_token(record) else expected[index]
        if actual is None or actual.shape != expected.shape:
            after = np.empty(0)
        else:
            after = actual[index][kept] if _per_token(record) else actual[index]
        found.comparisons.append(
            {
                "case": case.name,
                "family": case.family,
                "output": record.name,
                "text": text[:200],
                "trouble": trouble,
            }
            | metrics.compare(before, after)
        )


def _real(record: TensorRecord, case: Case) -> Any:
    return case.mask.astype(bool) if _per_token(record) else slice(None)


def _per_token(record: TensorRecord) -> bool:
    return record.axes[:2] in (("batch", "sequence"), ("batch", "frames"))


def _kept(values: Any, kept: Any) -> Any:
    return values[kept] if values.shape[: kept.ndim] == kept.shape else values
