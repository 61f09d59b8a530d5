"""What a run says of what it makes, and which answers of earlier runs it takes for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from compileflow import CompiledTokenizer
from compileflow.artifact.attestations.envelopes import put_statement, read_bundle, stored_envelopes
from compileflow.artifact.attestations.statements import verdict_statement
from compileflow.artifact.attestations.verify import verify_attestations
from compileflow.artifact.manifest import ATTESTATIONS_NAME, read_manifest
from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find_or_make
from compileflow.steps.report_file import read_report
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.stores.local import LocalStore
from tests.conftest import ModelFactory
from tests.services.secrets import SIGNING_PASSWORD
from tests.steps import Pipeline, in_process
from tests.unit.attested_artifacts import (
    REPORT,
    RUN,
    Keys,
    digest_of,
    envelopes_for,
    judged,
    make_keys,
    small_artifact,
    statement_of,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return small_artifact(tmp_path / "artifact")


@pytest.fixture
def store(tmp_path: Path, settings: Settings) -> LocalStore:
    return LocalStore((tmp_path / "store").as_uri(), settings)


@dataclass(frozen=True)
class Ran:
    """A signed run of compile and validate; to read only."""

    pipeline: Pipeline
    request: CompileRequest
    keys: Keys
    source: FetchedSource
    artifact: CompiledArtifact
    validated: ValidatedArtifact

    @property
    def store(self) -> ArtifactStore:
        return open_store(self.pipeline.store_uri, self.pipeline.settings)


@pytest.fixture(scope="module")
def ran(tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    root = tmp_path_factory.mktemp("signed")
    keys = make_keys(root, password=SIGNING_PASSWORD)
    settings = keys.settings.model_copy(update={"home": root / "home", "threads": 1})
    with pytest.MonkeyPatch.context() as patch, in_process(settings, patch) as pipeline:
        request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION))
        with pytest.MonkeyPatch.context() as enforced:
            # What is being proven cannot be signed yet, wherever nothing else loads unsigned.
            enforced.setenv("COMPILEFLOW_REQUIRE_SIGNATURE", "true")
            get_settings.cache_clear()
            compiled = pipeline.compile(request)
            validated = pipeline.validate(request, compiled)
        get_settings.cache_clear()
        yield Ran(pipeline, request, keys, pipeline.fetch(request), compiled, validated)


class TestRun:
    def test_both_statements_are_signed_and_on_the_artifact(self, ran: Ran) -> None:
        attested = verify_attestations(
            ran.artifact.digest,
            stored_envelopes(ran.store, ran.artifact.digest),
            trusted_keys=ran.keys.trusted,
            require_signature=True,
            manifest_source=ran.source.digest,
        )
        assert attested.signed_by == (ran.keys.id,)
        assert attested.result == "PASSED"

    def test_the_subject_is_a_file_of_the_store_that_any_tool_can_hash(self, ran: Ran) -> None:
        for envelope in stored_envelopes(ran.store, ran.artifact.digest):
            (subject,) = statement_of(envelope)["subject"]
            body = (ran.pipeline.settings.home_dir / "store" / subject["name"]).read_bytes()
            assert hashlib.sha256(body).hexdigest() == subject["digest"]["sha256"] == ran.artifact.digest

    def test_provenance_says_what_the_manifest_says(self, ran: Ran) -> None:
        said = statement_of(stored_envelopes(ran.store, ran.artifact.digest)[0])["predicate"]
        definition, run = said["buildDefinition"], said["runDetails"]
        with ran.store.open_folder(ran.artifact.digest) as folder:
            manifest = read_manifest(folder)
        assert definition["externalParameters"]["spec"] == manifest.spec.model_dump(mode="json")
        assert definition["internalParameters"]["threads"] == 1
        named = {each["name"]: each for each in definition["resolvedDependencies"]}
        assert named.pop("source-model")["digest"] == {"sha256": ran.source.digest}
        assert {name: each["annotations"]["version"] for name, each in named.items()} == manifest.target.toolchain
        assert run["metadata"]["startedOn"] <= run["metadata"]["finishedOn"]
        assert run["metadata"]["invocationId"]

    def test_verdict_says_what_the_report_says(self, ran: Ran) -> None:
        said = statement_of(stored_envelopes(ran.store, ran.artifact.digest)[1])["predicate"]
        gates = read_report(ran.validated.report_uri).verdict.gates
        assert said["url"] == ran.validated.report_uri
        assert said["passedTests"] == [gate.gate for gate in gates if gate.outcome == "pass"]
        digests = {each["name"]: each["digest"]["sha256"] for each in said["configuration"]}
        assert (digests["source-model"], digests["report"]) == (ran.source.digest, ran.validated.report_digest)

    def test_same_run_again_is_cached_and_says_nothing_new(self, ran: Ran) -> None:
        before = stored_envelopes(ran.store, ran.artifact.digest)
        counted = dict(ran.pipeline.counts)
        assert ran.pipeline.validate(ran.request, ran.pipeline.compile(ran.request)).cached
        assert ran.pipeline.counts == counted
        assert stored_envelopes(ran.store, ran.artifact.digest) == before

    def test_run_without_a_key_takes_what_a_key_signed(self, ran: Ran) -> None:
        keyless = Pipeline(ran.pipeline.settings.model_copy(update={"signing_key": None}), ran.pipeline.counts)
        counted = dict(ran.pipeline.counts)
        assert keyless.validate(ran.request, keyless.compile(ran.request)).cached
        assert ran.pipeline.counts == counted

    def test_password_is_in_nothing_that_was_written(self, ran: Ran) -> None:
        written = [path for path in ran.pipeline.settings.home_dir.rglob("*") if path.is_file()]
        assert len(written) > 10
        assert [path for path in written if SIGNING_PASSWORD.encode() in path.read_bytes()] == []
        assert SIGNING_PASSWORD not in "\n".join(ran.pipeline.lines)

    def test_fetched_artifact_brings_them_along_and_so_does_every_copy(
        self, ran: Ran, settings: Settings, tmp_path: Path
    ) -> None:
        said = stored_envelopes(ran.store, ran.artifact.digest)
        opened = open_artifact(ran.artifact.uri, settings=settings)
        copied = copy_artifact(opened, tmp_path / "copied")
        saved = CompiledTokenizer.from_pretrained(copied).save_pretrained(tmp_path / "saved")
        for folder in (opened.folder, copied, saved):
            assert read_bundle(folder) == said
            assert open_artifact(folder, require_signature=ran.keys.public).digest == ran.artifact.digest

    def test_every_line_of_the_file_is_an_envelope(self, ran: Ran, settings: Settings) -> None:
        folder = open_artifact(ran.artifact.uri, settings=settings).folder
        lines = (folder / ATTESTATIONS_NAME).read_text("utf-8").splitlines()
        assert [sorted(json.loads(line)) for line in lines] == [["payload", "payloadType", "signatures"]] * 2


class Answer(BaseModel):
    """What a step might keep."""

    digest: str
    why: str


class TestCached:
    """Which answers of earlier runs a run with a key takes for its own."""

    def attester(self, store: ArtifactStore, keys: Keys | None, *trusted: Keys) -> Attester:
        others = tuple(key for each in trusted for key in each.trusted)
        return Attester(store, keys.signer if keys else None, others, threads=1)

    def test_answer_of_an_older_key_stands_while_that_is_trusted(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        old, new = make_keys(tmp_path, "old"), make_keys(tmp_path, "new")
        digest = digest_of(artifact)
        self.attester(store, old).compiled(artifact, digest, started=RUN.started)
        assert self.attester(store, old).lacks_provenance(digest) == ""
        assert self.attester(store, new, old).lacks_provenance(digest) == ""
        assert "neither this run's key nor a trusted key signed" in self.attester(store, new).lacks_provenance(digest)

    def test_answer_that_nobody_signed_is_made_again_by_who_has_a_key(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        digest = digest_of(artifact)
        self.attester(store, None).compiled(artifact, digest, started=RUN.started)
        assert self.attester(store, None).lacks_provenance(digest) == ""
        assert "neither this run's key nor a trusted key signed" in self.attester(store, make_keys(tmp_path)).lacks_provenance(digest)

    def test_answer_of_which_nothing_is_said_is_made_again(self, store: LocalStore, artifact: Path) -> None:
        attester, digest = self.attester(store, None), digest_of(artifact)
        assert "no provenance statement" in attester.lacks_provenance(digest)
        assert "no verdict statement" in attester.lacks_verdict(digest, REPORT)

    def test_statement_that_somebody_put_in_its_place_is_made_again(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        other = small_artifact(tmp_path / "other", graph=b"another")
        digest = digest_of(artifact)
        store.put_record("provenance", digest, envelopes_for(other, None)[0])
        assert "is about another artifact" in self.attester(store, None).lacks_provenance(digest)

    def test_verdict_of_another_report_is_given_again(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        put_statement(store, digest, verdict_statement(digest, judged("fail", report="8" * 64)), None)
        assert "a later validation replaced the verdict" in self.attester(store, None).lacks_verdict(digest, REPORT)
        put_statement(store, digest, verdict_statement(digest, judged()), keys.signer)
        assert self.attester(store, keys).lacks_verdict(digest, REPORT) == ""
        # Whoever has no key could not put another one in its place.
        assert self.attester(store, None).lacks_verdict(digest, "8" * 64) == ""

    def test_answer_that_was_there_and_lacks_something_is_made_again_and_says_why(
        self, store: LocalStore, artifact: Path
    ) -> None:
        attester, stored = self.attester(store, None), store.put_folder(artifact)
        key = CacheKey("compile", "hf://a/b for onnx-runtime", {"part": "1"})
        said: list[str] = []

        def make(reason: str) -> Answer:
            return Answer(digest=stored.digest, why=reason)

        def ask() -> tuple[Answer, bool]:
            return find_or_make(
                store,
                key,
                Answer,
                digest_fields=("digest",),
                make=make,
                say=said.append,
                lacks=lambda found: attester.lacks_provenance(found.digest),
            )

        assert not ask()[1]
        assert ask() == (Answer(digest=stored.digest, why="the store has no provenance statement on it"), False)
        assert "no provenance statement" in said[-1]
        attester.compiled(artifact, stored.digest, started=RUN.started)
        assert ask()[1]

    def test_unsigned_statement_never_takes_the_place_of_a_signed_one(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        self.attester(store, keys).compiled(artifact, digest, started=RUN.started)
        signed = store.get_record("provenance", digest)
        self.attester(store, None).compiled(artifact, digest, started=RUN.started)
        assert store.get_record("provenance", digest) == signed
        self.attester(store, keys).compiled(artifact, digest, started=RUN.finished)
        assert store.get_record("provenance", digest) != signed
