"""The example that pulls promoted versions: its command after a pull, and each error in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_registry
from compileflow.errors import IntegrityError, ProcessError, StoreError
from compileflow.settings import get_settings
from tests.services.example_process import FOLDER
from tests.services.http_server import serving
from tests.unit.attested_artifacts import stored_entry

PROGRAM = FOLDER / "pull_promoted.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("pull_promoted", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose registry has version 1 of reviews in production."""
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    put_in_production(1)
    yield tmp_path
    get_settings.cache_clear()


def put_in_production(number: int) -> None:
    settings = get_settings()
    registry = open_registry(settings.resolved_registry_uri())
    registry.register(stored_entry(settings, "reviews", number=number))
    registry.set_stage("reviews", number, "production", who="ann")


def options(home: Path, then: str = "") -> Namespace:
    (home / "pulled").mkdir(exist_ok=True)
    return Namespace(
        name="reviews", folder=home / "pulled", stage="production", registry=None, then=then.split() or None
    )


def test_failed_command_is_one_error_and_the_next_start_runs_it_again(home: Path, example: Any) -> None:
    with pytest.raises(ProcessError, match=r"^The command false ended with exit code 1\. The next start of"):
        example.update(options(home, "false"))
    assert (home / "pulled" / "current" / "manifest.json").is_file()
    proof = home / "proof"
    example.update(options(home, f"touch {proof}"))
    assert proof.exists()


def test_version_that_changes_while_it_is_pulled_is_not_kept(
    home: Path, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_production(2)
    pull = example.pull_version
    monkeypatch.setattr(
        example, "pull_version", lambda _, *arguments, **options: pull("reviews@1", *arguments, **options)
    )
    with pytest.raises(IntegrityError, match=r"^reviews@2 got another artifact while it was being pulled\."):
        example.update(options(home))
    assert list((home / "pulled").iterdir()) == []


def test_command_runs_once_for_each_version(home: Path, example: Any) -> None:
    proof = home / "proof"
    once = f"mkdir {proof}"
    example.update(options(home, once))
    # A second call of mkdir would fail.
    example.update(options(home, once))
    proof.rmdir()
    put_in_production(2)
    example.update(options(home, once))
    assert proof.is_dir()
    assert (home / "pulled" / "current").resolve().name.startswith("version-2-")


def test_folder_that_cannot_be_written_is_one_error(home: Path, example: Any) -> None:
    ready = options(home)
    # Even root cannot replace a folder by a link.
    (ready.folder / "current").mkdir()
    with pytest.raises(StoreError, match=rf"^Cannot write to {ready.folder}: Is a directory"):
        example.update(ready)


def test_command_that_cannot_be_run_is_refused_before_the_start(example: Any) -> None:
    assert example.command("true 'a b'") == ["true", "a b"]
    for text in ("", "no-such-program now"):
        with pytest.raises(ArgumentTypeError, match="does not start with a program"):
            example.command(text)


def call(tmp_path: Path, url: str | None) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    variables |= {"PREFECT_HOME": str(tmp_path), "COMPILEFLOW_HOME": str(tmp_path)}
    variables |= {} if url is None else {"PREFECT_API_URL": url}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), "reviews", str(tmp_path / "pulled")],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def locked_server() -> Iterator[str]:
    """A server that refuses every login, as Prefect's does."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    with serving(Refusal) as url:
        yield f"{url}/api"


def test_without_a_server_the_program_says_what_to_set(tmp_path: Path) -> None:
    with call(tmp_path, None) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == (
        "error: PREFECT_API_URL is not set. Set it to the API of the Prefect server, for example "
        "http://127.0.0.1:4200/api.\n"
    )


def test_wrong_password_ends_the_program_in_one_line(tmp_path: Path) -> None:
    with locked_server() as url, call(tmp_path, url) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith(f"error: The Prefect server at {url} refuses the login. Set PREFECT_API_AUTH_STRING ")
    assert output.count("\n") == 1


def test_server_that_does_not_answer_is_tried_again(tmp_path: Path) -> None:
    # Nothing listens on port 1.
    with call(tmp_path, "http://127.0.0.1:1/api") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("The Prefect server at http://127.0.0.1:1/api does not answer: ")
        assert line.endswith(" Trying again in 10 seconds.\n")
        assert process.poll() is None
        process.terminate()


def test_unknown_stage_is_refused(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pull_promoted.py", "reviews", "pulled", "--stage", "prod"])
    with pytest.raises(SystemExit, match=r"^2$"):
        example.main()
    assert "'prod' (choose from 'production', 'staging')" in capsys.readouterr().err
