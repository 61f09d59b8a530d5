"""Small source models for the conformance suite: random weights with fixed seeds, built in each run."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from compileflow.source_model import AUTO_CLASSES
from compileflow.spec import HfTask

MAX_TOKENS = 64


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HfTask], Path]:
    """Build a model once for each task: `tiny_model(hf_task)` returns its folder. Do not write to it."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def build(hf_task: HfTask) -> Path:
        folder = root / hf_task.value
        _tokenizer().save_pretrained(folder)
        _model(hf_task).save_pretrained(folder)
        return folder

    return build


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=MAX_TOKENS)


def _model(hf_task: HfTask) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
    )
    model = getattr(transformers, AUTO_CLASSES[hf_task]).from_config(config)
    # Larger weights than the default ones make a lost mask or token type visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3 if "embeddings" in name else 0.15)
    return model.eval()
