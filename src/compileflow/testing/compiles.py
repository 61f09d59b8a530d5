"""compile_once: compiles in this process that all tests of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from compileflow.catalog import get_target
from compileflow.contracts.digests import folder_digest, json_digest, list_files
from compileflow.steps.build import build_artifact
from compileflow.testing.shared import make_once
from compileflow.testing.state import unchanged_process


def compile_once(request: Mapping[str, Any], parent: Path) -> Path:
    """Compile in this process unless `parent` holds the same compile, and return its folder. Do not write to it.

    Fails if the compile changes the state of the process.

    Args:
        request: Arguments of `build_artifact` without `out_dir`. Its source record does not matter: the manifest
            names `source_dir`, its digest and a revision of zeros.
        parent: Existing folder that all processes of a test run use.

    Raises:
        CompileflowError: The compile failed. The next call tries again.
    """
    source_dir = Path(request["source_dir"])
    target = get_target(request["spec"]["target"])
    files = list_files(source_dir)
    content = folder_digest(files)
    arguments = {
        name: value
        for name, value in request.items()
        if name not in ("source_dir", "source") and value is not None
    }
    key = json_digest(
        {"content": content, "arguments": arguments, "version": target.version, "toolchain": target.toolchain()}
    )
    source = {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": content}

    def make(folder: Path) -> None:
        # The first import of these in a process changes the environment and the filters of warnings.
        for module in ("torch._dynamo", "transformers.modeling_utils"):
            import_module(module)
        # The first compile of a run checks this for all tests. A separate test would cost another compile.
        with unchanged_process():
            build_artifact({**arguments, "source_dir": str(source_dir), "source": source, "out_dir": str(folder)})

    return make_once(parent / f"{target.name}-{key[:16]}", make)
