"""neuronx: torch_neuronx traces one graph for each shape bucket, for AWS Inf2 and Trn1.

Written from AWS's documentation. Weights stay outside the graphs and are stored once, in a safetensors file.
torch_neuronx.replace_weights exchanges the weights twice: before saving, for placeholders of the same shapes that
hold one number each; after loading, for the weights of the file. AWS does not document whether graphs with the
same tensors share them on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from compileflow.errors import CompileError, LoadError, SpecError, first_line
from compileflow.source_model import as_tuple_module, load_source_model
from compileflow.spec import TEXT_TASKS, Precision
from compileflow.targets._traced import TracedRunner
from compileflow.targets._vendor.buckets import compile_buckets, load_buckets
from compileflow.targets._vendor.toolchain import VendorToolchain, precision_conflict

_WEIGHTS = "weights.safetensors"
# The first of the NeuronCores that NEURON_RT_VISIBLE_CORES lets the process use.
_CORE = 0
_TOOLCHAIN = VendorToolchain(
    compiler={"torch_neuronx": ("torch-neuronx",), "neuronxcc": ("neuronx-cc",)},
    runtime={"torch_neuronx": ("torch-neuronx",)},
    install="python -m pip install neuronx-cc==2.26.6360.0 torch-neuronx==2.9.0.2.15.32035"
    " --extra-index-url https://pip.repos.neuron.amazonaws.com",
    device="neuron[0-9]*",
    device_hint="compile here, and load the artifact on an Inf2 or Trn1 instance with the driver aws-neuronx-dkms",
)
# Values of --auto-cast-type that compute in each precision; the first is the default.
_CAST_TYPES: Mapping[Precision, tuple[str | None, ...]] = {
    Precision.FP32: (None, "tf32"),
    Precision.BF16: ("bf16",),
    Precision.FP16: ("fp16",),
}
# Flags of neuronx-cc that an option of this target sets.
_OPTION_FLAGS = {
    "--auto-cast": "auto_cast",
    "--auto-cast-type": "auto_cast_type",
    "--target": "instance_type",
    "--optlevel": "optlevel",
    "-O": "optlevel",
    "-O1": "optlevel",
    "-O2": "optlevel",
    "-O3": "optlevel",
    "--model-type": "model_type",
}


class NeuronxOptions(TargetOptions):
    """Options of the neuronx target."""

    instance_type: Literal["inf2", "trn1", "trn1n", "trn2"] = Field(
        "inf2", description="Instance family that the graphs will run on; neuronx-cc calls it --target."
    )
    auto_cast: Literal["none", "matmult", "all"] | None = Field(
        None, description="FP32 operators to cast. null: none at fp32, matmult at bf16 and fp16."
    )
    auto_cast_type: Literal["bf16", "fp16", "tf32"] | None = Field(
        None,
        description="Format that these operators are cast to. null: the precision. tf32 needs precision fp32.",
    )
    optlevel: Literal[1, 2, 3] = Field(2, description="Optimization level: 1 compiles fastest, 3 slowest.")
    model_type: Literal["generic", "transformer"] = Field(
        "transformer", description="Kind of model that neuronx-cc optimizes for."
    )
    inline_weights_to_neff: bool = Field(
        False,
        description="Build the weights into every graph. Graphs are larger, but faster, because the compiler "
        "chooses the layout of the weights.",
    )
    dynamic_batch_size: bool = Field(
        False,
        description="Let each graph take any number of rows; it processes them in groups of its batch size.",
    )
    async_load: bool = Field(False, description="Load the graphs onto the device in the background, in parallel.")
    lazy_load: bool = Field(False, description="Load a graph onto the device at its first call.")
    compiler_args: tuple[str, ...] = Field((), strict=False, description="Additional arguments of neuronx-cc.")

    def check_precision(self, precision: Precision) -> None:
        """Refuse casts that contradict the precision."""
        compiler_arguments(self, precision)


class NeuronxTarget:
    """Compile with neuronx-cc for NeuronCores of the second generation."""

    name: ClassVar[str] = "neuronx"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch_neuronx for AWS Inf2 and Trn1; fixed shapes; compiles without a device"
    Options: ClassVar[type[TargetOptions]] = NeuronxOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=TEXT_TASKS,
        precisions=(Precision.FP32, Precision.BF16, Precision.FP16),
        devices=("neuron",),
        dynamic_axes=False,
        # Later runtimes load graphs of earlier compilers. From 2.13 on, the package is TorchNeuron: a new API.
        runtime={"torch-neuronx": ">={release},<2.13"},
        runtime_install="python -m pip install {} --extra-index-url https://pip.repos.neuron.amazonaws.com",
    )

    def probe(self) -> Availability:
        """Check for torch_neuronx, neuronx-cc and a Neuron device, without importing anything."""
        return _TOOLCHAIN.probe()

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch-neuronx, neuronx-cc, libneuronxla, torch and transformers."""
        return installed_versions(("torch-neuronx", "neuronx-cc", "libneuronxla", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code runs on the Neuron device."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph for each shape bucket on the CPU, and store the weights once."""
        options = NeuronxOptions.model_validate(dict(component.options))
        arguments = compiler_arguments(options, component.precision)
        torch_neuronx = _TOOLCHAIN.import_module("torch_neuronx")
        if not hasattr(torch_neuronx, "trace"):
            raise CompileError(
                f"torch-neuronx {self.toolchain().get('torch-neuronx')} is TorchNeuron, which has no trace.",
                hint=f"Run: {_TOOLCHAIN.install}",
            )
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        module = as_tuple_module(source_model)
        placeholders = {
            name: weight.new_zeros(()).expand(weight.shape) for name, weight in module.state_dict().items()
        }

        def trace(tensors: tuple[Any, ...], work: Path) -> Any:
            traced_module = torch_neuronx.trace(
                module,
                tensors,
                compiler_workdir=str(work),
                compiler_args=[*arguments, "--logfile", str(work / "log-neuron-cc.txt")],
                inline_weights_to_neff=options.inline_weights_to_neff,
                # The compile needs no device; --target names the instance family.
                cpu_backend=True,
            )
            if options.dynamic_batch_size:
                traced_module = torch_neuronx.dynamic_batch(traced_module)
            # Both calls must come between tracing and saving.
            if options.async_load:
                torch_neuronx.async_load(traced_module)
            if options.lazy_load:
                torch_neuronx.lazy_load(traced_module)
            if not options.inline_weights_to_neff:
                torch_neuronx.replace_weights(traced_module, placeholders)
            return traced_module

        files = compile_buckets(source_model, component, out_dir, compiler="torch_neuronx.trace", trace=trace)
        tied_weights: dict[str, str] = {}
        if not options.inline_weights_to_neff:
            report_progress("writing the weights")
            tied_weights = _write_weights(module.state_dict(), out_dir / _WEIGHTS)
            files = (*files, _WEIGHTS)
        return source_model.compiled_to(
            files,
            {
                "dynamic_batch_size": options.dynamic_batch_size,
                "inline_weights_to_neff": options.inline_weights_to_neff,
                "tied_weights": dict(tied_weights),
            },
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the graph of every shape bucket, with the same weights, and move all to one NeuronCore."""
        # The import registers the operators of the graphs.
        torch_neuronx = _TOOLCHAIN.import_module("torch_neuronx")
        load_option = component.load_option
        weights = (
            None
            if load_option("inline_weights_to_neff")
            else _read_weights(component_dir, load_option("tied_weights"))
        )

        def prepare(graph: Any) -> Any:
            if weights is not None:
                torch_neuronx.replace_weights(graph, weights)
                # Otherwise every call would copy them from the CPU to the device.
                torch_neuronx.move_trace_to_device(graph, _CORE)
            return graph

        graphs = load_buckets(component_dir, component, runtime="torch_neuronx", prepare=prepare)
        return TracedRunner(graphs, component, any_batch=bool(load_option("dynamic_batch_size")))


def compiler_arguments(options: NeuronxOptions, precision: Precision) -> tuple[str, ...]:
    """Return the arguments of neuronx-cc.

    Raises:
        SpecError: The casts contradict the precision, or `compiler_args` repeats an option.
    """
    extra = tuple(word for argument in options.compiler_args for word in argument.split())
    for word in extra:
        option = _OPTION_FLAGS.get(word.partition("=")[0])
        if option is not None:
            raise SpecError(
                f"neuronx: compiler_args holds {word}, which the option {option} sets.",
                hint=f"Set {option} instead.",
            )
    cast_types = _CAST_TYPES[precision]
    cast_type = options.auto_cast_type or cast_types[0]
    cast = options.auto_cast or ("none" if cast_type is None else "matmult")
    if cast_type not in cast_types or (cast == "none") != (cast_type is None):
        raise precision_conflict(
            "neuronx",
            f"auto_cast {cast} with auto_cast_type {cast_type or '(empty)'}",
            precision.value,
            "Leave both options empty, or request the precision that they compute in.",
        )
    casts = ("--auto-cast", cast) + (() if cast_type is None else ("--auto-cast-type", cast_type))
    return (
        *("--target", options.instance_type),
        *casts,
        *("--optlevel", str(options.optlevel)),
        *("--model-type", options.model_type),
        *extra,
    )


def _write_weights(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write each tensor once, and return the tied names, each with the name that its tensor is stored under."""
    from safetensors.torch import save_file

    stored_names: dict[tuple[int, tuple[int, ...]], str] = {}
    tied_weights = {}
    for name, tensor in state.items():
        stored_name = stored_names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if stored_name != name:
            tied_weights[name] = stored_name
    save_file({name: state[name].contiguous() for name in stored_names.values()}, path)
    return tied_weights


def _read_weights(component_dir: Path, tied_weights: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        weights: dict[str, Any] = load_file(component_dir / _WEIGHTS)
        return weights | {name: weights[stored_name] for name, stored_name in tied_weights.items()}
    except Exception as error:
        raise LoadError(
            f"{_WEIGHTS} cannot be loaded: {first_line(error)}.", hint="Fetch the artifact again."
        ) from error
