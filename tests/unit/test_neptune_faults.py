"""Faults of network, server and user during a registration in Neptune: calls end in time, without duplicates."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from compileflow.errors import CompileflowError, RegistryError, RegistryUnavailableError
from compileflow.registries.neptune import client_process
from compileflow.registries.neptune.address import INSECURE, read_token
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.client_process import ClientProcess, process_for
from compileflow.registries.neptune.registry import NeptuneRegistry
from compileflow.settings import Settings
from compileflow.testing.processes import other_process, say
from compileflow.testing.registries import version_entry, version_files
from deployments.neptune_server.tokens import make_api_token
from tests.leaks import leaks_below
from tests.services import secrets
from tests.services.fault_proxy import Answer, FaultProxy, Hang, LoseReply
from tests.services.neptune import Neptune
from tests.services.neptune_writer import NeptuneWriter

# The import of the client on a busy machine; the deadline of a call starts afterwards.
START_S = 30.0
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def proxy(neptune_server: Neptune) -> Iterator[FaultProxy]:
    with FaultProxy(neptune_server.url) as running:
        yield running


@pytest.fixture
def faulty(
    proxy: FaultProxy, neptune_server: Neptune, neptune_project: str, settings: Settings
) -> NeptuneRegistry:
    """The test's project through the proxy, with a client that has started."""
    proxy.heal()
    client_settings = settings_for(neptune_server.token_for(proxy.url), settings, TIMEOUT_S)
    registry = NeptuneRegistry(f"neptune://{neptune_project}", client_settings)
    registry.versions()
    return registry


def settings_for(token: str, settings: Settings, timeout_s: float) -> Settings:
    return Settings(home=settings.home, neptune_api_token=SecretStr(token), neptune_timeout_s=timeout_s)


def process_of(settings: Settings) -> ClientProcess:
    return process_for(read_token(settings, refused=RegistryError), settings)


@contextmanager
def ends_within(seconds: float, error: type[CompileflowError]) -> Iterator[pytest.ExceptionInfo[CompileflowError]]:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        yield caught
    assert time.monotonic() - started < seconds
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def only_one_complete(client: NeptuneWriter, project: str) -> str:
    identities = [identity for identity, is_complete in client("list_versions", project).items() if is_complete]
    assert len(identities) == 1
    return str(identities[0])


def test_server_that_is_down_is_unavailable_and_the_next_run_registers_one_version(
    settings: Settings, neptune_server: Neptune, neptune_client: NeptuneWriter, neptune_project: str
) -> None:
    # The port of a proxy that has ended is closed.
    with FaultProxy(neptune_server.url) as ended:
        token = neptune_server.token_for(ended.url)
    uri = f"neptune://{neptune_project}"
    with ends_within(START_S + 4, RegistryUnavailableError) as caught:
        NeptuneRegistry(uri, settings_for(token, settings, 4)).register(version_entry("ner", 1))
    assert ended.url in str(caught.value)
    assert neptune_client("list_versions", neptune_project) == {}
    NeptuneRegistry(uri, Settings(home=settings.home)).register(version_entry("ner", 1))
    only_one_complete(neptune_client, neptune_project)


def test_server_that_fails_for_a_while_is_asked_again(
    faulty: NeptuneRegistry, proxy: FaultProxy, neptune_client: NeptuneWriter, neptune_project: str
) -> None:
    for status, path in ((500, "attributes/operations"), (503, "entries/search"), (503, "file/upload")):
        proxy.inject(Answer(status), path=path)
    version = faulty.register(version_entry("ner", 1))
    assert list(faulty.versions()) == [version]
    only_one_complete(neptune_client, neptune_project)


def test_server_that_goes_on_failing_is_unavailable_and_the_next_run_completes(
    faulty: NeptuneRegistry, proxy: FaultProxy, neptune_client: NeptuneWriter, neptune_project: str
) -> None:
    proxy.inject(Answer(503), path="file/upload", times=20)
    with ends_within(TIMEOUT_S, RegistryUnavailableError) as caught:
        faulty.register(version_entry("ner", 1))
    assert "did not answer while uploading" in str(caught.value)
    assert list(faulty.versions()) == []
    proxy.heal()
    faulty.register(version_entry("ner", 1))
    only_one_complete(neptune_client, neptune_project)


@pytest.mark.slow
def test_server_that_is_slow_but_goes_on_is_waited_for(
    proxy: FaultProxy, neptune_server: Neptune, neptune_project: str, settings: Settings
) -> None:
    registry = NeptuneRegistry(
        f"neptune://{neptune_project}", settings_for(neptune_server.token_for(proxy.url), settings, 2.5)
    )
    registry.versions()
    proxy.inject(Hang(0.2), path="attributes/operations", times=25)
    started = time.monotonic()
    # One call writes all fields, and takes longer than its limit for a silence.
    assert registry.register(version_entry("ner", 1)).version == 1
    assert time.monotonic() - started > 2.5
    proxy.heal()


