"""registry:NAME@REF as a reference to a compiled model, and as the source model that it was compiled from."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.catalog import get_source, open_registry, open_store, parse_reference, resolve_reference
from compileflow.contracts import ModelVersion
from compileflow.errors import RegistryError, SourceError, SpecError
from compileflow.registries.references import Reference
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.fetch import fetch_source
from compileflow.steps.register import default_name
from compileflow.testing.registries import version_entry
from tests.conftest import ModelFactory
from tests.unit.test_lazy_import import heavy_modules_after


@pytest.fixture
def versions(settings: Settings) -> list[ModelVersion]:
    """Register three versions of `ner`, the second one in production."""
    registry = open_registry(settings.resolved_registry_uri(), settings)
    versions = [registry.register(version_entry("ner", n)) for n in (1, 2, 3)]
    versions[1] = registry.set_stage("ner", 2, "production", who="ann")
    return versions


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("registry:ner", Reference(None, "ner", None)),
        ("registry:ner.v2@production", Reference(None, "ner.v2", "production")),
        ("registry:ner@3", Reference(None, "ner", 3)),
        ("neptune://ws/project#ner@production", Reference("neptune://ws/project", "ner", "production")),
        ("mlflow:http://u:p@h:5000#ner@3", Reference("mlflow:http://u:p@h:5000", "ner", 3)),
        ("sqlite:////a#b/x.db#ner", Reference("sqlite:////a#b/x.db", "ner", None)),
    ],
)
def test_reference_is_read(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["owner/name", "./folder", "/a#b", "hf://owner/name#x", "s3://bucket/x", "C#", ""]
)
def test_other_text_is_not_a_reference(text: str, settings: Settings) -> None:
    assert parse_reference(text) is None
    with pytest.raises(SpecError, match="is not a reference to a registered model") as caught:
        resolve_reference(text, settings)
    assert "registry:NAME@STAGE" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["registry:", "registry:a b", "registry:ner@", "mlflow:http://u:p@h#", "sqlite:x#-"]
)
def test_name_that_cannot_be_says_how_to_write_it(text: str) -> None:
    with pytest.raises(SpecError, match="Expected a reference to a registered model") as caught:
        parse_reference(text)
    assert "REGISTRY_URI#NAME" in caught.value.hint
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize("ref", ["live", "0", "-1", "03", "1.5", "Production"])
def test_ref_that_cannot_be_lists_the_stages(ref: str) -> None:
    with pytest.raises(SpecError, match=f"'{ref}'") as caught:
        parse_reference(f"registry:ner@{ref}")
    assert "none, staging, production, archived" in caught.value.hint


def test_reference_means_a_number_a_stage_or_the_newest(versions: list[ModelVersion], settings: Settings) -> None:
    first, second, third = versions
    elsewhere = f"{settings.resolved_registry_uri()}#ner@1"
    references = ["registry:ner@1", elsewhere, "registry:ner@production", "registry:ner"]
    assert [resolve_reference(text, settings) for text in references] == [first, first, second, third]


def test_first_of_several_registries_is_read(versions: list[ModelVersion], settings: Settings) -> None:
    uris = f"{settings.resolved_registry_uri()}, sqlite:////absent.db"
    several = settings.model_copy(update={"registry_uri": uris})
    assert resolve_reference("registry:ner@1", several) == versions[0]


@pytest.mark.usefixtures("versions")
def test_absent_version_lists_what_there_is(settings: Settings) -> None:
    for ref, hint in (("4", "3, 2, 1"), ("staging", "production (2)")):
        with pytest.raises(RegistryError, match=ref) as caught:
            resolve_reference(f"registry:ner@{ref}", settings)
        assert hint in caught.value.hint
    with pytest.raises(RegistryError, match="'nerd'") as caught:
        resolve_reference("registry:nerd", settings)
    assert "ner" in caught.value.hint


def test_parsing_imports_nothing_heavy() -> None:
    assert heavy_modules_after("from compileflow.catalog import parse_reference as p; p('registry:a')") == []


@pytest.fixture
def stored(settings: Settings, tmp_path: Path) -> ModelVersion:
    """Store a source model and register a version that was compiled from it."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes(name.encode())
    digest = open_store(settings.resolved_store_uri(), settings).put_folder(tmp_path / "model").digest
    entry = version_entry("ner", 1).model_copy(update={"source_digest": digest})
    return open_registry(settings.resolved_registry_uri(), settings).register(entry)


