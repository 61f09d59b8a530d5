"""Compare what two pipelines return: floats within a tolerance, all else equal; and count what a graph runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compileflow import CompiledPipeline
from compileflow.contracts import Arrays

SCORE_ATOL = 1e-4


def assert_same_result(candidate: Any, reference: Any) -> None:
    """Fail where two results of pipelines differ in kind, length, label or, beyond SCORE_ATOL, in a number."""
    assert type(candidate) is type(reference)
    if isinstance(reference, dict):
        assert list(candidate) == list(reference)
        for name, value in reference.items():
            assert_same_result(candidate[name], value)
    elif isinstance(reference, list):
        assert len(candidate) == len(reference)
        for one, other in zip(candidate, reference, strict=True):
            assert_same_result(one, other)
    elif isinstance(reference, torch.Tensor):
        torch.testing.assert_close(candidate, reference, atol=SCORE_ATOL, rtol=0)
    elif isinstance(reference, float | np.floating):
        assert candidate == pytest.approx(reference, abs=SCORE_ATOL)
    else:
        assert candidate == reference


class RunCounter:
    """Runs a compiled graph, and keeps the shape of every call."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Arrays) -> Arrays:
        """Run it."""
        self.shapes.append(inputs["input_ids"].shape)
        return self.runner.run(inputs)

    def close(self) -> None:
        """Close it."""
        self.runner.close()

    @property
    def computed(self) -> int:
        """Tokens that were computed, padding included."""
        return sum(rows * length for rows, length in self.shapes)


def counted(pipeline: CompiledPipeline) -> RunCounter:
    """Count a pipeline's calls of its graph from now on."""
    graph = pipeline.model.graph
    graph._runner = RunCounter(graph._runner)
    return graph._runner
