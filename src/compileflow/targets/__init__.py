"""Targets, one file each."""
