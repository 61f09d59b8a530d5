"""Low precisions block garbage and let honest rounding pass; another model answers for the compiled one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.contracts import Arrays
from compileflow.serving.component import LoadedComponent
from compileflow.source_model import as_tuple_module
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model
from compileflow.spec import HfTask, Precision
from compileflow.validation.measure import rounded_to
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import Proof, validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

CLASSIFY, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.FEATURE_EXTRACTION
Answer = Callable[[SourceModel, Arrays], Arrays]
Prove = Callable[..., Proof]
BF16, INT8 = Precision.BF16, Precision.INT8
MASK_TOKEN_ID = 4
_LOCK = Lock()


@pytest.fixture
def prove(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Prove:
    """Validate a compile for a precision whose graph answers as a function of the source model says."""

    def proved(
        task: HfTask, precision: Precision, answer: Answer, alter: Callable[[Any], None] | None = None
    ) -> Proof:
        source_dir = tiny_model(task)
        model = load_source_model(source_dir, task)
        artifact_dir = tmp_path / "artifact"
        shutil.copytree(in_process.compiled(source_dir, "torchscript", task), artifact_dir)
        manifest = read_manifest(artifact_dir)
        component = manifest.components["default"].model_copy(update={"precision": precision})
        spec = manifest.spec.model_copy(update={"precision": precision})
        (artifact_dir / MANIFEST_NAME).unlink()
        manifest.model_copy(update={"spec": spec, "components": {"default": component}}).write(artifact_dir)
        if alter is not None:
            with torch.no_grad():
                alter(model.model)

        def run(_: LoadedComponent, inputs: Mapping[str, Any]) -> Arrays:
            neutral = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}
            missing = {name: fill(inputs["input_ids"]) for name, fill in neutral.items() if name not in inputs}
            return answer(model, {**missing, **inputs})

        monkeypatch.setattr(LoadedComponent, "run", run)
        return validate_here(source_dir, artifact_dir, tmp_path / "report", max_examples=80)

    return proved


def plain(model: SourceModel, inputs: Arrays) -> Arrays:
    return model.run(inputs)


def rounded(model: SourceModel, inputs: Arrays) -> Arrays:
    # Validation calls from several threads, and a layer that is being rounded belongs to one of them.
    with _LOCK, rounded_to(model.model, INT8):
        return model.run(inputs)


def in_bf16(model: SourceModel, inputs: Arrays) -> Arrays:
    tensors = [torch.as_tensor(inputs[record.name]) for record in model.inputs]
    with torch.inference_mode():
        answers = as_tuple_module(model, BF16)(*tensors)
    return {record.name: answer.numpy() for record, answer in zip(model.outputs, answers, strict=True)}


def constant(model: SourceModel, inputs: Arrays) -> Arrays:
    return {name: np.ones_like(value) for name, value in model.run(inputs).items()}


def without_mask(model: SourceModel, inputs: Arrays) -> Arrays:
    return rounded(model, inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})


def scaled(model: SourceModel, inputs: Arrays) -> Arrays:
    return {name: 1.45 * value for name, value in model.run(inputs).items()}


def shuffle(model: Any) -> None:
    random = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(parameter[torch.randperm(len(parameter), generator=random)])


def skip_a_layer(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "layer.1." in name and "output.dense" in name:
            parameter.zero_()


def lose_the_mask_token(model: Any) -> None:
    model.get_input_embeddings().weight[MASK_TOKEN_ID].neg_()


@pytest.mark.parametrize("task", [CLASSIFY, pytest.param(EMBED, marks=pytest.mark.slow)])
def test_honest_rounding_to_int8_is_not_refused(prove: Prove, task: HfTask) -> None:
    proof = prove(task, INT8, rounded)
    assert proof.outcome in ("pass", "warn"), proof.reason
    typical = proof.gate("typical_error")
    # The floor is the same rounding, on a part of the examples.
    assert typical["multiple"] == pytest.approx(1.0, abs=0.3)
    assert typical["measured"] < typical["limit"]


@pytest.mark.parametrize("task", [EMBED, pytest.param(CLASSIFY, marks=pytest.mark.slow)])
def test_honest_computation_in_bf16_is_not_refused(prove: Prove, task: HfTask) -> None:
    proof = prove(task, BF16, in_bf16)
    assert proof.outcome in ("pass", "warn"), proof.reason
    error = proof.gate("rel_l2")
    assert 1e-3 < error["measured"] < error["limit"]
    # The floor is the rounding of all modules, where autocast rounds those with weights.
    assert 0.2 < error["multiple"] < 2.0


@pytest.mark.parametrize(
    ("answer", "alter", "gate"),
    [
        pytest.param(in_bf16, lose_the_mask_token, "rel_l2", id="wrong row", marks=pytest.mark.slow),
        pytest.param(in_bf16, skip_a_layer, "rel_l2", id="layer skipped", marks=pytest.mark.slow),
        pytest.param(scaled, None, "rel_l2", id="logits x 1.45", marks=pytest.mark.slow),
        pytest.param(without_mask, None, "mask_respected", id="mask ignored", marks=pytest.mark.slow),
    ],
)
def test_garbage_at_bf16_fails_by_a_named_gate(
    prove: Prove, answer: Answer, alter: Callable[[Any], None] | None, gate: str
) -> None:
    proof = prove(EMBED, BF16, answer, alter)
    assert proof.outcome == "fail", proof.reason
    assert proof.reason.startswith(f"fail: {gate} measured"), proof.reason


@pytest.mark.parametrize(
    ("task", "answer", "alter", "gate"),
    [
        pytest.param(EMBED, constant, None, "typical_error", id="one constant vector"),
        pytest.param(EMBED, without_mask, None, "mask_obeyed", id="mask ignored", marks=pytest.mark.slow),
        pytest.param(CLASSIFY, scaled, None, "typical_error", id="logits x 1.45", marks=pytest.mark.slow),
        pytest.param(EMBED, rounded, lose_the_mask_token, "special_token_error", id="wrong row of one token"),
        pytest.param(EMBED, plain, shuffle, "typical_error", id="shuffled weights", marks=pytest.mark.slow),
        pytest.param(EMBED, plain, skip_a_layer, "typical_error", id="layer skipped", marks=pytest.mark.slow),
    ],
)
def test_garbage_at_int8_fails_by_a_named_gate(
    prove: Prove, task: HfTask, answer: Answer, alter: Callable[[Any], None] | None, gate: str
) -> None:
    proof = prove(task, INT8, answer, alter)
    assert proof.outcome == "fail", proof.reason
    assert proof.reason.startswith(f"fail: {gate} measured"), proof.reason


@pytest.mark.parametrize(
    ("precision", "least", "most"), [(INT8, 1e-3, 0.3), (BF16, 1e-4, 3e-2), (Precision.FP16, 1e-5, 3e-3)]
)
def test_rounding_leaves_the_source_model_as_it_was(
    tiny_model: ModelFactory, precision: Precision, least: float, most: float
) -> None:
    model = load_source_model(tiny_model(CLASSIFY), CLASSIFY)
    inputs = model.example_arrays(2, 16)
    before = model.run(inputs)["logits"]
    with rounded_to(model.model, precision):
        during = model.run(inputs)["logits"]
    after = model.run(inputs)["logits"]
    assert (before == after).all()
    assert least < np.linalg.norm(during - before) / np.linalg.norm(before) < most
