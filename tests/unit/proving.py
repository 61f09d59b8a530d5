"""Validate small models in this process, for several test files; the fixture `in_process` compiles them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.steps.prove import prove_artifact
from compileflow.validation.judge import UserSuite


@dataclass(frozen=True)
class Proof:
    """A verdict, and the report that says why."""

    outcome: str
    reason: str
    report: dict[str, Any]

    def gate(self, name: str) -> dict[str, Any]:
        """Return one judged gate."""
        return next(gate for gate in self.report["verdict"]["gates"] if gate["gate"] == name)


def validate_here(
    source_dir: Path,
    artifact_dir: Path,
    report_dir: Path,
    *,
    max_examples: int = 40,
    reference_dir: Path | None = None,
    suite: UserSuite | None = None,
    examples: Path | None = None,
) -> Proof:
    """Run the real measurement, judgement and report in this process."""
    report_dir.mkdir(parents=True)
    answer = prove_artifact(
        {
            "source_dir": str(source_dir),
            "artifact_dir": str(artifact_dir),
            "artifact_uri": artifact_dir.as_uri(),
            "report_dir": str(report_dir),
            "validation": {
                "max_examples": max_examples,
                "latency_pairs": 5,
                "examples_path": str(examples) if examples else None,
            },
            "threads": 1,
            "source_digest": folder_digest(list_files(source_dir)),
            "reference_dir": str(reference_dir) if reference_dir else None,
            "suite": {"text": suite.text, "origin": suite.origin} if suite is not None else None,
        }
    )
    report = json.loads((report_dir / "report.json").read_text("utf-8"))
    return Proof(answer["outcome"], answer["reason"], report)


def reseal(artifact_dir: Path) -> None:
    """Rewrite the manifest's digests, so that altered files are what it promises."""
    manifest = read_manifest(artifact_dir)
    (artifact_dir / MANIFEST_NAME).unlink()
    manifest.model_copy(update={"files": list_files(artifact_dir)}).write(artifact_dir)
