"""MLflow: the suite for all registries, on a SQLite file and over HTTP, and the cases that only MLflow has."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compileflow.catalog import get_source, open_registry
from compileflow.contracts import ModelRegistry
from compileflow.errors import RegistryError, RegistryUnavailableError, SpecError
from compileflow.registries.mlflow import client as mlflow_client
from compileflow.registries.mlflow.client import parse_place
from compileflow.registries.mlflow.files import NAME
from compileflow.registries.mlflow.tags import ARCHIVED, DIGEST, entry_tags
from compileflow.settings import Settings, get_settings
from compileflow.testing.registries import (
    ARTIFACT_FILES,
    REPORT_FILES,
    TEST_FILES,
    RegistryConformance,
    files_below,
    version_entry,
    version_files,
)
from tests.conformance.promotion import check_promotion_needs_the_artifact
from tests.services.fault_proxy import Answer, CutResponse, FaultProxy, Hang, LoseReply
from tests.services.http_server import serving
from tests.services.mlflow import MlflowServer, migrated_file, serve_mlflow
from tests.services.secrets import MLFLOW_PASSWORD

BOUND_S = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    database = migrated_file(tmp_path_factory, tmp_path_factory.mktemp("mlflow") / "mlflow.db")
    with serve_mlflow(database) as served:
        yield served


@pytest.fixture
def file_uri(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, settings: Settings) -> str:
    return f"mlflow:sqlite:///{migrated_file(tmp_path_factory, tmp_path / 'mlflow.db')}"


class TestMlflowServer(RegistryConformance):
    @pytest.fixture
    def registry_uri(self, server: MlflowServer, settings: Settings) -> str:
        server.empty()
        return f"mlflow:{server.url}"


class TestMlflowFile(RegistryConformance):
    @pytest.fixture
    def registry_uri(self, file_uri: str) -> str:
        return file_uri


@pytest.fixture
def registry(file_uri: str) -> ModelRegistry:
    return open_registry(file_uri)


def test_promotion_needs_the_artifact(file_uri: str, settings: Settings) -> None:
    check_promotion_needs_the_artifact(file_uri, settings)


@pytest.fixture
def proxy(server: MlflowServer, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stand between client and server; a call has two tries of at most a second each."""
    server.empty()
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    for name, value in limits.items():
        monkeypatch.setitem(mlflow_client.LIMITS, name, value)
    with FaultProxy(server.url) as proxy:
        yield proxy


def raw(uri: str) -> Any:
    """Return a block with MLflow's own client, for changes that bypass the registry."""
    return parse_place(uri).calls("test", refused=RegistryError, unavailable=RegistryUnavailableError)


def test_promotion_that_cannot_be_read_is_one_line(registry: ModelRegistry, file_uri: str) -> None:
    registry.register(version_entry("ner", 1))
    for number, value in enumerate(("[" * 2000, '{"at": 5}', "no JSON")):
        with raw(file_uri) as client:
            client.set_model_version_tag("ner", "1", f"compileflow.promotion.{number}", value)
        with pytest.raises(RegistryError, match="has a promotion that this compileflow cannot read"):
            registry.promotions("ner", 1)
        with raw(file_uri) as client:
            client.delete_model_version_tag("ner", "1", f"compileflow.promotion.{number}")
    assert registry.promotions("ner", 1) == []


def test_small_files_are_kept_and_weights_are_not(
    server: MlflowServer, settings: Settings, tmp_path: Path
) -> None:
    server.empty()
    uri = f"mlflow:{server.url}"
    entry = version_entry("ner", 1).model_copy(update={"flow_run_id": "brave-fox"})
    open_registry(uri).register(entry, version_files(tmp_path / "given"))
    with raw(uri) as client:
        version = client.get_model_version("ner", "1")
        assert client.get_run(version.run_id).info.run_name == "brave-fox"
        (tmp_path / "out").mkdir()
        out = client.download_artifacts(version.run_id, "", str(tmp_path / "out"))
    expected = {f"report/{name}": body for name, body in REPORT_FILES.items()}
    expected |= {f"test_files/{name}": body for name, body in TEST_FILES.items()}
    assert files_below(Path(out)) == expected | {"manifest.json": ARTIFACT_FILES["manifest.json"]}


