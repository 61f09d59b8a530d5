"""targets, inspect, verify: what there is, what it is, whether it is proven."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from compileflow.cli.common import AsJson, artifact_location, one_line_errors, stored_folder

if TYPE_CHECKING:
    from compileflow.artifact.attestations.verification import Verification


@one_line_errors
def targets(as_json: AsJson = False) -> None:
    """List every known target and whether it can compile and run here."""
    from dataclasses import asdict

    from compileflow.catalog import get_target, target_names

    rows = []
    for name in target_names():
        target = get_target(name)
        can = target.capabilities
        rows.append(
            {
                "target": name,
                **asdict(target.probe()),
                "precisions": [precision.value for precision in can.precisions],
                "hf_tasks": [task.value for task in can.hf_tasks],
                "devices": list(can.devices),
                "dynamic_axes": can.dynamic_axes,
                "summary": target.summary,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(Column("target", no_wrap=True), "compiles here", "runs here", "precisions")
    missing = []
    for row in rows:
        lacking = row["lacking"] if row["can_run"] else {}
        table.add_row(
            str(row["target"]),
            "yes" if row["can_compile"] else "no",
            "yes" if row["can_run"] else "no",
            ", ".join(f"({name})" if name in lacking else name for name in row["precisions"]),
        )
        if row["reason"]:
            missing.append(f"{row['target']}: {row['reason']}. {row['hint']}")
        missing += [f"{row['target']} ({name}): {why}." for name, why in lacking.items()]
    Console().print(table)
    for line in missing:
        typer.echo(line)


@one_line_errors
def inspect(
    artifact: Annotated[
        str,
        typer.Argument(
            help="An artifact's folder or URI, registry:NAME@STAGE, or the URI of a report or comparison."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what an artifact is, or what a report says. Reads the manifest and opens no compiled file."""
    from compileflow.artifact.manifest import read_manifest
    from compileflow.errors import ManifestError

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
        typer.echo(json.dumps(manifest.model_dump(mode="json"), indent=1))
        return
    table = Table("field", Column("value", overflow="fold"), show_header=False)
    toolchain = ", ".join(f"{name} {version}" for name, version in manifest.target.toolchain.items())
    rows = {
        "target": f"{manifest.target.name} (version {manifest.target.version})",
        "task": manifest.hf_task.value,
        "precision": manifest.spec.precision.value,
        "source model": f"{manifest.source.uri} at {manifest.source.revision}",
        "source digest": manifest.source.digest,
        "architecture": manifest.source.architecture,
        "toolchain": toolchain,
        "size": f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files",
    }
    unit = {"text": "tokens", "audio": "samples or spectra", "image": ""}[manifest.hf_task.modality]
    for name, component in manifest.components.items():
        shapes = ", ".join(str(bucket) for bucket in component.shape_buckets) or "any shape"
        longest = f"up to {component.max_sequence_length} {unit}; " if unit else ""
        rows[f"component {name}"] = f"{longest}{shapes}"
    for field, value in rows.items():
        table.add_row(field, value)
    Console().print(table)


@one_line_errors
def verify(
    artifact: Annotated[str, typer.Argument(help="Folder or URI of an artifact, or registry:NAME@STAGE.")],
    integrity_only: Annotated[
        bool, typer.Option("--integrity-only", help="Do not ask for a passing report.")
    ] = False,
    require_signature: Annotated[
        bool | None,
        typer.Option("--require-signature", help="Ask for provenance and verdict signed by a trusted key."),
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="Public key (PEM file) to trust instead of the configured. Repeat.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of an artifact, what is said of it, and that a passing verdict stands on it.

    Exit code 0 only if all of it holds.
    """
    from dataclasses import asdict

    from compileflow.artifact.attestations.verification import verify_artifact
    from compileflow.contracts import without_credentials
    from compileflow.settings import get_settings

    settings = get_settings()
    location = artifact_location(artifact)
    found = verify_artifact(location, settings=settings, keys=key or (), require_signature=require_signature)
    proof = _proof(location, found.digest) if found.intact else None
    problems = list(found.problems)
    if found.verdict == "FAILED" and not integrity_only:
        problems.append("Its last validation failed, whatever passed before. Do not serve it; read the report.")
    elif proof is None and found.intact and not integrity_only:
        problems.append(
            "No passing verdict on this digest is known to the store or to the registry "
            f"{without_credentials(settings.resolved_registry_uri())}. "
            "Run the flow with this store and registry; do not serve it before."
        )
    if as_json:
        answer = asdict(found) | {"proven": proof is not None, "proof": proof, "problems": problems}
        typer.echo(json.dumps(answer, indent=1))
    else:
        _print_verification(found, proof)
    if problems:
        more = f" (and {len(problems) - 1} more, which --json lists)" if len(problems) > 1 else ""
        typer.echo(f"error: {problems[0]}{more}", err=True)
        raise typer.Exit(1)


def _print_verification(found: Verification, proof: str | None) -> None:
    if found.intact:
        typer.echo(f"intact: {found.files} files, digest {found.digest}")
    if found.attested:
        signers = f"signed by {', '.join(found.signed_by)}" if found.signed_by else "not signed by a trusted key"
        typer.echo(f"attested: provenance and verdict {found.verdict}, {signers}")
    if found.report_intact:
        typer.echo("report: the one that the verdict stands on")
    if proof is not None:
        typer.echo(f"proven: {proof}")


def _inspect_report(uri: str, as_json: bool) -> None:
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import export_report, read_report

    report = read_report(uri)
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json"), indent=1))
        return
    table = Table("gate", "outcome", "measured", "limit", title=report.verdict.reason)
    for gate in report.verdict.gates:
        measured = "no number" if gate.measured is None else f"{gate.measured:.4g}"
        table.add_row(gate.gate, gate.outcome, measured, f"{gate.comparison} {gate.limit:.4g}")
    Console().print(table)
    typer.echo(f"report: {export_report(uri, get_settings())}")


def _inspect_comparison(uri: str, as_json: bool) -> None:
    from compileflow.selection.comparison_file import export_comparison, read_comparison
    from compileflow.settings import get_settings

    comparison = read_comparison(uri)
    if as_json:
        typer.echo(json.dumps(comparison.model_dump(mode="json"), indent=1))
        return
    table = Table(*comparison.comparison_header(), title=comparison.reason)
    for row in comparison.comparison_rows():
        table.add_row(*row)
    Console().print(table)
    for line in comparison.comparison_notes():
        typer.echo(line)
    typer.echo(f"comparison: {export_comparison(uri, get_settings())}")


def _proof(location: str, digest: str) -> str | None:
    """Say what proves an artifact: a registered version, or else a passing report in its store."""
    from compileflow.catalog import open_registry, open_store
    from compileflow.settings import get_settings
    from compileflow.steps.validate import report_on
    from compileflow.stores.layout import split_uri

    settings = get_settings()
    registered: Sequence[Any] = open_registry(settings.resolved_registry_uri()).find(digest)
    if registered:
        version = registered[0]
        return f"{version.name} version {version.version}, verdict {version.verdict}"
    store_uri = split_uri(location)[0] if "://" in location else settings.resolved_store_uri()
    report = report_on(open_store(store_uri), digest)
    if report is not None and report.outcome == "pass":
        return f"report {report.report_digest[:12]}, {report.reason}"
    return None
