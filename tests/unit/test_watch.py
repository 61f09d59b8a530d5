"""The watch of registries: what is missing, the oldest first, each compile for one run, and announcements."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from compileflow.admin.shared_compile import SharedCompile
from compileflow.admin.watch import (
    MissingCompile,
    WatchRequest,
    is_missing,
    missing_compiles,
    next_announcement,
    source_versions,
)
from compileflow.catalog import open_registry
from compileflow.errors import CompileError, SpecError, StoreUnavailableError
from compileflow.registries.mlflow.client import parse_place
from compileflow.settings import Settings
from compileflow.testing.registries import version_entry
from tests.services.mlflow import migrated_file

WATCH = WatchRequest(targets=("torchscript",))


@pytest.fixture
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, settings: Settings) -> str:
    return f"mlflow:sqlite:///{migrated_file(tmp_path_factory, tmp_path / 'mlflow.db')}"


def add_source(mlflow_uri: str, name: str, folder: Path) -> None:
    """Register a folder as an MLflow version, without compileflow."""
    place = parse_place(mlflow_uri)
    with place.calls("register", refused=AssertionError, unavailable=AssertionError) as client:  # type: ignore[arg-type]
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        client.create_model_version(name, source=folder.as_uri())


def register(settings: Settings, number: int, **fields: Any) -> None:
    entry = version_entry("ner", number).model_copy(update=fields)
    open_registry(settings.resolved_registry_uri(), settings).register(entry)


def names(compiles: list[MissingCompile]) -> list[tuple[str, str, str]]:
    return [(missing.source.name, missing.request.target, missing.request.precision.value) for missing in compiles]


def test_versions_in_mlflow_are_missing_until_compiled_the_oldest_first(
    mlflow_uri: str, tmp_path: Path, settings: Settings
) -> None:
    for name in ("zebra", "ant", "zebra"):
        add_source(mlflow_uri, name, tmp_path)
    # compileflow's own versions are no sources.
    open_registry(mlflow_uri, settings).register(version_entry("zebra", 1))
    watch = WatchRequest(targets=("torchscript", "openvino"), places=(mlflow_uri,), shared={"allow_warn": True})
    compiles = missing_compiles(watch, settings)
    assert names(compiles) == [
        (name, target, "fp32") for name in ("zebra", "ant", "zebra") for target in ("torchscript", "openvino")
    ]
    assert [missing.source.uri.rpartition("#")[2] for missing in compiles[::2]] == ["zebra@1", "ant@1", "zebra@2"]
    assert all(missing.request.allow_warn and missing.request.name for missing in compiles)

    register(settings, 1, source_uri=compiles[0].source.uri, target="torchscript", spec={"precision": "fp32"})
    assert names(missing_compiles(watch, settings))[0] == ("zebra", "openvino", "fp32")
    only_ants = watch.model_copy(update={"names": ("ant",)})
    assert {name for name, _, _ in names(missing_compiles(only_ants, settings))} == {"ant"}


def test_new_target_is_missing_for_each_source_of_the_configured_registry(settings: Settings) -> None:
    spec = {"precision": "fp32"}
    register(settings, 1, source_digest="1" * 64, target="openvino", spec=spec)
    register(settings, 2, source_digest="1" * 64, target="onnx-runtime", spec=spec)
    register(settings, 3, source_digest="2" * 64, target="torchscript", spec=spec)
    (missing,) = missing_compiles(WATCH, settings)
    assert (missing.request.model, missing.request.name) == ("registry:ner@1", "ner")
    assert missing.source.digest == "1" * 64


@pytest.fixture
def missing(settings: Settings) -> MissingCompile:
    register(settings, 1, target="openvino", spec={"precision": "fp32"})
    (compile_,) = missing_compiles(WATCH, settings)
    return compile_


@pytest.fixture
def shared(missing: MissingCompile, settings: Settings) -> SharedCompile:
    return missing.shared(settings)


def test_compile_belongs_to_one_run_at_a_time(shared: SharedCompile) -> None:
    with shared.held("compile") as first, shared.held("compile") as second, shared.held("announce") as announcer:
        assert (first, second, announcer) == (True, False, True)
        assert shared.is_running()
    assert not shared.is_running()


def test_compile_that_another_run_finished_is_not_missing(missing: MissingCompile, settings: Settings) -> None:
    assert is_missing(missing, WATCH, settings)
    register(settings, 2, target="torchscript", spec={"precision": "fp32"}, source_uri=missing.source.uri,
             source_digest=missing.source.digest)  # fmt: skip
    assert not is_missing(missing, WATCH, settings)


def test_failed_compile_is_repeated_only_on_request(
    missing: MissingCompile, shared: SharedCompile, settings: Settings
) -> None:
    shared.record_failure(StoreUnavailableError("The store did not answer."))
    assert missing_compiles(WATCH, settings) == [missing]
    shared.record_failure(CompileError("The toolchain refused the model."))
    assert missing_compiles(WATCH, settings) == []
    assert missing_compiles(WATCH.model_copy(update={"retry_failed": True}), settings) == [missing]
    assert next_announcement(shared, WATCH) == ("announce", 1)


def announced(shared: SharedCompile, *, count: int, ago_s: float) -> None:
    """Write the record of an announcement that was made some time ago."""
    at = datetime.now(UTC) - timedelta(seconds=ago_s)
    shared.store.put_record("watch-announced", shared.key, {"at": at.isoformat(), "count": count})


def test_compile_that_no_run_did_is_announced_again_a_few_times(shared: SharedCompile) -> None:
    assert next_announcement(shared, WATCH) == ("announce", 1)
    shared.record_announcement(1)
    assert next_announcement(shared, WATCH) == ("wait", 1)
    # An hour is the default.
    announced(shared, count=1, ago_s=3590)
    assert next_announcement(shared, WATCH) == ("wait", 1)
    announced(shared, count=1, ago_s=3610)
    assert next_announcement(shared, WATCH) == ("announce again", 2)
    with shared.held("compile"):
        assert next_announcement(shared, WATCH) == ("wait", 1)
    announced(shared, count=3, ago_s=3610)
    assert next_announcement(shared, WATCH) == ("give up", 3)
    patient = WATCH.model_copy(update={"announce_again_s": 7200, "most_announcements": 4})
    assert next_announcement(shared, patient) == ("wait", 3)
    announced(shared, count=3, ago_s=7210)
    assert next_announcement(shared, patient) == ("announce again", 4)


def test_compiled_version_that_was_deleted_is_announced_as_new(shared: SharedCompile) -> None:
    announced(shared, count=3, ago_s=3610)
    shared.record_compiled()
    assert next_announcement(shared, WATCH) == ("announce", 1)


def test_record_of_an_older_version_counts_as_one_announcement(shared: SharedCompile) -> None:
    shared.store.put_record("watch-announced", shared.key, {"at": "2026-01-02T03:04:05+00:00"})
    assert next_announcement(shared, WATCH) == ("announce again", 2)


@pytest.mark.parametrize(
    "record", [{"x": 1}, {"at": "x"}, {"at": "2026-01-02T03:04:05"}, {"at": "9999-01-01T00:00:00+00:00"}]
)
def test_record_that_no_run_can_have_written_is_ignored(
    missing: MissingCompile, shared: SharedCompile, settings: Settings, record: dict[str, Any]
) -> None:
    for kind in ("watch-announced", "watch-attempt"):
        shared.store.put_record(kind, shared.key, record)
    assert next_announcement(shared, WATCH) == ("announce", 1)
    assert missing_compiles(WATCH, settings) == [missing]


def test_run_knows_whether_its_compile_was_settled_since_the_announcement(shared: SharedCompile) -> None:
    assert not shared.is_settled()
    shared.record_failure(CompileError("The toolchain refused the model."))
    shared.record_announcement(1)
    assert not shared.is_settled()
    shared.record_failure(CompileError("The toolchain refused the model."))
    assert shared.is_settled()
    shared.record_announcement(2)
    assert not shared.is_settled()
    shared.record_compiled()
    assert shared.is_settled()


def test_place_that_lists_nothing_is_refused(settings: Settings) -> None:
    with pytest.raises(SpecError, match="hf://owner does not list source versions"):
        source_versions("hf://owner", settings)
