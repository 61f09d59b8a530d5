"""neuron: torch_neuron traces one graph a shape bucket for Inf1. Written from AWS's documentation.

fp32 compiles with `--fast-math none`, the most exact that Inf1 has: AWS documents it as matrix products in BF16,
all else in FP32, and lossless transposes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from compileflow.contracts import (
    Availability,
    Capabilities,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Device,
    Runner,
    TargetOptions,
)
from compileflow.contracts.toolkit import installed_versions, report_progress
from compileflow.source_model import as_tuple_module, load_source_model
from compileflow.spec import TEXT_TASKS, Precision
from compileflow.targets._vendor.buckets import TracedRunner, compile_buckets, load_buckets
from compileflow.targets._vendor.toolchain import VendorToolchain, contradiction

_TOOLCHAIN = VendorToolchain(
    compiler={"torch_neuron": ("torch-neuron",), "neuroncc": ("neuron-cc",)},
    runtime={"torch_neuron": ("torch-neuron",)},
    install="python -m pip install torch-neuron==1.13.1.2.11.13.0 'neuron-cc[tensorflow]' protobuf"
    " --extra-index-url https://pip.repos.neuron.amazonaws.com",
    note="its last release is for PyTorch 1.13.1 and Python 3.10",
    device="neuron[0-9]*",
    device_hint="compile here, and load the artifact on an Inf1 instance with the driver aws-neuronx-dkms",
)
_FAST_MATH = {
    Precision.FP32: "none",
    Precision.BF16: "fp32-cast-all",
    Precision.FP16: "fp32-cast-all-fp16",
}
# What neuron-cc casts FP32 operators to, for each value of --fast-math that casts.
_CASTS = {
    "fp32-cast-all": Precision.BF16,
    "fp32-cast-all-fp16": Precision.FP16,
    "fp32-cast-matmult": Precision.BF16,
    "fp32-cast-matmult-bf16": Precision.BF16,
    "fp32-cast-matmult-fp16": Precision.FP16,
}


class NeuronOptions(TargetOptions):
    """Options of the neuron target."""

    dynamic_batch_size: bool = Field(
        False,
        description="Let each graph take any number of rows; it works through them in parts of its own size.",
    )
    fallback: bool = Field(
        True, description="Run operators that Inf1 lacks on the CPU. Off: such a model is refused."
    )
    compiler_args: tuple[str, ...] = Field(
        (),
        description="Arguments of neuron-cc. Without --fast-math or --fp32-cast the precision chooses: "
        "--fast-math none for fp32, fp32-cast-all for bf16, fp32-cast-all-fp16 for fp16.",
    )


class NeuronTarget:
    """Compile with neuron-cc for NeuronCores of the first generation."""

    name: ClassVar[str] = "neuron"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch_neuron for AWS Inf1; fixed shapes; compiles without a device"
    Options: ClassVar[type[TargetOptions]] = NeuronOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=TEXT_TASKS,
        precisions=(Precision.FP32, Precision.BF16, Precision.FP16),
        devices=("neuron",),
        dynamic_axes=False,
        runtime={"torch-neuron": ">={release}"},
        runtime_install="python -m pip install {} --extra-index-url https://pip.repos.neuron.amazonaws.com",
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look for torch_neuron, neuron-cc and a Neuron device, without importing anything."""
        return _TOOLCHAIN.probe()

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch-neuron, its compiler, torch and transformers."""
        return installed_versions(("torch-neuron", "neuron-cc", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code is the device's."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph a shape bucket; each carries its weights."""
        options = NeuronOptions.model_validate(dict(component.options))
        arguments = compiler_arguments(options.compiler_args, component.precision)
        torch_neuron = _TOOLCHAIN.import_module("torch_neuron")
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        module = as_tuple_module(graph)

        def trace(tensors: tuple[Any, ...], work: Path) -> Any:
            return torch_neuron.trace(
                module,
                tensors,
                compiler_args=list(arguments),
                compiler_workdir=str(work),
                fallback=options.fallback,
                dynamic_batch_size=options.dynamic_batch_size,
            )

        files = compile_buckets(graph, component, out_dir, compiler="torch_neuron.trace", trace=trace)
        return CompiledComponent(
            files,
            graph.inputs,
            graph.outputs,
            graph.output_class,
            graph.pad_token_id,
            load_options={"dynamic_batch_size": options.dynamic_batch_size},
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load every shape bucket; the runtime places each on a NeuronCore that this process may use."""
        # It registers the operators that the graphs consist of.
        _TOOLCHAIN.import_module("torch_neuron")
        graphs = load_buckets(component_dir, component, runtime="torch_neuron")
        return TracedRunner(graphs, component, any_batch=bool(component.load_options["dynamic_batch_size"]))


def compiler_arguments(given: Sequence[str], precision: Precision) -> tuple[str, ...]:
    """Return neuron-cc's arguments: those given, and the precision's cast where they name none.

    Raises:
        SpecError: those given cast to another precision.
    """
    arguments = tuple(word for argument in given for word in argument.split())
    fast_math, fp32_cast = _values(arguments, "--fast-math"), _values(arguments, "--fp32-cast")
    if fast_math is None and fp32_cast is None:
        return (*arguments, "--fast-math", _FAST_MATH[precision])
    # As documented: --fp32-cast outranks --fast-math, whose casting values outrank `none` and `all`.
    casts = [f"fp32-cast-{value}" for value in fp32_cast or ()]
    casts = casts or [value for value in fast_math or () if value.startswith("fp32-cast-")]
    if casts:
        # A value that is not documented is left to the compiler to refuse.
        computed = {_CASTS.get(value, precision) for value in casts}
    else:
        computed = {Precision.FP32 if "none" in (fast_math or ()) else Precision.BF16}
    if computed != {precision}:
        raise contradiction(
            "neuron",
            f"compiler_args {' '.join(arguments)!r}",
            precision.value,
            f"Leave out --fast-math and --fp32-cast, or ask for {min(computed - {precision}).value}.",
        )
    return arguments


def _values(arguments: Sequence[str], flag: str) -> list[str] | None:
    """Return the values of a flag, written with a space or with '='; None where it is absent."""
    values: list[str] | None = None
    taking = False
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            taking = name == flag
            if taking:
                values = (values or []) + ([value] if value else [])
        elif taking and values is not None:
            values.append(argument)
    return values
