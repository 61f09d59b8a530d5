"""One operation on several registries: what succeeded stays, and the error names what failed."""

from __future__ import annotations

from collections.abc import Mapping

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, RegistryError


def check_all_succeeded(
    action: str, versions: Mapping[str, ModelVersion], errors: Mapping[str, CompileflowError], *, hint: str
) -> None:
    """Raise if a registry failed; its own error if no other registry was asked.

    Args:
        action: What was done, as a participle: "Registered", "Promoted".
        versions: Versions of the registries that succeeded, by URI without credentials.
        errors: Errors of the registries that failed, by URI without credentials.
        hint: How the failed registries can be completed.

    Raises:
        RegistryError: some registries failed; the message names both kinds.
    """
    if len(errors) == 1 and not versions:
        raise next(iter(errors.values()))
    if errors:
        failures = "; ".join(f"{uri}: {error.message}" for uri, error in errors.items())
        raise RegistryError(f"{action} in {', '.join(versions) or 'none'}, but not in {failures}", hint=hint)
