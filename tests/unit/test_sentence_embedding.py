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

from compileflow import CompiledPipeline, HfTask
from compileflow.artifact.manifest import read_manifest
from compileflow.errors import InputError, LoadError
from compileflow.serving.embedding_recipe import POOLINGS, EmbeddingRecipe, read_recipe
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import compiled_folder
from tests.models import sentences
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
    assert [rows for rows, _ in runs.shapes] == [4] * (len(texts) // 4) + [2] * (len(texts) % 4 // 2)
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
        assert read_recipe(tmp_path) == EmbeddingRecipe(poolings=(mode,))
        assert reference.pooling_mode == mode


def test_module_with_weights_of_its_own_is_refused_when_it_is_loaded(sentence_model: MakeModel) -> None:
    source = sentence_model("mean", modules.Dense(32, 8))

    with pytest.raises(
        LoadError,
        match=r"support Transformer, .*modules.json lists Transformer, Pooling, Dense.*feature-extraction",
    ):
        compiled(source)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("modules.json", "[{", "modules.json cannot be read"),
        ("modules.json", "{}", "Expected list in modules.json, got dict"),
        ("modules.json", '[{"path": "", "type": "x.Transformer"}]', "one Pooling"),
        ("modules.json", '[{"path": "../x", "type": "x.Pooling"}]', "leaves its folder"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', r"\['median'\].*Known modes: mean"),
        ("2_Normalize/config.json", '{"module_input_name": "token_embeddings"}', "token_embeddings"),
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
    assert read_recipe(tmp_path) == EmbeddingRecipe(normalize=True)
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
