"""The AWS credentials block of a request replaces the worker's credentials."""

from __future__ import annotations

from typing import Any

import pytest
from prefect_aws import AwsCredentials
from pydantic import SecretStr

from compileflow.settings import Settings, get_settings
from compileflow.steps.request import CompileRequest
from tasks.settings import settings_for
from tests.services import secrets


def test_block_without_a_token_does_not_borrow_the_workers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    block: Any = AwsCredentials(
        aws_access_key_id=secrets.AWS_ACCESS_KEY_ID,
        aws_secret_access_key=SecretStr(secrets.AWS_SECRET_ACCESS_KEY),
        region_name="us-east-1",
    )
    monkeypatch.setattr(AwsCredentials, "load", lambda name, _sync: block)
    monkeypatch.setenv("COMPILEFLOW_S3_SESSION_TOKEN", "token of the worker's own key")
    monkeypatch.setenv("COMPILEFLOW_S3_STORAGE_CLASS", "STANDARD_IA")
    get_settings.cache_clear()
    task_settings = settings_for(CompileRequest(model="owner/name", aws_credentials_block="mine"))
    assert task_settings.s3_access_key_id is not None
    assert task_settings.s3_access_key_id.get_secret_value() == secrets.AWS_ACCESS_KEY_ID
    assert task_settings.s3_session_token is None
    assert (task_settings.s3_region, task_settings.s3_storage_class) == ("us-east-1", "STANDARD_IA")
