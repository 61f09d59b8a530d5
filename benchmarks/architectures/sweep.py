"""sweep: check every class on every target, each in its own child process, and keep the results as JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.architectures.tiny_models import ModelClass

# Targets that check every class, and those that check one class in three.
ALL_CLASSES_TARGETS = ("onnx-runtime", "openvino")
SAMPLE_TARGETS = ("torchscript", "aot-inductor")
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
    pairs: Iterable[tuple[ModelClass, str]], path: Path, *, stop_after_s: float, again: tuple[str, ...] = ()
) -> int:
    """Check the pairs that have no result yet, and append their results to a file.

    Args:
        pairs: Classes and targets.
        path: File of results, one JSON object in a line.
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
    for number, (model_class, target) in enumerate(todo):
        if time.monotonic() - start > stop_after_s:
            return len(todo) - number
        began = time.monotonic()
        result = _check_in_child(model_class, target)
        line = {
            "key": key_of(model_class, target),
            "task": model_class.hf_task.value,
            "model_type": model_class.model_type,
            "class": model_class.name,
            "target": target,
            **result,
            "seconds": round(time.monotonic() - began, 1),
            "versions": versions(target),
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{number + 1}/{len(todo)} {line['task']}/{line['model_type']} {target}: {line['outcome']} "
            f"{line['stage']} {line['reason'][:100]} {line['seconds']} s",
            flush=True,
        )
    return 0


def _import_toolchains() -> None:
    """Import once what every child needs: a child is a fork of this process and starts in milliseconds."""
    import torch
    import transformers

    for name in _TOOLCHAIN_MODULES:
        import_module(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def _check_in_child(model_class: ModelClass, target: str) -> dict[str, Any]:
    """Run one check in a fork of this process, in its own process group, and kill it at the time limit."""
    folder = Path(tempfile.mkdtemp(prefix="architecture-"))
    answer = folder / "result.json"
    child = os.fork()
    if child == 0:
        _child(model_class, target, folder, answer)
    try:
        limit = _TIME_LIMIT_S.get(target, _DEFAULT_TIME_LIMIT_S)
        status = _wait(child, limit)
        if answer.exists():
            return dict(json.loads(answer.read_text("utf-8")))
        stage = "transformers" if not (folder / "artifact").exists() else "compile"
        outcome = "transformers" if stage == "transformers" else "fails"
        reason = f"no answer within {limit} s" if status is None else f"the process ended: {_ending(status)}"
        return {"outcome": outcome, "stage": stage, "reason": reason, "worst": 0.0}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(model_class: ModelClass, target: str, folder: Path, answer: Path) -> None:
    os.setsid()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        import resource
        import warnings

        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from benchmarks.architectures.check import check

        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        result = check(model_class, target, folder)
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(result)), "utf-8")
        partial.rename(answer)
    finally:
        os._exit(0)


def _wait(child: int, limit_s: float) -> int | None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"
