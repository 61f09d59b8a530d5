"""Compile a model that is in memory in a child process, compare it, and keep the artifact in the local cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compileflow._process.folders import move_into_place, work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import ORIGINAL_FOLDER
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target, target_names
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import (
    CompileError,
    ProcessError,
    SpecError,
    TargetUnavailableError,
    first_line,
    first_problem,
)
from compileflow.local.comparison import Tolerance, compare_with_source, evaluation_mode
from compileflow.serving.original import write_task
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.settings import Settings, get_settings
from compileflow.source_model.text_model import longest_of
from compileflow.sources.files import choose_files_below
from compileflow.spec import NEURON_TARGETS, CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.compile import check_available, checked_target, detect_task
from compileflow.steps.plan import DEFAULT_TOKENS
from compileflow.steps.request import StepTimeouts

logger = logging.getLogger(__name__)
_CHILD = "compileflow.steps.build:build_artifact"
# Parameters of torch_neuron.trace and torch.jit.trace, which the older library called with these settings.
_TRACER_SETTINGS = {
    "compiler_args", "compiler_timeout", "compiler_workdir", "dynamic_batch_size", "dynamic_batching", "fallback",
    "minimum_segment_size", "op_whitelist", "optimizations", "separate_weights", "single_fusion_ratio_threshold",
    "subgraph_builder_function", "subgraph_inputs_pruning", "verbose",
    "check_inputs", "check_tolerance", "check_trace", "optimize", "strict",
}  # fmt: skip
_ARGUMENT_NAMES = (
    "batch_size", "max_length", "neuron", "target", "validate_compilation", "validation_rtol", "validation_atol",
)  # fmt: skip


def compile_in_memory(
    model: Any,
    *,
    target: str,
    batch_size: int,
    max_length: int,
    options: Mapping[str, Any],
    tolerance: Tolerance | None,
    hf_task: HfTask | None = None,
    tokenizer: CompiledTokenizer | None = None,
    original_task: str | None = None,
) -> OpenArtifact:
    """Compile a model in memory for one shape. The model itself stays unchanged.

    Args:
        model: A transformers model.
        target: Name of a target.
        batch_size: Rows of the compiled shape.
        max_length: Tokens per row; -1 is the maximum of the model.
        options: Options of the target. Settings of the older library's tracers that the target does not have are
            ignored, with a warning in the log.
        tolerance: Largest accepted difference from the source model. None: no comparison.
        hf_task: Task of the model. None: the task of its class.
        tokenizer: Tokenizer to include in the artifact with its settings.
        original_task: Task of the pipeline that the model belongs to, as the pipeline names it. The uncompiled
            pipeline is then kept beside the artifact.

    Returns:
        The artifact in the local cache. After an error, the cache is unchanged.

    Raises:
        SpecError: The model, the shape, the target or an option is invalid.
        TargetUnavailableError: The target's toolchain or runtime is not installed.
        CompileError: The toolchain failed or died.
        VerdictError: The compiled model does not answer like the source model.
    """
    settings = get_settings()
    with work_folder(settings.work_dir, label="compile") as work:
        source, artifact_dir = work / "source", work / "artifact"
        artifact_dir.mkdir()
        save_model(model, source)
        if tokenizer is not None:
            tokenizer.write(source)
        if original_task is not None:
            write_task(source, original_task)
        options = _without_tracer_settings(target, options)
        spec = _spec(model, target, hf_task or detect_task(source), (batch_size, max_length), options)
        _check_here(spec)
        _run(spec, source, artifact_dir, work, settings, type(model).__name__, tokenizer, tolerance)
        if tolerance is not None:
            artifact = open_artifact(
                artifact_dir, require_signature=False, trust_remote_code=spec.trust_remote_code
            )
            compare_with_source(model, artifact, tolerance, tokenizer=tokenizer)
        original = None if original_task is None else source
        return _keep(artifact_dir, settings, original, trust_remote_code=spec.trust_remote_code)


def older_target(target: str | None, *, neuron: bool) -> str:
    """Return `target`, or without it the target that `neuron` of the older library stands for.

    Raises:
        TargetUnavailableError: neuron is True, but no Neuron toolchain works here.
    """
    if target is not None:
        return target
    if not neuron:
        return "torchscript"
    reasons, hints = [], []
    for name in NEURON_TARGETS:
        availability = get_target(name).probe()
        if availability.can_compile and availability.can_run:
            return name
        reasons.append(f"{name}: {availability.reason}")
        hints.append(f"for {name} {availability.hint}")
    other_targets = ", ".join(name for name in target_names() if name not in NEURON_TARGETS)
    raise TargetUnavailableError(
        f"neuron=True needs AWS Neuron, which does not work here: {'; '.join(reasons)}.",
        hint=f"Install the toolchain ({'; '.join(hints)}), or pass neuron=False for torchscript, or target= "
        f"with one of: {other_targets}.",
    )


def resolved_length(model: Any, max_length: int) -> int:
    """Return a length in tokens; -1 stands for the maximum of the model.

    Raises:
        SpecError: The length is not a whole number, or the model has fewer positions.
    """
    if not isinstance(max_length, Integral) or isinstance(max_length, bool):
        raise SpecError(
            f"Expected max_length as a whole number of tokens, got {max_length!r}.",
            hint="Pass a number, or -1 for the maximum of the model.",
        )
    with evaluation_mode(model):
        positions = longest_of(model)
    if positions is not None and max_length > positions:
        raise SpecError(
            f"max_length is {max_length}, but the model has positions for {positions} tokens.",
            hint=f"Pass at most {positions}, or -1 for the maximum of the model.",
        )
    return (positions or DEFAULT_TOKENS) if max_length == -1 else max_length


def save_model(model: Any, folder: Path) -> None:
    """Write a model's configuration and weights. The model itself stays unchanged.

    Raises:
        SpecError: The object is not a transformers model, it is already quantized, or it cannot be saved.
        SourceError: The model has a PEFT adapter.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and _is_quantized(model):
        raise SpecError(
            f"The {type(model).__name__} is already quantized.",
            hint="Pass the model before quantization; compileflow.optimize(..., precision='int8') quantizes it.",
        )
    if not isinstance(model, PreTrainedModel) or next(model.parameters(), None) is None:
        raise SpecError(
            f"Expected a transformers model with its weights, got {type(model).__name__}.",
            hint="Pass a model as AutoModel...from_pretrained returns it, not wrapped or compiled.",
        )
    try:
        with _unchanged(model.config):
            model.save_pretrained(folder)
    except Exception as error:
        raise SpecError(
            f"The {type(model).__name__} cannot be saved: {type(error).__name__}: {first_line(error)}.",
            hint="Pass a model that its own save_pretrained can write.",
        ) from error
    choose_files_below(folder, f"The {type(model).__name__}")


