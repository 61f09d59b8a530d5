"""The modules behind the transformer of a sentence-transformers model: their files, computed with NumPy."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts.toolkit import library_errors
from compileflow.errors import LoadError
from compileflow.source_model.activations import Activation, activation_function
from compileflow.source_model.sentence_files import (
    DAMAGED,
    MODULE_WEIGHTS,
    MODULES_FILE,
    NOT_PLAIN,
    SAVE_SAFE,
    SETTINGS_FILE,
    TextSettings,
    module_list,
    read_file,
    read_text_settings,
    transformer_settings,
    typed,
)

Floats = NDArray[np.float32]
# Arrays of one text by the names of sentence-transformers.
Features = dict[str, Floats]

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
_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"
# Prompts that every model has unless its files give others.
_PROMPTS = {"query": "", "document": ""}
_ACTIVATION = "torch.nn.modules.activation.Tanh"
# Shorter embeddings are divided by this length: eps of torch.nn.functional.normalize.
_SHORTEST = 1e-12
# sentence-transformers divides by at least this number, for texts without a token to pool.
_LEAST_WEIGHT = 1e-9
_LAYER_NORM_EPS = 1e-5
# Types of safetensors files that NumPy has.
_NUMPY_TYPES = ("F64", "F32", "F16")
_HINT = "Compile for feature-extraction, and use sentence-transformers for the rest."


class SentenceModule(Protocol):
    """One step from the tokens of a text to its embedding."""

    def apply(self, features: Features, prompt_length: int) -> None:
        """Compute the module, and write the result into the features of the text."""


@dataclass(frozen=True)
class Pooling:
    """Pools the tokens of a text into one vector.

    Attributes:
        modes: Modes of `POOLINGS`; the results of several modes are concatenated.
        include_prompt: Whether the tokens of the prompt are pooled.
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True

    def apply(self, features: Features, prompt_length: int) -> None:
        """Pool the tokens behind the prompt, or all of them."""
        first = 0 if self.include_prompt else prompt_length
        pooled = [_pooled(mode, features[_TOKENS], first) for mode in self.modes]
        features[_SENTENCE] = pooled[0] if len(pooled) == 1 else np.concatenate(pooled)


