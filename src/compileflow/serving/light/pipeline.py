"""LightPipeline: the pipeline of a compiled model without torch and transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from compileflow.artifact.attestations.require_signature import RequireSignature
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.contracts import Device
from compileflow.errors import SpecError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.full_interface import FULL_INTERFACE
from compileflow.serving.interface_files import check_answers, check_files
from compileflow.serving.light.image_processor import load_image_processor
from compileflow.serving.light.model import LightModel, read_config
from compileflow.serving.light.tokenizer_files import load_tokenizer
from compileflow.serving.served_task import served_task
from compileflow.spec import HfTask, ShapeBucket

_LIGHT = "compileflow.serving.light"
# The class of each task. Those of compileflow's own tasks serve CompiledPipeline as well.
_TASKS: Mapping[HfTask, str] = {
    HfTask.FEATURE_EXTRACTION: f"{_LIGHT}.feature_extraction:FeatureExtraction",
    HfTask.TEXT_CLASSIFICATION: f"{_LIGHT}.text_classification:TextClassification",
    HfTask.TOKEN_CLASSIFICATION: f"{_LIGHT}.token_classification:TokenClassification",
    HfTask.FILL_MASK: f"{_LIGHT}.fill_mask:FillMask",
    HfTask.ZERO_SHOT_CLASSIFICATION: f"{_LIGHT}.zero_shot:ZeroShotClassification",
    HfTask.IMAGE_CLASSIFICATION: f"{_LIGHT}.image_classification:ImageClassification",
    HfTask.QUESTION_ANSWERING: "compileflow.serving.question_answering:QuestionAnsweringPipeline",
    HfTask.TEXT_RANKING: "compileflow.serving.text_ranking:TextRankingPipeline",
    HfTask.SENTENCE_SIMILARITY: "compileflow.serving.sentence_embedding:SentenceEmbeddingPipeline",
}
# Tasks whose pipelines read the files of sentence-transformers.
_WITH_FILES = (HfTask.SENTENCE_SIMILARITY, HfTask.TEXT_RANKING)


class LightPipeline:
    """Answers what `CompiledPipeline` answers for the same artifact, from NumPy and tokenizers or Pillow alone.

    It imports neither torch nor transformers, unless the runtime of the artifact's target needs torch. All
    attributes of the task's pipeline are available on this object.

    Attributes:
        pipeline: Pipeline of the task.
        artifact: Artifact that the model belongs to.
    """

    def __init__(self, pipeline: Any, artifact: OpenArtifact):
        self.pipeline = pipeline
        self.artifact = artifact

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        task: HfTask | str | None = None,
        device: Device | None = None,
        threads: int | None = None,
        buckets: Sequence[ShapeBucket] | None = None,
        digest: str | None = None,
        trust: bool = False,
        require_signature: RequireSignature = None,
        **settings: Any,
    ) -> LightPipeline:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, registered name, or URI such as STORE/manifests/sha256/DIGEST.json.
            component: Name of the component to load.
            task: Hub task to serve; see `CompiledPipeline.from_pretrained`.
            device: Device to run on. None: the first device of the target.
            threads: Threads per call. None: the runtime decides.
            buckets: Compiled shape buckets to load. None: all.
            digest: Expected digest of the artifact, or at least its first 12 digits.
            trust: Load the artifact even if files were altered or added, with a warning in the log. Compiled files
                are native code, which then runs with your rights.
            require_signature: True accepts only artifacts whose provenance and verdict a trusted key signed. PEM
                files of public keys replace the trusted keys. None: the setting COMPILEFLOW_REQUIRE_SIGNATURE.
            **settings: Settings of each call, for example `batch_size` or `top_k`.

        Raises:
            ManifestError, IntegrityError, SignatureError: The artifact fails a check. Nothing was deserialized.
            LoadError: The artifact cannot run here, does not serve the task, has no tokenizer.json, or has another
                image processor than the light ones.
            MissingPackageError: The artifact takes images, and Pillow is not installed.
            SpecError: No light pipeline serves the task, or it does not have a setting.
        """
        artifact = open_artifact(location, digest=digest, trust=trust, require_signature=require_signature)
        # Before the runtime starts.
        _check_request(artifact, served_task(artifact, task), settings)
        graph = LoadedComponent.load(
            artifact, component=component, device=device, threads=threads, buckets=buckets
        )
        return cls.from_component(graph, task=task, **settings)

    @classmethod
    def from_component(
        cls, graph: LoadedComponent, *, task: HfTask | str | None = None, **settings: Any
    ) -> LightPipeline:
        """Put a component that is loaded into a pipeline; see `from_pretrained`.

        Raises:
            LoadError, MissingPackageError: The artifact does not serve the task, or its tokenizer or image
                processor cannot be read; see `from_pretrained`.
            SpecError: No light pipeline serves the task, or it does not have a setting.
        """
        artifact = graph.artifact
        hf_task = served_task(artifact, task)
        kind = _check_request(artifact, hf_task, settings)
        check_files(artifact, artifact.folder)
        config = read_config(artifact.folder)
        check_answers(artifact, graph.record, config, None)
        reader: Any
        if hf_task.modality == "image":
            reader = load_image_processor(artifact.folder)
        else:
            reader = load_tokenizer(artifact, component=graph.component)
        folders = [artifact.folder] if hf_task in _WITH_FILES else []
        return cls(kind(LightModel(graph, config), reader, *folders, **settings), artifact)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        """Answer an item, a list or an iterator; inputs, settings and answers are those of `CompiledPipeline`.

        Raises:
            InputError: The task cannot read the inputs, or a setting has a wrong value.
            SpecError: The pipeline does not have a setting.
        """
        if settings:
            _check_names(HfTask(self.pipeline.task), settings, _call_settings(self.pipeline.__class__))
        return self.pipeline(*inputs, **settings)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"LightPipeline(task={self.task!r}, target={self.artifact.manifest.target.name!r})"


