"""sweep: check every class on every target, each in its own child process, and keep the results as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.architectures.tiny_models import ModelClass

# Targets that check every class, and those that check one class in three.
ALL_CLASSES_TARGETS = ("onnx-runtime", "openvino")
SAMPLE_TARGETS = ("torchscript", "aot-inductor")
_ANSWER = "result.json"
_TIME_LIMIT_S = {"aot-inductor": 400}
_DEFAULT_TIME_LIMIT_S = 180
_TOOLCHAIN_MODULES = (
    "benchmarks.architectures.check",
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


def jobs(classes: Iterable[ModelClass], targets: Iterable[str]) -> Iterator[tuple[ModelClass, str]]:
    """Yield the pairs of class and target to check, target by target."""
    classes = list(classes)
    for target in targets:
        for model_class in classes:
            if target in ALL_CLASSES_TARGETS or in_sample(model_class):
                yield model_class, target


def in_sample(model_class: ModelClass) -> bool:
    """Return True for one class in three: by a checksum of its name, so that the choice never changes."""
    return zlib.crc32(model_class.name.encode()) % 3 == 0


def versions(target: str) -> str:
    """Return the versions that a result of a target depends on."""
    from compileflow.contracts.toolkit import installed_versions

    found = installed_versions(_DISTRIBUTIONS[target])
    return " ".join(f"{name} {version}" for name, version in sorted(found.items()))


def key_of(model_class: ModelClass, target: str) -> str:
    """Return the key of a result: task, model type, target and versions."""
    return f"{model_class.hf_task.value}/{model_class.model_type}/{target}/{versions(target)}"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each key."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, lines)}


def sweep(
    pairs: Iterable[tuple[ModelClass, str]],
    path: Path,
    *,
    children: int,
    stop_after_s: float,
    again: tuple[str, ...] = (),
) -> int:
    """Check the pairs that have no result yet, and append their results to a file.

    Args:
        pairs: Classes and targets.
        path: File of results, one JSON object in a line.
        children: Child processes at a time.
        stop_after_s: Seconds after which no further check starts.
        again: Outcomes that are checked again.

    Returns:
        Number of pairs that still have no result.
    """
    start = time.monotonic()
    results = read_results(path)
    todo = [
        (model_class, target)
        for model_class, target in pairs
        if (result := results.get(key_of(model_class, target))) is None or result["outcome"] in again
    ]
    if not todo:
        return 0
    _import_toolchains()
    path.parent.mkdir(parents=True, exist_ok=True)
    running: list[_Child] = []
    number = ended = 0
    try:
        while running or number < len(todo):
            is_late = time.monotonic() - start > stop_after_s
            while len(running) < children and number < len(todo) and not is_late:
                running.append(_Child(*todo[number]))
                number += 1
            if is_late and not running:
                break
            for child in [child for child in running if child.has_ended()]:
                running.remove(child)
                ended += 1
                line = child.line()
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{ended} of {len(todo)}: {line['task']}/{line['model_type']} {line['target']} "
                    f"{line['outcome']} {line['stage']} {line['reason'][:100]} {line['seconds']} s",
                    flush=True,
                )
            time.sleep(0.02)
    finally:
        for child in running:
            child.kill()
    return len(todo) - number


def _import_toolchains() -> None:
    """Import once what every child needs: a child is a fork of this process and starts in milliseconds."""
    import torch
    import transformers

    for name in _TOOLCHAIN_MODULES:
        import_module(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


class _Child:
    """One check in a fork of this process, in a process group of its own, with a time limit."""

    def __init__(self, model_class: ModelClass, target: str):
        self._model_class, self._target = model_class, target
        self._began = time.monotonic()
        self._limit_s = _TIME_LIMIT_S.get(target, _DEFAULT_TIME_LIMIT_S)
        self._folder = Path(tempfile.mkdtemp(prefix="architecture-"))
        self._ending = ""
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(model_class, target, self._folder)

    def has_ended(self) -> bool:
        """Return True once the child has ended, and end it at the time limit."""
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if done:
            signalled = os.WIFSIGNALED(status)
            reason = (
                signal.Signals(os.WTERMSIG(status)).name if signalled else f"exit code {os.WEXITSTATUS(status)}"
            )
            self._ending = f"the process ended: {reason}"
        elif time.monotonic() - self._began > self._limit_s:
            self.kill()
            self._ending = f"no answer within {self._limit_s} s"
        return bool(self._ending)

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
            is_compiling = (self._folder / "artifact").exists()
            result = {
                "outcome": "fails" if is_compiling else "transformers",
                "stage": "compile" if is_compiling else "reference",
                "reason": self._ending,
                "worst": 0.0,
            }
        shutil.rmtree(self._folder, ignore_errors=True)
        return {
            "key": key_of(self._model_class, self._target),
            "task": self._model_class.hf_task.value,
            "model_type": self._model_class.model_type,
            "class": self._model_class.name,
            "target": self._target,
            **result,
            "seconds": round(time.monotonic() - self._began, 1),
            "versions": versions(self._target),
        }


def _run_child(model_class: ModelClass, target: str, folder: Path) -> None:
    os.setsid()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        result = import_module("benchmarks.architectures.check").check(model_class, target, folder)
        partial = folder / f"{_ANSWER}.partial"
        partial.write_text(json.dumps(asdict(result)), "utf-8")
        partial.rename(folder / _ANSWER)
    finally:
        os._exit(0)
