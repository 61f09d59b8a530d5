"""Compare a compiled model with its source model in memory, output by output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.errors import SpecError, VerdictError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.text_model import missing_pad_token
from compileflow.source_model.token_rows import TokenRows, token_rows
from compileflow.spec import HfTask
from compileflow.steps.padded_texts import text_rows
from compileflow.validation.cases import CaseBuilder, load_examples

_TEXTS = 4
# More rows than the batch size, so that batches are split and padded.
_MORE_ROWS = 2
# Differences up to so many times the tolerance may be rounding.
_ROUNDING = 100


@dataclass(frozen=True)
class Tolerance:
    """Largest difference per element: |candidate - reference| <= atol + rtol * |reference|, in float64."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name, value in (("validation_rtol", self.rtol), ("validation_atol", self.atol)):
            if not isinstance(value, Real) or not value >= 0:
                raise SpecError(
                    f"Expected {name} as a number of at least 0, got {value!r}.", hint="The default is 0.01."
                )


def compare_with_source(
    model: Any, artifact: OpenArtifact, tolerance: Tolerance, *, tokenizer: CompiledTokenizer | None = None
) -> None:
    """Run both models on full, ragged, one-token and, with a tokenizer, natural inputs.

    The source model also gets a few texts without padding, which the compiled model gets as the tokenizer pads
    them: these are the answers of the two pipelines.

    Args:
        model: The source model. Its training mode is restored.
        artifact: Artifact of the compiled model.
        tolerance: Largest accepted difference of each element of each output.
        tokenizer: Tokenizer of the compiled model; None without one.

    Raises:
        VerdictError: An output has another shape, is not finite, or differs by more than the tolerance.
    """
    component = LoadedComponent.load(artifact)
    record, hf_task = component.record, artifact.manifest.hf_task
    inner_tokenizer = None if tokenizer is None else tokenizer.tokenizer
    tokens = token_rows(inner_tokenizer, model.config, record.vocab_size, hf_task)
    try:
        with evaluation_mode(model, missing_pad_token(inner_tokenizer, tokens)):
            for case, inputs in _cases(record, artifact, inner_tokenizer, tokens):
                is_choice = hf_task is HfTask.MULTIPLE_CHOICE
                # The graph has one choice per row.
                source_inputs = {name: value[:, None] for name, value in inputs.items()} if is_choice else inputs
                reference = _reference(model, source_inputs, record.outputs)
                candidate = component.run(inputs)
                for output in record.outputs:
                    check_output(
                        output,
                        reference[output.name],
                        candidate[output.name],
                        mask=inputs.get("attention_mask"),
                        tolerance=tolerance,
                        case=case,
                    )
            if tokenizer is not None:
                settings = tokenizer.tokenization_settings
                for row in text_rows(inner_tokenizer, settings, record.inputs, hf_task, record.vocab_size):
                    reference, candidate = _reference(model, row.bare, record.outputs), component.run(row.padded)
                    for output, bare, padded in row.answers(record.outputs, reference, candidate):
                        case = f"On a text of {row.tokens} tokens"
                        check_output(output, bare, padded, mask=None, tolerance=tolerance, case=case)
    finally:
        component.close()


def check_output(
    output: TensorRecord,
    reference: NDArray[Any],
    candidate: NDArray[Any],
    *,
    mask: NDArray[Any] | None,
    tolerance: Tolerance,
    case: str,
) -> None:
    """Compare one output on one input. Masked positions are not compared, because their values have no meaning.

    Args:
        output: Name and axes of the output.
        reference: Output of the source model with these axes.
        candidate: Output of the compiled model.
        mask: 1 for tokens that count, shape (batch, sequence); None if all tokens count.
        tolerance: Largest accepted difference of each element.
        case: Description of the input for the error message.

    Raises:
        VerdictError: See `compare_with_source`.

    Source: numpy.isclose, https://numpy.org/doc/stable/reference/generated/numpy.isclose.html
    """
    if candidate.shape != reference.shape:
        raise _mismatch(f"{case}, expected {output.name} of shape {reference.shape}, got shape {candidate.shape}")
    counts = np.ones(reference.shape, dtype=bool)
    if mask is not None and output.axes[:2] == ("batch", "sequence"):
        counts &= mask.astype(bool).reshape(mask.shape + (1,) * (reference.ndim - 2))
    for name, values in (("source", reference), ("compiled", candidate)):
        not_finite = ~np.isfinite(values) & counts
        if not_finite.any():
            index = _first(not_finite)
            raise _mismatch(
                f"{case}, {output.name}{_place(index)} of the {name} model is {values[index]} "
                f"({int(not_finite.sum())} such elements)"
            )
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    limits = tolerance.atol + tolerance.rtol * np.abs(np.where(counts, expected, 0.0))
    excess = np.where(counts, np.abs(actual - expected) - limits, -np.inf)
    if (excess > 0).any():
        is_rounding = bool((excess < (_ROUNDING - 1) * limits).all())
        index = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        raise _mismatch(
            f"{case}, expected {output.name}{_place(index)} = {expected[index]:.6g}, got {actual[index]:.6g}. "
            f"The difference is {abs(actual[index] - expected[index]):.3g}; the limit is {tolerance.atol:g} + "
            f"{tolerance.rtol:g} * |{expected[index]:.6g}| = {limits[index]:.3g} "
            f"({int((excess > 0).sum())} of {int(counts.sum())} elements exceed it)",
            is_rounding=is_rounding,
        )


