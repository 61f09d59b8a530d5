"""Run a function in a fresh process: its value, its error, its wall time, its peak memory.

The child gets its request on standard input, and a watcher that it forks reads on: when the parent dies,
however it dies, that pipe closes and the watcher ends the child and all that it started. A thread could not:
native code may hold the GIL for minutes.

Over 300 lines, because the parent's side and the child's share one protocol.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow._process.state import resident_bytes
from compileflow.errors import (
    CompileError,
    CompileflowError,
    OutOfMemoryError,
    ProcessError,
    ProcessKilledError,
    ProcessTimeoutError,
)

logger = logging.getLogger(__name__)

JsonObject = dict[str, Any]

_PROGRESS = "\x1eprogress "
_ENTRY = "from compileflow._process.child import child_main; child_main()"
# What a compile or a validation has no business knowing: it uses no network.
_SECRETS = ("TOKEN", "SECRET", "PASSW", "_KEY", "CREDENTIAL", "AUTH", "DATABASE")
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "std::bad_alloc", "out of memory")


@dataclass(frozen=True)
class Isolated:
    """What a child process gave back."""

    value: JsonObject
    duration_s: float
    peak_rss_bytes: int


def run_isolated(
    function: str,
    request: Mapping[str, Any],
    *,
    work_dir: Path,
    log_path: Path,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    threads: int = 1,
    on_progress: Callable[[str], None] = logger.info,
) -> Isolated:
    """Call `function(request)` in a fresh process and wait for it.

    Args:
        function: "module:name" of a function from a JSON object to a JSON object.
        request: Its argument; JSON values only.
        work_dir: Existing folder for the child's answer.
        log_path: File for all that the child prints; deleted when it succeeds, kept when it does not.
        timeout_s: Seconds after which the child and all that it started are killed.
        memory_limit_bytes: Resident memory above which they are killed.
        threads: Threads that numeric libraries in the child may use.
        on_progress: Called with each progress line of the child.

    Returns:
        The function's value with wall time in seconds and peak resident memory in bytes.

    Raises:
        CompileflowError: whatever the function raised of that tree.
        OutOfMemoryError, ProcessTimeoutError, ProcessKilledError: the child was ended.
        CompileError: anything else that the function raised; the traceback is in the log.
    """
    answer_path = work_dir / "answer.json"
    answer_path.unlink(missing_ok=True)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.touch()
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", _ENTRY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_child_environment(threads, work_dir),
        start_new_session=True,
    )
    watch = _Watch(child, log_path, on_progress)
    try:
        watch.send({"function": function, "request": dict(request), "answer": str(answer_path)})
        ended_by_us = watch.wait(timeout_s, memory_limit_bytes)
    finally:
        watch.stop()
    duration_s = time.monotonic() - started
    if ended_by_us == "timeout":
        raise ProcessTimeoutError(
            f"{function} ran past its limit of {timeout_s:g} s and was killed.",
            hint="Raise the step's timeout, or ask for fewer or smaller shape buckets.",
            log_path=str(log_path),
        )
    if ended_by_us == "memory":
        raise OutOfMemoryError(
            f"{function} needed more than {_gib(memory_limit_bytes or 0)} and was killed.",
            hint="Run it on a machine with more memory, or lower max_sequence_length.",
            log_path=str(log_path),
        )
    answer = _read_answer(answer_path)
    if answer is None:
        raise _ended_without_answer(function, watch.exit_code, watch.peak_rss_bytes, log_path)
    if "error" in answer:
        raise CompileflowError.from_dict(answer["error"] | {"log_path": str(log_path)})
    log_path.unlink(missing_ok=True)
    return Isolated(answer["value"], duration_s, answer["peak_rss_bytes"] or watch.peak_rss_bytes)


def report_progress(text: str) -> None:
    """Tell the parent process, in one line, what is being done. Does nothing visible outside a child."""
    if os.environ.get("COMPILEFLOW_ISOLATED") == "1":
        sys.stdout.write(f"{_PROGRESS}{text}\n")
        sys.stdout.flush()


def skip_slow_grammar() -> None:
    """Keep jsonschema from building a grammar of internationalised URLs, which takes two seconds.

    Neptune's client brings it. Prefect, Great Expectations and Neptune import jsonschema; none checks such URLs.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def child_main() -> None:
    """Entry of the child process."""
    request = json.loads(sys.stdin.buffer.readline())
    skip_slow_grammar()
    if os.fork() == 0:
        _end_with_parent()
    module, _, name = request["function"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(request["request"])
        answer = {"value": value, "peak_rss_bytes": max(_peak_bytes("self"), _other_peak_bytes())}
    except CompileflowError as error:
        # Not by logging, which toolchains set up for themselves, or switch off.
        traceback.print_exception(error)
        answer = {"error": error.to_dict()}
    except MemoryError as error:
        traceback.print_exception(error)
        answer = {"error": _out_of_memory(request["function"], error).to_dict()}
    except Exception as error:  # noqa: BLE001 - the parent gets it
        traceback.print_exception(error)
        answer = {"error": _foreign_error(request["function"], error).to_dict()}
    path = Path(request["answer"])
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(answer), "utf-8")
    partial.replace(path)
    sys.stdout.flush()
    # Native libraries may crash while they are torn down; the answer is complete, so leave at once.
    os._exit(0)


