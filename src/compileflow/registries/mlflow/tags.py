"""A version's entry, stage and promotions as tags of an MLflow model version.

Tags hold the entry as JSON in pieces: MLflow 3.17 accepts values of 100,000 characters, older versions 5,000. The
other tags serve searches and readers of MLflow's pages.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry
from compileflow.registries import lookup

SCHEMA = "compileflow.schema_version"
SCHEMA_VERSION = "1"
DIGEST = "compileflow.artifact_digest"
SOURCE = "compileflow.source_uri_sha256"
ARCHIVED = "compileflow.archived"
# Strongest first: a kill between two stages leaves a version with both aliases.
ALIASES: tuple[Stage, ...] = ("production", "staging")
_ENTRY = "compileflow.entry."
_PROMOTION = "compileflow.promotion."
_PIECE = 5_000


def entry_tags(entry: VersionEntry) -> dict[str, str]:
    """Return all tags of a new version."""
    # In ASCII a character is a byte, so the limit holds whether the database counts characters or bytes.
    body = json.dumps(entry.model_dump(mode="json", include=set(VersionEntry.model_fields)))
    pieces = {
        f"{_ENTRY}{offset // _PIECE:04d}": body[offset : offset + _PIECE] for offset in range(0, len(body), _PIECE)
    }
    readable_tags = {
        "compileflow.target": entry.target,
        "compileflow.verdict": entry.verdict,
        "compileflow.artifact_uri": entry.artifact_uri,
        "compileflow.source_uri": entry.source_uri,
        "compileflow.report_uri": entry.report_uri,
    }
    return {
        SCHEMA: SCHEMA_VERSION,
        DIGEST: entry.artifact_digest,
        SOURCE: source_key(entry.source_uri),
        **pieces,
        **{key: value for key, value in readable_tags.items() if len(value) <= _PIECE},
    }


def source_key(source_uri: str) -> str:
    """Return the search key of a source model: a URI may be too long for a tag, and may contain quotes."""
    return hashlib.sha256(source_uri.encode()).hexdigest()


def read_version(
    name: str, number: int, created_ms: int, tags: Mapping[str, str], *, aliases: frozenset[str]
) -> ModelVersion | None:
    """Return the version in these tags; None if compileflow did not register it.

    Args:
        name: Name of the model.
        number: MLflow's number of the version.
        created_ms: Time of creation in milliseconds since 1970.
        tags: All tags of the version.
        aliases: Aliases that point at the version.

    Raises:
        RegistryError: The tags were changed and do not hold an entry any more.
    """
    if tags.get(SCHEMA) != SCHEMA_VERSION:
        return None
    body = "".join(tags[key] for key in sorted(tags) if key.startswith(_ENTRY))
    created_at = time_of(created_ms).isoformat(timespec="seconds")
    stage = next((alias for alias in ALIASES if alias in aliases), "archived" if ARCHIVED in tags else "none")
    registry_fields = {"name": name, "version": number, "created_at": created_at, "stage": stage}
    return lookup.read_version(body, f"{name} {number} in MLflow", registry_fields)


def time_of(milliseconds: Any) -> datetime:
    """Return a time of MLflow's in UTC; 1970 for what is not a time."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def promotion_tag(stage: Stage, who: str, reason: str) -> tuple[str, str]:
    """Return key and value of a tag that records one promotion; keys sort by time."""
    at = datetime.now(UTC)
    value = Promotion(at=at.isoformat(timespec="seconds"), stage=stage, who=who, reason=reason)
    return f"{_PROMOTION}{at:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}", json.dumps(value.model_dump())


def read_promotions(tags: Mapping[str, str]) -> list[Promotion]:
    """Return the promotions that tags record, oldest first.

    Raises:
        RegistryError: The tags were changed and do not hold a promotion any more.
    """
    keys = sorted(key for key in tags if key.startswith(_PROMOTION))
    return [lookup.read_promotion(tags[key], "A version in MLflow") for key in keys]
