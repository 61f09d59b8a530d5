"""StatementJudge: whether a statement from another store may replace the one that a store has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compileflow.artifact.attestations.envelopes import Envelope, is_signed, statement_in
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.statements import finished_on
from compileflow.artifact.attestations.verify import verify_attestations
from compileflow.errors import SignatureError
from compileflow.settings import Settings

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True)
class StatementJudge:
    """Decides which of two statements of one kind about an artifact stays.

    With trusted keys, only a statement that one of them signed replaces another, and not by an older verdict.
    Without keys, nothing replaces a signed statement, because the signature of the other one cannot be checked.

    Attributes:
        trusted: Public keys whose signatures are trusted.
    """

    trusted: Sequence[SSlibKey]

    @classmethod
    def of(cls, settings: Settings) -> StatementJudge:
        """Load the trusted keys of the settings.

        Raises:
            SpecError: A key cannot be used.
            SignatureError: securesystemslib is not installed.
        """
        paths = configured_keys(settings)
        return cls(load_public_keys(paths) if paths else ())

    def objection(self, digest: str, existing: Envelope, new: Envelope, *, predicate_type: str) -> str:
        """Return why a statement about an artifact must not replace the existing one; "" if it may.

        Args:
            digest: Digest of the artifact.
            existing: Envelope that the store has.
            new: Envelope that would replace it.
            predicate_type: Kind of the statements.
        """
        if not self.trusted:
            return (
                "it is signed, and no key is trusted that could check another one" if is_signed(existing) else ""
            )
        problem = self._distrust(digest, new, predicate_type)
        if problem:
            return problem
        if self._distrust(digest, existing, predicate_type):
            return ""
        before, after = (finished_on(statement_in(envelope) or {}) for envelope in (existing, new))
        # Only older versions of compileflow wrote verdicts without a date.
        return "the other one is older" if before and (after is None or after < before) else ""

    def _distrust(self, digest: str, envelope: Envelope, predicate_type: str) -> str:
        try:
            attestations = verify_attestations(
                digest, [envelope], trusted_keys=self.trusted, require_signature=False
            )
            if (statement_in(envelope) or {}).get("predicateType") != predicate_type:
                return "the other one is a statement of another kind"
        except SignatureError as error:
            return error.message.rstrip(".")
        return "" if attestations.signed_by else "no trusted key signed the other one"
