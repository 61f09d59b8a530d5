"""docs/adding-a-target.md, followed to the letter: its files are the example's, and its commands work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from compileflow.spec import GRAPH_TASKS, TEXT_TASKS, HfTask
from compileflow.testing.targets import TargetConformance
from tests.conftest import ModelFactory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-target.md"
EXAMPLE = ROOT / "examples" / "targets" / "torch-export"
_FILE = re.compile(
    r"^`(?P<path>[\w./-]+)`(?:, continued)?:\n\n```\w+\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_files() -> dict[str, str]:
    """Return the files of the page by path, their pieces joined as a formatter spaces them."""
    files: dict[str, str] = {}
    for match in _FILE.finditer(PAGE.read_text("utf-8")):
        path, text = match["path"], match["text"]
        if path in files:
            text = files[path] + ("\n" if text.startswith(" ") else "\n\n") + text
        files[path] = text
    return files


@dataclass(frozen=True)
class Installed:
    """The page's distribution, copied to a folder and installed beside this environment."""

    folder: Path
    site: Path

    def run(self, line: str, *, cwd: Path, **environment: str) -> str:
        """Run a command of the page and return what it printed."""
        words = shlex.split(line)
        if words[:2] == ["pip", "install"]:
            # Beside, because other tests list exactly the targets that compileflow has itself.
            offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
            words = ["python", "-m", *words[:2], *offline, "--target", str(self.site), *words[2:]]
        elif words[0] == "compileflow":
            words = ["python", "-m", "compileflow", *words[1:]]
        assert words[0] == "python", line
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(self.site)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """The page's commands: in the distribution's folder, and in compileflow's."""
    return [block.splitlines() for block in _CONSOLE.findall(PAGE.read_text("utf-8"))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, commands: list[list[str]]) -> Installed:
    """Install the example's own folder, which holds the page's files, as the page says."""
    made = Installed(tmp_path_factory.mktemp("my-target"), tmp_path_factory.mktemp("site"))
    # A copy, so that running its tests leaves nothing in the repository.
    shutil.copytree(EXAMPLE, made.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    made.run(commands[0][0], cwd=made.folder)
    return made


def test_page_shows_every_file_of_the_example_as_it_is() -> None:
    files = {
        path.relative_to(EXAMPLE).as_posix(): path.read_text("utf-8")
        for path in EXAMPLE.rglob("*")
        if path.is_file() and path.suffix in (".py", ".toml")
    }
    assert "pyproject.toml" in files
    assert page_files() == files


@pytest.mark.slow
def test_installed_target_passes_the_suite_for_one_task_and_is_listed(
    installed: Installed, commands: list[list[str]], tmp_path: Path
) -> None:
    _, run_tests, list_targets = commands[0]
    others = " or ".join(task for task in TEXT_TASKS if task is not HfTask.TEXT_CLASSIFICATION)
    said = installed.run(
        run_tests,
        cwd=installed.folder,
        PYTEST_DEBUG_TEMPROOT=str(tmp_path),
        PYTEST_ADDOPTS=f"-k 'not ({others})'",
    )
    # A summary with anything but passed tests has more words.
    assert re.search(r"^=+ \d+ passed, \d+ deselected in ", said, re.MULTILINE), said
    listed = installed.run(list_targets, cwd=installed.folder, COLUMNS="200")
    assert re.search(r"torch-export +│ yes +│ yes +│ fp32 ", listed), listed


@pytest.mark.slow
def test_installed_target_passes_the_whole_suite(
    installed: Installed, commands: list[list[str]], tmp_path: Path
) -> None:
    said = installed.run(commands[0][1], cwd=installed.folder, PYTEST_DEBUG_TEMPROOT=str(tmp_path))
    # A summary with anything but passed tests has more words.
    passed = re.search(r"^=+ (\d+) passed in ", said, re.MULTILINE)
    assert passed is not None, said
    suite = [name for name in dir(TargetConformance) if name.startswith("test_")]
    assert int(passed[1]) >= len(suite) + len([task for task in TEXT_TASKS if task in GRAPH_TASKS]) - 1


@pytest.mark.slow
def test_installed_target_compiles_proves_and_registers(
    installed: Installed, commands: list[list[str]], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    (tmp_path / "my-model").symlink_to(tiny_model(HfTask.TEXT_CLASSIFICATION))
    [line] = commands[1]
    said = installed.run(
        f"{line} --json",
        cwd=tmp_path,
        PYTHONPATH=f"{installed.site}{os.pathsep}{ROOT}",
        COMPILEFLOW_HOME=str(tmp_path / "home"),
    )
    [result] = json.loads(said)
    assert result["target"] == "torch-export"
    assert result["validated"]["outcome"] == "pass"
    assert result["version"]["version"] == 1
