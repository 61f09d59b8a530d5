"""Sweep over transformers' model classes: build a small model of each, compile it, and compare the answers."""