def _is_quantized(model: Any) -> bool:
    return (
        getattr(model, "is_quantized", False)
        or getattr(model.config, "quantization_config", None) is not None
        or any("quantized" in type(module).__module__ for module in model.modules())
        or any(not parameter.is_floating_point() for parameter in model.parameters())
    )


@contextmanager
def _unchanged(config: Any) -> Iterator[None]:
    """Restore a configuration afterwards, because save_pretrained writes the model's class and type into it."""
    attributes = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(attributes)


def _spec(
    model: Any, target: str, hf_task: HfTask, shape: tuple[int, int], options: Mapping[str, Any]
) -> CompileSpec:
    _check_names(target, options)
    rows, length = shape[0], resolved_length(model, shape[1])
    try:
        bucket = ShapeBucket(batch_size=rows, sequence_length=length)
        return CompileSpec(
            target=target,
            hf_task=hf_task,
            components=(ComponentSpec(max_sequence_length=length, shape_buckets=(bucket,)),),
            target_options=dict(options),
            # The code of a model in memory already runs in this process.
            trust_remote_code=model.is_remote_code(),
        )
    except ValidationError as error:
        raise SpecError(
            f"{first_problem(error, show_input=True)}.",
            hint="Pass plain values, and batch_size and max_length of at least 1 (-1 is the model's maximum).",
        ) from error


