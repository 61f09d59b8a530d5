"""Compile and validate small models in this process; what several files of tests need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.catalog import get_target
from compileflow.contracts.digests import list_files
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, ShapeBucket
from compileflow.steps.prove import prove_artifact
from tests.compiles import build_once

BUCKETS = {
    modality: tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in shapes)
    for modality, shapes in {
        "text": ((1, 16), (8, 64)),
        "image": ((1, 1), (8, 1)),
        "audio": ((1, 8000), (8, 48000)),
    }.items()
}


@dataclass(frozen=True)
class Proof:
    """A verdict, and the report that says why."""

    outcome: str
    reason: str
    report: dict[str, Any]

    def gate(self, name: str) -> dict[str, Any]:
        """Return one judged gate."""
        return next(gate for gate in self.report["verdict"]["gates"] if gate["gate"] == name)


def compile_here(
    source_dir: Path, out_dir: Path, *, target: str, hf_task: HfTask, max_sequence_length: int | None = None
) -> Path:
    """Compile for real, once a run, in this process, with one thread; `out_dir` must not exist."""
    out_dir.mkdir(parents=True)
    dynamic = get_target(target).capabilities.dynamic_axes
    buckets = () if max_sequence_length or dynamic else BUCKETS[hf_task.modality]
    component = ComponentSpec(shape_buckets=buckets, max_sequence_length=max_sequence_length)
    spec = CompileSpec(target=target, hf_task=hf_task, components=(component,))
    build_once(
        {
            "source_dir": str(source_dir),
            "out_dir": str(out_dir),
            "spec": spec.model_dump(mode="json"),
            "source": {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": "0" * 64},
            "threads": 1,
        }
    )
    return out_dir


def validate_here(source_dir: Path, artifact_dir: Path, report_dir: Path, *, max_examples: int = 40) -> Proof:
    """Run the real measurement, judgement and report in this process."""
    report_dir.mkdir(parents=True)
    answer = prove_artifact(
        {
            "source_dir": str(source_dir),
            "artifact_dir": str(artifact_dir),
            "artifact_uri": artifact_dir.as_uri(),
            "report_dir": str(report_dir),
            "validation": {"max_examples": max_examples, "latency_pairs": 5},
            "threads": 1,
        }
    )
    report = json.loads((report_dir / "report.json").read_text("utf-8"))
    return Proof(answer["outcome"], answer["reason"], report)


def reseal(artifact_dir: Path) -> None:
    """Rewrite the manifest's digests, so that altered files are what it promises."""
    manifest = read_manifest(artifact_dir)
    (artifact_dir / MANIFEST_NAME).unlink()
    manifest.model_copy(update={"files": list_files(artifact_dir)}).write(artifact_dir)
