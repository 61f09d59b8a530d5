"""compile: turn a stored source model into an artifact, in a child process, once for each cache key."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from compileflow._process.failures import smaller_request
from compileflow._process.folders import work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import SCHEMA_VERSION, ArtifactManifest, CalibrationRecord, TargetRecord
from compileflow.catalog import get_target, open_store
from compileflow.contracts import ArtifactStore, Capabilities, FileRecord, Target
from compileflow.contracts.digests import json_digest, list_files
from compileflow.errors import (
    CompileError,
    LoadError,
    MeasurementError,
    ProcessError,
    SourceError,
    SpecError,
    StepOffError,
    TargetUnavailableError,
    first_problem,
)
from compileflow.settings import Settings
from compileflow.source_model.ranking_recipe import ranks_documents, read_ranking_recipe
from compileflow.source_model.sentence_modules import read_recipe
from compileflow.source_model.tasks import task_of_architecture
from compileflow.sources.files import kind_of, read_model_json
from compileflow.spec import CompileSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find, find_or_make, latest, why_missed
from compileflow.steps.calibration import Calibration, load_calibration
from compileflow.steps.plan import targets_of
from compileflow.steps.request import AUTO, NOTE, CompileRequest
from compileflow.steps.source_checks import (
    check_lengths,
    check_model_type,
    check_safe,
    check_source,
    declared_sampling_rate,
    read_config,
)
from compileflow.steps.toolchain_logs import keep_log
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.cases import (
    CLASS_FOLDERS,
    LABELS_UNUSED,
    METRICS_OF_LABELS,
    MULTI_LABEL,
    ONE_LABEL,
    check_labels,
    check_signals,
    class_names,
    example_lines,
    has_label,
    load_examples,
    note_on_count,
    note_on_fields,
    sample_examples,
)
from compileflow.validation.judge import load_user_suite
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
STEP = "compile"
_CHILD = "compileflow.steps.build:build_artifact"
# Seconds of processor time; no toolchain is among them, because some start threads when they are imported.
_IMPORTS = ("torch", "transformers.modeling_utils", _CHILD.partition(":")[0])
_FOLDERS = {"digest": "uri"}
_TWO_PARTS = "ForConditionalGeneration"


def compile_artifact(
    source: FetchedSource,
    request: CompileRequest,
    *,
    store_uri: str,
    settings: Settings,
    enabled: bool = True,
    needs_tokenizer: bool = True,
    on_progress: Callable[[str], None] = logger.info,
) -> CompiledArtifact:
    """Compile a stored source model, or return the cached artifact of the same key.

    Args:
        source: The result of `fetch_source`.
        request: The request. Only the fields that decide the artifact are part of the cache key.
        store_uri: URI of the artifact store.
        settings: Work folder, threads and signing key.
        enabled: False returns the cached artifact, or raises StepOffError.
        needs_tokenizer: False also compiles a text model that has no tokenizer.
        on_progress: Called with one line for each stage.

    Raises:
        SpecError: The request does not fit the target or the model, or the signing key cannot be used.
        SourceError: transformers does not know the model, or a file of it is missing or not safe to load.
        CompileError: The toolchain refused the model, or its process died.
        TargetUnavailableError: The toolchain is missing.
        SignatureError: A signing key is set, but securesystemslib is missing.
        StepOffError: The step is off, and the store has no artifact of this key.
    """
    store = open_store(store_uri, settings)
    attester = Attester.of(store, settings)
    with store.open_folder(source.digest) as folder:
        spec = spec_of(request, folder, card_task=source.hf_task)
        target = checked_target(spec)
        check_modules(spec.hf_task, folder)
        calibration = None
        if target.Options.model_validate(spec.target_options).needs_calibration(spec.precision):
            if spec.hf_task.modality != "text":
                raise SpecError(
                    f"{target.name} calibrates static int8 on text, but {spec.hf_task.value} does not take text.",
                    hint="Choose quantization=dynamic, or another precision.",
                )
            calibration = load_calibration(spec.hf_task, request.calibration)
        key = compile_key(source, list_files(folder), spec, target, calibration)
        if not enabled:
            return _reuse(store, key, attester)
        if request.steps.validate and (path := request.validation.examples_path) is not None:
            check_examples(spec.hf_task, path, request.validation.max_examples, folder, on_progress)
        if request.steps.validate:
            _check_label_gates(request.validation, spec)

        def compute(reason: str) -> CompiledArtifact:
            if cost := earlier_cost(store, key):
                on_progress(cost)
            check_available(target, spec.precision)
            check_source(folder, spec, needs_tokenizer=needs_tokenizer)
            check_model_type(target, spec.hf_task, read_config(folder))
            check_lengths(folder, spec, target, timed_shapes=timed_shapes(request))
            if not spec.trust_remote_code:
                check_safe(folder)
            build_request: dict[str, Any] = {
                "source_dir": str(folder),
                "spec": spec.model_dump(mode="json"),
                "source": {"uri": source.uri, "revision": source.revision, "digest": source.digest},
                "threads": settings.threads,
                "needs_tokenizer": needs_tokenizer,
                "calibration": calibration.to_json() if calibration else None,
            }
            if shapes := timed_shapes(request):
                # Refused before the compile if they are too long. They do not change the artifact.
                build_request["timed_shapes"] = [shape.model_dump() for shape in shapes]
            if request.validation.suite_path is not None and request.steps.validate:
                # The same holds for a suite that does not fit the model.
                suite = load_user_suite(request.validation.suite_path)
                suite.check(spec.hf_task, spec.precision)
                if suite.names_outputs():
                    build_request["suite"] = {"text": suite.text, "origin": suite.origin}
            return _compile(
                attester, build_request, key, reason, request.timeouts.compile_s, settings, on_progress
            )

        value, cached = find_or_make(
            store,
            key,
            CompiledArtifact,
            folders=_FOLDERS,
            attester=attester,
            compute=compute,
            report_line=on_progress,
            reason_to_redo=lambda artifact: attester.lacks_provenance(artifact.digest, key.digest),
        )
    if cached:
        return value.model_copy(update={"cached": True, "why": "every part of its key is unchanged"})
    return value


def timed_shapes(request: CompileRequest) -> tuple[ShapeBucket, ...]:
    """Return the shapes that the validate step of a request times; () for its own choice."""
    return request.validation.latency_shapes if request.steps.validate else ()


def check_examples(
    hf_task: HfTask, path: str, limit: int, source_dir: Path, report_line: Callable[[str], None]
) -> None:
    """Refuse examples that the validate step could not use, before the compile takes minutes; say what it ignores.

    Raises:
        SpecError: The file holds no example, or not in the form of the task; an image or a recording cannot be
            read; or the model lacks a label.
    """
    by_class = hf_task in CLASS_FOLDERS
    try:
        if hf_task.modality == "text":
            examples, _, _ = load_examples(hf_task, path, sys.maxsize)
            lines = example_lines(hf_task, path)
            if note := note_on_fields(hf_task, path):
                report_line(NOTE + note)
        else:
            rate = declared_sampling_rate(source_dir)
            check_signals(path, hf_task.modality, limit, by_class=by_class, sampling_rate=rate)
            names = class_names(path, hf_task.modality) if by_class else []
            examples, lines = [{"label": name} for name in names], []
        config_path = source_dir / "config.json"
        config = read_model_json(config_path, config_path.name) if config_path.is_file() else {}
        labels = _labels_of(config)
        if labels:
            check_labels(hf_task, examples, labels, Path(path).name, lines=lines)
    except MeasurementError as error:
        raise SpecError(error.message, hint=error.hint) from error
    if note := note_on_count(hf_task, path, limit):
        report_line(NOTE + note)
    chooses_one = len(labels) != 1 and config.get("problem_type") != MULTI_LABEL
    if hf_task in ONE_LABEL and not chooses_one and any(map(has_label, examples)):
        report_line(f"{NOTE}Validation does not use the labels of {Path(path).name}: {LABELS_UNUSED}.")


def _check_label_gates(validation: ValidationSettings, spec: CompileSpec) -> None:
    """Refuse the user's gates on labels, before the compile, if no example has a label.

    Raises:
        SpecError: A gate would have nothing to judge.
    """
    if validation.suite_path is None:
        return
    suite = load_user_suite(validation.suite_path)
    gates = suite.gates_for(spec.precision, spec.hf_task)
    names = [gate.entry.gate for gate in gates if gate.entry.metric in METRICS_OF_LABELS]
    if names and not _has_labels(spec.hf_task, validation):
        raise SpecError(
            f"The suite {suite.origin} cannot be used: gate {names[0]!r} needs labels, and no example has one.",
            hint="Give examples with labels by --examples, or leave the gate out.",
        )


def _has_labels(hf_task: HfTask, validation: ValidationSettings) -> bool:
    path = validation.examples_path
    if path is None:
        return False
    if hf_task.modality != "text":
        return bool(class_names(path, hf_task.modality))
    return any(map(has_label, sample_examples(hf_task, path, validation.max_examples)[0]))


def _labels_of(config: Mapping[str, Any]) -> dict[int, str]:
    """Return the labels that config.json names; {} if transformers gives them their default names."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        return {}
    return {int(number): str(name) for number, name in names.items()}


