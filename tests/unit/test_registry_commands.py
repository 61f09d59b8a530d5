"""promote, lineage, pull, gc, mirror: the commands that read or change registries and stores."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from compileflow.admin.promote import promote_version
from compileflow.artifact.attestations.envelopes import RECORDS, put_statement
from compileflow.artifact.attestations.statements import verdict_statement
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import open_artifact
from compileflow.catalog import open_registry, open_store
from compileflow.cli import app
from compileflow.contracts import ModelRegistry, Outcome, VersionEntry
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, RegistryError, RegistryUnavailableError
from compileflow.registries.sqlite import SqliteRegistry
from compileflow.settings import Settings, get_settings
from compileflow.testing.registries import version_entry
from tests.unit.attested_artifacts import Keys, envelopes_for, judged, make_keys, statement_of, stored_entry

OLD_ARTIFACT = Path(__file__).parents[1] / "artifacts" / "v2-openvino"


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    return open_registry(settings.resolved_registry_uri())


@pytest.fixture
def both(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two registries, the second of which has other numbers."""
    uris = (f"sqlite:///{tmp_path / 'first.db'}", f"sqlite:///{tmp_path / 'second.db'}")
    monkeypatch.setenv("COMPILEFLOW_REGISTRY_URI", ", ".join(uris))
    get_settings.cache_clear()
    open_registry(uris[1]).register(version_entry("ner", 99))
    for uri in uris:
        open_registry(uri).register(stored_entry(settings, "ner"))
    return uris


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def one_line(result: Result, *parts: str, exit_code: int = 1) -> None:
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for part in ("error: ", *parts):
        assert part in result.stderr


def stored(settings: Settings, name: str = "old") -> VersionEntry:
    """Store an artifact and return the entry of it."""
    folder = open_store(settings.resolved_store_uri()).put_folder(OLD_ARTIFACT)
    manifest = read_manifest(OLD_ARTIFACT)
    artifact = {
        "artifact_uri": folder.uri,
        "artifact_digest": folder.digest,
        "source_digest": manifest.source.digest,
        "target": manifest.target.name,
        "spec": manifest.spec.model_dump(mode="json"),
    }
    return version_entry(name, 1).model_copy(update=artifact)


def test_promote_moves_the_same_artifact_in_every_registry(settings: Settings, both: tuple[str, str]) -> None:
    result = call("promote", "ner", "1", "--stage", "production", "--reason", "it is quicker")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"ner version 1 is now production in {both[0]}",
        f"ner version 2 is now production in {both[1]}",
    ]
    digest = stored_entry(settings, "ner").artifact_digest
    for uri in both:
        version = open_registry(uri).get("ner", "production")
        assert version.artifact_digest == digest
        (change,) = open_registry(uri).promotions("ner", version.version)
        assert (change.stage, change.reason) == ("production", "it is quicker")
        assert change.who


def test_promotion_of_another_artifact_than_was_agreed_on_moves_nothing(
    settings: Settings, both: tuple[str, str]
) -> None:
    with pytest.raises(RegistryError, match=r"by now; 0{12} was agreed on\."):
        promote_version(
            "ner", 1, "production", registry_uris=both, settings=settings, who="Ann", artifact_digest="0" * 64
        )
    assert {open_registry(uri).get("ner", number).stage for number, uri in enumerate(both, 1)} == {"none"}


def test_promote_finds_a_version_by_its_stage(both: tuple[str, str]) -> None:
    for stage in ("staging", "production"):
        words = ("promote", "ner", "1" if stage == "staging" else "staging", "--stage", stage)
        assert call(*words).exit_code == 0
    assert [open_registry(uri).get("ner", "production").version for uri in both] == [1, 2]


def test_promote_leaves_out_a_registry_that_has_not_the_artifact(
    settings: Settings, both: tuple[str, str]
) -> None:
    open_registry(both[0]).register(stored_entry(settings, "ner", number=5))
    result = call("promote", "ner", "2", "--stage", "staging", "--json")
    assert list(json.loads(result.stdout)) == [both[0]]


