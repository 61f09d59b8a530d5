"""Measure a compiled model against its source model, then judge the numbers."""
