"""Writers: the source model and the compiled model as validation lets them write on from natural prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.errors import MeasurementError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.model import CompiledModel
from compileflow.source_model.decoding import token_positions
from compileflow.source_model.interface import SourceModel
from compileflow.validation.cases import Case
from compileflow.validation.measure import Measurements, Model
from compileflow.validation.measure.generation import (
    Prompts,
    Settings,
    Written,
    measure_generation,
    measure_pieces,
    part,
)

# Prompts, and tokens that are written after each.
_PROMPTS, _NEW_TOKENS = 64, 64
# Tokens that are written in a call that is timed.
_TIMED_TOKENS = 16


@dataclass(frozen=True)
class ModelWriter:
    """A model with transformers' `generate`.

    Attributes:
        model: The model.
        pad_token_id: Token that follows the token which ends a text.
        no_token: An id that the model never writes.
    """

    model: Any
    pad_token_id: int
    no_token: int

    def write(self, prompts: Mapping[str, NDArray[Any]], settings: Settings) -> Written:
        """Write on from prompts, and choose the likeliest tokens whatever the model's own settings are."""
        import torch

        is_beam_search = settings.beams > 1
        answer = self._generate(
            prompts,
            settings,
            return_dict_in_generate=True,
            output_logits=not is_beam_search,
            output_scores=is_beam_search,
        )
        length = prompts["input_ids"].shape[1]
        ids = answer.sequences[:, length:].numpy()
        if is_beam_search:
            return Written(ids, scores=answer.sequences_scores.numpy())
        # The difference of two logits is that of the log probabilities.
        best = [logits.topk(2) for logits in answer.logits]
        values, ranked = (torch.stack(parts, dim=1).numpy() for parts in zip(*best, strict=True))
        written = Written(ids, ranked, values[..., 0] - values[..., 1])
        if isinstance(self.model, CompiledModel) and self.model.graph.writer is not None:
            # A call that asks for logits does not let the runtime write whole texts.
            whole_text = self._generate(prompts, settings)[:, length:].numpy()
            if "real" in part(written, Written(whole_text, ranked[..., ::-1], written.gaps)):
                raise MeasurementError(
                    "The runtime's own generate writes another text than its logits do.",
                    hint="Report the version of the runtime.",
                )
        return written

    def timed(self, longest: int) -> Model:
        """Return a function that writes `timed_tokens(longest)` tokens after each row of a call, and no more."""
        settings = Settings(timed_tokens(longest))
        return lambda inputs: {"ids": self._generate(inputs, settings).numpy()}

    def _generate(self, prompts: Mapping[str, NDArray[Any]], settings: Settings, **outputs: Any) -> Any:
        import torch
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=settings.new_tokens,
            num_beams=settings.beams,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.no_token if settings.end_id is None else settings.end_id,
            use_cache=True,
            **outputs,
        )
        tensors = {name: torch.as_tensor(value) for name, value in prompts.items()}
        with torch.inference_mode(), warnings.catch_warnings():
            # transformers warns of settings in the model's file that choosing the likeliest token does not use.
            warnings.simplefilter("ignore")
            return self.model.generate(**tensors, generation_config=config)


def timed_tokens(longest: int) -> int:
    """Return how many tokens a timed call writes after each row, given the longest row of a component."""
    return max(1, min(_TIMED_TOKENS, longest // 2))


def writers(source_model: SourceModel, component: LoadedComponent) -> tuple[ModelWriter, ModelWriter]:
    """Return both models as validation lets them write."""
    ids = source_model.pad_token_id, source_model.vocab_size
    return ModelWriter(source_model.model, *ids), ModelWriter(CompiledModel.from_component(component), *ids)


@dataclass(frozen=True)
class ComponentReader:
    """A compiled component that reads rows piece by piece."""

    component: LoadedComponent

    def read(self, pieces: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[Any]:
        """Read pieces of the same rows, one after another, and return the logits of all tokens."""
        continuation = self.component.start()
        try:
            logits = []
            for piece in pieces:
                ids, mask = (np.ascontiguousarray(piece[name]) for name in ("input_ids", "attention_mask"))
                positions = np.ascontiguousarray(token_positions(mask)[:, -ids.shape[1] :])
                logits.append(continuation.read(ids, mask, positions).copy())
            return np.concatenate(logits, axis=1)
        finally:
            continuation.close()


def compare_writing(
    measurements: Measurements,
    source_model: SourceModel,
    reference: Model,
    component: LoadedComponent,
    natural: Sequence[Case],
    *,
    progress: Callable[[str], None],
) -> None:
    """Measure how both models write on from natural prompts, and how the compiled model reads in pieces.

    Args:
        measurements: Gets the scalars of `measure_generation` and `measure_pieces`.
        source_model: The source model.
        reference: The source model as a function of whole rows.
        component: The compiled component.
        natural: Cases of natural texts, from which the prompts are taken.
        progress: Is told what is compared.
    """
    prompts = prompts_of(natural, source_model.pad_token_id, component.record.max_sequence_length)
    measure_pieces(measurements, reference, ComponentReader(component), prompts)
    measure_generation(measurements, *writers(source_model, component), prompts, progress=progress)


def prompts_of(natural: Sequence[Case], pad_token_id: int, longest: int) -> Prompts:
    """Return the beginnings of natural texts as prompts.

    Args:
        natural: Cases of natural texts.
        pad_token_id: Token that pads prompts.
        longest: Longest row, of which at most half is a prompt.
    """
    rows = [
        ([int(token) for token in ids[mask.astype(bool)]], text)
        for case in natural
        for ids, mask, text in zip(case.inputs["input_ids"], case.mask, case.texts, strict=True)
    ]
    new_tokens = max(1, min(_NEW_TOKENS, longest // 2))
    chosen = rows[:: max(1, len(rows) // _PROMPTS)][:_PROMPTS]
    return Prompts(
        rows=[row[: max(1, longest - new_tokens)] for row, _ in chosen],
        texts=[text for _, text in chosen],
        pad_token_id=pad_token_id,
        longest=longest,
        new_tokens=new_tokens,
    )
