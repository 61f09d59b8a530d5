"""A mirror holds the folders and the records about them, verified on the way; a second run sends nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from compileflow.admin.mirror import mirror_store
from compileflow.artifact.attestations.envelopes import put_statement, seal
from compileflow.artifact.attestations.statements import provenance_statement, verdict_statement
from compileflow.artifact.manifest import read_manifest
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore, Outcome
from compileflow.contracts.digests import list_files
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings, get_settings
from tests.services.fault_proxy import FaultProxy
from tests.services.moto_server import Moto
from tests.unit.attested_artifacts import REPORT, RUN, Envelope, Keys, judged, make_keys, small_artifact


@pytest.fixture
def source(settings: Settings, tmp_path: Path) -> ArtifactStore:
    return open_store((tmp_path / "from").as_uri(), settings)


@pytest.fixture
def to_uri(tmp_path: Path) -> str:
    return (tmp_path / "to").as_uri()


def stored(store: ArtifactStore, tmp_path: Path, text: str) -> str:
    folder = tmp_path / f"folder-{text}"
    folder.mkdir()
    (folder / "file").write_text(text)
    return store.put_folder(folder).digest


def report_on(store: ArtifactStore, artifact: str, report: str) -> None:
    value = {"artifact_digest": artifact, "report_digest": report, "report_uri": store.folder_uri(report)}
    store.put_record("report-of", artifact, value)


def test_second_run_to_s3_sends_nothing(
    source: ArtifactStore, tmp_path: Path, moto: Moto, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, report = stored(source, tmp_path, "artifact"), stored(source, tmp_path, "report")
    report_on(source, artifact, report)
    to_uri = f"s3://{bucket}/mirror"
    with FaultProxy(moto.url) as proxy:
        monkeypatch.setenv("COMPILEFLOW_S3_ENDPOINT_URL", proxy.url)
        get_settings.cache_clear()
        assert mirror_store(source.uri, to_uri, settings=get_settings()) == 2
        sent = [request for request in proxy.seen if request.method == "PUT"]
        # Two blobs, two listings, one record.
        assert len(sent) == 5
        assert mirror_store(source.uri, to_uri, settings=get_settings()) == 2
        assert [request for request in proxy.seen if request.method == "PUT"] == sent
        mirror = open_store(to_uri, get_settings())
        assert sorted(mirror.list()) == sorted([artifact, report])
        record = mirror.get_record("report-of", artifact)
        assert record is not None
        assert record["report_uri"] == mirror.folder_uri(report)
        mirror.get_folder(artifact, tmp_path / "out")
    assert list_files(tmp_path / "out") == list_files(tmp_path / "folder-artifact")


def test_one_folder_brings_the_report_on_it_and_nothing_else(
    source: ArtifactStore, tmp_path: Path, to_uri: str, settings: Settings
) -> None:
    artifact, report = stored(source, tmp_path, "artifact"), stored(source, tmp_path, "report")
    other = stored(source, tmp_path, "other")
    report_on(source, artifact, report)
    report_on(source, other, report)
    lines: list[str] = []
    assert mirror_store(source.uri, to_uri, settings=settings, digests=[artifact], on_progress=lines.append) == 2
    mirror = open_store(to_uri, settings)
    assert sorted(mirror.list()) == sorted([artifact, report])
    assert list(mirror.list_records("report-of")) == [artifact]
    assert lines == [f"folder 1 of 2: {artifact[:12]}", f"folder 2 of 2: {report[:12]}"]


def test_cache_records_stay_where_they_were_made(
    source: ArtifactStore, tmp_path: Path, to_uri: str, settings: Settings
) -> None:
    artifact = stored(source, tmp_path, "artifact")
    for kind in ("compile", "compile-latest", "provenance", "verdict"):
        source.put_record(kind, artifact, {"kind": kind})
    mirror_store(source.uri, to_uri, settings=settings)
    mirror = open_store(to_uri, settings)
    assert mirror.get_record("provenance", artifact) == {"kind": "provenance"}
    assert mirror.get_record("verdict", artifact) == {"kind": "verdict"}
    assert mirror.get_record("compile", artifact) is None


def verdict(artifact: str, keys: Keys | None, outcome: Outcome = "pass", **changes: Any) -> Envelope:
    run = replace(judged(outcome), **changes)
    return dict(seal(verdict_statement(artifact, run), keys.signer if keys else None))


def junk_signed(envelope: Envelope) -> Envelope:
    return envelope | {
        "signatures": [{"keyid": entry["keyid"], "sig": "AAAA"} for entry in envelope["signatures"]]
    }


@pytest.mark.parametrize("makes", ["unsigned", "junk", "signed by another"])
@pytest.mark.parametrize("has_keys", [True, False])
def test_signed_statement_stays_unless_a_trusted_key_signed_the_other_one(
    source: ArtifactStore,
    tmp_path: Path,
    to_uri: str,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    makes: str,
    has_keys: bool,
) -> None:
    artifact, keys, other = stored(source, tmp_path, "artifact"), make_keys(tmp_path), make_keys(tmp_path, "other")
    if has_keys:
        settings = settings.model_copy(update={"trusted_keys": str(keys.public)})
    mirror = open_store(to_uri, settings)
    failed = verdict(artifact, keys, "fail")
    mirror.put_record("verdict", artifact, failed)
    mirror.put_record("report-of", artifact, {"outcome": "fail"})
    forged = {
        "unsigned": verdict(artifact, None),
        "junk": junk_signed(verdict(artifact, keys)),
        "signed by another": verdict(artifact, other),
    }[makes]
    source.put_record("verdict", artifact, forged)
    source.put_record("report-of", artifact, {"outcome": "pass"})
    mirror_store(source.uri, to_uri, settings=settings)
    assert mirror.get_record("verdict", artifact) == failed
    assert mirror.get_record("report-of", artifact) == {"outcome": "fail"}
    assert ["keeps its verdict of" in warning for warning in caplog.messages] == [True, False]
    assert "keeps its report-of of" in caplog.messages[1]


@pytest.mark.parametrize("change", [{"report_digest": "8" * 64}, {"outcome": "pass"}, {"outcome": ["pass"]}])
def test_record_of_a_verdict_is_copied_only_if_it_says_what_the_statement_says(
    source: ArtifactStore, tmp_path: Path, to_uri: str, settings: Settings, change: dict[str, Any]
) -> None:
    artifact, keys = stored(source, tmp_path, "artifact"), make_keys(tmp_path)
    settings = settings.model_copy(update={"trusted_keys": str(keys.public)})
    mirror = open_store(to_uri, settings)
    mirror.put_record("verdict", artifact, verdict(artifact, keys, "fail"))
    record = {"outcome": "fail", "report_digest": REPORT}
    source.put_record("report-of", artifact, record | change)
    mirror_store(source.uri, to_uri, settings=settings)
    assert mirror.get_record("report-of", artifact) is None
    source.put_record("report-of", artifact, record)
    mirror_store(source.uri, to_uri, settings=settings)
    assert mirror.get_record("report-of", artifact) == record


def test_newer_statement_of_a_trusted_key_replaces_any_other_one(
    source: ArtifactStore, tmp_path: Path, to_uri: str, settings: Settings
) -> None:
    artifact, keys = stored(source, tmp_path, "artifact"), make_keys(tmp_path)
    settings = settings.model_copy(update={"trusted_keys": str(keys.public)})
    mirror = open_store(to_uri, settings)
    new = verdict(artifact, keys, finished=RUN.finished + timedelta(days=1))
    source.put_record("verdict", artifact, new)
    olds = verdict(artifact, keys, "fail"), junk_signed(verdict(artifact, keys)), verdict(artifact, None)
    for old in (*olds, {"signatures": "yes"}):
        mirror.put_record("verdict", artifact, old)
        mirror_store(source.uri, to_uri, settings=settings)
        assert mirror.get_record("verdict", artifact) == new
    # The older one does not come back, nor one without a date, and another statement does not take its place.
    manifest = read_manifest(small_artifact(tmp_path / "small"))
    provenance = dict(seal(provenance_statement(manifest, artifact, RUN), keys.signer))
    undated = json.loads(json.dumps(verdict_statement(artifact, judged())).replace("finishedOn", "ended"))
    for old in (*olds, provenance, dict(seal(undated, keys.signer))):
        source.put_record("verdict", artifact, old)
        mirror_store(source.uri, to_uri, settings=settings)
        assert mirror.get_record("verdict", artifact) == new


def test_altered_folder_is_not_copied(
    source: ArtifactStore, tmp_path: Path, to_uri: str, settings: Settings
) -> None:
    digest = stored(source, tmp_path, "artifact")
    blob = next(path for path in (tmp_path / "from" / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_text("ARTIFACT")
    with pytest.raises(IntegrityError, match="altered"):
        mirror_store(source.uri, to_uri, settings=settings)
    assert not open_store(to_uri, settings).exists(digest)


def test_checked_mirror_replaces_an_altered_blob(
    source: ArtifactStore, to_uri: str, settings: Settings, tmp_path: Path
) -> None:
    digest = stored(source, tmp_path, "artifact")
    mirror_store(source.uri, to_uri, settings=settings)
    blob = next(path for path in (tmp_path / "to" / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"ARTIFACT")
    assert mirror_store(source.uri, to_uri, settings=settings, check=True) == 1
    open_store(to_uri).get_folder(digest, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_bytes() == b"artifact"


def test_report_that_a_verdict_stands_on_comes_with_its_artifact(
    source: ArtifactStore, to_uri: str, settings: Settings, tmp_path: Path
) -> None:
    """After another validation without the key, the signed verdict and the last record name two reports."""
    artifact, attested, latest = (stored(source, tmp_path, text) for text in ("artifact", "attested", "latest"))
    put_statement(source, artifact, verdict_statement(artifact, judged(report=attested)), None)
    report_on(source, artifact, latest)
    assert mirror_store(source.uri, to_uri, settings=settings, digests=[artifact]) == 3
    assert sorted(open_store(to_uri, settings).list()) == sorted([artifact, attested, latest])


def test_store_without_a_folder_is_not_taken_for_one_that_was_copied(
    source: ArtifactStore, to_uri: str, settings: Settings
) -> None:
    """With a mistyped prefix, the command must not look like a successful backup."""
    with pytest.raises(SpecError, match="does not hold any folder") as caught:
        mirror_store(source.uri, to_uri, settings=settings)
    assert "URI" in caught.value.hint


def test_store_cannot_be_mirrored_into_itself(source: ArtifactStore, settings: Settings) -> None:
    with pytest.raises(SpecError, match="into itself"):
        mirror_store(source.uri, f"{source.uri}/", settings=settings)
