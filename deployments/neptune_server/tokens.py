"""Tokens: the API token that a client is given, and the short-lived session tokens that it exchanges it for."""

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
    """Return what goes into NEPTUNE_API_TOKEN: base64 of JSON with the server's address and the key."""
    fields = {"api_address": url, "api_url": url, "api_key": api_key}
    return base64.b64encode(json.dumps(fields).encode()).decode()


def read_api_token(token: str) -> dict[str, str]:
    """Return the token's fields; none when it is no such token."""
    try:
        fields = json.loads(base64.b64decode(token.strip(), validate=True))
    except (ValueError, binascii.Error):
        return {}
    return {str(name): str(value) for name, value in fields.items()} if isinstance(fields, dict) else {}


def keep_api_token(path: Path, url: str, *, api_key: str | None) -> tuple[str, bool]:
    """Put the token for `url` into its file, mode 0600.

    Args:
        path: The file.
        url: The server's address as clients reach it.
        api_key: Key to use; None: the one that the file has, else a new one.

    Returns:
        The key, and whether it was made just now.
    """
    kept = read_api_token(path.read_text("ascii")).get("api_key") if path.exists() else None
    key = api_key or kept or secrets.token_urlsafe(32)
    token = make_api_token(url, key)
    # A new file, never the old one opened: its mode would stay what it was.
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token + "\n")
        os.fsync(file.fileno())
    fresh.replace(path)
    return key, not api_key and not kept


class Tokens:
    """Checks tokens; of the API key it keeps the SHA-256 only.

    Args:
        api_key: The key that the API token must hold.
        secret: Signs session tokens. Kept over a restart, so that clients go on without noticing.
    """

    def __init__(self, api_key: str, *, secret: bytes):
        self._key_digest = hashlib.sha256(api_key.encode()).digest()
        # With another key, the sessions of the old one end.
        self._secret = hmac.digest(secret, self._key_digest, "sha256")

    def check_api_token(self, token: str | None) -> str:
        """Return the address by which the client reaches this server: the one in its token.

        Raises:
            ApiError: 401, the token is absent or not this server's.
        """
        fields = read_api_token(token or "")
        digest = hashlib.sha256(fields.get("api_key", "").encode()).digest()
        if not hmac.compare_digest(digest, self._key_digest):
            raise _unauthorized("The API token is not this server's.")
        return (fields.get("api_url") or fields.get("api_address", "")).rstrip("/")

    def session(self, url: str) -> tuple[str, str]:
        """Return an access token and a refresh token (JWT) for a client that reaches this server at `url`."""
        return self._sign("access", url, _ACCESS_S), self._sign("refresh", url, _REFRESH_S)

    def check_access(self, authorization: str | None) -> str:
        """Return the address in the access token of an Authorization header.

        Raises:
            ApiError: 401, the header is absent, forged or expired.
        """
        return self._check("access", (authorization or "").removeprefix("Bearer "))

    def check_refresh(self, token: str) -> str:
        """Return the address in a refresh token.

        Raises:
            ApiError: 401, it is forged or expired.
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
            raise _unauthorized("The session token is not this server's.")
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
    return ApiError(401, "Unauthorized", detail=f"{detail} Set NEPTUNE_API_TOKEN to the one in its token file.")
