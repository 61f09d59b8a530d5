"""hyperdex: HyperAccel's HyperDex toolchain compiles a model's folder for LPUs. Written from its documentation.

HyperAccel documents decoders alone (AutoModelForCausalLM, generate). The compiler takes a Hugging Face model's
folder, and the runtime's interface is said to be that of transformers; so the class of the task is looked up by
its name in transformers, and called as there. Where the toolchain lacks that class, a compile is refused.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compileflow.contracts import (
    Arrays,
    Availability,
    Capabilities,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Device,
    Runner,
    TargetOptions,
)
from compileflow.contracts.digests import list_files
from compileflow.contracts.toolkit import installed_versions, report_progress, torch_threads
from compileflow.errors import CompileError, InputError, LoadError, SpecError, first_line
from compileflow.source_model import AUTO_CLASSES, HEADS, SourceModel, load_config, load_source_model
from compileflow.spec import TEXT_TASKS, Precision
from compileflow.targets._vendor.toolchain import VendorToolchain, vendor_call

_FOLDER = "model"
_PARTS = {"hyperdex": ("hyperdex-toolchain",)}
_TOOLCHAIN = VendorToolchain(
    compiler=_PARTS,
    runtime=_PARTS,
    install="pip install -i https://pypi.hyperaccel.ai/simple hyperdex-toolchain",
    note="HyperAccel gives accounts for its index",
    device="xfpga*",
    device_hint="use a server with an LPU, and install XRT and the device package as HyperAccel describes",
)


class HyperdexOptions(TargetOptions):
    """Options of the hyperdex target, named as AutoCompiler.compile names them."""

    num_device: int = Field(1, ge=1, description="LPUs that the model is spread over.")
    max_length: int | None = Field(
        None, ge=1, description="Longest input in tokens. Empty: the component's maximum sequence length."
    )
    low_memory_usage: bool = Field(False, description="Compile with less memory.")
    fast_compile: bool = Field(True, description="Compile faster; on in all of HyperAccel's examples.")


class HyperdexTarget:
    """Compile with HyperDex; rows of any length, one at a time."""

    name: ClassVar[str] = "hyperdex"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "HyperAccel's HyperDex for LPUs; rows of any length; decoders alone are documented"
    Options: ClassVar[type[TargetOptions]] = HyperdexOptions
    # FP16 is what the LPU computes in; HyperDex has no argument for it. The device is among the prerequisites.
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=TEXT_TASKS,
        precisions=(Precision.FP16,),
        devices=("lpu",),
        dynamic_axes=True,
        compile_needs_device=True,
        # Nothing is documented about other versions.
        runtime={"hyperdex-toolchain": "=={minor}.*"},
        runtime_install="pip install -i https://pypi.hyperaccel.ai/simple {}",
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look for the toolchain and an LPU, without importing anything."""
        return _TOOLCHAIN.probe(compile_needs_device=self.capabilities.compile_needs_device)

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the HyperDex toolchain, torch and transformers."""
        return installed_versions(("hyperdex-toolchain", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code is the device's."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Copy the model's folder and let HyperDex compile it there.

        Everything in that folder is kept: which files the runtime reads is not documented.
        """
        options = HyperdexOptions.model_validate(dict(component.options))
        longest = options.max_length or component.max_sequence_length
        if longest < component.max_sequence_length:
            raise SpecError(
                f"hyperdex: max_length is {longest}, and {component.max_sequence_length} tokens were asked for.",
                hint="Leave it out, or ask for a shorter max_sequence_length.",
            )
        _check_head(source_dir, component)
        tools = _TOOLCHAIN.import_module("hyperdex.tools")
        auto_class = AUTO_CLASSES[component.hf_task]
        if not hasattr(_TOOLCHAIN.import_module("hyperdex.transformers"), auto_class):
            raise CompileError(
                f"hyperdex.transformers has no {auto_class}, which {component.hf_task.value} needs.",
                hint="Choose another target: HyperAccel documents AutoModelForCausalLM alone.",
            )
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        folder = out_dir / _FOLDER
        before = list_files(source_dir)
        for record in before:
            # Not copytree: it would copy the source's modes, which may forbid writing.
            (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, folder / record.path)
        report_progress("compiling with HyperDex")
        with torch_threads(component.threads), vendor_call("AutoCompiler.compile"):
            tools.AutoCompiler().compile(
                model_id=str(folder),
                num_device=options.num_device,
                max_length=longest,
                low_memory_usage=options.low_memory_usage,
                fast_compile=options.fast_compile,
            )
        if list_files(folder) == before:
            raise CompileError(
                "AutoCompiler.compile wrote nothing into the model's folder.",
                hint="Look where this HyperDex puts its files; an artifact has to hold them.",
            )
        return _compiled(graph, out_dir, {"auto_class": auto_class, "num_device": options.num_device})

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the compiled folder onto as many LPUs as it was compiled for."""
        runtime = _TOOLCHAIN.import_module("hyperdex.transformers")
        loaded = component.load_options
        try:
            model = getattr(runtime, str(loaded["auto_class"])).from_pretrained(
                model_id=str(component_dir / _FOLDER), device_map={"lpu": loaded["num_device"]}
            )
        except Exception as error:
            raise LoadError(
                f"{_FOLDER} cannot be loaded by hyperdex.transformers: {first_line(error)}.",
                hint="Use the versions that the manifest names, or compile again.",
            ) from error
        return _HyperdexRunner(model, component)


class _HyperdexRunner:
    """Gives rows to the LPU one at a time, as HyperAccel asks; concurrent calls wait for one another."""

    def __init__(self, model: Any, component: ComponentRecord):
        self._model = model
        self._component = component
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        model = self._model
        if model is None:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        named = {record.name: inputs[record.name] for record in self._component.inputs}
        rows = range(len(next(iter(named.values()))))
        with self._lock:
            answers = [model(**{name: value[row : row + 1] for name, value in named.items()}) for row in rows]
        return {
            record.name: np.concatenate(
                [np.asarray(getattr(answer, record.name), np.float32) for answer in answers]
            )
            for record in self._component.outputs
        }

    def close(self) -> None:
        self._model = None


def _check_head(source_dir: Path, component: ComponentPlan) -> None:
    """Refuse a task that is not the saved model's own: the compiler has no argument for it.

    Raises:
        SpecError: config.json names the architecture of another task.
    """
    config = load_config(source_dir, trust_remote_code=component.trust_remote_code)
    for name in getattr(config, "architectures", None) or ():
        own = next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
        if own is not component.hf_task:
            raise SpecError(
                f"hyperdex compiles {name} as it was saved, and {component.hf_task.value} was asked for.",
                hint=f"Ask for {own.value}." if own else "Choose another target.",
            )


def _compiled(graph: SourceModel, out_dir: Path, load_options: Mapping[str, Any]) -> CompiledComponent:
    return CompiledComponent(
        tuple(record.path for record in list_files(out_dir)),
        graph.inputs,
        graph.outputs,
        graph.output_class,
        graph.pad_token_id,
        load_options=load_options,
    )
