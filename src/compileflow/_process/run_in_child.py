"""Run one function in a process of its own: its value, its error, its wall time, its peak memory."""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from compileflow._process.child_process import (
    ChildProcess,
    JsonObject,
    Overdue,
    child_environment,
    connect_to_parent,
    current_activity,
    end_child,
    peak_bytes,
    receive_from_parent,
    send_to_parent,
    skip_slow_grammar,
)
from compileflow._process.failures import compile_error, failure_of
from compileflow.errors import (
    CompileError,
    CompileflowError,
    OutOfMemoryError,
    ProcessError,
    ProcessKilledError,
    ProcessTimeoutError,
    TargetUnavailableError,
    first_line,
)

logger = logging.getLogger(__name__)

_ENTRY = "from compileflow._process.run_in_child import child_main; child_main()"
# A warm process prints it after a call, so that the parent knows that it has read the whole log.
_END_OF_LOG = b"\0end of the call\n"
# Bytes of a log that the parent keeps.
_LONGEST_LOG = 100_000


@dataclass(frozen=True)
class ChildResult:
    """The value of a function that ran in a child process, with its cost.

    Attributes:
        value: Value of the function.
        duration_s: Wall time in seconds.
        peak_rss_bytes: Peak of resident memory.
        log: End of what the child printed.
    """

    value: JsonObject
    duration_s: float
    peak_rss_bytes: int
    log: str = ""


class WarmProcess:
    """A process that has imported what several calls need, and forks for each of them.

    Memory, environment and crashes of a call stay its own, as in a fresh process.
    """

    def __init__(self) -> None:
        self._child: ChildProcess | None = None
        self._start: tuple[Sequence[str], Mapping[str, str]] | None = None
        self._on_log: Callable[[bytes], object] = lambda _: None
        self._is_read = threading.Event()

    def opened(
        self, imports: Sequence[str], environment: Mapping[str, str], on_log: Callable[[bytes], object]
    ) -> ChildProcess:
        """Return the process; a new one, if the last one ended or differs from what a call needs."""
        self._on_log = on_log
        self._is_read.clear()
        # A call gets its own folder for temporary files.
        start = (tuple(imports), {name: value for name, value in environment.items() if name != "TMPDIR"})
        if self._child is not None and not (start == self._start and self._child.is_running()):
            self.close()
        if self._child is None:
            self._start = start
            self._child = ChildProcess(_ENTRY, environment=environment, on_log=self._take_line)
        return self._child

    def rest(self) -> None:
        """Wait until all that a call printed is read, and drop what the process prints until the next one."""
        self._is_read.wait(timeout=2)
        self._on_log = lambda _: None

    def close(self) -> int:
        """End the process and what it forked; return its exit code."""
        child, self._child = self._child, None
        return child.end() if child is not None else 0

    def _take_line(self, line: bytes) -> None:
        text = line.removesuffix(_END_OF_LOG)
        if text:
            self._on_log(text)
        if text != line:
            self._is_read.set()


# Warm processes by what they have imported.
_warm_processes: ContextVar[dict[tuple[str, ...], WarmProcess] | None] = ContextVar("warm_processes", default=None)


@contextmanager
def warm_processes() -> Iterator[None]:
    """Share imports: in the block, calls of `run_in_child` with the same `imports` are forks of one process."""
    processes: dict[tuple[str, ...], WarmProcess] = {}
    # Elsewhere libraries of the system do not survive a fork.
    token = _warm_processes.set(processes if sys.platform == "linux" else None)
    try:
        yield
    finally:
        _warm_processes.reset(token)
        for process in processes.values():
            process.close()


