"""A collection keeps what any version in any registry needs, and stops if a registry does not answer."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from compileflow._process.folders import work_folder
from compileflow.admin import collect
from compileflow.admin.collect import collect_garbage
from compileflow.artifact.attestations.envelopes import put_statement
from compileflow.artifact.attestations.statements import verdict_statement
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import RegistryError, SpecError, StoreError
from compileflow.settings import Settings
from compileflow.steps.register import register_version
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.stores.local import LocalStore
from compileflow.testing.registries import version_entry
from tests.unit.attested_artifacts import judged, small_artifact

DAY_S = 86400.0


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings.resolved_store_uri(), settings)


def stored(store: ArtifactStore, tmp_path: Path, text: str) -> str:
    folder = tmp_path / text
    folder.mkdir()
    (folder / "file").write_text(text)
    return store.put_folder(folder).digest


def registered(tmp_path: Path, settings: Settings, name: str, **digests: str) -> str:
    """Create a registry with one version and return its URI."""
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
    dry_run = collect_garbage(store.uri, uris, settings=settings, min_age_s=0, dry_run=True)
    assert sorted(store.list()) == sorted(digests)
    assert collect_garbage(store.uri, uris, settings=settings, min_age_s=0) == dry_run
    assert (dry_run.folders, dry_run.blobs) == (1, 1)
    assert sorted(store.list()) == sorted(digests[:4])
    assert all(store.exists(digest) for digest in digests[:4])


def test_last_report_on_a_registered_artifact_stays(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    """A validation after the registration replaces the verdict, so its report must be kept."""
    names = ("artifact", "recorded", "signed", "other")
    artifact, recorded, signed, other = (stored(store, tmp_path, text) for text in names)
    store.put_record("report-of", artifact, {"report_digest": recorded})
    put_statement(store, artifact, verdict_statement(artifact, judged(report=signed)), None)
    store.put_record("report-of", "e" * 64, {"report_digest": other})
    store.put_record("provenance", artifact, {"payload": "no envelope"})
    uri = registered(tmp_path, settings, "first", artifact_digest=artifact)
    collect_garbage(store.uri, (uri,), settings=settings, min_age_s=0)
    assert sorted(store.list()) == sorted([artifact, recorded, signed])


def test_old_artifact_that_is_registered_stays_although_the_collection_began_before(
    settings: Settings, tmp_path: Path
) -> None:
    """A run registers an artifact that was compiled long ago, after the collection has read the registries."""
    store = LocalStore(settings.resolved_store_uri(), settings)
    artifact = store.put_folder(small_artifact(tmp_path / "artifact"))
    report = store.put_folder(small_artifact(tmp_path / "report", graph=b"report"))
    garbage = stored(store, tmp_path, "garbage")
    modified = time.time() - 3 * DAY_S
    for path in store.root.rglob("*"):
        os.utime(path, (modified, modified))
    version = register_version(
        FetchedSource(uri="hf://a/b", revision="main", stored_uri="", digest="5" * 64, size_bytes=1, cached=True),
        CompiledArtifact(
            uri=artifact.uri, digest=artifact.digest, cache_key="6" * 64, size_bytes=1, compile_duration_s=1.0,
            peak_rss_bytes=1, cached=True, why="",
        ),
        ValidatedArtifact(
            artifact_digest=artifact.digest, report_uri=report.uri, report_digest=report.digest, outcome="pass",
            reason="", figures={}, cached=True, why="",
        ),
        name="old", allow_warn=False, store_uri=store.uri, registry_uri=settings.resolved_registry_uri(),
        settings=settings,
    )  # fmt: skip
    store.gc((), min_age_s=DAY_S)
    assert store.exists(version.artifact_digest)
    assert store.exists(version.report_digest)
    assert not store.exists(garbage)


def test_error_does_not_show_a_registrys_password(
    store: ArtifactStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Empty:
        def versions(self) -> list[object]:
            return []

    monkeypatch.setattr(collect, "open_registry", lambda *_: Empty())
    with pytest.raises(RegistryError, match=r"mlflow:http://host:5000") as caught:
        collect_garbage(store.uri, ("mlflow:http://me:hunter2@host:5000",), settings=settings)
    assert "hunter2" not in str(caught.value)


def test_objects_younger_than_a_day_are_kept_by_default(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(store, tmp_path, "young")
    uri = registered(tmp_path, settings, "first")
    collect_garbage(store.uri, (uri,), settings=settings)
    assert list(store.list()) == [digest]


def test_missing_registry_is_an_error_and_nothing_is_deleted(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(store, tmp_path, "artifact")
    existing = registered(tmp_path, settings, "first")
    for mistyped in (f"sqlite:///{tmp_path / 'frist'}.db", f"mlflow:sqlite:///{tmp_path / 'frist'}.db"):
        with pytest.raises(RegistryError, match="frist"):
            collect_garbage(store.uri, (existing, mistyped), settings=settings, min_age_s=0)
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


def test_work_folders_of_killed_processes_are_deleted(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    uri = registered(tmp_path, settings, "first")
    stored(store, tmp_path, "young")
    parents = (settings.work_dir, settings.home_dir / "store" / "tmp")
    for parent in parents:
        (parent / "read-000000000001").mkdir(parents=True)
        (parent / "read-000000000001.lock").touch()
    with work_folder(settings.work_dir, label="live") as live:
        # The folder of a live process swept the dead one's.
        (settings.work_dir / "read-000000000002").mkdir()
        (settings.work_dir / "read-000000000002.lock").touch()
        collect_garbage(store.uri, (uri,), settings=settings, dry_run=True)
        assert (settings.work_dir / "read-000000000002").exists()
        collect_garbage(store.uri, (uri,), settings=settings)
        assert [path for path in settings.work_dir.iterdir() if path.is_dir()] == [live]
    assert not [path for parent in parents for path in parent.iterdir()]


def test_no_registry_at_all_is_refused(store: ArtifactStore, settings: Settings) -> None:
    with pytest.raises(SpecError, match="No registry"):
        collect_garbage(store.uri, (), settings=settings)


def test_collection_stops_when_the_store_does_not_list_a_folder_that_a_version_names(
    settings: Settings, tmp_path: Path
) -> None:
    """Its listing may be missing because the list is incomplete, and then others may be missing as well."""
    store = LocalStore(settings.resolved_store_uri(), settings)
    artifact, report, garbage = (stored(store, tmp_path, text) for text in ("artifact", "report", "garbage"))
    uri = registered(
        tmp_path,
        settings,
        "first",
        artifact_digest=artifact,
        artifact_uri=store.folder_uri(artifact),
        report_digest=report,
        report_uri=store.folder_uri(report),
    )
    (store.root / "manifests" / "sha256" / f"{report}.json").unlink()
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=report):
            collect_garbage(store.uri, (uri,), settings=settings, min_age_s=0, dry_run=dry_run)
    assert store.exists(garbage)
    assert collect_garbage(store.uri, (uri,), settings=settings, min_age_s=0, lost=(report,)).folders == 1
    assert list(store.list()) == [artifact]


def test_listings_are_read_at_once(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(settings.resolved_store_uri(), settings)
    digests = [stored(store, tmp_path, str(number)) for number in range(4)]
    reading, all_readers = store.read_listing, threading.Barrier(len(digests), timeout=30)

    def read_with_the_others(digest: str) -> object:
        all_readers.wait()
        return reading(digest)

    monkeypatch.setattr(store, "read_listing", read_with_the_others)
    assert store.gc(digests, min_age_s=0).folders == 0


def test_listing_that_is_written_while_others_are_deleted_keeps_its_blobs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of its blobs does not matter, because a put may take long."""
    store = LocalStore(settings.resolved_store_uri(), settings)
    deleted, written_late = (stored(store, tmp_path, text) for text in ("doomed", "late"))
    listing = store.root / "manifests" / "sha256" / f"{written_late}.json"
    body = listing.read_bytes()
    listing.unlink()
    deleting = store.delete_listing

    def written_meanwhile(digest: str, *, min_age_s: float) -> bool:
        listing.write_bytes(body)
        return deleting(digest, min_age_s=min_age_s)

    monkeypatch.setattr(store, "delete_listing", written_meanwhile)
    assert store.gc((), min_age_s=0).folders == 1
    assert list(store.list()) == [written_late]
    assert store.exists(written_late)
    assert not store.exists(deleted)
