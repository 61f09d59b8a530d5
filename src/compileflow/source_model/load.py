"""Load a source model from its folder: its configuration, and its weights with the head of a task.

Targets compile from the result, and validation uses it as the reference. torch and transformers are imported
inside the functions.
"""

from __future__ import annotations

import gc
import inspect
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compileflow._process.failures import raise_if_out_of_memory
from compileflow._process.memory import trim_heap
from compileflow.contracts import Attention, TensorRecord
from compileflow.errors import SourceError, SpecError, first_line
from compileflow.source_model.choices import with_one_choice
from compileflow.source_model.interface import SourceModel, probe_model
from compileflow.source_model.lengths import x_vector_convolutions
from compileflow.source_model.processor import (
    load_processor,
    signal_lengths,
    signal_records,
    single_image_records,
)
from compileflow.source_model.sentence_files import NOT_PLAIN, SAVE_SAFE
from compileflow.source_model.tasks import (
    AUTO_CLASSES,
    SIGNALS,
    UNMASKED_TASKS,
    model_class_of,
    task_of_architecture,
    tasks_of,
)
from compileflow.source_model.text_model import probe_text_model
from compileflow.spec import HfTask

# Tasks that read hidden states. The pooler of their models may be untrained.
_BARE_MODELS = (HfTask.FEATURE_EXTRACTION, HfTask.IMAGE_FEATURE_EXTRACTION)
_SAVE_TOKENIZER = "Save the tokenizer into the model's folder with save_pretrained."
# Bytes of weights that are worth a second.
_LARGE = 100_000_000
# The model that `loaded_once` holds, with the arguments that it was loaded for.
_loaded: ContextVar[tuple[tuple[Any, ...], SourceModel] | None] = ContextVar("loaded", default=None)


def load_source_model(
    folder: Path,
    hf_task: HfTask,
    *,
    attention: Attention = "sdpa",
    trust_remote_code: bool = False,
) -> SourceModel:
    """Load a source model in fp32 with the head of a task, and run it on a few examples to learn its interface.

    Args:
        folder: Folder that save_pretrained wrote.
        hf_task: Task whose head the model must have.
        attention: Preferred implementation of attention in transformers. A class without sdpa uses eager.
        trust_remote_code: Run Python files of the folder.

    Raises:
        SpecError: The architecture or the weights have no head for the task, or remote code is not trusted.
        SourceError: The configuration or the weights cannot be read.
    """
    key = (folder, hf_task, attention, trust_remote_code)
    loaded = _loaded.get()
    if loaded is not None and loaded[0] == key and not _is_released(loaded[1].model):
        return loaded[1]
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model, has_pooler = _load_model(folder, config, hf_task, attention, trust_remote_code)
    ignored_outputs = () if has_pooler else ("pooler_output",)
    if hf_task.takes_text:
        tokenizer = tokenizer_or_none(folder, trust_remote_code=trust_remote_code)
        image: tuple[TensorRecord, ...] = ()
        if hf_task.modality == "image-text":
            processor = load_processor(folder, "image", trust_remote_code=trust_remote_code)
            image = single_image_records(
                processor, inspect.signature(model.forward).parameters, type(model).__name__
            )
        return probe_text_model(
            model, config, tokenizer, hf_task, ignored_outputs=ignored_outputs, other_inputs=image
        )
    processor = load_processor(folder, hf_task.modality, trust_remote_code=trust_remote_code)
    is_unmasked = hf_task in UNMASKED_TASKS
    inputs = signal_records(
        processor,
        inspect.signature(model.forward).parameters,
        type(model).__name__,
        ignored_inputs=("attention_mask",) if is_unmasked else (),
    )
    lengths = signal_lengths(processor, inputs)
    try:
        source = probe_model(model, config, inputs, lengths, ignored_outputs=ignored_outputs, processor=processor)
        return replace(source, frame_convolutions=x_vector_convolutions(config)) if is_unmasked else source
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise_if_out_of_memory(error)
        shapes = "; ".join(f"{record.name} ({', '.join(map(str, record.axes))})" for record in inputs)
        raise SourceError(
            f"{type(model).__name__} does not run on the inputs that its processor prepares, {shapes}: "
            f"{first_line(error)}.",
            hint="Use the processor that was saved with this model. If it keeps the aspect ratio and the model "
            "takes one size, set size to a height and a width in preprocessor_config.json.",
        ) from error


