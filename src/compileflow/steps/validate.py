"""validate: compare a stored artifact with its source model, judge the differences, store the report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from pydantic import ValidationError

from compileflow._process.failures import smaller_request
from compileflow._process.folders import work_folder
from compileflow._process.packages import installed_versions
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import ArtifactManifest, read_manifest
from compileflow.catalog import get_target, open_store
from compileflow.contracts import ACCEPTED_OUTCOMES, LATENCY_ON_BUSY_MACHINE, PENDING, ArtifactStore
from compileflow.contracts.digests import json_digest
from compileflow.errors import (
    IntegrityError,
    ManifestError,
    MeasurementError,
    ProcessError,
    SpecError,
    StepOffError,
)
from compileflow.settings import Settings
from compileflow.spec import CompileSpec, HfTask
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find_or_make
from compileflow.steps.compile import spec_of
from compileflow.steps.pending import PendingValidation
from compileflow.steps.plan import check_timed_shapes
from compileflow.steps.project_tests import run_project_tests
from compileflow.steps.report_file import read_report_file
from compileflow.steps.request import CompileRequest, StepTimeouts
from compileflow.steps.toolchain_logs import write_logs
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.bundle import BUNDLE_FOLDER
from compileflow.validation.cases import CLASS_FOLDERS, sample_examples, signals_digest
from compileflow.validation.judge import load_user_suite
from compileflow.validation.judge.suite import suite_digest
from compileflow.validation.project_tests import check_tests, digest_of_tests
from compileflow.validation.recorded_reference import REFERENCE_FOLDER
from compileflow.validation.report import REPORT_JSON
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
STEP = "validate"
# Records of the last verdict on an artifact, and of the recorded reference of one that waits for its device.
_REPORT, WAITING = "report-of", "waiting-for-device"
# Part of the cache key. Raise it when a measurement changes.
MEASUREMENT_VERSION = 9
CHILD = "compileflow.steps.prove:prove_artifact"
# Great Expectations alone takes seconds. What a compiled model needs stays out: its memory is measured.
IMPORTS = ("torch", CHILD.partition(":")[0], "compileflow.validation.judge.expectations", "matplotlib.pyplot")
_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "great_expectations")


def validate_artifact(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validation: ValidationSettings,
    *,
    store_uri: str,
    settings: Settings,
    timeout_s: float,
    request: CompileRequest | None = None,
    enabled: bool = True,
    repeat: bool = False,
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] = logger.info,
) -> ValidatedArtifact:
    """Measure and judge an artifact, or return the cached verdict of the same key.

    The artifact must be what `request` asks for; without one, only the source model says what it must be.
    Only the verdicts pass and warn are cached. A refused artifact is measured again, because the machine may have
    been at fault; with `repeat`, so is any other. Python files of the source model and of the artifact run only
    with `trust_remote_code`.

    Where the target's device is missing, the verdict is pending-device, and the report holds the answers of the
    source model. `settle.py` compares them with the artifact's on a machine that has the device.

    Raises:
        MeasurementError: The models could not be compared.
        ProcessError: The child process died.
        SpecError: The signing key, the user's suite or the folder of tests cannot be used, or a shape to time is
            longer than the longest row.
        SignatureError: A signing key is set, but securesystemslib is missing.
        StepOffError: The step is off, and the store has no report on this artifact.
    """
    store = open_store(store_uri, settings)
    if not enabled:
        return _reuse(store, artifact, Attester.of(store, settings))
    attester = Attester.of(store, settings)
    with ExitStack() as stack:
        source_dir = stack.enter_context(store.open_folder(source.digest))
        artifact_dir = stack.enter_context(store.open_folder(artifact.digest))
        tests_dir = None
        if source.test_files_digest is not None:
            tests_dir = stack.enter_context(store.open_folder(source.test_files_digest))
        manifest = read_manifest(artifact_dir)
        longest = max(component.max_sequence_length for component in manifest.components.values())
        check_timed_shapes(validation.latency_shapes, longest)
        spec = spec_of(request, source_dir, card_task=source.hf_task) if request else None
        suite = load_user_suite(validation.suite_path) if validation.suite_path is not None else None
        if suite is not None:
            component = next(iter(manifest.components.values()))
            suite.check(manifest.hf_task, manifest.spec.precision, [record.name for record in component.outputs])
        if validation.tests_path is not None:
            check_tests(validation.tests_path)
        parts = key_parts(
            source, [artifact], spec, validation, manifest.hf_task, get_target(manifest.target.name).toolchain()
        )
        if suite is not None:
            parts["user suite"] = suite.digest
        key = CacheKey(STEP, f"{source.uri} for {manifest.target.name}", parts)
        missing_device = lacking_device(manifest)
        settled = read_report_on(store, artifact.digest) if missing_device else None
        if settled and not _lack(attester, settled, key.digest):
            return settled.model_copy(update={"cached": True, "why": "a machine with the device proved it"})

        if missing_device and validation.tests_path is not None:
            # The machine with the device has neither the tests nor the source model, so it would skip them.
            raise SpecError(
                f"The tests in {validation.tests_path} cannot run here: {missing_device}.",
                hint="Validate on a machine with the device, or leave tests_path out.",
            )
        judges_latency = validation.max_latency_ratio or (suite is not None and suite.judges_latency())

        def compute(reason: str) -> ValidatedArtifact:
            with work_folder(settings.work_dir, label=STEP) as work:
                (work / "report").mkdir()
                project_tests = None
                if validation.tests_path is not None:
                    project_tests = run_project_tests(
                        validation.tests_path,
                        artifact_dir=artifact_dir,
                        source_dir=source_dir,
                        registered_dir=tests_dir,
                        work_dir=work,
                        log_path=settings.log_path(f"tests-{key.digest[:12]}"),
                        timeout_s=(request.timeouts if request else StepTimeouts()).tests_s,
                        threads=settings.threads,
                        trust_remote_code=trust_remote_code,
                        on_progress=on_progress,
                    ).model_dump(mode="json")
                try:
                    child = run_in_child(
                        CHILD,
                        {
                            "source_dir": str(source_dir),
                            "source_digest": source.digest,
                            "reference_dir": str(settings.reference_dir),
                            "tests_dir": str(tests_dir) if tests_dir else None,
                            "artifact_dir": str(artifact_dir),
                            "artifact_uri": artifact.uri,
                            "report_dir": str(work / "report"),
                            "spec": spec.model_dump(mode="json") if spec else None,
                            "validation": validation.model_dump(mode="json"),
                            "suite": {"text": suite.text, "origin": suite.origin} if suite is not None else None,
                            "project_tests": project_tests,
                            "threads": settings.threads,
                            "trust_remote_code": trust_remote_code,
                            "record": missing_device,
                        },
                        work_dir=work,
                        log_path=settings.log_path(f"{STEP}-{key.digest[:12]}"),
                        timeout_s=timeout_s,
                        threads=settings.threads,
                        imports=IMPORTS,
                        on_progress=on_progress,
                    )
                except ProcessError as error:
                    raise _died(error, manifest, threads=settings.threads, timeout_s=timeout_s) from error
                write_logs(work / "report" / BUNDLE_FOLDER, store, artifact.digest, {STEP: child.log})
                if missing_device:
                    pending = PendingValidation(
                        source=source,
                        artifact=artifact,
                        spec=spec,
                        validation=validation,
                        suite={"text": suite.text, "origin": suite.origin} if suite is not None else None,
                        request=request,
                        request_digest=key.digest,
                    )
                    pending.write(work / "report" / REFERENCE_FOLDER, tests_dir=tests_dir)
                stored_folder = store.put_folder(work / "report")
                attester.validated(
                    artifact.digest,
                    work / "report",
                    stored_folder=stored_folder,
                    source_digest=source.digest,
                    request_digest=key.digest,
                    is_pending=bool(missing_device),
                    is_revalidation=repeat,
                )
            value = ValidatedArtifact(
                artifact_digest=artifact.digest,
                report_uri=stored_folder.uri,
                report_digest=stored_folder.digest,
                cached=False,
                why=reason,
                **child.value,
            )
            kind = WAITING if missing_device else _REPORT
            store.put_record(kind, artifact.digest, value.model_dump(mode="json"))
            return value

        def reason_to_redo(validated: ValidatedArtifact) -> str:
            if repeat:
                return "a new validation was requested"
            if validated.outcome == PENDING:
                waiting = report_on(store, artifact.digest, kind=WAITING) if missing_device else None
                still_waits = waiting is not None and waiting.report_digest == validated.report_digest
                return "" if still_waits else "it does not wait for its device any more"
            return _lack(attester, validated, key.digest)

        value, cached = find_or_make(
            store,
            key,
            ValidatedArtifact,
            folders={"report_digest": "report_uri"},
            attester=attester,
            compute=compute,
            report_line=on_progress,
            is_cacheable=lambda validated: (
                validated.outcome in (*ACCEPTED_OUTCOMES, PENDING)
                # The gate that the user set was not judged, so the next run measures again.
                and not (judges_latency and LATENCY_ON_BUSY_MACHINE in validated.figures)
            ),
            reason_to_redo=reason_to_redo,
        )
    if cached:
        return value.model_copy(update={"cached": True, "why": "every part of its key is unchanged"})
    return value


def lacking_device(manifest: ArtifactManifest) -> str:
    """Return why an artifact for a device cannot run here, if a record of its source model can replace it for now.

    "" for an artifact that runs here, for a target of the CPU, and for other models than those that read text.
    """
    target, task = get_target(manifest.target.name), manifest.hf_task
    availability = target.probe()
    if availability.can_run or target.capabilities.devices[0] == "cpu":
        return ""
    is_recordable = task.modality == "text" and not task.generates
    return f"{target.name} cannot run here: {availability.reason}" if is_recordable else ""


def check_libraries() -> dict[str, str]:
    """Return the versions of the libraries that validation needs.

    Raises:
        MeasurementError: One of them is not installed.
    """
    versions = installed_versions(_LIBRARIES)
    missing_libraries = [name for name in _LIBRARIES if name not in versions]
    if missing_libraries:
        raise MeasurementError(
            f"Validation needs {missing_libraries[0]}, which is not installed.",
            hint="Run: pip install 'compileflow[validation]'",
        )
    return versions


def report_on(store: ArtifactStore, artifact_digest: str, *, kind: str = _REPORT) -> ValidatedArtifact | None:
    """Return the last verdict on an artifact; None without a report in the store.

    Args:
        store: Store of the artifact.
        artifact_digest: Digest of the artifact.
        kind: `WAITING` for the verdict pending-device, which does not replace an earlier one.
    """
    record = store.get_record(kind, artifact_digest)
    # An artifact that was settled waits no longer.
    if not record:
        return None
    try:
        value = ValidatedArtifact.model_validate(record)
    except ValidationError:
        logger.warning("%s: ignoring the unreadable record on %s", STEP, artifact_digest[:12])
        return None
    if value.artifact_digest != artifact_digest:
        logger.warning(
            "%s: ignoring the record on %s, which is about another artifact", STEP, artifact_digest[:12]
        )
        return None
    if not store.exists(value.report_digest):
        return None
    # The store may have been moved since, or the report was mirrored from another store.
    return value.model_copy(update={"report_uri": store.folder_uri(value.report_digest)})


def read_report_on(store: ArtifactStore, artifact_digest: str) -> ValidatedArtifact | None:
    """Return the last verdict on an artifact as its report says it; None without a report that says so."""
    value = report_on(store, artifact_digest)
    return value and _as_reported(store, value)


def key_parts(
    source: FetchedSource,
    artifacts: Sequence[CompiledArtifact],
    spec: CompileSpec | None,
    validation: ValidationSettings,
    hf_task: HfTask,
    toolchain: Mapping[str, str],
) -> dict[str, str]:
    """Return everything that changes what is measured of artifacts, part by part, for a cache key."""
    parts = {
        "artifact": " ".join(artifact.digest for artifact in artifacts),
        "source model": source.digest,
        "request": json_digest(spec.model_dump(mode="json")) if spec else "none",
        "suite": suite_digest(),
        "test files": source.test_files_digest or "none",
        "measurement version": str(MEASUREMENT_VERSION),
    }
    # A suite and a folder of tests count by their content.
    settings = validation.model_dump(mode="json", exclude={"suite_path", "tests_path", "data_docs"})
    parts |= {f"validation.{name}": str(value) for name, value in settings.items()}
    if validation.tests_path is not None:
        parts["project tests"] = digest_of_tests(validation.tests_path)
    if validation.data_docs:
        parts["data docs"] = "written"
    if hf_task.generates:
        parts["timed"] = "written tokens"
    # Built-in examples also count: another version of compileflow may have others.
    path, limit = validation.examples_path, validation.max_examples
    if hf_task.modality == "text":
        parts["examples"] = sample_examples(hf_task, path, limit)[2]
    else:
        parts["examples"] = signals_digest(path, hf_task.modality, limit, by_class=hf_task in CLASS_FOLDERS)
    versions = dict(toolchain) | check_libraries()
    return parts | {f"toolchain.{name}": value for name, value in versions.items()}


def _died(error: ProcessError, manifest: ArtifactManifest, *, threads: int, timeout_s: float) -> ProcessError:
    """Return the error of a process that died, with what to change in the request."""
    components = manifest.components.values()
    hint = smaller_request(
        error,
        buckets=[bucket for component in components for bucket in component.shape_buckets],
        longest=max(component.max_sequence_length for component in components),
        any_shape=all(component.dynamic_axes for component in components),
        threads=threads,
        limit=f"validate_s, now {timeout_s:g}",
    )
    return type(error)(f"The validation died: {error.message}", hint=hint, log_path=error.log_path)


def _lack(attester: Attester, validated: ValidatedArtifact, request_digest: str | None = None) -> str:
    """Return why a recorded verdict is not sufficient; '' if it is."""
    return attester.lacks_verdict(
        validated.artifact_digest, validated.report_digest, validated.outcome, request_digest
    )


def _as_reported(store: ArtifactStore, validated: ValidatedArtifact) -> ValidatedArtifact | None:
    """Return a recorded verdict with the words and figures of its report; None if the report says otherwise."""
    try:
        with store.open_folder(validated.report_digest) as folder:
            report = read_report_file(folder / REPORT_JSON)
    except (IntegrityError, ManifestError) as error:
        logger.warning("%s: ignoring the record on %s: %s", STEP, validated.artifact_digest[:12], error.message)
        return None
    if (report.subject.artifact_digest, report.verdict.outcome) != (validated.artifact_digest, validated.outcome):
        return None
    return validated.model_copy(update={"reason": report.verdict.reason, "figures": report.figures})


def _reuse(store: ArtifactStore, artifact: CompiledArtifact, attester: Attester) -> ValidatedArtifact:
    recorded = report_on(store, artifact.digest)
    waiting = report_on(store, artifact.digest, kind=WAITING) if recorded is None else None
    value = recorded or waiting
    if value is None:
        raise StepOffError(
            f"The validate step is off, and the store {store.uri} has no report on {artifact.digest[:12]}...",
            hint="Switch the validate step on.",
        )
    problem = ""
    if value.outcome == PENDING:
        problem = attester.lacks_pending(artifact.digest, value.report_digest)
    elif attester.requires_signature:
        problem = _lack(attester, value)
    reported = _as_reported(store, value)
    if problem or reported is None:
        raise StepOffError(
            f"The validate step is off, and the report on {artifact.digest[:12]} cannot be used: "
            f"{problem or 'its record differs from it'}.",
            hint="Switch the validate step on.",
        )
    value = reported
    return value.model_copy(update={"cached": True, "why": "the validate step is off"})
