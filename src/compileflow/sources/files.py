"""The files that make up a model in its folder, and checks that they are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import is_zipfile

from compileflow.contracts import json_files
from compileflow.errors import SourceError, first_line
from compileflow.source_model.sentence_files import MODULE_WEIGHTS, MODULES_FILE
from compileflow.spec import HfTask

SAFE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
LEGACY_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
CONFIG = (
    "config.json", "generation_config.json", "*_config.json", "*/config.json",
    "modules.json", "config_sentence_transformers.json",
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "tokenization_settings.json", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.jinja", "spiece*", "bpe.codes", "sentencepiece*",
)  # fmt: skip
CODE = ("*.py",)
# The files that transformers looks for, in its order; an index names further files.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# PEFT and adapters write these instead of weights, or beside the weights of the base model.
_ADAPTERS = ("adapter_config.json", "adapter_model.*", "pytorch_adapter.bin", "pytorch_lora_weights.*")
# Weights in formats that compileflow does not read.
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_COPY_AGAIN = "Copy or download the model again."
_NO_MODEL = "Give the folder that save_pretrained wrote, or a Hub id as owner/name."
_NO_TRANSFORMER = (
    "compileflow compiles models that begin with a Transformer, not with CLIPModel, StaticEmbedding or BoW. "
    "If the Transformer is in a folder of its own, load the model with sentence-transformers and save it again."
)
_JSON_TYPES = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean",
    type(None): "null",
}  # fmt: skip
# JSON files that transformers or sentence-transformers read. Others may hold anything, for example the list
# data_config.json of a training run.
_READ_JSON = (
    "config.json", "*/config.json", "generation_config.json", "*processor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "tokenizer*.json", "tokenization_settings.json",
    "special_tokens_map.json", "added_tokens.json", "vocab*.json",
)  # fmt: skip
# Other exports of the same weights, and files that a training run left.
_SKIPPED_FOLDERS = ("onnx", "openvino", "coreml", "checkpoint-*", "runs", ".*", "__pycache__")


def kind_of(name: str) -> str:
    """Return the part of a model that a file belongs to: weights, tokenizer, config, code, or ''."""
    for kind, patterns in (
        ("weights", SAFE_WEIGHTS + LEGACY_WEIGHTS + tuple(f"*/{name}" for name in MODULE_WEIGHTS)),
        ("tokenizer", TOKENIZER),
        ("config", CONFIG),
        ("code", CODE),
    ):
        if any(fnmatch(name, pattern) for pattern in patterns):
            return kind
    return ""


def is_interface_file(name: str) -> bool:
    """Return whether the Hugging Face classes read a file beside the weights: configuration, tokenizer or code."""
    return kind_of(name) in ("config", "tokenizer", "code")


def choose_files(names: list[str], place: str) -> tuple[str, ...]:
    """Choose the files that make up the model, and of its weights those that transformers loads.

    Args:
        names: Paths of all files, relative to the model's folder.
        place: Name of the place, for errors.

    Raises:
        SourceError: config.json or the weights are missing, or the folder holds an adapter.
    """
    candidates = []
    for name in sorted(names):
        folders = PurePosixPath(name).parts[:-1]
        is_skipped = any(fnmatch(folder, pattern) for folder in folders for pattern in _SKIPPED_FOLDERS)
        if not is_skipped and (not folders or (len(folders) == 1 and kind_of(name) == "config")):
            candidates.append(name)
    adapters = [name for name in candidates if _matches(name, _ADAPTERS)]
    if adapters:
        raise SourceError(
            f"{place} holds a PEFT adapter: {adapters[0]}. Its base model alone would answer differently.",
            hint="Merge it into its base model (merge_and_unload) and save the result with save_pretrained.",
        )
    if "config.json" not in candidates:
        has_modules = MODULES_FILE in candidates
        gguf_name = next((name for name in candidates if name.endswith(".gguf")), None)
        raise SourceError(
            f"{place} does not hold a model: config.json is missing"
            + (f", although there is {MODULES_FILE} of sentence-transformers." if has_modules else "."),
            hint=_NO_TRANSFORMER
            if has_modules
            else f"Give the GGUF file itself, with its path: {gguf_name}."
            if gguf_name
            else _NO_MODEL,
        )
    weights = {*_choose_weights(candidates, place), *_module_weights(candidates, names)}
    return tuple(
        name for name in sorted({*candidates, *weights}) if name in weights or kind_of(name) not in ("weights", "")
    )


def _module_weights(candidates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the weights of the modules of sentence-transformers, one file for each folder with a config.json."""
    if MODULES_FILE not in candidates:
        return []
    folders = [PurePosixPath(name).parent for name in candidates if PurePosixPath(name).name == "config.json"]
    paths = [[f"{folder}/{name}" for name in MODULE_WEIGHTS] for folder in folders]
    return [next(path for path in choices if path in names) for choices in paths if set(choices) & set(names)]


