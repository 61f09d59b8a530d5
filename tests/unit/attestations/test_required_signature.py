"""`require_signature=` of every load: set in code or in the environment, by folder and by URI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow.artifact.attestations.envelopes import put_statement, read_bundle, stored_envelopes, write_bundle
from compileflow.artifact.manifest import ATTESTATIONS_NAME, MANIFEST_NAME
from compileflow.artifact.open import open_artifact
from compileflow.errors import ManifestError, SignatureError, SpecError
from compileflow.settings import Settings, get_settings
from compileflow.stores.local import LocalStore
from tests.unit.attested_artifacts import (
    Keys,
    attest,
    envelopes_for,
    make_keys,
    statement_of,
)


@pytest.fixture
def enforced(settings: Settings, monkeypatch: pytest.MonkeyPatch, keys: Keys) -> Iterator[None]:
    """Settings of a machine that loads only signed artifacts."""
    monkeypatch.setenv("COMPILEFLOW_REQUIRE_SIGNATURE", "true")
    monkeypatch.setenv("COMPILEFLOW_TRUSTED_KEYS", f" {keys.public} ,")
    get_settings.cache_clear()
    yield
    # The next test reads the settings again.
    get_settings.cache_clear()


@pytest.mark.usefixtures("enforced")
def test_environment_enforces_it_on_every_load(artifact: Path, keys: Keys) -> None:
    for kind in (CompiledTokenizer, CompiledModel, CompiledPipeline):
        with pytest.raises(SignatureError, match="has no provenance statement"):
            kind.from_pretrained(artifact)  # type: ignore[attr-defined]
    attest(artifact, keys)
    opened = open_artifact(artifact)
    assert opened.attested is not None
    assert opened.attested.signed_by == (keys.id,)


@pytest.mark.usefixtures("enforced")
def test_saved_tokenizer_is_refused_because_it_is_never_signed(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "tokenizer_config.json").write_text("{}", "utf-8")
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        CompiledTokenizer.from_pretrained(tmp_path / "saved")


def test_given_keys_are_trusted_instead_of_the_configured_ones(
    artifact: Path, keys: Keys, settings: Settings, tmp_path: Path
) -> None:
    configured = settings.model_copy(update={"trusted_keys": str(make_keys(tmp_path, "other").public)})
    attest(artifact, keys)
    for required in (keys.public, str(keys.public), [keys.public]):
        assert open_artifact(artifact, require_signature=required, settings=configured).attested is not None
    with pytest.raises(SignatureError, match="no trusted key signed"):
        open_artifact(artifact, require_signature=True, settings=configured)


def test_no_key_to_trust_is_an_error_before_anything_else(settings: Settings, tmp_path: Path) -> None:
    for required in (True, []):
        with pytest.raises(SpecError, match=r"no key is trusted.*COMPILEFLOW_TRUSTED_KEYS"):
            open_artifact(tmp_path / "nothing", require_signature=required, settings=settings)


def test_verdict_that_came_after_the_fetch_is_asked_of_the_store(
    artifact: Path, store: LocalStore, settings: Settings, keys: Keys, tmp_path: Path
) -> None:
    stored = store.put_folder(artifact)
    provenance, verdict = map(statement_of, envelopes_for(artifact, None))
    put_statement(store, stored.digest, provenance, keys.signer)
    cached = open_artifact(stored.uri, settings=settings).folder
    with pytest.raises(SignatureError, match="has no verdict statement"):
        open_artifact(stored.uri, require_signature=keys.public, settings=settings)
    put_statement(store, stored.digest, verdict, keys.signer)
    assert len(read_bundle(cached)) == 1
    # A verified artifact also loads if the envelopes cannot be written to the cache.
    unwritable = settings.model_copy(update={"home": tmp_path / "read-only"})
    (unwritable.home / "artifacts").mkdir(parents=True)
    shutil.copytree(cached, unwritable.home / "artifacts" / stored.digest)
    unwritable.work_dir.write_text("no folder")
    assert open_artifact(stored.uri, require_signature=keys.public, settings=unwritable).attested is not None
    assert open_artifact(stored.uri, require_signature=keys.public, settings=settings).attested is not None
    assert read_bundle(cached) == stored_envelopes(store, stored.digest)
    # Now the artifact loads without the store.
    shutil.rmtree(store.root)
    assert open_artifact(stored.uri, require_signature=keys.public, settings=settings).attested is not None


@pytest.mark.parametrize("body", [b"{", b"[]\n", b"\xff\xfe", b"[" * 100_000])
def test_file_without_valid_envelopes_is_refused(
    artifact: Path, keys: Keys, settings: Settings, body: bytes
) -> None:
    (artifact / ATTESTATIONS_NAME).write_bytes(body)
    with pytest.raises(SignatureError, match=ATTESTATIONS_NAME):
        open_artifact(artifact, require_signature=keys.public, settings=settings)


def test_manifest_edited_after_the_verdict_is_refused_without_any_key(
    artifact: Path, keys: Keys, settings: Settings
) -> None:
    attest(artifact, keys)
    assert open_artifact(artifact, settings=settings).attested is None
    manifest = json.loads((artifact / MANIFEST_NAME).read_text())
    manifest["source"]["architecture"] += "Other"
    (artifact / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(SignatureError, match="is about another artifact"):
        open_artifact(artifact, settings=settings)
    assert open_artifact(artifact, settings=settings, trust=True).digest


def test_bundle_without_envelopes_is_not_written(artifact: Path) -> None:
    write_bundle(artifact, ())
    assert not (artifact / ATTESTATIONS_NAME).exists()
    assert read_bundle(artifact) == ()