@pytest.mark.slow
def test_reply_that_is_lost_at_any_request_leaves_one_complete_version(
    faulty: NeptuneRegistry, proxy: FaultProxy, neptune_client: NeptuneWriter, neptune_project: str, tmp_path: Path
) -> None:
    files = version_files(tmp_path / "given")
    faulty.register(version_entry("ner", 0), files)
    proxy.seen.clear()
    faulty.register(version_entry("ner", 1), files)
    requests = len(proxy.seen)
    for skip in range(0, requests, 3):
        proxy.inject(LoseReply(), skip=skip)
        version = faulty.register(version_entry("ner", 2 + skip), files)
        assert faulty.register(version_entry("ner", 2 + skip), files) == version
        proxy.heal()
    complete = [
        identity
        for identity, is_complete in neptune_client("list_versions", neptune_project).items()
        if is_complete
    ]
    assert len(complete) == 2 + len(range(0, requests, 3))


@pytest.mark.slow
def test_registration_that_is_killed_at_any_request_is_completed_by_the_next(
    faulty: NeptuneRegistry,
    proxy: FaultProxy,
    neptune_client: NeptuneWriter,
    neptune_project: str,
    neptune_server: Neptune,
    settings: Settings,
    tmp_path: Path,
) -> None:
    files = version_files(tmp_path / "given")
    process = process_of(settings_for(neptune_server.token_for(proxy.url), settings, TIMEOUT_S))
    faulty.register(version_entry("ner", 0), files)
    proxy.seen.clear()
    faulty.register(version_entry("ner", 1), files)
    points = range(0, len(proxy.seen), 12)
    for skip in points:
        proxy.seen.clear()
        proxy.inject(Hang(60), skip=skip)
        killer = threading.Thread(target=kill_at, args=(process, proxy, "", skip))
        killer.start()
        with ends_within(TIMEOUT_S, RegistryUnavailableError):
            faulty.register(version_entry("ner", 2 + skip), files)
        killer.join()
        proxy.heal()
        version = faulty.register(version_entry("ner", 2 + skip), files)
        assert list(faulty.find(version.artifact_digest)) == [version]
    complete = [
        identity
        for identity, is_complete in neptune_client("list_versions", neptune_project).items()
        if is_complete
    ]
    assert len(complete) == 2 + len(points)


def test_disk_that_cannot_be_written_is_not_called_a_server_that_does_not_answer(
    neptune_project: str, settings: Settings, tmp_path: Path
) -> None:
    client_settings = Settings(home=settings.home)
    NeptuneRegistry(f"neptune://{neptune_project}", client_settings).register(version_entry("ner", 1))
    client = NeptuneClient(
        neptune_project, client_settings, refused=RegistryError, unavailable=RegistryUnavailableError
    )
    (row,) = client.find("version", "")
    with ends_within(START_S, RegistryError) as caught:
        client.download(str(row["sys/id"]), "registry/entry", tmp_path / "absent" / "entry.json")
    assert "No such file" in caught.value.message
    assert "disk" in caught.value.hint


def test_hung_upload_ends_and_the_next_run_completes_the_version(
    faulty: NeptuneRegistry, proxy: FaultProxy, neptune_client: NeptuneWriter, neptune_project: str, tmp_path: Path
) -> None:
    files = version_files(tmp_path / "given")
    proxy.inject(Hang(60), path="file/upload", skip=2)
    with ends_within(TIMEOUT_S, RegistryUnavailableError) as caught:
        faulty.register(version_entry("ner", 1), files)
    assert "uploading" in str(caught.value)
    assert list(faulty.versions()) == []
    version = faulty.register(version_entry("ner", 1), files)
    assert list(faulty.versions()) == [version]
    assert list(neptune_client("list_versions", neptune_project)) == [
        only_one_complete(neptune_client, neptune_project)
    ]


def test_lost_reply_to_the_creation_of_a_version_leaves_one_that_counts(
    faulty: NeptuneRegistry, proxy: FaultProxy, neptune_client: NeptuneWriter, neptune_project: str
) -> None:
    faulty.register(version_entry("ner", 1))
    count = len(neptune_client("list_versions", neptune_project))
    proxy.inject(LoseReply(), method="POST", path="/experiments")
    version = faulty.register(version_entry("ner", 2))
    # The client repeated the request itself: its first version has no digest and stays hidden.
    assert len(neptune_client("list_versions", neptune_project)) == count + 2
    assert [version.artifact_digest for version in faulty.versions("ner")] == [
        version_entry("ner", number).artifact_digest for number in (2, 1)
    ]
    assert faulty.register(version_entry("ner", 2)) == version


