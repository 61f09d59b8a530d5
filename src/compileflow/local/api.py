"""pipeline and optimize: a model by name, compiled into the local cache, proven, and ready to be called."""

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
from compileflow.serving.pipeline import CompiledPipeline
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
# Tried in this order; the last one compiles and runs wherever torch does.
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
    **kw: Any,
) -> CompiledPipeline:
    """Make a compiled pipeline, as `transformers.pipeline` makes one that is not compiled.

    Args:
        task: Task or alias, for example "ner"; None is the model's own.
        model: Folder, Hub id, or a transformers model in memory; None is transformers' default for the task.
        target: A target's name; "auto-local" is the first of openvino, onnx-runtime, aot-inductor and
            torchscript that compiles and runs here.
        precision: fp32, bf16, fp16 or int8, as the target has them.
        tokenizer: A tokenizer, its folder or Hub id, where the model comes without one or with another.
        revision: Branch, tag or commit of a Hub model.
        device: None, -1 or "cpu": which device it runs on is the target's.
        validate: False returns it unproven; settings say how it is proven.
        **kw: `max_sequence_length`, `shape_buckets`, `target_options` and `trust_remote_code` go to the compile,
            the rest to the pipeline: `top_k`, `aggregation_strategy`, `batch_size`.

    Raises:
        ValueError: neither a task nor a model.
        SpecError: a task, target, precision or option that there is not.
        TargetUnavailableError, CompileError: it cannot be compiled here.
        VerdictError: it was compiled and does not answer like the source model.
    """
    _check_device(device)
    compile_kw = {name: kw.pop(name) for name in _COMPILE_NAMES if name in kw}
    artifact, hf_task = _compiled(task, model, target, precision, tokenizer, revision, validate, compile_kw)
    return CompiledPipeline.from_pretrained(artifact.folder, task=hf_task, **kw)


def optimize(
    task: str | None = None,
    model: Any = None,
    target: str = AUTO_LOCAL,
    *,
    precision: Precision | str = "fp32",
    tokenizer: Any = None,
    revision: str | None = None,
    validate: bool | ValidationSettings = True,
    **compile_kw: Any,
) -> Any:
    """Return a compiled model that is an instance of the source model's own class.

    It is called with the same arguments and answers with the same output class. It has no parameters, and
    refuses what the compiled graph has not: training, labels, attentions, hidden states.

    Args:
        task: As `pipeline` has it, and so are the next ones.
        model: Folder, Hub id, or a transformers model in memory.
        target: A target's name, or "auto-local".
        precision: fp32, bf16, fp16 or int8.
        tokenizer: Goes with a model in memory.
        revision: Branch, tag or commit of a Hub model.
        validate: False returns it unproven; settings say how it is proven.
        **compile_kw: `max_sequence_length`, `shape_buckets`, `target_options`, `trust_remote_code`.

    Raises:
        ValueError, SpecError, TargetUnavailableError, CompileError, VerdictError: as `pipeline`.
    """
    artifact, _ = _compiled(task, model, target, precision, tokenizer, revision, validate, compile_kw)
    return as_source_class(CompiledModel.from_artifact(artifact))


def local_target(hf_task: HfTask, precision: Precision) -> str:
    """Return the first target that compiles and runs this task at this precision on this machine.

    Raises:
        TargetUnavailableError: there is none; the message says what each one lacks.
    """
    passed_over = []
    for name in LOCAL_TARGETS:
        target = get_target(name)
        here, can = target.probe(), target.capabilities
        if hf_task not in can.hf_tasks or precision not in can.precisions:
            passed_over.append(f"{name} has no {hf_task.value} at {precision.value}")
        elif not (here.can_compile and here.can_run):
            passed_over.append(f"{name}: {here.reason}")
        elif precision in here.lacking:
            passed_over.append(f"{name}: {here.lacking[precision]}")
        else:
            why = f" (passed over: {'; '.join(passed_over)})" if passed_over else ""
            logger.info("%s is %s here%s", AUTO_LOCAL, name, why)
            return name
    raise TargetUnavailableError(
        f"No local target compiles {hf_task.value} at {precision.value} here: {'; '.join(passed_over)}.",
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
    compile_kw: Mapping[str, Any],
) -> tuple[OpenArtifact, HfTask]:
    settings = get_settings()
    hf_task = None if task is None else known_task(task)
    if model is None:
        if hf_task is None:
            raise ValueError("Neither a task nor a model was given. Give one, for example task='ner'.")
        model, revision = default_model(hf_task)
    source = fetch_local(model, tokenizer, revision, settings)
    if hf_task is None:
        with open_store(settings.resolved_store_uri()).open_folder(source.digest) as folder:
            hf_task = detect_task(folder)
    wanted = _checked(
        {
            "model": source.uri,
            "hf_task": hf_task,
            "precision": precision,
            "validation": validate if isinstance(validate, ValidationSettings) else ValidationSettings(),
            **compile_kw,
        }
    )
    name = local_target(hf_task, wanted.precision) if target == AUTO_LOCAL else target
    request = wanted.model_copy(update={"target": get_target(name).name})
    artifact = compile_artifact(source, request, store_uri=settings.resolved_store_uri(), settings=settings)
    logger.info("%s for %s: %s", source.uri, request.target, compile_words(artifact))
    if validate:
        _prove(source, artifact, request, settings)
    return open_artifact(artifact.uri, settings=settings), hf_task


def _prove(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest, settings: Settings) -> None:
    validated = validate_artifact(
        source,
        artifact,
        request.validation,
        store_uri=settings.resolved_store_uri(),
        settings=settings,
        timeout_s=request.timeouts.validate_s,
    )
    logger.info("%s for %s: %s", source.uri, request.target, validated.reason)
    if validated.outcome in ("fail", "error"):
        raise VerdictError(
            f"{source.uri} was compiled for {request.target} and refused: {validated.reason}.",
            hint=f"The report is {validated.report_uri}. Choose another target or precision; validate=False "
            "skips the proof.",
        )


def _checked(asked: dict[str, Any]) -> CompileRequest:
    try:
        return CompileRequest.model_validate(asked)
    except ValidationError as error:
        raise SpecError(
            f"{first_problem(error, show_input=True)}.",
            hint=f"Settings of a compile are: {', '.join(_COMPILE_NAMES)}.",
        ) from error


def _check_device(device: Any) -> None:
    if device not in (None, -1) and str(device) != "cpu":
        raise LoadError(
            f"device={device!r} was asked for; a compiled pipeline takes its tensors from the CPU.",
            hint="Leave device out: the target decides where the graph runs.",
        )
