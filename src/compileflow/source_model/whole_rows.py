"""whole_rows: while a model is exported, its code reads at once the rows that it otherwise reads in steps.

A graph has a fixed number of steps. State-space models (Mamba, Falcon-Mamba, Jamba, Zamba) read a row token by
token, models with linear attention (Qwen3-Next, Qwen3.5, Kimi Linear) chunk by chunk, and Longformer and LED cut
it into windows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from compileflow.source_model.delta_rule import CHUNK, delta_rule, earlier

_DELTA_RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


@contextmanager
def whole_rows(model: Any, longest: int) -> Iterator[None]:
    """Let the code of a model read rows whole, with the same answers.

    Args:
        model: The transformers model.
        longest: Longest row of the graph.
    """
    classes = {type(module) for module in model.modules()}
    replacements: list[tuple[Any, str, Callable[..., Any]]] = []
    for code in _code_of(model):
        replacements += [
            (code, "mamba_selective_scan", partial(_scan, longest=longest)),
            *((code, name, partial(delta_rule, longest=longest)) for name in _DELTA_RULES),
            (code, "_get_question_end_index", _first_separator),
        ]
    for model_class in classes:
        replacements.append((model_class, "_pad_to_window_size", _without_padding))
        if hasattr(model_class, "_sliding_chunks_query_key_matmul"):
            replacements.append((model_class, "forward", _windowed_attention))
    originals = [(holder, name, vars(holder)[name]) for holder, name, _ in replacements if name in vars(holder)]
    try:
        for holder, name, function in replacements:
            if name in vars(holder):
                setattr(holder, name, function)
        yield
    finally:
        for holder, name, original in originals:
            setattr(holder, name, original)


def chunk_of(model: Any) -> int:
    """Return the number of tokens in each part of a row that the code above reads in parts; 0 for other models."""
    return CHUNK if any(hasattr(code, name) for code in _code_of(model) for name in _DELTA_RULES) else 0


def _code_of(model: Any) -> set[ModuleType]:
    return {sys.modules[type(module).__module__] for module in model.modules()}


def _scan(
    hidden_states: Any,
    dt: Any,
    A: Any,  # noqa: N803 - the names of the function that it replaces
    B: Any,  # noqa: N803
    C: Any,  # noqa: N803
    D: Any = None,  # noqa: N803
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    longest: int,
    **_: Any,
) -> Any:
    """Return the outputs of a selective scan, whose state is h[t] = a[t] h[t - 1] + b[t].

    After k rounds, each b[t] is the sum over 2^k tokens and each a[t] the product, so log2(longest) rounds are
    enough for all rows (Hillis and Steele 1986, https://doi.org/10.1145/7902.7903).

    Args:
        hidden_states: Inputs of shape (batch, channels, sequence).
        dt: Time steps of the same shape.
        A: Decays of shape (channels, states).
        B: Input weights of shape (batch, states, sequence).
        C: Output weights of the same shape.
        D: Weights of the inputs in the outputs, of shape (channels).
        z: Gate of the shape of the inputs.
        delta_bias: Bias of the time steps, of shape (channels).
        delta_softplus: Apply softplus to the time steps.
        longest: Longest row.
    """
    from torch.nn import functional

    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = functional.softplus(dt)
    # Shape: (batch, channels, sequence, states).
    decay = (A[None, :, None] * dt[..., None]).exp()
    state = dt[..., None] * B.transpose(1, 2)[:, None].float() * hidden_states[..., None].float()
    for distance in (1 << power for power in range(max(longest - 1, 1).bit_length())):
        state = state + decay * earlier(state, distance)
        decay = decay * earlier(decay, distance)
    output = (state.to(hidden_states.dtype) * C.transpose(1, 2)[:, None]).sum(-1)
    if D is not None:
        output = output + hidden_states * D[:, None]
    return output if z is None else output * functional.silu(z)


def _without_padding(_: Any, *, pad_token_id: int, **inputs: Any) -> tuple[Any, ...]:
    """Return the number of padded tokens, and the inputs as they are."""
    return (0, *inputs.values())


def _first_separator(input_ids: Any, sep_token_id: int) -> Any:
    """Return the place of the first separator of each row: the end of the question."""
    return (input_ids == sep_token_id).int().argmax(dim=1)


def _windowed_attention(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    is_index_masked: Any = None,
    is_index_global_attn: Any = None,
    **_: Any,
) -> tuple[Any]:
    """Return the attention of Longformer and LED, computed for all pairs of tokens and masked beyond the window.

    A token attends to the tokens of its window and to the global ones. A global token attends to all tokens,
    through weights of its own.
    """
    import torch

    batch, length, _ = hidden_states.shape

    def heads(projection: Any) -> Any:
        return projection(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def attend(query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = heads(query) @ heads(key).transpose(2, 3) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1, dtype=torch.float32).type_as(scores) @ heads(value)

    place = torch.arange(length, device=hidden_states.device)
    is_near = (place[:, None] - place).abs() <= self.one_sided_attn_window_size
    is_visible = ~is_index_masked[:, None, None]
    is_global = is_index_global_attn[:, None, None]
    local = attend(self.query, self.key, self.value, is_visible & (is_near | is_global))
    local = local.masked_fill(is_index_masked[:, None, :, None], 0.0)
    everywhere = attend(self.query_global, self.key_global, self.value_global, is_visible)
    output = torch.where(is_index_global_attn[:, None, :, None], everywhere, local)
    return (output.transpose(1, 2).reshape(batch, length, self.embed_dim),)
