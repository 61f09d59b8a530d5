"""TextTask: what the light pipelines of text have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.model import LightModel
from compileflow.serving.light.task import LightTask
from compileflow.serving.light.tokenizer import Encoded, LightTokenizer
from compileflow.serving.padding import complete_inputs

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
        record = self.model.graph.record
        values = {name: value if index is None else value[index] for name, value in encoded.items()}
        if not values["input_ids"]:
            raise InputError("The tokenizer returns no token for a text.", hint="Leave empty texts out.")
        names = [tensor.name for tensor in record.inputs if tensor.name in values]
        return complete_inputs(record, {name: np.array([values[name]]) for name in names})