def test_lost_reply_to_the_creation_of_a_model_leaves_one_model(
    faulty: NeptuneRegistry, proxy: FaultProxy
) -> None:
    proxy.inject(LoseReply(), method="POST", path="/experiments")
    assert faulty.register(version_entry("ner", 1)).version == 1
    assert faulty.register(version_entry("ner", 2)).version == 2


@pytest.mark.parametrize("moment", ["first field", pytest.param("upload", marks=pytest.mark.slow), "commit mark"])
def test_killed_registration_is_completed_by_the_next_run(
    moment: str,
    faulty: NeptuneRegistry,
    proxy: FaultProxy,
    neptune_client: NeptuneWriter,
    neptune_project: str,
    neptune_server: Neptune,
    settings: Settings,
) -> None:
    process = process_of(settings_for(neptune_server.token_for(proxy.url), settings, TIMEOUT_S))
    path = "file/upload" if moment == "upload" else "attributes/operations"
    skip = 0
    if moment == "commit mark":
        faulty.register(version_entry("keywords", 2))
        proxy.seen.clear()
        faulty.register(version_entry("keywords", 1))
        # A new name takes identity more write, for the name of the model.
        skip = sum(path in request.path for request in proxy.seen) + 2 - 1
    proxy.seen.clear()
    proxy.inject(Hang(60), path=path, skip=skip)
    killer = threading.Thread(target=kill_at, args=(process, proxy, path, skip))
    killer.start()
    with ends_within(TIMEOUT_S, RegistryUnavailableError):
        faulty.register(version_entry("ner", 1))
    killer.join()
    assert list(faulty.find(version_entry("ner", 1).artifact_digest)) == (
        list(faulty.versions("keywords"))[:1] if moment == "commit mark" else []
    )
    version = faulty.register(version_entry("ner", 1))
    assert list(faulty.versions("ner")) == [version]
    complete = [
        identity
        for identity, is_complete in neptune_client("list_versions", neptune_project).items()
        if is_complete
    ]
    assert len([identity for identity in complete if identity.split("-")[1].startswith("NER")]) == 1


def kill_at(process: ClientProcess, proxy: FaultProxy, path: str, skip: int) -> None:
    until = time.monotonic() + TIMEOUT_S
    while sum(path in request.path for request in list(proxy.seen)) <= skip and time.monotonic() < until:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def test_client_that_does_nothing_is_killed_at_its_deadline_and_replaced(
    neptune_project: str, neptune_server: Neptune, settings: Settings
) -> None:
    client_settings = settings_for(neptune_server.token, settings, 1.5)
    registry = NeptuneRegistry(f"neptune://{neptune_project}", client_settings)
    registry.versions()
    stopped = process_of(client_settings).pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    with ends_within(4, RegistryUnavailableError) as caught:
        registry.versions()
    assert "1.5 s" in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    assert list(registry.versions()) == []
    assert process_of(client_settings).pid != stopped


def test_token_that_the_server_did_not_give_is_refused(
    neptune_project: str, neptune_server: Neptune, neptune_client: NeptuneWriter, settings: Settings
) -> None:
    wrong = make_api_token(neptune_server.url, "not-its-key")
    registry = NeptuneRegistry(f"neptune://{neptune_project}", settings_for(wrong, settings, 4))
    with ends_within(START_S + 4, RegistryError) as caught:
        registry.register(version_entry("ner", 1))
    assert "NEPTUNE_API_TOKEN" in caught.value.hint
    assert wrong not in str(caught.value)
    assert neptune_client("list_versions", neptune_project) == {}
    NeptuneRegistry(registry.uri, Settings(home=settings.home)).register(version_entry("ner", 1))
    only_one_complete(neptune_client, neptune_project)


def test_unknown_project_lists_similar_ones(neptune_project: str, settings: Settings) -> None:
    registry = NeptuneRegistry(f"neptune://{neptune_project}x", Settings(home=settings.home))
    with ends_within(START_S, RegistryError) as caught:
        registry.register(version_entry("ner", 1))
    assert f"{neptune_project}x" in caught.value.message
    assert "tests/" in caught.value.hint


def test_values_that_neptune_would_cut_or_drop_stay_complete(
    neptune_project: str, neptune_client: NeptuneWriter, settings: Settings
) -> None:
    entry = version_entry("ner", 1).model_copy(
        update={"figures": {"speedup": math.nan, "worst": math.inf}, "source_revision": "r" * 20_000}
    )
    NeptuneRegistry(f"neptune://{neptune_project}", Settings(home=settings.home)).register(entry)
    identity = only_one_complete(neptune_client, neptune_project)
    fields = neptune_client("read_version", neptune_project, identity)
    assert fields["metrics"] == {"speedup": "NaN", "worst": "Infinity"}
    assert fields["source"]["revision"].endswith("(cut)")
    entry_file = json.loads(neptune_client.file(neptune_project, identity, "registry/entry"))
    assert entry_file["source_revision"] == entry.source_revision
    assert entry_file["figures"] == fields["metrics"]