def test_warned_version_is_promoted_only_by_force_and_with_a_reason(
    settings: Settings, registry: ModelRegistry
) -> None:
    registry.register(stored_entry(settings, "ner").model_copy(update={"verdict": "warn"}))
    words = ("promote", "ner", "1", "--stage", "production")
    one_line(call(*words), "has the verdict warn", "takes only pass", "--force")
    one_line(call(*words, "--force"), "without a reason", exit_code=2)
    assert registry.get("ner", 1).stage == "none"
    assert call(*words, "--force", "--reason", "the old one is worse").exit_code == 0
    assert registry.get("ner", "production").version == 1
    # Taking it out of service needs no force.
    assert call("promote", "ner", "1", "--stage", "archived").exit_code == 0


@pytest.mark.parametrize(
    ("words", "parts", "exit_code"),
    [
        (("promote", "ner", "1", "--stage", "live"), ("Unknown stage 'live'", "staging, production"), 2),
        (("promote", "ner", "7", "--stage", "staging"), ("no version 7", "1"), 1),
        (("promote", "nor", "1", "--stage", "staging"), ("no model 'nor'", "ner"), 1),
        (("promote", "ner", "soon", "--stage", "staging"), ("number of a version or a stage, got 'soon'",), 2),
        (("promote", "ner", "production", "--stage", "archived"), ("'production'", "none (1)"), 1),
        (("lineage", "ner", "soon"), ("number of a version or a stage, got 'soon'",), 2),
        (("lineage", "ner", "7"), ("no version 7", "1"), 1),
        (("lineage", "ner", "production"), ("production",), 1),
        (("pull", "ner@production", "out"), ("production",), 1),
        (("pull", "ner@soon", "out"), ("Expected the number of a version or a stage, got 'soon'",), 2),
        (("pull", "../ner", "out"), ("Expected a reference to a registered model",), 2),
        (("mirror", "file:///a", "toaster:1"), ("Unknown artifact store 'toaster'", "s3"), 2),
    ],
)
def test_wrong_name_number_or_stage_is_one_line_that_says_what_there_is(
    registry: ModelRegistry, words: tuple[str, ...], parts: tuple[str, ...], exit_code: int
) -> None:
    registry.register(version_entry("ner", 1))
    one_line(call(*words), *parts, exit_code=exit_code)


def test_lineage_shows_source_artifact_report_promotions_and_siblings(registry: ModelRegistry) -> None:
    for number in (1, 2):
        registry.register(version_entry("ner", number))
    registry.set_stage("ner", 1, "staging", who="ann", reason="try it")
    entry = version_entry("ner", 1)
    tree = call("lineage", "ner", "staging").stdout
    parts = (
        f"source {entry.source_uri} at {entry.source_revision}", f"digest {entry.source_digest}",
        "ner version 1 for onnx-runtime, staging",
        f"artifact {entry.artifact_uri}", f"digest {entry.artifact_digest}",
        f"report {entry.report_uri}, verdict pass", f"digest {entry.report_digest}",
        "ann made it staging: try it", "ner version 2 for onnx-runtime",
    )  # fmt: skip
    positions = [tree.find(words) for words in parts]
    assert -1 not in positions, tree
    assert positions == sorted(positions)
    history = json.loads(call("lineage", "ner", "1", "--json").stdout)
    assert history["promotions"][0]["reason"] == "try it"
    assert [version["version"] for version in history["siblings"]] == [2]


def test_mark_of_a_busy_machine_is_shown_where_a_latency_would_be(registry: ModelRegistry) -> None:
    registry.register(version_entry("ner", 1).model_copy(update={"figures": {"latency_on_busy_machine": 1.0}}))
    assert "busy machine" in call("versions").stdout
    assert "verdict pass, latency measured on a busy machine" in call("lineage", "ner", "1").stdout
    assert json.loads(call("versions", "--json").stdout)[0]["figures"] == {"latency_on_busy_machine": 1.0}