def test_logged_model_folder_is_fetched_over_http(
    server: MlflowServer, settings: Settings, tmp_path: Path
) -> None:
    server.empty()
    uri = f"mlflow:{server.url}"
    logged = tmp_path / "model"
    logged.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (logged / name).write_bytes(name.encode() * 1000)
    with raw(uri) as client:
        run = client.create_run(client.create_experiment("training"))
        # Not a path, which client and server would share in a test: the files below come from the server.
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        client.log_artifacts(run.info.run_id, str(logged), "logged")
        client.create_registered_model("src")
        client.create_model_version("src", source=f"{run.info.artifact_uri}/logged", run_id=run.info.run_id)
    located = get_source("mlflow", settings).locate(f"{uri}#src@1", None, tmp_path / "work")
    assert {name: (located.folder / name).read_bytes() for name in located.files} == files_below(logged)


def test_two_versions_that_a_race_made_are_seen_and_left_as_one(registry: ModelRegistry, file_uri: str) -> None:
    first = registry.register(version_entry("ner", 1))
    registry.register(version_entry("ner", 2))
    with raw(file_uri) as client:
        client.create_model_version("ner", source="elsewhere", tags=entry_tags(version_entry("ner", 1)))
    assert [version.version for version in registry.versions("ner")] == [2, 1]
    assert list(registry.find(first.artifact_digest)) == [first]
    assert registry.register(version_entry("ner", 1)) == first
    with raw(file_uri) as client:
        assert sorted(int(version.version) for version in client.search_model_versions("name = 'ner'")) == [1, 2]
    assert registry.register(version_entry("ner", 3)).version == 4


def test_repeated_version_that_names_another_model_costs_that_model_nothing(
    registry: ModelRegistry, file_uri: str
) -> None:
    first = registry.register(version_entry("ner", 1))
    for number in (2, 3):
        registry.register(version_entry("other", number))
    forged = version_entry("ner", 1).model_copy(update={"name": "other"})
    with raw(file_uri) as client:
        client.create_model_version("ner", source="elsewhere", tags=entry_tags(forged))
    assert registry.register(version_entry("ner", 1)) == first
    assert [version.version for version in registry.versions("other")] == [2, 1]
    assert [version.version for version in registry.versions("ner")] == [1]


def test_run_that_a_killed_call_left_is_used(registry: ModelRegistry, file_uri: str) -> None:
    version = registry.register(version_entry("ner", 1))
    with raw(file_uri) as client:
        run_id = client.get_model_version("ner", "1").run_id
        client.delete_model_version("ner", "1")
    completed = registry.register(version_entry("ner", 1))
    assert completed.entry == version.entry
    with raw(file_uri) as client:
        assert client.get_model_version("ner", str(completed.version)).run_id == run_id


def test_what_others_registered_is_left_out(registry: ModelRegistry, file_uri: str) -> None:
    with raw(file_uri) as client:
        for name in ("theirs", "ner"):
            client.create_registered_model(name)
            client.create_model_version(name, source="elsewhere", tags={"hf_task": "token-classification"})
    version = registry.register(version_entry("ner", 1))
    assert version.version == 2
    assert list(registry.versions()) == list(registry.versions("ner")) == [version]
    with pytest.raises(RegistryError, match="'theirs'"):
        registry.versions("theirs")


def test_promotion_that_was_cut_short_is_completed_by_the_next(registry: ModelRegistry, file_uri: str) -> None:
    for n in (1, 2):
        registry.register(version_entry("ner", n))
        registry.set_stage("ner", n, "staging", who="ann")
    registry.set_stage("ner", 1, "production", who="ann")
    # The state after a kill just before the alias moves: both promotions are recorded, production is unchanged.
    with raw(file_uri) as client:
        client.delete_registered_model_alias("ner", "production")
    registry.set_stage("ner", 2, "production", who="bob", reason="better")
    with raw(file_uri) as client:
        client.set_registered_model_alias("ner", "production", "1")
        client.set_model_version_tag("ner", "1", ARCHIVED, "true")
    assert registry.get("ner", "production").version == 1
    registry.set_stage("ner", 2, "production", who="bob", reason="better")
    assert [version.stage for version in registry.versions("ner")] == ["production", "archived"]
    assert [change.who for change in registry.promotions("ner", 2)] == ["ann", "bob"]


def test_aliases_that_someone_moved_in_mlflow_count(registry: ModelRegistry, file_uri: str) -> None:
    for n in (1, 2):
        registry.register(version_entry("ner", n))
    registry.set_stage("ner", 1, "production", who="ann")
    with raw(file_uri) as client:
        client.set_registered_model_alias("ner", "production", "2")
        client.set_registered_model_alias("ner", "champion", "1")
    assert [version.stage for version in registry.versions("ner")] == ["production", "none"]


def test_tags_that_someone_changed_are_one_clear_error(registry: ModelRegistry, file_uri: str) -> None:
    registry.register(version_entry("ner", 1))
    with raw(file_uri) as client:
        client.set_model_version_tag("ner", "1", "compileflow.entry.0000", '{"name": "ner"}')
    with pytest.raises(RegistryError, match="ner 1 in MLflow does not hold an entry") as caught:
        registry.versions("ner")
    assert "\n" not in str(caught.value)


