"""The S3 store: the conformance suite, against the server of moto over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from compileflow.contracts import ArtifactStore
from compileflow.settings import get_settings
from compileflow.stores.s3.store import S3Store
from compileflow.testing.stores import UNUSABLE_RECORDS
from tests.conformance.collection_races import CollectionRaces
from tests.services.moto_server import Moto

PREFIX = "some/prefix/"


class TestS3Store(CollectionRaces):
    moto: Moto
    client: Any
    bucket: str

    @pytest.fixture(autouse=True)
    def _served(self, moto: Moto, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # One test kills a holder and waits for its lease to expire.
        monkeypatch.setenv("COMPILEFLOW_S3_LEASE_S", "1")
        get_settings.cache_clear()
        type(self).moto, type(self).bucket, type(self).client = moto, bucket, moto.client()

    @pytest.fixture
    def store_uri(self, bucket: str) -> str:
        return f"s3://{bucket}/{PREFIX}"

    def object_stamps(self, uri: str) -> dict[str, object]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {
            entry["Key"].removeprefix(PREFIX): (entry["ETag"], entry["LastModified"])
            for page in pages
            for entry in page.get("Contents", ())
        }

    def read_object(self, uri: str, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=PREFIX + key)["Body"].read()
        return body

    def write_object(self, uri: str, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=PREFIX + key, Body=body)

    def delete_object(self, uri: str, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=PREFIX + key)

    @pytest.mark.parametrize("name", UNUSABLE_RECORDS)
    def test_lock_with_other_content_expires_like_any_lock(
        self, store: ArtifactStore, store_uri: str, *, name: str
    ) -> None:
        with store.lock("key", on_wait=lambda: None):
            (key,) = (key for key in self.object_stamps(store_uri) if key.startswith("locks/"))
        self.write_object(store_uri, key, UNUSABLE_RECORDS[name])
        self.make_old(store_uri, key, seconds=100)
        waits: list[str] = []
        with store.lock("key", on_wait=lambda: waits.append("waited")):
            assert b"holder" in self.read_object(store_uri, key)
        assert waits == []

    def test_large_object_is_read_only_as_far_as_its_limit(self, store: S3Store, store_uri: str) -> None:
        self.write_object(store_uri, "records/cache/key.json", bytes(20 * 2**20))
        content = store._objects.read("records/cache/key.json", most_bytes=2**20)
        assert content is not None
        assert 2**20 < len(content[0]) <= 2**21

    def make_old(self, uri: str, key: str, *, seconds: float) -> None:
        self.moto.age(self.bucket, PREFIX + key, seconds=seconds)
