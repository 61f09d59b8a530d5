"""What a component is proven on: its cases, probes and timed inputs, from text, images or audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.source_model.processor import load_processor
from compileflow.spec import CompileSpec, HfTask
from compileflow.validation.measure import outputs as measuring
from compileflow.validation.cases.text import Case, CaseBuilder, agreement_cases, load_examples, shape_cases
from compileflow.validation.measure.outputs import Measurements, Model
from compileflow.validation.registered_tests import RegisteredTests
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.cases.signals import SignalCases, load_signals

# Where a graph is dynamic, lengths at which kernels are wont to change.
_DYNAMIC_EDGES = (8, 16, 32, 64, 128, 256)
_TIMED_TEXT = ((1, 16), (1, 128), (8, 128))
_TIMED_IMAGES = ((1, 1), (8, 1))
_TIMED_SECONDS = ((1, 1), (1, 5))

Decode = Callable[[Sequence[int]], str]
Probe = Callable[[Measurements, Model, Model], None]


@dataclass(frozen=True)
class Evidence:
    """Everything that both models are asked.

    Attributes:
        generated: Cases that no natural example brings.
        natural: Natural examples, on which decisions are compared.
        probes: Measure one property each, given the measurements, the reference and the candidate.
        timed: Inputs of a batch size and a length.
        decode: Turns token ids into text.
        tokens: Names of what the graph decides between, where id2label does not say.
        origin: Where the natural examples come from.
        examples_count: How many there are.
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
) -> Evidence:
    """Build the evidence for one component; the source version's own test inputs come first."""
    if spec.hf_task.modality == "text":
        return _of_text(source_dir, spec, record, validation, tests)
    return _of_signals(source_dir, spec, record, validation)


def timed_shapes(
    hf_task: HfTask, record: ComponentRecord, validation: ValidationSettings, *, second: int
) -> tuple[tuple[int, int], ...]:
    """Return (batch size, length) of each shape that is timed; `second` is the length of a second of audio."""
    asked = [(each.batch_size, each.sequence_length) for each in validation.latency_shapes]
    usual = {
        "text": _TIMED_TEXT,
        "image": _TIMED_IMAGES,
        "audio": tuple((rows, seconds * second) for rows, seconds in _TIMED_SECONDS),
    }[hf_task.modality]
    longest = record.max_sequence_length
    return tuple(dict.fromkeys((rows, min(length, longest)) for rows, length in asked or usual))


def _tokenizer(source_dir: Path, spec: CompileSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        source_dir, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )


def _of_text(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    tests: RegisteredTests | None,
) -> Evidence:
    tokenizer = _tokenizer(source_dir, spec)
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(each.name for each in record.inputs),
        max_length=record.max_sequence_length,
        edges=tuple(sorted({b.sequence_length for b in record.shape_buckets})) or _DYNAMIC_EDGES,
        pad_token_id=record.pad_token_id,
    )
    examples, origin, _ = load_examples(spec.hf_task, validation.examples_path, validation.max_examples)
    own = tests.examples(spec.hf_task) if tests else []
    if own:
        origin = f"{len(own)} test inputs of the source version, and {origin}"
        examples = (own + examples)[: max(validation.max_examples, len(own))]
    texts = [example.get("text") or example["context"] for example in examples]

    def mask(found: Measurements, reference: Model, candidate: Model) -> None:
        measuring.measure_mask(found, reference, candidate, builder, texts[:4])

    def token_types(found: Measurements, reference: Model, candidate: Model) -> None:
        measuring.measure_token_types(found, reference, candidate, builder, texts)

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


def _of_signals(
    source_dir: Path, spec: CompileSpec, record: ComponentRecord, validation: ValidationSettings
) -> Evidence:
    task = spec.hf_task
    processor = load_processor(source_dir, task.modality, trust_remote_code=spec.trust_remote_code)
    builder = SignalCases(processor, record)
    signals, origin, _ = load_signals(processor, validation.examples_path, validation.max_examples)
    signals = sorted(signals, key=lambda signal: signal.values.size)
    batches = [signals[start : start + 8] for start in range(0, len(signals), 8)]
    decode: Decode = lambda ids: " ".join(map(str, ids))  # noqa: E731 - a default for one field
    tokens: Mapping[int, str] = {}
    if task is HfTask.SPEECH_RECOGNITION:
        tokenizer = _tokenizer(source_dir, spec)
        decode, tokens = tokenizer.decode, {n: token for token, n in tokenizer.get_vocab().items()}

    def padding(found: Measurements, reference: Model, candidate: Model) -> None:
        measuring.measure_padding(found, reference, candidate, builder.case("", "", signals[:4]))

    return Evidence(
        generated=builder.generated(),
        natural=[builder.case(f"natural batch {n + 1}", "agreement", batch) for n, batch in enumerate(batches)],
        probes=(padding,) if any(each.name == "attention_mask" for each in record.inputs) else (),
        timed=builder.timed,
        decode=decode,
        tokens=tokens,
        origin=origin,
        examples_count=len(signals),
    )
