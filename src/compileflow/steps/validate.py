"""validate: compare a stored artifact with its source model, judge, and store the report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compileflow.catalog import get_target, open_store
from compileflow.contracts import Arrays, ArtifactStore
from compileflow.errors import MeasurementError, StepOffError
from compileflow.isolation import report_progress, run_isolated
from compileflow.manifest import read_manifest
from compileflow.serving.artifacts import open_artifact
from compileflow.serving.model import CompiledModel
from compileflow.settings import Settings
from compileflow.source_graph import SourceGraph, load_source_graph
from compileflow.steps.cache import CacheKey, find_or_make
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation import measure as measuring
from compileflow.validation.cases import Case, CaseBuilder, agreement_cases, load_examples, shape_cases
from compileflow.validation.decisions import Decisions
from compileflow.validation.judge import judge
from compileflow.validation.report import (
    Report,
    ReportSubject,
    environment,
    worst_rows,
    write_report,
)
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.suite import suite_digest
from compileflow.workspace import work_folder

logger = logging.getLogger(__name__)
STEP = "validate"
# Raised when what is measured, or how, changes.
MEASUREMENT_VERSION = 1
_CHILD = "compileflow.steps.validate:validate_in_child"
_LIBRARIES = ("torch", "transformers", "numpy", "great_expectations")
# Where an engine's graph is dynamic, lengths at which kernels are wont to change.
_DYNAMIC_EDGES = (8, 16, 32, 64, 128, 256)


def validate_artifact(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validation: ValidationSettings,
    *,
    store_uri: str,
    settings: Settings,
    timeout_s: float,
    enabled: bool = True,
    on_progress: Callable[[str], None] = logger.info,
) -> ValidatedArtifact:
    """Measure and judge an artifact, or return the verdict that the same content got before.

    Only pass and warn are remembered: a refused artifact is measured anew, since its machine may have been
    at fault.

    Raises:
        MeasurementError: the comparison could not be made.
        ProcessError: the compiled model took its process down.
        StepOffError: the step is off and the store has no report on this artifact.
    """
    store = open_store(store_uri)
    if not enabled:
        return _reuse(store, artifact)
    with store.open_folder(source.digest) as source_dir, store.open_folder(artifact.digest) as artifact_dir:
        manifest = read_manifest(artifact_dir)
        key = CacheKey(
            STEP,
            f"{source.uri} for {manifest.target.name}",
            _key_parts(source, artifact, validation, get_target(manifest.target.name).toolchain()),
        )

        def make(reason: str) -> ValidatedArtifact:
            with work_folder(settings.work_dir, label=STEP) as work:
                (work / "report").mkdir()
                answer = run_isolated(
                    _CHILD,
                    {
                        "source_dir": str(source_dir),
                        "artifact_dir": str(artifact_dir),
                        "artifact_uri": artifact.uri,
                        "report_dir": str(work / "report"),
                        "validation": validation.model_dump(mode="json"),
                        "threads": settings.threads,
                    },
                    work_dir=work,
                    log_path=settings.home_dir / "logs" / f"{STEP}-{key.digest[:12]}.log",
                    timeout_s=timeout_s,
                    threads=settings.threads,
                    on_progress=on_progress,
                ).value
                stored = store.put_folder(work / "report")
            value = ValidatedArtifact(
                artifact_digest=artifact.digest,
                report_uri=stored.uri,
                report_digest=stored.digest,
                cached=False,
                why=reason,
                **answer,
            )
            store.put_record("report-of", artifact.digest, value.model_dump(mode="json"))
            return value

        value, cached = find_or_make(
            store,
            key,
            ValidatedArtifact,
            digest_field="report_digest",
            make=make,
            say=on_progress,
            keep=lambda made: made.outcome in ("pass", "warn"),
        )
    if cached:
        return value.model_copy(update={"cached": True, "why": "every part of its key is unchanged"})
    return value


def report_on(store: ArtifactStore, artifact_digest: str) -> ValidatedArtifact | None:
    """Return the last verdict on an artifact, or None when the store has no report on it."""
    record = store.get_record("report-of", artifact_digest)
    if record is None:
        return None
    value = ValidatedArtifact.model_validate(record)
    return value if store.exists(value.report_digest) else None


def validate_in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, judge and write the report. Runs in a fresh process."""
    import torch

    threads = int(request["threads"])
    torch.set_num_threads(threads)
    validation = ValidationSettings.model_validate(request["validation"])
    report_progress("loading the source model and the compiled model")
    artifact = open_artifact(request["artifact_dir"])
    spec = artifact.manifest.spec
    graph = load_source_graph(Path(request["source_dir"]), spec.hf_task, trust_remote_code=spec.trust_remote_code)
    reports = []
    for component in spec.components:
        compiled = CompiledModel.from_artifact(artifact, component=component.name, threads=threads)
        reports.append(
            _validate_component(
                graph, compiled, Path(request["source_dir"]), validation, threads, request["artifact_uri"]
            )
        )
        compiled.close()
    # One component so far; issue of several: the worst verdict speaks for the artifact.
    report = max(reports, key=lambda r: ("pass", "warn", "fail", "error").index(r.verdict.outcome))
    report_progress("writing the report")
    write_report(report, Path(request["report_dir"]))
    return {
        "outcome": report.verdict.outcome,
        "reason": report.verdict.reason,
        "figures": report.figures,
    }


