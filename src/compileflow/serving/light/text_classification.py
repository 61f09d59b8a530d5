"""Text classification: labels of a text or a pair of texts with their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.text_task import TOKENIZER_SETTINGS, Settings, TextTask, checked_top_k
from compileflow.serving.rows import PreparedItem
from compileflow.source_model.activations import Activation, softmax
from compileflow.spec import HfTask

_PAIR = {"text", "text_pair"}


_FUNCTIONS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "sigmoid": Activation("Sigmoid"),
    "softmax": softmax,
    "none": Activation("Identity"),
}


class TextClassification(TextTask):
    """Classifies texts, or pairs as {"text": ..., "text_pair": ...}.

    Without top_k, an item has its best label, and a single text a list with it. With top_k, each item has a list.
    """

    hf_task = HfTask.TEXT_CLASSIFICATION
    load_settings = ("batch_size", "top_k", "function_to_apply", *TOKENIZER_SETTINGS)

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Classify an item, a list, or the items of an iterator; see `TextTask`."""
        result = super().__call__(inputs, **settings)
        # As in transformers, which looks at the settings of the call alone.
        return [result] if isinstance(inputs, str) and "top_k" not in settings else result

    def check(self, settings: Settings) -> None:
        """Check top_k and function_to_apply."""
        if "top_k" in settings:
            checked_top_k(settings["top_k"], none_is_all=True)
        function = settings.get("function_to_apply")
        if function is not None and not (isinstance(function, str) and function.lower() in _FUNCTIONS):
            raise InputError(f"function_to_apply is {function!r}.", hint=f"Pass one of: {', '.join(_FUNCTIONS)}.")

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[None]:
        """Tokenize a text or a pair."""
        chosen = {name: settings[name] for name in TOKENIZER_SETTINGS if name in settings}
        text, pair = _text_and_pair(item)
        return PreparedItem([self.row(self.tokenizer(text, pair, **chosen))], None)

    def answer(self, settings: Settings, details: None, row_outputs: list[Arrays]) -> Any:
        """Return the labels with their scores, the best first."""
        scores = self._function(settings)(row_outputs[0]["logits"][0].astype(np.float32))
        labels = self.model.config.id2label
        if "top_k" not in settings:
            best = int(scores.argmax())
            return {"label": labels[best], "score": scores[best].item()}
        results = [{"label": labels[number], "score": score.item()} for number, score in enumerate(scores)]
        results.sort(key=lambda result: result["score"], reverse=True)
        return results[: settings["top_k"]]

    def _function(self, settings: Settings) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return the function that turns logits into scores; without a setting, the kind of problem decides."""
        function = settings.get("function_to_apply")
        config = self.model.config
        if function is None:
            if config.problem_type == "regression":
                function = "none"
            elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
                function = "sigmoid"
            else:
                function = "softmax"
        return _FUNCTIONS[function.lower()]


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
