"""load_tokenizer: read the tokenizer of an artifact from its files, as AutoTokenizer of transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts.toolkit import library_errors
from compileflow.errors import LoadError
from compileflow.serving.full_interface import FULL_INTERFACE
from compileflow.serving.interface_files import check_files
from compileflow.serving.light.tokenizer import LightTokenizer, TokenizerTraits
from compileflow.source_model.sentence_files import DAMAGED, read_file
from compileflow.spec import HfTask

TOKENIZER_FILE = "tokenizer.json"
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_SETTINGS = "tokenization_settings.json"
# Settings of a call that `LightTokenizer.encoded` takes and that may be saved with an artifact.
_SETTING_NAMES = ("padding", "truncation", "max_length", "stride", "add_special_tokens")
# Names that the classes of transformers give to special tokens, for files that do not name them.
_USUAL_TOKENS: Mapping[str, tuple[str, ...]] = {
    "bos": ("<s>",),
    "eos": ("</s>",),
    "unk": ("[UNK]", "<unk>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "mask": ("[MASK]", "<mask>"),
}
# Classes of transformers whose tokenizers number the two texts of a pair, unless the files name their inputs.
_TYPED_CLASSES = (
    *("BertTokenizer", "CanineTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer", "ElectraTokenizer"),
    *("FNetTokenizer", "LayoutLMv2Tokenizer", "MarkupLMTokenizer", "TapasTokenizer"),
)
_TYPED_MODELS = ("bert", "canine", "deberta", "deberta-v2", "electra", "fnet")


def load_tokenizer(artifact: OpenArtifact, *, component: str = "default") -> LightTokenizer:
    """Load the tokenizer of an artifact that is open; it truncates to the longest row of the component.

    Raises:
        LoadError: The artifact has no tokenizer.json, a file cannot be read, or a saved setting is not supported.
    """
    folder, longest = artifact.tokenizer_folder, artifact.component(component).max_sequence_length
    check_files(artifact, folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise LoadError(
            f"The artifact has no {TOKENIZER_FILE}, which a light pipeline needs.",
            hint=f"Save the source model with a fast tokenizer and compile it again. {FULL_INTERFACE}.",
        )
    from tokenizers import AddedToken, Tokenizer

    config = read_file(folder / _CONFIG, {})
    with library_errors(f"The tokenizer in {folder} cannot be used", hint=DAMAGED):
        backend = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        named = _named_tokens(folder, config)
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        tokens = {role: _content(token) for role, token in named.items()}
        for role, token in named.items():
            # The tokenizer of transformers looks for each special token in the text, whatever tokenizer.json says.
            if tokens[role] not in added:
                extra = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
                backend.add_special_tokens([AddedToken(tokens[role], **{**extra, "normalized": False})])
        for role, names in _USUAL_TOKENS.items():
            usual = next((name for name in names if name in added), None)
            if f"{role}_token" not in config and role not in tokens and usual is not None:
                tokens[role] = usual
        traits = TokenizerTraits(
            special_tokens=tokens,
            input_names=_input_names(folder, config),
            padding_side=str(config.get("padding_side", "right")),
            truncation_side=str(config.get("truncation_side", "right")),
            pad_token_type_id=int(config.get("pad_token_type_id", 0)),
            cleans_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        )
    saved = _saved_settings(folder)
    if saved is None:
        defaults = {"padding": "pad" in tokens, "truncation": True, "max_length": longest}
        return LightTokenizer(backend, traits, defaults)
    settings = saved | {"max_length": min(saved.get("max_length") or longest, longest)}
    # Question answering splits long contexts, which needs settings of its own in each call.
    fixed = artifact.manifest.hf_task is not HfTask.QUESTION_ANSWERING
    return LightTokenizer(backend, traits, settings, fixed=fixed)


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens by their role, as text or as an object with the field content."""
    older = read_file(folder / _MAP, {}) if "added_tokens_decoder" not in config else {}
    tokens = {role: {**older, **config}.get(f"{role}_token") for role in _USUAL_TOKENS}
    return {role: token for role, token in tokens.items() if token is not None}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _input_names(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("model_input_names")
    if names is None:
        class_name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        model_type = read_file(folder / "config.json", {}).get("model_type")
        is_typed = class_name in _TYPED_CLASSES if class_name else model_type in _TYPED_MODELS
        names = ("input_ids", "token_type_ids", "attention_mask") if is_typed else ("input_ids", "attention_mask")
    return tuple(map(str, names))


def _saved_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that were saved with the artifact, also in the form of earlier versions."""
    if not (folder / _SETTINGS).is_file():
        return None
    data = read_file(folder / _SETTINGS, {})
    settings = dict(data["settings"] if data.keys() == {"settings", "given"} else data)
    unknown_names = [name for name in settings if name not in _SETTING_NAMES]
    if unknown_names:
        raise LoadError(
            f"{_SETTINGS} has the setting {unknown_names[0]!r}, which a light pipeline does not have.",
            hint=f"{FULL_INTERFACE}.",
        )
    return settings
