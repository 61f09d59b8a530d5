"""Statements beside an artifact's files and in the store, and `verify_artifact`, which verifies everything."""

from __future__ import annotations

import json
import logging
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from compileflow.artifact import verify
from compileflow.artifact.attestations.envelopes import (
    put_statement,
    read_bundle,
    seal,
    stored_envelopes,
    write_bundle,
)
from compileflow.artifact.manifest import ATTESTATIONS_NAME, artifact_files, verify_folder
from compileflow.artifact.open import open_artifact
from compileflow.artifact.verify import attestations_of, verify_artifact
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, ManifestError, StoreUnavailableError
from compileflow.settings import Settings
from compileflow.stores.local import LocalStore
from tests.unit.attested_artifacts import (
    RUN,
    Envelope,
    Keys,
    altered,
    attest,
    digest_of,
    envelopes_for,
    make_keys,
    statement_of,
)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.json").write_text('{"outcome": "pass"}', "utf-8")
    return folder


def redated(verdict: Envelope, keys: Keys, text: str) -> Envelope:
    """Sign a verdict again, with another time."""
    statement = statement_of(verdict)
    (request,) = (part for part in statement["predicate"]["configuration"] if part["name"] == "request")
    request["annotations"]["finishedOn"] = text
    return dict(seal(statement, keys.signer))


