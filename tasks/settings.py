"""Settings of the worker, with the credentials of the Prefect block that a request names."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from compileflow.errors import SpecError, hide
from compileflow.settings import Settings, get_settings
from compileflow.steps.request import CompileRequest
from tasks.server import patiently


def settings_for(request: CompileRequest) -> Settings:
    """Return the settings for a request's tasks.

    Raises:
        SpecError: The block does not exist or holds no credentials, or prefect-aws is not installed.
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
            f"The request names the AWS credentials block {name!r}, but prefect-aws is not installed.",
            hint="Run: pip install 'compileflow[prefect-aws]'",
        ) from error
    try:
        # Prefect's types know neither the argument nor that the call is then synchronous.
        block: Any = patiently(lambda: AwsCredentials.load(name, _sync=True))  # type: ignore[call-arg]
    except ValueError as error:
        raise SpecError(
            f"Prefect has no AWS credentials block {name!r}.",
            hint="Create it in the Prefect UI under Blocks, or leave the field empty.",
        ) from error
    session = block.get_boto3_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise SpecError(
            f"The AWS credentials block {name!r} holds no credentials.",
            hint="Enter an access key, a profile or a role in the Prefect UI.",
        )
    # Frozen credentials resolve profiles and roles to the keys of this moment.
    keys = credentials.get_frozen_credentials()
    hide([keys.secret_key, keys.token])
    fields = {
        "s3_access_key_id": SecretStr(keys.access_key),
        "s3_secret_access_key": SecretStr(keys.secret_key),
        "s3_region": session.region_name,
        "s3_endpoint_url": block.aws_client_parameters.endpoint_url,
    }
    # A token belongs to its key: S3 would refuse the worker's token with the block's key.
    token = {"s3_session_token": SecretStr(keys.token) if keys.token else None}
    return {field: value for field, value in fields.items() if value is not None} | token