class _Watch:
    """The parent's side of one child: its output, its memory, its end."""

    def __init__(self, child: subprocess.Popen[bytes], log_path: Path, on_progress: Callable[[str], None]):
        self._child = child
        self._log_path = log_path
        self._on_progress = on_progress
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self.exit_code: int | None = None
        self.peak_rss_bytes = 0

    def send(self, request: JsonObject) -> None:
        self._reader.start()
        assert self._child.stdin is not None  # noqa: S101 - a pipe was asked for
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            logger.debug("the child ended before it read its request")

    def wait(self, timeout_s: float | None, memory_limit_bytes: int | None) -> str:
        """Wait for the end; return 'timeout' or 'memory' if this side caused it, else ''."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = 0.005
        while True:
            self._forward()
            self.peak_rss_bytes = max(self.peak_rss_bytes, _peak_bytes(self._child.pid))
            pid, status = os.waitpid(self._child.pid, os.WNOHANG)
            if pid:
                self._ended(status)
                return ""
            if deadline is not None and time.monotonic() > deadline:
                return "timeout"
            if memory_limit_bytes is not None and resident_bytes(self._child.pid) > memory_limit_bytes:
                return "memory"
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.1)

    def stop(self) -> None:
        """Kill what still runs and close the pipes."""
        if self.exit_code is None:
            _kill_group(self._child.pid)
            self._ended(os.waitpid(self._child.pid, 0)[1])
        else:
            _kill_group(self._child.pid)
        self._reader.join(timeout=2)
        self._forward()
        assert self._child.stdin is not None  # noqa: S101 - a pipe was asked for
        try:
            self._child.stdin.close()
        except BrokenPipeError:
            logger.debug("the child closed its pipe first")

    def _ended(self, status: int) -> None:
        self.exit_code = os.waitstatus_to_exitcode(status)
        self._child.returncode = self.exit_code

    def _read(self) -> None:
        """Read to the end, which a detached process may put off past the child's own."""
        assert self._child.stdout is not None  # noqa: S101 - a pipe was asked for
        with self._child.stdout as output, self._log_path.open("ab", buffering=0) as log:
            for raw in output:
                line = raw.decode("utf-8", "replace").rstrip()
                if line.startswith(_PROGRESS):
                    with self._lock:
                        self._lines.append(line.removeprefix(_PROGRESS))
                try:
                    log.write(raw.replace(_PROGRESS.encode(), b""))
                except OSError as error:
                    # Not reading on would stop the child at a full pipe.
                    logger.warning("the log %s lost a line: %s", self._log_path, error)

    def _forward(self) -> None:
        """Hand progress on from the caller's own thread, where its logging context is."""
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            self._on_progress(line)


def _child_environment(threads: int, work_dir: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)
    }
    count = str(threads)
    return kept | {
        "COMPILEFLOW_ISOLATED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONUNBUFFERED": "1",
        # Libraries leave temporary folders behind; the work folder is deleted.
        "TMPDIR": str(work_dir),
    }


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        logger.debug("process group %d is gone already", pid)


def _peak_bytes(pid: int | str) -> int:
    """Return VmHWM; ru_maxrss would not do, as a child inherits its parent's peak in it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _other_peak_bytes() -> int:
    """Return the largest grandchild's peak; where there is no /proc, this process's own too."""
    if sys.platform == "linux":
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose)


def _read_answer(path: Path) -> JsonObject | None:
    try:
        answer: JsonObject = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return answer


def _ended_without_answer(function: str, code: int | None, peak: int, log_path: Path) -> ProcessError:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        text = f"{function} was killed by {name} at a peak of {_gib(peak)}."
        if -code == signal.SIGKILL:
            return OutOfMemoryError(
                text,
                hint="Nothing here sent that signal: most likely the machine ran out of memory.",
                log_path=str(log_path),
            )
        return ProcessKilledError(
            text,
            hint="The toolchain crashed in native code; its last words are in the log.",
            log_path=str(log_path),
        )
    return ProcessError(f"{function} ended with exit code {code} and no answer.", log_path=str(log_path))


def _foreign_error(function: str, error: Exception) -> CompileflowError:
    text = f"{type(error).__name__}: {error}"
    if any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return _out_of_memory(function, error)
    # Toolchains print pages; the first line says what, the log holds the rest.
    first = next((line for line in text.splitlines() if line.strip()), text)
    return CompileError(
        f"{function.partition(':')[2].lstrip('_')} failed: {first[:300]}",
        hint="The toolchain's own messages are in the log.",
    )


def _out_of_memory(function: str, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{function} ran out of memory ({type(error).__name__}).",
        hint="Run it on a machine with more memory, or lower max_sequence_length.",
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
