"""The proof of one artifact: what its components are measured on, the measurements, the verdict, the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow._process.child_process import report_progress
from compileflow.artifact.open import OpenArtifact
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord
from compileflow.errors import LoadError
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.sentence_modules import read_recipe
from compileflow.spec import CompileSpec, HfTask, Precision
from compileflow.steps.claims import claimed_length
from compileflow.steps.component_calls import (
    artifact_config,
    component_shapes,
    one_thread_models,
    timed_models,
    written_tokens,
)
from compileflow.steps.source_variants import measure_rounded, noise_variants, source_function
from compileflow.steps.validate import MEASUREMENT_VERSION
from compileflow.validation import measure as measuring
from compileflow.validation.bundle import Failed, examine_failure, write_failure_bundle
from compileflow.validation.cases import LABELS_UNUSED, MULTI_LABEL, ONE_LABEL, Case
from compileflow.validation.evidence import Evidence, draw_for, gather_evidence
from compileflow.validation.judge import UserSuite, Verdict, judge
from compileflow.validation.judge.early import EarlyOutcome, early_verdict
from compileflow.validation.judge.suite import suite_digest
from compileflow.validation.measure import Call, Measurements
from compileflow.validation.measure.decisions import Decisions, Pool, mean_of_tokens
from compileflow.validation.measure.interface import Claims
from compileflow.validation.project_tests import ProjectTests
from compileflow.validation.reference_answers import ReferenceAnswers
from compileflow.validation.registered_tests import (
    RegisteredTests,
)
from compileflow.validation.report import (
    Report,
    ReportSubject,
    environment,
    worst_rows,
)
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.whole_artifact import WholeArtifact
from compileflow.validation.writing import compare_writing


@dataclass(frozen=True)
class _Component:
    """A compiled component, and the calls that it is measured on.

    Attributes:
        compiled: The loaded component.
        record: Record of the component, with the rule by which the source model counts frames.
        evidence: Calls that both models answer.
        shapes_to_time: Shapes to time, each as (batch size, length).
        cases: Calls whose outputs are compared.
        decisions: Decisions of both models, which the comparison collects.
    """

    compiled: LoadedComponent
    record: ComponentRecord
    evidence: Evidence
    shapes_to_time: tuple[tuple[int, int], ...]
    cases: Sequence[Case]
    decisions: Decisions


@dataclass(frozen=True)
class Proof:
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
        """The artifact that is proven."""
        return self.whole_artifact.artifact

    @property
    def spec(self) -> CompileSpec:
        """The spec in the artifact's manifest."""
        return self.artifact.manifest.spec

    def record(self, compiled: LoadedComponent, first_call: Call, claims: Claims) -> None:
        """Record every answer that a measurement of the component asks of the source model.

        Args:
            compiled: Component that answers as the source model does.
            first_call: First call of the component in this process.
            claims: Claims of the manifest about the component, with the right values.
        """
        self._measure(self._component(compiled), first_call, claims)

    def try_out(self, compiled: LoadedComponent, *, pairs: int) -> tuple[Measurements, EarlyOutcome, str]:
        """Compare a component on the natural examples alone, and time it: the first round of target auto.

        Args:
            compiled: The loaded component.
            pairs: Number of pairs of calls to time at each shape.

        Returns:
            The measurements, and the early verdict with its reason.
        """
        component = self._component(compiled)
        measurements = self._compare(component, component.evidence.natural)
        outcome, reason = early_verdict(
            measurements,
            precision=self.spec.precision,
            hf_task=self.spec.hf_task,
            overrides=self._overrides(),
            strict=self.validation.strict,
        )
        self._time(measurements, component, pairs)
        return measurements, outcome, reason

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
        component = self._component(compiled)
        measurements = self._measure(component, first_call, claims)
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

    def _component(self, compiled: LoadedComponent) -> _Component:
        """Choose the calls that a component is measured on."""
        artifact, source_dir, spec = self.artifact, self.whole_artifact.source_dir, self.spec
        # A wrong manifest must not decide which frames are compared.
        record = compiled.record.model_copy(update={"frame_convolutions": self.source_model.frame_convolutions})
        config = artifact_config(source_dir, artifact)
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
        return _Component(compiled, record, evidence, shapes_to_time, cases, decisions)

    def _compare(self, component: _Component, cases: Sequence[Case]) -> Measurements:
        """Compare the answers of both models to some of a component's cases."""
        source_model, record = self.source_model, component.record
        self.answers.leave_out([case.inputs for case in cases if case.is_drawn])
        return measuring.measure(
            self.answers.remembered(source_model.run),
            component.compiled.run,
            outputs=source_model.outputs,
            decisions=component.decisions,
            cases=cases,
            coverage=measuring.Coverage(record, component.evidence.shapes, source_model.tokens),
            progress=report_progress,
            bucket_lengths={bucket.sequence_length for bucket in record.shape_buckets},
        )

    def _measure(self, component: _Component, first_call: Call, claims: Claims) -> Measurements:
        """Compare a component with the source model in every way that a gate judges.

        Args:
            component: The component.
            first_call: First call of the component in this process.
            claims: Claims of the manifest about the component, with the right values.
        """
        source_model, answers = self.source_model, self.answers
        run, evidence = component.compiled.run, component.evidence
        measurements = self._compare(component, component.cases)
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
        measuring.measure_repeatability(measurements, run, evidence.repeated, first_call)
        computed = source_function(source_model)
        reference = answers.remembered(computed)
        if self.spec.precision is not Precision.FP32:
            report_progress(f"rounding the source model's numbers to {self.spec.precision.value}")
            measure_rounded(measurements, source_model, component.decisions, evidence, answers)
        report_progress("probing padding, masks and token types")
        # The probes of images and audio alter drawn signals.
        probed = reference if self.spec.hf_task.modality == "text" else computed
        for probe in evidence.probes:
            probe(measurements, probed, run)
        report_progress("measuring the noise of the source model")
        noise_cases = evidence.natural[:: max(1, len(evidence.natural) // 3)][:3]
        # No name holds the variants, so that the copy in float64 is freed afterwards.
        measuring.measure_noise(
            measurements, noise_variants(source_model, self.threads, answers), reference, noise_cases
        )
        if not self.has_both:
            measurements.notes.append("Latency was not compared, because the source model is not on this machine.")
            return measurements
        self._time(measurements, component, self.validation.latency_pairs)
        return measurements

    def _time(self, measurements: Measurements, component: _Component, pairs: int) -> None:
        report_progress("timing both models in turn")
        measuring.measure_latency(
            measurements,
            *timed_models(self.source_model, component.compiled),
            lambda rows, length: component.evidence.timed(rows, length).inputs,
            shapes=component.shapes_to_time,
            pairs=pairs,
            threads=self.threads,
            one_thread=one_thread_models(self.source_model, component.compiled),
            written_tokens=written_tokens(component.compiled),
        )

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
        report_progress("judging with Great Expectations")
        return judge(
            measurements,
            precision=self.spec.precision,
            hf_task=self.spec.hf_task,
            overrides=self._overrides(),
            strict=self.validation.strict,
            user_suite=self.user_suite,
            on_result=on_result,
        )

    def _overrides(self) -> dict[str, float]:
        """Return the limits that the target or the user sets."""
        # Optional attribute of a third party's target: its own limits for a precision.
        gates = getattr(get_target(self.spec.target), "default_gates", {})
        overrides = dict(gates.get(self.spec.precision, {}))
        if self.validation.max_latency_ratio is not None:
            overrides["latency_ratio"] = self.validation.max_latency_ratio
        return overrides

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
