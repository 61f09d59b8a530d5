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
        "automatic-speech-recognition",
        "depth",
        "image-classification",
        "object-detection",
        "test_compile_writes_only",
        "test_package",
        "test_two_graphs",
        "text-classification",
    ),
}
# Further heads of the same encoders, which prove nothing new about native code and take g++ as long.
_LEFT_OUT = {
    "TestAotInductor": (
        *_HEADS,
        "audio-classification",
        "audio-frame",
        "audio-xvector",
        "image-feature",
        "image-segmentation",
        "multiple-choice",
        "text-ranking",
        "zero-shot",
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests slow whose compiles take longest, and leave out those that prove nothing new."""
    left_out = [item for item in items if _is_among(item, _LEFT_OUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if _is_among(item, _SLOW):
            item.add_marker(pytest.mark.slow)


def _is_among(item: pytest.Item, parts_by_suite: dict[str, tuple[str, ...]]) -> bool:
    return any(
        suite in item.nodeid and any(part in item.name for part in parts)
        for suite, parts in parts_by_suite.items()
    )
