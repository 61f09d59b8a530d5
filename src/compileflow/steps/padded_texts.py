"""Whether a model answers a text as before if a tokenizer pads it to the length of a compiled shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, Target, TensorRecord
from compileflow.errors import SpecError
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.text_model import row_of
from compileflow.source_model.token_rows import text_config
from compileflow.spec import HfTask
from compileflow.steps.plan import SourceLimits, targets_of_any_shape
from compileflow.validation.cases import load_examples

# Words of each text; a longer text is cut off at the compiled length.
_WORD_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class TextRow:
    """One text as tokens, without padding and as the tokenizer of a pipeline pads it.

    Attributes:
        bare: Inputs by name without padding, shape (1, tokens).
        padded: The same inputs with padding, shape (1, compiled tokens).
        left: The padding is on the left.
    """

    bare: Arrays
    padded: Arrays
    left: bool

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.bare["input_ids"].shape[1])

    def answers(
        self, outputs: Sequence[TensorRecord], bare: Arrays, padded: Arrays
    ) -> Iterator[tuple[TensorRecord, Any, Any]]:
        """Yield each output that can be compared, its value without padding, and that with padding, cut to it."""
        for record in outputs:
            if all(axis in ("batch", "sequence") or isinstance(axis, int) for axis in record.axes):
                yield record, bare[record.name], row_of(padded, record, 0, self.tokens, left=self.left)


def text_rows(
    tokenizer: Any, settings: Mapping[str, Any], inputs: Sequence[TensorRecord], hf_task: HfTask, vocab_size: int
) -> Iterator[TextRow]:
    """Yield texts of different lengths as tokens.

    Args:
        tokenizer: Hugging Face tokenizer.
        settings: Settings of its call.
        inputs: Inputs of the model.
        hf_task: Task whose examples the texts come from.
        vocab_size: Number of token ids of the model; 0 if it takes any. Texts with other ids are left out.
    """
    names = {record.name for record in inputs}
    settings = {**settings, "return_tensors": "np", "return_overflowing_tokens": False}
    examples, _, _ = load_examples(hf_task, None, len(_WORD_COUNTS))
    for example, count in zip(examples, _WORD_COUNTS, strict=False):
        text, pair = example.get("question") or example["text"], example.get("context")
        texts = [" ".join(part.split()[:count]) for part in (text, pair) if part is not None]
        bare, padded = (
            {name: value for name, value in tokenizer(*texts, **call).items() if name in names}
            for call in (settings | {"padding": False}, settings)
        )
        highest = max(int(row["input_ids"].max(initial=-1)) for row in (bare, padded))
        if bare["input_ids"].size and (vocab_size == 0 or highest < vocab_size):
            yield TextRow(bare, padded, (settings.get("padding_side") or tokenizer.padding_side) == "left")


def check_padding(
    source_model: SourceModel,
    tokenizer: Any,
    target: Target,
    limits: SourceLimits,
    hf_task: HfTask,
    *,
    settings: Mapping[str, Any],
    tolerance: Mapping[str, float] | None,
) -> None:
    """Check that padding by the tokenizer leaves the source model's answers to a few texts unchanged.

    Args:
        source_model: The source model.
        tokenizer: Tokenizer of the model.
        target: Target to compile for.
        limits: Lengths that the source model takes.
        hf_task: Task of the model.
        settings: Settings of each call of the tokenizer.
        tolerance: "rtol" and "atol" of `numpy.allclose`; None: no comparison.

    Raises:
        SpecError: An answer differs by more than the tolerance, or the tokenizer has no token to pad with and the
            model does not take the padding of the target.
    """
    if tokenizer.pad_token is None:
        if limits.padding_fault and not target.capabilities.dynamic_axes:
            raise SpecError(
                f"The tokenizer has no padding token, but {target.name} pads each input to a fixed length, and "
                "the model cannot tell the padding from text.",
                hint="Set pad_token before the compile: tokenizer.pad_token = tokenizer.eos_token, then "
                "model.config.pad_token_id = tokenizer.pad_token_id.",
            )
        return

    def is_unchanged(call_settings: Mapping[str, Any]) -> bool:
        return tolerance is None or all(
            bare.shape == padded.shape and np.allclose(padded, bare, **tolerance, equal_nan=True)
            for row in text_rows(tokenizer, call_settings, source_model.inputs, hf_task, source_model.vocab_size)
            for _, bare, padded in row.answers(
                source_model.outputs, source_model.run(row.bare), source_model.run(row.padded)
            )
        )

    if is_unchanged(settings):
        return
    text = "The tokenizer pads each text to a fixed length, and padding changes the answers of this model: "
    config, pad_token_id = text_config(source_model.model.config), tokenizer.pad_token_id
    configured_id = config.pad_token_id
    if configured_id != pad_token_id:
        config.pad_token_id = pad_token_id
        try:
            is_cause = is_unchanged(settings)
        finally:
            config.pad_token_id = configured_id
        if is_cause:
            raise SpecError(
                f"{text}the tokenizer pads with the token {pad_token_id}, but pad_token_id of the model's "
                f"configuration is {configured_id}.",
                hint=f"Make them equal before the compile, for example with model.config.pad_token_id = "
                f"{pad_token_id}.",
            )
    side = settings.get("padding_side") or tokenizer.padding_side
    other_side = "right" if side == "left" else "left"
    if is_unchanged({**settings, "padding_side": other_side}):
        raise SpecError(
            f"{text}the padding is on the {side}.",
            hint=f"Set tokenizer.padding_side = {other_side!r} before the compile.",
        )
    raise SpecError(
        f"{text}{limits.padding_fault or 'on both sides, they differ from those without padding'}.",
        hint="Pass tokenizer_settings={'padding': False} and a target that takes inputs of any length: "
        f"{', '.join(targets_of_any_shape(hf_task))}.",
    )
