"""A multiple-choice model with one choice per row: the graph has no axis for choices.

A question and each of its choices form a row. The model's own forward does the same; only the shape of its logits
puts the choices of a question side by side.
"""

from __future__ import annotations

import inspect
from typing import Any

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def with_one_choice(model: Any) -> Any:
    """Let a model take inputs of shape (rows, sequence) and return logits of shape (rows, 1), and return it."""
    source_class = type(model)

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | inputs
        rows = {name: value.unsqueeze(1) for name, value in named.items() if name in names and value is not None}
        others = {name: value for name, value in named.items() if name not in names}
        return source_class.forward(self, **rows, **others)

    parameters = inspect.signature(source_class.forward).parameters
    names = [name for name in parameters if name in _INPUTS]
    # Exporters and `text_inputs` read the names of the inputs.
    signature = inspect.Signature([parameters["self"], *(parameters[name] for name in names)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": source_class.__module__}
    model.__class__ = type(source_class.__name__, (source_class,), members)
    return model
