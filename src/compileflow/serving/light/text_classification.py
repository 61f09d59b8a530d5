"""Text classification: labels of a text or a pair of texts with their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.label_scores import check_function, labelled_scores
from compileflow.serving.light.task import Settings, checked_top_k
from compileflow.serving.light.text_task import TOKENIZER_SETTINGS, TextTask
from compileflow.serving.rows import PreparedItem
from compileflow.spec import HfTask

_PAIR = {"text", "text_pair"}


class TextClassification(TextTask):
    """Classifies texts, or pairs as {"text": ..., "text_pair": ...}.

    Without top_k, an item has its best label, and a single text a list with it. With top_k, each item has a list.
    """

    hf_task = HfTask.TEXT_CLASSIFICATION
    load_settings = ("batch_size", "top_k", "function_to_apply", *TOKENIZER_SETTINGS)

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Classify an item, a list, or the items of an iterator; see `LightTask`."""
        result = super().__call__(inputs, **settings)
        # As in transformers, which looks at the settings of the call alone.
        return [result] if isinstance(inputs, str) and "top_k" not in settings else result

    def check(self, settings: Settings) -> None:
        """Check top_k and function_to_apply."""
        if "top_k" in settings:
            checked_top_k(settings["top_k"], none_is_all=True)
        check_function(settings.get("function_to_apply"))

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[None]:
        """Tokenize a text or a pair."""
        chosen = {name: settings[name] for name in TOKENIZER_SETTINGS if name in settings}
        text, pair = _text_and_pair(item)
        return PreparedItem([self.row(self.tokenizer(text, pair, **chosen))], None)

    def answer(self, settings: Settings, details: None, row_outputs: list[Arrays]) -> Any:
        """Return the labels with their scores, the best first."""
        logits = row_outputs[0]["logits"][0]
        results = labelled_scores(self.model.config, logits, settings.get("function_to_apply"))
        return results[: settings["top_k"]] if "top_k" in settings else results[0]


def _text_and_pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping) and "text" in item and item.keys() <= _PAIR:
        return item["text"], item.get("text_pair")
    if isinstance(item, list) and len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
        return item[0][0], item[0][1]
    if isinstance(item, str):
        return item, None
    raise InputError(
        f"Text classification cannot read an input of type {type(item).__name__}.",
        hint='Pass a text, a pair as {"text": ..., "text_pair": ...}, or a list of these.',
    )