def run_in_child(
    function: str,
    request: Mapping[str, Any],
    *,
    work_dir: Path,
    log_path: Path,
    timeout_s: float | None = None,
    threads: int = 1,
    imports: Sequence[str] = (),
    on_progress: Callable[[str], None] = logger.info,
) -> ChildResult:
    """Call `function(request)` in a fresh process, or in a fork of a warm one, and wait for it.

    Args:
        function: "module:name" of a function from a JSON object to a JSON object.
        request: Argument of the function; JSON values only.
        work_dir: Existing folder for the child's temporary files.
        log_path: File for everything that the child prints; deleted when the child succeeds.
        timeout_s: Seconds after which the child and all that it started are killed.
        threads: Threads that numeric libraries in the child may use.
        imports: Modules that a warm process imports once, in a block of `warm_processes`; none of them may start
            a thread.
        on_progress: Called in this thread with each progress line of the child.

    Returns:
        The function's value with wall time in seconds and peak resident memory in bytes.

    Raises:
        CompileflowError: The function raised an error of this tree.
        OutOfMemoryError: The child ran out of memory, or was killed from outside.
        ProcessTimeoutError: The child ran past `timeout_s`.
        ProcessKilledError: The child was killed by another signal.
        ProcessError: The child ended without an answer.
        CompileError: The function raised another error; the traceback is in the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    deadline = math.inf if timeout_s is None else start + timeout_s
    with log_path.open("ab", buffering=0) as log:

        def write_log(line: bytes) -> None:
            try:
                log.write(line)
            # Keep reading, or the child would stop at a full pipe. The file is closed after the child ends.
            except (OSError, ValueError) as error:
                logger.warning("The log %s lost a line: %s", log_path, error)

        environment = _environment(threads, work_dir)
        processes = _warm_processes.get() if imports else None
        warm = processes.setdefault(tuple(imports), WarmProcess()) if processes is not None else None
        exit_code: int | None = None
        answer: JsonObject | None = None
        if warm is not None:
            child = warm.opened(imports, environment, write_log)
        else:
            child = ChildProcess(_ENTRY, environment=environment, on_log=write_log)
        try:
            message = {"function": function, "request": dict(request)}
            if warm is not None:
                message["warm"] = {"imports": list(imports), "temporary": str(work_dir)}
            child.send(message, deadline=deadline)
            while (answer := child.receive(deadline=deadline)) is not None and "progress" in answer:
                on_progress(answer["progress"])
            if warm is not None and answer is not None:
                ended = answer if "ended" in answer else child.receive(deadline=deadline)
                exit_code = None if ended is None else ended["ended"]
                answer = None if "ended" in answer else answer
        except Overdue as error:
            raise ProcessTimeoutError(
                f"{function} ran past its limit of {timeout_s:g} s and was killed.",
                hint="Raise the step's timeout, or request fewer or smaller shape buckets.",
                log_path=str(log_path),
            ) from error
        finally:
            if warm is not None and exit_code is not None:
                warm.rest()
            else:
                exit_code = child.end() if warm is None else warm.close()
    if answer is None:
        raise _ended_without_answer(function, exit_code, child.peak_rss_bytes, log_path)
    if "error" in answer:
        raise CompileflowError.from_dict(answer["error"] | {"log_path": str(log_path)})
    printed = _end_of(log_path)
    log_path.unlink(missing_ok=True)
    peak_rss_bytes = answer["peak_rss_bytes"] or child.peak_rss_bytes
    return ChildResult(answer["value"], time.monotonic() - start, peak_rss_bytes, printed)


def _end_of(log_path: Path) -> str:
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LONGEST_LOG))
            return log.read(_LONGEST_LOG).decode("utf-8", "replace")
    except OSError:
        return ""


def child_main() -> None:
    """Entry point of the child process, and of a warm process and its forks."""
    connect_to_parent()
    skip_slow_grammar()
    request = receive_from_parent()
    assert request is not None  # noqa: S101 - without a timeout it waits
    is_fork = "warm" in request
    if is_fork:
        request = _fork_for_each(request)
    # The only call: torch.jit writes the lines of its callers into a graph, which must not depend on the process.
    _answer(request)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_fork:
        # As `end_child`, but the group is that of the warm process.
        os._exit(0)
    end_child()


def _fork_for_each(request: JsonObject | None) -> JsonObject:
    """In a warm process: fork for each request, and tell how the fork ended; return in each fork."""
    while request is not None:
        for module in request["warm"]["imports"]:
            # The call imports the module again, and its error says what is wrong.
            with suppress(Exception):
                import_module(module)
        pid = os.fork()
        if pid == 0:
            os.environ["TMPDIR"] = request["warm"]["temporary"]
            tempfile.tempdir = None
            return request
        _, status = os.waitpid(pid, 0)
        os.write(2, _END_OF_LOG)
        send_to_parent({"ended": os.waitstatus_to_exitcode(status)})
        request = receive_from_parent()
    sys.exit()


def _answer(request: JsonObject) -> None:
    """Call the function of a request, and send its value or its error to the parent."""
    module, _, name = request["function"].partition(":")
    try:
        value = getattr(import_module(module), name)(request["request"])
        answer = {"value": value, "peak_rss_bytes": max(peak_bytes("self"), _other_peak_bytes())}
    except CompileflowError as error:
        # Not through logging, which toolchains configure for themselves or switch off.
        traceback.print_exception(error)
        answer = {"error": error.to_dict()}
    except MemoryError as error:
        traceback.print_exception(error)
        answer = {"error": _out_of_memory(request["function"], error).to_dict()}
    except Exception as error:  # noqa: BLE001 - the parent raises it
        traceback.print_exception(error)
        answer = {"error": _foreign_error(request["function"], error).to_dict()}
    send_to_parent(answer)


def _environment(threads: int, work_dir: Path) -> dict[str, str]:
    count = str(threads)
    return child_environment() | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": os.environ.get("ORT_DISABLE_TELEMETRY", "1"),
        "GX_ANALYTICS_ENABLED": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONUNBUFFERED": "1",
        # Libraries leave temporary folders behind; the work folder is deleted.
        "TMPDIR": str(work_dir),
    }


def _other_peak_bytes() -> int:
    """Return the peak of the largest grandchild, or, without /proc, the larger one of that and this process."""
    if sys.platform == "linux":
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(process).ru_maxrss for process in processes)


def _ended_without_answer(function: str, exit_code: int, peak_rss_bytes: int, log_path: Path) -> ProcessError:
    if exit_code >= 0:
        return ProcessError(f"{function} ended with exit code {exit_code} and no answer.", log_path=str(log_path))
    number = signal.Signals(-exit_code)
    text = f"{function} was killed by {number.name} at a peak of {peak_rss_bytes / 2**30:.2f} GiB."
    if number == signal.SIGKILL:
        hint = "compileflow did not send that signal: most likely the machine ran out of memory."
        return OutOfMemoryError(text, hint=hint, log_path=str(log_path))
    hint = "The toolchain crashed in native code; the log holds its last output."
    if number == signal.SIGBUS:
        # The system has no page for a write to a mapped file.
        hint = "Most likely a disk is full: free some space on the disk of COMPILEFLOW_HOME."
    return ProcessKilledError(text, hint=hint, log_path=str(log_path))


def _foreign_error(function: str, error: Exception) -> CompileflowError:
    failure = failure_of(error)
    if failure is not None and failure.kind == "memory":
        return _out_of_memory(function, error)
    stop = f"compileflow stopped while {current_activity() or f'running {function}'}"
    # Libraries print pages; the first line names the problem, and the log holds the rest.
    reason = first_line(error)
    if isinstance(error, ImportError):
        module = error.name or "a module"
        return TargetUnavailableError(
            f"{stop}: a module cannot be imported: {reason}.", hint=f"Install {module} here."
        )
    if failure is not None and failure.kind == "disk":
        return CompileError(f"{stop}: a disk is full: {reason}.", hint=failure.hint)
    if isinstance(error, OSError):
        return CompileError(
            f"{stop}: {error.filename or 'a file'} cannot be read or written: {reason}.",
            hint="Check the free space and the permissions of the home folder and the work folder.",
        )
    if isinstance(error, RecursionError):
        return CompileError(
            f"{stop}: its calls are nested too deeply: {reason}.", hint="Choose a model with fewer layers."
        )
    return compile_error(
        f"{stop}: {type(error).__name__}: {reason}.",
        error,
        hint="Please report it with the name of the model; the log holds the traceback.",
    )


def _out_of_memory(function: str, error: BaseException) -> CompileflowError:
    activity = current_activity() or f"running {function}"
    return compile_error(
        f"compileflow ran out of memory ({type(error).__name__}) while {activity}.", error, hint=""
    )
