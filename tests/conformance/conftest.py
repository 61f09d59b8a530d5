"""Doubles of vendors for the conformance suites, and the compiles that are left to make test-slow."""

from __future__ import annotations

import pytest

from tests.doubles.fixtures import vendor_doubles

__all__ = ["vendor_doubles"]

_AUDIO = ("audio-classification", "automatic-speech-recognition")
# Other heads of image and audio models; torchscript runs them in every test run.
_SIGNALS = (
    "audio-frame",
    "audio-xvector",
    "depth",
    "image-feature",
    "image-segmentation",
    "object-detection",
    "zero-shot-image",
)
# Other heads of the same encoder.
_HEADS = ("fill-mask", "question-answering", "token-classification")
# Native code takes g++ half a minute each time, and so do the converters for audio. What a target leaves behind is
# shown by openvino and torchscript; the vendors' doubles share their code.
_SLOW = {
    "TestOnnxRuntime": (*_AUDIO, *_SIGNALS, *_HEADS, "test_compile_writes_only"),
    "TestOpenVino": (*_AUDIO, *_SIGNALS, *_HEADS),
    "TestBlade": (*_HEADS, "test_compile_writes_only", "test_pipeline"),
    "TestHyperdex": (*_HEADS, "test_compile_writes_only", "test_pipeline"),
    "TestNeuron:": ("test_compile_writes_only", "test_pipeline"),
    # The same registry on a file; the server is the harder one.
    "TestMlflowFile": ("test_",),
    "TestMlflowServer": ("test_two_processes", "killed"),
    "TestAotInductor": (
        *_AUDIO,
        *_SIGNALS,
        "fill-mask",
        "image-classification",
        "question-answering",
        "test_compile_writes_only",
        "test_package_is_unpacked",
        "test_two_graphs",
        "text-classification",
        "token-classification",
        "zero-shot-classification",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests slow whose compiles take longest."""
    for item in items:
        for suite, parts in _SLOW.items():
            if suite in item.nodeid and any(part in item.name for part in parts):
                item.add_marker(pytest.mark.slow)
