"""The checks of the sweep: a planted fault and an honest compile, proved as the validate step proves them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forked_checks import target_versions
from benchmarks.mutation.answers import user_answers, visible_difference
from benchmarks.mutation.fault import Fault, Healthy, Planting
from compileflow.contracts.digests import json_digest
from compileflow.errors import CompileflowError, first_line
from compileflow.steps.build import build_artifact
from compileflow.steps.prove import prove_artifact
from compileflow.steps.validate import MEASUREMENT_VERSION
from compileflow.testing.compiles import compile_once
from compileflow.validation.judge.suite import gates_for, load_suite
from compileflow.validation.settings import ValidationSettings

_TIME_LIMIT_S = 300
_LATENCY_PAIRS = 5


@dataclass(frozen=True)
class FaultCheck:
    """Plant a fault, prove the artifact, and compare its answers with those of the healthy compile.

    Attributes:
        fault: The fault.
        shared_dir: Folder of source models and healthy compiles, which checks share.
    """

    fault: Fault
    shared_dir: Path

    @property
    def key(self) -> str:
        """Key of the result."""
        return f"fault/{self.fault.name}/{versions(self.fault.healthy)}"

    @property
    def labels(self) -> dict[str, Any]:
        """Fields that identify the check."""
        healthy = self.fault.healthy
        return {
            "check": "fault",
            "name": self.fault.name,
            "kind": self.fault.kind,
            "task": healthy.source.hf_task.value,
            "target": healthy.target,
            "precision": healthy.precision.value,
            "versions": versions(healthy),
        }

    @property
    def time_limit_s(self) -> int:
        """Seconds of processor time after which the check is ended."""
        return _TIME_LIMIT_S

    def run(self, folder: Path) -> dict[str, Any]:
        """Plant and prove the fault."""
        healthy = self.fault.healthy
        source_dir, healthy_dir = _healthy_compile(healthy, self.shared_dir)
        planting = Planting(healthy, source_dir, healthy_dir, folder / "artifact", folder / "work")
        planting.work_dir.mkdir()
        try:
            self.fault.plant(planting)
        except CompileflowError as error:
            return _refused("plant", error) | {"visible": ""}
        result = proof(healthy, source_dir, planting.artifact_dir, folder / "report")
        mask_token = _mask_token(source_dir) if healthy.source.hf_task.takes_text else None
        before = user_answers(healthy_dir, mask_token)
        return result | {"visible": visible_difference(before, user_answers(planting.artifact_dir, mask_token))}

    def ended(self, folder: Path, reason: str) -> dict[str, Any]:
        """Return the result of a child that died."""
        return _no_result(folder, reason) | {"visible": ""}

    def summary(self, line: dict[str, Any]) -> str:
        """Return the result in words."""
        seen = f"visible in {line['visible']}" if line["visible"] else "not visible"
        return f"fault {line['name']} ({line['target']}): {line['outcome']}, {seen}: {line['reason'][:100]}"


@dataclass(frozen=True)
class HonestCheck:
    """Compile a source model, and prove the artifact.

    Attributes:
        name: Name of the compile in words.
        healthy: The compile.
        shared_dir: Folder of source models, which checks share.
    """

    name: str
    healthy: Healthy
    shared_dir: Path

    @property
    def key(self) -> str:
        """Key of the result."""
        return f"honest/{self.name}/{versions(self.healthy)}"

    @property
    def labels(self) -> dict[str, Any]:
        """Fields that identify the check."""
        return {
            "check": "honest",
            "name": self.name,
            "task": self.healthy.source.hf_task.value,
            "target": self.healthy.target,
            "precision": self.healthy.precision.value,
            "versions": versions(self.healthy),
        }

    @property
    def time_limit_s(self) -> int:
        """Seconds of processor time after which the check is ended."""
        return _TIME_LIMIT_S

    def run(self, folder: Path) -> dict[str, Any]:
        """Compile and prove."""
        source_dir = self.healthy.source.folder(self.shared_dir)
        artifact_dir = folder / "artifact"
        artifact_dir.mkdir()
        try:
            build_artifact(self.healthy.request(source_dir) | {"out_dir": str(artifact_dir)})
        except CompileflowError as error:
            return _refused("compile", error)
        return proof(self.healthy, source_dir, artifact_dir, folder / "report")

    def ended(self, folder: Path, reason: str) -> dict[str, Any]:
        """Return the result of a child that died."""
        return _no_result(folder, reason)

    def summary(self, line: dict[str, Any]) -> str:
        """Return the result in words."""
        return f"honest {line['name']}: {line['outcome']}: {line['reason'][:100]}"


def versions(healthy: Healthy) -> str:
    """Return what a verdict on a compile depends on: versions of the toolchain, gates and measurements."""
    suite, precision, task = load_suite(), healthy.precision, healthy.source.hf_task.graph_task
    gates = gates_for(precision, task, {})
    # Other tasks that a gate has, and what it says, do not change what it refuses here.
    others = {"says", "tasks", "optional"}
    rules = {
        "gates": [
            (
                gate.entry.model_dump(mode="json", exclude=others),
                task in gate.entry.optional,
                gate.limit,
                gate.severity,
            )
            for gate in gates
        ],
        "noise": [limit.model_dump() for name, limit in suite.noise_limits.items() if name is precision],
        "grid": {
            gate.entry.gate: grid.model_dump(exclude={"precisions"})
            for gate in gates
            if (grid := suite.grid_limits.get(gate.entry.gate)) is not None and precision in grid.precisions
        },
    }
    return f"{target_versions(healthy.target)} gates {json_digest(rules)[:8]} measurements {MEASUREMENT_VERSION}"


def _healthy_compile(healthy: Healthy, shared_dir: Path) -> tuple[Path, Path]:
    source_dir = healthy.source.folder(shared_dir)
    return source_dir, compile_once(healthy.request(source_dir), shared_dir)


def proof(healthy: Healthy, source_dir: Path, artifact_dir: Path, report_dir: Path) -> dict[str, Any]:
    """Prove an artifact as the validate step does; return the outcome, the reason and the gates that failed."""
    report_dir.mkdir()
    validation = ValidationSettings(latency_pairs=_LATENCY_PAIRS)
    try:
        answer = prove_artifact(
            {
                "source_dir": str(source_dir),
                "artifact_dir": str(artifact_dir),
                "artifact_uri": artifact_dir.as_uri(),
                "spec": healthy.request(source_dir)["spec"],
                "report_dir": str(report_dir),
                "validation": validation.model_dump(mode="json"),
                "threads": 1,
            }
        )
    except CompileflowError as error:
        return _refused("prove", error)
    except Exception as error:  # noqa: BLE001 - no verdict, so that the artifact is not registered
        name = type(error).__name__
        return {"outcome": "error", "reason": f"error: {name}: {error}", "gates": [name], "warnings": []}
    report = json.loads((report_dir / "report.json").read_text("utf-8"))
    gates = report["verdict"]["gates"]
    return {
        "outcome": answer["outcome"],
        "reason": answer["reason"],
        "gates": [gate["gate"] for gate in gates if gate["outcome"] in ("fail", "error")],
        "warnings": [gate["gate"] for gate in gates if gate["outcome"] == "warn"],
    }


def _refused(stage: str, error: CompileflowError) -> dict[str, Any]:
    """Return the result of an artifact that a step refuses with an error: its class stands for a gate."""
    outcome = "refused" if stage == "prove" else f"no {stage}"
    name = type(error).__name__
    return {"outcome": outcome, "reason": f"{name}: {first_line(error)}", "gates": [name], "warnings": []}


def _no_result(folder: Path, reason: str) -> dict[str, Any]:
    log = folder / "log"
    lines = log.read_text("utf-8", errors="replace").strip().splitlines() if log.exists() else []
    words = f"{reason}: {lines[-1][:200]}" if lines else reason
    return {"outcome": "no result", "reason": words, "gates": [], "warnings": []}


def _mask_token(source_dir: Path) -> str | None:
    from transformers import AutoTokenizer

    token: str | None = AutoTokenizer.from_pretrained(source_dir).mask_token
    return token
