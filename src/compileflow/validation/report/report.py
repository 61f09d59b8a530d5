"""The report of a validation: report.json, and report.html, which opens offline."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compileflow._process.packages import installed_versions
from compileflow.validation.bundle import Failure
from compileflow.validation.judge.verdict import Verdict
from compileflow.validation.measure.coverage import Covered
from compileflow.validation.measure.flips import Flip
from compileflow.validation.measure.measurements import Latency
from compileflow.validation.measure.scores import LabelScore
from compileflow.validation.project_tests import ProjectTests
from compileflow.validation.report.page import fraction, write_page
from compileflow.validation.report.picture import latency_picture

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
# Differences whose worst comparisons are listed.
_DIFFERENCES = ("scaled_diff", "rel_l2", "one_minus_cosine")
# Folder beside them with the source version's test inputs and the compiled model's answers.
TEST_FILES_FOLDER = "test_files"


class ReportSubject(BaseModel):
    """The two models that were compared."""

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
    """The stored result of a validation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    subject: ReportSubject
    verdict: Verdict
    figures: dict[str, float]
    noise: dict[str, float]
    floors: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="By output, the source model's largest differences from itself."
    )
    grid: dict[str, float] = Field(
        default_factory=dict,
        description="Figures of the source model with numbers rounded to the precision; empty at fp32.",
    )
    grid_floors: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="By output, the largest differences of the rounded source model."
    )
    latencies: tuple[Latency, ...]
    worst: tuple[dict[str, Any], ...]
    families: dict[str, int]
    examples_origin: str
    examples_count: int
    labelled_count: int | None = Field(
        None, description="Number of natural examples that have a label; null in older reports."
    )
    examples_digest: str = Field("", description="SHA-256 of the natural examples; empty in older reports.")
    measurement_version: int | None = Field(
        None, description="Version of the measurements, which changes their numbers; null in older reports."
    )
    suite_digest: str
    user_suite: str = Field("", description="Name of the user's suite; empty without one.")
    user_suite_digest: str = Field("", description="SHA-256 of the user's suite file; empty without one.")
    environment: dict[str, str]
    flips: tuple[Flip, ...] = Field(
        (), max_length=50, description="Examples decided differently, the most confident first."
    )
    flips_count: int = Field(0, ge=0, description="Number of all flips, listed or not.")
    coverage: tuple[Covered, ...] = Field((), description="Shapes and token ids that were met.")
    score: LabelScore | None = Field(None, description="Score of both models on the labels of the examples.")
    project_tests: ProjectTests | None = Field(None, description="Outcome of the project's own tests.")
    failure: Failure | None = Field(None, description="After the verdict fail: where the failure begins.")

    @property
    def noise_multiple(self) -> float | None:
        """Worst rel_l2 as a multiple of the source model's own noise; None if either was not measured."""
        floor, rel_l2 = self.noise.get("rel_l2", 0.0), self.figures.get("rel_l2")
        return rel_l2 / floor if floor > 0 and rel_l2 is not None else None


def worst_rows(comparisons: Sequence[dict[str, Any]], count: int = 10) -> tuple[dict[str, Any], ...]:
    """Return the comparisons that are worst by some difference; comparisons without a number come first."""
    peaks = {
        name: max((row[name] for row in comparisons if np.isfinite(row[name])), default=0.0) or 1.0
        for name in _DIFFERENCES
    }

    def share(row: Mapping[str, Any]) -> float:
        shares = [row[name] / peaks[name] for name in _DIFFERENCES]
        return max(shares) if np.isfinite(shares).all() else np.inf

    ordered = sorted(comparisons, key=share, reverse=True)
    return tuple({name: _plain(value) for name, value in row.items()} for row in ordered[:count])


def environment(threads: int) -> dict[str, str]:
    """Return a description of the machine and the versions of the libraries that measure."""
    machine = {
        "machine": platform.machine(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": str(threads),
    }
    libraries = (
        "compileflow",
        "torch",
        "transformers",
        "onnxruntime",
        "openvino",
        "nncf",
        "numpy",
        "scipy",
        "great_expectations",
    )
    return machine | installed_versions(libraries)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into an existing folder."""
    values = {"report": report, "picture": latency_picture(report.latencies), "fraction": fraction}
    write_page(folder, report, json_name=REPORT_JSON, html_name=REPORT_HTML, values=values)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
