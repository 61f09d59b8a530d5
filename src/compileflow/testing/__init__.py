"""Conformance suites that a new target, store or registry inherits."""
