"""openvino: transformers' OpenVINO exporter with dynamic axes, int8 by NNCF, run by OpenVINO's CPU plugin.

The precision is always said when a graph is loaded: left to itself, the plugin computes in bf16 where it can.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from compileflow.contracts.toolkit import (
    environment,
    installed_versions,
    lacking_precisions,
    report_progress,
    torch_threads,
    undisturbed_process,
)
from compileflow.errors import CompileError, InputError, LoadError, first_line
from compileflow.source_model import (
    SourceModel,
    calibration_tensors,
    example_inputs,
    example_length,
    free_axes,
    load_source_model,
)
from compileflow.spec import HfTask, Precision

_FILE = "model.xml"
_FILES = (_FILE, "model.bin")
_NEEDS = ("torch", "transformers", "openvino", "nncf")
# int8 graphs compute in fp32 what is not int8.
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.FP16: "f16", Precision.INT8: "f32"}
# Activations are quantised at run time in groups of so many, where the CPU has kernels for it; 0 is never.
_GROUP_SIZE = {"dynamic": 32, "static": 0, "weights": 0}
# Both converters send usage data and keep an identifier in the home folder, except where CI is set.
_NO_TELEMETRY = {"CI": "true", "NNCF_CI": "true"}

Quantization = Literal["dynamic", "static", "weights"]


class OpenVinoOptions(TargetOptions):
    """Options of the openvino target."""

    quantization: Quantization = Field(
        "dynamic",
        description="At int8: activations quantised in each call where the CPU has kernels for it (dynamic), with "
        "ranges from natural examples (static), or never (weights).",
    )
    performance_hint: Literal["latency", "throughput"] = Field(
        "latency",
        description="latency: one call at a time uses all threads. throughput: one call a thread, many at once.",
    )

    def needs_calibration(self, precision: Precision) -> bool:
        """Only static int8 looks at examples."""
        return precision is Precision.INT8 and self.quantization == "static"


class OpenVinoTarget:
    """Convert to OpenVINO's IR, any batch size and length, and run with its CPU plugin."""

    name: ClassVar[str] = "openvino"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "OpenVINO IR with dynamic axes, int8 by NNCF; CPU fleets"
    Options: ClassVar[type[TargetOptions]] = OpenVinoOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=tuple(Precision),
        devices=("cpu",),
        dynamic_axes=True,
        variants={Precision.INT8: ({"quantization": "dynamic"}, {"quantization": "static"})},
        runtime={"openvino": ">={minor}"},
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look which distributions are installed and what the CPU can compute, without importing anything."""
        missing = [name for name in _NEEDS if name not in self.toolchain()]
        if missing:
            return Availability(
                can_compile=False,
                can_run="openvino" not in missing,
                reason=f"{', '.join(missing)} not installed",
                hint="pip install 'compileflow[openvino]'",
                lacking=lacking_precisions(self.capabilities.precisions),
            )
        return Availability(
            can_compile=True, can_run=True, lacking=lacking_precisions(self.capabilities.precisions)
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the exporter's, the quantiser's and the runtime's distributions."""
        return installed_versions(_NEEDS)

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): OpenVINO chooses its kernels when it loads."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes, and quantise it where int8 is asked for."""
        options = OpenVinoOptions.model_validate(dict(component.options))
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        length = example_length(graph.inputs, component.max_sequence_length)
        example = example_inputs(graph.inputs, 3, length, graph.vocab_size, graph.pad_token_id)
        calibration = calibration_tensors(graph, component)
        with torch_threads(component.threads), environment(**_NO_TELEMETRY):
            report_progress(f"converting to OpenVINO IR ({component.precision.value})")
            model = _export(graph, example, component.precision, options.quantization, calibration)
            found = {name for port in model.outputs for name in port.get_names()}
            lost = [record.name for record in graph.outputs if record.name not in found]
            if lost:
                raise CompileError(
                    f"The OpenVINO export lost the output {lost[0]!r}; it has {', '.join(sorted(found))}.",
                    hint="Report this model's architecture; another target may compile it.",
                )
            report_progress("writing the IR")
            import openvino

            openvino.save_model(
                model, str(out_dir / _FILE), compress_to_fp16=component.precision is Precision.FP16
            )
        return CompiledComponent(
            _FILES,
            graph.inputs,
            graph.outputs,
            graph.output_class,
            graph.pad_token_id,
            frame_convolutions=graph.frame_convolutions,
            load_options={
                "performance_hint": options.performance_hint,
                "dynamic_quantization_group_size": (
                    _GROUP_SIZE[options.quantization] if component.precision is Precision.INT8 else 0
                ),
            },
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Compile the IR for this CPU, at the artifact's precision and no other."""
        import openvino

        hint = str(component.load_options["performance_hint"])
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": hint.upper(),
            "INFERENCE_PRECISION_HINT": _HINTS[component.precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": component.load_options["dynamic_quantization_group_size"],
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
            settings["NUM_STREAMS"] = threads if hint == "throughput" else 1
        try:
            with undisturbed_process():
                model = openvino.Core().compile_model(str(component_dir / _FILE), "CPU", settings)
        except Exception as error:
            raise LoadError(
                f"{_FILE} cannot be loaded by openvino {openvino.__version__}: {_reason(error)}.",
                hint="Use the openvino version that the manifest names, or compile again.",
            ) from error
        return _OpenVinoRunner(model, component)


class _OpenVinoRunner:
    """Runs one compiled model; each call that overlaps another gets an inference request of its own."""

    def __init__(self, model: Any, component: ComponentRecord):
        self._model = model
        self._names = [record.name for record in component.outputs]
        # A graph may drop an input that does not matter to it.
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._idle: list[Any] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        model = self._model
        if model is None:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        try:
            request = self._idle.pop()
        except IndexError:
            request = model.create_infer_request()
        used = {name: value for name, value in inputs.items() if name in self._inputs}
        answers = request.infer(used)
        outputs = {name: answers[name].copy() for name in self._names}
        self._idle.append(request)
        return outputs

    def close(self) -> None:
        self._model = None
        self._idle = []


def _export(
    graph: SourceModel, example: Arrays, precision: Precision, quantization: str, calibration: list[Any]
) -> Any:
    import torch
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    batch, sequence = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    config = OpenVINOConfig(
        dynamic=True,
        dynamic_shapes=free_axes(graph.inputs, batch, sequence),
        quantizer=_quantizer(quantization, calibration) if precision is Precision.INT8 else None,
    )
    tensors = {name: torch.as_tensor(value) for name, value in example.items()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter says that it was tested with an older torch, and torch.export deprecates its own parts.
            warnings.simplefilter("ignore")
            return OpenVINOExporter().export(graph.model, tensors, config).program
    except Exception as error:
        raise CompileError(
            f"The OpenVINO exporter refused the model: {type(error).__name__}: {_reason(error)}.",
            hint="Try another target; `compileflow targets` lists them.",
        ) from error


def _quantizer(quantization: str, calibration: list[Any]) -> Any:
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig, NNCFWeightCompressionConfig

    logging.getLogger("nncf").setLevel(logging.ERROR)
    if quantization != "static":
        return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_ASYM))
    # NNCF would look at 300 batches, and takes the first ones; all of them, since they are sorted by length.
    config = NNCFQuantizationConfig(subset_size=len(calibration))
    return NNCFOpenVINOQuantizer(config, calibration_dataset=calibration)


def _reason(error: Exception) -> str:
    # Operators without a conversion are listed last, after the place in OpenVINO's own source.
    listed = [line.strip() for line in str(error).splitlines() if line.strip().startswith("-- ")]
    return listed[0].removeprefix("-- ")[:300] if listed else first_line(error)
