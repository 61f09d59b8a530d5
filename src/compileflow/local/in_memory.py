"""Compile a model that is in memory, in a fresh process, prove it, and keep the artifact in the local cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compileflow._process.run import run_in_child
from compileflow._process.folders import move_into_place, work_folder
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target, target_names
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import CompileError, ProcessError, SpecError, TargetUnavailableError, first_problem
from compileflow.local.comparison import Tolerance, compare_with_source
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.settings import Settings, get_settings
from compileflow.source_model.interface import maximum_length
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.compile import check_available, checked_target, detect_task
from compileflow.steps.request import StepTimeouts

_CHILD = "compileflow.steps.build:build_artifact"
# Inf1 first: what services wrote tracing settings for; Inf2 where only its toolchain is here.
_NEURON_TARGETS = ("neuron", "neuronx")
_OWN_NAMES = (
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
) -> OpenArtifact:
    """Compile a model in memory for one shape; the model stays as it is.

    Args:
        model: A transformers model.
        target: A target's name.
        batch_size: Rows of the compiled shape.
        max_length: Tokens a row; -1 is the model's own maximum.
        options: The target's options.
        tolerance: What the compiled model has to keep; None compares nothing.
        hf_task: None reads it off the model's class.
        tokenizer: Goes into the artifact with its settings.

    Returns:
        The artifact, in the local cache. After an error nothing of it is left there.

    Raises:
        SpecError: the model, a shape, the target or an option is not possible.
        TargetUnavailableError: the target's toolchain or runtime is missing here.
        CompileError: the toolchain refused or died.
        VerdictError: the compiled model answers otherwise than the source model.
    """
    settings = get_settings()
    with work_folder(settings.work_dir, label="compile") as work:
        source, out = work / "source", work / "artifact"
        out.mkdir()
        save_model(model, source)
        if tokenizer is not None:
            tokenizer.write(source)
        spec = _spec(model, target, hf_task or detect_task(source), (batch_size, max_length), options)
        _check_here(spec)
        _run(spec, source, out, work, settings, type(model).__name__, has_tokenizer=tokenizer is not None)
        if tolerance is not None:
            plain = tokenizer.tokenizer if tokenizer is not None else None
            compiled = open_artifact(out, require_signature=False)
            compare_with_source(model, compiled, tolerance, tokenizer=plain)
        return _keep(out, settings)


def older_target(target: str | None, *, neuron: bool) -> str:
    """Return the target that the older library's `neuron` means; a `target` that is named wins.

    Raises:
        TargetUnavailableError: neuron=True, and no Neuron toolchain works here.
    """
    if target is not None:
        return target
    if not neuron:
        return "torchscript"
    missing, installs = [], []
    for name in _NEURON_TARGETS:
        here = get_target(name).probe()
        if here.can_compile and here.can_run:
            return name
        missing.append(f"{name}: {here.reason}")
        installs.append(f"for {name} {here.hint}")
    others = ", ".join(name for name in target_names() if name not in _NEURON_TARGETS)
    raise TargetUnavailableError(
        f"neuron=True, and AWS Neuron does not work here: {'; '.join(missing)}.",
        hint=f"Install the toolchain ({'; '.join(installs)}), or give neuron=False for torchscript, or target= "
        f"with one of: {others}.",
    )


def resolved_length(config: Any, max_length: int) -> int:
    """Return a length in tokens; -1 is the model's own maximum.

    Raises:
        SpecError: the model has fewer positions.
    """
    positions = maximum_length(config, None)
    if max_length > positions:
        raise SpecError(
            f"max_length {max_length} was asked for; the model has positions for {positions} tokens.",
            hint=f"Ask for {positions} or fewer, or for -1, the model's own maximum.",
        )
    return positions if max_length == -1 else max_length


def save_model(model: Any, folder: Path) -> None:
    """Write a model's configuration and weights, and leave the model as it was.

    Raises:
        SpecError: it is no transformers model.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or next(model.parameters(), None) is None:
        raise SpecError(
            f"A transformers model with its weights is needed; found {type(model).__name__}.",
            hint="Give what AutoModel...from_pretrained returns, unwrapped and not compiled yet.",
        )
    with _unchanged(model.config):
        model.save_pretrained(folder)


@contextmanager
def _unchanged(config: Any) -> Iterator[None]:
    """Put a configuration back: save_pretrained writes the model's class and type into it."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def _spec(
    model: Any, target: str, hf_task: HfTask, shape: tuple[int, int], options: Mapping[str, Any]
) -> CompileSpec:
    _check_names(target, options)
    rows, length = shape[0], resolved_length(model.config, shape[1])
    try:
        bucket = ShapeBucket(batch_size=rows, sequence_length=length)
        return CompileSpec(
            target=target,
            hf_task=hf_task,
            components=(ComponentSpec(max_sequence_length=length, shape_buckets=(bucket,)),),
            target_options=dict(options),
            trust_remote_code=model.is_remote_code(),
        )
    except ValidationError as error:
        raise SpecError(
            f"{first_problem(error, show_input=True)}.",
            hint="Give batch_size and max_length of at least 1 (-1 is the model's maximum), and plain values.",
        ) from error


def _check_names(target: str, options: Mapping[str, Any]) -> None:
    """Refuse a misspelled argument of ours by its right name; the target's own check lists its options."""
    known = get_target(target).Options.model_fields
    for name in options:
        near = get_close_matches(name, _OWN_NAMES, n=1)
        if name not in known and near:
            raise SpecError(
                f"There is no setting {name!r}.",
                hint=f"Did you mean {near[0]}? The options of {target} are: {', '.join(known) or 'none'}.",
            )


def _check_here(spec: CompileSpec) -> None:
    target = checked_target(spec)
    check_available(target, Precision.FP32)
    here = target.probe()
    # The caller gets a model that answers, so that compiling alone is not enough.
    if not here.can_run:
        raise TargetUnavailableError(
            f"{target.name} compiles here and cannot run here: {here.reason}.", hint=f"Try: {here.hint}."
        )


def _run(
    spec: CompileSpec,
    source: Path,
    out: Path,
    work: Path,
    settings: Settings,
    class_name: str,
    *,
    has_tokenizer: bool,
) -> None:
    digest = folder_digest(list_files(source))
    request = {
        "source_dir": str(source),
        "out_dir": str(out),
        "spec": spec.model_dump(mode="json"),
        "source": {"uri": f"memory://{class_name}", "revision": digest, "digest": digest},
        "threads": settings.threads,
        "needs_tokenizer": has_tokenizer,
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


def _keep(folder: Path, settings: Settings) -> OpenArtifact:
    """Move an artifact to where the local cache has those that came from a store."""
    # Nobody signs what this process made; what it was made of is in its memory.
    kept = settings.home_dir / "artifacts" / open_artifact(folder, require_signature=False).digest
    move_into_place(folder, kept)
    return open_artifact(kept, require_signature=False)
