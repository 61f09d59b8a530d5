"""Tokens: the API token of a client, and the short-lived session tokens that the client exchanges it for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path

from deployments.neptune_server.errors import ApiError

_ACCESS_S = 3600
_REFRESH_S = 30 * 86_400


def make_api_token(url: str, api_key: str) -> str:
    """Return the value of NEPTUNE_API_TOKEN: base64 of JSON with the server's address and the key."""
    fields = {"api_address": url, "api_url": url, "api_key": api_key}
    return base64.b64encode(json.dumps(fields).encode()).decode()


def read_api_token(token: str) -> dict[str, str]:
    """Return the fields of a token, or no fields if it is not such a token."""
    try:
        fields = json.loads(base64.b64decode(token.strip(), validate=True))
    except (ValueError, RecursionError, binascii.Error):
        return {}
    return {str(name): str(value) for name, value in fields.items()} if isinstance(fields, dict) else {}


def write_api_token(path: Path, url: str, *, api_key: str | None) -> tuple[str, bool]:
    """Write the token for `url` to a file that only its owner can read.

    Args:
        path: The token file.
        url: Address by which clients reach the server.
        api_key: Key of the token. If None, the key in the file is used, or a new key if the file does not exist.

    Returns:
        The key, and whether the key is new.
    """
    stored_key = read_api_token(path.read_text("ascii")).get("api_key") if path.exists() else None
    key = api_key or stored_key or secrets.token_urlsafe(32)
    # The mode of an existing file would stay as it is, so write another file and move it into place.
    new_path = path.with_suffix(".new")
    new_path.unlink(missing_ok=True)
    with os.fdopen(os.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(make_api_token(url, key) + "\n")
        os.fsync(file.fileno())
    new_path.replace(path)
    return key, not api_key and not stored_key


class Tokens:
    """Creates and checks tokens. It stores only the SHA-256 of the API key.

    Args:
        api_key: Key that the API token must contain.
        secret: Key that signs session tokens. With the same secret, sessions survive a restart of the server.
    """

    def __init__(self, api_key: str, *, secret: bytes):
        self._key_digest = hashlib.sha256(api_key.encode()).digest()
        # The signature depends on the API key, so a new key ends all sessions.
        self._secret = hmac.digest(secret, self._key_digest, "sha256")

    def check_api_token(self, token: str | None) -> str:
        """Return the address in an API token, by which the client reaches this server.

        Raises:
            ApiError: 401, the token is absent or belongs to another server.
        """
        fields = read_api_token(token or "")
        digest = hashlib.sha256(fields.get("api_key", "").encode()).digest()
        if not hmac.compare_digest(digest, self._key_digest):
            raise _unauthorized("The API token is absent or belongs to another server.")
        return (fields.get("api_url") or fields.get("api_address", "")).rstrip("/")

    def session(self, url: str) -> tuple[str, str]:
        """Return an access token and a refresh token (JWT) for a client that reaches this server at `url`."""
        return self._sign("access", url, _ACCESS_S), self._sign("refresh", url, _REFRESH_S)

    def check_access(self, authorization: str | None) -> str:
        """Return the address in the access token of an Authorization header.

        Raises:
            ApiError: 401, the token is absent, forged or expired.
        """
        return self._check("access", (authorization or "").removeprefix("Bearer "))

    def check_refresh(self, token: str) -> str:
        """Return the address in a refresh token.

        Raises:
            ApiError: 401, the token is forged or expired.
        """
        return self._check("refresh", token)

    def _sign(self, kind: str, url: str, lifetime_s: int) -> str:
        claims = {
            "iss": f"{url}/auth/realms/neptune",
            "azp": "neptune-cli",
            "exp": int(time.time()) + lifetime_s,
            "typ": kind,
            "url": url,
        }
        head = b".".join(_encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return (head + b"." + self._signature(head)).decode()

    def _check(self, kind: str, token: str) -> str:
        head, _, signature = token.encode().rpartition(b".")
        if not hmac.compare_digest(signature, self._signature(head)):
            raise _unauthorized("The session token is absent or belongs to another server.")
        claims = json.loads(_decode(head.partition(b".")[2]))
        if claims["typ"] != kind or claims["exp"] < time.time():
            raise _unauthorized("The session has expired.")
        return str(claims["url"])

    def _signature(self, head: bytes) -> bytes:
        return _encode(hmac.digest(self._secret, head, "sha256"))


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _decode(data: bytes) -> bytes:
    return base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))


def _unauthorized(detail: str) -> ApiError:
    return ApiError(
        401, "Unauthorized", detail=f"{detail} Set NEPTUNE_API_TOKEN to the content of this server's token file."
    )
