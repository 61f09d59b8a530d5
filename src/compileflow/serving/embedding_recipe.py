"""How a source model's tokens become one embedding, read from its sentence-transformers files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.contracts.digests import safe_relative_path
from compileflow.errors import LoadError
from compileflow.source_model.interface import length_limit

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Older files have a flag for each mode; several modes are concatenated in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SUPPORTED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EmbeddingRecipe:
    """The steps from a text to its embedding, except for the model itself.

    Attributes:
        poolings: Pooling modes of the tokens; the results of several modes are concatenated.
        normalize: Whether embeddings are scaled to length 1.
        max_tokens: Longest text of the source model in tokens, including special tokens; None if unspecified.
        lower_case: Whether texts are lowercased before the tokenizer normalises them.
        prompt: Text in front of every text.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """Read modules.json and the files named there; without it, pool the mean as sentence-transformers does.

    Raises:
        LoadError: A module has weights, or a setting is not supported.
    """
    modules = _read(folder / "modules.json", [])
    if not modules:
        return EmbeddingRecipe(max_tokens=_tokenizer_maximum(folder))
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    kinds = dict(zip(names, modules, strict=True))
    unknown_kinds = sorted(set(kinds) - set(_SUPPORTED))
    if unknown_kinds or len(kinds) != len(modules) or "Pooling" not in kinds:
        raise LoadError(
            f"Compiled embeddings support Transformer, one Pooling and Normalize; modules.json lists "
            f"{', '.join(names)}.",
            hint="Load the artifact for feature-extraction and use sentence-transformers for the rest.",
        )
    pooling = _read(_folder_of(folder, kinds["Pooling"]) / "config.json", {})
    prompt = _prompt(folder)
    if prompt and not pooling.get("include_prompt", True):
        raise LoadError(
            f"The model excludes its prompt {prompt!r} from pooling, which compiled embeddings do not support.",
            hint="Load the artifact for feature-extraction and pool its tokens.",
        )
    max_tokens, lower_case = _text_settings(_folder_of(folder, kinds.get("Transformer", {"path": ""})))
    # Newer files have the maximum in the tokenizer's configuration.
    max_tokens = max_tokens or _tokenizer_maximum(folder)
    return EmbeddingRecipe(_poolings(pooling), _normalizes(folder, kinds), max_tokens, lower_case, prompt)


def checked_poolings(poolings: tuple[str, ...], setting: str) -> tuple[str, ...]:
    """Return pooling modes unchanged if all are known.

    Raises:
        LoadError: A mode is unknown; the hint lists the known ones.
    """
    unknown_modes = [mode for mode in poolings if mode not in POOLINGS]
    if unknown_modes or not poolings:
        raise LoadError(
            f"{setting} has unknown modes: {unknown_modes}.", hint=f"Known modes: {', '.join(POOLINGS)}."
        )
    return poolings


def _poolings(config: Mapping[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return checked_poolings((modes,) if isinstance(modes, str) else tuple(modes), "Pooling of modules.json")


def _normalizes(folder: Path, kinds: Mapping[str, Any]) -> bool:
    if "Normalize" not in kinds:
        return False
    config = _read(_folder_of(folder, kinds["Normalize"]) / "config.json", {})
    names = {config.get(f"module_{side}_name") or "sentence_embedding" for side in ("input", "output")}
    if names != {"sentence_embedding"}:
        raise LoadError(
            f"Normalize of modules.json must work on sentence_embedding, got {', '.join(sorted(names))}.",
            hint="Load the artifact for feature-extraction and use sentence-transformers for the rest.",
        )
    return True


def _text_settings(folder: Path) -> tuple[int | None, bool]:
    # The name contains the model type: sentence_bert_config.json, sentence_roberta_config.json.
    paths = sorted(folder.glob("sentence_*_config.json"))
    config = _read(paths[0], {}) if paths else {}
    if config.get("processing_kwargs"):
        raise LoadError(
            f"{paths[0].name} has processing_kwargs, which compiled embeddings do not support: "
            f"{config['processing_kwargs']}.",
            hint="Load the artifact for feature-extraction and tokenize with these settings.",
        )
    return config.get("max_seq_length"), bool(config.get("do_lower_case", False))


def _tokenizer_maximum(folder: Path) -> int | None:
    return length_limit(_read(folder / "tokenizer_config.json", {}).get("model_max_length"))


def _prompt(folder: Path) -> str:
    config = _read(folder / "config_sentence_transformers.json", {})
    name = config.get("default_prompt_name")
    return str(config.get("prompts", {}).get(name) or "") if name else ""


def _folder_of(folder: Path, module: Mapping[str, Any]) -> Path:
    path = str(module["path"])
    try:
        return folder / safe_relative_path(path) if path else folder
    except ValueError as error:
        raise LoadError(f"modules.json has an invalid path: {error}.", hint="Do not use this model.") from error


def _read(path: Path, absent: Any) -> Any:
    if not path.is_file():
        return absent
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LoadError(f"{path.name} cannot be read: {error}.", hint="Compile the model again.") from error
    if not isinstance(value, type(absent)):
        raise LoadError(
            f"Expected {type(absent).__name__} in {path.name}, got {type(value).__name__}.",
            hint="Compile the model again.",
        )
    return value
