"""Errors of boto3 as errors of the store: one line that says what to do, without headers, queries or secrets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compileflow.errors import CompileflowError, StoreError, StoreUnavailableError
from compileflow.stores.s3.replies import NOT_S3

BUSY_STATUSES = {429, 500, 502, 503, 504}
_HINTS = {
    "NoSuchBucket": "Create the bucket, or correct the URI of the store.",
    "AccessDenied": "Allow this user s3:GetObject, PutObject, DeleteObject and ListBucket, and the KMS key.",
    "InvalidAccessKeyId": "Check COMPILEFLOW_S3_ACCESS_KEY_ID, or the AWS profile or role.",
    "SignatureDoesNotMatch": "Check COMPILEFLOW_S3_SECRET_ACCESS_KEY, or the AWS profile.",
    "InvalidToken": "Check COMPILEFLOW_S3_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "Correct the clock of this machine.",
    "BadDigest": "The data changes on its way to the server. Check proxies and memory.",
    "AuthorizationHeaderMalformed": "Set COMPILEFLOW_S3_REGION to the bucket's region.",
    "PermanentRedirect": "Set COMPILEFLOW_S3_REGION to the bucket's region.",
    "TemporaryRedirect": "Set COMPILEFLOW_S3_REGION to the bucket's region.",
    "InvalidStorageClass": "Correct COMPILEFLOW_S3_STORAGE_CLASS.",
    "NotImplemented": "This server lacks a feature that the store needs, for example conditional PUT.",
}
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
# The status of a reply without a body, for example to a HEAD, is all that it says.
_STATUS_CODES = {
    "301": "PermanentRedirect",
    "302": "TemporaryRedirect",
    "307": "TemporaryRedirect",
    "308": "PermanentRedirect",
    "400": "BadRequest",
    "403": "AccessDenied",
}


@contextmanager
def s3_errors(store_uri: str, action: str) -> Iterator[None]:
    """Turn an error that boto3 raises in the block into one line that says what to do.

    Args:
        store_uri: URI of the store.
        action: Action that the block tries, for example "write to".

    Raises:
        StoreUnavailableError: The server did not answer, or it is busy or broken even after boto3's retries.
        StoreError: Trying again does not help.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    try:
        yield
    except CompileflowError:
        raise
    except boto.ClientError as error:
        raise _refused(error, store_uri, action) from error
    except boto.SSLError as error:
        raise StoreError(
            f"Cannot {action} {store_uri}: the server's certificate is not trusted.",
            hint="Set AWS_CA_BUNDLE to the certificate of the signing authority, or correct the endpoint.",
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HTTPError) as error:
        # The text of the error contains the whole URL, so only its class is shown.
        raise StoreUnavailableError(
            f"Cannot {action} {store_uri}: {type(error).__name__}.",
            hint="Check the network and COMPILEFLOW_S3_ENDPOINT_URL, or try again later.",
        ) from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise login_error(error, f"Cannot {action} {store_uri}") or StoreError(
            f"Cannot {action} {store_uri}: {type(error).__name__}.", hint="Check the COMPILEFLOW_S3_* settings."
        ) from error


def login_error(error: Exception, text: str) -> StoreError | None:
    """Return the error of credentials that are missing or over; it names the profile of AWS. None: another error.

    Args:
        error: Error of boto3.
        text: What cannot be done.
    """
    from botocore import exceptions as boto

    profile = _profile()
    if isinstance(error, boto.ProfileNotFound):
        return StoreError(
            f"{text}: the AWS profile {profile!r} does not exist.",
            hint=f"Correct AWS_PROFILE, or run: aws configure sso --profile {profile}",
        )
    if isinstance(error, boto.SSOError | boto.TokenRetrievalError | boto.LoginError):
        command = "aws login" if isinstance(error, boto.LoginError) else "aws sso login"
        return StoreError(
            f"{text}: the login of the AWS profile {profile!r} is over.",
            hint=f"Run: {command} --profile {profile}",
        )
    if isinstance(error, boto.RefreshWithMFAUnsupportedError):
        return StoreError(
            f"{text}: the session of the AWS profile {profile!r} is over, and a new one needs an MFA code.",
            hint="Run: aws sts get-session-token --serial-number DEVICE --token-code CODE, and set its answer.",
        )
    if isinstance(error, boto.CredentialRetrievalError):
        return StoreError(
            f"{text}: the AWS profile {profile!r} gives no credentials ({error.kwargs['provider']}).",
            hint=f"Check it with: aws sts get-caller-identity --profile {profile}",
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StoreError(
            f"{text}: the credentials are missing or incomplete.",
            hint="Set COMPILEFLOW_S3_ACCESS_KEY_ID and COMPILEFLOW_S3_SECRET_ACCESS_KEY, or log in to AWS.",
        )
    return None


def _profile() -> str:
    from botocore.session import Session

    return Session().get_config_variable("profile") or "default"


def code_of(error: Any) -> str:
    """Return the code of a ClientError, for example NoSuchKey; after a HEAD, the meaning of the status."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return _STATUS_CODES.get(code, code)


def status_of(error: Any) -> int:
    """Return the HTTP status of a ClientError; 0 without one."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refused(error: Any, store_uri: str, action: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    # The server's message may quote the request, which contains secrets.
    text = f"Cannot {action} {store_uri}: {code or 'no code'} (HTTP {status}, {error.operation_name})."
    if code == NOT_S3:
        return StoreUnavailableError(
            f"Cannot {action} {store_uri}: the server at {error.response['Error']['Message']} does not answer "
            f"like S3 ({error.operation_name}).",
            hint="Check COMPILEFLOW_S3_ENDPOINT_URL and the proxy between here and there, or try again later.",
        )
    if status in BUSY_STATUSES or code in ("SlowDown", "RequestTimeout", "InternalError"):
        return StoreUnavailableError(text, hint="The server is busy or failing. Try again later.")
    if error.operation_name.startswith("AssumeRole") and code not in _EXPIRED:
        return StoreError(
            f"Cannot {action} {store_uri}: the AWS profile {_profile()!r} cannot assume its role: {code}.",
            hint="Allow it sts:AssumeRole on that role, or choose another profile with AWS_PROFILE.",
        )
    if code in _EXPIRED:
        return StoreError(
            f"Cannot {action} {store_uri}: the session of AWS is over ({code}, {error.operation_name}).",
            hint=f"Run: aws sso login --profile {_profile()}, or set a new session token where you set one.",
        )
    return StoreError(text, hint=_HINTS.get(code, "Check the store's URI and the COMPILEFLOW_S3_* settings."))
