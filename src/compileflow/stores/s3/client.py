"""The boto3 client as configured, and the arguments that every written object gets."""

from __future__ import annotations

from functools import partial
from typing import Any
from urllib.parse import urlencode, urlsplit

from pydantic import SecretStr

from compileflow.errors import StoreError
from compileflow.settings import Settings
from compileflow.stores.s3.errors import login_error
from compileflow.stores.s3.replies import replace_foreign_reply

# Longer than a slow connection needs for a block, shorter than a person waits for a dead server.
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_ATTEMPTS = 4


def make_client(settings: Settings, *, bucket: str | None = None) -> Any:
    """Return a boto3 client, which several threads may share. Sends no request.

    Args:
        settings: Settings that name the server and the credentials.
        bucket: Bucket that all requests name, and so must the replies. None: there are several.

    Raises:
        StoreError: boto3 is not installed, or it rejects the configuration.
    """
    _check_endpoint(settings.s3_endpoint_url)
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.handlers import add_expect_header
    except ImportError as error:
        raise StoreError(
            "A store on S3 needs boto3, which is not installed.", hint="Run: pip install 'compileflow[s3]'"
        ) from error
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        max_pool_connections=settings.s3_files_at_once + 4,
        # Every PUT and every part carries our SHA-256 in a signed header, and every read is checked against it.
        # Checksums by boto3 and a signature over the body would hash the same bytes again.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": settings.s3_addressing, "payload_signing_enabled": False},
    )
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=_plain(settings.s3_access_key_id),
            aws_secret_access_key=_plain(settings.s3_secret_access_key),
            aws_session_token=_plain(settings.s3_session_token),
            config=config,
        )
        # With "Expect: 100-continue", boto3 spends a round trip on asking whether the server wants the body. The
        # store has already checked that.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        client.meta.events.register_first("needs-retry.s3.HeadBucket", _follow_no_redirect)
        client.meta.events.register(
            "before-parse.s3", partial(replace_foreign_reply, bucket=bucket, server=endpoint(settings))
        )
        return client
    except (BotoCoreError, ValueError) as error:
        raise login_error(error, f"Cannot use {endpoint(settings)}") or StoreError(
            f"boto3 rejects the configuration for {endpoint(settings)}: {type(error).__name__}.",
            hint="Check the COMPILEFLOW_S3_* settings and the AWS configuration files.",
        ) from error


def _follow_no_redirect(request_dict: dict[str, Any], **_: Any) -> None:
    # boto3 sends HeadBucket to find the region of a redirected bucket. If that is redirected as well, it would
    # send HeadBucket again, without end.
    request_dict["context"]["s3_redirect"]["redirected"] = True


def _check_endpoint(url: str | None) -> None:
    # boto3 accepts some invalid URLs and fails later with an unclear message.
    try:
        parts = urlsplit(url or "https://aws")
        # boto3 sends neither user nor query string, and its errors show both.
        is_valid = (
            "@" not in parts.netloc
            and not parts.query
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port or 1) > 0
        )
    except ValueError:
        is_valid = False
    if not is_valid:
        # The message does not show the URL, which may contain a password.
        raise StoreError(
            "COMPILEFLOW_S3_ENDPOINT_URL is not the URL of a server.",
            hint="Write it as https://host or http://host:port, without user, password or query.",
        )


def object_arguments(settings: Settings, *, blob: bool) -> dict[str, str]:
    """Return the arguments of a write: encryption, tags, and for a blob the storage class."""
    arguments: dict[str, str] = {}
    if settings.s3_kms_key_id:
        arguments |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.s3_kms_key_id}
    if settings.s3_tags:
        arguments["Tagging"] = urlencode(settings.s3_tags)
    if blob and settings.s3_storage_class:
        arguments["StorageClass"] = settings.s3_storage_class
    return arguments


def endpoint(settings: Settings) -> str:
    """Return the server's address for an error, without the other parts of the URL, which may be secret."""
    parts = urlsplit(settings.s3_endpoint_url or "")
    return (
        f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        if parts.hostname
        else "AWS"
    )


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None
