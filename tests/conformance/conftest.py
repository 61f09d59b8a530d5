"""Vendors' doubles for the conformance suites, and which of their compiles are left to make test-all."""

from __future__ import annotations

import pytest

from tests.doubles.fixtures import vendor_doubles

__all__ = ["vendor_doubles"]

# Native code takes g++ a quarter of a minute each time.
_SLOW = (
    "audio-classification",
    "automatic-speech-recognition",
    "fill-mask",
    "image-classification",
    "question-answering",
    "test_nothing_is_left",
    "token-classification",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark some of aot-inductor's tests slow."""
    for item in items:
        if "TestAotInductor" in item.nodeid and any(part in item.name for part in _SLOW):
            item.add_marker(pytest.mark.slow)
