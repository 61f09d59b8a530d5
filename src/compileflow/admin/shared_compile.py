"""SharedCompile: what all watchers and runs know of one compile that the watch found missing.

A lock says who does it. Two records in the artifact store say when it was announced, and how its last run ended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ValidationError

from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import CompileflowError
from compileflow.settings import Settings
from compileflow.steps.request import CompileRequest

logger = logging.getLogger(__name__)
_CLOCK_DIFFERENCE = timedelta(days=1)
_ATTEMPT, _ANNOUNCED = "watch-attempt", "watch-announced"
Role = Literal["compile", "announce"]


class Announcement(BaseModel):
    """The last announcement of a compile.

    Attributes:
        at: Time of the announcement.
        count: Number of announcements since the compile was last finished or retried.
        compiled: Whether a run has finished the compile since.
    """

    at: AwareDatetime
    count: int = 1
    compiled: bool = False


class _Attempt(BaseModel):
    """The last attempt that failed and would fail again."""

    at: AwareDatetime
    error: str = ""
    report_uri: str = ""


_Record = TypeVar("_Record", Announcement, _Attempt)


@dataclass(frozen=True)
class SharedCompile:
    """One compile, as all watchers and runs see it.

    Attributes:
        key: What identifies the compile: 64 hex digits.
        store: Store of the compile.
    """

    key: str
    store: ArtifactStore

    @classmethod
    def of(cls, request: CompileRequest, key: str, settings: Settings) -> SharedCompile:
        """Return the compile of a request, in the request's store."""
        return cls(key, open_store(settings.resolved_store_uri(request.store_uri), settings))

    @contextmanager
    def held(self, role: Role) -> Iterator[bool]:
        """Hold the compile for the duration of the block, so that no other process compiles or announces it.

        A holder that dies releases it.

        Args:
            role: What the block does.

        Yields:
            False if another process holds it for the same purpose.
        """

        class TakenError(Exception):
            pass

        def refuse() -> None:
            raise TakenError

        try:
            lock = self.store.lock(f"watch/{role}/{self.key}", on_wait=refuse)
            lock.__enter__()
        except TakenError:
            yield False
            return
        try:
            yield True
        finally:
            lock.__exit__(None, None, None)

    def is_running(self) -> bool:
        """Return whether a process holds the compile now."""
        with self.held("compile") as is_free:
            return not is_free

    def announcement(self) -> Announcement | None:
        """Return the last announcement, if there is one."""
        return self._read(_ANNOUNCED, Announcement)

    def failed_at(self) -> datetime | None:
        """Return when an attempt failed that would fail again; None without such an attempt."""
        attempt = self._read(_ATTEMPT, _Attempt)
        return attempt.at if attempt else None

    def is_settled(self) -> bool:
        """Return whether a run has finished the compile, or failed for good, since its last announcement."""
        announcement, failed_at = self.announcement(), self.failed_at()
        if announcement is None:
            return False
        return announcement.compiled or (failed_at is not None and failed_at >= announcement.at)

    def record_announcement(self, count: int) -> None:
        """Record that the compile was announced for the `count`-th time."""
        self._put_announcement(Announcement(at=datetime.now(UTC), count=count))

    def record_compiled(self) -> None:
        """Record that a run has finished the compile."""
        announcement = self.announcement() or Announcement(at=datetime.now(UTC))
        self._put_announcement(announcement.model_copy(update={"compiled": True}))

    def record_failure(self, error: CompileflowError) -> None:
        """Record an attempt that would fail again; one that may succeed later leaves no record."""
        if not error.retryable:
            attempt = _Attempt(at=datetime.now(UTC), error=error.message, report_uri=error.report_uri)
            self.store.put_record(_ATTEMPT, self.key, attempt.model_dump(mode="json"))

    def _read(self, kind: str, record_class: type[_Record]) -> _Record | None:
        """Return a record of this compile; None if it is missing, or none that a run can have written."""
        value = self.store.get_record(kind, self.key)
        if value is None:
            return None
        try:
            record = record_class.model_validate(value)
        except ValidationError:
            logger.warning("ignoring the record %s of %s, which cannot be read", kind, self.key[:12])
            return None
        if record.at - datetime.now(UTC) > _CLOCK_DIFFERENCE:
            logger.warning("ignoring the record %s of %s, whose date is in the future", kind, self.key[:12])
            return None
        return record

    def _put_announcement(self, announcement: Announcement) -> None:
        self.store.put_record(_ANNOUNCED, self.key, announcement.model_dump(mode="json"))
