"""A registry file of every older schema can be read unchanged, and the first write migrates it.

registry-v1.db was made by the compileflow of its day: three versions of two names, one of them with figures
that are not finite.
"""

from __future__ import annotations

import math
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from compileflow.catalog import open_registry
from compileflow.contracts import ModelRegistry
from compileflow.errors import RegistryError
from compileflow.registries import sqlite
from compileflow.registries.sqlite import SCHEMA_VERSION
from compileflow.testing.registries import version_entry

FOLDER = Path(__file__).parent


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    return Path(shutil.copy(FOLDER / "registry-v1.db", tmp_path / "registry.db"))


@pytest.fixture
def registry(old_file: Path) -> ModelRegistry:
    return open_registry(f"sqlite:///{old_file}")


def schema_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_every_older_schema_has_a_file_here() -> None:
    names = {path.name for path in FOLDER.glob("registry-v*.db")}
    assert names == {f"registry-v{schema}.db" for schema in range(1, SCHEMA_VERSION)}


def test_old_registry_is_read_and_left_as_it_is(registry: ModelRegistry, old_file: Path) -> None:
    assert [(version.name, version.version, version.verdict) for version in registry.versions()] == [
        ("keywords", 1, "pass"),
        ("ner", 2, "warn"),
        ("ner", 1, "pass"),
    ]
    assert registry.get("ner", 1).entry == version_entry("ner", 1)
    assert registry.get("ner", "none").version == 2
    (keywords,) = registry.compiled_from("file:///models/tiny")
    assert math.isnan(keywords.figures["speedup"])
    assert list(registry.promotions("ner", 1)) == []
    with pytest.raises(RegistryError, match="'production'"):
        registry.get("ner", "production")
    assert old_file.read_bytes() == (FOLDER / "registry-v1.db").read_bytes()
    assert [path.name for path in old_file.parent.iterdir()] == [old_file.name]


def test_first_write_migrates_an_old_registry(registry: ModelRegistry, old_file: Path) -> None:
    versions = list(registry.versions("ner"))
    assert registry.set_stage("ner", 2, "production", who="ann").stage == "production"
    assert schema_of(old_file) == SCHEMA_VERSION
    assert list(registry.versions("ner")) == [versions[0].model_copy(update={"stage": "production"}), versions[1]]
    assert registry.register(version_entry("ner", 1)) == versions[1]
    assert registry.register(version_entry("ner", 3)).version == 3


def test_migration_that_fails_leaves_an_old_registry(
    registry: ModelRegistry, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sqlite._MIGRATIONS
    monkeypatch.setattr(sqlite, "_MIGRATIONS", (first, f"{second}; CREATE TABLE promotion(again)"))
    with pytest.raises(RegistryError, match="promotion already exists"):
        registry.register(version_entry("ner", 3))
    assert schema_of(old_file) == 1
    assert [version.stage for version in registry.versions("ner")] == ["none", "none"]
