"""The cache of a step: its key, the lookup, and the explanation of a miss.

A step's result is a record in the artifact store. Its key is the digest of everything that decides the result. The
record only points at folders in the store, so a record whose folder is gone is a miss. See docs/adr/0002.

The parts of each key are listed in compile.py, fetch.py, validate.py, trial.py and race.py. Concurrent runs with
the same key do the work only once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from compileflow.contracts import ArtifactStore
from compileflow.contracts.digests import json_digest
from compileflow.steps.attest import Attester

logger = logging.getLogger(__name__)

Value = TypeVar("Value", bound=BaseModel)


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the result of a step, part by part.

    Attributes:
        step: Name of the step.
        subject: The model's location and the target, which stay the same when an input changes. A new key is
            compared with the last key of the same subject, to explain a miss.
        parts: Name of each part to its value. Equal parts mean an equal result.
    """

    step: str
    subject: str
    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The key: 64 hex digits."""
        return json_digest({"step": self.step, "parts": dict(self.parts)})


def find(
    store: ArtifactStore,
    key: CacheKey,
    kind: type[Value],
    *,
    folders: Mapping[str, str],
    attester: Attester,
    quietly: bool = False,
) -> Value | None:
    """Return the cached result for a key; None without one, or if the store lost a folder that it points at.

    The URIs in the result are those of this store, wherever the store was when the record was written. A run with
    a key uses only what a trusted key signed. Unless `quietly`, the log says why a record is not used.
    """
    level = logging.DEBUG if quietly else logging.WARNING
    record = store.get_record(key.step, key.digest)
    if record is None:
        return None
    if fault := fault_of(record, key, attester):
        logger.log(level, "%s: ignoring the cache record %s: %s", key.step, key.digest[:12], fault)
        return None
    try:
        value = kind.model_validate(record["value"])
    except ValidationError:
        logger.log(level, "%s: ignoring the cache record %s, which cannot be read", key.step, key.digest[:12])
        return None
    uris = {}
    for digest_field, uri_field in folders.items():
        digest = getattr(value, digest_field)
        if digest is None:
            continue
        if not store.exists(digest):
            logger.log(
                level,
                "%s: ignoring a cache record, because the store has lost the folder %s",
                key.step,
                digest[:12],
            )
            return None
        if uri_field:
            uris[uri_field] = store.folder_uri(digest)
    return value.model_copy(update=uris)


def record_of(key: CacheKey, value: BaseModel, attester: Attester) -> dict[str, JsonValue]:
    """Return the record of a result: the parts of its key, the result, and a checksum and signatures over both."""
    record: dict[str, JsonValue] = {"parts": dict(key.parts), "value": value.model_dump(mode="json")}
    signatures = attester.signatures_of(key.step, record)
    return record | {"checksum": json_digest([key.step, record]), "signatures": signatures}


def fault_of(record: Mapping[str, JsonValue], key: CacheKey, attester: Attester) -> str:
    """Return why a record does not answer a key: it answers another one, or it was changed; '' if it does."""
    parts, value, checksum = (record.get(name) for name in ("parts", "value", "checksum"))
    if not isinstance(parts, dict) or value is None:
        return "it cannot be read"
    if changes := changed_parts(parts, key.parts):
        return f"it answers another request: {', '.join(changes)}"
    if checksum is None:
        return "an older version of compileflow wrote it, without a checksum"
    content: dict[str, JsonValue] = {"parts": parts, "value": value}
    if checksum != json_digest([key.step, content]):
        return "it was changed"
    return attester.distrusts(key.step, content, record.get("signatures"))


def _why_unused(store: ArtifactStore, key: CacheKey, attester: Attester) -> str:
    """Return why the record of a key is there and not used; '' if it is not there, or sound."""
    record = store.get_record(key.step, key.digest)
    fault = "" if record is None else fault_of(record, key, attester)
    return f"its record is not used: {fault}" if fault else ""


def find_or_make(
    store: ArtifactStore,
    key: CacheKey,
    kind: type[Value],
    *,
    folders: Mapping[str, str],
    attester: Attester,
    compute: Callable[[str], Value],
    report_line: Callable[[str], None],
    is_cacheable: Callable[[Value], bool] = lambda value: True,
    reason_to_redo: Callable[[Value], str] = lambda value: "",
) -> tuple[Value, bool]:
    """Return the result for a key, and whether it was cached. On a miss, make it once for all concurrent callers.

    Args:
        store: Store of the cache records.
        key: Key of the result.
        kind: Class of the result.
        folders: Field of each digest of a stored folder, with the field of that folder's URI, or "" without one. A
            digest that is None is skipped.
        attester: Signs the record of a new result, and says which records this run may use.
        compute: Called with the reason of the miss; returns the result.
        report_line: Called with one line: the reason of a miss, or that another run is making the result.
        is_cacheable: Returns whether a result may be cached.
        reason_to_redo: Returns why a cached result must be made again; '' if it need not be.
    """
    # On a miss, the lookup under the lock says why.
    value = find(store, key, kind, folders=folders, attester=attester, quietly=True)
    if value is not None and not reason_to_redo(value):
        return value, True

    def say_waiting() -> None:
        report_line("another run is producing the same result; waiting for it")

    with store.lock(f"{key.step}/{key.digest}", on_wait=say_waiting):
        value = find(store, key, kind, folders=folders, attester=attester)
        redo_reason = "" if value is None else reason_to_redo(value)
        if value is not None and not redo_reason:
            return value, True
        reason = redo_reason or _why_unused(store, key, attester) or why_missed(store, key)
        report_line(f"not cached: {reason}")
        value = compute(reason)
        if not is_cacheable(value):
            return value, False
        store.put_record(key.step, key.digest, record_of(key, value, attester))
        store.put_record(f"{key.step}-latest", _subject_key(key), {"key": key.digest, "parts": dict(key.parts)})
    return value, False


def latest(store: ArtifactStore, step: str, subject: str) -> dict[str, JsonValue] | None:
    """Return the last record of a subject, {"key": ..., "parts": {...}}; None without a sound one."""
    record = store.get_record(f"{step}-latest", json_digest([step, subject])) or {}
    parts = record.get("parts")
    # The parts decide the key, so they are its checksum.
    is_sound = isinstance(parts, dict) and record.get("key") == json_digest({"step": step, "parts": parts})
    return record if is_sound else None


def why_missed(store: ArtifactStore, key: CacheKey) -> str:
    """Return in one line which parts of the key differ from the last key of the same subject."""
    previous_record = latest(store, key.step, key.subject)
    if previous_record is None:
        return f"first run for {key.subject}"
    old_parts = previous_record.get("parts")
    changes = changed_parts(old_parts if isinstance(old_parts, dict) else {}, key.parts)
    if not changes:
        return "the store has lost its record or its folder"
    return f"changed: {', '.join(changes)}"


def changed_parts(old_parts: Mapping[str, JsonValue], new_parts: Mapping[str, str]) -> Sequence[str]:
    """Return one text per part that was changed, added or removed. Short values are shown, digests are not."""
    lines = []
    for name in sorted({*old_parts, *new_parts}):
        old_value, new_value = old_parts.get(name), new_parts.get(name)
        if old_value == new_value:
            continue
        if old_value is None:
            lines.append(f"{name} (added)")
        elif new_value is None:
            lines.append(f"{name} (removed)")
        elif len(str(old_value)) <= 40 and len(new_value) <= 40:
            lines.append(f"{name} ({old_value} -> {new_value})")
        else:
            lines.append(name)
    return lines


def _subject_key(key: CacheKey) -> str:
    return json_digest([key.step, key.subject])
