"""The files that make up a model in its folder, and checks that they are complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from compileflow.errors import SourceError, first_line
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
# Cards and test files are smaller; JSON is read into memory completely.
_LONGEST_JSON_BYTES = 64 * 2**20
# Other exports of the same weights, and files that a training run left.
_SKIPPED_FOLDERS = ("onnx", "openvino", "coreml", "checkpoint-*", "runs", ".*", "__pycache__")


def kind_of(name: str) -> str:
    """Return the part of a model that a file belongs to: weights, tokenizer, config, code, or ''."""
    for kind, patterns in (
        ("weights", SAFE_WEIGHTS + LEGACY_WEIGHTS),
        ("tokenizer", TOKENIZER),
        ("config", CONFIG),
        ("code", CODE),
    ):
        if any(fnmatch(name, pattern) for pattern in patterns):
            return kind
    return ""


def choose_files(names: list[str], place: str) -> tuple[str, ...]:
    """Choose the files that make up the model; safetensors take precedence over pickled weights.

    Args:
        names: Paths of all files, relative to the model's folder.
        place: Name of the place, for errors.

    Raises:
        SourceError: config.json or the weights are missing.
    """
    candidates = []
    for name in sorted(names):
        folders = PurePosixPath(name).parts[:-1]
        is_skipped = any(fnmatch(folder, pattern) for folder in folders for pattern in _SKIPPED_FOLDERS)
        if not is_skipped and (not folders or (len(folders) == 1 and kind_of(name) == "config")):
            candidates.append(name)
    if "config.json" not in candidates:
        raise SourceError(
            f"{place} does not hold a model: config.json is missing.",
            hint="Give the folder that save_pretrained wrote, or a Hub id as owner/name.",
        )
    safe = [name for name in candidates if any(fnmatch(name, pattern) for pattern in SAFE_WEIGHTS)]
    legacy_weights = [name for name in candidates if any(fnmatch(name, pattern) for pattern in LEGACY_WEIGHTS)]
    weights = safe or legacy_weights
    if all(name.endswith(".index.json") for name in weights):
        raise SourceError(
            f"{place} does not hold weights: expected *.safetensors or pytorch_model*.bin.",
            hint="Save the model with save_pretrained, or download the complete repository.",
        )
    return tuple(name for name in candidates if name in weights or kind_of(name) not in ("weights", ""))


def choose_files_below(folder: Path, place: str) -> tuple[str, ...]:
    """Choose the files below a folder that make up the model; see `choose_files`."""
    return choose_files(
        [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], place
    )


def model_folder(root: Path) -> Path:
    """Return the folder with config.json: an upload of a folder under its name adds a level."""
    inner = [path for path in sorted(root.iterdir()) if (path / "config.json").is_file()]
    return inner[0] if len(inner) == 1 and not (root / "config.json").is_file() else root


def check_weights(folder: Path, names: tuple[str, ...]) -> None:
    """Check that safetensors files are complete, without reading their tensors.

    Raises:
        SourceError: A file is truncated or not safetensors, or an index names a missing file.
    """
    from safetensors import SafetensorError, safe_open

    for name in names:
        if fnmatch(name, "*.index.json"):
            shards = _shards(folder / name)
            missing_shards = sorted(shards - set(names))
            if missing_shards:
                raise SourceError(
                    f"{name} names the shard {missing_shards[0]}, which is missing "
                    f"({len(missing_shards)} shards in all).",
                    hint="Copy or download the complete model again.",
                )
        elif name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="np"):
                    continue
            except SafetensorError as error:
                size = (folder / name).stat().st_size
                raise SourceError(
                    f"{name} is truncated or not safetensors ({size} bytes): {error}.",
                    hint="Copy or download the model again.",
                ) from error


def read_json(path: Path, place: str) -> Any:
    """Read a JSON file from outside: a card or a test file.

    Args:
        path: Path of the file.
        place: Name of the file, for the error.

    Raises:
        SourceError: The file is larger than 64 MiB, not JSON in UTF-8, or nested too deeply.
    """
    size = path.stat().st_size
    if size > _LONGEST_JSON_BYTES:
        raise SourceError(
            f"Expected {place} to have at most {_LONGEST_JSON_BYTES} bytes, got {size}.",
            hint="Upload a smaller file.",
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not JSON: {first_line(error)}.", hint="Upload it as JSON.") from error


def card_task(card: Mapping[str, Any], uri: str, registry_task: str | None = None) -> HfTask | None:
    """Return the task in a version's model card, or without one the task that its registry names.

    Raises:
        SourceError: The task is unknown.
    """
    parameters = card.get("model_params")
    task = parameters.get("huggingface_pipeline_task") if isinstance(parameters, dict) else None
    name = task or registry_task
    if name is None:
        return None
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
            f"{index.name} is not an index of weights: {type(error).__name__}: {error}.",
            hint="Copy or download the model again.",
        ) from error
