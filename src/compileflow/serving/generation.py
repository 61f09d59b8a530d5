"""GeneratingModel: a compiled decoder behind transformers' `generate`, whose code chooses every token.

The class only reads tokens and keeps what was read. Sampling, beams, stopping and streaming are transformers' own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Continuation
from compileflow.errors import InputError, in_words
from compileflow.serving.component import GraphErrors, LoadedComponent
from compileflow.serving.greedy import write_greedily
from compileflow.serving.interface_files import load_part
from compileflow.serving.model import FLAGS, CompiledModel
from compileflow.serving.streaming import check_iterable, generate_in_thread, streamer_of_one_text
from compileflow.serving.whole_texts import can_write, write_texts

logger = logging.getLogger(__name__)
# Arguments that reach decoders and change no answer of a compiled one.
_IGNORED = ("tokenizer", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class ReadRows:
    """The rows that a compiled decoder has read, in the place of transformers' cache.

    It belongs to one call of `generate`, or to several that continue the same rows.

    Attributes:
        is_compileable: False: transformers must not compile the code around it.
        rows: Number of rows; None until the first ones are read.
    """

    is_compileable = False

    def __init__(self, continuation: Continuation):
        self.continuation = continuation
        self.rows: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of each row were read, with padding."""
        return self.continuation.length

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep the rows that a beam search goes on with.

        Args:
            beam_idx: Number of the row that takes each place, a tensor of shape (rows,).
        """
        self.continuation.reorder(beam_idx.numpy())
        self.rows = len(beam_idx)

    def __deepcopy__(self, memo: Any = None) -> ReadRows:
        raise InputError(
            "The rows that a compiled decoder has read cannot be copied.",
            hint="Go on from past_key_values once, and read the prompt again for another continuation.",
        )

    __copy__ = __deepcopy__

    def crop(self, max_length: int) -> None:
        """Refuse to forget tokens, which a compiled decoder cannot do.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "A compiled decoder cannot forget tokens that it has read.", hint="Read the shorter prompt again."
        )

    def __del__(self) -> None:
        self.continuation.close()


