"""Parts of the benchmark of text generation, benchmarks/exp_generation.py."""
