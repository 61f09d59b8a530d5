"""Prove an artifact: measure it against its source model, judge the differences, write the report.

The validate step runs this module in a child process, with both models in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compileflow._process.child_process import peak_bytes, report_progress, reset_peak
from compileflow._process.state import resident_bytes
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.contracts import OUTCOMES, PENDING, Arrays
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import LoadError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model
from compileflow.spec import CompileSpec
from compileflow.steps.claims import claimed_length, expected_claims
from compileflow.steps.component_calls import component_examples, component_shapes
from compileflow.steps.proof import Proof
from compileflow.steps.validate import MEASUREMENT_VERSION
from compileflow.validation import measure as measuring
from compileflow.validation.bundle import BUNDLE_FOLDER
from compileflow.validation.judge import Verdict, parse_user_suite
from compileflow.validation.judge.suite import suite_digest
from compileflow.validation.measure import Call, Measurements
from compileflow.validation.project_tests import ProjectTests
from compileflow.validation.recorded_reference import (
    REFERENCE_FOLDER,
    RecordedAnswers,
    load_recorded,
    record_interface,
)
from compileflow.validation.reference_answers import ReferenceAnswers, reference_key
from compileflow.validation.registered_tests import (
    AnsweredTests,
    RegisteredTests,
    answer_tests,
    read_registered_tests,
    write_registered_tests,
)
from compileflow.validation.report import (
    DATA_DOCS_FOLDER,
    TEST_FILES_FOLDER,
    Report,
    environment,
    write_data_docs,
    write_report,
)
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.whole_artifact import WholeArtifact


def prove_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, judge and write the report. Runs in a child process.

    Args:
        request: What `steps.validate` sends. With a "tests_dir", the compiled pipeline answers the tests that are
            registered with the source version. The report keeps its answers, compared with the registered ones.
            With a "reference_dir" and the "source_digest", the source model's answers are kept in that folder.
        With "record", the artifact is not run: the source model's part is recorded beside the report, and the
        verdict is pending-device. With a "recorded_dir", that record takes the place of the source model.
            The gates of the user's "suite" are judged in addition to compileflow's.

    Returns:
        The outcome, the reason and the figures of the worst component.
    """
    import torch

    threads = int(request["threads"])
    torch.set_num_threads(threads)
    validation = ValidationSettings.model_validate(request["validation"])
    report_progress("loading the source model and the compiled model")
    # The consent of the run counts, not what the manifest says.
    trust_remote_code = bool(request.get("trust_remote_code"))
    # The artifact cannot be signed yet: the signature covers the verdict that this function returns.
    artifact = open_artifact(request["artifact_dir"], require_signature=False, trust_remote_code=trust_remote_code)
    artifact.check_code()
    spec = artifact.manifest.spec
    # Components load before the source model, so that the growth in memory is due to them alone.
    source_dir = Path(request["source_dir"])
    record_dir = Path(request["report_dir"]) / REFERENCE_FOLDER if request.get("record") else None
    loaded_components = []
    if record_dir is None:
        loaded_components = [
            _load(artifact, component.name, source_dir, validation, threads) for component in spec.components
        ]
    source_model: SourceModel
    answers: ReferenceAnswers
    if recorded_dir := request.get("recorded_dir"):
        answers = RecordedAnswers(Path(recorded_dir), recording=False)
        source_model = load_recorded(Path(recorded_dir), answers, trust_remote_code=trust_remote_code)
    else:
        source_model = load_source_model(source_dir, spec.hf_task, trust_remote_code=trust_remote_code)
        answers = ReferenceAnswers(
            Path(request["reference_dir"]) if request.get("reference_dir") else None,
            reference_key(
                source_model,
                source_digest=request.get("source_digest", ""),
                hf_task=spec.hf_task.value,
                threads=threads,
            ),
            report=report_progress,
        )
    if record_dir is not None:
        answers = RecordedAnswers(record_dir, recording=True)
        record_interface(record_dir, source_model, source_dir, threads=threads)
        loaded_components = [
            _stand_in(artifact, component.name, source_dir, validation, source_model)
            for component in spec.components
        ]
    report_progress("comparing files, tokens and processor outputs with the source model's")
    requested = CompileSpec.model_validate(request["spec"]) if request.get("spec") else None
    claims = expected_claims(
        artifact,
        source_model,
        source_dir,
        requested,
        source_digest=request.get("source_digest") or folder_digest(list_files(source_dir)),
    )
    whole_artifact = WholeArtifact(artifact, source_dir, validation.examples_path)
    user_suite = parse_user_suite(**request["suite"]) if request.get("suite") else None
    shared = Measurements()
    whole_artifact.measure_shared(shared, max_length=max(map(claimed_length, claims.values())))
    project_tests = None
    if request.get("project_tests"):
        project_tests = ProjectTests.model_validate(request["project_tests"])
        project_tests.measure(shared)
    tests = read_registered_tests(Path(request["tests_dir"])) if request.get("tests_dir") else None
    if tests is not None and record_dir is None:
        report_progress("answering the test inputs that are registered with the source version")
        try:
            answered = _answered(tests, artifact, threads)
        except LoadError as error:
            # A gate says what cannot be loaded.
            answered = AnsweredTests(replace(tests, note=f"they were not answered: {error.message}"), None, None)
        tests = answered.tests
        if answered.answers is not None:
            write_registered_tests(tests, answered.answers, Path(request["report_dir"]) / TEST_FILES_FOLDER)
        if answered.disagreement is not None:
            shared.scalars["registered_disagreement"] = answered.disagreement
    proof = Proof(
        source_model=source_model,
        whole_artifact=whole_artifact,
        artifact_uri=request["artifact_uri"],
        requested=requested or spec,
        validation=validation,
        user_suite=user_suite,
        answers=answers,
        tests=tests,
        project_tests=project_tests,
        shared=shared,
        threads=threads,
        bundle_dir=Path(request["report_dir"]) / BUNDLE_FOLDER,
        has_both=record_dir is None and not recorded_dir,
    )
    if record_dir is not None:
        for compiled_component, _, first_call in loaded_components:
            proof.record(compiled_component, first_call, claims[compiled_component.component])
        return _pending(proof, loaded_components[0][0].component, Path(request["report_dir"]), request["record"])
    reports = []
    judged: list[tuple[str, Any]] = []
    for compiled_component, serving_memory_bytes, first_call in loaded_components:
        name = compiled_component.component
        on_result = partial(_keep, judged, name) if validation.data_docs else None
        report = proof.report(compiled_component, first_call, claims[name], on_result)
        figures = report.figures | {"serving_memory_bytes": float(serving_memory_bytes)}
        reports.append(report.model_copy(update={"figures": figures}))
        compiled_component.close()
    # The worst component's verdict is the artifact's.
    report = max(reports, key=lambda report: OUTCOMES.index(report.verdict.outcome))
    report_progress("writing the report")
    write_report(report, Path(request["report_dir"]))
    if judged:
        write_data_docs(judged, Path(request["report_dir"]) / DATA_DOCS_FOLDER)
    return {
        "outcome": report.verdict.outcome,
        "reason": report.verdict.reason,
        "figures": report.figures,
    }


