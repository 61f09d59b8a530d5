"""Conformance suites that the tests of a new target, store or registry inherit."""

import pytest

# Called before the modules are imported, so that a failed assertion shows its values.
pytest.register_assert_rewrite("compileflow.testing.registries", "compileflow.testing.stores")
