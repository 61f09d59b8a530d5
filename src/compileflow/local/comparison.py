"""Compare a compiled model with the source model that is in memory, output by output, before anyone uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.errors import VerdictError
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.examples import example_inputs
from compileflow.spec import HfTask
from compileflow.validation.cases import CaseBuilder, load_examples

_TEXTS = 4
# One row more than two full calls of batch size 1, so that batches are split and padded, too.
_MORE_ROWS = 2


@dataclass(frozen=True)
class Tolerance:
    """NumPy's: |candidate - reference| <= atol + rtol * |reference|, element by element, in float64."""

    rtol: float
    atol: float


def compare_with_source(
    model: Any, artifact: OpenArtifact, tolerance: Tolerance, *, tokenizer: Any = None
) -> None:
    """Run both models on full, ragged, one-token and, with a tokenizer, natural inputs.

    Args:
        model: The source model; its training mode is put back.
        artifact: The compiled one.
        tolerance: What every element of every output has to keep.
        tokenizer: Hugging Face tokenizer for natural text.

    Raises:
        VerdictError: an output has another shape, is not finite, or differs by more than the tolerance.
    """
    compiled = LoadedComponent.load(artifact)
    try:
        with _evaluation_mode(model):
            for case, inputs in _cases(model, compiled.record, artifact, tokenizer):
                reference = _reference(model, inputs, compiled.record.outputs)
                candidate = compiled.run(inputs)
                for output in compiled.record.outputs:
                    check_output(
                        output,
                        reference[output.name],
                        candidate[output.name],
                        mask=inputs.get("attention_mask"),
                        tolerance=tolerance,
                        case=case,
                    )
    finally:
        compiled.close()


def check_output(
    output: TensorRecord,
    reference: NDArray[Any],
    candidate: NDArray[Any],
    *,
    mask: NDArray[Any] | None,
    tolerance: Tolerance,
    case: str,
) -> None:
    """Compare one output on one input; what stands at masked positions is not compared, as nobody reads it.

    Args:
        output: Its name and axes.
        reference: The source model's, of those axes.
        candidate: The compiled model's.
        mask: 1 where a token counts, shape (batch, sequence); None where all do.
        tolerance: What each element has to keep.
        case: The input in words, for the error.

    Raises:
        VerdictError: see `compare_with_source`.

    Source: numpy.isclose, https://numpy.org/doc/stable/reference/generated/numpy.isclose.html
    """
    if candidate.shape != reference.shape:
        raise _refused(
            f"{output.name} has the shape {candidate.shape}, the source model's {reference.shape}, {case}"
        )
    counts = np.ones(reference.shape, dtype=bool)
    if mask is not None and output.axes[:2] == ("batch", "sequence"):
        counts &= mask.astype(bool).reshape(mask.shape + (1,) * (reference.ndim - 2))
    for name, values in (("the source model's", reference), ("the compiled model's", candidate)):
        broken = ~np.isfinite(values) & counts
        if broken.any():
            at = _first(broken)
            raise _refused(
                f"{name} {output.name}{_place(at)} is {values[at]}, {case} ({int(broken.sum())} such elements)"
            )
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    allowed = tolerance.atol + tolerance.rtol * np.abs(np.where(counts, r, 0.0))
    excess = np.where(counts, np.abs(c - r) - allowed, -np.inf)
    if (excess > 0).any():
        at = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        raise _refused(
            f"{output.name}{_place(at)} is {c[at]:.6g} and the source model's {r[at]:.6g}, {case}: they differ by "
            f"{abs(c[at] - r[at]):.3g}, allowed is {tolerance.atol:g} + {tolerance.rtol:g} * |{r[at]:.6g}| = "
            f"{allowed[at]:.3g} ({int((excess > 0).sum())} of {int(counts.sum())} elements are beyond)"
        )


def _cases(
    model: Any, record: ComponentRecord, artifact: OpenArtifact, tokenizer: Any
) -> Iterator[tuple[str, Arrays]]:
    vocab_size, pad = int(model.config.vocab_size), record.pad_token_id
    longest = record.max_sequence_length
    # A dynamic graph's record names no batch size; the spec still does.
    buckets = record.shape_buckets or artifact.manifest.spec.components[0].shape_buckets
    rows = max((bucket.batch_size for bucket in buckets), default=1)
    row = example_inputs(record.inputs, 1, longest, vocab_size, pad)
    shifts = range(rows)
    full = {name: np.concatenate([np.roll(value, n, axis=1) for n in shifts]) for name, value in row.items()}
    yield f"on {rows} full rows of {longest} tokens", full
    ragged = example_inputs(record.inputs, rows + _MORE_ROWS, longest, vocab_size, pad)
    yield f"on {rows + _MORE_ROWS} ragged rows of up to {longest} tokens", ragged
    yield "on one token", example_inputs(record.inputs, 1, 1, vocab_size, pad)
    if tokenizer is not None:
        yield f"on {_TEXTS} natural texts", _natural(record, artifact.manifest.hf_task, tokenizer)


def _natural(record: ComponentRecord, task: HfTask, tokenizer: Any) -> Arrays:
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(each.name for each in record.inputs),
        max_length=record.max_sequence_length,
        edges=(),
        pad_token_id=record.pad_token_id,
    )
    examples, _, _ = load_examples(task, None, _TEXTS)
    pairs = [(example.get("question") or example["text"], example.get("context")) for example in examples]
    return builder.collate([builder.encode(text, pair) for text, pair in pairs])


def _reference(model: Any, inputs: Mapping[str, NDArray[Any]], outputs: tuple[TensorRecord, ...]) -> Arrays:
    import torch

    # Not inference_mode: what a model keeps of such a call could never be trained on again.
    with torch.no_grad():
        answer = model(**{name: torch.as_tensor(value).to(model.device) for name, value in inputs.items()})
    return {record.name: answer[record.name].cpu().double().numpy() for record in outputs}


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off, and put every module's own mode back: parts of a model may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _first(where: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _place(at: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, at))}]"


def _refused(found: str) -> VerdictError:
    return VerdictError(
        f"The compiled model does not answer like its source: {found}.",
        hint="Try another target, or raise validation_rtol or validation_atol if the service allows it.",
    )
