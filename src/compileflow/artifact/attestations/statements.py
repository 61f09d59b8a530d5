"""The two in-toto statements about an artifact: how it was compiled, and what its validation found.

The fields follow in-toto Statement v1, its resource descriptors and its test result v0.1, and SLSA provenance v1:
https://github.com/in-toto/attestation/tree/main/spec and https://slsa.dev/spec/v1.0/provenance.
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
from compileflow.contracts import PENDING, Outcome

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
VERDICT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
# docs/how-to/sign-and-verify.md describes what these URNs stand for. They do not depend on a host name.
BUILD_TYPE = "urn:compileflow:compile:v1"
BUILDER_ID = "pkg:pypi/compileflow"
# Names of the resource descriptors in a statement.
SOURCE_MODEL, CALIBRATION, SUITE, REPORT = "source-model", "calibration", "suite", "report"
USER_SUITE = "user-suite"
# The request as the cache names it, and the end of the run that answered it.
REQUEST, FINISHED, REVALIDATION = "request", "finishedOn", "revalidation"

Statement = Mapping[str, Any]
# What a verdict states for an outcome.
RESULT_OF: Mapping[str, str] = {
    "pass": "PASSED",
    "warn": "WARNED",
    "fail": "FAILED",
    "error": "FAILED",
    PENDING: "FAILED",
}
FAILED = RESULT_OF["fail"]
RESULTS = frozenset(RESULT_OF.values())


@dataclass(frozen=True)
class CompileRun:
    """The run that compiled an artifact.

    Attributes:
        invocation_id: Unique id of the run.
        started: Start of the compile, with a time zone.
        finished: End of the compile, with a time zone.
        threads: Number of threads that the compile used.
        request_digest: Key of the compile in the cache, of all that decides it.
    """

    invocation_id: str
    started: datetime
    finished: datetime
    threads: int
    request_digest: str


@dataclass(frozen=True)
class ValidationRun:
    """The verdict of a validation, and what the verdict is based on.

    Attributes:
        outcome: Outcome of all gates together.
        gates: Outcome by gate, in the order of the suite.
        suite_digest: SHA-256 of the suite file.
        user_suite_digest: SHA-256 of the user's suite file; "" without one.
        source_digest: Digest of the source model's folder.
        report_digest: Digest of the report's folder.
        report_uri: URI of the report's folder.
        request_digest: Key of the validation in the cache: artifact, source model, suite, settings and toolchain.
        finished: End of the validation, with a time zone.
        is_revalidation: Whether an artifact that was registered before was validated again.
    """

    outcome: Outcome
    gates: Mapping[str, Outcome]
    suite_digest: str
    source_digest: str
    report_digest: str
    report_uri: str
    request_digest: str
    finished: datetime
    user_suite_digest: str = ""
    is_revalidation: bool = False


def provenance_statement(manifest: ArtifactManifest, artifact_digest: str, run: CompileRun) -> dict[str, Any]:
    """Return the statement about how an artifact was compiled, as SLSA provenance v1."""
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
                    "requestDigest": run.request_digest,
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


def verdict_statement(artifact_digest: str, run: ValidationRun) -> dict[str, Any]:
    """Return the statement about what a validation found, as in-toto test result v0.1; `error` becomes FAILED."""

    def gates(*outcomes: Outcome) -> list[str]:
        return [name for name, outcome in run.gates.items() if outcome in outcomes]

    users_suite = [{"name": USER_SUITE, "digest": {"sha256": run.user_suite_digest}}]
    return _statement(
        artifact_digest,
        VERDICT_TYPE,
        {
            "result": RESULT_OF[run.outcome],
            "configuration": [
                {"name": SUITE, "digest": {"sha256": run.suite_digest}},
                *(users_suite if run.user_suite_digest else ()),
                {"name": SOURCE_MODEL, "digest": {"sha256": run.source_digest}},
                {"name": REPORT, "uri": run.report_uri, "digest": {"sha256": run.report_digest}},
                {
                    "name": REQUEST,
                    "digest": {"sha256": run.request_digest},
                    "annotations": {FINISHED: _timestamp(run.finished)}
                    | ({REVALIDATION: True} if run.is_revalidation else {}),
                },
            ],
            "url": run.report_uri,
            "passedTests": gates("pass"),
            "warnedTests": gates("warn"),
            "failedTests": gates("fail", "error"),
        },
    )


def subject_digests(statement: Statement) -> tuple[str, ...]:
    """Return the SHA-256 of every subject that a statement is about."""
    return tuple(filter(None, map(_sha256, _list(statement.get("subject")))))


def source_digest(statement: Statement) -> str | None:
    """Return the digest of the source model that a statement names; both kinds of statement have one."""
    predicate = _dict(statement.get("predicate"))
    dependencies = _dict(predicate.get("buildDefinition")).get("resolvedDependencies")
    return _named(dependencies, SOURCE_MODEL) or _named(predicate.get("configuration"), SOURCE_MODEL)


@dataclass(frozen=True)
class Origin:
    """What a provenance says about the source model of its artifact; "" where it says nothing.

    Attributes:
        uri: Place of the model.
        revision: Commit, or the digest of the folder.
        digest: Digest of the model's files.
        hf_task: Task that the artifact was compiled for.
    """

    uri: str
    revision: str
    digest: str
    hf_task: str


def origin(provenance: Statement) -> Origin:
    """Return what a provenance says about the source model."""
    definition = _dict(_dict(provenance.get("predicate")).get("buildDefinition"))
    parameters = _dict(definition.get("externalParameters"))
    models = [_dict(item) for item in _list(definition.get("resolvedDependencies"))]
    annotations = next((_dict(item.get("annotations")) for item in models if item.get("name") == SOURCE_MODEL), {})
    texts = (
        parameters.get("source"),
        annotations.get("revision"),
        source_digest(provenance),
        _dict(parameters.get("spec")).get("hf_task"),
    )
    return Origin(*(text if isinstance(text, str) else "" for text in texts))


def report_digest(verdict: Statement) -> str | None:
    """Return the digest of the report's folder that a verdict names."""
    return _named(_dict(verdict.get("predicate")).get("configuration"), REPORT)


