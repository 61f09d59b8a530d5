"""onnx-runtime: transformers' ONNX exporter with dynamic axes and fused graphs, run by ONNX Runtime."""

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
from compileflow.contracts.toolkit import installed_versions, report_progress, torch_threads
from compileflow.errors import CompileError, InputError, LoadError, TargetUnavailableError
from compileflow.source_model import (
    SourceModel,
    calibration_tensors,
    example_inputs,
    example_length,
    free_axes,
    load_source_model,
)
from compileflow.spec import HfTask, Precision

_FILE = "model.onnx"
_NEEDS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


class OnnxRuntimeOptions(TargetOptions):
    """Options of the onnx-runtime target."""

    fusions: Literal["cpu", "none"] = Field(
        "cpu", description="Fuse attention, layer normalisation and GELU for ONNX Runtime's CPU kernels."
    )
    opset: int | None = Field(None, ge=18, le=25, description="ONNX opset. Empty: the exporter's own choice.")
    quantization: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="At int8: ranges of activations measured in each call (dynamic), or once, on natural examples "
        "(static).",
    )
    reduce_range: bool = Field(
        True,
        description="At int8: weights of 7 bits. With 8, CPUs without VNNI overflow; set it to false for fleets "
        "that all have it.",
    )

    def needs_calibration(self, precision: Precision) -> bool:
        """Only static int8 looks at examples."""
        return precision is Precision.INT8 and self.quantization == "static"


class OnnxRuntimeTarget:
    """Export to ONNX, any batch size and length, and run with ONNX Runtime."""

    name: ClassVar[str] = "onnx-runtime"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "ONNX with dynamic axes and fused graphs, int8 by ONNX Runtime; CPU fleets"
    Options: ClassVar[type[TargetOptions]] = OnnxRuntimeOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.INT8),
        devices=("cpu",),
        dynamic_axes=True,
        variants={Precision.INT8: ({"quantization": "dynamic"}, {"quantization": "static"})},
        runtime={"onnxruntime": ">={minor}"},
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look which distributions are installed, without importing them."""
        missing = [name for name in _NEEDS if name not in self.toolchain()]
        if not missing:
            return Availability(can_compile=True, can_run=True)
        return Availability(
            can_compile=False,
            can_run="onnxruntime" not in missing,
            reason=f"{', '.join(missing)} not installed",
            hint="pip install 'compileflow[onnx-runtime]'",
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the exporter's, the quantiser's and the runtime's distributions."""
        return installed_versions((*_NEEDS, "nncf"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): ONNX Runtime chooses its kernels when it loads."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes."""
        options = OnnxRuntimeOptions.model_validate(dict(component.options))
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        # A batch of one would be taken for a constant, and the file would refuse a batch of two.
        length = example_length(graph.inputs, component.max_sequence_length)
        example = example_inputs(graph.inputs, 3, length, graph.vocab_size, graph.pad_token_id)
        quantizer = _quantizer(options, component, graph) if component.precision is Precision.INT8 else None
        report_progress(f"exporting to ONNX ({component.precision.value})")
        with torch_threads(component.threads):
            model = _export(graph, example, options, quantizer)
        names = {value.name for value in model.graph.outputs}
        lost = [record.name for record in graph.outputs if record.name not in names]
        if lost:
            raise CompileError(
                f"The ONNX export lost the output {lost[0]!r}; it has {', '.join(sorted(names))}.",
                hint="Report this model's architecture; another target may compile it.",
            )
        report_progress("writing the ONNX graph")
        import onnx_ir

        onnx_ir.save(model, str(out_dir / _FILE), external_data=f"{_FILE}.data")
        return CompiledComponent(
            (_FILE, f"{_FILE}.data"),
            graph.inputs,
            graph.outputs,
            graph.output_class,
            graph.pad_token_id,
            frame_convolutions=graph.frame_convolutions,
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Open an inference session; ONNX Runtime optimises the graph for this CPU."""
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        if threads is not None:
            settings.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(
                str(component_dir / _FILE), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise LoadError(
                f"{_FILE} cannot be loaded by onnxruntime {onnxruntime.__version__}: {error}",
                hint="Use the onnxruntime version that the manifest names, or compile again.",
            ) from error
        return _OnnxRuntimeRunner(session, component)


class _OnnxRuntimeRunner:
    """Runs one inference session."""

    def __init__(self, session: Any, component: ComponentRecord):
        self._session = session
        self._names = [record.name for record in component.outputs]
        # A graph may drop an input that does not matter to it.
        self._inputs = {value.name for value in session.get_inputs()}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if self._session is None:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        used = {name: value for name, value in inputs.items() if name in self._inputs}
        return dict(zip(self._names, self._session.run(self._names, used), strict=True))

    def close(self) -> None:
        self._session = None


def _quantizer(options: OnnxRuntimeOptions, component: ComponentPlan, graph: SourceModel) -> Any:
    """Quantise what multiplies by weights, one scale a column: products of two activations lose most."""
    if options.quantization == "static":
        return _static_quantizer(options, calibration_tensors(graph, component))
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    return OnnxRuntimeQuantizer(
        OnnxRuntimeDynamicConfig(
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            reduce_range=options.reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    )


def _static_quantizer(options: OnnxRuntimeOptions, samples: list[dict[str, Any]]) -> Any:
    """NNCF's, which moves outliers of activations into the weights; ONNX Runtime's own keeps far less."""
    try:
        import nncf
    except ImportError as error:
        raise TargetUnavailableError(
            "onnx-runtime needs nncf for static int8, and it is not installed.",
            hint="Run: pip install 'compileflow[int8]'",
        ) from error
    from transformers.exporters import NNCFOnnxQuantizer, NNCFQuantizationConfig

    logging.getLogger("nncf").setLevel(logging.ERROR)

    class Quantizer(NNCFOnnxQuantizer):  # type: ignore[misc]
        """The exporter's fusions leave a constant with another shape than it is declared with; NNCF refuses it."""

        def quantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            for value in model.graph.initializers.values():
                if value.const_value is not None:
                    value.shape = value.const_value.shape
            return super().quantize(model, *args, **kwargs)

    seven_bits = nncf.OverflowFix.ENABLE if options.reduce_range else nncf.OverflowFix.DISABLE
    config = NNCFQuantizationConfig(
        # All batches: NNCF takes the first ones, and they are sorted by length.
        subset_size=len(samples),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=seven_bits),
    )
    return Quantizer(config, calibration_dataset=samples)


def _export(graph: SourceModel, example: Arrays, options: OnnxRuntimeOptions, quantizer: Any) -> Any:
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    batch, sequence = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=free_axes(graph.inputs, batch, sequence),
        ort_fusions=None if options.fusions == "none" else options.fusions,
        opset_version=options.opset,
        quantizer=quantizer,
    )
    tensors = {name: torch.as_tensor(value) for name, value in example.items()}
    # The exporter says that it was tested with an older torch, and torch.export deprecates its own parts.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return OnnxExporter().export(graph.model, tensors, config).program
    except Exception as error:
        cause: BaseException = error
        # Its outer errors are pages of advice; the innermost names the operator.
        while isinstance(cause, torch.onnx.OnnxExporterError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise CompileError(
            f"The ONNX exporter refused the model: {type(cause).__name__}: {str(cause)[:300]}",
            hint="Try another target; `compileflow targets` lists them.",
        ) from error
