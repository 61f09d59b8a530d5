"""Which versions of a runtime can load a compiled model, by the rule of its target."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.artifact.runtime import check_runtime, runtime_needs
from compileflow.catalog import TARGETS, get_target
from compileflow.contracts import Capabilities
from compileflow.errors import LoadError, ManifestError
from compileflow.spec import Precision
from compileflow.testing.targets import hide_distributions
from tests.unit.refused_loads import pretend_installed


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_names_its_runtime_and_takes_the_version_that_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = get_target(name)
    toolchain = dict.fromkeys(target.capabilities.runtime, "2.9.1")
    assert toolchain
    for distribution, version in toolchain.items():
        pretend_installed(tmp_path, distribution, version)
    monkeypatch.syspath_prepend(tmp_path)
    check_runtime(target, toolchain)


@pytest.mark.parametrize(
    ("name", "distribution", "compiled", "fitting", "unfit"),
    [
        ("torchscript", "torch", "2.13.1+cpu", ("2.13.0", "2.14.0+cu130"), ("2.12.1", "3.0.0", "1.13.1")),
        ("aot-inductor", "torch", "2.13.1", ("2.13.0+cpu", "2.13.2", "2.13.0rc1"), ("2.12.1", "2.14.0", "3.13.0")),
        ("onnx-runtime", "onnxruntime", "1.31.1", ("1.31.0", "1.32.0", "2.0.0"), ("1.30.9", "1.3.1")),
        ("openvino", "openvino", "2026.4.1", ("2026.4.0", "2027.0.0"), ("2026.3.1", "2025.4.1")),
        ("neuron", "torch-neuron", "1.13.1.2.11.13.0", ("1.13.1.2.11.13.0",), ("1.13.1.2.11.12.0", "1.12.1.2.9")),
        ("neuronx", "torch-neuronx", "2.9.0.2.15.3+a", ("2.9.0.2.15.3+b", "2.9.1.1"), ("2.8.0.2.16", "2.13.0")),
        ("blade", "torch_blade", "0.2.0+1.12.0", ("0.2.1",), ("0.3.0", "0.1.0")),
        ("hyperdex", "hyperdex-toolchain", "1.5.1", ("1.5.0", "1.5.2"), ("1.4.9", "1.6.0")),
    ],
)
def test_other_versions_load_or_not(
    name: str,
    distribution: str,
    compiled: str,
    fitting: tuple[str, ...],
    unfit: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = get_target(name)
    for version in fitting:
        pretend_installed(tmp_path / version, distribution, version)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / version)
            check_runtime(target, {distribution: compiled})
    for version in (*unfit, "newest"):
        pretend_installed(tmp_path / version, distribution, version)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / version)
            with pytest.raises(LoadError, match=f"{name} needs {distribution} ") as caught:
                check_runtime(target, {distribution: compiled})
        assert f" (compiled with {compiled}), found {version}." in str(caught.value)
        assert f"'{distribution}" in caught.value.hint


def test_all_that_does_not_fit_is_named_with_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, "torch", "2.7.0")
    monkeypatch.syspath_prepend(tmp_path)
    hide_distributions(monkeypatch, "torch_blade")
    with pytest.raises(LoadError) as caught:
        check_runtime(get_target("blade"), {"torch": "1.12.0", "torch_blade": "0.2.0", "transformers": "5.23.0"})
    assert caught.value.message == (
        "blade needs torch_blade ==0.2.* (compiled with 0.2.0), found none; "
        "and torch ==1.12.* (compiled with 1.12.0), found 2.7.0."
    )
    assert caught.value.hint.startswith(
        "Run: pip install 'torch_blade==0.2.*' 'torch==1.12.*', with torch_blade from "
    )


@pytest.mark.parametrize("name", ["neuron", "neuronx", "hyperdex"])
def test_vendors_runtime_is_installed_from_the_vendors_index(name: str) -> None:
    target = get_target(name)
    (distribution,) = target.capabilities.runtime
    with pytest.raises(LoadError, match="found none") as caught:
        check_runtime(target, {distribution: "99.0"})
    address = "pypi.hyperaccel.ai" if name == "hyperdex" else "pip.repos.neuron.amazonaws.com"
    assert address in caught.value.hint


def test_target_without_a_runtime_rule_needs_nothing() -> None:
    can = Capabilities(hf_tasks=(), precisions=(Precision.FP32,), devices=("cpu",), dynamic_axes=True)
    assert runtime_needs(can.runtime, {"torch": "2.13.0"}) == {}


def test_version_of_one_part_is_that_and_zero() -> None:
    rules = {"torch": "{major} {minor} {release} {next_major}"}
    assert runtime_needs(rules, {"torch": "25"}) == {"torch": "25 25.0 25 26"}


def test_recorded_version_that_is_not_a_version_is_an_error_of_the_manifest() -> None:
    with pytest.raises(
        ManifestError, match=r"names torch 'newest', which is not a version.*Compile the model again"
    ):
        runtime_needs({"torch": ">={minor}"}, {"torch": "newest"})
