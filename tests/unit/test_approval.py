"""What a person reads before a promotion, and the notes that the registries keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.admin.approval import approval_markdown
from compileflow.admin.promote import check_promotable, note_in_each
from compileflow.catalog import open_registry
from compileflow.errors import StoreError, VerdictError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.testing.registries import version_entry
from tests.conftest import ModelFactory
from tests.steps import Pipeline
from tests.unit.attested_artifacts import stored_entry


def test_form_shows_verdict_changed_answers_latency_and_report(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    version = pipeline.run(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews"))
    text = approval_markdown(version, "production", pipeline.settings)
    lines = text.splitlines()
    assert lines[0] == "# Promote reviews version 1 to production?"
    assert "- verdict: **pass**" in lines
    assert any(line.startswith("0 of the answers to ") for line in lines)
    assert any(" (batch x tokens): source model " in line and ", ratio " in line for line in lines)
    assert f"[file in the store]({version.report_uri})" in text

    # Whoever writes to the registry names another report, and writes Markdown into texts.
    forged = version.model_copy(
        update={
            "report_uri": "javascript://x/manifests/sha256/" + "5" * 64 + ".json",
            "source_uri": "`![](https://evil.example)`",
            "flow_run_id": "x) [y](https://evil.example",
        }
    )
    shown = approval_markdown(forged, "production", pipeline.settings)
    assert f"[file in the store]({version.report_uri})" in shown
    assert "- source model: `'![](https://evil.example)'` at " in shown
    assert "javascript" not in shown
    assert "evil.example" not in shown.replace("`'![](https://evil.example)'`", "")


def test_version_whose_report_is_lost_is_shown_with_that_fact(settings: Settings) -> None:
    version = open_registry(settings.resolved_registry_uri()).register(version_entry("ner", 1))
    assert "The report cannot be read" in approval_markdown(version, "staging", settings)


def test_warned_version_may_be_archived_but_not_served(settings: Settings) -> None:
    entry = version_entry("ner", 1).model_copy(update={"verdict": "warn"})
    version = open_registry(settings.resolved_registry_uri()).register(entry)
    check_promotable([version], "archived", settings)
    with pytest.raises(VerdictError, match="verdict warn"):
        check_promotable([version], "production", settings)


@pytest.mark.parametrize("force", [False, True])
def test_version_whose_artifact_is_lost_may_be_archived_but_not_served(settings: Settings, force: bool) -> None:
    entry = stored_entry(settings, "ner")
    version = open_registry(settings.resolved_registry_uri()).register(entry)
    check_promotable([version], "production", settings, force=force)
    (settings.home_dir / "store" / "manifests" / "sha256" / f"{entry.artifact_digest}.json").unlink()
    check_promotable([version], "archived", settings, force=force)
    with pytest.raises(StoreError, match=r"^ner version 1 cannot enter production: file:///\S+ does not hold"):
        check_promotable([version], "production", settings, force=force)


def test_note_is_kept_in_every_registry_that_has_the_artifact(settings: Settings, tmp_path: Path) -> None:
    uris = [f"sqlite:///{tmp_path / name}.db" for name in ("first", "second", "third")]
    for uri in uris[:2]:
        open_registry(uri).register(version_entry("ner", 1))
    note_in_each("ner", 1, registry_uris=uris, settings=settings, who="ann", reason="rejected: slow")
    for uri in uris[:2]:
        (note,) = open_registry(uri).promotions("ner", 1)
        assert (note.who, note.reason, note.stage) == ("ann", "rejected: slow", "none")
