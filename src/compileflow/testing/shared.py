"""Folders that a test run fills once, in whichever of its processes needs one first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all workers of pytest-xdist share; without xdist, the temporary folder of the run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def make_once(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Return a folder, and fill it first if no process has done so yet. It appears complete or not at all.

    Args:
        folder: Folder to fill. Do not write to it afterwards, because other tests read it.
        fill: Fills the empty folder that it is given, which is then moved to `folder`.
    """
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            temporary_folder = folder.with_name(f"{folder.name}.unfinished")
            # A failed attempt may have left files.
            shutil.rmtree(temporary_folder, ignore_errors=True)
            temporary_folder.mkdir(parents=True)
            fill(temporary_folder)
            temporary_folder.rename(folder)
    return folder
