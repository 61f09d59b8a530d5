"""How texts of two models are compared: near ties, real differences, likelihoods, and what is refused at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow.errors import InputError, SourceError, SpecError
from compileflow.source_model.decoding import token_positions
from compileflow.spec import CompileSpec, HfTask, Precision
from compileflow.steps.compile import checked_target, flat_spec
from compileflow.steps.source_checks import check_source
from compileflow.targets.open_vino import OpenVinoOptions
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.generation import (
    Prompts,
    Settings,
    Written,
    measure_generation,
    part,
)
from compileflow.validation.measure.likelihoods import Likelihoods
from tests.unit.test_source_model import config_folder

TASK = HfTask.TEXT_GENERATION


def spec(target: str, precision: Precision = Precision.FP32, **options: Any) -> CompileSpec:
    return CompileSpec(target=target, hf_task=TASK, precision=precision, target_options=options)


@pytest.mark.parametrize("target", ["blade", "neuron", "neuronx", "torchscript"])
def test_target_that_cannot_generate_names_those_that_can(target: str) -> None:
    with pytest.raises(SpecError, match=f"{target} does not support text-generation") as caught:
        checked_target(spec(target))
    assert (
        caught.value.hint == "Choose one of the targets that do: aot-inductor, hyperdex, onnx-runtime, openvino."
    )


@pytest.mark.parametrize(
    ("target", "precision", "options", "says"),
    [
        ("onnx-runtime", "bf16", {}, "does not support bf16"),
        ("openvino", "fp32", {"exporter": "trace"}, "cannot trace a model for text-generation"),
        ("onnx-runtime", "fp32", {"exporter": "trace"}, "cannot trace a model for text-generation"),
        ("openvino", "int8", {"quantization": "static"}, "does not quantize statically"),
        ("onnx-runtime", "int8", {"quantization": "static"}, "does not quantize statically"),
        ("openvino", "int8", {"group_size": 64}, "group_size is only for int4"),
        ("onnx-runtime", "fp32", {"group_size": 32}, "group_size is only for int4"),
        ("openvino", "int8", {"symmetric": True}, "symmetric is only for int4"),
        ("openvino", "bf16", {"compute_precision": "fp32"}, "compute_precision is for int8 and int4"),
        ("openvino", "int4", {"kv_cache_precision": "int2"}, "kv_cache_precision"),
        ("openvino", "int4", {"group_size": 0}, "group_size is 0"),
        ("openvino", "int4", {"group_size": True}, "group_size: expected a whole number, got True"),
        ("openvino", "int4", {"symmetric": "yes"}, "symmetric: expected true or false, got 'yes'"),
        ("onnx-runtime", "int4", {"group_size": "32"}, "group_size"),
        ("onnx-runtime", "int4", {"group_size": 48}, "group_size"),
        ("onnx-runtime", "int8", {"reduce_range": False}, "no option reduce_range for text-generation"),
    ],
)
def test_options_that_do_not_suit_are_refused(
    target: str, precision: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        checked_target(spec(target, Precision(precision), **options))


@pytest.mark.parametrize(
    ("precision", "options", "compute", "cache"),
    [
        ("fp32", {}, "f32", "f32"),
        ("bf16", {}, "bf16", "bf16"),
        ("int8", {}, "f32", "f32"),
        ("int4", {"compute_precision": "bf16"}, "bf16", "bf16"),
        ("int4", {"compute_precision": "bf16", "kv_cache_precision": "fp32"}, "bf16", "f32"),
        ("fp32", {"kv_cache_precision": "int8"}, "f32", "u8"),
    ],
)
def test_formats_of_computation_and_cache_are_explicit(
    precision: str, options: dict[str, Any], compute: str, cache: str
) -> None:
    hints = OpenVinoOptions(**options).decoder_hints(Precision(precision))
    assert hints == {"inference_precision": compute, "kv_cache_precision": cache}


def test_formats_are_part_of_the_cache_key() -> None:
    plain, small_cache = flat_spec(spec("openvino")), flat_spec(spec("openvino", kv_cache_precision="int8"))
    assert small_cache == plain | {"target_options.kv_cache_precision": "int8"}
    assert flat_spec(spec("openvino", Precision.BF16)) == plain | {"precision": "bf16"}


def test_other_tasks_have_neither_int4_nor_a_cache() -> None:
    encoder = CompileSpec(target="openvino", hf_task=HfTask.FILL_MASK, precision=Precision.INT4)
    with pytest.raises(SpecError, match="openvino does not support int4 for fill-mask"):
        checked_target(encoder)
    options = {"kv_cache_precision": "int8"}
    with pytest.raises(SpecError, match="only for text-generation"):
        checked_target(CompileSpec(target="openvino", hf_task=HfTask.FILL_MASK, target_options=options))


@pytest.mark.parametrize(
    ("config", "task", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, TASK, "bert has no head for text-generation"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, TASK, "t5 has no head for text-generation"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, TASK, "saved as LlamaModel, not for text-gen"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            HfTask.TEXT_CLASSIFICATION,
            "saved as LlamaForCausalLM, not for text-classification",
        ),
    ],
)
def test_model_of_another_kind_is_refused_by_its_configuration(
    tmp_path: Path, config: dict[str, Any], task: HfTask, says: str
) -> None:
    folder = config_folder(tmp_path / "model", **config)
    with pytest.raises(SpecError, match=says):
        check_source(folder, CompileSpec(target="openvino", hf_task=task), needs_tokenizer=False)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba"},
        {"model_type": "rwkv"},
        {"model_type": "qwen3_5_text"},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"model_type": "minimax", "layer_types": ["full_attention", "linear_attention"]},
    ],
    ids=lambda config: config["model_type"],
)
def test_decoder_that_carries_a_state_is_refused_by_its_configuration(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = config_folder(tmp_path / "model", **config)
    with pytest.raises(SourceError, match="carries a state from token to token") as caught:
        check_source(folder, CompileSpec(target="openvino", hf_task=TASK), needs_tokenizer=False)
    assert "docs/reference/decoders.md" in caught.value.hint
    check_source(folder, CompileSpec(target="openvino", hf_task=HfTask.FEATURE_EXTRACTION), needs_tokenizer=False)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("git", "as if an image stood before them"), ("moshi", "depend on the prompt's end")],
)
def test_decoder_of_a_family_that_no_graph_serves_is_refused_by_its_configuration(
    tmp_path: Path, model_type: str, says: str
) -> None:
    folder = config_folder(tmp_path / "model", model_type=model_type)
    with pytest.raises(SourceError, match=says):
        check_source(folder, CompileSpec(target="openvino", hf_task=TASK), needs_tokenizer=False)


def test_decoder_with_sliding_windows_is_not_refused_by_its_configuration(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention"]
    folder = config_folder(tmp_path / "model", model_type="gemma3_text", layer_types=layers)
    check_source(folder, CompileSpec(target="openvino", hf_task=TASK), needs_tokenizer=False)


def test_positions_count_the_tokens_after_the_padding() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert token_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


def written(*rows: list[tuple[int, int, float]]) -> Written:
    """Return a text, given at each place as its token, the second likeliest one, and the gap between them."""
    places = np.array(rows)
    return Written(places[..., 0].astype(int), places[..., :2].astype(int), places[..., 2])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([(1, 2, 5.0)], [(1, 3, 0.0)], "none"),
        ([(1, 2, 0.1)], [(2, 1, 0.12)], "near tie"),
        # Too far apart in one model.
        ([(1, 2, 0.2)], [(2, 1, 0.1)], "real"),
        ([(1, 2, 0.1)], [(2, 1, math.nan)], "real"),
        # The other's token is not second.
        ([(1, 3, 0.1)], [(2, 1, 0.1)], "real"),
        # The texts part before the tie, and after it.
        ([(1, 5, 3.0), (1, 2, 0.1)], [(4, 5, 3.0), (2, 1, 0.1)], "real"),
        ([(1, 2, 0.1), (1, 5, 3.0)], [(2, 1, 0.1), (4, 5, 3.0)], "near tie"),
        # One text is longer.
        ([(1, 2, 3.0)], [(1, 2, 3.0), (3, 4, 3.0)], "real"),
    ],
)
def test_texts_are_judged_at_their_first_different_token(
    before: list[tuple[int, int, float]], after: list[tuple[int, int, float]], expected: str
) -> None:
    assert part(written(before), written(after)) == [expected]
    assert part(written(after), written(before)) == [expected]


class Counting:
    """Writes the numbers after the last token of a prompt; `step` and `refuses` plant faults."""

    def __init__(self, step: int = 1, *, refuses: bool = True):
        self.step, self.refuses = step, refuses

    def write(self, prompts: Mapping[str, Any], settings: Settings) -> Written:
        """Write on from prompts of at most 15 tokens."""
        ids = prompts["input_ids"]
        if self.refuses and ids.shape[1] > 15:
            raise InputError("too long", hint="")
        new_ids = (ids[:, -1:] + self.step * np.arange(1, settings.new_tokens + 1)) % 10
        if settings.beams > 1:
            return Written(new_ids, scores=np.full(len(ids), -0.1 * self.step))
        return written(*([(int(number), 0, 5.0) for number in row] for row in new_ids))


@pytest.mark.parametrize(
    ("candidate", "faulty"),
    [
        (Counting(), set()),
        (Counting(3), {"generations", "prompt_lengths", "early_ends", "beams"}),
        (Counting(refuses=False), {"long_prompts"}),
    ],
)
def test_faults_are_counted_under_their_names(candidate: Counting, faulty: set[str]) -> None:
    prompts = Prompts([[1, 2, 3], [5]] * 5, ["a text"] * 10, pad_token_id=0, longest=16, new_tokens=6)
    measurements = Measurements()
    measure_generation(measurements, Counting(), candidate, prompts, progress=lambda _: None)
    assert {name for name, value in measurements.scalars.items() if value} == faulty
    assert len(measurements.scalars) == 7
    assert sum(row["trials"] for row in measurements.rates) == 10


def test_likelihoods_of_two_known_distributions() -> None:
    likelihoods = Likelihoods()
    before, after = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    for text in ("one", "two"):
        likelihoods.add(text, before, after, [0])
    scalars = likelihoods.scalars()
    assert scalars["kl_mean"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    # The token had 0.5 and has 0.25, so the perplexity doubles.
    assert scalars["perplexity_change"] == pytest.approx(1.0)
    assert likelihoods.details()["perplexity_change"].startswith("perplexity 2 of the source model, 4 of the")


def test_likelihoods_without_texts_measure_nothing() -> None:
    assert Likelihoods().scalars() == {}
    assert Likelihoods().details() == {}
