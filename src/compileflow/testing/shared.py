"""Folders that are made once a test run, whichever of its processes asks first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all of pytest-xdist's workers share; without it, the run's own."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder, after `make` filled it where nobody has yet; it appears whole or not at all.

    Args:
        folder: To read only: others share it.
        make: Given an empty folder elsewhere, which is then moved to `folder`.
    """
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = folder.with_name(f"{folder.name}.made-here")
            # Of one that failed.
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            make(made)
            made.rename(folder)
    return folder
