"""Prove an artifact: run it beside its source model, measure, judge, write the report.

This is the validate step's part that runs in a fresh process, with both models in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compileflow._process.child import report_progress
from compileflow._process.state import resident_bytes
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target
from compileflow.contracts import OUTCOMES, Arrays, ComponentRecord
from compileflow.serving.component import LoadedComponent
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, load_source_model
from compileflow.source_model.processor import LONGEST_S, load_processor, longest_signal
from compileflow.spec import CompileSpec
from compileflow.validation import measure as measuring
from compileflow.validation.cases import Case
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.evidence import gather_evidence, timed_shapes
from compileflow.validation.judge import judge
from compileflow.validation.registered_tests import (
    RegisteredTests,
    answers_to,
    read_registered_tests,
    write_registered_tests,
)
from compileflow.validation.report import (
    TEST_FILES,
    Report,
    ReportSubject,
    environment,
    worst_rows,
    write_report,
)
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.judge.suite import suite_digest


def prove_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, judge and write the report. Runs in a fresh process.

    Args:
        request: See `steps.validate`. With a "tests_dir", the compiled pipeline answers the tests registered with
            the source version; its answers are compared with the registered ones and kept with the report.
    """
    import torch

    threads = int(request["threads"])
    torch.set_num_threads(threads)
    validation = ValidationSettings.model_validate(request["validation"])
    report_progress("loading the source model and the compiled model")
    # The verdict that a signature would be on is what comes of this.
    artifact = open_artifact(request["artifact_dir"], require_signature=False)
    spec = artifact.manifest.spec
    # Before the source model comes into memory, so that what memory they add is their own.
    loaded = {each.name: _load(artifact, each.name, validation, threads) for each in spec.components}
    graph = load_source_model(Path(request["source_dir"]), spec.hf_task, trust_remote_code=spec.trust_remote_code)
    tests = read_registered_tests(Path(request["tests_dir"])) if request.get("tests_dir") else None
    registered: dict[str, float] = {}
    if tests is not None:
        report_progress("answering the source version's own test inputs")
        predictions = _predictions(tests, request["artifact_dir"], spec, threads)
        write_registered_tests(tests, predictions, Path(request["report_dir"]) / TEST_FILES)
        if tests.predictions is not None:
            registered["registered_disagreement"] = tests.disagreement(predictions)
    reports = []
    for compiled, serving_memory_bytes in loaded.values():
        report = _prove_component(
            graph,
            compiled,
            Path(request["source_dir"]),
            validation,
            threads,
            request["artifact_uri"],
            tests=tests,
            known=registered,
        )
        figures = report.figures | {"serving_memory_bytes": float(serving_memory_bytes)}
        reports.append(report.model_copy(update={"figures": figures}))
        compiled.close()
    # The worst component's verdict is the artifact's.
    report = max(reports, key=lambda r: OUTCOMES.index(r.verdict.outcome))
    report_progress("writing the report")
    write_report(report, Path(request["report_dir"]))
    return {
        "outcome": report.verdict.outcome,
        "reason": report.verdict.reason,
        "figures": report.figures,
    }


def _predictions(tests: RegisteredTests, artifact_dir: str, spec: CompileSpec, threads: int) -> list[Any]:
    """Answer the registered tests with the first component that the spec names."""
    pipeline = CompiledPipeline.from_pretrained(
        artifact_dir, component=spec.components[0].name, threads=threads, require_signature=False
    )
    return answers_to(tests, pipeline)


def _load(
    artifact: OpenArtifact, component: str, validation: ValidationSettings, threads: int
) -> tuple[LoadedComponent, int]:
    """Load a component, call it once at each shape that is timed, and return it with the memory that this took."""
    record = artifact.component(component)
    before = resident_bytes()
    vocab_size = getattr(_config(artifact), "vocab_size", None) or 0
    compiled = LoadedComponent.load(artifact, component=component, threads=threads)
    for rows, length in _timed_shapes(artifact, record, validation):
        # One that raises is left to the gates.
        measuring.candidate_answer(
            compiled.run, example_inputs(record.inputs, rows, length, vocab_size, record.pad_token_id)
        )
    return compiled, max(0, resident_bytes() - before)


def _config(artifact: OpenArtifact) -> Any:
    return load_config(artifact.folder, trust_remote_code=artifact.manifest.spec.trust_remote_code)


def _timed_shapes(
    artifact: OpenArtifact, record: ComponentRecord, validation: ValidationSettings
) -> tuple[tuple[int, int], ...]:
    spec = artifact.manifest.spec
    if spec.hf_task.modality != "audio":
        return timed_shapes(spec.hf_task, record, validation, second=1)
    processor = load_processor(artifact.folder, "audio", trust_remote_code=spec.trust_remote_code)
    return timed_shapes(spec.hf_task, record, validation, second=max(1, longest_signal(processor) // LONGEST_S))


def _prove_component(
    graph: SourceModel,
    compiled: LoadedComponent,
    source_dir: Path,
    validation: ValidationSettings,
    threads: int,
    artifact_uri: str,
    *,
    tests: RegisteredTests | None,
    known: Mapping[str, float],
) -> Report:
    manifest, record = compiled.artifact.manifest, compiled.record
    spec, config = manifest.spec, _config(compiled.artifact)
    evidence = gather_evidence(source_dir, spec, record, validation, tests)
    labels = {int(key): str(value) for key, value in config.id2label.items()}
    decisions = Decisions(
        spec.hf_task.graph_task,
        labels=dict(evidence.tokens) or labels,
        multi_label=config.problem_type == "multi_label_classification",
    )
    found = measuring.measure(
        graph.run,
        compiled.run,
        outputs=graph.outputs,
        decisions=decisions,
        cases=evidence.generated + evidence.natural,
        progress=report_progress,
    )
    found.scalars |= known
    if "misplaced_labels" in found.scalars:
        before, after = graph.model.config.id2label, config.id2label
        # Right logits under a wrong name are as wrong as misplaced ones.
        found.scalars["misplaced_labels"] += sum(before.get(n) != after.get(n) for n in before | after)
    report_progress("probing what must not change the answers, and what must")
    for probe in evidence.probes:
        probe(found, graph.run, compiled.run)
    report_progress("measuring the source model's own noise")
    few = evidence.natural[:: max(1, len(evidence.natural) // 3)][:3]
    measuring.measure_noise(found, _noise_variants(graph, threads), graph.run, few)
    report_progress("timing both models in turn")
    measuring.measure_latency(
        found,
        graph.run,
        compiled.run,
        evidence.timed,
        shapes=_timed_shapes(compiled.artifact, record, validation),
        pairs=validation.latency_pairs,
    )
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
        examples_origin=evidence.origin,
        examples_count=evidence.examples_count,
        suite_digest=suite_digest(),
        environment=environment(threads),
        flips=decisions.flips(evidence.decode),
        flips_count=decisions.flips_count(),
    )


def _noise_variants(graph: SourceModel, threads: int) -> dict[str, Callable[[Case], Arrays]]:
    """Return runs of the source model that should all give the same answer."""
    import copy

    import numpy as np
    import torch

    exact = copy.deepcopy(graph.model).double()

    def in_float64(case: Case) -> Arrays:
        with torch.inference_mode():
            tensors = {name: torch.as_tensor(value) for name, value in case.inputs.items()}
            answer = exact(**{name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
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
