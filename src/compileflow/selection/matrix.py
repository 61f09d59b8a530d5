"""A matrix of compiles: models x targets x precisions, what became of each cell, and the page of all cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compileflow._process.folders import work_folder
from compileflow.catalog import get_target, open_store
from compileflow.contracts import PENDING, StoredFolder
from compileflow.errors import CompileflowError, SpecError, TargetUnavailableError
from compileflow.selection.auto import failed_candidate, measured_candidate
from compileflow.selection.candidates import Candidate, CandidateLatency, accuracy_loss_of
from compileflow.selection.choice import pareto_front
from compileflow.selection.comparison import Comparison, compile_words
from compileflow.selection.scatter import letter, scatter
from compileflow.settings import Settings
from compileflow.spec import HfTask, Objective
from compileflow.steps.cells import Cells
from compileflow.steps.report_file import export_page, read_report, read_values
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from compileflow.steps.summary import version_line
from compileflow.validation.report import environment, fraction, megabytes, percent, write_page

MATRIX_JSON, MATRIX_HTML = "matrix.json", "matrix.html"


class MatrixRequest(Cells):
    """Models, targets and precisions; each combination is one compile."""

    models: tuple[str, ...] = Field(
        min_length=1,
        title="Models",
        description="Model folders, Hub ids or registered versions.",
        json_schema_extra={"position": 0},
    )

    def requests(self) -> list[CompileRequest]:
        """Return one request per cell: all targets and precisions of the first model, then of the next one."""
        return [request for model in dict.fromkeys(self.models) for request in self.requests_for(model)]


class MatrixCell(BaseModel):
    """One model for one target at one precision, and what became of it.

    Attributes:
        model: Model of the request.
        candidate: Target, precision, verdict and numbers.
        versions: One line for each registered version.
        error: Why the run failed; "" if it succeeded, if the artifact waits for its device, or if the target does
            not have the precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    candidate: Candidate
    versions: tuple[str, ...] = ()
    error: str = ""


class ModelComparison(BaseModel):
    """The comparison of one model's cells."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    comparison: Comparison


class Matrix(BaseModel):
    """All cells of a matrix, and one comparison for each model that was fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    cells: tuple[MatrixCell, ...]
    comparisons: tuple[ModelComparison, ...]
    environment: dict[str, str]

    @property
    def failed(self) -> tuple[MatrixCell, ...]:
        """Cells whose run failed."""
        return tuple(cell for cell in self.cells if cell.error)

    @property
    def headline(self) -> str:
        """The outcome in one line: how many cells failed, and how many no target can compile."""
        impossible = sum(cell.candidate.outcome == "unavailable" and not cell.error for cell in self.cells)
        possible = len(self.cells) - impossible
        pending = sum(cell.candidate.outcome == PENDING for cell in self.cells)
        verb = "combination does" if impossible == 1 else "combinations do"
        left_out = f"; {pending} wait for a device" if pending else ""
        left_out += f"; {impossible} {verb} not exist" if impossible else ""
        if self.failed:
            return f"{len(self.failed)} of {possible} cells failed{left_out}"
        return f"{possible - pending} of {possible} cells passed{left_out}"

    def rows(self) -> list[tuple[str, list[MatrixCell]]]:
        """Return the cells of each model."""
        rows: dict[str, list[MatrixCell]] = {}
        for cell in self.cells:
            rows.setdefault(cell.model, []).append(cell)
        return list(rows.items())

    def columns(self) -> list[str]:
        """Return the titles of the cells of one row: target and precision."""
        first_row = self.rows()[0][1]
        return [f"{cell.candidate.target} {cell.candidate.precision.value}" for cell in first_row]


def impossible_cell(request: CompileRequest) -> MatrixCell | None:
    """Return the cell of a target that does not have the precision, on any machine; None if it may be compiled."""
    target = get_target(request.target)
    precisions = target.capabilities.all_precisions
    if request.precision in precisions:
        return None
    choices = ", ".join(precision.value for precision in precisions)
    reason = TargetUnavailableError(
        f"{target.name} does not support {request.precision.value}.", hint=f"Choose one of: {choices}."
    )
    return MatrixCell(model=request.model, candidate=failed_candidate(request, reason))


def measured_cell(
    request: CompileRequest, outcome: CompileResult | CompileflowError, settings: Settings
) -> tuple[MatrixCell, Comparison | None]:
    """Return the cell of a finished run, and the comparison with this cell alone.

    Args:
        request: Request of the cell.
        outcome: Result of its run, or its error.
        settings: Credentials of the store.

    Returns:
        The cell, and a comparison that names the source model; None if the run did not get that far.
    """
    if isinstance(outcome, CompileflowError):
        if not outcome.report_uri:
            return _cell(request, failed_candidate(request, outcome), error=str(outcome)), None
        report_uri = outcome.report_uri
    elif outcome.validated is None:
        error = SpecError("The steps validate and register are off.", hint="A matrix compares verdicts.")
        return _cell(request, failed_candidate(request, error), error=str(error)), None
    else:
        report_uri = outcome.validated.report_uri
    report = read_report(report_uri, settings)
    if isinstance(outcome, CompileResult) and outcome.artifact is not None and outcome.validated is not None:
        candidate = measured_candidate(request, outcome.artifact, outcome.validated, settings)
        versions = tuple(version_line(version, uri) for uri, version in outcome.versions.items())
        cell = _cell(request, candidate, versions=versions)
    else:
        is_pending = report.verdict.outcome == PENDING
        memory = report.figures.get("serving_memory_bytes")
        candidate = Candidate(
            target=request.target,
            precision=request.precision,
            options=dict(request.target_options),
            outcome=report.verdict.outcome,
            reason=report.verdict.reason,
            latencies=tuple(CandidateLatency.of(latency) for latency in report.latencies),
            accuracy_loss=None if is_pending else accuracy_loss_of(report.figures),
            rel_l2=report.figures.get("rel_l2"),
            serving_memory_bytes=None if memory is None else int(memory),
            artifact_uri=report.subject.artifact_uri,
            report_uri=report_uri,
        )
        cell = _cell(request, candidate, error="" if is_pending else str(outcome))
    comparison = Comparison(
        source_uri=report.subject.source_uri,
        source_revision=report.subject.source_revision,
        source_digest=report.subject.source_digest,
        hf_task=HfTask(report.subject.hf_task),
        objective=Objective(),
        allow_warn=request.allow_warn,
        candidates=(candidate,),
        winner=None,
        reason="",
        environment=report.environment,
    )
    return cell, comparison


