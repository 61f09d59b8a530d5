"""pipeline() and optimize(): compile a model into the local cache, validate it, and return it ready to call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target, open_store
from compileflow.errors import LoadError, SpecError, TargetUnavailableError, VerdictError, first_problem
from compileflow.local.optimized_model import as_source_class
from compileflow.local.source import default_model, fetch_local, known_task
from compileflow.serving.model import CompiledModel
from compileflow.serving.pipeline import CompiledPipeline, check_pipeline
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import compile_artifact, detect_task
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import compile_words
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
AUTO_LOCAL = "auto-local"
# In order of preference; the last one compiles and runs wherever torch does.
LOCAL_TARGETS = ("openvino", "onnx-runtime", "aot-inductor", "torchscript")
_COMPILE_NAMES = ("max_sequence_length", "shape_buckets", "target_options", "trust_remote_code")


def pipeline(
    task: str | None = None,
    model: Any = None,
    target: str = AUTO_LOCAL,
    *,
    precision: Precision | str = "fp32",
    tokenizer: Any = None,
    revision: str | None = None,
    device: Any = None,
    validate: bool | ValidationSettings = True,
    **settings: Any,
) -> CompiledPipeline:
    """Return a compiled pipeline that is called like a pipeline of `transformers.pipeline`.

    Args:
        task: Task or alias, for example "ner". None: the task of the model.
        model: Folder, Hub id, or a transformers model in memory. None: transformers' default for the task.
        target: Name of a target. "auto-local" is the first of openvino, onnx-runtime, aot-inductor and
            torchscript that compiles and runs here.
        precision: fp32, bf16, fp16 or int8, if the target supports it.
        tokenizer: A tokenizer, its folder or Hub id. It replaces the tokenizer of the model.
        revision: Branch, tag or commit of a Hub model.
        device: None, -1 or "cpu"; the target decides which device computes.
        validate: False skips validation; `ValidationSettings` configure it.
        **settings: `max_sequence_length`, `shape_buckets`, `target_options`, `trust_remote_code` configure the
            compile, all others the pipeline, for example `top_k`, `aggregation_strategy` or `batch_size`.

    Raises:
        ValueError: Both the task and the model are missing.
        SpecError: The task, the target, the precision or an option is invalid.
        LoadError: The task has no pipeline; `optimize` compiles its models.
        TargetUnavailableError, CompileError: The model cannot be compiled here.
        VerdictError: The compiled model does not answer like the source model.
    """
    _check_device(device)
    if task is not None:
        check_pipeline(known_task(task))
    compile_settings = {name: settings.pop(name) for name in _COMPILE_NAMES if name in settings}
    artifact, hf_task = _compiled(task, model, target, precision, tokenizer, revision, validate, compile_settings)
    return CompiledPipeline.from_pretrained(
        artifact.folder, task=hf_task, trust_remote_code=artifact.trust_remote_code, **settings
    )


def optimize(
    task: str | None = None,
    model: Any = None,
    target: str = AUTO_LOCAL,
    *,
    precision: Precision | str = "fp32",
    tokenizer: Any = None,
    revision: str | None = None,
    validate: bool | ValidationSettings = True,
    **compile_settings: Any,
) -> Any:
    """Return a compiled model that is an instance of the source model's class.

    It takes the same arguments and returns the same output class. It has no parameters, and raises an error for
    features that a compiled model does not have: training, labels, attentions and hidden states.

    Args:
        task: Task or alias, for example "ner". None: the task of the model.
        model: Folder, Hub id, or a transformers model in memory. None: transformers' default for the task.
        target: Name of a target, or "auto-local"; see `pipeline`.
        precision: fp32, bf16, fp16 or int8, if the target supports it.
        tokenizer: A tokenizer, its folder or Hub id; required for a model in memory.
        revision: Branch, tag or commit of a Hub model.
        validate: False skips validation; `ValidationSettings` configure it.
        **compile_settings: `max_sequence_length`, `shape_buckets`, `target_options`, `trust_remote_code`.

    Raises:
        ValueError, SpecError, TargetUnavailableError, CompileError, VerdictError: See `pipeline`.
    """
    artifact, _ = _compiled(task, model, target, precision, tokenizer, revision, validate, compile_settings)
    return as_source_class(CompiledModel.from_artifact(artifact))


def local_target(hf_task: HfTask, precision: Precision) -> str:
    """Return the first target that compiles and runs this task at this precision on this machine.

    Raises:
        TargetUnavailableError: No target does; the message says what each of them lacks.
    """
    skip_reasons = []
    for name in LOCAL_TARGETS:
        target = get_target(name)
        availability, capabilities = target.probe(), target.capabilities
        if hf_task not in capabilities.hf_tasks or precision not in capabilities.precisions:
            skip_reasons.append(f"{name} does not compile {hf_task.value} at {precision.value}")
        elif not (availability.can_compile and availability.can_run):
            skip_reasons.append(f"{name}: {availability.reason}")
        elif precision in availability.lacking:
            skip_reasons.append(f"{name}: {availability.lacking[precision]}")
        else:
            reasons = f" (skipped: {'; '.join(skip_reasons)})" if skip_reasons else ""
            logger.info("%s selects %s%s", AUTO_LOCAL, name, reasons)
            return name
    raise TargetUnavailableError(
        f"No local target compiles {hf_task.value} at {precision.value} here: {'; '.join(skip_reasons)}.",
        hint="Install one: pip install 'compileflow[openvino]' or 'compileflow[onnx-runtime]'.",
    )


def _compiled(
    task: str | None,
    model: Any,
    target: str,
    precision: Precision | str,
    tokenizer: Any,
    revision: str | None,
    validate: bool | ValidationSettings,
    compile_settings: Mapping[str, Any],
) -> tuple[OpenArtifact, HfTask]:
    settings = get_settings()
    hf_task = None if task is None else known_task(task)
    if model is None:
        if hf_task is None:
            raise ValueError("Both task and model are missing. Pass at least one, for example task='ner'.")
        model, revision = default_model(hf_task)
    trust_remote_code = bool(compile_settings.get("trust_remote_code"))
    source = fetch_local(model, tokenizer, revision, settings, trust_remote_code=trust_remote_code)
    if hf_task is None:
        with open_store(settings.resolved_store_uri()).open_folder(source.digest) as folder:
            hf_task = detect_task(folder)
    base_request = _checked(
        {
            "model": source.uri,
            "hf_task": hf_task,
            "precision": precision,
            "validation": validate if isinstance(validate, ValidationSettings) else ValidationSettings(),
            **compile_settings,
        }
    )
    name = local_target(hf_task, base_request.precision) if target == AUTO_LOCAL else target
    request = base_request.model_copy(update={"target": get_target(name).name})
    artifact = compile_artifact(source, request, store_uri=settings.resolved_store_uri(), settings=settings)
    logger.info("%s for %s: %s", source.uri, request.target, compile_words(artifact))
    if validate:
        _prove(source, artifact, request, settings)
    opened_artifact = open_artifact(artifact.uri, trust_remote_code=request.trust_remote_code, settings=settings)
    return opened_artifact, hf_task


def _prove(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest, settings: Settings) -> None:
    validated = validate_artifact(
        source,
        artifact,
        request.validation,
        store_uri=settings.resolved_store_uri(),
        settings=settings,
        timeout_s=request.timeouts.validate_s,
        trust_remote_code=request.trust_remote_code,
    )
    logger.info("%s for %s: %s", source.uri, request.target, validated.reason)
    if validated.outcome in ("fail", "error"):
        raise VerdictError(
            f"{source.uri}, compiled for {request.target}, failed validation: {validated.reason}.",
            hint=f"The report is {validated.report_uri}. Choose another target or precision; validate=False "
            "skips validation.",
        )


def _checked(fields: dict[str, Any]) -> CompileRequest:
    try:
        return CompileRequest.model_validate(fields)
    except ValidationError as error:
        raise SpecError(
            f"{first_problem(error, show_input=True)}.",
            hint=f"The settings of a compile are: {', '.join(_COMPILE_NAMES)}.",
        ) from error


def _check_device(device: Any) -> None:
    if device not in (None, -1) and str(device) != "cpu":
        raise LoadError(
            f"A compiled pipeline takes its tensors from the CPU, got device={device!r}.",
            hint="Leave device out; the target decides where the model runs.",
        )
