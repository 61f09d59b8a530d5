"""Read a side of a difference: an artifact with the last report on it, or a report with its artifact."""

from __future__ import annotations

from pathlib import Path

from compileflow.admin.difference import Side
from compileflow.artifact.manifest import MANIFEST_NAME, listed_digest, read_manifest
from compileflow.contracts import ArtifactStore
from compileflow.errors import ManifestError
from compileflow.steps.report_file import read_report, read_report_file
from compileflow.steps.validate import read_report_on
from compileflow.validation.report import REPORT_JSON


def read_side(path: Path, store: ArtifactStore, *, location: str) -> Side:
    """Read an artifact or a report.

    Args:
        path: Folder of an artifact or a report, or the JSON file of a report.
        store: Store that may hold the report on the artifact, or the artifact of the report.
        location: What the user calls the path, for errors.

    Raises:
        ManifestError: The path holds neither, or a file of it cannot be read.
        IntegrityError: A folder of the store is altered.
    """
    if path.is_file():
        return _side_of_report(path, store)
    if path.is_dir() and not (path / MANIFEST_NAME).exists():
        if not (path / REPORT_JSON).exists():
            raise ManifestError(
                f"{location} is neither an artifact nor a report.",
                hint="`compileflow versions --json` lists the artifacts and reports of registered versions.",
            )
        return _side_of_report(path / REPORT_JSON, store)
    manifest = read_manifest(path)
    digest = listed_digest(path, manifest)
    validated = read_report_on(store, digest)
    return Side(digest, manifest, read_report(validated.report_uri) if validated is not None else None)


def _side_of_report(path: Path, store: ArtifactStore) -> Side:
    report = read_report_file(path)
    digest = report.subject.artifact_digest
    if not store.exists(digest):
        return Side(digest, None, report)
    with store.open_folder(digest) as folder:
        return Side(digest, read_manifest(folder), report)