@contextmanager
def loaded_once(
    folder: Path, hf_task: HfTask, *, attention: Attention = "sdpa", trust_remote_code: bool = False
) -> Iterator[SourceModel]:
    """Load a source model; inside the block, `load_source_model` returns it for the same arguments."""
    source_model = load_source_model(folder, hf_task, attention=attention, trust_remote_code=trust_remote_code)
    token = _loaded.set(((folder, hf_task, attention, trust_remote_code), source_model))
    try:
        yield source_model
    finally:
        _loaded.reset(token)


def release_weights(source_model: SourceModel) -> None:
    """Free the weights of a large source model, which then answers nothing. `load_source_model` reads them again.

    What still refers to the model, or is part of a cycle with it, holds no weights either.
    """
    model = source_model.model
    if sum(parameter.nbytes for parameter in model.parameters()) < _LARGE:
        return
    model.to("meta")
    # Exported graphs, which share the weights, are cycles.
    gc.collect()
    trim_heap()


def _is_released(model: Any) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a source model.

    Raises:
        SourceError: The folder has no tokenizer, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # The Rust library behind fast tokenizers raises bare exceptions.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SourceError(
            f"The source model's tokenizer cannot be loaded: {reason}.", hint=_SAVE_TOKENIZER
        ) from error
    # Without tokenizer files, transformers returns a tokenizer that has only special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise missing_tokenizer()
    return tokenizer


def missing_tokenizer() -> SourceError:
    """Return the error for a model without the files of a tokenizer."""
    return SourceError(
        "The source model has no tokenizer: no file in its folder holds a vocabulary, such as tokenizer.json.",
        hint=_SAVE_TOKENIZER,
    )


def tokenizer_or_none(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder; None for a model that was in memory and came without one."""
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except SourceError:
        return None


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the configuration of a source model.

    Raises:
        SpecError: The model brings Python code that is not trusted, or it is already quantized.
        SourceError: transformers cannot use config.json.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise untrusted_code() from error
        is_unknown = "ecognize" in text  # "Unrecognized model", "does not recognize this architecture"
        raise SourceError(
            f"transformers cannot use config.json of the source model: {text.rstrip('.')}.",
            hint="Use a model that this version of transformers supports."
            if is_unknown
            else "Correct config.json, or use the one that was saved with the weights.",
        ) from error
    refuse_quantized(config)
    return config


def untrusted_code() -> SpecError:
    """Return the error for a model whose Python code is not trusted."""
    return SpecError(
        "The source model brings its own Python code, and trust_remote_code is off.",
        hint="Read that code; if you trust it, set trust_remote_code to true.",
    )


def missing_head(model_type: str, hf_task: HfTask, supported_tasks: Sequence[HfTask]) -> SpecError:
    """Return the error for a task that the architecture does not have a head for."""
    hint = (
        f"Choose one of: {', '.join(supported_tasks)}."
        if supported_tasks
        else "Choose another model: this one has no task that compileflow compiles."
    )
    return SpecError(f"{model_type} has no head for {hf_task.value}.", hint=hint)


def two_parts(class_name: str, signal: str, hf_task: HfTask, has_class: Callable[[str], bool]) -> SpecError:
    """Return the error for a model of two parts, such as CLIP, and a task that reads only one of its inputs.

    Args:
        class_name: Class of the model.
        signal: Input of the model besides text.
        hf_task: The task.
        has_class: Says whether transformers has a class of some name.
    """
    stem = class_name.removesuffix("Model")
    parts = [name for part in ("Text", "Vision", "Audio") if has_class(name := f"{stem}{part}Model")]
    return SpecError(
        f"{class_name} takes text and {signal} inputs together; {hf_task.value} gives it only one.",
        hint=f"Save one of its parts and compile that: {' or '.join(parts) or 'the encoder of one input'}.",
    )


def refuse_quantized(config: Any) -> None:
    """Refuse a model that is already quantized.

    Args:
        config: Configuration of the model, or its config.json with the fields as attributes.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        )
        raise SpecError(
            f"The source model is already quantized ({method or 'quantization_config'} in its config.json).",
            hint="Give the model before quantization, and compile it with precision int8.",
        )


