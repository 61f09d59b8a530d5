"""Pipeline: the four steps of the library with one set of settings, and what tests want to know about a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compileflow.contracts import ModelVersion
from compileflow.settings import Settings
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.register import register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact

BUCKETS = ({"batch_size": 1, "sequence_length": 16}, {"batch_size": 1, "sequence_length": 64})


@dataclass
class Pipeline:
    """The four steps with one set of settings.

    Attributes:
        settings: Settings of all steps.
        counts: Number of compiles and validations; the fixture `in_process` counts them.
        lines: Progress lines of all steps.
    """

    settings: Settings
    counts: dict[str, int] = field(default_factory=lambda: {"compile": 0, "validate": 0})
    lines: list[str] = field(default_factory=list)

    @property
    def store_uri(self) -> str:
        return self.settings.resolved_store_uri()

    @property
    def registry_uri(self) -> str:
        return self.settings.resolved_registry_uri()

    def request(self, model: Path | str, **fields: Any) -> CompileRequest:
        defaults = {"target": "torchscript", "shape_buckets": BUCKETS, "validation": {"latency_pairs": 5}}
        return CompileRequest.model_validate(defaults | {"model": str(model)} | fields)

    def fetch(self, request: CompileRequest) -> FetchedSource:
        return fetch_source(
            request.model,
            request.revision,
            store_uri=self.store_uri,
            settings=self.settings,
            enabled=request.steps.fetch,
            on_progress=self.lines.append,
        )

    def compile(self, request: CompileRequest) -> CompiledArtifact:
        return compile_artifact(
            self.fetch(request),
            request,
            store_uri=self.store_uri,
            settings=self.settings,
            enabled=request.steps.compile,
            on_progress=self.lines.append,
        )

    def validate(self, request: CompileRequest, artifact: CompiledArtifact) -> ValidatedArtifact:
        return validate_artifact(
            self.fetch(request),
            artifact,
            request.validation,
            store_uri=self.store_uri,
            settings=self.settings,
            timeout_s=600,
            request=request,
            enabled=request.steps.validate,
            on_progress=self.lines.append,
        )

    def run(self, request: CompileRequest) -> ModelVersion:
        artifact = self.compile(request)
        return register_version(
            self.fetch(request),
            artifact,
            self.validate(request, artifact),
            name=request.name,
            allow_warn=request.allow_warn,
            store_uri=self.store_uri,
            registry_uri=self.registry_uri,
            settings=self.settings,
        )
