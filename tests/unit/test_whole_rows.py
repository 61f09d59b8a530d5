"""Code that reads rows whole answers like the code of transformers, which reads them in steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from compileflow.source_model.delta_rule import delta_rule
from compileflow.source_model.whole_rows import whole_rows

LONGEST = 40
_STATE_SPACE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}
_WINDOWED = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "attention_window": [8, 8],
    "max_position_embeddings": 130,
    "pad_token_id": 1,
    "sep_token_id": 2,
}
MODELS: dict[str, Any] = {
    "mamba": lambda: transformers.MambaModel(transformers.MambaConfig(**_STATE_SPACE)),
    "falcon_mamba": lambda: transformers.FalconMambaModel(transformers.FalconMambaConfig(**_STATE_SPACE)),
    "longformer without global tokens": lambda: transformers.LongformerModel(
        transformers.LongformerConfig(**_WINDOWED)
    ),
    "longformer with a global token": lambda: transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(**_WINDOWED)
    ),
    "longformer with global questions": lambda: transformers.LongformerForQuestionAnswering(
        transformers.LongformerConfig(**_WINDOWED)
    ),
    "led": lambda: transformers.LEDModel(
        transformers.LEDConfig(
            vocab_size=100,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            attention_window=[8, 8],
            max_encoder_position_embeddings=130,
        )
    ).get_encoder(),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_read_whole_have_the_same_answers(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids, mask = _rows()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        with whole_rows(model, LONGEST):
            whole = model(input_ids=ids, attention_mask=mask)[0]
        again = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1
    assert torch.equal(again, expected)


@pytest.mark.parametrize("length", [1, 37, 64, 65, 200])
@pytest.mark.parametrize("is_decay_per_channel", [False, True])
def test_delta_rule_of_a_whole_row_is_that_of_its_chunks(length: int, is_decay_per_channel: bool) -> None:
    torch.manual_seed(0)
    heads = 2 if is_decay_per_channel else 4
    query, key = torch.randn(2, 2, length, 2, 16)
    # Keys that resemble one another, as in text, make the inverse of a chunk large.
    key = key * 0.1 + torch.randn(2, 16)
    value, beta = torch.randn(2, length, heads, 8), torch.rand(2, length, heads)
    decay = -0.05 * torch.rand(2, length, heads, *((16,) if is_decay_per_channel else ()))
    expected, _ = (chunk_kimi_delta_attention if is_decay_per_channel else torch_chunk_gated_delta_rule)(
        query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
    )
    whole, _ = delta_rule(query, key, value, decay, beta, longest=200, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three rows of 37, 25 and 12 tokens with three separators each."""
    ids = torch.randint(5, 100, (3, 37))
    mask = torch.ones_like(ids)
    for row, length in enumerate((37, 25, 12)):
        ids[row, [4, 5, length - 1]] = 2
        ids[row, length:] = 1
        mask[row, length:] = 0
    return ids, mask
