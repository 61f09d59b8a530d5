"""settle: validate an artifact that waits for its device."""

from __future__ import annotations

from prefect import get_run_logger, task

from compileflow.settings import get_settings
from compileflow.steps.settle import Settled, settle_artifact
from compileflow.steps.summary import verdict_line
from tasks.policies import RETRIES


@task(name="settle", description="Validate an artifact that was compiled without its device.", **RETRIES)
def settle(artifact_uri: str, *, timeout_s: float, trust_remote_code: bool) -> Settled:
    """Return the verdict, with the source model, the artifact and the request that it belongs to."""
    logger = get_run_logger()
    settled = settle_artifact(
        artifact_uri,
        settings=get_settings(),
        timeout_s=timeout_s,
        trust_remote_code=trust_remote_code,
        on_progress=logger.info,
    )
    logger.info(verdict_line(settled.validated))
    return settled
