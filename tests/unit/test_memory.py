"""Mapped files leave the memory after they were read, and a large compile needs little more than the weights."""

from __future__ import annotations

import mmap
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from compileflow._process.child_process import peak_bytes, reset_peak
from compileflow._process.memory import released_pages
from compileflow._process.run_in_child import run_in_child
from compileflow._process.state import resident_bytes as resident_bytes_of_process
from compileflow.spec import CompileSpec, HfTask
from tests.models import build_decoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much of a file is in memory")
SIZE = 8 * 2**20


def resident_bytes(path: Path) -> int:
    """Return how much of the mappings of a file is in memory, as the kernel counts it."""
    parts = Path("/proc/self/smaps").read_text("utf-8").split(f" {path}\n")[1:]
    return sum(1024 * int(size) for part in parts for size in re.findall(r"^Rss:\s+(\d+) kB", part, re.M)[:1])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of eight megabytes."""
    path = tmp_path / "weights of a model.bin"
    path.write_bytes(b"ab" * (SIZE // 2))
    return path


def test_peak_is_counted_from_its_reset_on() -> None:
    # In a process of its own, because memory that earlier tests freed would hold the block unseen.
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        above_resident, growth = executor.submit(_peaks_of_a_block).result(timeout=120)
    assert above_resident < SIZE
    assert growth > 7 * SIZE


def _peaks_of_a_block() -> tuple[int, int]:
    """Return how far a reset peak is above the resident memory, and how far a block raises it, in bytes."""
    block = bytearray(8 * SIZE * b"x")
    del block
    assert reset_peak()
    peak = peak_bytes("self")
    above_resident = peak - resident_bytes_of_process()
    block = bytearray(8 * SIZE * b"x")
    del block
    return above_resident, peak_bytes("self") - peak


def test_pages_of_a_mapped_file_are_released_and_read_again(weights: Path) -> None:
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[:].count(b"ab") == SIZE // 2
        assert resident_bytes(weights) == SIZE
        with released_pages(weights.parent):
            deadline = time.monotonic() + 10
            while resident_bytes(weights):
                assert time.monotonic() < deadline
            assert mapping[:].count(b"ab") == SIZE // 2
        assert resident_bytes(weights) == 0
        assert mapping[:].count(b"ab") == SIZE // 2


def test_pages_that_a_process_may_write_to_and_other_folders_stay(weights: Path, tmp_path: Path) -> None:
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        mapping[:2] = b"cd"
        with released_pages(weights.parent):
            pass
        assert mapping[:4] == b"cdab"
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[:].count(b"ab") == SIZE // 2
        with released_pages(tmp_path / "weights"):
            pass
        assert resident_bytes(weights) == SIZE


@pytest.mark.slow
# The exporter to ONNX transposes the weights of all products, beside those of the source model.
@pytest.mark.parametrize(("target", "times"), [("openvino", 1.5), ("onnx-runtime", 2.0)])
def test_compile_needs_few_times_the_weights(target: str, times: float, tmp_path: Path) -> None:
    """What a compile needs for libraries and graphs is measured with a model of the same layers, but narrow."""
    peaks, sizes = [], []
    for width in (64, 1280):
        source_dir = build_decoder(tmp_path / f"{width}", hidden_size=width, intermediate_size=4 * width)
        sizes.append((source_dir / "model.safetensors").stat().st_size)
        work_dir = tmp_path / f"{width} work"
        work_dir.mkdir()
        child = run_in_child(
            "compileflow.steps.build:build_artifact",
            {
                "source_dir": str(source_dir),
                "out_dir": str(tmp_path / f"{width} artifact"),
                "spec": CompileSpec(target=target, hf_task=HfTask.TEXT_GENERATION).model_dump(mode="json"),
                "source": {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": "0" * 64},
                "calibration": None,
                "threads": 1,
            },
            work_dir=work_dir,
            log_path=tmp_path / f"{width}.log",
        )
        peaks.append(child.peak_rss_bytes)
    assert sizes[1] > 150_000_000
    assert peaks[1] - peaks[0] <= times * (sizes[1] - sizes[0])
