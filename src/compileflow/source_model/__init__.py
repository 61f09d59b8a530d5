"""The uncompiled model: its tasks, how it is loaded, its interface, its example inputs and its processor."""

from __future__ import annotations

from compileflow.source_model.examples import calibration_tensors, example_inputs, example_length
from compileflow.source_model.interface import (
    SourceModel,
    as_tuple_module,
    free_axes,
    length_limit,
    tokenizer_maximum,
)
from compileflow.source_model.load import load_config, load_source_model, release_weights
from compileflow.source_model.tasks import AUTO_CLASSES, HEADS, UNMASKED_TASKS, task_of_architecture, tasks_of

__all__ = [
    "AUTO_CLASSES",
    "HEADS",
    "UNMASKED_TASKS",
    "SourceModel",
    "as_tuple_module",
    "calibration_tensors",
    "example_inputs",
    "example_length",
    "free_axes",
    "length_limit",
    "load_config",
    "load_source_model",
    "release_weights",
    "task_of_architecture",
    "tasks_of",
    "tokenizer_maximum",
]
