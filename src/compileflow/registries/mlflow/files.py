"""The MLflow run behind a version: it holds the version's small files and names the flow run.

MLflow accepts only a source inside its own place for a version; the folder of a run is always accepted.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

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
        if runs and _may_reuse(client, place, runs[0])
        else client.create_run(
            experiment_id,
            run_name=entry.flow_run_id or f"{entry.name}-{entry.target}",
            tags={DIGEST: entry.artifact_digest, NAME: entry.name},
        )
    )
    run_id, uri = run.info.run_id, run.info.artifact_uri
    # The folder of a run that another program made may be anywhere.
    is_own = place.artifact_folder is None or uri.startswith(f"{place.artifact_folder.as_uri()}/")
    repository = place.files_at(uri) if is_own else None
    if files is not None and repository is not None:
        with work_folder(work_dir, label="mlflow") as work:
            copy_small_files(files, work / "files")
            repository.log_artifacts(str(work / "files"))
    elif files is not None:
        logger.info("%s keeps the run's files elsewhere (%s); they are only in the store", place.tracking_uri, uri)
    client.set_terminated(run_id)
    return run_id, uri


def _may_reuse(client: Any, place: MlflowPlace, run: Any) -> bool:
    """Return whether files may be written for a run that is there already.

    A server keeps them by run. Elsewhere, what is at the run's URI may be a link, or the files of others.
    """
    repository = place.files_at(run.info.artifact_uri)
    if repository is None or repository.artifact_uri.startswith(("http:", "https:")):
        return True
    return not client.list_artifacts(run.info.run_id)


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
        folder = place.artifact_folder.as_uri() if place.artifact_folder else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=folder))
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(EXPERIMENT)
    return str(experiment.experiment_id)
