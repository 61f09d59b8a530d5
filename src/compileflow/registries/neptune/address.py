"""What a neptune:// URI and an API token say: project, version, server, and what must never be shown."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from compileflow.errors import CompileflowError, SpecError
from compileflow.settings import Settings

_PROJECT = re.compile(r"neptune://([^/\s]+/[^/\s]+)/?")
_VERSION = re.compile(r"neptune://([^/\s]+/[^/\s]+)/([A-Za-z0-9_-]+)/?")
INSECURE = "OAUTHLIB_INSECURE_TRANSPORT"


def parse_project(uri: str) -> str:
    """Return "workspace/project" of neptune://workspace/project.

    Raises:
        SpecError: it is written otherwise.
    """
    match = _PROJECT.fullmatch(uri)
    if match is None:
        raise SpecError(f"{uri!r} is no Neptune project.", hint="Write it as neptune://workspace/project.")
    return match[1]


def parse_version(uri: str) -> tuple[str, str]:
    """Return "workspace/project" and the model version's id of neptune://workspace/project/PRJ-KEY-3.

    Raises:
        SpecError: it is written otherwise.
    """
    match = _VERSION.fullmatch(uri)
    if match is None:
        raise SpecError(
            f"{uri!r} is no model version in Neptune.",
            hint="Write it as neptune://workspace/project/KEY-3, with the id that Neptune shows.",
        )
    return match[1], match[2]


@dataclass(frozen=True, repr=False)
class Token:
    """An API token.

    Attributes:
        value: The token itself.
        address: URL of its server, without user or password.
        secrets: Texts that no log or error may hold, the longest first.
        allow_http: Whether the client is to be told that plain http is meant.
    """

    value: str
    address: str
    secrets: tuple[str, ...]
    allow_http: bool

    def scrub(self, text: str) -> str:
        """Replace every secret in a text."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def read_token(settings: Settings, *, refused: type[CompileflowError]) -> Token:
    """Read the configured token. Nothing is asked of its server.

    Raises:
        CompileflowError: of the class `refused`: there is no token, it is none of Neptune's, or its server is
            reached over plain http across a network.
    """
    if settings.neptune_api_token is None:
        raise refused(
            "Neptune was asked for and there is no API token.",
            hint="Set NEPTUNE_API_TOKEN to a token of your Neptune server.",
        )
    value = settings.neptune_api_token.get_secret_value().strip()
    try:
        content = json.loads(base64.b64decode(value, validate=True))
        addresses = [content["api_address"], *filter(None, [content.get("api_url")])]
        hosts = [urlsplit(address if "://" in address else f"https://{address}") for address in addresses]
        names = [host.hostname or "" for host in hosts]
        shown = hosts[-1]
        port = f":{shown.port}" if shown.port else ""
    except (binascii.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(
            f"NEPTUNE_API_TOKEN holds no Neptune token ({type(error).__name__}).",
            hint="Copy the whole token, as the Neptune server gave it.",
        ) from error
    secrets = (value, *filter(None, [str(content.get("api_key") or ""), *(host.password for host in hosts)]))
    plain = [name for name, host in zip(names, hosts, strict=True) if host.scheme == "http"]
    asked = os.environ.get(INSECURE) == "1"
    far = [name for name in plain if not _is_loopback(name)]
    if far and not asked:
        raise refused(
            f"The token's server, {far[0]}, is reached over plain http, which shows the token to the network.",
            hint=f"Use https, or set {INSECURE}=1 where that network is trusted.",
        )
    return Token(value, f"{shown.scheme}://{shown.hostname}{port}", secrets, bool(plain) or asked)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
