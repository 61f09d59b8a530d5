"""The outcome of a run on another machine: kept, signed, and believed only about the request of that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_store
from compileflow.errors import CompileError, CompileflowError
from compileflow.settings import Settings
from compileflow.steps.outcomes import get_outcome, put_outcome
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from compileflow.steps.values import FetchedSource
from tests.unit.attested_artifacts import make_keys

REQUEST = CompileRequest(model="/srv/model", target="openvino")
SOURCE = FetchedSource(
    uri="file:///srv/model", revision="5" * 64, stored_uri="", digest="5" * 64, size_bytes=1, cached=False
)
RESULT = CompileResult.of(REQUEST, SOURCE)
ERROR = CompileError("The toolchain refused the model.", hint="Choose another target.", report_uri="file:///r")


@pytest.mark.parametrize("outcome", [RESULT, ERROR])
@pytest.mark.parametrize("signs", [True, False])
def test_caller_gets_what_the_run_left(
    settings: Settings, tmp_path: Path, outcome: CompileResult | CompileflowError, signs: bool
) -> None:
    if signs:
        settings = settings.model_copy(update={"signing_key": make_keys(tmp_path).private})
    assert get_outcome(REQUEST, "r-1", settings) is None
    put_outcome(REQUEST, outcome, "r-1", settings)
    found = get_outcome(REQUEST, "r-1", settings)
    if isinstance(outcome, CompileResult):
        assert found == outcome
    else:
        assert isinstance(found, CompileError)
        assert found.to_dict() == outcome.to_dict()
    assert get_outcome(REQUEST.model_copy(update={"model": "/srv/other"}), "r-1", settings) is None


def test_outcome_that_no_trusted_key_signed_is_not_believed(settings: Settings, tmp_path: Path) -> None:
    put_outcome(REQUEST, RESULT, "r-1", settings)
    signing = settings.model_copy(update={"signing_key": make_keys(tmp_path).private})
    assert get_outcome(REQUEST, "r-1", signing) is None


@pytest.mark.parametrize(
    "record", [{"error": {"type": ["x"], "message": {}}}, {"result": RESULT.model_dump(mode="json")}, {"value": 5}]
)
def test_record_that_no_run_wrote_is_ignored(settings: Settings, record: dict[str, Any]) -> None:
    open_store(settings.resolved_store_uri(), settings).put_record("outcome-of", "r-1", record)
    assert get_outcome(REQUEST, "r-1", settings) is None