def refuse_other_head(config: Any, hf_task: HfTask) -> None:
    """Refuse a model that was saved with the head of another task. Two heads may have the same tensors.

    Args:
        config: Configuration of the model, or its config.json with the fields as attributes.
        hf_task: The task.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    saved_task = task_of_architecture(architecture)
    if saved_task is None or saved_task.graph_task == hf_task.graph_task:
        return
    if hf_task.graph_task in _BARE_MODELS or (saved_task in _BARE_MODELS and not hf_task.generates):
        return
    if saved_task.generates and hf_task is HfTask.FILL_MASK:
        # BertLMHeadModel has the tensors of BertForMaskedLM.
        return
    raise SpecError(
        f"The model was saved as {architecture}, not for {hf_task.value}.",
        hint=f"Choose the task that the model was trained for, {saved_task.value}, or give another model.",
    )


def _refuse_two_parts(config: Any, hf_task: HfTask) -> None:
    """Refuse a model of two parts, such as CLIP, for a task that reads only one of its inputs."""
    import transformers

    if AUTO_CLASSES[hf_task] != "AutoModel":
        return
    model_class = model_class_of(config, hf_task)
    if model_class is transformers.AutoModel:
        model_class = model_class._model_mapping.get(type(config), model_class)
    signals = [name for name in SIGNALS if hasattr(model_class, f"get_{name}_features")]
    if signals and hasattr(model_class, "get_text_features"):
        raise two_parts(model_class.__name__, signals[0], hf_task, partial(hasattr, transformers))


def _name_outputs(config: Any) -> None:
    """Ask a model for named outputs, and for those alone that it has without further settings."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None:
            part.return_dict = True
            part.output_hidden_states = part.output_attentions = False
            if hasattr(part, "use_cache"):
                part.use_cache = False


