"""Compiles that a test run makes once: whoever asks for the same again gets what is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compileflow.catalog import get_target
from compileflow.contracts.digests import json_digest, list_files
from compileflow.steps.build import build_artifact
from compileflow.testing.shared import make_once
from compileflow.testing.state import unchanged_process


def compile_once(request: Mapping[str, Any], parent: Path) -> Path:
    """Compile in this process what nobody has compiled yet below `parent`; return its folder, to read only.

    Fails when the compile leaves the process changed.

    Args:
        request: What `build_artifact` takes, without `out_dir`. Its source record decides nothing here:
            the manifest names `source_dir`, at a revision of zeros.
        parent: Existing folder, the same for all who want to share.

    Raises:
        CompileflowError: the compile failed; the next who asks tries again.
    """
    source_dir = Path(request["source_dir"])
    target = get_target(request["spec"]["target"])
    content = [record.model_dump(mode="json") for record in list_files(source_dir)]
    asked = {
        name: value
        for name, value in request.items()
        if name not in ("source_dir", "source") and value is not None
    }
    key = json_digest(
        {"content": content, "asked": asked, "version": target.version, "toolchain": target.toolchain()}
    )
    source = {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": "0" * 64}

    def make(made: Path) -> None:
        # Each first compile of a run is looked at: one more would cost as long again.
        with unchanged_process():
            build_artifact({**asked, "source_dir": str(source_dir), "source": source, "out_dir": str(made)})

    return make_once(parent / f"{target.name}-{key[:16]}", make)
