"""The cache of a step: complete content keys, what changed since last time, one maker at a time.

A step's answer is a record in the artifact store, found by the digest of everything that decides it. The record
only points at folders of the store, so an answer whose folder has vanished is a miss. See docs/adr/0002.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from compileflow.contracts import ArtifactStore
from compileflow.contracts.digests import json_digest

logger = logging.getLogger(__name__)

Value = TypeVar("Value", bound=BaseModel)


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides a step's answer, named part by part.

    Attributes:
        step: The step's name.
        subject: What stays the same when an input changes: the model's place and the target. The last key of
            a subject is what a new one is compared with.
        parts: Name to value; equal parts mean an equal answer.
    """

    step: str
    subject: str
    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The key itself, 64 hex digits."""
        return json_digest({"step": self.step, "parts": dict(self.parts)})


def find(store: ArtifactStore, key: CacheKey, kind: type[Value], *, digest_fields: Sequence[str]) -> Value | None:
    """Return the answer for a key, or None when there is none or the store lost a folder of it."""
    record = store.get_record(key.step, key.digest)
    if record is None:
        return None
    try:
        value = kind.model_validate(record["value"])
    except (KeyError, ValidationError):
        logger.warning("%s: the record %s is not readable; it is made anew", key.step, key.digest[:12])
        return None
    for digest in filter(None, (getattr(value, field) for field in digest_fields)):
        if not store.exists(digest):
            logger.warning(
                "%s: the store lost %s, which a record points at; it is made anew", key.step, digest[:12]
            )
            return None
    return value


def find_or_make(
    store: ArtifactStore,
    key: CacheKey,
    kind: type[Value],
    *,
    digest_fields: Sequence[str],
    make: Callable[[str], Value],
    say: Callable[[str], None],
    keep: Callable[[Value], bool] = lambda value: True,
    lacks: Callable[[Value], str] = lambda value: "",
) -> tuple[Value, bool]:
    """Return the answer for a key and whether it was there; make it if not, once for all who ask.

    Args:
        store: Holds the answers.
        key: What is asked.
        kind: The answer's class.
        digest_fields: The fields of the answer that name the stored folders it stands on; None names none.
        make: Makes the answer; given the reason why it was not there.
        say: Told in one line why there was no answer, or that another run is making it.
        keep: Says whether an answer may be given again to the next who asks.
        lacks: Says why an answer that was there has to be made again; '' if it has not.
    """
    value = find(store, key, kind, digest_fields=digest_fields)
    if value is not None and not lacks(value):
        return value, True

    def say_waiting() -> None:
        say("another run is making the same answer; waiting for it")

    with store.lock(f"{key.step}/{key.digest}", on_wait=say_waiting):
        value = find(store, key, kind, digest_fields=digest_fields)
        lack = "" if value is None else lacks(value)
        if value is not None and not lack:
            return value, True
        reason = lack or why_missed(store, key)
        say(f"not cached: {reason}")
        value = make(reason)
        if not keep(value):
            return value, False
        store.put_record(key.step, key.digest, {"value": value.model_dump(mode="json"), "parts": dict(key.parts)})
        store.put_record(f"{key.step}-latest", _subject_key(key), {"key": key.digest, "parts": dict(key.parts)})
    return value, False


def latest(store: ArtifactStore, step: str, subject: str) -> dict[str, JsonValue] | None:
    """Return the last record of a subject, {"key": ..., "parts": {...}}, or None."""
    return store.get_record(f"{step}-latest", json_digest([step, subject]))


def why_missed(store: ArtifactStore, key: CacheKey) -> str:
    """Say in one line which parts of the key differ from the subject's last one."""
    before = latest(store, key.step, key.subject)
    if before is None:
        return f"nothing was made for {key.subject} before"
    old = before.get("parts")
    changed = changed_parts(old if isinstance(old, dict) else {}, key.parts)
    if not changed:
        return "its record or its folder is gone from the store"
    return f"changed: {', '.join(changed)}"


def changed_parts(old: Mapping[str, JsonValue], new: Mapping[str, str]) -> Sequence[str]:
    """Name each part that was changed, added or removed; versions are shown, digests are not."""
    lines = []
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if was is None:
            lines.append(f"{name} (added)")
        elif now is None:
            lines.append(f"{name} (removed)")
        elif len(str(was)) <= 40 and len(now) <= 40:
            lines.append(f"{name} ({was} -> {now})")
        else:
            lines.append(name)
    return lines


def _subject_key(key: CacheKey) -> str:
    return json_digest([key.step, key.subject])
