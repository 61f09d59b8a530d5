"""A text model: its inputs, its longest row, and how its rows may be padded, found by running it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow._process.failures import raise_if_out_of_memory
from compileflow.contracts import Arrays, Padding, TensorRecord
from compileflow.errors import SourceError, first_line
from compileflow.source_model.decoding import refuse_decoder
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import SourceModel, is_close, probe_model
from compileflow.source_model.positions import declared_longest, longest_row
from compileflow.source_model.token_rows import TokenRows, text_config, token_rows
from compileflow.source_model.whole_rows import chunk_of
from compileflow.spec import HfTask

# Lengths of the two probes; shorter ones are for models that take few tokens.
_PROBES = ((7, 11), (5, 8), (4, 6), (3, 4))
# Model types without the form of experts that transformers exports for any number of tokens.
_CHOOSE_EXPERTS = ("dbrx", "longcat_flash", "nllb-moe", "switch_transformers")
# A difference that rounding does not explain, as a share of the norm. Small answers are sums of large numbers.
_VISIBLE = 0.01


def probe_text_model(
    model: Any,
    config: Any,
    tokenizer: Any,
    hf_task: HfTask,
    *,
    ignored_outputs: Sequence[str] = (),
    other_inputs: Sequence[TensorRecord] = (),
) -> SourceModel:
    """Run a text model on a few short rows, and return it with its interface.

    Args:
        model: A transformers model in evaluation mode.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model; None without one.
        hf_task: Task of the model.
        ignored_outputs: Names of outputs that the compiled component does not have.
        other_inputs: Inputs besides the tokens, of fixed shape.

    Raises:
        SourceError: The model does not take token ids, fails on each example, or does not repeat its answers.
    """
    refuse_family(config, type(model).__name__)
    if hf_task.generates:
        # transformers gives a decoder with a cache of its own no other one.
        has_own_cache = not getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        is_stateful = has_own_cache or getattr(model, "_is_stateful", False)
        refuse_decoder(config, type(model).__name__, is_stateful=is_stateful)
    refuse_short(config)
    inputs = (*text_inputs(model, config, tokenizer), *other_inputs)
    tokens = token_rows(tokenizer, config, embedding_rows(model), hf_task)
    _give_pad_token(model, tokenizer, tokens)
    errors: list[Exception] = []
    for lengths in _PROBES:
        try:
            source_model = probe_model(
                model, config, inputs, lengths, ignored_outputs=ignored_outputs, tokens=tokens
            )
            break
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 - models raise whatever they like
            raise_if_out_of_memory(error)
            errors.append(error)
    else:
        raise SourceError(
            f"{type(model).__name__} fails on an example of its own inputs, {', '.join(r.name for r in inputs)}: "
            f"{type(errors[0]).__name__}: {first_line(errors[0])}.",
            hint="Run the model on tokenized text in transformers first: it must answer for these inputs alone.",
        ) from errors[0]
    # The table of positions of the image would look like that of the tokens.
    longest = declared_longest(text_config(config)) if other_inputs else measured_longest(model, inputs, tokens)
    if hf_task.generates:
        source_model = replace(
            source_model,
            # A step of generation answers nothing else.
            outputs=tuple(record for record in source_model.outputs if record.name == "logits"),
            numbers_tokens="position_ids" in inspect.signature(model.forward).parameters,
        )
    return replace(
        source_model,
        longest=longest,
        chunk=_declared_chunk(text_config(config)) or chunk_of(model),
        padding=_padding(source_model, lengths),
    )


def refuse_family(config: Any, class_name: str) -> None:
    """Refuse a model of a family that no target can compile.

    Args:
        config: Configuration of the model, or its config.json with the fields as attributes.
        class_name: Class of the model.

    Raises:
        SourceError: The model draws random numbers, or chooses experts for each token in a loop.
    """
    if "lsh" in (getattr(config, "attn_layers", None) or ()):
        raise SourceError(
            f"{class_name} hashes its tokens with random numbers, which it draws in each call, so no compiled "
            "model can repeat its answers.",
            hint="Choose a model without LSH attention layers (lsh in attn_layers of config.json).",
        )
    if getattr(text_config(config), "model_type", None) in _CHOOSE_EXPERTS:
        raise SourceError(
            f"{class_name} loops over the experts that the tokens of a call choose, and a compiled model has a "
            "fixed number of steps.",
            hint="Choose a model of another family.",
        )


def refuse_short(config: Any) -> None:
    """Refuse a model that has no room for padding beside one token of text and the special tokens around it.

    Args:
        config: Configuration of the model, or its config.json with the fields as attributes.

    Raises:
        SourceError: The model takes fewer tokens than the shortest probe.
    """
    longest, shortest = declared_longest(text_config(config)), _PROBES[-1][-1]
    if longest is not None and longest < shortest:
        raise SourceError(
            f"The model has positions for {longest} tokens, and compileflow takes models for {shortest} or more.",
            hint="Choose a model with a larger max_position_embeddings.",
        )


def longest_of(model: Any) -> int | None:
    """Return the longest row that a model in memory has positions for; None without a limit."""
    config = model.config
    try:
        inputs = text_inputs(model, config, None)
    except SourceError:
        # A subclass may pass its arguments on without names; the saved model has the class of its configuration.
        return declared_longest(text_config(config))
    return measured_longest(
        model, inputs, token_rows(None, config, embedding_rows(model), HfTask.FEATURE_EXTRACTION)
    )


def measured_longest(model: Any, inputs: Sequence[TensorRecord], tokens: TokenRows) -> int | None:
    """Return the longest row that a model has positions for; None without a limit.

    Args:
        model: A transformers model.
        inputs: Inputs of the model.
        tokens: Form of its rows.
    """
    import torch

    for _, length in _PROBES:
        example = example_inputs(inputs, 3, length, tokens)
        tensors = {name: torch.as_tensor(value).to(model.device) for name, value in example.items()}
        # The example may be too long; the probe reports what else is wrong with the model.
        with suppress(Exception):
            return longest_row(model, text_config(model.config), partial(model, **tensors), length)
    return declared_longest(text_config(model.config))


def text_inputs(model: Any, config: Any, tokenizer: Any) -> tuple[TensorRecord, ...]:
    """Return the inputs of a text model: those of the usual three that its `forward` takes.

    Raises:
        SourceError: `forward` does not take input_ids.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    if "input_ids" not in parameters:
        raise SourceError(
            f"{type(model).__name__}.forward has no parameter input_ids; it has {', '.join(parameters)}.",
            hint="Name the inputs in the signature of forward: a compiled graph needs named inputs.",
        )
    names = ["input_ids", "attention_mask"]
    types_count = getattr(text_config(config), "type_vocab_size", None)
    # XLNet has any number of token types, and says so by leaving their number out.
    takes_types = (
        "token_type_ids" in getattr(tokenizer, "model_input_names", ()) if types_count is None else types_count > 1
    )
    if takes_types:
        names.append("token_type_ids")
    return tuple(
        TensorRecord(
            name=name,
            dtype="int64",
            axes=("batch", "sequence"),
            below=types_count if name == "token_type_ids" else None,
        )
        for name in names
        if name in parameters
    )