def spec_of(request: CompileRequest, source_dir: Path, *, card_task: HfTask | None = None) -> CompileSpec:
    """Turn a request into a spec. An empty task is filled from the model card, or else from the architecture."""
    return request.spec_for(request.hf_task or card_task or detect_task(source_dir))


def detect_task(source_dir: Path) -> HfTask:
    """Return the task that sentence-transformers' files stand for, or else that of config.json's architectures.

    Raises:
        SourceError: A file is not the JSON that transformers expects.
        SpecError: No architecture has a known head.
    """
    if _pools_tokens(source_dir):
        return HfTask.SENTENCE_SIMILARITY
    config = read_model_json(source_dir / "config.json", "config.json")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise SourceError(
            f"Expected a list of class names as architectures in config.json, got {architectures!r:.80}.",
            hint="Save the model again with save_pretrained.",
        )
    for name in architectures:
        task = task_of_architecture(name)
        if task is HfTask.FEATURE_EXTRACTION and _takes_images(source_dir):
            has_tokenizer = (source_dir / "tokenizer_config.json").exists()
            return HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION if has_tokenizer else HfTask.IMAGE_FEATURE_EXTRACTION
        if task is HfTask.TEXT_CLASSIFICATION and ranks_documents(source_dir):
            return HfTask.TEXT_RANKING
        if task is not None:
            return task
    generating = next((name for name in architectures if name.endswith(_TWO_PARTS)), None)
    if generating:
        raise SpecError(
            f"{generating} generates text from an encoder's answer, which compileflow does not compile.",
            hint="Give a decoder, such as LlamaForCausalLM. For hidden states, give the task feature-extraction.",
        )
    raise SpecError(
        f"The architecture {', '.join(architectures) or '(none in config.json)'} does not determine the task.",
        hint=f"Give the task: one of {', '.join(task.value for task in HfTask)}."
        + (
            " The model brings its own Python code: if you trust it, set trust_remote_code."
            if "auto_map" in config
            else ""
        ),
    )


