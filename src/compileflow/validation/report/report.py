"""The report of a validation: report.json, and report.html that opens offline with nothing else."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compileflow._process.packages import installed_versions
from compileflow.validation.measure.flips import Flip
from compileflow.validation.judge.verdict import Verdict
from compileflow.validation.measure.latency import Latency

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
# Beside them: a registered source version's test inputs, with what the compiled model answers.
TEST_FILES = "test_files"


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
    flips: tuple[Flip, ...] = Field((), max_length=50, description="Examples decided differently, surest first.")
    flips_count: int = Field(0, ge=0, description="All of them, shown or not.")

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
    libraries = (
        "compileflow",
        "torch",
        "transformers",
        "onnxruntime",
        "openvino",
        "nncf",
        "numpy",
        "great_expectations",
    )
    return found | installed_versions(libraries)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into an existing folder."""
    write_page(folder, report, json_name=REPORT_JSON, html_name=REPORT_HTML, values={"report": report})


def write_page(
    folder: Path,
    value: BaseModel,
    *,
    json_name: str,
    html_name: str,
    values: Mapping[str, Any],
    package: str = "compileflow.validation.report",
) -> None:
    """Write a value as JSON, and as a page that opens offline, by the template of the page's name.

    Args:
        folder: Exists.
        value: What the JSON file holds.
        json_name: Of the JSON file.
        html_name: Of the page; its template is this name and `.j2`.
        values: What the template is given, besides the style.
        package: Package that holds the template.
    """
    import jinja2
    from markupsafe import Markup

    (folder / json_name).write_text(
        json.dumps(value.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8"
    )
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        (files(package) / f"{html_name}.j2").read_text("utf-8")
    )
    # Our own file, and it has characters that a style must keep as they are.
    style = Markup((files("compileflow.validation.report") / "page.css").read_text("utf-8"))  # noqa: S704
    (folder / html_name).write_text(template.render(style=style, **values), "utf-8")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def percent(share: float) -> str:
    """Return a share for people."""
    return f"{share * 100:.3g} %"


def megabytes(size_bytes: float) -> str:
    """Return a size for people, in MB of 10**6 bytes."""
    return f"{size_bytes / 1e6:.1f} MB"
