"""CompiledPipeline: a transformers pipeline around a compiled model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compileflow.artifact.attestations.require_signature import RequireSignature
from compileflow.artifact.open import OpenArtifact, copy_artifact
from compileflow.contracts import Device
from compileflow.errors import LoadError, SpecError
from compileflow.serving.from_memory import in_memory
from compileflow.serving.generation import check_prompts
from compileflow.serving.interface_files import load_part
from compileflow.serving.list_calls import call_list
from compileflow.serving.model import CompiledModel
from compileflow.serving.older_folder import open_any
from compileflow.serving.original import completed_artifact, load_original, original_task
from compileflow.serving.pipeline_settings import check_mapping, check_settings, check_spelling
from compileflow.serving.question_answering import QuestionAnsweringPipeline
from compileflow.serving.sentence_embedding import SentenceEmbeddingPipeline
from compileflow.serving.served_task import served_task
from compileflow.serving.text_ranking import TextRankingPipeline
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.spec import TEXT_TASKS, HfTask, ShapeBucket

_NONE: Mapping[str, Any] = MappingProxyType({})


class CompiledPipeline:
    """A transformers pipeline whose model is compiled.

    All attributes of the wrapped pipeline are available on this object.

    Attributes:
        pipeline: The wrapped pipeline: from transformers, or from compileflow for tasks that transformers lacks.
    """

    def __init__(self, original_pipeline: Any, compiled_pipeline: Any, artifact: OpenArtifact | None = None):
        """Wrap a pipeline whose model is compiled.

        Args:
            original_pipeline: The uncompiled pipeline; None if there is none.
            compiled_pipeline: The pipeline that answers calls.
            artifact: Artifact to save. None: the artifact of the compiled pipeline's model.

        Raises:
            SpecError: An argument is not a pipeline.
        """
        for name, value in (("original", original_pipeline), ("compiled", compiled_pipeline)):
            is_pipeline = hasattr(value, "model") and hasattr(value, "task")
            if not is_pipeline and (name == "compiled" or value is not None):
                raise SpecError(
                    f"Expected a pipeline as {name}_pipeline, got {type(value).__name__}.",
                    hint="from_pipeline compiles a pipeline, and from_pretrained loads a compiled one.",
                )
        self.pipeline = compiled_pipeline
        self._original_pipeline = original_pipeline
        self._artifact = artifact or getattr(compiled_pipeline.model, "artifact", None)

    @property
    def compiled_pipeline(self) -> Any:
        """The wrapped pipeline, under its name in the older library."""
        return self.pipeline

    @property
    def original_pipeline(self) -> Any:
        """The uncompiled pipeline: the one that was compiled, or after loading its saved copy.

        None for an artifact that was saved without it, for example by `compileflow compile`.

        Raises:
            IntegrityError: A file of the saved copy was altered.
        """
        if self._original_pipeline is None and self._artifact is not None:
            self._original_pipeline = load_original(self._artifact)
        return self._original_pipeline

    @property
    def original_pipeline_task(self) -> str:
        """Task of the original pipeline, as it was named there; "ner" stays "ner"."""
        if self._original_pipeline is None and self._artifact is not None:
            return original_task(self._artifact)
        return str((self._original_pipeline or self.pipeline).task)

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
        """Compile the model of a pipeline that is in memory. The pipeline itself stays unchanged.

        Args:
            pipeline: A transformers pipeline for text.
            max_length: Tokens of the compiled shape; -1 is the maximum of the model.
            batch_size: Rows of the compiled shape. Inputs with any number of rows are padded or split to it.
            neuron: Without `target`, True compiles for AWS Neuron and False for torchscript.
            validate_compilation: Compare every output with the source model's before returning.
            validation_rtol: Relative tolerance of the comparison, a fraction.
            validation_atol: Absolute tolerance of the comparison, in the units of the outputs.
            tokenizer_settings: Settings of the tokenizer; see `CompiledTokenizer.from_tokenizer`.
            model_tracing_settings: Options of the target. Settings of torch_neuron.trace or torch.jit.trace that
                the target does not have are ignored, with a warning in the log.
            target: Name of a target; `compileflow targets` lists them.

        Raises:
            SpecError: The pipeline, the shape, a setting or the target is invalid.
            TargetUnavailableError, CompileError, VerdictError: See `CompiledModel.from_model`.
        """
        local = in_memory()
        from transformers import Pipeline

        if not isinstance(pipeline, Pipeline):
            raise SpecError(
                f"Expected a transformers pipeline, got {type(pipeline).__name__}.",
                hint="Pass what transformers.pipeline returns; CompiledModel.from_model compiles a model alone.",
            )
        check_mapping("tokenizer_settings", tokenizer_settings)
        check_mapping("model_tracing_settings", model_tracing_settings)
        length = local.resolved_length(pipeline.model, max_length)
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
            original_task=pipeline.task,
        )
        # A copy keeps the class and settings of the pipeline, such as top_k.
        pipeline_copy = copy.copy(pipeline)
        pipeline_copy.model = CompiledModel.from_artifact(artifact)
        pipeline_copy.tokenizer = CompiledTokenizer.from_artifact(artifact)
        pipeline_copy.device = pipeline_copy.model.device
        return cls(pipeline, pipeline_copy, artifact)

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
        trust_remote_code: bool = False,
        **pipeline_settings: Any,
    ) -> CompiledPipeline:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, registered name, or URI such as STORE/manifests/sha256/DIGEST.json.
            component: Name of the component to load.
            task: Hub task to serve. A model compiled for feature-extraction also serves sentence-similarity, and
                one for text-classification also zero-shot-classification. None: the task it was compiled for.
            device: Device to run on. None: the first device of the target.
            threads: Threads per call. None: the runtime decides.
            buckets: Compiled shape buckets to load. None: all.
            digest: Expected digest of the artifact, or at least its first 12 digits.
            trust: Load the artifact even if files were altered or added, with a warning in the log. Compiled files
                are native code, which then runs with your rights.
            require_signature: True accepts only artifacts whose provenance and verdict a trusted key signed. PEM
                files of public keys replace the trusted keys. None: the setting COMPILEFLOW_REQUIRE_SIGNATURE.
            trust_remote_code: Run the Python files that the artifact brings. Read them first: they run with your
                rights. The artifact itself never decides this.
            **pipeline_settings: Settings of `transformers.pipeline`, for example `batch_size` or `top_k`.

        Raises:
            ManifestError, IntegrityError, SignatureError: The artifact fails a check. Nothing was deserialized.
            LoadError: The artifact cannot run here, it does not serve the task, or the task has no pipeline.
            SpecError: A keyword is nearly one of the arguments above, or the pipeline has no such setting.
        """
        check_spelling(pipeline_settings, inspect.signature(cls.from_pretrained).parameters)
        artifact = open_any(
            location,
            digest=digest,
            trust=trust,
            require_signature=require_signature,
            trust_remote_code=trust_remote_code,
        )
        hf_task = served_task(artifact, task)
        check_pipeline(hf_task)
        model = CompiledModel.from_artifact(
            artifact, component=component, device=device, threads=threads, buckets=buckets
        )
        return cls.from_model(model, task=hf_task, **pipeline_settings)

    @classmethod
    def from_model(
        cls,
        model: CompiledModel,
        *,
        task: HfTask | str | None = None,
        tokenizer: Any = None,
        **pipeline_settings: Any,
    ) -> CompiledPipeline:
        """Put a compiled model that is loaded into a pipeline.

        Args:
            model: The compiled model.
            task: Hub task to serve; see `from_pretrained`.
            tokenizer: Tokenizer of a text model. None: the tokenizer of its artifact.
            **pipeline_settings: Settings of `transformers.pipeline`, for example `batch_size` or `top_k`.

        Raises:
            LoadError: The model does not serve the task, or its artifact has no tokenizer.
            SpecError: The model is not compiled, or the pipeline has no such setting.
        """
        if not isinstance(model, CompiledModel):
            raise SpecError(
                f"Expected a CompiledModel, got {type(model).__name__}.",
                hint="CompiledPipeline.from_pipeline compiles a pipeline, compileflow.pipeline a model.",
            )
        hf_task = served_task(model.artifact, task)
        check_pipeline(hf_task)
        check_settings(hf_task, pipeline_settings)
        if tokenizer is not None and not isinstance(tokenizer, CompiledTokenizer):
            longest = model.graph.record.max_sequence_length
            settings = {"padding": True, "truncation": True, "max_length": longest}
            tokenizer = (
                CompiledTokenizer.for_prompts(tokenizer)
                if hf_task.generates
                else CompiledTokenizer(tokenizer, settings)
            )
        return cls(None, _wrapped(hf_task, model, tokenizer, pipeline_settings), model.artifact)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the pipeline as in transformers. Lists run in batches of similar length; answers keep the order.

        Raises:
            InputError: The pipeline cannot read the inputs.
        """
        if self._generates():
            # A list may be one chat, and the order of the prompts decides what sampling draws.
            check_prompts(self.pipeline.tokenizer, inputs[0] if inputs else kwargs.get("text_inputs"))
            return self.pipeline(*inputs, **kwargs)
        # As in transformers, a tuple is a single input: a text pair.
        if inputs and isinstance(inputs[0], list) and len(inputs[0]) > 1:
            return call_list(self.pipeline, *inputs, **kwargs)
        return self.pipeline(*inputs, **kwargs)

    def _generates(self) -> bool:
        return str(self.pipeline.task) == HfTask.TEXT_GENERATION.value

    def save_pretrained(self, dest: str | Path, *, original: bool = True) -> Path:
        """Write the artifact, and beside it the original pipeline if there is one.

        Args:
            dest: An empty or absent folder, or one that holds another artifact, which is replaced.
            original: False saves about half the disk space, but leaves `original_pipeline` None after loading.

        Raises:
            StoreError: The folder holds other files, or cannot be written.
            SpecError: The model is not compiled.
        """
        if self._artifact is None:
            raise SpecError(
                "The pipeline has no compiled model to save.",
                hint="Pass a pipeline around a CompiledModel as compiled_pipeline, or use from_pipeline.",
            )
        with completed_artifact(self._artifact, self.pipeline.tokenizer, self._original_pipeline) as artifact:
            return copy_artifact(artifact, dest, replace=True, with_original=original)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return f"CompiledPipeline(task={self.task!r}, model={self.model!r})"


def check_pipeline(task: HfTask) -> None:
    """Check that a pipeline answers the task.

    Raises:
        LoadError: Neither transformers nor compileflow has a pipeline for it.
    """
    if task.pipeline_owner is None:
        raise LoadError(
            f"transformers has no pipeline for {task.value}.",
            hint="Load the model with CompiledModel.from_pretrained, and call it with the model's own processor.",
        )


def _task_of(pipeline: Any) -> HfTask | None:
    """Return the task of a pipeline; None if it has none, so that the class of its model decides."""
    if not pipeline.task:
        return None
    supported_tasks = [task for task in TEXT_TASKS if task.pipeline_owner == "transformers"]
    with suppress(ValueError):
        task = HfTask(pipeline.task)
        if task in supported_tasks:
            return task
    raise SpecError(
        f"from_pipeline does not compile {pipeline.task!r}.",
        hint=f"It compiles: {', '.join(supported_tasks)}. Use compileflow.pipeline for other tasks.",
    )


def _fitting_tokenizer(pipeline: Any, length: int, settings: Mapping[str, Any]) -> CompiledTokenizer:
    if pipeline.tokenizer is None:
        raise SpecError("The pipeline has no tokenizer.", hint="Create it with tokenizer=.")
    tokenizer = CompiledTokenizer.from_tokenizer(pipeline.tokenizer, **({"max_length": length} | dict(settings)))
    max_length = tokenizer.tokenization_settings["max_length"]
    if max_length is None or max_length > length:
        raise SpecError(
            f"tokenizer_settings has max_length {max_length}, but the model is compiled for {length} tokens.",
            hint=f"Leave max_length out, or pass at most {length}.",
        )
    return tokenizer


def _wrapped(task: HfTask, model: CompiledModel, tokenizer: Any, settings: dict[str, Any]) -> Any:
    artifact = model.artifact
    if task.modality == "text":
        if tokenizer is None:
            tokenizer = CompiledTokenizer.from_artifact(artifact, component=model.component)
        if task is HfTask.QUESTION_ANSWERING:
            return QuestionAnsweringPipeline(model, tokenizer, **settings)
        if task is HfTask.SENTENCE_SIMILARITY:
            return SentenceEmbeddingPipeline(model, tokenizer, artifact.folder, **settings)
        if task is HfTask.TEXT_RANKING:
            return TextRankingPipeline(model, tokenizer, artifact.folder, **settings)
        parts = {"tokenizer": tokenizer}
    else:
        parts = _processors(task, artifact)
    from transformers import pipeline

    # With the device, because transformers would move tensors to a GPU if it finds one.
    wrapped_pipeline = pipeline(
        task.value,
        model=model,
        device=model.device,
        trust_remote_code=artifact.trust_remote_code,
        **parts,
        **settings,
    )
    if task.modality == "text":
        pipeline_class: Any = type(wrapped_pipeline)
        wrapped_pipeline.__class__ = _without_device_moves(pipeline_class)
    return wrapped_pipeline


@cache
def _without_device_moves(pipeline_class: Any) -> Any:
    """Return a subclass whose forward does not look for tensors on other devices, since there are none.

    The search through inputs and outputs takes longer than everything else around a small model.
    """

    def forward(self: Any, model_inputs: Mapping[str, Any], **settings: Any) -> Any:
        # A copy, as in transformers, because some tasks remove entries.
        return self._forward(dict(model_inputs), **settings)

    def reduce(self: Any) -> tuple[Any, ...]:
        # pickle looks a class up by its name, and finds the class of transformers there.
        return _with_attributes, (pipeline_class, vars(self))

    members = {
        "__module__": pipeline_class.__module__,
        "__doc__": pipeline_class.__doc__,
        "__reduce__": reduce,
        "forward": forward,
    }
    return type(pipeline_class.__name__, (pipeline_class,), members)


def _with_attributes(pipeline_class: Any, attributes: Mapping[str, Any]) -> Any:
    subclass = _without_device_moves(pipeline_class)
    pipeline_copy = subclass.__new__(subclass)
    vars(pipeline_copy).update(attributes)
    return pipeline_copy


def _processors(task: HfTask, artifact: OpenArtifact) -> dict[str, Any]:
    """Load the processor of images or audio, and the tokenizer of labels or transcripts."""
    if task.modality == "audio":
        parts = {"feature_extractor": load_part(artifact, "AutoFeatureExtractor")}
    else:
        parts = {"image_processor": load_part(artifact, "AutoImageProcessor")}
    if task is HfTask.SPEECH_RECOGNITION or task.takes_text:
        parts["tokenizer"] = load_part(artifact, "AutoTokenizer")
    return parts
