"""The layout of a registered version in Neptune: fields, files, model card, and its conversion back to an entry.

The entry's JSON is authoritative: always complete in the file `registry/entry`, and in the string
`registry/entry_json` if it fits, so that a list of versions takes one query. The other fields serve people and
queries.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from compileflow.contracts import ModelVersion, VersionEntry, VersionFiles
from compileflow.contracts.digests import json_digest
from compileflow.contracts.sources import TEST_FILES
from compileflow.registries.lookup import read_version

DIGEST, COMPLETE, NAME = "registry/digest", "registry/complete", "registry/name"
IS_COMPLETE = f"(`{COMPLETE}`:bool = true)"
ENTRY_FILE, ENTRY_JSON = "registry/entry", "registry/entry_json"
PROMOTIONS, PROMOTED_AT = "registry/promotions", "registry/promoted_at"
CARD, CARD_TASK, COMPILED = "model/model_card", "huggingface_pipeline_task", "model/compiled_model_versions"
ARTIFACT, TEST_FOLDER = "model/artifact", "model/test_files"
COLUMNS = (
    "sys/stage", "sys/creation_time", DIGEST, COMPLETE, NAME, ENTRY_JSON, PROMOTED_AT,
)  # fmt: skip
# Neptune's client cuts longer strings and reports that only in its log.
LONGEST_STRING = 16_384
_CUT = "... (cut)"


def model_key(name: str) -> str:
    """Return the key of a name's model: upper-case letters and digits, with 32 bits of the name's digest.

    Neptune needs unique upper-case keys; without the digest `Ner-v1` and `ner_v1` would share one model.

    >>> model_key("ner")
    'NER84F1590C'
    """
    letters = re.sub(r"[^A-Z0-9]", "", name.upper()).lstrip("0123456789")[:8]
    return (letters or "M") + json_digest(name)[:8].upper()


def number_of(identity: str) -> int:
    """Return a version's number: the last part of Neptune's id, 3 for PRJ-KEY-3."""
    return int(identity.rpartition("-")[2])


def cut(text: str) -> str:
    """Shorten a text that Neptune would cut, so that the cut is visible; equal texts stay equal."""
    return text if len(text) <= LONGEST_STRING else text[: LONGEST_STRING - len(_CUT)] + _CUT


def equals(path: str, text: str) -> str:
    """Return the Neptune query for versions whose string field equals `text`.

    A query cannot contain a quotation mark safely: for such a text it finds all versions, and the caller filters.
    """
    return "" if '"' in text or "\\" in text else f'(`{path}`:string = "{cut(text)}")'


def all_of(*queries: str) -> str:
    """Join queries by AND; empty ones find everything."""
    return " AND ".join(query for query in queries if query)


def any_of(queries: Iterable[str]) -> str:
    """Join queries by OR; an empty one finds everything."""
    parts = list(queries)
    return f"({' OR '.join(parts)})" if all(parts) else ""


def entry_json(entry: VersionEntry) -> str:
    """Write an entry as JSON; figures that are not finite become the strings NaN, Infinity and -Infinity."""
    value = entry.model_dump(mode="python", include=set(VersionEntry.model_fields))
    value["figures"] = {name: _figure(figure) for name, figure in entry.figures.items()}
    return json.dumps(value, sort_keys=True, allow_nan=False)


def entry_fields(entry: VersionEntry, report: JsonValue) -> dict[str, str | float]:
    """Return the fields of an entry and of the gates in its report.

    Args:
        entry: Entry to register.
        report: Content of report.json, or None without a report.
    """
    fields: dict[str, str | float] = {
        "target": entry.target,
        "hf_task": str(entry.spec.get("hf_task", "")),
        "precision": str(entry.spec.get("precision", "")),
        "verdict": entry.verdict,
        "artifact/uri": entry.artifact_uri,
        "artifact/digest": entry.artifact_digest,
        "report/uri": entry.report_uri,
        "report/digest": entry.report_digest,
        "source/uri": entry.source_uri,
        "source/revision": entry.source_revision,
        "source/digest": entry.source_digest,
        "flow_run_id": entry.flow_run_id or "",
    }
    for name, figure in entry.figures.items():
        fields[f"metrics/{_part(name)}"] = _figure(figure)
    for gate in _gates(report):
        for key in ("outcome", "measured", "limit"):
            if gate.get(key) is not None:
                value = gate[key]
                fields[f"gates/{_part(gate['gate'])}/{key}"] = value if key == "outcome" else _figure(value)
    text = entry_json(entry)
    if len(text) <= LONGEST_STRING:
        fields[ENTRY_JSON] = text
    return {path: cut(value) if isinstance(value, str) else value for path, value in fields.items()}


def model_card(entry: VersionEntry, test_files: Iterable[str], *, weights: bool) -> dict[str, JsonValue]:
    """Return the card that services read: the task, the place of the artifact and of the test files.

    Args:
        entry: Entry to register.
        test_files: Kinds of the test files that are uploaded.
        weights: Whether the artifact's files are below the attribute path, instead of a reference.
    """
    return {
        "model_params": {CARD_TASK: str(entry.spec.get("hf_task", ""))},
        "model_artifact_attribute_path": ARTIFACT,
        "model_test_files": {kind: f"{TEST_FOLDER}/{kind}" for kind in test_files},
        "artifact": {"uri": entry.artifact_uri, "digest": entry.artifact_digest, "uploaded": weights},
        "source": {"uri": entry.source_uri, "revision": entry.source_revision, "digest": entry.source_digest},
        "target": entry.target,
    }


def uploads(files: VersionFiles, *, weights: bool) -> dict[str, Path]:
    """Return the existing files to upload by their field."""
    paths = {
        "artifact/manifest": files.artifact / "manifest.json",
        "report/html": files.report / "report.html",
        "report/json": files.report / "report.json",
    }
    paths |= {f"{TEST_FOLDER}/{kind}": path for kind, path in existing_test_files(files).items()}
    if weights:
        for path in sorted(files.artifact.rglob("*")):
            paths[f"{ARTIFACT}/{path.relative_to(files.artifact).as_posix()}"] = path
    return {field: path for field, path in paths.items() if path.is_file()}


def existing_test_files(files: VersionFiles) -> dict[str, Path]:
    """Return the existing test files by their kind, for example "inputs" for inputs.json."""
    paths = [files.test_files / name for name in TEST_FILES] if files.test_files else []
    return {path.stem: path for path in paths if path.is_file()}


def to_version(identity: str, text: str, *, stage: str, created_at: str) -> ModelVersion:
    """Combine an entry's JSON with the fields that Neptune keeps beside it.

    Raises:
        RegistryError: This compileflow cannot read the JSON as an entry.
    """
    moment = datetime.fromisoformat(created_at).astimezone(UTC)
    registry_fields = {
        "version": number_of(identity),
        "created_at": moment.isoformat(timespec="milliseconds"),
        "stage": stage or "none",
    }
    return read_version(text, f"{identity} in Neptune", registry_fields)


def _gates(report: JsonValue) -> list[dict[str, Any]]:
    verdict = report.get("verdict") if isinstance(report, dict) else None
    gates = verdict.get("gates") if isinstance(verdict, dict) else None
    return [gate for gate in gates if isinstance(gate, dict)] if isinstance(gates, list) else []


def _part(name: str) -> str:
    # A slash would create a namespace, which may collide with another figure's field.
    return name.replace("/", ".")


def _figure(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
