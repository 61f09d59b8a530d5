"""A promoted version is proven again with today's runtimes, and flagged once when it does not pass any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compileflow.admin import revalidate
from compileflow.admin.promote import promote_version
from compileflow.admin.revalidate import Revalidation, revalidate_version, versions_in_stages
from compileflow.artifact.attestations.envelopes import put_statement
from compileflow.artifact.attestations.statements import ValidationRun, verdict_statement
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import Availability, ModelVersion
from compileflow.errors import LoadError, MeasurementError, RegistryError, VerdictError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps import validate as validate_step
from compileflow.targets.torchscript import TorchScriptTarget
from compileflow.validation.settings import ValidationSettings
from tests.conftest import ModelFactory
from tests.steps import Pipeline
from tests.unit.attested_artifacts import judged, make_keys, stored_entry

VALIDATION = ValidationSettings(latency_pairs=5, max_examples=340)


@pytest.fixture
def version(pipeline: Pipeline, tiny_model: ModelFactory) -> ModelVersion:
    registered = pipeline.run(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews"))
    return open_registry(pipeline.registry_uri).set_stage("reviews", registered.version, "staging", who="ann")


def again(pipeline: Pipeline, version: ModelVersion) -> Revalidation:
    return revalidate_version(
        version, pipeline.registry_uri, validation=VALIDATION, timeout_s=600, settings=pipeline.settings
    )


def notes(pipeline: Pipeline) -> list[str]:
    promotions = open_registry(pipeline.registry_uri).promotions("reviews", 1)
    return [promotion.reason for promotion in promotions if promotion.who == "revalidate"]


@pytest.mark.slow
def test_version_that_does_not_load_any_more_is_flagged_once_until_it_passes_again(
    pipeline: Pipeline, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [
        found.version for found in versions_in_stages(pipeline.registry_uri, pipeline.settings, stages=["staging"])
    ] == [1]
    outcome = again(pipeline, version)
    assert (outcome.outcome, outcome.is_news) == ("passes", False)
    # Without the cache: the registered version was validated once before.
    assert pipeline.counts["validate"] == 2

    def refuse(*_: object, **__: object) -> None:
        raise LoadError("torch 9.9 cannot load this artifact.", hint="Compile it again.")

    with monkeypatch.context() as patched:
        patched.setattr(validate_step, "run_in_child", refuse)
        outcomes = [again(pipeline, version) for _ in range(2)]
    assert [(outcome.outcome, outcome.is_news) for outcome in outcomes] == [
        ("regressed", True),
        ("regressed", False),
    ]
    assert notes(pipeline) == ["no longer passes: torch 9.9 cannot load this artifact. Compile it again."]
    assert open_registry(pipeline.registry_uri).get("reviews", "staging").version == 1

    assert again(pipeline, version).is_news
    assert [note.partition(":")[0] for note in notes(pipeline)] == ["no longer passes", "passes again"]


@pytest.mark.slow
def test_verdict_that_became_fail_keeps_the_version_from_being_promoted(
    pipeline: Pipeline, version: ModelVersion, tmp_path: Path
) -> None:
    suite = tmp_path / "strict.yaml"
    suite.write_text(
        "schema_version: 1\nname: strict\ngates:\n"
        "  - gate: no_difference\n    says: largest difference\n    table: comparisons\n"
        "    type: expect_column_maximum_to_be_at_most\n    column: max_abs_diff\n    limit: -1.0\n",
        "utf-8",
    )
    validation = VALIDATION.model_copy(update={"suite_path": str(suite)})
    outcome = revalidate_version(
        version, pipeline.registry_uri, validation=validation, timeout_s=600, settings=pipeline.settings
    )
    assert outcome.outcome == "regressed"
    assert notes(pipeline)[0].startswith("no longer passes: fail: no_difference")
    with pytest.raises(VerdictError, match="FAILED"):
        promote_version(
            "reviews",
            1,
            "production",
            registry_uris=[pipeline.registry_uri],
            settings=pipeline.settings,
            who="ann",
        )


def test_machine_without_the_device_says_nothing_about_a_version(
    pipeline: Pipeline, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    unavailable = Availability(can_compile=True, can_run=False, reason="this machine has no device")
    monkeypatch.setattr(TorchScriptTarget, "probe", lambda _: unavailable)
    outcome = again(pipeline, version)
    assert (outcome.outcome, notes(pipeline)) == ("not checked", [])
    assert "no device" in outcome.reason


def test_version_whose_artifact_is_lost_has_regressed(settings: Settings) -> None:
    uri = settings.resolved_registry_uri()
    version = open_registry(uri, settings).register(stored_entry(settings, "reviews"))
    next((settings.home_dir / "store").glob("blobs/sha256/*/*")).unlink()
    outcome = revalidate_version(version, uri, validation=VALIDATION, timeout_s=600, settings=settings)
    assert outcome.outcome == "regressed"
    assert "missing or altered" in outcome.reason


def test_verdict_fail_is_lifted_by_no_revalidation_unless_another_one_gave_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile may have asked for more than a revalidation does."""
    uri = settings.resolved_registry_uri()
    version = open_registry(uri, settings).register(stored_entry(settings, "reviews"))
    store = open_store(settings.resolved_store_uri(), settings)

    def stop(*_: object, **__: object) -> None:
        raise MeasurementError("It was measured.")

    def outcome_after(verdict: ValidationRun) -> Revalidation:
        put_statement(store, version.artifact_digest, verdict_statement(version.artifact_digest, verdict), None)
        return revalidate_version(version, uri, validation=VALIDATION, timeout_s=600, settings=settings)

    monkeypatch.setattr(revalidate, "validate_artifact", stop)
    refused = outcome_after(judged("fail"))
    assert refused.outcome == "regressed"
    assert refused.reason == "the last verdict on its artifact is FAILED, and a compile gave it"
    assert (
        outcome_after(judged("warn")).reason == "the last verdict on its artifact is WARNED, and a compile gave it"
    )
    again = replace(judged("fail"), is_revalidation=True)
    for verdict in (again, judged("pass")):
        assert outcome_after(verdict).reason == "It was measured."
    refused = outcome_after(replace(again, user_suite_digest="7" * 64))
    assert refused.outcome == "regressed"
    assert refused.reason.endswith("is FAILED, and a revalidation with another suite gave it")


