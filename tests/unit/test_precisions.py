"""Precisions: float32 outputs near those of fp32 but not equal to them, and smaller files at int8."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compileflow import CompiledTokenizer
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target
from compileflow.contracts import Arrays, Runner
from compileflow.spec import ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.calibration import CalibrationSettings, calibration_batches, load_calibration
from compileflow.validation.measure.metrics import rel_l2
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import sentences

TASK = HfTask.TEXT_CLASSIFICATION
FP32, BF16, INT8 = Precision.FP32, Precision.BF16, Precision.INT8
ROWS, LENGTH = 4, 32
TEXTS = sentences()[100 : 100 + ROWS]
WEIGHTS = {"onnx-runtime": "model.onnx.data", "openvino": "model.bin", "torchscript": "model.pt"}
# Target, precision, options, and the largest relative error: about three times the measured one.
LOWERED = [
    pytest.param("onnx-runtime", INT8, {"quantization": "dynamic"}, 0.12, id="onnx-runtime-dynamic"),
    pytest.param(
        "onnx-runtime", INT8, {"quantization": "static"}, 0.2, id="onnx-runtime-static", marks=pytest.mark.slow
    ),
    pytest.param("openvino", INT8, {"quantization": "dynamic"}, 0.1, id="openvino-dynamic"),
    pytest.param("openvino", INT8, {"quantization": "static"}, 0.7, id="openvino-static"),
    pytest.param(
        "openvino", INT8, {"quantization": "weights"}, 0.1, id="openvino-weights", marks=pytest.mark.slow
    ),
    pytest.param("torchscript", BF16, {}, 0.03, id="torchscript-bf16"),
]

Artifacts = Callable[..., OpenArtifact]


def build(
    in_process: InProcess,
    source_dir: Path,
    out_dir: Path,
    target: str,
    precision: Precision,
    options: dict[str, Any],
    *,
    task: HfTask = TASK,
    calibration: dict[str, Any] | None = None,
) -> OpenArtifact:
    """Compile and open, whether or not the CPU has the precision."""
    dynamic = get_target(target).capabilities.dynamic_axes
    bucket = ShapeBucket(batch_size=ROWS, sequence_length=LENGTH)
    if calibration is None and get_target(target).Options.model_validate(options).needs_calibration(precision):
        calibration = load_calibration(task, CalibrationSettings(max_examples=64)).to_json()
    artifact_dir = in_process.compile(
        source_dir,
        out_dir,
        target=target,
        hf_task=task,
        components=[ComponentSpec(shape_buckets=() if dynamic else (bucket,))],
        precision=precision,
        options=options,
        calibration=calibration,
    )
    return open_artifact(artifact_dir)


@pytest.fixture(scope="session")
def artifacts(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory
) -> Artifacts:
    """Compile once in a session: `artifacts(target, precision, {"option": value})`."""
    root = tmp_path_factory.mktemp("precisions")

    @cache
    def make(target: str, precision: Precision, options: str) -> OpenArtifact:
        number = len(list(root.iterdir()))
        return build(in_process, tiny_model(TASK), root / f"{number}", target, precision, json.loads(options))

    def compiled(target: str, precision: Precision, options: dict[str, Any] | None = None) -> OpenArtifact:
        return make(target, precision, json.dumps(options or {}, sort_keys=True))

    return compiled


def load(artifact: OpenArtifact, threads: int | None = 1) -> Runner:
    """Load without the check of the CPU: torch emulates missing instructions."""
    record = artifact.manifest.components["default"]
    target = get_target(artifact.manifest.target.name)
    return target.load(artifact.folder / record.folder, record, device="cpu", threads=threads)


def natural_inputs(artifact: OpenArtifact) -> Arrays:
    """Return four sentences that no model was calibrated on, padded to the shape of static graphs."""
    encoded = CompiledTokenizer.from_pretrained(artifact.folder)(
        TEXTS, padding="max_length", max_length=LENGTH, return_tensors="np"
    )
    return {record.name: encoded[record.name] for record in artifact.manifest.components["default"].inputs}


def answers(artifact: OpenArtifact) -> Arrays:
    runner = load(artifact)
    try:
        return runner.run(natural_inputs(artifact))
    finally:
        runner.close()


class Formats(TorchDispatchMode):
    """Records the formats in which each operator answers."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        first = answer[0] if isinstance(answer, tuple | list) else answer
        if isinstance(first, torch.Tensor):
            self.dtypes[func.overloadpacket.__name__].add(first.dtype)
        return answer


