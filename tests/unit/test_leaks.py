"""A service that compiles many times keeps its size: the memory of a compile ends with its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow._process.state import resident_bytes
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.models import build_model
from tests.steps import Pipeline

COMPILES = 10
MAX_GROWTH_BYTES = 50 * 10**6


@pytest.mark.slow
def test_ten_compiles_leave_the_parent_as_large_as_it_was(settings: Settings, tmp_path: Path) -> None:
    pipeline = Pipeline(settings)
    buckets = [{"batch_size": 1, "sequence_length": 8}]
    folders = [
        build_model(tmp_path / f"model-{seed}", HfTask.TEXT_CLASSIFICATION, seed=seed)
        for seed in range(COMPILES + 1)
    ]

    def compile_one(folder: Path) -> str:
        return pipeline.compile(pipeline.request(folder, shape_buckets=buckets)).digest

    # Memory that the first compile imports and caches is not a leak.
    digests = {compile_one(folders[0])}
    resident_before = resident_bytes()
    assert resident_before > 0
    digests |= {compile_one(folder) for folder in folders[1:]}
    assert len(digests) == COMPILES + 1
    assert resident_bytes() - resident_before < MAX_GROWTH_BYTES
