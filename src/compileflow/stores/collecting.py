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

Before it deletes anything, the collection plans all deletions. It stops if it cannot trust what the store says:
if a listing cannot be read, because its blobs are unknown; if a folder that must be kept is not listed, because
others may be missing from the list as well; or if the deletions exceed the caller's limit.
With `min_age_s` below a day, no other process may write to the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from compileflow.contracts import Collected, FileRecord
from compileflow.errors import StoreError
from compileflow.stores.threads import run_for_all

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
    """What the collection needs from a store. Several threads call the methods at once."""

    uri: str

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


def collect(
    store: Collectable,
    keep: Collection[str],
    *,
    min_age_s: float,
    dry_run: bool,
    may_lack: Collection[str],
    at_most: float,
    at_once: int,
) -> Collected:
    """Delete what `ArtifactStore.gc` describes, in the order that the module's docstring explains.

    Args:
        store: Store to collect in.
        keep: As for `ArtifactStore.gc`, and so are `min_age_s`, `dry_run`, `may_lack` and `at_most`.
        min_age_s: See `keep`.
        dry_run: See `keep`.
        may_lack: See `keep`.
        at_most: See `keep`.
        at_once: Number of requests that run at once.
    """
    all_listings = list(store.aged_listings())
    _check_listed(store, set(keep) - set(may_lack), {listing.digest for listing in all_listings})
    old_listings = [
        listing for listing in all_listings if listing.digest not in keep and listing.age_s >= min_age_s
    ]
    old_digests = {listing.digest for listing in old_listings}
    folders = _read(store, {listing.digest for listing in all_listings} - old_digests, at_once)
    all_blobs = list(store.aged_blobs())
    old_blobs = _unneeded([blob for blob in all_blobs if blob.age_s >= min_age_s], folders)
    if dry_run:
        return _collected(old_listings, old_blobs)
    _check_share(store, [*old_listings, *old_blobs], [*all_listings, *all_blobs], at_most)

    delete_listing = partial(store.delete_listing, min_age_s=min_age_s)
    deleted_listings = _deleted(delete_listing, old_listings, at_once)
    present_digests = old_digests | {listing.digest for listing in store.aged_listings()}
    new_digests = present_digests - {listing.digest for listing in deleted_listings} - folders.keys()
    folders = {**folders, **_read(store, new_digests, at_once)}
    delete_blob = partial(store.delete_blob, min_age_s=min_age_s)
    return _collected(deleted_listings, _deleted(delete_blob, _unneeded(old_blobs, folders), at_once))


def _check_listed(store: Collectable, required_digests: Collection[str], listed_digests: Collection[str]) -> None:
    missing_digests = sorted(set(required_digests) - set(listed_digests))
    if missing_digests:
        raise StoreError(
            f"{store.uri} does not list {len(missing_digests)} of the folders that must be kept, for example "
            f"{missing_digests[0]}. Nothing was deleted.",
            hint="Check the store's URI and its server. Name a folder that is really lost with --lost DIGEST.",
        )


def _check_share(
    store: Collectable, doomed_objects: Sequence[AgedObject], all_objects: Sequence[AgedObject], at_most: float
) -> None:
    doomed_bytes, all_bytes = (
        sum(aged.size_bytes for aged in objects) for objects in (doomed_objects, all_objects)
    )
    if doomed_bytes > at_most * all_bytes:
        raise StoreError(
            f"The collection would delete {doomed_bytes / 1e6:.1f} of {all_bytes / 1e6:.1f} MB in {store.uri}, "
            f"more than {at_most:.0%}. Nothing was deleted.",
            hint="Check the URIs of the store and of all its registries with --dry-run, then run it with --yes.",
        )


def _read(store: Collectable, digests: Collection[str], at_once: int) -> dict[str, tuple[FileRecord, ...]]:
    """Return the files of each folder whose listing exists."""
    names = sorted(digests)
    listings = zip(names, run_for_all(store.read_listing, names, at_once=at_once), strict=True)
    return {digest: files for digest, files in listings if files is not None}


def _unneeded(blobs: Sequence[AgedObject], folders: Mapping[str, tuple[FileRecord, ...]]) -> Sequence[AgedObject]:
    needed_blobs = {record.sha256 for files in folders.values() for record in files}
    return [blob for blob in blobs if blob.digest not in needed_blobs]


def _deleted(delete: Callable[[str], bool], objects: Sequence[AgedObject], at_once: int) -> Sequence[AgedObject]:
    """Delete objects, and return those that were deleted."""
    outcomes = run_for_all(lambda aged: delete(aged.digest), objects, at_once=at_once)
    return [aged for aged, was_deleted in zip(objects, outcomes, strict=True) if was_deleted]


def _collected(listings: Sequence[AgedObject], blobs: Sequence[AgedObject]) -> Collected:
    return Collected(
        folders=len(listings),
        blobs=len(blobs),
        size_bytes=sum(aged.size_bytes for aged in [*listings, *blobs]),
    )