def _takes_images(source_dir: Path) -> bool:
    """Say whether the folder has an image processor: a class named ViTModel says no more than BertModel does."""
    path = source_dir / "preprocessor_config.json"
    return path.exists() and bool({"image_processor_type", "image_mean"} & set(read_model_json(path, path.name)))


def _pools_tokens(source_dir: Path) -> bool:
    """Say whether sentence-transformers saved the folder as a model that pools its tokens into one embedding.

    Its `architectures` may still name the head that the model was trained from. Cross-encoders and sparse encoders
    also have modules.json.
    """
    path, settings_path = (source_dir / name for name in ("modules.json", "config_sentence_transformers.json"))
    if not path.exists():
        return False
    settings = read_model_json(settings_path, settings_path.name) if settings_path.exists() else {}
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        return False
    modules = read_model_json(path, path.name)
    return any(isinstance(module, dict) and str(module.get("type")).endswith("Pooling") for module in modules)


def check_modules(hf_task: HfTask, source_dir: Path) -> None:
    """Check that what comes after the graph can be served, before anything is compiled.

    Raises:
        SpecError: The modules of sentence-transformers are of another kind, or their weights are missing.
    """
    try:
        if hf_task is HfTask.SENTENCE_SIMILARITY:
            read_recipe(source_dir)
        if hf_task is HfTask.TEXT_RANKING:
            read_ranking_recipe(source_dir)
    except LoadError as error:
        raise SpecError(error.message, hint=error.hint) from error


