"""The files of sentence-transformers beside a model: its modules, its prompts, and how it reads texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compileflow.contracts.digests import safe_relative_path
from compileflow.contracts.json_files import read_json
from compileflow.errors import InputError, LoadError
from compileflow.source_model.interface import length_limit

MODULES_FILE, SETTINGS_FILE = "modules.json", "config_sentence_transformers.json"
# Files with the weights of a module, in the order in which sentence-transformers looks for them.
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DAMAGED = "Copy or download the complete model, and compile it again."
# torch's own text says how to load such a file all the same, which would run the code in it.
NOT_PLAIN = "is not a plain weights file: it holds other objects than tensors, or it is damaged"
SAVE_SAFE = "Save the model as safetensors, which save_pretrained writes."


@dataclass(frozen=True)
class TextSettings:
    """How a model of sentence-transformers reads texts.

    Attributes:
        max_tokens: Longest row of the source model in tokens, including special tokens; None if unspecified.
        lower_case: Whether texts are lowercased before the tokenizer normalizes them.
        prompts: Texts that may stand in front of every text, by name.
        default_prompt_name: Name of the prompt of a call that gives none; None for no prompt.
    """

    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """Return the prompt of a call: the given one, the one of that name, or the default.

        Raises:
            InputError: The model does not have a prompt of that name.
        """
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise InputError(
                f"The model has no prompt {name!r}.",
                hint=f"Its prompts are: {', '.join(self.prompts) or 'none'}.",
            )
        return self.prompts[name]


def read_text_settings(
    folder: Path, *, prompts: Mapping[str, str], output: str, feature: str, hint: str
) -> TextSettings:
    """Read how a model reads texts.

    Args:
        folder: Folder of the model.
        prompts: Prompts that a model has unless its files give others.
        output: Output of the model that the next module reads.
        feature: Name of that output in sentence-transformers.
        hint: What to do if a setting is not supported.

    Raises:
        LoadError: A setting is not supported, or the default prompt does not exist.
    """
    settings = read_file(folder / SETTINGS_FILE, {})
    own_prompts = typed(settings, "prompts", dict, SETTINGS_FILE) or {}
    own_prompts = {name: typed(own_prompts, name, str, SETTINGS_FILE) or "" for name in own_prompts}
    name = typed(settings, "default_prompt_name", str, SETTINGS_FILE)
    all_prompts = {**prompts, **own_prompts}
    if name is not None and name not in all_prompts:
        raise LoadError(
            f"{SETTINGS_FILE} has no prompt {name!r}, which it names as default.",
            hint=f"Its prompts are: {', '.join(all_prompts)}.",
        )
    modules = module_list(folder)
    transformer = transformer_settings(folder / modules[0][1]) if modules else {}
    modality = transformer.get("modality_config") or {}
    text = modality.get("text", {"method": "forward", "method_output_name": output})
    unsupported_settings = ["processing_kwargs"] if transformer.get("processing_kwargs") else []
    # With a chat template, sentence-transformers turns each text into a message.
    if "message" in modality or (text.get("method"), text.get("method_output_name")) != ("forward", output):
        unsupported_settings.append("modality_config")
    if transformer.get("module_output_name", feature) != feature:
        unsupported_settings.append("module_output_name")
    if unsupported_settings:
        setting = unsupported_settings[0]
        raise LoadError(
            f"The Transformer of {MODULES_FILE} has {setting}, which compileflow does not support: "
            f"{transformer[setting]!r:.200}.",
            hint=hint,
        )
    return TextSettings(
        # Newer files have the maximum in the tokenizer's configuration.
        max_tokens=typed(transformer, "max_seq_length", int, MODULES_FILE) or _tokenizer_maximum(folder),
        lower_case=bool(transformer.get("do_lower_case", False)),
        prompts=all_prompts,
        default_prompt_name=name,
    )


def module_list(folder: Path) -> list[tuple[str, str]]:
    """Return the name and the folder of each module in modules.json; [] without the file.

    The name of a class of sentence-transformers is its last part. Other classes keep their whole path.

    Raises:
        LoadError: The file is not a list of modules, or a folder leaves the model's.
    """
    modules = []
    for entry in read_file(folder / MODULES_FILE, []):
        if not (isinstance(entry, dict) and isinstance(entry.get("type"), str)):
            raise LoadError(f"An entry of {MODULES_FILE} has no type: {entry!r:.80}.", hint=DAMAGED)
        path = str(entry.get("path", ""))
        try:
            safe_path = "" if path in ("", ".") else safe_relative_path(path)
        except ValueError as error:
            raise LoadError(f"{MODULES_FILE} has an invalid path: {error}.", hint=DAMAGED) from error
        kind = entry["type"]
        is_own = kind.startswith("sentence_transformers.")
        modules.append((kind.rpartition(".")[2] if is_own else kind, safe_path))
    return modules


def transformer_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the module Transformer in its folder; {} without a file."""
    # The name contains the model type: sentence_bert_config.json, sentence_roberta_config.json.
    paths = sorted(folder.glob("sentence_*_config.json"))
    return dict(read_file(paths[0], {})) if paths else {}


def typed(settings: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    """Return a setting of a type; None where it is missing or null.

    Raises:
        LoadError: The setting has another type.
    """
    value = settings.get(name)
    if value is not None and type(value) is not kind:
        raise LoadError(f"Expected {kind.__name__} as {name} in {place}, got {value!r:.80}.", hint=DAMAGED)
    return value


def read_file(path: Path, absent: Any) -> Any:
    """Return the content of a JSON file, or `absent`, whose type it must have.

    Raises:
        LoadError: The file is not such JSON.
    """
    if not path.is_file():
        return absent
    try:
        value = read_json(path)
    except ValueError as error:
        raise LoadError(f"{path.name} cannot be read: {error}.", hint=DAMAGED) from error
    if not isinstance(value, type(absent)):
        raise LoadError(
            f"Expected {type(absent).__name__} in {path.name}, got {type(value).__name__}.", hint=DAMAGED
        )
    return value


def _tokenizer_maximum(folder: Path) -> int | None:
    return length_limit(read_file(folder / "tokenizer_config.json", {}).get("model_max_length"))