def _pending(proof: Proof, component: str, report_dir: Path, reason: str) -> dict[str, Any]:
    """Write the report of an artifact that was not run."""
    verdict = Verdict(outcome=PENDING, reason=f"{PENDING}: {reason}", gates=())
    report = Report(
        subject=proof.subject(component),
        verdict=verdict,
        figures={},
        noise={},
        latencies=(),
        worst=(),
        families={},
        examples_origin="",
        examples_count=0,
        measurement_version=MEASUREMENT_VERSION,
        suite_digest=suite_digest(),
        environment=environment(proof.threads),
    )
    write_report(report, report_dir)
    return {"outcome": PENDING, "reason": verdict.reason, "figures": {}}


def _keep(judged: list[tuple[str, Any]], component: str, title: str, result: Any) -> None:
    judged.append((f"component {component}, suite {title}", result))


def _answered(tests: RegisteredTests, artifact: OpenArtifact, threads: int) -> AnsweredTests:
    """Answer the registered tests with the first component of the spec."""
    pipeline = CompiledPipeline.from_pretrained(
        artifact.folder,
        component=artifact.manifest.spec.components[0].name,
        threads=threads,
        require_signature=False,
        trust_remote_code=artifact.trust_remote_code,
    )
    return answer_tests(tests, pipeline, artifact.manifest.hf_task)


def _load(
    artifact: OpenArtifact, component: str, source_dir: Path, validation: ValidationSettings, threads: int
) -> tuple[LoadedComponent, int, Call]:
    """Load a component and call it once at each timed shape.

    Returns:
        The component, the most bytes of memory that it took once it was loaded, and the first call.
    """
    record = artifact.component(component)
    bytes_before = resident_bytes()
    example = component_examples(artifact, record, source_dir)
    compiled_component = LoadedComponent.load(artifact, component=component, threads=threads)
    has_peak = reset_peak()
    calls: list[Call] = []
    for rows, length in component_shapes(artifact, record, source_dir, validation):
        inputs = example(rows, length)
        # The gates judge a call that raises.
        calls.append((inputs, measuring.candidate_answer(compiled_component.run, inputs)[0]))
    bytes_used = peak_bytes("self") if has_peak else resident_bytes()
    return compiled_component, max(0, bytes_used - bytes_before), calls[0]


def _stand_in(
    artifact: OpenArtifact, component: str, source_dir: Path, validation: ValidationSettings, source: SourceModel
) -> tuple[LoadedComponent, int, Call]:
    """Return a component whose graph is the source model, which takes the place of one that cannot run here."""
    record = artifact.component(component)
    example = component_examples(artifact, record, source_dir)
    stand_in = LoadedComponent(artifact, component, record, _SourceRunner(source))
    inputs = example(*component_shapes(artifact, record, source_dir, validation)[0])
    return stand_in, 0, (inputs, measuring.candidate_answer(stand_in.run, inputs)[0])


@dataclass(frozen=True)
class _SourceRunner:
    source: SourceModel

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        return self.source.run(inputs)

    def close(self) -> None:
        """Do nothing: the source model stays."""
