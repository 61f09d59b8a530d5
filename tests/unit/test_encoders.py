"""Encoders of encoder-decoder models, such as sentence-t5: embeddings as sentence-transformers gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bart.modeling_bart import BartEncoder

from compileflow import CompiledPipeline, HfTask
from compileflow.source_model.load import load_source_model
from compileflow.source_model.tasks import task_of_architecture
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import compiled_folder
from tests.models import sentences

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 80,
}
TEXTS = [*sentences()[:6], "", " ".join(sentences()[:20])]


@pytest.fixture
def save(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a small random model with a tokenizer: `save(model class, settings of its configuration)`."""

    def write(model_class: Any, settings: dict[str, Any]) -> Path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(HfTask.FEATURE_EXTRACTION, "roberta"))
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = model_class.config_class(vocab_size=len(tokenizer), **ids, **settings)
        torch.manual_seed(2)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


def test_sentence_t5_embeds_as_sentence_transformers_does(save: Callable[..., Path], tmp_path: Path) -> None:
    transformer = modules.Transformer(str(save(transformers.T5EncoderModel, T5)), max_seq_length=48)
    dense = modules.Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    model = st.SentenceTransformer(
        modules=[transformer, modules.Pooling(32), dense, modules.Normalize()], device="cpu"
    )
    model.save(str(tmp_path / "source"), create_model_card=False)
    artifact = compiled_folder(tmp_path / "source", "torchscript", HfTask.SENTENCE_SIMILARITY, tmp_path)

    embeddings = CompiledPipeline.from_pretrained(artifact)(TEXTS)

    assert_same_result(embeddings, model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "settings", "loaded_class"),
    [
        (transformers.T5ForConditionalGeneration, T5, "T5EncoderModel"),
        (transformers.MT5EncoderModel, T5, "MT5EncoderModel"),
        (transformers.UMT5EncoderModel, T5, "UMT5EncoderModel"),
        (BartEncoder, BART, "BartEncoder"),
        # The whole model shifts its input to make the input of its decoder.
        (transformers.BartModel, BART, "BartModel"),
    ],
)
def test_encoder_is_loaded_where_the_whole_model_needs_a_decoders_input(
    save: Callable[..., Path], model_class: Any, settings: dict[str, Any], loaded_class: str
) -> None:
    folder = save(model_class, settings)
    source_model = load_source_model(folder, HfTask.FEATURE_EXTRACTION)
    whole = model_class.from_pretrained(folder).eval()
    expected_model = whole.get_encoder() if model_class is transformers.T5ForConditionalGeneration else whole
    ids = torch.tensor([[7, 8, 9, 10, 2]])

    assert type(source_model.model).__name__ == loaded_class
    with torch.inference_mode():
        expected = expected_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 5), np.int64)}
    assert_same_result(source_model.run(inputs)["last_hidden_state"], expected.numpy(), atol=1e-5)


def test_name_of_an_encoder_stands_for_feature_extraction() -> None:
    for name in ("T5EncoderModel", "M2M100Encoder", "BartEncoder"):
        assert task_of_architecture(name) is HfTask.FEATURE_EXTRACTION
