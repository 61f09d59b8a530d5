from __future__ import annotations

import logging
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from pydantic import SecretStr

from compileflow.errors import CompileflowError, SourceError, SourceUnavailableError, StoreError
from compileflow.settings import Settings
from compileflow.sources.hub import HubSource
from tests.hub_server import Hub
from tests.services.secrets import HF_TOKEN as TOKEN

REPOSITORY = "owner/model"
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "vocab.txt": b"a\nb\n",
    "README.md": b"# Model",
    "model.onnx": b"other export",
    "onnx/model.onnx": b"other export",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickled",
    "tf_model.h5": b"other weights",
    "checkpoint-500/model.safetensors": b"leftover",
    "1_Pooling/config.json": b"{}",
}
MODEL_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"
}  # fmt: skip


def source(endpoint: str, token: str | None = TOKEN) -> HubSource:
    return HubSource(Settings(hub_endpoint=endpoint, hub_token=SecretStr(token) if token else None))


def files_below(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def test_revision_is_pinned_to_the_commit_it_means_now(hub: Hub) -> None:
    first = hub.add(REPOSITORY, FILES)
    old_commit = hub.add(REPOSITORY, FILES, branch="v1.0")
    there = source(hub.endpoint)
    assert there.pin(REPOSITORY, None) == (f"hf://{REPOSITORY}", first)
    assert there.pin(f"hf://{REPOSITORY}", "v1.0") == (f"hf://{REPOSITORY}", old_commit)
    assert there.pin(REPOSITORY, old_commit) == (f"hf://{REPOSITORY}", old_commit)
    second = hub.add(REPOSITORY, FILES | {"model.safetensors": b"retrained"})
    assert there.pin(REPOSITORY, "main")[1] == second != first


def test_exactly_the_pinned_commit_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    there = source(hub.endpoint)
    first = hub.add(REPOSITORY, FILES)
    _, pinned = there.pin(REPOSITORY, None)
    hub.add(REPOSITORY, FILES | {"model.safetensors": b"retrained"})
    located = there.locate(REPOSITORY, pinned, tmp_path)
    assert (located.uri, located.revision) == (f"hf://{REPOSITORY}", first)
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert {commit for commit, _ in hub.downloaded()} == {first}


def test_branch_is_downloaded_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, FILES)
    commit = hub.add(REPOSITORY, FILES | {"model.safetensors": b"of the branch"}, branch="v1.0")
    assert source(hub.endpoint).locate(REPOSITORY, "v1.0", tmp_path).revision == commit
    assert (tmp_path / "model.safetensors").read_bytes() == b"of the branch"
    assert {revision for revision, _ in hub.downloaded()} == {commit}


def test_only_the_models_files_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, FILES)
    located = source(hub.endpoint).locate(REPOSITORY, None, tmp_path)
    assert set(located.files) == MODEL_FILES
    assert {path for _, path in hub.downloaded()} == MODEL_FILES
    assert files_below(located.folder) == {name: FILES[name] for name in MODEL_FILES}


def test_file_name_that_leaves_the_folder_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, FILES | {"../config.json": b"{}", "../../vocab.txt": b"{}", "/etc/vocab.txt": b""})
    located = source(hub.endpoint).locate(REPOSITORY, None, tmp_path / "a" / "b")
    assert set(located.files) == MODEL_FILES
    assert set(files_below(tmp_path)) == {f"a/b/{name}" for name in MODEL_FILES}


def test_token_goes_to_the_hub_and_only_the_configured_one(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPOSITORY, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    source(hub.endpoint).pin(REPOSITORY, None)
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    hub.authorizations.clear()
    source(hub.endpoint, token=None).pin(REPOSITORY, None)
    assert hub.authorizations == {None}


def test_gated_repository_opens_with_the_right_token(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, FILES, gated=True)
    hub.token = TOKEN
    assert set(source(hub.endpoint).locate(REPOSITORY, None, tmp_path).files) == MODEL_FILES


def test_repository_without_a_model_says_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, {"README.md": b"# Data"})
    with pytest.raises(SourceError, match=r"hf://owner/model does not hold a model: config\.json is missing"):
        source(hub.endpoint).locate(REPOSITORY, None, tmp_path)
    assert hub.downloaded() == set()


def test_plain_file_in_the_way_is_one_clear_error(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, FILES)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"EEXIST|ENOTDIR"):
        source(hub.endpoint).locate(REPOSITORY, None, tmp_path / "file" / "download")


