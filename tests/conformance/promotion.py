"""A promotion reads the artifact's bytes, whichever registry names them."""

from __future__ import annotations

import pytest

from compileflow.admin.promote import promote_version
from compileflow.catalog import open_registry
from compileflow.contracts import ModelVersion
from compileflow.errors import StoreError
from compileflow.settings import Settings
from tests.unit.attested_artifacts import stored_entry


def promoted(uri: str, settings: Settings) -> ModelVersion:
    versions = promote_version("ner", 1, "production", registry_uris=[uri], settings=settings, who="ann")
    return versions[uri]


def check_promotion_needs_the_artifact(uri: str, settings: Settings) -> None:
    """Register a small artifact, damage it, and promote it once its bytes are back."""
    registry = open_registry(uri, settings)
    registry.register(stored_entry(settings, "ner"))
    blob = next((settings.home_dir / "store" / "blobs" / "sha256").glob("*/*"))
    content = blob.read_bytes()
    blob.unlink()
    with pytest.raises(StoreError, match=r"ner version 1 cannot enter production: .* is missing or altered"):
        promoted(uri, settings)
    assert (registry.get("ner", 1).stage, registry.promotions("ner", 1)) == ("none", [])
    blob.write_bytes(content)
    assert promoted(uri, settings).stage == "production"
