"""Greedy generation without the work of transformers between two tokens, which takes up to a tenth of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Reads one token for each row, with the mask of all tokens and the positions, and returns the logits that follow.
Read = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[Any]]


def write_greedily(
    read: Read,
    logits: NDArray[Any],
    input_ids: Any,
    stopping_criteria: Any,
    *,
    attention_mask: Any,
    position_ids: Any,
    pad_id: int,
    streamer: Any,
) -> Any:
    """Write the likeliest token after each row until all rows end, as the loop of transformers does.

    Args:
        read: Reads the next token of each row.
        logits: Logits of the first new tokens, of shape (rows, words).
        input_ids: Token ids of the rows, of shape (rows, tokens).
        stopping_criteria: When a row ends, as transformers prepared it; it limits the length.
        attention_mask: 0 for padding, of shape (rows, all tokens read so far).
        position_ids: Position of each row's last token, of shape (rows, 1).
        pad_id: Token of a row that has ended.
        streamer: Gets the new tokens of each step; None: there is none.

    Returns:
        The rows with their new tokens, of shape (rows, all tokens).
    """
    import torch
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    rows, length = input_ids.shape
    longest = stopping_criteria.max_length
    ends = [
        end
        for rule in stopping_criteria
        if type(rule) is EosTokenCriteria
        for end in rule.eos_token_id.flatten().tolist()
    ]
    others = [rule for rule in stopping_criteria if type(rule) not in (EosTokenCriteria, MaxLengthCriteria)]
    texts = np.full((rows, longest), pad_id)
    texts[:, :length] = input_ids
    seen = attention_mask.shape[1]
    mask = np.ones((rows, seen + longest - length), np.int64)
    mask[:, :seen] = attention_mask
    is_open = np.ones(rows, bool)
    while True:
        tokens = logits.argmax(axis=-1)
        if ends:
            tokens = np.where(is_open, tokens, pad_id)
        texts[:, length] = tokens
        length += 1
        for end in ends:
            is_open &= tokens != end
        for rule in others:
            is_open &= ~rule(torch.from_numpy(texts[:, :length]), None).numpy()
        if streamer is not None:
            streamer.put(torch.from_numpy(tokens))
        if length == longest or not is_open.any():
            break
        seen += 1
        position_ids = position_ids + 1
        logits = read(tokens[:, None], mask[:, :seen], position_ids)[:, -1]
    if streamer is not None:
        streamer.end()
    return torch.from_numpy(texts[:, :length].copy())
