"""Signatures: which forgeries are detected, what `require_signature` refuses, and which keys are accepted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from compileflow.artifact.attestations.envelopes import seal
from compileflow.artifact.attestations.keys import load_public_keys, load_signer
from compileflow.artifact.attestations.verify import verify_attestations
from compileflow.errors import SignatureError, SpecError
from compileflow.settings import Settings
from tests.services.secrets import SIGNING_PASSWORD
from tests.unit.attested_artifacts import (
    Envelope,
    Keys,
    altered,
    digest_of,
    envelopes_for,
    make_keys,
    signed_by_both,
    small_artifact,
    statement_of,
)

Change = Callable[[list[Envelope]], list[Envelope]]


def check(folder: Path, envelopes: list[Envelope], keys: Keys, *, required: bool = True) -> Any:
    return verify_attestations(digest_of(folder), envelopes, trusted_keys=keys.trusted, require_signature=required)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("password", [None, SIGNING_PASSWORD], ids=["bare", "encrypted"])
def test_statements_that_a_trusted_key_signed_are_accepted(
    artifact: Path, tmp_path: Path, kind: str, password: str | None
) -> None:
    keys = make_keys(tmp_path, kind, kind=kind, password=password)
    attested = check(artifact, envelopes_for(artifact, keys), keys)
    assert attested.complete
    assert attested.signed_by == (keys.id,)


def test_warned_artifact_is_accepted(artifact: Path, keys: Keys) -> None:
    assert check(artifact, envelopes_for(artifact, keys, outcome="warn"), keys).result == "WARNED"


def test_two_steps_may_sign_with_two_keys(artifact: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    envelopes = [envelopes_for(artifact, keys)[0], envelopes_for(artifact, other)[1]]
    trusted = (*keys.trusted, *other.trusted)
    attested = verify_attestations(digest_of(artifact), envelopes, trusted_keys=trusted, require_signature=True)
    assert attested.signed_by == tuple(sorted((keys.id, other.id)))
    with pytest.raises(SignatureError, match="no trusted key signed the verdict"):
        check(artifact, envelopes, keys)


def test_envelope_with_two_signatures_needs_one_that_is_trusted(
    artifact: Path, keys: Keys, tmp_path: Path
) -> None:
    stranger = make_keys(tmp_path, "stranger")
    pairs = zip(envelopes_for(artifact, stranger), envelopes_for(artifact, keys), strict=True)
    envelopes = [signed_by_both(untrusted, [trusted]) for untrusted, trusted in pairs]
    assert [len(envelope["signatures"]) for envelope in envelopes] == [2, 2]
    assert check(artifact, envelopes, keys).signed_by == (keys.id,)
    assert check(artifact, envelopes, stranger).signed_by == (stranger.id,)
    with pytest.raises(SignatureError, match="no trusted key signed the provenance"):
        check(artifact, envelopes, make_keys(tmp_path, "third"))


def test_key_id_is_only_a_hint(artifact: Path, keys: Keys) -> None:
    envelopes = envelopes_for(artifact, keys)
    for envelope in envelopes:
        for signature in envelope["signatures"]:
            del signature["keyid"]
    assert check(artifact, envelopes, keys).signed_by == (keys.id,)


def test_envelopes_of_other_kinds_are_ignored(artifact: Path, keys: Keys) -> None:
    scan = statement_of(envelopes_for(artifact, None)[0]) | {"predicateType": "https://example.com/scan/v1"}
    other_envelopes = [
        dict(seal(scan, keys.signer)),
        {**envelopes_for(artifact, keys)[0], "payloadType": "text/plain"},
    ]
    assert check(artifact, [*other_envelopes, *envelopes_for(artifact, keys)], keys).complete
    with pytest.raises(SignatureError, match="has no provenance statement"):
        check(artifact, other_envelopes, keys)


def forged(name: str, change: Callable[[Envelope], Envelope]) -> Change:
    """Return a change of one of the two envelopes."""
    number = ("provenance", "verdict").index(name)
    return lambda envelopes: [
        change(envelope) if index == number else envelope for index, envelope in enumerate(envelopes)
    ]


# These are detected whether or not a signature is required.
FORGERIES: dict[str, tuple[Change, str]] = {
    "altered verdict": (
        forged("verdict", lambda envelope: altered(envelope, '"result":"PASSED"', '"result":"WARNED"')),
        "The verdict was altered: the signature of key",
    ),
    "altered provenance": (
        forged("provenance", lambda envelope: altered(envelope, '"threads":2', '"threads":4')),
        "The provenance was altered",
    ),
    "signature of the other payload": (
        lambda envelopes: [envelopes[0], {**envelopes[1], "signatures": envelopes[0]["signatures"]}],
        "The verdict was altered",
    ),
    "no signature at all under a trusted key's name": (
        forged(
            "verdict",
            lambda envelope: {
                **envelope,
                "signatures": [{"keyid": envelope["signatures"][0]["keyid"], "sig": "!"}],
            },
        ),
        "The verdict was altered",
    ),
    "two verdicts": (
        lambda envelopes: [*envelopes, envelopes[1]],
        "The artifact has two verdict statements, expected one",
    ),
    "not base64": (forged("verdict", lambda envelope: {**envelope, "payload": "?"}), "is not a DSSE envelope"),
    "no payload": (forged("verdict", lambda envelope: {"signatures": []}), "is not a DSSE envelope: KeyError"),
    "not JSON": (
        forged("verdict", lambda envelope: {**envelope, "payload": "ew=="}),
        "payload of an attestation is not JSON",
    ),
}


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_is_detected(artifact: Path, keys: Keys, name: str, required: bool) -> None:
    change, says = FORGERIES[name]
    with pytest.raises(SignatureError, match=says):
        check(artifact, change(envelopes_for(artifact, keys)), keys, required=required)


@pytest.mark.parametrize("required", [False, True])
def test_statements_on_another_artifact_are_detected(
    artifact: Path, keys: Keys, tmp_path: Path, required: bool
) -> None:
    other = small_artifact(tmp_path / "other", graph=b"another")
    says = f"expected {digest_of(artifact)[:12]}..., found {digest_of(other)[:12]}"
    with pytest.raises(SignatureError, match=says):
        check(artifact, envelopes_for(other, keys), keys, required=required)


def test_verdict_on_another_source_model_is_detected(artifact: Path, keys: Keys) -> None:
    with pytest.raises(
        SignatureError, match=r"name different source models: provenance 5{12}\.\.\., verdict 1{12}"
    ):
        check(artifact, envelopes_for(artifact, keys, source="1" * 64), keys)
    with pytest.raises(
        SignatureError, match=r"name different source models: manifest 2{12}\.\.\., provenance 5{12}"
    ):
        verify_attestations(
            digest_of(artifact),
            envelopes_for(artifact, keys),
            trusted_keys=keys.trusted,
            require_signature=True,
            manifest_source="2" * 64,
        )


def test_verdict_without_a_source_model_is_detected(artifact: Path, keys: Keys) -> None:
    statement = statement_of(envelopes_for(artifact, None)[1])
    statement["predicate"]["configuration"] = []
    envelopes = [envelopes_for(artifact, keys)[0], dict(seal(statement, keys.signer))]
    with pytest.raises(SignatureError, match=r"name different source models: .*verdict none"):
        check(artifact, envelopes, keys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda envelopes: [], "has no provenance statement"),
        (lambda envelopes: envelopes[:1], "has no verdict statement"),
        (lambda envelopes: envelopes[1:], "has no provenance statement"),
        (
            lambda envelopes: [{**envelope, "signatures": []} for envelope in envelopes],
            "no trusted key signed the provenance",
        ),
        (lambda envelopes: [envelopes[0], {**envelopes[1], "signatures": "none"}], "signed the verdict"),
    ],
)
def test_missing_statement_or_signature_is_refused_only_if_required(
    artifact: Path, keys: Keys, change: Change, says: str
) -> None:
    envelopes = change(envelopes_for(artifact, keys))
    check(artifact, envelopes, keys, required=False)
    with pytest.raises(SignatureError, match=says):
        check(artifact, envelopes, keys)


def test_untrusted_keys_signature_counts_for_nothing(artifact: Path, keys: Keys, tmp_path: Path) -> None:
    envelopes = envelopes_for(artifact, make_keys(tmp_path, "stranger"))
    assert check(artifact, envelopes, keys, required=False).signed_by == ()
    with pytest.raises(SignatureError, match=f"Trusted keys: {keys.id[:12]}"):
        check(artifact, envelopes, keys)


@pytest.mark.parametrize("outcome", ["fail", "error"])
def test_signed_verdict_that_does_not_pass_is_refused(artifact: Path, keys: Keys, outcome: Any) -> None:
    with pytest.raises(SignatureError, match="signed verdict PASSED or WARNED is required, found FAILED"):
        check(artifact, envelopes_for(artifact, keys, outcome=outcome), keys)


class TestKeys:
    @pytest.mark.parametrize("password", [None, "not-the-password"])
    def test_wrong_password_is_refused_and_not_shown(self, tmp_path: Path, password: str | None) -> None:
        path = make_keys(tmp_path, password=SIGNING_PASSWORD).private
        settings = Settings(signing_key=path, signing_key_password=SecretStr(password) if password else None)
        with pytest.raises(SpecError, match=r"cannot be used as a private key.*SIGNING_KEY_PASSWORD") as caught:
            load_signer(settings)
        assert SIGNING_PASSWORD not in str(caught.value)
        assert password is None or password not in f"{caught.value} {caught.value.__cause__}"

    def test_password_of_a_key_that_has_none_is_refused(self, keys: Keys) -> None:
        settings = Settings(signing_key=keys.private, signing_key_password=SecretStr(SIGNING_PASSWORD))
        with pytest.raises(SpecError, match=r"is not encrypted.*unset it if the key has none"):
            load_signer(settings)

    def test_file_that_is_not_a_key_is_refused(self, keys: Keys, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine", "utf-8")
        for path in (tmp_path / "notes.txt", keys.public):
            with pytest.raises(SpecError, match=r"as a private key: .*ed25519, ecdsa or rsa"):
                load_signer(Settings(signing_key=path))
        for path in (tmp_path / "notes.txt", keys.private):
            with pytest.raises(SpecError, match=r"as a public key: .*openssl pkey"):
                load_public_keys([path])

    def test_key_of_a_kind_that_cannot_sign_is_refused(self, tmp_path: Path) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import x25519

        pem = x25519.X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (tmp_path / "x25519.pem").write_bytes(pem)
        with pytest.raises(SpecError, match="unsupported key"):
            load_signer(Settings(signing_key=tmp_path / "x25519.pem"))

    def test_absent_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"private key .*absent\.pem cannot be read"):
            load_signer(Settings(signing_key=tmp_path / "absent.pem"))
        with pytest.raises(SpecError, match=r"public key .*absent\.pub cannot be read"):
            load_public_keys([tmp_path / "absent.pub"])

    def test_private_key_that_all_can_read_is_refused(self, keys: Keys) -> None:
        assert load_signer(keys.settings) is not None
        keys.private.chmod(0o644)
        with pytest.raises(SpecError, match=f"Every user .* can read .* Run: chmod 600 {keys.private}"):
            load_signer(keys.settings)


class TestWithoutTheLibrary:
    @pytest.fixture(autouse=True)
    def absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] == "securesystemslib":
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "securesystemslib", None)

    def test_unsigned_statements_are_written_and_checked(self, artifact: Path) -> None:
        attested = verify_attestations(
            digest_of(artifact), envelopes_for(artifact, None), trusted_keys=(), require_signature=False
        )
        assert attested.complete
        assert attested.signed_by == ()

    def test_configured_key_without_the_library_gives_the_install_command(self, tmp_path: Path) -> None:
        keys = make_keys(tmp_path)
        for use in (lambda: load_signer(keys.settings), lambda: load_public_keys([keys.public])):
            with pytest.raises(SignatureError, match=r"pip install 'compileflow\[signing\]'"):
                use()
