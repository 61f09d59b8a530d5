"""Feature extraction: the hidden states of each token."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.task import Settings
from compileflow.serving.light.text_task import TOKENIZER_SETTINGS, TextTask
from compileflow.serving.rows import PreparedItem
from compileflow.spec import HfTask


class FeatureExtraction(TextTask):
    """Returns the first output of the model for a text, as nested lists of the shape (1, tokens, size)."""

    hf_task = HfTask.FEATURE_EXTRACTION
    load_settings = ("batch_size", "truncation", "tokenize_kwargs")

    def check(self, settings: Settings) -> None:
        """Check the settings of the tokenizer."""
        self._tokenizer_settings(settings)

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[None]:
        """Tokenize a text."""
        return PreparedItem([self.row(self.tokenizer(item, **self._tokenizer_settings(settings)))], None)

    def answer(self, settings: Settings, details: None, row_outputs: list[Arrays]) -> Any:
        """Return the first output as lists."""
        return row_outputs[0][self.model.graph.record.outputs[0].name].tolist()

    def _tokenizer_settings(self, settings: Settings) -> dict[str, Any]:
        nested = dict(settings.get("tokenize_kwargs") or {})
        unknown_names = [name for name in nested if name not in TOKENIZER_SETTINGS]
        if unknown_names:
            raise InputError(
                f"tokenize_kwargs has the setting {unknown_names[0]!r}, which a light pipeline does not have.",
                hint=f"Its settings are: {', '.join(TOKENIZER_SETTINGS)}.",
            )
        if settings.get("truncation") is not None:
            nested["truncation"] = settings["truncation"]
        return nested
