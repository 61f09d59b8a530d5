"""An environment with the extras serve, vision and onnx-runtime alone: no torch, small, and it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compileflow import CompiledPipeline, HfTask
from compileflow.testing.pipelines import assert_same_result
from tests.in_process import InProcess

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# What the issue of serving without torch allows, in bytes.
MOST_BYTES = 250 * 10**6
# Each prints the vector of a text, its seconds since the start of the process, and its peak memory in kB.
HEAD = """
import json, os, sys
folder, text = sys.argv[1:]
"""
TAIL = """
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
uptime_s = float(open("/proc/uptime").read().split()[0])
peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
seconds = uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
heavy = sorted({"torch", "transformers", "huggingface_hub"} & sys.modules.keys())
print(json.dumps([vector.tolist(), seconds, peak_kb, heavy]))
"""
LIGHT = """
from compileflow import LightPipeline
vector = LightPipeline.from_pretrained(folder, task="sentence-similarity")(text)
"""
BARE = """
from pathlib import Path
import numpy as np, onnxruntime, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
(path,) = Path(folder).rglob("*.onnx")
session = onnxruntime.InferenceSession(path)
encoded = tokenizer.encode(text)
arrays = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
names = [item.name for item in session.get_inputs()]
vector = session.run(None, {name: np.array([arrays[name]]) for name in names})[0][0].mean(0)
"""
IMAGE = """
from compileflow import LightPipeline
print(json.dumps(LightPipeline.from_pretrained(folder)(text)), *{"torch", "transformers"} & sys.modules.keys())
"""
FULL = """
from compileflow import CompiledPipeline, CompileflowError
try:
    CompiledPipeline.from_pretrained(folder)
except CompileflowError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the three extras, installed from this repository."""
    folder = tmp_path_factory.mktemp("light") / "environment"
    venv.create(folder, with_pip=True)
    words = ["install", "--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    interpreter = folder / "bin" / "python"
    subprocess.run(
        [interpreter, "-m", "pip", *words, f"{ROOT}[serve,vision,onnx-runtime]"], check=True, timeout=600
    )
    return interpreter


@pytest.fixture(scope="module")
def artifact(tiny_model: Callable[..., Path], in_process: InProcess) -> Path:
    return in_process.compiled(tiny_model(HfTask.FEATURE_EXTRACTION), "onnx-runtime", HfTask.FEATURE_EXTRACTION)


def run(python: Path, code: str, *arguments: str, home: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        [python, "-c", code, *arguments],
        env=environment | {"COMPILEFLOW_HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_environment_is_small_and_has_no_torch(python: Path) -> None:
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    names = {path.name.lower() for path in packages.iterdir()}
    assert not {"torch", "transformers", "onnx", "onnxscript", "nncf"} & names
    # Every environment has these two.
    counted = [path for path in packages.iterdir() if not path.name.startswith(("pip", "setuptools"))]
    files = [file for path in counted for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_light_pipeline_answers_there(
    python: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Anna lives in Berlin ."
    answers: dict[str, list[Any]] = {}
    for name, code in (("bare session", BARE), ("LightPipeline", LIGHT)):
        output = run(python, HEAD + code + TAIL, str(artifact), text, home=tmp_path)
        answers[name] = json.loads(output)
    expected = CompiledPipeline.from_pretrained(artifact, task="sentence-similarity")(text)
    vector, _, _, heavy = answers["LightPipeline"]
    assert vector == pytest.approx(expected.tolist(), abs=1e-6)
    assert heavy == []
    with capsys.disabled():
        for name, (_, seconds, peak_kb, _) in answers.items():
            sys.stdout.write(f"\n{name}: first answer {seconds:.2f} s after the start, {peak_kb // 1000} MB\n")


def test_light_pipeline_classifies_an_image_there(
    python: Path, tiny_model: Callable[..., Path], in_process: InProcess, tmp_path: Path
) -> None:
    task = HfTask.IMAGE_CLASSIFICATION
    artifact = in_process.compiled(tiny_model(task), "onnx-runtime", task)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    answer = json.loads(run(python, HEAD + IMAGE, str(artifact), str(path), home=tmp_path))
    assert_same_result(answer, CompiledPipeline.from_pretrained(artifact)(str(path)), atol=1e-6)


def test_full_interface_and_compile_name_their_extras_there(python: Path, artifact: Path, tmp_path: Path) -> None:
    assert run(python, HEAD + FULL, str(artifact), "", home=tmp_path) == (
        "CompiledModel needs torch and transformers, which are not installed. Run: pip install 'compileflow[hf]'. "
        "LightPipeline serves text and classifies images without them.\n"
    )
    words = [python.with_name("compileflow"), "compile", artifact, "--target", "onnx-runtime"]
    environment = os.environ | {"COMPILEFLOW_HOME": str(tmp_path)}
    completed = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert completed.returncode != 0
    assert completed.stderr.startswith("error: ")
    assert completed.stderr.count("\n") == 1
