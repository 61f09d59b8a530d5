"""Evidence: everything that one component is measured on, for text, images or audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.source_model.processor import load_processor
from compileflow.spec import CompileSpec, HfTask
from compileflow.validation.cases import (
    Case,
    CaseBuilder,
    SignalCases,
    agreement_cases,
    load_examples,
    load_signals,
    shape_cases,
)
from compileflow.validation.cases.image_text import LABELS, ImageTextCases
from compileflow.validation.measure import (
    Measurements,
    Model,
    measure_mask,
    measure_padding,
    measure_token_types,
)
from compileflow.validation.registered_tests import RegisteredTests
from compileflow.validation.settings import ValidationSettings

# Lengths at which the kernels of a dynamic model usually change.
_DYNAMIC_EDGES = (8, 16, 32, 64, 128, 256)
_TIMED_TEXT = ((1, 16), (1, 128), (8, 128))
_TIMED_IMAGES = ((1, 1), (8, 1))
_TIMED_LABELS = ((8, 16),)
_TIMED_SECONDS = ((1, 1), (1, 5))

Decode = Callable[[Sequence[int]], str]
Probe = Callable[[Measurements, Model, Model], None]


@dataclass(frozen=True)
class Evidence:
    """The inputs of one validation.

    Attributes:
        generated: Cases that natural examples do not cover.
        natural: Cases of natural examples, on which decisions are compared.
        probes: Functions that measure one property, given the measurements, the reference and the candidate.
        timed: Function from a batch size and a length to inputs for timing.
        decode: Function from token ids to text.
        tokens: Names of the classes where id2label has none, such as the characters of a speech model.
        origin: Origin of the natural examples, in words.
        examples_count: Number of natural examples.
    """

    generated: list[Case]
    natural: list[Case]
    probes: tuple[Probe, ...]
    timed: Callable[[int, int], Arrays]
    decode: Decode
    tokens: Mapping[int, str]
    origin: str
    examples_count: int


def gather_evidence(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    tests: RegisteredTests | None = None,
    *,
    trust_remote_code: bool,
) -> Evidence:
    """Build the evidence for one component; the source version's registered test inputs come first.

    Args:
        source_dir: Folder of the source model.
        spec: Specification of the artifact.
        record: Record of the component.
        validation: Settings of the validation.
        tests: Test inputs that are registered with the source version.
        trust_remote_code: Run Python files of the source model.

    Raises:
        MeasurementError: The examples cannot be used.
    """
    if spec.hf_task.modality == "image-text":
        return _image_text_evidence(source_dir, record, validation, trust_remote_code)
    if spec.hf_task.modality == "text":
        tokenizer = _tokenizer(source_dir, trust_remote_code)
        return _text_evidence(tokenizer, spec, record, validation, tests)
    return _signal_evidence(source_dir, spec, record, validation, trust_remote_code)


def timed_shapes(
    hf_task: HfTask, record: ComponentRecord, validation: ValidationSettings, *, second: int
) -> tuple[tuple[int, int], ...]:
    """Return the shapes to time, each as (batch size, length); `second` is the length of one second of audio."""
    requested_shapes = [(bucket.batch_size, bucket.sequence_length) for bucket in validation.latency_shapes]
    default = {
        "text": _TIMED_TEXT,
        "image": _TIMED_IMAGES,
        "image-text": _TIMED_LABELS,
        "audio": tuple((rows, seconds * second) for rows, seconds in _TIMED_SECONDS),
    }[hf_task.modality]
    longest = record.max_sequence_length
    return tuple(dict.fromkeys((rows, min(length, longest)) for rows, length in requested_shapes or default))


def _tokenizer(source_dir: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source_dir, local_files_only=True, trust_remote_code=trust_remote_code)


def _text_evidence(
    tokenizer: Any,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    tests: RegisteredTests | None,
) -> Evidence:
    examples, origin, _ = load_examples(spec.hf_task, validation.examples_path, validation.max_examples)
    test_examples = tests.examples(spec.hf_task) if tests else []
    if test_examples or (tests and tests.note):
        note = f" ({tests.note})" if tests and tests.note else ""
        origin = f"{len(test_examples)} test inputs of the source version{note}, and {origin}"
        examples = (test_examples + examples)[: max(validation.max_examples, len(test_examples))]
    texts = [example.get("text") or example["context"] for example in examples]
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(tensor.name for tensor in record.inputs),
        max_length=record.max_sequence_length,
        edges=tuple(sorted({bucket.sequence_length for bucket in record.shape_buckets})) or _DYNAMIC_EDGES,
        pad_token_id=record.pad_token_id,
        question=examples[0].get("question"),
        pad_left=record.padding == "left",
    )

    def mask(measurements: Measurements, reference: Model, candidate: Model) -> None:
        measure_mask(measurements, reference, candidate, builder, texts[:4])

    def token_types(measurements: Measurements, reference: Model, candidate: Model) -> None:
        measure_token_types(measurements, reference, candidate, builder, texts)

    return Evidence(
        generated=shape_cases(builder, texts),
        natural=agreement_cases(builder, examples, spec.hf_task),
        probes=(mask, token_types),
        timed=lambda rows, length: builder.collate([builder.encode(" ".join(texts), max_length=length)] * rows),
        decode=tokenizer.decode,
        tokens={},
        origin=origin,
        examples_count=len(examples),
    )


def _image_text_evidence(
    source_dir: Path, record: ComponentRecord, validation: ValidationSettings, trust_remote_code: bool
) -> Evidence:
    tokenizer = _tokenizer(source_dir, trust_remote_code)
    processor = load_processor(source_dir, "image", trust_remote_code=trust_remote_code)
    builder = ImageTextCases(tokenizer, processor, record)
    signals, origin, _ = load_signals(processor, validation.examples_path, validation.max_examples)
    return Evidence(
        generated=builder.generated(),
        natural=[builder.case(signal.name, "agreement", signal, LABELS) for signal in signals],
        probes=(),
        timed=builder.timed,
        decode=tokenizer.decode,
        tokens=dict(enumerate(LABELS)),
        origin=origin,
        examples_count=len(signals),
    )


def _signal_evidence(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    trust_remote_code: bool,
) -> Evidence:
    task = spec.hf_task
    processor = load_processor(source_dir, task.modality, trust_remote_code=trust_remote_code)
    builder = SignalCases(processor, record)
    signals, origin, _ = load_signals(processor, validation.examples_path, validation.max_examples)
    decode: Decode = lambda ids: " ".join(map(str, ids))  # noqa: E731 - a default for one field
    tokens: Mapping[int, str] = {}
    if task is HfTask.SPEECH_RECOGNITION:
        tokenizer = _tokenizer(source_dir, trust_remote_code)
        decode, tokens = tokenizer.decode, {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    short_signals = sorted(signals, key=lambda signal: signal.values.size)[:4]

    def padding(measurements: Measurements, reference: Model, candidate: Model) -> None:
        measure_padding(measurements, reference, candidate, builder.case("", "", short_signals))

    return Evidence(
        generated=builder.generated(),
        natural=builder.natural(signals),
        probes=(padding,) if any(tensor.name == "attention_mask" for tensor in record.inputs) else (),
        timed=builder.timed,
        decode=decode,
        tokens=tokens,
        origin=origin,
        examples_count=len(signals),
    )
