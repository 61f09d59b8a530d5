"""A child process and its parent: both sides of one protocol.

Messages are JSON objects, one per line: to the child on standard input, and back on its original standard output.
Everything that the child prints goes to its log. However the parent dies, a watcher that the child
forks kills the child and all that it started. A thread cannot do this: native code may hold the GIL for minutes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

from compileflow.settings import get_settings

logger = logging.getLogger(__name__)

JsonObject = dict[str, Any]

# The variables that every child gets: of the system, of compilers and of numeric libraries. Any other
# variable may hold a secret, and a child may run the code of a model.
_NAMES = frozenset({
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "GLIBC_TUNABLES"),
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
    *("LIBRARY_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("COMPILEFLOW_HOME", "COMPILEFLOW_ENV", "COMPILEFLOW_THREADS", "COMPILEFLOW_REQUIRE_SIGNATURE"),
    "COMPILEFLOW_TRUSTED_KEYS",
})  # fmt: skip
_PREFIXES = (
    *("LC_", "XDG_", "PYTHON", "MALLOC_", "COVERAGE_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TBB_"),
    *("DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_", "TRITON_", "XLA_", "CUDA_", "NVIDIA_", "NEURON"),
    *("ONNX", "ORT_", "OPENVINO_", "OV_", "NNCF_", "AOT_", "BLADE_", "HYPERDEX_", "TRANSFORMERS_", "TOKENIZERS_"),
)
# Polling interval for a silent child, in seconds.
_LOOK_S = 0.05
_BLOCK = 64 * 1024
_to_parent: TextIO | None = None
_activity = ""


class Overdue(Exception):  # noqa: N818 - every caller turns it into an error of the tree
    """A child did not read or answer before a deadline. The argument, where there is one: seconds."""


class ChildProcess:
    """A Python process in a session of its own, as its parent sees it.

    Args:
        code: Python code that calls `connect_to_parent` first.
        environment: The child's whole environment.
        on_log: Called with each line that the child prints, in a thread.

    Attributes:
        peak_rss_bytes: Largest resident memory that the parent saw while it waited for messages.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, code: str, *, environment: Mapping[str, str], on_log: Callable[[bytes], object]) -> None:
        self.peak_rss_bytes = 0
        self._on_log = on_log
        self._messages: queue.SimpleQueue[JsonObject] = queue.SimpleQueue()
        self._is_killed = False
        self._popen = subprocess.Popen(
            # -P keeps files of the working folder from standing in for packages.
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        pipes = ((self._popen.stdout, self._take_message), (self._popen.stderr, on_log))
        self._readers = [threading.Thread(target=_read_lines, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._popen.pid

    def is_running(self) -> bool:
        """Return whether the child itself has not ended."""
        return self._popen.poll() is None

    def send(self, message: JsonObject, *, deadline: float = math.inf) -> None:
        """Write a message. A child that does not read would otherwise hold its writer forever.

        Args:
            message: JSON object for the child.
            deadline: Deadline on the clock `time.monotonic`.

        Raises:
            Overdue: The child did not read the message before the deadline.
        """
        assert self._popen.stdin is not None  # noqa: S101 - Popen made the pipe
        pipe = self._popen.stdin.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                remaining_s = deadline - time.monotonic()
                if not poll.poll(None if math.isinf(remaining_s) else 1000 * max(0.0, remaining_s)):
                    raise Overdue
                # A pipe that is ready takes this many bytes without blocking.
                data = data[os.write(pipe, data[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            logger.debug("the child %d ended before it read its request", self.pid)

    def receive(self, *, deadline: float = math.inf) -> JsonObject | None:
        """Wait for the next message; return None if the child ended without one.

        Args:
            deadline: Deadline on the clock `time.monotonic`.

        Raises:
            Overdue: The deadline passed; the child may still run.
        """
        while True:
            self.peak_rss_bytes = max(self.peak_rss_bytes, peak_bytes(self.pid))
            is_running = self.is_running()
            if not is_running:
                # Its grandchildren may hold the pipe open; the messages that it sent are in there.
                self.kill()
                self._readers[0].join(timeout=2)
            remaining_s = deadline - time.monotonic()
            try:
                return self._messages.get(timeout=max(0.0, min(_LOOK_S, remaining_s)))
            except queue.Empty as error:
                if not is_running:
                    return None
                if remaining_s <= 0:
                    raise Overdue from error

    def kill(self) -> None:
        """Kill the child and all processes of its group."""
        # Once only: once the child is reaped, its pid may belong to another process.
        if not self._is_killed:
            self._is_killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill the group, close the pipes and return the child's exit code, -N for signal N."""
        self.kill()
        exit_code = self._popen.wait()
        for reader in self._readers:
            # A detached process may hold the pipe open for as long as it runs.
            reader.join(timeout=2)
        assert self._popen.stdin is not None  # noqa: S101 - Popen made the pipe
        with suppress(OSError):
            self._popen.stdin.close()
        return exit_code

    def _take_message(self, line: bytes) -> None:
        try:
            self._messages.put(json.loads(line))
        except ValueError:
            # Printed before the child connected.
            self._on_log(line)


def child_environment(*more: str) -> dict[str, str]:
    """Return the variables of this process that a child needs.

    Args:
        more: Names of further variables. The setting `child_variables` names more of them.
    """
    names = {*_NAMES, *more, *(name.strip() for name in get_settings().child_variables.split(","))}
    return {name: value for name, value in os.environ.items() if name in names or name.startswith(_PREFIXES)}


def connect_to_parent() -> None:
    """In a child: start the watcher, take standard output for messages, and send all prints to the log."""
    global _to_parent
    end_with_parent()
    _to_parent = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)


def receive_from_parent(*, timeout_s: float | None = None) -> JsonObject | None:
    """In a child: wait for the next message; return None if none comes in time.

    The parent waits for an answer before it sends the next message, so nothing is left in the buffer.
    """
    if not select.select([sys.stdin], [], [], timeout_s)[0]:
        return None
    message: JsonObject = json.loads(sys.stdin.buffer.readline())
    return message


def send_to_parent(message: JsonObject) -> None:
    """In a child: send a message. Outside a child it does nothing."""
    if _to_parent is not None:
        _to_parent.write(json.dumps(message) + "\n")


def report_progress(text: str) -> None:
    """Report the current activity to the parent process in one line. Outside a child it does nothing."""
    global _activity
    _activity = text
    send_to_parent({"progress": text})


def current_activity() -> str:
    """Return the activity that `report_progress` was last called with; "" before its first call."""
    return _activity


def end_child() -> NoReturn:
    """In a child: end at once, with the watcher and all processes of the group.

    Native libraries may crash while they are torn down, and exit hooks may wait; all messages have been sent.
    """
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("unreachable")


def skip_slow_grammar() -> None:
    """Keep jsonschema from building a grammar of internationalized URLs, which takes two seconds.

    Neptune's client installs that grammar. Prefect, Great Expectations and Neptune import jsonschema; none of them
    checks such URLs.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def end_with_parent() -> None:
    """In a child: fork a watcher that kills the child's group when the pipe from the parent closes.

    The pipe is standard input, and the watcher passes on what the parent writes. The child must have a session of
    its own, and call this before it starts a thread.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.dup2(reader, 0)
        os.close(reader)
        os.close(writer)
        return
    try:
        # The parent sees the end of the child's output when the child ends, not when the watcher does.
        for handle in (1, 2, reader):
            os.close(handle)
        while block := os.read(0, _BLOCK):
            with suppress(BrokenPipeError):
                os.write(writer, block)
    finally:
        os.killpg(0, signal.SIGKILL)


def _read_lines(pipe: IO[bytes], on_line: Callable[[bytes], object]) -> None:
    with pipe:
        for line in pipe:
            on_line(line)


def reset_peak() -> bool:
    """Count the peak of this process from now on; return False if the system cannot."""
    try:
        # proc(5): resets VmHWM.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(pid: int | str) -> int:
    """Return VmHWM in bytes, 0 on systems without /proc. A child inherits its parent's peak in ru_maxrss."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
