"""RegistryConformance: tests of the behaviour of every model registry, for a registry's test class to inherit.

The tests make few calls: on a registry behind a network a call takes time, and a new process takes seconds.
"""

# ruff: noqa: D102, S101 - these are pytest tests, whose names say what they check.

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import ClassVar, cast

import pytest

from compileflow.contracts import ModelRegistry, Stage, VersionEntry, VersionFiles
from compileflow.errors import RegistryError
from compileflow.testing.processes import at_once, other_process, resolve, say

ARTIFACT_FILES = {"manifest.json": b'{"schema_version": 2}\n', "default/model.bin": bytes(range(256)) * 64}
REPORT_FILES = {"report.json": b'{"verdict": "pass"}\n', "report.html": b"<!doctype html><p>pass</p>\n"}
TEST_FILES = {
    "inputs.json": b'["a text"]\n',
    "inference_params.json": b"{}\n",
    "predictions.json": b'[{"label": "POSITIVE", "score": 0.75}]\n',
}


class RegistryConformance:
    """Inherit this class and define the fixture `registry_uri`: the URI of a new, empty registry.

    For a registry outside the catalog, set `opener`.
    """

    opener: ClassVar[str] = "compileflow.catalog:open_registry"

    @pytest.fixture
    def registry_uri(self) -> str:
        """Return the URI of a new, empty registry."""
        raise NotImplementedError("define the fixture registry_uri")

    @pytest.fixture
    def registry(self, registry_uri: str) -> ModelRegistry:
        """Open the registry under test."""
        model_registry: ModelRegistry = resolve(self.opener)(registry_uri)
        return model_registry

    def test_registered_version_holds_its_entry(self, registry: ModelRegistry) -> None:
        entry = version_entry("ner", 1)
        version = registry.register(entry)
        assert version.version == 1
        assert version.created_at
        assert version.stage == "none"
        assert version.entry == entry
        assert registry.get("ner", 1) == version

    def test_same_artifact_twice_is_one_version(self, registry: ModelRegistry) -> None:
        version = registry.register(version_entry("ner", 1))
        again = registry.register(version_entry("ner", 1))
        assert again == version
        assert len(registry.versions("ner")) == 1

    def test_registered_version_is_a_value_to_register_again(self, registry: ModelRegistry) -> None:
        version = registry.register(version_entry("ner", 1))
        assert registry.register(version) == version

    def test_distinct_artifacts_are_numbered_from_one(self, registry: ModelRegistry) -> None:
        numbers = [registry.register(version_entry("ner", number)).version for number in range(1, 4)]
        assert numbers == [1, 2, 3]

    def test_each_name_counts_for_itself(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        assert registry.register(version_entry("keywords", 2)).version == 1

    def test_versions_are_newest_first(self, registry: ModelRegistry) -> None:
        for number in range(1, 11):
            registry.register(version_entry("ner", number))
        assert [version.version for version in registry.versions("ner")] == list(range(10, 0, -1))

    def test_versions_without_a_name_are_those_of_all(self, registry: ModelRegistry) -> None:
        assert list(registry.versions()) == []
        registry.register(version_entry("ner", 1))
        registry.register(version_entry("keywords", 2))
        assert {(version.name, version.version) for version in registry.versions()} == {
            ("ner", 1),
            ("keywords", 1),
        }

    def test_find_gives_every_name_of_an_artifact(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        registry.register(version_entry("ner", 2))
        registry.register(version_entry("ner-eu", 1))
        versions = registry.find(version_entry("ner", 1).artifact_digest)
        assert {(version.name, version.version) for version in versions} == {("ner", 1), ("ner-eu", 1)}
        for absent in ("f" * 64, '"', "'"):
            assert list(registry.find(absent)) == []

    def test_unknown_name_lists_similar_names(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("sentiment-en", 1))
        registry.register(version_entry("keywords", 2))
        for call in (
            lambda: registry.versions("sentiment"),
            lambda: registry.get("sentiment", 1),
            lambda: registry.get("sentiment", "production"),
            lambda: registry.set_stage("sentiment", 1, "staging", who="ann"),
            lambda: registry.promotions("sentiment", 1),
        ):
            with pytest.raises(RegistryError, match="'sentiment'") as error_info:
                call()
            assert "sentiment-en" in error_info.value.hint

    def test_unknown_name_in_an_empty_registry_says_so(self, registry: ModelRegistry) -> None:
        with pytest.raises(RegistryError, match="empty"):
            registry.versions("ner")

    def test_unknown_number_lists_the_numbers(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        registry.register(version_entry("ner", 2))
        for call in (
            lambda: registry.get("ner", 3),
            lambda: registry.set_stage("ner", 3, "staging", who="ann"),
            lambda: registry.promotions("ner", 3),
        ):
            with pytest.raises(RegistryError, match="no version 3") as error_info:
                call()
            assert "2, 1" in error_info.value.hint

    def test_stage_that_no_version_is_in_lists_those_there_are(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        registry.register(version_entry("ner", 2))
        registry.set_stage("ner", 1, "staging", who="ann")
        for stage in ("production", "live"):
            with pytest.raises(RegistryError, match=f"'{stage}'") as error_info:
                registry.get("ner", stage)
            assert "staging (1)" in error_info.value.hint
            assert "none (2)" in error_info.value.hint

    def test_stage_that_does_not_exist_cannot_be_set(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        with pytest.raises(RegistryError, match="'live'") as error_info:
            registry.set_stage("ner", 1, cast(Stage, "live"), who="ann")
        assert "none, staging, production, archived" in error_info.value.hint
        assert registry.get("ner", 1).stage == "none"

    def test_version_is_found_by_its_stage(self, registry: ModelRegistry) -> None:
        for number in (1, 2, 3):
            registry.register(version_entry("ner", number))
        staging_version = registry.set_stage("ner", 2, "staging", who="ann")
        assert staging_version == registry.get("ner", 2) == registry.get("ner", "staging")
        assert staging_version.stage == "staging"
        assert registry.get("ner", "none").version == 3
        production_version = registry.set_stage("ner", 2, "production", who="ann")
        assert registry.get("ner", "production") == production_version
        with pytest.raises(RegistryError, match="'staging'"):
            registry.get("ner", "staging")

    @pytest.mark.parametrize("stage", ["staging", "production"])
    def test_stage_is_held_by_one_version_and_the_one_before_is_archived(
        self, registry: ModelRegistry, stage: Stage
    ) -> None:
        for name in ("ner", "keywords"):
            for number in (1, 2):
                registry.register(version_entry(name, number))
        for name, number in (("ner", 1), ("keywords", 1), ("ner", 2)):
            registry.set_stage(name, number, stage, who="ann", reason="tested")
        assert [version.stage for version in registry.versions("ner")] == [stage, "archived"]
        assert registry.get("keywords", stage).version == 1
        promotions = registry.promotions("ner", 1)
        assert [promotion.stage for promotion in promotions] == [stage, "archived"]
        assert "version 2" in promotions[-1].reason

    def test_any_number_of_versions_is_archived_or_in_no_stage(self, registry: ModelRegistry) -> None:
        for number in (1, 2, 3):
            registry.register(version_entry("ner", number))
            registry.set_stage("ner", number, "archived", who="ann")
        assert [version.stage for version in registry.versions("ner")] == ["archived"] * 3
        for number in (1, 2):
            registry.set_stage("ner", number, "none", who="ann")
        assert [version.stage for version in registry.versions("ner")] == ["archived", "none", "none"]

    def test_promotions_tell_who_and_why_oldest_first(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        assert list(registry.promotions("ner", 1)) == []
        changes = [("staging", "ann", 'looks good: 0.5 % faster, "no" flips'), ("production", "Jörg", "")]
        changes += [("none", "ann", "it's late"), ("production", "bob", "forced; " + "why " * 200)]
        for stage, who, reason in changes:
            registry.set_stage("ner", 1, cast(Stage, stage), who=who, reason=reason)
        promotions = registry.promotions("ner", 1)
        assert [(promotion.stage, promotion.who, promotion.reason) for promotion in promotions] == changes
        assert [promotion.at for promotion in promotions] == sorted(promotion.at for promotion in promotions)

    def test_note_stands_among_the_promotions_and_moves_nothing(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        stages: tuple[Stage, ...] = ("none", "production")
        for stage in stages:
            registry.set_stage("ner", 1, stage, who="ann")
            note = registry.note("ner", 1, who="bob", reason='no longer passes: "0.7" < 0.98')
            assert (note.stage, note.who) == (stage, "bob")
            assert registry.get("ner", 1).stage == stage
        promotions = [(promotion.stage, promotion.who) for promotion in registry.promotions("ner", 1)]
        assert promotions == [("none", "bob"), ("production", "ann"), ("production", "bob")]
        assert registry.promotions("ner", 1)[-1] == note
        with pytest.raises(RegistryError, match="no version 2"):
            registry.note("ner", 2, who="bob", reason="")

    def test_same_stage_twice_is_one_promotion(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        version = registry.set_stage("ner", 1, "production", who="ann")
        assert registry.set_stage("ner", 1, "production", who="ann") == version
        assert [promotion.stage for promotion in registry.promotions("ner", 1)] == ["production"]

    def test_registering_again_leaves_the_stage(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        version = registry.set_stage("ner", 1, "production", who="ann")
        assert registry.register(version_entry("ner", 1)) == version
        assert list(registry.find(version.artifact_digest)) == [version]

    def test_source_leads_to_its_compiled_versions_and_back(self, registry: ModelRegistry) -> None:
        uri, similar_uri = "hf://owner/it's a name?x=1", "hf://owner/it's a name"
        for number, source_uri in ((1, uri), (2, similar_uri), (3, uri)):
            registry.register(version_entry("ner", number).model_copy(update={"source_uri": source_uri}))
        versions = registry.compiled_from(uri)
        assert [(version.version, version.source_uri) for version in versions] == [(3, uri), (1, uri)]
        assert list(registry.compiled_from("hf://owner/it")) == []

    def test_figures_that_are_not_finite_come_back(self, registry: ModelRegistry) -> None:
        figures = {"speedup": math.nan, "worst": math.inf, "least": -math.inf, "tiny": 5e-324, "third": 1 / 3}
        entry = version_entry("ner", 1).model_copy(update={"figures": figures})
        version = registry.register(entry)
        for copy in (version, registry.get("ner", 1)):
            # As text, because NaN is not equal to itself.
            assert json.dumps(copy.figures, sort_keys=True) == json.dumps(figures, sort_keys=True)

    def test_long_strings_come_back_whole(self, registry: ModelRegistry) -> None:
        spec = {"notes": "".join(chr(0x20 + n % 0x3000) for n in range(20_000)), "text": "a\n\t'\"\\%{}\U0001d11e"}
        entry = version_entry("ner", 1).model_copy(update={"spec": spec, "source_uri": "hf://" + "n" * 6_000})
        assert registry.register(entry).entry == entry
        assert registry.get("ner", 1).entry == entry
        assert len(registry.compiled_from(entry.source_uri)) == 1

    def test_near_and_long_names_are_models_of_their_own(self, registry: ModelRegistry) -> None:
        names = ["ner-a", "ner.a", "ner_a", "NER-A", "nera", "n" * 127, "n" * 128]
        for number, name in enumerate(names):
            assert registry.register(version_entry(name, number)).version == 1
        for number, name in enumerate(names):
            assert [version.entry for version in registry.versions(name)] == [version_entry(name, number)]

    def test_files_may_be_given_with_the_entry(self, registry: ModelRegistry, tmp_path: Path) -> None:
        files = version_files(tmp_path / "given")
        entry = version_entry("ner", 1)
        version = registry.register(entry, files)
        assert version.entry == entry
        assert registry.register(entry, files) == registry.register(entry) == version
        required_files = VersionFiles(files.artifact, files.report)
        assert registry.register(version_entry("ner", 2), required_files).version == 2
        assert files_below(tmp_path / "given") == {
            f"{folder}/{name}": body
            for folder, bodies in (
                ("artifact", ARTIFACT_FILES),
                ("report", REPORT_FILES),
                ("test_files", TEST_FILES),
            )
            for name, body in bodies.items()
        }

    def test_reopened_registry_holds_everything(self, registry: ModelRegistry, registry_uri: str) -> None:
        versions = [registry.register(version_entry("ner", number)) for number in (1, 2)]
        reopened: ModelRegistry = resolve(self.opener)(registry_uri)
        assert list(reopened.versions()) == versions[::-1]

    def test_four_processes_register_one_artifact_as_one_version(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        arguments = (self.opener, registry_uri, "1")
        numbers = at_once(
            "compileflow.testing.registries:register_one", arguments, arguments, arguments, arguments
        )
        assert numbers == ["1"] * 4
        assert len(registry.versions("ner")) == 1

    def test_two_processes_register_two_artifacts_without_a_gap(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        calls = [(self.opener, registry_uri, str(n)) for n in (1, 2)]
        numbers = at_once("compileflow.testing.registries:register_one", *calls)
        assert sorted(numbers) == ["1", "2"]
        assert [version.version for version in registry.versions("ner")] == [2, 1]

    def test_versions_are_whole_after_the_writer_is_killed(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        for start in (1000, 2000):
            arguments = (self.opener, registry_uri, str(start))
            with other_process("compileflow.testing.registries:register_on_and_on", *arguments) as writer:
                numbers_printed = [writer.line() for _ in range(2)]
                # Kill each writer at a different point of its next write.
                time.sleep(0.0000017 * start)
                numbers_printed += writer.kill()
            # The same call completes the version that the kill interrupted, and does not repeat it.
            entry = version_entry("ner", start + len(numbers_printed))
            assert list(registry.find(entry.artifact_digest)) in ([], [registry.register(entry)])
            numbers = [version.version for version in registry.versions("ner")]
            # A number that a killed call had reserved may stay unused.
            assert numbers == sorted(set(numbers), reverse=True)
            assert set(numbers) >= {int(number) for number in numbers_printed}
        for version in registry.versions("ner"):
            assert version.entry == version_entry("ner", int(version.artifact_digest, 16))
            assert list(registry.find(version.artifact_digest)) == [version]


def version_files(root: Path) -> VersionFiles:
    """Write small folders with the files of a registration."""
    folders = {"artifact": ARTIFACT_FILES, "report": REPORT_FILES, "test_files": TEST_FILES}
    for folder, bodies in folders.items():
        for name, body in bodies.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    return VersionFiles(**{folder: root / folder for folder in folders})


def files_below(root: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def version_entry(name: str, number: int) -> VersionEntry:
    """Return a complete entry; `number` determines the artifact's digest."""
    return VersionEntry(
        name=name,
        target="onnx-runtime",
        spec={"target": "onnx-runtime", "hf_task": "token-classification", "components": [{"name": "default"}]},
        source_uri="hf://owner/name",
        source_revision="c" * 40,
        source_digest="5" * 64,
        artifact_uri="file:///store/manifests/sha256/x.json",
        artifact_digest=f"{number:064x}",
        verdict="pass",
        figures={"latency_p50_ms": 1.5, "agreement": 1.0},
        report_uri="file:///store/manifests/sha256/y.json",
        report_digest="7" * 64,
        flow_run_id=None,
    )


def register_one(opener: str, uri: str, number: str) -> None:
    """Register one artifact and print its version's number; runs in another process."""
    say(resolve(opener)(uri).register(version_entry("ner", int(number))).version)


def register_on_and_on(opener: str, uri: str, start: str) -> None:
    """Register one artifact after another and print each number afterwards; runs in another process."""
    registry = resolve(opener)(uri)
    number = int(start)
    while True:
        say(registry.register(version_entry("ner", number)).version)
        number += 1