def test_process_forked_during_a_call_can_call() -> None:
    is_locked, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with mlflow_client._ONE_AT_A_TIME:
            is_locked.set()
            is_over.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    is_locked.wait(10)
    child = os.fork()
    if not child:
        os._exit(0 if mlflow_client._ONE_AT_A_TIME.acquire(timeout=1) else 1)
    status = os.waitpid(child, 0)[1]
    is_over.set()
    thread.join()
    assert status == 0


def test_reading_an_absent_file_does_not_make_one(settings: Settings, tmp_path: Path) -> None:
    assert list(open_registry(f"mlflow:sqlite:///{tmp_path / 'absent.db'}").versions()) == []
    assert not (tmp_path / "absent.db").exists()


def test_file_that_is_no_database_is_one_clear_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError, match="not a database") as caught:
        open_registry(f"mlflow:sqlite:///{tmp_path / 'mlflow.db'}").versions()
    assert not caught.value.retryable


def test_nothing_of_the_process_is_changed_by_a_call(
    registry: ModelRegistry, capfd: pytest.CaptureFixture[str]
) -> None:
    before, levels = dict(os.environ), [logging.getLogger(name).level for name in ("", "mlflow", "alembic")]
    registry.register(version_entry("ner", 1))
    with pytest.raises(RegistryError):
        registry.versions("absent")
    assert dict(os.environ) == before
    assert [logging.getLogger(name).level for name in ("", "mlflow", "alembic")] == levels
    assert capfd.readouterr() == ("", "")


