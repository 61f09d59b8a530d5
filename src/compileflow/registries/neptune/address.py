"""The content of a neptune:// URI and of an API token: project, version, server and secrets."""

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
        SpecError: The URI has another form.
    """
    match = _PROJECT.fullmatch(uri)
    if match is None:
        raise SpecError(
            f"Expected the URI of a Neptune project, got {uri!r}.", hint="Write it as neptune://workspace/project."
        )
    return match[1]


def parse_version(uri: str) -> tuple[str, str]:
    """Return "workspace/project" and the model version's id of neptune://workspace/project/PRJ-KEY-3.

    Raises:
        SpecError: The URI has another form.
    """
    match = _VERSION.fullmatch(uri)
    if match is None:
        raise SpecError(
            f"Expected the URI of a model version in Neptune, got {uri!r}.",
            hint="Write it as neptune://workspace/project/KEY-3, with the id that Neptune shows.",
        )
    return match[1], match[2]


@dataclass(frozen=True, repr=False)
class Token:
    """An API token.

    Attributes:
        value: The token itself.
        address: URL of its server, without user or password.
        secrets: Texts that must not appear in a log or an error, the longest first.
        allow_http: Whether the client may use plain http.
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
    """Read the configured token. No request is sent.

    Raises:
        CompileflowError: An error of the class `refused`: the token is missing or not a Neptune token, or its
            server would be reached over plain http across a network.
    """
    if settings.neptune_api_token is None:
        raise refused(
            "Neptune needs an API token, and NEPTUNE_API_TOKEN is not set.",
            hint="Set NEPTUNE_API_TOKEN to a token from your Neptune server.",
        )
    value = settings.neptune_api_token.get_secret_value().strip()
    try:
        content = json.loads(base64.b64decode(value, validate=True))
        addresses = [content["api_address"], *filter(None, [content.get("api_url")])]
        hosts = [urlsplit(address if "://" in address else f"https://{address}") for address in addresses]
        names = [host.hostname or "" for host in hosts]
        public_host = hosts[-1]
        port = f":{public_host.port}" if public_host.port else ""
    except (binascii.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(
            f"NEPTUNE_API_TOKEN does not hold a Neptune token ({type(error).__name__}).",
            hint="Copy the complete token from the Neptune server.",
        ) from error
    secrets = (value, *filter(None, [str(content.get("api_key") or ""), *(host.password for host in hosts)]))
    http_names = [name for name, host in zip(names, hosts, strict=True) if host.scheme == "http"]
    remote_names = [name for name in http_names if not _is_loopback(name)]
    is_allowed = os.environ.get(INSECURE) == "1"
    if remote_names and not is_allowed:
        raise refused(
            f"The token's server, {remote_names[0]}, uses plain http, which exposes the token to the network.",
            hint=f"Use https, or set {INSECURE}=1 if you trust that network.",
        )
    address = f"{public_host.scheme}://{public_host.hostname}{port}"
    return Token(value, address, secrets, allow_http=bool(http_names) or is_allowed)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
