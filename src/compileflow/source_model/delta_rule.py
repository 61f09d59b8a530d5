"""delta_rule: the gated delta rule of Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear and others, for a whole row.

transformers reads a row in chunks of 64 tokens, one after another. See Yang et al. 2024,
https://arxiv.org/abs/2412.06464, and for decays per channel https://arxiv.org/abs/2510.26692.
"""

from __future__ import annotations

from typing import Any

# Tokens in each part of a row.
CHUNK = 64


def delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    *,
    longest: int,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Any, None]:
    """Return the outputs of the gated delta rule, and None for the state after the row.

    The state before a chunk is a linear function of the state before an earlier one, so the functions of all
    chunks are combined in log2(chunks) rounds.

    Args:
        query: Queries of shape (batch, sequence, key heads, key size).
        key: Keys of the same shape.
        value: Values of shape (batch, sequence, value heads, value size).
        g: Logarithms of the decays, at most 0, of shape (batch, sequence, value heads) or, per channel of the
            keys, (batch, sequence, value heads, key size).
        beta: Rates of the updates, of shape (batch, sequence, value heads).
        longest: Longest row.
        use_qk_l2norm_in_kernel: Divide queries and keys by their lengths.
    """
    import torch

    dtype, length, size = query.dtype, query.shape[1], query.shape[-1]
    repeats = value.shape[2] // key.shape[2]
    query, key = (tensor.repeat_interleave(repeats, dim=2) for tensor in (query, key))
    decay = g if g.ndim == value.ndim else g[..., None]
    # Shape from here on: (batch, heads, chunks, tokens of the chunk, ...).
    query, key, value, decay, beta = (_chunks(tensor) for tensor in (query, key, value, decay, beta[..., None]))
    if use_qk_l2norm_in_kernel:
        query, key = (tensor * (tensor.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for tensor in (query, key))
    query = query * size**-0.5
    decay = decay.cumsum(dim=3)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)[..., None]
    between = (decay.unsqueeze(4) - decay.unsqueeze(3)).masked_fill(future, float("-inf")).exp()

    def weighted(rows: Any) -> Any:
        """Return the products of rows and keys, each times the decay between their tokens."""
        if between.shape[-1] == 1:
            return rows @ key.transpose(3, 4) * between[..., 0]
        return (rows.unsqueeze(4) * key.unsqueeze(3) * between).sum(-1)

    inverse = _inverse(weighted(key * beta).tril(-1))
    new_values = inverse @ (value * beta)
    read_keys = inverse @ (key * beta * decay.exp())
    written_keys = (key * (decay[:, :, :, -1:] - decay).exp()).transpose(3, 4)
    # The state after a chunk is transition @ (state before it) + state.
    transition = torch.eye(size) * decay[:, :, :, -1, :, None].exp() - written_keys @ read_keys
    state = written_keys @ new_values
    for power in range((max(longest - 1, 0) // CHUNK).bit_length()):
        state = state + transition @ earlier(state, 1 << power)
        transition = transition @ earlier(transition, 1 << power)
    before = earlier(state, 1)
    output = (query * decay.exp()) @ before + weighted(query) @ (new_values - read_keys @ before)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype), None


def earlier(values: Any, distance: int) -> Any:
    """Return the values of an earlier place on axis 2, and zero where there is none."""
    from torch.nn import functional

    padding = (0, 0) * (values.ndim - 3) + (distance, 0)
    return functional.pad(values, padding)[:, :, : values.shape[2]]


def _chunks(tensor: Any) -> Any:
    """Turn (batch, sequence, heads, size) into (batch, heads, chunks, tokens, size) of float32."""
    from torch.nn import functional

    tensor = tensor.transpose(1, 2).float()
    batch, heads, length, size = tensor.shape
    padding = (CHUNK - length % CHUNK) % CHUNK
    return functional.pad(tensor, (0, 0, 0, padding)).reshape(batch, heads, -1, CHUNK, size)


def _inverse(below: Any) -> Any:
    """Return the inverse of 1 + `below`, a matrix with values below its diagonal only.

    Blocks on the diagonal are inverted first, and then pairs of them, as in forward substitution.
    """
    import torch

    inverse = torch.eye(CHUNK)
    place = torch.arange(CHUNK)
    for power in range((CHUNK - 1).bit_length()):
        block = place // (1 << power)
        is_beside = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        inverse = inverse - inverse @ (below * is_beside) @ inverse
    return inverse
