"""A run from a registered source version, with S3, Neptune and a Prefect block: all real servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.states import State
from prefect_aws import AwsCredentials
from prefect_aws.client_parameters import AwsClientParameters
from pydantic import SecretStr

from compileflow import CompiledPipeline
from compileflow.admin.lineage import lineage_of
from compileflow.catalog import open_registry, open_store
from compileflow.settings import get_settings
from compileflow.spec import HfTask
from compileflow.stores.layout import split_uri
from flows.compile_model import CompileResult, compile_model
from tests.conftest import ModelFactory
from tests.leaks import leaked
from tests.services import secrets
from tests.services.moto_server import Moto
from tests.services.neptune_writer import NeptuneWriter
from tests.steps import Pipeline

INPUTS = ["It arrived on time.", "It never came, and nobody answered.", "Good."]
CARD = {
    "model_params": {"huggingface_pipeline_task": "text-classification"},
    "model_artifact_attribute_path": "model/model_artifact",
    "model_test_files": {
        name: f"model/model_test_files/{name}" for name in ("inputs", "inference_params", "predictions")
    },
}


@pytest.fixture
def source_uri(
    neptune_client: NeptuneWriter, neptune_project: str, tiny_model: ModelFactory, tmp_path: Path
) -> str:
    """Register a source version as other teams do, with the real client and without compileflow."""
    from transformers import pipeline as of_transformers

    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    predictions = of_transformers("text-classification", model=str(model))(INPUTS)
    files = {f"model/model_artifact/{path.name}": str(path) for path in model.iterdir()}
    contents = {
        "model/model_card": CARD,
        "model/model_test_files/inputs": INPUTS,
        "model/model_test_files/inference_params": {},
        "model/model_test_files/predictions": predictions,
    }
    for attribute, value in contents.items():
        path = tmp_path / f"{attribute.rpartition('/')[2]}.json"
        path.write_text(json.dumps(value))
        files[attribute] = str(path)
    identity = neptune_client("make_version", neptune_project, "SRC", {}, files, {})
    return f"neptune://{neptune_project}/{identity}"


@pytest.fixture
def aws_block(moto: Moto) -> str:
    """Keep the credentials in a block of the Prefect server, and nowhere else."""
    name = f"test-{uuid4().hex[:8]}"
    AwsCredentials(
        aws_access_key_id=secrets.AWS_ACCESS_KEY_ID,
        aws_secret_access_key=SecretStr(secrets.AWS_SECRET_ACCESS_KEY),
        region_name="us-east-1",
        aws_client_parameters=AwsClientParameters(endpoint_url=moto.url),
    ).save(name, _sync=True)
    return name


def told_by(state: State[Any]) -> str:
    """Return all that a flow run left on the Prefect server: logs, parameters and Prefect artifacts."""
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
        run = client.read_flow_run(run_id)
        artifacts = [entry for entry in client.read_artifacts() if entry.flow_run_id == run_id]
    assert artifacts
    texts = [log.message for log in logs] + [str(entry.data) for entry in artifacts]
    return "\n".join([*texts, str(run.parameters), str(state.message)])


def test_run_from_a_registered_version_is_one_version_with_lineage_both_ways(
    pipeline: Pipeline,
    source_uri: str,
    aws_block: str,
    moto: Moto,
    neptune_client: NeptuneWriter,
    neptune_project: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = moto.make_bucket(f"test-{uuid4().hex}")
    neptune = f"neptune://{neptune_project}"
    request = pipeline.request(
        source_uri,
        name="reviews",
        validation={"latency_pairs": 5, "max_examples": 340},
        store_uri=f"s3://{bucket}/compileflow",
        registry_uris=[pipeline.registry_uri, neptune],
        aws_credentials_block=aws_block,
    )
    state = compile_model(request, return_state=True)
    result: CompileResult = state.result()
    assert list(result.versions) == [pipeline.registry_uri, neptune]
    assert result.validated is not None
    assert result.validated.figures["registered_disagreement"] == 0.0
    version = result.versions[neptune]
    assert (version.source_uri, version.verdict) == (source_uri, "pass")
    assert version.artifact_uri.startswith(f"s3://{bucket}/compileflow/manifests/")

    # Found by the real client, in a process that has never seen compileflow.
    complete = [key for key, whole in neptune_client("list_versions", neptune_project).items() if whole]
    (identity,) = complete
    registered = neptune_client("read_version", neptune_project, identity)
    assert registered["registry"]["digest"] == version.artifact_digest
    assert registered["source"]["uri"] == source_uri
    card = json.loads(neptune_client.file(neptune_project, identity, "model/model_card"))
    assert card["model_params"]["huggingface_pipeline_task"] == "text-classification"
    answers = json.loads(neptune_client.file(neptune_project, identity, card["model_test_files"]["predictions"]))
    assert len(answers) == len(INPUTS)
    listed_versions = json.loads(
        neptune_client.file(neptune_project, source_uri.rpartition("/")[2], "model/compiled_model_versions")
    )
    assert [entry["with_id"] for entry in listed_versions] == [identity]
    registry = open_registry(neptune)
    assert list(registry.compiled_from(source_uri)) == [version]
    lineage = lineage_of(registry, "reviews", version.version)
    assert (lineage.version.source_uri, lineage.siblings) == (source_uri, ())

    # Again: nothing is compiled, proven or registered anew.
    again: CompileResult = compile_model(request, return_state=True).result()
    assert again.versions == result.versions
    assert again.artifact.cached
    assert pipeline.counts == {"compile": 1, "validate": 1}
    assert [k for k, whole in neptune_client("list_versions", neptune_project).items() if whole] == complete

    # A service loads what is in production, from the registry and S3, once.
    registry.set_stage("reviews", version.version, "production", who="test")
    for name, value in {
        "COMPILEFLOW_S3_ENDPOINT_URL": moto.url,
        "COMPILEFLOW_S3_REGION": "us-east-1",
        "COMPILEFLOW_S3_ACCESS_KEY_ID": secrets.AWS_ACCESS_KEY_ID,
        "COMPILEFLOW_S3_SECRET_ACCESS_KEY": secrets.AWS_SECRET_ACCESS_KEY,
        "COMPILEFLOW_REGISTRY_URI": neptune,
    }.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    production_pipeline = CompiledPipeline.from_pretrained("registry:reviews@production")
    assert [answer["label"] for answer in production_pipeline(INPUTS)] == [answer["label"] for answer in answers]

    # No secret is in what the run left: not in Prefect, not in the store.
    texts_of_run = told_by(state).encode()
    assert leaked(texts_of_run, secrets.ALL) == []
    store_uri, _ = split_uri(version.artifact_uri)
    for digest in open_store(store_uri).list():
        with open_store(store_uri).open_folder(digest) as folder:
            for path in folder.rglob("*.*"):
                assert leaked(path.read_bytes(), secrets.ALL) == [], path
