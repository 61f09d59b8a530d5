"""Compiles, proofs and services without a network look up no name, and write only into the folders they get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compileflow.catalog import get_target
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.functional.namespaces import usable
from tests.services.no_network import CONTROL, UNSHARE

_ROOT = Path(__file__).parents[2]
_TARGETS = ("openvino", "onnx-runtime")


@pytest.fixture
def unshare() -> tuple[str, ...]:
    """The command that starts another one in namespaces of its own."""
    return usable(UNSHARE)


def test_no_runtime_looks_up_a_name_or_writes_a_file_outside_its_folders(
    unshare: tuple[str, ...], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    targets = [name for name in _TARGETS if get_target(name).probe().can_compile]
    for name in ("user", "working", "tmp"):
        (tmp_path / name).mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "HF_"))}
    variables |= {
        "HOME": str(tmp_path / "user"),
        "COMPILEFLOW_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(_ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        *unshare,
        sys.executable,
        "-P",
        "-m",
        "tests.services.no_network",
        str(model),
        str(tmp_path),
        *targets,
    ]
    run = subprocess.run(
        command, cwd=tmp_path / "working", env=variables, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads((tmp_path / "answers").read_text())
    assert list(answers) == [*targets, "torchscript"]
    assert all("outputs" in answer for answer in answers.values()), answers
    # Each family of addresses is a query.
    assert set((tmp_path / "names").read_text().split()) == {CONTROL}
    files = [path for name in ("user", "working") for path in (tmp_path / name).rglob("*") if path.is_file()]
    # matplotlib keeps its list of fonts for all programs of a user.
    assert [path for path in files if path.parent.name != "matplotlib"] == []
