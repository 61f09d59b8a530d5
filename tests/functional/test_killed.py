"""A process that is killed at any moment leaves nothing that looks complete, and the next run completes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from compileflow.catalog import open_registry, open_store
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory

ROOT = Path(__file__).parents[2]


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "HF_HUB_OFFLINE": "1"}


def processes_of(settings: Settings) -> list[str]:
    """Return the command lines of all processes that inherited the environment of these settings."""
    mark = f"COMPILEFLOW_HOME={settings.home_dir}".encode()
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                lines.append((folder / "cmdline").read_text().replace("\0", " "))
    # A process that has ended has an empty command line until its parent asks for its exit code.
    return [line for line in lines if line]


def drive(settings: Settings, model: Path, *place: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.driver", str(model), *place],
        cwd=ROOT, env=environment(settings), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def accepted_by_verify(settings: Settings) -> set[str]:
    """Return the digests of all folders in the store that `compileflow verify` accepts."""
    store = open_store(settings.resolved_store_uri())
    accepted = set()
    for digest in store.list():
        completed = subprocess.run(
            [sys.executable, "-m", "compileflow", "verify", store.folder_uri(digest)],
            env=environment(settings), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in completed.stderr
        if completed.returncode == 0:
            accepted.add(digest)
    return accepted


def assert_next_run_completes(settings: Settings, model: Path) -> None:
    again = drive(settings, model)
    assert again.returncode == 0, again.stderr
    versions = open_registry(settings.resolved_registry_uri()).versions()
    assert [version.version for version in versions] == [1]
    assert accepted_by_verify(settings) == {versions[0].artifact_digest}
    for folder in ("store/tmp", "work"):
        assert not list((settings.home_dir / folder).iterdir())


@pytest.mark.parametrize(
    "place",
    ["compile", *(pytest.param(place, marks=pytest.mark.slow) for place in ("upload:3", "register"))],
)
def test_run_killed_in_the_middle_leaves_nothing_that_verify_accepts_and_the_next_completes(
    settings: Settings, tiny_model: ModelFactory, place: str
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    killed = drive(settings, model, place)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    proven = {"register"} & {place}
    registered = open_registry(settings.resolved_registry_uri()).versions()
    assert not registered
    # Killed at registering, the artifact has its passing report already; before, nothing has one.
    assert len(accepted_by_verify(settings)) == len(proven)
    assert_next_run_completes(settings, model)


@pytest.mark.functional
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "place"),
    [
        (signal.SIGKILL, "work/compile-*/artifact"),
        (signal.SIGTERM, "prefect/prefect.db"),
    ],
)
def test_no_process_outlives_a_flow_that_is_killed(
    settings: Settings, tiny_model: ModelFactory, number: signal.Signals, place: str
) -> None:
    command = [
        sys.executable, "-m", "flows", "compile", "--model", str(tiny_model(HfTask.TEXT_CLASSIFICATION)),
        "--target", "torchscript", "--bucket", "1x16", "--no-progress",
    ]  # fmt: skip
    flow = subprocess.Popen(command, cwd=ROOT, env=environment(settings), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not list(settings.home_dir.glob(place)):
        assert flow.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The flow, its embedded server and the server's watcher.
    assert len(processes_of(settings)) >= 3
    flow.send_signal(number)
    _, err = flow.communicate(timeout=60)
    if number is signal.SIGTERM:
        assert flow.returncode == 143
        assert err == "Terminated. Finished steps are kept; run the command again to do the rest.\n"
    deadline = time.monotonic() + 10
    while processes := processes_of(settings):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


@pytest.mark.functional
@pytest.mark.slow
def test_flow_killed_while_compiling_completes_when_run_again(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    command = [
        sys.executable, "-m", "flows", "compile", "--model", str(tiny_model(HfTask.TEXT_CLASSIFICATION)),
        "--target", "torchscript", "--bucket", "1x16", "--bucket", "1x64", "--name", "reviews", "--progress",
    ]  # fmt: skip
    log = settings.home_dir / "flow.log"
    log.parent.mkdir(parents=True)
    with log.open("w") as out:
        flow = subprocess.Popen(
            command, cwd=ROOT, env=environment(settings), stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + 180
    while "tracing" not in log.read_text():
        assert flow.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    assert not accepted_by_verify(settings)

    again = subprocess.run(
        command, cwd=ROOT, env=environment(settings), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    versions = open_registry(settings.resolved_registry_uri()).versions()
    assert [version.name for version in versions] == ["reviews"]
    assert accepted_by_verify(settings) == {versions[0].artifact_digest}
