"""What reaches the vendors' compilers and what is refused, on doubles of their modules."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compileflow.catalog import get_target
from compileflow.contracts import CompiledComponent, ComponentPlan, ComponentRecord, Runner
from compileflow.contracts.digests import list_files
from compileflow.errors import CompileError, InputError, LoadError, SpecError, TargetUnavailableError
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.load import load_source_model
from compileflow.source_model.token_rows import TokenRows
from compileflow.spec import CompileSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.compile import check_available
from compileflow.targets import neuron, neuronx
from compileflow.targets._vendor import toolchain as vendor_toolchain
from compileflow.testing.targets import hide_distributions
from tests.doubles.fixtures import vendor_doubles as vendor_doubles

DOCS = Path(__file__).parents[2] / "docs"
VENDORS = ("blade", "hyperdex", "neuron", "neuronx")
TASK = HfTask.TEXT_CLASSIFICATION
FP32, BF16, FP16 = Precision.FP32, Precision.BF16, Precision.FP16
BUCKET = ShapeBucket(batch_size=2, sequence_length=8)

Compile = Callable[..., tuple[CompiledComponent, Path]]
doubled = pytest.mark.usefixtures("vendor_doubles")


@pytest.fixture
def compiled(tiny_model: Callable[..., Path], tmp_path: Path) -> Compile:
    """Compile in this process: `compiled("neuron", FP32, {...})` gives the component and its folder."""

    def make(
        name: str,
        precision: Precision = FP32,
        options: Mapping[str, Any] | None = None,
        *,
        buckets: Sequence[ShapeBucket] = (BUCKET,),
        hf_task: HfTask = TASK,
        threads: int = 1,
    ) -> tuple[CompiledComponent, Path]:
        folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        plan = plan_of(name, precision, options, buckets=buckets, hf_task=hf_task, threads=threads)
        return get_target(name).compile(tiny_model(hf_task), plan, folder), folder

    return make


def plan_of(
    target: str,
    precision: Precision,
    options: Mapping[str, Any] | None = None,
    *,
    buckets: Sequence[ShapeBucket] = (BUCKET,),
    hf_task: HfTask = TASK,
    threads: int = 1,
) -> ComponentPlan:
    spec = CompileSpec(target=target, hf_task=hf_task, precision=precision, target_options=dict(options or {}))
    # A copy, because these buckets are shorter than the maximum.
    shape = {"max_sequence_length": 16, "shape_buckets": tuple(buckets)}
    return ComponentPlan(spec=spec, component=spec.components[0].model_copy(update=shape), threads=threads)


def record_of(component: CompiledComponent, *, dynamic: bool = False) -> ComponentRecord:
    return ComponentRecord(
        folder="components/default",
        inputs=component.inputs,
        outputs=component.outputs,
        output_class=component.output_class,
        max_sequence_length=16 if dynamic else BUCKET.sequence_length,
        dynamic_axes=dynamic,
        shape_buckets=() if dynamic else (BUCKET,),
        load_options=dict(component.load_options),
    )


def calls(module: str) -> list[dict[str, Any]]:
    """Return the arguments of each call of a double."""
    recorded_calls: list[dict[str, Any]] = sys.modules[module].CALLS
    return recorded_calls


def inputs_of(component: CompiledComponent, rows: int, length: int) -> dict[str, Any]:
    return example_inputs(component.inputs, rows, length, TokenRows(100, pad_token_id=component.pad_token_id))


def tensor_bytes(path: Path) -> int:
    """Return the size of all tensors in a TorchScript file, without its code."""
    with zipfile.ZipFile(path) as archive:
        entries = (
            entry for entry in archive.infolist() if "/data/" in entry.filename or "/constants/" in entry.filename
        )
        return sum(entry.file_size for entry in entries)


def run(
    name: str, component: CompiledComponent, folder: Path, rows: int = 2, length: int = 8
) -> tuple[Runner, Any]:
    target = get_target(name)
    record = record_of(component, dynamic=target.capabilities.dynamic_axes)
    runner = target.load(folder, record, device=target.capabilities.devices[0], threads=None)
    return runner, runner.run(inputs_of(component, rows, length))


@pytest.mark.parametrize("name", VENDORS)
def test_absent_toolchain_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = get_target(name)
    hide_distributions(monkeypatch)
    availability = target.probe()
    assert (availability.can_compile, availability.can_run) == (False, False)
    assert "is not installed" in availability.reason
    assert "pip install" in availability.hint
    with pytest.raises(TargetUnavailableError, match="is not installed") as caught:
        check_available(target, target.capabilities.precisions[0])
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("name", VENDORS)
def test_compile_without_the_toolchain_says_what_to_run(name: str, compiled: Compile) -> None:
    with pytest.raises(TargetUnavailableError, match="cannot be imported: No module named") as caught:
        compiled(name, get_target(name).capabilities.precisions[0])
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize(("name", "distribution"), [("neuron", "torch-neuron"), ("neuronx", "torch-neuronx")])
def test_empty_placeholder_is_not_a_toolchain(
    name: str, distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = distribution.replace("-", "_")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    availability = get_target(name).probe()
    assert not availability.can_compile
    assert (
        f"{distribution} 1.0 is an empty placeholder from PyPI, without the module {module}" in availability.reason
    )
    assert "pip.repos.neuron.amazonaws.com" in availability.hint


@doubled
@pytest.mark.parametrize(
    ("name", "can_compile", "can_run"),
    [("blade", True, True), ("hyperdex", False, False), ("neuron", True, False), ("neuronx", True, False)],
)
def test_without_its_device_a_target_says_which_is_missing(
    name: str, can_compile: bool, can_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_device = get_target(name).probe()
    assert (with_device.can_compile, with_device.can_run, with_device.reason) == (True, True, "")
    monkeypatch.setattr(vendor_toolchain, "DEVICE_NODES", tmp_path / "nothing")
    availability = get_target(name).probe()
    assert (availability.can_compile, availability.can_run) == (can_compile, can_run)
    assert ("has no device" in availability.reason) == (not can_run)
    assert bool(availability.hint) == (not can_run)


@doubled
def test_runtime_without_the_compiler_can_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_distributions(monkeypatch, "neuron-cc", "neuronx-cc")
    for name in ("neuron", "neuronx"):
        availability = get_target(name).probe()
        assert (availability.can_compile, availability.can_run) == (False, True)
        assert "-cc is not installed" in availability.reason


@doubled
@pytest.mark.parametrize(
    ("precision", "fast_math"), [(FP32, "none"), (BF16, "fp32-cast-all"), (FP16, "fp32-cast-all-fp16")]
)
def test_neuron_cc_gets_the_precision_and_the_options(
    compiled: Compile, precision: Precision, fast_math: str
) -> None:
    compiled("neuron", precision)
    assert calls("torch_neuron")[-1]["flags"] == ["--fast-math", fast_math]
    assert not calls("torch_neuron")[-1]["dynamic_batch_size"]
    assert calls("torch_neuron")[-1]["fallback"]
    pipeline = {"compiler_args": ["--neuroncore-pipeline-cores 4"], "fallback": False, "dynamic_batch_size": True}
    compiled("neuron", precision, pipeline)
    assert calls("torch_neuron")[-1]["flags"] == ["--neuroncore-pipeline-cores", "4", "--fast-math", fast_math]
    assert calls("torch_neuron")[-1]["dynamic_batch_size"]
    assert not calls("torch_neuron")[-1]["fallback"]


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        (["--fast-math", "none"], FP32),
        (["--fast-math=none"], FP32),
        (["--fast-math fp32-cast-matmult no-fast-relayout"], BF16),
        (["--fast-math", "no-fast-relayout"], BF16),
        (["--fast-math", "none", "fp32-cast-matmult-fp16"], FP16),
        (["--fast-math", "none", "--fp32-cast", "matmult-fp16"], FP16),
    ],
)
def test_casts_of_neuron_cc_must_be_the_precisions(arguments: list[str], precision: Precision) -> None:
    assert " ".join(neuron.compiler_arguments(arguments, precision)) == " ".join(arguments)
    for other_precision in {FP32, BF16, FP16} - {precision}:
        with pytest.raises(SpecError, match=f"does not compute in {other_precision.value}") as caught:
            neuron.compiler_arguments(arguments, other_precision)
        assert f"request {precision.value}" in caught.value.hint


@doubled
@pytest.mark.parametrize(
    ("precision", "options", "casts"),
    [
        (FP32, {}, ["--auto-cast", "none"]),
        (BF16, {}, ["--auto-cast", "matmult", "--auto-cast-type", "bf16"]),
        (FP16, {"auto_cast": "all"}, ["--auto-cast", "all", "--auto-cast-type", "fp16"]),
        (FP32, {"auto_cast_type": "tf32"}, ["--auto-cast", "matmult", "--auto-cast-type", "tf32"]),
    ],
)
def test_neuronx_cc_gets_the_precision(
    compiled: Compile, precision: Precision, options: dict[str, Any], casts: list[str]
) -> None:
    compiled("neuronx", precision, options)
    trace = calls("torch_neuronx")[0]
    flags = " ".join(trace["flags"])
    assert f"--target inf2 {' '.join(casts)} --optlevel 2 --model-type transformer --logfile " in flags
    assert trace["cpu_backend"]
    assert not trace["inline_weights_to_neff"]


@doubled
def test_neuronx_options_reach_the_compiler_and_the_graph(compiled: Compile) -> None:
    options = {
        "instance_type": "trn1",
        "optlevel": 3,
        "model_type": "generic",
        "dynamic_batch_size": True,
        "async_load": True,
        "lazy_load": True,
        "compiler_args": ["--enable-fast-loading-neuron-binaries"],
    }
    component, folder = compiled("neuronx", FP32, options)
    trace, *rest = calls("torch_neuronx")
    values = trace["values"]
    assert (values.target, values.optlevel, values.model_type) == ("trn1", 3, "generic")
    assert values.enable_fast_loading_neuron_binaries
    assert [call["call"] for call in rest] == ["dynamic_batch", "async_load", "lazy_load"]
    _, outputs = run("neuronx", component, folder, rows=5)
    assert outputs["logits"].shape == (5, 3)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"auto_cast": "all"}, FP32),
        ({"auto_cast": "none"}, BF16),
        ({"auto_cast_type": "bf16"}, FP32),
        ({"auto_cast_type": "bf16"}, FP16),
        ({"auto_cast": "none", "auto_cast_type": "tf32"}, FP32),
    ],
)
def test_neuronx_refuses_casts_that_contradict_the_precision(
    options: dict[str, Any], precision: Precision
) -> None:
    with pytest.raises(SpecError, match=f"does not compute in {precision.value}, the requested precision"):
        neuronx.compiler_arguments(neuronx.NeuronxOptions.model_validate(options), precision)


@pytest.mark.parametrize("argument", ["--auto-cast all", "--target=trn1", "-O1", "--model-type generic"])
def test_neuronx_options_are_not_given_twice(argument: str) -> None:
    with pytest.raises(SpecError, match="compiler_args holds"):
        neuronx.compiler_arguments(neuronx.NeuronxOptions(compiler_args=(argument,)), FP32)


@doubled
def test_blade_gets_the_precision_and_the_settings_that_were_given(compiled: Compile) -> None:
    compiled("blade", FP32)
    default_config = calls("torch_blade")[-1]["config"]
    assert (default_config["enable_fp16"], default_config["disc_cpu_fast_math_level"]) == (False, 0)
    options = {
        "fp16_fallback_op_ratio": 0.25,
        "disc_cpu_fast_math_level": 2,
        "enable_static_shape": True,
        "optimization_pipeline": "TensorRT",
        "customize_op_black_list": ["aten::flatten"],
    }
    compiled("blade", FP16, options)
    assert calls("torch_blade")[-1]["config"] == default_config | {"enable_fp16": True} | options
    with pytest.raises(SpecError, match=r"fp16_fallback_op_ratio 0\.25 does not compute in fp32"):
        compiled("blade", FP32, {"fp16_fallback_op_ratio": 0.25})


@doubled
def test_blade_without_a_setting_says_so(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled("blade", FP32)
    monkeypatch.delitem(sys.modules["torch_blade.config"]._DEFAULTS, "enable_static_shape")
    with pytest.raises(CompileError, match="has no setting 'enable_static_shape'"):
        compiled("blade", FP32, {"enable_static_shape": True})


@doubled
def test_blade_runs_on_the_device_that_it_was_compiled_for(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, folder = compiled("blade", FP32)
    target = get_target("blade")
    with pytest.raises(LoadError, match="Cannot load on cuda: the graphs were compiled for cpu"):
        target.load(folder, record_of(component), device="cuda", threads=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetUnavailableError, match="no CUDA device"):
        compiled("blade", FP32, {"device": "cuda"})


@doubled
def test_blade_answers_with_the_requested_threads(compiled: Compile) -> None:
    component, folder = compiled("blade", FP32)
    threads = torch.get_num_threads()
    runner: Any = get_target("blade").load(folder, record_of(component), device="cpu", threads=threads + 1)
    threads_in_calls = []
    (shape, graph), *_ = runner._graphs.items()
    runner._graphs[shape] = lambda *tensors: threads_in_calls.append(torch.get_num_threads()) or graph(*tensors)
    runner.run(inputs_of(component, 2, 8))
    assert threads_in_calls == [threads + 1]
    assert torch.get_num_threads() == threads


@doubled
def test_hyperdex_gets_its_options_and_loads_onto_as_many_devices(compiled: Compile) -> None:
    options = {"num_device": 2, "max_length": 32, "low_memory_usage": True, "fast_compile": False}
    component, folder = compiled("hyperdex", FP16, options)
    assert calls("hyperdex.tools") == [options | {"threads": 1}]
    _, outputs = run("hyperdex", component, folder, rows=3, length=5)
    assert outputs["logits"].shape == (3, 3)
    assert calls("hyperdex.transformers") == [
        {"class": "AutoModelForSequenceClassification", "device_map": {"lpu": 2}}
    ]
    compiled("hyperdex", FP16)
    assert calls("hyperdex.tools")[-1]["max_length"] == 16


@doubled
def test_hyperdex_compiles_a_source_that_is_read_only(compiled: Compile, tiny_model: Callable[..., Path]) -> None:
    source = tiny_model(TASK)
    mode = source.stat().st_mode
    source.chmod(0o555)
    try:
        _, folder = compiled("hyperdex", FP16)
    finally:
        source.chmod(mode)
    assert (folder / "model").stat().st_mode & 0o200


@doubled
def test_hyperdex_refuses_what_it_cannot_compile(
    compiled: Compile, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="max_length is 8, but the component takes 16"):
        compiled("hyperdex", FP16, {"max_length": 8})
    other_task = plan_of("hyperdex", FP16, hf_task=HfTask.FEATURE_EXTRACTION, buckets=())
    with pytest.raises(SpecError, match="cannot compile BertForSequenceClassification for feature-extraction"):
        get_target("hyperdex").compile(tiny_model(TASK), other_task, tmp_path)
    compiled("hyperdex", FP16)
    monkeypatch.delattr(sys.modules["hyperdex.transformers"], "AutoModelForSequenceClassification")
    with pytest.raises(CompileError, match=r"hyperdex\.transformers has no AutoModelForSequenceClassification"):
        compiled("hyperdex", FP16)


@doubled
def test_hyperdex_that_writes_elsewhere_is_noticed(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled("hyperdex", FP16)
    compiler = sys.modules["hyperdex.tools"].AutoCompiler
    monkeypatch.setattr(compiler, "compile", lambda self, **kwargs: None)
    with pytest.raises(CompileError, match="wrote nothing into the model's folder"):
        compiled("hyperdex", FP16)


@doubled
@pytest.mark.parametrize(("name", "call"), [("neuron", "torch_neuron.trace"), ("neuronx", "torch_neuronx.trace")])
def test_error_of_a_vendors_compiler_is_one_line(compiled: Compile, name: str, call: str) -> None:
    with pytest.raises(CompileError) as caught:
        compiled(name, FP32, {"compiler_args": ["--no-such-flag"]})
    assert f"{call} refused the model: RuntimeError: neuron" in caught.value.message
    assert caught.value.message.endswith("unrecognized arguments: --no-such-flag.")
    assert isinstance(caught.value.__cause__, RuntimeError)


@doubled
def test_operator_that_inf1_lacks_is_refused_without_fallback(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled("neuron")
    monkeypatch.setattr(sys.modules["torch_neuron"], "UNSUPPORTED", {"aten::gelu"})
    compiled("neuron")
    with pytest.raises(CompileError, match="AttributeError: Neuron does not support the operator aten::gelu"):
        compiled("neuron", FP32, {"fallback": False})


@doubled
def test_torchneuron_without_trace_is_refused(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled("neuronx")
    monkeypatch.delattr(sys.modules["torch_neuronx"], "trace")
    with pytest.raises(CompileError, match="is TorchNeuron, which has no trace"):
        compiled("neuronx")


@doubled
def test_neuronx_stores_weights_once_and_shares_them_after_loading(compiled: Compile) -> None:
    buckets = [BUCKET, ShapeBucket(batch_size=1, sequence_length=8), ShapeBucket(batch_size=1, sequence_length=16)]
    component, folder = compiled("neuronx", buckets=buckets)
    inline, inline_folder = compiled("neuronx", FP32, {"inline_weights_to_neff": True}, buckets=buckets)
    weights = (folder / "weights.safetensors").stat().st_size
    assert set(inline.files) == set(component.files) - {"weights.safetensors"}
    for name in inline.files:
        assert tensor_bytes(folder / name) < 0.05 * weights, name
        assert tensor_bytes(inline_folder / name) > 0.8 * weights, name
    assert {path.path for path in list_files(folder)} == set(component.files)

    record = record_of(component).model_copy(update={"shape_buckets": tuple(buckets)})
    runner: Any = get_target("neuronx").load(folder, record, device="neuron", threads=None)
    parameters_of_graphs = [dict(graph.named_parameters()) for graph in runner._graphs.values()]
    assert len(parameters_of_graphs) == 3
    for name, tensor in parameters_of_graphs[0].items():
        assert {parameters[name].data_ptr() for parameters in parameters_of_graphs} == {tensor.data_ptr()}, name
    moved = [call for call in calls("torch_neuronx") if call["call"] == "move_trace_to_device"]
    assert moved == [{"call": "move_trace_to_device", "device_id": 0}] * 3


@doubled
def test_neuronx_stores_tied_weights_once(compiled: Compile, tiny_model: Callable[..., Path]) -> None:
    component, folder = compiled("neuronx", hf_task=HfTask.FILL_MASK)
    tied = component.load_options["tied_weights"]
    assert isinstance(tied, dict)
    assert any("decoder.weight" in name for name in tied)
    source = load_source_model(tiny_model(HfTask.FILL_MASK), HfTask.FILL_MASK)
    size = sum(parameter.nbytes for parameter in source.model.parameters())
    assert size <= (folder / "weights.safetensors").stat().st_size < 1.2 * size
    _, outputs = run("neuronx", component, folder)
    np.testing.assert_allclose(
        outputs["logits"], source.run(inputs_of(component, 2, 8))["logits"], rtol=0, atol=1e-5
    )


@doubled
def test_dynamic_batch_size_lets_a_graph_take_other_batches(compiled: Compile) -> None:
    component, folder = compiled("neuron", FP32, {"dynamic_batch_size": True})
    runner, outputs = run("neuron", component, folder, rows=5)
    first = runner.run({name: value[:2] for name, value in inputs_of(component, 5, 8).items()})
    np.testing.assert_allclose(outputs["logits"][:2], first["logits"], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"one of the shape buckets 2x8, got shape 5x9"):
        runner.run(inputs_of(component, 5, 9))
    component, folder = compiled("neuron")
    with pytest.raises(InputError, match=r"one of the shape buckets 2x8, got shape 5x8"):
        run("neuron", component, folder, rows=5)


@doubled
@pytest.mark.parametrize(("name", "module"), [("blade", "torch_blade"), ("neuron", "torch_neuron")])
def test_graph_loads_only_once_the_runtime_is_imported(compiled: Compile, name: str, module: str) -> None:
    component, folder = compiled(name)
    code = f"""