def test_name_that_no_model_has_is_an_error(settings: Settings) -> None:
    uri = settings.resolved_registry_uri()
    open_registry(uri, settings).register(stored_entry(settings, "reviews"))
    assert versions_in_stages(uri, settings, stages=["none"], names=["reviews"])
    with pytest.raises(RegistryError, match="has no model 'review'"):
        versions_in_stages(uri, settings, stages=["none"], names=["review"])


def test_run_with_a_key_revalidates_only_what_a_trusted_key_signed(settings: Settings, tmp_path: Path) -> None:
    uri = settings.resolved_registry_uri()
    version = open_registry(uri, settings).register(stored_entry(settings, "reviews"))
    store = open_store(settings.resolved_store_uri(), settings)
    signing = settings.model_copy(update={"signing_key": make_keys(tmp_path).private})
    for lack in ("the store has no verdict statement on it", "nor a trusted key signed its verdict statement"):
        outcome = revalidate_version(version, uri, validation=VALIDATION, timeout_s=600, settings=signing)
        assert outcome.outcome == "not checked"
        assert outcome.reason.startswith("its last verdict does not count: ")
        assert outcome.reason.endswith(lack)
        put_statement(store, version.artifact_digest, verdict_statement(version.artifact_digest, judged()), None)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("source_digest", "f" * 64, "names the source model ffffffffffff"),
        ("spec", {"precision": "bf16"}, "names another request"),
        ("spec", {"precision": 5}, "names another request"),
        ("artifact_digest", "f" * 64, "names the artifact ffffffffffff"),
        ("artifact_digest", "", "names the artifact none"),
        ("figures", {"size_bytes": float("inf"), "peak_rss_bytes": float("nan")}, ""),
    ],
)
def test_version_that_contradicts_its_artifact_is_flagged(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, says: str
) -> None:
    """Whoever can write to the registry could otherwise let one artifact vouch for another."""
    uri = settings.resolved_registry_uri()
    entry = stored_entry(settings, "reviews")
    bent = entry.spec | value if field == "spec" else value
    version = open_registry(uri, settings).register(entry.model_copy(update={field: bent}))

    def stop(*_: object, **__: object) -> None:
        raise MeasurementError("This artifact is not to be measured.")

    monkeypatch.setattr(revalidate, "validate_artifact", stop)
    outcomes = [
        revalidate_version(version, uri, validation=VALIDATION, timeout_s=600, settings=settings) for _ in range(2)
    ]
    notes = [promotion.reason for promotion in open_registry(uri, settings).promotions("reviews", 1)]
    if not says:
        assert ([outcome.outcome for outcome in outcomes], notes) == (["not checked", "not checked"], [])
        return
    assert [(outcome.outcome, outcome.is_news) for outcome in outcomes] == [
        ("regressed", True),
        ("regressed", False),
    ]
    (note,) = notes
    assert note.startswith("no longer passes: ")
    assert says in note