def weights_bytes(artifact: OpenArtifact) -> int:
    name = WEIGHTS[artifact.manifest.target.name]
    return (artifact.folder / "components" / "default" / name).stat().st_size


@pytest.mark.parametrize(("target", "precision", "options", "limit"), LOWERED)
def test_lowered_precision_is_near_fp32_and_is_not_fp32(
    artifacts: Artifacts, target: str, precision: Precision, options: dict[str, Any], limit: float
) -> None:
    plain, lowered = artifacts(target, FP32), artifacts(target, precision, options)
    assert lowered.manifest.components["default"].precision is precision
    expected, actual = answers(plain)["logits"], answers(lowered)["logits"]
    assert actual.dtype == expected.dtype == np.float32
    assert 1e-4 < rel_l2(expected, actual) < limit


@pytest.mark.parametrize(
    ("target", "precision", "options", "limit"), [case for case in LOWERED if case.values[1] is INT8]
)
def test_int8_weights_are_stored_as_int8(
    artifacts: Artifacts, target: str, precision: Precision, options: dict[str, Any], limit: float
) -> None:
    assert weights_bytes(artifacts(target, precision, options)) < 0.8 * weights_bytes(artifacts(target, FP32))


def test_matrix_products_of_a_bf16_graph_are_bf16_and_its_sums_are_not(artifacts: Artifacts) -> None:
    artifact = artifacts("torchscript", BF16)
    runner, inputs = load(artifact), natural_inputs(artifact)
    with Formats() as formats:
        runner.run(inputs)
    runner.close()
    assert formats.dtypes["linear"] == formats.dtypes["scaled_dot_product_attention"] == {torch.bfloat16}
    assert formats.dtypes["layer_norm"] == formats.dtypes["add"] == {torch.float32}


@pytest.mark.parametrize(("precision", "options"), [(FP32, {}), (INT8, {"quantization": "dynamic"})])
def test_openvino_loads_with_the_precision_of_the_artifact(
    artifacts: Artifacts, precision: Precision, options: dict[str, Any]
) -> None:
    runner = load(artifacts("openvino", precision, options))
    hint = runner._model.get_property("INFERENCE_PRECISION_HINT")  # type: ignore[attr-defined]
    assert hint.to_string() == "f32"
    runner.close()


@pytest.mark.parametrize(
    ("options", "hint", "streams"),
    [({}, "latency", 1), ({"performance_hint": "throughput"}, "throughput", 2)],
)
def test_openvino_has_one_stream_per_thread_for_throughput_and_one_for_latency(
    artifacts: Artifacts, options: dict[str, Any], hint: str, streams: int
) -> None:
    artifact = artifacts("openvino", FP32, options)
    assert artifact.manifest.components["default"].load_options["performance_hint"] == hint
    runner = load(artifact, threads=2)
    assert runner._model.get_property("NUM_STREAMS") == streams  # type: ignore[attr-defined]
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-runtime", "openvino"])
def test_static_int8_of_a_real_model_is_nearer_when_calibrated_on_natural_text(
    in_process: InProcess, tmp_path: Path, target: str
) -> None:
    from transformers import AutoTokenizer

    from compileflow.cli.demo import demo_model

    model, task = demo_model(), HfTask.FEATURE_EXTRACTION
    static = {"quantization": "static"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    natural = load_calibration(task, CalibrationSettings(max_examples=64))
    random = np.random.default_rng(5)
    drawn = [
        {"text": tokenizer.decode(random.integers(1000, len(tokenizer), len(example["text"]) // 5))}
        for example in natural.examples
    ]
    settings = {"natural": natural.to_json(), "random": natural.to_json() | {"examples": drawn}}
    # Text that neither was calibrated on.
    judged = load_calibration(HfTask.QUESTION_ANSWERING, CalibrationSettings(max_examples=32)).examples
    batches = calibration_batches(
        [{"text": example["context"]} for example in judged], tokenizer, task=task, max_length=128, pad_token_id=0
    )

    def pooled(artifact: OpenArtifact) -> Any:
        runner = load(artifact, threads=None)
        rows = []
        for batch in batches:
            mask = batch["attention_mask"][:, :, None]
            rows.append((runner.run(batch)["last_hidden_state"] * mask).sum(1) / mask.sum(1))
        runner.close()
        return np.concatenate(rows)

    reference = pooled(build(in_process, model, tmp_path / "fp32", target, FP32, {}, task=task))
    errors = {
        name: rel_l2(
            reference,
            pooled(
                build(in_process, model, tmp_path / name, target, INT8, static, task=task, calibration=calibration)
            ),
        )
        for name, calibration in settings.items()
    }
    assert errors["natural"] < errors["random"], errors
