"""How a source model's tokens become one embedding, as its own sentence-transformers files say."""

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
# Older files have a flag for each; several at once are joined in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_KNOWN = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EmbeddingRecipe:
    """What stands between a text and its embedding, besides the graph.

    Attributes:
        poolings: How tokens are pooled; several are joined end to end.
        normalize: Whether embeddings have length 1.
        max_tokens: Longest text that the source model takes, special tokens included; None: it does not say.
        lower_case: Whether texts are lowered before the tokenizer's own normalisation.
        prompt: Put before every text.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """Read modules.json and what it names; without it, the mean of all tokens, as sentence-transformers has it.

    Raises:
        LoadError: a module that has weights of its own, or settings that are not known here.
    """
    modules = _read(folder / "modules.json", [])
    if not modules:
        return EmbeddingRecipe(max_tokens=_tokenizer_maximum(folder))
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    kinds = dict(zip(names, modules, strict=True))
    unknown = sorted(set(kinds) - set(_KNOWN))
    if unknown or len(kinds) != len(modules) or "Pooling" not in kinds:
        found = ", ".join(names)
        raise LoadError(
            f"modules.json asks for {found}; of these, compiled embeddings know Transformer, one Pooling and "
            f"Normalize{': ' + unknown[0] + ' is not compiled' if unknown else ''}.",
            hint="Load the artifact for feature-extraction, and do the rest with sentence-transformers.",
        )
    pooling = _read(_folder_of(folder, kinds["Pooling"]) / "config.json", {})
    prompt = _prompt(folder)
    if prompt and not pooling.get("include_prompt", True):
        raise LoadError(
            f"The model pools without its prompt {prompt!r}, which compiled embeddings cannot.",
            hint="Load the artifact for feature-extraction, and pool its tokens.",
        )
    max_tokens, lower_case = _text_settings(_folder_of(folder, kinds.get("Transformer", {"path": ""})))
    # Newer files leave it to the tokenizer's own.
    max_tokens = max_tokens or _tokenizer_maximum(folder)
    return EmbeddingRecipe(_poolings(pooling), _normalizes(folder, kinds), max_tokens, lower_case, prompt)


def checked_poolings(asked: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return ways of pooling as they are.

    Raises:
        LoadError: one is unknown; the hint lists those there are.
    """
    unknown = [mode for mode in asked if mode not in POOLINGS]
    if unknown or not asked:
        raise LoadError(f"{where} asks for the pooling {unknown}.", hint=f"There are: {', '.join(POOLINGS)}.")
    return asked


def _poolings(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return checked_poolings((named,) if isinstance(named, str) else tuple(named), "modules.json's Pooling")


def _normalizes(folder: Path, kinds: Mapping[str, Any]) -> bool:
    if "Normalize" not in kinds:
        return False
    config = _read(_folder_of(folder, kinds["Normalize"]) / "config.json", {})
    names = {config.get(f"module_{side}_name") or "sentence_embedding" for side in ("input", "output")}
    if names != {"sentence_embedding"}:
        raise LoadError(
            f"modules.json's Normalize works on {', '.join(sorted(names))}; known is sentence_embedding.",
            hint="Load the artifact for feature-extraction, and do the rest with sentence-transformers.",
        )
    return True


def _text_settings(folder: Path) -> tuple[int | None, bool]:
    # The name has the model type in it: sentence_bert_config.json, sentence_roberta_config.json.
    found = sorted(folder.glob("sentence_*_config.json"))
    config = _read(found[0], {}) if found else {}
    if config.get("processing_kwargs"):
        raise LoadError(
            f"{found[0].name} has processing_kwargs {config['processing_kwargs']}, which are not known here.",
            hint="Load the artifact for feature-extraction, and tokenize as the model wants it.",
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
        raise LoadError(f"modules.json: {error}.", hint="Do not use this model.") from error


def _read(path: Path, absent: Any) -> Any:
    if not path.is_file():
        return absent
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LoadError(f"{path.name} cannot be read: {error}.", hint="Compile the model again.") from error
    if not isinstance(value, type(absent)):
        raise LoadError(f"{path.name} holds a {type(value).__name__}.", hint="Compile the model again.")
    return value
