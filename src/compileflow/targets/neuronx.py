"""neuronx: torch_neuronx traces one graph a shape bucket for Inf2 and Trn1. Written from AWS's documentation.

Weights stay outside the graphs and are stored once, in a safetensors file. The graphs are saved with stand-ins of
the same shapes that hold one number each, and get the weights when they are loaded; both times it is
torch_neuronx.replace_weights that does it. Whether graphs with the same tensors share them on the device, too, is
not documented.
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
from compileflow.targets._vendor.buckets import TracedRunner, compile_buckets, load_buckets
from compileflow.targets._vendor.toolchain import VendorToolchain, contradiction

_WEIGHTS = "weights.safetensors"
# The first of the NeuronCores that NEURON_RT_VISIBLE_CORES leaves to the process.
_CORE = 0
_TOOLCHAIN = VendorToolchain(
    compiler={"torch_neuronx": ("torch-neuronx",), "neuronxcc": ("neuronx-cc",)},
    runtime={"torch_neuronx": ("torch-neuronx",)},
    install="python -m pip install neuronx-cc==2.26.6360.0 torch-neuronx==2.9.0.2.15.32035"
    " --extra-index-url https://pip.repos.neuron.amazonaws.com",
    device="neuron[0-9]*",
    device_hint="compile here, and load the artifact on an Inf2 or Trn1 instance with the driver aws-neuronx-dkms",
)
# Which --auto-cast-type keeps each precision's promise; the first is the default.
_CAST_TYPES: Mapping[Precision, tuple[str | None, ...]] = {
    Precision.FP32: (None, "tf32"),
    Precision.BF16: ("bf16",),
    Precision.FP16: ("fp16",),
}
_OWN_FLAGS = {
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
        None, description="Which FP32 operators are cast. Empty: none at fp32, matmult at bf16 and fp16."
    )
    auto_cast_type: Literal["bf16", "fp16", "tf32"] | None = Field(
        None, description="What they are cast to. Empty: the precision. tf32 is for fp32, where it is asked for."
    )
    optlevel: Literal[1, 2, 3] = Field(2, description="Optimisation: 1 compiles fastest, 3 longest.")
    model_type: Literal["generic", "transformer"] = Field(
        "transformer", description="Kind of model that neuronx-cc optimises for."
    )
    inline_weights_to_neff: bool = Field(
        False, description="Build the weights into every graph: faster, as they can be laid out, and larger."
    )
    dynamic_batch_size: bool = Field(
        False,
        description="Let each graph take any number of rows; it works through them in parts of its own size.",
    )
    async_load: bool = Field(False, description="Load the graphs onto the device side by side, in the background.")
    lazy_load: bool = Field(False, description="Load a graph onto the device when it is first called.")
    compiler_args: tuple[str, ...] = Field((), description="Further arguments of neuronx-cc.")


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
        # Later runtimes take what earlier compilers made; from 2.13 on it is TorchNeuron, another interface.
        runtime={"torch-neuronx": ">={release},<2.13"},
        runtime_install="python -m pip install {} --extra-index-url https://pip.repos.neuron.amazonaws.com",
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look for torch_neuronx, neuronx-cc and a Neuron device, without importing anything."""
        return _TOOLCHAIN.probe()

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch-neuronx, its compiler and bridge, torch and transformers."""
        return installed_versions(("torch-neuronx", "neuronx-cc", "libneuronxla", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code is the device's."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph a shape bucket on the CPU, and store the weights once."""
        options = NeuronxOptions.model_validate(dict(component.options))
        arguments = compiler_arguments(options, component.precision)
        torch_neuronx = _TOOLCHAIN.import_module("torch_neuronx")
        if not hasattr(torch_neuronx, "trace"):
            raise CompileError(
                f"torch-neuronx {self.toolchain().get('torch-neuronx')} has no trace: it is TorchNeuron.",
                hint=f"Run: {_TOOLCHAIN.install}",
            )
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        module = as_tuple_module(graph)
        stand_ins = {
            name: weight.new_zeros(()).expand(weight.shape) for name, weight in module.state_dict().items()
        }

        def trace(tensors: tuple[Any, ...], work: Path) -> Any:
            traced = torch_neuronx.trace(
                module,
                tensors,
                compiler_workdir=str(work),
                compiler_args=[*arguments, "--logfile", str(work / "log-neuron-cc.txt")],
                inline_weights_to_neff=options.inline_weights_to_neff,
                # Neither looks for a device nor occupies one; --target says what the code is for.
                cpu_backend=True,
            )
            if options.dynamic_batch_size:
                traced = torch_neuronx.dynamic_batch(traced)
            # Both have to be called between tracing and saving.
            if options.async_load:
                torch_neuronx.async_load(traced)
            if options.lazy_load:
                torch_neuronx.lazy_load(traced)
            if not options.inline_weights_to_neff:
                torch_neuronx.replace_weights(traced, stand_ins)
            return traced

        files = compile_buckets(graph, component, out_dir, compiler="torch_neuronx.trace", trace=trace)
        tied: dict[str, str] = {}
        if not options.inline_weights_to_neff:
            report_progress("writing the weights")
            tied = _write_weights(module.state_dict(), out_dir / _WEIGHTS)
            files = (*files, _WEIGHTS)
        return CompiledComponent(
            files,
            graph.inputs,
            graph.outputs,
            graph.output_class,
            graph.pad_token_id,
            load_options={
                "dynamic_batch_size": options.dynamic_batch_size,
                "inline_weights_to_neff": options.inline_weights_to_neff,
                "tied_weights": dict(tied),
            },
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load every shape bucket, give all the same weights, and move them to one NeuronCore."""
        # It registers the operators that the graphs consist of.
        torch_neuronx = _TOOLCHAIN.import_module("torch_neuronx")
        loaded = component.load_options
        weights = (
            None if loaded["inline_weights_to_neff"] else _read_weights(component_dir, loaded["tied_weights"])
        )

        def prepare(graph: Any) -> Any:
            if weights is not None:
                torch_neuronx.replace_weights(graph, weights)
                # Left on the CPU, they would cross to the device at every call.
                torch_neuronx.move_trace_to_device(graph, _CORE)
            return graph

        graphs = load_buckets(component_dir, component, runtime="torch_neuronx", prepare=prepare)
        return TracedRunner(graphs, component, any_batch=bool(loaded["dynamic_batch_size"]))


def compiler_arguments(options: NeuronxOptions, precision: Precision) -> tuple[str, ...]:
    """Return neuronx-cc's arguments.

    Raises:
        SpecError: the casts contradict the precision, or `compiler_args` repeats another option.
    """
    extra = tuple(word for argument in options.compiler_args for word in argument.split())
    for word in extra:
        own = _OWN_FLAGS.get(word.partition("=")[0])
        if own is not None:
            raise SpecError(
                f"neuronx: compiler_args holds {word}, which the option {own} decides.",
                hint=f"Give {own} instead.",
            )
    allowed = _CAST_TYPES[precision]
    kind = options.auto_cast_type or allowed[0]
    mode = options.auto_cast or ("none" if kind is None else "matmult")
    fits = kind in allowed and (mode == "none") == (kind is None)
    if not fits:
        raise contradiction(
            "neuronx",
            f"auto_cast {mode} with auto_cast_type {kind or '(none given)'}",
            precision.value,
            "Leave both empty, or ask for the precision that is meant.",
        )
    casts = ("--auto-cast", mode) + (() if kind is None else ("--auto-cast-type", kind))
    return (
        *("--target", options.instance_type),
        *casts,
        *("--optlevel", str(options.optlevel)),
        *("--model-type", options.model_type),
        *extra,
    )


def _write_weights(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write each tensor once, and return the names that share another's tensor, each with that other name."""
    from safetensors.torch import save_file

    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    tied = {}
    for name, tensor in state.items():
        first = kept.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if first != name:
            tied[name] = first
    save_file({name: state[name].contiguous() for name in kept.values()}, path)
    return tied


def _read_weights(component_dir: Path, tied: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        weights: dict[str, Any] = load_file(component_dir / _WEIGHTS)
        return weights | {name: weights[first] for name, first in tied.items()}
    except Exception as error:
        raise LoadError(
            f"{_WEIGHTS} cannot be loaded: {first_line(error)}.", hint="Fetch the artifact again."
        ) from error
