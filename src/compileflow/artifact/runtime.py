"""Check that the installed runtime can load what the artifact's toolchain compiled."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from compileflow._process.packages import installed_versions
from compileflow.contracts import Target
from compileflow.errors import LoadError, ManifestError


def runtime_needs(rules: Mapping[str, str], toolchain: Mapping[str, str]) -> dict[str, str]:
    """Return the versions that can load what `toolchain` compiled: distribution to PEP 440 specifier.

    Args:
        rules: `Capabilities.runtime` of the target.
        toolchain: Distribution to its version at compile time. Distributions that it lacks are not required.

    Raises:
        ManifestError: A recorded version is not a PEP 440 version.

    >>> runtime_needs({"torch": ">={minor},<{next_major}"}, {"torch": "2.13.0+cpu", "transformers": "5.23.0"})
    {'torch': '>=2.13,<3'}
    """
    requirements = {}
    for name, rule in rules.items():
        if name not in toolchain:
            continue
        try:
            parts = Version(toolchain[name]).release
        # int() refuses a number of more than 4300 digits.
        except ValueError as error:
            raise ManifestError(
                f"The manifest names {name} {toolchain[name]!r}, which is not a version.",
                hint="Compile the model again.",
            ) from error
        major, minor = (*parts, 0)[:2]
        requirements[name] = rule.format(
            major=major, next_major=major + 1, minor=f"{major}.{minor}", release=".".join(map(str, parts))
        )
    return requirements


def check_runtime(target: Target, toolchain: Mapping[str, str]) -> None:
    """Compare the installed versions with those that can load what `toolchain` compiled. Imports none of them.

    Only releases are compared: 2.13.0+cpu and 2.13.0rc1 count as 2.13.0.

    Raises:
        LoadError: A distribution is missing, too old or too new.
        ManifestError: See `runtime_needs`.
    """
    specifiers = runtime_needs(target.capabilities.runtime, toolchain)
    versions = installed_versions(specifiers)
    wrong_versions = [name for name in specifiers if not _fits(versions.get(name), specifiers[name])]
    if wrong_versions:
        problems = [
            f"{name} {specifiers[name]} (compiled with {toolchain[name]}), found {versions.get(name, 'none')}"
            for name in wrong_versions
        ]
        requirements = " ".join(f"'{name}{specifiers[name]}'" for name in wrong_versions)
        raise LoadError(
            f"{target.name} needs {'; and '.join(problems)}.",
            hint=f"Run: {target.capabilities.runtime_install.format(requirements)}",
        )


def _fits(version: str | None, specifier: str) -> bool:
    try:
        return version is not None and SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return False
