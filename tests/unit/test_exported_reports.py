"""What `compile` and `inspect` copy out of the store runs no code of the store, whoever wrote it there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from compileflow.catalog import open_store
from compileflow.errors import ManifestError
from compileflow.settings import Settings
from compileflow.steps.report_file import data_docs_beside, export_bundle, export_report

FAILURE = {"subject": {"reason": "fail"}, "failure": {"figure": None}}
Stored = Callable[[Mapping[str, bytes]], str]


@pytest.fixture
def stored(settings: Settings, tmp_path: Path) -> Stored:
    """Store files as the folder of a report and return its URI."""

    def store(files: Mapping[str, bytes]) -> str:
        folder = tmp_path / "report"
        for name, body in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(body)
        return open_store(settings.resolved_store_uri(), settings).put_folder(folder).uri

    return store


def archive(tmp_path: Path) -> bytes:
    np.savez_compressed(tmp_path / "arrays.npz", mask=np.ones(2))
    return (tmp_path / "arrays.npz").read_bytes()


def test_script_and_modules_of_the_store_stay_there(stored: Stored, settings: Settings, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'trapped')!r}, 'w').close()\n".encode()
    names = ("reproduce.py", "json.py", "pathlib.py", "compileflow/__init__.py", "sitecustomize.py")
    files = {f"bundle/{name}": trap for name in names}
    files |= {"bundle/failure.json": json.dumps(FAILURE).encode(), "bundle/inputs.npz": archive(tmp_path)}
    uri = stored(files | {"report.json": b"{}"})
    bundle = export_bundle(uri, settings)
    assert bundle is not None
    assert sorted(path.name for path in bundle.iterdir()) == ["failure.json", "inputs.npz", "reproduce.py"]
    completed = subprocess.run(
        [sys.executable, "reproduce.py", "--help"], cwd=bundle, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    assert "Show the failure of a compiled model" in completed.stdout
    assert not (tmp_path / "trapped").exists()


def test_bundle_that_an_earlier_version_copied_whole_is_replaced(stored: Stored, settings: Settings) -> None:
    uri = stored({"bundle/failure.json": json.dumps(FAILURE).encode()})
    bundle = export_bundle(uri, settings)
    assert bundle is not None
    (bundle / "json.py").write_text("raise SystemExit('trapped')")
    export_bundle(uri, settings)
    assert sorted(path.name for path in bundle.iterdir()) == ["failure.json", "reproduce.py"]


def test_text_of_a_failure_stays_text_in_the_script(stored: Stored, settings: Settings) -> None:
    """The text holds what would end its literal, and the name of the script's other place."""
    words = "ARRAYS_TEXT+__import__('os').abort()+ARRAYS_TEXT '\"\"\" \\N{BEL} \u202e"
    bundle = export_bundle(
        stored({"bundle/failure.json": json.dumps(FAILURE | {"more": words}).encode()}), settings
    )
    assert bundle is not None
    tree = ast.parse((bundle / "reproduce.py").read_text("utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert json.loads(values["FAILURE"])["more"] == words
    assert values["ARRAYS"] == ""


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("failure.json", b"import os"),
        ("failure.json", b"[" * 100_000),
        ("failure.json", b"[]"),
        ("inputs.npz", b"\x80\x04\x95pickle"),
    ],
)
def test_bundle_of_other_files_is_not_shown(stored: Stored, settings: Settings, name: str, body: bytes) -> None:
    files = {"bundle/failure.json": json.dumps(FAILURE).encode(), f"bundle/{name}": body}
    with pytest.raises(ManifestError, match=name):
        export_bundle(stored(files), settings)


class Policy(HTMLParser):
    """The first policy of a page, and whether anything came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_of_a_report_starts_with_a_policy_that_forbids_scripts(stored: Stored, settings: Settings) -> None:
    evil = b"<!doctype html><script>fetch('file:///etc/passwd')</script>"
    uri = stored({"report.html": evil, "data_docs/index.html": evil, "data_docs/more.svg": b"<svg/>"})
    page = export_report(uri, settings)
    docs = data_docs_beside(page)
    assert docs is not None
    assert [path.name for path in docs.parent.iterdir()] == ["index.html"]
    for file in (page, docs):
        policy = Policy()
        policy.feed(file.read_text("utf-8"))
        tag, attributes = policy.tags[0]
        assert (tag, attributes["http-equiv"]) == ("meta", "Content-Security-Policy")
        directives = dict(part.split(maxsplit=1) for part in str(attributes["content"]).split("; "))
        assert directives == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}
