"""s3://bucket/prefix: an artifact store on S3 or any server that speaks it, in the layout of all stores."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

from pydantic import JsonValue

from compileflow._process.folders import os_errors, work_folder
from compileflow.contracts import Collected, FileRecord, StoredFolder
from compileflow.contracts.digests import folder_digest, listing_bytes
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S, Aged, collect
from compileflow.stores.s3.downloads import BlobCache, fetch_blob
from compileflow.stores.s3.folders import FolderUpload, each, find_blobs
from compileflow.stores.s3.lease import lease
from compileflow.stores.s3.objects import Found, S3Objects
from compileflow.stores.s3.progress import TransferProgress
from compileflow.stores.s3.uploads import BlobUploads

_BUCKET = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9._-]{1,62}")
# How often a put starts again when a collection took what it relied on.
_PUTS = 5
_STALE_UPLOAD = timedelta(days=7)


class S3Store:
    """Folders as content-addressed objects below a bucket's prefix."""

    def __init__(self, uri: str, settings: Settings):
        """Take the place and how to get there; nothing is asked of the server yet."""
        parsed = urlparse(uri)
        if parsed.scheme != "s3" or not _BUCKET.fullmatch(parsed.netloc) or parsed.query or parsed.fragment:
            # Whatever stands before an @ may be a secret.
            shown = re.sub(r"//.*@", "//...@", uri)
            raise SpecError(f"{shown!r} is no place on S3.", hint="Write it as s3://bucket/prefix.")
        self.uri = uri.rstrip("/")
        prefix = parsed.path.strip("/")
        self._at_once = settings.s3_files_at_once
        self._lease_s = settings.s3_lease_s
        self._objects = S3Objects(
            self.uri, bucket=parsed.netloc, prefix=f"{prefix}/" if prefix else "", settings=settings
        )
        self._uploads = BlobUploads(self._objects)
        self._cache = BlobCache(settings.home_dir / "blobs")

    def put_folder(self, folder: Path) -> StoredFolder:
        """Send the blobs that are not there yet, several at once, then the listing.

        Raises:
            StoreError: refused, or the folder changed meanwhile.
            StoreUnavailableError: no answer; the next put sends only what is missing.
        """
        for _ in range(_PUTS):
            upload = FolderUpload(folder, self._objects, self._uploads, at_once=self._at_once)
            with os_errors(folder, "read"):
                files = upload.send()
            digest = folder_digest(files)
            refreshed = self._put_listing(listing_bytes(files), digest) or upload.refreshed > 0
            # stores/collecting.py says why.
            if not refreshed or self.exists(digest):
                return StoredFolder(self.folder_uri(digest), digest, sum(record.size_bytes for record in files))
        raise layout.collected_meanwhile(self.uri, folder)

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Write the folder below `dest`; what this machine's cache has is copied from there.

        Raises:
            IntegrityError: the folder is absent, or a blob is absent or altered.
            StoreError: `dest` exists or cannot be written, or the server refused.
            StoreUnavailableError: no answer.
        """
        files = self._listing(digest)
        with os_errors(dest, "write to"):
            dest.mkdir(parents=True)
            try:
                with TransferProgress("fetching", sum(record.size_bytes for record in files)) as progress:

                    def get(record: FileRecord) -> None:
                        out = dest / record.path
                        out.parent.mkdir(parents=True, exist_ok=True)
                        if self._cache.copy(record, out):
                            progress.add(record.size_bytes)
                        else:
                            fetch_blob(self._objects, record, out, progress.add)

                    each(get, sorted(files, key=lambda record: -record.size_bytes), at_once=self._at_once)
            except BaseException:
                # A half-written folder would stand in the way of the next try.
                shutil.rmtree(dest, ignore_errors=True)
                raise
        return files

    @contextmanager
    def open_folder(self, digest: str) -> Iterator[Path]:
        """Give links into this machine's cache, each verified; nobody may write to them."""
        files = self._listing(digest)
        with work_folder(self._cache.root / "tmp", label="read") as work:
            with os_errors(self._cache.root, "write to the cache"):
                (work / "folder").mkdir()
                blobs = dict(zip((one.sha256 for one in _distinct(files)), self._cached(files, work), strict=True))
                for record in files:
                    out = work / "folder" / record.path
                    out.parent.mkdir(parents=True, exist_ok=True)
                    layout.link_or_copy(blobs[record.sha256], out)
            yield work / "folder"

    def exists(self, digest: str) -> bool:
        """Say whether the listing and every blob, at its right size, are there.

        Raises:
            StoreError: the server refused; StoreUnavailableError when it did not answer.
        """
        try:
            blobs = _distinct(self._listing(digest))
        except IntegrityError:
            return False
        there = find_blobs(self._objects, blobs, at_once=self._at_once)
        return all(_fits(there[record.sha256], record) for record in blobs)

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders, sorted."""
        for listing in self.aged_listings():
            yield listing.digest

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/{layout.LISTINGS}{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a pointer; readers see the old one or the new one, never a part."""
        self._objects.write(layout.record_key(kind, key), layout.record_body(dict(value)))

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Read a pointer. One that is not JSON counts as absent."""
        read = self._objects.read(layout.record_key(kind, key))
        return layout.parse_record(read[0]) if read is not None else None

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all pointers of a kind, sorted."""
        below = layout.records_key(kind)
        for found in self._objects.list(below):
            yield found.key.removeprefix(below).removesuffix(".json")

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a key alone among all machines that use this store, as stores/s3_lease.py explains."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return lease(self._objects, f"locks/{name}.json", lease_s=self._lease_s, on_wait=on_wait)

    def gc(self, keep: Collection[str], *, min_age_s: float, dry_run: bool = False) -> Collected:
        """Delete what nobody needs, as stores/collecting.py explains, and uploads that were left a week ago.

        Raises:
            IntegrityError: a listing cannot be read; nothing was deleted.
            StoreError: the server refused; StoreUnavailableError when it did not answer.
        """
        collected = collect(self, keep, min_age_s=min_age_s, dry_run=dry_run)
        if not dry_run:
            self._objects.abort_uploads(layout.BLOBS, min_age=_STALE_UPLOAD)
        return collected

    def aged_listings(self) -> Iterator[Aged]:
        """Yield all listings."""
        return self._aged(layout.LISTINGS)

    def aged_blobs(self) -> Iterator[Aged]:
        """Yield all blobs."""
        return self._aged(layout.BLOBS)

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder, or None when it has gone."""
        key = layout.listing_key(digest)
        read = self._objects.read(key)
        return layout.parse_listing(read[0], digest, f"{self.uri}/{key}") if read is not None else None

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still that old."""
        return self._delete_old(layout.listing_key(digest), min_age_s)

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still that old."""
        return self._delete_old(layout.blob_key(sha256), min_age_s)

    def _put_listing(self, body: bytes, digest: str) -> bool:
        key = layout.listing_key(digest)
        for _ in range(_PUTS):
            there = self._objects.head(key)
            if there is not None and there.size_bytes == len(body):
                if there.age_s < REFRESH_AFTER_S:
                    return False
                if self._objects.refresh(there, blob=False):
                    return True
            elif self._objects.write_if(key, body, etag=there.etag if there is not None else None):
                return False
        raise layout.collected_meanwhile(self.uri, digest)

    def _cached(self, files: Sequence[FileRecord], work: Path) -> Sequence[Path]:
        """Return each distinct blob's file in the cache; what it lacks is fetched by way of `work`."""
        blobs = _distinct(files)
        with TransferProgress("fetching", sum(record.size_bytes for record in blobs)) as progress:

            def get(record: FileRecord) -> Path:
                path = self._cache.find(record)
                if path is not None:
                    progress.add(record.size_bytes)
                    return path
                fetch_blob(self._objects, record, work / record.sha256, progress.add)
                return self._cache.add(record, work / record.sha256)

            return each(get, blobs, at_once=self._at_once)

    def _listing(self, digest: str) -> tuple[FileRecord, ...]:
        files = self.read_listing(digest)
        if files is None:
            raise layout.no_folder(self.uri, digest)
        return files

    def _aged(self, below: str) -> Iterator[Aged]:
        for found in self._objects.list(below):
            digest = found.key.rpartition("/")[2].removesuffix(".json")
            if layout.is_digest(digest):
                yield Aged(digest, found.size_bytes, found.age_s)

    def _delete_old(self, key: str, min_age_s: float) -> bool:
        found = self._objects.head(key)
        return found is not None and found.age_s >= min_age_s and self._objects.delete(key)


def _distinct(files: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    """Return each blob once, the largest first: it would be waited for at the end."""
    return tuple(sorted({record.sha256: record for record in files}.values(), key=lambda one: -one.size_bytes))


def _fits(there: Found | None, record: FileRecord) -> bool:
    return there is not None and there.size_bytes == record.size_bytes
