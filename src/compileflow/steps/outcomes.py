"""Outcomes of requests, kept in the artifact store for a caller whose runs take place on other machines."""

from __future__ import annotations

import logging

from pydantic import BaseModel, ValidationError

from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.contracts.digests import json_digest
from compileflow.errors import CompileflowError
from compileflow.settings import Settings
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, fault_of, record_of
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult

logger = logging.getLogger(__name__)
_KIND = "outcome-of"


class _Error(BaseModel):
    type: str
    message: str
    hint: str = ""
    log_path: str = ""
    report_uri: str = ""


class _Outcome(BaseModel):
    result: CompileResult | None = None
    error: _Error | None = None


def put_outcome(
    request: CompileRequest, outcome: CompileResult | CompileflowError, run_id: str, settings: Settings
) -> None:
    """Keep the outcome of a run, signed if the run has a key."""
    if isinstance(outcome, CompileflowError):
        kept = _Outcome(error=_Error.model_validate(outcome.to_dict()))
    else:
        kept = _Outcome(result=outcome)
    store = _store(request, settings)
    store.put_record(_KIND, run_id, record_of(_key(request, run_id), kept, Attester.of(store, settings)))


def get_outcome(
    request: CompileRequest, run_id: str, settings: Settings
) -> CompileResult | CompileflowError | None:
    """Return the outcome of a run; None if it left none that can be used, for which the log gives the reason.

    A caller with a signing key uses only what a trusted key signed.
    """
    store = _store(request, settings)
    record = store.get_record(_KIND, run_id)
    if record is None:
        return None
    if fault := fault_of(record, _key(request, run_id), Attester.of(store, settings)):
        logger.warning("ignoring the outcome of the run %s: %s", run_id, fault)
        return None
    try:
        kept = _Outcome.model_validate(record["value"])
    except ValidationError:
        logger.warning("ignoring the outcome of the run %s: another version of compileflow wrote it", run_id)
        return None
    return kept.result if kept.error is None else CompileflowError.from_dict(kept.error.model_dump())


def _key(request: CompileRequest, run_id: str) -> CacheKey:
    return CacheKey(_KIND, run_id, {"run": run_id, "request": json_digest(request.model_dump(mode="json"))})


def _store(request: CompileRequest, settings: Settings) -> ArtifactStore:
    return open_store(settings.resolved_store_uri(request.store_uri), settings)
