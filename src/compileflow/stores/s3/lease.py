"""A lock on S3: an object that its holder keeps renewing, and that others take over once it is too old.

The object is made if it is absent, renewed and taken over if it is as it was last seen; each is one conditional
PUT, so that of several who try one succeeds. Its age is told by the server's clock alone.

A holder that cannot renew it in time, for example because the network was away, may lose it to another. It is told
in the log and goes on: two who do the same work make the same content-addressed bytes, so what is lost is time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compileflow.errors import StoreError
from compileflow.stores.s3.objects import S3Objects

logger = logging.getLogger(__name__)


@contextmanager
def lease(objects: S3Objects, key: str, *, lease_s: float, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold `key` alone.

    Args:
        objects: Where the lease is.
        key: Its place.
        lease_s: Seconds after its last renewal at which others may take it.
        on_wait: Called once if somebody else holds it.

    Raises:
        StoreError: it could not be taken; StoreUnavailableError when that may pass.
    """
    held = _Lease(objects, key, lease_s)
    waited = False
    while not held.take():
        if not waited:
            on_wait()
            waited = True
        time.sleep(min(1.0, lease_s / 4))
    heart = threading.Thread(target=held.keep, name="compileflow-lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        held.over.set()
        heart.join(lease_s)
        held.free()


class _Lease:
    def __init__(self, objects: S3Objects, key: str, lease_s: float):
        self.over = threading.Event()
        self._objects = objects
        self._key = key
        self._lease_s = lease_s
        self._holder = uuid.uuid4().hex
        self._beats = 0
        self._etag: str | None = None

    def take(self) -> bool:
        """Try once, and say whether it is ours."""
        there = self._objects.read(self._key)
        if there is not None and not self._ours(there[0]) and there[1].age_s <= self._lease_s:
            return False
        return self._write(there[1].etag if there is not None else None)

    def keep(self) -> None:
        """Renew it until it is over or lost; runs in a thread of its own."""
        renewed = time.monotonic()
        while not self.over.wait(self._lease_s / 3):
            try:
                if not self._write(self._etag):
                    logger.warning("the lock %s was taken over by another run; both go on", self._key)
                    self._etag = None
                    return
            except StoreError as error:
                away_s = time.monotonic() - renewed
                logger.warning("the lock %s could not be renewed for %.0f s: %s", self._key, away_s, error)
            else:
                renewed = time.monotonic()

    def free(self) -> None:
        """Delete it if it is still ours; left alone, it is free after its time."""
        if self._etag is None:
            return
        try:
            self._objects.delete(self._key, etag=self._etag)
        except StoreError as error:
            logger.warning(
                "the lock %s could not be freed; it is free in %.0f s: %s", self._key, self._lease_s, error
            )

    def _write(self, etag: str | None) -> bool:
        # Each renewal has other bytes, and so another ETag: who saw the old one cannot take over the new one.
        self._beats += 1
        body = json.dumps({"holder": self._holder, "beat": self._beats}).encode()
        written = self._objects.write_if(self._key, body, etag=etag)
        if written is None:
            # It may be our own write, whose reply was lost on the way to boto3's second try.
            there = self._objects.read(self._key)
            if there is None or not self._ours(there[0]):
                return False
            written = there[1].etag
        self._etag = written
        return True

    def _ours(self, body: bytes) -> bool:
        try:
            return bool(json.loads(body)["holder"] == self._holder)
        except (ValueError, KeyError, TypeError):
            return False
