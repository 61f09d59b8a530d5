"""inspect: show an artifact, a report or a comparison. Reads JSON and opens no compiled file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from compileflow.cli.common import AsJson, artifact_location, one_line_errors, stored_folder
from compileflow.cli.output import say, say_json
from compileflow.cli.tables import print_record, print_table

if TYPE_CHECKING:
    from compileflow.artifact.manifest import ArtifactManifest

_UNITS = {"text": "tokens", "image-text": "tokens", "audio": "samples or spectra", "image": ""}


@one_line_errors
def inspect(
    artifact: Annotated[
        str,
        typer.Argument(
            help="Folder, URI or digest of an artifact, registry:NAME@STAGE or registry:NAME@NUMBER, or URI or "
            "digest of a report or of a comparison by target auto."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show an artifact, a report or a comparison by target auto. Opens no compiled file."""
    from compileflow.artifact.manifest import read_manifest
    from compileflow.errors import ManifestError

    artifact = artifact_location(artifact)
    with stored_folder(artifact) as folder:
        try:
            manifest = read_manifest(folder)
        except ManifestError:
            if (folder / "comparison.json").is_file():
                _inspect_comparison(artifact, as_json)
            elif (folder / "report.json").is_file():
                _inspect_report(artifact, as_json)
            else:
                raise
            return
    if as_json:
        say_json(manifest.model_dump(mode="json"))
    else:
        _print_manifest(manifest)


def _print_manifest(manifest: ArtifactManifest) -> None:
    toolchain = ", ".join(f"{name} {version}" for name, version in manifest.target.toolchain.items())
    rows = {
        "target": f"{manifest.target.name} (version {manifest.target.version})",
        "task": manifest.hf_task.value,
        "precision": manifest.spec.precision.value,
        "source model": f"{manifest.source.uri} at {manifest.source.revision}",
        "source digest": manifest.source.digest,
        "architecture": manifest.source.architecture,
        "toolchain": toolchain,
        "Python code": ", ".join(manifest.python_files) or "none",
        "size": f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files",
    }
    unit = _UNITS[manifest.hf_task.modality]
    for name, component in manifest.components.items():
        shapes = ", ".join(str(bucket) for bucket in component.shape_buckets) or "any shape"
        longest = f"up to {component.max_sequence_length} {unit}; " if unit else ""
        rows[f"component {name}"] = f"{longest}{shapes}"
    print_record(rows)


def _inspect_report(uri: str, as_json: bool) -> None:
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import data_docs_beside, export_report, read_report

    report = read_report(uri)
    if as_json:
        say_json(report.model_dump(mode="json"))
        return
    rows = []
    for gate in report.verdict.gates:
        measured = "no number" if gate.measured is None else f"{gate.measured:.4g}"
        name = f"{gate.gate} (suite {gate.suite})" if gate.suite else gate.gate
        rows.append((name, gate.outcome, measured, f"{gate.comparison} {gate.limit:.4g}"))
    print_table(("gate", "outcome", "measured", "limit"), rows, title=report.verdict.reason)
    page = export_report(uri, get_settings())
    say(f"report: {page}")
    if docs := data_docs_beside(page):
        say(f"data docs: {docs}")


def _inspect_comparison(uri: str, as_json: bool) -> None:
    from compileflow.selection.comparison_file import export_comparison, read_comparison
    from compileflow.settings import get_settings

    comparison = read_comparison(uri)
    if as_json:
        say_json(comparison.model_dump(mode="json"))
        return
    print_table(comparison.comparison_header(), comparison.comparison_rows(), title=comparison.reason)
    for line in comparison.comparison_notes():
        say(line)
    say(f"comparison: {export_comparison(uri, get_settings())}")
