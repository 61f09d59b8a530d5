"""blade: BladeDISC's torch_blade optimizes one traced graph for each shape bucket.

Written from BladeDISC's documentation. BladeDISC itself takes dynamic shapes, but graphs traced from transformers
do not, so each shape bucket has its own graph.
"""

from __future__ import annotations

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
from compileflow.contracts.toolkit import installed_versions
from compileflow.errors import CompileError, LoadError, TargetUnavailableError
from compileflow.source_model import as_tuple_module, load_source_model
from compileflow.spec import TEXT_TASKS, Precision
from compileflow.targets._traced import TracedRunner
from compileflow.targets._vendor.buckets import compile_buckets, load_buckets
from compileflow.targets._vendor.toolchain import VendorToolchain, precision_conflict

# A wheel built without CUDA has a different name.
_DISTRIBUTIONS = ("torch_blade", "torch_blade-cpu")
_TOOLCHAIN = VendorToolchain(
    compiler={"torch_blade": _DISTRIBUTIONS},
    runtime={"torch_blade": _DISTRIBUTIONS},
    install="bash ./ci_build/build_pytorch_blade.sh && python setup.py bdist_wheel && python -m pip install"
    " dist/*.whl, in pytorch_blade/ of a checkout of https://github.com/alibaba/BladeDISC",
    note="PyPI has no wheel, and each wheel needs the PyTorch version that it was built with",
)


class BladeOptions(TargetOptions):
    """Options of the blade target. All except `device` have the names of torch_blade.Config."""

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Device that the graphs are compiled for and run on."
    )
    optimization_pipeline: Literal["DISC", "TensorRT"] = Field(
        "DISC", description="Compiler that torch_blade uses."
    )
    disc_cpu_fast_math_level: int = Field(
        0,
        ge=0,
        le=4,
        description="Inexact arithmetic allowed on the CPU: 0 none, 4 all. The default of torch_blade is 4.",
    )
    fp16_fallback_op_ratio: float = Field(
        0.0, ge=0, le=1, description="At fp16: fraction of operators that stay in fp32."
    )
    enable_static_shape: bool = Field(
        False, description="Let the compiler treat the shape of the bucket as a constant."
    )
    freeze_module: bool = Field(True, description="Turn weights into constants of the graph.")
    disc_cluster_max_iter_count: int = Field(10, ge=1, description="Rounds of merging operators into subgraphs.")
    disc_compile_for_multi_cuda_targets: bool = Field(
        True, description="Generate code for several CUDA compute capabilities; compiling takes longer."
    )
    customize_op_white_list: tuple[str, ...] = Field(
        (), strict=False, description="Additional TorchScript operators to compile, for example aten::flatten."
    )
    customize_op_black_list: tuple[str, ...] = Field(
        (), strict=False, description="TorchScript operators to leave to torch, for example aten::flatten."
    )

    def check_precision(self, precision: Precision) -> None:
        """Refuse operators that stay in fp32 if none computes in fp16."""
        if self.fp16_fallback_op_ratio and precision is not Precision.FP16:
            raise precision_conflict(
                "blade",
                f"fp16_fallback_op_ratio {self.fp16_fallback_op_ratio:g}",
                precision.value,
                "Omit the option, or request fp16.",
            )


class BladeTarget:
    """Optimize with BladeDISC, for the CPU or for CUDA."""

    name: ClassVar[str] = "blade"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "BladeDISC's torch_blade for CPU and CUDA; fixed shapes"
    Options: ClassVar[type[TargetOptions]] = BladeOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=TEXT_TASKS,
        precisions=(Precision.FP32, Precision.FP16),
        devices=("cpu", "cuda"),
        dynamic_axes=False,
        # A wheel needs the PyTorch that it was built with. The documentation does not mention other versions.
        runtime=dict.fromkeys((*_DISTRIBUTIONS, "torch"), "=={minor}.*"),
        runtime_install="pip install {}, with torch_blade from a wheel that was built for this torch",
    )

    def probe(self) -> Availability:
        """Check whether torch_blade is installed, without importing it."""
        return _TOOLCHAIN.probe()

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch_blade, torch and transformers."""
        return installed_versions((*_DISTRIBUTIONS, "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): BladeDISC does not document which CPU its code needs."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace and optimize one graph for each shape bucket; every graph carries its weights."""
        options = BladeOptions.model_validate(dict(component.options))
        options.check_precision(component.precision)
        torch_blade = _TOOLCHAIN.import_module("torch_blade")
        _check_cuda(options.device)
        config = _config(torch_blade, options, component.precision)
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        module = as_tuple_module(source_model).to(options.device)

        def trace(tensors: tuple[Any, ...], work: Path) -> Any:
            inputs = tuple(tensor.to(options.device) for tensor in tensors)
            with config:
                return torch_blade.optimize(module, allow_tracing=True, model_inputs=inputs)

        files = compile_buckets(source_model, component, out_dir, compiler="torch_blade.optimize", trace=trace)
        return source_model.compiled_to(files, {"device": options.device})

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the graph of every shape bucket.

        Calls queue, because BladeDISC does not document whether its graphs are thread-safe.
        """
        compiled_for = str(component.load_option("device"))
        if device != compiled_for:
            raise LoadError(
                f"Cannot load on {device}: the graphs were compiled for {compiled_for}.",
                hint=f"Load with device={compiled_for!r}, or compile with the option device={device!r}.",
            )
        # The import registers the classes of the graphs.
        _TOOLCHAIN.import_module("torch_blade")
        _check_cuda(device)
        graphs = load_buckets(component_dir, component, runtime="torch_blade", map_location=device)
        return TracedRunner(graphs, component, device=device, queued=True, threads=threads)


def _config(torch_blade: Any, options: BladeOptions, precision: Precision) -> Any:
    """Return torch_blade's configuration; options that the user leaves out keep torch_blade's defaults."""
    settings: dict[str, Any] = {
        name: list(value) if isinstance(value := getattr(options, name), tuple) else value
        for name in options.model_fields_set - {"device"}
    }
    settings["disc_cpu_fast_math_level"] = options.disc_cpu_fast_math_level
    settings["enable_fp16"] = precision is Precision.FP16
    config = torch_blade.Config()
    for name, value in sorted(settings.items()):
        if not hasattr(config, name):
            raise CompileError(
                f"This torch_blade has no setting {name!r}.",
                hint="Omit the option, or install a newer torch_blade.",
            )
        try:
            setattr(config, name, value)
        # torch_blade checks its settings with assert.
        except (AssertionError, ValueError) as error:
            raise CompileError(
                f"torch_blade refused {name} {value!r}: {error}", hint="Choose another value."
            ) from error
    return config


def _check_cuda(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise TargetUnavailableError(
            "The graphs need cuda, but torch finds no CUDA device on this machine.",
            hint="Use a machine with an NVIDIA GPU, or compile with the option device='cpu'.",
        )
