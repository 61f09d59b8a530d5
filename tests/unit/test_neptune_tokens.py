"""Tokens of the Neptune-compatible server: their server, their lifetime and their file."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest

from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.tokens import Tokens, make_api_token, read_api_token, write_api_token

URL = "http://127.0.0.1:8765"
SECRET = b"s" * 32


def test_session_survives_a_restart_of_the_server_but_not_a_new_key() -> None:
    access, refresh = Tokens("key", secret=SECRET).session(URL)
    restarted = Tokens("key", secret=SECRET)
    assert restarted.check_access(f"Bearer {access}") == URL
    assert restarted.check_refresh(refresh) == URL
    for other in (Tokens("other", secret=SECRET), Tokens("key", secret=b"t" * 32)):
        with pytest.raises(ApiError, match="Unauthorized"):
            other.check_access(f"Bearer {access}")


def test_session_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens("key", secret=SECRET)
    access, refresh = tokens.session(URL)
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(ApiError) as caught:
        tokens.check_access(f"Bearer {access}")
    assert "expired" in caught.value.detail
    # The refresh token, with which the client gets new tokens, is still valid.
    assert tokens.check_refresh(refresh) == URL


@pytest.mark.parametrize("kind", ["access", "refresh"])
def test_access_and_refresh_tokens_are_not_interchangeable(kind: str) -> None:
    tokens = Tokens("key", secret=SECRET)
    access, refresh = tokens.session(URL)
    with pytest.raises(ApiError, match="Unauthorized"):
        tokens.check_access(f"Bearer {refresh}") if kind == "access" else tokens.check_refresh(access)


@pytest.mark.parametrize(
    "token",
    [
        None,
        "",
        "x",
        "ANONYMOUS",
        "ä",
        base64.b64encode(b"not JSON").decode(),
        base64.b64encode(b"[1]").decode(),
        base64.b64encode(b"{}").decode(),
        make_api_token(URL, ""),
        make_api_token(URL, "kez"),
    ],
)
def test_token_of_another_server_is_refused(token: str | None) -> None:
    tokens = Tokens("key", secret=SECRET)
    with pytest.raises(ApiError) as caught:
        tokens.check_api_token(token)
    assert caught.value.status == 401
    assert "NEPTUNE_API_TOKEN" in caught.value.detail
    for session in (token, f"Bearer {token}", f"Bearer .{token}.", "Bearer a.b.c"):
        with pytest.raises(ApiError, match="Unauthorized"):
            tokens.check_access(session)


def test_token_file_keeps_its_key_for_a_new_address_until_another_key_is_set(tmp_path: Path) -> None:
    path = tmp_path / "token"
    key, is_new = write_api_token(path, URL, api_key=None)
    assert is_new
    path.chmod(0o644)
    assert write_api_token(path, "https://elsewhere", api_key=None) == (key, False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_api_token(path.read_text())["api_address"] == "https://elsewhere"
    assert write_api_token(path, URL, api_key="chosen") == ("chosen", False)
    assert read_api_token(path.read_text())["api_key"] == "chosen"
    assert [file.name for file in tmp_path.iterdir()] == ["token"]
