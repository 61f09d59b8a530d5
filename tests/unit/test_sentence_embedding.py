"""Sentence embeddings of compiled models, beside what sentence-transformers itself gives for the source model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compileflow import CompiledPipeline, HfTask
from compileflow.artifact.manifest import read_manifest
from compileflow.errors import InputError, LoadError, SourceError, SpecError
from compileflow.settings import Settings
from compileflow.source_model.sentence_modules import (
    POOLINGS,
    EmbeddingRecipe,
    Normalize,
    Pooling,
    read_recipe,
)
from compileflow.sources.files import choose_files_below
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import compiled_folder
from tests.in_process import InProcess
from tests.models import sentences
from tests.steps import Pipeline
from tests.unit.run_counter import counted

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

ATOL = 1e-5
MAX_TOKENS = 16
WORDS = " ".join(sentences()).split()
# Words are a token or more each: some of these are just below, at and beyond the 16 tokens that are taken.
TEXTS = [" ".join(WORDS[:count]) for count in (3, 12, 1, 15, 13, 40, 14, 200)]
TEXTS[2:2] = ["", "Words IN Capitals"]

MakeModel = Callable[..., Path]


@pytest.fixture
def sentence_model(tiny_model: Callable[..., Path], tmp_path: Path) -> MakeModel:
    """Write a small model as sentence-transformers does: `sentence_model(pooling, more modules)`."""

    def make(pooling: Any, *more: Any, prompts: dict[str, str] | None = None, **settings: Any) -> Path:
        source = str(tiny_model(HfTask.FEATURE_EXTRACTION))
        transformer = modules.Transformer(source, **({"max_seq_length": MAX_TOKENS} | settings))
        if isinstance(pooling, str | tuple):
            pooling = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)
        default = next(iter(prompts or {}), None)
        model = st.SentenceTransformer(
            modules=[transformer, pooling, *more], device="cpu", prompts=prompts, default_prompt_name=default
        )
        folder = tmp_path / "source"
        model.save(str(folder), create_model_card=False)
        return folder

    return make


def compiled(source: Path, target: str = "torchscript", **settings: Any) -> CompiledPipeline:
    """Compile a source model for feature extraction, and load it for sentence similarity."""
    folder = compiled_folder(source, target, HfTask.FEATURE_EXTRACTION, source.parent)
    return CompiledPipeline.from_pretrained(folder, task="sentence-similarity", **settings)


def encode(source: Path, texts: Any, **settings: Any) -> Any:
    """Embed with sentence-transformers itself."""
    return st.SentenceTransformer(str(source), device="cpu", local_files_only=True).encode(texts, **settings)


def assert_embeddings(candidate: Any, reference: Any) -> None:
    """Fail where embeddings differ in shape, in type or, beyond ATOL, in a number."""
    assert reference.dtype == np.float32
    assert_same_result(candidate, reference, atol=ATOL)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", [*POOLINGS, ("cls", "mean")])
def test_embeddings_are_pooled_as_the_source_models_files_say(
    sentence_model: MakeModel, pooling: Any, normalize: bool
) -> None:
    source = sentence_model(pooling, *([modules.Normalize()] if normalize else []))
    pipeline = compiled(source)
    expected = encode(source, TEXTS)

    assert_embeddings(pipeline(TEXTS), expected)
    assert_embeddings(pipeline(tuple(TEXTS), batch_size=3), expected)
    assert_embeddings(pipeline(TEXTS[0]), expected[0])
    assert_embeddings(pipeline(TEXTS[:1]), expected[:1])
    assert pipeline.max_tokens == MAX_TOKENS
    assert pipeline([]).shape == (0, expected.shape[1])
    lengths = np.linalg.norm(expected, axis=1)
    assert np.allclose(lengths, 1, atol=ATOL) is normalize


@pytest.mark.slow
def test_dynamic_graph_embeds_in_batches_of_like_length(sentence_model: MakeModel) -> None:
    source = sentence_model("mean")
    pipeline = compiled(source, "onnx-runtime", batch_size=4)
    runs = counted(pipeline)
    texts = [text for text in TEXTS for _ in range(5)]

    module_list = pipeline(texts)

    assert_embeddings(module_list, encode(source, texts))
    assert sum(rows for rows, _ in runs.shapes) == len(texts)
    assert max(rows for rows, _ in runs.shapes) == 4
    assert runs.shapes == sorted(runs.shapes, key=lambda shape: -shape[1])


def test_settings_win_over_the_source_models_files(sentence_model: MakeModel) -> None:
    source = sentence_model("cls", modules.Normalize())
    folder = compiled_folder(source, "torchscript", HfTask.FEATURE_EXTRACTION, source.parent)

    def load(**settings: Any) -> CompiledPipeline:
        return CompiledPipeline.from_pretrained(folder, task="sentence-similarity", **settings)

    plain, unit = load(normalize=False), load(normalize=True)
    assert not np.allclose(np.linalg.norm(plain(TEXTS), axis=1), 1, atol=ATOL)
    assert_embeddings(plain(TEXTS, normalize=True), unit(TEXTS))
    assert_embeddings(unit(TEXTS), encode(source, TEXTS))
    for pooling in ("mean", "max"):
        pooling_config = json.loads((source / "1_Pooling" / "config.json").read_text("utf-8"))
        copy = source.with_name(pooling)
        shutil.copytree(source, copy)
        (copy / "1_Pooling" / "config.json").write_text(
            json.dumps(pooling_config | {"pooling_mode": pooling}), "utf-8"
        )
        assert_embeddings(load(pooling=pooling)(TEXTS), encode(copy, TEXTS))
    with pytest.raises(LoadError, match=r"no setting 'top_k'.*normalize, batch_size, pooling"):
        load(top_k=1)
    with pytest.raises(LoadError, match=r"pooling has unknown modes: \['median'\].*Known modes: mean, cls, max"):
        load(pooling="median")
    with pytest.raises(InputError, match="batch_size is 0"):
        load(batch_size=0)


def test_model_without_modules_gives_the_mean_as_sentence_transformers_has_it(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model(HfTask.FEATURE_EXTRACTION), source)
    # sentence-transformers warns that it makes a mean of its own accord.
    caplog.set_level(logging.ERROR)

    assert_embeddings(compiled(source)(TEXTS), encode(source, TEXTS))


def test_padding_of_a_pipeline_from_memory_is_not_pooled(
    tiny_model: Callable[..., Path],
    in_process: InProcess,
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    folder = tiny_model(HfTask.FEATURE_EXTRACTION)
    source = transformers.pipeline("feature-extraction", model=str(folder), device="cpu")
    with in_process.instead_of_children():
        from_memory = CompiledPipeline.from_pipeline(source, max_length=MAX_TOKENS, neuron=False)
    from_memory.save_pretrained(tmp_path / "artifact")
    reference = st.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    reference.max_seq_length = MAX_TOKENS

    pipeline = CompiledPipeline.from_pretrained(tmp_path / "artifact", task="sentence-similarity")

    assert_embeddings(pipeline(TEXTS), reference.encode(TEXTS))


def test_texts_are_lowered_and_prompted_as_the_source_model_has_it(
    sentence_model: MakeModel, tmp_path: Path
) -> None:
    source = sentence_model("mean", prompts={"query": "find this: "}, do_lower_case=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    # A tokenizer that would see the capitals, which are unknown to it.
    tokenizer["normalizer"] = {"type": "NFC"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    expected = encode(source, TEXTS)

    assert_embeddings(compiled(source)(TEXTS), expected)
    without = encode(source, TEXTS, prompt="")
    assert not np.allclose(without, expected, atol=ATOL)


def test_flags_of_older_files_are_read_like_names(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    module = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([module]), "utf-8")
    flags = {
        "mean": "pooling_mode_mean_tokens",
        "cls": "pooling_mode_cls_token",
        "max": "pooling_mode_max_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    for mode, flag in flags.items():
        config = {"word_embedding_dimension": 32} | {flag_name: flag_name == flag for flag_name in flags.values()}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config), "utf-8")
        reference = modules.Pooling.load(str(tmp_path), subfolder="1_Pooling", local_files_only=True)
        assert read_recipe(tmp_path) == EmbeddingRecipe(modules=(Pooling((mode,)),))
        assert reference.pooling_mode == mode


def assert_recipe(source: Path) -> None:
    """Fail where the modules give other embeddings than sentence-transformers for the tokens of its own model."""
    model = st.SentenceTransformer(str(source), device="cpu", local_files_only=True)
    recipe = read_recipe(source)
    for text in TEXTS:
        with torch.inference_mode():
            tokens = model[0](model.preprocess([text]))["token_embeddings"][0]
        assert_embeddings(recipe.embed(tokens.numpy()), model.encode(text))


@pytest.mark.parametrize(
    ("pooling", "more"),
    [
        ("cls", [modules.Dense(32, 8), modules.Normalize()]),
        ("mean", [modules.Dense(32, 8, bias=False, activation_function=torch.nn.GELU(), use_residual=True)]),
        ("max", [modules.Dropout(0.5), modules.Dense(32, 32, activation_function=None, use_residual=True)]),
        (("cls", "mean"), [modules.LayerNorm(64), modules.Dense(64, 16, activation_function=torch.nn.Sigmoid())]),
    ],
)
def test_modules_behind_the_pooling_compute_as_in_sentence_transformers(
    sentence_model: MakeModel, pooling: Any, more: list[Any]
) -> None:
    torch.manual_seed(5)
    for module in more:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0.5, 0.4)
    assert_recipe(sentence_model(pooling, *more))


def test_modules_before_the_pooling_change_the_tokens(sentence_model: MakeModel) -> None:
    dense = modules.Dense(32, 12, module_input_name="token_embeddings")
    normalize = modules.Normalize(module_input_name="token_embeddings")
    assert_recipe(sentence_model(dense, normalize, modules.Pooling(12, "mean")))


def test_layers_are_weighted_only_where_the_model_returns_them(sentence_model: MakeModel) -> None:
    source = sentence_model(
        modules.WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1), modules.Pooling(32)
    )
    assert_recipe(source)
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"output_hidden_states": True}), "utf-8")

    with pytest.raises(LoadError, match=r"modules.json lists Transformer, WeightedLayerPooling, Pooling"):
        read_recipe(source)


def test_compiled_model_with_a_dense_module_passes_and_serves_it(
    sentence_model: MakeModel, pipeline: Pipeline
) -> None:
    source = sentence_model("cls", modules.Dense(32, 8), modules.Normalize())
    # As older models have it.
    weights = load_file(source / "2_Dense" / "model.safetensors")
    torch.save(weights, source / "2_Dense" / "pytorch_model.bin")
    (source / "2_Dense" / "model.safetensors").unlink()

    request = pipeline.request(source, name="labse")
    pipeline.run(request)
    compiled_pipeline = CompiledPipeline.from_pretrained(pipeline.compile(request).uri)

    assert compiled_pipeline.task == "sentence-similarity"
    assert compiled_pipeline.dimension == 8
    assert_embeddings(compiled_pipeline(TEXTS), encode(source, TEXTS))
    assert not list(compiled_pipeline.model.artifact.folder.rglob("*.bin"))


@pytest.mark.slow
def test_dense_module_that_was_damaged_in_the_artifact_fails_the_validation(
    sentence_model: MakeModel, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sentence_model("mean", modules.Dense(32, 8))

    def write_swapped(folder: Path, dest: Path) -> None:
        weights = load_file(folder / "2_Dense" / "model.safetensors")
        rows = {name: value.flip(0).contiguous() for name, value in weights.items()}
        save_file(rows, dest / "2_Dense" / "model.safetensors")

    monkeypatch.setattr("compileflow.steps.build.write_module_weights", write_swapped)
    # Not through the cache of compiles that all tests share.
    request = pipeline.request(source, max_sequence_length=63, shape_buckets=())
    verdict = pipeline.validate(request, pipeline.compile(request))

    assert verdict.outcome == "fail"
    assert "2_Dense: the weights differ" in verdict.reason
    assert verdict.figures["embedding_error"] > 0.1


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("sentence_transformers.models.CNN", "CNN"),
        ("sentence_transformers.sentence_transformer.modules.lstm.LSTM", "LSTM"),
        ("sentence_transformers.base.modules.router.Router", "Router"),
        ("custom_st.Scale", "custom_st.Scale"),
    ],
)
def test_module_that_cannot_be_served_is_refused_before_the_compile(
    sentence_model: MakeModel, pipeline: Pipeline, module: str, says: str
) -> None:
    source = sentence_model("mean")
    module_list = json.loads((source / "modules.json").read_text("utf-8"))
    more = [{"idx": 2, "name": "2", "path": "2_More", "type": module}]
    (source / "modules.json").write_text(json.dumps(module_list + more), "utf-8")

    with pytest.raises(
        SpecError, match=f"support Transformer, .*lists Transformer, Pooling, {says}\\..*feature-ex"
    ):
        pipeline.run(pipeline.request(source))
    assert pipeline.counts["compile"] == 0


def test_activation_of_custom_code_is_refused(sentence_model: MakeModel) -> None:
    source = sentence_model("mean", modules.Dense(32, 8))
    config = json.loads((source / "2_Dense" / "config.json").read_text("utf-8"))
    for path in ("os.system", "torch.nn.modules.activation.PReLU", "torch.nn.functional.gelu", "torch.hub.load"):
        (source / "2_Dense" / "config.json").write_text(
            json.dumps(config | {"activation_function": path}), "utf-8"
        )
        with pytest.raises(LoadError, match=f"Dense has the activation '{path}'"):
            read_recipe(source)


def test_folder_that_begins_with_another_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]", "utf-8")

    with pytest.raises(SourceError, match=r"although there is modules.json.*not with CLIPModel, StaticEmbedding"):
        choose_files_below(tmp_path, "the folder")


def test_prompts_are_chosen_and_left_out_of_the_pooling_as_in_sentence_transformers(
    sentence_model: MakeModel,
) -> None:
    pooling = modules.Pooling(32, POOLINGS, include_prompt=False)
    source = sentence_model(pooling, prompts={"query": "find this: ", "passage": "the text is this one: "})
    pipeline = compiled(source)

    assert pipeline.default_prompt_name == "query"
    for options in (
        {},
        {"prompt_name": "passage"},
        {"prompt_name": "document"},
        {"prompt": "a b c d e f g "},
        {"prompt": "another, ", "prompt_name": "passage"},
        {"prompt": ""},
    ):
        assert_embeddings(pipeline(TEXTS, **options), encode(source, TEXTS, **options))
    # The prompt fills all 16 tokens, so that no token is left to pool.
    long_prompt = " ".join(WORDS[:30])
    actual = pipeline(TEXTS[0], prompt=long_prompt)
    np.testing.assert_allclose(actual, encode(source, TEXTS[0], prompt=long_prompt), atol=ATOL)
    with pytest.raises(InputError, match=r"no prompt 'title'.*query, document, passage"):
        pipeline(TEXTS[0], prompt_name="title")


def test_embeddings_are_cut_to_the_size_that_the_files_name(sentence_model: MakeModel) -> None:
    source = sentence_model("mean", modules.Normalize())
    settings_path = source / "config_sentence_transformers.json"
    settings = json.loads(settings_path.read_text("utf-8"))
    settings_path.write_text(json.dumps(settings | {"truncate_dim": 12, "similarity_fn_name": "dot"}), "utf-8")
    pipeline = compiled(source)

    assert (pipeline.dimension, pipeline.truncate_dim, pipeline.similarity_fn_name) == (12, 12, "dot")
    assert_embeddings(pipeline(TEXTS), encode(source, TEXTS))
    assert_embeddings(pipeline(TEXTS, truncate_dim=5), encode(source, TEXTS, truncate_dim=5))
    assert_embeddings(
        pipeline(TEXTS, truncate_dim=5, normalize=True),
        encode(source, TEXTS, truncate_dim=5, normalize_embeddings=True),
    )
    with pytest.raises(InputError, match="truncate_dim is 0"):
        pipeline(TEXTS, truncate_dim=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("modules.json", "[{", "modules.json cannot be read"),
        ("modules.json", "{}", "Expected list in modules.json, got dict"),
        ("modules.json", '[{"path": "", "type": "x.Transformer"}]', "one Pooling"),
        ("modules.json", '[{"path": "../x", "type": "x.Pooling"}]', "leaves its folder"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', r"\['median'\].*Known modes: mean"),
        (
            "modules.json",
            '[{"path": "0_T", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", '
            '"type": "sentence_transformers.models.Pooling"}]',
            "in the folder 0_T",
        ),
        ("config_sentence_transformers.json", '{"truncate_dim": "12"}', "Expected int as truncate_dim"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}', "Expected str as query"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "title"}', "no prompt 'title'"),
        ("2_Normalize/config.json", '{"module_input_name": "all_layer_embeddings"}', "all_layer_embeddings"),
        (
            "sentence_bert_config.json",
            '{"processing_kwargs": {"text": {"padding": "max_length"}}}',
            "processing_kwargs",
        ),
    ],
)
def test_files_that_ask_for_what_is_not_known_are_refused(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    module_list = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(module_list), "utf-8")
    assert read_recipe(tmp_path) == EmbeddingRecipe(modules=(Pooling(), Normalize()))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content, "utf-8")

    with pytest.raises(LoadError, match=says):
        read_recipe(tmp_path)


def test_what_is_no_text_is_refused(sentence_model: MakeModel) -> None:
    pipeline = compiled(sentence_model("mean"))

    with pytest.raises(InputError, match="got int at position 1 of the list"):
        pipeline(["one", 2])
    with pytest.raises(InputError, match="Expected a text or a list of texts, got dict"):
        pipeline({"text": "one"})


def test_files_that_say_how_to_pool_are_in_the_artifact(sentence_model: MakeModel) -> None:
    source = sentence_model("max", modules.Normalize())
    folder = compiled_folder(source, "torchscript", HfTask.FEATURE_EXTRACTION, source.parent)

    listed = {record.path for record in read_manifest(folder).files}

    assert {
        "modules.json",
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    } <= listed


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchscript", "onnx-runtime"])
def test_minilm_embeds_as_sentence_transformers_does(tmp_path: Path, target: str) -> None:
    from compileflow.cli.demo import demo_model

    folder = compiled_folder(demo_model(), target, HfTask.FEATURE_EXTRACTION, tmp_path)
    pipeline = CompiledPipeline.from_pretrained(folder, task="sentence-similarity")
    # The source model takes 256 tokens of the 512 that it has positions for; the tests' static graph has 64.
    texts = [*sentences()[:12], "", *(" ".join(WORDS[:count]) for count in (180, 200, 220, 250, 300, 700))]
    if target == "torchscript":
        texts = [" ".join(text.split()[:30]) for text in texts]
    expected = encode(demo_model(), texts)

    assert pipeline.max_tokens == {"torchscript": 64, "onnx-runtime": 256}[target]
    assert_embeddings(pipeline(texts), expected)
    assert_embeddings(pipeline(texts[0]), expected[0])
