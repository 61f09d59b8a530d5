"""neuron: torch_neuron traces one graph for each shape bucket, for AWS Inf1. Written from AWS's documentation.

fp32 compiles with `--fast-math none`, the most exact mode of Inf1: AWS documents it as matrix products in BF16,
other operators in FP32, and lossless transposes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from compileflow.contracts.toolkit import installed_versions
from compileflow.source_model import as_tuple_module, load_source_model
from compileflow.spec import TEXT_TASKS, Precision
from compileflow.targets._traced import TracedRunner
from compileflow.targets._vendor.buckets import compile_buckets, load_buckets
from compileflow.targets._vendor.toolchain import VendorToolchain, precision_conflict

_TOOLCHAIN = VendorToolchain(
    compiler={"torch_neuron": ("torch-neuron",), "neuroncc": ("neuron-cc",)},
    runtime={"torch_neuron": ("torch-neuron",)},
    install="python -m pip install torch-neuron==1.13.1.2.11.13.0 'neuron-cc[tensorflow]' protobuf"
    " --extra-index-url https://pip.repos.neuron.amazonaws.com",
    note="the last release is for PyTorch 1.13.1 and Python 3.10",
    device="neuron[0-9]*",
    device_hint="compile here, and load the artifact on an Inf1 instance with the driver aws-neuronx-dkms",
)
_FAST_MATH = {
    Precision.FP32: "none",
    Precision.BF16: "fp32-cast-all",
    Precision.FP16: "fp32-cast-all-fp16",
}
# Format that neuron-cc casts FP32 operators to, for each value of --fast-math that casts.
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
        description="Let each graph take any number of rows; it processes them in groups of its batch size.",
    )
    fallback: bool = Field(
        True, description="Run operators that Inf1 lacks on the CPU. Off: refuse a model that has any."
    )
    compiler_args: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Arguments of neuron-cc. Without --fast-math or --fp32-cast the precision chooses: "
        "--fast-math none for fp32, fp32-cast-all for bf16, fp32-cast-all-fp16 for fp16.",
    )

    def check_precision(self, precision: Precision) -> None:
        """Refuse casts that contradict the precision."""
        compiler_arguments(self.compiler_args, precision)


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

    def probe(self) -> Availability:
        """Check for torch_neuron, neuron-cc and a Neuron device, without importing anything."""
        return _TOOLCHAIN.probe()

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch-neuron, neuron-cc, torch and transformers."""
        return installed_versions(("torch-neuron", "neuron-cc", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code runs on the Neuron device."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph for each shape bucket; every graph carries its weights."""
        options = NeuronOptions.model_validate(dict(component.options))
        arguments = compiler_arguments(options.compiler_args, component.precision)
        torch_neuron = _TOOLCHAIN.import_module("torch_neuron")
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        module = as_tuple_module(source_model)

        def trace(tensors: tuple[Any, ...], work: Path) -> Any:
            return torch_neuron.trace(
                module,
                tensors,
                compiler_args=list(arguments),
                compiler_workdir=str(work),
                fallback=options.fallback,
                dynamic_batch_size=options.dynamic_batch_size,
            )

        files = compile_buckets(source_model, component, out_dir, compiler="torch_neuron.trace", trace=trace)
        return source_model.compiled_to(files, {"dynamic_batch_size": options.dynamic_batch_size})

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the graph of every shape bucket; the runtime chooses a NeuronCore for each."""
        # The import registers the operators of the graphs.
        _TOOLCHAIN.import_module("torch_neuron")
        graphs = load_buckets(component_dir, component, runtime="torch_neuron")
        return TracedRunner(graphs, component, any_batch=bool(component.load_option("dynamic_batch_size")))


def compiler_arguments(user_arguments: Sequence[str], precision: Precision) -> tuple[str, ...]:
    """Return the arguments of neuron-cc: the user's, and the cast of the precision where they name no cast.

    Raises:
        SpecError: The user's arguments cast to another precision.
    """
    arguments = tuple(word for argument in user_arguments for word in argument.split())
    fast_math, fp32_cast = _values(arguments, "--fast-math"), _values(arguments, "--fp32-cast")
    if fast_math is None and fp32_cast is None:
        return (*arguments, "--fast-math", _FAST_MATH[precision])
    # As documented: --fp32-cast outranks --fast-math, whose casting values outrank `none` and `all`.
    casts = [f"fp32-cast-{value}" for value in fp32_cast or ()]
    casts = casts or [value for value in fast_math or () if value.startswith("fp32-cast-")]
    if casts:
        # The compiler itself refuses values that AWS does not document.
        cast_precisions = {_CASTS.get(value, precision) for value in casts}
    else:
        cast_precisions = {Precision.FP32 if "none" in (fast_math or ()) else Precision.BF16}
    if cast_precisions != {precision}:
        raise precision_conflict(
            "neuron",
            f"compiler_args {' '.join(arguments)!r}",
            precision.value,
            f"Omit --fast-math and --fp32-cast, or request {min(cast_precisions - {precision}).value}.",
        )
    return arguments


def _values(arguments: Sequence[str], flag: str) -> list[str] | None:
    """Return the values of a flag, written with a space or with '='; None where the flag is absent."""
    values: list[str] | None = None
    in_flag = False
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            in_flag = name == flag
            if in_flag:
                values = (values or []) + ([value] if value else [])
        elif in_flag and values is not None:
            values.append(argument)
    return values
