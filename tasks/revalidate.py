"""revalidate: prove one registered version again."""

from __future__ import annotations

import logging

from prefect import get_run_logger, task

from compileflow.admin.revalidate import Revalidation, revalidate_version
from compileflow.contracts import ModelVersion, without_credentials
from compileflow.settings import get_settings
from compileflow.validation.settings import ValidationSettings
from tasks.events import announce
from tasks.policies import RETRIES


@task(name="revalidate", description="Prove a registered version with today's runtimes.", **RETRIES)
def revalidate_one(
    version: ModelVersion,
    registry_uri: str,
    validation: ValidationSettings,
    *,
    timeout_s: float,
    trust_remote_code: bool,
) -> Revalidation:
    """Return the outcome, and send an event about a version that does not pass any more."""
    logger = get_run_logger()
    outcome = revalidate_version(
        version,
        registry_uri,
        validation=validation,
        timeout_s=timeout_s,
        settings=get_settings(),
        trust_remote_code=trust_remote_code,
        on_progress=logger.info,
    )
    level = logging.ERROR if outcome.outcome == "regressed" else logging.INFO
    logger.log(level, "%s version %d %s: %s", version.name, version.version, outcome.outcome, outcome.reason)
    if outcome.is_news and outcome.outcome == "regressed":
        announce("regressed", version, without_credentials(registry_uri), reason=outcome.reason)
    return outcome
