"""Whole texts: plain greedy generation by a runtime that writes by itself, in the place of transformers' loop."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import WritingRunner


def can_write(
    logits_processor: Any,
    stopping_criteria: Any,
    *,
    generation_config: Any,
    streamer: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> bool:
    """Say whether a call of `generate` asks for no more than the likeliest tokens up to an end.

    Args:
        logits_processor: What transformers would do to the logits.
        stopping_criteria: When transformers would stop.
        generation_config: Settings of the call.
        streamer: Gets each token; the runtime gives whole texts only.
        past_key_values: Rows that were read before.
        **_: Arguments of `forward`, which change no token.
    """
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    ends = generation_config._eos_token_tensor
    return (
        not generation_config.do_sample
        and not generation_config.return_dict_in_generate
        and not logits_processor
        and all(type(rule) in (EosTokenCriteria, MaxLengthCriteria) for rule in stopping_criteria)
        and streamer is None
        and (past_key_values is None or past_key_values.get_seq_length() == 0)
        and (ends is None or ends.numel() == 1)
    )


def write_texts(writer: WritingRunner, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
    """Write on from each prompt, and return the texts as `generate` does.

    Args:
        writer: Component whose runtime writes.
        input_ids: Prompts of shape (rows, tokens), padded on the left.
        attention_mask: 0 for padding, of the same shape; None: no padding.
        generation_config: Settings of the call, as `generate` prepared them.

    Returns:
        Prompts and new tokens, padded on the right, of shape (rows, all tokens).
    """
    import torch

    ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    end_id = None if ends is None else int(ends.flatten()[0])
    new_tokens = generation_config.max_length - input_ids.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    texts = [
        torch.from_numpy(writer.write(ids[mask.bool()].numpy(), new_tokens=new_tokens, end_id=end_id))
        for ids, mask in zip(input_ids, attention_mask, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0 if pad is None else int(pad))
    return torch.cat([input_ids, padded], dim=1)
