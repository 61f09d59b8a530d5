"""The catalog: names of plugins, entry points of third parties, lazy imports."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compileflow import catalog
from compileflow.artifact.open import open_artifact
from compileflow.cli.targets import targets as list_targets
from compileflow.contracts import Target
from compileflow.errors import LoadError, SpecError
from compileflow.settings import Settings
from tests.unit.test_lazy_import import heavy_modules_after

OLD_ARTIFACT = Path(__file__).parents[1] / "artifacts" / "v1-torchscript"


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a distribution on sys.path that names a target, a store, and a target that is ours already."""
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[compileflow.targets]\nacme = acme_plugin:AcmeTarget\nonnx-runtime = acme_plugin:AcmeTarget\n"
        "[compileflow.stores]\nacme = acme_plugin:AcmeStore\n"
    )
    (tmp_path / "acme_plugin.py").write_text(
        "class AcmeTarget:\n    name = 'acme'\n"
        "class AcmeStore:\n    def __init__(self, uri, settings):\n        self.uri = uri\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_plugin", raising=False)
    catalog._with_entry_points.cache_clear()
    yield tmp_path
    catalog._with_entry_points.cache_clear()


def test_every_target_has_the_name_it_is_found_by() -> None:
    assert catalog.target_names() == tuple(sorted(catalog.TARGETS))
    for name in catalog.target_names():
        target = catalog.get_target(name)
        assert isinstance(target, Target)
        assert target.name == name


def test_unknown_target_lists_the_choices() -> None:
    with pytest.raises(SpecError, match="Unknown target 'onnxruntime'") as caught:
        catalog.get_target("onnxruntime")
    assert all(name in caught.value.hint for name in catalog.TARGETS)


def test_unknown_scheme_lists_the_choices(settings: Settings) -> None:
    for ask, choice in (
        (lambda: catalog.get_source("ftp", settings), "hf"),
        (lambda: catalog.open_store("ftp://host/x"), "file"),
        (lambda: catalog.open_registry("ftp://host/x"), "sqlite"),
    ):
        with pytest.raises(SpecError, match="'ftp'") as caught:
            ask()
        assert choice in caught.value.hint


@pytest.mark.usefixtures("third_party")
def test_installed_third_party_is_found_by_name() -> None:
    assert "acme" in catalog.target_names()
    assert catalog.get_target("acme").name == "acme"
    assert catalog.open_store("acme://bucket").uri == "acme://bucket"


@pytest.mark.usefixtures("third_party")
def test_third_party_cannot_replace_a_target_of_ours() -> None:
    assert type(catalog.get_target("onnx-runtime")).__module__ == "compileflow.targets.onnx_runtime"


@pytest.mark.parametrize("plugin", ["import compileflow.gone\n", "class Renamed: ...\n", "x =\n", "1 / 0\n"])
def test_target_that_cannot_be_imported_is_listed_with_the_reason(
    third_party: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (third_party / "acme_plugin.py").write_text(plugin)
    with pytest.raises(SpecError, match="'acme' cannot be imported from acme_plugin:AcmeTarget") as caught:
        catalog.get_target("acme")
    assert "Update or uninstall" in caught.value.hint
    list_targets(as_json=True)
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"acme", *catalog.TARGETS}
    assert not rows["acme"]["can_run"]
    assert rows["acme"]["reason"] == caught.value.message.rstrip(".")
    assert rows["torchscript"]["can_run"]


def test_artifact_of_a_target_that_cannot_be_imported_says_why(third_party: Path, tmp_path: Path) -> None:
    (third_party / "acme_plugin.py").write_text("raise RuntimeError('no licence')")
    folder = Path(shutil.copytree(OLD_ARTIFACT, tmp_path / "artifact"))
    data = json.loads((folder / "manifest.json").read_text("utf-8"))
    data["target"]["name"] = "acme"
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    artifact = open_artifact(folder)
    with pytest.raises(
        LoadError, match=r"needs its target: .*'acme' cannot be imported from acme_plugin:AcmeTarget: no licence"
    ) as caught:
        artifact.load(artifact.component("default"), device=None, threads=None)
    assert "Update or uninstall" in caught.value.hint


def test_listing_and_probing_load_nothing_heavy() -> None:
    code = (
        "from compileflow.catalog import get_target, target_names\n"
        "names = target_names()\n"
        "assert names\n"
        "for name in names:\n"
        "    get_target(name).probe()"
    )
    assert heavy_modules_after(code) == []
