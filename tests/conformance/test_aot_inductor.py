"""aot-inductor passes the conformance suite for targets, and leaves nothing in the temporary folder."""

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Target
from compileflow.errors import LoadError
from compileflow.spec import HfTask
from compileflow.testing.targets import Load, TargetConformance

TASK = HfTask.TEXT_CLASSIFICATION
FILE = "model.pt2"


class TestAotInductor(TargetConformance):
    target_name: ClassVar[str] = "aot-inductor"

    @pytest.fixture
    def temporary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty temporary folder, for Python and for native code."""
        folder = tmp_path / "temporary"
        folder.mkdir()
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder

    def test_package_is_unpacked_nowhere_while_it_answers(
        self, load: Load, artifact: Callable[[HfTask], OpenArtifact], temporary: Path
    ) -> None:
        opened = artifact(TASK)
        package = torch._inductor.aoti_load_package(str(opened.folder / "components/default" / FILE))
        # Without the target's loader, torch leaves its files here.
        assert [path.name for path in temporary.iterdir() if path.name.startswith("aotinductor")]
        del package
        for path in temporary.iterdir():
            shutil.rmtree(path)

        runner, record, source = load(TASK)

        assert list(temporary.iterdir()) == []
        inputs = {tensor.name: np.ones((2, 9), np.int64) for tensor in record.inputs}
        np.testing.assert_allclose(
            runner.run(inputs)["logits"], source.run(inputs)["logits"], rtol=0, atol=self.atol
        )
        runner.close()
        assert list(temporary.iterdir()) == []

    def test_package_that_cannot_be_loaded_leaves_nothing(
        self, target: Target, artifact: Callable[[HfTask], OpenArtifact], temporary: Path, tmp_path: Path
    ) -> None:
        opened = artifact(TASK)
        with (
            zipfile.ZipFile(opened.folder / "components/default" / FILE) as package,
            zipfile.ZipFile(tmp_path / FILE, "w") as broken,
        ):
            for name in package.namelist():
                broken.writestr(name, b"not a library" if name.endswith(".so") else package.read(name))
        with pytest.raises(LoadError, match=r"model\.pt2 cannot be loaded by torch"):
            target.load(tmp_path, opened.component("default"), device="cpu", threads=None)
        assert list(temporary.iterdir()) == []
