"""aot-inductor passes the conformance suite for targets, loads without a compiler, leaves no temporary file."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
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
PUBLIC_CALL, LOADER = "aoti_load_package", "AOTIModelPackageLoader"
# In a process of its own: loads an artifact and answers. It may start no other process.
_LOAD = """
    import resource, sys
    import numpy as np
    from compileflow.artifact.open import open_artifact

    def refuse(event, arguments):
        if event in ("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen"):
            raise RuntimeError(f"{event} {arguments}")

    sys.addaudithook(refuse)
    artifact = open_artifact(sys.argv[1])
    runner = artifact.load(artifact.component("default"), device="cpu", threads=1)
    np.save(sys.argv[3], runner.run(dict(np.load(sys.argv[2])))["logits"])
    assert "torch" in sys.modules
    imported = {"torch._dynamo", "torch._inductor", "transformers"} & sys.modules.keys()
    assert not imported, imported
    # A process that native code starts causes no event.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss == 0
"""


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

    def test_package_is_loaded_without_a_compiler_and_answers_as_through_the_public_call(
        self, artifact: Callable[[HfTask], OpenArtifact], tmp_path: Path
    ) -> None:
        opened = artifact(TASK)
        names = [tensor.name for tensor in opened.component("default").inputs]
        inputs = {name: np.ones((2, 9), np.int64) for name in names}
        np.savez(tmp_path / "inputs.npz", **inputs)
        for folder in ("cache", "temporary"):
            (tmp_path / folder).mkdir()

        finished = subprocess.run(
            [sys.executable, "-c", dedent(_LOAD), opened.folder, tmp_path / "inputs.npz", tmp_path / "logits.npy"],
            env=os.environ
            | {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
            | {"TMPDIR": str(tmp_path / "temporary"), "CXX": str(tmp_path / "no-compiler")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

        assert finished.returncode == 0, finished.stderr
        package = torch._inductor.aoti_load_package(str(opened.folder / "components/default" / FILE))
        with torch.inference_mode():
            (expected,) = package(*(torch.from_numpy(inputs[name]) for name in names))
        np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected.numpy())

    @pytest.mark.parametrize("loader", [None, lambda path: None], ids=["missing", "another signature"])
    def test_public_call_opens_the_package_where_torch_has_another_loader(
        self, load: Load, monkeypatch: pytest.MonkeyPatch, loader: object
    ) -> None:
        own_loader, public_call = getattr(torch._C._aoti, LOADER), getattr(torch._inductor, PUBLIC_CALL)
        paths = []

        def call(path: str) -> object:
            paths.append(Path(path).name)
            # The public call of this version needs the loader.
            monkeypatch.setattr(torch._C._aoti, LOADER, own_loader, raising=False)
            return public_call(path)

        monkeypatch.setattr(torch._inductor, PUBLIC_CALL, call)
        if loader is None:
            monkeypatch.delattr(torch._C._aoti, LOADER)
        else:
            monkeypatch.setattr(torch._C._aoti, LOADER, loader)
        runner, record, source = load(TASK)
        assert paths == [FILE]
        inputs = {tensor.name: np.ones((2, 9), np.int64) for tensor in record.inputs}
        np.testing.assert_allclose(
            runner.run(inputs)["logits"], source.run(inputs)["logits"], rtol=0, atol=self.atol
        )
        runner.close()

    def test_threads_that_load_at_once_leave_the_environment_unchanged(
        self, artifact: Callable[[HfTask], OpenArtifact]
    ) -> None:
        opened = artifact(TASK)
        before = dict(os.environ)
        record = opened.component("default")
        with ThreadPoolExecutor(4) as threads:
            runners = list(threads.map(lambda _: opened.load(record, device="cpu", threads=1), range(8)))
        assert dict(os.environ) == before
        inputs = {tensor.name: np.ones((2, 9), np.int64) for tensor in record.inputs}
        first, *others = [runner.run(inputs)["logits"] for runner in runners]
        for logits in others:
            np.testing.assert_array_equal(logits, first)

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
        with pytest.raises(LoadError, match=r"^model\.pt2 cannot be loaded by torch [^\n]+$"):
            target.load(tmp_path, opened.component("default"), device="cpu", threads=None)
        assert list(temporary.iterdir()) == []
