"""Sign what the compile and validate steps did, and decide whether a cached answer is attested well enough.

Only the run that did the work signs it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from compileflow.artifact.attestations.envelopes import RECORD_TYPE, RECORDS, put_statement, seal
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys, load_signer
from compileflow.artifact.attestations.statements import (
    PROVENANCE_TYPE,
    RESULT_OF,
    VERDICT_TYPE,
    CompileRun,
    Origin,
    Statement,
    ValidationRun,
    finished_on,
    origin,
    provenance_statement,
    report_digest,
    result,
    verdict_statement,
)
from compileflow.artifact.attestations.statements import request_digest as asked_request
from compileflow.artifact.attestations.verify import Attestation, trusted_signers, verify_attestations
from compileflow.artifact.manifest import read_manifest
from compileflow.contracts import ArtifactStore, Outcome, StoredFolder
from compileflow.errors import SignatureError
from compileflow.settings import Settings
from compileflow.validation.report import REPORT_JSON, Report

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey


# The statement on an artifact whose verdict is pending-device.
WAITING_VERDICT = "waiting-verdict"


@dataclass(frozen=True)
class Attester:
    """Writes the statements of one run.

    Attributes:
        store: Store of the artifacts and of the statements about them.
        signer: Private key of the run. None leaves the statements unsigned.
        trusted: Public keys whose earlier statements are accepted, in addition to the signer's key.
        threads: Number of threads that a step uses.
        requires_signature: Whether only what a trusted key signed counts: with a key, or if the settings say so.
    """

    store: ArtifactStore
    signer: CryptoSigner | None
    trusted: tuple[SSlibKey, ...]
    threads: int
    requires_signature: bool

    @classmethod
    def of(cls, store: ArtifactStore, settings: Settings) -> Attester:
        """Load the configured keys. Call it before a step starts its work, so that a bad key fails early.

        Raises:
            SpecError: A key cannot be used.
            SignatureError: securesystemslib is not installed.
        """
        signer = load_signer(settings)
        requires_signature = signer is not None or settings.require_signature
        key_files = configured_keys(settings) if requires_signature else ()
        trusted = load_public_keys(key_files) if key_files else ()
        return cls(store, signer, trusted, settings.threads, requires_signature)

    def compiled(self, folder: Path, digest: str, *, started: datetime, request_digest: str) -> None:
        """Record how the artifact in `folder` was compiled. The artifact must be in the store already.

        Args:
            folder: Folder of the artifact.
            digest: Digest of the artifact.
            started: Start of the compile.
            request_digest: Key of the compile in the cache.
        """
        run = CompileRun(str(uuid.uuid4()), started, datetime.now(UTC), self.threads, request_digest)
        put_statement(self.store, digest, provenance_statement(read_manifest(folder), digest, run), self.signer)

    def validated(
        self,
        digest: str,
        report_dir: Path,
        *,
        stored_folder: StoredFolder,
        source_digest: str,
        request_digest: str,
        is_pending: bool = False,
        is_revalidation: bool = False,
    ) -> None:
        """Record the verdict of a validation.

        Args:
            digest: Digest of the artifact.
            report_dir: Folder with report.json.
            stored_folder: The same folder in the store.
            source_digest: Digest of the source model that the artifact was compared with.
            request_digest: Key of the validation in the cache.
            is_pending: The verdict is pending-device; it replaces no other verdict.
            is_revalidation: The artifact was registered before.
        """
        report = Report.model_validate_json((report_dir / REPORT_JSON).read_bytes())
        run = ValidationRun(
            outcome=report.verdict.outcome,
            gates={gate.gate: gate.outcome for gate in report.verdict.gates},
            suite_digest=report.suite_digest,
            user_suite_digest=report.user_suite_digest,
            source_digest=source_digest,
            report_digest=stored_folder.digest,
            report_uri=stored_folder.uri,
            request_digest=request_digest,
            finished=datetime.now(UTC),
            is_revalidation=is_revalidation,
        )
        statement = verdict_statement(digest, run)
        if is_pending:
            self.store.put_record(WAITING_VERDICT, digest, dict(seal(statement, self.signer)))
        else:
            put_statement(self.store, digest, statement, self.signer)

    def lacks_pending(self, digest: str, report: str, request_digest: str | None = None) -> str:
        """Return why a verdict that waits for a device cannot be settled; '' if its record is sufficient.

        The recorded answers of the source model are in its report, so that a run with a key, or one that requires
        signatures, settles only what a trusted key signed.

        Args:
            digest: Digest of the artifact.
            report: Digest of the report with the recorded answers.
            request_digest: Key of the validation. None: any is sufficient.
        """
        reason, verdict = self._lack(digest, VERDICT_TYPE, record=WAITING_VERDICT)
        if verdict is None:
            return reason if self.requires_signature else ""
        if report_digest(verdict.statement) != report:
            return "its statement names another report"
        if request_digest is None:
            return ""
        return _other_request(verdict, request_digest) or self._later_refusal(digest, verdict, request_digest)

    def _later_refusal(self, digest: str, waiting: Attestation, request_digest: str) -> str:
        """Return that a validation for another request did not pass since; it may have asked for more."""
        last = self.verdict_on(digest)[1]
        if last is None or result(last) == RESULT_OF["pass"] or asked_request(last) == request_digest:
            return ""
        before, after = finished_on(waiting.statement), finished_on(last)
        is_later = before is None or after is None or after >= before
        return f"a later validation has the result {result(last)}" if is_later else ""

    def lacks_provenance(self, digest: str, request_digest: str) -> str:
        """Return why a cached artifact must be compiled again; '' if its provenance is sufficient.

        Args:
            digest: Digest of the artifact.
            request_digest: Key of the compile that is asked for. A changed record can point at any artifact.
        """
        reason, provenance = self._lack(digest, PROVENANCE_TYPE)
        return reason if provenance is None else _other_request(provenance, request_digest)

    def compiled_from(self, digest: str) -> tuple[str, Origin | None]:
        """Return why an artifact's provenance is not sufficient, and None; or '' and its source model."""
        reason, provenance = self._lack(digest, PROVENANCE_TYPE)
        return reason, None if provenance is None else origin(provenance.statement)

    def lacks_verdict(self, digest: str, report: str, outcome: Outcome, request_digest: str | None = None) -> str:
        """Return why a cached validation must be repeated; '' if its verdict is sufficient.

        Args:
            digest: Digest of the artifact.
            report: Digest of the cached report. A later validation may have replaced its verdict.
            outcome: Outcome of the cached validation.
            request_digest: Key of the validation that is asked for. None: any validation is sufficient.
        """
        reason, verdict = self._lack(digest, VERDICT_TYPE)
        if verdict is None:
            return reason
        if report_digest(verdict.statement) == report:
            stated = result(verdict.statement)
            if stated != RESULT_OF[outcome]:
                return f"its statement has the result {stated or 'none'}"
            return "" if request_digest is None else _other_request(verdict, request_digest)
        signatures = _record(self.store, digest, VERDICT_TYPE).get("signatures")
        # A run without a key cannot replace a signed verdict, so repeating the validation would change nothing.
        can_replace = not signatures or self.signer is not None
        return "a later validation replaced the verdict on this artifact" if can_replace else ""

    def verdict_on(self, digest: str) -> tuple[str, Statement | None]:
        """Return why the verdict on an artifact is not sufficient, and None; or '' and the verdict."""
        reason, verdict = self._lack(digest, VERDICT_TYPE)
        return reason, None if verdict is None else verdict.statement

    def signatures_of(self, step: str, content: Mapping[str, JsonValue]) -> JsonValue:
        """Return this run's signatures of a cache record; [] without a key."""
        return _sealed_record(step, content, self.signer)["signatures"]

    def distrusts(self, step: str, content: Mapping[str, JsonValue], signatures: JsonValue) -> str:
        """Return why this run does not use a cache record; '' if it needs no signature or has a trusted one."""
        if not self.requires_signature:
            return ""
        envelope = _sealed_record(step, content, None) | {"signatures": signatures}
        try:
            signers = trusted_signers("record", envelope, self._keys, payload_type=RECORD_TYPE)
        except SignatureError as error:
            return error.message.rstrip(".")
        return "" if signers else "neither this run's key nor a trusted key signed it"

    @property
    def _keys(self) -> tuple[SSlibKey, ...]:
        """Public keys whose signatures count for this run."""
        return self.trusted if self.signer is None else (self.signer.public_key, *self.trusted)

    def _lack(self, digest: str, kind: str, *, record: str = "") -> tuple[str, Attestation | None]:
        """Return why a statement of a kind is not sufficient, and the statement; '' with it if it is."""
        name = RECORDS[kind]
        try:
            attestations = verify_attestations(
                digest,
                filter(None, [self.store.get_record(record or name, digest)]),
                trusted_keys=self._keys,
                require_signature=False,
            )
        except SignatureError as error:
            return error.message.rstrip("."), None
        # A record may hold a statement of the other kind.
        attestation = attestations.provenance if kind == PROVENANCE_TYPE else attestations.verdict
        if attestation is None:
            return f"the store has no {name} statement on it", None
        if self.requires_signature and not attestation.signed_by:
            return f"neither this run's key nor a trusted key signed its {name} statement", None
        return "", attestation


def _sealed_record(
    step: str, content: Mapping[str, JsonValue], signer: CryptoSigner | None
) -> dict[str, JsonValue]:
    return seal({"step": step, "record": dict(content)}, signer, payload_type=RECORD_TYPE)


def _other_request(attestation: Attestation, request_digest: str) -> str:
    """Return that a statement answers another request than the one asked, or ''."""
    found = asked_request(attestation.statement)
    if found == request_digest:
        return ""
    return f"its statement answers {f'another request, {found[:12]}' if found else 'an unnamed request'}"


def _record(store: ArtifactStore, digest: str, kind: str) -> Mapping[str, object]:
    return store.get_record(RECORDS[kind], digest) or {}
