"""onnx-runtime: transformers' ONNX exporter with dynamic axes and fused operators, run by ONNX Runtime."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

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
    load_error,
    probe_installed,
    refusal,
    released_pages,
    report_progress,
    require_open,
    torch_threads,
    violated_size,
)
from compileflow.errors import SpecError, TargetUnavailableError, one_line
from compileflow.source_model import (
    SourceModel,
    as_tuple_module,
    calibration_tensors,
    free_axes,
    load_source_model,
    release_weights,
)
from compileflow.source_model.decoding import OTHER_DECODER, decoding_step
from compileflow.source_model.free_batch import free_batch, free_repeats
from compileflow.source_model.whole_rows import whole_rows
from compileflow.spec import HfTask, Precision
from compileflow.targets._onnx_decoder import (
    LOGITS,
    OnnxDecoder,
    check_cache,
    has_cache,
    plain_last_layer,
    transpose_batches,
    whole_row_inputs,
)
from compileflow.targets._onnx_memory import Arena
from compileflow.targets._onnx_weights import compress_weights

_FILE = "model.onnx"
# It moves zeros around a picture into a following MaxPool, which pads with minus infinity (BiT).
_WRONG_OPTIMIZERS = ["Pad_Fusion"]
# The newest one that the tracing exporter writes by default.
_TRACED_OPSET = 18
_COMPILE_NEEDS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
# Weights that share one scale at int4, as in onnxruntime-genai.
_WEIGHTS_PER_SCALE = 32
# Where an error of torch stops to say what happened.
_ADVICE = re.compile(r"consider using|Caused by:|For more information|The following call raised")
_FLOAT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")


class OnnxRuntimeOptions(TargetOptions):
    """Options of the onnx-runtime target."""

    fusions: Literal["cpu", "none"] = Field(
        "cpu",
        description="cpu: fuse attention, layer normalization and GELU for ONNX Runtime's CPU kernels. none: fuse "
        "nothing.",
    )
    exporter: Literal["graph", "trace"] = Field(
        "graph",
        description="graph: export the whole graph. trace: export the operators that one example runs, which "
        "works for some models that graph refuses. If graph fails, compileflow tries trace automatically. "
        "trace supports only fp32.",
    )
    opset: int | None = Field(None, ge=18, le=25, description="ONNX opset. null: the exporter chooses.")
    quantization: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="At int8: measure the ranges of activations in each call (dynamic), or once, on natural text "
        "(static).",
    )
    reduce_range: bool = Field(
        True,
        description="At int8: store weights in 7 bits. 8 bits overflow on CPUs without VNNI; set it to false only "
        "if every machine has VNNI. The operators for text-generation use 8 bits and do not overflow.",
    )
    group_size: Literal[16, 32, 64, 128, 256, None] = Field(
        None, description=f"At int4: weights that share one scale. null: {_WEIGHTS_PER_SCALE}."
    )
    symmetric: bool = Field(False, description="At int4: store the weights without zero points.")

    def needs_calibration(self, precision: Precision) -> bool:
        """Return True for static int8, which measures ranges on natural examples."""
        return precision is Precision.INT8 and self.quantization == "static"

    def check_task(self, hf_task: HfTask, precision: Precision) -> None:
        """Refuse a trace and static ranges for text generation, and options of int4 elsewhere."""
        if precision is not Precision.INT4 and (self.group_size is not None or self.symmetric):
            name = "symmetric" if self.symmetric else "group_size"
            raise SpecError(f"onnx-runtime option {name} is only for int4.", hint=f"Leave {name} out.")
        if hf_task.generates and self.exporter == "trace":
            raise SpecError("onnx-runtime cannot trace a model for text-generation.", hint="Leave exporter out.")
        if hf_task.generates and not self.reduce_range:
            raise SpecError(
                "onnx-runtime has no option reduce_range for text-generation, whose weights have 8 bits.",
                hint="Leave reduce_range out.",
            )
        if hf_task.generates and self.quantization == "static" and precision is Precision.INT8:
            raise SpecError(
                "onnx-runtime does not quantize statically for text-generation.",
                hint="Choose quantization=dynamic.",
            )

    def check_precision(self, precision: Precision) -> None:
        """Refuse a trace at int8."""
        if self.exporter == "trace" and precision is not Precision.FP32:
            raise SpecError(
                f"onnx-runtime cannot trace a model at {precision.value}.", hint="Choose fp32, or another target."
            )


class OnnxRuntimeTarget:
    """Export to ONNX for any batch size and length, and run with ONNX Runtime."""

    name: ClassVar[str] = "onnx-runtime"
    version: ClassVar[int] = 5
    summary: ClassVar[str] = (
        "ONNX with dynamic axes and fused operators, int8 (static: by NNCF) and int4 by ONNX Runtime; CPU fleets"
    )
    Options: ClassVar[type[TargetOptions]] = OnnxRuntimeOptions
    component_files: ClassVar[Sequence[str]] = (_FILE, f"{_FILE}.data")
    fallback_options: ClassVar[Mapping[str, JsonValue]] = {"exporter": "trace"}
    refused_model_types: ClassVar[Mapping[str, str]] = {
        "deformable_detr": "its exported graph does not run on images of other sizes",
        "image-feature-extraction/textnet": "its exported graph pools images of one size only",
        "llama4": "its positions are complex numbers, which ONNX does not have",
        "llama4_text": "its positions are complex numbers, which ONNX does not have",
        "lw_detr": "its exported graph answers differently",
        "maskformer": "its export takes many minutes even for a tiny model",
        "openai_privacy_filter": "its exported graph fails on rows of few tokens",
    }
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.INT8),
        generation_precisions=(Precision.FP32, Precision.INT8, Precision.INT4),
        devices=("cpu",),
        dynamic_axes=True,
        variants={Precision.INT8: ({"quantization": "dynamic"}, {"quantization": "static"})},
        runtime={"onnxruntime": ">={minor}"},
    )

    def probe(self) -> Availability:
        """Check which distributions are installed, without importing them."""
        return probe_installed(
            _COMPILE_NEEDS,
            ("onnxruntime",),
            install="pip install 'compileflow[compile,onnx-runtime]'",
            runtime_install="pip install 'compileflow[onnx-runtime]'",
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the exporter, the quantizer and the runtime."""
        return installed_versions((*_COMPILE_NEEDS, "nncf"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): ONNX Runtime chooses its kernels at load."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes."""
        options = OnnxRuntimeOptions.model_validate(dict(component.options))
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        quantizer = None
        if component.precision is not Precision.FP32 and not component.hf_task.generates:
            quantizer = _quantizer(options, component, source_model)
        report_progress(f"exporting to ONNX ({component.precision.value})")
        with torch_threads(component.threads):
            example = source_model.export_tensors(component.max_sequence_length)
            if component.hf_task.generates:
                model = _export_decoder(source_model, options, component)
            elif options.exporter == "trace":
                model = _trace(source_model, example, options)
            else:
                model = _export(source_model, example, options, quantizer, component.max_sequence_length)
        source_model.check_outputs({value.name for value in model.graph.outputs}, "the ONNX exporter")
        report_progress("writing the ONNX graph")
        import onnx_ir

        onnx_ir.save(model, str(out_dir / _FILE), external_data=f"{_FILE}.data")
        return source_model.compiled_to(self.component_files)

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Open an inference session; ONNX Runtime optimizes the graph for this CPU."""
        session = _session(str(component_dir / _FILE), component_dir, threads)
        return OnnxDecoder(session) if has_cache(session) else _OnnxRuntimeRunner(session, component)

    def observe(
        self,
        component_dir: Path,
        component: ComponentRecord,
        inputs: Mapping[str, NDArray[Any]],
        *,
        threads: int | None,
        parts: int = 1,
    ) -> Iterator[Arrays]:
        """Run the graph with the tensors between its nodes as further outputs."""
        import onnx

        model = onnx.load(str(component_dir / _FILE), load_external_data=False)
        outputs = [record.name for record in component.outputs]
        products = _products_before_bias(model.graph)
        reached = {value.name for value in model.graph.input}
        inner_names: list[str] = []
        for node in model.graph.node:
            if reached.intersection(node.input):
                reached.update(node.output)
                inner_names += [name for name in node.output if name and name not in (*outputs, *products)]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner_names)
        session = _session(model.SerializeToString(), component_dir, threads)
        if has_cache(session):
            inputs = whole_row_inputs(session, inputs)
        runner = _OnnxRuntimeRunner(session, component)
        floats = {value.name for value in session.get_outputs() if value.type in _FLOAT_TYPES}
        for names in in_parts([name for name in inner_names if name in floats], parts):
            yield runner.fetch(names, inputs)
        yield runner.run(inputs)


def _session(model: str | bytes, component_dir: Path, threads: int | None) -> Any:
    """Open an inference session for a file, or for a model in memory whose weights are in `component_dir`.

    Raises:
        LoadError: ONNX Runtime does not accept the model.
    """
    # Otherwise a thread sends usage data, and a process that is forked later waits for that thread at its end.
    with environment(ORT_DISABLE_TELEMETRY=os.environ.get("ORT_DISABLE_TELEMETRY", "1")):
        import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    if isinstance(model, bytes):
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(component_dir)
        )
    if threads is not None:
        settings.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=_WRONG_OPTIMIZERS
        )
    except Exception as error:
        raise load_error(_FILE, f"onnxruntime {onnxruntime.__version__}", error) from error


def _products_before_bias(graph: Any) -> set[str]:
    """Return the tensors of a graph that are only half of a layer: products whose bias is added next."""
    constants = {value.name for value in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "MatMul"
        and [reader.op_type for reader in readers.get(node.output[0], [])] == ["Add"]
        and constants.intersection(readers[node.output[0]][0].input)
    }


class _OnnxRuntimeRunner:
    """Runs one inference session."""

    def __init__(self, session: Any, component: ComponentRecord):
        self._session = session
        self._arena = Arena()
        self._names = [record.name for record in component.outputs]
        # An exporter may drop an input that changes no output.
        self._inputs = {value.name for value in session.get_inputs()}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return self.fetch(self._names, inputs)

    def fetch(self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Return the named outputs of the graph."""
        session = require_open(self._session)
        graph_inputs = {name: value for name, value in inputs.items() if name in self._inputs}
        outputs = session.run(names, graph_inputs, self._arena.run_options(graph_inputs))
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        self._session = None


@contextmanager
def exact_zeros() -> Iterator[None]:
    """Let onnxscript, inside the block, remove an addition only if it adds 0.

    It takes 1e-8 for 0. A model that divides by the norm of a row plus such a number would answer NaN for padding.
    """
    from onnxscript.rewriter import _matcher

    matcher: Any = _matcher.SimplePatternMatcher
    match_constant = matcher._match_constant

    def match_exactly(self: Any, pattern: Any, value: Any) -> Any:
        # A relative tolerance remains.
        pattern._abs_tol = 0.0
        return match_constant(self, pattern, value)

    matcher._match_constant = match_exactly
    try:
        yield
    finally:
        matcher._match_constant = match_constant


@contextmanager
def forgotten_graphs() -> Iterator[None]:
    """Let onnxscript's rules, inside the block, forget the graph that they looked at.

    The rules live as long as the process, and would keep the weights of the last graph in memory.
    """
    from onnxscript.rewriter import _matcher

    matcher: Any = _matcher.SimplePatternMatcher
    match = matcher.match

    def match_and_forget(self: Any, *arguments: Any, **settings: Any) -> Any:
        try:
            return match(self, *arguments, **settings)
        finally:
            self._graph = self._match = self._current_node = None

    matcher.match = match_and_forget
    try:
        yield
    finally:
        matcher.match = match


def _quantizer(options: OnnxRuntimeOptions, component: ComponentPlan, source_model: SourceModel) -> Any:
    """Quantize products with weights, at int8 with one scale for each column.

    Products of two activations stay in fp32, because they lose the most accuracy.
    """
    if options.quantization == "static":
        return _static_quantizer(options, calibration_tensors(source_model.inputs, component.calibration))
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
    """Return NNCF's quantizer: it moves outliers of activations into the weights, so it is far more accurate.

    Raises:
        TargetUnavailableError: nncf is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise TargetUnavailableError(
            "onnx-runtime needs nncf for static int8, but nncf is not installed.",
            hint="Run: pip install 'compileflow[int8]'",
        ) from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    from transformers.exporters import NNCFQuantizationConfig

    overflow_fix = nncf.OverflowFix.ENABLE if options.reduce_range else nncf.OverflowFix.DISABLE
    config = NNCFQuantizationConfig(
        # Use all batches: NNCF would take only the first ones, and they are sorted by length.
        subset_size=len(samples),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow_fix),
    )
    return _nncf_quantizer(config, samples)


def _nncf_quantizer(config: Any, samples: list[dict[str, Any]] | None = None) -> Any:
    """Return NNCF's quantizer for a graph that the exporter's fusions have changed."""
    from transformers.exporters import NNCFOnnxQuantizer

    class Quantizer(NNCFOnnxQuantizer):  # type: ignore[misc]
        """Corrects the declared shapes of constants that the exporter's fusions leave wrong; NNCF refuses them."""

        def quantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            for value in model.graph.initializers.values():
                if value.const_value is not None:
                    value.shape = value.const_value.shape
            return super().quantize(model, *args, **kwargs)

    return Quantizer(config, calibration_dataset=samples)


def _trace(source_model: SourceModel, example: Mapping[str, Any], options: OnnxRuntimeOptions) -> Any:
    """Export the operators that the example runs. Branches and loops become constant, which the caller checks."""
    import onnx
    import onnx_ir
    import torch

    records = (*source_model.inputs, *source_model.outputs)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad(), free_repeats():
            warnings.simplefilter("ignore")
            path = f"{folder}/{_FILE}"
            torch.onnx.export(
                as_tuple_module(source_model),
                tuple(example.values()),
                path,
                input_names=[record.name for record in source_model.inputs],
                output_names=[record.name for record in source_model.outputs],
                dynamic_axes={
                    record.name: {number: axis for number, axis in enumerate(record.axes) if isinstance(axis, str)}
                    for record in records
                },
                dynamo=False,
                opset_version=options.opset or _TRACED_OPSET,
            )
            return onnx_ir.from_proto(onnx.load(path))
    except Exception as error:
        raise refusal("The tracing ONNX exporter", error) from error


def _export(
    source_model: SourceModel,
    example: Mapping[str, Any],
    options: OnnxRuntimeOptions,
    quantizer: Any,
    longest: int,
) -> Any:
    import torch

    batch, sequence = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = free_axes(source_model.inputs, batch, sequence)
    return _exported(source_model.model, example, shapes, options, quantizer, longest)


def _export_decoder(source_model: SourceModel, options: OnnxRuntimeOptions, component: ComponentPlan) -> Any:
    """Export one step of a decoder, with its cache as inputs and outputs."""
    class_name = type(source_model.model).__name__
    try:
        step = decoding_step(source_model, chooses_logits=True)
    except RuntimeError as error:
        raise refusal(
            "transformers", error, model=type(source_model.model).__name__, hint=OTHER_DECODER
        ) from error
    model = _exported(step.model, step.inputs, step.dynamic_shapes, options, None, component.max_sequence_length)
    check_cache(model, class_name)
    transpose_batches(model)
    if component.precision is Precision.FP32:
        return model
    import onnx_ir

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = f"{folder}/{_FILE}"
        onnx_ir.save(model, path, external_data=f"{_FILE}.data")
        # The weights are read from the file one by one. Before, the graph shared them with the source model.
        del model
        release_weights(source_model)
        saved_model = onnx_ir.load(path)
        plain_last_layer(saved_model)
        try:
            with released_pages(Path(folder)):
                compress_weights(
                    saved_model,
                    LOGITS,
                    bits=8 if component.precision is Precision.INT8 else 4,
                    group_size=options.group_size or _WEIGHTS_PER_SCALE,
                    symmetric=options.symmetric,
                )
        except Exception as error:
            raise refusal("The quantizer", error, model=class_name) from error
        # What was not compressed is still in the file.
        onnx_ir.external_data.load_to_model(saved_model)
        return saved_model


def _exported(
    model: Any,
    inputs: Mapping[str, Any],
    shapes: Mapping[str, Any],
    options: OnnxRuntimeOptions,
    quantizer: Any,
    longest: int,
) -> Any:
    """Export a model with free axes to an ONNX graph."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dict(shapes),
        ort_fusions=None if options.fusions == "none" else options.fusions,
        opset_version=options.opset,
        quantizer=quantizer,
    )
    # The exporter warns that it was tested with an older torch, and torch.export warns about itself.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            free_batch(),
            exact_zeros(),
            forgotten_graphs(),
            whole_rows(model, longest),
        ):
            warnings.simplefilter("ignore")
            return OnnxExporter().export(model, dict(inputs), config).program
    except Exception as error:
        cause: BaseException = error
        # The outer errors hold pages of advice; the innermost error names the operator.
        while isinstance(cause, torch.onnx.OnnxExporterError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = violated_size(cause) or one_line(_ADVICE.split(str(cause))[0])[:300].rstrip(". ")
        raise refusal("The ONNX exporter", cause, model=type(model).__name__, reason=reason) from error
