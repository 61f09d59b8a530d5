"""Garbage collection for every store, and why it is safe while other processes put folders.

The collection does not lock the store. Four rules keep a folder whole while it is being put:

1. A blob or a listing younger than `min_age_s` (a day by default) is never deleted. So everything that a put
   writes is safe until it writes the listing, which refers to the blobs and comes last.
2. A put that finds an existing blob or listing older than `REFRESH_AFTER_S` (half a day) refreshes its age first,
   as if the put had written it. A younger one stays safe for at least another half a day. So a put has half a day
   from its first blob to its listing.
3. The collection deletes listings first, then reads all remaining listings, and only then deletes the blobs that
   none of them names. So a listing that was written meanwhile counts. Immediately before each deletion the
   collection checks the age again, so that a refresh counts.
4. A refresh between that check and the deletion would go unnoticed. So a put that refreshed something verifies,
   after it has written its listing, that everything exists, and starts again if not.

If a listing cannot be read, its blobs are unknown, and the collection stops before it deletes anything.
With `min_age_s` below a day, no other process may write to the store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from compileflow.contracts import Collected, FileRecord

REFRESH_AFTER_S = 43200.0


@dataclass(frozen=True)
class AgedObject:
    """A listing or a blob of a store.

    Attributes:
        digest: SHA-256 that names the object.
        size_bytes: Size of the object.
        age_s: Seconds since the object was last put or refreshed.
    """

    digest: str
    size_bytes: int
    age_s: float


class Collectable(Protocol):
    """What the collection needs from a store."""

    def aged_listings(self) -> Iterator[AgedObject]:
        """Yield all listings."""

    def aged_blobs(self) -> Iterator[AgedObject]:
        """Yield all blobs."""

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder; None if its listing does not exist. Raises what `get_folder` raises."""

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still at least that old, and say whether it was."""

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still at least that old, and say whether it was."""


def collect(store: Collectable, digests_to_keep: Collection[str], *, min_age_s: float, dry_run: bool) -> Collected:
    """Delete what `ArtifactStore.gc` describes, in the order that the module's docstring explains."""
    listings: dict[str, tuple[FileRecord, ...]] = {}
    candidates: list[AgedObject] = []
    for listing in store.aged_listings():
        if listing.digest not in digests_to_keep and listing.age_s >= min_age_s:
            candidates.append(listing)
        else:
            _read(store, listing.digest, listings)
    deleted_sizes = {
        listing.digest: listing.size_bytes
        for listing in candidates
        if dry_run or store.delete_listing(listing.digest, min_age_s=min_age_s)
    }
    for listing in store.aged_listings():
        if listing.digest not in deleted_sizes:
            _read(store, listing.digest, listings)
    blobs_in_use = {record.sha256 for files in listings.values() for record in files}
    blob_sizes = [
        blob.size_bytes
        for blob in store.aged_blobs()
        if blob.digest not in blobs_in_use
        and blob.age_s >= min_age_s
        and (dry_run or store.delete_blob(blob.digest, min_age_s=min_age_s))
    ]
    return Collected(
        folders=len(deleted_sizes),
        blobs=len(blob_sizes),
        size_bytes=sum(deleted_sizes.values()) + sum(blob_sizes),
    )


def _read(store: Collectable, digest: str, listings: dict[str, tuple[FileRecord, ...]]) -> None:
    if digest not in listings and (files := store.read_listing(digest)) is not None:
        listings[digest] = files
