"""TextTask: what the light pipelines of text have in common."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.model import LightModel
from compileflow.serving.light.task import LightTask
from compileflow.serving.light.tokenizer import Encoded, LightTokenizer
from compileflow.serving.padding import token_row

# Settings of the tokenizer that a call of some tasks takes.
TOKENIZER_SETTINGS = ("truncation", "max_length", "padding", "add_special_tokens")


class TextTask(LightTask):
    """A task whose items are texts.

    Attributes:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, model: LightModel, tokenizer: LightTokenizer, **settings: Any):
        self.tokenizer = tokenizer
        super().__init__(model, **settings)

    def row(self, encoded: Encoded, index: int | None = None) -> Arrays:
        """Return the inputs of the component for a text, or for one of several windows.

        Raises:
            InputError: The text has no token, or too many.
        """
        values = encoded if index is None else {name: value[index] for name, value in encoded.items()}
        if not values["input_ids"]:
            raise InputError("The tokenizer returns no token for a text.", hint="Leave empty texts out.")
        return token_row(self.model.graph.record, values)
