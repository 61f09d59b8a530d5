"""sweep: check every class on every target, each in its own child process, and keep the results as JSON lines."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.architectures.tiny_models import ModelClass
from benchmarks.forked_checks import COMPILE_MODULES, run_checks, target_versions
from compileflow.validation.report import environment

# Targets that check every class, and those that check one class in three.
ALL_CLASSES_TARGETS = ("onnx-runtime", "openvino")
SAMPLE_TARGETS = ("torchscript", "aot-inductor")
# Targets that check every decoder.
DECODER_TARGETS = ("openvino", "onnx-runtime")
_TIME_LIMIT_S = {"aot-inductor": 400}
_DEFAULT_TIME_LIMIT_S = 180
# For each target.
DECODER_TIME_LIMIT_S = 60


def jobs(classes: Iterable[ModelClass], targets: Iterable[str]) -> Iterator[tuple[ModelClass, str]]:
    """Yield the pairs of class and target to check, target by target."""
    classes = list(classes)
    for target in targets:
        for model_class in classes:
            if target in ALL_CLASSES_TARGETS or model_class.hf_task.generates or in_sample(model_class):
                yield model_class, target


def in_sample(model_class: ModelClass) -> bool:
    """Return True for one class in three: by a checksum of its name, so that the choice never changes."""
    return zlib.crc32(model_class.name.encode()) % 3 == 0


def key_of(model_class: ModelClass, target: str) -> str:
    """Return the key of a result: task, model type, target and versions."""
    return f"{model_class.hf_task.value}/{model_class.model_type}/{target}/{target_versions(target)}"


def sweep(
    pairs: Iterable[tuple[ModelClass, str]],
    path: Path,
    *,
    children: int,
    stop_after_s: float,
    again: tuple[str, ...] = (),
) -> int:
    """Check the pairs that have no result yet, and append their results to a file; see `run_checks`.

    Returns:
        Number of pairs that still have no result.
    """
    return run_checks(
        (_ClassCheck(model_class, target) for model_class, target in pairs),
        path,
        modules=("benchmarks.architectures.check", "benchmarks.architectures.decoders", *COMPILE_MODULES),
        children=children,
        stop_after_s=stop_after_s,
        again=again,
    )


@dataclass(frozen=True)
class _ClassCheck:
    """The check of one class on one target."""

    model_class: ModelClass
    target: str

    @property
    def key(self) -> str:
        return key_of(self.model_class, self.target)

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "task": self.model_class.hf_task.value,
            "model_type": self.model_class.model_type,
            "class": self.model_class.name,
            "target": self.target,
            "versions": target_versions(self.target),
            "processor": environment(threads=1)["processor"],
        }

    @property
    def time_limit_s(self) -> int:
        if self.model_class.hf_task.generates:
            return DECODER_TIME_LIMIT_S
        return _TIME_LIMIT_S.get(self.target, _DEFAULT_TIME_LIMIT_S)

    def run(self, folder: Path) -> dict[str, Any]:
        from benchmarks.architectures.check import check
        from benchmarks.architectures.decoders import check_decoder

        make_check = check_decoder if self.model_class.hf_task.generates else check
        return asdict(make_check(self.model_class, self.target, folder))

    def ended(self, folder: Path, reason: str) -> dict[str, Any]:
        is_compiling = (folder / "artifact").exists()
        return {
            "outcome": "fails" if is_compiling else "transformers",
            "stage": "compile" if is_compiling else "reference",
            "reason": reason,
            "worst": 0.0,
        }

    def summary(self, line: dict[str, Any]) -> str:
        return (
            f"{line['task']}/{line['model_type']} {line['target']} {line['outcome']} {line['stage']} "
            f"{line['reason'][:100]}"
        )
