"""Versions of installed distributions, read without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from compileflow.errors import MissingPackageError


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed ones among these distributions, by name."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def check_installed(names: Iterable[str], *, subject: str, extra: str, hint: str = "") -> None:
    """Check that distributions are installed.

    Args:
        names: Names of the distributions.
        subject: What needs them.
        extra: Extra of compileflow that brings them.
        hint: What else the caller can do.

    Raises:
        MissingPackageError: Some are not installed.
    """
    names = tuple(names)
    versions = installed_versions(names)
    missing_names = [name for name in names if name not in versions]
    if missing_names:
        verb = "is" if len(missing_names) == 1 else "are"
        raise MissingPackageError(
            f"{subject} needs {' and '.join(missing_names)}, which {verb} not installed.",
            hint=f"Run: pip install 'compileflow[{extra}]'.{hint and ' '}{hint}",
        )
