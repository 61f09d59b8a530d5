"""run_checks: many checks, each in a fork of one process, with their results as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

_ANSWER = "result.json"
# A check that waits instead of computing is ended after its time limit times this factor.
_WAITING_FACTOR = 5
# Modules that are slow to import and that every compile needs.
COMPILE_MODULES = (
    "compileflow.steps.build",
    "onnx.reference",
    "onnx_ir",
    "onnxruntime",
    "onnxscript.optimizer",
    "onnxscript.rewriter",
    "openvino.frontend.pytorch",
    "torch._inductor",
    "torch.export",
    "torch.onnx._internal.exporter._core",
    "transformers.exporters",
    "transformers.pipelines",
)
_DISTRIBUTIONS = {
    "onnx-runtime": ("torch", "transformers", "onnxruntime", "onnxscript"),
    "openvino": ("torch", "transformers", "openvino"),
    "torchscript": ("torch", "transformers"),
    "aot-inductor": ("torch", "transformers"),
}


class Check(Protocol):
    """One check of a sweep."""

    @property
    def key(self) -> str:
        """Key of the result. A check whose key has a result is not made again."""

    @property
    def labels(self) -> dict[str, Any]:
        """Fields of the result that identify the check."""

    @property
    def time_limit_s(self) -> int:
        """Seconds of processor time after which the check is ended, so that a busy machine does not end it."""

    def run(self, folder: Path) -> dict[str, Any]:
        """Make the check in an empty folder, and return the fields of its result. Runs in a child process."""

    def ended(self, folder: Path, reason: str) -> dict[str, Any]:
        """Return the fields of the result of a child that ended without one."""

    def summary(self, line: dict[str, Any]) -> str:
        """Return a result in words, for the terminal."""


def target_versions(target: str) -> str:
    """Return the versions that a result of a target depends on."""
    from compileflow.contracts.toolkit import installed_versions

    found = installed_versions(_DISTRIBUTIONS[target])
    return " ".join(f"{name} {version}" for name, version in sorted(found.items()))


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each key."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, lines)}


def run_checks(
    checks: Iterable[Check],
    path: Path,
    *,
    modules: Iterable[str],
    children: int,
    stop_after_s: float = float("inf"),
    again: tuple[str, ...] = (),
) -> int:
    """Make the checks that have no result yet, and append their results to a file.

    Args:
        checks: Checks with different keys.
        path: File of results, one JSON object in a line.
        modules: Modules to import once, before the first child starts.
        children: Child processes at a time.
        stop_after_s: Seconds after which no further check starts.
        again: Outcomes that are checked again.

    Returns:
        Number of checks that still have no result.
    """
    start = time.monotonic()
    results = read_results(path)
    todo = [check for check in checks if (result := results.get(check.key)) is None or result["outcome"] in again]
    if not todo:
        return 0
    _import_once(modules)
    path.parent.mkdir(parents=True, exist_ok=True)
    running: list[_Child] = []
    number = ended = 0
    try:
        while running or number < len(todo):
            is_late = time.monotonic() - start > stop_after_s
            while len(running) < children and number < len(todo) and not is_late:
                running.append(_Child(todo[number]))
                number += 1
            if is_late and not running:
                break
            for child in [child for child in running if child.has_ended()]:
                running.remove(child)
                ended += 1
                line = child.line()
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{ended} of {len(todo)}: {child.check.summary(line)} {line['seconds']} s", flush=True)
            time.sleep(0.02)
    finally:
        for child in running:
            child.kill()
    return len(todo) - number


def _import_once(modules: Iterable[str]) -> None:
    """Import what every child needs: a child is a fork of this process and starts in milliseconds."""
    import torch
    import transformers

    for name in modules:
        import_module(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


class _Child:
    """One check in a fork of this process, in a process group of its own, with a time limit."""

    def __init__(self, check: Check):
        self.check = check
        self._began = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="check-"))
        self._ending = ""
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(check, self._folder)

    def has_ended(self) -> bool:
        """Return True once the child has ended, and end it if it has waited for too long."""
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if done:
            signalled = os.WIFSIGNALED(status)
            reason = (
                signal.Signals(os.WTERMSIG(status)).name if signalled else f"exit code {os.WEXITSTATUS(status)}"
            )
            self._ending = f"the process ended: {reason}"
        elif self._cpu_s() > self.check.time_limit_s:
            self.kill()
            self._ending = f"no answer within {self.check.time_limit_s} s of processor time"
        elif time.monotonic() - self._began > self.check.time_limit_s * _WAITING_FACTOR:
            self.kill()
            self._ending = f"no answer within {self.check.time_limit_s * _WAITING_FACTOR} s"
        return bool(self._ending)

    def _cpu_s(self) -> float:
        """Return the processor time of the child. A limit of the system would coarsen the child's own clock."""
        fields = Path(f"/proc/{self._pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the child and the processes that it has started."""
        # A child that has just started is not yet in a group of its own.
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def line(self) -> dict[str, Any]:
        """Return the result, with everything that identifies it, and delete the child's folder."""
        answer = self._folder / _ANSWER
        if answer.exists():
            result = json.loads(answer.read_text("utf-8"))
        else:
            result = self.check.ended(self._folder, self._ending)
        shutil.rmtree(self._folder, ignore_errors=True)
        seconds = round(time.monotonic() - self._began, 1)
        return {"key": self.check.key, **self.check.labels, **result, "seconds": seconds}


def _run_child(check: Check, folder: Path) -> None:
    os.setsid()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        result = check.run(folder)
        partial = folder / f"{_ANSWER}.partial"
        partial.write_text(json.dumps(result), "utf-8")
        partial.rename(folder / _ANSWER)
    except Exception:  # noqa: BLE001 - the end of the log is the reason
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)
