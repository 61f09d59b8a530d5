"""How a registered version is laid out in Neptune: the fields, the files, the model card, and the way back.

The entry's JSON is the truth: whole as the file `registry/entry`, and as the string `registry/entry_json` where
Neptune keeps it uncut, so that a list of versions is one query. All other fields are for people and queries.
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
from compileflow.registries.lookup import read_version

DIGEST, COMPLETE, NAME = "registry/digest", "registry/complete", "registry/name"
IS_COMPLETE = f"(`{COMPLETE}`:bool = true)"
ENTRY_FILE, ENTRY_JSON = "registry/entry", "registry/entry_json"
PROMOTIONS, PROMOTED_AT = "registry/promotions", "registry/promoted_at"
CARD, CARD_TASK, COMPILED = "model/model_card", "huggingface_pipeline_task", "model/compiled_model_versions"
ARTIFACT, TEST_FILES = "model/artifact", "model/test_files"
TEST_FILE_KINDS = ("inputs", "inference_params", "predictions")
COLUMNS = (
    "sys/stage", "sys/creation_time", DIGEST, COMPLETE, NAME, ENTRY_JSON, PROMOTED_AT,
)  # fmt: skip
# Neptune's client cuts longer strings and says so in its log alone.
LONGEST_STRING = 16_384
_CUT = "... (cut)"


def model_key(name: str) -> str:
    """Return the key of a name's model: upper-case letters and digits, with 32 bits of the name's digest.

    Neptune wants keys upper-case and unique; `Ner-v1` and `ner_v1` would otherwise be one model.

    >>> model_key("ner")
    'NER84F1590C'
    """
    letters = re.sub(r"[^A-Z0-9]", "", name.upper()).lstrip("0123456789")[:8]
    return (letters or "M") + json_digest(name)[:8].upper()


def number_of(identity: str) -> int:
    """Return a version's number: the last part of Neptune's own id, 3 for PRJ-KEY-3."""
    return int(identity.rpartition("-")[2])


def cut(text: str) -> str:
    """Shorten what Neptune would cut anyway, so that it shows; equal texts stay equal."""
    return text if len(text) <= LONGEST_STRING else text[: LONGEST_STRING - len(_CUT)] + _CUT


def equals(path: str, text: str) -> str:
    """Return the Neptune query for versions whose string field holds `text`.

    A quotation mark has no safe way into a query: for such a text it finds all, and the caller looks itself.
    """
    return "" if '"' in text or "\\" in text else f'(`{path}`:string = "{cut(text)}")'


def all_of(*queries: str) -> str:
    """Join queries by AND; empty ones find everything."""
    return " AND ".join(query for query in queries if query)


def entry_json(entry: VersionEntry) -> str:
    """Write an entry as JSON; figures that are no numbers become the strings NaN, Infinity and -Infinity."""
    value = entry.model_dump(mode="python", include=set(VersionEntry.model_fields))
    value["figures"] = {name: _figure(figure) for name, figure in entry.figures.items()}
    return json.dumps(value, sort_keys=True, allow_nan=False)


def entry_fields(entry: VersionEntry, report: JsonValue) -> dict[str, str | float]:
    """Return the fields of an entry, and of its report's gates.

    Args:
        entry: What is registered.
        report: report.json, or None where it is not at hand.
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
        for what in ("outcome", "measured", "limit"):
            if gate.get(what) is not None:
                value = gate[what]
                fields[f"gates/{_part(gate['gate'])}/{what}"] = value if what == "outcome" else _figure(value)
    text = entry_json(entry)
    if len(text) <= LONGEST_STRING:
        fields[ENTRY_JSON] = text
    return {path: cut(value) if isinstance(value, str) else value for path, value in fields.items()}


def model_card(entry: VersionEntry, test_files: Iterable[str], *, weights: bool) -> dict[str, JsonValue]:
    """Return the card that services read: the task, where the artifact is, and where the test files are.

    Args:
        entry: What is registered.
        test_files: Kinds of those that are uploaded.
        weights: Whether the artifact's files are below the attribute path; otherwise a reference is.
    """
    return {
        "model_params": {CARD_TASK: str(entry.spec.get("hf_task", ""))},
        "model_artifact_attribute_path": ARTIFACT,
        "model_test_files": {kind: f"{TEST_FILES}/{kind}" for kind in test_files},
        "artifact": {"uri": entry.artifact_uri, "digest": entry.artifact_digest, "uploaded": weights},
        "source": {"uri": entry.source_uri, "revision": entry.source_revision, "digest": entry.source_digest},
        "target": entry.target,
    }


def uploads(files: VersionFiles, *, weights: bool) -> dict[str, Path]:
    """Return the files to upload by their field. What is not there is left out."""
    chosen = {
        "artifact/manifest": files.artifact / "manifest.json",
        "report/html": files.report / "report.html",
        "report/json": files.report / "report.json",
    }
    chosen |= {f"{TEST_FILES}/{kind}": path for kind, path in given_test_files(files).items()}
    if weights:
        below = sorted(files.artifact.rglob("*"))
        chosen |= {f"{ARTIFACT}/{path.relative_to(files.artifact).as_posix()}": path for path in below}
    return {path: file for path, file in chosen.items() if file.is_file()}


def given_test_files(files: VersionFiles) -> dict[str, Path]:
    """Return the test files that there are, by their kind."""
    if files.test_files is None:
        return {}
    paths = {kind: files.test_files / f"{kind}.json" for kind in TEST_FILE_KINDS}
    return {kind: path for kind, path in paths.items() if path.is_file()}


def to_version(identity: str, text: str, *, stage: str, created_at: str) -> ModelVersion:
    """Make a version of an entry's JSON and what Neptune keeps beside it.

    Raises:
        RegistryError: the JSON is no entry of this compileflow.
    """
    moment = datetime.fromisoformat(created_at).astimezone(UTC)
    added = {
        "version": number_of(identity),
        "created_at": moment.isoformat(timespec="milliseconds"),
        "stage": stage or "none",
    }
    return read_version(text, f"{identity} in Neptune", added)


def _gates(report: JsonValue) -> list[dict[str, Any]]:
    verdict = report.get("verdict") if isinstance(report, dict) else None
    gates = verdict.get("gates") if isinstance(verdict, dict) else None
    return [gate for gate in gates if isinstance(gate, dict)] if isinstance(gates, list) else []


def _part(name: str) -> str:
    # A slash would make a namespace, which may stand where another figure's field is.
    return name.replace("/", ".")


def _figure(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
