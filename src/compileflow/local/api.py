"""pipeline() and optimize(): compile a model into the local cache, validate it, and return it ready to call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from compileflow._process.packages import check_installed
from compileflow.artifact.open import open_artifact
from compileflow.catalog import get_target, open_store
from compileflow.errors import SpecError, TargetUnavailableError, VerdictError, first_problem
from compileflow.local.blade_forms import Forms, autocast_precision, check_device, load_settings
from compileflow.local.comparison import Tolerance, compare_with_source
from compileflow.local.optimized_model import as_source_class
from compileflow.local.source import default_model, fetch_local, is_compiled, known_task, loaded, preprocessor_of
from compileflow.serving.model import CompiledModel
from compileflow.serving.pipeline import CompiledPipeline, check_pipeline
from compileflow.serving.pipeline_settings import check_settings, check_spelling
from compileflow.serving.served_task import served_task
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import compile_artifact, detect_task
from compileflow.steps.register import check_last_verdict
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import compile_words
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
AUTO_LOCAL = "auto-local"
# In order of preference; the last one compiles and runs wherever torch does.
LOCAL_TARGETS = ("openvino", "onnx-runtime", "aot-inductor", "torchscript")
# Tolerances of a model that is compared on token ids only: those of CompiledModel.from_model, and wider ones below
# fp32.
_TOLERANCE = Tolerance(rtol=1e-2, atol=1e-2)
_LOW_PRECISION_TOLERANCE = Tolerance(rtol=0.1, atol=0.1)
_COMPILE_NAMES = ("max_sequence_length", "shape_buckets", "target_options", "trust_remote_code")


def pipeline(
    task: str | None = None,
    model: Any = None,
    target: str = AUTO_LOCAL,
    *,
    precision: Precision | str = "fp32",
    tokenizer: Any = None,
    feature_extractor: Any = None,
    revision: str | None = None,
    device: Any = None,
    validate: bool | ValidationSettings = True,
    use_fast: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    skip_compile: bool = False,
    amp: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    output_names: Sequence[str] | None = None,
    forward_default_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> CompiledPipeline:
    """Return a compiled pipeline that is called like a pipeline of `transformers.pipeline`.

    Args:
        task: Task or alias, for example "ner". None: the task of the model.
        model: Folder, Hub id, a transformers model in memory, or a model that compileflow compiled before. None:
            transformers' default for the task.
        target: Name of a target. "auto-local" is the first of openvino, onnx-runtime, aot-inductor and
            torchscript that compiles and runs here.
        precision: fp32, bf16, fp16, int8 or int4, if the target supports it for the task.
        tokenizer: A tokenizer, its folder or Hub id. It replaces the tokenizer of the model.
        feature_extractor: A processor of images or audio. It replaces the processor of the model.
        revision: Branch, tag or commit of a Hub model.
        device: None, -1 or "cpu"; the target decides which device computes.
        validate: False skips validation; `ValidationSettings` configure it.
        use_fast: Ignored: transformers 5 loads the fast tokenizer wherever there is one.
        model_kwargs: See `optimize`.
        skip_compile: See `optimize`.
        amp: See `optimize`.
        example_inputs: Checked as in `optimize`, but not used: a pipeline makes its own inputs.
        output_names: Checked as in `optimize`, but not used: a pipeline reads the outputs of its task.
        forward_default_kwargs: Checked as in `optimize`, but not used.
        **settings: `max_sequence_length`, `shape_buckets`, `target_options`, `trust_remote_code` configure the
            compile, all others the pipeline, for example `top_k`, `aggregation_strategy` or `batch_size`.

    Raises:
        ValueError: Both the task and the model are missing.
        SpecError: The task, the target, the precision or an option is invalid, or a model in memory has no
            tokenizer, or a setting is unknown.
        LoadError: The task has no pipeline; `optimize` compiles its models.
        TargetUnavailableError, CompileError: The model cannot be compiled here.
        VerdictError: The compiled model does not answer like the source model.
    """
    check_device(device)
    if task is not None:
        check_pipeline(known_task(task))
    compile_settings = {name: settings.pop(name) for name in _COMPILE_NAMES if name in settings}
    check_spelling(settings, [*inspect.signature(pipeline).parameters, *_COMPILE_NAMES])
    preprocessor = tokenizer if tokenizer is not None else feature_extractor
    compiled_model, hf_task = _compiled_model(
        task,
        model,
        target="torchscript" if skip_compile and target == AUTO_LOCAL else target,
        precision=autocast_precision(precision, target, amp=amp),
        preprocessor=preprocessor,
        needs_preprocessor=True,
        pipeline_settings=settings,
        validate=validate,
        settings={"revision": revision} | compile_settings | load_settings(model_kwargs),
    )
    if example_inputs or output_names or forward_default_kwargs:
        forms = Forms(example_inputs, output_names, forward_default_kwargs or {})
        as_source_class(compiled_model, forms)
    # The artifact of a model that is compiled here holds the preprocessor.
    given = preprocessor if is_compiled(model) else None
    return CompiledPipeline.from_model(compiled_model, task=hf_task, tokenizer=loaded(given), **settings)


def optimize(
    task: str | None = None,
    id_or_path: Any = None,
    model: Any = None,
    preprocessor: Any = None,
    skip_compile: bool = False,
    amp: bool = False,
    device: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    output_names: Sequence[str] | None = None,
    forward_default_kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = AUTO_LOCAL,
    precision: Precision | str = "fp32",
    tokenizer: Any = None,
    revision: str | None = None,
    validate: bool | ValidationSettings = True,
    **compile_settings: Any,
) -> Any:
    """Return a compiled model that is an instance of the source model's class.

    It takes the same arguments and returns the same output class. It has no parameters, and raises an error for
    features that a compiled model does not have: training, labels, attentions and hidden states. `.info` and
    `.opt_model` are those of BladeDISC's adapter: facts about the model, and the `CompiledModel` itself.

    Args:
        task: Task or alias, for example "ner". None: the task of the model.
        id_or_path: Folder or Hub id of the model.
        model: The same, a transformers model in memory, or a model that compileflow compiled before. None and no
            `id_or_path`: transformers' default for the task.
        preprocessor: A tokenizer or processor, or the folder or Hub id of a tokenizer. For a model in memory, None
            means the one at the place that the model was loaded from; without one, the model is validated on token
            ids only.
        skip_compile: True only traces the model: target torchscript, unless a target is given.
        amp: True computes as torch.autocast does, in bf16, or fp16 for target blade, unless a precision is given.
        device: None, -1 or "cpu"; the target decides which device computes.
        model_kwargs: `revision` and `trust_remote_code`. Others that only say how to load the weights are ignored,
            for example `torchscript`, which transformers 5 does not have.
        example_inputs: Tensors for `.info`, by name; they do not restrict the shapes.
        output_names: Outputs to return. None: all.
        forward_default_kwargs: Arguments for calls that leave them out; a callable is called in each call.
        target: Name of a target, or "auto-local"; see `pipeline`.
        precision: fp32, bf16, fp16, int8 or int4, if the target supports it for the task.
        tokenizer: Another name for `preprocessor`.
        revision: Branch, tag or commit of a Hub model.
        validate: False skips validation; `ValidationSettings` configure it.
        **compile_settings: `max_sequence_length`, `shape_buckets`, `target_options`, `trust_remote_code`.

    Raises:
        ValueError, SpecError, TargetUnavailableError, CompileError, VerdictError: See `pipeline`.
        LoadError: The device is not the CPU.
    """
    check_device(device)
    if model is not None and id_or_path is not None:
        raise SpecError("Both id_or_path and model were given.", hint="Pass one of them.")
    compiled_model, _ = _compiled_model(
        task,
        id_or_path if model is None else model,
        target="torchscript" if skip_compile and target == AUTO_LOCAL else target,
        precision=autocast_precision(precision, target, amp=amp),
        preprocessor=preprocessor if tokenizer is None else tokenizer,
        needs_preprocessor=False,
        validate=validate,
        settings={"revision": revision} | compile_settings | load_settings(model_kwargs),
    )
    memory_name = str(getattr(model, "name_or_path", ""))
    forms = Forms(example_inputs, output_names, forward_default_kwargs or {}, memory_name)
    return as_source_class(compiled_model, forms)


def local_target(
    hf_task: HfTask,
    precision: Precision | None,
    *,
    names: Sequence[str] = LOCAL_TARGETS,
    chooser: str = AUTO_LOCAL,
) -> str:
    """Return the first target that compiles and runs this task at this precision on this machine.

    Args:
        hf_task: The task.
        precision: The precision; None for any.
        names: Targets in order of preference.
        chooser: Who chooses, for the log.

    Raises:
        TargetUnavailableError: No target does; the message says what each of them lacks.
    """
    skip_reasons = []
    work = hf_task.value if precision is None else f"{hf_task.value} at {precision.value}"
    for name in names:
        target = get_target(name)
        availability, capabilities = target.probe(), target.capabilities
        precisions = capabilities.precisions_for(hf_task)
        if hf_task not in capabilities.hf_tasks or (precision is not None and precision not in precisions):
            skip_reasons.append(f"{name} does not compile {work}")
        elif not (availability.can_compile and availability.can_run):
            skip_reasons.append(f"{name}: {availability.reason}")
        elif precision is not None and precision in availability.lacking:
            skip_reasons.append(f"{name}: {availability.lacking[precision]}")
        else:
            reasons = f" (skipped: {'; '.join(skip_reasons)})" if skip_reasons else ""
            logger.info("%s selects %s%s", chooser, name, reasons)
            return name
    raise TargetUnavailableError(
        f"No local target compiles {work} here: {'; '.join(skip_reasons)}.",
        hint="Install one: pip install 'compileflow[openvino]' or 'compileflow[onnx-runtime]'.",
    )


def _compiled_model(
    task: str | None,
    model: Any,
    *,
    target: str,
    precision: Precision | str,
    preprocessor: Any,
    needs_preprocessor: bool,
    pipeline_settings: Mapping[str, Any] = MappingProxyType({}),
    validate: bool | ValidationSettings,
    settings: Mapping[str, Any],
) -> tuple[CompiledModel, HfTask]:
    """Compile a model unless it is compiled, and return it loaded, with its task."""
    hf_task = None if task is None else known_task(task)
    if is_compiled(model):
        compiled_model: CompiledModel = getattr(model, "compiled", model)
        return compiled_model, served_task(compiled_model.artifact, hf_task)
    check_installed(("torch", "transformers"), subject="A compile", extra="compile")
    revision = settings.get("revision")
    if model is None:
        if hf_task is None:
            raise ValueError("Both task and model are missing. Pass at least one, for example task='ner'.")
        model, revision = default_model(hf_task)
    in_memory = not isinstance(model, str | Path)
    trust_remote_code = bool(settings.get("trust_remote_code"))
    if in_memory and preprocessor is None:
        preprocessor = preprocessor_of(model, trust_remote_code=trust_remote_code)
        if preprocessor is None and needs_preprocessor:
            raise SpecError("A model in memory has no tokenizer.", hint="Pass tokenizer=.")
    configuration = get_settings()
    source = fetch_local(model, preprocessor, revision, configuration, trust_remote_code=trust_remote_code)
    if hf_task is None:
        with open_store(configuration.resolved_store_uri()).open_folder(source.digest) as folder:
            hf_task = detect_task(folder)
    check_settings(hf_task, pipeline_settings)
    request = _checked(
        {
            "model": source.uri,
            "hf_task": hf_task,
            "precision": precision,
            "validation": validate if isinstance(validate, ValidationSettings) else ValidationSettings(),
            **{name: value for name, value in settings.items() if name != "revision"},
        }
    )
    name = local_target(hf_task, request.precision) if target == AUTO_LOCAL else target
    request = request.model_copy(update={"target": get_target(name).name})
    has_preprocessor = not in_memory or preprocessor is not None
    artifact = compile_artifact(
        source,
        request,
        store_uri=configuration.resolved_store_uri(),
        settings=configuration,
        needs_tokenizer=has_preprocessor,
    )
    logger.info("%s for %s: %s", source.uri, request.target, compile_words(artifact))
    if validate and has_preprocessor:
        hint = "Choose another target or precision; validate=False skips validation."
        validated = prove(source, artifact, request, configuration, hint=hint)
        logger.info("%s for %s: %s", source.uri, request.target, validated.reason)
    opened = open_artifact(artifact.uri, settings=configuration, trust_remote_code=request.trust_remote_code)
    if validate and not has_preprocessor:
        # The validation step reads natural text, which takes a tokenizer.
        tolerance = _TOLERANCE if request.precision is Precision.FP32 else _LOW_PRECISION_TOLERANCE
        compare_with_source(model, opened, tolerance)
    return CompiledModel.from_artifact(opened), hf_task


def prove(
    source: FetchedSource,
    artifact: CompiledArtifact,
    request: CompileRequest,
    settings: Settings,
    *,
    hint: str = "Choose another target or precision.",
    on_progress: Callable[[str], None] = logger.info,
) -> ValidatedArtifact:
    """Validate an artifact in the configured store, and return its verdict.

    Raises:
        VerdictError: The verdict is neither pass nor warn, or the last signed verdict on the artifact is FAILED.
    """
    validated = validate_artifact(
        source,
        artifact,
        request.validation,
        store_uri=settings.resolved_store_uri(),
        settings=settings,
        timeout_s=request.timeouts.validate_s,
        request=request,
        trust_remote_code=request.trust_remote_code,
        on_progress=on_progress,
    )
    if validated.outcome in ("fail", "error"):
        raise VerdictError(
            f"{source.uri}, compiled for {request.target}, failed validation: {validated.reason}.",
            hint=f"The report is {validated.report_uri}. {hint}",
            report_uri=validated.report_uri,
        )
    check_last_verdict(artifact, settings, allow_warn=True)
    return validated


def _checked(fields: dict[str, Any]) -> CompileRequest:
    try:
        return CompileRequest.model_validate(fields)
    except ValidationError as error:
        raise SpecError(
            f"{first_problem(error, show_input=True)}.",
            hint=f"The settings of a compile are: {', '.join(_COMPILE_NAMES)}.",
        ) from error
