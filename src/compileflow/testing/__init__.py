"""Conformance suites that a new target, store or registry inherits."""

import pytest

# Before they are imported, so that a failed assertion shows its values.
pytest.register_assert_rewrite("compileflow.testing.registries", "compileflow.testing.stores")
