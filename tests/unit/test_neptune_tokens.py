"""Tokens of the Neptune-compatible server: whose they are, how long they hold, where they are kept."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest

from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.tokens import Tokens, keep_api_token, make_api_token, read_api_token

URL = "http://127.0.0.1:8765"
SECRET = b"s" * 32


def test_session_outlives_the_server_but_not_the_key() -> None:
    access, refresh = Tokens("key", secret=SECRET).session(URL)
    again = Tokens("key", secret=SECRET)
    assert again.check_access(f"Bearer {access}") == URL
    assert again.check_refresh(refresh) == URL
    for other in (Tokens("other", secret=SECRET), Tokens("key", secret=b"t" * 32)):
        with pytest.raises(ApiError, match="Unauthorized"):
            other.check_access(f"Bearer {access}")


def test_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens("key", secret=SECRET)
    access, refresh = tokens.session(URL)
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(ApiError) as caught:
        tokens.check_access(f"Bearer {access}")
    assert "expired" in caught.value.detail
    # With the other one the client gets new ones.
    assert tokens.check_refresh(refresh) == URL


@pytest.mark.parametrize("kind", ["access", "refresh"])
def test_one_kind_of_token_is_no_other(kind: str) -> None:
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
        base64.b64encode(b"no JSON").decode(),
        base64.b64encode(b"[1]").decode(),
        base64.b64encode(b"{}").decode(),
        make_api_token(URL, ""),
        make_api_token(URL, "kez"),
    ],
)
def test_what_is_no_token_of_this_server_is_refused(token: str | None) -> None:
    tokens = Tokens("key", secret=SECRET)
    with pytest.raises(ApiError) as caught:
        tokens.check_api_token(token)
    assert caught.value.status == 401
    assert "NEPTUNE_API_TOKEN" in caught.value.detail
    for session in (token, f"Bearer {token}", f"Bearer .{token}.", "Bearer a.b.c"):
        with pytest.raises(ApiError, match="Unauthorized"):
            tokens.check_access(session)


def test_token_file_keeps_its_key_at_another_address_and_takes_a_given_one(tmp_path: Path) -> None:
    path = tmp_path / "token"
    key, made = keep_api_token(path, URL, api_key=None)
    assert made
    path.chmod(0o644)
    assert keep_api_token(path, "https://elsewhere", api_key=None) == (key, False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_api_token(path.read_text())["api_address"] == "https://elsewhere"
    assert keep_api_token(path, URL, api_key="own") == ("own", False)
    assert read_api_token(path.read_text())["api_key"] == "own"
    assert [file.name for file in tmp_path.iterdir()] == ["token"]
