"""lineage: what a version was made of, what proves it, where it went, and its siblings of the same source."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from compileflow.contracts import ModelRegistry, ModelVersion, Promotion


class Lineage(BaseModel):
    """One version with its past and its siblings.

    Attributes:
        version: The version itself: source, artifact and report with their digests.
        promotions: Each change of its stage, oldest first.
        siblings: Other versions that were compiled from the same source model, newest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ModelVersion
    promotions: tuple[Promotion, ...]
    siblings: tuple[ModelVersion, ...]


def lineage_of(registry: ModelRegistry, name: str, version: int | str) -> Lineage:
    """Return a version's lineage.

    Raises:
        RegistryError: there is no such version.
    """
    found = registry.get(name, version)
    siblings = (each for each in registry.compiled_from(found.source_uri))
    return Lineage(
        version=found,
        promotions=tuple(registry.promotions(name, found.version)),
        siblings=tuple(each for each in siblings if (each.name, each.version) != (found.name, found.version)),
    )
