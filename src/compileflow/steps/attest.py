"""Write what the compile and validate steps say of an artifact, and see whether it was said before."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow.artifact.attestations.envelopes import RECORDS, put_statement
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys, load_signer
from compileflow.artifact.attestations.statements import (
    PROVENANCE_TYPE,
    VERDICT_TYPE,
    CompileRun,
    Judged,
    provenance_statement,
    report_digest,
    verdict_statement,
)
from compileflow.artifact.attestations.verify import Attested, verify_attestations
from compileflow.artifact.manifest import read_manifest
from compileflow.contracts import ArtifactStore, StoredFolder
from compileflow.errors import SignatureError
from compileflow.settings import Settings
from compileflow.validation.report import REPORT_JSON, Report

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey


@dataclass(frozen=True)
class Attester:
    """Speaks for one step of one run.

    Attributes:
        store: Keeps what is said.
        signer: None leaves statements unsigned.
        trusted: Keys whose earlier statements stand, besides the signer's own.
        threads: Of the step.
    """

    store: ArtifactStore
    signer: CryptoSigner | None
    trusted: tuple[SSlibKey, ...]
    threads: int

    @classmethod
    def of(cls, store: ArtifactStore, settings: Settings) -> Attester:
        """Load the keys before anything is compiled or measured.

        Raises:
            SpecError: a key cannot be used.
            SignatureError: securesystemslib is missing.
        """
        signer = load_signer(settings)
        others = configured_keys(settings) if signer is not None else ()
        return cls(store, signer, load_public_keys(others) if others else (), settings.threads)

    def compiled(self, folder: Path, digest: str, *, started: datetime) -> None:
        """Say how the artifact in `folder`, stored already, was made."""
        run = CompileRun(str(uuid.uuid4()), started, datetime.now(UTC), self.threads)
        put_statement(self.store, digest, provenance_statement(read_manifest(folder), digest, run), self.signer)

    def validated(self, digest: str, report_dir: Path, *, stored: StoredFolder, source_digest: str) -> None:
        """Say what the validation of an artifact found.

        Args:
            digest: The artifact's.
            report_dir: With report.json.
            stored: The same folder in the store.
            source_digest: Of the source model that the artifact was compared with.
        """
        report = Report.model_validate_json((report_dir / REPORT_JSON).read_bytes())
        judged = Judged(
            outcome=report.verdict.outcome,
            gates={gate.gate: gate.outcome for gate in report.verdict.gates},
            suite_digest=report.suite_digest,
            source_digest=source_digest,
            report_digest=stored.digest,
            report_uri=stored.uri,
        )
        put_statement(self.store, digest, verdict_statement(digest, judged), self.signer)

    def lacks_provenance(self, digest: str) -> str:
        """Say why an artifact that was found has to be compiled again; '' if it has not."""
        return self._lack(digest, PROVENANCE_TYPE)[0]

    def lacks_verdict(self, digest: str, report: str) -> str:
        """Say why a validation that was found has to be made again; '' if it has not.

        Args:
            digest: The artifact's.
            report: Digest of the report that was found. A later validation may have had the last word since.
        """
        why, attested = self._lack(digest, VERDICT_TYPE)
        if (
            why
            or attested is None
            or attested.verdict is None
            or report_digest(attested.verdict.statement) == report
        ):
            return why
        signed = _record(self.store, digest, VERDICT_TYPE).get("signatures")
        return "" if signed and self.signer is None else "the last verdict on this artifact is another one"

    def _lack(self, digest: str, kind: str) -> tuple[str, Attested | None]:
        name = RECORDS[kind]
        own = (self.signer.public_key,) if self.signer is not None else ()
        try:
            attested = verify_attestations(
                digest,
                filter(None, [_record(self.store, digest, kind)]),
                trusted_keys=(*own, *self.trusted),
                require_signature=False,
            )
        except SignatureError as error:
            return error.message.rstrip("."), None
        if (attested.provenance or attested.verdict) is None:
            return f"the store has no {name} statement on it", None
        if own and not attested.signed_by:
            return f"its {name} statement is not signed by this run's key or one that is trusted", None
        return "", attested


def _record(store: ArtifactStore, digest: str, kind: str) -> Mapping[str, object]:
    return store.get_record(RECORDS[kind], digest) or {}