def absent(hub: Hub, work_dir: Path) -> None:
    source(hub.endpoint).pin("owner/absent", None)


def unknown_revision(hub: Hub, work_dir: Path) -> None:
    source(hub.endpoint).pin(REPOSITORY, "v9")


def unknown_commit(hub: Hub, work_dir: Path) -> None:
    source(hub.endpoint).locate(REPOSITORY, "f" * 40, work_dir)


def gated(hub: Hub, work_dir: Path) -> None:
    hub.add(REPOSITORY, FILES, gated=True)
    source(hub.endpoint).locate(REPOSITORY, None, work_dir)


def invalid_id(hub: Hub, work_dir: Path) -> None:
    source(hub.endpoint).pin("owner/a/b", None)


def invalid_characters(hub: Hub, work_dir: Path) -> None:
    source(hub.endpoint).pin("owner/two words", None)


def unavailable(hub: Hub, work_dir: Path) -> None:
    hub.fail_with = 503
    source(hub.endpoint).pin(REPOSITORY, None)


def too_many_requests(hub: Hub, work_dir: Path) -> None:
    hub.fail_with = 429
    source(hub.endpoint).pin(REPOSITORY, None)


def unavailable_while_downloading(hub: Hub, work_dir: Path) -> None:
    hub.fail_with, hub.fail_at = 503, f"/{REPOSITORY}/resolve"
    source(hub.endpoint).locate(REPOSITORY, None, work_dir)


def unavailable_while_listing(hub: Hub, work_dir: Path) -> None:
    hub.fail_with, hub.fail_at = 503, f"/api/models/{REPOSITORY}/tree"
    source(hub.endpoint).locate(REPOSITORY, None, work_dir)


def refused(hub: Hub, work_dir: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    source(f"http://127.0.0.1:{port}").pin(REPOSITORY, None)


@pytest.mark.parametrize(
    ("ask", "retryable", "message", "hint"),
    [
        (absent, False, "hf://owner/absent does not exist", "set HF_TOKEN"),
        (unknown_revision, False, "hf://owner/model has no revision 'v9'", "a branch, a tag"),
        (unknown_commit, False, "has no revision 'ffff", "a full commit"),
        (gated, False, "hf://owner/model is gated", "Accept its licence"),
        (invalid_id, False, "Expected a folder or a Hub id, got 'owner/a/b'", "owner/name"),
        (invalid_characters, False, "Expected a folder or a Hub id, got 'owner/two words'", "owner/name"),
        (unavailable, True, "HTTP 503 for hf://owner/model", "later"),
        (too_many_requests, True, "HTTP 429 for hf://owner/model", "later"),
        (unavailable_while_downloading, True, "hf://owner/model", ""),
        (unavailable_while_listing, True, "hf://owner/model", ""),
        (refused, True, "did not answer for hf://owner/model (ConnectError)", "network"),
    ],
)
def test_refusal_is_one_line_without_the_token(
    ask: Callable[[Hub, Path], None],
    retryable: bool,
    message: str,
    hint: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # The client waits up to half a minute between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    caplog.set_level(logging.DEBUG)
    hub.add(REPOSITORY, FILES)
    with pytest.raises(SourceError) as caught:
        ask(hub, tmp_path)
    error = caught.value
    assert isinstance(error, SourceUnavailableError) == error.retryable == retryable
    assert message in error.message
    assert hint in error.hint
    assert "\n" not in str(error)
    texts = [*traceback.format_exception(error), *chain(error), caplog.text, *capfd.readouterr()]
    assert not any(TOKEN in text for text in texts)


def chain(error: BaseException) -> list[str]:
    """Return str and repr of an error and of all its causes."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        texts += [str(current), repr(current)]
        current = current.__cause__ or current.__context__
    return texts


def test_source_does_not_show_its_token() -> None:
    assert TOKEN not in repr(source("http://127.0.0.1:1"))
    assert TOKEN not in repr(vars(source("http://127.0.0.1:1")))


def test_offline_machine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompileflowError, match="HF_HUB_OFFLINE") as caught:
        source("http://127.0.0.1:1").pin(REPOSITORY, None)
    assert not caught.value.retryable


@pytest.mark.parametrize("endpoint", ["hub.example", "s3://bucket", "http://user:pass/word@host", "http://host:x"])
def test_endpoint_that_is_not_the_url_of_a_server_is_one_line(endpoint: str) -> None:
    with pytest.raises(
        SourceError, match=r"^HF_ENDPOINT is not the URL of a server\. Write it as https://host\.$"
    ):
        source(endpoint)
