"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.testing.shared import make_once, shared_folder
from tests.hub_server import Hub, serve_hub
from tests.models import build_model
from tests.services.moto_server import Moto, serve_moto, store_environment

os.environ["HF_HUB_OFFLINE"] = "1"
# Two tests run at once on a small machine; threads that spin for one another would only slow both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COMPILEFLOW_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

pytest_plugins = ["tests.leaks"]

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Build small models once a run: `tiny_model(task, architecture="bert")` gives a folder to read only."""
    root = shared_folder(tmp_path_factory)

    def build(hf_task: HfTask, architecture: str = "bert") -> Path:
        return make_once(
            root / f"{architecture}-{hf_task}",
            lambda folder: build_model(folder, hf_task, architecture=architecture),
        )

    return build


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose store, registry and work folder are below the test's own folder."""
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let huggingface_hub use the network in this test, and talk to 127.0.0.1 past any proxy."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(online: None) -> Iterator[Hub]:
    """A Hub on loopback that the real client talks to."""
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    """An S3 server on loopback, one for all tests of a worker."""
    with serve_moto(tmp_path_factory.mktemp("moto")) as served:
        yield served


@pytest.fixture
def bucket(moto: Moto, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; this process and those it starts find the server in their environment."""
    for name, value in store_environment(moto.url).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return moto.make_bucket(f"test-{uuid.uuid4().hex}")
