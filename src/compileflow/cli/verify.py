"""verify: check every byte of an artifact and its attestations, and look for a version or a passing report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from compileflow.cli.common import FAILED, AsJson, artifact_location, one_line_errors, registered_version, store_of
from compileflow.cli.output import say, say_json

if TYPE_CHECKING:
    from compileflow.artifact.verify import Verification
    from compileflow.contracts import ModelVersion
    from compileflow.settings import Settings
    from compileflow.steps.values import ValidatedArtifact


@one_line_errors
def verify(
    artifact: Annotated[
        str,
        typer.Argument(
            help="Folder, URI or digest of an artifact, or registry:NAME@STAGE or registry:NAME@NUMBER."
        ),
    ],
    integrity_only: Annotated[
        bool, typer.Option("--integrity-only", help="Do not require a registered version or a passing report.")
    ] = False,
    require_signature: Annotated[
        bool | None,
        typer.Option("--require-signature", help="Require provenance and verdict signed by a trusted key."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Public key (PEM file) to trust instead of the configured keys. Repeatable."),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(min=0, max=36500, metavar="DAYS", help="Refuse an artifact that was validated longer ago."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of an artifact and its attestations, and look for a registered version or a passing report.

    The exit code is 0 only if all checks succeed.
    """
    from dataclasses import asdict
    from datetime import timedelta

    from compileflow.artifact.verify import last_result, verify_artifact
    from compileflow.catalog import open_store
    from compileflow.contracts import ACCEPTED_OUTCOMES, without_credentials
    from compileflow.settings import get_settings
    from compileflow.steps.validate import read_report_on, report_on

    settings = get_settings()
    # Several names may share an artifact; only the one that the user named counts then.
    version = registered_version(artifact)
    location = artifact_location(artifact) if version is None else version.artifact_uri
    versions = [version] if version is not None else _registered(location, settings)
    version = next(iter(versions), None)
    verification = verify_artifact(
        location,
        settings=settings,
        keys=key or (),
        require_signature=require_signature,
        versions=versions,
        max_age=None if max_age is None else timedelta(days=max_age),
    )
    has_failed = verification.verdict == "FAILED"
    if version is not None and "://" not in location:
        # The statements in a folder may be older than those in the store.
        has_failed |= last_result(version.artifact_uri, settings) == "FAILED"
    is_unregistered = version is None and verification.intact
    store = open_store(store_of(location))
    recorded = report_on(store, verification.digest) if is_unregistered else None
    # A refusal counts whatever its report says; a proof needs the report.
    refusal = recorded if recorded is not None and recorded.outcome not in ACCEPTED_OUTCOMES else None
    report = read_report_on(store, verification.digest) if recorded is not None and refusal is None else None
    has_failed |= refusal is not None
    problems = list(verification.problems)
    proof = None if problems or has_failed else _proof(version, report, verification.verdict)
    if refusal is not None and not integrity_only:
        problems.append(f"The last validation refused it: {refusal.reason}. Report: {refusal.report_uri}")
    elif has_failed and not integrity_only:
        problems.append("The last validation failed, although an earlier one may have passed. Read the report.")
    elif proof is None and not problems and not integrity_only:
        registries = " or ".join(map(without_credentials, settings.resolved_registry_uris()))
        problems.append(
            f"Neither the store nor the registry {registries} has a passing verdict on this digest. "
            "Validate the artifact with this store and registry before you serve it."
        )
    if as_json:
        values = asdict(verification) | {"proven": proof is not None, "proof": proof, "problems": problems}
        say_json(values)
    else:
        _print_verification(verification, proof)
    if problems:
        rest = f" (and {len(problems) - 1} more; --json lists them)" if len(problems) > 1 else ""
        say(f"error: {problems[0]}{rest}", err=True)
        raise typer.Exit(FAILED)


def _registered(location: str, settings: Settings) -> list[ModelVersion]:
    """Return the versions of an artifact in all configured registries, which must agree with its manifest."""
    from compileflow.artifact.manifest import listed_digest, read_manifest
    from compileflow.artifact.open import path_of
    from compileflow.catalog import open_registry
    from compileflow.stores.layout import split_uri

    if "://" in location:
        digest = split_uri(location)[1]
    else:
        folder = path_of(location).absolute()
        digest = listed_digest(folder, read_manifest(folder))
    uris = settings.resolved_registry_uris()
    return [version for uri in uris for version in open_registry(uri, settings).find(digest)]


def _print_verification(verification: Verification, proof: str | None) -> None:
    if verification.intact:
        say(f"intact: {verification.files} files, digest {verification.digest}")
    if verification.attested:
        signers = ", ".join(verification.signed_by)
        signature = f"signed by {signers}" if signers else "not signed by a trusted key"
        say(f"attested: provenance and verdict {verification.verdict}, {signature}")
    if verification.report_intact:
        say("report: intact, and the one that the verdict names")
    if proof is not None:
        say(f"proven: {proof}")


def _proof(version: ModelVersion | None, report: ValidatedArtifact | None, result: str | None) -> str | None:
    """Describe the proof of an artifact: a registered version, or else a passing report in its store."""
    if version is not None:
        # A later validation may have warned.
        verdict = "warn" if result == "WARNED" else version.verdict
        return f"{version.name} version {version.version}, verdict {verdict}"
    if report is not None and report.outcome == "pass":
        return f"report {report.report_digest[:12]}, {report.reason}"
    return None
