"""Multiple choice: each choice of a question is a row of the component, and the logits become one row again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.padding import as_array


def run_choices(component: LoadedComponent, inputs: Mapping[str, Any]) -> Arrays:
    """Run a component on inputs of shape (batch, choices, sequence).

    Args:
        component: A component that was compiled for multiple-choice.
        inputs: Tensors, arrays or lists by input name; None counts as missing.

    Returns:
        Logits of shape (batch, choices).

    Raises:
        InputError: An input does not have three axes, or the component does not take it.
    """
    arrays = {name: as_array(value) for name, value in inputs.items() if value is not None}
    for name, array in arrays.items():
        if array.ndim != 3 or not array.size:
            raise InputError(
                f"{name}: expected shape (batch, choices, sequence), got shape {array.shape}.",
                hint="Tokenize the question with each choice, with padding=True, and add an axis for the batch.",
            )
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}
    outputs = component.run(rows)
    shape = next(iter(arrays.values())).shape[:2]
    return {name: value.reshape(shape) for name, value in outputs.items()}
