"""Fill mask: the likeliest tokens in place of the mask token."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.light.model import LightModel
from compileflow.serving.light.task import Settings, checked_top_k
from compileflow.serving.light.text_task import TOKENIZER_SETTINGS, TextTask
from compileflow.serving.light.tokenizer import LightTokenizer
from compileflow.serving.rows import PreparedItem
from compileflow.source_model.activations import softmax
from compileflow.spec import HfTask

logger = logging.getLogger(__name__)
_TOP_K = 5


class FillMask(TextTask):
    """Fills the mask tokens of texts; a text with several masks has a list of answers for each."""

    hf_task = HfTask.FILL_MASK
    load_settings = ("batch_size", "top_k", "targets", "tokenizer_kwargs")

    def __init__(self, model: LightModel, tokenizer: LightTokenizer, **settings: Any):
        mask = tokenizer.token_id("mask")
        if mask is None:
            raise LoadError("The tokenizer has no mask token.", hint="Use a model that was trained to fill masks.")
        self._mask = mask
        super().__init__(model, tokenizer, **settings)

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Fill an item, a list, or the items of an iterator; see `LightTask`."""
        result = super().__call__(inputs, **settings)
        # As in transformers, a list of one text has the answer of that text.
        return result[0] if isinstance(inputs, list) and len(inputs) == 1 else result

    def check(self, settings: Settings) -> None:
        """Check top_k and the settings of the tokenizer."""
        checked_top_k(settings.get("top_k") or _TOP_K, none_is_all=False)
        unknown_names = [name for name in settings.get("tokenizer_kwargs") or {} if name not in TOKENIZER_SETTINGS]
        if unknown_names:
            raise InputError(
                f"tokenizer_kwargs has the setting {unknown_names[0]!r}, which a light pipeline does not have.",
                hint=f"Its settings are: {', '.join(TOKENIZER_SETTINGS)}.",
            )

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[Any]:
        """Tokenize a text."""
        row = self.row(self.tokenizer(item, **(settings.get("tokenizer_kwargs") or {})))
        if self._mask not in row["input_ids"]:
            token = self.tokenizer.traits.special_tokens["mask"]
            raise InputError(f"The text has no mask token: {item!r:.80}.", hint=f"Put {token} into the text.")
        return PreparedItem([row], row["input_ids"][0])

    def answer(self, settings: Settings, details: Any, row_outputs: list[Arrays]) -> Any:
        """Return the likeliest tokens of each mask, with the text that they make."""
        ids = details
        places = np.flatnonzero(ids == self._mask)
        probabilities = softmax(row_outputs[0]["logits"][0][places])
        candidates = np.arange(probabilities.shape[-1])
        if settings.get("targets") is not None:
            candidates = self._target_ids(settings["targets"])
            probabilities = probabilities[:, candidates]
        count = min(settings.get("top_k") or _TOP_K, len(candidates))
        results = []
        for place, scores in zip(places, probabilities, strict=True):
            best = np.argsort(-scores, kind="stable")[:count]
            results.append(
                [
                    self._proposal(
                        ids, int(place), int(candidates[number]), scores[number].item(), len(places) == 1
                    )
                    for number in best
                ]
            )
        return results[0] if len(results) == 1 else results

    def _proposal(self, ids: Any, place: int, token: int, score: float, is_single: bool) -> dict[str, Any]:
        filled = ids.copy()
        filled[place] = token
        filled = filled[filled != self.tokenizer.token_id("pad")]
        return {
            "score": score,
            "token": token,
            "token_str": self.tokenizer.decode([token]),
            # Without the special tokens, unless the other masks would vanish with them.
            "sequence": self.tokenizer.decode(filled.tolist(), skip_special_tokens=is_single),
        }

    def _target_ids(self, targets: Any) -> Any:
        """Return the numbers of the targets; one that is several tokens counts as its first one."""
        backend = self.tokenizer.backend_tokenizer
        numbers = set()
        for target in [targets] if isinstance(targets, str) else targets:
            number = backend.token_to_id(target)
            if number is None:
                ids = self.tokenizer.encoded(target, add_special_tokens=False)["input_ids"]
                logger.warning(
                    "%r is not a token; %s", target, "its first token counts" if ids else "it is left out"
                )
                number = ids[0] if ids else None
            if number is not None:
                numbers.add(number)
        if not numbers:
            raise InputError("targets names no token.", hint="Pass words of the vocabulary, or leave targets out.")
        return np.array(list(numbers))