@dataclass(frozen=True, eq=False)
class Dense:
    """Multiplies with a matrix, adds a bias, and applies an activation.

    Attributes:
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,); None without one.
        activation: Activation of the result.
        uses_residual: Whether the input is added to the result.
        residual: Matrix for the added input where sizes differ, shape (out_features, in_features).
        source: Feature that the module reads.
        result: Feature that it writes.
    """

    weight: Floats = field(repr=False)
    bias: Floats | None = field(repr=False)
    activation: Activation
    uses_residual: bool = False
    residual: Floats | None = field(default=None, repr=False)
    source: str = _SENTENCE
    result: str = _SENTENCE

    def apply(self, features: Features, prompt_length: int) -> None:
        """Compute activation(W x + b), plus the residual if there is one."""
        value = features[self.source]
        product = value @ self.weight.T
        outcome = self.activation(product if self.bias is None else product + self.bias)
        if self.uses_residual:
            outcome = outcome + (value if self.residual is None else value @ self.residual.T)
        features[self.result] = outcome


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Normalizes an embedding to mean 0 and variance 1, then scales and shifts it; each array has its size."""

    weight: Floats = field(repr=False)
    bias: Floats = field(repr=False)

    def apply(self, features: Features, prompt_length: int) -> None:
        """Compute (x - mean) / sqrt(variance + 1e-5) * weight + bias."""
        centred = features[_SENTENCE] - features[_SENTENCE].mean()
        scale = np.sqrt(np.square(centred).mean() + np.float32(_LAYER_NORM_EPS))
        features[_SENTENCE] = centred / scale * self.weight + self.bias


@dataclass(frozen=True)
class Normalize:
    """Scales vectors to length 1.

    Attributes:
        source: Feature that the module reads.
        result: Feature that it writes.
    """

    source: str = _SENTENCE
    result: str = _SENTENCE

    def apply(self, features: Features, prompt_length: int) -> None:
        """Divide by the length of the vector."""
        features[self.result] = unit_length(features[self.source])


@dataclass(frozen=True)
class EmbeddingRecipe:
    """The steps from a text to its embedding, except for the transformer itself.

    Attributes:
        modules: Modules behind the transformer, in order.
        text: How the model reads texts.
        truncate_dim: Size that embeddings are cut to; None keeps all numbers.
        similarity_fn_name: Function that compares two embeddings: cosine, dot, euclidean or manhattan.
    """

    modules: tuple[SentenceModule, ...] = (Pooling(),)
    text: TextSettings = field(default_factory=lambda: TextSettings(prompts=_PROMPTS))
    truncate_dim: int | None = None
    similarity_fn_name: str = "cosine"

    @property
    def includes_prompt(self) -> bool:
        """Whether the tokens of a prompt are pooled."""
        return all(module.include_prompt for module in self.modules if isinstance(module, Pooling))

    @property
    def normalizes(self) -> bool:
        """Whether the last module scales embeddings to length 1."""
        return self.modules[-1:] == (Normalize(),)

    def without_normalize(self) -> EmbeddingRecipe:
        """Return the recipe without the last module if that scales embeddings to length 1."""
        return replace(self, modules=self.modules[:-1]) if self.normalizes else self

    def with_pooling(self, mode: str) -> EmbeddingRecipe:
        """Return the recipe with another pooling mode.

        Raises:
            LoadError: The mode is unknown.
        """
        modes = _checked_modes((mode,), "pooling")
        modules = tuple(
            replace(module, modes=modes) if isinstance(module, Pooling) else module for module in self.modules
        )
        return replace(self, modules=modules)

    def embed(self, tokens: Floats, prompt_length: int = 0) -> Floats:
        """Turn the tokens of one text, shape (tokens, size), into its embedding.

        Args:
            tokens: Last hidden state of the text's own tokens, without padding.
            prompt_length: Number of tokens of the prompt in front of the text.
        """
        features = {_TOKENS: tokens}
        for module in self.modules:
            module.apply(features, prompt_length)
        return features[_SENTENCE]


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """Read modules.json and the files named there; without it, pool as sentence-transformers then does.

    Raises:
        LoadError: A module or a setting is not supported, or has the wrong type.
    """
    with library_errors(f"{MODULES_FILE} and the files named there cannot be used", hint=DAMAGED):
        return _recipe(folder)


def _recipe(folder: Path) -> EmbeddingRecipe:
    settings, modules = read_file(folder / SETTINGS_FILE, {}), module_list(folder)
    return EmbeddingRecipe(
        modules=_modules(folder, modules) if modules else (_default_pooling(folder),),
        text=read_text_settings(folder, prompts=_PROMPTS, output="last_hidden_state", feature=_TOKENS, hint=_HINT),
        truncate_dim=typed(settings, "truncate_dim", int, SETTINGS_FILE),
        similarity_fn_name=typed(settings, "similarity_fn_name", str, SETTINGS_FILE) or "cosine",
    )


def _default_pooling(folder: Path) -> Pooling:
    """Return the pooling that sentence-transformers chooses for a model without modules.json."""
    config = read_file(folder / "config.json", {})
    architecture = str((config.get("architectures") or [""])[0])
    generates = architecture.endswith("ForCausalLM") and config.get("is_causal", True)
    return Pooling(("lasttoken",)) if generates else Pooling()


def write_module_weights(folder: Path, dest: Path) -> None:
    """Write the weights of all supported modules of a model as safetensors, so that no artifact holds a pickle.

    Args:
        folder: Folder of the source model.
        dest: Folder of the artifact, to which the configurations of the modules were copied.

    Raises:
        LoadError: A file cannot be read.
    """
    from safetensors.numpy import save_file

    for path, weights in module_weights(folder).items():
        save_file(weights, dest / path / MODULE_WEIGHTS[0])


def module_weights(folder: Path) -> dict[str, dict[str, Floats]]:
    """Return the weights of all supported modules of a model: by the module's folder, arrays by name.

    Raises:
        LoadError: A file cannot be read.
    """
    return {
        path: _module_weights(folder / path)
        for name, path in module_list(folder)
        if name in ("Dense", "LayerNorm")
    }


def unit_length(values: Floats) -> Floats:
    """Scale vectors to length 1, over the last axis."""
    # As np.linalg.norm computes them, without its other cases.
    lengths = np.sqrt(np.add.reduce(values * values, axis=-1, keepdims=True))
    return np.asarray(values / np.maximum(lengths, np.float32(_SHORTEST)), dtype=np.float32)


def _pooled(mode: str, tokens: Floats, first: int) -> Floats:
    """Pool the tokens from `first` on. Without any, give what sentence-transformers gives."""
    counted = tokens[first:]
    if mode == "cls":
        return np.asarray(tokens[first if len(counted) else 0])
    if mode == "max":
        return np.asarray(counted.max(axis=0, initial=-np.inf))
    if mode == "lasttoken":
        return tokens[-1] if len(counted) else np.zeros_like(tokens[-1])
    if mode == "weightedmean":
        # Positions count from the first token of the prompt.
        weights = np.arange(first + 1, len(tokens) + 1, dtype=np.float32)
        return np.asarray(weights @ counted / max(weights.sum(), np.float32(_LEAST_WEIGHT)))
    count = np.float32(max(len(counted), _LEAST_WEIGHT))
    return np.asarray(np.add.reduce(counted, axis=0) / (count if mode == "mean" else np.sqrt(count)))


def _modules(folder: Path, modules: Sequence[tuple[str, str]]) -> tuple[SentenceModule, ...]:
    readers: Mapping[str, Callable[[Path, Mapping[str, Any]], SentenceModule]] = {
        "Pooling": _read_pooling,
        "Dense": _read_dense,
        "LayerNorm": _read_layer_norm,
        "Normalize": _read_normalize,
    }
    names = [name for name, _ in modules]
    # Without hidden states, sentence-transformers skips this module.
    skipped_names = ["Dropout"] if _returns_hidden_states(folder, modules) else ["Dropout", "WeightedLayerPooling"]
    transformers = names[:1] if names[:1] == ["Transformer"] else []
    others = names[len(transformers) :]
    if any(name not in (*readers, *skipped_names) for name in others) or others.count("Pooling") != 1:
        raise LoadError(
            f"Compiled embeddings support Transformer, one Pooling, Dense, LayerNorm, Normalize and Dropout of "
            f"sentence-transformers; {MODULES_FILE} lists {', '.join(names)}.",
            hint=_HINT,
        )
    if transformers and modules[0][1]:
        raise LoadError(
            f"The Transformer of {MODULES_FILE} is in the folder {modules[0][1]}, expected it at the top.",
            hint="Load the model with sentence-transformers and save it again.",
        )
    result: list[SentenceModule] = []
    for name, path in modules[len(transformers) :]:
        if name in readers:
            config = read_file(folder / path / "config.json", {})
            result.append(readers[name](folder / path, config))
    return tuple(result)


def _returns_hidden_states(folder: Path, modules: Sequence[tuple[str, str]]) -> bool:
    """Say whether the transformer returns its hidden states, which WeightedLayerPooling needs."""
    settings = transformer_settings(folder / modules[0][1])
    given = [settings.get(name) or {} for name in ("config_kwargs", "config_args")]
    return any(config.get("output_hidden_states") for config in (read_file(folder / "config.json", {}), *given))


def _read_pooling(folder: Path, config: Mapping[str, Any]) -> Pooling:
    modes = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return Pooling(
        _checked_modes((modes,) if isinstance(modes, str) else tuple(modes), f"Pooling of {MODULES_FILE}"),
        include_prompt=bool(config.get("include_prompt", True)),
    )


def _read_dense(folder: Path, config: Mapping[str, Any]) -> Dense:
    source, result = _feature_names("Dense", config)
    weights = _module_weights(folder)
    sizes = (config.get("out_features"), config.get("in_features"))
    uses_residual = bool(config.get("use_residual", False))
    weight = _matrix(weights, "linear.weight", sizes, folder)
    return Dense(
        weight=weight,
        bias=_matrix(weights, "linear.bias", sizes[:1], folder) if config.get("bias", True) else None,
        activation=activation_function(str(config.get("activation_function", _ACTIVATION)), "Dense"),
        uses_residual=uses_residual,
        residual=_matrix(weights, "residual.weight", sizes, folder)
        if uses_residual and sizes[0] != sizes[1]
        else None,
        source=source,
        result=result,
    )


def _read_layer_norm(folder: Path, config: Mapping[str, Any]) -> LayerNorm:
    weights, sizes = _module_weights(folder), (config.get("dimension"),)
    return LayerNorm(*(_matrix(weights, f"norm.{name}", sizes, folder) for name in ("weight", "bias")))


def _read_normalize(folder: Path, config: Mapping[str, Any]) -> Normalize:
    return Normalize(*_feature_names("Normalize", config))


def _feature_names(kind: str, config: Mapping[str, Any]) -> tuple[str, str]:
    source = config.get("module_input_name") or _SENTENCE
    result = config.get("module_output_name") or source
    if source != result or source not in (_TOKENS, _SENTENCE):
        raise LoadError(
            f"{kind} of {MODULES_FILE} must change {_SENTENCE} or {_TOKENS}, got {source} and {result}.",
            hint=_HINT,
        )
    return source, result


def _matrix(weights: Mapping[str, Floats], name: str, sizes: Sequence[Any], folder: Path) -> Floats:
    actual_shape = weights[name].shape if name in weights else None
    if actual_shape != tuple(sizes):
        raise LoadError(
            f"Expected {name} of shape {tuple(sizes)} in {folder.name}, got {actual_shape or 'no such tensor'}.",
            hint="Use the config.json that was saved with these weights.",
        )
    return weights[name]


def _module_weights(folder: Path) -> dict[str, Floats]:
    paths = [folder / name for name in MODULE_WEIGHTS if (folder / name).is_file()]
    if not paths:
        raise LoadError(
            f"{folder.name} has no weights: expected {' or '.join(MODULE_WEIGHTS)}.",
            hint=DAMAGED,
        )
    try:
        return _read_safetensors(paths[0]) if paths[0].suffix == ".safetensors" else _read_pickle(paths[0])
    except pickle.UnpicklingError as error:
        raise LoadError(f"{folder.name}/{paths[0].name} {NOT_PLAIN}.", hint=SAVE_SAFE) from error
    except Exception as error:
        raise LoadError(
            f"{folder.name}/{paths[0].name} cannot be read: {type(error).__name__}: {error}.",
            hint=DAMAGED,
        ) from error


def _read_safetensors(path: Path) -> dict[str, Floats]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        if all(tensors.get_slice(name).get_dtype() in _NUMPY_TYPES for name in tensors.keys()):  # noqa: SIM118
            return {name: tensors.get_tensor(name).astype(np.float32) for name in tensors.keys()}  # noqa: SIM118
    # NumPy has no bfloat16. The files of artifacts hold float32.
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def _read_pickle(path: Path) -> dict[str, Floats]:
    """Read a file from before safetensors; the unpickler accepts tensors only."""
    import torch

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {str(name): tensor.float().numpy() for name, tensor in tensors.items()}


def _checked_modes(modes: tuple[str, ...], setting: str) -> tuple[str, ...]:
    unknown_modes = [mode for mode in modes if mode not in POOLINGS]
    if unknown_modes or not modes:
        raise LoadError(
            f"{setting} has unknown modes: {unknown_modes}.", hint=f"Known modes: {', '.join(POOLINGS)}."
        )
    return modes
