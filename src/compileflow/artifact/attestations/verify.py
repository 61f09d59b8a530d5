"""Verify that an artifact's statements are about it, agree with each other, and carry trusted signatures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compileflow.artifact.attestations.envelopes import PAYLOAD_TYPE, RECORDS, Envelope, payload_of, statement_in
from compileflow.artifact.attestations.statements import (
    PROVENANCE_TYPE,
    STATEMENT_TYPE,
    VERDICT_TYPE,
    Statement,
    result,
    source_digest,
    subject_digests,
)
from compileflow.errors import SignatureError

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

# A version with the verdict `warn` was registered deliberately.
_MOST_SIGNATURES = 100
_ACCEPTED_RESULTS = ("PASSED", "WARNED")
_FORGED = "Do not load this artifact; fetch it again from where it was compiled."


@dataclass(frozen=True)
class Attestation:
    """One statement about an artifact, and the ids of the trusted keys that signed it."""

    statement: Statement
    signed_by: tuple[str, ...]


@dataclass(frozen=True)
class Attestations:
    """The two attestations of an artifact; None where one is missing."""

    provenance: Attestation | None
    verdict: Attestation | None

    @property
    def complete(self) -> bool:
        """Whether the artifact has both statements."""
        return self.provenance is not None and self.verdict is not None

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Sorted ids of the trusted keys that signed at least one of the statements."""
        attestations = filter(None, (self.provenance, self.verdict))
        return tuple(sorted({key_id for attestation in attestations for key_id in attestation.signed_by}))

    @property
    def result(self) -> str | None:
        """The verdict: PASSED, WARNED or FAILED; None without a verdict."""
        return None if self.verdict is None else result(self.verdict.statement)


def verify_attestations(
    artifact_digest: str,
    envelopes: Iterable[Envelope],
    *,
    trusted_keys: Sequence[SSlibKey],
    require_signature: bool,
    manifest_source: str | None = None,
) -> Attestations:
    """Verify the provenance and the verdict of an artifact. Other kinds of statements are ignored.

    Args:
        artifact_digest: Digest of the artifact, as computed from its files.
        envelopes: DSSE envelopes, in any order.
        trusted_keys: Public keys whose signatures are trusted.
        require_signature: Refuse an artifact that lacks a statement or a trusted signature on one, or whose
            verdict is neither PASSED nor WARNED.
        manifest_source: Digest of the source model in the artifact's manifest.

    Raises:
        SignatureError: A statement is about another artifact or another source model, a kind of statement occurs
            twice, a trusted key's signature does not match its statement, or `require_signature` refuses.
    """
    attestations_by_type: dict[str, Attestation] = {}
    for envelope in envelopes:
        statement = statement_in(envelope)
        kind = str(statement.get("predicateType")) if statement is not None else ""
        if statement is None or statement.get("_type") != STATEMENT_TYPE or kind not in RECORDS:
            continue
        if kind in attestations_by_type:
            raise SignatureError(f"The artifact has two {RECORDS[kind]} statements, expected one.", hint=_FORGED)
        check_subject(RECORDS[kind], statement, artifact_digest)
        attestations_by_type[kind] = Attestation(statement, trusted_signers(RECORDS[kind], envelope, trusted_keys))
    attestations = Attestations(attestations_by_type.get(PROVENANCE_TYPE), attestations_by_type.get(VERDICT_TYPE))
    _check_source(attestations, manifest_source)
    if require_signature:
        _check_required(attestations_by_type, attestations.result, trusted_keys)
    return attestations


def check_subject(name: str, statement: Statement, artifact_digest: str) -> None:
    """Check that a statement, the provenance or the verdict, is about an artifact.

    Raises:
        SignatureError: It is about another one.
    """
    subjects = subject_digests(statement)
    if artifact_digest not in subjects:
        # Digests that begin alike are shown whole.
        length = 64 if any(digest[:12] == artifact_digest[:12] for digest in subjects) else 12
        expected, *found = (f"{digest[:length]}..." for digest in (artifact_digest, *subjects))
        raise SignatureError(
            f"The {name} is about another artifact: expected {expected}, found {', '.join(found) or 'none'}.",
            hint=_FORGED,
        )


def _check_source(attestations: Attestations, manifest_source: str | None) -> None:
    digests = {"manifest": manifest_source} if manifest_source is not None else {}
    for name, attestation in (("provenance", attestations.provenance), ("verdict", attestations.verdict)):
        if attestation is not None:
            digests[name] = source_digest(attestation.statement) or "none"
    if "none" in digests.values() or len(set(digests.values())) > 1:
        text = ", ".join(
            f"{name} {digest if digest == 'none' else f'{digest[:12]}...'}" for name, digest in digests.items()
        )
        raise SignatureError(f"The statements name different source models: {text}.", hint=_FORGED)


def _check_required(
    attestations: Mapping[str, Attestation], verdict: str | None, trusted_keys: Sequence[SSlibKey]
) -> None:
    for kind, name in RECORDS.items():
        if kind not in attestations:
            raise SignatureError(
                f"A signature is required, but the artifact has no {name} statement.",
                hint="Compile and validate the model again with COMPILEFLOW_SIGNING_KEY set, and load the result.",
            )
        if not attestations[kind].signed_by:
            trusted_ids = ", ".join(key.keyid[:12] for key in trusted_keys) or "none"
            raise SignatureError(
                f"A signature is required, but no trusted key signed the {name}. Trusted keys: {trusted_ids}.",
                hint="Compile and validate the model with one of these keys, or add the key that signed it to "
                "COMPILEFLOW_TRUSTED_KEYS.",
            )
    if verdict not in _ACCEPTED_RESULTS:
        accepted_results = " or ".join(_ACCEPTED_RESULTS)
        raise SignatureError(
            f"A signed verdict {accepted_results} is required, found {verdict or 'none'}.",
            hint=f"Load an artifact whose verdict is {accepted_results}.",
        )


def trusted_signers(
    name: str, envelope: Envelope, trusted_keys: Sequence[SSlibKey], *, payload_type: str = PAYLOAD_TYPE
) -> tuple[str, ...]:
    """Return the ids of the trusted keys that signed an envelope.

    DSSE's key ids are only hints. So every trusted key is tried on every signature.

    Raises:
        SignatureError: A signature names a trusted key, but is not that key's.
    """
    signatures = _signatures(envelope)
    if not trusted_keys or not signatures:
        return ()
    if len(signatures) > _MOST_SIGNATURES:
        raise SignatureError(
            f"The {name} has {len(signatures)} signatures, expected at most {_MOST_SIGNATURES}.", hint=_FORGED
        )
    from securesystemslib.dsse import Envelope as SignedEnvelope
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature

    signed_bytes = SignedEnvelope(payload_of(envelope), payload_type, {}).pae()
    signers = []
    for key in trusted_keys:
        for claimed_id, signature in signatures:
            try:
                key.verify_signature(Signature(key.keyid, signature.hex()), signed_bytes)
            except UnverifiedSignatureError as error:
                if claimed_id == key.keyid:
                    raise SignatureError(
                        f"The {name} was altered: the signature of key {key.keyid[:12]}... does not match it.",
                        hint=_FORGED,
                    ) from error
            else:
                signers.append(key.keyid)
                break
    return tuple(signers)


def _signatures(envelope: Envelope) -> list[tuple[Any, bytes]]:
    """Return (claimed key id, signature) per signature; malformed signatures are empty and match no key."""
    entries = envelope.get("signatures")
    return [
        (entry.get("keyid"), _decoded(entry.get("sig")))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    ]


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return b""
