"""The S3 client as configured, and its errors in our words: one line, and never a header, a query or a secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from pydantic import SecretStr

from compileflow.errors import CompileflowError, StoreError, StoreUnavailableError
from compileflow.settings import Settings

# Above what a slow link needs for a block, below what a person waits for a dead server.
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_ATTEMPTS = 4
_BUSY = {429, 500, 502, 503, 504}
_HINTS = {
    "NoSuchBucket": "Make the bucket, or correct the URI of the store.",
    "AccessDenied": "Give this user s3:GetObject, PutObject, DeleteObject and ListBucket there, and the KMS key.",
    "InvalidAccessKeyId": "Check COMPILEFLOW_S3_ACCESS_KEY_ID, or the profile or role that AWS's own chain finds.",
    "SignatureDoesNotMatch": "Check COMPILEFLOW_S3_SECRET_ACCESS_KEY, or the profile that AWS's own chain finds.",
    "ExpiredToken": "Log in again; the session token is over.",
    "InvalidToken": "Check COMPILEFLOW_S3_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "BadDigest": "Something between here and the server alters what is sent; look at proxies and memory.",
    "AuthorizationHeaderMalformed": "Set COMPILEFLOW_S3_REGION to the bucket's region.",
    "PermanentRedirect": "Set COMPILEFLOW_S3_REGION to the bucket's region.",
    "InvalidStorageClass": "Correct COMPILEFLOW_S3_STORAGE_CLASS.",
    "NotImplemented": "This server lacks something that the store needs; conditional PUTs are one such thing.",
}
# A HEAD has no body to say more than its status.
_STATUS_CODES = {"301": "PermanentRedirect", "400": "BadRequest", "403": "AccessDenied"}


def make_client(settings: Settings) -> Any:
    """Return a boto3 client, which several threads may share. Nothing is asked of the server.

    Raises:
        StoreError: boto3 is missing, or the configuration is none that it takes.
    """
    _check_endpoint(settings.s3_endpoint_url)
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.handlers import add_expect_header
    except ImportError as error:
        raise StoreError(
            "Stores on S3 need boto3, which is not installed.", hint="pip install 'compileflow[s3]'"
        ) from error
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        max_pool_connections=settings.s3_files_at_once + 4,
        # Every PUT and every part carries our SHA-256 already, and every read is checked against it. That header
        # is signed, so signing the body would be hashing it a second time.
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
        # boto3 asks beforehand whether a body would be taken: a round trip more, and the store looks anyway.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client
    except (BotoCoreError, ValueError) as error:
        raise StoreError(
            f"{endpoint(settings)} cannot be opened as configured: {type(error).__name__}.",
            hint="Check the COMPILEFLOW_S3_* settings and AWS's own configuration.",
        ) from error


def _check_endpoint(url: str | None) -> None:
    # boto3 takes some of these, and fails later with the name of a rule set.
    try:
        parts = urlsplit(url or "https://aws")
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        right = False
    if not right:
        # Not repeated, as it may hold a password.
        raise StoreError(
            "COMPILEFLOW_S3_ENDPOINT_URL is no server's URL.", hint="Write it as https://host or http://host:port."
        )


def object_arguments(settings: Settings, *, blob: bool) -> dict[str, str]:
    """Return what every object that is written gets: encryption and tags, and blobs their storage class."""
    arguments: dict[str, str] = {}
    if settings.s3_kms_key_id:
        arguments |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.s3_kms_key_id}
    if settings.s3_tags:
        arguments["Tagging"] = urlencode(settings.s3_tags)
    if blob and settings.s3_storage_class:
        arguments["StorageClass"] = settings.s3_storage_class
    return arguments


def endpoint(settings: Settings) -> str:
    """Return the server's name for an error; without what else a URL may hold."""
    parts = urlsplit(settings.s3_endpoint_url or "")
    return (
        f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        if parts.hostname
        else "AWS"
    )


@contextmanager
def s3_errors(where: str, doing: str) -> Iterator[None]:
    """Turn what boto3 raises into one line that says what to do.

    Args:
        where: The store's URI.
        doing: What was tried, for example "write to".

    Raises:
        StoreUnavailableError: no answer, or the server is busy or broken, also after boto3's own retries.
        StoreError: anything that trying again does not change.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    try:
        yield
    except CompileflowError:
        raise
    except boto.ClientError as error:
        raise _refused(error, where, doing) from error
    except boto.SSLError as error:
        raise StoreError(
            f"Cannot {doing} {where}: its certificate was not accepted.",
            hint="Set AWS_CA_BUNDLE to the authority that signed it, or correct the endpoint.",
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError) as error:
        # Not the error's own text, which holds the whole URL.
        raise StoreUnavailableError(
            f"Cannot {doing} {where}: {type(error).__name__}.",
            hint="Check the network and COMPILEFLOW_S3_ENDPOINT_URL, or try again later.",
        ) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise StoreError(
            f"Cannot {doing} {where}: there are no complete credentials.",
            hint="Set COMPILEFLOW_S3_ACCESS_KEY_ID and _SECRET_ACCESS_KEY, or log in with AWS's own tools.",
        ) from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise StoreError(
            f"Cannot {doing} {where}: {type(error).__name__}.", hint="Check the COMPILEFLOW_S3_* settings."
        ) from error


def code_of(error: Any) -> str:
    """Return the code of a ClientError, for example NoSuchKey; what the status means where a HEAD gave no more."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return _STATUS_CODES.get(code, code)


def status_of(error: Any) -> int:
    """Return the HTTP status of a ClientError; 0 when there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refused(error: Any, where: str, doing: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    # The server's own message may quote what it was sent.
    text = f"Cannot {doing} {where}: {code or 'no code'} (HTTP {status}, {error.operation_name})."
    if status in _BUSY or code in ("SlowDown", "RequestTimeout", "InternalError"):
        return StoreUnavailableError(text, hint="The server is busy or out of order; try again later.")
    return StoreError(text, hint=_HINTS.get(code, "Check the store's URI and the COMPILEFLOW_S3_* settings."))


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None