def checked_target(spec: CompileSpec) -> Target:
    """Return the target of a spec, after checking the spec against the target's capabilities.

    Raises:
        SpecError: The target is unknown, or it does not support the task, the precision or an option.
    """
    if spec.target == AUTO:
        raise SpecError(
            f"The compile step cannot compile for {AUTO!r}: it stands for a choice among targets.",
            hint="Name a target, or run the flow, which chooses one.",
        )
    target = get_target(spec.target)
    capabilities = target.capabilities
    if spec.hf_task not in capabilities.hf_tasks:
        raise SpecError(
            f"{target.name} does not support {spec.hf_task.value}.", hint=_other_choice(spec.hf_task, capabilities)
        )
    precisions = capabilities.precisions_for(spec.hf_task)
    if spec.precision not in precisions:
        subject = f" for {spec.hf_task.value}" if spec.precision in capabilities.all_precisions else ""
        raise SpecError(
            f"{target.name} does not support {spec.precision.value}{subject}.",
            hint=f"Choose one of: {', '.join(precisions)}.",
        )
    try:
        chosen_options = target.Options.model_validate(spec.target_options)
    except ValidationError as error:
        options = ", ".join(target.Options.model_fields) or "none"
        raise SpecError(
            f"{target.name} option {first_problem(error, show_input=True)}.",
            hint=f"The options of {target.name} are: {options}.",
        ) from error
    chosen_options.check_precision(spec.precision)
    chosen_options.check_task(spec.hf_task, spec.precision)
    return target


def _other_choice(hf_task: HfTask, capabilities: Capabilities) -> str:
    """Return what to choose instead of a task that a target lacks: another target for text generation."""
    if hf_task.generates:
        return f"Choose one of the targets that do: {', '.join(targets_of(hf_task))}."
    return f"Choose one of: {', '.join(task.value for task in capabilities.hf_tasks)}."


def check_available(target: Target, precision: Precision) -> None:
    """Check that this machine can compile for a target at a precision.

    Raises:
        TargetUnavailableError: The toolchain is missing, or this machine lacks the precision.
    """
    availability = target.probe()
    if not availability.can_compile:
        raise TargetUnavailableError(
            f"{target.name} cannot compile here: {availability.reason}.", hint=f"Run: {availability.hint}"
        )
    if precision in availability.lacking:
        choices = [choice.value for choice in target.capabilities.precisions if choice not in availability.lacking]
        raise TargetUnavailableError(
            f"{target.name} cannot compile {precision.value} here: {availability.lacking[precision]}.",
            hint=f"Choose one of {', '.join(choices)}, or compile on another machine.",
        )


def compile_key(
    source: FetchedSource,
    files: tuple[FileRecord, ...],
    spec: CompileSpec,
    target: Target,
    calibration: Calibration | None = None,
) -> CacheKey:
    """Return the cache key of a compile: source files, spec, target, toolchain, CPU features, calibration.

    The attention has no part of its own: it follows from the model's class, transformers and the target.
    """
    parts = {f"{kind_of(record.path) or 'file'} {record.path}": record.sha256 for record in files}
    parts |= _parts(spec, TargetRecord.of(target), SCHEMA_VERSION, calibration.record if calibration else None)
    return CacheKey(STEP, f"{source.uri} for {target.name}", parts)


def recorded_parts(manifest: ArtifactManifest) -> dict[str, str]:
    """Return the parts of an artifact's cache key that its manifest records.

    These are all parts, except that the manifest records the source model as a whole and not file by file.
    """
    parts = _parts(manifest.spec, manifest.target, manifest.schema_version, manifest.calibration)
    return parts | {"source model": manifest.source.digest}


def _parts(
    spec: CompileSpec, target: TargetRecord, schema_version: int, calibration: CalibrationRecord | None
) -> dict[str, str]:
    parts = {f"spec.{name}": _short(value) for name, value in flat_spec(spec).items()}
    parts |= {f"toolchain.{name}": version for name, version in target.toolchain.items()}
    parts["target version"] = str(target.version)
    parts["manifest schema"] = str(schema_version)
    if target.cpu_features:
        parts["cpu features"] = " ".join(target.cpu_features)
    if calibration is not None:
        parts["calibration examples"] = calibration.digest
        parts["calibration examples at most"] = str(calibration.examples)
    return parts


