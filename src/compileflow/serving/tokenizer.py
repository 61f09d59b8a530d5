"""CompiledTokenizer: a Hugging Face tokenizer with settings that fit the shapes of a compiled model."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

from compileflow._process.folders import os_errors
from compileflow.artifact.attestations.require_signature import RequireSignature, requires_signature
from compileflow.artifact.manifest import MANIFEST_NAME
from compileflow.artifact.open import OpenArtifact, copy_artifact, folder_to_write, path_of
from compileflow.errors import InputError, LoadError, SpecError, StoreError, first_line
from compileflow.serving.full_interface import check_full_interface
from compileflow.serving.interface_files import foreign_errors, load_part, load_saved_tokenizer
from compileflow.serving.older_folder import open_any
from compileflow.serving.turns import Turns
from compileflow.source_model.interface import length_limit
from compileflow.sources.files import kind_of
from compileflow.spec import HfTask

logger = logging.getLogger(__name__)
SETTINGS_FILE = "tokenization_settings.json"
# Methods of the wrapped tokenizer that set its truncation and padding.
_ENCODING_METHODS = ("encode", "batch_encode_plus", "tokenize", "apply_chat_template", "_encode_plus")
_TEXTS = ("self", "text", "text_pair", "text_target", "text_pair_target", "kwargs")


class CompiledTokenizer:
    """A Hugging Face tokenizer that pads and truncates to the shapes of a compiled model.

    All attributes of the wrapped tokenizer can be read and set on this object. Only calls of the object itself use
    the settings; `encode`, `encode_plus` and `decode` are those of the wrapped tokenizer.

    Attributes:
        tokenizer: The wrapped Hugging Face tokenizer.
        tokenization_settings: Settings of each call. The settings of `from_tokenizer`, its defaults included, and
            saved settings win over the arguments of a call. Those of an artifact without saved settings do not.
        compiled: True, as in the older library.
    """

    compiled = True

    def __init__(
        self,
        tokenizer: Any,
        tokenization_settings: Mapping[str, Any],
        artifact: OpenArtifact | None = None,
        *,
        fixed: bool = False,
    ):
        self.tokenizer = tokenizer
        self.tokenization_settings = dict(tokenization_settings)
        self._fixed = fixed
        self._artifact = artifact
        self._turns = Turns()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **settings: Any) -> CompiledTokenizer:
        """Wrap a tokenizer that is in memory.

        Args:
            tokenizer: A transformers tokenizer.
            **settings: Settings of the tokenizer's call. The defaults are `padding="max_length"`,
                `truncation=True`, `add_special_tokens=True` and `max_length=tokenizer.model_max_length`. All of
                them win over the arguments of a call, because the compiled shape is fixed.

        Raises:
            SpecError: The object is not a tokenizer, a setting is unknown, or the maximum length is missing or not
                a positive number.
        """
        from transformers import PreTrainedTokenizerBase

        inner_tokenizer = tokenizer.tokenizer if isinstance(tokenizer, cls) else tokenizer
        if not isinstance(inner_tokenizer, PreTrainedTokenizerBase):
            raise SpecError(
                f"Expected a transformers tokenizer, got {type(tokenizer).__name__}.",
                hint="Pass what AutoTokenizer.from_pretrained returns.",
            )
        _check_names(inner_tokenizer, settings)
        defaults = {
            "padding": "max_length" if _can_pad(inner_tokenizer) else False,
            "truncation": True,
            "add_special_tokens": True,
            "max_length": inner_tokenizer.model_max_length,
        }
        call_settings = defaults | settings
        _check_length(call_settings["max_length"])
        if call_settings["max_length"] and length_limit(call_settings["max_length"]) is None:
            raise SpecError(
                "The tokenizer has no maximum length, and max_length is missing.",
                hint="Pass max_length, for example the model's max_position_embeddings.",
            )
        return cls(inner_tokenizer, call_settings, fixed=True)

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        digest: str | None = None,
        trust: bool = False,
        require_signature: RequireSignature = None,
        trust_remote_code: bool = False,
    ) -> CompiledTokenizer:
        """Load from an artifact's folder or URI, after checking every digest, or from a saved tokenizer's folder.

        Args:
            location: Folder, registered name, or URI such as STORE/manifests/sha256/DIGEST.json.
            component: Component whose maximum length the tokenizer truncates to.
            digest: Expected digest of the artifact, or at least its first 12 digits.
            trust: Load the artifact even if files were altered or added, with a warning in the log.
            require_signature: True accepts only artifacts whose provenance and verdict a trusted key signed, and
                therefore rejects a saved tokenizer. PEM files of public keys replace the trusted keys. None: the
                setting COMPILEFLOW_REQUIRE_SIGNATURE.
            trust_remote_code: Run the Python files that come with the tokenizer. Read them first: they run with
                your rights. The artifact itself never decides this.

        Raises:
            ManifestError, IntegrityError, SignatureError: The location has neither, or the artifact fails a check.
            LoadError: The artifact has no tokenizer, or the saved settings cannot be read.
        """
        folder = path_of(location)
        # An artifact that lost its manifest is not a saved tokenizer.
        is_artifact = (
            digest is not None
            or requires_signature(require_signature)
            or any((folder / name).exists() for name in (MANIFEST_NAME, "components"))
        )
        if not is_artifact and (folder / "tokenizer_config.json").exists():
            return cls._from_folder(folder, trust_remote_code)
        artifact = open_any(
            location,
            digest=digest,
            trust=trust,
            require_signature=require_signature,
            trust_remote_code=trust_remote_code,
        )
        return cls.from_artifact(artifact, component=component)

    @classmethod
    def _from_folder(cls, folder: Path, trust_remote_code: bool) -> CompiledTokenizer:
        tokenizer = load_saved_tokenizer(folder, trust_remote_code=trust_remote_code)
        saved_settings = _read_settings(folder, tokenizer)
        return (
            cls.from_tokenizer(tokenizer) if saved_settings is None else cls(tokenizer, saved_settings, fixed=True)
        )

    @classmethod
    def from_artifact(cls, artifact: OpenArtifact, *, component: str = "default") -> CompiledTokenizer:
        """Load from an artifact that is already open.

        Raises:
            LoadError: The artifact does not have the component, or has no tokenizer.
        """
        check_full_interface("CompiledTokenizer")
        record = artifact.component(component)
        if not any(kind_of(file.path) == "tokenizer" for file in artifact.manifest.files):
            raise LoadError(
                "The artifact has no tokenizer, because it was compiled from a model alone.",
                hint="Use CompiledModel, or compile with CompiledPipeline.from_pipeline.",
            )
        tokenizer = load_part(artifact, "AutoTokenizer")
        longest = tokenizer.model_max_length = record.max_sequence_length
        saved_settings = _read_settings(artifact.tokenizer_folder, tokenizer)
        if artifact.manifest.hf_task.generates:
            return cls.for_prompts(tokenizer, saved_settings, artifact)
        if saved_settings is None:
            defaults = {"padding": _can_pad(tokenizer), "truncation": True, "max_length": longest}
            return cls(tokenizer, defaults, artifact)
        # The settings may have been saved before this length was chosen.
        with foreign_errors(artifact.tokenizer_folder, f"{SETTINGS_FILE} cannot be used"):
            settings = saved_settings | {"max_length": min(saved_settings.get("max_length") or longest, longest)}
            tokenizer("a", **settings)
        # Question answering splits long contexts, which needs settings of its own in each call.
        fixed = artifact.manifest.hf_task is not HfTask.QUESTION_ANSWERING
        return cls(tokenizer, settings, artifact, fixed=fixed)

    @classmethod
    def for_prompts(
        cls,
        tokenizer: Any,
        settings: Mapping[str, Any] | None = None,
        artifact: OpenArtifact | None = None,
    ) -> CompiledTokenizer:
        """Wrap a tokenizer for a decoder: it pads on the left, next to which the decoder writes, and cuts nothing.

        A prompt that is cut loses its question, so the model refuses one that is too long. A tokenizer without a
        padding token pads with the token that ends a text.

        Args:
            tokenizer: A transformers tokenizer. Its side of padding and its padding token are set.
            settings: Saved settings of each call; None without any.
            artifact: Artifact that the tokenizer belongs to.
        """
        tokenizer.padding_side = "left"
        if not _can_pad(tokenizer) and tokenizer.eos_token is not None:
            logger.info("the tokenizer has no padding token; %s pads the prompts of a batch", tokenizer.eos_token)
            tokenizer.pad_token = tokenizer.eos_token
        if settings is not None:
            return cls(tokenizer, settings, artifact, fixed=True)
        return cls(tokenizer, {"padding": _can_pad(tokenizer)}, artifact)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as the wrapped tokenizer does, with `tokenization_settings`."""
        settings = kwargs | self.tokenization_settings if self._fixed else self.tokenization_settings | kwargs
        if settings.get("return_tensors") != "pt":
            return self.encoded(*args, **settings)
        encoded = self.encoded(*args, **(settings | {"return_tensors": "np"}))
        if any(value.dtype.kind not in "bif" for value in encoded.values()):
            # Most likely rows of different lengths; this call raises the error of transformers.
            return self.encoded(*args, **settings)
        return _as_tensors(encoded)

    def encoded(self, *args: Any, **settings: Any) -> Any:
        """Tokenize with these settings alone, without `tokenization_settings`.

        Raises:
            InputError: Rows need padding, but the tokenizer has no token for it.
        """
        try:
            # Truncation and padding are state: see `Turns`.
            with self._turns.lock:
                return self.tokenizer(*args, **settings)
        except ValueError as error:
            if _can_pad(self.tokenizer) or "pad" not in str(error):
                raise
            raise InputError(
                "The tokenizer has no padding token, so it cannot make a batch of texts of different lengths.",
                hint="Tokenize one text at a time without padding, or set tokenizer.pad_token to a token.",
            ) from error

    @property
    def model_max_length(self) -> int:
        """Longest row of a call in tokens; without a maximum in the settings, that of the wrapped tokenizer."""
        return int(self.tokenization_settings.get("max_length") or self.tokenizer.model_max_length)

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """Tokenize one text or pair as the wrapped tokenizer does, without `tokenization_settings`."""
        # transformers 5 dropped this method; calling the tokenizer does the same.
        return self.encoded(text, text_pair, **kwargs)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[Any], token_ids_1: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the token types of one or two sequences with the special tokens around them.

        Args:
            token_ids_0: Tokens of the first sequence; only their number counts.
            token_ids_1: Tokens of the second sequence, None for a single one.
        """
        if hasattr(self.tokenizer, "create_token_type_ids_from_sequences"):
            return list(self.tokenizer.create_token_type_ids_from_sequences(token_ids_0, token_ids_1))
        # transformers 5 has the method only for slow tokenizers, so the types come from a tokenized example.
        texts = ("a",) if token_ids_1 is None else ("a", "a")
        example = self.encoded(*texts, return_token_type_ids=True)
        counts = {None: 1, 0: len(token_ids_0), 1: len(token_ids_1 or ())}
        types: list[int] = []
        last_sequence = None
        for token_type, sequence in zip(example["token_type_ids"], example.sequence_ids(0), strict=True):
            if sequence is None or sequence != last_sequence:
                types += [token_type] * counts[sequence]
            last_sequence = sequence
        return types

    def save_pretrained(self, dest: str | Path) -> Path:
        """Write the tokenizer and its settings, or copy the whole artifact that it was loaded from.

        Args:
            dest: Folder to write to; for an artifact, an empty or absent one, or one that holds another artifact.

        Raises:
            StoreError: The folder cannot be written, or contains an artifact.
        """
        if self._artifact is not None:
            return copy_artifact(self._artifact, dest, replace=True)
        folder = folder_to_write(dest)
        if (folder / MANIFEST_NAME).exists():
            raise StoreError(
                f"{folder} contains a compiled artifact, whose files must not change.",
                hint="Save the tokenizer elsewhere; CompiledPipeline.from_pipeline puts both into one artifact.",
            )
        with os_errors(folder, "write to"):
            folder.mkdir(parents=True, exist_ok=True)
            self.write(folder)
        return folder

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files and the settings into an existing folder."""
        write_tokenizer(self.tokenizer, folder)
        try:
            text = json.dumps(self.tokenization_settings, indent=1, sort_keys=True)
        except TypeError as error:
            raise SpecError(
                f"The tokenization settings cannot be saved: {error}.",
                hint="Pass plain values: text, numbers, True or False.",
            ) from error
        (folder / SETTINGS_FILE).write_text(text + "\n", "utf-8")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        value = getattr(self.tokenizer, name)
        return self._turns.guarded(value) if name in _ENCODING_METHODS else value

    def __setattr__(self, name: str, value: Any) -> None:
        # `tokenizer.padding_side = "left"` must reach the tokenizer that pads.
        inner_tokenizer = self.__dict__.get("tokenizer")
        if name not in self.__dict__ and inner_tokenizer is not None and hasattr(inner_tokenizer, name):
            setattr(inner_tokenizer, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"CompiledTokenizer({self.tokenizer!r}, settings={self.tokenization_settings})"


def _can_pad(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a padding token. One text, and the rows of a list call, need none."""
    return tokenizer.pad_token is not None


def _as_tensors(encoded: Any) -> Any:
    """Convert arrays to tensors, which is several times faster than transformers' conversion of lists."""
    import torch

    for name, value in encoded.items():
        encoded[name] = torch.from_numpy(value)
    return encoded


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer; they do not depend on its earlier calls."""
    tokenizer_copy = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer_copy, "backend_tokenizer", None)
    if backend is not None:
        # A fast tokenizer would save the padding and truncation of its last call.
        backend.no_padding()
        backend.no_truncation()
    # transformers saves the arguments of the constructor, not the attributes that were set later.
    sides = {side: getattr(tokenizer_copy, side) for side in ("padding_side", "truncation_side")}
    tokenizer_copy.init_kwargs |= sides
    tokenizer_copy.save_pretrained(folder)


def call_names(tokenizer: Any) -> set[str]:
    """Return the names of the settings that a tokenizer, or a class of tokenizers, takes in a call."""
    calls = [tokenizer.__call__, getattr(tokenizer, "_encode_plus", None)]
    calls.append(getattr(tokenizer, "prepare_for_tokenization", None))
    names = {name for call in calls if call is not None for name in inspect.signature(call).parameters}
    return names - {*_TEXTS, "padding_strategy", "truncation_strategy"}


def _check_length(max_length: Any) -> None:
    is_number = isinstance(max_length, Integral) and not isinstance(max_length, bool)
    if max_length is not None and not (is_number and max_length > 0):
        raise SpecError(
            f"Expected max_length as a whole number of at least 1, got {max_length!r}.",
            hint="Pass the number of tokens of the compiled shape.",
        )


def _check_names(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    known_names = call_names(tokenizer)
    for name in settings:
        if name not in known_names:
            near_names = get_close_matches(name, known_names, n=3) or sorted(known_names)
            raise SpecError(
                f"{type(tokenizer).__name__} has no setting {name!r}.",
                hint=f"Did you mean {' or '.join(near_names)}?",
            )


def _read_settings(folder: Path, tokenizer: Any) -> dict[str, Any] | None:
    """Read the saved settings, also in the form of earlier versions, which has "settings" and "given"."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        settings = dict(data["settings"] if data.keys() == {"settings", "given"} else data)
        _check_names(tokenizer, settings)
        _check_length(settings.get("max_length"))
    except (ValueError, TypeError, AttributeError, RecursionError, SpecError) as error:
        raise LoadError(
            f"{path} was not written by CompiledTokenizer.save_pretrained: {type(error).__name__}: "
            f"{first_line(error)}.",
            hint='Write the settings to the file, for example {"padding": "max_length", "max_length": 128}, or '
            "delete it.",
        ) from error
    return settings
