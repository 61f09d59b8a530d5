"""Pipelines from NumPy and the package tokenizers alone: they import neither torch nor transformers."""