def _choose_weights(names: Sequence[str], place: str) -> tuple[str, ...]:
    main_file = next((name for name in _WEIGHTS if name in names), None)
    patterns = SAFE_WEIGHTS if main_file and "safetensors" in main_file else LEGACY_WEIGHTS
    if main_file is not None and not main_file.endswith(".index.json"):
        return (main_file,)
    weights = tuple(name for name in names if _matches(name, patterns) and name not in _WEIGHTS)
    if main_file is None or not weights:
        other_weights = [name for name in names if _matches(name, _OTHER_WEIGHTS)]
        found_files = ", ".join([*filter(None, [main_file]), *other_weights][:3])
        raise SourceError(
            f"{place} does not hold weights: expected model.safetensors, pytorch_model.bin, or an index and its "
            f"shards, got {found_files or 'none of them'}.",
            hint="Save the model with save_pretrained, or download the complete repository.",
        )
    return (main_file, *weights)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def choose_files_below(folder: Path, place: str) -> tuple[str, ...]:
    """Choose the files below a folder that make up the model; see `choose_files`."""
    return choose_files(
        [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], place
    )


def folder_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the folders that hold a model, if the models of an upload lie in folders beside each other.

    Args:
        paths: Paths of the files, relative to the upload. A registry may cut the extension of config.json.
    """
    parts = [PurePosixPath(path).parts for path in paths if path]
    configs = [names for names in parts if names[-1] in ("config", "config.json")]
    if any(len(names) == 1 for names in configs):
        return ()
    return tuple(sorted({names[0] for names in configs if len(names) == 2}))


def model_folder(root: Path) -> Path:
    """Return the folder with config.json: an upload of a folder under its name adds a level."""
    inner = [path for path in sorted(root.iterdir()) if (path / "config.json").is_file()]
    return inner[0] if len(inner) == 1 and not (root / "config.json").is_file() else root


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Check that a model's files are complete, without reading its tensors.

    Raises:
        SourceError: A file cannot be read, weights are truncated or have another format, an index names a missing
            file, or a JSON file is not the JSON that transformers expects.
    """
    for name in names:
        # safetensors reports a file without permission as missing.
        with read_errors(), (folder / name).open("rb"):
            pass
        if fnmatch(name, "*.index.json"):
            _check_index(folder / name, names)
        elif _matches(name, _READ_JSON):
            read_model_json(folder / name, name)
        elif name.endswith(".safetensors"):
            _check_safetensors(folder / name)
        elif name.endswith(".bin") and kind_of(name) == "weights":
            _check_pickled(folder / name)


