"""Artifact stores: write-once, content-addressed folders."""
