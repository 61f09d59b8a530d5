"""Requests that a model's files rule out are refused before torch is imported; a missing field refuses none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from compileflow.catalog import get_target, open_store
from compileflow.contracts.digests import json_digest
from compileflow.errors import SourceError, SpecError
from compileflow.selection.run import check_any_target
from compileflow.settings import Settings
from compileflow.source_model.load import load_source_model
from compileflow.source_model.model_types import model_types
from compileflow.source_model.tasks import tasks_of
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.cache import CacheKey
from compileflow.steps.compile import earlier_cost
from compileflow.steps.request import CompileRequest
from compileflow.steps.source_checks import DeclaredConfig, check_lengths, check_model_type, check_source
from tests.conftest import ModelFactory
from tests.hub_server import Hub
from tests.models import MAX_TOKENS

TEXT, EMBED, IMAGES = HfTask.TEXT_CLASSIFICATION, HfTask.FEATURE_EXTRACTION, HfTask.IMAGE_CLASSIFICATION
Folder = Callable[..., Path]
# Prints, as JSON, the exit code and the error of each request, the heavy modules, and the processor time.
CALL = """
import json, resource, sys
from typer.testing import CliRunner
from compileflow.cli import app

outcomes = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "outcomes": [[outcome.exit_code, outcome.stderr] for outcome in outcomes],
    "modules": [name for name in ("torch", "transformers") if name in sys.modules],
    "cpu_s": usage.ru_utime + usage.ru_stime,
}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write a model folder without usable weights: a configuration, and a tokenizer unless it is left out."""

    def write(*, tokenizer: bool = True, **config: Any) -> Path:
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        (path / "model.safetensors").write_bytes(b"")
        if tokenizer:
            (path / "tokenizer.json").write_text("{}")
        return path

    return write


def spec(hf_task: HfTask, target: str = "onnx-runtime", length: int | None = None) -> CompileSpec:
    components = (ComponentSpec(max_sequence_length=length),)
    return CompileSpec(target=target, hf_task=hf_task, components=components)


def check(path: Path, requested: CompileSpec) -> None:
    check_source(path, requested)
    check_lengths(path, requested, get_target(requested.target))


def test_refusals_import_no_torch_and_take_little_processor_time(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    model = str(tiny_model(TEXT))
    both_towers = str(tiny_model(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION))
    requests = {
        ("compile", model, "--max-sequence-length", "65"): f"the model has positions for {MAX_TOKENS} tokens",
        ("compile", model, "--bucket", "8x128", "--target", "torchscript"): "a sequence length of 128",
        ("compile", model, "--max-sequence-length", "65", "--target", "auto"): "a sequence length of 65",
        ("compile", model, "--shape", "1x65"): "Cannot time the shape 1x65",
        ("compile", model, "--task", "audio-classification"): "bert has no head for audio-classification",
        ("compile", model, "--task", "image-feature-extraction"): "bert has no head for image-feature-extraction",
        ("compile", model, "--task", "fill-mask"): "saved as BertForSequenceClassification, not for fill-mask",
        ("compile", both_towers, "--task", "feature-extraction"): "CLIPModel takes text and image inputs together",
        ("compile", str(tiny_model(IMAGES)), "--max-sequence-length", "128"): "have no length that varies",
        ("compile", model, "--precision", "int8", "--option", "exporter=trace"): "cannot trace a model at int8",
    }
    completed = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(list(requests))],
        capture_output=True, text=True, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    report = json.loads(completed.stdout)
    for (exit_code, stderr), (words, says) in zip(report["outcomes"], requests.items(), strict=True):
        assert (exit_code, stderr.count("\n")) == (2, 1), (words, stderr)
        assert says in stderr
    assert report["modules"] == []
    # All ten requests together.
    assert report["cpu_s"] < 5 * len(requests)
    assert not settings.home_dir.exists()


def test_hint_gives_what_the_model_takes(tiny_model: ModelFactory) -> None:
    with pytest.raises(SpecError) as caught:
        check(tiny_model(TEXT), spec(TEXT, length=65))
    assert caught.value.hint == f"Request {MAX_TOKENS} or fewer."
    with pytest.raises(SpecError) as caught:
        check(tiny_model(EMBED), spec(IMAGES))
    assert "Choose one of: feature-extraction, sentence-similarity, text-classification" in caught.value.hint
    with pytest.raises(SpecError) as caught:
        check(tiny_model(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION), spec(EMBED))
    assert "CLIPTextModel or CLIPVisionModel" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "requested", "kind", "says"),
    [
        ({"model_type": "berd"}, spec(EMBED), SourceError, "does not know the model type 'berd'"),
        ({"model_type": "odd", "auto_map": {"AutoConfig": "a.B"}}, spec(EMBED), SpecError, "its own Python code"),
        (
            {"model_type": "gpt2", "auto_map": {"AutoModelForMaskedLM": "a.B"}},
            spec(HfTask.FILL_MASK),
            SpecError,
            "its own Python code",
        ),
        (
            {"model_type": "bert", "quantization_config": {"quant_method": "gptq"}},
            spec(EMBED),
            SpecError,
            r"already quantized \(gptq",
        ),
        ({"model_type": "bert", "tokenizer": False}, spec(EMBED), SourceError, "has no tokenizer"),
        ({"model_type": "vit"}, spec(IMAGES), SourceError, r"preprocessor_config\.json is missing"),
        ({"model_type": "vit"}, spec(EMBED), SpecError, "vit has no head for feature-extraction"),
        ({"model_type": "wav2vec2"}, spec(EMBED), SpecError, "wav2vec2 has no head for feature-extraction"),
        ({"model_type": "gpt2"}, spec(HfTask.FILL_MASK), SpecError, "gpt2 has no head for fill-mask"),
        ({"model_type": "switch_transformers"}, spec(EMBED), SourceError, "loops over the experts"),
        ({"model_type": "reformer", "attn_layers": ["lsh"]}, spec(EMBED), SourceError, "random numbers"),
        ({"model_type": "rwkv"}, spec(EMBED), SpecError, "reads it token by token"),
        (
            {"model_type": "canine", "max_position_embeddings": 16384, "local_transformer_stride": 128},
            spec(EMBED),
            SpecError,
            "or a maximum of 128 tokens",
        ),
        (
            {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1},
            spec(EMBED, length=513),
            SpecError,
            "positions for 512 tokens",
        ),
        (
            {"model_type": "clip", "text_config": {"max_position_embeddings": 77}},
            spec(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION, length=78),
            SpecError,
            "positions for 77 tokens",
        ),
        (
            {"model_type": "bert", "max_position_embeddings": 3},
            spec(TEXT),
            SourceError,
            "positions for 3 tokens, and compileflow takes models for 4 or more",
        ),
        *(
            ({"model_type": "bert", "id2label": labels}, spec(TEXT), SourceError, says)
            for labels, says in (
                ({"0": "a", "2": "b", "5": "c"}, "must name the labels 0 to 2, but it names 0, 2, 5"),
                ({"1": "a", "2": "b"}, "must name the labels 0 to 1, but it names 1, 2"),
                ({"a": "0"}, "must name the labels 0 to 0, but it names a"),
                (["a", "b"], r"must be an object with a label for each class, but it is \["),
                ({}, "must be an object with a label for each class"),
            )
        ),
    ],
)
def test_files_of_the_model_are_enough_to_refuse_it(
    folder: Folder, config: dict[str, Any], requested: CompileSpec, kind: type[Exception], says: str
) -> None:
    path = folder(**config)
    if requested.hf_task.modality == "image-text":
        (path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(kind, match=says):
        check(path, requested)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert"},
        {"model_type": "bert", "architectures": None, "max_position_embeddings": None},
        {"model_type": "roberta", "max_position_embeddings": -1},
        {"model_type": "gpt2", "n_positions": 1024},
        {"model_type": "reformer"},
        {"model_type": "big_bird", "attention_type": "block_sparse"},
        {"model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"]},
        {"model_type": "t5", "architectures": ["T5EncoderModel"], "n_positions": 512},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        {"model_type": "llama4", "text_config": {}},
        # No load reads the labels of this task.
        {"model_type": "bert", "id2label": {"1": "a", "90": "b"}},
    ],
    ids=str,
)
def test_field_that_is_missing_refuses_nothing(folder: Folder, config: dict[str, Any]) -> None:
    check(folder(**config), spec(EMBED, length=3000))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_max_length": "64"}, 'a whole number of at least 1 as model_max_length .*, got "64"'),
        ({"model_max_length": 0}, "a whole number of at least 1 as model_max_length"),
        ({"model_max_length": -1}, "a whole number of at least 1 as model_max_length"),
        ({"model_max_length": True}, "a whole number of at least 1 as model_max_length .*, got true"),
        ({"model_max_length": 12.5}, "a whole number of at least 1 as model_max_length"),
        ({"max_len": []}, "a whole number of at least 1 as max_len"),
        ({"padding_side": "centre"}, '"right" or "left" as padding_side'),
        ({"truncation_side": None}, '"right" or "left" as truncation_side'),
        ({"padding_side": ["left"]}, '"right" or "left" as padding_side'),
        ({"pad_token": 0}, "a text or an object as pad_token"),
        ({"added_tokens_decoder": []}, "an object as added_tokens_decoder"),
        ({"model_input_names": "input_ids"}, "a list of texts as model_input_names"),
    ],
    ids=str,
)
def test_wrong_setting_of_the_tokenizer_is_refused_by_name(
    folder: Folder, settings: dict[str, Any], says: str
) -> None:
    path = folder(model_type="bert")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=f"Expected {says}") as caught:
        check(path, spec(TEXT))
    assert "tokenizer_config.json" in caught.value.message


@pytest.mark.parametrize("length", [1, 512, 512.0, 10**30, 1e30, None])
def test_tokenizer_may_have_any_maximum_or_none(folder: Folder, length: float | None) -> None:
    path = folder(model_type="bert")
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    check_source(path, spec(TEXT))


def test_trusted_code_decides_for_itself(folder: Folder) -> None:
    path = folder(model_type="odd", auto_map={"AutoConfig": "a.B"}, tokenizer=False)
    check(path, spec(EMBED).model_copy(update={"trust_remote_code": True}))


def test_hub_model_is_refused_before_its_weights_are_downloaded(
    settings: Settings, hub: Hub, tiny_model: ModelFactory
) -> None:
    hub.add("owner/model", {path.name: path.read_bytes() for path in tiny_model(TEXT).iterdir()})
    settings = settings.model_copy(update={"hub_endpoint": hub.endpoint})
    request = CompileRequest(model="owner/model", target="onnx-runtime")
    check_any_target(request, settings)
    with pytest.raises(SpecError, match=f"positions for {MAX_TOKENS} tokens"):
        check_any_target(request.model_copy(update={"max_sequence_length": 65}), settings)
    names = {name for _, name in hub.downloaded()}
    assert {"config.json", "tokenizer_config.json"} <= names
    assert not names & {"model.safetensors", "tokenizer.json"}


def test_shape_to_time_counts_only_where_the_longest_row_is_known(folder: Folder) -> None:
    shape = ShapeBucket(batch_size=1, sequence_length=1000)
    path = folder(model_type="gpt2")
    check_lengths(path, spec(EMBED), get_target("onnx-runtime"), timed_shapes=(shape,))
    with pytest.raises(SpecError, match="the longest row of this model is 512"):
        check_lengths(path, spec(EMBED, length=512), get_target("onnx-runtime"), timed_shapes=(shape,))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_longest_row_is_the_one_that_the_loaded_model_has(tiny_model: ModelFactory, architecture: str) -> None:
    path = tiny_model(EMBED, architecture)
    assert load_source_model(path, EMBED).longest == MAX_TOKENS
    check(path, spec(EMBED, length=MAX_TOKENS))
    if architecture != "roberta":
        with pytest.raises(SpecError, match=f"positions for {MAX_TOKENS} tokens"):
            check(path, spec(EMBED, length=MAX_TOKENS + 1))


@pytest.mark.parametrize(
    "model_type",
    [
        "albert", "bart", "bert", "clip_text_model", "data2vec-audio", "data2vec-text", "distilbert", "gpt2",
        "mpnet", "roberta", "t5", "vit", "wav2vec2", "whisper", "xlm-roberta", "yolos",
    ],
)  # fmt: skip
def test_tables_read_from_source_give_the_tasks_that_transformers_has(model_type: str) -> None:
    types = model_types()
    assert types is not None
    assert types.tasks(model_type) == tasks_of(transformers.AutoConfig.for_model(model_type))


def test_model_type_that_a_target_does_not_compile_is_refused_for_its_tasks_alone() -> None:
    config, target = DeclaredConfig(model_type="textnet"), get_target("onnx-runtime")

    check_model_type(target, HfTask.IMAGE_CLASSIFICATION, config)
    check_model_type(get_target("openvino"), HfTask.IMAGE_FEATURE_EXTRACTION, config)
    with pytest.raises(SpecError, match="onnx-runtime does not compile textnet for image-feature-extraction: its"):
        check_model_type(target, HfTask.IMAGE_FEATURE_EXTRACTION, config)


def test_options_that_contradict_the_precision_are_refused_before_the_model_is_loaded() -> None:
    for target, options, precision in (
        ("onnx-runtime", {"exporter": "trace"}, Precision.INT8),
        ("openvino", {"exporter": "trace"}, Precision.INT8),
        ("neuronx", {"auto_cast": "all"}, Precision.FP32),
        ("neuron", {"compiler_args": ["--fast-math none"]}, Precision.BF16),
        ("blade", {"fp16_fallback_op_ratio": 0.5}, Precision.FP32),
    ):
        chosen = get_target(target).Options.model_validate(options)
        with pytest.raises(SpecError, match=precision.value):
            chosen.check_precision(precision)


def test_compile_says_what_the_last_one_of_the_model_took(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    last, key = (CacheKey("compile", "file:///model for torchscript", {"threads": name}) for name in "12")
    assert earlier_cost(store, key) == ""
    store.put_record(
        "compile-latest", json_digest(["compile", last.subject]), {"key": last.digest, "parts": dict(last.parts)}
    )
    value = {
        "uri": "file:///artifact", "digest": "1" * 64, "cache_key": last.digest, "size_bytes": 1, "cached": False,
        "why": "first run", "compile_duration_s": 34.6, "peak_rss_bytes": 1_240_000_000,
    }  # fmt: skip
    for damage in ({"compile_duration_s": 10**400}, {"peak_rss_bytes": 10**400}, {"peak_rss_bytes": "much"}):
        store.put_record("compile", last.digest, {"value": value | damage})
        assert earlier_cost(store, key) == ""
    store.put_record("compile", last.digest, {"value": value})
    assert earlier_cost(store, key) == (
        "the last compile of file:///model for torchscript took 35 s and 1.2 GB of memory"
    )


def test_model_without_its_tokenizer_is_refused_before_it_is_stored(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_model(TEXT), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        check_source(path, spec(TEXT))
    check_source(path, spec(TEXT), needs_tokenizer=False)
