"""CompiledPipeline: transformers' own pipeline around a compiled model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compileflow.artifact.attestations.required import RequireSignature
from compileflow.artifact.open import OpenArtifact, copy_artifact, open_artifact
from compileflow.contracts import Device
from compileflow.errors import LoadError, SpecError
from compileflow.serving.from_memory import in_memory
from compileflow.serving.model import CompiledModel
from compileflow.serving.question_answering import QuestionAnsweringPipeline
from compileflow.serving.sentence_embedding import SentenceEmbeddingPipeline
from compileflow.serving.sorted_calls import call_sorted
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.spec import HfTask, ShapeBucket

_NONE: Mapping[str, Any] = MappingProxyType({})


class CompiledPipeline:
    """A transformers pipeline whose model is compiled.

    Every attribute of the wrapped pipeline is available on this object.

    Attributes:
        pipeline: The wrapped pipeline: transformers', or compileflow's own where transformers has none.
        original_pipeline: The pipeline that `from_pipeline` was given; None after loading.
    """

    def __init__(self, pipeline: Any, artifact: OpenArtifact, original_pipeline: Any = None):
        self.pipeline = pipeline
        self.original_pipeline = original_pipeline
        self._artifact = artifact

    @property
    def compiled_pipeline(self) -> Any:
        """The wrapped pipeline, by the name that it had in an older library."""
        return self.pipeline

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        max_length: int,
        batch_size: int = 1,
        neuron: bool = True,
        validate_compilation: bool = True,
        validation_rtol: float = 1e-2,
        validation_atol: float = 1e-2,
        tokenizer_settings: Mapping[str, Any] = _NONE,
        model_tracing_settings: Mapping[str, Any] = _NONE,
        *,
        target: str | None = None,
    ) -> CompiledPipeline:
        """Compile the model of a pipeline that is in memory; the pipeline stays as it is.

        Args:
            pipeline: A pipeline for text.
            max_length: Tokens of the compiled shape; -1 is the model's own maximum.
            batch_size: Rows of the compiled shape; inputs of any number are padded or split to it.
            neuron: True compiles for AWS Neuron, False for torchscript, where no `target` is named.
            validate_compilation: Compare every output with the source model's before returning.
            validation_rtol: Relative tolerance of that, a fraction.
            validation_atol: Absolute tolerance of that, in the outputs' own units.
            tokenizer_settings: Settings of the tokenizer; see `CompiledTokenizer.from_tokenizer`.
            model_tracing_settings: The target's options.
            target: Any target's name; `compileflow targets` lists them.

        Raises:
            SpecError: a pipeline, a shape, a setting or a target that is not possible.
            TargetUnavailableError, CompileError, VerdictError: see `CompiledModel.from_model`.
        """
        local = in_memory()

        length = local.resolved_length(pipeline.model.config, max_length)
        tokenizer = _fitting_tokenizer(pipeline, length, tokenizer_settings)
        artifact = local.compile_in_memory(
            pipeline.model,
            target=local.older_target(target, neuron=neuron),
            batch_size=batch_size,
            max_length=length,
            options=model_tracing_settings,
            tolerance=local.Tolerance(validation_rtol, validation_atol) if validate_compilation else None,
            hf_task=_task_of(pipeline),
            tokenizer=tokenizer,
        )
        # A copy keeps the pipeline's own class and settings, such as top_k.
        compiled = copy.copy(pipeline)
        compiled.model = CompiledModel.from_artifact(artifact)
        compiled.tokenizer = CompiledTokenizer.from_artifact(artifact)
        compiled.device = compiled.model.device
        return cls(compiled, artifact, pipeline)

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
        **pipeline_settings: Any,
    ) -> CompiledPipeline:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, or STORE/manifests/sha256/DIGEST.json.
            component: Which compiled graph of the artifact.
            task: Hub task to serve, where one graph serves two: feature-extraction and sentence-similarity,
                text-classification and zero-shot-classification. None: the one that it was compiled for.
            device: Where it runs; the target must know it. None: where the target runs first of all.
            threads: Threads of one call; None leaves it to the runtime.
            buckets: Which of the compiled shape buckets to load; None loads all.
            digest: The artifact's own, or its first 12 digits and more; any other is refused.
            trust: Load although files were altered or added, with a warning in the log. Compiled files are native
                code, which then runs with your rights.
            require_signature: True refuses an artifact whose provenance and verdict no trusted key signed; so do
                public keys' PEM files, which are trusted instead. None: as COMPILEFLOW_REQUIRE_SIGNATURE says.
            **pipeline_settings: As `transformers.pipeline` takes them, for example `batch_size` or `top_k`.

        Raises:
            ManifestError, IntegrityError, SignatureError: refused before anything is deserialised.
            LoadError: it cannot run here, or serves another task.
        """
        artifact = open_artifact(location, digest=digest, trust=trust, require_signature=require_signature)
        served = served_task(artifact, task)
        model = CompiledModel.from_artifact(
            artifact, component=component, device=device, threads=threads, buckets=buckets
        )
        return cls(_wrapped(served, artifact, model, pipeline_settings), artifact)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call it as in transformers; what is in a list runs sorted by length and comes back in order."""
        # A tuple is one input, a text pair, as in transformers.
        if inputs and isinstance(inputs[0], list) and len(inputs[0]) > 1:
            return call_sorted(self.pipeline, *inputs, **kwargs)
        return self.pipeline(*inputs, **kwargs)

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        return copy_artifact(self._artifact, dest)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"CompiledPipeline(task={self.task!r}, model={self.model!r})"


def served_task(artifact: OpenArtifact, asked: HfTask | str | None) -> HfTask:
    """Return the task to serve.

    Raises:
        LoadError: the artifact's graph does not serve the one that was asked for.
    """
    compiled_for = artifact.manifest.hf_task
    if asked is None:
        return compiled_for
    able = [task.value for task in HfTask if task.graph_task is compiled_for.graph_task]
    if asked not in able:
        raise LoadError(
            f"The artifact was compiled for {compiled_for.value}, and {str(asked)!r} was asked for.",
            hint=f"It serves: {', '.join(able)}.",
        )
    return HfTask(asked)


def _task_of(pipeline: Any) -> HfTask | None:
    """Return a pipeline's task; None where it was made without one, and its model's class decides."""
    if not pipeline.task:
        return None
    # transformers has no pipeline for these two; ours are made from artifacts.
    ours = (HfTask.QUESTION_ANSWERING, HfTask.SENTENCE_SIMILARITY)
    able = [task.value for task in HfTask if task.modality == "text" and task not in ours]
    if pipeline.task not in able:
        raise SpecError(
            f"from_pipeline does not compile {pipeline.task!r}.",
            hint=f"It compiles: {', '.join(able)}. compileflow.pipeline takes the others.",
        )
    return HfTask(pipeline.task)


def _fitting_tokenizer(pipeline: Any, length: int, settings: Mapping[str, Any]) -> CompiledTokenizer:
    if pipeline.tokenizer is None:
        raise SpecError("The pipeline has no tokenizer.", hint="Make it with tokenizer=.")
    tokenizer = CompiledTokenizer.from_tokenizer(pipeline.tokenizer, **({"max_length": length} | dict(settings)))
    asked = tokenizer.tokenization_settings["max_length"]
    if asked is None or asked > length:
        raise SpecError(
            f"tokenizer_settings has max_length {asked}, and the model is compiled for {length} tokens.",
            hint=f"Leave it out, or give {length} or fewer.",
        )
    return tokenizer


def _wrapped(task: HfTask, artifact: OpenArtifact, model: CompiledModel, settings: dict[str, Any]) -> Any:
    if task.modality == "text":
        tokenizer = CompiledTokenizer.from_artifact(artifact, component=model.component)
        if task is HfTask.QUESTION_ANSWERING:
            return QuestionAnsweringPipeline(model, tokenizer, **settings)
        if task is HfTask.SENTENCE_SIMILARITY:
            return SentenceEmbeddingPipeline(model, tokenizer, artifact.folder, **settings)
        parts = {"tokenizer": tokenizer}
    else:
        parts = _processors(task, artifact)
    from transformers import pipeline

    # transformers would choose a GPU where there is one; the tensors are the CPU's, whatever computes.
    made = pipeline(task.value, model=model, device=model.device, **parts, **settings)
    if task.modality == "text":
        kind: Any = type(made)
        made.__class__ = _without_device_moves(kind)
    return made


@cache
def _without_device_moves(kind: Any) -> Any:
    """Return a pipeline class like `kind`, whose forward looks for no tensors on other devices: there are none.

    To look through inputs and outputs for tensors takes longer than all else that is done around a small graph.
    """

    def forward(self: Any, model_inputs: Mapping[str, Any], **settings: Any) -> Any:
        # A copy, as transformers makes one, too: some tasks take entries out of it.
        return self._forward(dict(model_inputs), **settings)

    named = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**named, "forward": forward})


def _processors(task: HfTask, artifact: OpenArtifact) -> dict[str, Any]:
    """Load what turns images or audio into a graph's inputs, and for speech, what spells its outputs."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    trusted = {"local_files_only": True, "trust_remote_code": artifact.manifest.spec.trust_remote_code}
    if task.modality == "image":
        return {"image_processor": AutoImageProcessor.from_pretrained(artifact.folder, **trusted)}
    parts = {"feature_extractor": AutoFeatureExtractor.from_pretrained(artifact.folder, **trusted)}
    if task is HfTask.SPEECH_RECOGNITION:
        parts["tokenizer"] = AutoTokenizer.from_pretrained(artifact.folder, **trusted)
    return parts
