"""CompiledTokenizer: the source model's tokenizer, with settings that fit what the model was compiled for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compileflow.errors import LoadError
from compileflow.serving.artifacts import OpenArtifact, copy_artifact, open_artifact


class CompiledTokenizer:
    """A Hugging Face tokenizer that pads and truncates to the compiled model's shapes by default.

    Every attribute of the wrapped tokenizer is available on this object, to read and to set.

    Attributes:
        tokenizer: The wrapped Hugging Face tokenizer.
        tokenization_settings: Settings of each call; what the call itself gives wins.
    """

    def __init__(self, tokenizer: Any, tokenization_settings: dict[str, Any], artifact: OpenArtifact):
        self.tokenizer = tokenizer
        self.tokenization_settings = dict(tokenization_settings)
        self._artifact = artifact

    @classmethod
    def from_pretrained(cls, location: str | Path, *, component: str = "default") -> CompiledTokenizer:
        """Load from an artifact's folder or URI, after checking every digest."""
        return cls.from_artifact(open_artifact(location), component=component)

    @classmethod
    def from_artifact(cls, artifact: OpenArtifact, *, component: str = "default") -> CompiledTokenizer:
        """Load from an artifact that is open already."""
        from transformers import AutoTokenizer

        record = artifact.manifest.components.get(component)
        if record is None:
            raise LoadError(
                f"The artifact has no component {component!r}.",
                hint=f"It has: {', '.join(sorted(artifact.manifest.components))}.",
            )
        tokenizer = AutoTokenizer.from_pretrained(
            artifact.folder,
            local_files_only=True,
            trust_remote_code=artifact.manifest.spec.trust_remote_code,
        )
        tokenizer.model_max_length = record.max_sequence_length
        settings = {"padding": True, "truncation": True, "max_length": record.max_sequence_length}
        return cls(tokenizer, settings, artifact)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as the wrapped tokenizer does, with `tokenization_settings` as defaults."""
        return self.tokenizer(*args, **(self.tokenization_settings | kwargs))

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        return copy_artifact(self._artifact, dest)

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
