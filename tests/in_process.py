"""Compile and validate in this process: real work without the start of a child, and each compile only once a run.

The fixture `in_process` is the one way in which tests do that; the fixture `pipeline` builds on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compileflow._process.run_in_child import ChildResult
from compileflow.artifact.manifest import SourceRecord, read_manifest
from compileflow.catalog import get_target
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.local import in_memory
from compileflow.settings import Settings
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps import compile as compile_step
from compileflow.steps import import_older as import_step
from compileflow.steps import race as race_step
from compileflow.steps import settle as settle_step
from compileflow.steps import trial as trial_step
from compileflow.steps import validate as validate_step
from compileflow.steps.build import build_artifact
from compileflow.testing.compiles import compile_once
from compileflow.testing.processes import resolve
from compileflow.validation.measure import latency
from tests.steps import Pipeline

_BUILD = "compileflow.steps.build:build_artifact"
# Shapes for targets with static shapes, by modality.
BUCKETS = {
    modality: tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in shapes)
    for modality, shapes in {
        "text": ((1, 16), (8, 64)),
        "image-text": ((1, 16), (8, 64)),
        "image": ((1, 1), (8, 1)),
        "audio": ((1, 8000), (8, 48000)),
    }.items()
}


class InProcess:
    """Compiles in this process.

    Args:
        shared: Folder in which the processes of a test run share their compiles. None: share nothing.
    """

    def __init__(self, shared: Path | None):
        self._shared = shared

    def compile(
        self,
        source_dir: Path,
        out_dir: Path,
        *,
        target: str,
        hf_task: HfTask,
        components: Sequence[ComponentSpec] | None = None,
        precision: Precision = Precision.FP32,
        options: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> Path:
        """Compile with one thread into `out_dir`, a new folder that the test may write to, and return it.

        Without `components`, a target with static shapes gets those of `BUCKETS`.
        """
        if components is None:
            dynamic = get_target(target).capabilities.dynamic_axes
            components = [ComponentSpec(shape_buckets=() if dynamic else BUCKETS[hf_task.modality])]
        spec = CompileSpec(
            target=target,
            hf_task=hf_task,
            precision=precision,
            components=tuple(components),
            target_options=dict(options or {}),
        )
        out_dir.mkdir(parents=True)
        self.build(
            {
                "source_dir": str(source_dir),
                "out_dir": str(out_dir),
                "spec": spec.model_dump(mode="json"),
                "source": {
                    "uri": source_dir.as_uri(),
                    "revision": "0" * 64,
                    "digest": folder_digest(list_files(source_dir)),
                },
                "threads": 1,
                "calibration": calibration,
            }
        )
        return out_dir

    def compiled(self, source_dir: Path, target: str, hf_task: HfTask) -> Path:
        """Return an artifact that all tests of the run share, as in the conformance suite. Do not write to it."""
        from compileflow.testing.targets import compiled_folder

        assert self._shared is not None
        return compiled_folder(source_dir, target, hf_task, self._shared)

    def build(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what `build_artifact` does, with a copy of the files if the run has compiled the same before."""
        if self._shared is None:
            return build_artifact(request)
        out_dir = Path(request["out_dir"])
        inputs = {name: value for name, value in request.items() if name != "out_dir"}
        folder = compile_once(inputs, self._shared)
        shutil.copytree(folder, out_dir, dirs_exist_ok=True)
        # Models with the same files may come from several places.
        manifest = read_manifest(out_dir)
        source = SourceRecord(**request["source"], architecture=manifest.source.architecture)
        manifest.model_copy(update={"source": source}).write(out_dir)
        return {}

    @contextmanager
    def instead_of_children(self) -> Iterator[dict[str, int]]:
        """Run all steps in this process, as on a quiet machine; count compiles and validations."""
        counts = {"compile": 0, "validate": 0}

        def count(step: str) -> Callable[..., ChildResult]:
            def run(function: str, request: Mapping[str, Any], **_: Any) -> ChildResult:
                counts[step] += 1
                call = self.build if function == _BUILD else resolve(function)
                return ChildResult(call(request), 0.1, 1)

            return run

        def in_this_process(function: str, request: Mapping[str, Any], **_: Any) -> ChildResult:
            return ChildResult(resolve(function)(request), 0.1, 1)

        with pytest.MonkeyPatch.context() as patch:
            for module, step in (
                (compile_step, "compile"),
                (validate_step, "validate"),
                (in_memory, "compile"),
                (import_step, "compile"),
                (settle_step, "validate"),
            ):
                patch.setattr(module, "run_in_child", count(step))
            for module in (race_step, trial_step):
                patch.setattr(module, "run_in_child", in_this_process)
            # Tests run beside each other, so nearly every latency would be marked.
            patch.setattr(latency, "disturbance", lambda *_, **__: "")
            patch.setattr(latency, "settle", lambda: None)
            yield counts

    @contextmanager
    def pipeline(self, settings: Settings) -> Iterator[Pipeline]:
        """Give the four steps with these settings, in this process."""
        with self.instead_of_children() as counts:
            yield Pipeline(settings, counts)
