"""compile_matrix: a failing cell leaves the others alone, and the next run does only what is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from compileflow.catalog import open_registry
from compileflow.errors import CompileError, ProcessError, SpecError
from compileflow.selection.matrix import MatrixRequest, read_matrix
from compileflow.spec import HfTask
from compileflow.steps.request import CompileRequest
from flows.compile_matrix import compile_matrix, task_runner
from flows.one_run import run_one
from tests.conftest import ModelFactory
from tests.steps import BUCKETS, Pipeline


@pytest.mark.slow
def test_next_run_compiles_only_the_cells_that_failed(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    models = [tiny_model(HfTask.TEXT_CLASSIFICATION), tmp_path / "late"]
    shared: dict[str, Any] = {"shape_buckets": list(BUCKETS), "validation": {"latency_pairs": 5}}
    matrix = MatrixRequest(
        models=tuple(map(str, models)), targets=("torchscript",), precisions=("fp32", "int4"), shared=shared
    )
    state = compile_matrix(matrix, at_once=2, return_state=True)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, CompileError)
    assert error.message == "1 of 2 cells failed; 2 combinations do not exist."
    cells = read_matrix(error.report_uri, pipeline.settings).cells
    assert [cell.candidate.outcome for cell in cells] == ["pass", "unavailable", "error", "unavailable"]
    assert "is not a folder" in cells[2].error
    assert pipeline.counts == {"compile": 1, "validate": 1}

    shutil.copytree(tiny_model(HfTask.TOKEN_CLASSIFICATION), tmp_path / "late")
    state = compile_matrix(matrix, at_once=2, return_state=True)
    assert state.is_completed()
    assert state.message == "2 of 2 cells passed; 2 combinations do not exist"
    assert pipeline.counts == {"compile": 2, "validate": 2}
    versions = open_registry(pipeline.registry_uri).versions()
    assert [(version.name, version.version) for version in versions] == [("late", 1), (models[0].name, 1)]

    run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        (artifact,) = [entry for entry in client.read_artifacts() if entry.flow_run_id == run_id]
    assert str(artifact.data).startswith("# 2 of 2 cells passed")


@pytest.mark.slow
def test_cells_run_on_the_workers_of_a_dask_cluster(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    pytest.importorskip("prefect_dask", reason="prefect-dask is not installed")
    from distributed import LocalCluster

    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    shared: dict[str, Any] = {"shape_buckets": list(BUCKETS), "validation": {"latency_pairs": 5}}
    matrix = MatrixRequest(models=(str(model),), targets=("torchscript",), shared=shared)
    # The workers are threads, so that they share the compiles of the other tests; they talk over TCP all the same.
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        state = compile_matrix(matrix, dask=cluster.scheduler_address, return_state=True)
        assert state.message == "1 of 1 cells passed"
    (version,) = open_registry(pipeline.registry_uri).versions()
    assert version.name == model.name


def test_dask_cluster_without_prefect_dask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(SpecError, match="prefect-dask is not installed") as refused:
        task_runner(1, "tcp://127.0.0.1:8786")
    assert "compileflow[dask]" in refused.value.hint
    state = compile_matrix(
        MatrixRequest(models=("m",), targets=("openvino",)), dask="tcp://127.0.0.1:8786", return_state=True
    )
    assert state.message == str(refused.value)


def test_deployment_that_the_server_lacks_is_named(tmp_path: Path) -> None:
    error = run_one(CompileRequest(model=str(tmp_path)), "nope/nope")
    assert isinstance(error, ProcessError)
    assert error.message == "The Prefect server has no deployment nope/nope."
