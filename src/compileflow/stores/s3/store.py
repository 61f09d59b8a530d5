"""S3Store, s3://bucket/prefix: an artifact store on S3 or a compatible server."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

from pydantic import JsonValue

from compileflow._process.folders import link_or_copy, os_errors, work_folder
from compileflow.contracts import Collected, FileRecord, StoredFolder
from compileflow.contracts.digests import folder_digest, listing_bytes
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S, AgedObject, collect
from compileflow.stores.s3.blob_cache import BlobCache
from compileflow.stores.s3.blob_downloads import fetch_blob
from compileflow.stores.s3.blob_uploads import BlobUploads
from compileflow.stores.s3.folder_upload import FolderUpload, find_blobs, largest_first
from compileflow.stores.s3.lease import lease
from compileflow.stores.s3.objects import S3Object, S3Objects
from compileflow.stores.s3.progress import TransferProgress
from compileflow.stores.threads import run_for_all

_BUCKET = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9._-]{1,62}")
# Attempts of a put. A collection may delete what an attempt found in the store.
_PUT_ATTEMPTS = 5
_ABANDONED_UPLOAD = timedelta(days=7)


class S3Store:
    """Folders as content-addressed objects below a prefix of a bucket."""

    def __init__(self, uri: str, settings: Settings):
        """Keep the address and the settings. Sends no request."""
        url = urlparse(uri)
        if url.scheme != "s3" or not _BUCKET.fullmatch(url.netloc) or url.query or url.fragment:
            raise SpecError(
                f"{layout.without_user(uri)!r} is not the URI of a store on S3.",
                hint="Write it as s3://bucket/prefix.",
            )
        self.uri = uri.rstrip("/")
        prefix = url.path.strip("/")
        self._at_once = settings.s3_files_at_once
        self._lease_s = settings.s3_lease_s
        self._objects = S3Objects(
            self.uri, bucket=url.netloc, prefix=f"{prefix}/" if prefix else "", settings=settings
        )
        self._uploads = BlobUploads(self._objects)
        self._cache = BlobCache(settings.home_dir / "blobs")

    def put_folder(self, folder: Path) -> StoredFolder:
        """Send the blobs that the store lacks, several at once, then the listing.

        Raises:
            StoreError: The server refused, or the folder changed meanwhile.
            StoreUnavailableError: The server did not answer. The next put sends only what is missing.
        """
        for _ in range(_PUT_ATTEMPTS):
            upload = FolderUpload(folder, self._objects, self._uploads, at_once=self._at_once)
            with os_errors(folder, "read"):
                files = upload.send()
            digest = folder_digest(files)
            was_refreshed = self._put_listing(listing_bytes(files), digest) or upload.refreshed > 0
            # Rule 4 of stores/collecting.py.
            if not was_refreshed or self.exists(digest):
                return StoredFolder(self.folder_uri(digest), digest, sum(record.size_bytes for record in files))
        raise layout.collected_meanwhile(self.uri, folder)

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Write a folder below `dest`. Blobs in the cache of this machine are copied from there.

        Raises:
            IntegrityError: The store does not hold the folder, or a blob is missing or altered.
            StoreError: `dest` exists or cannot be written, or the server refused.
            StoreUnavailableError: The server did not answer.
        """
        files = self._listing(digest)
        with os_errors(dest, "write to"):
            dest.mkdir(parents=True)
            try:
                with TransferProgress("fetching", sum(record.size_bytes for record in files)) as progress:

                    def get(record: FileRecord) -> None:
                        path = dest / record.path
                        path.parent.mkdir(parents=True, exist_ok=True)
                        if self._cache.copy(record, path):
                            progress.add(record.size_bytes)
                        else:
                            fetch_blob(self._objects, record, path, progress.add)

                    run_for_all(get, largest_first(files), at_once=self._at_once)
            except BaseException:
                # A partial folder would block the next attempt.
                shutil.rmtree(dest, ignore_errors=True)
                raise
        return files

    @contextmanager
    def open_folder(self, digest: str) -> Iterator[Path]:
        """Give a folder of links to verified blobs in the cache of this machine. Do not write to it."""
        files = self._listing(digest)
        with work_folder(self._cache.root / "tmp", label="read") as work:
            with os_errors(self._cache.root, "write to the cache"):
                (work / "folder").mkdir()
                blobs = self._cached_blobs(files, work)
                for record in files:
                    file = work / "folder" / record.path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(blobs[record.sha256], file)
            yield work / "folder"

    def exists(self, digest: str) -> bool:
        """Say whether the listing and every blob, with the right size, are in the store.

        Raises:
            StoreError: The server refused.
            StoreUnavailableError: The server did not answer.
        """
        try:
            blobs = _distinct(self._listing(digest))
        except IntegrityError:
            return False
        objects_by_digest = find_blobs(self._objects, blobs, at_once=self._at_once)
        return all(_has_size(objects_by_digest[record.sha256], record.size_bytes) for record in blobs)

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders, sorted."""
        for listing in self.aged_listings():
            yield listing.digest

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/{layout.LISTINGS}{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a record atomically: readers see the old value or the new one."""
        self._objects.write(layout.record_key(kind, key), layout.record_body(dict(value)))

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return the value of a record; None if it is missing or cannot be used."""
        object_key = layout.record_key(kind, key)
        content = self._objects.read(object_key)
        return layout.parse_record(content[0], f"{self.uri}/{object_key}") if content is not None else None

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all records of a kind, sorted."""
        prefix = layout.records_key(kind)
        for record in self._objects.list(prefix):
            key = record.key.removeprefix(prefix).removesuffix(".json")
            if layout.is_record_name(key):
                yield key

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock that excludes all other machines that use this store, as stores/s3/lease.py explains."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return lease(self._objects, f"locks/{name}.json", lease_s=self._lease_s, on_wait=on_wait)

    def gc(
        self,
        keep: Collection[str],
        *,
        min_age_s: float,
        dry_run: bool = False,
        may_lack: Collection[str] = (),
        at_most: float = 1.0,
    ) -> Collected:
        """Delete unneeded folders and blobs, as stores/collecting.py explains, and uploads abandoned a week ago.

        Raises:
            IntegrityError: A listing cannot be read. Nothing was deleted.
            StoreError: The server refused, or does not list a folder of `keep`. Or more than `at_most` would be
                deleted.
            StoreUnavailableError: The server did not answer.
        """
        result = collect(
            self,
            keep,
            min_age_s=min_age_s,
            dry_run=dry_run,
            may_lack=may_lack,
            at_most=at_most,
            at_once=self._at_once,
        )
        if not dry_run:
            self._objects.abort_uploads(layout.BLOBS, min_age=_ABANDONED_UPLOAD)
        return result

    def aged_listings(self) -> Iterator[AgedObject]:
        """Yield all listings."""
        return self._aged(layout.LISTINGS)

    def aged_blobs(self) -> Iterator[AgedObject]:
        """Yield all blobs."""
        return self._aged(layout.BLOBS)

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder; None if its listing does not exist.

        A listing with the wrong bytes is read once more, because they may have been damaged on the way.
        """
        key = layout.listing_key(digest)
        content = self._objects.read_checked(key, lambda body: hashlib.sha256(body).hexdigest() == digest)
        return layout.parse_listing(content[0], digest, f"{self.uri}/{key}") if content is not None else None

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still at least that old."""
        return self._delete_if_old(layout.listing_key(digest), min_age_s)

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still at least that old."""
        return self._delete_if_old(layout.blob_key(sha256), min_age_s)

    def _put_listing(self, body: bytes, digest: str) -> bool:
        """Write a listing unless it is there, unaltered. Return whether an old listing was refreshed."""
        key = layout.listing_key(digest)
        for _ in range(_PUT_ATTEMPTS):
            content = self._objects.read_checked(key, lambda existing_body: existing_body == body)
            existing_body, existing_object = content or (b"", None)
            if existing_object is not None and existing_body == body:
                if existing_object.age_s < REFRESH_AFTER_S:
                    return False
                if self._objects.refresh(existing_object, blob=False):
                    return True
            elif self._objects.write_if(
                key, body, etag=existing_object.etag if existing_object is not None else None
            ):
                return False
            # Another writer was faster, or the reply to our own request was lost; the next attempt finds out.
        raise layout.collected_meanwhile(self.uri, digest)

    def _cached_blobs(self, files: Sequence[FileRecord], work: Path) -> dict[str, Path]:
        """Return the path in the cache of each blob by SHA-256. Blobs that the cache lacks are fetched."""
        blobs = _distinct(files)
        with TransferProgress("fetching", sum(record.size_bytes for record in blobs)) as progress:

            def get(record: FileRecord) -> Path:
                path = self._cache.find(record)
                if path is not None:
                    progress.add(record.size_bytes)
                    return path
                fetch = partial(fetch_blob, self._objects, record, on_bytes=progress.add)
                return self._cache.add(record, work=work, fetch=fetch)

            paths = run_for_all(get, blobs, at_once=self._at_once)
        return dict(zip((record.sha256 for record in blobs), paths, strict=True))

    def _listing(self, digest: str) -> tuple[FileRecord, ...]:
        files = self.read_listing(digest)
        if files is None:
            raise layout.no_folder(self.uri, digest)
        return files

    def _aged(self, prefix: str) -> Iterator[AgedObject]:
        for stored_object in self._objects.list(prefix):
            digest = stored_object.key.rpartition("/")[2].removesuffix(".json")
            if layout.is_digest(digest):
                yield AgedObject(digest, stored_object.size_bytes, stored_object.age_s)

    def _delete_if_old(self, key: str, min_age_s: float) -> bool:
        existing_object = self._objects.head(key)
        return existing_object is not None and existing_object.age_s >= min_age_s and self._objects.delete(key)


def _distinct(files: Sequence[FileRecord]) -> Sequence[FileRecord]:
    """Return each blob once, the largest first."""
    return largest_first(list({record.sha256: record for record in files}.values()))


def _has_size(existing_object: S3Object | None, size_bytes: int) -> bool:
    return existing_object is not None and existing_object.size_bytes == size_bytes
