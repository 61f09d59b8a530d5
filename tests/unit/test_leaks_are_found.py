"""The search for secrets after a test run finds them in every form."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.leaks import leaked, leaks_below

# The search at the end of the run does not include this secret.
SECRET = "only/this test knows+it"  # noqa: S105 - a made-up value


@pytest.mark.parametrize("beside", ["", "x", "xy", "xyz"])
def test_secret_is_found_as_it_is_in_a_url_and_in_base64(beside: str) -> None:
    token = base64.b64encode(json.dumps({"a": beside, "api_key": SECRET, "b": beside}).encode())
    for body in (SECRET.encode(), quote(SECRET, safe="").encode(), token):
        assert leaked(b"before " + body + b" after", [SECRET]) == ["only/this te..."]
    assert leaked(base64.b64encode(beside.encode() + b"only/this test knows nothing"), [SECRET]) == []


def test_every_file_is_searched_but_those_that_are_there_to_hold_it(tmp_path: Path) -> None:
    for name in ("logs/run.log", "server/token", "home/.env", "home/prefect.db"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" + SECRET.encode())
    names = {path.relative_to(tmp_path).as_posix() for path, _ in leaks_below(tmp_path, [SECRET])}
    assert names == {"logs/run.log", "home/prefect.db"}
