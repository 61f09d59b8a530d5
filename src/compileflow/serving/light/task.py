"""LightTask: what the light pipelines of all tasks have in common. Each task prepares an item and answers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.model import LightModel
from compileflow.serving.rows import PreparedItem, checked_batch_size, run_item, run_rows
from compileflow.spec import HfTask

Settings = Mapping[str, Any]


class LightTask:
    """Answers items with a compiled model, with the inputs, settings and answers of transformers' pipeline.

    Attributes:
        model: The compiled model.
        task: Hub task.
        settings: Settings of each call.
        load_settings, call_settings: Names of the settings that the constructor and a call take.
    """

    hf_task: ClassVar[HfTask]
    load_settings: ClassVar[tuple[str, ...]] = ()
    call_settings: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls.call_settings = cls.load_settings

    def __init__(self, model: LightModel, **settings: Any):
        self.model = model
        self.task = self.hf_task.value
        self.settings = settings
        self.check(settings)

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Answer an item, a list of items in batches of similar length, or the items of an iterator.

        Raises:
            InputError: The task cannot read an item, or a setting has a wrong value.
        """
        if isinstance(inputs, Iterator):
            return (self(item, **settings) for item in inputs)
        call = {**self.settings, **settings}
        self.check(call)
        batch_size = checked_batch_size(call.get("batch_size"))
        if not isinstance(inputs, list):
            return run_item(self.model, self.prepare(inputs, call), partial(self.answer, call))
        prepared = (self.prepare(item, call) for item in inputs)
        return list(run_rows(self.model, prepared, partial(self.answer, call), batch_size=batch_size))

    def check(self, settings: Settings) -> None:
        """Check the values of settings.

        Raises:
            InputError: A value is wrong.
        """

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[Any]:
        """Turn one item into rows of the component."""
        raise NotImplementedError

    def answer(self, settings: Settings, details: Any, row_outputs: list[Arrays]) -> Any:
        """Turn the outputs of an item's rows into its answer."""
        raise NotImplementedError


def checked_top_k(value: Any, *, none_is_all: bool) -> None:
    """Check a number of answers.

    Raises:
        InputError: It is not a positive integer.
    """
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_number and not (value is None and none_is_all):
        raise InputError(
            f"top_k is {value!r}.",
            hint=f"Pass a positive integer{' or None for all labels' if none_is_all else ''}, or leave it out.",
        )