def user_suite_digest(verdict: Statement) -> str | None:
    """Return the digest of the user's suite that a validation used; None without one."""
    return _named(_dict(verdict.get("predicate")).get("configuration"), USER_SUITE)


def request_digest(statement: Statement) -> str | None:
    """Return the cache key of the request that a statement answers; statements of older versions have none."""
    predicate = _dict(statement.get("predicate"))
    asked = _dict(_dict(predicate.get("buildDefinition")).get("internalParameters")).get("requestDigest")
    return asked if isinstance(asked, str) else _named(predicate.get("configuration"), REQUEST)


def finished_on(verdict: Statement) -> datetime | None:
    """Return when a validation ended, in UTC; None without a time that has a zone, as in older statements."""
    text = _annotations(verdict).get(FINISHED)
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
        return moment.astimezone(UTC) if moment is not None and moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def is_revalidation(verdict: Statement) -> bool:
    """Return whether a verdict is about an artifact that was registered before."""
    return _annotations(verdict).get(REVALIDATION) is True


def result(verdict: Statement) -> str:
    """Return the result of a verdict, one of `RESULTS` unless it is forged; '' if the statement has none."""
    value = _dict(verdict.get("predicate")).get("result")
    return value if isinstance(value, str) else ""


def _statement(artifact_digest: str, kind: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    # The path of the listing in a store. Any tool can check it: the listing's SHA-256 is the artifact's digest.
    subject = {"name": f"manifests/sha256/{artifact_digest}.json", "digest": {"sha256": artifact_digest}}
    return {"_type": STATEMENT_TYPE, "subject": [subject], "predicateType": kind, "predicate": dict(predicate)}


def _package_url(name: str, version: str) -> str:
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}"


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _annotations(verdict: Statement) -> Mapping[str, Any]:
    """Return the notes on the request that a verdict answers."""
    items = map(_dict, _list(_dict(verdict.get("predicate")).get("configuration")))
    return next((_dict(item.get("annotations")) for item in items if item.get("name") == REQUEST), {})


def _named(descriptors: Any, name: str) -> str | None:
    return next((_sha256(item) for item in _list(descriptors) if _dict(item).get("name") == name), None)


def _sha256(descriptor: Any) -> str | None:
    digest = _dict(_dict(descriptor).get("digest")).get("sha256")
    return digest if isinstance(digest, str) else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
