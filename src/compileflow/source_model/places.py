"""Places in a source model: the module and the line that an error or an operator comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from compileflow.source_model.interface import SourceModel


def place_of_error(model: Any, error: BaseException) -> str:
    """Return the innermost place of a model in the tracebacks of an error and its causes; "" if it is in none.

    Args:
        model: A transformers model.
        error: An error that was raised while the model ran.
    """
    cause: BaseException | None = error
    place = ""
    while cause is not None:
        frames = []
        traceback = cause.__traceback__
        while traceback is not None:
            frames.append((traceback.tb_frame, traceback.tb_lineno))
            traceback = traceback.tb_next
        place = _place(model, reversed(frames)) or place
        cause = cause.__cause__
    return place


def place_of_operator(source_model: SourceModel, operator: str, longest: int) -> str:
    """Run a model on an example, and return the first place that uses an operator; "" if none is seen.

    Args:
        source_model: The source model.
        operator: Name of the operator, for example aten.fft_rfft.
        longest: Longest row of the example.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    name = operator.rpartition(".")[2].rstrip("_")
    places: list[str] = []

    def note(called: str) -> None:
        if not places and called.rstrip("_") == name:
            places.append(_place(source_model.model, _calling_frames()))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    # The model failed in the toolchain already; without a place, its error still says why.
    with suppress(Exception), torch.no_grad(), Functions(), Operators():  # type: ignore[no-untyped-call]
        source_model.model(**source_model.export_tensors(longest))
    return places[0] if places else ""


def _calling_frames() -> Iterable[tuple[FrameType, int]]:
    """Return the frames that called this function, from the innermost outwards, with their lines."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _place(model: Any, frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the first frame that runs a method of one of a model's modules, in words; "" for none."""
    names: Mapping[int, str] = {id(module): name for name, module in model.named_modules()}
    for frame, line in frames:
        owner = frame.f_locals.get("self")
        file_name = Path(frame.f_code.co_filename).name
        # torch calls a module through methods of the module itself.
        if id(owner) in names and file_name != "module.py":
            name = names[id(owner)]
            return f"{name or 'the whole model'} ({type(owner).__name__}), {file_name} line {line}"
    return ""
