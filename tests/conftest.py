"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compileflow._process.child_process import skip_slow_grammar
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.testing.shared import make_once, shared_folder
from compileflow.validation.cases import raw
from compileflow.validation.measure import latency
from tests.functional.prefect_server import PrefectServer, shared_server
from tests.hub_server import Hub, serve_hub
from tests.in_process import InProcess
from tests.models import build_model
from tests.services.moto_server import Moto, serve_moto, store_environment
from tests.services.neptune import Neptune, serve_neptune
from tests.services.neptune_writer import NeptuneWriter, neptune_writer
from tests.signal_stack import give_up_signal_stack
from tests.smollm2 import SmolLM2
from tests.steps import Pipeline

skip_slow_grammar()
os.environ["HF_HUB_OFFLINE"] = "1"
# Two tests run at once on a small machine; threads that spin for one another would only slow both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COMPILEFLOW_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Native code of small models need not be fast; the compiler takes most of the time of a test with aot-inductor.
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"
# The library readline sets it in the process that starts pytest's workers.
os.environ.pop("COLUMNS", None)

pytest_plugins = ["tests.leaks"]

ModelFactory = Callable[..., Path]


@pytest.fixture(autouse=True)
def handled_signals() -> None:
    """Let a test handle signals, whatever was compiled in this process before."""
    give_up_signal_stack()


@pytest.fixture(scope="session", autouse=True)
def short_validations() -> Iterator[None]:
    """Shorten validations in this process; those in child processes take the time that they take for users.

    Two tests run at once, so that waiting for a quiet machine is in vain.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latency, "_PATIENCE_S", 0.0)
        patched.setattr(raw, "_TEXTS", 1000)
        yield


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


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    """Compile and validate without child processes; all workers of the run share what they compile."""
    return InProcess(shared_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def smollm2(in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> SmolLM2:
    """A real model that writes text, for slow tests."""
    return SmolLM2(shared_folder(tmp_path_factory), in_process)


@pytest.fixture(scope="module")
def file_home(in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One local cache for all tests of a file. Compiles run in this process unless a test says otherwise."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched, in_process.instead_of_children():
        patched.setenv("COMPILEFLOW_HOME", str(folder))
        get_settings.cache_clear()
        yield folder
    get_settings.cache_clear()


@pytest.fixture
def pipeline(settings: Settings, in_process: InProcess) -> Iterator[Pipeline]:
    """The four steps in this process, with the test's own store and registry."""
    with in_process.pipeline(settings) as steps:
        yield steps


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose store, registry and work folder are below the test's own folder."""
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server on loopback, one for the whole run: each start would take half a minute."""
    with shared_server(shared_folder(tmp_path_factory) / "prefect-server") as running:
        yield running


@pytest.fixture
def flows_on_server(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `python -m flows`, started by this test, use that server instead of starting one of its own."""
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.setenv(name, prefect_server.environment[name])


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


@pytest.fixture(scope="session")
def neptune_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neptune]:
    """A Neptune-compatible server on loopback, one for all tests of a worker."""
    with serve_neptune(tmp_path_factory.mktemp("neptune") / "server") as running:
        yield running


@pytest.fixture(scope="session")
def neptune_client(neptune_server: Neptune, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeptuneWriter]:
    """The real client in a process of its own, without compileflow, one for all tests of a worker."""
    with neptune_writer(neptune_server.environment, tmp_path_factory.mktemp("neptune-client")) as running:
        yield running


@pytest.fixture
def neptune_project(neptune_server: Neptune, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """A project of its own, "workspace/name"; this process and those it starts find the token."""
    for name, value in neptune_server.environment.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return neptune_server.project()


@pytest.fixture
def wheel_without_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In processes that this test starts, compileflow is an unpacked wheel, and `import prefect` fails."""
    build = ("hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    subprocess.run(
        [sys.executable, "-m", *build], cwd=Path(__file__).parents[1], check=True, capture_output=True, timeout=60
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "prefect.py").write_text('raise ImportError("Prefect is not installed")\n')
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site
