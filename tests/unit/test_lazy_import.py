"""Imports: the package, its public names and the reading commands load no heavy distribution."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from typer.main import get_command

import compileflow
from compileflow.settings import Settings

HEAVY = (
    "boto3", "cryptography", "fastapi", "great_expectations", "huggingface_hub", "mlflow", "neptune", "onnx",
    "onnxruntime", "openvino", "pandas", "prefect", "safetensors", "securesystemslib", "sqlalchemy", "torch",
    "transformers",
)  # fmt: skip


def heavy_modules_after(code: str) -> list[str]:
    """Run `code` in a fresh interpreter and return the heavy distributions that it loaded."""
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    completed = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, timeout=60
    )
    return completed.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import compileflow",
        "import compileflow.errors, compileflow.artifact.manifest, compileflow.settings",
        "import compileflow._process.child_process",
        "from compileflow import ArtifactManifest, CompileSpec, CompileflowError, ShapeBucket",
        "import compileflow.cli",
        "import flows.__main__",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert heavy_modules_after(code) == []


@pytest.mark.parametrize("words", [["targets"], ["versions"]])
def test_reading_command_loads_nothing_heavy(words: list[str], settings: Settings) -> None:
    assert heavy_modules_after(called("compileflow.cli", [words])) == []


@pytest.mark.parametrize("module", ["compileflow.cli", "flows.commands"])
def test_help_of_no_command_loads_anything_heavy(module: str, settings: Settings) -> None:
    commands = list(get_command(import_module(module).app).commands)  # type: ignore[attr-defined]
    assert "compile" in commands
    calls = [["--help"], *([command, "--help"] for command in commands)]
    assert heavy_modules_after(called(module, calls)) == []


def called(module: str, calls: list[list[str]]) -> str:
    """Return code that runs commands of the command line in a module."""
    return (
        f"from typer.testing import CliRunner; from {module} import app\n"
        f"for words in {calls}:\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0, result.output"
    )


def test_the_check_sees_a_heavy_module() -> None:
    assert heavy_modules_after("import safetensors") == ["safetensors"]


@pytest.mark.parametrize("name", compileflow.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(compileflow, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'CompiledModle'"):
        compileflow.CompiledModle  # noqa: B018
