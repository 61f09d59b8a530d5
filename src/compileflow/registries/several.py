"""One operation on several registries: successful changes stay, and the error names the failed ones."""

from __future__ import annotations

from collections.abc import Mapping

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, RegistryError


def check_all_succeeded(
    action: str, versions: Mapping[str, ModelVersion], errors: Mapping[str, CompileflowError], *, hint: str
) -> None:
    """Raise if a registry failed. With one registry only, raise the error of that registry.

    Args:
        action: The operation as a past participle: "Registered", "Promoted".
        versions: Versions of the registries that succeeded, by URI without credentials.
        errors: Errors of the registries that failed, by URI without credentials.
        hint: How to complete the failed registries.

    Raises:
        RegistryError: Some registries failed; the message names these and the others.
    """
    if len(errors) == 1 and not versions:
        raise next(iter(errors.values()))
    if errors:
        failures = "; ".join(f"{uri}: {error.message}" for uri, error in errors.items())
        raise RegistryError(f"{action} in {', '.join(versions) or 'none'}, but not in {failures}", hint=hint)