def _validate_component(
    graph: SourceGraph,
    compiled: CompiledModel,
    source_dir: Path,
    validation: ValidationSettings,
    threads: int,
    artifact_uri: str,
) -> Report:
    from transformers import AutoTokenizer

    manifest = compiled.manifest
    spec, record = manifest.spec, manifest.components[compiled.component]
    tokenizer = AutoTokenizer.from_pretrained(
        source_dir, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=tuple(each.name for each in graph.inputs),
        max_length=record.max_sequence_length,
        edges=tuple(sorted({b.sequence_length for b in record.shape_buckets})) or _DYNAMIC_EDGES,
        pad_token_id=graph.pad_token_id,
    )
    examples, origin, _ = load_examples(spec.hf_task, validation.examples_path, validation.max_examples)
    texts = [example.get("text") or example["context"] for example in examples]
    natural = agreement_cases(builder, examples, spec.hf_task)
    cases = shape_cases(builder, texts) + natural
    decisions = Decisions(
        spec.hf_task,
        labels={int(key): str(value) for key, value in compiled.config.id2label.items()},
        multi_label=compiled.config.problem_type == "multi_label_classification",
    )
    found = measuring.measure(
        graph.run,
        compiled.run,
        outputs=graph.outputs,
        decisions=decisions,
        cases=cases,
        progress=report_progress,
    )
    if "misplaced_labels" in found.scalars:
        before, after = graph.model.config.id2label, compiled.config.id2label
        # Right logits under a wrong name are as wrong as misplaced ones.
        found.scalars["misplaced_labels"] += sum(before.get(n) != after.get(n) for n in before | after)
    report_progress("probing the attention mask and the token types")
    measuring.measure_mask(found, graph.run, compiled.run, builder, texts[:4])
    measuring.measure_token_types(found, graph.run, compiled.run, builder, texts)
    report_progress("measuring the source model's own noise")
    measuring.measure_noise(
        found, _noise_variants(graph, threads), graph.run, natural[:: max(1, len(natural) // 3)][:3]
    )
    report_progress("timing both models in turn")
    measuring.measure_latency(found, graph.run, compiled.run, builder, texts, pairs=validation.latency_pairs)
    overrides = dict(get_target(spec.target).default_gates.get(spec.precision, {}))
    if validation.max_latency_ratio is not None:
        overrides["latency_ratio"] = validation.max_latency_ratio
    report_progress("judging with Great Expectations")
    verdict = judge(found, precision=spec.precision, hf_task=spec.hf_task, overrides=overrides)
    return Report(
        subject=ReportSubject(
            source_uri=manifest.source.uri,
            source_revision=manifest.source.revision,
            source_digest=manifest.source.digest,
            architecture=manifest.source.architecture,
            artifact_uri=artifact_uri,
            artifact_digest=compiled.artifact.digest,
            target=spec.target,
            hf_task=spec.hf_task.value,
            precision=spec.precision.value,
            component=compiled.component,
            toolchain=manifest.target.toolchain,
        ),
        verdict=verdict,
        figures=found.figures(),
        noise=found.noise,
        latencies=tuple(found.latencies),
        worst=worst_rows(found.comparisons),
        families=dict(Counter(row["family"] for row in found.comparisons)),
        examples_origin=origin,
        examples_count=len(examples),
        suite_digest=suite_digest(),
        environment=environment(threads),
    )


def _noise_variants(graph: SourceGraph, threads: int) -> dict[str, Callable[[Case], Arrays]]:
    """Return runs of the source model that should all give the same answer."""
    import copy

    import numpy as np
    import torch

    exact = copy.deepcopy(graph.model).double()

    def in_float64(case: Case) -> Arrays:
        with torch.inference_mode():
            answer = exact(**{name: torch.as_tensor(value) for name, value in case.inputs.items()})
        return {record.name: answer[record.name].numpy() for record in graph.outputs}

    def row_by_row(case: Case) -> Arrays:
        rows = [
            graph.run({name: value[row : row + 1] for name, value in case.inputs.items()})
            for row in range(len(case.texts))
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def with_one_thread(case: Case) -> Arrays:
        torch.set_num_threads(1)
        try:
            return graph.run(case.inputs)
        finally:
            torch.set_num_threads(threads)

    return {"float64": in_float64, "row by row": row_by_row, "one thread": with_one_thread}


def _key_parts(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validation: ValidationSettings,
    toolchain: Mapping[str, str],
) -> dict[str, str]:
    parts = {
        "artifact": artifact.digest,
        "source model": source.digest,
        "suite": suite_digest(),
        "measurement version": str(MEASUREMENT_VERSION),
    }
    parts |= {f"validation.{name}": str(value) for name, value in validation.model_dump(mode="json").items()}
    if validation.examples_path is not None:
        try:
            parts["examples"] = load_examples_digest(validation.examples_path)
        except OSError as error:
            raise MeasurementError(
                f"The examples in {validation.examples_path} cannot be read: {error.strerror}.",
                hint="Give a file that the worker can read.",
            ) from error
    versions = dict(toolchain)
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError as error:
            raise MeasurementError(
                f"{name} is not installed, and validation needs it.",
                hint="Run: pip install 'compileflow[validation]'",
            ) from error
    return parts | {f"toolchain.{name}": value for name, value in versions.items()}


def load_examples_digest(path: str) -> str:
    """Return the SHA-256 of the user's examples."""
    from compileflow.digests import file_digest

    return file_digest(Path(path).expanduser())


def _reuse(store: ArtifactStore, artifact: CompiledArtifact) -> ValidatedArtifact:
    value = report_on(store, artifact.digest)
    if value is None:
        raise StepOffError(
            f"The validate step is off, and the store {store.uri} has no report on {artifact.digest[:12]}...",
            hint="Switch the validate step on.",
        )
    return value.model_copy(update={"cached": True, "why": "the validate step is off"})
