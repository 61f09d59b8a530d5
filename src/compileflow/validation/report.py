"""The report of a validation: report.json, and report.html that opens offline with nothing else."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compileflow.toolchain import installed_versions
from compileflow.validation.judge import Verdict
from compileflow.validation.latency import Latency

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


class ReportSubject(BaseModel):
    """What was compared with what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_uri: str
    source_revision: str
    source_digest: str
    architecture: str
    artifact_uri: str
    artifact_digest: str
    target: str
    hf_task: str
    precision: str
    component: str
    toolchain: dict[str, str]


class Report(BaseModel):
    """All of a validation that is worth keeping."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    subject: ReportSubject
    verdict: Verdict
    figures: dict[str, float]
    noise: dict[str, float]
    latencies: tuple[Latency, ...]
    worst: tuple[dict[str, Any], ...]
    families: dict[str, int]
    examples_origin: str
    examples_count: int
    suite_digest: str
    environment: dict[str, str]

    @property
    def noise_multiple(self) -> float | None:
        """The worst rel_l2 as a multiple of the source model's own noise."""
        floor, measured = self.noise.get("rel_l2", 0.0), self.figures.get("rel_l2")
        return measured / floor if floor > 0 and measured is not None else None


def worst_rows(comparisons: Sequence[dict[str, Any]], count: int = 10) -> tuple[dict[str, Any], ...]:
    """Return the comparisons that use most of the tolerance; those without a number come first."""
    ordered = sorted(
        comparisons, key=lambda row: -row["tolerance_use"] if np.isfinite(row["tolerance_use"]) else -np.inf
    )
    return tuple({name: _plain(value) for name, value in row.items()} for row in ordered[:count])


def environment(threads: int) -> dict[str, str]:
    """Return the machine and the versions that the measurements were made with."""
    found = {
        "machine": platform.machine(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": str(threads),
    }
    libraries = ("compileflow", "torch", "transformers", "onnxruntime", "numpy", "great_expectations")
    return found | installed_versions(libraries)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into an existing folder."""
    import jinja2

    (folder / REPORT_JSON).write_text(
        json.dumps(report.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8"
    )
    source = (files("compileflow.validation") / "report.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        source
    )
    (folder / REPORT_HTML).write_text(template.render(report=report), "utf-8")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
