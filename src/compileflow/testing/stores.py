"""StoreConformance: the tests that every artifact store must pass. The test class of a store inherits it.

The file is long because a suite that is inherited is one class.
"""

# ruff: noqa: D102, S101 - these are pytest tests, whose names say what they check.

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

import pytest
from pydantic import JsonValue

from compileflow.contracts import ArtifactStore, Collected, FileRecord
from compileflow.contracts.digests import folder_digest, list_files, listing_bytes
from compileflow.errors import IntegrityError, StoreError
from compileflow.testing.processes import at_once, other_process, resolve, say

FILES = {"manifest.json": b'{"schema_version": 1}\n', "default/model.bin": bytes(range(256)) * 400, "empty": b""}
UNUSABLE_RECORDS = {
    "cut": b"{",
    "list": b"[1]",
    "deep": b"[" * 100_000,
    "rather deep": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
    "huge number": b'{"a": 1' + b"0" * 400 + b"}",
    "lone surrogate": b'{"a": "\\ud800"}',
    "lone surrogate in a name": b'{"\\ud800": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "17 MB": b'{"a": "' + bytes(17 * 10**6).replace(b"\0", b"a") + b'"}',
}
UNUSABLE_LISTINGS = {
    "list": b"[]",
    "deep": b'{"files": ' + b"[" * 100_000,
    "path with many folders": listing_bytes([FileRecord(path="a/" * 2000 + "a", size_bytes=0, sha256="0" * 64)]),
    "path out of the folder": b'{"files": [{"path": "../a", "size_bytes": 0, "sha256": "' + b"0" * 64 + b'"}]}',
    "huge size": b'{"files": [{"path": "a", "size_bytes": 1' + b"0" * 400 + b', "sha256": "' + b"0" * 64 + b'"}]}',
}
DAY_S = 86400.0
# A put may end before it is killed. The kill test tries again until one kill came first.
_KILLS = 6
_DEADLINE_S = 30.0


