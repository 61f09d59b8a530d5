"""A failed compile: the caller gets one line, the log stays, and the store keeps no partial result.

The compiles are real: a child process each, with the toolchain itself refusing or dying.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compileflow import catalog
from compileflow._process import cpu
from compileflow.catalog import open_store
from compileflow.errors import CompileError, CompileflowError, SpecError, TargetUnavailableError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps import compile as compile_step
from compileflow.steps.cache import latest
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from tests.conftest import ModelFactory
from tests.unit.test_command_lines import call

ODD_MODEL = """
import torch
from transformers import BertForSequenceClassification

{odd}

class OddModel(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **more):
        answer = super().forward(input_ids, attention_mask, token_type_ids, **more)
        answer.logits = odd(answer.logits)
        return answer
"""
WITHOUT_LOWERING = """
@torch.library.custom_op("odd::op", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@odd.register_fake
def _(x):
    return torch.empty_like(x)
"""
BRANCH = """
def odd(x):
    return x + 1 if x.sum() > 0 else x - 1
"""
DYNAMO = """
@torch.compile(backend="eager")
def odd(x):
    return x + 1
"""
DYING = """
import os, signal, time
from pathlib import Path
from types import SimpleNamespace
from compileflow.contracts import TargetOptions
from compileflow.targets.torchscript import TorchScriptTarget

class DyingOptions(TargetOptions):
    how: str = "SIGSEGV"

class DyingTarget(TorchScriptTarget):
    name = "dying"
    Options = DyingOptions

    def compile(self, source_dir, component, out_dir):
        (out_dir / "half").write_bytes(b"half a graph")
        print("the toolchain's last words", flush=True)
        how = component.options["how"]
        if how == "memory":
            raise MemoryError
        if how == "raise":
            raise KeyError("first line\\nsecond line")
        if how == "hang":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(600)

def compile_alone(request):
    component = SimpleNamespace(options=request["spec"]["target_options"])
    DyingTarget().compile(Path(request["source_dir"]), component, Path(request["out_dir"]))
"""

# What `odd` does is a step of the whole model; the line is that of its call.
PLACE = r"In the model: the whole model \(OddModel\), modeling_odd\.py line \d+\.$"
OWN_OPERATORS = "Write the model with torch's own operators: targets know no others."

Refused = Callable[..., CompileflowError]


@pytest.fixture
def refused(settings: Settings) -> Refused:
    """Compile a model that must be refused; check what holds for every refusal, and return the error."""

    def compile_refused(model: Path, kind: type[CompileflowError], **fields: Any) -> CompileflowError:
        request = CompileRequest.model_validate({"model": str(model), "hf_task": "text-classification"} | fields)
        store_uri = settings.resolved_store_uri()
        source = fetch_source(request.model, None, store_uri=store_uri, settings=settings)
        with pytest.raises(CompileflowError) as caught:
            compile_artifact(source, request, store_uri=store_uri, settings=settings)
        error = caught.value
        assert type(error) is kind, error
        assert len(str(error).splitlines()) == 1
        assert "Traceback" not in str(error)
        assert "\x1b" not in str(error)
        assert error.hint
        store = open_store(store_uri)
        assert set(store.list()) == {source.digest}
        assert latest(store, "compile", f"{source.uri} for {request.target}") is None
        assert not settings.work_dir.exists() or not list(settings.work_dir.iterdir())
        return error

    return compile_refused


def log_of(error: CompileflowError) -> str:
    return Path(error.log_path).read_text("utf-8")


@pytest.fixture
def model(tiny_model: ModelFactory) -> Path:
    return tiny_model(HfTask.TEXT_CLASSIFICATION)


@pytest.fixture
def odd_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Give the model custom Python code whose last step is a function of the logits."""
    # transformers copies trusted code into its cache; use a temporary one.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(odd: str) -> Path:
        folder = Path(shutil.copytree(model, tmp_path / "odd"))
        (folder / "modeling_odd.py").write_text(ODD_MODEL.format(odd=odd), "utf-8")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_odd.OddModel"}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("target", "odd", "says", "hint"),
    [
        (
            "aot-inductor",
            BRANCH,
            "torch.export refused the model: GuardOnDataDependentSymNode.*" + PLACE,
            "A graph cannot branch on the values that it computes. In the model's code, compute both sides and "
            "choose with torch.where.",
        ),
        pytest.param(
            "onnx-runtime",
            WITHOUT_LOWERING,
            r"The ONNX exporter refused OddModel: it does not have the operator odd\.op .*" + PLACE,
            OWN_OPERATORS,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "openvino",
            WITHOUT_LOWERING,
            r"The OpenVINO exporter refused the model: it does not have the operator odd\.op .*" + PLACE,
            OWN_OPERATORS,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "torchscript",
            DYNAMO,
            "torch.jit.trace refused the model: .*dynamo-optimized function",
            "Try another target; `compileflow targets` lists them.",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["aot-inductor", "onnx-runtime", "openvino", "torchscript"],
)
def test_model_that_a_target_cannot_lower_is_refused_with_the_reason(
    refused: Refused, odd_model: Callable[[str], Path], target: str, odd: str, says: str, hint: str
) -> None:
    error = refused(odd_model(odd), CompileError, target=target, trust_remote_code=True)
    assert re.search(says, error.message), error
    assert error.hint == hint
    assert "Traceback" in log_of(error)


def test_unknown_opset_is_refused_with_the_range(refused: Refused, model: Path) -> None:
    for opset, says in ((99, "expected at most 25, got 99"), (7, "expected at least 18, got 7")):
        error = refused(model, SpecError, target="onnx-runtime", target_options={"opset": opset})
        assert says in error.message
        assert "opset" in error.hint


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a third-party target, in this process and in its children, that ends as its option says."""
    folder = tmp_path / "third-party"
    info = folder / "dying-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compileflow.targets]\ndying = dying_plugin:DyingTarget\n")
    (folder / "dying_plugin.py").write_text(DYING)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    catalog._with_entry_points.cache_clear()
    yield
    catalog._with_entry_points.cache_clear()


@pytest.mark.usefixtures("dying")
@pytest.mark.parametrize(
    ("how", "says", "hint"),
    [
        ("SIGSEGV", "was killed by SIGSEGV", "crashed in native code"),
        ("SIGABRT", "was killed by SIGABRT", "crashed in native code"),
        ("SIGKILL", "was killed by SIGKILL", "ran out of memory"),
        (
            "memory",
            "ran out of memory (MemoryError)",
            "give small shape_buckets, such as 1x128; use a machine with more memory",
        ),
        ("hang", "ran past its limit of 4 s", "Raise the step's timeout (compile_s, now 4), or give small shape_"),
    ],
)
def test_toolchain_that_dies_is_a_compile_error_that_says_how(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str, hint: str
) -> None:
    # Skip loading the model, which takes seconds; the two tests below load it.
    monkeypatch.setattr(compile_step, "_CHILD", "dying_plugin:compile_alone")
    timeouts = {"compile_s": 4} if how == "hang" else {}
    error = refused(model, CompileError, target="dying", target_options={"how": how}, timeouts=timeouts)
    assert error.message.startswith("The toolchain of dying died: ")
    assert says in error.message
    assert hint in error.hint
    assert "the toolchain's last words" in log_of(error)


@pytest.mark.usefixtures("dying")
def test_error_of_the_toolchains_own_kind_is_its_first_line(refused: Refused, model: Path) -> None:
    error = refused(model, CompileError, target="dying", target_options={"how": "raise"})
    assert error.message.startswith("dying failed on BertForSequenceClassification: KeyError: 'first line")
    assert "Traceback" in log_of(error)
    assert "the toolchain's last words" in log_of(error)


@pytest.mark.usefixtures("dying", "flows_on_server")
def test_command_line_prints_the_toolchains_words_when_asked(settings: Settings, model: Path) -> None:
    words = (
        "flows", "compile", "--model", str(model), "--target", "dying", "--option", 'how="SIGSEGV"',
        "--task", "text-classification", "--bucket", "1x8", "--verbose",
    )  # fmt: skip
    process = call(settings, *words)
    lines = process.stderr.splitlines()
    (error_line,) = (line for line in lines if line.startswith("error: "))
    assert error_line.startswith("error: The toolchain of dying died: ")
    assert "SIGSEGV" in error_line
    assert lines.index("the toolchain's last words") < lines.index(error_line)


def test_aot_inductor_without_a_cpp_compiler_says_what_to_install(
    refused: Refused, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    availability = catalog.get_target("aot-inductor").probe()
    assert (availability.can_compile, availability.can_run) == (False, True)
    error = refused(model, TargetUnavailableError, target="aot-inductor")
    assert error.message == "aot-inductor cannot compile here: the C++ compiler g++ is not installed."
    assert "apt-get install g++" in error.hint
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (
        "compiler no-such-compiler is not" in refused(model, TargetUnavailableError, target="aot-inductor").message
    )


@pytest.mark.parametrize("target", ["onnx-runtime", "openvino"])
def test_calibration_without_examples_is_refused(
    refused: Refused, model: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    error = refused(
        model,
        CompileError,
        target=target,
        precision="int8",
        target_options={"quantization": "static"},
        calibration={"examples_path": str(tmp_path / "empty.txt")},
    )
    assert error.message.startswith("Calibration for int8: ")
    assert "holds no example" in error.message


def test_calibration_in_another_language_is_refused(refused: Refused, model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("東京は日本の首都です。\n今日は良い天気ですね。\n", "utf-8")
    error = refused(
        model,
        CompileError,
        target="onnx-runtime",
        precision="int8",
        target_options={"quantization": "static"},
        calibration={"examples_path": str(tmp_path / "other.txt")},
    )
    assert "do not fit the model: its tokenizer knows only" in error.message
    assert log_of(error)


@pytest.mark.parametrize("target", ["aot-inductor", "openvino", "torchscript"])
def test_precision_that_this_cpu_lacks_is_refused(
    refused: Refused, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx2 fma\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    error = refused(model, TargetUnavailableError, target=target, precision="bf16")
    assert error.message.startswith(f"{target} cannot compile bf16 here: this CPU has no bf16 instructions (")
    assert "fp32" in error.hint