@contextmanager
def read_errors() -> Iterator[None]:
    """Turn an error of the operating system about a file of a model into one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise SourceError(
            f"{error.filename} cannot be read: {first_line(error)}.",
            hint="Give this user access to the model's files, and let no program change them meanwhile.",
        ) from error


def _check_index(index: Path, names: Sequence[str]) -> None:
    missing_shards = sorted(map(str, _shards(index) - set(names)))
    outside = [name for name in missing_shards if name.startswith("/") or ".." in PurePosixPath(name).parts]
    if outside:
        raise SourceError(
            f"{index.name} names the shard {outside[0]}, which lies outside the model's folder.",
            hint="Copy the shard into that folder, and name it in the index without a folder.",
        )
    if missing_shards:
        raise SourceError(
            f"{index.name} names the shard {missing_shards[0]}, which is missing ({len(missing_shards)} shards in "
            "all).",
            hint="Copy or download the complete model again.",
        )


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except SafetensorError as error:
        raise SourceError(
            f"{path.name} is truncated or not safetensors ({path.stat().st_size} bytes): {error}.",
            hint=_COPY_AGAIN,
        ) from error


def _check_pickled(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(2)
    # torch.save writes a ZIP archive, whose directory is at its end; before torch 1.6 it wrote a pickle.
    if not (is_zipfile(path) if start == b"PK" else start[:1] == b"\x80"):
        raise SourceError(
            f"{path.name} is truncated or not a file of torch.save ({path.stat().st_size} bytes).",
            hint=_COPY_AGAIN,
        )


def read_json(path: Path, place: str) -> Any:
    """Read a JSON file from outside: a card or a test file.

    Args:
        path: Path of the file.
        place: Name of the file, for the error.

    Raises:
        SourceError: The file is larger than 64 MiB, not JSON in UTF-8, or nested too deeply.
    """
    return _parsed(path, place, hint="Upload it as JSON.")


def read_model_json(path: Path, place: str) -> Any:
    """Read a JSON file of a model: an object, or for modules.json a list of objects.

    Args:
        path: Path of the file.
        place: Name of the file, for the error.

    Raises:
        SourceError: The file is empty, cut off, not JSON in UTF-8, or holds another type.
    """
    content = _parsed(path, place, hint=_COPY_AGAIN)
    expected_type = list if path.name == "modules.json" else dict
    if not isinstance(content, expected_type):
        raise SourceError(
            f"Expected {_JSON_TYPES[expected_type]} in {place}, got {_JSON_TYPES[type(content)]}.",
            hint=_COPY_AGAIN,
        )
    return content


def _parsed(path: Path, place: str, *, hint: str) -> Any:
    try:
        return json_files.read_json(path)
    except ValueError as error:
        reason = first_line(error)
        problem = "empty" if path.stat().st_size == 0 else f"not JSON: {reason}"
        if "BOM" in reason:
            hint = "Save the file as UTF-8 without BOM, the byte order mark at its start."
        raise SourceError(f"{place} is {problem}.", hint=hint) from error


def card_task(card: Mapping[str, Any], uri: str, registry_task: str | None = None) -> HfTask | None:
    """Return the task in a version's model card, or without one the task that its registry names.

    Raises:
        SourceError: The task is unknown.
    """
    # A card of several models has one object for each, such as model_params_base.
    objects = [value for key, value in card.items() if "model_params" in key and isinstance(value, dict)]
    names = [
        name
        for value in objects
        for key, name in value.items()
        if key.startswith("huggingface_pipeline_task") and name
    ]
    tasks = {_task(name, uri) for name in names or filter(None, [registry_task])}
    # With models of different tasks, the architecture of the chosen one decides.
    return tasks.pop() if len(tasks) == 1 else None


def _task(name: str, uri: str) -> HfTask:
    try:
        return HfTask(name)
    except ValueError as error:
        raise SourceError(
            f"The card of {uri} names the task {name!r}, which compileflow does not support.",
            hint=f"Supported tasks: {', '.join(HfTask)}.",
        ) from error


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index.name} is not an index of weights: {type(error).__name__}: {error}.", hint=_COPY_AGAIN
        ) from error
