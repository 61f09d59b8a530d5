"""Logins of AWS that are over: one line that says how to log in, with the name of the profile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from botocore.credentials import SSOProvider

from compileflow.errors import StoreError
from compileflow.settings import Settings
from compileflow.stores.s3.store import S3Store
from tests.services.http_server import answer, serving

START_URL = "https://example.awsapps.com/start"
SSO = f"""
sso_start_url = {START_URL}
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = reader
"""
SSO_SESSION = """
sso_session = company
sso_account_id = 123456789012
sso_role_name = reader
"""
ROLE = """
role_arn = arn:aws:iam::123456789012:role/writer
source_profile = base
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AWS's configuration file; it chooses the profile "team"."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "DEFAULT_PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    file = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    monkeypatch.setattr(SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(tmp_path / "sso"))
    (tmp_path / "sso").mkdir()
    return file


def error_of(tmp_path: Path) -> StoreError:
    settings = Settings(home=tmp_path, s3_endpoint_url="http://127.0.0.1:9", s3_region="us-east-1")
    with pytest.raises(StoreError) as caught:
        list(S3Store("s3://bucket/p", settings).list())
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("has_token", [True, False])
def test_sso_login_that_is_over_says_how_to_log_in(config: Path, tmp_path: Path, has_token: bool) -> None:
    config.write_text(f"[profile team]{SSO}")
    if has_token:
        token = {"accessToken": "CANARY", "expiresAt": "2020-01-01T00:00:00Z", "startUrl": START_URL}
        name = hashlib.sha1(START_URL.encode()).hexdigest()  # noqa: S324 - AWS's name of the file
        (tmp_path / "sso" / f"{name}.json").write_text(json.dumps(token))
    error = error_of(tmp_path)
    assert "the login of the AWS profile 'team' is over" in error.message
    assert error.hint == "Run: aws sso login --profile team"
    assert "CANARY" not in str(error)


def test_login_of_an_sso_session_says_how_to_log_in(config: Path, tmp_path: Path) -> None:
    session = f"[sso-session company]\nsso_start_url = {START_URL}\nsso_region = us-east-1\n"
    config.write_text(f"[profile team]{SSO_SESSION}{session}")
    assert error_of(tmp_path).hint == "Run: aws sso login --profile team"


def test_profile_that_does_not_exist_is_named(config: Path, tmp_path: Path) -> None:
    config.write_text("[default]\nregion = us-east-1\n")
    error = error_of(tmp_path)
    assert "the AWS profile 'team' does not exist" in error.message
    assert "AWS_PROFILE" in error.hint


def test_command_of_a_profile_that_fails_is_named(config: Path, tmp_path: Path) -> None:
    config.write_text("[profile team]\ncredential_process = false\n")
    error = error_of(tmp_path)
    assert "the AWS profile 'team' gives no credentials (custom-process)" in error.message
    assert error.hint == "Check it with: aws sts get-caller-identity --profile team"


class TokenService(BaseHTTPRequestHandler):
    """Answers as AWS's token service does when it refuses a role."""

    code = ""

    def do_POST(self) -> None:
        body = (
            f"<ErrorResponse><Error><Code>{self.code}</Code><Message>no</Message></Error></ErrorResponse>".encode()
        )
        answer(self, 403, body)


@pytest.fixture
def token_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TokenService]]:
    """The service on loopback, whose address boto3 finds in the environment."""

    class Service(TokenService):
        pass

    with serving(Service) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        yield Service


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        ("ExpiredToken", "the session of AWS is over (ExpiredToken, AssumeRole)", "aws sso login --profile team"),
        ("AccessDenied", "the AWS profile 'team' cannot assume its role: AccessDenied", "sts:AssumeRole"),
    ],
)
def test_role_that_is_refused_says_what_to_do(
    config: Path, tmp_path: Path, token_service: type[TokenService], code: str, message: str, hint: str
) -> None:
    token_service.code = code
    config.write_text(
        f"[profile team]{ROLE}[profile base]\naws_access_key_id = k\naws_secret_access_key = CANARY\n"
    )
    error = error_of(tmp_path)
    assert message in error.message
    assert hint in error.hint
    assert "CANARY" not in str(error)