def _declared_chunk(config: Any) -> int:
    """Return the number of tokens in each part of a row, if the configuration says one; 0 otherwise."""
    chunk = getattr(config, "mamba_chunk_size", None) or getattr(config, "chunk_size", None)
    return chunk if isinstance(chunk, int) else 0


def embedding_rows(model: Any) -> int:
    """Return the number of token ids that a model takes; 0 if it takes any, because it hashes them."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    # Not every model has one table for its tokens.
    except (NotImplementedError, AttributeError):
        weight = None
    if weight is not None and weight.ndim == 2:
        return int(weight.shape[0])
    return int(getattr(text_config(model.config), "vocab_size", None) or 0)


def _give_pad_token(model: Any, tokenizer: Any, tokens: TokenRows) -> None:
    """Name the padding token to a model whose configuration lacks it: some refuse every batch without one."""
    config = text_config(model.config)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = missing_pad_token(tokenizer, tokens)


def missing_pad_token(tokenizer: Any, tokens: TokenRows) -> int:
    """Return the padding token of a model whose configuration lacks it."""
    has_token = getattr(tokenizer, "pad_token_id", None) is not None
    # No token has the number -1: a classifier then reads the last token of each row, as of a single row.
    return tokens.pad_token_id if has_token and tokens.pad_token_id not in tokens.after else -1


def _padding(source_model: SourceModel, lengths: tuple[int, int]) -> Padding:
    """Return the side on which short rows may be padded to a longer one without changing their answers.

    Most models take padding on the right. XLNet reads its answer off the last position, so that its rows are
    padded on the left. Others look at neighbours before the mask counts, pool them, or hash the sequence: no side
    suits them. Pooling is seen only at some lengths, so there are several short rows.

    Raises:
        SourceError: The answer to a row without padding depends on the padding of the other rows.
    """
    if all(record.name != "attention_mask" for record in source_model.inputs) or source_model.tokens is None:
        return "none"
    shortest = min(lengths[0], max(source_model.tokens.shortest, lengths[0] - 3))
    shared: Arrays = {}
    row_lengths, rows, answers = [], [], []
    for length in (*range(shortest, lengths[0] + 1), lengths[1]):
        row = example_inputs(source_model.inputs, 1, length, source_model.tokens) | shared
        # All rows share an input without a batch axis, such as an image.
        shared = {record.name: row[record.name] for record in source_model.inputs if record.axes[0] != "batch"}
        # Funnel does not take rows of three or four tokens, whatever the padding.
        with suppress(RuntimeError, IndexError, ValueError):
            answers.append(source_model.run(row))
            rows.append(row)
            row_lengths.append(length)
    longest_is_equal: list[bool] = []
    sides: tuple[Padding, ...] = ("right", "left")
    for side in sides:
        # A model that refuses the batch cannot take padded rows either.
        with suppress(Exception):
            batch = source_model.run(_stacked(source_model, rows, left=side == "left"))
            pairs = [
                (answer[record.name], row_of(batch, record, number, length, left=side == "left"))
                for number, (length, answer) in enumerate(zip(row_lengths, answers, strict=True))
                for record in source_model.outputs
            ]
            if all(is_close(*pair) for pair in pairs):
                return side
            longest_row = pairs[-len(source_model.outputs) :]
            longest_is_equal.append(all(is_close(*pair, rounding=_VISIBLE) for pair in longest_row))
    if longest_is_equal and not any(longest_is_equal):
        # transformers leaves out a mask that hides no padding, and PaliGemma's attention then looks ahead.
        raise SourceError(
            f"{type(source_model.model).__name__} answers a row differently if another row of a batch is padded. "
            "A compiled model can repeat only one of these answers.",
            hint="Choose another model, or save the part that reads text and compile that.",
        )
    return "none"


def _stacked(source_model: SourceModel, rows: Sequence[Arrays], *, left: bool) -> Arrays:
    """Return a batch of rows, each padded to the last one."""
    batch = {record.name: rows[0][record.name] for record in source_model.inputs if record.axes[0] != "batch"}
    for name, last_row in rows[-1].items():
        if name in batch:
            continue
        fill = source_model.pad_token_id if name == "input_ids" else 0
        paddings = [last_row.shape[1] - row[name].shape[1] for row in rows]
        batch[name] = np.concatenate(
            [
                np.pad(row[name], ((0, 0), (padding, 0) if left else (0, padding)), constant_values=fill)
                for row, padding in zip(rows, paddings, strict=True)
            ]
        )
    return batch


def row_of(batch: Arrays, record: TensorRecord, number: int, length: int, *, left: bool) -> NDArray[Any]:
    """Return an output of one row of a padded batch, cut to the row's length."""
    place = slice(-length, None) if left else slice(length)
    index = {"batch": slice(number, number + 1), "sequence": place}
    return batch[record.name][tuple(index.get(str(axis), slice(None)) for axis in record.axes)]
