"""The final race of target auto: all candidates that can be chosen, timed in turn with one common source model.

The latencies of their reports were measured at different times, each relative to another run of the source model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compileflow._process.folders import work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.open import open_artifact
from compileflow.catalog import open_store
from compileflow.serving.component import LoadedComponent
from compileflow.settings import Settings
from compileflow.source_model.load import load_source_model
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find_or_make
from compileflow.steps.component_calls import component_examples, component_shapes, timed_models, written_tokens
from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import MEASUREMENT_VERSION
from compileflow.steps.values import FetchedSource
from compileflow.stores.layout import split_uri
from compileflow.validation.measure import Latency, Stopwatch
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
STEP = "race"
_CHILD = "compileflow.steps.race:time_artifacts"
# Seconds for each model at each shape.
_BUDGET_S = 0.4


class RaceResult(BaseModel):
    """The latencies of each artifact, in the order of the artifacts. They are empty if the machine was busy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latencies: tuple[tuple[Latency, ...], ...]
    busy: str


def race(
    source: FetchedSource,
    artifact_uris: Sequence[str],
    request: CompileRequest,
    *,
    store_uri: str,
    settings: Settings,
) -> RaceResult:
    """Time artifacts of one source model in turn in a child process, or return the cached result.

    Raises:
        ProcessError: The child process died.
        CompileflowError: An artifact cannot be loaded, or fails.
    """
    store = open_store(store_uri, settings)
    digests = [split_uri(uri)[1] for uri in artifact_uris]
    parts = {"source model": source.digest, "artifacts": " ".join(digests), "threads": str(settings.threads)}
    parts |= {"shapes": str(request.validation.latency_shapes), "pairs": str(request.validation.latency_pairs)}
    parts |= {"measurement version": str(MEASUREMENT_VERSION)}
    key = CacheKey(STEP, source.uri, parts)

    def compute(reason: str) -> RaceResult:
        with ExitStack() as stack:
            work = stack.enter_context(work_folder(settings.work_dir, label=STEP))
            answer = run_in_child(
                _CHILD,
                {
                    "source_dir": str(stack.enter_context(store.open_folder(source.digest))),
                    "artifact_dirs": [str(stack.enter_context(store.open_folder(digest))) for digest in digests],
                    "validation": request.validation.model_dump(mode="json"),
                    "threads": settings.threads,
                    "trust_remote_code": request.trust_remote_code,
                },
                work_dir=work,
                log_path=settings.log_path(f"{STEP}-{key.digest[:12]}"),
                timeout_s=request.timeouts.validate_s,
                threads=settings.threads,
            ).value
        return RaceResult.model_validate(answer)

    return find_or_make(
        store,
        key,
        RaceResult,
        folders={},
        attester=Attester.of(store, settings),
        compute=compute,
        report_line=logger.debug,
        is_cacheable=lambda result: not result.busy,
    )[0]


def time_artifacts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Time the first component of each artifact at the shapes that all of them have. Runs in a child process."""
    import torch

    threads = int(request["threads"])
    torch.set_num_threads(threads)
    trust_remote_code = bool(request["trust_remote_code"])
    source_dir = Path(request["source_dir"])
    validation = ValidationSettings.model_validate(request["validation"])
    artifacts = [
        # They are signed when they are registered.
        open_artifact(folder, require_signature=False, trust_remote_code=trust_remote_code)
        for folder in request["artifact_dirs"]
    ]
    components = [
        LoadedComponent.load(artifact, component=artifact.manifest.spec.components[0].name, threads=threads)
        for artifact in artifacts
    ]
    source_model = load_source_model(
        source_dir, artifacts[0].manifest.spec.hf_task, trust_remote_code=trust_remote_code
    )
    examples = [component_examples(component.artifact, component.record, source_dir) for component in components]
    pairs = [timed_models(source_model, component) for component in components]
    models = [(examples[0], pairs[0][0]), *zip(examples, (candidate for _, candidate in pairs), strict=True)]
    shapes_by_artifact = [
        component_shapes(component.artifact, component.record, source_dir, validation) for component in components
    ]
    stopwatch = Stopwatch(threads)
    latencies: list[list[Latency]] = [[] for _ in components]
    for rows, length in shapes_by_artifact[0]:
        if any((rows, length) not in shapes for shapes in shapes_by_artifact):
            continue
        calls = [partial(run, example(rows, length)) for example, run in models]
        times, busy = stopwatch.time(calls, rounds=validation.latency_pairs, budget_s=_BUDGET_S * len(calls))
        if times is None or busy:
            return RaceResult(latencies=(), busy=busy).model_dump(mode="json")
        for position, rival in enumerate(latencies):
            latency = times.latency(f"{rows} x {length}", position + 1)
            rival.append(replace(latency, written_tokens=written_tokens(components[position])))
    for component in components:
        component.close()
    return RaceResult(latencies=tuple(map(tuple, latencies)), busy="").model_dump(mode="json")
