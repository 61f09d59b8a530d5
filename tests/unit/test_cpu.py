"""CPU features: read from the cpuinfo of real machines, and checked before a model is opened."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compileflow import CompiledModel
from compileflow._process import cpu
from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.artifact.open import open_artifact
from compileflow.catalog import get_target
from compileflow.contracts import Availability
from compileflow.errors import LoadError, TargetUnavailableError
from compileflow.serving.component import LoadedComponent
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import check_available
from compileflow.targets.torchscript import TorchScriptTarget
from tests.conftest import ModelFactory
from tests.in_process import InProcess

ZEN_4 = """processor	: 0
vendor_id	: AuthenticAMD
model name	: AMD EPYC 9R14
flags		: fpu vme sse2 avx fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni

processor	: 1
flags		: fpu
"""
HASWELL = """processor	: 0
model name	: Intel(R) Xeon(R) CPU E5-2676 v3
flags		: fpu vme sse2 fma f16c avx avx2 avx512vbmi3
bugs		: avx512f
"""
GRAVITON_3 = """processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16
CPU implementer	: 0x41
"""

SetCpu = Callable[[str], None]


@pytest.fixture
def set_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetCpu:
    """Let this machine report another CPU."""

    def change(text: str) -> None:
        # A different path per text, because the features of a path are cached.
        path = tmp_path / f"cpuinfo-{len(list(tmp_path.iterdir()))}"
        path.write_text(text, "utf-8")
        monkeypatch.setattr(cpu, "CPUINFO", path)

    return change


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            ZEN_4,
            "avx avx2 avx512_bf16 avx512_vnni avx512bw avx512dq avx512f avx512vl f16c fma",
        ),
        (HASWELL, "avx avx2 f16c fma"),
        (GRAVITON_3, "asimd asimddp asimdhp bf16 i8mm sve"),
        ("processor : 0\n", ""),
    ],
)
def test_instruction_sets_are_read_off_the_first_processor(set_cpu: SetCpu, text: str, features: str) -> None:
    set_cpu(text)
    assert cpu.cpu_features() == tuple(sorted([*features.split(), platform.machine()]))


def test_system_that_does_not_say_has_its_architecture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "nothing")
    assert cpu.cpu_features() == (platform.machine(),)


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        (ZEN_4, {Precision.FP16}),
        (HASWELL, {Precision.BF16, Precision.FP16}),
        (GRAVITON_3, set()),
        (ZEN_4.replace("avx512_bf16", "amx_bf16 amx_fp16"), set()),
    ],
)
def test_precision_is_lacking_when_none_of_its_instruction_sets_is_there(
    set_cpu: SetCpu, text: str, lacking: set[Precision]
) -> None:
    set_cpu(text)
    reasons = cpu.lacking_precisions(Precision)
    assert set(reasons) == lacking
    for precision, reason in reasons.items():
        assert f"no {precision.value} instructions (" in reason
    assert cpu.lacking_precisions((Precision.FP32, Precision.INT8)) == {}


def test_missing_features_are_those_that_a_compile_had_and_this_cpu_has_not(set_cpu: SetCpu) -> None:
    set_cpu(HASWELL)
    assert cpu.missing_features(()) == ()
    assert cpu.missing_features(("avx2", "fma")) == ()
    assert cpu.missing_features(("fma", "avx512f", "avx2", "amx_int8")) == ("amx_int8", "avx512f")


@pytest.fixture
def artifact(tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path) -> Path:
    """A copy of a torchscript artifact with a garbage graph: a target that opens it reports that."""
    hf_task = HfTask.TEXT_CLASSIFICATION
    shared = in_process.compiled(tiny_model(hf_task), "torchscript", hf_task)
    folder = Path(shutil.copytree(shared, tmp_path / "artifact"))
    graph = folder / "components/default/model.pt"
    graph.write_bytes(b"garbage")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest consistently; the artifact's digest is the digest of its bytes."""
    from compileflow.contracts.digests import list_files

    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text("utf-8"))
    data["files"] = [
        record.model_dump(mode="json") for record in list_files(folder) if record.path != MANIFEST_NAME
    ]
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_artifact_for_a_cpu_that_has_more_is_refused_before_its_graph_is_opened(artifact: Path) -> None:
    rewrite(artifact, lambda data: data["target"].update(cpu_features=["a_flag_of_1", "a_flag_of_2"]))
    with pytest.raises(LoadError, match="compiled for a CPU with a_flag_of_1, a_flag_of_2, which") as caught:
        CompiledModel.from_pretrained(artifact)
    assert caught.value.hint.startswith("Compile it on a machine like this one: compileflow compile ")
    assert caught.value.hint.endswith("--target torchscript")


def test_artifact_for_this_cpu_reaches_the_target(artifact: Path) -> None:
    rewrite(artifact, lambda data: data["target"].update(cpu_features=list(cpu.cpu_features())))
    # The proof that the other loads were refused earlier.
    with pytest.raises(LoadError, match=r"model\.pt cannot be loaded by torch"):
        CompiledModel.from_pretrained(artifact)


def test_bf16_artifact_is_refused_on_a_cpu_without_it_before_its_graph_is_opened(
    artifact: Path, set_cpu: SetCpu
) -> None:
    rewrite(artifact, lambda data: data["components"]["default"].update(precision="bf16"))
    assert read_manifest(artifact).components["default"].precision is Precision.BF16
    set_cpu(HASWELL)
    with pytest.raises(LoadError, match="torchscript cannot run bf16 here: this CPU has no bf16") as caught:
        CompiledModel.from_pretrained(artifact)
    assert "compile it at another precision" in caught.value.hint
    set_cpu(GRAVITON_3)
    with pytest.raises(LoadError, match=r"model\.pt cannot be loaded by torch"):
        CompiledModel.from_pretrained(artifact)


def test_target_without_its_runtime_is_refused_before_the_cpu_is_asked(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(artifact, lambda data: data["target"].update(cpu_features=["a_flag_of_1"]))
    absent = Availability(
        can_compile=False, can_run=False, reason="torch is not installed", hint="pip install torch"
    )
    monkeypatch.setattr(TorchScriptTarget, "probe", lambda self: absent)
    with pytest.raises(LoadError, match=r"cannot run here: torch is not installed\. Try: pip install torch"):
        LoadedComponent.load(open_artifact(artifact))


@pytest.mark.parametrize("name", ["torchscript", "aot-inductor"])
def test_compile_at_a_precision_that_the_cpu_lacks_names_it_and_the_choices(set_cpu: SetCpu, name: str) -> None:
    set_cpu(HASWELL)
    target = get_target(name)
    with pytest.raises(
        TargetUnavailableError, match=f"{name} cannot compile bf16 here: this CPU has no"
    ) as caught:
        check_available(target, Precision.BF16)
    assert caught.value.hint == "Choose one of fp32, or compile on another machine."
    check_available(target, Precision.FP32)
    set_cpu(ZEN_4)
    check_available(target, Precision.BF16)


def test_choices_leave_out_every_precision_that_the_cpu_lacks(set_cpu: SetCpu) -> None:
    set_cpu(HASWELL)
    with pytest.raises(TargetUnavailableError) as caught:
        check_available(get_target("openvino"), Precision.FP16)
    assert caught.value.hint == "Choose one of fp32, int8, or compile on another machine."
