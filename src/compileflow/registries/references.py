"""References to registered versions: registry:NAME, registry:NAME@production, REGISTRY_URI#NAME@3."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from compileflow.contracts import STAGES, Stage, VersionEntry
from compileflow.errors import SpecError

_CONFIGURED = "registry:"
FORMS = f"{_CONFIGURED}NAME, {_CONFIGURED}NAME@STAGE or {_CONFIGURED}NAME@NUMBER, or REGISTRY_URI#NAME instead"


@dataclass(frozen=True)
class Reference:
    """A reference to a registered version.

    Attributes:
        registry_uri: URI of the registry; None means the configured one.
        name: Name of the model in the registry.
        ref: A number or a stage; None means the newest version.
    """

    registry_uri: str | None
    name: str
    ref: int | Stage | None


def parse_reference(text: str, schemes: Collection[str]) -> Reference | None:
    """Read a reference; return None for any other text, for example a folder or a Hub id.

    Args:
        text: Text from the user.
        schemes: Schemes of the registry URIs that the catalog knows.

    Raises:
        SpecError: The text is a reference, and its name, stage or number is not possible.

    >>> parse_reference("registry:ner@production", ())
    Reference(registry_uri=None, name='ner', ref='production')
    >>> parse_reference("neptune://workspace/project#ner@3", ("neptune",))
    Reference(registry_uri='neptune://workspace/project', name='ner', ref=3)
    """
    if text.startswith(_CONFIGURED):
        registry_uri, version = None, text.removeprefix(_CONFIGURED)
    else:
        # The last one counts: the path of a registry's file may contain the sign, and a name may not.
        registry_uri, hash_sign, version = text.rpartition("#")
        if not hash_sign or registry_uri.partition(":")[0] not in schemes:
            return None
    name, separator, ref = version.partition("@")
    if not _is_name(name) or (separator and not ref):
        # The message omits the registry's URI, which may hold a password.
        raise SpecError(f"Expected a reference to a registered model, got {version!r}.", hint=f"Write {FORMS}.")
    return Reference(registry_uri, name, parse_ref(ref) if separator else None)


def _is_name(name: str) -> bool:
    rule = VersionEntry.model_fields["name"]
    patterns = [getattr(part, "pattern", None) for part in rule.metadata]
    return all(re.fullmatch(pattern, name) for pattern in patterns if pattern)


def parse_ref(ref: str) -> int | Stage:
    """Read the number of a version, or a stage.

    Raises:
        SpecError: The text is neither.
    """
    if ref in STAGES:
        return ref
    if re.fullmatch(r"[1-9][0-9]*", ref):
        return int(ref)
    raise SpecError(
        f"Expected the number of a version or a stage, got {ref!r}.",
        hint=f"Stages are: {', '.join(STAGES)}. Numbers start at 1.",
    )