def _cell(request: CompileRequest, candidate: Candidate, **fields: Any) -> MatrixCell:
    return MatrixCell(model=request.model, candidate=candidate, **fields)


def matrix_of(cells: Sequence[tuple[MatrixCell, Comparison | None]], settings: Settings) -> Matrix:
    """Put cells together, in their order.

    Args:
        cells: Cells as `measured_cell` and `impossible_cell` return them.
        settings: Threads, for the description of the machine.
    """
    comparisons = []
    for model in dict.fromkeys(cell.model for cell, _ in cells):
        of_model = [(cell, comparison) for cell, comparison in cells if cell.model == model]
        first = next((comparison for _, comparison in of_model if comparison is not None), None)
        if first is not None:
            candidates = tuple(cell.candidate for cell, _ in of_model)
            comparison = first.model_copy(update={"candidates": candidates})
            comparisons.append(ModelComparison(model=model, comparison=comparison))
    return Matrix(
        cells=tuple(cell for cell, _ in cells),
        comparisons=tuple(comparisons),
        environment=environment(settings.threads),
    )


def store_matrix(matrix: Matrix, *, store_uri: str, settings: Settings) -> StoredFolder:
    """Store matrix.json and matrix.html beside the artifacts."""
    with work_folder(settings.work_dir, label="matrix") as work:
        (work / "matrix").mkdir()
        write_matrix(matrix, work / "matrix")
        return open_store(store_uri, settings).put_folder(work / "matrix")


def read_matrix(matrix_uri: str, settings: Settings) -> Matrix:
    """Read matrix.json from the store.

    Raises:
        ManifestError: The URI does not belong to a matrix.
        IntegrityError: The matrix is absent or altered.
    """
    return read_values(Matrix, matrix_uri, MATRIX_JSON, settings)


def export_matrix(matrix_uri: str, settings: Settings) -> Path:
    """Copy matrix.html out of the store to HOME/reports and return its path. Raises as `read_matrix` does."""
    return export_page(matrix_uri, MATRIX_HTML, settings)


def write_matrix(matrix: Matrix, folder: Path) -> None:
    """Write matrix.json and matrix.html into an existing folder."""
    sections: list[tuple[Any, ...]] = []
    for entry in matrix.comparisons:
        comparison = entry.comparison
        dropped = comparison.dropped()
        front = pareto_front(comparison.candidates)
        picture = scatter(
            comparison.candidates,
            winner=None,
            front=front,
            drops=dropped,
            description=f"Latency, accuracy and size of the cells of {entry.model}. The table has every number.",
        )
        # Nothing is chosen, so that the table gives the reasons of the verdicts.
        sections.append((entry.model, comparison, comparison.marks(), {}, picture))
    values = {
        "matrix": matrix,
        "sections": sections,
        "letter": letter,
        "percent": percent,
        "fraction": fraction,
        "megabytes": megabytes,
        "compile_words": compile_words,
    }
    write_page(
        folder,
        matrix,
        json_name=MATRIX_JSON,
        html_name=MATRIX_HTML,
        values=values,
        package="compileflow.selection",
    )


def matrix_markdown(matrix: Matrix, matrix_uri: str) -> str:
    """Return the matrix as Markdown: one row per model, one column per target and precision."""
    columns = matrix.columns()
    lines = [f"# {matrix.headline}", "", f"| model | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for model, cells in matrix.rows():
        lines.append(f"| `{model}` | {' | '.join(_cell_words(cell) for cell in cells)} |")
    lines += ["", "A number is the latency as a fraction of eager PyTorch's."]
    if matrix.failed:
        lines += ["", "## Failed cells", ""]
        lines += [f"- `{cell.model}`, {cell.candidate.label}: {cell.error}" for cell in matrix.failed]
    return "\n".join([*lines, "", f"Page with every number: `{matrix_uri}`"])


def matrix_table(matrix: Matrix) -> list[tuple[str, ...]]:
    """Return one row per cell: model, target, precision, verdict, latency / eager, size, compile, version."""
    return [
        (
            cell.model,
            cell.candidate.target,
            cell.candidate.precision.value,
            cell.candidate.outcome,
            "-" if cell.candidate.latency_ratio is None else fraction(cell.candidate.latency_ratio),
            "-" if cell.candidate.size_bytes is None else megabytes(cell.candidate.size_bytes),
            compile_words(cell.candidate),
            "; ".join(cell.versions) or "-",
        )
        for cell in matrix.cells
    ]


def _cell_words(cell: MatrixCell) -> str:
    candidate = cell.candidate
    if candidate.outcome == "unavailable":
        return "unavailable" if cell.error else "-"
    ratio = candidate.latency_ratio
    return candidate.outcome if ratio is None else f"{candidate.outcome}, {fraction(ratio)}"
