"""Races between a collection and a put, for both built-in stores: each test forces one exact moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compileflow.contracts.digests import list_files
from compileflow.stores.collecting import AgedObject
from compileflow.testing.stores import DAY_S, StoreConformance


class CollectionRaces(StoreConformance):
    """The conformance suite, and races that need access to the inside of a store."""

    def test_blob_that_a_put_refreshes_right_before_its_deletion_stays(
        self, store: Any, store_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = store.put_folder(folder).digest
        self.delete_object(store_uri, f"manifests/sha256/{digest}.json")
        self._make_all_old(store_uri)
        old_blobs = list(store.aged_blobs())
        assert all(blob.age_s > DAY_S for blob in old_blobs)

        def put_meanwhile() -> Iterator[AgedObject]:
            store.put_folder(folder)
            yield from old_blobs

        monkeypatch.setattr(store, "aged_blobs", put_meanwhile)
        assert store.gc((), min_age_s=DAY_S).blobs == 0
        assert store.exists(digest)

    def test_put_whose_old_blob_is_deleted_after_it_was_refreshed_sends_it_again(
        self, store: Any, store_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = store.put_folder(folder).digest
        self._make_all_old(store_uri)
        put_listing, deleted = store._put_listing, []

        def deleted_meanwhile(*arguments: Any) -> Any:
            refreshed = put_listing(*arguments)
            if not deleted:
                deleted.append(list_files(folder)[0].sha256)
                assert store.delete_blob(deleted[0], min_age_s=0)
            return refreshed

        monkeypatch.setattr(store, "_put_listing", deleted_meanwhile)
        assert store.put_folder(folder).digest == digest
        assert store.exists(digest)