def test_source_is_the_model_that_the_version_was_compiled_from(
    stored: ModelVersion, settings: Settings, tmp_path: Path
) -> None:
    source = get_source("registry", settings)
    assert source.pin("registry:ner@1", None) == (stored.source_uri, None)
    located = source.locate("registry:ner", None, tmp_path / "work")
    assert (located.uri, located.revision) == (stored.source_uri, stored.source_revision)
    assert located.hf_task is HfTask.TOKEN_CLASSIFICATION
    assert {name: (located.folder / name).read_bytes() for name in located.files} == {
        name: name.encode() for name in ("config.json", "model.safetensors")
    }


@pytest.mark.usefixtures("versions")
def test_source_that_left_the_store_says_where_it_came_from(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="ner 3 is not complete in the store") as caught:
        get_source("registry", settings).locate("registry:ner", None, tmp_path / "work")
    assert "hf://owner/name" in caught.value.hint


@pytest.mark.usefixtures("stored")
def test_registered_source_has_no_revision_of_its_own(settings: Settings) -> None:
    with pytest.raises(SourceError, match="no revision 'main'"):
        get_source("registry", settings).pin("registry:ner", "main")
    with pytest.raises(SourceError, match="'live'"):
        get_source("registry", settings).pin("registry:ner@live", None)


def test_fetching_a_registered_source_keeps_its_lineage(settings: Settings, tiny_model: ModelFactory) -> None:
    store_uri = settings.resolved_store_uri()
    model = tiny_model(HfTask.TOKEN_CLASSIFICATION)
    first = fetch_source(str(model), None, store_uri=store_uri, settings=settings)
    source = {"source_uri": first.uri, "source_revision": first.revision, "source_digest": first.digest}
    entry = version_entry("ner", 1).model_copy(update=source)
    open_registry(settings.resolved_registry_uri(), settings).register(entry)
    fetched = fetch_source("registry:ner@1", None, store_uri=store_uri, settings=settings)
    assert (fetched.uri, fetched.revision, fetched.digest) == (first.uri, first.revision, first.digest)
    assert fetched.hf_task is HfTask.TOKEN_CLASSIFICATION
    # Also with the step switched off, and from the store of the run instead of the configured one.
    bare = settings.model_copy(update={"store_uri": (settings.home_dir / "unused").as_uri()})
    assert fetch_source("registry:ner@1", None, store_uri=store_uri, settings=bare).digest == first.digest
    off = fetch_source("registry:ner@1", None, store_uri=store_uri, settings=bare, enabled=False)
    assert (off.digest, off.cached) == (first.digest, True)


def test_source_comes_from_the_store_of_its_artifact_where_the_run_uses_another(
    stored: ModelVersion, settings: Settings, tmp_path: Path
) -> None:
    there = settings.resolved_store_uri()
    entry = stored.entry.model_copy(
        update={"artifact_digest": "a" * 64, "artifact_uri": f"{there}/manifests/sha256/{'a' * 64}.json"}
    )
    open_registry(settings.resolved_registry_uri(), settings).register(entry)
    elsewhere = settings.model_copy(update={"store_uri": (tmp_path / "elsewhere").as_uri()})
    located = get_source("registry", elsewhere).locate("registry:ner", None, tmp_path / "work")
    assert sorted(located.files) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://owner/name", "name"),
        ("file:///models/my%20model/", "my-model"),
        ("neptune://workspace/project/KEY-3", "KEY-3"),
        ("mlflow:http://host:5000#ner@3", "ner"),
        ("mlflow:sqlite:////srv/mlflow.db#ner@3", "ner"),
    ],
)
def test_name_to_register_under_is_the_models_own(uri: str, name: str) -> None:
    assert default_name(uri) == name
