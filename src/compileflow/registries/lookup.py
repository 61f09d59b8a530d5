"""Choosing among a name's versions, and the errors that list what there is: the same in every registry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from compileflow.contracts import STAGES, ModelVersion, Stage
from compileflow.errors import RegistryError


def choose_version(name: str, found: Sequence[ModelVersion], version: int | str) -> ModelVersion:
    """Return the version of that number, or the newest one in that stage.

    Args:
        name: For the error.
        found: All versions of the name, newest first.
        version: A number, or a stage.

    Raises:
        RegistryError: there is none; the hint lists the numbers, or the stages that versions are in.
    """
    for candidate in found:
        if version in (candidate.version, candidate.stage):
            return candidate
    if isinstance(version, int):
        numbers = ", ".join(str(candidate.version) for candidate in found)
        raise RegistryError(f"{name} has no version {version}.", hint=f"It has: {numbers}.")
    held: dict[str, list[str]] = {}
    for candidate in found:
        held.setdefault(candidate.stage, []).append(str(candidate.version))
    stages = ", ".join(f"{stage} ({' '.join(numbers)})" for stage, numbers in held.items())
    if version in STAGES:
        raise RegistryError(f"No version of {name} is in the stage {version!r}.", hint=f"It has: {stages}.")
    raise RegistryError(
        f"{version!r} is neither a number nor a stage of {name}.",
        hint=f"Stages are {', '.join(STAGES)}; it has: {stages}.",
    )


def read_version(text: str, where: str, added: Mapping[str, object]) -> ModelVersion:
    """Make a version of an entry's JSON and what the registry keeps beside it.

    Args:
        text: The entry as it was registered.
        where: For the error, for example "ner 3 in sqlite:////reg.db".
        added: Number, time and stage.

    Raises:
        RegistryError: the JSON is no entry of this compileflow.
    """
    try:
        return ModelVersion.model_validate(json.loads(text) | dict(added))
    except (ValueError, TypeError) as error:
        raise RegistryError(
            f"{where} holds no entry that this compileflow can read ({type(error).__name__}).",
            hint="Use the compileflow that registered it, or delete that version.",
        ) from error


def unknown_name(uri: str, name: str, names: Iterable[str]) -> RegistryError:
    """Return the error for a name that a registry does not have; `names` are those that it has."""
    known = sorted(set(names))
    near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:10]
    return RegistryError(
        f"The registry {uri} has no model {name!r}.",
        hint=f"Near names: {', '.join(near)}." if near else "It is empty; run the flow first.",
    )


def check_stage(stage: str) -> None:
    """Refuse what is no stage.

    Raises:
        RegistryError: the hint lists the stages.
    """
    if stage not in STAGES:
        raise RegistryError(f"There is no stage {stage!r}.", hint=f"Choose one of: {', '.join(STAGES)}.")


def is_exclusive(stage: Stage) -> bool:
    """Say whether a stage is held by one version of a name at a time."""
    return stage in ("staging", "production")


def replaced_by(version: int, stage: Stage) -> str:
    """Return the reason that is kept with a version that another one moved out of a stage."""
    return f"version {version} took its place in {stage}"
