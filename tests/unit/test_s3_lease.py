"""The lock on S3: its holder renews it, the server's clock decides its age, and a loss is logged."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from compileflow.settings import get_settings
from compileflow.stores.s3.lease import _Lease
from compileflow.stores.s3.store import S3Store
from tests.services.fault_proxy import FaultProxy, LoseReply
from tests.services.moto_server import Moto


@pytest.fixture
def store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("COMPILEFLOW_S3_LEASE_S", "1")
    get_settings.cache_clear()
    return S3Store(f"s3://{bucket}/p", get_settings())


def leases(store: S3Store) -> list[str]:
    return [item.key for item in store._objects.list("locks/")]


def test_lease_is_renewed_for_longer_than_it_lasts(store: S3Store) -> None:
    waits: list[str] = []
    taken = threading.Event()

    def take() -> None:
        with store.lock("key", on_wait=lambda: waits.append("waits")):
            taken.set()

    with store.lock("key", on_wait=lambda: waits.append("first")):
        other = threading.Thread(target=take)
        other.start()
        # More than twice the lease, because the server reports its age in whole seconds.
        assert not taken.wait(3.2)
    other.join()
    assert waits == ["waits"]
    assert leases(store) == []


def test_holder_that_loses_its_lease_is_told_goes_on_and_leaves_the_new_one(
    store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), store.lock("key", on_wait=lambda: None):
        (key,) = leases(store)
        store._objects.write(key, b'{"holder": "another"}')
        deadline = time.monotonic() + 10
        while "took over the lock" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    current = store._objects.read(key)
    assert current is not None
    assert current[0] == b'{"holder": "another"}'


def test_lease_too_old_by_the_servers_clock_is_taken_over(store: S3Store, moto: Moto, bucket: str) -> None:
    with store.lock("key", on_wait=lambda: None):
        (key,) = leases(store)
    store._objects.write(key, b'{"holder": "dead"}')
    moto.age(bucket, f"p/{key}", seconds=60)
    waits: list[str] = []
    with store.lock("key", on_wait=lambda: waits.append("waits")):
        assert waits == []
        assert len(leases(store)) == 1
    assert leases(store) == []


def test_lost_replies_do_not_cost_the_lease(
    store: S3Store, moto: Moto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultProxy(moto.url) as proxy:
        monkeypatch.setenv("COMPILEFLOW_S3_ENDPOINT_URL", proxy.url)
        get_settings.cache_clear()
        proxied = S3Store(store.uri, get_settings())
        # The first request takes the lock, the second renews it.
        proxy.inject(LoseReply(), method="PUT", path="/locks/", times=1)
        proxy.inject(LoseReply(), method="PUT", path="/locks/", times=1, skip=1)
        with proxied.lock("key", on_wait=lambda: pytest.fail("it waits for itself")):
            deadline = time.monotonic() + 10
            while sum(request.method == "PUT" for request in proxy.seen) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert caplog.text == ""
    assert leases(store) == []


def test_holder_that_did_not_notice_its_loss_leaves_the_new_one(store: S3Store) -> None:
    """The holder was suspended for a while and ends before the next renewal."""
    stopped, successor = (_Lease(store._objects, "locks/key.json", 60) for _ in range(2))
    assert stopped.take()
    store._objects.delete("locks/key.json")
    assert successor.take()
    stopped.release()
    assert leases(store) == ["locks/key.json"]
    successor.release()
    assert leases(store) == []
