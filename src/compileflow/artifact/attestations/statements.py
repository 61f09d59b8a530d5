"""The two in-toto statements on an artifact: how it was compiled, and what its validation found.

Fields are those of in-toto Statement v1 and its resource descriptors, of SLSA provenance v1, and of in-toto's test
result v0.1: https://github.com/in-toto/attestation/tree/main/spec and https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from typing import Any
from urllib.parse import quote

from compileflow.artifact.manifest import ArtifactManifest
from compileflow.contracts import Outcome

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
VERDICT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
# They name what docs/how-to/sign-and-verify.md describes, and rest on no host name.
BUILD_TYPE = "urn:compileflow:compile:v1"
BUILDER_ID = "pkg:pypi/compileflow"
# Names of resource descriptors.
SOURCE_MODEL, CALIBRATION, SUITE, REPORT = "source-model", "calibration", "suite", "report"

Statement = Mapping[str, Any]
_RESULTS: Mapping[Outcome, str] = {"pass": "PASSED", "warn": "WARNED", "fail": "FAILED", "error": "FAILED"}


@dataclass(frozen=True)
class CompileRun:
    """The run that made an artifact.

    Attributes:
        invocation_id: Names this run and no other.
        started: With a time zone.
        finished: With a time zone.
        threads: Of the compile.
    """

    invocation_id: str
    started: datetime
    finished: datetime
    threads: int


@dataclass(frozen=True)
class Judged:
    """A validation's verdict, and what it stands on.

    Attributes:
        outcome: Of all gates together.
        gates: Each gate's own, in the suite's order.
        suite_digest: SHA-256 of the suite file.
        source_digest: Of the source model's folder.
        report_digest: Of the report's folder.
        report_uri: Where that is.
    """

    outcome: Outcome
    gates: Mapping[str, Outcome]
    suite_digest: str
    source_digest: str
    report_digest: str
    report_uri: str


def provenance_statement(manifest: ArtifactManifest, artifact_digest: str, run: CompileRun) -> dict[str, Any]:
    """Say how an artifact came to be: SLSA provenance v1."""
    source, target = manifest.source, manifest.target
    dependencies = [
        {
            "name": SOURCE_MODEL,
            "uri": source.uri,
            "digest": {"sha256": source.digest},
            "annotations": {"revision": source.revision, "architecture": source.architecture},
        },
        *(
            {"name": name, "uri": _package_url(name, version), "annotations": {"version": version}}
            for name, version in sorted(target.toolchain.items())
        ),
    ]
    if manifest.calibration is not None:
        record = manifest.calibration
        annotations = {"origin": record.origin, "examples": record.examples}
        dependencies.append({"name": CALIBRATION, "digest": {"sha256": record.digest}, "annotations": annotations})
    return _statement(
        artifact_digest,
        PROVENANCE_TYPE,
        {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"source": source.uri, "spec": manifest.spec.model_dump(mode="json")},
                "internalParameters": {
                    "targetVersion": target.version,
                    "threads": run.threads,
                    "cpuFeatures": list(target.cpu_features),
                    "machine": platform.machine(),
                    "python": platform.python_version(),
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": {"compileflow": installed_version("compileflow")}},
                "metadata": {
                    "invocationId": run.invocation_id,
                    "startedOn": _timestamp(run.started),
                    "finishedOn": _timestamp(run.finished),
                },
            },
        },
    )


def verdict_statement(artifact_digest: str, judged: Judged) -> dict[str, Any]:
    """Say what the validation of an artifact found: in-toto test result v0.1; `error` counts as FAILED."""

    def gates(*outcomes: Outcome) -> list[str]:
        return [name for name, outcome in judged.gates.items() if outcome in outcomes]

    return _statement(
        artifact_digest,
        VERDICT_TYPE,
        {
            "result": _RESULTS[judged.outcome],
            "configuration": [
                {"name": SUITE, "digest": {"sha256": judged.suite_digest}},
                {"name": SOURCE_MODEL, "digest": {"sha256": judged.source_digest}},
                {"name": REPORT, "uri": judged.report_uri, "digest": {"sha256": judged.report_digest}},
            ],
            "url": judged.report_uri,
            "passedTests": gates("pass"),
            "warnedTests": gates("warn"),
            "failedTests": gates("fail", "error"),
        },
    )


def subject_digests(statement: Statement) -> tuple[str, ...]:
    """Return the SHA-256 of each thing that a statement is about."""
    return tuple(filter(None, map(_sha256, _list(statement.get("subject")))))


def source_digest(statement: Statement) -> str | None:
    """Return the digest of the source model that either statement names."""
    predicate = _dict(statement.get("predicate"))
    dependencies = _dict(predicate.get("buildDefinition")).get("resolvedDependencies")
    return _named(dependencies, SOURCE_MODEL) or _named(predicate.get("configuration"), SOURCE_MODEL)


def report_digest(verdict: Statement) -> str | None:
    """Return the digest of the report's folder that a verdict names."""
    return _named(_dict(verdict.get("predicate")).get("configuration"), REPORT)


def result(verdict: Statement) -> str:
    """Return a verdict's PASSED, WARNED or FAILED; '' where it says nothing."""
    found = _dict(verdict.get("predicate")).get("result")
    return found if isinstance(found, str) else ""


def _statement(artifact_digest: str, kind: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    # The listing's path in a store: its own SHA-256 is the artifact's digest, for any tool that can hash a file.
    subject = {"name": f"manifests/sha256/{artifact_digest}.json", "digest": {"sha256": artifact_digest}}
    return {"_type": STATEMENT_TYPE, "subject": [subject], "predicateType": kind, "predicate": dict(predicate)}


def _package_url(name: str, version: str) -> str:
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}"


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _named(descriptors: Any, name: str) -> str | None:
    return next((_sha256(each) for each in _list(descriptors) if _dict(each).get("name") == name), None)


def _sha256(descriptor: Any) -> str | None:
    found = _dict(_dict(descriptor).get("digest")).get("sha256")
    return found if isinstance(found, str) else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