class StoreConformance:
    """The tests that every artifact store must pass.

    Inherit the class and define the fixture `store_uri`, the URI of a new, empty store.

    A store that is not in the catalog sets `opener`. A store whose objects are not files below the path of its URI
    also overrides the four `*_object*` methods and `make_old`. Their keys are paths of the layout, for example
    manifests/sha256/<digest>.json.
    """

    opener: ClassVar[str] = "compileflow.catalog:open_store"

    @pytest.fixture
    def store_uri(self) -> str:
        """Return the URI of a new, empty store."""
        raise NotImplementedError("define the fixture store_uri")

    @pytest.fixture
    def store(self, store_uri: str) -> ArtifactStore:
        """Open the store under test."""
        artifact_store: ArtifactStore = resolve(self.opener)(store_uri)
        return artifact_store

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Write the folder that the tests store."""
        for name, body in FILES.items():
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        return tmp_path / "folder"

    def object_stamps(self, uri: str) -> dict[str, object]:
        """Return the key of every object, with a value that changes when the object is written again."""
        root = _root(uri)
        stats = {path.relative_to(root).as_posix(): path.stat() for path in root.rglob("*") if path.is_file()}
        return {key: (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for key, stat in stats.items()}

    def read_object(self, uri: str, key: str) -> bytes:
        """Return the bytes of an object without using the store."""
        return (_root(uri) / key).read_bytes()

    def write_object(self, uri: str, key: str, body: bytes) -> None:
        """Write an object, or replace its bytes, without using the store."""
        path = _root(uri) / key
        path.unlink(missing_ok=True)
        path.write_bytes(body)

    def delete_object(self, uri: str, key: str) -> None:
        """Delete an object without using the store."""
        (_root(uri) / key).unlink()

    def make_old(self, uri: str, key: str, *, seconds: float) -> None:
        """Make an object older by a number of seconds, without using the store."""
        path = _root(uri) / key
        modified = path.stat().st_mtime - seconds
        os.utime(path, (modified, modified))

    def test_a_folder_comes_back_as_it_was_put(self, store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
        stored_folder = store.put_folder(folder)
        records = store.get_folder(stored_folder.digest, tmp_path / "out")
        assert _contents(tmp_path / "out") == FILES
        assert sorted(record.path for record in records) == sorted(FILES)
        assert stored_folder.size_bytes == sum(map(len, FILES.values()))

    def test_opened_folder_is_gone_after_the_block(self, store: ArtifactStore, folder: Path) -> None:
        digest = store.put_folder(folder).digest
        with store.open_folder(digest) as copy:
            assert _contents(copy) == FILES
        assert not copy.exists()

    def test_digest_is_that_of_the_folder(self, store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
        digest = store.put_folder(folder).digest
        assert digest == folder_digest(list_files(folder))
        assert store.put_folder(shutil.copytree(folder, tmp_path / "moved")).digest == digest

    def test_stored_folder_has_an_address_in_the_store(self, store: ArtifactStore, folder: Path) -> None:
        stored_folder = store.put_folder(folder)
        assert stored_folder.uri == store.folder_uri(stored_folder.digest)
        assert stored_folder.uri.startswith(store.uri)
        assert stored_folder.digest in stored_folder.uri

    def test_same_bytes_again_write_nothing(self, store: ArtifactStore, store_uri: str, folder: Path) -> None:
        store.put_folder(folder)
        stamps = self.object_stamps(store_uri)
        assert stamps
        store.put_folder(folder)
        assert self.object_stamps(store_uri) == stamps

    def test_only_new_bytes_are_written(self, store: ArtifactStore, store_uri: str, folder: Path) -> None:
        store.put_folder(folder)
        stamps = self.object_stamps(store_uri)
        (folder / "added").write_bytes(b"added")
        store.put_folder(folder)
        new_stamps = self.object_stamps(store_uri)
        assert stamps.items() <= new_stamps.items()
        assert len(new_stamps) == len(stamps) + 2

    def test_list_yields_what_was_put(self, store: ArtifactStore, folder: Path) -> None:
        assert list(store.list()) == []
        first_digest = store.put_folder(folder).digest
        (folder / "added").write_bytes(b"added")
        second_digest = store.put_folder(folder).digest
        assert sorted(store.list()) == sorted([first_digest, second_digest])

    def test_reopened_store_holds_the_folder(self, store: ArtifactStore, store_uri: str, folder: Path) -> None:
        digest = store.put_folder(folder).digest
        assert resolve(self.opener)(store_uri).exists(digest)

    def test_unknown_folder_is_absent(self, store: ArtifactStore, tmp_path: Path) -> None:
        assert not store.exists("0" * 64)
        with pytest.raises(IntegrityError, match="000000000000"):
            store.get_folder("0" * 64, tmp_path / "out")

    def test_path_is_not_accepted_as_a_digest(self, store: ArtifactStore, tmp_path: Path) -> None:
        assert not store.exists("../../etc/passwd")
        with pytest.raises(IntegrityError, match="Expected a digest"):
            store.get_folder("../../etc/passwd", tmp_path / "out")

    def test_folder_that_is_absent_is_refused(self, store: ArtifactStore, store_uri: str, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="is not a folder"):
            store.put_folder(tmp_path / "absent")
        assert self.object_stamps(store_uri) == {}

    def test_existing_destination_is_refused(self, store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
        digest = store.put_folder(folder).digest
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_bytes(b"mine")
        with pytest.raises(StoreError, match="EEXIST"):
            store.get_folder(digest, tmp_path / "out")
        assert _contents(tmp_path / "out") == {"mine": b"mine"}

    @pytest.mark.parametrize("same_size", [True, False])
    def test_altered_blob_is_refused(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path, *, same_size: bool
    ) -> None:
        digest = store.put_folder(folder).digest
        key = self._blob_key(folder, "default/model.bin")
        body = self.read_object(store_uri, key)
        self.write_object(store_uri, key, b"\xff" + body[1:] if same_size else body[:-1])
        with pytest.raises(IntegrityError, match=r"default/model\.bin"):
            store.get_folder(digest, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(IntegrityError, match=r"default/model\.bin"), store.open_folder(digest):
            pytest.fail("an altered folder was opened")

    def test_missing_blob_makes_the_folder_absent_until_it_is_put_again(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        self.delete_object(store_uri, self._blob_key(folder, "default/model.bin"))
        assert not store.exists(digest)
        with pytest.raises(IntegrityError, match=r"default/model\.bin"):
            store.get_folder(digest, tmp_path / "out")
        store.put_folder(folder)
        store.get_folder(digest, tmp_path / "out")
        assert _contents(tmp_path / "out") == FILES

    def test_put_replaces_an_altered_blob(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        key = self._blob_key(folder, "default/model.bin")
        self.write_object(store_uri, key, b"\xff" + self.read_object(store_uri, key)[1:])
        with pytest.raises(IntegrityError, match=key):
            store.get_folder(digest, tmp_path / "altered")
        assert store.put_folder(folder).digest == digest
        store.get_folder(digest, tmp_path / "out")
        assert _contents(tmp_path / "out") == FILES

    @pytest.mark.parametrize("same_size", [True, False])
    def test_put_replaces_an_altered_listing(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path, *, same_size: bool
    ) -> None:
        digest = store.put_folder(folder).digest
        key = f"manifests/sha256/{digest}.json"
        body = self.read_object(store_uri, key)
        self.write_object(store_uri, key, b"[" + body[1:] if same_size else body[:-20])
        assert store.put_folder(folder).digest == digest
        assert self.read_object(store_uri, key) == body
        store.get_folder(digest, tmp_path / "out")
        assert _contents(tmp_path / "out") == FILES

    def test_altered_listing_is_refused(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        key = f"manifests/sha256/{digest}.json"
        self.write_object(store_uri, key, self.read_object(store_uri, key).replace(b'"empty"', b'"../up"'))
        assert not store.exists(digest)
        with pytest.raises(IntegrityError, match="altered"):
            store.get_folder(digest, tmp_path / "out")
        assert not (tmp_path / "up").exists()

    @pytest.mark.parametrize(
        ("paths", "problem"),
        [
            (("f", "f"), "it names 'f' twice"),
            (("f", "f/g"), "it names 'f' as a file and as a folder"),
            (("f-", "f/g/h", "f"), "it names 'f' as a file and as a folder"),
        ],
    )
    def test_listing_whose_paths_exclude_one_another_is_refused(
        self,
        store: ArtifactStore,
        store_uri: str,
        folder: Path,
        tmp_path: Path,
        *,
        paths: tuple[str, ...],
        problem: str,
    ) -> None:
        store.put_folder(folder)
        records = [
            record.model_copy(update={"path": path})
            for record, path in zip(list_files(folder), paths, strict=False)
        ]
        digest = self._write_listing(store_uri, listing_bytes(records))
        objects = {key: self.read_object(store_uri, key) for key in self.object_stamps(store_uri)}
        assert not store.exists(digest)
        with pytest.raises(IntegrityError, match=problem):
            store.get_folder(digest, tmp_path / "out")
        with pytest.raises(IntegrityError, match=problem), store.open_folder(digest):
            pass
        assert {key: self.read_object(store_uri, key) for key in self.object_stamps(store_uri)} == objects

    @pytest.mark.parametrize("name", UNUSABLE_LISTINGS)
    def test_content_that_is_not_a_listing_is_refused(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path, *, name: str
    ) -> None:
        store.put_folder(folder)
        digest = self._write_listing(store_uri, UNUSABLE_LISTINGS[name])
        assert not store.exists(digest)
        with pytest.raises(IntegrityError, match=rf"{digest}\.json is not a listing: [^\n]*$"):
            store.get_folder(digest, tmp_path / "out")
        with pytest.raises(IntegrityError, match=digest):
            store.gc({digest}, min_age_s=DAY_S)

    def test_failed_put_leaves_nothing(self, store: ArtifactStore, store_uri: str, folder: Path) -> None:
        with _writer_on(folder / "default/model.bin"), pytest.raises(StoreError, match="changed while"):
            store.put_folder(folder)
        assert list(store.list()) == []
        assert [key for key in self.object_stamps(store_uri) if key.startswith("tmp/")] == []

    def test_link_out_of_the_folder_is_refused(self, store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "outside").write_bytes(b"outside")
        (folder / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(IntegrityError, match="link"):
            store.put_folder(folder)

    def test_two_processes_store_one_folder_at_once(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path
    ) -> None:
        arguments = (self.opener, store_uri, str(folder))
        digests = at_once("compileflow.testing.stores:put", arguments, arguments)
        assert digests == [folder_digest(list_files(folder))] * 2
        store.get_folder(digests[0], tmp_path / "out")
        assert _contents(tmp_path / "out") == FILES

    def test_killed_put_leaves_no_folder_and_the_next_put_succeeds(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        for attempt in range(_KILLS):
            # More files each time: on a fast store a small put ends before it is killed.
            for number in range(200 * 2**attempt):
                (folder / f"many-{number}").write_bytes(f"{attempt} {number} ".encode() * 200)
            digest = folder_digest(list_files(folder))
            blobs = len(self._blobs(store_uri))
            with other_process("compileflow.testing.stores:put", self.opener, store_uri, str(folder)) as writer:
                _wait_for(partial(self._has_more_blobs, store_uri, blobs))
                has_ended = writer.kill() != []
            if store.exists(digest):
                continue
            assert not has_ended
            assert digest not in list(store.list())
            break
        else:
            pytest.fail(f"all {_KILLS} puts ended before they were killed, so nothing was tested")
        store.put_folder(folder)
        assert store.exists(digest)
        assert [key for key in self.object_stamps(store_uri) if key.startswith("tmp/")] == []

    def test_record_is_replaced(self, store: ArtifactStore) -> None:
        assert store.get_record("cache", "key") is None
        store.put_record("cache", "key", {"digest": "a", "parts": {"n": 1}})
        store.put_record("cache", "key", {"digest": "b"})
        assert store.get_record("cache", "key") == {"digest": "b"}
        assert store.get_record("other", "key") is None

    @pytest.mark.parametrize("name", UNUSABLE_RECORDS)
    def test_record_that_cannot_be_used_counts_as_absent(
        self, store: ArtifactStore, store_uri: str, caplog: pytest.LogCaptureFixture, *, name: str
    ) -> None:
        store.put_record("cache", "key", {})
        self.write_object(store_uri, "records/cache/key.json", UNUSABLE_RECORDS[name])
        for _ in range(2):
            assert store.get_record("cache", "key") is None
        assert len([line for line in caplog.messages if "cache/key" in line]) == 1

    def test_largest_record_comes_back(self, store: ArtifactStore) -> None:
        record: dict[str, JsonValue] = {"text": "x" * (16 * 2**20 - 100), "n": 2**64 - 1}
        store.put_record("cache", "key", record)
        assert store.get_record("cache", "key") == record

    def test_reader_sees_whole_records_while_another_process_replaces_them(
        self, store: ArtifactStore, store_uri: str
    ) -> None:
        arguments = (self.opener, store_uri)
        with other_process("compileflow.testing.stores:replace_records", *arguments) as writer:
            assert writer.line() == "first"
            numbers: set[object] = set()
            reads = 0
            deadline = time.monotonic() + _DEADLINE_S
            while reads < 300 or len(numbers) < 2:
                assert time.monotonic() < deadline, "the record was never replaced"
                record = store.get_record("cache", "key")
                assert record is not None
                assert record["text"] == str(record["n"]) * 5000
                numbers.add(record["n"])
                reads += 1

    @pytest.mark.parametrize(
        ("kind", "key"), [("..", "key"), ("cache", "../key"), ("cache", "a/b"), ("cache", "")]
    )
    def test_record_name_that_leaves_the_store_is_refused(self, store: ArtifactStore, kind: str, key: str) -> None:
        with pytest.raises(StoreError, match="record's name"):
            store.put_record(kind, key, {})

    def test_records_are_listed_by_kind(self, store: ArtifactStore) -> None:
        assert list(store.list_records("cache")) == []
        for kind, key in (("cache", "a.b"), ("cache", "c"), ("cache-latest", "d")):
            store.put_record(kind, key, {})
        assert sorted(store.list_records("cache")) == ["a.b", "c"]
        with pytest.raises(StoreError, match="record's name"):
            list(store.list_records("../cache"))

    def test_objects_with_names_that_the_store_does_not_give_are_not_listed(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        store.put_record("cache", "key", {})
        for name in ("a name", "-x", "\x1b[2J", ".key"):
            self.write_object(store_uri, f"records/cache/{name}.json", b"{}")
            self.write_object(store_uri, f"manifests/sha256/{name}.json", b"{}")
        assert list(store.list_records("cache")) == ["key"]
        assert list(store.list()) == [digest]
        assert store.gc({digest}, min_age_s=0).folders == 0

    def test_collection_deletes_old_folders_that_are_not_kept(
        self, store: ArtifactStore, store_uri: str, folder: Path, tmp_path: Path
    ) -> None:
        kept_digest = store.put_folder(folder).digest
        (folder / "added").write_bytes(b"added")
        old_digest = store.put_folder(folder).digest
        self._make_all_old(store_uri)
        (folder / "added").write_bytes(b"young")
        young_digest = store.put_folder(folder).digest
        stamps = self.object_stamps(store_uri)
        dry_run = store.gc({kept_digest}, min_age_s=DAY_S, dry_run=True)
        assert self.object_stamps(store_uri) == stamps
        assert store.gc({kept_digest}, min_age_s=DAY_S) == dry_run
        assert sorted(store.list()) == sorted([kept_digest, young_digest])
        assert (dry_run.folders, dry_run.blobs) == (1, 1)
        assert dry_run.size_bytes == len(b"added") + len(listing_bytes(_with_added(folder, b"added", tmp_path)))
        store.get_folder(kept_digest, tmp_path / "out")
        assert store.exists(young_digest)
        assert not store.exists(old_digest)

    def test_collection_keeps_young_objects(self, store: ArtifactStore, store_uri: str, folder: Path) -> None:
        digest = store.put_folder(folder).digest
        for key in self.object_stamps(store_uri):
            self.make_old(store_uri, key, seconds=0.9 * DAY_S)
        assert store.gc((), min_age_s=DAY_S) == Collected(folders=0, blobs=0, size_bytes=0)
        assert store.exists(digest)

    def test_collection_without_a_minimum_age_deletes_everything_else(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        store.put_folder(folder)
        result = store.gc((), min_age_s=0)
        assert (result.folders, result.blobs) == (1, len(FILES))
        assert [key for key in self.object_stamps(store_uri) if not key.startswith(("tmp/", "locks/"))] == []

    def test_listing_that_cannot_be_read_stops_the_collection(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        (folder / "added").write_bytes(b"added")
        store.put_folder(folder)
        self.write_object(store_uri, f"manifests/sha256/{digest}.json", b"{")
        self._make_all_old(store_uri)
        stamps = self.object_stamps(store_uri)
        with pytest.raises(IntegrityError, match=digest):
            store.gc({digest}, min_age_s=DAY_S)
        assert self.object_stamps(store_uri) == stamps

    def test_collection_stops_when_a_folder_to_keep_is_not_listed(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        store.put_folder(folder)
        self._make_all_old(store_uri)
        stamps = self.object_stamps(store_uri)
        with pytest.raises(StoreError, match="does not list 1 of the folders that must be kept, for example fff"):
            store.gc({"f" * 64}, min_age_s=DAY_S)
        assert self.object_stamps(store_uri) == stamps
        assert store.gc({"f" * 64}, min_age_s=DAY_S, may_lack={"f" * 64}).folders == 1

    def test_collection_stops_before_it_deletes_more_than_it_may(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        store.put_folder(folder)
        (folder / "added").write_bytes(bytes(10**6))
        large_digest = store.put_folder(folder).digest
        self._make_all_old(store_uri)
        stamps = self.object_stamps(store_uri)
        with pytest.raises(StoreError, match=r"would delete 1\.1 of 1\.1 MB"):
            store.gc((), min_age_s=DAY_S, at_most=0.5)
        assert self.object_stamps(store_uri) == stamps
        assert store.gc({large_digest}, min_age_s=DAY_S, at_most=0.5).folders == 1
        assert list(store.list()) == [large_digest]

    def test_folder_put_while_garbage_is_collected_is_whole(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        for _ in range(3):
            self._make_all_old(store_uri)
            with ThreadPoolExecutor(2) as threads:
                collection = threads.submit(store.gc, (), min_age_s=DAY_S)
                upload = threads.submit(store.put_folder, folder)
                collection.result()
                assert upload.result().digest == digest
            assert store.exists(digest)

    def test_put_refreshes_old_objects_so_that_a_later_collection_keeps_them(
        self, store: ArtifactStore, store_uri: str, folder: Path
    ) -> None:
        digest = store.put_folder(folder).digest
        self._make_all_old(store_uri)
        store.put_folder(folder)
        assert store.gc((), min_age_s=DAY_S) == Collected(folders=0, blobs=0, size_bytes=0)
        assert store.exists(digest)

    def test_lock_excludes_another_process_until_it_is_killed(self, store: ArtifactStore, store_uri: str) -> None:
        with other_process("compileflow.testing.stores:hold", self.opener, store_uri, "key") as holder:
            assert holder.line() == "held"
            waits: list[float] = []
            killer = threading.Timer(0.5, holder.kill)

            def on_wait() -> None:
                waits.append(time.monotonic())
                killer.start()

            with store.lock("key", on_wait=on_wait):
                acquired = time.monotonic()
            killer.join()
        assert len(waits) == 1
        assert acquired - waits[0] > 0.4

    def test_locks_of_two_keys_are_independent(self, store: ArtifactStore, store_uri: str) -> None:
        waits: list[str] = []
        with other_process("compileflow.testing.stores:hold", self.opener, store_uri, "key") as holder:
            assert holder.line() == "held"
            with store.lock("another key", on_wait=lambda: waits.append("another key")):
                assert waits == []

    def test_lock_is_free_after_an_error_in_its_block(self, store: ArtifactStore) -> None:
        waits: list[str] = []
        with pytest.raises(ZeroDivisionError), store.lock("key", on_wait=lambda: waits.append("first")):
            raise ZeroDivisionError
        with store.lock("key", on_wait=lambda: waits.append("second")):
            assert waits == []

    def _blobs(self, uri: str) -> list[str]:
        return [key for key in self.object_stamps(uri) if key.startswith("blobs/")]

    def _has_more_blobs(self, uri: str, number: int) -> bool:
        return len(self._blobs(uri)) > number

    def _make_all_old(self, uri: str) -> None:
        for key in self.object_stamps(uri):
            self.make_old(uri, key, seconds=2 * DAY_S)

    def _write_listing(self, uri: str, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        self.write_object(uri, f"manifests/sha256/{digest}.json", body)
        return digest

    @staticmethod
    def _blob_key(folder: Path, name: str) -> str:
        sha256 = next(record.sha256 for record in list_files(folder, paths=[name]))
        return f"blobs/sha256/{sha256[:2]}/{sha256}"


def _with_added(folder: Path, body: bytes, tmp_path: Path) -> tuple[FileRecord, ...]:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "added").write_bytes(body)
    return list_files(copy)


def put(opener: str, uri: str, folder: str) -> None:
    """Store a folder and print its digest. Runs in another process."""
    say(resolve(opener)(uri).put_folder(Path(folder)).digest)


def replace_records(opener: str, uri: str) -> None:
    """Replace one record until this process is killed. Runs in another process."""
    store = resolve(opener)(uri)
    number = 0
    while True:
        store.put_record("cache", "key", {"n": number % 10, "text": str(number % 10) * 5000})
        if number == 0:
            say("first")
        number += 1


def hold(opener: str, uri: str, key: str) -> None:
    """Hold a lock until this process is killed. Runs in another process."""
    with resolve(opener)(uri).lock(key, on_wait=lambda: say("waiting")):
        say("held")
        time.sleep(600)


def _root(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def _writer_on(path: Path) -> Iterator[None]:
    """Write to a file without pause during the block."""
    started, stop = threading.Event(), threading.Event()
    # The file is so large that hashing it takes longer than many writes.
    path.write_bytes(bytes(32 * 2**20))

    def write() -> None:
        number = 0
        with path.open("r+b", buffering=0) as stream:
            while not stop.is_set():
                number += 1
                stream.seek(0)
                stream.write(number.to_bytes(8))
                started.set()

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _wait_for(condition: Callable[[], bool], *, timeout_s: float = _DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {timeout_s:g} s"
        time.sleep(0.001)
