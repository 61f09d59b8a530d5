"""lineage: the source, proof, promotions and siblings of a registered version."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from compileflow.contracts import ModelRegistry, ModelVersion, Promotion


class Lineage(BaseModel):
    """One version with its history and its siblings.

    Attributes:
        version: The version itself: source, artifact and report with their digests.
        promotions: Changes of its stage, oldest first.
        siblings: Other versions that were compiled from the same source model, newest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ModelVersion
    promotions: tuple[Promotion, ...]
    siblings: tuple[ModelVersion, ...]


def lineage_of(registry: ModelRegistry, name: str, version: int | str) -> Lineage:
    """Return a version's lineage.

    Args:
        registry: Registry that has the version.
        name: Name of the model.
        version: Version number, or a stage.

    Raises:
        RegistryError: The version does not exist.
    """
    version_record = registry.get(name, version)
    relatives = registry.compiled_from(version_record.source_uri)
    return Lineage(
        version=version_record,
        promotions=tuple(registry.promotions(name, version_record.version)),
        siblings=tuple(
            relative
            for relative in relatives
            if (relative.name, relative.version) != (version_record.name, version_record.version)
        ),
    )
