"""check_settings: refuse settings of a pipeline that transformers does not know and would ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from pkgutil import resolve_name
from typing import Any

from compileflow.errors import SpecError
from compileflow.serving.tokenizer import call_names
from compileflow.spec import HfTask

# Settings that the constructors of pipelines take out of their **kwargs.
_HIDDEN_NAMES = ("batch_size", "num_workers", "torch_dtype")


def check_spelling(settings: Iterable[str], known_names: Iterable[str]) -> None:
    """Refuse names that are nearly one of the known names.

    Raises:
        SpecError: A name is misspelled.
    """
    known_names = list(known_names)
    for name in settings:
        near_names = get_close_matches(name, known_names, n=1, cutoff=0.8)
        if near_names:
            raise SpecError(f"Unknown argument {name!r}.", hint=f"Did you mean {near_names[0]}?")


def check_mapping(name: str, settings: Any) -> None:
    """Check that an argument holds settings by name.

    Raises:
        SpecError: It is not a mapping, or a key is not text.
    """
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise SpecError(f"Expected {name} as a dict of settings by name, got {settings!r}.", hint="Pass a dict.")


def check_settings(task: HfTask, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the pipeline of a task does not have. Pipelines of compileflow check their own.

    Raises:
        SpecError: A setting is unknown.
    """
    known_names = _known_names(task) if settings and task.pipeline_owner == "transformers" else None
    if known_names is None:
        return
    for name in settings:
        if name not in known_names:
            near_names = get_close_matches(name, known_names, n=1)
            raise SpecError(
                f"The pipeline of {task.value} has no setting {name!r}.",
                hint=f"Did you mean {near_names[0]}?" if near_names else "Leave it out.",
            )


def _known_names(task: HfTask) -> set[str] | None:
    """Return the settings of a pipeline of transformers; None if it passes all others on to the model."""
    import transformers
    from transformers.pipelines import SUPPORTED_TASKS

    sanitize = resolve_name(SUPPORTED_TASKS[task.value]["impl"])._sanitize_parameters
    calls = (transformers.pipeline, transformers.Pipeline.__init__, sanitize)
    parameters = [parameter for call in calls for parameter in signature(call).parameters.values()]
    names = {*_HIDDEN_NAMES} | {item.name for item in parameters if item.kind is not Parameter.VAR_KEYWORD}
    for name in [item.name for item in signature(sanitize).parameters.values() if item.kind is item.VAR_KEYWORD]:
        if name == "tokenizer_kwargs":
            names |= call_names(transformers.PreTrainedTokenizerFast)
        elif name == "kwargs":
            # The code looks each setting up by its name and ignores all others.
            texts = [constant for constant in sanitize.__code__.co_consts if isinstance(constant, str)]
            names |= {text for text in texts if text.isidentifier()}
        else:
            return None
    return names - {"self"}
