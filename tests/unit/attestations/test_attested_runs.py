"""The statements that a run writes, and which cached answers of earlier runs it accepts."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from compileflow import CompiledTokenizer
from compileflow.artifact.attestations.envelopes import put_statement, read_bundle, stored_envelopes
from compileflow.artifact.attestations.statements import verdict_statement
from compileflow.artifact.attestations.verify import verify_attestations
from compileflow.artifact.manifest import ATTESTATIONS_NAME, read_manifest
from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore, Outcome
from compileflow.contracts.digests import json_digest
from compileflow.errors import SourceError, StepOffError, VerdictError
from compileflow.local.api import prove
from compileflow.settings import Settings, get_settings
from compileflow.sources.folder import FolderSource
from compileflow.spec import HfTask
from compileflow.steps import fetch
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find_or_make, latest, record_of
from compileflow.steps.report_file import read_report
from compileflow.steps.request import CompileRequest, StepSwitches
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.stores.local import LocalStore
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.services.secrets import SIGNING_PASSWORD
from tests.steps import Pipeline
from tests.unit.attested_artifacts import (
    REPORT,
    REQUEST,
    RUN,
    Keys,
    digest_of,
    envelopes_for,
    judged,
    make_keys,
    small_artifact,
    statement_of,
)


@dataclass(frozen=True)
class SignedRun:
    """A signed run of compile and validate. Tests only read it."""

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
def signed_run(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SignedRun]:
    root = tmp_path_factory.mktemp("signed")
    keys = make_keys(root, password=SIGNING_PASSWORD)
    settings = keys.settings.model_copy(update={"home": root / "home", "threads": 1})
    with in_process.pipeline(settings) as pipeline:
        request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION))
        with pytest.MonkeyPatch.context() as enforced:
            # The run must load its own artifact unsigned, even on a machine that requires signatures.
            enforced.setenv("COMPILEFLOW_REQUIRE_SIGNATURE", "true")
            get_settings.cache_clear()
            compiled = pipeline.compile(request)
            validated = pipeline.validate(request, compiled)
        get_settings.cache_clear()
        yield SignedRun(pipeline, request, keys, pipeline.fetch(request), compiled, validated)


def home_of_its_own(signed_run: SignedRun, folder: Path) -> Pipeline:
    """Return the pipeline of a copy of the run's home, which a test may change."""
    shutil.copytree(signed_run.pipeline.settings.home_dir, folder / "home")
    settings = signed_run.pipeline.settings.model_copy(update={"home": folder / "home"})
    return Pipeline(settings, signed_run.pipeline.counts)


def write_row(pipeline: Pipeline, update: dict[str, Any]) -> None:
    """Change what the registry says about its version, as anyone can who may write to it."""
    with closing(sqlite3.connect(pipeline.settings.home_dir / "registry.db")) as database, database:
        ((text,),) = database.execute("SELECT entry FROM version")
        database.execute("UPDATE version SET entry = ?", [json.dumps(json.loads(text) | update)])


