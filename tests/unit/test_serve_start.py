"""`make serve`: what it refuses before it starts anything, and the file with its password."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compileflow.errors import ProcessError
from compileflow.settings import get_settings
from deployments.serve import _access, _database_password, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path))
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def sourced(path: Path) -> tuple[str, str]:
    """Return what a shell has in the two variables after it has sourced the file."""
    script = f'. {path}; printf "%s\\n%s" "$PREFECT_API_URL" "$PREFECT_API_AUTH_STRING"'
    done = subprocess.run(["sh", "-euc", script], env={}, capture_output=True, text=True, check=True)
    url, login = done.stdout.split("\n")
    return url, login


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "4200x", ""])
def test_wrong_port_is_refused_in_one_line(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"error: Expected a port from 1 to 65535, got {port!r}. For example: make serve PORT=4200\n"
    )


@pytest.mark.parametrize(
    ("variable", "uri", "part"),
    [
        ("COMPILEFLOW_STORE_URI", "foo://x", "Unknown artifact store 'foo'."),
        ("COMPILEFLOW_REGISTRY_URI", "foo://x", "Unknown model registry 'foo'."),
        ("COMPILEFLOW_REGISTRY_URI", "sqlite:////r.db,foo://x", "Unknown model registry 'foo'."),
    ],
)
def test_wrong_uri_of_a_store_or_registry_is_refused_in_one_line(
    variable: str,
    uri: str,
    part: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv(variable, uri)
    get_settings.cache_clear()
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {part}")
    assert error.count("\n") == 1
    assert not (home / "serve").exists()


def test_first_start_makes_a_password_and_the_next_one_reads_it(tmp_path: Path) -> None:
    first, second = _access(tmp_path, 4200), _access(tmp_path, 4300)
    assert (first.is_new, second.is_new) == (True, False)
    assert first.password == second.password
    assert sourced(tmp_path / "client.env") == ("http://127.0.0.1:4300/api", f"admin:{first.password}")
    assert stat.S_IMODE((tmp_path / "client.env").stat().st_mode) == 0o600


@pytest.mark.parametrize("password", ["two words", "a'b", 'a"b', "$HOME", "a#b", "`id`", "a\\b", "a=b:c", "ä"])
def test_any_password_reaches_a_shell_that_sources_the_file(password: str, tmp_path: Path) -> None:
    path = tmp_path / "client.env"
    text = password.replace("'", "'\\''")
    path.write_text(f"export PREFECT_API_AUTH_STRING='admin:{text}'\n", "utf-8")
    assert _access(tmp_path, 4200).password == password
    assert sourced(path)[1] == f"admin:{password}"
    assert _access(tmp_path, 4200).password == password


@pytest.mark.parametrize(
    "text",
    [
        "garbage\n",
        "",
        "export PREFECT_API_URL=http://127.0.0.1:4200/api\n",
        "export PREFECT_API_AUTH_STRING=admin:\n",
        "export PREFECT_API_AUTH_STRING=root:secret\n",
        "export PREFECT_API_AUTH_STRING=admin:two words\n",
        "export PREFECT_API_AUTH_STRING='admin:secret\n",
        "\x00\xff",
    ],
)
def test_file_that_is_not_understood_is_refused_and_stays(text: str, tmp_path: Path) -> None:
    path = tmp_path / "client.env"
    path.write_bytes(os.fsencode(text) if text.isascii() else text.encode("latin-1"))
    before = path.read_bytes()
    with pytest.raises(ProcessError, match=r"client\.env cannot be read: expected a line .*or delete it, and the"):
        _access(tmp_path, 4200)
    assert path.read_bytes() == before


def test_database_keeps_its_password_when_the_server_gets_a_new_one(tmp_path: Path) -> None:
    first = _access(tmp_path, 4200)
    assert _database_password(tmp_path, first.password) == first.password
    (tmp_path / "client.env").unlink()
    second = _access(tmp_path, 4200)
    assert second.password != first.password
    assert _database_password(tmp_path, second.password) == first.password


def test_disk_without_room_is_refused_in_one_line(tmp_path: Path) -> None:
    # Files of at most 100 blocks stand for a full disk.
    words = ["sh", "-c", f"ulimit -f 100; exec {sys.executable} -m deployments.serve"]
    environment = os.environ | {"COMPILEFLOW_HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout + done.stderr == (
        f"error: Cannot write to {tmp_path / 'serve'}: File too large (EFBIG). Check that folder.\n"
    )
