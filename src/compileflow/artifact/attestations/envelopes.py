"""DSSE envelopes: how statements are sealed, recorded in a store, and bundled in a file beside an artifact.

https://github.com/secure-systems-lab/dsse defines the envelope. An unsigned envelope is plain JSON, and writing it
needs no other library. The bundle file holds one envelope per line.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from compileflow.artifact.attestations.statements import PROVENANCE_TYPE, VERDICT_TYPE, Statement
from compileflow.artifact.manifest import ATTESTATIONS_NAME
from compileflow.contracts import ArtifactStore
from compileflow.contracts.digests import canonical_json
from compileflow.contracts.json_files import read_bytes
from compileflow.errors import SignatureError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

PAYLOAD_TYPE = "application/vnd.in-toto+json"
# A record of the cache.
RECORD_TYPE = "application/vnd.compileflow.record+json"
# Two statements have a few kilobytes each.
_MOST_BUNDLE_BYTES = 16 * 2**20
# Predicate type to the kind of the store's record, whose key is the artifact's digest.
RECORDS: Mapping[str, str] = {PROVENANCE_TYPE: "provenance", VERDICT_TYPE: "verdict"}

Envelope = Mapping[str, Any]


def seal(
    content: Mapping[str, Any], signer: Signer | None, *, payload_type: str = PAYLOAD_TYPE
) -> dict[str, JsonValue]:
    """Put a statement or a record into an envelope and sign it; signer None leaves it unsigned."""
    payload = canonical_json(dict(content))
    if signer is None:
        return {"payload": base64.b64encode(payload).decode(), "payloadType": payload_type, "signatures": []}
    from securesystemslib.dsse import Envelope as SignedEnvelope

    envelope = SignedEnvelope(payload, payload_type, {})
    envelope.sign(signer)
    sealed: dict[str, JsonValue] = envelope.to_dict()
    return sealed


def payload_of(envelope: Envelope) -> bytes:
    """Return the payload of an envelope: the bytes that its signatures cover, without their type.

    Raises:
        SignatureError: The value is not an envelope.
    """
    try:
        return base64.b64decode(envelope["payload"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(
            f"An attestation is not a DSSE envelope: {type(error).__name__}: {error}.",
            hint="Fetch the artifact again.",
        ) from error


def statement_in(envelope: Envelope) -> dict[str, Any] | None:
    """Return the statement in an envelope without verifying it; None if the payload is not an in-toto statement.

    Raises:
        SignatureError: The value is not an envelope, or its payload is not JSON.
    """
    payload = payload_of(envelope)
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        return None
    try:
        statement = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SignatureError(
            f"The payload of an attestation is not JSON: {error}.", hint="Fetch the artifact again."
        ) from error
    return statement if isinstance(statement, dict) else None


def is_signed(envelope: Envelope) -> bool:
    """Return whether an envelope has signatures, which says nothing about whether they are right."""
    return bool(envelope.get("signatures"))


def put_statement(store: ArtifactStore, digest: str, statement: Statement, signer: Signer | None) -> None:
    """Record a statement about an artifact in its store. It replaces the previous statement of the same kind.

    An unsigned statement never replaces a signed one. Otherwise a run without the key would undo a run with it.
    """
    kind = RECORDS[str(statement["predicateType"])]
    previous_record = store.get_record(kind, digest)
    if signer is None and previous_record is not None and is_signed(previous_record):
        return
    store.put_record(kind, digest, seal(statement, signer))


def stored_envelopes(store: ArtifactStore, digest: str) -> tuple[Envelope, ...]:
    """Return the envelopes that the store holds for an artifact: provenance, verdict, one of them, or ()."""
    records = (store.get_record(kind, digest) for kind in RECORDS.values())
    return tuple(record for record in records if record is not None)


def write_bundle(folder: Path, envelopes: Iterable[Envelope]) -> None:
    """Write the bundle file beside an artifact's files; without envelopes, write nothing."""
    lines = [canonical_json(dict(envelope)) + b"\n" for envelope in envelopes]
    if lines:
        (folder / ATTESTATIONS_NAME).write_bytes(b"".join(lines))


def read_bundle(folder: Path) -> tuple[Envelope, ...]:
    """Return the envelopes of the bundle file beside an artifact's files; () if the file does not exist.

    Raises:
        SignatureError: The file cannot be read, it is empty, or a line is not a JSON object.
    """
    path = folder / ATTESTATIONS_NAME
    try:
        data = read_bytes(path, most_bytes=_MOST_BUNDLE_BYTES)
        envelopes = [json.loads(line) for line in data.splitlines() if line.strip()]
        if not envelopes:
            raise ValueError("it is empty")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise SignatureError(f"{path} cannot be read: {error}.", hint="Fetch the artifact again.") from error
    if not all(isinstance(envelope, dict) for envelope in envelopes):
        raise SignatureError(f"{path} has a line that is not a JSON object.", hint="Fetch the artifact again.")
    return tuple(envelopes)
