"""openvino: transformers' OpenVINO exporter with dynamic axes, int8 by NNCF, run by OpenVINO's CPU plugin.

Every load names the precision: by default the plugin computes in bf16 where the CPU can.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

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
    in_parts,
    installed_versions,
    lacking_precisions,
    load_error,
    probe_installed,
    refusal,
    released_pages,
    report_progress,
    require_open,
    torch_threads,
    undisturbed_process,
)
from compileflow.errors import SpecError, first_line
from compileflow.source_model import (
    SourceModel,
    as_tuple_module,
    calibration_tensors,
    free_axes,
    load_source_model,
)
from compileflow.source_model.free_batch import free_batch, free_repeats
from compileflow.source_model.position_buckets import tabulated_buckets
from compileflow.source_model.whole_rows import whole_rows
from compileflow.spec import HfTask, Precision
from compileflow.targets._openvino_decoder import (
    OpenVinoDecoder,
    choose_logits,
    compress_weights,
    export_decoder,
    whole_row_inputs,
)
from compileflow.targets._openvino_graph import divide_as_torch, keep_rounded_quotients, resize_as_torch
from compileflow.targets._openvino_tokenizer import CONVERTER, write_tokenizer
from compileflow.targets._openvino_tokenizer import FILES as TOKENIZER_FILES

_FILE = "model.xml"
_FILES = (_FILE, "model.bin")
# Operations without a tensor of their own: inputs, outputs, and the state of a decoder.
_NO_TENSORS = ("Parameter", "Result", "Assign", "ReadValue")
# The names that openvino_genai looks for in a folder.
_DECODER_FILE = "openvino_model.xml"
_DECODER_FILES = (_DECODER_FILE, "openvino_model.bin")
_COMPILE_NEEDS = ("torch", "transformers", "openvino", "nncf")
# int8 and int4 graphs compute the other operators in fp32.
_HINTS = {
    Precision.FP32: "f32",
    Precision.BF16: "bf16",
    Precision.FP16: "f16",
    Precision.INT8: "f32",
    Precision.INT4: "f32",
}
_CACHE_HINTS = {**_HINTS, Precision.INT8: "u8"}
# Weights that share one scale at int4. Every common hidden size is a multiple.
_WEIGHTS_PER_SCALE = 64
# Only the load options of a decoder hold it.
_CACHE_OPTION = "kv_cache_precision"
_QUANTIZED = (Precision.INT8, Precision.INT4)
# Size of the groups in which activations are quantized at run time, where the CPU has kernels for it; 0: never.
_GROUP_SIZE = {"dynamic": 32, "static": 0, "weights": 0}
# OpenVINO at its import, and both converters, send usage data and keep an identifier in the home folder without
# these variables.
_NO_TELEMETRY = {"CI": "true", "NNCF_CI": "true"}

Quantization = Literal["dynamic", "static", "weights"]
# Formats that activations are computed in, and formats that a cache is kept in.
ComputePrecision = Literal["fp32", "bf16", "fp16"]
CachePrecision = Literal["fp32", "bf16", "fp16", "int8"]


class OpenVinoOptions(TargetOptions):
    """Options of the openvino target."""

    quantization: Quantization = Field(
        "dynamic",
        description="At int8 and int4: quantize activations in each call where the CPU has kernels for it "
        "(dynamic), with ranges from natural examples (static; int8 only, not for text-generation), or never "
        "(weights).",
    )
    exporter: Literal["graph", "trace"] = Field(
        "graph",
        description="graph: export the whole graph. trace: export the operators that one example runs, which "
        "works for some models that graph refuses. If graph fails, compileflow tries trace automatically. "
        "trace does not support int8.",
    )
    performance_hint: Literal["latency", "throughput"] = Field(
        "latency",
        description="latency: each call uses all threads. throughput: each call uses one thread, and many calls "
        "run at once.",
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        le=4096,
        description=f"At int4: weights that share one scale; -1 for a whole channel. null: {_WEIGHTS_PER_SCALE}.",
    )
    symmetric: bool = Field(False, description="At int4: store the weights without zero points.")
    compute_precision: ComputePrecision | None = Field(
        None, description="For text-generation at int8 and int4: format of the computation. null: fp32."
    )
    kv_cache_precision: CachePrecision | None = Field(
        None,
        description="For text-generation: format of the keys and values of earlier tokens. null: the precision, "
        "and fp32 at int8 and int4.",
    )

    def needs_calibration(self, precision: Precision) -> bool:
        """Return True for static int8, which measures ranges on natural examples."""
        return precision is Precision.INT8 and self.quantization == "static"

    def check_precision(self, precision: Precision) -> None:
        """Refuse a trace at int8."""
        if self.exporter == "trace" and precision is Precision.INT8:
            raise SpecError("openvino cannot trace a model at int8.", hint="Choose fp32, or another target.")

    def check_task(self, hf_task: HfTask, precision: Precision) -> None:
        """Refuse a trace and static ranges for text generation, and options of generation for other tasks."""
        if not hf_task.generates:
            for name in ("group_size", "symmetric", "compute_precision", "kv_cache_precision"):
                if getattr(self, name):
                    raise SpecError(
                        f"openvino option {name} is only for text-generation, not for {hf_task.value}.",
                        hint=f"Leave {name} out.",
                    )
            return
        if self.exporter == "trace":
            raise SpecError("openvino cannot trace a model for text-generation.", hint="Leave exporter out.")
        if self.quantization == "static" and precision in _QUANTIZED:
            raise SpecError(
                "openvino does not quantize statically for text-generation.",
                hint="Choose quantization=dynamic or quantization=weights.",
            )
        if self.group_size == 0:
            raise SpecError("openvino option group_size is 0.", hint="Give -1 for a whole channel, or at least 1.")
        if precision is not Precision.INT4 and (self.group_size is not None or self.symmetric):
            name = "symmetric" if self.symmetric else "group_size"
            raise SpecError(f"openvino option {name} is only for int4.", hint=f"Leave {name} out.")
        if self.compute_precision is not None and precision not in _QUANTIZED:
            raise SpecError(
                f"openvino computes in {precision.value} at {precision.value}; compute_precision is for int8 and "
                "int4.",
                hint="Leave compute_precision out.",
            )

    def decoder_hints(self, precision: Precision) -> dict[str, JsonValue]:
        """Return the formats of the computation and of the cache, as OpenVINO names them."""
        compute = Precision(self.compute_precision or precision)
        cache = Precision(self.kv_cache_precision) if self.kv_cache_precision else None
        return {
            "inference_precision": _HINTS[compute],
            # Without a choice, the cache is as exact as the computation.
            _CACHE_OPTION: _CACHE_HINTS[cache] if cache else _HINTS[compute],
        }


class OpenVinoTarget:
    """Convert to OpenVINO IR for any batch size and length, and run with the CPU plugin."""

    name: ClassVar[str] = "openvino"
    version: ClassVar[int] = 4
    summary: ClassVar[str] = "OpenVINO IR with dynamic axes, int8 and int4 by NNCF; CPU fleets"
    Options: ClassVar[type[TargetOptions]] = OpenVinoOptions
    component_files: ClassVar[Sequence[str]] = (*_FILES, *_DECODER_FILES, *TOKENIZER_FILES)
    fallback_options: ClassVar[Mapping[str, JsonValue]] = {"exporter": "trace"}
    refused_model_types: ClassVar[Mapping[str, str]] = {
        "deformable_detr": "its exported graph answers differently",
        "feature-extraction/fsmt": "its code branches on the tokens of a call",
        "lw_detr": "its exported graph answers differently",
        "maskformer": "its export takes many minutes even for a tiny model",
    }
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.BF16, Precision.FP16, Precision.INT8),
        generation_precisions=tuple(Precision),
        devices=("cpu",),
        dynamic_axes=True,
        variants={Precision.INT8: ({"quantization": "dynamic"}, {"quantization": "static"})},
        runtime={"openvino": ">={minor}"},
    )

    def probe(self) -> Availability:
        """Check which distributions are installed and what the CPU can compute, without importing anything."""
        return probe_installed(
            _COMPILE_NEEDS,
            ("openvino",),
            install="pip install 'compileflow[compile,int8,openvino]'",
            runtime_install="pip install 'compileflow[openvino]'",
            lacking=lacking_precisions(self.capabilities.all_precisions),
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the exporter, the quantizer, the runtime and the converter of tokenizers."""
        return installed_versions((*_COMPILE_NEEDS, CONVERTER))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): OpenVINO chooses its kernels at load."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes, and quantize it at int8."""
        options = OpenVinoOptions.model_validate(dict(component.options))
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        if component.hf_task.generates:
            return _compile_decoder(source_model, source_dir, component, options, out_dir)
        example = source_model.export_tensors(component.max_sequence_length)
        calibration = calibration_tensors(source_model.inputs, component.calibration)
        with torch_threads(component.threads), environment(**_NO_TELEMETRY):
            report_progress(f"converting to OpenVINO IR ({component.precision.value})")
            if options.exporter == "trace":
                model = _trace(source_model, example)
            else:
                model = _export(source_model, example, component, options.quantization, calibration)
            output_names = {name for port in model.outputs for name in port.get_names()}
            source_model.check_outputs(output_names, "the OpenVINO exporter")
            resize_as_torch(model)
            divide_as_torch(model)
            report_progress("writing the IR")
            import openvino

            openvino.save_model(
                model, str(out_dir / _FILE), compress_to_fp16=component.precision is Precision.FP16
            )
        return source_model.compiled_to(
            _FILES,
            {
                "performance_hint": options.performance_hint,
                "dynamic_quantization_group_size": (
                    _GROUP_SIZE[options.quantization] if component.precision is Precision.INT8 else 0
                ),
            },
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Compile the IR for this CPU, in exactly the precision of the artifact."""
        is_decoder = _CACHE_OPTION in component.load_options
        path = str(component_dir / _file_of(component))
        with released_pages(component_dir):
            compiled = _compiled(_core(), path, component, threads)
        return OpenVinoDecoder(compiled) if is_decoder else _OpenVinoRunner(compiled, component)

    def observe(
        self,
        component_dir: Path,
        component: ComponentRecord,
        inputs: Mapping[str, NDArray[Any]],
        *,
        threads: int | None,
        parts: int = 1,
    ) -> Iterator[Arrays]:
        """Run the graph with the tensors between its operations as further outputs, once for each part."""
        is_decoder = _CACHE_OPTION in component.load_options
        core, path = _core(), str(component_dir / _file_of(component))
        graph_inputs = whole_row_inputs(inputs) if is_decoder else inputs
        for part in in_parts(_inner_positions(core.read_model(path)), parts):
            model = core.read_model(path)
            first = len(model.outputs)
            operations = model.get_ordered_ops()
            model.add_outputs([operations[operation].output(port) for operation, port in part])
            compiled = _compiled(core, model, component, threads)
            names = {name for port in compiled.inputs for name in port.get_names()}
            answers = compiled.create_infer_request().infer(
                {name: value for name, value in graph_inputs.items() if name in names}
            )
            yield {
                f"{operations[operation].get_friendly_name()}:{port}": answers[first + number].copy()
                for number, (operation, port) in enumerate(part)
            }
        yield (OpenVinoDecoder(compiled) if is_decoder else _OpenVinoRunner(compiled, component)).run(inputs)


def _imported() -> Any:
    with environment(**_NO_TELEMETRY):
        import openvino
    return openvino


@cache
def _core() -> Any:
    """Return the one Core of this process, which is never deleted.

    OpenVINO's CPU plugin gives the thread that uses a new Core a stack for signal handlers, and frees it with the
    Core. Of two Cores, the second one gives the first one's stack back. If that was freed before, the next signal
    ends the process with a segmentation fault.
    """
    return _imported().Core()


def _compile_decoder(
    source_model: SourceModel,
    source_dir: Path,
    component: ComponentPlan,
    options: OpenVinoOptions,
    out_dir: Path,
) -> CompiledComponent:
    """Export the stateful graph of a decoder, compress its weights at int8 and int4, and convert its tokenizer."""
    openvino = _imported()
    precision = component.precision
    with torch_threads(component.threads), environment(**_NO_TELEMETRY):
        report_progress(f"converting the decoder to OpenVINO IR ({precision.value})")
        graph = export_decoder(source_model)
        if precision in _QUANTIZED:
            report_progress(f"compressing the weights to {precision.value}")
            group_size = _WEIGHTS_PER_SCALE if options.group_size is None else options.group_size
            graph = compress_weights(graph, precision, group_size=group_size, symmetric=options.symmetric)
        report_progress("writing the IR")
        openvino.save_model(graph, str(out_dir / _DECODER_FILE), compress_to_fp16=precision is Precision.FP16)
        tokenizer_files = write_tokenizer(source_dir, out_dir, trust_remote_code=component.trust_remote_code)
    return source_model.compiled_to(
        (*_DECODER_FILES, *tokenizer_files),
        {
            "performance_hint": options.performance_hint,
            "dynamic_quantization_group_size": _GROUP_SIZE[options.quantization] if precision in _QUANTIZED else 0,
            **options.decoder_hints(precision),
        },
    )


def _file_of(component: ComponentRecord) -> str:
    return _DECODER_FILE if _CACHE_OPTION in component.load_options else _FILE


def _compiled(core: Any, model: Any, component: ComponentRecord, threads: int | None) -> Any:
    """Compile an IR, a model or the path of its file, for this CPU.

    Raises:
        LoadError: OpenVINO does not accept the model.
    """
    import openvino

    hint = str(component.load_option("performance_hint"))
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": hint.upper(),
        "INFERENCE_PRECISION_HINT": component.load_options.get("inference_precision", _HINTS[component.precision]),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": component.load_option("dynamic_quantization_group_size"),
    }
    if _CACHE_OPTION in component.load_options:
        settings["KV_CACHE_PRECISION"] = component.load_options[_CACHE_OPTION]
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
        settings["NUM_STREAMS"] = threads if hint == "throughput" else 1
    try:
        with undisturbed_process():
            if isinstance(model, str):
                model = core.read_model(model)
            keep_rounded_quotients(model)
            if _CACHE_OPTION in component.load_options:
                choose_logits(model)
            return core.compile_model(model, "CPU", settings)
    except Exception as error:
        runtime = f"openvino {openvino.__version__}"
        raise load_error(_file_of(component), runtime, error, reason=_reason(error)) from error


def _inner_positions(model: Any) -> list[tuple[int, int]]:
    """Return where a model has floating-point tensors that follow from its inputs: operation and output."""
    reached: set[str] = set()
    positions = []
    for number, operation in enumerate(model.get_ordered_ops()):
        kind, name = operation.get_type_name(), operation.get_friendly_name()
        sources = {port.get_source_output().get_node().get_friendly_name() for port in operation.inputs()}
        if kind == "Parameter" or reached & sources:
            reached.add(name)
            if kind not in _NO_TENSORS:
                positions += [(number, port.get_index()) for port in operation.outputs() if _is_inner(port)]
    return positions


def _is_inner(port: Any) -> bool:
    """Return whether a port has floating-point numbers, is not yet an output, and is not half of a layer.

    Halves are a product before its bias, and a normalized tensor before its scale and bias.
    """
    readers = [reader.get_node() for reader in port.get_target_inputs()]
    if not port.get_element_type().is_real() or "Result" in (reader.get_type_name() for reader in readers):
        return False
    node = port.get_node()
    kinds = [node.get_type_name(), *(source.get_node().get_type_name() for source in node.input_values())]
    finishing = {"MatMul": ("Add",), "MVN": ("Multiply", "Add")}.get(kinds[0], ())
    if kinds[0] == "Multiply" and "MVN" in kinds:
        finishing = ("Add",)
    return not (
        len(readers) == 1
        and readers[0].get_type_name() in finishing
        and any(source.get_node().get_type_name() == "Constant" for source in readers[0].input_values())
    )


class _OpenVinoRunner:
    """Runs one compiled model; concurrent calls get separate inference requests."""

    def __init__(self, model: Any, component: ComponentRecord):
        import openvino

        self._model = model
        self.streams = int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._tensor = openvino.Tensor
        outputs = {name: number for number, port in enumerate(model.outputs) for name in port.get_names()}
        self._outputs = [(record.name, outputs[record.name]) for record in component.outputs]
        # An exporter may drop an input that changes no output.
        self._inputs = [
            (name, number, port.get_element_type().to_dtype())
            for number, port in enumerate(model.inputs)
            for name in port.get_names()
        ]
        self._idle_requests: list[Any] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        model = require_open(self._model)
        try:
            request = self._idle_requests.pop()
        except IndexError:
            request = model.create_infer_request()
        # A call of `infer` with arrays, which copies all outputs as well, takes longer.
        for name, number, dtype in self._inputs:
            request.set_input_tensor(number, self._tensor(np.asarray(inputs[name], dtype)))
        request.infer(share_outputs=True)
        outputs = {name: request.get_output_tensor(number).data.copy() for name, number in self._outputs}
        self._idle_requests.append(request)
        return outputs

    def close(self) -> None:
        self._model = None
        self._idle_requests = []


def _export(
    source_model: SourceModel,
    example: Mapping[str, Any],
    component: ComponentPlan,
    quantization: str,
    calibration: list[Any],
) -> Any:
    import torch
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    batch, sequence = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    config = OpenVINOConfig(
        dynamic=True,
        dynamic_shapes=free_axes(source_model.inputs, batch, sequence),
        quantizer=_quantizer(quantization, calibration) if component.precision is Precision.INT8 else None,
    )
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            free_batch(),
            free_repeats(),
            whole_rows(source_model.model, component.max_sequence_length),
            tabulated_buckets(source_model.model, component.max_sequence_length),
        ):
            # The exporter warns that it was tested with an older torch, and torch.export warns about itself.
            warnings.simplefilter("ignore")
            return OpenVINOExporter().export(source_model.model, dict(example), config).program
    except Exception as error:
        raise refusal("The OpenVINO exporter", error, reason=_reason(error)) from error


def _trace(source_model: SourceModel, example: Mapping[str, Any]) -> Any:
    """Convert the operators that the example runs. Branches and loops become constant, which the caller checks."""
    import openvino
    import torch

    tensors = tuple(example.values())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = torch.jit.trace(  # type: ignore[no-untyped-call]
                as_tuple_module(source_model), tensors, strict=False, check_trace=False
            )
            model = openvino.convert_model(graph, example_input=tensors)
            for port, record in zip(model.inputs, source_model.inputs, strict=True):
                port.get_tensor().set_names({record.name})
                sizes = [-1 if isinstance(axis, str) else axis for axis in record.axes]
                port.get_node().set_partial_shape(openvino.PartialShape(sizes))
                port.get_node().set_element_type(openvino.Type(np.dtype(record.dtype)))
            for port, record in zip(model.outputs, source_model.outputs, strict=True):
                port.get_tensor().set_names({record.name})
            model.validate_nodes_and_infer_types()
    except Exception as error:
        raise refusal("The tracing OpenVINO converter", error, reason=_reason(error)) from error
    return model


def _quantizer(quantization: str, calibration: list[Any]) -> Any:
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig, NNCFWeightCompressionConfig

    logging.getLogger("nncf").setLevel(logging.ERROR)
    if quantization != "static":
        return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_ASYM))
    # Use all batches: NNCF would take only the first 300, and they are sorted by length.
    config = NNCFQuantizationConfig(subset_size=len(calibration))
    return NNCFOpenVINOQuantizer(config, calibration_dataset=calibration)


def _reason(error: Exception) -> str:
    # OpenVINO lists operators without a conversion last, after the line in its own source.
    operators = [line.strip() for line in str(error).splitlines() if line.strip().startswith("-- ")]
    return operators[0].removeprefix("-- ")[:300] if operators else first_line(error)
