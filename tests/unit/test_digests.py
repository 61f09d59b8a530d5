"""Digests of files, folders and JSON values."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from compileflow.contracts.digests import (
    canonical_json,
    folder_digest,
    json_digest,
    list_files,
    safe_relative_path,
)
from compileflow.errors import IntegrityError


def test_equal_values_have_equal_bytes() -> None:
    assert canonical_json({"b": 1, "a": [1, "ü"]}) == '{"a":[1,"ü"],"b":1}'.encode()
    assert json_digest({"b": 1, "a": 2}) == json_digest({"a": 2, "b": 1})
    assert json_digest({"a": 1}) != json_digest({"a": "1"})


def test_nan_has_no_digest() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_digest({"a": float("nan")})


def test_folder_digest_is_the_sha256_of_the_documented_listing(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"xyz")
    (tmp_path / "a").write_bytes(b"")
    files = [
        f'{{"path":"{name}","sha256":"{hashlib.sha256(body).hexdigest()}","size_bytes":{len(body)}}}'
        for name, body in (("a", b""), ("b/c", b"xyz"))
    ]
    listing = f'{{"files":[{",".join(files)}],"schema_version":1}}'
    assert folder_digest(list_files(tmp_path)) == hashlib.sha256(listing.encode()).hexdigest()


def test_folder_digest_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).write_text(name)
    files = list_files(tmp_path)
    assert [record.path for record in files] == ["a", "b", "c"]
    assert folder_digest(reversed(files)) == folder_digest(files)


def test_folder_digest_sees_a_byte_and_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0")
    digests = {folder_digest(list_files(tmp_path))}
    path.write_bytes(b"1")
    digests.add(folder_digest(list_files(tmp_path)))
    path.rename(tmp_path / "b")
    digests.add(folder_digest(list_files(tmp_path)))
    assert len(digests) == 3


def test_only_the_files_asked_for_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert [record.path for record in list_files(tmp_path, paths=["b"])] == ["b"]


def test_link_inside_the_folder_is_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").symlink_to("a")
    first, second = list_files(tmp_path)
    assert first.sha256 == second.sha256


def test_entry_that_is_not_a_file_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    odd = folder / "odd"
    for make in (
        lambda: odd.symlink_to("../outside/secret"),
        lambda: odd.symlink_to("../outside"),
        lambda: odd.symlink_to("absent"),
        lambda: os.mkfifo(odd),
    ):
        make()
        with pytest.raises(IntegrityError, match="odd"):
            list_files(folder)
        odd.unlink()
    assert list_files(folder) == ()


@pytest.mark.parametrize("name", ["back\\slash", "c:drive", os.fsdecode(b"\xff")])
def test_name_that_another_machine_cannot_write_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(IntegrityError, match="is not a portable file name"):
        list_files(tmp_path)


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is not a folder"):
        list_files(tmp_path / "absent")


@pytest.mark.parametrize("path", ["a", "a/b.c", "a..b/..c", "é"])
def test_path_below_the_folder_is_safe(path: str) -> None:
    assert safe_relative_path(path) == path


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../a", "a/../b", "/a", "a\\b", "..\\a", "C:/a", "c:a", "a\0b", "a//b", "./a", "a/"]
)
def test_path_that_may_leave_the_folder_is_not_safe(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        safe_relative_path(path)
