"""The fields of the statements about an artifact, as in-toto and SLSA name them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

import compileflow
from compileflow.artifact.attestations.statements import Outcome, provenance_statement, verdict_statement
from compileflow.artifact.manifest import CalibrationRecord, read_manifest
from tests.unit.attested_artifacts import (
    REPORT,
    REQUEST,
    RUN,
    SOURCE,
    judged,
)

DIGEST = "a" * 64


def test_provenance_is_an_in_toto_statement_with_slsas_predicate(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert provenance_statement(manifest, DIGEST, RUN) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f"manifests/sha256/{DIGEST}.json", "digest": {"sha256": DIGEST}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:compileflow:compile:v1",
                "externalParameters": {"source": "hf://a/b", "spec": manifest.spec.model_dump(mode="json")},
                "internalParameters": {
                    "requestDigest": REQUEST,
                    "targetVersion": 3,
                    "threads": 2,
                    "cpuFeatures": ["avx2"],
                    "machine": platform.machine(),
                    "python": platform.python_version(),
                },
                "resolvedDependencies": [
                    {
                        "name": "source-model",
                        "uri": "hf://a/b",
                        "digest": {"sha256": SOURCE},
                        "annotations": {"revision": "c" * 40, "architecture": "BertModel"},
                    },
                    {"name": "onnx", "uri": "pkg:pypi/onnx@1.21.0", "annotations": {"version": "1.21.0"}},
                    {
                        "name": "torch_blade",
                        "uri": "pkg:pypi/torch-blade@0.2.0%2Bcpu",
                        "annotations": {"version": "0.2.0+cpu"},
                    },
                ],
            },
            "runDetails": {
                "builder": {
                    "id": "pkg:pypi/compileflow",
                    "version": {"compileflow": compileflow.__version__},
                },
                "metadata": {
                    "invocationId": "run-1",
                    "startedOn": "2026-03-05T12:00:00Z",
                    "finishedOn": "2026-03-05T12:01:30Z",
                },
            },
        },
    }


def test_provenance_names_the_calibration_examples(artifact: Path) -> None:
    calibration = CalibrationRecord(origin="mine.txt", digest="9" * 64, examples=12)
    manifest = read_manifest(artifact).model_copy(update={"calibration": calibration})
    dependencies = provenance_statement(manifest, DIGEST, RUN)["predicate"]["buildDefinition"][
        "resolvedDependencies"
    ]
    assert dependencies[-1] == {
        "name": "calibration",
        "digest": {"sha256": "9" * 64},
        "annotations": {"origin": "mine.txt", "examples": 12},
    }


def test_verdict_is_an_in_toto_test_result() -> None:
    uri = f"file:///store/manifests/sha256/{REPORT}.json"
    assert verdict_statement(DIGEST, judged("warn")) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f"manifests/sha256/{DIGEST}.json", "digest": {"sha256": DIGEST}}],
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {
            "result": "WARNED",
            "configuration": [
                {"name": "suite", "digest": {"sha256": "6" * 64}},
                {"name": "source-model", "digest": {"sha256": SOURCE}},
                {"name": "report", "uri": uri, "digest": {"sha256": REPORT}},
                {
                    "name": "request",
                    "digest": {"sha256": REQUEST},
                    "annotations": {"finishedOn": "2026-03-05T12:01:30Z"},
                },
            ],
            "url": uri,
            "passedTests": ["finite_outputs"],
            "warnedTests": ["rel_l2"],
            "failedTests": [],
        },
    }


@pytest.mark.parametrize(
    ("outcome", "result", "holds_gate"),
    [
        ("pass", "PASSED", "passedTests"),
        ("warn", "WARNED", "warnedTests"),
        ("fail", "FAILED", "failedTests"),
        ("error", "FAILED", "failedTests"),
    ],
)
def test_every_outcome_has_its_result_and_an_error_is_none_that_passes(
    outcome: Outcome, result: str, holds_gate: str
) -> None:
    predicate = verdict_statement(DIGEST, judged(outcome))["predicate"]
    assert predicate["result"] == result
    assert "rel_l2" in predicate[holds_gate]
