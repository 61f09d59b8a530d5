"""TargetConformance: the tests that every target must pass. A test class inherits it in two lines.

class TestMyTarget(TargetConformance):
    target_name = "my-target"

The test module needs one fixture, `tiny_model(hf_task)`. It returns the folder of a small BERT-like source model
with at least 64 positions.
"""

# ruff: noqa: S101 - these are pytest tests, in the library so that third parties can inherit them.

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target
from compileflow.contracts import Arrays, ComponentRecord, Runner, Target, TargetOptions
from compileflow.contracts.digests import list_files
from compileflow.errors import InputError, LoadError, SpecError
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.lengths import frames_of, shortest_input
from compileflow.source_model.load import load_source_model
from compileflow.spec import GRAPH_TASKS, CompileSpec, ComponentSpec, HfTask, ShapeBucket
from compileflow.steps.compile import checked_target
from compileflow.testing.compiles import compile_once
from compileflow.testing.pipelines import assert_pipeline_answers_like_the_source_models
from compileflow.testing.shared import shared_folder
from compileflow.testing.state import unchanged_process

TinyModel = Callable[[HfTask], Path]
Load = Callable[[HfTask], tuple[Runner, ComponentRecord, SourceModel]]

BUCKETS = {
    modality: tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in shapes)
    for modality, shapes in {
        "text": ((1, 8), (4, 16), (1, 64)),
        "image-text": ((1, 8), (4, 16), (1, 64)),
        "image": ((1, 1), (4, 1), (8, 1)),
        "audio": ((1, 1600), (3, 4000), (1, 16000)),
    }.items()
}
# Packages that listing the targets must not import, besides the toolchain of the target.
_HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "boto3",
    "neptune",
    "mlflow",
)
_LOOK = """
import sys
from compileflow.catalog import get_target, target_names
for name in target_names():
    target = get_target(name)
    target.probe(), target.toolchain(), target.cpu_features(), target.capabilities, target.Options
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""


def compiled_folder(source_dir: Path, target_name: str, hf_task: HfTask, parent: Path) -> Path:
    """Compile a source model in this process, and return the artifact after moving it to another folder.

    Fails when the compile leaves the process changed. An existing artifact is reused: tests share it, and must not
    write to it.

    Args:
        source_dir: Folder of the source model.
        target_name: Name of a target in the catalog.
        hf_task: Task to compile for.
        parent: Existing folder; tests with the same folder share the artifact.
    """
    return compile_once(compile_request(source_dir, target_name, hf_task), parent)


def compile_request(source_dir: Path, target_name: str, hf_task: HfTask) -> dict[str, object]:
    """Return a request to `build_artifact`, without `out_dir`; static targets get the shapes of `BUCKETS`."""
    capabilities = get_target(target_name).capabilities
    component = ComponentSpec(shape_buckets=() if capabilities.dynamic_axes else BUCKETS[hf_task.modality])
    spec = CompileSpec(
        target=target_name, hf_task=hf_task, precision=capabilities.precisions[0], components=(component,)
    )
    source = {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": "0" * 64}
    return {
        "source_dir": str(source_dir),
        "spec": spec.model_dump(mode="json"),
        "source": source,
        "threads": 1,
    }


def hide_distributions(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make importlib.metadata report these distributions as not installed; without names, all distributions."""
    find = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if not names or name in names:
            raise PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(Distribution, "from_name", staticmethod(from_name))


