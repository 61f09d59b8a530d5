"""The protocol of an artifact store, and the values that it returns.

`compileflow.testing.stores.StoreConformance` checks an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from compileflow.contracts.digests import FileRecord


@dataclass(frozen=True)
class StoredFolder:
    """A folder in a store.

    Attributes:
        uri: URI of the folder's listing, STORE/manifests/sha256/DIGEST.json.
        digest: Digest of the folder, 64 hex digits.
        size_bytes: Total size of the folder's files.
    """

    uri: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Collected:
    """What a garbage collection deleted, or would delete in a dry run.

    Attributes:
        folders: Number of folders.
        blobs: Number of blobs.
        size_bytes: Total size of their listings and blobs.
    """

    folders: int
    blobs: int
    size_bytes: int


class ArtifactStore(Protocol):
    """Write-once, content-addressed folders, and small records that point at them.

    Every method may raise StoreError, or StoreUnavailableError if the store did not answer.

    Attributes:
        uri: URI of the store, without a slash at the end.
    """

    uri: str

    def put_folder(self, folder: Path) -> StoredFolder:
        """Store a folder. Existing blobs are not sent again, and the listing is written last.

        A put that is killed leaves no listing, and a second put completes it.

        Args:
            folder: Local folder. No other process may write to it meanwhile.

        Raises:
            IntegrityError: The folder contains a link that leads out of it, or something that is not a file.
            StoreError: The folder does not exist, or it changed during the put.
        """

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Write a folder below `dest` and check every SHA-256. After an error, `dest` does not exist.

        Args:
            digest: Digest of the folder.
            dest: New local folder.

        Returns:
            The records of all files.

        Raises:
            IntegrityError: The store does not hold the folder, or a blob is missing or altered.
            StoreError: `dest` exists or cannot be written.
        """

    def open_folder(self, digest: str) -> AbstractContextManager[Path]:
        """Give a verified, read-only copy of the folder for the duration of the block, on this machine.

        A process that may only write to the store cannot change the copy.

        Raises:
            IntegrityError: The store does not hold the folder, or a blob is missing or altered.
        """

    def exists(self, digest: str) -> bool:
        """Say whether the store holds the complete folder: its listing and every blob."""

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders."""

    def folder_uri(self, digest: str) -> str:
        """Return the URI that a folder has in this store, whether or not the store holds it."""

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a record. It atomically replaces the previous value of the same kind and key.

        Args:
            kind: Kind of the record: letters, digits, '.', '_' and '-'.
            key: Key of the record among those of its kind, with the same characters.
            value: JSON object.

        Raises:
            StoreError: The kind or the key contains other characters.
        """

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return the value of a record; None if it does not exist or is not a JSON object, of at most 16 MiB.

        Numbers of over 64 bits, NaN, text that is not Unicode and over 100 levels are refused as well. The log
        says why a record is not used.
        """

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all records of a kind."""

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock for the duration of the block. It excludes all other users of the store.

        The lock becomes free when its holder dies.

        Args:
            key: Name of the lock; any text.
            on_wait: Called once if another user holds the lock.
        """

    def gc(
        self,
        keep: Collection[str],
        *,
        min_age_s: float,
        dry_run: bool = False,
        may_lack: Collection[str] = (),
        at_most: float = 1.0,
    ) -> Collected:
        """Delete old folders that are not in `keep`, then old blobs that no remaining folder needs.

        Args:
            keep: Digests of the folders to keep.
            min_age_s: Listings and blobs that were put less than this number of seconds ago are kept. Below a day,
                no other process may write to the store.
            dry_run: Count, but do not delete.
            may_lack: Those of `keep` that the store need not hold.
            at_most: Fraction of the store's bytes that may be deleted. A dry run ignores it.

        Raises:
            IntegrityError: A listing cannot be read. Nothing was deleted.
            StoreError: The store does not list a folder of `keep`, or more than `at_most` would be deleted.
                Nothing was deleted.
        """
