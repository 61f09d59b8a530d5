"""What every version of every registry needs stays; a registry that does not answer stops the collection."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import RegistryError, SpecError
from compileflow.settings import Settings
from compileflow.steps.collect import collect_garbage
from compileflow.testing.registries import version_entry


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings.resolved_store_uri(), settings)


def stored(store: ArtifactStore, tmp_path: Path, text: str) -> str:
    folder = tmp_path / text
    folder.mkdir()
    (folder / "file").write_text(text)
    return store.put_folder(folder).digest


def registered(tmp_path: Path, settings: Settings, name: str, **digests: str) -> str:
    """Make a registry with one version; return its URI."""
    uri = f"sqlite:///{tmp_path / name}.db"
    open_registry(uri, settings).register(version_entry(name, 1).model_copy(update=digests))
    return uri


def test_artifact_report_and_source_of_every_registry_stay(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digests = [stored(store, tmp_path, text) for text in ("artifact", "report", "source", "other", "garbage")]
    first = registered(
        tmp_path,
        settings,
        "first",
        artifact_digest=digests[0],
        report_digest=digests[1],
        source_digest=digests[2],
    )
    second = registered(tmp_path, settings, "second", artifact_digest=digests[3])
    uris = (first, second)
    would = collect_garbage(store.uri, uris, settings=settings, min_age_s=0, dry_run=True)
    assert sorted(store.list()) == sorted(digests)
    assert collect_garbage(store.uri, uris, settings=settings, min_age_s=0) == would
    assert (would.folders, would.blobs) == (1, 1)
    assert sorted(store.list()) == sorted(digests[:4])
    assert all(store.exists(digest) for digest in digests[:4])


def test_what_is_younger_than_a_day_stays_unless_said_otherwise(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(store, tmp_path, "young")
    uri = registered(tmp_path, settings, "first")
    collect_garbage(store.uri, (uri,), settings=settings)
    assert list(store.list()) == [digest]


def test_registry_that_is_not_there_is_an_error_and_nothing_is_deleted(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(store, tmp_path, "artifact")
    there = registered(tmp_path, settings, "first")
    mistyped = f"sqlite:///{tmp_path / 'frist'}.db"
    with pytest.raises(RegistryError, match="frist"):
        collect_garbage(store.uri, (there, mistyped), settings=settings, min_age_s=0)
    assert store.exists(digest)
    assert not (tmp_path / "frist.db").exists()


def test_registry_without_versions_does_not_empty_the_store(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(store, tmp_path, "artifact")
    (tmp_path / "empty.db").touch()
    with pytest.raises(RegistryError, match="no version"):
        collect_garbage(store.uri, (f"sqlite:///{tmp_path / 'empty.db'}",), settings=settings, min_age_s=0)
    assert store.exists(digest)


def test_no_registry_at_all_is_refused(store: ArtifactStore, settings: Settings) -> None:
    with pytest.raises(SpecError, match="No registry"):
        collect_garbage(store.uri, (), settings=settings)