def has_light_pipeline(task: HfTask) -> bool:
    """Return whether a light pipeline serves a task."""
    return task in _TASKS


def _check_request(artifact: OpenArtifact, task: HfTask, settings: Mapping[str, Any]) -> Any:
    """Return the class of a task's pipeline, after checking that it serves the artifact and has the settings."""
    if task not in _TASKS:
        raise SpecError(
            f"Light pipelines do not serve {task.value}.",
            hint=f"They serve: {', '.join(_TASKS)}. {FULL_INTERFACE}.",
        )
    if artifact.manifest.spec.trust_remote_code:
        raise SpecError(
            "The source model brings Python files, which a light pipeline does not run.",
            hint=f"{FULL_INTERFACE}, and load with trust_remote_code=True.",
        )
    module, _, name = _TASKS[task].partition(":")
    kind = getattr(import_module(module), name)
    _check_names(task, settings, kind.load_settings)
    return kind


@cache
def _call_settings(kind: Any) -> tuple[str, ...]:
    """Return the settings that a call of a pipeline takes: those that it lists, or its keywords."""
    if hasattr(kind, "call_settings"):
        return tuple(kind.call_settings)
    parameters = inspect.signature(kind.__call__).parameters.values()
    return tuple([item.name for item in parameters if item.kind is item.KEYWORD_ONLY])


def _check_names(task: HfTask, settings: Mapping[str, Any], known_names: Sequence[str]) -> None:
    for name in settings:
        if name not in known_names:
            near_names = get_close_matches(name, known_names, n=1)
            way = f"Did you mean {near_names[0]}?" if near_names else f"It has: {', '.join(known_names)}."
            raise SpecError(
                f"The light pipeline of {task.value} has no setting {name!r}.", hint=f"{way} {FULL_INTERFACE}."
            )