class TestRun:
    def test_both_statements_are_signed_and_on_the_artifact(self, signed_run: SignedRun) -> None:
        attested = verify_attestations(
            signed_run.artifact.digest,
            stored_envelopes(signed_run.store, signed_run.artifact.digest),
            trusted_keys=signed_run.keys.trusted,
            require_signature=True,
            manifest_source=signed_run.source.digest,
        )
        assert attested.signed_by == (signed_run.keys.id,)
        assert attested.result == "PASSED"

    def test_the_subject_is_a_file_of_the_store_that_any_tool_can_hash(self, signed_run: SignedRun) -> None:
        for envelope in stored_envelopes(signed_run.store, signed_run.artifact.digest):
            (subject,) = statement_of(envelope)["subject"]
            body = (signed_run.pipeline.settings.home_dir / "store" / subject["name"]).read_bytes()
            assert hashlib.sha256(body).hexdigest() == subject["digest"]["sha256"] == signed_run.artifact.digest

    def test_provenance_agrees_with_the_manifest(self, signed_run: SignedRun) -> None:
        predicate = statement_of(stored_envelopes(signed_run.store, signed_run.artifact.digest)[0])["predicate"]
        definition, run = predicate["buildDefinition"], predicate["runDetails"]
        with signed_run.store.open_folder(signed_run.artifact.digest) as folder:
            manifest = read_manifest(folder)
        assert definition["externalParameters"]["spec"] == manifest.spec.model_dump(mode="json")
        assert definition["internalParameters"]["threads"] == 1
        dependencies = {item["name"]: item for item in definition["resolvedDependencies"]}
        assert dependencies.pop("source-model")["digest"] == {"sha256": signed_run.source.digest}
        assert {
            name: item["annotations"]["version"] for name, item in dependencies.items()
        } == manifest.target.toolchain
        assert run["metadata"]["startedOn"] <= run["metadata"]["finishedOn"]
        assert run["metadata"]["invocationId"]

    def test_verdict_agrees_with_the_report(self, signed_run: SignedRun) -> None:
        predicate = statement_of(stored_envelopes(signed_run.store, signed_run.artifact.digest)[1])["predicate"]
        gates = read_report(signed_run.validated.report_uri).verdict.gates
        assert predicate["url"] == signed_run.validated.report_uri
        assert predicate["passedTests"] == [gate.gate for gate in gates if gate.outcome == "pass"]
        digests = {item["name"]: item["digest"]["sha256"] for item in predicate["configuration"]}
        assert (digests["source-model"], digests["report"]) == (
            signed_run.source.digest,
            signed_run.validated.report_digest,
        )

    def test_same_run_again_is_cached_and_says_nothing_new(self, signed_run: SignedRun) -> None:
        envelopes = stored_envelopes(signed_run.store, signed_run.artifact.digest)
        counts = dict(signed_run.pipeline.counts)
        assert signed_run.pipeline.validate(
            signed_run.request, signed_run.pipeline.compile(signed_run.request)
        ).cached
        assert signed_run.pipeline.counts == counts
        assert stored_envelopes(signed_run.store, signed_run.artifact.digest) == envelopes

    def test_run_without_a_key_accepts_signed_answers(self, signed_run: SignedRun) -> None:
        keyless = Pipeline(
            signed_run.pipeline.settings.model_copy(update={"signing_key": None}), signed_run.pipeline.counts
        )
        counts = dict(signed_run.pipeline.counts)
        assert keyless.validate(signed_run.request, keyless.compile(signed_run.request)).cached
        assert signed_run.pipeline.counts == counts

    @pytest.mark.parametrize("changed", ["source_digest", "source_uri", "both", "source_revision", "spec"])
    @pytest.mark.parametrize("has_key", [True, False])
    @pytest.mark.parametrize("fetches", [True, False])
    def test_source_model_that_was_put_into_a_registered_version_is_refused(
        self, signed_run: SignedRun, tmp_path: Path, changed: str, has_key: bool, fetches: bool
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        version = pipeline.run(pipeline.request(signed_run.request.model, name="reviews"))
        other_model = tmp_path / "other"
        shutil.copytree(signed_run.request.model, other_model)
        (other_model / "config.json").write_text((other_model / "config.json").read_text() + "\n")
        other_source = pipeline.fetch(pipeline.request(other_model))
        update: dict[str, Any] = {"source_digest": other_source.digest, "source_uri": other_source.uri}
        if changed == "spec":
            update = {"spec": version.spec | {"hf_task": "feature-extraction"}}
        elif changed != "both":
            update = {changed: update.get(changed, "v9-approved")}
        write_row(pipeline, update)

        settings = pipeline.settings.model_copy(update={} if has_key else {"signing_key": None})
        request = pipeline.request("registry:reviews", steps=StepSwitches(fetch=fetches))
        with pytest.raises(
            SourceError, match="The source model of reviews version 1 cannot be used: its artifact"
        ):
            Pipeline(settings).fetch(request)

    @pytest.mark.parametrize(
        "update", [{"source_revision": "v9-approved"}, {"spec": {"hf_task": "feature-extraction"}}, {"spec": {}}]
    )
    def test_version_that_changes_after_its_check_is_refused(
        self, signed_run: SignedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: dict[str, Any]
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        pipeline.run(pipeline.request(signed_run.request.model, name="reviews"))
        check = fetch._checked_version

        def check_then_change(*arguments: Any) -> Any:
            version = check(*arguments)
            write_row(pipeline, update)
            return version

        monkeypatch.setattr(fetch, "_checked_version", check_then_change)
        with pytest.raises(SourceError, match="changed while it was being read"):
            pipeline.fetch(pipeline.request("registry:reviews"))

    def test_fetch_step_that_is_off_takes_the_task_of_the_version(
        self, signed_run: SignedRun, tmp_path: Path
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        model = signed_run.request.model
        pipeline.run(pipeline.request(model, name="reviews"))
        pipeline.run(pipeline.request(model, name="vectors", hf_task=HfTask.FEATURE_EXTRACTION))
        pipeline.fetch(pipeline.request("registry:vectors"))
        off = StepSwitches(fetch=False)
        assert (
            pipeline.fetch(pipeline.request("registry:reviews", steps=off)).hf_task is HfTask.TEXT_CLASSIFICATION
        )
        assert pipeline.fetch(pipeline.request(model, steps=off)).hf_task is None

    def test_reference_that_means_another_version_by_the_time_of_its_copy_is_refused(
        self, signed_run: SignedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        request = pipeline.request(signed_run.request.model)
        pin, versions = FolderSource.pin, iter(("@1", "@2"))
        monkeypatch.setattr(FolderSource, "pin", lambda *arguments: (pin(*arguments)[0] + next(versions), None))
        with pytest.raises(SourceError, match="changed while it was being read"):
            pipeline.fetch(request)

    def test_fetch_record_with_another_revision_than_the_folder_is_not_used(
        self, signed_run: SignedRun, tmp_path: Path
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        request = pipeline.request(signed_run.request.model)
        source = pipeline.fetch(request)
        assert source.cached
        store = open_store(pipeline.store_uri, pipeline.settings)
        parts = latest(store, "fetch", source.uri)["parts"]  # type: ignore[index]
        key = CacheKey("fetch", source.uri, dict(parts))  # type: ignore[arg-type]
        forged = record_of(
            key,
            source.model_copy(update={"revision": "v9-approved"}),
            Attester.of(store, pipeline.settings),
        )
        store.put_record("fetch", key.digest, forged)
        again = pipeline.fetch(request)
        assert (again.revision, again.cached) == (source.digest, False)

    @pytest.mark.parametrize(("outcome", "result"), [("fail", "FAILED"), ("warn", "WARNED")])
    def test_run_without_a_key_registers_nothing_whose_last_signed_verdict_is_worse(
        self, signed_run: SignedRun, tmp_path: Path, outcome: Outcome, result: str
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        digest = signed_run.artifact.digest
        worse = verdict_statement(digest, judged(outcome, source=signed_run.source.digest, report="8" * 64))
        put_statement(open_store(pipeline.store_uri, pipeline.settings), digest, worse, signed_run.keys.signer)
        keyless = Pipeline(pipeline.settings.model_copy(update={"signing_key": None}), pipeline.counts)
        request = pipeline.request(signed_run.request.model, name="reviews")
        refusal = f"The last verdict on the artifact {digest[:12]} is {result}"
        with pytest.raises(VerdictError, match=refusal):
            keyless.run(request)
        source, artifact = keyless.fetch(request), keyless.compile(request)
        # Whoever asks for a model by hand takes a warning.
        expected = pytest.raises(VerdictError, match=refusal) if outcome == "fail" else nullcontext()
        with expected:
            prove(source, artifact, request, keyless.settings)
        assert pipeline.run(request).version == 1

    def test_source_model_of_a_registered_version_needs_a_signature_only_where_there_is_a_key(
        self, signed_run: SignedRun, tmp_path: Path
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        pipeline.run(pipeline.request(signed_run.request.model, name="reviews"))
        request = pipeline.request("registry:reviews")
        assert pipeline.fetch(request).digest == signed_run.source.digest
        (pipeline.settings.home_dir / f"store/records/provenance/{signed_run.artifact.digest}.json").unlink()
        keyless = Pipeline(pipeline.settings.model_copy(update={"signing_key": None}))
        assert keyless.fetch(request).digest == signed_run.source.digest
        with pytest.raises(SourceError, match="the store has no provenance statement on it"):
            pipeline.fetch(request)

    def test_steps_that_are_off_give_only_what_a_trusted_key_signed(
        self, signed_run: SignedRun, tmp_path: Path
    ) -> None:
        pipeline = home_of_its_own(signed_run, tmp_path)
        store = open_store(pipeline.store_uri, pipeline.settings)
        request = signed_run.request.model_copy(update={"steps": StepSwitches(compile=False, validate=False)})
        artifact = pipeline.compile(request)
        validated = pipeline.validate(request, artifact)
        assert (artifact.digest, validated.outcome) == (signed_run.artifact.digest, "pass")

        recorded = store.get_record("report-of", artifact.digest)
        assert recorded is not None
        store.put_record("report-of", artifact.digest, recorded | {"reason": "forged", "figures": {}})
        assert pipeline.validate(request, artifact) == validated
        store.put_record("report-of", artifact.digest, recorded | {"outcome": "warn"})
        with pytest.raises(StepOffError, match="cannot be used: its statement has the result PASSED"):
            pipeline.validate(request, artifact)
        store.put_record("report-of", artifact.digest, recorded)
        verdict = stored_envelopes(store, artifact.digest)[1]
        store.put_record("verdict", artifact.digest, {**verdict, "signatures": []})
        with pytest.raises(StepOffError, match="neither this run's key nor a trusted key signed its verdict"):
            pipeline.validate(request, artifact)

        provenance = stored_envelopes(store, artifact.digest)[0]
        store.put_record("provenance", artifact.digest, {**provenance, "signatures": []})
        with pytest.raises(StepOffError, match="neither this run's key nor a trusted key signed its provenance"):
            pipeline.compile(request)
        unsigned = store.get_record("compile", artifact.cache_key)
        assert unsigned is not None
        store.put_record("compile", artifact.cache_key, unsigned | {"signatures": []})
        with pytest.raises(StepOffError, match="has no artifact of"):
            pipeline.compile(request)

    def test_password_is_in_nothing_that_was_written(self, signed_run: SignedRun) -> None:
        files = [path for path in signed_run.pipeline.settings.home_dir.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert [path for path in files if SIGNING_PASSWORD.encode() in path.read_bytes()] == []
        assert SIGNING_PASSWORD not in "\n".join(signed_run.pipeline.lines)

    def test_fetched_artifact_brings_them_along_and_so_does_every_copy(
        self, signed_run: SignedRun, settings: Settings, tmp_path: Path
    ) -> None:
        envelopes = stored_envelopes(signed_run.store, signed_run.artifact.digest)
        opened = open_artifact(signed_run.artifact.uri, settings=settings)
        copied = copy_artifact(opened, tmp_path / "copied")
        saved = CompiledTokenizer.from_pretrained(copied).save_pretrained(tmp_path / "saved")
        for folder in (opened.folder, copied, saved):
            assert read_bundle(folder) == envelopes
            assert (
                open_artifact(folder, require_signature=signed_run.keys.public).digest
                == signed_run.artifact.digest
            )

    def test_every_line_of_the_file_is_an_envelope(self, signed_run: SignedRun, settings: Settings) -> None:
        folder = open_artifact(signed_run.artifact.uri, settings=settings).folder
        lines = (folder / ATTESTATIONS_NAME).read_text("utf-8").splitlines()
        assert [sorted(json.loads(line)) for line in lines] == [["payload", "payloadType", "signatures"]] * 2


class Answer(BaseModel):
    """The result of a step."""

    digest: str
    why: str


class TestCached:
    """Which cached answers a run accepts."""

    def attester(self, store: ArtifactStore, keys: Keys | None, *trusted: Keys) -> Attester:
        other_keys = tuple(key for pair in trusted for key in pair.trusted)
        return Attester(store, keys.signer if keys else None, other_keys, 1, keys is not None)

    def test_answer_of_an_older_key_stands_while_that_is_trusted(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        old, new = make_keys(tmp_path, "old"), make_keys(tmp_path, "new")
        digest = digest_of(artifact)
        self.attester(store, old).compiled(artifact, digest, started=RUN.started, request_digest=REQUEST)
        assert self.attester(store, old).lacks_provenance(digest, REQUEST) == ""
        assert self.attester(store, new, old).lacks_provenance(digest, REQUEST) == ""
        assert "neither this run's key nor a trusted key signed" in self.attester(store, new).lacks_provenance(
            digest, REQUEST
        )

    def test_unsigned_answer_is_made_again_by_a_run_with_a_key(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        digest = digest_of(artifact)
        self.attester(store, None).compiled(artifact, digest, started=RUN.started, request_digest=REQUEST)
        assert self.attester(store, None).lacks_provenance(digest, REQUEST) == ""
        assert "neither this run's key nor a trusted key signed" in self.attester(
            store, make_keys(tmp_path)
        ).lacks_provenance(digest, REQUEST)

    def test_answer_without_a_statement_is_made_again(self, store: LocalStore, artifact: Path) -> None:
        attester, digest = self.attester(store, None), digest_of(artifact)
        assert "no provenance statement" in attester.lacks_provenance(digest, REQUEST)
        assert "no verdict statement" in attester.lacks_verdict(digest, REPORT, "pass", REQUEST)

    def test_statement_about_another_artifact_is_made_again(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        other = small_artifact(tmp_path / "other", graph=b"another")
        digest = digest_of(artifact)
        store.put_record("provenance", digest, envelopes_for(other, None)[0])
        assert "is about another artifact" in self.attester(store, None).lacks_provenance(digest, REQUEST)

    def test_signed_statement_on_another_request_is_no_answer(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        """Whoever writes to the store can put a record there that answers with any artifact that was signed."""
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        for envelope, kind in zip(envelopes_for(artifact, keys), ("provenance", "verdict"), strict=True):
            store.put_record(kind, digest, envelope)
        attester = self.attester(store, keys)
        assert attester.lacks_provenance(digest, REQUEST) == ""
        assert attester.lacks_verdict(digest, REPORT, "pass", REQUEST) == ""
        for reason in (
            attester.lacks_provenance(digest, "e" * 64),
            attester.lacks_verdict(digest, REPORT, "pass", "e" * 64),
        ):
            assert "answers another request" in reason

    def test_statement_of_the_other_kind_is_no_answer(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        for envelope, kind in zip(envelopes_for(artifact, keys), ("verdict", "provenance"), strict=True):
            store.put_record(kind, digest, envelope)
        store.put_record("waiting-verdict", digest, envelopes_for(artifact, keys)[0])
        attester = self.attester(store, keys)
        missing = "the store has no verdict statement on it"
        assert attester.lacks_provenance(digest, REQUEST) == missing.replace("verdict", "provenance")
        assert attester.lacks_verdict(digest, REPORT, "pass", REQUEST) == missing
        assert attester.lacks_pending(digest, REPORT, REQUEST) == missing

    @pytest.mark.parametrize(
        ("stated", "result", "recorded"),
        [("fail", "FAILED", "pass"), ("warn", "WARNED", "pass"), ("pass", "PASSED", "fail")],
    )
    def test_record_of_another_outcome_than_the_statement_is_no_answer(
        self, store: LocalStore, artifact: Path, tmp_path: Path, stated: Outcome, result: str, recorded: Outcome
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        put_statement(store, digest, verdict_statement(digest, judged(stated)), keys.signer)
        attester = self.attester(store, keys)
        assert attester.lacks_verdict(digest, REPORT, stated, REQUEST) == ""
        reason = attester.lacks_verdict(digest, REPORT, recorded, REQUEST)
        assert reason == f"its statement has the result {result}"

    @pytest.mark.parametrize("step", ["compile", "fetch", "race", "trial"])
    def test_run_with_a_key_uses_only_records_that_a_trusted_key_signed(
        self, store: LocalStore, artifact: Path, tmp_path: Path, step: str
    ) -> None:
        keys, others = make_keys(tmp_path, "one"), make_keys(tmp_path, "two")
        stored, key = store.put_folder(artifact), CacheKey(step, "hf://a/b", {"part": "1"})

        def ask(attester: Attester, why: str) -> Answer:
            return find_or_make(
                store,
                key,
                Answer,
                folders={"digest": ""},
                attester=attester,
                compute=lambda reason: Answer(digest=stored.digest, why=why),
                report_line=lambda line: None,
            )[0]

        unsigned, own = self.attester(store, None), self.attester(store, keys)
        assert [ask(*asked).why for asked in ((unsigned, "1"), (own, "2"), (own, "3"))] == ["1", "2", "2"]
        # A run without a key uses it as well, another key must be trusted.
        assert ask(unsigned, "4").why == ask(self.attester(store, others, keys), "5").why == "2"
        assert ask(self.attester(store, others), "6").why == "6"

        # With a checksum that is right again.
        record = store.get_record(step, key.digest)
        assert record is not None
        content = {"parts": record["parts"], "value": {"digest": stored.digest, "why": "forged"}}
        forged = content | {"checksum": json_digest([step, content]), "signatures": record["signatures"]}
        store.put_record(step, key.digest, forged)
        assert ask(unsigned, "7").why == "forged"
        assert ask(self.attester(store, others), "8").why == "8"

    def test_verdict_of_another_report_is_given_again(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        put_statement(store, digest, verdict_statement(digest, judged("fail", report="8" * 64)), None)
        assert "a later validation replaced the verdict" in self.attester(store, None).lacks_verdict(
            digest, REPORT, "pass", REQUEST
        )
        put_statement(store, digest, verdict_statement(digest, judged()), keys.signer)
        assert self.attester(store, keys).lacks_verdict(digest, REPORT, "pass", REQUEST) == ""
        # A run without a key could not replace the signed verdict.
        assert self.attester(store, None).lacks_verdict(digest, "8" * 64, "fail", REQUEST) == ""

    def test_answer_that_was_there_and_lacks_something_is_made_again_and_says_why(
        self, store: LocalStore, artifact: Path
    ) -> None:
        attester, stored = self.attester(store, None), store.put_folder(artifact)
        key = CacheKey("compile", "hf://a/b for onnx-runtime", {"part": "1"})
        lines: list[str] = []

        def make(reason: str) -> Answer:
            return Answer(digest=stored.digest, why=reason)

        def ask() -> tuple[Answer, bool]:
            return find_or_make(
                store,
                key,
                Answer,
                folders={"digest": ""},
                attester=attester,
                compute=make,
                report_line=lines.append,
                reason_to_redo=lambda answer: attester.lacks_provenance(answer.digest, REQUEST),
            )

        assert not ask()[1]
        assert ask() == (Answer(digest=stored.digest, why="the store has no provenance statement on it"), False)
        assert "no provenance statement" in lines[-1]
        attester.compiled(artifact, stored.digest, started=RUN.started, request_digest=REQUEST)
        assert ask()[1]

    def test_unsigned_statement_never_takes_the_place_of_a_signed_one(
        self, store: LocalStore, artifact: Path, tmp_path: Path
    ) -> None:
        keys, digest = make_keys(tmp_path), digest_of(artifact)
        self.attester(store, keys).compiled(artifact, digest, started=RUN.started, request_digest=REQUEST)
        signed = store.get_record("provenance", digest)
        self.attester(store, None).compiled(artifact, digest, started=RUN.started, request_digest=REQUEST)
        assert store.get_record("provenance", digest) == signed
        self.attester(store, keys).compiled(artifact, digest, started=RUN.finished, request_digest=REQUEST)
        assert store.get_record("provenance", digest) != signed