class TargetConformance:
    """Inherit this class and set `target_name`."""

    target_name: ClassVar[str]
    # Largest absolute difference from the outputs of the source model.
    atol: ClassVar[float] = 1e-5

    @pytest.fixture
    def target(self) -> Target:
        """The target under test."""
        return get_target(self.target_name)

    @pytest.fixture
    def artifact(
        self, target: Target, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[HfTask], OpenArtifact]:
        """Compile once for each task in a session, move the artifact, and open it."""
        availability = target.probe()
        if not availability.can_compile:
            pytest.skip(f"{target.name} cannot compile here: {availability.reason}")

        def make(hf_task: HfTask) -> OpenArtifact:
            return open_artifact(
                compiled_folder(tiny_model(hf_task), target.name, hf_task, shared_folder(tmp_path_factory))
            )

        return make

    @pytest.fixture
    def load(self, target: Target, artifact: Callable[[HfTask], OpenArtifact], tiny_model: TinyModel) -> Load:
        """Return a fresh runner, its record, and the source model that it must equal."""

        def make(hf_task: HfTask) -> tuple[Runner, ComponentRecord, SourceModel]:
            compiled_artifact = artifact(hf_task)
            runner = compiled_artifact.load(
                compiled_artifact.component("default"), device=target.capabilities.devices[0], threads=None
            )
            source = load_source_model(tiny_model(hf_task), hf_task)
            return runner, compiled_artifact.manifest.components["default"], source

        return make

    def test_target_says_what_it_is(self, target: Target) -> None:
        """Names, options and capabilities have the form that forms, tables and specs need."""
        assert isinstance(target, Target)
        assert target.name == self.target_name
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", target.name)
        assert target.version >= 1
        assert target.summary
        assert target.capabilities.hf_tasks
        assert target.capabilities.precisions
        assert target.capabilities.devices
        assert issubclass(target.Options, TargetOptions)
        assert target.Options() == target.Options.model_validate({})
        assert [name for name, field in target.Options.model_fields.items() if not field.description] == []

    def test_listing_and_probing_import_nothing_heavy(self, target: Target) -> None:
        """`compileflow targets` answers at once."""
        process = subprocess.run([sys.executable, "-P", "-c", _LOOK], capture_output=True, text=True, check=True)
        toolchain = {name.replace("-", "_") for name in target.toolchain()}
        assert sorted(set(process.stdout.split()) & (toolchain | set(_HEAVY))) == []

    def test_probe_answers_without_any_toolchain(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without any distribution, probe reports it instead of raising."""
        hide_distributions(monkeypatch)
        availability = target.probe()
        assert target.toolchain() == {}
        assert not availability.can_compile
        assert not availability.can_run
        assert availability.reason
        assert availability.hint

    def test_unknown_option_is_refused_with_the_known_options(self, target: Target) -> None:
        """The error lists the names of the options."""
        spec = CompileSpec(
            target=target.name,
            hf_task=target.capabilities.hf_tasks[0],
            precision=target.capabilities.precisions[0],
            target_options={"no_such_option": 1},
        )
        with pytest.raises(SpecError, match="no_such_option") as error_info:
            checked_target(spec)
        for option in target.Options.model_fields or ("none",):
            assert option in error_info.value.hint

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize over each graph that the target compiles, and each task that these graphs serve.

        Text generation goes on after a call, which this suite does not check.
        """
        tasks_of_target = get_target(self.target_name).capabilities.hf_tasks
        supported_tasks = [task for task in tasks_of_target if not task.generates]
        for name, tasks in (("hf_task", GRAPH_TASKS), ("served_task", tuple(HfTask))):
            if name in metafunc.fixturenames:
                selected = [task for task in tasks if task in supported_tasks]
                metafunc.parametrize(name, selected, ids=[task.value for task in selected])

    def test_moved_artifact_answers_like_the_source_model(
        self, target: Target, load: Load, hf_task: HfTask
    ) -> None:
        """Equal outputs at three shapes, with the names, types and axes of the record."""
        runner, record, source = load(hf_task)
        for rows, length in _shapes(record):
            inputs = _inputs(record, source, rows, length)
            copies = {name: value.copy() for name, value in inputs.items()}
            outputs = runner.run(inputs)
            _assert_close(outputs, source.run(inputs), self.atol)
            assert {name: str(value.dtype) for name, value in outputs.items()} == {
                output.name: output.dtype for output in record.outputs
            }
            frames = frames_of(record.frame_convolutions, length)
            sizes = {"batch": rows, "sequence": length, "frames": frames}
            assert {name: value.shape for name, value in outputs.items()} == {
                output.name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in output.axes)
                for output in record.outputs
            }
            for name, value in copies.items():
                np.testing.assert_array_equal(inputs[name], value)
        runner.close()

    def test_pipeline_answers_like_transformers(
        self, artifact: Callable[[HfTask], OpenArtifact], tiny_model: TinyModel, served_task: HfTask
    ) -> None:
        """The same labels, words, spans and transcripts, and scores within 1e-4, for every form of call."""
        graph_task = served_task.graph_task
        assert_pipeline_answers_like_the_source_models(artifact(graph_task), tiny_model(graph_task), served_task)

    def test_compile_writes_only_into_its_folder(
        self, target: Target, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A compile leaves the home, temporary and working folders and the source model unchanged."""
        if not target.probe().can_compile:
            pytest.skip(f"{target.name} cannot compile here: {target.probe().reason}")
        hf_task = target.capabilities.hf_tasks[0]
        source_dir = tiny_model(hf_task)
        source_files = list_files(source_dir)
        watched_folder = tmp_path / "watched"
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"):
            (watched_folder / name).mkdir(parents=True)
            monkeypatch.setenv(name, str(watched_folder / name))
        (watched_folder / "cwd").mkdir()
        monkeypatch.chdir(watched_folder / "cwd")
        (tmp_path / "out").mkdir()
        run_in_child(
            "compileflow.steps.build:build_artifact",
            compile_request(source_dir, target.name, hf_task) | {"out_dir": str(tmp_path / "out")},
            work_dir=watched_folder / "TMPDIR",
            log_path=tmp_path / "log",
            timeout_s=300,
        )
        assert [path for path in watched_folder.rglob("*") if path.is_file()] == []
        assert list_files(source_dir) == source_files
        assert open_artifact(tmp_path / "out").manifest.target.name == target.name

    @pytest.mark.parametrize("threads", [None, 1])
    def test_compiling_loading_and_calling_leave_the_process_unchanged(
        self,
        target: Target,
        artifact: Callable[[HfTask], OpenArtifact],
        tiny_model: TinyModel,
        threads: int | None,
    ) -> None:
        """Environment, threads, random state, warning filters and working folder stay those of the caller."""
        import torch

        hf_task = target.capabilities.hf_tasks[0]
        compiled_artifact = artifact(hf_task)
        source = load_source_model(tiny_model(hf_task), hf_task)
        record = compiled_artifact.manifest.components["default"]
        inputs = _inputs(record, source, *_shapes(record)[1])
        reference = source.run(inputs)
        count = torch.get_num_threads()
        # A count that differs from `threads`.
        torch.set_num_threads(2)
        try:
            with unchanged_process():
                runner = compiled_artifact.load(
                    compiled_artifact.component("default"), device=None, threads=threads
                )
            with unchanged_process():
                _assert_close(runner.run(inputs), reference, self.atol)
                runner.close()
        finally:
            torch.set_num_threads(count)

    def test_closing_twice_does_nothing_and_a_closed_graph_says_so(self, target: Target, load: Load) -> None:
        """A closed runner refuses calls, and closes again without an error."""
        runner, record, source = load(target.capabilities.hf_tasks[0])
        runner.close()
        runner.close()
        with pytest.raises(InputError, match="closed"):
            runner.run(_inputs(record, source, *_shapes(record)[0]))

    def test_two_graphs_live_in_one_process(self, target: Target, load: Load) -> None:
        """Calling or closing one graph does not change the other."""
        hf_tasks = [task for task in target.capabilities.hf_tasks if task in GRAPH_TASKS][:2]
        loaded = [load(hf_task) for hf_task in (hf_tasks[0], hf_tasks[-1])]
        for _ in range(2):
            for runner, record, source in loaded:
                inputs = _inputs(record, source, *_shapes(record)[1])
                _assert_close(runner.run(inputs), source.run(inputs), self.atol)
        loaded[0][0].close()
        runner, record, source = loaded[1]
        inputs = _inputs(record, source, *_shapes(record)[1])
        _assert_close(runner.run(inputs), source.run(inputs), self.atol)
        runner.close()

    def test_four_threads_at_once_get_the_answers_of_one(self, target: Target, load: Load) -> None:
        """Each caller gets the answer to its input."""
        runner, record, source = load(target.capabilities.hf_tasks[0])
        rows, length = _shapes(record)[1]
        random = np.random.default_rng(0)
        batches = []
        for _ in range(24):
            inputs = _inputs(record, source, rows, length)
            batches.append(inputs | {"input_ids": random.permuted(inputs["input_ids"], axis=1)})
        sequential = [runner.run(inputs) for inputs in batches]
        with ThreadPoolExecutor(4) as threads:
            concurrent = list(threads.map(runner.run, batches))
        for outputs, reference in zip(concurrent, sequential, strict=True):
            _assert_close(outputs, reference, 1e-6)
        name = record.outputs[0].name
        assert not np.allclose(sequential[0][name], sequential[1][name], atol=1e-3)
        runner.close()

    def test_damaged_file_is_refused_with_a_load_error(
        self, target: Target, artifact: Callable[[HfTask], OpenArtifact], tmp_path: Path
    ) -> None:
        """The caller gets a LoadError for any error of the runtime."""
        compiled_artifact = artifact(target.capabilities.hf_tasks[0])
        record = compiled_artifact.manifest.components["default"]
        folder = tmp_path / "component"
        shutil.copytree(compiled_artifact.folder / record.folder, folder)
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"not a graph")
        with pytest.raises(LoadError, match="cannot be loaded"):
            target.load(folder, record, device=target.capabilities.devices[0], threads=None)


def _shapes(record: ComponentRecord) -> list[tuple[int, int]]:
    """Return the smallest, a medium and the largest shape that a graph takes."""
    if record.dynamic_axes:
        if "sequence" not in record.inputs[0].axes:
            return [(1, 1), (3, 1), (5, 1)]
        if record.inputs[0].name != "input_ids":
            shortest = shortest_input(record.frame_convolutions)
            if all(tensor.name != "attention_mask" for tensor in record.inputs):
                # Without a mask, a row cannot be padded to the shortest that the graph takes.
                shortest = max(shortest, int(str(record.load_options.get("shortest", 0))))
            return [(1, shortest), (3, 1700), (2, 16000)]
        return [(1, 1), (3, 17), (5, record.max_sequence_length)]
    return [(bucket.batch_size, bucket.sequence_length) for bucket in record.shape_buckets]


def _inputs(record: ComponentRecord, source: SourceModel, rows: int, length: int) -> Arrays:
    assert record.inputs == source.inputs
    return source.example_arrays(rows, length)


def _assert_close(candidate: Arrays, reference: Arrays, atol: float) -> None:
    assert sorted(candidate) == sorted(reference)
    for name, value in reference.items():
        np.testing.assert_allclose(candidate[name], value, rtol=0, atol=atol, err_msg=name)