def test_two_machines_that_register_one_artifact_at_once_leave_one_version(
    neptune_project: str, neptune_client: NeptuneWriter, settings: Settings
) -> None:
    # Separate homes do not share a lock.
    homes = [Settings(home=settings.home_dir / name) for name in ("first", "second")]
    registries = [NeptuneRegistry(f"neptune://{neptune_project}", home) for home in homes]
    start = threading.Barrier(2)

    def register(registry: NeptuneRegistry) -> None:
        start.wait()
        registry.register(version_entry("ner", 1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(register, registries))
    only_one_complete(neptune_client, neptune_project)
    first, second = (registry.register(version_entry("ner", 1)) for registry in registries)
    assert first == second


def test_token_is_nowhere_but_in_the_clients_environment(
    neptune_project: str, neptune_server: Neptune, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    client_settings = Settings(home=settings.home)
    registry = NeptuneRegistry(f"neptune://{neptune_project}", client_settings)
    registry.register(version_entry("ner", 1))
    with pytest.raises(RegistryError) as caught:
        NeptuneRegistry("neptune://tests/none", client_settings).versions()
    pid = process_of(client_settings).pid
    texts = [
        caplog.text,
        str(caught.value),
        process_of(client_settings).log_text(),
        repr(client_settings),
        repr(registry.__dict__),
    ]
    texts.append(Path(f"/proc/{pid}/cmdline").read_text())
    for secret in (neptune_server.token, secrets.NEPTUNE_API_KEY):
        assert not any(secret in text for text in texts)
    assert list(leaks_below(settings.home_dir, secrets.ALL)) == []
    assert list(leaks_below(neptune_server.folder, secrets.ALL)) == []
    assert list(neptune_server.folder.rglob("*")) != []


def test_log_of_the_client_holds_no_token(neptune_server: Neptune, settings: Settings) -> None:
    token = read_token(settings_for(neptune_server.token, settings, 4), refused=RegistryError)
    text = token.scrub(f"sent {neptune_server.token} with {secrets.NEPTUNE_API_KEY} to {neptune_server.url}")
    assert text == f"sent *** with *** to {neptune_server.url}"


def test_client_ends_with_the_process_that_started_it(neptune_project: str) -> None:
    with other_process("tests.unit.test_neptune_faults:hold_a_client", neptune_project) as holder:
        pid = int(holder.line())
        os.kill(pid, 0)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        state = Path(f"/proc/{pid}/stat")
        # A zombie waits for its new parent.
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"the client {pid} outlived its parent")


def hold_a_client(project: str) -> None:
    """Start a client, print its process id and wait for the kill; runs in another process."""
    settings = Settings()
    NeptuneRegistry(f"neptune://{project}", settings).versions()
    say(process_of(settings).pid)
    time.sleep(60)


@pytest.mark.slow
def test_idle_client_ends_and_the_next_call_starts_another(
    neptune_project: str, neptune_server: Neptune, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_process, "_IDLE_S", 0.2)
    client_settings = settings_for(neptune_server.token, settings, 21)
    registry = NeptuneRegistry(f"neptune://{neptune_project}", client_settings)
    registry.versions()
    first_pid = process_of(client_settings).pid
    time.sleep(1.5)
    assert list(registry.versions()) == []
    assert process_of(client_settings).pid != first_pid


def test_client_that_is_not_installed_is_named(
    neptune_server: Neptune, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = "import sys; sys.modules['neptune'] = None; "
    monkeypatch.setattr(client_process, "_ENTRY", without + client_process._ENTRY)
    registry = NeptuneRegistry("neptune://team/models", settings_for(neptune_server.token, settings, 22))
    with ends_within(START_S, RegistryError) as caught:
        registry.versions()
    assert "compileflow[neptune]" in caught.value.hint


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "NEPTUNE_API_TOKEN is not set"),
        ("not base64!", "does not hold a Neptune token"),
        ("bm90IGpzb24=", "does not hold a Neptune token"),
        (make_api_token("https://registry.example:port", "key"), "does not hold a Neptune token"),
        (make_api_token("http://registry.example:8000", "key"), "plain http"),
    ],
)
def test_token_that_cannot_be_used_is_refused_before_anything_is_asked(
    token: str | None, message: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(INSECURE, raising=False)
    monkeypatch.delenv("NEPTUNE_API_TOKEN", raising=False)
    client_settings = settings_for(token, settings, 4) if token else Settings(home=settings.home)
    with ends_within(1, RegistryError) as caught:
        NeptuneRegistry("neptune://team/models", client_settings).versions()
    assert message in caught.value.message
