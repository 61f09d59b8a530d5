"""python -m deployments.deploy says in one line what is wrong with its files or its server."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.deploy import main

NOTHING_LISTENS = "http://127.0.0.1:1/api"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deployments:", "has no list of deployments with fields"),
        ("deployments: hello", "has no list of deployments with fields"),
        ("deployments: [a, b]", "has no list of deployments with fields"),
        ("other: []", "has no list of deployments: 'deployments'"),
        ("deployments: [{name: a, entrypoint: b}]", "is wrong: 0.work_pool: "),
        ("deployments: [{name: a, entrypoint: b, work_pool: {}}]", "is wrong: 0.work_pool.name: "),
        ("deployments: [{name: Überblick}]", "has no list of deployments: "),
    ],
)
def test_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_bytes(text.encode("latin-1"))
    with temporary_settings({PREFECT_API_URL: NOTHING_LISTENS}):
        assert main(["--prefect-file", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [(None, "PREFECT_API_URL is not set. Set it to "), (NOTHING_LISTENS, "The Prefect server does not answer: ")],
)
def test_server_that_cannot_be_used_is_one_line(
    capsys: pytest.CaptureFixture[str], url: str | None, message: str
) -> None:
    with temporary_settings({PREFECT_API_URL: url}):
        assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert ". Check PREFECT" in error or url is None
