"""CompiledTokenizer: a Hugging Face tokenizer, with settings that fit what a model was compiled for."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from compileflow._process.folders import os_errors
from compileflow.artifact.attestations.required import RequireSignature, requires_signature
from compileflow.artifact.manifest import MANIFEST_NAME
from compileflow.artifact.open import OpenArtifact, copy_artifact, open_artifact
from compileflow.errors import LoadError, SpecError, StoreError
from compileflow.sources.files import kind_of

SETTINGS_FILE = "tokenization_settings.json"
_TEXTS = ("self", "text", "text_pair", "text_target", "text_pair_target", "kwargs")
# transformers writes a number of the order 1e30 where a tokenizer knows no maximum.
_NO_MAXIMUM = 1_000_000


class CompiledTokenizer:
    """A Hugging Face tokenizer that pads and truncates to the compiled model's shapes by default.

    Every attribute of the wrapped tokenizer is available on this object, to read and to set.

    Attributes:
        tokenizer: The wrapped Hugging Face tokenizer.
        tokenization_settings: Settings of each call. What `from_tokenizer` was given wins over the call, the
            call wins over the rest.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenization_settings: Mapping[str, Any],
        artifact: OpenArtifact | None = None,
        *,
        given: Iterable[str] = (),
    ):
        self.tokenizer = tokenizer
        self.tokenization_settings = dict(tokenization_settings)
        self._given = frozenset(given)
        self._artifact = artifact

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **settings: Any) -> CompiledTokenizer:
        """Wrap a tokenizer that is in memory.

        Args:
            tokenizer: A transformers tokenizer.
            **settings: Settings of a tokenizer's call, which no call can change. The others are
                `padding="max_length"`, `truncation=True`, `add_special_tokens=True` and
                `max_length=tokenizer.model_max_length`, until a call gives its own.

        Raises:
            SpecError: a setting that no call knows, or no maximum length.
        """
        wrapped = tokenizer.tokenizer if isinstance(tokenizer, cls) else tokenizer
        _check_names(wrapped, settings)
        defaults = {
            "padding": "max_length",
            "truncation": True,
            "add_special_tokens": True,
            "max_length": wrapped.model_max_length,
        }
        merged = defaults | settings
        if (merged["max_length"] or 0) > _NO_MAXIMUM:
            raise SpecError(
                "The tokenizer knows no maximum length, and none was given.",
                hint="Give max_length, for example the model's max_position_embeddings.",
            )
        return cls(wrapped, merged, given=settings)

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        digest: str | None = None,
        trust: bool = False,
        require_signature: RequireSignature = None,
    ) -> CompiledTokenizer:
        """Load from an artifact's folder or URI, after checking every digest, or from a saved tokenizer's folder.

        Args:
            location: Folder, or STORE/manifests/sha256/DIGEST.json.
            component: Whose longest input the tokenizer truncates to.
            digest: The artifact's own, or its first 12 digits and more; any other is refused.
            trust: Load although files were altered or added, with a warning in the log.
            require_signature: True refuses an artifact whose provenance and verdict no trusted key signed, and a
                saved tokenizer, which nobody signs; so do public keys' PEM files, which are trusted instead.
                None: as COMPILEFLOW_REQUIRE_SIGNATURE says.

        Raises:
            ManifestError, IntegrityError, SignatureError: it is neither, was altered, or is not signed.
            LoadError: the artifact has no tokenizer, or the saved settings cannot be read.
        """
        folder = Path(location).expanduser()
        # An artifact that lost its manifest is no saved tokenizer.
        is_artifact = (
            digest is not None
            or requires_signature(require_signature)
            or any((folder / name).exists() for name in (MANIFEST_NAME, "components"))
        )
        if not is_artifact and (folder / "tokenizer_config.json").exists():
            return cls._from_folder(folder)
        artifact = open_artifact(location, digest=digest, trust=trust, require_signature=require_signature)
        return cls.from_artifact(artifact, component=component)

    @classmethod
    def _from_folder(cls, folder: Path) -> CompiledTokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        saved = _read_settings(folder)
        return cls.from_tokenizer(tokenizer) if saved is None else cls(tokenizer, saved[0], given=saved[1])

    @classmethod
    def from_artifact(cls, artifact: OpenArtifact, *, component: str = "default") -> CompiledTokenizer:
        """Load from an artifact that is open already.

        Raises:
            LoadError: it has no such component, or no tokenizer.
        """
        record = artifact.component(component)
        if not any(kind_of(file.path) == "tokenizer" for file in artifact.manifest.files):
            raise LoadError(
                "The artifact has no tokenizer: it was compiled from a model alone.",
                hint="Use CompiledModel, or compile with CompiledPipeline.from_pipeline.",
            )
        # After the checks: what is refused imports nothing.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            artifact.folder,
            local_files_only=True,
            trust_remote_code=artifact.manifest.spec.trust_remote_code,
        )
        longest = tokenizer.model_max_length = record.max_sequence_length
        saved = _read_settings(artifact.folder)
        if saved is None:
            return cls(tokenizer, {"padding": True, "truncation": True, "max_length": longest}, artifact)
        # The settings may be older than the choice of this length.
        fitting = min(saved[0].get("max_length") or longest, longest)
        return cls(tokenizer, saved[0] | {"max_length": fitting}, artifact, given=saved[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as the wrapped tokenizer does, with `tokenization_settings`."""
        own = {name: value for name, value in kwargs.items() if name not in self._given}
        settings = self.tokenization_settings | own
        if settings.get("return_tensors") != "pt":
            return self.tokenizer(*args, **settings)
        encoded = self.tokenizer(*args, **(settings | {"return_tensors": "np"}))
        if any(value.dtype.kind not in "bif" for value in encoded.values()):
            # Rows of different lengths, most likely: transformers says it in its own words.
            return self.tokenizer(*args, **settings)
        return _as_tensors(encoded)

    def save_pretrained(self, dest: str | Path) -> Path:
        """Write the tokenizer and its settings; of an artifact, copy the whole into an empty or absent folder.

        Raises:
            StoreError: the folder cannot be written, or holds an artifact, whose files are fixed.
        """
        if self._artifact is not None:
            return copy_artifact(self._artifact, dest)
        out = Path(dest).expanduser().absolute()
        if (out / MANIFEST_NAME).exists():
            raise StoreError(
                f"{out} holds a compiled artifact, whose files its manifest lists.",
                hint="Save the tokenizer elsewhere; CompiledPipeline.from_pipeline puts both into one artifact.",
            )
        with os_errors(out, "write to"):
            out.mkdir(parents=True, exist_ok=True)
            self.write(out)
        return out

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files and the settings into an existing folder."""
        write_tokenizer(self.tokenizer, folder)
        data = {"settings": self.tokenization_settings, "given": sorted(self._given)}
        try:
            text = json.dumps(data, indent=1, sort_keys=True)
        except TypeError as error:
            raise SpecError(
                f"The tokenization settings cannot be saved: {error}.",
                hint="Give plain values: text, numbers, true or false.",
            ) from error
        (folder / SETTINGS_FILE).write_text(text + "\n", "utf-8")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # `tokenizer.padding_side = "left"` must reach the tokenizer that pads.
        wrapped = self.__dict__.get("tokenizer")
        if name not in self.__dict__ and wrapped is not None and hasattr(wrapped, name):
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"CompiledTokenizer({self.tokenizer!r}, settings={self.tokenization_settings})"


def _as_tensors(encoded: Any) -> Any:
    """Turn arrays into tensors; from lists, as transformers makes them, it takes several times as long."""
    import torch

    for name, value in encoded.items():
        encoded[name] = torch.from_numpy(value)
    return encoded


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, the same ones whatever it was called with before."""
    fresh = copy.deepcopy(tokenizer)
    core = getattr(fresh, "backend_tokenizer", None)
    if core is not None:
        # A fast tokenizer keeps the padding and truncation of its last call, and would save them.
        core.no_padding()
        core.no_truncation()
    # transformers saves what a tokenizer was made with, not what was set since.
    fresh.init_kwargs |= {side: getattr(fresh, side) for side in ("padding_side", "truncation_side")}
    fresh.save_pretrained(folder)


def _check_names(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    calls = [tokenizer.__call__, getattr(tokenizer, "_encode_plus", None)]
    calls.append(getattr(tokenizer, "prepare_for_tokenization", None))
    known = {name for call in calls if call is not None for name in inspect.signature(call).parameters}
    known -= {*_TEXTS, "padding_strategy", "truncation_strategy"}
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=3) or sorted(known)
            raise SpecError(
                f"No call of {type(tokenizer).__name__} knows the setting {name!r}.",
                hint=f"Did you mean {' or '.join(near)}?",
            )


def _read_settings(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        return dict(data["settings"]), list(data["given"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{path} is not what CompiledTokenizer.save_pretrained writes: {type(error).__name__}: {error}.",
            hint='Write {"settings": {...}, "given": [...]}, or delete it.',
        ) from error