@pytest.mark.parametrize("reference", ["old", "old@1", "old@production", "registry:old@production"])
def test_pull_writes_the_artifact_that_was_registered(
    settings: Settings, registry: ModelRegistry, tmp_path: Path, reference: str
) -> None:
    entry = stored(settings)
    registry.register(entry)
    registry.set_stage("old", 1, "production", who="ann")
    result = call("pull", reference, str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    assert entry.artifact_digest in result.stdout
    assert folder_digest(list_files(tmp_path / "out", paths=names(OLD_ARTIFACT))) == entry.artifact_digest
    one_line(call("pull", reference, str(tmp_path / "out")), "is not empty")


def test_pull_reads_the_registry_that_is_named(settings: Settings, tmp_path: Path) -> None:
    entry = stored(settings)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    open_registry(elsewhere).register(entry)
    for number, reference in enumerate(("old", "registry:old")):
        result = call("pull", reference, str(tmp_path / str(number)), "--registry", elsewhere)
        assert result.exit_code == 0, result.stderr
        assert entry.artifact_digest in result.stdout


def test_user_without_a_name_can_promote(
    settings: Settings, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number."""
    registry.register(stored_entry(settings, "ner"))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    result = call("promote", "ner", "1", "--stage", "staging")
    assert result.exit_code == 0, result.stderr
    (change,) = registry.promotions("ner", 1)
    assert change.who == f"uid {os.getuid()}"


def test_promote_that_fails_in_the_only_registry_says_what_to_do(
    settings: Settings, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(stored_entry(settings, "ner"))

    def busy(*_: object, **__: object) -> None:
        raise RegistryUnavailableError("It is busy.", hint="Wait for the other writer.")

    monkeypatch.setattr(SqliteRegistry, "set_stage", busy)
    one_line(call("promote", "ner", "1", "--stage", "staging"), "error: It is busy. Wait for the other writer.")


def test_versions_lists_the_newest_ones_and_says_that_there_are_more(registry: ModelRegistry) -> None:
    for number in range(4):
        registry.register(version_entry("ner", number))
    result = call("versions", "ner", "--limit", "2", "--json")
    assert [version["version"] for version in json.loads(result.stdout)] == [4, 3]
    assert result.stderr == "Listing the 2 newest versions; --limit 0 lists all.\n"
    for limit in ("0", "4"):
        result = call("versions", "--limit", limit, "--json")
        assert (len(json.loads(result.stdout)), result.stderr) == (4, "")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_version_whose_uri_was_bent_to_another_artifact_is_refused(
    settings: Settings, registry: ModelRegistry, command: str
) -> None:
    registry.register(stored(settings).model_copy(update={"artifact_digest": "f" * 64}))
    one_line(call(command, "registry:old"), "expected ffffffffffff", "it was changed")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("source_digest", "f" * 64, "names the source model ffffffffffff"),
        ("target", "hyperdex", "names the target hyperdex"),
        ("spec", {"precision": "int8"}, "names another request"),
    ],
)
def test_version_that_contradicts_its_artifact_is_refused(
    settings: Settings, registry: ModelRegistry, field: str, value: Any, says: str
) -> None:
    """Who can write to the registry, and not to the signed statements, can say that an artifact is another's."""
    entry = stored(settings)
    bent = entry.spec | value if field == "spec" else value
    registry.register(entry.model_copy(update={field: bent}))
    registry.register(stored(settings, "sound"))
    for location in ("registry:old", entry.artifact_uri, entry.artifact_digest, str(OLD_ARTIFACT)):
        result = call("verify", location)
        assert result.exit_code == 1
        assert says in result.stderr
        assert "proven" not in result.stdout
        assert json.loads(call("verify", location, "--json").stdout)["proven"] is False
    assert call("verify", "registry:sound").exit_code == 0


def test_contradiction_in_any_configured_registry_is_found(settings: Settings, both: tuple[str, str]) -> None:
    entry = stored(settings)
    open_registry(both[0]).register(entry)
    open_registry(both[1]).register(entry.model_copy(update={"source_digest": "f" * 64}))
    result = call("verify", entry.artifact_uri)
    assert result.exit_code == 1
    assert "names the source model ffffffffffff" in result.stderr


@pytest.mark.parametrize("length", [0, 12, 63])
def test_shortened_digest_of_a_registry_is_a_contradiction(
    settings: Settings, registry: ModelRegistry, tmp_path: Path, length: int
) -> None:
    """Only a user may shorten a digest: an empty one would fit every artifact."""
    entry = stored(settings)
    registry.register(entry.model_copy(update={"artifact_digest": entry.artifact_digest[:length]}))
    for words in (
        ("verify", "registry:old"), ("inspect", "registry:old"), ("pull", "old", str(tmp_path / "out")),
    ):  # fmt: skip
        one_line(call(*words), "it was changed in the registry")
    with pytest.raises(IntegrityError, match="it was changed in the registry"):
        open_artifact("registry:old")
    one_line(call("promote", "old", "1", "--stage", "production"), "names the artifact")
    assert open_artifact(entry.artifact_uri, digest=entry.artifact_digest[:12]).digest == entry.artifact_digest


def test_verify_names_the_version_that_was_asked_for(
    settings: Settings, registry: ModelRegistry, tmp_path: Path
) -> None:
    other_uri = f"sqlite:///{tmp_path / 'other.db'}"
    for name in ("first", "second"):
        registry.register(stored(settings, name))
    open_registry(other_uri).register(stored(settings, "third"))
    for reference, name in (
        ("registry:first", "first"),
        ("registry:second@1", "second"),
        (f"{other_uri}#third@1", "third"),
    ):
        assert call("verify", reference).stdout.splitlines()[-1] == f"proven: {name} version 1, verdict pass"
        assert json.loads(call("verify", reference, "--json").stdout)["proof"] == f"{name} version 1, verdict pass"


def test_verify_refuses_what_failed_after_it_was_registered(settings: Settings, registry: ModelRegistry) -> None:
    entry = stored(settings)
    registry.register(entry)
    assert call("verify", entry.artifact_uri).exit_code == 0
    store = open_store(settings.resolved_store_uri())
    manifest = read_manifest(OLD_ARTIFACT)
    report = store.put_folder(OLD_ARTIFACT).digest
    failed = judged("fail", source=manifest.source.digest, report=report)
    put_statement(store, entry.artifact_digest, verdict_statement(entry.artifact_digest, failed), None)
    result = call("verify", entry.artifact_uri)
    assert result.exit_code == 1
    assert "last validation failed" in result.stderr
    assert "proven" not in result.stdout
    assert json.loads(call("verify", entry.artifact_uri, "--json").stdout)["proven"] is False
    # A copy of the folder has the same digest, but not the later statement.
    copied = call("verify", str(OLD_ARTIFACT))
    assert copied.exit_code == 1
    assert "proven" not in copied.stdout
    assert call("verify", entry.artifact_uri, "--integrity-only").exit_code == 0


@pytest.mark.parametrize(("outcome", "result"), [("fail", "FAILED"), ("error", "FAILED"), ("warn", "WARNED")])
def test_promote_refuses_what_did_not_pass_its_last_validation(
    settings: Settings, registry: ModelRegistry, outcome: Outcome, result: str
) -> None:
    entry = stored(settings)
    registry.register(entry)
    verdict = judged(outcome, source=read_manifest(OLD_ARTIFACT).source.digest)
    store = open_store(settings.resolved_store_uri())
    put_statement(store, entry.artifact_digest, verdict_statement(entry.artifact_digest, verdict), None)
    words = ("promote", "old", "1", "--stage", "production")
    one_line(call(*words), f"last validation of old version 1 has the result {result}", "--force")
    assert registry.get("old", 1).stage == "none"
    assert call(*words, "--force", "--reason", "the other suite counts").exit_code == 0


def trust(monkeypatch: pytest.MonkeyPatch, keys: Keys, *, require: bool) -> None:
    monkeypatch.setenv("COMPILEFLOW_TRUSTED_KEYS", str(keys.public))
    monkeypatch.setenv("COMPILEFLOW_REQUIRE_SIGNATURE", str(require))
    get_settings.cache_clear()


def attested_entry(settings: Settings, keys: Keys | None, outcome: Outcome = "pass") -> VersionEntry:
    """Store an artifact with its statements."""
    entry = stored(settings)
    for envelope in envelopes_for(OLD_ARTIFACT, keys, outcome=outcome):
        kind = RECORDS[statement_of(envelope)["predicateType"]]
        open_store(settings.resolved_store_uri()).put_record(kind, entry.artifact_digest, envelope)
    return entry


FORCE = ("--force", "--reason", "the old one is worse")


@pytest.mark.parametrize("more", [(), FORCE])
@pytest.mark.parametrize("kind", ["provenance", "verdict"])
@pytest.mark.parametrize("require", [True, False])
def test_version_whose_statement_was_altered_is_not_promoted(
    settings: Settings,
    registry: ModelRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    kind: str,
    require: bool,
) -> None:
    keys = make_keys(tmp_path)
    trust(monkeypatch, keys, require=require)
    entry = attested_entry(settings, keys)
    registry.register(entry)
    store = open_store(settings.resolved_store_uri())
    record = store.get_record(kind, entry.artifact_digest)
    assert record is not None
    junk = [{"keyid": keys.id, "sig": "AAAA"}]
    store.put_record(kind, entry.artifact_digest, record | {"signatures": junk})
    words = ("promote", "old", "1", "--stage", "production")
    one_line(call(*words, *more), f"cannot enter production: The {kind} was altered")
    store.put_record(kind, entry.artifact_digest, record)
    assert call(*words, *more).exit_code == 0


@pytest.mark.parametrize("more", [(), FORCE])
@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("absent", "has no provenance statement"),
        ("unsigned", "no trusted key signed the provenance"),
        ("of another key", "no trusted key signed the provenance"),
        ("warn", "signed verdict PASSED is required, found WARNED"),
        ("fail", "A signed verdict PASSED or WARNED is required, found FAILED"),
    ],
)
def test_required_signature_is_required_of_a_promotion(
    settings: Settings,
    registry: ModelRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    state: str,
    says: str,
) -> None:
    keys, other = make_keys(tmp_path), make_keys(tmp_path, "other")
    trust(monkeypatch, keys, require=True)
    if state == "absent":
        registry.register(stored(settings))
    elif state == "unsigned":
        registry.register(attested_entry(settings, None))
    elif state == "of another key":
        registry.register(attested_entry(settings, other))
    else:
        registry.register(attested_entry(settings, keys, "warn" if state == "warn" else "fail"))
    one_line(call("promote", "old", "1", "--stage", "production", *more), "cannot enter production", says)
    assert registry.get("old", 1).stage == "none"
    # It can still be taken out of service.
    assert call("promote", "old", "1", "--stage", "archived").exit_code == 0


