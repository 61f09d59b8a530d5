"""CompiledPipeline: transformers' own pipeline around a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compileflow.contracts import Device
from compileflow.errors import LoadError
from compileflow.serving.artifacts import OpenArtifact, copy_artifact, open_artifact
from compileflow.serving.model import CompiledModel
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.spec import HfTask


class CompiledPipeline:
    """A transformers pipeline whose model is compiled.

    Every attribute of the wrapped pipeline is available on this object.

    Attributes:
        pipeline: The wrapped transformers pipeline.
    """

    def __init__(self, pipeline: Any, artifact: OpenArtifact):
        self.pipeline = pipeline
        self._artifact = artifact

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
        **pipeline_settings: Any,
    ) -> CompiledPipeline:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, or STORE/manifests/sha256/DIGEST.json.
            component: Which compiled graph of the artifact.
            device: Where it runs; the target must know it. None: where the target runs first of all.
            threads: Threads of one call; None leaves it to the runtime.
            **pipeline_settings: As `transformers.pipeline` takes them, for example `batch_size` or `top_k`.

        Raises:
            ManifestError, IntegrityError: refused before anything is deserialised.
            LoadError: it cannot run here, or transformers has no pipeline for its task.
        """
        from transformers import pipeline

        artifact = open_artifact(location)
        task = artifact.manifest.hf_task
        if task is HfTask.QUESTION_ANSWERING:
            raise LoadError(
                "transformers 5 has no question-answering pipeline.",
                hint="Use CompiledModel: it returns start_logits and end_logits.",
            )
        model = CompiledModel.from_artifact(artifact, component=component, device=device, threads=threads)
        tokenizer = CompiledTokenizer.from_artifact(artifact, component=component)
        return cls(pipeline(task.value, model=model, tokenizer=tokenizer, **pipeline_settings), artifact)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline as in transformers."""
        return self.pipeline(*args, **kwargs)

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        return copy_artifact(self._artifact, dest)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"CompiledPipeline(task={self._artifact.manifest.hf_task.value!r}, model={self.model!r})"
