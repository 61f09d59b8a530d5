"""Vendors' doubles for the conformance suites, and which compiles are left to make test-all."""

from __future__ import annotations

import pytest

from tests.doubles.fixtures import vendor_doubles

__all__ = ["vendor_doubles"]

_AUDIO = ("audio-classification", "automatic-speech-recognition")
# Native code takes g++ half a minute each time, and so do the converters for audio. What a target leaves behind is
# shown by those that run here; the vendors' doubles share their code.
_LONG = ("answers_like_the_source_model[fill-mask", "answers_like_the_source_model[question-answering")
_SLOW = {
    "TestOnnxRuntime": (*_AUDIO, *_LONG, "test_nothing_is_left"),
    "TestOpenVino": (*_AUDIO, *_LONG),
    "TestBlade": ("test_nothing_is_left",),
    "TestHyperdex": ("test_nothing_is_left",),
    "TestNeuron": ("test_nothing_is_left",),
    # Each process takes seconds to import mlflow; what keeps them apart is shown by four with a server.
    "TestMlflowFile": ("processes", "killed"),
    "TestMlflowServer": ("test_two_processes",),
    "TestAotInductor": (
        *_AUDIO,
        "fill-mask",
        "image-classification",
        "question-answering",
        "test_nothing_is_left",
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
