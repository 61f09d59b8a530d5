"""Whether the runtime that is installed here can load what the artifact's own toolchain compiled."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from compileflow._process.packages import installed_versions
from compileflow.contracts import Target
from compileflow.errors import LoadError, ManifestError


def runtime_needs(rules: Mapping[str, str], toolchain: Mapping[str, str]) -> dict[str, str]:
    """Return the versions that load what `toolchain` compiled, distribution to PEP 440 specifier.

    Args:
        rules: `Capabilities.runtime`.
        toolchain: Distribution to version at compile time; a distribution that it lacks is not needed.

    Raises:
        ManifestError: a recorded version is none.

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
                f"The manifest says that {name} {toolchain[name]!r} compiled the artifact, which is no version.",
                hint="Compile the model again.",
            ) from error
        major, minor = (*parts, 0)[:2]
        needs[name] = rule.format(
            major=major, next_major=major + 1, minor=f"{major}.{minor}", release=".".join(map(str, parts))
        )
    return needs


def check_runtime(target: Target, toolchain: Mapping[str, str]) -> None:
    """Compare the versions that are installed with those that load what `toolchain` compiled; imports none.

    Only releases are compared: 2.13.0+cpu and 2.13.0rc1 are 2.13.0.

    Raises:
        LoadError: one is missing, too old or too new.
        ManifestError: see `runtime_needs`.
    """
    needs = runtime_needs(target.capabilities.runtime, toolchain)
    here = installed_versions(needs)
    unfit = [name for name in needs if not _fits(here.get(name), needs[name])]
    if unfit:
        found = [
            f"{name} {needs[name]}, compiled with {toolchain[name]}; found {here.get(name, 'none')}"
            for name in unfit
        ]
        requirements = " ".join(f"'{name}{needs[name]}'" for name in unfit)
        raise LoadError(
            f"{target.name} needs {'; and '.join(found)}.",
            hint=f"Run: {target.capabilities.runtime_install.format(requirements)}",
        )


def _fits(version: str | None, specifier: str) -> bool:
    try:
        return version is not None and SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return False