def _cases(
    record: ComponentRecord, artifact: OpenArtifact, tokenizer: Any, tokens: TokenRows
) -> Iterator[tuple[str, Arrays]]:
    example = partial(example_inputs, record.inputs, tokens=tokens, pad_left=record.padding == "left")
    longest = record.max_sequence_length
    # The record of a dynamic component has no batch size, but the spec has.
    buckets = record.shape_buckets or artifact.manifest.spec.components[0].shape_buckets
    rows = max((bucket.batch_size for bucket in buckets), default=1)
    row = example(1, longest)
    shifts = range(rows)
    full = {
        name: np.concatenate([np.roll(value, shift, axis=1) for shift in shifts]) for name, value in row.items()
    }
    yield f"On {rows} full rows of {longest} tokens", full
    short_rows = example(rows + _MORE_ROWS, longest)
    yield f"On {rows + _MORE_ROWS} ragged rows of up to {longest} tokens", short_rows
    # A model that reads two texts looks for the token between them.
    shortest = tokens.shortest if tokens.between else 1
    yield f"On a row of length {shortest}", example(1, shortest)
    if tokenizer is not None:
        yield f"On {_TEXTS} natural texts", _natural(record, artifact.manifest.hf_task, tokenizer)


def _natural(record: ComponentRecord, task: HfTask, tokenizer: Any) -> Arrays:
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(tensor.name for tensor in record.inputs),
        max_length=record.max_sequence_length,
        edges=(),
        pad_token_id=record.pad_token_id,
        pad_left=record.padding == "left",
    )
    examples, _, _ = load_examples(task, None, _TEXTS)
    pairs = [(example.get("question") or example["text"], example.get("context")) for example in examples]
    return builder.collate([builder.encode(text, pair) for text, pair in pairs])


def _reference(model: Any, inputs: Mapping[str, NDArray[Any]], outputs: tuple[TensorRecord, ...]) -> Arrays:
    import torch

    # Not inference_mode, because tensors that the model caches could not be used in training.
    with torch.no_grad():
        answer = model(**{name: torch.as_tensor(value).to(model.device) for name, value in inputs.items()})
    return {record.name: answer[record.name].cpu().double().numpy() for record in outputs}


@contextmanager
def evaluation_mode(model: Any, pad_token_id: int = -1) -> Iterator[None]:
    """Switch dropout off and name the outputs, and restore the mode of each module, because some may be frozen.

    Args:
        model: A transformers model.
        pad_token_id: Padding token of a model that has none; no token has the number -1.
    """
    modes = [(module, module.training) for module in model.modules()]
    settings = {name: getattr(model.config, name, None) for name in ("return_dict", "pad_token_id")}
    model.eval()
    model.config.return_dict = True
    if settings["pad_token_id"] is None:
        # Some classifiers refuse a batch without a padding token.
        model.config.pad_token_id = pad_token_id
    try:
        yield
    finally:
        for name, value in settings.items():
            setattr(model.config, name, value)
        for module, training in modes:
            module.training = training


def _first(positions: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(positions)[0])


def _place(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]"


def _mismatch(details: str, *, is_rounding: bool = False) -> VerdictError:
    tolerances = ", or raise validation_rtol or validation_atol if the service allows it" if is_rounding else ""
    return VerdictError(
        f"The compiled model does not answer like its source model. {details}.",
        hint=f"Try another target{tolerances}.",
    )
