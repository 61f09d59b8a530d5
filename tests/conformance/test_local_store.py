"""The local store: the conformance suite, and faults that only a file system can cause."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compileflow._process.folders import open_regular, work_folder
from compileflow.admin.mirror import mirror_store
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import OpenArtifact, copy_artifact
from compileflow.catalog import open_store
from compileflow.cli import app
from compileflow.contracts.digests import folder_digest, list_files
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

    def collected(blob: Path) -> int:
        blob.unlink()
        return open_regular(blob)

    monkeypatch.setattr(local, "open_regular", collected)
    with pytest.raises(IntegrityError, match="missing or altered"), store.open_folder(digest):
        pass


def make_large(path: Path) -> None:
    """Make a file of 40 GB that takes no room on the disk."""
    with path.open("wb") as stream:
        stream.truncate(40 * 10**9)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": make_socket,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "large": make_large,
}


PutOddFile = Callable[[Path], str]


@pytest.fixture(params=ODD_FILES)
def put_odd_file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PutOddFile]:
    """Replace a file by something that no store writes, and return what that is."""
    odd_paths = []

    def put(path: Path) -> str:
        path.unlink(missing_ok=True)
        # The name of a socket is short.
        monkeypatch.chdir(path.parent)
        ODD_FILES[request.param](Path(path.name))
        odd_paths.append(path)
        return str(request.param)

    yield put
    for path in odd_paths:
        if path.is_file() and path.stat().st_size > 10**9:
            path.unlink()


def test_record_that_is_not_a_small_file_counts_as_absent(
    tmp_path: Path, put_odd_file: PutOddFile, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    store.put_record("cache", "other", {})
    put_odd_file(tmp_path / "store" / "records" / "cache" / "key.json")
    for _ in range(2):
        assert store.get_record("cache", "key") is None
    (line,) = caplog.messages
    assert re.fullmatch(
        r"ignoring the record \S+/key\.json: it is (not a regular file|a link|larger than 16 MiB)", line
    )


def test_listing_that_is_not_a_small_file_is_refused_and_stops_a_collection(
    tmp_path: Path, put_odd_file: PutOddFile
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    folder = model_folder(tmp_path, size_bytes=10)
    stored_folder = store.put_folder(folder)
    odd_file = put_odd_file(tmp_path / "store" / "manifests" / "sha256" / f"{stored_folder.digest}.json")
    assert not store.exists(stored_folder.digest)
    for act in (
        lambda: store.open_folder(stored_folder.digest).__enter__(),
        lambda: store.gc({stored_folder.digest}, min_age_s=0),
    ):
        with pytest.raises(IntegrityError, match="is not a listing: it is"):
            act()
    assert len([path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()]) == 2
    if odd_file != "folder":
        store.put_folder(folder)
        assert store.exists(stored_folder.digest)


def test_blob_that_is_not_the_right_file_is_refused_and_put_again(
    tmp_path: Path, put_odd_file: PutOddFile
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    folder = model_folder(tmp_path, size_bytes=10)
    digest = store.put_folder(folder).digest
    odd_file = put_odd_file(next(path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()))
    assert not store.exists(digest)
    with pytest.raises(IntegrityError, match="missing or altered"):
        store.get_folder(digest, tmp_path / "out")
    if odd_file != "folder":
        store.put_folder(folder)
        assert store.exists(digest)


@pytest.mark.parametrize("odd_file", ["pipe", "link"])
def test_lock_that_is_not_a_file_is_refused(tmp_path: Path, *, odd_file: str) -> None:
    store = open_store((tmp_path / "store").as_uri())
    with store.lock("key", on_wait=lambda: None):
        (path,) = (tmp_path / "store" / "locks").iterdir()
    path.unlink()
    ODD_FILES[odd_file](path)
    with (
        pytest.raises(StoreError, match=r"Cannot lock .*: it is (not a regular file|a link)\."),
        store.lock("key", on_wait=lambda: None),
    ):
        pass


FOLDERS = "tmp locks manifests manifests/sha256 records records/cache blobs blobs/sha256 blobs/*/*"


@pytest.mark.parametrize("linked", FOLDERS.split())
def test_store_with_a_link_for_a_folder_is_refused_and_nothing_outside_changes(
    tmp_path: Path, settings: Settings, *, linked: str
) -> None:
    root, outside = tmp_path / "store", tmp_path / "outside"
    store = open_store(root.as_uri(), settings)
    folder = model_folder(tmp_path, size_bytes=10)
    store.put_folder(folder)
    store.put_record("cache", "key", {})
    with store.lock("key", on_wait=lambda: None):
        pass
    link = sorted(root.glob(linked))[0]
    link.rename(outside)
    link.symlink_to(outside)
    for name in ("uv.lock", "read-0123456789ab.lock"):
        (outside / name).touch()
    (outside / "uv").mkdir()
    for path in outside.rglob("*"):
        os.utime(path, (0, 0))
    contents = stamps(outside)
    acts = {
        "tmp": (lambda: store.put_folder(folder), lambda: store.put_record("cache", "key", {"n": 2})),
        "locks": (lambda: store.lock("key", on_wait=lambda: None),),
        "records": (lambda: store.put_record("cache", "key", {"n": 2}), lambda: store.get_record("cache", "key")),
        "manifests": (lambda: store.put_folder(folder), lambda: list(store.list())),
        "blobs": (lambda: store.put_folder(folder),),
    }[linked.partition("/")[0]]
    collections = (lambda: store.gc((), min_age_s=0),) if linked.startswith(("tmp", "manifests", "blobs")) else ()
    for act in (*acts, *collections):
        with pytest.raises(StoreError, match=f"{link} is a link") as caught:
            act()
        assert "\n" not in str(caught.value)
        assert caught.value.hint
    assert stamps(outside) == contents


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


def test_put_does_not_write_through_a_link_that_another_process_plants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "precious").write_text("precious")

    folder = model_folder(tmp_path, size_bytes=10)
    files = list_files(folder)
    names = [*(record.sha256 for record in files), f"{folder_digest(files)}.json", "key.json"]

    @contextmanager
    def planted_work_folder(parent: Path, *, label: str, below: Path) -> Iterator[Path]:
        with work_folder(parent, label=label, below=below) as work:
            for name in names:
                (work / name).symlink_to(tmp_path / "precious")
            yield work
            # Nothing that the store did not make is deleted.
            assert {path.name for path in work.iterdir()} == {*names}

    monkeypatch.setattr(local, "work_folder", planted_work_folder)
    for act in (lambda: store.put_folder(folder), lambda: store.put_record("cache", "key", {})):
        with pytest.raises(StoreError, match="EEXIST"):
            act()
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "precious").stat().st_mode & 0o200


def test_writer_of_a_store_cannot_change_a_folder_that_is_open(tmp_path: Path, settings: Settings) -> None:
    root = tmp_path / "store"
    store = open_store(root.as_uri(), settings)
    digest = store.put_folder(model_folder(tmp_path, size_bytes=10)).digest
    with store.open_folder(digest) as opened:
        assert opened.is_relative_to(settings.work_dir)
        for path in [path for path in root.rglob("*") if path.is_file()]:
            path.chmod(0o600)
            path.write_bytes(b"other")
        assert list_files(opened) == list_files(tmp_path / "model")


def test_store_in_the_home_of_the_user_is_read_without_copies_unless_others_may_write_or_results_are_signed(
    settings: Settings, tmp_path: Path
) -> None:
    store = open_store(settings.resolved_store_uri(), settings)
    digest = store.put_folder(model_folder(tmp_path, size_bytes=10)).digest
    with store.open_folder(digest) as opened:
        assert opened.is_relative_to(settings.work_dir)
        assert (opened / "weights").stat().st_nlink == 2
    for change in ({"signing_key": tmp_path / "key.pem"}, {"require_signature": True}):
        with open_store(store.uri, settings.model_copy(update=change)).open_folder(digest) as opened:
            assert (opened / "weights").stat().st_nlink == 1
    blobs = settings.home_dir / "store" / "blobs"
    for path in [path for path in blobs.rglob("*") if path.is_file()]:
        path.chmod(0o666)
    with store.open_folder(digest) as opened:
        assert (opened / "weights").stat().st_nlink == 1


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