class TestBesideTheFiles:
    def test_digest_is_the_same_with_and_without_them(self, artifact: Path) -> None:
        digest = digest_of(artifact)
        assert digest == folder_digest(list_files(artifact))
        attest(artifact, None)
        _, files = verify_folder(artifact)
        assert folder_digest(files) == digest == open_artifact(artifact).digest
        assert folder_digest(list_files(artifact)) != digest

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"\xff{", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte."),
            (b"", "cannot be read: it is empty."),
            (b"[]\n", "has a line that is not a JSON object."),
            (b"{}\n", "An attestation is not a DSSE envelope: KeyError: 'payload'."),
            (b'{"payload": "!"}\n', "An attestation is not a DSSE envelope: "),
        ],
    )
    @pytest.mark.parametrize("place", ["folder", "trusted folder", "fetched folder"])
    def test_damaged_bundle_is_named_in_a_warning_unless_a_signature_is_required(
        self,
        artifact: Path,
        settings: Settings,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        body: bytes,
        reason: str,
        place: str,
    ) -> None:
        location, folder = str(artifact), artifact
        if place == "fetched folder":
            location = LocalStore((tmp_path / "store").as_uri(), settings).put_folder(artifact).uri
            folder = open_artifact(location, settings=settings).folder
        (folder / ATTESTATIONS_NAME).write_bytes(body)
        with caplog.at_level(logging.WARNING, "compileflow"):
            opened = open_artifact(location, settings=settings, trust=place == "trusted folder")
        assert opened.verified
        assert opened.attested is None
        (warning,) = caplog.messages
        assert warning.startswith(f"Loading {folder} although its attestations are damaged: ")
        assert reason in warning
        assert warning.endswith(" Fetch the artifact again.")
        problems = verify_artifact(folder, settings=settings).problems
        assert len(problems) == 1
        assert reason in problems[0]

    def test_bundle_of_20_gb_is_refused_before_it_is_read(
        self, artifact: Path, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        bundle = artifact / ATTESTATIONS_NAME
        # Other files of the test run are searched for secrets; this one is deleted again.
        with bundle.open("wb") as stream:
            stream.truncate(20 * 10**9)
        started = time.monotonic()
        opened = open_artifact(artifact, settings=settings)
        (problem,) = verify_artifact(artifact, settings=settings).problems
        took_s = time.monotonic() - started
        bundle.unlink()
        assert opened.digest == digest_of(artifact)
        assert "it is larger than 16 MiB" in problem
        assert "it is larger than 16 MiB" in caplog.messages[0]
        # Hashing it takes over 10 s.
        assert took_s < 5

    def test_statements_that_are_absent_or_sound_are_loaded_without_a_word(
        self, artifact: Path, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "compileflow"):
            open_artifact(artifact, settings=settings)
            attest(artifact, None)
            open_artifact(artifact, settings=settings)
        assert caplog.messages == []

    def test_manifest_that_lists_them_is_refused(self, artifact: Path) -> None:
        attest(artifact, None)
        manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
        manifest["files"] += [record.model_dump() for record in list_files(artifact, paths=[ATTESTATIONS_NAME])]
        (artifact / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(ManifestError, match=r"files: .*must not be listed as a file"):
            verify_folder(artifact)

    def test_link_out_under_their_name_is_refused(self, artifact: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret", "utf-8")
        (artifact / ATTESTATIONS_NAME).symlink_to(tmp_path / "secret")
        with pytest.raises(IntegrityError, match="link out of the folder"):
            verify_folder(artifact)

    def test_same_name_below_a_component_is_a_file_like_any_other(self, artifact: Path) -> None:
        (artifact / "default" / ATTESTATIONS_NAME).write_text("{}", "utf-8")
        with pytest.raises(IntegrityError, match="is not in the manifest"):
            verify_folder(artifact)

    def test_artifact_without_statements_is_fetched_without_a_bundle(
        self, artifact: Path, store: LocalStore, settings: Settings
    ) -> None:
        opened = open_artifact(store.put_folder(artifact).uri, settings=settings)
        assert artifact_files(opened.folder) == list_files(opened.folder)


class TestWhereTheyAre:
    def test_uri_gives_the_records_of_the_store_and_a_folder_its_bundle(
        self, artifact: Path, store: LocalStore, settings: Settings, tmp_path: Path
    ) -> None:
        stored = store.put_folder(artifact)
        assert attestations_of(stored.uri, settings=settings) == ()
        keys = make_keys(tmp_path)
        for statement in map(statement_of, envelopes_for(artifact, None)):
            put_statement(store, stored.digest, statement, keys.signer)
        attest(artifact, None)
        assert attestations_of(stored.uri, settings=settings) == stored_envelopes(store, stored.digest)
        assert [envelope["signatures"] for envelope in attestations_of(artifact)] == [[], []]

    def test_bundle_is_used_if_the_store_lost_its_records(
        self, artifact: Path, store: LocalStore, settings: Settings
    ) -> None:
        stored = store.put_folder(artifact)
        for statement in map(statement_of, envelopes_for(artifact, None)):
            put_statement(store, stored.digest, statement, None)
        envelopes = stored_envelopes(store, stored.digest)
        open_artifact(stored.uri, settings=settings)
        for kind in ("provenance", "verdict"):
            (store.root / "records" / kind / f"{stored.digest}.json").unlink()
        assert attestations_of(stored.uri, settings=settings) == envelopes


class TestVerifyArtifact:
    @pytest.fixture
    def stored(self, artifact: Path, store: LocalStore, keys: Keys, report: Path) -> str:
        """A signed artifact in the store, with its report."""
        uri = store.put_folder(artifact).uri
        stored_report = store.put_folder(report)
        for statement in map(statement_of, envelopes_for(artifact, None, report=stored_report.digest)):
            put_statement(store, digest_of(artifact), statement, keys.signer)
        return uri

    def verify(self, location: str | Path, settings: Settings, keys: Keys, **arguments: Any) -> Any:
        return verify_artifact(location, settings=settings, keys=[keys.public], **arguments)

    def test_signed_artifact_of_a_store_is_sound(
        self, stored: str, artifact: Path, settings: Settings, keys: Keys
    ) -> None:
        verification = self.verify(stored, settings, keys, require_signature=True)
        assert (verification.digest, verification.files) == (digest_of(artifact), 2)
        assert verification.intact
        assert verification.attested
        assert verification.report_intact
        assert (verification.signed_by, verification.verdict, verification.problems) == ((keys.id,), "PASSED", ())

    def test_old_verdict_is_a_problem_where_its_age_counts(
        self, stored: str, settings: Settings, keys: Keys
    ) -> None:
        age = datetime.now(UTC) - RUN.finished
        assert self.verify(stored, settings, keys, max_age=age + timedelta(hours=1)).problems == ()
        [problem] = self.verify(stored, settings, keys, max_age=age - timedelta(hours=1)).problems
        assert "was validated on 2026-03-05 12:01 UTC" in problem
        assert self.verify(stored, settings, keys).validated_on == "2026-03-05T12:01:30+00:00"

    @pytest.mark.parametrize("text", ["2026-03-05T12:01:30", "9999-12-31T23:59:59-23:59", "soon", ""])
    def test_verdict_without_a_time_of_a_zone_is_not_dated(
        self, artifact: Path, settings: Settings, keys: Keys, text: str
    ) -> None:
        provenance, verdict = envelopes_for(artifact, keys)
        write_bundle(artifact, [provenance, redated(verdict, keys, text)])
        verification = self.verify(artifact, settings, keys, max_age=timedelta(days=36500))
        assert (verification.validated_on, verification.signed_by) == (None, (keys.id,))
        assert "has no dated verdict" in verification.problems[0]

    def test_verdict_of_the_future_is_a_problem(self, artifact: Path, settings: Settings, keys: Keys) -> None:
        provenance, verdict = envelopes_for(artifact, keys)
        now = datetime.now(UTC)
        for hours, count in ((23, 0), (25, 1)):
            text = (now + timedelta(hours=hours)).isoformat()
            write_bundle(artifact, [provenance, redated(verdict, keys, text)])
            problems = self.verify(artifact, settings, keys).problems
            assert len(problems) == count
            assert all("is in the future" in problem for problem in problems)

    def test_result_that_no_validation_gives_is_a_problem(
        self, artifact: Path, settings: Settings, keys: Keys
    ) -> None:
        attest(artifact, None)
        provenance, verdict = read_bundle(artifact)
        write_bundle(artifact, [provenance, altered(verdict, '"PASSED"', '"BOGUS"')])
        (problem,) = self.verify(artifact, settings, keys).problems
        assert "unknown result 'BOGUS'" in problem

    def test_report_of_a_folder_is_not_looked_at(
        self, artifact: Path, settings: Settings, keys: Keys, report: Path
    ) -> None:
        attest(artifact, keys, report=digest_of(report))
        verification = self.verify(artifact, settings, keys)
        assert verification.report_intact is None
        assert verification.problems == ()

    def test_altered_file_is_found_in_store_and_folder(
        self, stored: str, artifact: Path, store: LocalStore, settings: Settings, keys: Keys
    ) -> None:
        for blob in (store.root / "blobs").rglob("*"):
            if blob.is_file() and blob.read_bytes() == b"graph":
                blob.chmod(0o644)
                blob.write_bytes(b"grapH")
        in_store = self.verify(stored, settings, keys)
        assert not in_store.intact
        assert in_store.signed_by == (keys.id,)
        assert "model.onnx is missing or altered" in in_store.problems[0]
        attest(artifact, keys)
        (artifact / "default" / "model.onnx").write_bytes(b"grapH")
        in_folder = self.verify(artifact, settings, keys)
        assert not in_folder.intact
        file, statements = in_folder.problems
        assert "model.onnx was altered" in file
        assert "is about another artifact" in statements

    def test_altered_manifest_is_another_artifact(self, artifact: Path, settings: Settings, keys: Keys) -> None:
        attest(artifact, keys)
        manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
        manifest["source"]["revision"] = "main"
        (artifact / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        verification = self.verify(artifact, settings, keys)
        assert verification.intact
        assert not verification.attested
        assert "is about another artifact" in verification.problems[0]

    def test_altered_report_is_found(
        self, stored: str, store: LocalStore, settings: Settings, keys: Keys, report: Path
    ) -> None:
        for blob in (store.root / "blobs").rglob("*"):
            if blob.is_file() and blob.read_bytes() == (report / "report.json").read_bytes():
                blob.chmod(0o644)
                blob.write_bytes(b'{"outcome": "PASS"}')
        verification = self.verify(stored, settings, keys)
        assert verification.report_intact is False
        assert verification.intact
        assert "report.json is missing or altered" in verification.problems[0]

    def test_altered_verdict_is_found(
        self, stored: str, artifact: Path, store: LocalStore, settings: Settings, keys: Keys
    ) -> None:
        record = dict(store.get_record("verdict", digest_of(artifact)) or {})
        changed = altered(record, '"failedTests":[]', '"failedTests":["x"]')
        store.put_record("verdict", digest_of(artifact), changed)
        verification = self.verify(stored, settings, keys)
        assert not verification.attested
        assert "The verdict was altered" in verification.problems[0]

    def test_missing_signature_is_a_problem_only_if_required(
        self, artifact: Path, settings: Settings, keys: Keys
    ) -> None:
        attest(artifact, None)
        verification = self.verify(artifact, settings, keys)
        assert verification.attested
        assert (verification.signed_by, verification.verdict, verification.problems) == ((), "PASSED", ())
        enforced = settings.model_copy(update={"require_signature": True})
        required = self.verify(artifact, enforced, keys)
        assert required.attested
        assert "no trusted key signed the provenance" in required.problems[0]

    def test_folder_without_an_artifact_is_an_error(self, tmp_path: Path, settings: Settings, keys: Keys) -> None:
        with pytest.raises(ManifestError, match="has no manifest"):
            self.verify(tmp_path, settings, keys)

    def test_bundle_is_used_if_the_store_does_not_answer(
        self, stored: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetched = read_bundle(open_artifact(stored, settings=settings).folder)

        def unavailable(*_: Any) -> Any:
            raise StoreUnavailableError("The store did not answer.")

        monkeypatch.setattr(verify, "open_store", unavailable)
        assert attestations_of(stored, settings=settings) == fetched
        shutil.rmtree(settings.home_dir / "artifacts")
        with pytest.raises(StoreUnavailableError):
            attestations_of(stored, settings=settings)
