"""Runs of the command line: each in a fork, which shares the imports, or in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn

import psutil

from compileflow._process import child_process
from compileflow.validation.cases import raw
from compileflow.validation.measure import latency

ROOT = Path(__file__).parents[2]
Manner = Literal["fork", "process", "flow"]
# Slow to import, and none of them starts a thread, which a fork would lack.
_MODULES = (
    "compileflow.cli.compile",
    "compileflow.selection.run",
    "compileflow.serving.pipeline",
    "compileflow.steps.build",
    "compileflow.steps.prove",
    "compileflow.targets.torchscript",
    "compileflow.validation.judge.expectations",
    "boto3",
    "matplotlib.pyplot",
    "securesystemslib.signer",
    "transformers.pipelines",
)
_LONGEST_S = 900
_LINGER_S = 60


@dataclass
class Run:
    """A run of the command line.

    Attributes:
        pid: Process of the run, the first of its own session.
        out: File with its standard output.
        err: File with its standard error.
        exit_code: -N if signal N ended the run; None while it runs.
        family: Processes that the run started, as far as they were seen.
    """

    pid: int
    out: Path
    err: Path
    exit_code: int | None = None
    family: set[psutil.Process] = field(default_factory=set)

    def poll(self) -> int | None:
        """Return the exit code, or None while the run goes on."""
        if self.exit_code is None:
            with suppress(psutil.NoSuchProcess):
                self.family |= set(psutil.Process(self.pid).children(recursive=True))
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def sleep(self, seconds: float) -> bool:
        """Wait that long, or until the run ends; return whether it still runs."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.exit_code is None

    def children(self) -> list[psutil.Process]:
        """Return the child processes in which steps run."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.pid).children()
            return [child for child in children if "uvicorn" not in " ".join(child.cmdline())]
        return []

    def kill(self) -> None:
        """Kill the process of the run, as the kernel would; its children are to end by themselves."""
        self.poll()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> str:
        """Wait until the run and all its processes have ended; return what is wrong about that, or ''."""
        problem = ""
        if self.sleep(_LONGEST_S):
            problem = f"it ran for more than {_LONGEST_S} s"
            self.kill()
            self.sleep(_LONGEST_S)
        end = time.monotonic() + _LINGER_S
        while left := [process for process in self.family if _runs(process)]:
            if time.monotonic() > end:
                problem = problem or f"processes outlive it: {left}"
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.01)
        return problem


def start(
    words: Sequence[str],
    environment: Mapping[str, str],
    out: Path,
    *,
    manner: Manner,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    """Start a command.

    Args:
        words: Words of the command line after the program.
        environment: The whole environment of the run.
        out: File for standard output; standard error goes beside it.
        manner: fork: `compileflow` in a fork. process: `python -m compileflow`. flow: `python -m flows`.
        prepare: Called in a fork before the command.
    """
    err = out.with_suffix(".err")
    if manner == "fork":
        pid = os.fork()
        if pid == 0:
            _become(lambda: (prepare(), _command(words)), environment, (os.devnull, str(out), str(err)))
        return Run(pid, out, err)
    module = "flows" if manner == "flow" else "compileflow"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    # `Run` waits for the process.
    popen.returncode = 0
    return Run(popen.pid, out, err)


def call_in_fork(function: Callable[[], Any], environment: Mapping[str, str], out: Path) -> str:
    """Call a function in a fork and return '', or its traceback: libraries leave threads in the caller."""
    run = Run(pid := os.fork(), out, out)
    if pid == 0:
        _become(function, environment, (os.devnull, str(out), str(out)))
    problem = run.wait()
    if run.exit_code:
        return problem or out.read_text("utf-8", "replace") or f"exit code {run.exit_code}"
    return problem


def import_once() -> None:
    """Import what forks need, shorten their validations, and let them fork their children."""
    for module in _MODULES:
        import_module(module)
    latency._PATIENCE_S, latency._BUDGET_S, latency._ONE_THREAD_BUDGET_S = 0.0, 0.1, 0.1
    raw._TEXTS = 200
    child_process.subprocess = _ForkedChildren  # type: ignore[assignment]


class _ForkedChildren:
    """Stands in for the module subprocess where compileflow starts a child: a fork that runs the child's code."""

    PIPE = subprocess.PIPE

    class Popen:
        def __init__(self, words: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
            code = words[-1]
            pipes = [os.pipe() for _ in range(3)]
            self.returncode: int | None = None
            self.pid = os.fork()
            if self.pid == 0:
                ends = (pipes[0][0], pipes[1][1], pipes[2][1])
                _become(lambda: exec(code, {}), env, ends)  # noqa: S102 - it is the code of compileflow's child
            for end in (pipes[0][0], pipes[1][1], pipes[2][1]):
                os.close(end)
            self.stdin = os.fdopen(pipes[0][1], "wb", buffering=0)
            self.stdout, self.stderr = os.fdopen(pipes[1][0], "rb"), os.fdopen(pipes[2][0], "rb")

        def poll(self) -> int | None:
            return self._reap(os.WNOHANG)

        def wait(self) -> int:
            exit_code = self._reap(0)
            assert exit_code is not None
            return exit_code

        def _reap(self, options: int) -> int | None:
            if self.returncode is None and (found := os.waitpid(self.pid, options))[0]:
                self.returncode = os.waitstatus_to_exitcode(found[1])
            return self.returncode


def _become(
    call: Callable[[], Any], environment: Mapping[str, str], streams: tuple[str | int, str | int, str | int]
) -> NoReturn:
    """In a fork: become what a fresh process would be, make a call, and end."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for handle, stream in enumerate(streams):
            is_path = isinstance(stream, str)
            flags = os.O_RDONLY if handle == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(stream, flags) if is_path else stream, handle)
        os.closerange(3, 4096)
        os.environ.clear()
        os.environ.update(environment)
        _forget_environment()
        call()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - a fresh process would print it
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _forget_environment() -> None:
    import tempfile

    from compileflow.settings import get_settings

    get_settings.cache_clear()
    tempfile.tempdir = None


def _command(words: Sequence[str]) -> None:
    from compileflow.__main__ import main

    sys.argv = ["compileflow", *words]
    main()


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def watched(run: Run) -> Iterator[None]:
    """Yield again and again, every few milliseconds, until the run ends."""
    while run.sleep(0.005):
        yield
