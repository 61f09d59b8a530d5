"""Which files of a model folder make the model, and whether they are whole."""

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
# What is larger is no card and no test file, and would have to be in memory whole.
_LONGEST_JSON_BYTES = 64 * 2**20
# Other exports of the same weights, and a training run's leftovers.
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


def choose_files(names: list[str], where: str) -> tuple[str, ...]:
    """Choose the files that make the model; safetensors win over pickled weights.

    Raises:
        SourceError: no config.json, or no weights.
    """
    kept = []
    for name in sorted(names):
        folders = PurePosixPath(name).parts[:-1]
        if len(folders) <= 1 and not any(fnmatch(f, skip) for f in folders for skip in _SKIPPED_FOLDERS):
            kept.append(name)
    if "config.json" not in kept:
        raise SourceError(
            f"{where} holds no model: there is no config.json.",
            hint="Give the folder that save_pretrained wrote, or a Hub id as owner/name.",
        )
    top = [name for name in kept if "/" not in name or kind_of(name) == "config"]
    safe = [name for name in top if any(fnmatch(name, pattern) for pattern in SAFE_WEIGHTS)]
    legacy = [name for name in top if any(fnmatch(name, pattern) for pattern in LEGACY_WEIGHTS)]
    weights = safe or legacy
    if not any(not name.endswith(".index.json") for name in weights):
        raise SourceError(
            f"{where} holds no weights: neither *.safetensors nor pytorch_model*.bin.",
            hint="Save the model with save_pretrained, or fetch the whole repository.",
        )
    return tuple(name for name in top if name in weights or kind_of(name) not in ("weights", ""))


def check_weights(folder: Path, names: tuple[str, ...]) -> None:
    """Check that safetensors files are whole, without reading their tensors.

    Raises:
        SourceError: a file is truncated or not safetensors, or an index names a file that is absent.
    """
    from safetensors import SafetensorError, safe_open

    for name in names:
        if fnmatch(name, "*.index.json"):
            shards = _shards(folder / name)
            absent = sorted(shards - set(names))
            if absent:
                raise SourceError(
                    f"{name} names the shard {absent[0]}, which is absent ({len(absent)} in all).",
                    hint="Copy or download the model again, whole.",
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


def read_json(path: Path, where: str) -> Any:
    """Read a JSON file that others wrote: a card, a test file.

    Args:
        path: The file.
        where: What it is, for the error.

    Raises:
        SourceError: it is larger than 64 MiB, no UTF-8, no JSON, or nested too deeply.
    """
    size = path.stat().st_size
    if size > _LONGEST_JSON_BYTES:
        raise SourceError(
            f"{where} has {size} bytes; at most {_LONGEST_JSON_BYTES} are read.", hint="Upload a smaller one."
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is no JSON: {first_line(error)}.", hint="Upload it as JSON.") from error


def card_task(card: Mapping[str, Any], uri: str, otherwise: str | None = None) -> HfTask | None:
    """Return the task that a version's model card names, or else the one that its registry does.

    Raises:
        SourceError: it is none that is known.
    """
    parameters = card.get("model_params")
    named = parameters.get("huggingface_pipeline_task") if isinstance(parameters, dict) else None
    name = named or otherwise
    if name is None:
        return None
    try:
        return HfTask(name)
    except ValueError as error:
        raise SourceError(
            f"{uri} says that its task is {name!r}, which cannot be compiled.",
            hint=f"Tasks are: {', '.join(HfTask)}.",
        ) from error


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index.name} is no index of weights: {type(error).__name__}: {error}.",
            hint="Copy or download the model again.",
        ) from error
