"""README and docs are true: their code runs, their tables are fresh, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import compileflow
from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.in_process import InProcess

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Another test runs these commands, or they change an environment.
NOT_RUN = (
    "pip install",
    "ARTIFACT=",
    "compileflow import-older",
)
# Pages with this command write that folder themselves.
PULL = "compileflow pull my-model compiled/my-model"
# Commands that register a version that a page takes for granted.
BEFORE = {
    "docs/how-to/serve-a-compiled-model.md": "compileflow compile ./my-model --target onnx-runtime --name my-model"
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workspace(settings: Settings, in_process: InProcess, tiny_model: ModelFactory, tmp_path: Path) -> Path:
    """A folder with everything that the pages' commands and code name."""
    folder = tmp_path / "workspace"
    (folder / "compiled").mkdir(parents=True)
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    (folder / "my-model").symlink_to(model)
    shutil.copyfile(ROOT / "src/compileflow/validation/data/sentences_en.txt", folder / "examples.txt")
    (suite,) = blocks(ROOT / "docs/how-to/validate-on-your-own-examples.md", "yaml")
    (folder / "our-suite.yaml").write_text(suite, "utf-8")
    with in_process.pipeline(settings) as pipeline:
        artifact = pipeline.compile(pipeline.request(model))
    copy_artifact(open_artifact(artifact.uri, settings=settings), folder / "compiled" / "my-model")
    return folder


def test_python_of_the_readme_runs(
    settings: Settings, in_process: InProcess, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    python_blocks = blocks(ROOT / "README.md", "python")
    assert python_blocks
    monkeypatch.chdir(workspace)
    with in_process.pipeline(settings) as pipeline:
        for block in python_blocks:
            exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert "BaseModelOutput" in capsys.readouterr().out
    # The first of two calls compiles and validates; the second only loads.
    assert pipeline.counts == {"compile": 1, "validate": 1}


def commands(page: Path) -> list[str]:
    """Return the commands of a page that this file runs."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all pages, which compile the same model: the first page compiles it, the others find it."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize(
    ("page", "server"),
    [
        pytest.param("README.md", "the run's", id="README"),
        pytest.param("README.md", "embedded", id="README, embedded server", marks=pytest.mark.slow),
        pytest.param("docs/getting-started.md", "none", id="getting started", marks=pytest.mark.slow),
        pytest.param("docs/how-to/compile-a-model.md", "the run's", id="compile", marks=pytest.mark.slow),
        pytest.param(
            "docs/how-to/validate-on-your-own-examples.md", "none", id="validate", marks=pytest.mark.slow
        ),
        pytest.param("docs/how-to/serve-a-compiled-model.md", "none", id="serve", marks=pytest.mark.slow),
        pytest.param("docs/how-to/sign-and-verify.md", "none", id="sign", marks=pytest.mark.slow),
    ],
)
def test_commands_and_then_the_python_of_a_page_run(
    settings: Settings, workspace: Path, store: Path, request: pytest.FixtureRequest, page: str, server: str
) -> None:
    if server == "the run's":
        request.getfixturevalue("flows_on_server")
    environment = os.environ | {
        "COMPILEFLOW_HOME": str(settings.home_dir),
        "COMPILEFLOW_STORE_URI": store.as_uri(),
        "PYTHONPATH": str(ROOT),
    }
    lines = commands(ROOT / page)
    if PULL in lines:
        shutil.rmtree(workspace / "compiled")
    if page in BEFORE:
        lines.insert(0, BEFORE[page])
    runs = [(line, words_of(line)) for line in lines]
    if page != "README.md":
        runs += [(block, [sys.executable, "-c", block]) for block in blocks(ROOT / page, "python")]
    assert runs
    for text, words in runs:
        process = subprocess.run(
            words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, f"{text}\n{process.stdout}{process.stderr}"


def words_of(line: str) -> list[str]:
    """Return a command of a page as this test runs it: with this Python, and without what takes minutes."""
    words = shlex.split(line)
    if words[0] == "make":
        words = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
    elif words[0] == "compileflow":
        words = [sys.executable, "-m", "compileflow", *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    if "auto" in words:
        # Two candidates are enough to see that the command is right.
        words += ["--among", "torchscript", "--among", "onnx-runtime", "--precision", "fp32"]
    return words


def test_tables_from_code_are_fresh() -> None:
    process = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


# These pages name files of other repositories.
OTHER_FILES = ("add-a-target.md", "architectures.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    if page.name in OTHER_FILES:
        return
    for path in re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|yaml|toml))`", text):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "src" / "compileflow")), path
    for name in re.findall(r"`compileflow\.([a-z_.]+)`", text):
        path = ROOT / "src" / "compileflow" / name.replace(".", "/")
        assert name in compileflow.__all__ or path.is_dir() or path.with_suffix(".py").exists(), name


def test_picture_of_the_architecture_shows_the_bands_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    bands = next(contract["layers"] for contract in contracts if contract.get("exhaustive"))
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8")
    drawn = re.findall(r'font-weight="600"[^>]*>([^<]+)<', picture)

    assert [set(re.split(r" [|:] ", band)) for band in bands] == [set(band.split(" · ")) for band in drawn]
    assert len(drawn) <= 8