class GeneratingModel(CompiledModel):
    """A compiled decoder. `generate` is transformers' own, and a call gives logits as the source model does.

    Each call of `generate` keeps its own rows, so calls are safe from several threads.

    Attributes:
        generation_config: Settings of `generate`, from generation_config.json or else from config.json.
    """

    _is_stateful = True
    _supports_cache_class = False

    def __init__(self, graph: LoadedComponent, config: Any):
        super().__init__(graph, config)
        self.generation_config = load_generation_config(graph.artifact, config)

    def __call__(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: ReadRows | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read tokens and return the logits of the tokens that follow each of them.

        Args:
            input_ids: Token ids of shape (rows, tokens).
            attention_mask: 0 for padding, of shape (rows, all tokens read so far). None: no padding.
            position_ids: Position of each token in its row. None: counted from the mask.
            past_key_values: Rows that were read before, as an earlier call returned them. None: read new rows.
            use_cache: True returns the rows that were read, as past_key_values.
            logits_to_keep: Return the logits of so many of the last tokens; 0 returns all.
            return_dict: False returns a plain tuple, as in transformers.
            **kwargs: Other arguments of transformers' models, which must not ask for more outputs.

        Raises:
            InputError: The inputs do not suit the component, or there are more tokens than it takes.
        """
        _refuse(kwargs)
        if not isinstance(past_key_values, ReadRows | None):
            raise _other_cache()
        ids = self._checked_ids(input_ids, past_key_values)
        past = past_key_values
        if past is None and use_cache:
            past = ReadRows(self.graph.start())
        mask = _as_mask(attention_mask)
        if past is None:
            logits = self.run({"input_ids": ids, **({} if mask is None else {"attention_mask": mask})})["logits"]
        else:
            logits = self._read(past, ids, mask, _as_array(position_ids), last=logits_to_keep == 1)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        output = self.as_output({"logits": logits})
        if past is not None:
            output["past_key_values"] = past
        return output if return_dict is not False else output.to_tuple()

    forward = __call__  # type: ignore[assignment]

    def generate(self, inputs: Any = None, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Write tokens after a prompt; arguments and answer are those of transformers' `generate`.

        Meanwhile torch uses one thread, unless it runs the graph itself: its threads go on spinning after each
        operation, and the graph would wait for the processor.

        Raises:
            InputError: The prompt is not a tensor, does not suit the component, or leaves no room for a token; or
                the streamer takes another text.
        """
        _check_prompt(inputs, *map(kwargs.get, ("input_ids", "attention_mask", "past_key_values")))
        mixin: Any = super()
        target, _ = self.artifact.target_for(self.graph.record, None)
        threads = nullcontext() if "torch" in target.capabilities.runtime else _ONE_TORCH_THREAD
        with streamer_of_one_text(streamer) as taker, threads:
            return mixin.generate(inputs, *args, streamer=taker, **kwargs)

    def _read(self, past: ReadRows, ids: Any, mask: Any, positions: Any, *, last: bool) -> Any:
        """Read the next tokens of rows, with the mask and the positions that transformers leaves out."""
        rows, length = ids.shape
        if past.rows not in (None, rows):
            raise InputError(
                f"Expected {past.rows} rows, as many as past_key_values holds, got {rows}.",
                hint="Go on with all rows of the earlier answer, or leave past_key_values out.",
            )
        total = past.get_seq_length() + length
        if mask is None:
            mask = np.ones((rows, total), np.int64)
        if mask.shape != (rows, total):
            raise InputError(
                f"Expected attention_mask of shape {(rows, total)} for {total} tokens in all, got {mask.shape}.",
                hint="Give a mask of all tokens, those that were read before included.",
            )
        if positions is None:
            positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)[:, -length:]
        positions = np.array(np.broadcast_to(positions, ids.shape))
        with GraphErrors({"input_ids": ids, "attention_mask": mask, "position_ids": positions}):
            logits = past.continuation.read(ids, mask, positions, last=last)
        past.rows = rows
        return logits

    def _checked_ids(self, input_ids: Any, past: ReadRows | None) -> Any:
        ids = _as_array(input_ids)
        if past is not None and past.rows is not None and ids is not None and ids.ndim == 2 and not ids.size:
            raise InputError(
                f"past_key_values holds {past.get_seq_length()} tokens of each row, and the prompt has no more.",
                hint="Give a prompt that is longer than what was read, or leave past_key_values out.",
            )
        if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
            found = "nothing" if ids is None else f"{ids.dtype} of shape {ids.shape}"
            if ids is not None and ids.dtype.kind not in "iufb":
                found = in_words(input_ids)
            raise InputError(
                f"Expected input_ids as integers of shape (rows, tokens), got {found}.",
                hint="Tokenize the prompt; a compiled decoder takes neither embeddings nor an empty prompt.",
            )
        vocab_size = self.graph.record.vocab_size
        if vocab_size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise InputError(
                f"Expected token ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}.",
                hint="Use the tokenizer of this model.",
            )
        total = ids.shape[1] + (past.get_seq_length() if past is not None else 0)
        if total > self.longest:
            raise InputError(f"The model was compiled for {self.longest} tokens, got {total}.", hint=_LONGER_ROWS)
        return np.ascontiguousarray(ids, np.int64)

    @property
    def longest(self) -> int:
        """Tokens that a row can have, those of the prompt included."""
        return self.graph.record.max_sequence_length

    def can_generate(self) -> bool:
        """Return True."""
        return True

    def generate_yield(self, input_ids: Any, *, streamer: Any = None, **settings: Any) -> Iterator[Any]:
        """Generate in a thread, and yield what it writes as soon as it is written.

        Closing the iterator ends the generation at its next token.

        Args:
            input_ids: Token ids of one prompt.
            streamer: A `TextStreamer`, whose pieces of text or events are yielded. None: token ids are yielded.
            **settings: Further arguments of `generate`.

        Raises:
            InputError: The token ids are not those of one prompt, or the streamer is not a `TextStreamer`. At the
                first piece: the streamer takes another text, or `generate` refuses the call.
        """
        check_iterable(streamer)
        ids = self._checked_ids(_as_rows(input_ids), None)
        if len(ids) != 1:
            raise InputError(
                f"generate_yield takes one prompt, got {len(ids)}.", hint="Call it once for each prompt."
            )
        if settings.get("attention_mask") is not None:
            import torch

            mask = _as_rows(settings["attention_mask"])
            settings["attention_mask"] = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
        return generate_in_thread(self, ids, streamer, settings)

    def _sample(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """Write the likeliest tokens here, or let the runtime do so; transformers' loop does all else."""
        mixin: Any = super()
        settings = {"generation_config": generation_config, "streamer": streamer, **inputs}
        writer, past = self.graph.writer, inputs.get("past_key_values")
        if writer is not None and can_write(logits_processor, stopping_criteria, **settings):
            return write_texts(writer, input_ids, inputs.get("attention_mask"), generation_config)
        if (
            past is None
            or logits_processor
            or generation_config.do_sample
            or generation_config.return_dict_in_generate
        ):
            return mixin._sample(input_ids, logits_processor, stopping_criteria, **settings)
        inputs.pop("synced_gpus", None)
        answer = self._prefill(input_ids, generation_config, inputs)
        mask = inputs.get("attention_mask")
        mask = np.ones((past.rows, past.get_seq_length()), np.int64) if mask is None else mask.numpy()
        positions = inputs.get("position_ids")
        pad_id = generation_config._pad_token_tensor
        return write_greedily(
            partial(self._read, past, last=True),
            answer.logits[:, -1].numpy(),
            input_ids,
            stopping_criteria,
            attention_mask=mask,
            position_ids=mask.sum(axis=-1, keepdims=True) - 1 if positions is None else positions[:, -1:].numpy(),
            pad_id=0 if pad_id is None else int(pad_id),
            streamer=streamer,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` the rows that this model reads, in the place of transformers' cache.

        Raises:
            InputError: The call wants a cache of transformers.
        """
        rows = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation is not None or not isinstance(rows, ReadRows | None):
            raise _other_cache()
        if rows is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ReadRows(self.graph.start())

    def _prepare_generated_length(self, *, input_ids_length: int, **kwargs: Any) -> Any:
        """End a generation at the longest row at the latest.

        Raises:
            InputError: The prompt leaves no room for a token.
        """
        mixin: Any = super()
        settings = mixin._prepare_generated_length(input_ids_length=input_ids_length, **kwargs)
        if input_ids_length >= self.longest:
            raise InputError(
                f"The prompt has {input_ids_length} tokens, and the model was compiled for {self.longest}.",
                hint=_LONGER_ROWS,
            )
        if settings.max_length > self.longest:
            logger.warning(
                "generation ends at %d tokens, for which the model was compiled, instead of %d",
                self.longest,
                settings.max_length,
            )
            settings.max_length = self.longest
        return settings


class _OneTorchThread:
    """Limits torch to one thread in blocks that may run in several threads at once.

    A new thread begins with the count that was set last, so no block may take another block's limit for the count
    to restore.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = self._count = 0

    def __enter__(self) -> None:
        import torch

        with self._lock:
            if self._blocks == 0:
                self._count = torch.get_num_threads()
            self._blocks += 1
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        import torch

        with self._lock:
            self._blocks -= 1
            torch.set_num_threads(self._count)


_ONE_TORCH_THREAD = _OneTorchThread()
_LONGER_ROWS = "Shorten the prompt, or compile the model with a larger maximum length."


def load_generation_config(artifact: OpenArtifact, config: Any) -> Any:
    """Return the settings of `generate` that an artifact holds, or those that follow from its configuration."""
    from transformers import GenerationConfig

    if (artifact.folder / "generation_config.json").is_file():
        return load_part(artifact, "GenerationConfig")
    return GenerationConfig.from_model_config(config)


def check_prompts(tokenizer: Any, prompts: Any) -> None:
    """Check what a pipeline is called with: a text, a chat, or a list of texts or of chats.

    A chat is a list of messages with "role" and "content". Generators and data sets are not read.

    Args:
        tokenizer: Tokenizer of the pipeline.
        prompts: What the pipeline is called with.

    Raises:
        InputError: It is something else, or the tokenizer has no template for chats.
    """
    if not isinstance(prompts, list | tuple):
        is_series = hasattr(prompts, "__getitem__") or hasattr(prompts, "__next__")
        if not is_series or hasattr(prompts, "dtype") or isinstance(prompts, bytes | Mapping):
            raise _other_prompt("a text, a chat, or a list of texts or of chats", prompts)
        return
    first = prompts[0] if prompts else None
    # As in transformers: the first entry decides, and a tuple is not a list of texts.
    chats = [prompts] if isinstance(first, Mapping) else prompts if isinstance(first, list | tuple) else []
    if not prompts or (isinstance(prompts, tuple) and not chats):
        raise _other_prompt("a text, a chat, or a list of texts or of chats", prompts)
    for number, chat in enumerate(chats):
        if not isinstance(chat, list | tuple) or not chat:
            raise _other_prompt(f"prompt {number} as a chat", chat)
        for position, message in enumerate(chat):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise _other_prompt(f'message {position} of a chat with "role" and "content"', message)
    for number, prompt in enumerate(() if chats else prompts):
        if not isinstance(prompt, str):
            raise _other_prompt(f"prompt {number} as a text", prompt)
    if chats and getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "The prompt is a chat, but the model's tokenizer has no chat template.",
            hint="Write the prompt as one text, or set tokenizer.chat_template to the template that the model was "
            "trained with.",
        )


def generating_bases(kind: type[CompiledModel]) -> tuple[type, ...]:
    """Return the bases of a compiled decoder's class, given the class that loads it."""
    from transformers import GenerationMixin, PreTrainedModel

    if issubclass(kind, GeneratingModel):
        own: tuple[type, ...] = (kind,)
    else:
        own = (GeneratingModel,) if kind is CompiledModel else (kind, GeneratingModel)
    return (*own, PreTrainedModel, GenerationMixin)


def _other_cache() -> InputError:
    """Return the error for a call with a cache of transformers."""
    return InputError(
        "A compiled decoder keeps its own cache; it takes neither cache_implementation nor another cache.",
        hint="Leave them out; past_key_values of an earlier answer of this model can be passed.",
    )


def _other_prompt(expected: str, value: Any) -> InputError:
    return InputError(
        f"Expected {expected}, got {in_words(value)}.",
        hint='Give a text such as "It is", or a chat such as [{"role": "user", "content": "Hello"}].',
    )


def _check_prompt(inputs: Any, input_ids: Any, attention_mask: Any, past_key_values: Any) -> None:
    """Check the prompts of `generate`: tensors, as transformers needs them, of the same shape.

    Raises:
        InputError: A value is not a tensor, or the shapes differ.
    """
    import torch

    ids = input_ids if inputs is None else inputs
    for name, value in (("input_ids", ids), ("attention_mask", attention_mask)):
        if not isinstance(value, torch.Tensor | None):
            raise InputError(
                f"generate takes {name} as a tensor of shape (rows, tokens), got {in_words(value)}.",
                hint='Tokenize the prompt: model.generate(**tokenizer(text, return_tensors="pt")).',
            )
    # With rows that were read before, the mask covers them as well.
    if (
        ids is not None
        and attention_mask is not None
        and past_key_values is None
        and ids.shape != attention_mask.shape
    ):
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has shape {tuple(ids.shape)}.",
            hint="Make the shapes equal.",
        )


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a compiled decoder does not have.

    Raises:
        InputError: An argument asks for another output, or is unknown.
    """
    for name, value in arguments.items():
        if name in FLAGS and value:
            raise InputError(
                f"{name}=True asks for outputs that the compiled model does not have.",
                hint="Use the source model for these outputs.",
            )
        if name not in (*FLAGS, *_IGNORED) and value is not None:
            raise InputError(
                f"The compiled decoder has no input {name}.",
                hint="It takes input_ids, attention_mask, position_ids and past_key_values.",
            )


def _as_mask(value: Any) -> Any:
    """Return a mask as integers.

    Raises:
        InputError: A number is neither 0 nor 1.
    """
    mask = _as_array(value)
    if mask is None or mask.dtype.kind in "iu":
        return mask
    if mask.dtype.kind != "f" or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"Expected an attention_mask of 0 for padding and 1 for tokens, got {in_words(value)}.",
            hint="Pass the mask that the tokenizer returns.",
        )
    return mask.astype(np.int64)


def _as_array(value: Any) -> Any:
    """Return a tensor or a list as an array; integers get 64 bits, and other types are refused later.

    Raises:
        InputError: The rows of a list differ in length.
    """
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(
            f"Expected rows of the same length, got {in_words(value)}.",
            hint='Let the tokenizer pad the prompts: tokenizer(texts, return_tensors="pt", padding=True).',
        ) from error
    is_integer = array.dtype.kind in "biu" and np.can_cast(array.dtype, np.int64)
    return np.ascontiguousarray(array, np.int64) if is_integer else array


def _as_rows(value: Any) -> Any:
    """Return integers of one row, or of several, as an array of shape (rows, tokens); anything else unchanged."""
    array = _as_array(value)
    return value if array is None or array.dtype.kind not in "iu" else np.atleast_2d(array)
