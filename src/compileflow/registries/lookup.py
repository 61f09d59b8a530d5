"""The choice of a version by number or stage, and the rules and errors that all registries share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from compileflow.contracts import STAGES, ModelVersion, Promotion, Stage
from compileflow.errors import RegistryError


def choose_version(name: str, versions: Sequence[ModelVersion], version: int | str) -> ModelVersion:
    """Return the version of that number, or the newest one in that stage.

    Args:
        name: Name of the model, for the error.
        versions: All versions of the name, newest first.
        version: A number, or a stage.

    Raises:
        RegistryError: No version matches; the hint lists the numbers, or the stages that versions are in.
    """
    for candidate in versions:
        if version in (candidate.version, candidate.stage):
            return candidate
    if isinstance(version, int):
        numbers = ", ".join(str(candidate.version) for candidate in versions)
        raise RegistryError(f"{name} has no version {version}.", hint=f"Versions: {numbers}.")
    numbers_by_stage: dict[str, list[str]] = {}
    for candidate in versions:
        numbers_by_stage.setdefault(candidate.stage, []).append(str(candidate.version))
    stages = ", ".join(f"{stage} ({' '.join(numbers)})" for stage, numbers in numbers_by_stage.items())
    if version in STAGES:
        raise RegistryError(
            f"No version of {name} is in the stage {version!r}.", hint=f"Versions by stage: {stages}."
        )
    raise RegistryError(
        f"Expected a number or a stage of {name}, got {version!r}.",
        hint=f"Stages: {', '.join(STAGES)}. Versions by stage: {stages}.",
    )


def read_version(text: str, place: str, registry_fields: Mapping[str, object]) -> ModelVersion:
    """Combine an entry's JSON with the fields that the registry keeps beside it.

    Args:
        text: JSON of the registered entry.
        place: Place of the entry for the error, for example "ner 3 in sqlite:////reg.db".
        registry_fields: Number, time and stage; and the name, which takes the place of the one in the JSON.

    Raises:
        RegistryError: This compileflow cannot read the JSON as an entry.
    """
    try:
        return ModelVersion.model_validate(json.loads(text) | dict(registry_fields))
    except (ValueError, TypeError, RecursionError) as error:
        raise RegistryError(
            f"{place} does not hold an entry that this compileflow can read ({type(error).__name__}).",
            hint="Use the version of compileflow that registered it, or delete that entry.",
        ) from error


def read_promotion(record: str | Mapping[str, object], place: str) -> Promotion:
    """Return a promotion as a registry keeps it.

    Args:
        record: JSON of the promotion, or its fields.
        place: Place of its version for the error.

    Raises:
        RegistryError: This compileflow cannot read the record as a promotion.
    """
    try:
        return Promotion.model_validate(json.loads(record) if isinstance(record, str) else record)
    except (ValueError, TypeError, RecursionError) as error:
        raise RegistryError(
            f"{place} has a promotion that this compileflow cannot read ({type(error).__name__}).",
            hint="Use the version of compileflow that recorded it, or delete that promotion.",
        ) from error


def unknown_name(uri: str, name: str, names: Iterable[str]) -> RegistryError:
    """Return the error for a name that a registry does not have; `names` are those that it has."""
    known_names = sorted(set(names))
    near_names = get_close_matches(name, known_names, n=5, cutoff=0.6)
    if near_names:
        hint = f"Similar names: {', '.join(near_names)}."
    elif known_names:
        hint = f"It has: {', '.join(known_names[:10])}{' and others' if known_names[10:] else ''}."
    else:
        hint = "It is empty; register a model first."
    return RegistryError(f"The registry {uri} has no model {name!r}.", hint=hint)


def check_stage(stage: str) -> None:
    """Refuse the name of a stage that does not exist.

    Raises:
        RegistryError: The stage does not exist; the hint lists the stages.
    """
    if stage not in STAGES:
        raise RegistryError(f"Unknown stage {stage!r}.", hint=f"Choose one of: {', '.join(STAGES)}.")


def is_exclusive(stage: str) -> bool:
    """Return whether only one version of a name may be in a stage at a time."""
    return stage in ("staging", "production")


def replaced_by(version: int, stage: Stage) -> str:
    """Return the reason that is stored with a version that another version replaced in a stage."""
    return f"version {version} took its place in {stage}"
