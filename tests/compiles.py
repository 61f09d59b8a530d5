"""What stands in for `build_artifact` where a test is about something else: real files, compiled once a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compileflow.artifact.manifest import SourceRecord, read_manifest
from compileflow.steps.build import build_artifact
from compileflow.testing.compiles import compile_once

_kept: list[Path] = []


def keep_in(folder: Path) -> None:
    """Say where this process keeps what it compiles and finds what others of the run have."""
    _kept[:] = [folder]


def build_once(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fill `out_dir` as `build_artifact` would, with a copy of what the run has compiled already where it has."""
    if not _kept:
        return build_artifact(request)
    out_dir = Path(request["out_dir"])
    asked = {name: value for name, value in request.items() if name != "out_dir"}
    shutil.copytree(compile_once(asked, _kept[0]), out_dir, dirs_exist_ok=True)
    # The same files may come from several places.
    manifest = read_manifest(out_dir)
    source = SourceRecord(**request["source"], architecture=manifest.source.architecture)
    manifest.model_copy(update={"source": source}).write(out_dir)
    return {}
