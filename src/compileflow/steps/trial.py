"""The first round of target auto: each artifact answers the natural examples and is timed in a few calls.

A trial is not a proof: it says which artifacts are worth a validation, and which cannot be chosen after one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compileflow._process.child_process import report_progress
from compileflow._process.folders import work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import open_artifact
from compileflow.catalog import open_store
from compileflow.errors import first_line
from compileflow.serving.component import LoadedComponent
from compileflow.settings import Settings
from compileflow.source_model.load import load_source_model
from compileflow.spec import HfTask
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find_or_make
from compileflow.steps.proof import Proof
from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import IMPORTS, key_parts
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.judge.early import EarlyOutcome
from compileflow.validation.measure import Latency, Measurements
from compileflow.validation.reference_answers import ReferenceAnswers, reference_key
from compileflow.validation.registered_tests import read_registered_tests
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.whole_artifact import WholeArtifact

logger = logging.getLogger(__name__)
STEP = "trial"
_CHILD = "compileflow.steps.trial:try_artifacts"
# Pairs of calls that are timed at each shape.
_PAIRS = 7


class Trial(BaseModel):
    """What the first round measured of one artifact. An artifact that could not be tried has neither.

    Attributes:
        latencies: Latency at each shape.
        figures: Figures of the answers to the natural examples, as in a report.
        outcome: Verdict that a validation cannot improve; "" if the artifact may pass.
        reason: Reason of the outcome, or why the artifact could not be tried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latencies: tuple[Latency, ...] = ()
    figures: dict[str, float] = {}
    outcome: EarlyOutcome = ""
    reason: str = ""


class Trials(BaseModel):
    """The trials of several artifacts, in the order of the artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: tuple[Trial, ...]


def try_compiled(
    source: FetchedSource,
    artifacts: Sequence[CompiledArtifact],
    request: CompileRequest,
    *,
    store_uri: str,
    settings: Settings,
    on_progress: Callable[[str], None] = logger.info,
) -> tuple[Trial, ...]:
    """Try artifacts of one source model one after the other in a child process, or return the cached trials.

    Raises:
        ProcessError: The child process died.
        CompileflowError: The source model cannot be loaded, or the examples cannot be used.
    """
    store = open_store(store_uri, settings)
    with ExitStack() as stack:
        folders = [stack.enter_context(store.open_folder(artifact.digest)) for artifact in artifacts]
        source_dir = stack.enter_context(store.open_folder(source.digest))
        tests_dir = None
        if source.test_files_digest is not None:
            tests_dir = stack.enter_context(store.open_folder(source.test_files_digest))
        hf_task = read_manifest(folders[0]).hf_task
        parts = key_parts(source, artifacts, None, request.validation, hf_task, {})
        key = CacheKey(STEP, source.uri, parts | {"threads": str(settings.threads)})

        def compute(reason: str) -> Trials:
            with work_folder(settings.work_dir, label=STEP) as work:
                answer = run_in_child(
                    _CHILD,
                    {
                        "source_dir": str(source_dir),
                        "source_digest": source.digest,
                        "reference_dir": str(settings.reference_dir),
                        "tests_dir": str(tests_dir) if tests_dir else None,
                        "hf_task": hf_task.value,
                        "artifact_dirs": [str(folder) for folder in folders],
                        "validation": request.validation.model_dump(mode="json"),
                        "threads": settings.threads,
                        "trust_remote_code": request.trust_remote_code,
                    },
                    work_dir=work,
                    log_path=settings.log_path(f"{STEP}-{key.digest[:12]}"),
                    timeout_s=request.timeouts.validate_s,
                    threads=settings.threads,
                    imports=IMPORTS,
                    on_progress=on_progress,
                ).value
            return Trials.model_validate(answer)

        return find_or_make(
            store,
            key,
            Trials,
            folders={},
            attester=Attester.of(store, settings),
            compute=compute,
            report_line=logger.debug,
            is_cacheable=lambda found: (
                not any(latency.busy for trial in found.trials for latency in trial.latencies)
            ),
        )[0].trials


def try_artifacts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Try the first component of each artifact, with one source model for all. Runs in a child process."""
    import torch

    threads = int(request["threads"])
    torch.set_num_threads(threads)
    trust_remote_code = bool(request["trust_remote_code"])
    source_dir = Path(request["source_dir"])
    validation = ValidationSettings.model_validate(request["validation"])
    hf_task = HfTask(request["hf_task"])
    source_model = load_source_model(source_dir, hf_task, trust_remote_code=trust_remote_code)
    answers = ReferenceAnswers(
        Path(request["reference_dir"]),
        reference_key(
            source_model, source_digest=request["source_digest"], hf_task=hf_task.value, threads=threads
        ),
        report=report_progress,
    )
    tests = read_registered_tests(Path(request["tests_dir"])) if request["tests_dir"] else None
    trials = []
    folders = request["artifact_dirs"]
    for number, folder in enumerate(folders, start=1):
        try:
            # It is signed when it is registered.
            artifact = open_artifact(folder, require_signature=False, trust_remote_code=trust_remote_code)
            artifact.check_code()
            spec = artifact.manifest.spec
            report_progress(f"{number} of {len(folders)}: {spec.target} {spec.precision.value}")
            proof = Proof(
                source_model=source_model,
                whole_artifact=WholeArtifact(artifact, source_dir, validation.examples_path),
                artifact_uri="",
                requested=spec,
                validation=validation,
                user_suite=None,
                answers=answers,
                tests=tests,
                project_tests=None,
                shared=Measurements(),
                threads=threads,
                bundle_dir=Path(),
            )
            component = LoadedComponent.load(artifact, component=spec.components[0].name, threads=threads)
            try:
                measurements, outcome, reason = proof.try_out(component, pairs=_PAIRS)
            finally:
                component.close()
        except Exception as error:  # noqa: BLE001 - the validation judges what an artifact raises
            trials.append(Trial(reason=f"{type(error).__name__}: {first_line(error)}"))
            continue
        figures = measurements.figures()
        latencies = tuple(measurements.latencies)
        trials.append(Trial(latencies=latencies, figures=figures, outcome=outcome, reason=reason))
    return Trials(trials=tuple(trials)).model_dump(mode="json")
