"""Every shape and every token: a fault at one shape, one length or one token of the vocabulary shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.validation.cases.shapes import audio_shapes, image_shapes, text_shapes
from compileflow.validation.evidence import Draw, Evidence, gather_evidence
from compileflow.validation.judge import judge
from compileflow.validation.measure import Coverage, Measurements, measure
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.settings import ValidationSettings
from tests import models
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import Proof, validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

CLASSIFY = HfTask.TEXT_CLASSIFICATION
LIMIT = 1e-4
Model = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Long:
    """A small classifier of 512 tokens, the evidence for a dynamic graph, and the answers of the source model."""

    source_model: SourceModel
    record: ComponentRecord
    evidence: Evidence
    reference: Model

    def measured(self, candidate: Model) -> Measurements:
        """Compare a candidate with the source model on all cases, and probe it."""
        measurements = measure(
            self.reference,
            candidate,
            outputs=self.source_model.outputs,
            decisions=Decisions(CLASSIFY, labels={}, multi_label=False),
            cases=self.evidence.generated + self.evidence.natural + [self.evidence.timed(8, 128)],
            coverage=Coverage(self.record, self.evidence.shapes, self.source_model.tokens),
            progress=lambda _: None,
        )
        for probe in self.evidence.probes:
            probe(measurements, self.reference, candidate)
        return measurements

    def error(self, candidate: Model) -> float:
        """Return the largest rel_l2 of all cases."""
        return max(float(row["rel_l2"]) for row in self.measured(candidate).comparisons)


def _record(source_model: SourceModel, **fields: Any) -> ComponentRecord:
    return ComponentRecord(
        folder="components/default",
        inputs=source_model.inputs,
        outputs=source_model.outputs,
        output_class=source_model.output_class,
        vocab_size=source_model.vocab_size,
        **{"max_sequence_length": 512, "dynamic_axes": True} | fields,
    )


def _evidence(source_dir: Path, source_model: SourceModel, record: ComponentRecord, **fields: Any) -> Evidence:
    draw = Draw(seed=fields.pop("seed", 1), tokens=source_model.tokens, most_ids=fields.pop("most_ids", 10**6))
    spec = CompileSpec(target="onnx-runtime", hf_task=CLASSIFY, components=(ComponentSpec(),), **fields)
    settings = ValidationSettings(max_examples=16)
    return gather_evidence(source_dir, spec, record, settings, labels={}, draw=draw, trust_remote_code=False)


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "MAX_TOKENS", 512)
        return models.build_model(tmp_path_factory.mktemp("source") / "long", CLASSIFY)


@pytest.fixture(scope="module")
def long(long_dir: Path) -> Long:
    source_model = load_source_model(long_dir, CLASSIFY, trust_remote_code=False)
    record = _record(source_model)
    answers: dict[bytes, Arrays] = {}

    def reference(inputs: Arrays) -> Arrays:
        key = b"".join(f"{name} {value.shape}".encode() + value.tobytes() for name, value in inputs.items())
        if key not in answers:
            answers[key] = source_model.run(inputs)
        return answers[key]

    return Long(source_model, record, _evidence(long_dir, source_model, record), reference)


def test_a_faultless_model_has_no_difference_and_every_shape_and_token_counts(long: Long) -> None:
    measurements = long.measured(long.reference)
    assert max(row["rel_l2"] for row in measurements.comparisons) == 0.0
    assert measurements.scalars["shapes_left_out"] == 0.0
    assert [(covered.subject, covered.count == covered.total) for covered in measurements.coverage] == [
        ("shapes compared", True),
        ("token ids read", True),
    ]
    figures = measurements.figures()
    assert figures["shapes_compared"] == figures["shapes_compared_of"] == len(long.evidence.shapes)
    assert figures["token_ids_read"] == len(long.source_model.tokens.text_ids())


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (9, 1),
        (2, 257),
        (3, 129),
        (33, 1),
        (32, 100),
        (33, 257),
        (8, 200),
        (9, 300),
        (2, 512),
        (1, 512),
        (1, 1),
        (41, 1),
    ],
)
def test_a_fault_from_some_rows_and_some_tokens_on_shows(long: Long, rows: int, length: int) -> None:
    def faulty(inputs: Arrays) -> Arrays:
        answer = long.reference(inputs)
        shape = inputs["input_ids"].shape
        sign = -1 if shape[0] >= rows and shape[1] >= length else 1
        return {name: sign * value for name, value in answer.items()}

    assert long.error(faulty) > LIMIT


@pytest.mark.parametrize("rows", [5, 16, 27, 64])
def test_a_fault_at_one_batch_size_alone_shows(long: Long, rows: int) -> None:
    def faulty(inputs: Arrays) -> Arrays:
        sign = -1 if inputs["input_ids"].shape[0] == rows else 1
        return {name: sign * value for name, value in long.reference(inputs).items()}

    assert long.error(faulty) > LIMIT


@pytest.mark.parametrize("shape", [(3, 129), (9, 129), (1, 257), (33, 257), (8, 128)])
def test_a_fault_at_one_shape_alone_shows(long: Long, shape: tuple[int, int]) -> None:
    def faulty(inputs: Arrays) -> Arrays:
        answer = long.reference(inputs)
        is_hit = inputs["input_ids"].shape == shape
        return {name: np.zeros_like(value) if is_hit else value for name, value in answer.items()}

    assert long.error(faulty) > LIMIT


@pytest.mark.parametrize("length", [129, 257, 500])
def test_a_mask_that_is_ignored_in_long_rows_shows(long: Long, length: int) -> None:
    def faulty(inputs: Arrays) -> Arrays:
        if inputs["input_ids"].shape[1] < length or "attention_mask" not in inputs:
            return long.reference(inputs)
        return long.reference(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})

    assert long.measured(faulty).scalars["mask_leak"] > LIMIT


@pytest.mark.parametrize("position", [64, 200])
def test_token_types_that_are_ignored_at_late_positions_show(long: Long, position: int) -> None:
    def faulty(inputs: Arrays) -> Arrays:
        types = inputs.get("token_type_ids")
        if types is None:
            return long.reference(inputs)
        types = types.copy()
        types[:, position:] = 0
        return long.reference(inputs | {"token_type_ids": types})

    assert long.measured(faulty).scalars["token_type_error"] > 0.5


def test_one_token_of_the_vocabulary_that_no_natural_text_reads_shows(long: Long, long_dir: Path) -> None:
    natural_ids = np.unique(np.concatenate([case.inputs["input_ids"].ravel() for case in long.evidence.natural]))
    token_id = next(number for number in range(5, 600) if number not in natural_ids)
    faulty = load_source_model(long_dir, CLASSIFY, trust_remote_code=False)
    with torch.no_grad():
        faulty.model.get_input_embeddings().weight[token_id] = 0

    def candidate(inputs: Arrays) -> Arrays:
        has_token = (inputs["input_ids"] == token_id).any()
        return faulty.run(inputs) if has_token else long.reference(inputs)

    assert long.error(candidate) > LIMIT


def test_a_model_that_knows_the_inputs_of_another_artifact_by_heart_shows(long: Long, long_dir: Path) -> None:
    seen: set[bytes] = set()

    def spy(inputs: Arrays) -> Arrays:
        seen.update(row.tobytes() for row in inputs["input_ids"])
        return long.reference(inputs)

    other = replace(long, evidence=_evidence(long_dir, long.source_model, long.record, seed=2))
    assert other.error(spy) == 0.0

    def memorised(inputs: Arrays) -> Arrays:
        known = np.array([row.tobytes() in seen for row in inputs["input_ids"]])
        return {name: np.where(known[:, None], value, -value) for name, value in long.reference(inputs).items()}

    assert other.error(memorised) == 0.0
    assert long.error(memorised) > LIMIT


def test_int8_is_compared_on_natural_text_only_and_must_answer_to_every_token(long: Long, long_dir: Path) -> None:
    evidence = _evidence(long_dir, long.source_model, long.record, precision=Precision.INT8)
    natural_ids = {int(number) for case in evidence.natural for number in np.unique(case.inputs["input_ids"])}
    for case in evidence.generated:
        if case.family in ("shape", "drawn"):
            assert set(np.unique(case.inputs["input_ids"]).tolist()) <= natural_ids | {0}
    assert all(case.answers_only for case in evidence.generated if case.family == "vocabulary")
    coarse = replace(long, evidence=evidence)
    rare_id = next(number for number in range(5, 600) if number not in natural_ids)

    def overflowing(inputs: Arrays) -> Arrays:
        has_id = (inputs["input_ids"] == rare_id).any(axis=1)[:, None]
        return {name: np.where(has_id, np.nan, value) for name, value in long.reference(inputs).items()}

    measurements = coarse.measured(overflowing)
    assert max(row["candidate_nonfinite_count"] for row in measurements.comparisons) > 0
    assert measurements.figures()["token_ids_read"] == len(long.source_model.tokens.text_ids())
    assert coarse.error(long.reference) == 0.0


def test_a_large_model_reads_a_part_of_its_vocabulary_and_the_figures_say_so(long: Long, long_dir: Path) -> None:
    record = _record(long.source_model, max_sequence_length=4)
    evidence = _evidence(long_dir, long.source_model, record, most_ids=300)
    small = replace(long, record=record, evidence=evidence)
    figures = small.measured(long.reference).figures()
    assert 300 <= figures["token_ids_read"] < figures["token_ids_read_of"]


def test_a_bucket_that_was_not_compared_is_an_error(long: Long, long_dir: Path) -> None:
    buckets = tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in ((1, 16), (8, 64)))
    record = _record(long.source_model, dynamic_axes=False, shape_buckets=buckets, max_sequence_length=64)
    static = replace(long, record=record, evidence=_evidence(long_dir, long.source_model, record))
    measurements = static.measured(long.reference)
    assert measurements.scalars["shapes_left_out"] == 0.0
    measurements.scalars |= {"shapes_left_out": 1.0, "repeat_error": 0.0}
    verdict = judge(measurements, precision=Precision.FP32, hf_task=CLASSIFY)
    assert verdict.outcome == "error"
    assert verdict.reason.startswith("error: every_shape measured 1")


def test_each_bucket_is_met_with_full_rows_ragged_rows_and_both_token_types(long: Long, long_dir: Path) -> None:
    shapes = ((1, 16), (8, 16), (2, 64))
    buckets = tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in shapes)
    record = _record(long.source_model, dynamic_axes=False, shape_buckets=buckets, max_sequence_length=64)
    cases = _evidence(long_dir, long.source_model, record).generated
    for shape in shapes:
        met = [case.inputs for case in cases if case.family == "shape" and case.inputs["input_ids"].shape == shape]
        assert any(inputs["attention_mask"].all() for inputs in met)
        assert any((inputs["attention_mask"].sum(axis=1) < shape[1]).any() for inputs in met)
        assert any(set(inputs["token_type_ids"][0]) == {0, 1} for inputs in met)


def _signals(axes: tuple[Any, ...], **fields: Any) -> ComponentRecord:
    return ComponentRecord(
        folder="components/default",
        inputs=(TensorRecord(name="values", dtype="float32", axes=axes),),
        outputs=(TensorRecord(name="logits", dtype="float32", axes=("batch", 3)),),
        output_class="module:Class",
        **{"max_sequence_length": 1, "dynamic_axes": True} | fields,
    )


def test_grids_stay_within_the_memory_that_a_call_may_take() -> None:
    images = _signals(("batch", 3, 224, 224))
    assert image_shapes(images, 3 * 224 * 224)[-1] == (33, 1)
    assert image_shapes(images, 3 * 800 * 1333)[-1] == (8, 1)
    audio = _signals(("batch", "sequence"), max_sequence_length=480_000)
    assert (33, 4000) in audio_shapes(audio, 400, 16_000)
    assert max(rows * length for rows, length in audio_shapes(audio, 400, 16_000)) <= 240_000
    words = TensorRecord(name="logits", dtype="float32", axes=("batch", "sequence", 30_522))
    text = _signals(("batch", "sequence"), max_sequence_length=8192).model_copy(update={"outputs": (words,)})
    assert max(rows * length for rows, length in text_shapes(text, 3) if rows > 1) * 30_522 <= 40_000_000


def test_a_maximum_below_the_shortest_row_gives_shapes_of_that_length() -> None:
    record = _signals(("batch", "sequence"), max_sequence_length=2)
    assert {length for _, length in text_shapes(record, 2)} == {2}


class FaultyRunner:
    """Stands before the runner of a compiled component and spoils its answers."""

    def __init__(self, runner: Any, fault: Callable[[Mapping[str, Any], Arrays], Arrays]):
        self._runner = runner
        self._fault = fault

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        return self._fault(inputs, self._runner.run(inputs))

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def prove(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Proof]:
    """Prove a compile for TorchScript whose runner has a fault."""
    source_dir = tiny_model(CLASSIFY)

    def run(fault: Callable[[Mapping[str, Any], Arrays], Arrays]) -> Proof:
        folder = tmp_path / "artifact"
        artifact_dir = in_process.compile(source_dir, folder, target="torchscript", hf_task=CLASSIFY)
        load = OpenArtifact.load
        monkeypatch.setattr(OpenArtifact, "load", lambda self, *a, **k: FaultyRunner(load(self, *a, **k), fault))
        return validate_here(source_dir, artifact_dir, tmp_path / "report", max_examples=10)

    return run


def test_a_bucket_that_answers_zeros_fails_and_the_report_counts_the_buckets(
    prove: Callable[..., Proof], tmp_path: Path
) -> None:
    def zeros(inputs: Mapping[str, Any], answer: Arrays) -> Arrays:
        is_hit = inputs["input_ids"].shape == (8, 64)
        return {name: value * 0 if is_hit else value for name, value in answer.items()}

    proof = prove(zeros)
    assert proof.reason.startswith("fail: max_abs_diff"), proof.reason
    assert (proof.report["figures"]["buckets_compared"], proof.report["figures"]["buckets_compared_of"]) == (2, 2)
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "buckets compared: 2 of 2" in page
    assert "token ids read: 595 of 595" in page


def test_noise_of_each_call_is_blamed_on_repeatability(prove: Callable[..., Proof]) -> None:
    random = np.random.default_rng(0)

    def noisy(_: Mapping[str, Any], answer: Arrays) -> Arrays:
        noise = 1e-3 * random.standard_normal(answer["logits"].shape, dtype=np.float32)
        return {"logits": answer["logits"] + noise}

    proof = prove(noisy)
    assert proof.reason.startswith("fail: repeatable measured"), proof.reason


def test_an_answer_that_depends_on_the_call_before_is_blamed_on_repeatability(
    prove: Callable[..., Proof],
) -> None:
    last = [np.float32(0)]

    def stateful(_: Mapping[str, Any], answer: Arrays) -> Arrays:
        before, last[0] = last[0], np.float32(answer["logits"].mean())
        return {"logits": answer["logits"] + np.float32(0.05) * before}

    proof = prove(stateful)
    assert proof.reason.startswith("fail: repeatable measured"), proof.reason
