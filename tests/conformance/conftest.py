"""Vendors' doubles for the conformance suites."""

from tests.doubles.fixtures import vendor_doubles

__all__ = ["vendor_doubles"]
