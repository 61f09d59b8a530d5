"""A user without a home folder, as containers have: no HOME, and a user id that no file lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.functional.namespaces import usable

pytestmark = [pytest.mark.functional, pytest.mark.slow]
_ROOT = Path(__file__).parents[2]


@pytest.fixture
def unlisted_user() -> tuple[str, ...]:
    """The command that starts another one as a user whom /etc/passwd does not list."""
    return usable(("unshare", "--user", "--map-user=54321"))


def test_run_without_a_home_folder_needs_the_setting_alone(
    unlisted_user: tuple[str, ...], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    variables = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    command = [*unlisted_user, sys.executable, "-m", "flows", "compile", str(model), "--target", "torchscript"]
    command += ["--bucket", "1x16", "--name", "reviews", "--no-progress"]

    refused = subprocess.run(command, cwd=_ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: ~/.local/share/compileflow cannot be expanded: HOME is not set, and this user has no home folder. "
        "Set COMPILEFLOW_HOME to a folder.\n"
    )
    variables["COMPILEFLOW_HOME"] = str(tmp_path)
    done = subprocess.run(command, cwd=_ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "reviews version 1" in done.stdout
