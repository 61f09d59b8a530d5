"""compile: make an artifact of a stored source model, in a fresh process, once for each content key."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compileflow._process.child import run_isolated
from compileflow._process.folders import work_folder
from compileflow.artifact.manifest import SCHEMA_VERSION
from compileflow.catalog import get_target, open_store
from compileflow.contracts import ArtifactStore, FileRecord, Target
from compileflow.contracts.digests import json_digest, list_files
from compileflow.errors import (
    CompileError,
    ProcessError,
    SpecError,
    StepOffError,
    TargetUnavailableError,
    first_problem,
)
from compileflow.settings import Settings
from compileflow.source_model.tasks import task_of_architecture
from compileflow.sources.files import kind_of
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find, find_or_make, why_missed
from compileflow.steps.calibration import Calibration, load_calibration
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource

logger = logging.getLogger(__name__)
STEP = "compile"
_CHILD = "compileflow.steps.build:build_artifact"


def compile_artifact(
    source: FetchedSource,
    request: CompileRequest,
    *,
    store_uri: str,
    settings: Settings,
    enabled: bool = True,
    on_progress: Callable[[str], None] = logger.info,
) -> CompiledArtifact:
    """Compile a stored source model, or return the artifact that the same content gave before.

    Args:
        source: From `fetch_source`.
        request: What is asked; only what decides the artifact is part of its key.
        store_uri: The artifact store.
        settings: Work folder and threads.
        enabled: False returns the artifact of this key, or refuses.
        on_progress: Called with one line a stage.

    Raises:
        SpecError: the request does not fit the target or the model, or the signing key cannot be used.
        CompileError, TargetUnavailableError: the toolchain refused or died, or is missing.
        SignatureError: a signing key is set, and securesystemslib is missing.
        StepOffError: the step is off and the store has no such artifact.
    """
    store = open_store(store_uri, settings)
    attester = Attester.of(store, settings)
    with store.open_folder(source.digest) as folder:
        spec = spec_of(request, folder, card_task=source.hf_task)
        target = checked_target(spec)
        calibration = None
        if target.Options.model_validate(spec.target_options).needs_calibration(spec.precision):
            if spec.hf_task.modality != "text":
                raise SpecError(
                    f"{target.name} calibrates this int8 on natural text, and {spec.hf_task.value} takes none.",
                    hint="Choose quantization=dynamic, or another precision.",
                )
            calibration = load_calibration(spec.hf_task, request.calibration)
        key = compile_key(source, list_files(folder), spec, target, calibration)
        if not enabled:
            return _reuse(store, key)

        def make(reason: str) -> CompiledArtifact:
            check_available(target, spec.precision)
            child = {
                "source_dir": str(folder),
                "spec": spec.model_dump(mode="json"),
                "source": {"uri": source.uri, "revision": source.revision, "digest": source.digest},
                "threads": settings.threads,
                "calibration": calibration.to_json() if calibration else None,
            }
            return _compile(attester, child, key, reason, request.timeouts.compile_s, settings, on_progress)

        value, cached = find_or_make(
            store,
            key,
            CompiledArtifact,
            digest_fields=("digest",),
            make=make,
            say=on_progress,
            lacks=lambda found: attester.lacks_provenance(found.digest),
        )
    if cached:
        return value.model_copy(update={"cached": True, "why": "every part of its key is unchanged"})
    return value


def spec_of(request: CompileRequest, source_dir: Path, *, card_task: HfTask | None = None) -> CompileSpec:
    """Turn a request into a spec; an empty task is the model card's, else the one of the model's architecture."""
    try:
        return CompileSpec(
            target=request.target,
            hf_task=request.hf_task or card_task or detect_task(source_dir),
            precision=request.precision,
            components=request.components
            or (
                ComponentSpec(
                    max_sequence_length=request.max_sequence_length, shape_buckets=request.shape_buckets
                ),
            ),
            target_options=request.target_options,
            trust_remote_code=request.trust_remote_code,
        )
    except ValidationError as error:
        raise SpecError(f"{first_problem(error)}.", hint="Correct the request.") from error


def detect_task(source_dir: Path) -> HfTask:
    """Read the task off config.json's architectures.

    Raises:
        SpecError: the class has no head that is known.
    """
    architectures = json.loads((source_dir / "config.json").read_text("utf-8")).get("architectures") or []
    for name in architectures:
        task = task_of_architecture(name)
        if task is not None:
            return task
    raise SpecError(
        f"The task cannot be read off the architecture {', '.join(architectures) or '(none given)'}.",
        hint=f"Give it: one of {', '.join(task.value for task in HfTask)}.",
    )


def checked_target(spec: CompileSpec) -> Target:
    """Return the spec's target, after checking that it can do what the spec asks.

    Raises:
        SpecError: unknown target, or a task, precision or option that it does not have.
    """
    if spec.target == AUTO:
        raise SpecError(f"{AUTO!r} is no target of its own.", hint="Run the flow, which chooses one.")
    target = get_target(spec.target)
    can = target.capabilities
    if spec.hf_task not in can.hf_tasks:
        choices = ", ".join(task.value for task in can.hf_tasks)
        raise SpecError(f"{target.name} has no {spec.hf_task.value}.", hint=f"Choose one of: {choices}.")
    if spec.precision not in can.precisions:
        choices = ", ".join(precision.value for precision in can.precisions)
        raise SpecError(f"{target.name} has no {spec.precision.value}.", hint=f"Choose one of: {choices}.")
    try:
        target.Options.model_validate(spec.target_options)
    except ValidationError as error:
        options = ", ".join(target.Options.model_fields) or "none"
        raise SpecError(
            f"{target.name} option {first_problem(error)}.", hint=f"Its options are: {options}."
        ) from error
    return target


def check_available(target: Target, precision: Precision) -> None:
    """Refuse what cannot be compiled here.

    Raises:
        TargetUnavailableError: the toolchain is missing, or the CPU has not the precision and the target runs
            on the CPU that it compiles on.
    """
    here = target.probe()
    if not here.can_compile:
        raise TargetUnavailableError(
            f"{target.name} cannot compile here: {here.reason}.", hint=f"Run: {here.hint}"
        )
    if precision in here.lacking:
        offered = [each.value for each in target.capabilities.precisions if each not in here.lacking]
        raise TargetUnavailableError(
            f"{target.name} cannot compile {precision.value} here: {here.lacking[precision]}.",
            hint=f"Choose one of {', '.join(offered)}, or compile on another machine.",
        )


def compile_key(
    source: FetchedSource,
    files: tuple[FileRecord, ...],
    spec: CompileSpec,
    target: Target,
    calibration: Calibration | None = None,
) -> CacheKey:
    """Return the complete content key of a compile: files, spec, target, toolchain, CPU, calibration."""
    parts = {f"{kind_of(record.path) or 'file'} {record.path}": record.sha256 for record in files}
    parts |= {f"spec.{name}": value for name, value in _flat(spec.model_dump(mode="json")).items()}
    parts |= {f"toolchain.{name}": version for name, version in target.toolchain().items()}
    parts["target version"] = str(target.version)
    parts["manifest schema"] = str(SCHEMA_VERSION)
    if target.cpu_features():
        parts["cpu features"] = " ".join(target.cpu_features())
    if calibration is not None:
        parts["calibration examples"] = calibration.record.digest
        parts["calibration examples at most"] = str(calibration.record.examples)
    return CacheKey(STEP, f"{source.uri} for {target.name}", parts)


def _compile(
    attester: Attester,
    child: Mapping[str, Any],
    key: CacheKey,
    reason: str,
    timeout_s: float,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> CompiledArtifact:
    started = datetime.now(UTC)
    with work_folder(settings.work_dir, label=STEP) as work:
        out_dir = work / "artifact"
        out_dir.mkdir()
        try:
            done = run_isolated(
                _CHILD,
                {**child, "out_dir": str(out_dir)},
                work_dir=work,
                log_path=settings.log_path(f"{STEP}-{key.digest[:12]}"),
                timeout_s=timeout_s,
                threads=settings.threads,
                on_progress=on_progress,
            )
        except ProcessError as error:
            name = child["spec"]["target"]
            raise CompileError(
                f"The toolchain of {name} died: {error.message}", hint=error.hint, log_path=error.log_path
            ) from error
        on_progress("storing the artifact")
        stored = attester.store.put_folder(out_dir)
        attester.compiled(out_dir, stored.digest, started=started)
    return CompiledArtifact(
        uri=stored.uri,
        digest=stored.digest,
        cache_key=key.digest,
        size_bytes=stored.size_bytes,
        compile_duration_s=round(done.duration_s, 3),
        peak_rss_bytes=done.peak_rss_bytes,
        cached=False,
        why=reason,
    )


def _flat(value: Mapping[str, Any]) -> dict[str, str]:
    """Name every field of a spec, so that a changed one can be named; a lone component's without its index."""
    flat: dict[str, str] = {}
    for name, item in value.items():
        if name == "components":
            for component in item:
                for field, inner in component.items():
                    flat[f"{component['name']}.{field}"] = _short(inner)
        elif isinstance(item, dict):
            flat |= {f"{name}.{inner}": _short(content) for inner, content in item.items()}
        else:
            flat[name] = _short(item)
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 64 else json_digest(value)


def _reuse(store: ArtifactStore, key: CacheKey) -> CompiledArtifact:
    value = find(store, key, CompiledArtifact, digest_fields=("digest",))
    if value is None:
        raise StepOffError(
            f"The compile step is off, and the store {store.uri} has no artifact of {key.subject} with this key: "
            f"{why_missed(store, key)}.",
            hint="Switch the compile step on.",
        )
    return value.model_copy(update={"cached": True, "why": "the compile step is off"})