import sys, torch
from pathlib import Path
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord
folder, record = Path(sys.argv[1]), ComponentRecord.model_validate_json(sys.argv[2])
try:
    torch.jit.load(folder / "bucket_2x8.pt")
except RuntimeError as error:
    print(str(error).split()[0])
target = get_target({name!r})
target.load(folder, record, device=target.capabilities.devices[0], threads=None)
print({module!r} in sys.modules)
"""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), record_of(component).model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.split() == ["Unknown", "True"]


@doubled
@pytest.mark.parametrize("name", VENDORS)
def test_threads_and_warning_filters_are_as_they_were(
    name: str, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    filters = list(warnings.filters)
    component, folder = compiled(name, get_target(name).capabilities.precisions[-1], threads=threads + 1)
    run(name, component, folder)
    assert warnings.filters == filters
    assert torch.get_num_threads() == threads
    double = {"blade": "torch_blade", "hyperdex": "hyperdex.tools"}.get(name, f"torch_{name}")
    assert calls(double)[0]["threads"] == threads + 1


@pytest.mark.parametrize("name", VENDORS)
def test_pages_name_every_option_and_the_command_that_probe_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (DOCS / "reference" / "targets.md").read_text("utf-8").split(f"### {name}\n")[1].split("\n### ")[0]
    commands = (DOCS / "explanation" / "vendor-targets.md").read_text("utf-8").split(f"## {name}: ")[1]
    target = get_target(name)
    assert [option for option in target.Options.model_fields if f"`{option}`" not in options] == []
    hide_distributions(monkeypatch)
    for command in target.probe().hint.partition(", in ")[0].split(" && "):
        assert command in commands.split("\n## ")[0]
