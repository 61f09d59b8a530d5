"""The worker's settings, with the credentials of the Prefect block that a request names."""

from __future__ import annotations

from compileflow.errors import SpecError
from compileflow.settings import Settings, get_settings
from compileflow.steps.request import CompileRequest


def settings_for(request: CompileRequest) -> Settings:
    """Return the settings for a request's tasks.

    Raises:
        SpecError: there is no such block, or prefect-aws is not installed.
    """
    settings = get_settings()
    if request.aws_credentials_block is None:
        return settings
    return settings.model_copy(update=_aws_settings(request.aws_credentials_block))


def _aws_settings(name: str) -> dict[str, object]:
    try:
        from prefect_aws import AwsCredentials
    except ImportError as error:
        raise SpecError(
            f"The request names the AWS credentials block {name!r}, and prefect-aws is not installed.",
            hint="Run: pip install 'compileflow[prefect-aws]'",
        ) from error
    try:
        block = AwsCredentials.load(name, _sync=True)
    except ValueError as error:
        raise SpecError(
            f"Prefect has no AWS credentials block {name!r}.",
            hint="Make it in the Prefect UI under Blocks, or leave the field empty.",
        ) from error
    asked = {
        "s3_access_key_id": block.aws_access_key_id,
        "s3_secret_access_key": block.aws_secret_access_key,
        "s3_session_token": block.aws_session_token,
        "s3_region": block.region_name,
        "s3_endpoint_url": block.aws_client_parameters.endpoint_url,
    }
    return {field: value for field, value in asked.items() if value is not None}
