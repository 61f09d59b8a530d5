"""A run from the Hub: the commit is pinned and downloaded once, and the token is stored nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from compileflow.catalog import open_registry
from compileflow.errors import SourceError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.hub_server import Hub
from tests.in_process import InProcess
from tests.services.secrets import HF_TOKEN as TOKEN
from tests.steps import Pipeline

REPOSITORY = "owner/reviews"


@pytest.fixture
def files(tiny_model: ModelFactory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_model(HfTask.TEXT_CLASSIFICATION).iterdir()}


@pytest.fixture
def hub_settings(settings: Settings, hub: Hub) -> Settings:
    return Settings(home=settings.home, hub_endpoint=hub.endpoint, hub_token=SecretStr(TOKEN))


def test_run_from_the_hub_registers_the_commit_and_leaves_no_token(
    hub: Hub, hub_settings: Settings, files: dict[str, bytes], in_process: InProcess
) -> None:
    hub.token = TOKEN
    commit = hub.add(REPOSITORY, files, gated=True)
    with in_process.pipeline(hub_settings) as pipeline:
        version = pipeline.run(pipeline.request(Path(REPOSITORY)))
    assert (version.name, version.source_uri) == ("reviews", f"hf://{REPOSITORY}")
    assert version.source_revision == commit
    assert open_registry(pipeline.registry_uri).get("reviews", 1) == version
    paths = [path for path in hub_settings.home_dir.rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert not [path for path in paths if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "\n".join(pipeline.lines)


def test_commit_is_downloaded_once_and_a_new_one_is_seen(
    hub: Hub, hub_settings: Settings, files: dict[str, bytes]
) -> None:
    hub.add(REPOSITORY, files)
    pipeline = Pipeline(hub_settings)
    first = pipeline.fetch(pipeline.request(Path(REPOSITORY)))
    hub.requests.clear()
    again = pipeline.fetch(pipeline.request(Path(REPOSITORY)))
    assert (again.digest, again.cached) == (first.digest, True)
    assert not hub.downloaded()

    settings = json.loads(files["config.json"]) | {"classifier_dropout": 0.5}
    commit = hub.add(REPOSITORY, files | {"config.json": json.dumps(settings).encode()})
    second = pipeline.fetch(pipeline.request(Path(REPOSITORY)))
    assert (second.revision, second.cached) == (commit, False)
    assert any(line.startswith("not cached: changed: commit") for line in pipeline.lines)


def test_truncated_download_is_refused_and_nothing_is_stored(
    hub: Hub, hub_settings: Settings, files: dict[str, bytes]
) -> None:
    hub.add(REPOSITORY, files | {"model.safetensors": files["model.safetensors"][:-100]})
    pipeline = Pipeline(hub_settings)
    with pytest.raises(SourceError, match=r"model\.safetensors is truncated"):
        pipeline.fetch(pipeline.request(Path(REPOSITORY)))
    assert not list((hub_settings.home_dir / "store").rglob("manifests/sha256/*"))
    assert not list(hub_settings.work_dir.iterdir())
