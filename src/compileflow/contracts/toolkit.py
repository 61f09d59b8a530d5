"""Helpers for targets, ours and third parties': progress, threads, environment, versions, CPU features."""

from __future__ import annotations

from compileflow._process.child import report_progress
from compileflow._process.cpu import cpu_features, lacking_precisions
from compileflow._process.packages import installed_versions
from compileflow._process.state import environment, torch_threads, undisturbed_process

__all__ = [
    "cpu_features",
    "environment",
    "installed_versions",
    "lacking_precisions",
    "report_progress",
    "torch_threads",
    "undisturbed_process",
]
