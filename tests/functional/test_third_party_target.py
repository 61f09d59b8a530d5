"""The commands of docs/how-to/add-a-target.md work, and its files are those of the example."""

from __future__ import annotations

import importlib.util
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

from compileflow.contracts import ComponentPlan
from compileflow.spec import GRAPH_TASKS, TEXT_TASKS, CompileSpec, ComponentSpec, HfTask
from compileflow.testing.targets import TargetConformance
from tests.conftest import ModelFactory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "add-a-target.md"
EXAMPLE = ROOT / "examples" / "targets" / "torch-export"
_FILE = re.compile(
    r"^`(?P<path>[\w./-]+)`(?:, continued)?:\n\n```\w+\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_files() -> dict[str, str]:
    """Return the files of the page by path, with the pieces of a file joined as a formatter spaces them."""
    files: dict[str, str] = {}
    for match in _FILE.finditer(PAGE.read_text("utf-8")):
        path, text = match["path"], match["text"]
        if path in files:
            text = files[path] + ("\n" if text.startswith(" ") else "\n\n") + text
        files[path] = text
    return files


@dataclass(frozen=True)
class Installed:
    """The distribution of the page, copied to a folder and installed beside this environment."""

    folder: Path
    site: Path

    def run(self, line: str, *, cwd: Path, **environment: str) -> str:
        """Run a command of the page and return what it printed."""
        words = shlex.split(line)
        if words[:2] == ["pip", "install"]:
            # A separate folder, because other tests list exactly the built-in targets.
            offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
            words = ["python", "-m", *words[:2], *offline, "--target", str(self.site), *words[2:]]
        elif words[0] == "compileflow":
            words = ["python", "-m", "compileflow", *words[1:]]
        assert words[0] == "python", line
        process = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(self.site)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, f"{line}\n{process.stdout}{process.stderr}"
        return process.stdout


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """The commands of the page: those for the distribution's folder, and those for a clone of compileflow."""
    return [block.splitlines() for block in _CONSOLE.findall(PAGE.read_text("utf-8"))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, commands: list[list[str]]) -> Installed:
    """Install the folder of the example, which holds the files of the page, as the page says."""
    distribution = Installed(tmp_path_factory.mktemp("my-target"), tmp_path_factory.mktemp("site"))
    # A copy, so that running its tests leaves nothing in the repository.
    shutil.copytree(EXAMPLE, distribution.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    distribution.run(commands[0][0], cwd=distribution.folder)
    return distribution


def test_page_shows_every_file_of_the_example() -> None:
    files = {
        path.relative_to(EXAMPLE).as_posix(): path.read_text("utf-8")
        for path in EXAMPLE.rglob("*")
        if path.is_file() and path.suffix in (".py", ".toml")
    }
    assert "pyproject.toml" in files
    assert page_files() == files


def test_example_compiles_with_the_attention_of_the_plan(tiny_model: ModelFactory, tmp_path: Path) -> None:
    location = EXAMPLE / "src" / "compileflow_torch_export" / "target.py"
    module_spec = importlib.util.spec_from_file_location("torch_export_example", location)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    component = ComponentSpec(max_sequence_length=16)
    spec = CompileSpec(target="torch-export", hf_task=HfTask.TEXT_CLASSIFICATION, components=(component,))
    plan = ComponentPlan(spec=spec, component=component, attention="eager")

    compiled = module.TorchExportTarget().compile(tiny_model(spec.hf_task), plan, tmp_path)

    assert compiled.attention == "eager"


@pytest.mark.slow
def test_installed_target_passes_the_suite_and_is_listed(
    installed: Installed, commands: list[list[str]], tmp_path: Path
) -> None:
    _, run_tests, list_targets = commands[0]
    summary = installed.run(run_tests, cwd=installed.folder, PYTEST_DEBUG_TEMPROOT=str(tmp_path))
    # The summary has more words if a test failed or was skipped.
    passed = re.search(r"^=+ (\d+) passed in ", summary, re.MULTILINE)
    assert passed is not None, summary
    suite = [name for name in dir(TargetConformance) if name.startswith("test_")]
    assert int(passed[1]) >= len(suite) + len([task for task in TEXT_TASKS if task in GRAPH_TASKS]) - 1
    table = installed.run(list_targets, cwd=installed.folder, COLUMNS="200")
    assert re.search(r"torch-export +│ yes +│ yes +│ fp32 ", table), table


@pytest.mark.slow
def test_installed_target_compiles_proves_and_registers(
    installed: Installed, commands: list[list[str]], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    (tmp_path / "my-model").symlink_to(tiny_model(HfTask.TEXT_CLASSIFICATION))
    [line] = commands[1]
    output = installed.run(
        f"{line} --json",
        cwd=tmp_path,
        PYTHONPATH=f"{installed.site}{os.pathsep}{ROOT}",
        COMPILEFLOW_HOME=str(tmp_path / "home"),
    )
    [result] = json.loads(output)
    assert result["target"] == "torch-export"
    assert result["validated"]["outcome"] == "pass"
    assert result["version"]["version"] == 1
