"""The MLflow run behind a version: it holds the version's small files and names the flow run.

MLflow accepts only a source inside its own place for a version; the folder of a run is always accepted.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from compileflow._process.folders import os_errors, work_folder
from compileflow.contracts import VersionEntry, VersionFiles
from compileflow.contracts.sources import TEST_FILES
from compileflow.registries.mlflow.client import MlflowPlace, error_code
from compileflow.registries.mlflow.tags import DIGEST

logger = logging.getLogger(__name__)

EXPERIMENT = "compileflow"
NAME = "compileflow.name"
_ARTIFACT_FILES = ("manifest.json", "model_card.json", "README.md")
_REPORT_FILES = ("report.json", "report.html")


def run_with_files(
    client: Any, place: MlflowPlace, entry: VersionEntry, files: VersionFiles | None, work_dir: Path
) -> tuple[str, str]:
    """Create the run of a version, or reuse the run of a killed call, and upload the small files.

    Returns:
        The run's id, and the URI of its folder.
    """
    experiment_id = _experiment(client, place)
    # Digest and name cannot contain a quotation mark, which would end the filter's string.
    query = f"tags.`{DIGEST}` = '{entry.artifact_digest}' and tags.`{NAME}` = '{entry.name}'"
    runs = client.search_runs([experiment_id], query, max_results=1)
    run = (
        runs[0]
        if runs
        else client.create_run(
            experiment_id,
            run_name=entry.flow_run_id or f"{entry.name}-{entry.target}",
            tags={DIGEST: entry.artifact_digest, NAME: entry.name},
        )
    )
    run_id, uri = run.info.run_id, run.info.artifact_uri
    if files is not None and _can_upload(place, uri):
        with work_folder(work_dir, label="mlflow") as work:
            copy_small_files(files, work / "files")
            client.log_artifacts(run_id, str(work / "files"))
    elif files is not None:
        logger.info("%s keeps artifacts on its own disk; the files are only in the store", place.tracking_uri)
    client.set_terminated(run_id)
    return run_id, uri


def copy_small_files(files: VersionFiles, dest: Path) -> None:
    """Copy the files that people read, without the weights."""
    groups = [(files.artifact, "", _ARTIFACT_FILES), (files.report, "report", _REPORT_FILES)]
    if files.test_files is not None:
        groups.append((files.test_files, "test_files", TEST_FILES))
    with os_errors(dest, "write to"):
        for folder, subfolder, names in groups:
            for name in names:
                if (folder / name).is_file():
                    (dest / subfolder).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, dest / subfolder / name)


def _experiment(client: Any, place: MlflowPlace) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        # For a file, MLflow's default is a folder `mlruns` in the working folder.
        folder = place.file.with_suffix(".artifacts").as_uri() if place.file else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=folder))
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(EXPERIMENT)
    return str(experiment.experiment_id)


def _can_upload(place: MlflowPlace, artifact_uri: str) -> bool:
    """Return whether this machine can write the run's folder, which may be on a server's own disk."""
    return place.file is not None or urlparse(artifact_uri).scheme not in ("", "file")