def _load_model(
    folder: Path, config: Any, hf_task: HfTask, attention: str, trust_remote_code: bool
) -> tuple[Any, bool]:
    """Return the model, and whether the weights hold everything that its pooler needs."""
    import torch
    from safetensors import SafetensorError

    supported_tasks = tasks_of(config)
    if hf_task not in supported_tasks:
        raise missing_head(config.model_type, hf_task, supported_tasks)
    refuse_other_head(config, hf_task)
    _refuse_two_parts(config, hf_task)
    _name_outputs(config)
    try:
        model, report = model_class_of(config, hf_task).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            # None is sdpa where the class has it, and eager where it does not; "sdpa" would be an error there.
            attn_implementation=None if attention == "sdpa" else attention,
            local_files_only=True,
            output_loading_info=True,
            # Without it, transformers' error names no tensor. Mismatched tensors are refused below.
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise_if_out_of_memory(error)
        raise SourceError(
            f"The source model's weights cannot be loaded: {error}",
            hint="Check that the folder holds one complete model saved by save_pretrained.",
        ) from error
    except ImportError as error:
        raise SourceError(
            f"The source model needs a module that is not installed: {first_line(error)}.",
            hint="Install it, or choose a model without it.",
        ) from error
    except pickle.UnpicklingError as error:
        raise SourceError(f"pytorch_model.bin {NOT_PLAIN}.", hint=SAVE_SAFE) from error
    except MemoryError:
        raise
    except Exception as error:
        raise SourceError(
            f"transformers cannot build the source model from its config.json: {type(error).__name__}: "
            f"{first_line(error)}.",
            hint="Correct config.json; AutoModel.from_pretrained must load the folder.",
        ) from error
    mismatched_keys = report["mismatched_keys"]
    if mismatched_keys:
        name, actual_shape, expected_shape = min(mismatched_keys)
        raise SourceError(
            f"Expected {name} of shape {tuple(expected_shape)} from config.json, got shape {tuple(actual_shape)} "
            f"from the weights; {len(mismatched_keys)} tensors differ.",
            hint="Use the config.json that was saved with these weights.",
        )
    _refuse_unused_layers(model, report["unexpected_keys"])
    missing_keys = set(report["missing_keys"])
    missing_pooler = {key for key in missing_keys if hf_task.graph_task in _BARE_MODELS and "pooler." in key}
    missing_tensors = sorted(missing_keys - missing_pooler)
    saved_task = task_of_architecture((config.architectures or [""])[0])
    if missing_tensors and saved_task is not None and saved_task.graph_task == hf_task.graph_task:
        raise SourceError(
            f"config.json describes a {config.architectures[0]} with {missing_tensors[0]}, but the weights do not "
            f"hold it; {len(missing_tensors)} tensors are missing.",
            hint="Use the config.json that was saved with these weights.",
        )
    if missing_tensors:
        raise SpecError(
            f"The weights hold no {missing_tensors[0]} ({len(missing_tensors)} tensors are missing): the model "
            f"was saved as {', '.join(config.architectures or ['an unknown class'])}, not for {hf_task.value}.",
            hint="Choose the task that the model was trained for, or give a fine-tuned model.",
        )
    if hf_task is HfTask.MULTIPLE_CHOICE:
        model = with_one_choice(model)
    number_positions = getattr(model, "get_rope_index", None)
    if number_positions is not None and "mm_token_type_ids" in inspect.signature(number_positions).parameters:
        _hide_image_positions(model)
    return model.eval(), not missing_pooler


def _refuse_unused_layers(model: Any, unused_names: Collection[str]) -> None:
    """Refuse weights with more layers than config.json describes: transformers drops the rest without a word.

    Args:
        model: The model.
        unused_names: Names of the weights that the model does not have, except those that its class ignores.
    """
    # The names of a bare model and of one with a head differ by this prefix.
    prefix = f"{model.base_model_prefix}."
    known_names = {_without_numbers(name, prefix) for name in model.state_dict()}
    unused_layers = [name for name in unused_names if _without_numbers(name, prefix) in known_names]
    if not unused_layers:
        return
    first_name = min(unused_layers, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
    field = getattr(model.config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    count = getattr(model.config, field, None)
    described = f"{field} is {count}" if isinstance(count, int) else "the model has fewer layers"
    raise SourceError(
        f"The weights hold {first_name}, but {described} in config.json; {len(unused_layers)} tensors are left "
        "over.",
        hint="Use the config.json that was saved with these weights.",
    )


def _without_numbers(name: str, prefix: str) -> str:
    """Return the name of a weight with a sign for the number of each layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name.removeprefix(prefix))


def _hide_image_positions(model: Any) -> None:
    """Hide the function that numbers the positions of text and images from transformers' exporters.

    They call it with the inputs at hand, and add its answer to the inputs of the graph. The model itself calls it
    only if it gets the type of each token, text or image.
    """
    source_class = type(model)

    def get_rope_index(self: Any) -> Any:
        raise AttributeError("get_rope_index")

    members = {"get_rope_index": property(get_rope_index), "__module__": source_class.__module__}
    model.__class__ = type(source_class.__name__, (source_class,), members)
