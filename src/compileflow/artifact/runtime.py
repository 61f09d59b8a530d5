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
    needs = {}
    for name, rule in rules.items():
        if name not in toolchain:
            continue
        try:
            parts = Version(toolchain[name]).release
        except InvalidVersion as error:
            raise ManifestError(
                f"The manifest names {name} {toolchain[name]!r}, which is not a version.",
                hint="Compile the model again.",
            ) from error
        major, minor = (*parts, 0)[:2]
        needs[name] = rule.format(
            major=major, next_major=major + 1, minor=f"{major}.{minor}", release=".".join(map(str, parts))
        )
    return needs


def check_runtime(target: Target, toolchain: Mapping[str, str]) -> None:
    """Compare the installed versions with those that can load what `toolchain` compiled. Imports none of them.

    Only releases are compared: 2.13.0+cpu and 2.13.0rc1 count as 2.13.0.

    Raises:
        LoadError: A distribution is missing, too old or too new.
        ManifestError: See `runtime_needs`.
    """
    needs = runtime_needs(target.capabilities.runtime, toolchain)
    installed = installed_versions(needs)
    misfits = [name for name in needs if not _fits(installed.get(name), needs[name])]
    if misfits:
        problems = [
            f"{name} {needs[name]} (compiled with {toolchain[name]}), found {installed.get(name, 'none')}"
            for name in misfits
        ]
        requirements = " ".join(f"'{name}{needs[name]}'" for name in misfits)
        raise LoadError(
            f"{target.name} needs {'; and '.join(problems)}.",
            hint=f"Run: {target.capabilities.runtime_install.format(requirements)}",
        )


def _fits(version: str | None, specifier: str) -> bool:
    try:
        return version is not None and SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return False
