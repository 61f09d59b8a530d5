"""What an artifact store must be able to do, and the values that it exchanges with its caller."""

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
    """A folder in a store."""

    uri: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Collected:
    """What a garbage collection deleted, or would delete."""

    folders: int
    blobs: int
    size_bytes: int


class ArtifactStore(Protocol):
    """Write-once, content-addressed folders, and small records that point at them."""

    uri: str

    def put_folder(self, folder: Path) -> StoredFolder:
        """Store a folder; its listing is written last. Bytes that are there already are not sent again."""

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Write the folder below `dest`, which must not exist; every SHA-256 is checked."""

    def open_folder(self, digest: str) -> AbstractContextManager[Path]:
        """Give a verified, read-only copy of the folder for as long as the block lasts."""

    def exists(self, digest: str) -> bool:
        """Say whether the folder is there whole: its listing and every blob."""

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders."""

    def folder_uri(self, digest: str) -> str:
        """Return the URI of a folder in this store."""

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Point `key` at something; replaces what was there, atomically."""

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return what `put_record` wrote, or None."""

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all pointers of a kind."""

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold `key` alone among all users of the store; freed when the holder dies."""

    def gc(self, keep: Collection[str], *, min_age_s: float, dry_run: bool = False) -> Collected:
        """Delete folders that are neither in `keep` nor younger than `min_age_s`, then what no folder refers to.

        Args:
            keep: Digests of folders that stay.
            min_age_s: Seconds for which a listing or a blob stays after it was last put, whoever needs it.
            dry_run: Only count.
        """
