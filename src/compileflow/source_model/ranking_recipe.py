"""How the logits of a cross-encoder become scores, read from the files of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compileflow.contracts.toolkit import library_errors
from compileflow.errors import LoadError
from compileflow.source_model.activations import Activation, activation_function
from compileflow.source_model.sentence_files import (
    DAMAGED,
    MODULES_FILE,
    SETTINGS_FILE,
    TextSettings,
    module_list,
    read_file,
    read_text_settings,
)

_HINT = "Compile for text-classification, and use sentence-transformers for the rest."
_SIGMOID, _IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class RankingRecipe:
    """The steps from a pair of texts to its score, except for the transformer itself.

    Attributes:
        activation: Turns logits into scores.
        text: How the model reads pairs. A prompt stands in front of the first text.
    """

    activation: Activation
    text: TextSettings = field(default_factory=TextSettings)


def is_cross_encoder(folder: Path) -> bool:
    """Say whether sentence-transformers saved a folder as a model that scores pairs of texts."""
    if module_list(folder):
        return bool(read_file(folder / SETTINGS_FILE, {}).get("model_type") == "CrossEncoder")
    config = read_file(folder / "config.json", {})
    own_settings = config.get("sentence_transformers")
    return bool(config.get("sbert_ce_default_activation_function")) or (
        isinstance(own_settings, dict) and "activation_fn" in own_settings
    )


def ranks_documents(folder: Path) -> bool:
    """Say whether a folder holds a cross-encoder with one score for each pair of texts."""
    return is_cross_encoder(folder) and _label_count(read_file(folder / "config.json", {})) == 1


def read_ranking_recipe(folder: Path) -> RankingRecipe:
    """Read the activation and the prompts; without any, one logit goes through a sigmoid, and several stay.

    Raises:
        LoadError: A module or a setting is not supported, or has the wrong type.
    """
    with library_errors("The files of the cross-encoder cannot be used", hint=DAMAGED):
        modules = module_list(folder)
        own_files = bool(modules) and is_cross_encoder(folder)
        if own_files and modules != [("Transformer", "")]:
            raise LoadError(
                f"Compiled cross-encoders support one Transformer at the top of the folder; {MODULES_FILE} lists "
                f"{', '.join(name for name, _ in modules)}.",
                hint=_HINT,
            )
        return RankingRecipe(
            activation=activation_function(_activation(folder, own_files=own_files), "The cross-encoder"),
            # sentence-transformers ignores the settings of a model of another kind, such as one of embeddings.
            text=read_text_settings(folder, prompts={}, output="logits", feature="scores", hint=_HINT)
            if own_files
            else TextSettings(),
        )


def _activation(folder: Path, *, own_files: bool) -> str:
    """Return the path of the activation, from the newest place in which it may be named."""
    config = read_file(folder / "config.json", {})
    settings = read_file(folder / SETTINGS_FILE, {}) if own_files else {}
    nested = config.get("sentence_transformers") or {}
    named = (
        settings.get("activation_fn"),
        nested.get("activation_fn"),
        config.get("sbert_ce_default_activation_function"),
    )
    return str(next(filter(None, named), _SIGMOID if _label_count(config) == 1 else _IDENTITY))


def _label_count(config: Mapping[str, Any]) -> int:
    # transformers names two labels unless the file says otherwise.
    return len(config.get("id2label") or range(int(config.get("num_labels", 2))))