def _without_tracer_settings(target: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options without those settings of the older library's tracers that the target does not have."""
    ignored = [
        name for name in options if name in _TRACER_SETTINGS - get_target(target).Options.model_fields.keys()
    ]
    if ignored:
        logger.warning(
            "%s does not have these tracing settings, which are ignored: %s", target, ", ".join(ignored)
        )
    return {name: value for name, value in options.items() if name not in ignored}


def _check_names(target: str, options: Mapping[str, Any]) -> None:
    """Suggest the correct name for a misspelled argument; the target checks the names of its options."""
    known_names = get_target(target).Options.model_fields
    for name in options:
        near_names = get_close_matches(name, _ARGUMENT_NAMES, n=1)
        if name not in known_names and near_names:
            raise SpecError(
                f"Unknown setting {name!r}.",
                hint=f"Did you mean {near_names[0]}? "
                f"The options of {target} are: {', '.join(known_names) or 'none'}.",
            )


def _check_here(spec: CompileSpec) -> None:
    target = checked_target(spec)
    check_available(target, Precision.FP32)
    availability = target.probe()
    # The caller gets a loaded model, so the target must also run here.
    if not availability.can_run:
        raise TargetUnavailableError(
            f"{target.name} compiles here but cannot run here: {availability.reason}.",
            hint=f"Try: {availability.hint}.",
        )


def _run(
    spec: CompileSpec,
    source: Path,
    artifact_dir: Path,
    work: Path,
    settings: Settings,
    class_name: str,
    tokenizer: CompiledTokenizer | None,
    tolerance: Tolerance | None,
) -> None:
    digest = folder_digest(list_files(source))
    rows_fill_shapes, padding = True, None
    if tokenizer is not None:
        call_settings = tokenizer.tokenization_settings
        (component,) = spec.components
        filled = {"padding": "max_length", "max_length": component.max_sequence_length}
        # The older library pads each row to the one shape that it compiles, unless its settings say otherwise.
        rows_fill_shapes = filled.items() <= call_settings.items()
        padding = {"settings": call_settings, "tolerance": None if tolerance is None else asdict(tolerance)}
    request = {
        "source_dir": str(source),
        "out_dir": str(artifact_dir),
        "spec": spec.model_dump(mode="json"),
        "source": {"uri": f"memory://{class_name}", "revision": digest, "digest": digest},
        "threads": settings.threads,
        "needs_tokenizer": tokenizer is not None,
        "rows_fill_shapes": rows_fill_shapes,
        "padding": padding,
    }
    try:
        run_in_child(
            _CHILD,
            request,
            work_dir=work,
            log_path=settings.log_path(f"compile-{work.name}"),
            timeout_s=StepTimeouts().compile_s,
            threads=settings.threads,
        )
    except ProcessError as error:
        raise CompileError(
            f"The toolchain of {spec.target} died: {error.message}", hint=error.hint, log_path=error.log_path
        ) from error


def _keep(folder: Path, settings: Settings, original: Path | None, *, trust_remote_code: bool) -> OpenArtifact:
    """Move an artifact into the local cache of downloaded artifacts, with its original pipeline."""
    # Artifacts of this process are unsigned; their source model is in its memory.
    cached_folder = settings.home_dir / "artifacts" / open_artifact(folder, require_signature=False).digest
    move_into_place(folder, cached_folder)
    if original is not None:
        # The same artifact may be cached without it.
        move_into_place(original, cached_folder / ORIGINAL_FOLDER)
    return open_artifact(cached_folder, require_signature=False, trust_remote_code=trust_remote_code)
