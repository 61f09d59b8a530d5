"""A lock on S3: an object that its holder keeps renewing, and that another run may take over once it is too old.

The object is created if it does not exist, and renewed or taken over if it is unchanged. Each of these is one
conditional PUT, so only one of several runs succeeds. The server's clock alone tells the object's age.

A holder that cannot renew the object in time, for example while the network is down, may lose it to another run.
The holder logs a warning and continues: two runs that do the same work write the same content-addressed bytes, so
only time is lost.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compileflow.contracts.json_files import parse_json
from compileflow.errors import StoreError
from compileflow.stores.layout import MOST_RECORD_BYTES
from compileflow.stores.s3.lost_replies import write_if_unchanged_or_ours
from compileflow.stores.s3.objects import S3Objects

logger = logging.getLogger(__name__)


@contextmanager
def lease(objects: S3Objects, key: str, *, lease_s: float, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock for the duration of the block.

    Args:
        objects: Objects of the store.
        key: Key of the lock's object.
        lease_s: Seconds after the last renewal at which another run may take the lock over.
        on_wait: Called once if another run holds the lock.

    Raises:
        StoreError: The lock cannot be taken.
        StoreUnavailableError: The server did not answer.
    """
    holder = _Lease(objects, key, lease_s)
    has_waited = False
    while not holder.take():
        if not has_waited:
            on_wait()
            has_waited = True
        time.sleep(min(1.0, lease_s / 4))
    renewals = threading.Thread(target=holder.keep_renewing, name="compileflow-lease", daemon=True)
    renewals.start()
    try:
        yield
    finally:
        holder.finished.set()
        renewals.join(lease_s)
        holder.release()


class _Lease:
    def __init__(self, objects: S3Objects, key: str, lease_s: float):
        self.finished = threading.Event()
        self._objects = objects
        self._key = key
        self._lease_s = lease_s
        self._holder = uuid.uuid4().hex
        self._beats = 0
        self._etag: str | None = None

    def take(self) -> bool:
        """Try once to take the lock, and say whether this run holds it now."""
        content = self._objects.read(self._key)
        if content is not None and not self._is_ours(content[0]) and content[1].age_s <= self._lease_s:
            return False
        return self._write(content[1].etag if content is not None else None)

    def keep_renewing(self) -> None:
        """Renew the lock until it is released or lost. Runs in a thread."""
        renewed_at = time.monotonic()
        while not self.finished.wait(self._lease_s / 3):
            try:
                if not self._write(self._etag):
                    logger.warning("another run took over the lock %s; both runs continue", self._key)
                    self._etag = None
                    return
            except StoreError as error:
                overdue_s = time.monotonic() - renewed_at
                logger.warning("the lock %s could not be renewed for %.0f s: %s", self._key, overdue_s, error)
            else:
                renewed_at = time.monotonic()

    def release(self) -> None:
        """Delete the object if it is still ours. If that fails, the lock expires."""
        if self._etag is None:
            return
        try:
            self._objects.delete(self._key, etag=self._etag)
        except StoreError as error:
            logger.warning(
                "the lock %s could not be released; it expires in %.0f s: %s", self._key, self._lease_s, error
            )

    def _write(self, etag: str | None) -> bool:
        # Each renewal has other bytes and therefore another ETag. A run that saw the old one cannot take over.
        self._beats += 1
        body = json.dumps({"holder": self._holder, "beat": self._beats}).encode()
        new_etag = write_if_unchanged_or_ours(self._objects, self._key, body, etag=etag, is_ours=self._is_ours)
        if new_etag is None:
            return False
        self._etag = new_etag
        return True

    def _is_ours(self, body: bytes) -> bool:
        try:
            holder = parse_json(body, MOST_RECORD_BYTES, strict=True)
        except ValueError:
            return False
        return isinstance(holder, dict) and holder.get("holder") == self._holder
