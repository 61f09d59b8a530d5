"""Neptune as registry: the suite for all registries, and the fields and files that the real client reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_registry
from compileflow.contracts import ModelRegistry
from compileflow.errors import RegistryError, SpecError
from compileflow.registries.neptune import registry as neptune_registry
from compileflow.settings import Settings, get_settings
from compileflow.testing.registries import RegistryConformance, version_entry, version_files
from tests.conformance.promotion import check_promotion_needs_the_artifact
from tests.services.neptune_writer import NeptuneWriter

REPORT = {
    "verdict": {
        "gates": [
            {"gate": "latency", "outcome": "pass", "measured": 1.5, "limit": 2.0},
            {"gate": "agreement", "outcome": "warn", "measured": None, "limit": 1.0},
        ]
    }
}


class TestNeptuneRegistry(RegistryConformance):
    @pytest.fixture
    def registry_uri(self, neptune_project: str) -> str:
        return f"neptune://{neptune_project}"

    @pytest.mark.slow
    def test_two_processes_register_two_artifacts_without_a_gap(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        super().test_two_processes_register_two_artifacts_without_a_gap(registry, registry_uri)


@pytest.fixture
def registry(neptune_project: str) -> ModelRegistry:
    return open_registry(f"neptune://{neptune_project}")


def test_promotion_needs_the_artifact(neptune_project: str) -> None:
    check_promotion_needs_the_artifact(f"neptune://{neptune_project}", get_settings())


def test_real_client_finds_the_version_in_a_process_of_its_own(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter, tmp_path: Path
) -> None:
    files = version_files(tmp_path / "given")
    (files.report / "report.json").write_text(json.dumps(REPORT))
    entry = version_entry("ner", 1)
    registry.register(entry, files)
    registry.set_stage("ner", 1, "production", who="ann", reason="tested")
    (identity,) = neptune_client("list_versions", neptune_project)
    fields = neptune_client("read_version", neptune_project, identity)
    assert fields["artifact"] == {"uri": entry.artifact_uri, "digest": entry.artifact_digest}
    assert fields["source"]["uri"] == entry.source_uri
    assert fields["metrics"] == entry.figures
    assert fields["gates"]["latency"] == {"outcome": "pass", "measured": 1.5, "limit": 2.0}
    assert fields["gates"]["agreement"] == {"outcome": "warn", "limit": 1.0}
    assert (fields["sys"]["stage"], fields["verdict"]) == ("production", entry.verdict)
    card = json.loads(neptune_client.file(neptune_project, identity, "model/model_card"))
    assert card["model_params"] == {"huggingface_pipeline_task": entry.spec["hf_task"]}
    for kind, path in card["model_test_files"].items():
        assert files.test_files is not None
        body = neptune_client.file(neptune_project, identity, path)
        assert body == (files.test_files / f"{kind}.json").read_bytes()
    assert set(card["model_test_files"]) == {"inputs", "inference_params", "predictions"}
    for path, file in (
        ("artifact/manifest", files.artifact / "manifest.json"),
        ("report/html", files.report / "report.html"),
        ("report/json", files.report / "report.json"),
    ):
        assert neptune_client.file(neptune_project, identity, path) == file.read_bytes()
    # The weights stay in the store, and the card's path leads there.
    reference = json.loads(fields["model"]["artifact"]["reference"])
    assert reference == {"uri": entry.artifact_uri, "digest": entry.artifact_digest}


def test_weights_are_uploaded_where_that_is_asked_for(
    neptune_project: str, neptune_client: NeptuneWriter, tmp_path: Path, settings: Settings
) -> None:
    upload_settings = Settings(home=settings.home, neptune_upload_weights=True)
    files = version_files(tmp_path / "given")
    inner = files.artifact / "components" / "default" / "graph.bin"
    inner.parent.mkdir(parents=True)
    # Larger than one part of the client's upload.
    inner.write_bytes(bytes(12 << 20))
    open_registry(f"neptune://{neptune_project}", upload_settings).register(version_entry("ner", 1), files)
    (identity,) = neptune_client("list_versions", neptune_project)
    for path in files.artifact.rglob("*"):
        if path.is_file():
            attribute = f"model/artifact/{path.relative_to(files.artifact).as_posix()}"
            assert neptune_client.file(neptune_project, identity, attribute) == path.read_bytes()


def test_source_version_lists_its_compiled_versions_beside_existing_entries(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter
) -> None:
    existing_entry = {
        "project": "team/other",
        "model": "OTH-A",
        "with_id": "OTH-A-1",
        "time_stamp": "2025-01-01T00:00:00",
    }
    sources = [
        neptune_client("make_version", neptune_project, "SRC", fields, {}, {})
        for fields in ({}, {"model/compiled_model_versions": json.dumps([existing_entry])})
    ]
    for number, source in enumerate(sources, 1):
        entry = version_entry("ner", number).model_copy(
            update={"source_uri": f"neptune://{neptune_project}/{source}"}
        )
        registry.register(entry)
        registry.register(entry)
        (version,) = registry.compiled_from(entry.source_uri)
        assert version.version == number
    versions = neptune_client("list_versions", neptune_project)
    ids = sorted(identity for identity, is_complete in versions.items() if is_complete)
    path = "model/compiled_model_versions"
    first = json.loads(neptune_client.file(neptune_project, sources[0], path))
    second = json.loads(
        neptune_client("read_version", neptune_project, sources[1])["model"]["compiled_model_versions"]
    )
    assert [item["with_id"] for item in first] == ids[:1]
    assert {key: first[0][key] for key in ("project", "model")} == {
        "project": neptune_project,
        "model": ids[0].rpartition("-")[0],
    }
    assert second[0] == existing_entry
    assert [item["with_id"] for item in second[1:]] == ids[1:]


def test_source_that_cannot_list_its_compiled_versions_is_a_warning(
    registry: ModelRegistry,
    neptune_project: str,
    neptune_client: NeptuneWriter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "deep").write_text("[" * 100_000)
    path = "model/compiled_model_versions"
    source_ids = [
        neptune_client("make_version", neptune_project, "SRC", {}, {path: str(tmp_path / name)}, {})
        for name in ("list", "deep")
    ]
    for number, source in enumerate((f"/{source_ids[0]}", f"/{source_ids[1]}", "/GONE-1", "#ner@3"), 1):
        caplog.clear()
        entry = version_entry("ner", number).model_copy(
            update={"source_uri": f"neptune://{neptune_project}{source}"}
        )
        assert registry.register(entry).version == number
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert source in warning.message
        assert "\n" not in warning.message


def test_of_two_complete_versions_of_one_artifact_the_first_one_stays(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter
) -> None:
    version = registry.register(version_entry("ner", 1))
    (first,) = neptune_client("list_versions", neptune_project)
    fields_of_first = neptune_client("read_version", neptune_project, first)["registry"]
    # The leftovers of another machine that registers at the same moment.
    key = first.rpartition("-")[0].partition("-")[2]
    fields = {f"registry/{name}": fields_of_first[name] for name in ("digest", "name", "entry_json", "complete")}
    second = neptune_client("make_version", neptune_project, key, fields, {}, {})
    assert set(neptune_client("list_versions", neptune_project)) == {first, second}
    assert registry.register(version_entry("ner", 1)) == version
    assert list(neptune_client("list_versions", neptune_project)) == [first]


def test_version_that_names_another_model_is_not_one_of_its_versions(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ner", "other"):
        registry.register(version_entry(name, 1))
    identities = neptune_client("list_versions", neptune_project)
    fields = {
        identity: neptune_client("read_version", neptune_project, identity)["registry"] for identity in identities
    }
    ner = next(identity for identity, values in fields.items() if values["name"] == "ner")
    forged = fields[ner]["entry_json"].replace('"ner"', '"other"')
    key = ner.rpartition("-")[0].partition("-")[2]
    values = {
        "registry/digest": "0" * 64,
        "registry/name": "other",
        "registry/entry_json": forged,
        "registry/complete": True,
    }
    identity = neptune_client("make_version", neptune_project, key, values, {}, {})
    assert [(version.name, version.version) for version in registry.versions("other")] == [("other", 1)]
    assert f"ignoring {identity}, which is not a version of the model 'other'" in caplog.messages


def test_version_that_another_machine_completed_meanwhile_stays_though_it_is_the_second(
    registry: ModelRegistry,
    neptune_project: str,
    neptune_client: NeptuneWriter,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine_b = open_registry(f"neptune://{neptune_project}", Settings(home=settings.home_dir / "other"))
    assert isinstance(machine_b, neptune_registry.NeptuneRegistry)
    fill = neptune_registry.NeptuneRegistry._fill

    def slowly(self: neptune_registry.NeptuneRegistry, model: str, identity: str, *rest: Any) -> None:
        monkeypatch.setattr(neptune_registry.NeptuneRegistry, "_fill", fill)
        # Machine B does not see a digest yet, creates a version, and is in production before machine A completes.
        self._client.write(identity, {"registry/digest": "e" * 64})
        assert machine_b.register(version_entry("ner", 1)).version == 2
        machine_b.set_stage("ner", 2, "production", who="ann")
        self._client.write(identity, {"registry/digest": version_entry("ner", 1).artifact_digest})
        fill(self, model, identity, *rest)

    monkeypatch.setattr(neptune_registry.NeptuneRegistry, "_fill", slowly)
    assert registry.register(version_entry("ner", 1)).version == 2
    assert registry.get("ner", "production").version == 2
    assert [identity.rpartition("-")[2] for identity in neptune_client("list_versions", neptune_project)] == ["2"]


def test_of_two_versions_in_production_the_last_promoted_counts(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter
) -> None:
    for number in (1, 2):
        registry.register(version_entry("ner", number))
    registry.set_stage("ner", 2, "production", who="ann")
    registry.set_stage("ner", 1, "production", who="ann")
    # The state after a kill between the promotion of the second version and the archiving of the first.
    identities = neptune_client("list_versions", neptune_project)
    second = next(identity for identity in identities if identity.endswith("-2"))
    moved = {"sys/stage": "production", "registry/promoted_at": "2001-01-01T00:00:00+00:00"}
    neptune_client("change_version", neptune_project, second, moved, {})
    assert [version.stage for version in registry.versions("ner")] == ["archived", "production"]
    assert registry.get("ner", "production").version == 1
    assert registry.find(version_entry("ner", 2).artifact_digest)[0].stage == "archived"
    registry.set_stage("ner", 1, "production", who="ann")
    assert neptune_client("read_version", neptune_project, second)["sys"]["stage"] == "archived"
    neptune_client("change_version", neptune_project, second, moved, {})
    registry.set_stage("ner", 2, "production", who="bob")
    assert [version.stage for version in registry.versions("ner")] == ["production", "archived"]
    assert registry.promotions("ner", 2)[-1].who == "bob"


def test_old_versions_without_a_digest_go_to_the_trash_and_others_stay(
    registry: ModelRegistry, neptune_project: str, neptune_client: NeptuneWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(version_entry("ner", 1))
    (first,) = neptune_client("list_versions", neptune_project)
    key = first.rpartition("-")[0].partition("-")[2]
    lost = neptune_client("make_version", neptune_project, key, {}, {}, {})
    begun = neptune_client("make_version", neptune_project, key, {"registry/digest": "e" * 64}, {}, {})
    registry.register(version_entry("ner", 2))
    assert lost in neptune_client("list_versions", neptune_project)
    monkeypatch.setattr(neptune_registry, "_LITTER_AGE_S", -60)
    registry.register(version_entry("ner", 3))
    remaining = neptune_client("list_versions", neptune_project)
    assert lost not in remaining
    assert not remaining.pop(begun)
    assert list(remaining.values()) == [True] * 3


def test_reason_that_neptune_would_cut_is_refused(registry: ModelRegistry) -> None:
    registry.register(version_entry("ner", 1))
    with pytest.raises(RegistryError, match="20000 characters"):
        registry.set_stage("ner", 1, "staging", who="ann", reason="x" * 20_000)
    assert registry.get("ner", 1).stage == "none"


@pytest.mark.parametrize("uri", ["neptune:workspace/project", "neptune://project", "neptune://a/b/c"])
def test_uri_without_a_project_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="Expected the URI of a Neptune project"):
        open_registry(uri)
