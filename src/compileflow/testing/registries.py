"""RegistryConformance: what every model registry must do, as tests that a registry's own test class inherits."""

# ruff: noqa: D102, S101 - these are pytest tests, whose names say what they check.

from __future__ import annotations

import time
from typing import ClassVar

import pytest

from compileflow.errors import RegistryError
from compileflow.testing.processes import at_once, other_process, resolve, say
from compileflow.versions import ModelRegistry, VersionEntry


class RegistryConformance:
    """Inherit it, and define the fixture `registry_uri`: the URI of a new, empty registry.

    A registry that is not in the catalog sets `opener`.
    """

    opener: ClassVar[str] = "compileflow.catalog:open_registry"

    @pytest.fixture
    def registry_uri(self) -> str:
        """Return the URI of a new, empty registry."""
        raise NotImplementedError("define the fixture registry_uri")

    @pytest.fixture
    def registry(self, registry_uri: str) -> ModelRegistry:
        """Open the registry under test."""
        opened: ModelRegistry = resolve(self.opener)(registry_uri)
        return opened

    def test_registered_version_holds_its_entry(self, registry: ModelRegistry) -> None:
        entry = version_entry("ner", 1)
        version = registry.register(entry)
        assert version.version == 1
        assert version.created_at
        assert version.model_dump(exclude={"version", "created_at"}) == entry.model_dump()
        assert registry.get("ner", 1) == version

    def test_same_artifact_twice_is_one_version(self, registry: ModelRegistry) -> None:
        first = registry.register(version_entry("ner", 1))
        again = registry.register(version_entry("ner", 1))
        assert again == first
        assert len(registry.versions("ner")) == 1

    def test_registered_version_is_a_value_to_register_again(self, registry: ModelRegistry) -> None:
        first = registry.register(version_entry("ner", 1))
        assert registry.register(first) == first

    def test_distinct_artifacts_are_numbered_from_one(self, registry: ModelRegistry) -> None:
        numbers = [registry.register(version_entry("ner", n)).version for n in range(1, 6)]
        assert numbers == [1, 2, 3, 4, 5]

    def test_each_name_counts_for_itself(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        assert registry.register(version_entry("keywords", 2)).version == 1

    def test_versions_are_newest_first(self, registry: ModelRegistry) -> None:
        for n in range(1, 13):
            registry.register(version_entry("ner", n))
        assert [version.version for version in registry.versions("ner")] == list(range(12, 0, -1))

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
        found = registry.find(version_entry("ner", 1).artifact_digest)
        assert {(version.name, version.version) for version in found} == {("ner", 1), ("ner-eu", 1)}
        assert list(registry.find("f" * 64)) == []

    def test_unknown_name_lists_near_names(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("sentiment-en", 1))
        registry.register(version_entry("keywords", 2))
        for ask in (lambda: registry.versions("sentiment"), lambda: registry.get("sentiment", 1)):
            with pytest.raises(RegistryError, match="'sentiment'") as caught:
                ask()
            assert "sentiment-en" in caught.value.hint

    def test_unknown_name_in_an_empty_registry_says_so(self, registry: ModelRegistry) -> None:
        with pytest.raises(RegistryError, match="empty"):
            registry.versions("ner")

    def test_unknown_number_lists_the_numbers(self, registry: ModelRegistry) -> None:
        registry.register(version_entry("ner", 1))
        registry.register(version_entry("ner", 2))
        with pytest.raises(RegistryError, match="no version 3") as caught:
            registry.get("ner", 3)
        assert "2, 1" in caught.value.hint

    def test_reopened_registry_holds_everything(self, registry: ModelRegistry, registry_uri: str) -> None:
        kept = [registry.register(version_entry("ner", n)) for n in (1, 2)]
        reopened: ModelRegistry = resolve(self.opener)(registry_uri)
        assert list(reopened.versions()) == kept[::-1]

    def test_four_processes_register_one_artifact_as_one_version(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        each = (self.opener, registry_uri, "1")
        numbers = at_once("compileflow.testing.registries:register_one", each, each, each, each)
        assert numbers == ["1"] * 4
        assert len(registry.versions("ner")) == 1

    def test_four_processes_register_four_artifacts_without_a_gap(
        self, registry: ModelRegistry, registry_uri: str
    ) -> None:
        each = [(self.opener, registry_uri, str(n)) for n in range(4)]
        numbers = at_once("compileflow.testing.registries:register_one", *each)
        assert sorted(numbers) == ["1", "2", "3", "4"]
        assert [version.version for version in registry.versions("ner")] == [4, 3, 2, 1]

    def test_rows_are_whole_after_the_writer_is_killed(self, registry: ModelRegistry, registry_uri: str) -> None:
        for attempt in range(4):
            arguments = (self.opener, registry_uri, str(1000 * attempt))
            with other_process("compileflow.testing.registries:register_on_and_on", *arguments) as other:
                told = [other.line() for _ in range(3)]
                # A different point of a later write each time.
                time.sleep(0.0017 * attempt)
                told += other.kill()
            versions = registry.versions("ner")
            assert [version.version for version in versions] == list(range(len(versions), 0, -1))
            assert len(versions) >= int(told[-1])
            for version in versions:
                assert version in registry.find(version.artifact_digest)


def version_entry(name: str, number: int) -> VersionEntry:
    """Return a complete entry; `number` decides the artifact's digest."""
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
    """Register artifact after artifact, printing each number once it is kept; runs in another process."""
    registry = resolve(opener)(uri)
    number = int(start)
    while True:
        say(registry.register(version_entry("ner", number)).version)
        number += 1
