"""Commands in namespaces of the kernel, which not every user may make."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def usable(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of an unshare command; skip the test where it does not work."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    attempt = subprocess.run([*command, "true"], capture_output=True, text=True)
    if attempt.returncode:
        pytest.skip(f"this user may not make namespaces: {attempt.stderr.strip()}")
    return command
