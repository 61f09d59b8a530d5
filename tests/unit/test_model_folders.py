"""Models as people have them: without a padding token, with tokens added, quantized, in odd folders."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from compileflow import CompiledPipeline, CompiledTokenizer, HfTask
from compileflow.errors import InputError, SourceError, SpecError
from compileflow.local.in_memory import save_model
from compileflow.spec import ComponentSpec, ShapeBucket
from compileflow.steps.build import build_artifact
from compileflow.steps.compile import detect_task
from compileflow.targets.aot_inductor import _compiler_folder
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import sentences
from tests.steps import Pipeline

TEXTS = ["It arrived on time.", "no", "It arrived late, and the coffee was cold; we had to go back."]
BUCKETS = tuple(ShapeBucket(batch_size=rows, sequence_length=32) for rows in (1, 4))
EMBED = HfTask.FEATURE_EXTRACTION


@pytest.fixture
def model_copy(tiny_model: ModelFactory, tmp_path: Path) -> Callable[[HfTask], Path]:
    """Return a folder of a small model that the test may write to."""
    return lambda task: shutil.copytree(tiny_model(task), tmp_path / "model")


class TestNoPaddingToken:
    @pytest.fixture
    def model(self, model_copy: Callable[[HfTask], Path]) -> Path:
        folder = model_copy(EMBED)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        transformers.GPT2Model(config).save_pretrained(folder)
        return folder

    @pytest.fixture
    def artifact(self, model: Path, in_process: InProcess, tmp_path: Path) -> Path:
        components = [ComponentSpec(max_sequence_length=32, shape_buckets=BUCKETS)]
        return in_process.compile(
            model, tmp_path / "artifact", target="torchscript", hf_task=EMBED, components=components
        )

    def test_pipeline_answers_as_that_of_transformers(self, model: Path, artifact: Path) -> None:
        pipeline = CompiledPipeline.from_pretrained(artifact)
        source = transformers.pipeline("feature-extraction", model=str(model), device="cpu")
        for text, features in zip(TEXTS, pipeline(TEXTS), strict=True):
            expected = np.array(source(text))
            np.testing.assert_allclose(pipeline(text), expected, atol=1e-4)
            np.testing.assert_allclose(features, expected, atol=1e-4)

    def test_batch_of_different_lengths_is_refused_until_the_tokenizer_has_a_token(self, artifact: Path) -> None:
        tokenizer = CompiledTokenizer.from_pretrained(artifact)
        assert tokenizer(TEXTS[0], return_tensors="pt")["input_ids"].shape[0] == 1
        for settings in ({}, {"padding": True}):
            with pytest.raises(InputError, match="has no padding token") as caught:
                tokenizer(TEXTS, return_tensors="pt", **settings)
            assert "set tokenizer.pad_token" in caught.value.hint
        tokenizer.pad_token = "the"  # noqa: S105 - a word
        assert tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"].shape[0] == len(TEXTS)

    def test_error_that_has_nothing_to_do_with_padding_stays(self, artifact: Path) -> None:
        with pytest.raises(ValueError, match="text input must be of type"):
            CompiledTokenizer.from_pretrained(artifact)([1])


class TestTaskOfModulesJson:
    MODULES = ("models.Transformer", "models.Pooling", "models.Normalize")

    def write(self, folder: Path, modules: tuple[str, ...], **settings: str) -> Path:
        entries = [
            {"idx": n, "name": str(n), "path": "", "type": f"sentence_transformers.{module}"}
            for n, module in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        return folder

    def test_model_that_pools_is_for_sentence_similarity_whatever_its_architecture(
        self, model_copy: Callable[[HfTask], Path]
    ) -> None:
        assert detect_task(self.write(model_copy(HfTask.FILL_MASK), self.MODULES)) is HfTask.SENTENCE_SIMILARITY

    def test_other_models_of_sentence_transformers_have_the_task_of_their_architecture(
        self, model_copy: Callable[[HfTask], Path]
    ) -> None:
        folder = model_copy(HfTask.TEXT_CLASSIFICATION)
        self.write(folder, ("models.Transformer",), model_type="CrossEncoder")
        assert detect_task(folder) is HfTask.TEXT_CLASSIFICATION
        self.write(folder, self.MODULES, model_type="SparseEncoder")
        assert detect_task(folder) is HfTask.TEXT_CLASSIFICATION

    @pytest.mark.parametrize("architectures", ["BertModel", [1], {"BertModel": 1}])
    def test_architectures_of_another_type_are_refused(
        self, model_copy: Callable[[HfTask], Path], architectures: Any
    ) -> None:
        folder = model_copy(EMBED)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(SourceError, match=r"Expected a list of class names as architectures in config\.json"):
            detect_task(folder)


class TestTokensThatTheModelLacks:
    def add_token(self, folder: Path, **settings: bool) -> int:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        size = len(tokenizer)
        tokenizer.add_tokens(["flubber"], **settings)
        tokenizer.save_pretrained(folder)
        return size

    def build(self, folder: Path, out_dir: Path) -> dict[str, Any]:
        spec = {
            "target": "torchscript",
            "hf_task": "feature-extraction",
            "components": [
                {"max_sequence_length": 32, "shape_buckets": [bucket.model_dump() for bucket in BUCKETS]}
            ],
        }
        source = {"uri": folder.as_uri(), "revision": "0" * 64, "digest": "0" * 64}
        out_dir.mkdir()
        return build_artifact(
            {"source_dir": str(folder), "out_dir": str(out_dir), "spec": spec, "source": source, "threads": 1}
        )

    def test_compile_warns_and_a_text_with_the_token_is_refused(
        self, model_copy: Callable[[HfTask], Path], tmp_path: Path
    ) -> None:
        folder = model_copy(EMBED)
        size = self.add_token(folder)
        value = self.build(folder, tmp_path / "artifact")
        expected = (
            f"tokens that the model lacks (1 in all), for example 'flubber' with the id {size}; the model has"
        )
        assert expected in value["warnings"][0]

        pipeline = CompiledPipeline.from_pretrained(tmp_path / "artifact")
        assert np.isfinite(pipeline(TEXTS[0])).all()
        with pytest.raises(InputError, match=f"input_ids contains {size}, but the model takes numbers from 0 to"):
            pipeline("the flubber film")

    def test_token_that_the_tokenizer_adds_to_every_text_is_refused(
        self, model_copy: Callable[[HfTask], Path], tmp_path: Path
    ) -> None:
        folder = model_copy(EMBED)
        size = self.add_token(folder, special_tokens=True)
        content = json.loads((folder / "tokenizer.json").read_text())
        special_tokens = content["post_processor"]["special_tokens"]
        special_tokens["[CLS]"] |= {"ids": [size]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(SourceError, match="adds such a token to every text"):
            self.build(folder, tmp_path / "artifact")


class TestModelInMemory:
    def test_quantized_model_is_refused(self, tiny_model: ModelFactory, tmp_path: Path) -> None:
        import torch

        model = transformers.AutoModel.from_pretrained(tiny_model(EMBED))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        with pytest.raises(SpecError, match="BertModel is already quantized") as caught:
            save_model(quantized, tmp_path / "model")
        assert "precision='int8'" in caught.value.hint
        assert not (tmp_path / "model").exists()

    def test_model_that_cannot_be_saved_is_one_line(
        self, tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = transformers.AutoModel.from_pretrained(tiny_model(EMBED))
        model.config.id2label = {0: object()}
        with pytest.raises(SpecError, match="The BertModel cannot be saved: TypeError: ") as caught:
            save_model(model, tmp_path / "model")
        assert "\n" not in str(caught.value)


def test_quantized_folder_is_refused(
    model_copy: Callable[[HfTask], Path], in_process: InProcess, tmp_path: Path
) -> None:
    folder = model_copy(EMBED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SpecError, match=r"already quantized \(gptq in its config\.json\)"):
        in_process.compile(folder, tmp_path / "artifact", target="torchscript", hf_task=EMBED)


def test_fetch_that_is_off_finds_the_model_of_an_escaped_uri(
    pipeline: Pipeline, model_copy: Callable[[HfTask], Path]
) -> None:
    model = model_copy(EMBED)
    folder = model.rename(model.with_name("my model, 100%"))
    fetched = pipeline.fetch(pipeline.request(folder.as_uri()))
    for name in (folder.as_uri(), str(folder)):
        reused = pipeline.fetch(pipeline.request(name, steps={"fetch": False}))
        assert (reused.digest, reused.cached) == (fetched.digest, True)


def test_folder_of_the_cpp_compiler_has_no_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    spaced = tmp_path / "my home"
    spaced.mkdir()
    for folder, expected in ((tmp_path, str(tmp_path)), (spaced, "/tmp")):  # noqa: S108
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert _compiler_folder() == expected


@pytest.mark.slow
def test_aot_inductor_compiles_below_a_path_with_spaces(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    spaced = tmp_path / "my 'home' & more"
    spaced.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spaced))
    components = [ComponentSpec(max_sequence_length=32)]
    in_process.compile(
        tiny_model(EMBED), spaced / "artifact", target="aot-inductor", hf_task=EMBED, components=components
    )
    assert np.isfinite(CompiledPipeline.from_pretrained(spaced / "artifact")(sentences()[0])).all()
