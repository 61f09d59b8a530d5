"""The embedded registry: the suite for all registries, and the cases that only a file has."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from compileflow.catalog import open_registry
from compileflow.errors import RegistryError, SpecError
from compileflow.registries import sqlite
from compileflow.registries.sqlite import _errors
from compileflow.testing.processes import at_once, say
from compileflow.testing.registries import RegistryConformance, version_entry


class TestSqliteRegistry(RegistryConformance):
    @pytest.fixture
    def registry_uri(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'registry.db'}"


def test_reading_an_absent_registry_does_not_make_one(tmp_path: Path) -> None:
    assert list(open_registry(f"sqlite:///{tmp_path / 'registry.db'}").versions()) == []
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_of_the_file_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "registry.db"
    open_registry(f"sqlite:///{path}").register(version_entry("ner", 1))
    assert path.is_file()


def test_path_below_a_plain_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RegistryError, match=r"ENOTDIR|EEXIST") as caught:
        open_registry(f"sqlite:///{tmp_path / 'file' / 'registry.db'}").register(version_entry("ner", 1))
    assert "choose another folder" in caught.value.hint


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError, match="not a database"):
        open_registry(f"sqlite:///{path}").versions()


@pytest.mark.parametrize("entry", ["{", "[]", '{"name": "ner", "new": 1}'])
def test_row_that_holds_no_entry_is_one_clear_error(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "registry.db"
    registry = open_registry(f"sqlite:///{path}")
    registry.register(version_entry("ner", 1))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE version SET entry = ?", (entry,))
    db.close()
    with pytest.raises(RegistryError, match="Version 1 in the registry's file does not hold an entry") as caught:
        registry.versions("ner")
    assert "\n" not in str(caught.value)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    open_registry(f"sqlite:///{path}").register(version_entry("ner", 1))
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RegistryError, match="schema 99"):
        open_registry(f"sqlite:///{path}").versions()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "CREATE TRIGGER other AFTER INSERT ON promotion BEGIN DELETE FROM promotion; END",
            "has the trigger 'other', which compileflow did not write",
        ),
        (
            "ALTER TABLE model ADD COLUMN slow AS (hex(zeroblob(6000000)))",
            "has the table 'model', which compileflow",
        ),
        ("CREATE VIEW other AS SELECT 1", "has the view 'other', which compileflow did not write"),
        ("UPDATE version SET entry = zeroblob(20000000)", "string or blob too big"),
    ],
)
def test_file_that_could_hold_up_its_readers_is_refused(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "registry.db"
    registry = open_registry(f"sqlite:///{path}")
    registry.register(version_entry("ner", 1))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(change)
    with pytest.raises(RegistryError, match=message):
        registry.versions("ner")
    with pytest.raises(RegistryError, match=message):
        registry.set_stage("ner", 1, "production", who="ann")


def test_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE precious(value)")
    with pytest.raises(RegistryError, match="is the database of another program"):
        open_registry(f"sqlite:///{path}").register(version_entry("ner", 1))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_schema").fetchall() == [("precious",)]


@pytest.mark.parametrize("exists", [True, False])
def test_journal_that_names_a_file_to_delete_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    monkeypatch.setattr(sqlite, "_MAKING_S", 0.1)
    path, precious = tmp_path / "registry.db", tmp_path / "precious.txt"
    precious.write_text("mine")
    registry = open_registry(f"sqlite:///{path}")
    if exists:
        registry.register(version_entry("ner", 1))
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
    name = str(precious).encode()
    # The page number, length, sum and magic number of a super-journal's name, behind any bytes.
    trailer = len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + bytes.fromhex("d9d505f920a163d7")
    (tmp_path / "registry.db-journal").write_bytes(b"\1" * 1024 + b"\0\0\0\1" + name + trailer)
    with pytest.raises(RegistryError, match="lies beside the registry, which compileflow did not write"):
        registry.register(version_entry("ner", 2))
    if exists:
        with pytest.raises(RegistryError, match="lies beside the registry"):
            registry.versions()
    assert precious.read_text() == "mine"


def test_link_to_nothing_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "registry.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(RegistryError, match="is a link to nothing"):
        open_registry(f"sqlite:///{tmp_path / 'registry.db'}").register(version_entry("ner", 1))
    assert not (tmp_path / "elsewhere.db").exists()


def test_name_in_an_entry_does_not_make_it_a_version_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    registry = open_registry(f"sqlite:///{path}")
    for name in ("ner", "other"):
        registry.register(version_entry(name, 1))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE version SET entry = replace(entry, '\"ner\"', '\"other\"')")
    registry.set_stage("ner", 1, "production", who="ann")
    assert [(version.name, version.stage) for version in registry.versions()] == [
        ("ner", "production"),
        ("other", "none"),
    ]


def test_newest_is_the_highest_number_even_if_the_clock_went_back(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    registry = open_registry(f"sqlite:///{path}")
    for number in (1, 2):
        registry.register(version_entry("ner", number))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE version SET created_at = '2001-01-01T00:00:00+00:00' WHERE number = 2")
    db.close()
    assert [version.version for version in registry.versions("ner")] == [2, 1]


@pytest.mark.parametrize("uri", ["sqlite:registry.db", "sqlite://registry.db", "sqlite:///registry.db"])
def test_uri_without_a_path_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="sqlite:////absolute"):
        open_registry(uri)


def test_one_of_two_that_are_promoted_at_once_is_archived(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    registry = open_registry(uri)
    for number in (1, 2):
        registry.register(version_entry("ner", number))
    at_once(f"{__name__}:promote", (uri, "1"), (uri, "2"))
    assert sorted(version.stage for version in registry.versions("ner")) == ["archived", "production"]
    changes = [change.stage for number in (1, 2) for change in registry.promotions("ner", number)]
    assert sorted(changes) == ["archived", "production", "production"]


@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
def test_registry_in_a_read_only_folder_is_read() -> None:
    # Not below tmp_path, which other users may not enter.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.db"
        registry = open_registry(f"sqlite:///{path}")
        version = registry.register(version_entry("ner", 1))
        with read_only(path.parent):
            assert list(registry.versions("ner")) == [version]
            assert list(registry.promotions("ner", 1)) == []
            with pytest.raises(RegistryError, match=r"readonly|unable to open"):
                registry.register(version_entry("ner", 2))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder and its files read-only; root becomes the user nobody within the block."""
    nobody = 65534
    root = os.geteuid() == 0
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    if root:
        os.seteuid(nobody)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def promote(uri: str, number: str) -> None:
    """Promote one version; runs in another process."""
    say(open_registry(uri).set_stage("ner", int(number), "production", who="ann").stage)


@pytest.mark.parametrize("words", ["database or disk is full", "disk I/O error"])
def test_full_disk_is_named(tmp_path: Path, words: str) -> None:
    with pytest.raises(RegistryError, match="Free some space on its disk"), _errors(tmp_path / "registry.db"):
        raise sqlite3.OperationalError(words)
