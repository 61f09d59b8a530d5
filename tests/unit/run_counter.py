"""Count what a graph runs."""

from __future__ import annotations

from typing import Any

from compileflow import CompiledPipeline
from compileflow.contracts import Arrays


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
