"""Evidence: everything that one component is measured on, for text, images or audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.errors import MeasurementError
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.lengths import call_sizes
from compileflow.source_model.processor import load_processor
from compileflow.source_model.token_rows import TokenRows
from compileflow.spec import CompileSpec, HfTask
from compileflow.validation.cases import (
    CLASS_FOLDERS,
    Case,
    CaseBuilder,
    SignalCases,
    agreement_cases,
    check_labels,
    generated_count,
    load_signals,
    note_on_count,
    note_on_fields,
    sample_examples,
    shape_cases,
    truth_of,
)
from compileflow.validation.cases.filled_rows import FilledRows, natural_ids
from compileflow.validation.cases.image_text import LABELS, ImageTextCases
from compileflow.validation.cases.labels import Searched
from compileflow.validation.cases.shapes import Shape, repeated_shapes, text_shapes
from compileflow.validation.measure import (
    Measurements,
    Model,
    measure_mask,
    measure_padding,
    measure_token_types,
)
from compileflow.validation.registered_tests import RegisteredTests
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.writing import timed_tokens

# Lengths at which the kernels of a dynamic model usually change; the grid of shapes has longer ones.
_DYNAMIC_EDGES = (8, 16, 32, 64)
_TIMED_TEXT = ((1, 16), (1, 128), (8, 128))
_TIMED_IMAGES = ((1, 1), (8, 1))
_TIMED_LABELS = ((8, 16),)
_TIMED_SECONDS = ((1, 1), (1, 5))
# Lengths of the probes of a dynamic model, as far as its maximum.
_PROBED_LENGTHS = (64, 129, 512)
# Multiplications by weights while the vocabulary is read: two minutes on two cores, for each model. A decoder also
# writes, which takes minutes more.
_MOST_VOCABULARY_WORK, _MOST_DECODER_WORK = 6e12, 1.5e12

Decode = Callable[[Sequence[int]], str]
Probe = Callable[[Measurements, Model, Model], None]


@dataclass(frozen=True)
class Draw:
    """Values from which inputs are drawn.

    Attributes:
        seed: Seed of the inputs that differ from artifact to artifact, so that no fixed set of answers passes.
        tokens: Form of the rows of a text model; None for images and audio.
        most_ids: Number of token ids that are read at most.
    """

    seed: int
    tokens: TokenRows | None
    most_ids: int


def draw_for(artifact_digest: str, source_model: SourceModel, *, generates: bool) -> Draw:
    """Return the seed of an artifact, and how many token ids a model of this size reads in bearable time.

    Args:
        artifact_digest: Digest of the artifact.
        source_model: The source model.
        generates: Whether the model is a decoder, compiled to generate text.
    """
    # The table of embeddings is read, not multiplied, but a decoder predicts each token with one of that size.
    weights = sum(
        weight.numel()
        for weight in source_model.model.parameters()
        if generates or source_model.tokens is None or weight.shape[:1] != (source_model.tokens.vocab_size,)
    )
    most_ids = int((_MOST_DECODER_WORK if generates else _MOST_VOCABULARY_WORK) // max(1, weights))
    return Draw(int(artifact_digest[:16], 16), source_model.tokens, most_ids)


@dataclass(frozen=True)
class Evidence:
    """The inputs of one validation.

    Attributes:
        generated: Cases that natural examples do not cover.
        natural: Cases of natural examples, on which decisions are compared.
        probes: Functions that measure one property, given the measurements, the reference and the candidate.
        shapes: Shapes, (batch size, length), at which both models are compared.
        repeated: Inputs that are called again, the shortest first.
        timed: Function from a batch size and a length to the call for timing.
        decode: Function from token ids to text.
        tokens: Names of the classes where id2label has none, such as the characters of a speech model.
        origin: Origin of the natural examples, in words.
        examples_digest: SHA-256 that changes when the file or the folder of natural examples changes.
        examples_count: Number of natural examples.
        notes: What to know about the user's examples: what of them is not used, and whether they are few.
    """

    generated: list[Case]
    natural: list[Case]
    probes: tuple[Probe, ...]
    shapes: tuple[Shape, ...]
    repeated: tuple[Arrays, ...]
    timed: Callable[[int, int], Case]
    decode: Decode
    tokens: Mapping[int, str]
    origin: str
    examples_digest: str
    examples_count: int
    notes: tuple[str, ...] = ()

    @property
    def labelled_count(self) -> int:
        """Number of natural examples that have a label."""
        truths = [truth for case in self.natural for truth in case.truths if truth is not None]
        # A text that queries should find is not labelled itself.
        return sum(not isinstance(truth, Searched) or bool(truth.relevant) for truth in truths)


def gather_evidence(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    tests: RegisteredTests | None = None,
    *,
    labels: Mapping[int, str],
    draw: Draw,
    trust_remote_code: bool,
) -> Evidence:
    """Build the evidence for one component; the source version's registered test inputs come first.

    Args:
        source_dir: Folder of the source model.
        spec: Specification of the artifact.
        record: Record of the component.
        validation: Settings of the validation.
        tests: Test inputs that are registered with the source version.
        labels: Name of each label of the model.
        draw: Values from which inputs are drawn.
        trust_remote_code: Run Python files of the source model.

    Raises:
        MeasurementError: The examples cannot be used.
    """
    if spec.hf_task.modality == "image-text":
        return _image_text_evidence(source_dir, spec, record, validation, draw, trust_remote_code)
    if spec.hf_task.modality == "text":
        tokenizer = _tokenizer(source_dir, trust_remote_code)
        return _text_evidence(tokenizer, spec, record, validation, tests, labels, draw)
    return _signal_evidence(source_dir, spec, record, validation, labels, draw, trust_remote_code)


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
    if hf_task.generates:
        # Room for the tokens that a timed call writes.
        longest -= timed_tokens(longest)
    return tuple(dict.fromkeys((rows, min(length, longest)) for rows, length in requested_shapes or default))


def _notes(hf_task: HfTask, validation: ValidationSettings) -> tuple[str, ...]:
    path = validation.examples_path
    if path is None:
        return ()
    fields = note_on_fields(hf_task, path) if hf_task.modality == "text" else ""
    return tuple(filter(None, [fields, note_on_count(hf_task, path, validation.max_examples)]))


def _tokenizer(source_dir: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source_dir, local_files_only=True, trust_remote_code=trust_remote_code)


def _text_evidence(
    tokenizer: Any,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    tests: RegisteredTests | None,
    labels: Mapping[int, str],
    draw: Draw,
) -> Evidence:
    examples, origin, digest = sample_examples(spec.hf_task, validation.examples_path, validation.max_examples)
    test_examples = tests.examples(spec.hf_task) if tests else []
    if test_examples or (tests and tests.note):
        note = f" ({tests.note})" if tests and tests.note else ""
        origin = f"{len(test_examples)} test inputs of the source version{note}, and {origin}"
        examples = (test_examples + examples)[: max(validation.max_examples, len(test_examples))]
    texts = [example["context" if "context" in example else "text"] for example in examples]
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(tensor.name for tensor in record.inputs),
        max_length=record.max_sequence_length,
        edges=tuple(sorted({bucket.sequence_length for bucket in record.shape_buckets})) or _DYNAMIC_EDGES,
        pad_token_id=record.pad_token_id,
        question=examples[0].get("question"),
        pad_left=record.padding == "left",
    )

    check_labels(spec.hf_task, examples, labels, origin)
    truths = [truth_of(example, builder.with_offsets, labels) for example in examples]
    natural = agreement_cases(builder, examples, spec.hf_task, truths)
    tokens = _required(draw.tokens)
    ids = np.concatenate([case.inputs["input_ids"][case.mask == 1] for case in natural])
    filled = FilledRows(tokens, record, natural_ids(ids, tokens), {})
    shapes, filled_cases = _filled_cases(filled, spec, draw)
    special_cases: list[Case] = []
    # At other precisions, the case of all special tokens is enough.
    if spec.precision.is_integer:
        names = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        special_cases = filled.special_cases(dict(names))
    probed_lengths = sorted({min(length, record.max_sequence_length) for length in _probed_lengths(record)})

    def mask(measurements: Measurements, reference: Model, candidate: Model) -> None:
        padded_cases = [case for length in probed_lengths if (case := filled.padded_case(length)) is not None]
        measure_mask(measurements, reference, candidate, padded_cases)

    def token_types(measurements: Measurements, reference: Model, candidate: Model) -> None:
        full_cases = [filled.full_case(length) for length in probed_lengths]
        measure_token_types(measurements, reference, candidate, full_cases)

    def timed(rows: int, length: int) -> Case:
        text = " ".join(texts)
        row = builder.encode(text, max_length=length)
        return builder.case(f"timed {rows} x {length}", "timed", [row] * rows, [text] * rows)

    return Evidence(
        generated=shape_cases(builder, texts) + filled_cases + special_cases,
        natural=natural,
        probes=(mask, token_types) if "token_type_ids" in builder.input_names else (mask,),
        shapes=shapes,
        repeated=_repeated(record, shapes, filled_cases),
        timed=timed,
        decode=tokenizer.decode,
        tokens={},
        origin=origin,
        examples_digest=digest,
        examples_count=len(examples),
        notes=_notes(spec.hf_task, validation),
    )


def _filled_cases(filled: FilledRows, spec: CompileSpec, draw: Draw) -> tuple[tuple[Shape, ...], list[Case]]:
    """Return the shapes at which text is compared, and the cases that fill them and read the vocabulary."""
    shapes = text_shapes(filled.record, filled.shortest)
    vocabulary = filled.vocabulary(draw.most_ids)
    # The scales of int8 fit natural text, so its answers to other tokens say nothing.
    is_numeric = not spec.precision.is_integer
    cases = filled.shape_cases(shapes, vocabulary if is_numeric else None)
    cases += filled.vocabulary_cases(vocabulary, answers_only=not is_numeric)
    return shapes, cases + filled.drawn_cases(draw.seed)


def _probed_lengths(record: ComponentRecord) -> Sequence[int]:
    if record.dynamic_axes:
        return _PROBED_LENGTHS
    return [bucket.sequence_length for bucket in record.shape_buckets]


def _repeated(record: ComponentRecord, shapes: Sequence[Shape], cases: Sequence[Case]) -> tuple[Arrays, ...]:
    """Return one call for each shape that is called again."""
    main = record.inputs[0]
    inputs_by_shape = {call_sizes(main, case.inputs[main.name]): case.inputs for case in reversed(cases)}
    return tuple(inputs_by_shape[shape] for shape in repeated_shapes(shapes, dynamic=record.dynamic_axes))


def _required(tokens: TokenRows | None) -> TokenRows:
    if tokens is None:
        raise MeasurementError(
            "The form of the model's rows is unknown.", hint="Load the source model for a task that takes text."
        )
    return tokens


def _image_text_evidence(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    draw: Draw,
    trust_remote_code: bool,
) -> Evidence:
    tokenizer = _tokenizer(source_dir, trust_remote_code)
    processor = load_processor(source_dir, "image", trust_remote_code=trust_remote_code)
    builder = ImageTextCases(tokenizer, processor, record)
    signals, origin, digest = load_signals(
        processor,
        validation.examples_path,
        validation.max_examples,
        generated=generated_count(spec.hf_task, spec.precision),
    )
    shapes, filled_cases = _filled_cases(builder.filled_rows(_required(draw.tokens), draw.seed), spec, draw)
    # They share a drawn image.
    filled_cases = [replace(case, is_drawn=True) for case in filled_cases]
    return Evidence(
        generated=builder.generated() + filled_cases,
        natural=[builder.case(signal.name, "agreement", signal, LABELS) for signal in signals],
        probes=(),
        shapes=shapes,
        repeated=_repeated(record, shapes, filled_cases),
        timed=builder.timed,
        decode=tokenizer.decode,
        tokens=dict(enumerate(LABELS)),
        origin=origin,
        examples_digest=digest,
        examples_count=len(signals),
        notes=_notes(spec.hf_task, validation),
    )


def _signal_evidence(
    source_dir: Path,
    spec: CompileSpec,
    record: ComponentRecord,
    validation: ValidationSettings,
    labels: Mapping[int, str],
    draw: Draw,
    trust_remote_code: bool,
) -> Evidence:
    task = spec.hf_task
    processor = load_processor(source_dir, task.modality, trust_remote_code=trust_remote_code)
    builder = SignalCases(processor, record)
    signals, origin, digest = load_signals(
        processor,
        validation.examples_path,
        validation.max_examples,
        generated=generated_count(spec.hf_task, spec.precision),
        by_class=task in CLASS_FOLDERS,
    )
    check_labels(task, [{"label": signal.label} for signal in signals if signal.label], labels, origin)
    decode: Decode = lambda ids: " ".join(map(str, ids))  # noqa: E731 - a default for one field
    tokens: Mapping[int, str] = {}
    if task is HfTask.SPEECH_RECOGNITION:
        tokenizer = _tokenizer(source_dir, trust_remote_code)
        decode, tokens = tokenizer.decode, {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    short_signals = sorted(signals, key=lambda signal: signal.values.size)[:4]
    shapes = builder.shapes()
    filled_cases = builder.shape_cases(shapes, draw.seed)

    def padding(measurements: Measurements, reference: Model, candidate: Model) -> None:
        padded_cases = [case for case in reversed(filled_cases) if not case.inputs["attention_mask"].all()]
        # One batch of each length is enough, the smallest.
        one_per_length = {case.inputs["attention_mask"].shape[1]: case for case in padded_cases}
        cases = [builder.case("natural", "probe", short_signals), *one_per_length.values()]
        measure_padding(measurements, reference, candidate, cases)

    return Evidence(
        generated=builder.generated() + filled_cases,
        natural=builder.natural(signals),
        probes=(padding,) if any(tensor.name == "attention_mask" for tensor in record.inputs) else (),
        shapes=shapes,
        repeated=_repeated(record, shapes, filled_cases),
        timed=builder.timed,
        decode=decode,
        tokens=tokens,
        origin=origin,
        examples_digest=digest,
        examples_count=len(signals),
        notes=_notes(spec.hf_task, validation),
    )
