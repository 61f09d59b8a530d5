"""Runs without Prefect: one target or auto, several registries, refused verdicts, progress of the steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_registry
from compileflow.errors import MeasurementError, RegistryError, SpecError, VerdictError
from compileflow.selection.comparison_file import read_comparison
from compileflow.selection.run import run_any_target
from compileflow.selection.search import time_left
from compileflow.spec import HfTask
from compileflow.steps.run import run_request
from tests.conftest import ModelFactory
from tests.steps import Pipeline


class RecordedSteps:
    """Records the steps of a run, with an error if a step ended in one, and the lines of each step."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lines: dict[str, list[str]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        try:
            yield self.lines.setdefault(name, []).append
        except BaseException as error:
            self.names.append(f"{name}: {type(error).__name__}")
            raise
        self.names.append(name)


def test_run_registers_a_version_that_a_second_run_finds(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews")
    progress = RecordedSteps()
    result = run_any_target(request, pipeline.settings, progress=progress)
    assert progress.names == ["fetch", "compile", "validate", "register"]
    assert result.version == open_registry(pipeline.registry_uri).get("reviews", 1)
    assert result.version.flow_run_id is None
    assert result.versions == {pipeline.registry_uri: result.version}
    again = run_any_target(request, pipeline.settings)
    assert again.version == result.version
    assert (again.source.cached, again.artifact.cached) == (True, True)
    assert pipeline.counts == {"compile": 1, "validate": 1}


def test_library_that_validation_lacks_is_reported_before_the_compile(
    pipeline: Pipeline, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compileflow.steps.validate._LIBRARIES", ("numpy", "not-installed"))
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION))
    with pytest.raises(MeasurementError, match=r"not-installed.*pip install 'compileflow\[validation\]'"):
        run_request(request, pipeline.settings)
    assert pipeline.counts["compile"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store_uri": "ftp://host/store"}, "Unknown artifact store 'ftp'"),
        ({"registry_uris": ["redis://host"]}, "Unknown model registry 'redis'"),
        ({"validation": {"examples_path": "missing.txt"}}, "missing.txt do not exist"),
    ],
)
def test_wrong_places_are_refused_before_the_compile(
    pipeline: Pipeline, tiny_model: ModelFactory, fields: dict[str, Any], message: str
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), **fields)
    with pytest.raises(SpecError, match=message):
        run_request(request, pipeline.settings)
    assert pipeline.counts["compile"] == 0


def test_verdict_that_fails_is_not_registered(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    request = pipeline.request(
        tiny_model(HfTask.TEXT_CLASSIFICATION), validation={"latency_pairs": 5, "max_latency_ratio": 1e-6}
    )
    with pytest.raises(VerdictError, match="latency_ratio measured"):
        run_request(request, pipeline.settings)
    assert list(open_registry(pipeline.registry_uri).versions()) == []


def test_registry_that_fails_does_not_stop_the_other_and_the_next_run_completes_it(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    obstacle = tmp_path / "folder"
    obstacle.write_text("a file where a folder should be")
    uris = [f"sqlite:///{obstacle / 'registry.db'}", f"sqlite:///{tmp_path / 'whole.db'}"]
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews", registry_uris=uris)
    with pytest.raises(RegistryError) as caught:
        run_request(request, pipeline.settings)
    assert caught.value.message.startswith(f"Registered in {uris[1]}, but not in {uris[0]}: ")
    obstacle.unlink()
    assert list(run_request(request, pipeline.settings).versions) == uris
    assert pipeline.counts == {"compile": 1, "validate": 1}


def test_register_step_that_is_off_finds_the_version(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    compile_only = pipeline.request(model, steps={"validate": False, "register": False})
    assert run_request(compile_only, pipeline.settings).version is None
    version = run_request(pipeline.request(model), pipeline.settings).version
    result = run_request(compile_only, pipeline.settings)
    assert (result.version, result.validated) == (version, None)


def test_auto_registers_the_winner_and_names_the_candidates_that_failed(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    auto = {"targets": ["torchscript", "onnx-runtime"], "precisions": ["fp32"]}
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="auto", auto=auto)
    progress = RecordedSteps()
    result = run_any_target(request, pipeline.settings, progress=progress)
    assert progress.names == [
        "fetch", "compile torchscript fp32", "compile onnx-runtime fp32", "validate torchscript fp32",
        "validate onnx-runtime fp32", "candidates", "register",
    ]  # fmt: skip
    lines = progress.lines["candidates"]
    assert [re.sub(r"about \d+ (s|min) left", "about N left", line) for line in lines] == [
        "compile 1 of 2: torchscript fp32",
        "compile 2 of 2: onnx-runtime fp32, about N left",
        "validate 1 of about 2: torchscript fp32",
        "validate 2 of about 2: onnx-runtime fp32, about N left",
    ]
    assert result.comparison_uri is not None
    comparison = read_comparison(result.comparison_uri)
    assert [candidate.outcome for candidate in comparison.candidates] == ["pass", "pass"]
    # The race times all of them with one common source model.
    assert (
        len({tuple(timing.reference_p50_ms for timing in rival.latencies) for rival in comparison.candidates}) == 1
    )
    assert comparison.winner is not None
    winner = comparison.candidates[comparison.winner]
    assert (result.target, result.artifact.uri) == (winner.target, winner.artifact_uri)
    assert open_registry(pipeline.registry_uri).versions() == [result.version]

    hopeless = request.auto.model_copy(
        update={"objective": request.auto.objective.model_copy(update={"max_size_bytes": 1})}
    )
    with pytest.raises(VerdictError, match="2 exceeded the size budget") as caught:
        run_any_target(request.model_copy(update={"auto": hopeless}), pipeline.settings)
    assert "compileflow inspect file://" in caught.value.hint
    assert len(open_registry(pipeline.registry_uri).versions()) == 1


def test_auto_goes_on_when_a_candidate_fails(
    pipeline: Pipeline, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SpecError("The toolchain refused the model.")

    monkeypatch.setattr("compileflow.targets.onnx_runtime.OnnxRuntimeTarget.toolchain", refuse)
    auto = {"targets": ["torchscript", "onnx-runtime"], "precisions": ["fp32"]}
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="auto", auto=auto)
    progress = RecordedSteps()
    result = run_any_target(request, pipeline.settings, progress=progress)
    assert result.target == "torchscript"
    assert "compile onnx-runtime fp32: SpecError" in progress.names
    assert read_comparison(str(result.comparison_uri)).candidates[1].outcome == "error"


def test_time_that_is_left_grows_with_the_candidates_that_are_left() -> None:
    # Three times 70 s, twice 40 s, once 200 s.
    assert [time_left(0, 4, 0.0), time_left(1, 3, 70.0), time_left(2, 2, 80.0), time_left(3, 1, 600.0)] == [
        "",
        ", about 4 min left",
        ", about 80 s left",
        ", about 3 min left",
    ]
