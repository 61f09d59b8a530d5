"""The local store: the conformance suite, and faults that only a file system can cause."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compileflow.admin.mirror import mirror_store
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import OpenArtifact, copy_artifact
from compileflow.catalog import open_store
from compileflow.cli import app
from compileflow.contracts.digests import list_files
from compileflow.errors import IntegrityError, ManifestError, SpecError, StoreError
from compileflow.settings import Settings
from compileflow.stores import local
from compileflow.stores.layout import split_uri
from tests.conformance.collection_races import CollectionRaces
from tests.unit.attested_artifacts import digest_of, small_artifact


class TestLocalStore(CollectionRaces):
    @pytest.fixture
    def store_uri(self, tmp_path: Path) -> str:
        return (tmp_path / "store").as_uri()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a full disk needs root, to mount a small tmpfs")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def model_folder(parent: Path, *, size_bytes: int) -> Path:
    folder = parent / "model"
    folder.mkdir()
    (folder / "small").write_bytes(b"small")
    (folder / "weights").write_bytes(os.urandom(size_bytes))
    return folder


def test_full_disk_is_named_leaves_nothing_half_written_and_ends_with_the_lack(
    small_disk: Path, tmp_path: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    store = open_store((small_disk / "store").as_uri())
    folder = model_folder(tmp_path, size_bytes=600_000)
    with pytest.raises(StoreError, match="ENOSPC") as caught:
        store.put_folder(folder)
    assert not caught.value.retryable
    assert "Free some space" in caught.value.hint
    assert list(store.list()) == []
    assert list((small_disk / "store" / "tmp").iterdir()) == []
    assert all(path.stat().st_size == 5 for path in (small_disk / "store" / "blobs").rglob("*") if path.is_file())
    ballast.unlink()
    digest = store.put_folder(folder).digest
    assert store.exists(digest)


def test_full_disk_keeps_the_old_record(small_disk: Path) -> None:
    store = open_store((small_disk / "store").as_uri())
    store.put_record("cache", "key", {"n": 1})
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(StoreError, match="ENOSPC"):
        store.put_record("cache", "key", {"n": 2, "text": "x" * 5000})
    assert store.get_record("cache", "key") == {"n": 1}


def test_full_disk_at_the_destination_leaves_no_partial_folder(small_disk: Path, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    digest = store.put_folder(model_folder(tmp_path, size_bytes=2_000_000)).digest
    with pytest.raises(StoreError, match="ENOSPC"):
        store.get_folder(digest, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_store_below_a_plain_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = open_store((tmp_path / "file" / "store").as_uri())
    folder = model_folder(tmp_path, size_bytes=10)
    for act in (
        lambda: store.put_folder(folder),
        lambda: store.put_record("cache", "key", {}),
        lambda: store.lock("key", on_wait=lambda: None).__enter__(),
    ):
        with pytest.raises(StoreError, match=r"ENOTDIR|EEXIST") as caught:
            act()
        assert "choose another folder" in caught.value.hint
        assert "\n" not in str(caught.value)


def test_store_below_a_plain_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = open_store((tmp_path / "file" / "store").as_uri())
    assert not store.exists("0" * 64)
    assert store.get_record("cache", "key") is None
    assert list(store.list()) == []


def test_store_on_a_read_only_file_system_can_be_read(
    small_disk: Path, tmp_path: Path, settings: Settings
) -> None:
    artifact = small_artifact(tmp_path / "artifact")
    store = open_store((small_disk / "store").as_uri())
    stored_folder = store.put_folder(artifact)
    store.put_record("cache", "key", {"n": 1})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with store.open_folder(stored_folder.digest) as opened:
        assert list_files(opened) == list_files(artifact)
    assert list(settings.work_dir.iterdir()) == []
    store.get_folder(stored_folder.digest, tmp_path / "out")
    assert list_files(tmp_path / "out") == list_files(artifact)
    assert store.exists(stored_folder.digest)
    assert list(store.list()) == [stored_folder.digest]
    assert store.get_record("cache", "key") == {"n": 1}
    assert store.gc((), min_age_s=0, dry_run=True).folders == 1
    assert mirror_store(store.uri, (tmp_path / "mirror").as_uri(), settings=settings) == 1
    for command, line in (("inspect", "onnx-runtime"), ("verify", f"digest {stored_folder.digest}")):
        outcome = CliRunner().invoke(app, [command, stored_folder.uri])
        assert line in outcome.output
        assert "EROFS" not in outcome.output
    with pytest.raises(StoreError, match="EROFS"):
        store.put_record("cache", "key", {"n": 2})


def test_blobs_cannot_be_written_by_accident(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    digest = store.put_folder(model_folder(tmp_path, size_bytes=10)).digest
    with store.open_folder(digest) as opened:
        assert (opened / "weights").stat().st_mode & 0o222 == 0


def test_store_whose_path_has_a_space_works(tmp_path: Path) -> None:
    store = open_store((tmp_path / "a store").as_uri())
    assert "%20" in store.uri
    assert store.exists(store.put_folder(model_folder(tmp_path, size_bytes=10)).digest)
    assert (tmp_path / "a store" / "manifests").is_dir()


@pytest.mark.parametrize("uri", ["file://host/folder", "file:", "file://"])
def test_uri_of_another_machine_or_without_a_path_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="file:///absolute/path"):
        open_store(uri)


def test_full_disk_leaves_no_partial_copy_of_an_artifact(small_disk: Path, tmp_path: Path) -> None:
    folder = small_artifact(tmp_path / "artifact", graph=os.urandom(2_000_000))
    artifact = OpenArtifact(folder, read_manifest(folder), digest_of(folder), verified=True)
    (small_disk / "there").mkdir()
    for name in ("absent", "there"):
        with pytest.raises(StoreError, match="ENOSPC") as caught:
            copy_artifact(artifact, small_disk / name)
        assert "Free some space" in caught.value.hint
    assert [path.name for path in small_disk.rglob("*")] == ["there"]


def test_blob_that_is_collected_while_it_is_read_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    digest = store.put_folder(model_folder(tmp_path, size_bytes=10)).digest

    def collected(blob: Path, out: Path) -> None:
        blob.unlink()
        linking(blob, out)

    linking = local.link_or_copy
    monkeypatch.setattr(local, "link_or_copy", collected)
    with pytest.raises(IntegrityError, match="missing or altered"), store.open_folder(digest):
        pass


def test_record_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    for key in ("records/cache/key.json", f"manifests/sha256/{'a' * 64}.json"):
        (tmp_path / "store" / key).mkdir(parents=True)
    for act in (lambda: store.get_record("cache", "key"), lambda: store.exists("a" * 64)):
        with pytest.raises(StoreError, match=r"Cannot read .*EISDIR"):
            act()


def test_listings_that_this_user_may_not_see_stop_a_collection() -> None:
    """Otherwise their blobs would be garbage. Other users cannot enter tmp_path, so the store is elsewhere."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        store = open_store((Path(parent) / "store").as_uri())
        digest = store.put_folder(model_folder(Path(parent), size_bytes=10)).digest
        for path in (Path(parent) / "store").rglob("*"):
            path.chmod(0o777 if path.is_dir() else 0o666)
        listings = Path(parent) / "store" / "manifests" / "sha256"
        listings.chmod(0o300)
        with without_root_rights():
            for act in (lambda: store.gc((), min_age_s=0), lambda: list(store.list())):
                with pytest.raises(StoreError, match="EACCES"):
                    act()
        listings.chmod(0o700)
        assert store.exists(digest)


@contextmanager
def without_root_rights() -> Iterator[None]:
    """Give up the right of root to read everything; does nothing for another user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("uri", ["s3://AKIA:se/cret@bucket/x", "https://me:se/cret@host/x.json"])
def test_uri_with_credentials_is_not_repeated(uri: str) -> None:
    with pytest.raises(ManifestError, match="neither an artifact folder nor an artifact URI") as caught:
        split_uri(uri)
    assert "se/cret" not in str(caught.value)