@pytest.mark.parametrize("depth", [900, 100_000])
def test_entry_that_is_nested_too_deeply_is_one_line(
    settings: Settings, registry: ModelRegistry, depth: int
) -> None:
    registry.register(version_entry("ner", 1))
    with closing(sqlite3.connect(settings.resolved_registry_uri().removeprefix("sqlite:///"))) as db, db:
        db.execute("UPDATE version SET entry = ?", ("[" * depth + "]" * depth,))
    for words in (("versions",), ("lineage", "ner", "1"), ("verify", "registry:ner")):
        one_line(call(*words), "does not hold an entry that this compileflow can read")


@pytest.mark.parametrize("value", [b"\xff", "live"])
def test_promotion_that_cannot_be_read_is_one_line(
    settings: Settings, registry: ModelRegistry, value: bytes | str
) -> None:
    registry.register(version_entry("ner", 1))
    registry.set_stage("ner", 1, "staging", who="ann")
    with closing(sqlite3.connect(settings.resolved_registry_uri().removeprefix("sqlite:///"))) as db, db:
        db.execute("UPDATE promotion SET stage = ?", (value,))
    one_line(call("lineage", "ner", "1"), "has a promotion that this compileflow cannot read")


def lose(path: Path) -> None:
    path.unlink()


def alter(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[0] ^= 1
    # A new file, because an opened folder may be a hard link to the old one.
    path.unlink()
    path.write_bytes(body)


@pytest.mark.parametrize("more", [(), ("--force", "--reason", "the old one is worse")])
@pytest.mark.parametrize(
    ("damage", "place", "says"),
    [
        (lose, "manifests/sha256/*.json", "does not hold the folder"),
        (alter, "manifests/sha256/*.json", "was altered"),
        (lose, "blobs/sha256/*/*", "is missing or altered"),
        (alter, "blobs/sha256/*/*", "is missing or altered"),
    ],
)
def test_version_whose_artifact_cannot_be_read_is_not_promoted(
    settings: Settings,
    registry: ModelRegistry,
    more: tuple[str, ...],
    damage: Callable[[Path], None],
    place: str,
    says: str,
) -> None:
    registry.register(stored_entry(settings, "ner"))
    damage(next((settings.home_dir / "store").glob(place)))
    for stage in ("staging", "production"):
        one_line(call("promote", "ner", "1", "--stage", stage, *more), f"cannot enter {stage}: ", says)
    assert (registry.get("ner", 1).stage, registry.promotions("ner", 1)) == ("none", [])
    # It can still be taken out of service.
    assert call("promote", "ner", "1", "--stage", "archived").exit_code == 0


def test_version_of_another_artifact_than_was_registered_is_not_promoted(
    settings: Settings, registry: ModelRegistry
) -> None:
    registry.register(stored_entry(settings, "ner").model_copy(update={"source_digest": "f" * 64}))
    one_line(call("promote", "ner", "1", "--stage", "production"), "names the source model ffffffffffff")
    bent = stored_entry(settings, "pos").model_copy(update={"artifact_digest": "f" * 64})
    registry.register(bent)
    one_line(call("promote", "pos", "1", "--stage", "production"), "names the artifact ffffffffffff")


def test_artifact_must_be_readable_for_every_registry(settings: Settings, both: tuple[str, str]) -> None:
    elsewhere = settings.model_copy(update={"store_uri": (settings.home_dir / "elsewhere").as_uri()})
    for uri, place in zip(both, (settings, elsewhere), strict=True):
        open_registry(uri).register(stored_entry(place, "pos", number=5))
    shutil.rmtree(settings.home_dir / "elsewhere")
    one_line(call("promote", "pos", "1", "--stage", "production"), "pos version 1 cannot enter production")
    assert [open_registry(uri).get("pos", 1).stage for uri in both] == ["none", "none"]


def test_promote_reads_the_verdict_in_every_registry(both: tuple[str, str]) -> None:
    for number, uri in enumerate(both):
        entry = version_entry("pos", 5).model_copy(update={"verdict": ("pass", "warn")[number]})
        open_registry(uri).register(entry)
    one_line(call("promote", "pos", "1", "--stage", "staging"), "pos version 1 has the verdict warn")
    assert open_registry(both[0]).get("pos", 1).stage == "none"


def test_report_of_another_version_is_one_line(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"schema_version": 999}')
    uri = open_store(settings.resolved_store_uri()).put_folder(tmp_path / "report").uri
    one_line(call("inspect", uri), "cannot be read", "compileflow that wrote it")


def test_record_of_a_report_that_cannot_be_read_counts_as_absent(settings: Settings) -> None:
    entry = stored(settings)
    store = open_store(settings.resolved_store_uri())
    store.put_record("report-of", entry.artifact_digest, {"report_digest": 5})
    result = call("verify", entry.artifact_uri)
    assert result.exit_code == 1
    assert "has a passing verdict on this digest" in result.stderr


def test_wrong_setting_is_one_line(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILEFLOW_THREADS", "many")
    get_settings.cache_clear()
    one_line(call("versions"), "COMPILEFLOW_THREADS", "docs/reference/settings.md", exit_code=2)


def test_pull_refuses_what_is_not_the_registered_digest(
    settings: Settings, registry: ModelRegistry, tmp_path: Path
) -> None:
    entry = stored(settings)
    registry.register(entry.model_copy(update={"artifact_digest": "f" * 64}))
    one_line(call("pull", "old", str(tmp_path / "out")), "expected ffffffffffff")
    assert not (tmp_path / "out").exists()


def test_registered_name_is_a_location_like_any_other(settings: Settings, registry: ModelRegistry) -> None:
    entry = stored(settings)
    registry.register(entry)
    for location in ("registry:old", "registry:old@1", f"{settings.resolved_registry_uri()}#old"):
        assert open_artifact(location).digest == entry.artifact_digest


def test_gc_keeps_what_is_registered_in_any_registry_and_says_what_it_deleted(
    settings: Settings, tmp_path: Path, both: tuple[str, str]
) -> None:
    store = open_store(settings.resolved_store_uri())
    needed = stored(settings, "kept")
    open_registry(both[1]).register(needed)
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "weights").write_bytes(bytes(2_000_000))
    garbage = store.put_folder(tmp_path / "left").digest
    assert "would delete 1 folders and 1 blobs, 2.0 MB" in call("gc", "--min-age-days", "0", "--dry-run").stdout
    assert "deleted 0 folders" in call("gc").stdout
    assert store.exists(garbage)
    one_line(call("gc", "--min-age-days", "0"), "more than 50%")
    assert "deleted 0 folders" in call("gc", "--min-age-days", "0", "--keep", garbage).stdout
    assert store.exists(garbage)
    assert "deleted 1 folders and 1 blobs, 2.0 MB" in call("gc", "--min-age-days", "0", "--yes").stdout
    kept = {needed.artifact_digest, stored_entry(settings, "ner").artifact_digest}
    assert set(store.list()) == kept


def test_gc_stops_when_a_registry_cannot_be_asked(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings.resolved_store_uri())
    digest = store.put_folder(OLD_ARTIFACT).digest
    broken = tmp_path / "registry.db"
    broken.write_bytes(b"this is not a database" * 100)
    one_line(call("gc", "--min-age-days", "0", "--registry", f"sqlite:///{broken}"), "not a database")
    assert store.exists(digest)


def test_gc_refuses_a_store_that_does_not_exist(registry: ModelRegistry, tmp_path: Path) -> None:
    registry.register(version_entry("ner", 1))
    absent = tmp_path / "sotre"
    for more in ((), ("--dry-run",)):
        one_line(call("gc", "--store", absent.as_uri(), *more), f"The store {absent.as_uri()} does not exist")
    assert not absent.exists()


def test_mirror_copies_what_is_not_there_yet(settings: Settings, tmp_path: Path) -> None:
    digest = open_store(settings.resolved_store_uri()).put_folder(OLD_ARTIFACT).digest
    target_uri = (tmp_path / "there").as_uri()
    for _ in range(2):
        result = call("mirror", settings.resolved_store_uri(), target_uri)
        assert result.exit_code == 0, result.stderr
        assert "has 1 folders" in result.stdout
    assert open_store(target_uri).exists(digest)


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
