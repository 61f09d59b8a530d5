"""Target auto: the run tries every candidate, the objective chooses one, and the others give their reasons."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.states import State

from compileflow import catalog
from compileflow.catalog import open_registry
from compileflow.errors import SpecError, VerdictError
from compileflow.selection.comparison_file import export_comparison, read_comparison
from compileflow.serving.model import CompiledModel
from compileflow.spec import HfTask
from flows.compile_model import CompileResult, compile_model
from tests.conftest import ModelFactory
from tests.steps import Pipeline

_BROKEN = """
from compileflow.errors import CompileError
from compileflow.targets.torchscript import TorchScriptTarget

class BrokenTarget(TorchScriptTarget):
    name = "broken"

    def compile(self, source_dir, component, out_dir):
        raise CompileError("The toolchain refused the model: no kernel for Gelu.", hint="Try another target.")
"""


@pytest.fixture
def broken_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a third party's target whose compile always fails."""
    info = tmp_path / "plugins" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compileflow.targets]\nbroken = broken_plugin:BrokenTarget\n")
    (tmp_path / "plugins" / "broken_plugin.py").write_text(_BROKEN)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    catalog._with_entry_points.cache_clear()
    yield "broken"
    catalog._with_entry_points.cache_clear()
    sys.modules.pop("broken_plugin", None)


def run(pipeline: Pipeline, model: Path, **auto: Any) -> State[CompileResult]:
    auto = {"targets": ["torchscript", "onnx-runtime"], "precisions": ["fp32"]} | auto
    return compile_model(pipeline.request(model, target="auto", auto=auto), return_state=True)


def test_winner_is_an_ordinary_registered_artifact(
    pipeline: Pipeline, tiny_model: ModelFactory, broken_target: str
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    targets = ["torchscript", "onnx-runtime", "openvino", broken_target]
    result = run(pipeline, model, targets=targets).result()
    comparison = read_comparison(result.comparison_uri)
    outcomes = {candidate.target: candidate.outcome for candidate in comparison.candidates}
    assert outcomes.pop("broken") == "error"
    # What is much slower in the first round is not validated.
    assert {"pass"} <= set(outcomes.values()) <= {"pass", "unvalidated"}
    assert "no kernel for Gelu" in "\n".join(comparison.comparison_notes())
    winner = comparison.candidates[comparison.winner]
    fastest = min(candidate.latency_ratio for candidate in comparison.candidates if candidate.outcome == "pass")
    assert winner.latency_ratio <= 1.02 * fastest
    assert (result.target, result.artifact.uri) == (winner.target, winner.artifact_uri)
    assert open_registry(pipeline.registry_uri).get(result.version.name, 1) == result.version
    assert result.version.target == winner.target
    loaded = CompiledModel.from_pretrained(result.artifact.uri)
    assert loaded(input_ids=[[2, 5, 3]]).logits.shape == (1, 3)
    loaded.close()
    page = export_comparison(result.comparison_uri, pipeline.settings).read_text("utf-8")
    assert "<svg" in page
    assert all(candidate.label in page for candidate in comparison.candidates)


@pytest.mark.slow
def test_second_run_measures_nothing_again_and_gives_the_same_version(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    first = run(pipeline, model).result()
    counts = dict(pipeline.counts)
    second = run(pipeline, model).result()
    assert pipeline.counts == counts == {"compile": 2, "validate": 2}
    assert second.version == first.version
    comparison = read_comparison(second.comparison_uri)
    assert all(candidate.cached for candidate in comparison.candidates)


@pytest.mark.slow
def test_size_is_another_objective_and_wins_another_candidate(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    fields = {"precisions": [], "targets": ["onnx-runtime"], "objective": {"goal": "size"}}
    comparison = read_comparison(run(pipeline, model, **fields).result().comparison_uri)
    passed = [candidate for candidate in comparison.candidates if candidate.outcome == "pass"]
    assert {candidate.precision for candidate in comparison.candidates} == {"fp32", "int8"}
    assert comparison.candidates[comparison.winner].size_bytes == min(candidate.size_bytes for candidate in passed)


def test_nothing_is_registered_when_no_candidate_keeps_to_the_budget(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    state = run(pipeline, model, objective={"goal": "latency", "max_size_bytes": 1})
    assert state.is_failed()
    assert state.message == "None of 2 candidates can be chosen: 2 exceeded the size budget."
    error = state.result(raise_on_failure=False)
    assert isinstance(error, VerdictError)
    assert "Run: compileflow inspect file://" in error.hint
    assert list(open_registry(pipeline.registry_uri).versions()) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_options": {"opset": 18}}, "Target 'auto' takes no target options, got opset"),
        ({"steps": {"validate": False}}, "the validate step is off"),
        ({"auto": {"targets": ["onx-runtime"]}}, "Unknown target 'onx-runtime'"),
        (
            {"auto": {"targets": ["onnx-runtime"], "precisions": ["bf16"]}},
            "compiles text-classification in a requested precision",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_compiled(
    pipeline: Pipeline, tiny_model: ModelFactory, fields: dict[str, Any], reason: str
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="auto", **fields)
    state = compile_model(request, return_state=True)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, SpecError)
    assert reason in str(error)
    assert pipeline.counts["compile"] == 0


def test_fault_that_all_candidates_share_is_the_reason(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    request = pipeline.request(
        tiny_model(HfTask.FEATURE_EXTRACTION),
        target="auto",
        hf_task="text-classification",
        auto={"precisions": ["fp32"], "targets": ["torchscript", "onnx-runtime"]},
    )
    state = compile_model(request, return_state=True)
    assert state.message.startswith(
        "None of 2 candidates can be chosen: 2 ended in an error: The weights hold no classifier"
    )


def test_what_this_machine_cannot_try_is_named_and_not_tried(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    result = run(pipeline, model, targets=["torchscript", "neuronx"]).result()
    comparison = read_comparison(result.comparison_uri)
    outcomes = {candidate.target: candidate.outcome for candidate in comparison.candidates}
    assert outcomes == {"torchscript": "pass", "neuronx": "unavailable"}
    assert any(
        line.startswith("not tried: neuronx") and "not installed" in line for line in comparison.comparison_notes()
    )
