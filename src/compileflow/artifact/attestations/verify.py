"""Whether an artifact's statements are about it, agree with one another, and are signed by a trusted key."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compileflow.artifact.attestations.envelopes import PAYLOAD_TYPE, RECORDS, Envelope, payload_of, statement_in
from compileflow.artifact.attestations.statements import (
    PROVENANCE_TYPE,
    STATEMENT_TYPE,
    VERDICT_TYPE,
    Statement,
    report_digest,
    result,
    source_digest,
    subject_digests,
)
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, SignatureError

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

# A warned artifact was registered on purpose.
_ACCEPTED = ("PASSED", "WARNED")
_FORGED = "Do not load this artifact; fetch it again from where it was compiled."


@dataclass(frozen=True)
class Attestation:
    """One statement on an artifact, and the ids of the trusted keys that signed it."""

    statement: Statement
    signed_by: tuple[str, ...]


@dataclass(frozen=True)
class Attested:
    """What is said of an artifact; None where nothing is."""

    provenance: Attestation | None
    verdict: Attestation | None

    @property
    def complete(self) -> bool:
        """Whether both statements are there."""
        return self.provenance is not None and self.verdict is not None

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Ids of the trusted keys that signed one of them or both, sorted."""
        ids = {key for each in (self.provenance, self.verdict) if each is not None for key in each.signed_by}
        return tuple(sorted(ids))

    @property
    def result(self) -> str | None:
        """The verdict: PASSED, WARNED or FAILED."""
        return None if self.verdict is None else result(self.verdict.statement)


def verify_attestations(
    artifact_digest: str,
    envelopes: Iterable[Envelope],
    *,
    trusted_keys: Sequence[SSlibKey],
    require_signature: bool,
    manifest_source: str | None = None,
) -> Attested:
    """Check all that is said of an artifact. Envelopes of other kinds than these two statements are passed over.

    Args:
        artifact_digest: Of the artifact that is here.
        envelopes: DSSE, in any order.
        trusted_keys: Public keys whose signatures count.
        require_signature: Refuse an artifact that lacks a statement or a trusted signature on it, or whose verdict
            is neither PASSED nor WARNED.
        manifest_source: The source model's digest in the artifact's manifest.

    Raises:
        SignatureError: a statement is on another artifact or another source model, there are two of a kind, a
            trusted key's signature is over other bytes, or what `require_signature` says.
    """
    found: dict[str, Attestation] = {}
    for envelope in envelopes:
        statement = statement_in(envelope)
        kind = str(statement.get("predicateType")) if statement is not None else ""
        if statement is None or statement.get("_type") != STATEMENT_TYPE or kind not in RECORDS:
            continue
        if kind in found:
            raise SignatureError(f"There are two statements of the kind {RECORDS[kind]}.", hint=_FORGED)
        _check_subject(RECORDS[kind], statement, artifact_digest)
        found[kind] = Attestation(statement, _signers(RECORDS[kind], envelope, trusted_keys))
    attested = Attested(found.get(PROVENANCE_TYPE), found.get(VERDICT_TYPE))
    _check_source(attested, manifest_source)
    if require_signature:
        _check_required(found, attested.result, trusted_keys)
    return attested


def check_report(report: Path | str, verdict: Statement) -> None:
    """Compare a report's folder, or its digest, with the one that a verdict stands on.

    Raises:
        IntegrityError: it is another report, or an altered one.
    """
    found = folder_digest(list_files(report)) if isinstance(report, Path) else report
    said = report_digest(verdict) or "none"
    if found != said:
        raise IntegrityError(
            f"The report has the digest {found[:12]}..., the verdict stands on {said[:12]}...",
            hint="Do not rely on this report; validate the artifact again.",
        )


def _check_subject(name: str, statement: Statement, artifact_digest: str) -> None:
    subjects = subject_digests(statement)
    if artifact_digest not in subjects:
        others = ", ".join(f"{digest[:12]}..." for digest in subjects) or "nothing"
        raise SignatureError(
            f"The {name} is on another artifact: it names {others}, this one is {artifact_digest[:12]}...",
            hint=_FORGED,
        )


def _check_source(attested: Attested, manifest_source: str | None) -> None:
    said = {
        "manifest": manifest_source,
        "provenance": source_digest(attested.provenance.statement) if attested.provenance else None,
        "verdict": source_digest(attested.verdict.statement) if attested.verdict else None,
    }
    absent = [
        name
        for name, statement in (("provenance", attested.provenance), ("verdict", attested.verdict))
        if statement is not None and said[name] is None
    ]
    named = {name: digest for name, digest in said.items() if digest is not None}
    if absent or len(set(named.values())) > 1:
        words = [f"{name} {digest[:12]}..." for name, digest in named.items()]
        words += [f"{name} none" for name in absent]
        raise SignatureError(f"The statements differ on the source model: {', '.join(words)}.", hint=_FORGED)


def _check_required(found: dict[str, Attestation], verdict: str | None, trusted_keys: Sequence[SSlibKey]) -> None:
    for kind, name in RECORDS.items():
        if kind not in found:
            raise SignatureError(
                f"A signature is required, and the artifact has no {name} statement.",
                hint="Compile and validate it by a run with COMPILEFLOW_SIGNING_KEY set, and load that.",
            )
        if not found[kind].signed_by:
            trusted = ", ".join(key.keyid[:12] for key in trusted_keys) or "none"
            raise SignatureError(
                f"A signature is required, and no trusted key signed the {name}; trusted are: {trusted}.",
                hint="Compile and validate it with one of these keys, or add the key that signed it to "
                "COMPILEFLOW_TRUSTED_KEYS.",
            )
    if verdict not in _ACCEPTED:
        raise SignatureError(
            f"A signature is required, and the signed verdict is {verdict or 'none'}.",
            hint=f"Load an artifact whose verdict is {' or '.join(_ACCEPTED)}.",
        )


def _signers(name: str, envelope: Envelope, trusted_keys: Sequence[SSlibKey]) -> tuple[str, ...]:
    """Return the trusted keys that signed an envelope. DSSE's key ids are only hints: every key is tried."""
    signatures = _signatures(envelope)
    if not trusted_keys or not signatures:
        return ()
    from securesystemslib.dsse import Envelope as SignedEnvelope
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature

    signed = SignedEnvelope(payload_of(envelope), PAYLOAD_TYPE, {}).pae()
    valid = []
    for key in trusted_keys:
        for claimed, raw in signatures:
            try:
                key.verify_signature(Signature(key.keyid, raw.hex()), signed)
            except UnverifiedSignatureError as error:
                if claimed == key.keyid:
                    raise SignatureError(
                        f"The {name} was altered: the signature of the key {key.keyid[:12]}... does not fit it.",
                        hint=_FORGED,
                    ) from error
            else:
                valid.append(key.keyid)
                break
    return tuple(valid)


def _signatures(envelope: Envelope) -> list[tuple[Any, bytes]]:
    """Return (key id as claimed, signature) of each; what is no signature counts as an empty one."""
    entries = envelope.get("signatures")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            found.append((entry.get("keyid"), _decoded(entry.get("sig"))))
    return found


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return b""
