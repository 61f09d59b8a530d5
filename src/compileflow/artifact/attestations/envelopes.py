"""DSSE envelopes around statements, and the file in which an artifact's travel: one envelope a line.

The envelope is that of https://github.com/secure-systems-lab/dsse; without signatures it is plain JSON, and needs
no other library.
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
from compileflow.errors import SignatureError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

PAYLOAD_TYPE = "application/vnd.in-toto+json"
# Records of an artifact store, by the artifact's digest.
RECORDS: Mapping[str, str] = {PROVENANCE_TYPE: "provenance", VERDICT_TYPE: "verdict"}

Envelope = Mapping[str, Any]


def seal(statement: Statement, signer: Signer | None) -> dict[str, JsonValue]:
    """Put a statement into an envelope, signed where there is a signer."""
    payload = canonical_json(dict(statement))
    if signer is None:
        return {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": []}
    from securesystemslib.dsse import Envelope as SignedEnvelope

    envelope = SignedEnvelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    sealed: dict[str, JsonValue] = envelope.to_dict()
    return sealed


def payload_of(envelope: Envelope) -> bytes:
    """Return the bytes that an envelope's signatures are over, without their type.

    Raises:
        SignatureError: it is no envelope.
    """
    try:
        return base64.b64decode(envelope["payload"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(
            f"An attestation is no DSSE envelope: {type(error).__name__}: {error}.",
            hint="Fetch the artifact again.",
        ) from error


def statement_in(envelope: Envelope) -> dict[str, Any] | None:
    """Return an envelope's statement, unchecked; None where it holds something else than in-toto's.

    Raises:
        SignatureError: it is no envelope, or no JSON is in it.
    """
    payload = payload_of(envelope)
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        return None
    try:
        statement = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SignatureError(
            f"An attestation's payload is no JSON: {error}.", hint="Fetch the artifact again."
        ) from error
    return statement if isinstance(statement, dict) else None


def put_statement(store: ArtifactStore, digest: str, statement: Statement, signer: Signer | None) -> None:
    """Record a statement on an artifact in its store, in place of the last one of its kind.

    One that is not signed never takes the place of one that is: whoever runs without the key would undo it.
    """
    kind = RECORDS[str(statement["predicateType"])]
    before = store.get_record(kind, digest)
    if signer is None and before is not None and before.get("signatures"):
        return
    store.put_record(kind, digest, seal(statement, signer))


def stored_envelopes(store: ArtifactStore, digest: str) -> tuple[Envelope, ...]:
    """Return what the store has on an artifact: provenance, verdict, or what there is of them."""
    found = (store.get_record(kind, digest) for kind in RECORDS.values())
    return tuple(envelope for envelope in found if envelope is not None)


def write_bundle(folder: Path, envelopes: Iterable[Envelope]) -> None:
    """Write an artifact's envelopes beside its files; none leave no file."""
    lines = [canonical_json(dict(envelope)) + b"\n" for envelope in envelopes]
    if lines:
        (folder / ATTESTATIONS_NAME).write_bytes(b"".join(lines))


def read_bundle(folder: Path) -> tuple[Envelope, ...]:
    """Return the envelopes beside an artifact's files, () where there are none.

    Raises:
        SignatureError: the file cannot be read, or a line is no JSON object.
    """
    path = folder / ATTESTATIONS_NAME
    try:
        envelopes = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise SignatureError(f"{path} cannot be read: {error}.", hint="Fetch the artifact again.") from error
    if not all(isinstance(envelope, dict) for envelope in envelopes):
        raise SignatureError(f"{path} has a line that is no JSON object.", hint="Fetch the artifact again.")
    return tuple(envelopes)