def _died(error: ProcessError, spec: CompileSpec, *, threads: int, timeout_s: float) -> CompileError:
    """Return the error for a toolchain whose process died, with what to change in the request."""
    lengths = [component.max_sequence_length or component.longest_bucket for component in spec.components]
    hint = smaller_request(
        error,
        buckets=[bucket for component in spec.components for bucket in component.shape_buckets],
        longest=max((length for length in lengths if length), default=None),
        any_shape=get_target(spec.target).capabilities.dynamic_axes,
        threads=threads,
        limit=f"compile_s, now {timeout_s:g}",
    )
    return CompileError(
        f"The toolchain of {spec.target} died: {error.message}", hint=hint, log_path=error.log_path
    )


def _compile(
    attester: Attester,
    build_request: Mapping[str, Any],
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
            child = run_in_child(
                _CHILD,
                {**build_request, "out_dir": str(out_dir)},
                work_dir=work,
                log_path=settings.log_path(f"{STEP}-{key.digest[:12]}"),
                timeout_s=timeout_s,
                threads=settings.threads,
                imports=_IMPORTS,
                on_progress=on_progress,
            )
        except ProcessError as error:
            spec = CompileSpec.model_validate(build_request["spec"])
            raise _died(error, spec, threads=settings.threads, timeout_s=timeout_s) from error
        for warning in child.value.get("warnings", ()):
            logger.warning("%s", warning)
        on_progress("storing the artifact")
        stored_folder = attester.store.put_folder(out_dir)
        attester.compiled(out_dir, stored_folder.digest, started=started, request_digest=key.digest)
        keep_log(attester.store, stored_folder.digest, child.log)
    return CompiledArtifact(
        uri=stored_folder.uri,
        digest=stored_folder.digest,
        cache_key=key.digest,
        size_bytes=stored_folder.size_bytes,
        compile_duration_s=round(child.duration_s, 3),
        peak_rss_bytes=child.peak_rss_bytes,
        cached=False,
        why=reason,
    )


def flat_spec(spec: CompileSpec) -> dict[str, JsonValue]:
    """Return every field of a spec under its own name, so that a cache miss can name the fields that changed."""
    flat: dict[str, JsonValue] = {}
    for name, item in spec.model_dump(mode="json").items():
        if name == "components":
            for component in item:
                flat |= {f"{component['name']}.{field}": content for field, content in component.items()}
        elif isinstance(item, dict):
            flat |= {f"{name}.{field}": content for field, content in item.items()}
        else:
            flat[name] = item
    return flat


def earlier_cost(store: ArtifactStore, key: CacheKey) -> str:
    """Return a line with the time and memory of the last compile of the same model and target; "" without one."""
    last = latest(store, key.step, key.subject)
    record = store.get_record(key.step, str(last["key"])) if last else None
    try:
        artifact = CompiledArtifact.model_validate(record["value"] if record else None)
        duration_s, peak_gb = artifact.compile_duration_s, artifact.peak_rss_bytes / 1e9
    except (KeyError, ValidationError, OverflowError):
        return ""
    return f"the last compile of {key.subject} took {duration_s:.0f} s and {peak_gb:.1f} GB of memory"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 64 else json_digest(value)


def _reuse(store: ArtifactStore, key: CacheKey, attester: Attester) -> CompiledArtifact:
    value = find(store, key, CompiledArtifact, folders=_FOLDERS, attester=attester)
    if value is None:
        raise StepOffError(
            f"The compile step is off, and the store {store.uri} has no artifact of {key.subject} with this key: "
            f"{why_missed(store, key)}.",
            hint="Switch the compile step on.",
        )
    if reason := attester.lacks_provenance(value.digest, key.digest):
        raise StepOffError(
            f"The compile step is off, and the artifact {value.digest[:12]} cannot be used: {reason}.",
            hint="Switch the compile step on.",
        )
    return value.model_copy(update={"cached": True, "why": "the compile step is off"})
