"""The run that stands behind a version in MLflow: it holds the version's small files, and names the flow run.

MLflow refuses a version whose source is a folder or a page outside its own place; a run's folder it always takes.
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
_OF_ARTIFACT = ("manifest.json", "model_card.json", "README.md")
_OF_REPORT = ("report.json", "report.html")


def run_with_files(
    client: Any, place: MlflowPlace, entry: VersionEntry, files: VersionFiles | None, work_dir: Path
) -> tuple[str, str]:
    """Make the run of a version, or take the one that a killed call left, and upload the small files.

    Returns:
        The run's id, and the URI of its folder.
    """
    experiment_id = _experiment(client, place)
    # Digest and name hold nothing that would end a filter's string.
    query = f"tags.`{DIGEST}` = '{entry.artifact_digest}' and tags.`{NAME}` = '{entry.name}'"
    left = client.search_runs([experiment_id], query, max_results=1)
    run = (
        left[0]
        if left
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
        logger.info("%s keeps artifacts on its own disk; the files stay in the store alone", place.tracking_uri)
    client.set_terminated(run_id)
    return run_id, uri


def copy_small_files(files: VersionFiles, dest: Path) -> None:
    """Copy what is read beside a model, and not its weights."""
    wanted = [(files.artifact, "", _OF_ARTIFACT), (files.report, "report", _OF_REPORT)]
    if files.test_files is not None:
        wanted.append((files.test_files, "test_files", TEST_FILES))
    with os_errors(dest, "write to"):
        for folder, below, names in wanted:
            for name in names:
                if (folder / name).is_file():
                    (dest / below).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, dest / below / name)


def _experiment(client: Any, place: MlflowPlace) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # Of a bare file MLflow would make a folder `mlruns` wherever the process happens to be.
        beside = place.file.with_suffix(".artifacts").as_uri() if place.file else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=beside))
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)


def _can_upload(place: MlflowPlace, artifact_uri: str) -> bool:
    """Say whether the run's folder can be written from here: not where it is on a server's own disk."""
    return place.file is not None or urlparse(artifact_uri).scheme not in ("", "file")
