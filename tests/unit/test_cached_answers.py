"""A record of the cache answers only what was asked, and a model that changes while it is read is no source."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from compileflow.admin.collect import reports_on
from compileflow.contracts import ModelVersion
from compileflow.contracts.digests import folder_digest, json_digest, list_files
from compileflow.errors import IntegrityError, SourceError, StepOffError, VerdictError
from compileflow.settings import Settings
from compileflow.steps.cache import CacheKey, why_missed
from compileflow.steps.compile import earlier_cost
from compileflow.steps.fetch import fetch_source
from compileflow.steps.register import register_version
from compileflow.steps.validate import report_on
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.stores.local import LocalStore
from tests.unit.attested_artifacts import small_artifact

Fetch = Callable[..., FetchedSource]


def write_model(folder: Path, weight: int) -> Path:
    """Write a model whose one weight is a number, or overwrite it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["BertModel"]}')
    save_file({"weight": np.full(64, weight, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def fetch(settings: Settings) -> Fetch:
    """Fetch a folder; further arguments go to `fetch_source`."""

    def run(folder: Path, **arguments: object) -> FetchedSource:
        return fetch_source(
            str(folder), None, store_uri=settings.resolved_store_uri(), settings=settings, **arguments
        )

    return run


@pytest.fixture
def records(settings: Settings) -> Path:
    """Folder of the fetch step's records."""
    return LocalStore(settings.resolved_store_uri(), settings).root / "records" / "fetch"


def overwrite(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def test_swapped_records_answer_nothing(
    fetch: Fetch, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [write_model(tmp_path / name, weight) for weight, name in enumerate("ab")]
    digests = [fetch(model).digest for model in models]
    one, two = records.iterdir()
    texts = one.read_text(), two.read_text()
    overwrite(one, texts[1])
    overwrite(two, texts[0])
    sources = [fetch(model) for model in models]
    assert [source.digest for source in sources] == digests
    assert not any(source.cached for source in sources)
    assert "answers another request: model.safetensors, uri" in caplog.text
    assert all(fetch(model).cached for model in models)


@pytest.mark.parametrize("field", ["digest", "size_bytes", "checksum", "parts"])
def test_changed_record_answers_nothing(
    fetch: Fetch, records: Path, tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    other, model = write_model(tmp_path / "other", 1), write_model(tmp_path / "model", 2)
    other_source, source = fetch(other), fetch(model)
    [path] = [path for path in records.iterdir() if source.digest in path.read_text()]
    record = json.loads(path.read_text())
    if field == "checksum":
        del record["checksum"]
    elif field == "parts":
        record["parts"] = None
    else:
        record["value"][field] = getattr(other_source, field) if field == "digest" else 1
    overwrite(path, json.dumps(record))
    again = fetch(model)
    assert (again.digest, again.cached) == (source.digest, False)
    assert "ignoring the cache record" in caplog.text


@pytest.mark.parametrize("forged", ["digest", "hf_task"])
def test_record_of_a_folder_says_nothing_that_its_files_do_not_say(
    fetch: Fetch, records: Path, tmp_path: Path, forged: str
) -> None:
    other, model = fetch(write_model(tmp_path / "other", 1)), write_model(tmp_path / "model", 2)
    source = fetch(model)
    [path] = [path for path in records.iterdir() if source.digest in path.read_text()]
    record = json.loads(path.read_text())
    record["value"][forged] = other.digest if forged == "digest" else "fill-mask"
    content = {name: record[name] for name in ("parts", "value")}
    overwrite(path, json.dumps(content | {"checksum": json_digest(["fetch", content])}))
    again = fetch(model)
    assert (again.digest, again.hf_task, again.cached) == (source.digest, None, False)


def test_model_that_changes_while_it_is_read_is_refused_and_leaves_nothing(
    fetch: Fetch, settings: Settings, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", 1)
    digest = folder_digest(list_files(model))

    def go_on_training(line: str) -> None:
        if line.startswith("fetching"):
            write_model(model, 2)

    with pytest.raises(SourceError, match="changed while it was being read"):
        fetch(model, on_progress=go_on_training)
    root = LocalStore(settings.resolved_store_uri(), settings).root
    assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    write_model(model, 1)
    source = fetch(model)
    assert (source.digest, source.revision, source.cached) == (digest, digest, False)


def test_artifact_of_another_source_model_is_not_registered(settings: Settings, tmp_path: Path) -> None:
    store = LocalStore(settings.resolved_store_uri(), settings)
    artifact = store.put_folder(small_artifact(tmp_path / "artifact", source="5" * 64))
    report = store.put_folder(small_artifact(tmp_path / "report", graph=b"report"))
    with pytest.raises(
        VerdictError, match=r"compiled from the source model 555555555555\.\.\., and not from 6666"
    ):
        register_version(
            FetchedSource(
                uri="hf://a/b", revision="main", stored_uri="", digest="6" * 64, size_bytes=1, cached=True
            ),
            CompiledArtifact(
                uri=artifact.uri, digest=artifact.digest, cache_key="6" * 64, size_bytes=1, compile_duration_s=1.0,
                peak_rss_bytes=1, cached=True, why="",
            ),
            ValidatedArtifact(
                artifact_digest=artifact.digest, report_uri=report.uri, report_digest=report.digest,
                outcome="pass", reason="", figures={}, cached=True, why="",
            ),
            name="other", allow_warn=False, store_uri=store.uri, registry_uri=settings.resolved_registry_uri(),
            settings=settings,
        )  # fmt: skip


@pytest.mark.parametrize("is_altered", [False, True])
def test_lost_report_of_a_registered_version_is_told(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_altered: bool
) -> None:
    store = LocalStore((tmp_path / "store").as_uri(), settings)
    artifact = store.put_folder(small_artifact(tmp_path / "artifact"))
    reports = []
    for text in ("first", "second"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "report.json").write_text(text)
        reports.append(store.put_folder(tmp_path / text))
    versions = []
    source = FetchedSource(uri="hf://a/b", revision="1", stored_uri="", digest="5" * 64, size_bytes=1, cached=True)
    compiled = CompiledArtifact(
        uri=artifact.uri, digest=artifact.digest, cache_key="1" * 64, size_bytes=1, compile_duration_s=1.0,
        peak_rss_bytes=1, cached=True, why="",
    )  # fmt: skip
    for report in (reports[0], reports[1], reports[1]):
        validated = ValidatedArtifact(
            artifact_digest=artifact.digest, report_uri=report.uri, report_digest=report.digest, outcome="pass",
            reason="pass", figures={}, cached=True, why="",
        )  # fmt: skip
        versions.append(
            register_version(
                source, compiled, validated, name="b", allow_warn=False, store_uri=store.uri,
                registry_uri=settings.resolved_registry_uri(), settings=settings,
            )
        )  # fmt: skip
        if len(versions) == 2:
            # The first report is still there.
            assert caplog.text == ""
            if is_altered:
                overwrite(
                    next(blob for blob in (store.root / "blobs").glob("*/*/*") if blob.read_text() == "first"),
                    "fxrst",
                )
            else:
                (store.root / "manifests" / "sha256" / f"{reports[0].digest}.json").unlink()
    assert [(version.version, version.report_digest) for version in versions] == 3 * [(1, reports[0].digest)]
    assert f"the store has lost the report {reports[0].digest[:12]}" in caplog.text


def test_version_that_somebody_changed_is_not_what_a_run_registers(settings: Settings, tmp_path: Path) -> None:
    store = LocalStore(settings.resolved_store_uri(), settings)
    folder = store.put_folder(small_artifact(tmp_path / "artifact"))
    source = FetchedSource(uri="hf://a/b", revision="1", stored_uri="", digest="5" * 64, size_bytes=1, cached=True)
    artifact = CompiledArtifact(
        uri=folder.uri, digest=folder.digest, cache_key="1" * 64, size_bytes=1, compile_duration_s=1.0,
        peak_rss_bytes=1, cached=True, why="",
    )  # fmt: skip
    validated = ValidatedArtifact(
        artifact_digest=folder.digest, report_uri=folder.uri, report_digest=folder.digest, outcome="pass",
        reason="pass", figures={}, cached=True, why="",
    )  # fmt: skip

    def register() -> ModelVersion:
        return register_version(
            source, artifact, validated, name="b", allow_warn=False, store_uri=store.uri,
            registry_uri=settings.resolved_registry_uri(), settings=settings,
        )  # fmt: skip

    assert register() == register()
    with closing(sqlite3.connect(settings.home_dir / "registry.db")) as db, db:
        db.execute("UPDATE version SET entry = replace(entry, ?, ?)", ("5" * 64, "f" * 64))
    with pytest.raises(IntegrityError, match="b version 1 names the source model ffffffffffff"):
        register()


DAMAGED = [
    {},
    {"key": 5, "parts": {}},
    {"key": "../x", "parts": {"uri": "a"}},
    {"key": "0" * 64, "parts": []},
    {"parts": {"uri": "a"}},
]


@pytest.mark.parametrize("record", DAMAGED)
def test_damaged_record_of_the_last_run_is_none(
    settings: Settings, tmp_path: Path, record: dict[str, Any]
) -> None:
    store = LocalStore((tmp_path / "store").as_uri(), settings)
    key = CacheKey("compile", "a for b", {"uri": "a"})
    for kind in ("compile", "compile-latest"):
        store.put_record(kind, key.digest, record)
    store.put_record("compile-latest", json_digest(["compile", "a for b"]), record)
    assert earlier_cost(store, key) == ""
    assert why_missed(store, key) == "first run for a for b"


def test_fetch_step_that_is_off_does_not_take_the_record_of_another_model(
    fetch: Fetch, records: Path, settings: Settings, tmp_path: Path
) -> None:
    models = [write_model(tmp_path / name, weight) for weight, name in enumerate("ab")]
    fetched = [fetch(model) for model in models]
    one, two = sorted((records.parent / "fetch-latest").iterdir())
    bodies = one.read_text(), two.read_text()
    overwrite(one, bodies[1])
    overwrite(two, bodies[0])
    store_uri = settings.resolved_store_uri()
    for model in models:
        with pytest.raises(StepOffError, match="has no source model from"):
            fetch_source(str(model), None, store_uri=store_uri, settings=settings, enabled=False)
    overwrite(one, bodies[0])
    overwrite(two, bodies[1])
    for model, source in zip(models, fetched, strict=True):
        again = fetch_source(str(model), None, store_uri=store_uri, settings=settings, enabled=False)
        assert again.digest == source.digest


def test_verdict_on_another_artifact_is_no_verdict(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore((tmp_path / "store").as_uri(), settings)
    report = store.put_folder(small_artifact(tmp_path / "report"))
    value = ValidatedArtifact(
        artifact_digest="1" * 64, report_uri=report.uri, report_digest=report.digest, outcome="pass",
        reason="pass", figures={}, cached=True, why="",
    )  # fmt: skip
    for digest in ("1" * 64, "2" * 64):
        store.put_record("report-of", digest, value.model_dump(mode="json"))
    found = report_on(store, "1" * 64)
    assert found is not None
    assert found.outcome == "pass"
    assert report_on(store, "2" * 64) is None
    assert "about another artifact" in caplog.text


def test_collection_reads_past_damaged_records(settings: Settings, tmp_path: Path) -> None:
    store = LocalStore((tmp_path / "store").as_uri(), settings)
    for number, digest in enumerate([{"a": 1}, [], 5, "7" * 64]):
        store.put_record("report-of", str(number) * 64, {"report_digest": digest})
    assert reports_on(store, [str(number) * 64 for number in range(4)]) == {"7" * 64}
