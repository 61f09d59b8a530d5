"""The watch of registries: what is missing, the oldest first, and each compile for one watcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compileflow.admin.watch import (
    MissingCompile,
    WatchRequest,
    claimed,
    is_new,
    missing_compiles,
    record_announcement,
    record_failure,
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


def test_compile_belongs_to_one_watcher_at_a_time(missing: MissingCompile, settings: Settings) -> None:
    with claimed(missing, WATCH, settings) as first, claimed(missing, WATCH, settings) as second:
        assert (first, second) == (True, False)
    with claimed(missing, WATCH, settings) as again:
        assert again


def test_compile_that_another_watcher_finished_is_not_started(missing: MissingCompile, settings: Settings) -> None:
    register(settings, 2, target="torchscript", spec={"precision": "fp32"}, source_uri=missing.source.uri,
             source_digest=missing.source.digest)  # fmt: skip
    with claimed(missing, WATCH, settings) as is_ours:
        assert not is_ours


def test_failed_compile_is_repeated_only_on_request(missing: MissingCompile, settings: Settings) -> None:
    record_failure(missing, StoreUnavailableError("The store did not answer."), settings)
    assert missing_compiles(WATCH, settings) == [missing]
    record_failure(missing, CompileError("The toolchain refused the model."), settings)
    assert missing_compiles(WATCH, settings) == []
    assert missing_compiles(WATCH.model_copy(update={"retry_failed": True}), settings) == [missing]


def test_compile_is_announced_once(missing: MissingCompile, settings: Settings) -> None:
    assert is_new(missing, settings)
    record_announcement(missing, settings)
    assert not is_new(missing, settings)


def test_place_that_lists_nothing_is_refused(settings: Settings) -> None:
    with pytest.raises(SpecError, match="hf://owner does not list source versions"):
        source_versions("hf://owner", settings)
