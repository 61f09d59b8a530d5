"""Compiles that are broken on purpose in the compiled file: each must fail, and the reason must name the fault.

This file has over 300 lines, because every fault is made in ONNX and in TorchScript.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.catalog import get_target, open_registry, open_store
from compileflow.cli import app
from compileflow.errors import VerdictError
from compileflow.settings import Settings
from compileflow.spec import HfTask, Precision
from compileflow.steps.fetch import fetch_source
from compileflow.steps.register import register_version
from compileflow.steps.reproduce import reproduce
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact
from compileflow.validation.settings import ValidationSettings
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import reseal, validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

CLASSIFY, TAG = HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION
POSITIONS = "bert.embeddings.position_embeddings.weight"
TARGETS = ("onnx-runtime", "torchscript")
# Each fault, and the gate that must name the verdict: the first gate of the suite that can see the fault.
BREAKS = {
    "mask ignored": "mask_respected",
    "token types dropped": "token_types_respected",
    "one weight changed": "max_abs_diff",
    "labels swapped": "label_order",
    "NaN in one position": "finite_outputs",
    "one label missing": "output_shapes",
}


@dataclass(frozen=True)
class Compiled:
    """A healthy, read-only compile and its source model."""

    source_dir: Path
    artifact_dir: Path
    target: str


@pytest.fixture(scope="module", params=TARGETS)
def healthy(
    request: pytest.FixtureRequest,
    tiny_model: ModelFactory,
    in_process: InProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    source_dir = tiny_model(CLASSIFY)
    out_dir = tmp_path_factory.mktemp("healthy") / request.param
    artifact_dir = in_process.compile(source_dir, out_dir, target=request.param, hf_task=CLASSIFY)
    return Compiled(source_dir, artifact_dir, request.param)


def break_artifact(artifact_dir: Path, how: str) -> None:
    """Alter the compiled file as a faulty compiler would write it, and reseal the artifact."""
    name = read_manifest(artifact_dir).target.name
    component = artifact_dir / "components" / "default"
    (_break_onnx if name == "onnx-runtime" else _break_torchscript)(component, how)
    reseal(artifact_dir)


def _broken(healthy: Compiled, tmp_path: Path, how: str) -> Path:
    artifact_dir = tmp_path / "broken"
    shutil.copytree(healthy.artifact_dir, artifact_dir)
    break_artifact(artifact_dir, how)
    return artifact_dir


def _break_onnx(component: Path, how: str) -> None:
    import onnx
    from onnx import helper, numpy_helper

    path = component / "model.onnx"
    model = onnx.load(str(path))
    (component / "model.onnx.data").unlink()
    graph = model.graph
    if how in ("mask ignored", "token types dropped"):
        name, value = ("attention_mask", 1) if how == "mask ignored" else ("token_type_ids", 0)
        for node in graph.node:
            node.input[:] = ["constant_ids" if value == name else value for value in node.input]
        fill = helper.make_tensor("fill", onnx.TensorProto.INT64, [1], [value])
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["ids_shape"], ["constant_ids"], value=fill))
        graph.node.insert(0, helper.make_node("Shape", ["input_ids"], ["ids_shape"]))
    elif how in ("labels swapped", "one label missing"):
        labels = graph.output[0].type.tensor_type.shape.dim[-1]
        order = list(range(labels.dim_value))
        order[:2] = [1, 0]
        if how == "one label missing":
            order = order[1:]
            labels.dim_value -= 1
        for node in graph.node:
            node.output[:] = ["logits_before" if value == "logits" else value for value in node.output]
        graph.initializer.append(numpy_helper.from_array(np.array(order), "label_order"))
        graph.node.append(helper.make_node("Gather", ["logits_before", "label_order"], ["logits"], axis=-1))
    else:
        (tensor,) = (weight for weight in graph.initializer if weight.name == POSITIONS)
        tensor.CopyFrom(numpy_helper.from_array(_altered(numpy_helper.to_array(tensor), how), POSITIONS))
    onnx.save(model, str(path))


def _break_torchscript(component: Path, how: str) -> None:
    holder = torch.jit.load(str(component / "model.pt"))
    weights = holder.state_dict()
    if how in ("one weight changed", "NaN in one position"):
        # The buckets share their weights, so altering one bucket alters them all.
        (name, *_) = (key for key in weights if key.endswith(POSITIONS))
        weights[name].copy_(torch.as_tensor(_altered(weights[name].numpy(), how)))
    elif how == "labels swapped":
        for ending in ("classifier.weight", "classifier.bias"):
            (name, *_) = (key for key in weights if key.endswith(ending))
            weights[name][:2] = weights[name][:2].flip(0).clone()
    else:
        broken = torch.nn.Module()
        for name, graph in holder.named_children():
            setattr(broken, name, Faulty(graph, how))
        holder = torch.jit.script(Holder(dict(broken.named_children())))
    torch.jit.save(holder, str(component / "model.pt"))


class Faulty(torch.nn.Module):
    """Wraps a traced graph and spoils its inputs or outputs."""

    def __init__(self, graph: Any, how: str):
        super().__init__()
        self.graph = graph
        self.how = how

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor]:
        if self.how == "mask ignored":
            mask = torch.ones_like(mask)
        if self.how == "token types dropped":
            types = torch.zeros_like(types)
        if self.how == "raises on long inputs" and ids.shape[1] > 16:
            raise RuntimeError("no kernel for this shape")
        logits = self.graph(ids, mask, types)[0]
        if self.how == "one label missing":
            logits = logits[..., 1:]
        return (logits,)


class Holder(torch.nn.Module):
    """Holds one graph per bucket, as the target does."""

    def __init__(self, graphs: dict[str, torch.nn.Module]):
        super().__init__()
        for name, graph in graphs.items():
            setattr(self, name, graph)


def _altered(weights: np.ndarray, how: str) -> np.ndarray:
    altered = weights.copy()
    if how == "one weight changed":
        altered[2, 0] += 0.5
    else:
        altered[40, 0] = np.nan
    assert (altered != weights).sum() == 1
    return altered


def test_the_healthy_compile_passes(healthy: Compiled, tmp_path: Path) -> None:
    proof = validate_here(healthy.source_dir, healthy.artifact_dir, tmp_path / "report")
    assert proof.outcome == "pass", proof.reason
    assert {gate["outcome"] for gate in proof.report["verdict"]["gates"]} == {"pass"}
    assert proof.gate("token_types_respected")["measured"] < 1e-4


def test_the_limits_of_a_target_win_over_those_of_the_suite(
    healthy: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = type(get_target(read_manifest(healthy.artifact_dir).target.name))
    limits = {Precision.FP32: {"rel_l2": -1.0}, Precision.BF16: {"max_abs_diff": -1.0}}
    monkeypatch.setattr(target, "default_gates", limits, raising=False)
    proof = validate_here(healthy.source_dir, healthy.artifact_dir, tmp_path / "report")
    assert (proof.outcome, proof.gate("rel_l2")["limit"]) == ("fail", -1.0)
    assert proof.gate("max_abs_diff")["outcome"] == "pass"


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_compile_fails_and_the_reason_names_the_fault(
    healthy: Compiled, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact_dir = _broken(healthy, tmp_path, how)
    proof = validate_here(healthy.source_dir, artifact_dir, tmp_path / "report")
    assert proof.outcome == "fail", proof.reason
    assert proof.reason.startswith(f"fail: {BREAKS[how]} measured"), proof.reason
    assert proof.gate(BREAKS[how])["outcome"] == "fail"
    assert (tmp_path / "report" / "report.html").stat().st_size > 0
    assert proof.report["failure"]["gate"] == BREAKS[how]
    if proof.report["failure"]["figure"]["gate"] == BREAKS[how]:
        bundle = tmp_path / "report" / "bundle"
        script = runpy.run_path(str(bundle / "reproduce.py"))
        assert reproduce(script["FAILURE"], script["ARRAYS"], folder=bundle, arguments=[]) == 1
        measured = f"{proof.gate(BREAKS[how])['measured']:.4g}"
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"{BREAKS[how]} of logits, case "), line
        assert f": {measured}, the limit is" in line
        assert line.endswith(f"the report says {measured}")


def test_other_gates_see_an_ignored_mask_as_well(healthy: Compiled, tmp_path: Path) -> None:
    artifact_dir = _broken(healthy, tmp_path, "mask ignored")
    proof = validate_here(healthy.source_dir, artifact_dir, tmp_path / "report")
    assert proof.gate("rel_l2")["outcome"] == "fail"
    assert proof.gate("label_order")["outcome"] == "pass"
    assert proof.gate("token_types_respected")["outcome"] == "pass"


def test_a_bucket_that_raises_fails_and_the_report_has_the_error(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    source_dir = tiny_model(CLASSIFY)
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target="torchscript", hf_task=CLASSIFY)
    break_artifact(artifact_dir, "raises on long inputs")
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report")
    assert proof.reason.startswith("fail: output_shapes measured 0"), proof.reason
    assert "no kernel for this shape" in proof.report["worst"][0]["trouble"]
    assert any("was not timed" in note for note in proof.report["verdict"]["notes"])


@pytest.mark.parametrize("target", ["torchscript", pytest.param("onnx-runtime", marks=pytest.mark.slow)])
def test_swapped_labels_of_a_token_classifier_fail(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, target: str
) -> None:
    source_dir = tiny_model(TAG)
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target=target, hf_task=TAG)
    break_artifact(artifact_dir, "labels swapped")
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report")
    assert proof.outcome == "fail"
    assert proof.reason.startswith("fail: label_order measured 2"), proof.reason
    assert proof.gate("entity_f1")["outcome"] == "fail"


def test_right_logits_under_swapped_names_fail(healthy: Compiled, tmp_path: Path) -> None:
    artifact_dir = tmp_path / "broken"
    shutil.copytree(healthy.artifact_dir, artifact_dir)
    config = json.loads((artifact_dir / "config.json").read_text("utf-8"))
    names = config["id2label"]
    config["id2label"] = names | {"0": names["2"], "2": names["0"]}
    (artifact_dir / "config.json").write_text(json.dumps(config), "utf-8")
    reseal(artifact_dir)
    proof = validate_here(healthy.source_dir, artifact_dir, tmp_path / "report")
    assert proof.reason.startswith("fail: interface_files measured 1"), proof.reason
    assert "config.json differs at id2label.0" in proof.reason
    assert proof.gate("pipeline_answers")["outcome"] == "fail"
    # The graph itself is right.
    assert proof.gate("label_order")["measured"] == 0


@dataclass(frozen=True)
class Stored:
    """A source model and its artifacts in a real store."""

    validate: Callable[[CompiledArtifact], Any]
    register: Callable[..., Any]
    put: Callable[[Path], CompiledArtifact]


@pytest.fixture
def stored(healthy: Compiled, settings: Settings, in_process: InProcess) -> Iterator[Stored]:
    settings = settings.model_copy(update={"threads": 1})
    store_uri, registry_uri = settings.resolved_store_uri(), settings.resolved_registry_uri()
    source = fetch_source(str(healthy.source_dir), None, store_uri=store_uri, settings=settings)

    def put(folder: Path) -> CompiledArtifact:
        stored = open_store(store_uri).put_folder(folder)
        return CompiledArtifact(
            uri=stored.uri,
            digest=stored.digest,
            cache_key="0" * 64,
            size_bytes=stored.size_bytes,
            compile_duration_s=1.0,
            peak_rss_bytes=1,
            cached=False,
            why="",
        )

    def validate(artifact: CompiledArtifact) -> Any:
        validation = ValidationSettings(max_examples=24, latency_pairs=5)
        return validate_artifact(
            source, artifact, validation, store_uri=store_uri, settings=settings, timeout_s=300.0
        )

    def register(artifact: CompiledArtifact, validated: Any, *, allow_warn: bool = True) -> Any:
        return register_version(
            source,
            artifact,
            validated,
            name="tiny",
            allow_warn=allow_warn,
            store_uri=store_uri,
            registry_uri=registry_uri,
            settings=settings,
        )

    with in_process.instead_of_children():
        yield Stored(validate, register, put)


@pytest.mark.parametrize("healthy", ["onnx-runtime"], indirect=True)
def test_a_broken_artifact_in_the_store_is_refused_by_validate_and_by_register(
    healthy: Compiled, stored: Stored, settings: Settings, tmp_path: Path
) -> None:
    artifact = stored.put(_broken(healthy, tmp_path, "mask ignored"))
    validated = stored.validate(artifact)
    assert validated.outcome == "fail"
    assert validated.reason.startswith("fail: mask_respected")
    with open_store(settings.resolved_store_uri()).open_folder(validated.report_digest) as report:
        assert json.loads((report / "report.json").read_text("utf-8"))["verdict"]["outcome"] == "fail"
        assert "mask_respected" in (report / "report.html").read_text("utf-8")

    with pytest.raises(VerdictError, match="fail: mask_respected"):
        stored.register(artifact, validated)
    # A passing report on another artifact does not help.
    good = validated.model_copy(update={"outcome": "pass", "artifact_digest": "f" * 64})
    with pytest.raises(VerdictError, match="got one about ffffffffffff"):
        stored.register(artifact, good)
    warned = validated.model_copy(update={"outcome": "warn"})
    with pytest.raises(VerdictError, match="artifact is not registered"):
        stored.register(artifact, warned, allow_warn=False)
    error = validated.model_copy(update={"outcome": "error", "reason": "error: mask_respected measured no number"})
    # The command line writes "error: " before it.
    with pytest.raises(VerdictError, match=r"^The verdict is error: .*artifact is not registered"):
        stored.register(artifact, error)
    assert not list(open_registry(settings.resolved_registry_uri()).versions())

    # `verify` says the same of the artifact in the store and of a copy.
    copy = copy_artifact(open_artifact(artifact.uri, settings=settings), tmp_path / "copy")
    for location in (artifact.uri, str(copy)):
        outcome = CliRunner().invoke(app, ["verify", location])
        assert outcome.exit_code == 1
        assert (
            f"The last validation refused it: {validated.reason}. Report: {validated.report_uri}" in outcome.stderr
        )


@pytest.mark.parametrize("healthy", ["torchscript"], indirect=True)
def test_a_healthy_artifact_in_the_store_passes_and_is_registered(healthy: Compiled, stored: Stored) -> None:
    artifact = stored.put(healthy.artifact_dir)
    validated = stored.validate(artifact)
    assert (validated.outcome, validated.cached) == ("pass", False)
    assert stored.validate(artifact).cached
    version = stored.register(artifact, validated)
    assert (version.verdict, version.artifact_digest) == ("pass", artifact.digest)
