"""The cache: which changes miss, which do not, and the reason that a miss gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compileflow.artifact.open import open_artifact
from compileflow.catalog import open_store
from compileflow.errors import StepOffError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps import validate as validate_step
from compileflow.steps.values import ValidatedArtifact
from compileflow.targets.torchscript import TorchScriptTarget
from compileflow.validation.measure import latency
from tests.conftest import ModelFactory
from tests.steps import Pipeline


@pytest.fixture
def model(tiny_model: ModelFactory, tmp_path: Path) -> Path:
    """A copy of a model, which the test may change."""
    return Path(shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), tmp_path / "model"))


def test_second_run_compiles_and_validates_nothing_and_says_so(pipeline: Pipeline, model: Path) -> None:
    first = pipeline.run(pipeline.request(model))
    again = pipeline.request(model)
    artifact = pipeline.compile(again)
    validated = pipeline.validate(again, artifact)
    assert pipeline.counts == {"compile": 1, "validate": 1}
    assert artifact.cached
    assert validated.cached
    assert "unchanged" in artifact.why
    assert pipeline.run(again) == first


def test_moved_model_hits(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    pipeline.compile(pipeline.request(model))
    assert pipeline.compile(pipeline.request(Path(model.rename(tmp_path / "elsewhere")))).cached


def flip_weight(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def touch_tokenizer(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def rename_label(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace("neutral", "indifferent"))


def add_code(model: Path) -> None:
    (model / "modeling.py").write_text("# custom code\n")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (flip_weight, "weights model.safetensors"),
        (touch_tokenizer, "tokenizer tokenizer_config.json"),
        (rename_label, "config config.json"),
        (add_code, "code modeling.py (added)"),
    ],
)
def test_changed_file_misses_and_is_named(
    pipeline: Pipeline, model: Path, change: Callable[[Path], None], part: str
) -> None:
    pipeline.compile(pipeline.request(model))
    change(model)
    artifact = pipeline.compile(pipeline.request(model))
    assert not artifact.cached
    assert artifact.why == f"changed: {part}"
    assert f"not cached: changed: {part}" in pipeline.lines
    assert pipeline.counts["compile"] == 2


def test_unrelated_file_hits(pipeline: Pipeline, model: Path) -> None:
    pipeline.compile(pipeline.request(model))
    (model / "README.md").write_text("a new paragraph")
    (model / "checkpoint-500").mkdir()
    (model / "checkpoint-500" / "model.safetensors").write_bytes(b"a training run's leftovers")
    assert pipeline.compile(pipeline.request(model)).cached


def test_changed_spec_field_misses_and_is_named(pipeline: Pipeline, model: Path) -> None:
    pipeline.compile(pipeline.request(model))
    artifact = pipeline.compile(pipeline.request(model, shape_buckets=[{"batch_size": 2, "sequence_length": 64}]))
    assert not artifact.cached
    assert artifact.why.startswith("changed: spec.default.shape_buckets")


def test_changed_toolchain_misses_and_shows_both_versions(
    pipeline: Pipeline, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain = TorchScriptTarget().toolchain()
    pipeline.compile(pipeline.request(model))
    monkeypatch.setattr(TorchScriptTarget, "toolchain", lambda self: toolchain | {"torch": "99.0"})
    artifact = pipeline.compile(pipeline.request(model))
    assert artifact.why == f"changed: toolchain.torch ({toolchain['torch']} -> 99.0)"


def test_vanished_artifact_is_a_miss(pipeline: Pipeline, model: Path) -> None:
    first = pipeline.compile(pipeline.request(model))
    store = Path(pipeline.store_uri.removeprefix("file://"))
    (store / "manifests" / "sha256" / f"{first.digest}.json").unlink()
    second = pipeline.compile(pipeline.request(model))
    assert not second.cached
    assert "the store has lost its record" in second.why
    assert open_store(pipeline.store_uri).exists(second.digest)


def test_vanished_blob_is_a_miss_and_is_made_anew(pipeline: Pipeline, model: Path) -> None:
    first = pipeline.compile(pipeline.request(model))
    store = Path(pipeline.store_uri.removeprefix("file://"))
    listing = json.loads((store / "manifests" / "sha256" / f"{first.digest}.json").read_text())
    graph = next(entry["sha256"] for entry in listing["files"] if entry["path"].endswith("model.pt"))
    (store / "blobs" / "sha256" / graph[:2] / graph).unlink()
    second = pipeline.compile(pipeline.request(model))
    assert not second.cached
    assert open_store(pipeline.store_uri).exists(second.digest)


def test_moved_home_hits_and_its_versions_load(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    request = pipeline.request(model, name="moved")
    pipeline.run(request)
    home = pipeline.settings.home_dir.rename(tmp_path / "moved home")
    moved = Pipeline(pipeline.settings.model_copy(update={"home": home}), pipeline.counts)
    artifact = moved.compile(request)
    validated = moved.validate(request, artifact)
    assert (artifact.why, validated.why) == ("every part of its key is unchanged",) * 2
    for uri in (moved.fetch(request).stored_uri, artifact.uri, validated.report_uri):
        assert uri.startswith(f"{moved.store_uri}/")
    assert open_artifact("registry:moved", settings=moved.settings).digest == artifact.digest


def test_changed_validation_setting_validates_again(pipeline: Pipeline, model: Path) -> None:
    request = pipeline.request(model)
    artifact = pipeline.compile(request)
    pipeline.validate(request, artifact)
    changed_request = pipeline.request(model, validation={"latency_pairs": 6})
    validated = pipeline.validate(changed_request, artifact)
    assert not validated.cached
    assert validated.why == "changed: validation.latency_pairs (5 -> 6)"


def test_changed_examples_validate_again_and_are_named(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    examples = tmp_path / "examples.txt"
    examples.write_text("It arrived on time.\nIt did not.\n")
    request = pipeline.request(model, validation={"latency_pairs": 5, "examples_path": str(examples)})
    artifact = pipeline.compile(request)
    pipeline.validate(request, artifact)
    examples.write_text("It arrived on time.\nIt never did.\n")
    assert pipeline.validate(request, artifact).why == "changed: examples"


def test_suite_of_a_user_counts_by_its_content(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    suite = (
        "{schema_version: 1, name: ours, limits: {}, gates: [{gate: few_flips, says: flips, table: scalars, "
        "type: expect_column_maximum_to_be_at_most, metric: confident_flips, limit: LIMIT}]}"
    )

    def validate(name: str, limit: int) -> ValidatedArtifact:
        (tmp_path / name).write_text(suite.replace("LIMIT", str(limit)))
        settings = {"latency_pairs": 5, "suite_path": str(tmp_path / name)}
        return pipeline.validate(pipeline.request(model, validation=settings), artifact)

    artifact = pipeline.compile(pipeline.request(model))
    first = validate("ours.yaml", 5)
    assert first.reason.endswith(", 1 of them of the suite ours")
    assert validate("moved.yaml", 5).cached
    assert validate("moved.yaml", 6).why == "changed: user suite"
    assert pipeline.counts == {"compile": 1, "validate": 2}


def test_other_shipped_examples_validate_again(
    pipeline: Pipeline, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pipeline.request(model)
    artifact = pipeline.compile(request)
    pipeline.validate(request, artifact)
    real = validate_step.sample_examples
    monkeypatch.setattr(validate_step, "sample_examples", lambda *arguments: (*real(*arguments)[:2], "0" * 64))
    assert pipeline.validate(request, artifact).why == "changed: examples"


def test_refused_artifact_is_measured_again(pipeline: Pipeline, model: Path) -> None:
    request = pipeline.request(model, validation={"latency_pairs": 5, "max_latency_ratio": 1e-6})
    artifact = pipeline.compile(request)
    assert pipeline.validate(request, artifact).outcome == "fail"
    assert not pipeline.validate(request, artifact).cached
    assert pipeline.counts["validate"] == 2


def test_an_artifact_of_another_request_fails(pipeline: Pipeline, model: Path) -> None:
    artifact = pipeline.compile(pipeline.request(model))
    longer_request = pipeline.request(model, shape_buckets=[{"batch_size": 1, "sequence_length": 32}])
    validated = pipeline.validate(longer_request, artifact)
    assert validated.outcome == "fail"
    assert "manifest_claims" in validated.reason


def test_gate_that_a_busy_machine_left_unjudged_is_measured_again(pipeline: Pipeline, model: Path) -> None:
    request = pipeline.request(model, validation={"latency_pairs": 5, "max_latency_ratio": 1e-6})
    artifact = pipeline.compile(request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "disturbance", lambda *_, **__: "other processes used 1.9 of 2 processors")
        validated = pipeline.validate(request, artifact)
    assert validated.outcome == "pass"
    assert "latency_ratio not judged: measured on a busy machine (other processes used 1.9" in validated.reason
    assert [name for name in validated.figures if name.startswith("latency")] == ["latency_on_busy_machine"]
    # The same request: now the gate is judged.
    assert pipeline.validate(request, artifact).outcome == "fail"


def test_steps_that_are_off_reuse_earlier_results(pipeline: Pipeline, model: Path) -> None:
    version = pipeline.run(pipeline.request(model))
    shutil.rmtree(model)
    off = {"fetch": False, "compile": False, "validate": False}
    assert pipeline.run(pipeline.request(model, steps=off)) == version


@pytest.mark.parametrize(
    ("off", "missing"),
    [("fetch", "has no source model from"), ("compile", "has no artifact of"), ("validate", "has no report on")],
)
def test_step_that_is_off_names_the_missing_result(
    pipeline: Pipeline, model: Path, off: str, missing: str
) -> None:
    with pytest.raises(StepOffError, match=missing) as caught:
        pipeline.run(pipeline.request(model, steps={off: False}))
    assert caught.value.hint == f"Switch the {off} step on."


def test_two_runs_at_once_with_one_key_compile_once(settings: Settings, model: Path) -> None:
    command = [sys.executable, "-m", "tests.driver", str(model)]
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir)}
    runs = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum("compiled" in output for output in outputs) == 1
    # Each may wait for a step of the other.
    assert any("waiting for it" in output for output in outputs)
    assert {output.splitlines()[-1] for output in outputs} == {"version 1"}
