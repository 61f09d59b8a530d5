"""Garbage collection, the same for every store, and why it may run while others put folders.

Nothing locks the store. What keeps a folder whole while it is being put:

1. A blob or a listing younger than `min_age_s` (a day, unless somebody says less) is never deleted. So what a put
   writes itself is safe until its listing, which is written last, refers to it.
2. A put that finds a blob or a listing already there refreshes its age first, once that is over
   `REFRESH_AFTER_S` (half a day): then it is as if the put had written it. One that is younger stays out of reach
   for another half a day. So a put has half a day from its first blob to its listing.
3. The collector deletes the listings first, then reads all listings that there are now, and only then deletes
   blobs that none of them names: a listing that came meanwhile counts. Right before each deletion it looks at the
   age again, so that a refresh counts, too.
4. Between that last look and the deletion a refresh could still go unseen. So a put that refreshed something looks
   whether all of it is there after it wrote its listing, and starts again where not.

A listing that cannot be read stops everything before anything is deleted: its blobs are unknown.
With `min_age_s` below a day, nobody else may be writing to the store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from compileflow.contracts import Collected, FileRecord

REFRESH_AFTER_S = 43200.0


@dataclass(frozen=True)
class Aged:
    """An object of a store: its digest, its size, and the seconds since it was last put."""

    digest: str
    size_bytes: int
    age_s: float


class Collectable(Protocol):
    """What a collection needs of a store."""

    def aged_listings(self) -> Iterator[Aged]:
        """Yield all listings."""

    def aged_blobs(self) -> Iterator[Aged]:
        """Yield all blobs."""

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder; None when its listing has gone meanwhile; else as `get_folder` raises."""

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still that old, and say whether it was."""

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still that old, and say whether it was."""


def collect(store: Collectable, keep: Collection[str], *, min_age_s: float, dry_run: bool) -> Collected:
    """Delete what `ArtifactStore.gc` says, in the order above."""
    known: dict[str, tuple[FileRecord, ...]] = {}
    doomed: list[Aged] = []
    for listing in store.aged_listings():
        if listing.digest not in keep and listing.age_s >= min_age_s:
            doomed.append(listing)
        else:
            _read(store, listing.digest, known)
    gone = {
        listing.digest: listing.size_bytes
        for listing in doomed
        if dry_run or store.delete_listing(listing.digest, min_age_s=min_age_s)
    }
    for listing in store.aged_listings():
        if listing.digest not in gone:
            _read(store, listing.digest, known)
    needed = {record.sha256 for files in known.values() for record in files}
    freed = [
        blob.size_bytes
        for blob in store.aged_blobs()
        if blob.digest not in needed
        and blob.age_s >= min_age_s
        and (dry_run or store.delete_blob(blob.digest, min_age_s=min_age_s))
    ]
    return Collected(folders=len(gone), blobs=len(freed), size_bytes=sum(gone.values()) + sum(freed))


def _read(store: Collectable, digest: str, known: dict[str, tuple[FileRecord, ...]]) -> None:
    if digest not in known and (files := store.read_listing(digest)) is not None:
        known[digest] = files
