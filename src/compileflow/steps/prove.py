"""Prove an artifact: measure it against its source model, judge the differences, write the report.

The validate step runs this module in a child process, with both models in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from compileflow._process.child_process import peak_bytes, report_progress, reset_peak
from compileflow._process.state import resident_bytes, torch_threads
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.catalog import get_target
from compileflow.contracts import OUTCOMES, PENDING, Arrays, ComponentRecord
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import LoadError, MeasurementError, first_line
from compileflow.serving.component import LoadedComponent
from compileflow.serving.padding import join_rows, take_rows
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, load_source_model, load_tokenizer
from compileflow.source_model.processor import LONGEST_S, image_inputs, load_processor, longest_signal
from compileflow.source_model.sentence_modules import read_recipe
from compileflow.source_model.token_rows import token_rows
from compileflow.spec import CompileSpec, HfTask, Precision
from compileflow.steps.claims import claimed_length, expected_claims
from compileflow.steps.validate import MEASUREMENT_VERSION
from compileflow.validation import measure as measuring
from compileflow.validation.bundle import BUNDLE_FOLDER, Failed, examine_failure, write_failure_bundle
from compileflow.validation.cases import LABELS_UNUSED, MULTI_LABEL, ONE_LABEL, Case
from compileflow.validation.evidence import Evidence, draw_for, gather_evidence, timed_shapes
from compileflow.validation.judge import UserSuite, Verdict, judge, parse_user_suite
from compileflow.validation.judge.suite import suite_digest
from compileflow.validation.measure import Call, Measurements, Model, OneThread
from compileflow.validation.measure.decisions import Decisions, Pool, mean_of_tokens
from compileflow.validation.measure.interface import Claims
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
    ReportSubject,
    environment,
    worst_rows,
    write_data_docs,
    write_report,
)
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.whole_artifact import WholeArtifact
from compileflow.validation.writing import compare_writing, timed_tokens, writers

# Natural batches, and families of generated ones, on which the source model is run with rounded numbers.
_GRID_CASES = 12
_GRID_FAMILIES = ("batch", "length", "text")


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
    proof = _Proof(
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


def _pending(proof: _Proof, component: str, report_dir: Path, reason: str) -> dict[str, Any]:
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


def component_examples(
    artifact: OpenArtifact, record: ComponentRecord, source_dir: Path
) -> Callable[[int, int], Arrays]:
    """Return a function from a batch size and a length to example inputs."""
    spec, trust = artifact.manifest.spec, artifact.trust_remote_code
    if spec.hf_task.modality == "image":
        processor = load_processor(source_dir, "image", trust_remote_code=trust)
        return lambda rows, _: image_inputs(processor, record.inputs, rows)
    tokens = None
    if spec.hf_task.takes_text:
        tokenizer = load_tokenizer(source_dir, trust_remote_code=trust)
        tokens = token_rows(tokenizer, _config(source_dir, artifact), record.vocab_size, spec.hf_task)
    return partial(example_inputs, record.inputs, tokens=tokens, pad_left=record.padding == "left")


def _config(folder: Path, artifact: OpenArtifact) -> Any:
    return load_config(folder, trust_remote_code=artifact.trust_remote_code)


def component_shapes(
    artifact: OpenArtifact, record: ComponentRecord, source_dir: Path, validation: ValidationSettings
) -> tuple[tuple[int, int], ...]:
    """Return the shapes at which a component is timed, each as (batch size, length)."""
    spec = artifact.manifest.spec
    if spec.hf_task.modality != "audio":
        return timed_shapes(spec.hf_task, record, validation, second=1)
    processor = load_processor(source_dir, "audio", trust_remote_code=artifact.trust_remote_code)
    return timed_shapes(spec.hf_task, record, validation, second=max(1, longest_signal(processor) // LONGEST_S))


@dataclass(frozen=True)
class _Component:
    """A compiled component, and the calls that it is measured on.

    Attributes:
        compiled: The loaded component.
        first_call: First call of the component in this process.
        record: Record of the component, with the rule by which the source model counts frames.
        evidence: Calls that both models answer.
        shapes_to_time: Shapes to time, each as (batch size, length).
        cases: Calls whose outputs are compared.
        decisions: Decisions of both models, which the comparison collects.
    """

    compiled: LoadedComponent
    first_call: Call
    record: ComponentRecord
    evidence: Evidence
    shapes_to_time: tuple[tuple[int, int], ...]
    cases: Sequence[Case]
    decisions: Decisions


@dataclass(frozen=True)
class _Proof:
    """The proof of an artifact's components, one after another, with what they share.

    Attributes:
        source_model: The source model.
        whole_artifact: The artifact, beside the files of the source model.
        artifact_uri: URI of the artifact, for the report.
        requested: Spec that the user requested.
        validation: Settings of the validation.
        user_suite: Gates of the user; None without any.
        answers: Kept answers of the source model.
        tests: Tests that are registered with the source version; None without any.
        project_tests: Outcome of the project's own tests; None without any.
        shared: Measurements that hold for each component.
        threads: Threads that both models use.
        bundle_dir: Folder for the bundle of the first component that fails.
        has_both: Both models run here, so that their latencies can be compared.
    """

    source_model: SourceModel
    whole_artifact: WholeArtifact
    artifact_uri: str
    requested: CompileSpec
    validation: ValidationSettings
    user_suite: UserSuite | None
    answers: ReferenceAnswers
    tests: RegisteredTests | None
    project_tests: ProjectTests | None
    shared: Measurements
    threads: int
    bundle_dir: Path
    has_both: bool = True

    @property
    def artifact(self) -> OpenArtifact:
        return self.whole_artifact.artifact

    @property
    def spec(self) -> CompileSpec:
        return self.artifact.manifest.spec

    def record(self, compiled: LoadedComponent, first_call: Call, claims: Claims) -> None:
        """Record every answer that a measurement of the component asks of the source model.

        Args:
            compiled: Component that answers as the source model does.
            first_call: First call of the component in this process.
            claims: Claims of the manifest about the component, with the right values.
        """
        self._measure(self._component(compiled, first_call), claims)

    def report(
        self,
        compiled: LoadedComponent,
        first_call: Call,
        claims: Claims,
        on_result: Callable[[str, Any], None] | None,
    ) -> Report:
        """Measure and judge a component, and write a bundle if it is the first one that fails.

        Args:
            compiled: The loaded component.
            first_call: First call of the component in this process.
            claims: Claims of the manifest about the component, with the right values.
            on_result: Called with the title and the result of each judged suite.
        """
        component = self._component(compiled, first_call)
        measurements = self._measure(component, claims)
        verdict = self._judge(measurements, on_result)
        failed = None
        if verdict.outcome == "fail":
            report_progress("looking for the first module whose output differs")
            failed = examine_failure(
                self.artifact,
                compiled,
                component.record,
                self.source_model,
                component.cases,
                measurements,
                verdict,
                self.user_suite,
                threads=self.threads,
            )
        report = self._report(component, measurements, verdict, failed)
        # The first component that fails names the verdict.
        if failed is not None and not self.bundle_dir.exists():
            subject = report.subject.model_dump(mode="json") | {
                "reason": report.verdict.reason,
                "environment": report.environment,
                "threads": self.threads,
            }
            write_failure_bundle(
                self.bundle_dir, failed, subject, self.requested, self.validation, self.user_suite
            )
        return report

    def _component(self, compiled: LoadedComponent, first_call: Call) -> _Component:
        """Choose the calls that a component is measured on."""
        artifact, source_dir, spec = self.artifact, self.whole_artifact.source_dir, self.spec
        # A wrong manifest must not decide which frames are compared.
        record = compiled.record.model_copy(update={"frame_convolutions": self.source_model.frame_convolutions})
        config = _config(source_dir, artifact)
        labels = {int(key): str(value) for key, value in config.id2label.items()}
        evidence = gather_evidence(
            source_dir,
            spec,
            record,
            self.validation,
            self.tests,
            labels=labels,
            draw=draw_for(artifact.digest, self.source_model, generates=spec.hf_task.generates),
            trust_remote_code=artifact.trust_remote_code,
        )
        shapes_to_time = component_shapes(artifact, record, source_dir, self.validation)
        decisions = Decisions(
            spec.hf_task.graph_task,
            labels=dict(evidence.tokens) or labels,
            multi_label=config.problem_type == MULTI_LABEL,
            pools=_pools(spec.hf_task, source_dir, artifact.folder),
            precision=spec.precision,
        )
        cases = [
            *evidence.generated,
            *evidence.natural,
            *(evidence.timed(rows, length) for rows, length in shapes_to_time),
        ]
        return _Component(compiled, first_call, record, evidence, shapes_to_time, cases, decisions)

    def _measure(self, component: _Component, claims: Claims) -> Measurements:
        """Compare a component with the source model in every way that a gate judges."""
        source_model, answers = self.source_model, self.answers
        run, record, evidence = component.compiled.run, component.record, component.evidence
        answers.leave_out([case.inputs for case in component.cases if case.is_drawn])
        measurements = measuring.measure(
            answers.remembered(source_model.run),
            run,
            outputs=source_model.outputs,
            decisions=component.decisions,
            cases=component.cases,
            coverage=measuring.Coverage(record, evidence.shapes, source_model.tokens),
            progress=report_progress,
            bucket_lengths={bucket.sequence_length for bucket in record.shape_buckets},
        )
        measurements.scalars |= self.shared.scalars
        measurements.details |= self.shared.details
        measurements.notes += [*self.shared.notes, *evidence.notes]
        if evidence.labelled_count and measurements.score is None:
            task = self.spec.hf_task
            why = LABELS_UNUSED if task in ONE_LABEL else "a search needs a relevant document and another one"
            measurements.notes.append(f"{evidence.labelled_count} labels are not used: {why}.")
        report_progress("answering raw inputs as a service does")
        self.whole_artifact.measure_component(
            measurements, component.compiled, claims, max_length=claimed_length(claims)
        )
        if self.spec.hf_task.generates:
            compare_writing(
                measurements,
                source_model,
                answers.remembered(source_model.run),
                component.compiled,
                evidence.natural,
                progress=report_progress,
            )
        report_progress("calling the compiled model again")
        measuring.measure_repeatability(measurements, run, evidence.repeated, component.first_call)
        computed = _reference(source_model)
        reference = answers.remembered(computed)
        if self.spec.precision is not Precision.FP32:
            report_progress(f"rounding the source model's numbers to {self.spec.precision.value}")
            _measure_grid(measurements, source_model, component.decisions, evidence, answers)
        report_progress("probing padding, masks and token types")
        # The probes of images and audio alter drawn signals.
        probed = reference if self.spec.hf_task.modality == "text" else computed
        for probe in evidence.probes:
            probe(measurements, probed, run)
        report_progress("measuring the noise of the source model")
        noise_cases = evidence.natural[:: max(1, len(evidence.natural) // 3)][:3]
        # No name holds the variants, so that the copy in float64 is freed afterwards.
        measuring.measure_noise(
            measurements, _noise_variants(source_model, self.threads, answers), reference, noise_cases
        )
        if not self.has_both:
            measurements.notes.append("Latency was not compared, because the source model is not on this machine.")
            return measurements
        report_progress("timing both models in turn")
        measuring.measure_latency(
            measurements,
            *timed_models(source_model, component.compiled),
            lambda rows, length: evidence.timed(rows, length).inputs,
            shapes=component.shapes_to_time,
            pairs=self.validation.latency_pairs,
            threads=self.threads,
            one_thread=_one_thread(source_model, component.compiled),
            written_tokens=written_tokens(component.compiled),
        )
        return measurements

    def subject(self, component: str) -> ReportSubject:
        """Return what a report says about both models."""
        manifest, spec = self.artifact.manifest, self.spec
        return ReportSubject(
            source_uri=manifest.source.uri,
            source_revision=manifest.source.revision,
            source_digest=manifest.source.digest,
            architecture=manifest.source.architecture,
            artifact_uri=self.artifact_uri,
            artifact_digest=self.artifact.digest,
            target=spec.target,
            hf_task=spec.hf_task.value,
            precision=spec.precision.value,
            component=component,
            toolchain=manifest.target.toolchain,
        )

    def _judge(self, measurements: Measurements, on_result: Callable[[str, Any], None] | None) -> Verdict:
        spec = self.spec
        # Optional attribute of a third party's target: its own limits for a precision.
        overrides = dict(getattr(get_target(spec.target), "default_gates", {}).get(spec.precision, {}))
        if self.validation.max_latency_ratio is not None:
            overrides["latency_ratio"] = self.validation.max_latency_ratio
        report_progress("judging with Great Expectations")
        return judge(
            measurements,
            precision=spec.precision,
            hf_task=spec.hf_task,
            overrides=overrides,
            strict=self.validation.strict,
            user_suite=self.user_suite,
            on_result=on_result,
        )

    def _report(
        self, component: _Component, measurements: Measurements, verdict: Verdict, failed: Failed | None
    ) -> Report:
        evidence = component.evidence
        return Report(
            subject=self.subject(component.compiled.component),
            verdict=failed.named(verdict) if failed else verdict,
            figures=measurements.figures(),
            noise=measurements.noise,
            floors=measurements.floors,
            grid=measurements.grid,
            grid_floors=measurements.grid_floors,
            latencies=tuple(measurements.latencies),
            worst=worst_rows(measurements.comparisons),
            families=dict(Counter(row["family"] for row in measurements.comparisons)),
            examples_origin=evidence.origin,
            examples_count=evidence.examples_count,
            labelled_count=evidence.labelled_count,
            examples_digest=evidence.examples_digest,
            measurement_version=MEASUREMENT_VERSION,
            suite_digest=suite_digest(),
            user_suite=self.user_suite.name if self.user_suite is not None else "",
            user_suite_digest=self.user_suite.digest if self.user_suite is not None else "",
            environment=environment(self.threads),
            flips=component.decisions.flips(evidence.decode),
            flips_count=component.decisions.flips_count(),
            coverage=measurements.coverage,
            score=measurements.score,
            failure=failed.failure if failed else None,
            project_tests=self.project_tests,
        )


def _pools(hf_task: HfTask, source_dir: Path, artifact_dir: Path) -> tuple[Pool, Pool]:
    """Return the functions from tokens to an embedding, of the source model and of the compiled model.

    Modules that cannot be served do not matter to feature extraction; its tokens are then averaged.
    """
    if hf_task.graph_task is not HfTask.FEATURE_EXTRACTION:
        return mean_of_tokens, mean_of_tokens
    try:
        before = read_recipe(source_dir).embed
    except LoadError:
        if hf_task is HfTask.SENTENCE_SIMILARITY:
            raise
        return mean_of_tokens, mean_of_tokens
    try:
        return before, read_recipe(artifact_dir).embed
    except LoadError:
        # A gate names the file that is spoilt.
        return before, before


def timed_models(source_model: SourceModel, component: LoadedComponent) -> tuple[Model, Model]:
    """Return both models as functions of inputs to time: decoders write, and all others answer."""
    if not component.artifact.manifest.hf_task.generates:
        return _reference(source_model), component.run
    longest = component.record.max_sequence_length
    before, after = (writer.timed(longest) for writer in writers(source_model, component))
    return before, after


def written_tokens(component: LoadedComponent) -> int:
    """Return how many tokens a timed call writes after each row; 0 if the component is not a decoder."""
    generates = component.artifact.manifest.hf_task.generates
    return timed_tokens(component.record.max_sequence_length) if generates else 0


def _one_thread(source_model: SourceModel, component: LoadedComponent) -> OneThread | None:
    """Return what gives both models with one thread; None if the compiled model runs on a device."""
    if get_target(component.artifact.manifest.spec.target).capabilities.devices[0] != "cpu":
        return None

    @contextmanager
    def models() -> Iterator[tuple[Model, Model]]:
        alone = LoadedComponent.load(component.artifact, component=component.component, threads=1)
        try:
            with torch_threads(1):
                yield timed_models(source_model, alone)
        finally:
            alone.close()

    return models


def _reference(source_model: SourceModel) -> Callable[[Arrays], Arrays]:
    """Return the source model as a function; if it fails, the error says that it was the source model."""

    def run(inputs: Arrays) -> Arrays:
        try:
            return source_model.run(inputs)
        except MemoryError:
            raise
        except Exception as error:
            rows, length = next(iter(inputs.values())).shape[:2]
            raise MeasurementError(
                f"The source model itself fails on {rows} rows of length {length}: {type(error).__name__}: "
                f"{first_line(error)}.",
                hint="Check that the model and its tokenizer belong together.",
            ) from error

    return run


def _measure_grid(
    measurements: Measurements,
    source_model: SourceModel,
    decisions: Decisions,
    evidence: Evidence,
    answers: ReferenceAnswers,
) -> None:
    """Measure the source model with numbers rounded to the precision, on natural text and generated rows."""
    precision = decisions.precision

    def rounded(inputs: Arrays) -> Arrays:
        with measuring.rounded_to(source_model.model, precision):
            return source_model.run(inputs)

    pools = (decisions.pools[0], decisions.pools[0])
    # The source model fails on some special tokens; those were left out.
    compared_names = {row["case"] for row in measurements.comparisons}
    generated = [case for case in evidence.generated if case.name in compared_names]
    special = [case for case in generated if case.family == "special"]
    # Short rows round worse than natural text. At int8, such differences only warn.
    others = [case for case in generated if case.family in _GRID_FAMILIES and not precision.is_integer]
    measuring.measure_grid(
        measurements,
        answers.remembered(rounded, f"rounded to {precision.value}"),
        answers.remembered(_reference(source_model)),
        outputs=source_model.outputs,
        decisions=Decisions(
            decisions.task,
            labels=decisions.labels,
            multi_label=decisions.multi_label,
            pools=pools,
            precision=precision,
        ),
        cases=[*evidence.natural[:: math.ceil(len(evidence.natural) / _GRID_CASES)], *others, *special],
    )
    if decisions.task.generates:
        # Rows that are read piece by piece round as whole rows do.
        floors = [floor["rel_l2"] for floor in measurements.grid_floors.values() if "rel_l2" in floor]
        measurements.grid["piece_error"] = max(floors, default=0.0)


def _noise_variants(
    source_model: SourceModel, threads: int, answers: ReferenceAnswers
) -> dict[str, Callable[[Case], Arrays]]:
    """Return functions that run the source model in ways that should all give the same answer."""
    import copy

    import torch

    @cache
    def float64_model() -> Any:
        return copy.deepcopy(source_model.model).double()

    def in_float64(case: Case) -> Arrays:
        with torch.inference_mode():
            tensors = {name: torch.as_tensor(value) for name, value in case.inputs.items()}
            answer = float64_model()(
                **{
                    name: tensor.double() if tensor.is_floating_point() else tensor
                    for name, tensor in tensors.items()
                }
            )
        return {record.name: answer[record.name].numpy() for record in source_model.outputs}

    def row_by_row(case: Case) -> Arrays:
        records = [record for record in source_model.inputs if record.name in case.inputs]
        rows = [
            source_model.run(take_rows(records, case.inputs, slice(row, row + 1)))
            for row in range(len(case.texts))
        ]
        return join_rows(source_model.outputs, rows)

    def with_one_thread(case: Case) -> Arrays:
        torch.set_num_threads(1)
        try:
            return source_model.run(case.inputs)
        finally:
            torch.set_num_threads(threads)

    def with_eager_attention(case: Case) -> Arrays:
        source_model.model.set_attn_implementation("eager")
        try:
            return source_model.run(case.inputs)
        finally:
            source_model.model.set_attn_implementation(source_model.attention)

    variants: dict[str, Callable[[Case], Arrays]] = {"float64": in_float64, "row by row": row_by_row}
    if threads > 1:
        variants["one thread"] = with_one_thread
    if source_model.attention == "sdpa":
        variants["eager attention"] = with_eager_attention

    def remembered(way: str, run: Callable[[Case], Arrays]) -> Callable[[Case], Arrays]:
        return lambda case: answers.answer(case.inputs, lambda: run(case), way)

    return {way: remembered(way, run) for way, run in variants.items()}
