"""One function in a child process: its answer, its ends, its limits, its environment and its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compileflow._process.run_in_child import ChildResult, run_in_child, warm_processes
from compileflow.errors import (
    CompileError,
    CompileflowError,
    OutOfMemoryError,
    ProcessError,
    ProcessKilledError,
    ProcessTimeoutError,
    TargetUnavailableError,
)
from compileflow.settings import get_settings

MIB = 2**20
FUNCTIONS = "tests.unit.child_functions"
Run = Callable[..., ChildResult]


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.fixture
def run(tmp_path: Path, log_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def call(name: str, request: dict[str, Any] | None = None, **options: Any) -> ChildResult:
        return run_in_child(f"{FUNCTIONS}:{name}", request or {}, work_dir=tmp_path, log_path=log_path, **options)

    return call


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def assert_all_end(pids_path: Path) -> None:
    pids = [int(pid) for pid in pids_path.read_text().split()]
    assert len(pids) == 2
    ended = wait_until(lambda: not any(map(is_running, pids)))
    for pid in filter(is_running, pids):
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_value_comes_back_from_another_process(run: Run) -> None:
    result = run("echo", {"text": "ü", "n": [1, 2.5, None]})
    assert result.value["request"] == {"text": "ü", "n": [1, 2.5, None]}
    assert result.value["pid"] != os.getpid()
    assert 0 < result.duration_s < 60


def test_error_of_ours_crosses_with_kind_hint_and_log(run: Run, log_path: Path) -> None:
    with pytest.raises(TargetUnavailableError) as caught:
        run("refuse")
    assert (caught.value.message, caught.value.hint) == ("the toolchain is absent", "install it")
    assert caught.value.log_path == str(log_path)
    assert "Traceback" in log_path.read_text()


def test_foreign_error_is_one_line_and_its_traceback_is_in_the_log(run: Run, log_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        run("fail")
    assert caught.value.message == "compileflow stopped while failing: ValueError: first line."
    assert caught.value.log_path == str(log_path)
    assert str(caught.value).endswith(f"Log: {log_path}")
    assert str(log_path) not in caught.value.message + caught.value.hint
    assert "\n" not in str(caught.value)
    log = log_path.read_text()
    assert "Traceback" in log
    assert "second line" in log
    assert "the child's own words" in log


@pytest.mark.parametrize(
    ("function", "kind", "problem"),
    [
        ("import_absent", TargetUnavailableError, "a module cannot be imported: No module named 'absent_module'"),
        ("read_absent", CompileError, "/absent/file cannot be read or written: No such file"),
        ("fill_disk", CompileError, "a disk is full: No space left on device"),
        ("nest_deeply", CompileError, "its calls are nested too deeply: maximum recursion depth exceeded"),
    ],
)
def test_each_kind_of_foreign_error_has_its_own_line(
    run: Run, function: str, kind: type[CompileflowError], problem: str
) -> None:
    with pytest.raises(kind) as caught:
        run(function)
    assert type(caught.value) is kind
    assert problem in caught.value.message
    assert caught.value.hint


def test_log_is_deleted_on_success(run: Run, log_path: Path) -> None:
    run("progress")
    assert log_path.parent.is_dir()
    assert not log_path.exists()


def test_function_that_is_not_there_is_a_compile_error(run: Run) -> None:
    with pytest.raises(CompileError, match="absent"):
        run("absent")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGTERM"])
def test_end_by_a_signal_names_it(run: Run, log_path: Path, name: str) -> None:
    with pytest.raises(ProcessKilledError, match=f"killed by {name} at a peak of 0.0") as caught:
        run("end_by_signal", {"signal": name})
    assert caught.value.log_path == str(log_path)
    assert log_path.exists()


def test_kill_from_outside_is_most_likely_lack_of_memory(run: Run) -> None:
    with pytest.raises(OutOfMemoryError, match="SIGKILL") as caught:
        run("end_by_signal", {"signal": "SIGKILL"})
    assert "ran out of memory" in caught.value.hint


def test_memory_error_is_out_of_memory(run: Run) -> None:
    with pytest.raises(OutOfMemoryError, match="MemoryError") as caught:
        run("allocate_too_much")
    assert "more memory" in caught.value.hint


@pytest.mark.parametrize("text", ["std::bad_alloc", "DefaultCPUAllocator: can't allocate memory: 9 bytes"])
def test_native_lack_of_memory_is_out_of_memory(run: Run, text: str) -> None:
    with pytest.raises(OutOfMemoryError):
        run("fail_with", {"text": text})


def test_exit_without_an_answer_names_the_code(run: Run) -> None:
    with pytest.raises(ProcessError, match="exit code 3 and no answer") as caught:
        run("leave")
    assert type(caught.value) is ProcessError


def test_answer_of_an_earlier_child_is_not_taken(run: Run) -> None:
    run("echo")
    with pytest.raises(ProcessKilledError):
        run("end_by_signal", {"signal": "SIGTERM"})


@pytest.mark.parametrize("hold_gil", [False, True])
def test_timeout_kills_grandchildren_too(run: Run, tmp_path: Path, *, hold_gil: bool) -> None:
    with pytest.raises(ProcessTimeoutError, match="limit of 2 s"):
        run("family", {"path": str(tmp_path / "pids"), "hold_gil": hold_gil}, timeout_s=2)
    assert_all_end(tmp_path / "pids")


def test_progress_is_forwarded_and_nothing_else(run: Run) -> None:
    lines: list[str] = []
    run("progress", on_progress=lines.append)
    assert lines == ["one of two", "two of two"]


def test_any_output_is_taken(run: Run) -> None:
    assert run("noise").value == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a log that cannot be written needs /dev/full")
def test_child_finishes_though_its_log_cannot_be_written(run: Run, log_path: Path) -> None:
    log_path.parent.mkdir()
    log_path.symlink_to("/dev/full")
    assert run("noise", timeout_s=30).value == {}


def test_error_in_the_callers_callback_ends_the_child(run: Run, tmp_path: Path) -> None:
    def on_progress(line: str) -> None:
        raise ZeroDivisionError(line)

    with pytest.raises(ZeroDivisionError, match="started"):
        run("family", {"path": str(tmp_path / "pids")}, on_progress=on_progress)
    assert_all_end(tmp_path / "pids")


def test_child_gets_only_variables_that_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "NEPTUNE_API_TOKEN",
        "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PGPASSWORD",
        "COMPILEFLOW_REGISTRY_URI", "COMPILEFLOW_S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "HTTPS_PROXY",
        "https_proxy", "HF_ENDPOINT", "PIP_INDEX_URL", "ANY_OTHER",
    )  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "http://user:s3cr3t-value@127.0.0.1:9")
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("TOOLCHAIN_LICENSE", "27000@host")
    monkeypatch.setenv("COMPILEFLOW_CHILD_VARIABLES", "TOOLCHAIN_LICENSE, ABSENT")
    get_settings.cache_clear()
    variables = run("environment").value
    assert "s3cr3t-value" not in str(variables)
    assert variables["OMP_PROC_BIND"] == "close"
    assert variables["TOOLCHAIN_LICENSE"] == "27000@host"


def test_onnxruntime_does_not_call_home_from_a_child_unless_the_user_allows_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert run("environment").value["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert run("environment").value["ORT_DISABLE_TELEMETRY"] == "0"


def test_child_does_not_import_files_of_the_working_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not the json of the standard library')")
    monkeypatch.chdir(tmp_path)
    assert run("echo").value["request"] == {}


def test_child_is_offline_and_has_its_threads(run: Run) -> None:
    variables = run("environment", threads=3).value
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"


def test_peak_memory_is_the_childs(run: Run) -> None:
    assert 200 * MIB < run("allocate", {"size_bytes": 200 * MIB}).peak_rss_bytes < 300 * MIB


def test_peak_memory_counts_grandchildren(run: Run) -> None:
    assert 200 * MIB < run("grandchild_allocates", {"size_bytes": 200 * MIB}).peak_rss_bytes < 300 * MIB


def test_peak_memory_does_not_count_the_parents(run: Run) -> None:
    large = bytearray(200 * MIB)
    large[::4096] = b"x" * len(large[::4096])
    assert 0 < run("echo").peak_rss_bytes < 100 * MIB


@pytest.mark.parametrize("hold_gil", [False, True])
@pytest.mark.usefixtures("run")
def test_child_and_grandchild_end_when_the_parent_is_killed(tmp_path: Path, *, hold_gil: bool) -> None:
    pids = tmp_path / "pids"
    code = (
        "from pathlib import Path; from compileflow._process.run_in_child import run_in_child; "
        f"folder = Path({str(tmp_path)!r}); "
        f"request = {{'path': {str(pids)!r}, 'hold_gil': {hold_gil}}}; "
        f"run_in_child('{FUNCTIONS}:family', request, work_dir=folder, log_path=folder / 'log')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    started = wait_until(pids.exists)
    parent.kill()
    parent.wait()
    assert started
    assert_all_end(pids)


def test_detached_process_does_not_hold_up_the_answer(run: Run) -> None:
    started = time.monotonic()
    pid = run("detach").value["pid"]
    took_s = time.monotonic() - started
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)
    assert took_s < 20


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a warm process forks, which only Linux allows")


@linux_only
def test_calls_of_a_warm_process_share_imports_and_nothing_else(run: Run, tmp_path: Path) -> None:
    with warm_processes():
        answers = [run("look", {"name": name}, imports=["wave"]).value for name in ("first", "second")]
        other = run("look", {"name": "third"}).value
    assert [answer["names"] for answer in answers] == [["first"], ["second"]]
    assert all(answer["has_wave"] for answer in answers)
    assert not other["has_wave"]
    assert answers[0]["pid"] != answers[1]["pid"]
    assert answers[0]["parent"] == answers[1]["parent"] != os.getpid()
    assert answers[0]["temporary"] == str(tmp_path)
    assert wait_until(lambda: not is_running(answers[0]["parent"]))
    # After the block, a call is a fresh process again.
    assert not run("look", {"name": "fourth"}, imports=["wave"]).value["has_wave"]


@linux_only
def test_a_call_of_a_warm_process_ends_as_a_fresh_one(run: Run, log_path: Path) -> None:
    with warm_processes():
        parent = run("look", {"name": "first"}, imports=["wave"]).value["parent"]
        with pytest.raises(CompileError, match="first line"):
            run("fail", imports=["wave"])
        assert "the child's own words" in log_path.read_text()
        assert "end of the call" not in log_path.read_text()
        with pytest.raises(ProcessKilledError, match="SIGSEGV"):
            run("end_by_signal", {"signal": "SIGSEGV"}, imports=["wave"])
        with pytest.raises(TargetUnavailableError, match="absent_module"):
            run("import_absent", imports=["wave"])
        # None of these ended the process that forks.
        assert run("look", {"name": "last"}, imports=["wave"]).value["parent"] == parent


@linux_only
def test_a_timeout_ends_a_warm_process_and_the_next_call_starts_another(run: Run) -> None:
    with warm_processes():
        parent = run("look", {"name": "first"}, imports=["wave"]).value["parent"]
        with pytest.raises(ProcessTimeoutError):
            run("hang", imports=["wave"], timeout_s=1)
        assert not is_running(parent)
        assert run("look", {"name": "second"}, imports=["wave"]).value["parent"] != parent


@linux_only
def test_calls_that_need_other_imports_take_turns_between_two_warm_processes(run: Run) -> None:
    with warm_processes():
        looks = [run("look", {"name": "a"}, imports=[module]).value for module in ("wave", "this_is_absent") * 2]
    assert [look["has_wave"] for look in looks] == [True, False, True, False]
    first, other, *again = [look["parent"] for look in looks]
    assert first != other
    assert again == [first, other]


@linux_only
def test_a_call_has_the_same_callers_in_a_warm_process(run: Run) -> None:
    # torch.jit writes them into its graphs, and the same compile should give the same bytes.
    fresh = run("callers").value
    with warm_processes():
        assert run("callers", imports=["wave"]).value == fresh
    assert len(fresh["callers"]) >= 3
