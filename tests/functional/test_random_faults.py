"""Whole runs with random faults register what was asked for, or say in one line why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.functional, pytest.mark.slow]


def test_no_run_with_faults_registers_what_was_not_asked_for() -> None:
    words = [sys.executable, "-m", "tests.faults", "--seed", "17", "--runs", "5"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 5 runs were wrong" in done.stdout