def test_limits_that_someone_set_are_kept(file_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with raw(file_uri):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        retries = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    assert retries == mlflow_client.LIMITS["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]


def test_missing_client_says_what_to_install(file_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    with pytest.raises(RegistryError, match="not installed") as caught:
        open_registry(file_uri).versions()
    assert "compileflow[mlflow]" in caught.value.hint


@pytest.mark.parametrize(
    "uri",
    ["mlflow:", "mlflow:http://", "mlflow:ftp://host", "mlflow:sqlite:///relative.db", "mlflow:http://h:port"],
)
def test_uri_that_names_no_mlflow_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="Expected the URI of an MLflow server or file") as caught:
        open_registry(uri)
    assert "mlflow:sqlite:////absolute" in caught.value.hint


def test_server_that_is_down_is_one_line_within_its_bound(settings: Settings) -> None:
    registry = open_registry(f"mlflow:http://ann:{MLFLOW_PASSWORD}@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError, match=r"MLflow at http://127.0.0.1:9 could not") as caught:
        registry.register(version_entry("ner", 1))
    assert time.monotonic() - started < BOUND_S
    assert "Connection refused" in str(caught.value)
    assert MLFLOW_PASSWORD not in registry.uri + repr(registry.__dict__) + str(caught.getrepr())


def test_server_that_hangs_is_left_within_its_bound(proxy: FaultProxy) -> None:
    proxy.inject(Hang(30), path="model-versions/search", times=2)
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError, match="imed out"):
        open_registry(f"mlflow:{proxy.url}").register(version_entry("ner", 1))
    assert time.monotonic() - started < BOUND_S
    assert open_registry(f"mlflow:{proxy.url}").register(version_entry("ner", 1)).version == 1


@pytest.mark.parametrize(
    "path", ["registered-models/create", "runs/create", "model-versions/create", "model-versions/search"]
)
def test_lost_reply_leaves_one_version(proxy: FaultProxy, path: str) -> None:
    proxy.inject(LoseReply(), path=path)
    registry = open_registry(f"mlflow:{proxy.url}")
    version = registry.register(version_entry("ner", 1))
    assert list(registry.versions("ner")) == [version]
    with raw(f"mlflow:{proxy.url}") as client:
        assert [int(item.version) for item in client.search_model_versions("name = 'ner'")] == [version.version]


def test_server_that_fails_half_way_is_completed_by_the_next_call(proxy: FaultProxy, tmp_path: Path) -> None:
    registry = open_registry(f"mlflow:{proxy.url}")
    files = version_files(tmp_path / "given")
    proxy.inject(Answer(503), path="report.html", times=2)
    with pytest.raises(RegistryUnavailableError, match="503"):
        registry.register(version_entry("ner", 1), files)
    assert list(registry.versions()) == []
    version = registry.register(version_entry("ner", 1), files)
    assert list(registry.versions("ner")) == [version]
    with raw(f"mlflow:{proxy.url}") as client:
        runs = client.search_runs([client.get_experiment_by_name("compileflow").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_reply_that_is_cut_off_may_be_asked_for_again(proxy: FaultProxy) -> None:
    registry = open_registry(f"mlflow:{proxy.url}")
    version = registry.register(version_entry("ner", 1))
    proxy.inject(CutResponse(20), path="model-versions/search")
    # MLflow's client retries only while the server has not started a reply.
    with pytest.raises(RegistryUnavailableError) as caught:
        registry.versions("ner")
    assert caught.value.retryable
    assert list(registry.versions("ner")) == [version]


@pytest.mark.parametrize(("status", "hint"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "Ask the owner")])
def test_refused_credentials_are_not_tried_again_and_not_shown(proxy: FaultProxy, status: int, hint: str) -> None:
    proxy.inject(Answer(status, b"no"), times=10)
    registry = open_registry(f"mlflow:{proxy.url.replace('//', f'//ann:{MLFLOW_PASSWORD}@')}")
    with pytest.raises(RegistryError, match=str(status)) as caught:
        registry.versions()
    assert not caught.value.retryable
    assert hint in caught.value.hint
    assert len(proxy.seen) == 1
    assert MLFLOW_PASSWORD not in json.dumps(caught.value.to_dict()) + str(caught.getrepr())


class Headers(BaseHTTPRequestHandler):
    """Refuses each request and keeps what it says about its sender."""

    seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers["Authorization"])
        self.send_response(403)
        self.end_headers()


@pytest.fixture
def stranger(settings: Settings) -> Iterator[str]:
    """A server that MLflow's client would tell who it is."""
    Headers.seen.clear()
    with serving(Headers) as url:
        yield url


@pytest.mark.parametrize(
    ("kind", "variable", "value"),
    [
        ("token", "MLFLOW_TRACKING_URI", "{url}/prefix"),
        ("password", "COMPILEFLOW_REGISTRY_URI", "sqlite:////r.db, mlflow:{url}"),
        ("file", "MLFLOW_TRACKING_URI", "{url}"),
        ("token", "MLFLOW_TRACKING_URI", "databricks"),
        ("password", "COMPILEFLOW_REGISTRY_URI", "mlflow:http://127.0.0.1:1"),
        ("file", "MLFLOW_TRACKING_URI", "http://mlflow.internal"),
    ],
)
def test_credentials_go_only_to_a_server_of_the_settings(
    stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str, value: str
) -> None:
    """The URI may come from a file that a stranger wrote; MLflow's client sends its variables to any host."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if kind == "token":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a token")
    else:
        values = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "a password"}
        for name, text in values.items() if kind == "password" else ():
            monkeypatch.setenv(name, text)
        if kind == "file":
            (tmp_path / ".mlflow").mkdir()
            lines = "".join(f"{name.lower()} = {text}\n" for name, text in values.items())
            (tmp_path / ".mlflow" / "credentials").write_text(f"[mlflow]\n{lines}")
    monkeypatch.setenv(variable, value.format(url=stranger))
    get_settings.cache_clear()
    with pytest.raises(RegistryError):
        open_registry(f"mlflow:{stranger}").versions()
    (authorization,) = Headers.seen
    expected = "Bearer" if kind == "token" else "Basic"
    assert (authorization or "none").split()[0] == (expected if "{url}" in value else "none")
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.parametrize("where", ["server", "folder of the experiment", "folder of the run", "link in the run"])
def test_files_are_not_sent_to_a_place_that_another_program_chose(
    file_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MLFLOW_PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text("mine")
    entry = version_entry("ner", 1)
    with serving(Server) as url, raw(file_uri) as client:
        database = Path(file_uri.removeprefix("mlflow:sqlite:///"))
        location = {"server": url, "folder of the experiment": precious.as_uri()}.get(where)
        own = database.with_suffix(".artifacts").as_uri()
        experiment = client.create_experiment("compileflow", artifact_location=location or own)
        if location is None:
            run = client.create_run(experiment, tags={DIGEST: entry.artifact_digest, NAME: entry.name})
        if where == "link in the run":
            folder = Path(run.info.artifact_uri.removeprefix("file://"))
            folder.mkdir(parents=True)
            (folder / "manifest.json").symlink_to(precious / "manifest.json")
        elif where == "folder of the run":
            with closing(sqlite3.connect(database)) as db, db:
                db.execute("UPDATE runs SET artifact_uri = ?", [precious.as_uri()])
        version = open_registry(file_uri).register(entry, version_files(tmp_path / "given"))
    assert version.version == 1
    assert asked == []
    assert {path.name: path.read_text() for path in precious.iterdir()} == {"manifest.json": "mine"}
