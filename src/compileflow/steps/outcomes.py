"""Outcomes of requests, kept in the artifact store for a caller whose runs take place on other machines."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import CompileflowError
from compileflow.settings import Settings
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult

_KIND = "outcome-of"


def put_outcome(
    request: CompileRequest, outcome: CompileResult | CompileflowError, run_id: str, settings: Settings
) -> None:
    """Keep the outcome of a run."""
    if isinstance(outcome, CompileflowError):
        content: dict[str, Any] = {"error": outcome.to_dict()}
    else:
        content = {"result": outcome.model_dump(mode="json")}
    _store(request, settings).put_record(_KIND, run_id, content)


def get_outcome(
    request: CompileRequest, run_id: str, settings: Settings
) -> CompileResult | CompileflowError | None:
    """Return the outcome of a run; None if it left none, or if its worker has another version of compileflow."""
    record: dict[str, Any] = _store(request, settings).get_record(_KIND, run_id) or {}
    error = record.get("error")
    if isinstance(error, dict) and {"type", "message"} <= error.keys():
        return CompileflowError.from_dict(error)
    try:
        return CompileResult.model_validate(record.get("result"))
    except ValidationError:
        return None


def _store(request: CompileRequest, settings: Settings) -> ArtifactStore:
    return open_store(settings.resolved_store_uri(request.store_uri), settings)
