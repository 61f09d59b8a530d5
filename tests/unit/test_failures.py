"""Classes of failure: the text of a toolchain gives the class, and the class what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from compileflow._process.failures import compile_error, failure_in, failure_of, smaller_request
from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.contracts.toolkit import refusal
from compileflow.errors import (
    CompileError,
    OutOfMemoryError,
    ProcessError,
    ProcessKilledError,
    ProcessTimeoutError,
)
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.load import load_source_model
from compileflow.source_model.places import place_of_error, place_of_operator
from compileflow.spec import HfTask, ShapeBucket
from compileflow.steps import validate as validate_step
from tests.conftest import ModelFactory
from tests.steps import Pipeline

ONNX = "No ONNX function found for <OpOverload(op='aten.unsqueeze', overload='default')>. Failure message: No"
GUARD = "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).  (Size-like symbols: none)"
NEW_OPSET = (
    "Exporting the operator 'aten::col2im' to ONNX opset version 17 is not supported. Support for this operator "
    "was added in version 18, try exporting with this version"
)
OPENVINO = "Model wasn't fully converted.\nSummary:\n-- No conversion rule found for operations: aten::fft_rfft"
MISSING = [
    (ONNX, "aten.unsqueeze"),
    ("Exporting the operator 'aten::fft_rfft' to ONNX opset version 18 is not supported", "aten.fft_rfft"),
    ("ONNX export failed on an operator with unrecognized namespace odd::op. If you", "odd.op"),
    (OPENVINO, "aten.fft_rfft"),
    ("Failed operations detailed log:\n-- odd.op.default with a message:\nNo translator found", "odd.op"),
    ("UnsupportedOperatorException: odd.op.default", "odd.op"),
    ("missing lowering\n  target: odd.op.default\n  args[0]: x", "odd.op"),
    ("Could not run 'odd::op' with arguments from the 'Meta' backend.", "odd.op"),
    ("NOT_IMPLEMENTED : Could not find an implementation for Einsum(12) node with name 'e'", "Einsum"),
    ("com.microsoft:Odd(-1) is not a registered function/op", "com.microsoft.Odd"),
    ("The compiler stopped: aten::roll is not supported on this device", "aten.roll"),
    ("Unsupported operator: aten::roll", "aten.roll"),
]


@pytest.mark.parametrize(("text", "operator"), MISSING)
def test_missing_operator_is_named(text: str, operator: str) -> None:
    failure = failure_in(text)
    assert failure is not None
    assert (failure.kind, failure.operator) == ("operator", operator)


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("std::bad_alloc", "memory", "more memory"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "memory", "more memory"),
        ("Failed to allocate memory for requested buffer of size 17179869184", "memory", "more memory"),
        ("Unable to allocate 3.20 TiB for an array", "memory", "more memory"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "memory", "more memory"),
        ("[Errno 28] No space left on device: 'model.onnx.data'", "disk", "Free some space"),
        ("ld: final link failed: No space left on device", "disk", "Free some space"),
        ("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22", "disk", "Free some space"),
        (NEW_OPSET, "opset", "Set the option opset to 18 or more."),
        ("Unsupported model IR version: 12, max supported IR version: 11", "opset", "option opset"),
        ("ONNX Runtime only guarantees support; Opset 26 is under development and support", "opset", "opset"),
        (GUARD, "branch", "torch.where"),
        ("DataDependentOutputException: aten._local_scalar_dense.default", "branch", "torch.where"),
        ("Constraints violated (sequence)! For more information", "shape", "fixed shapes"),
        ("Detected mismatch between the structure of `inputs` and `dynamic_shapes`", "shape", "fixed shapes"),
    ],
)
def test_text_of_a_toolchain_gives_class_and_hint(text: str, kind: str, hint: str) -> None:
    failure = failure_in(text)
    assert failure is not None
    assert failure.kind == kind
    assert hint in failure.hint


@pytest.mark.parametrize("text", ["KeyError: 'x'", "module 'torch' has no attribute 'where'", "exit code 1", ""])
def test_other_text_has_no_class(text: str) -> None:
    assert failure_in(text) is None


def test_innermost_cause_counts_because_exporters_give_advice() -> None:
    try:
        try:
            raise RuntimeError(ONNX)
        except RuntimeError as error:
            raise ValueError(
                "Failed. Check that dynamic_shapes is right, or that memory is out of memory"
            ) from error
    except ValueError as error:
        failure = failure_of(error)
    assert failure is not None
    assert failure.kind == "operator"


def test_refusal_names_operator_and_lack_of_memory() -> None:
    missing = refusal("The ONNX exporter", RuntimeError(ONNX))
    assert missing.message.startswith(
        "The ONNX exporter refused the model: it does not have the operator aten.unsqueeze (RuntimeError: No ONNX"
    )
    assert type(missing) is CompileError
    memory = refusal("torch.export", RuntimeError("std::bad_alloc"))
    assert memory.message == "torch.export ran out of memory: RuntimeError: std::bad_alloc."
    assert type(memory) is OutOfMemoryError
    other = refusal("torch.export", KeyError("x"))
    assert other.hint == "Try another target; `compileflow targets` lists them."
    assert type(compile_error("It failed.", MemoryError(), hint="")) is OutOfMemoryError


class TestSmallerRequest:
    """Hints of a process that died: values of the request, from the smallest change to the largest."""

    BUCKETS = (ShapeBucket(batch_size=1, sequence_length=512), ShapeBucket(batch_size=8, sequence_length=128))

    def test_lack_of_memory_halves_the_batch_and_then_the_threads(self) -> None:
        hint = smaller_request(OutOfMemoryError("x", hint="Killed."), buckets=self.BUCKETS, threads=4)
        assert hint == (
            "Killed. Try in this order: give 4x128 for 8x128 in shape_buckets; set COMPILEFLOW_THREADS to 2; "
            "use a machine with more memory."
        )

    def test_single_rows_get_shorter(self) -> None:
        hint = smaller_request(OutOfMemoryError("x"), buckets=self.BUCKETS[:1])
        assert "lower max_sequence_length from 512 to 256; use a machine" in hint

    def test_any_shape_has_no_buckets(self) -> None:
        hint = smaller_request(OutOfMemoryError("x"), buckets=self.BUCKETS, longest=512, any_shape=True)
        assert "lower max_sequence_length from 512 to 256;" in hint

    def test_request_without_lengths_is_told_the_option(self) -> None:
        assert "give small shape_buckets, such as 1x128" in smaller_request(OutOfMemoryError("x"))
        assert "lower max_sequence_length;" in smaller_request(OutOfMemoryError("x"), any_shape=True)

    def test_timeout_names_its_limit(self) -> None:
        hint = smaller_request(ProcessTimeoutError("x"), buckets=self.BUCKETS, limit="compile_s, now 60")
        assert hint == "Raise the step's timeout (compile_s, now 60), or give 4x128 for 8x128 in shape_buckets."

    @pytest.mark.parametrize(
        "error", [ProcessKilledError("x", hint="Crashed."), ProcessError("x", hint="Crashed.")]
    )
    def test_crash_keeps_its_hint(self, error: ProcessError) -> None:
        assert smaller_request(error, buckets=self.BUCKETS) == "Crashed."


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (
            OutOfMemoryError,
            "Try in this order: lower max_sequence_length from 64 to 32; use a machine with more memory.",
        ),
        (
            ProcessTimeoutError,
            "Raise the step's timeout (validate_s, now 600), or lower max_sequence_length from 64 to 32.",
        ),
    ],
)
def test_validation_that_dies_says_what_to_change(
    pipeline: Pipeline,
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[ProcessError],
    hint: str,
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION))
    artifact = pipeline.compile(request)

    def die(*_: Any, **__: Any) -> None:
        raise kind("It ended.")

    monkeypatch.setattr(validate_step, "run_in_child", die)
    with pytest.raises(kind) as caught:
        pipeline.validate(request, artifact)
    assert caught.value.message == "The validation died: It ended."
    assert caught.value.hint == hint


class FullRunner:
    """Fails as ONNX Runtime does if it gets no memory."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")

    def close(self) -> None:
        pass


def test_compiled_graph_without_memory_is_a_memory_error() -> None:
    record = ComponentRecord(
        folder="components/default",
        inputs=(TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence")),),
        outputs=(TensorRecord(name="logits", dtype="float32", axes=("batch", 2)),),
        output_class="transformers.modeling_outputs:BaseModelOutput",
        max_sequence_length=16,
        dynamic_axes=True,
        shape_buckets=(),
        pad_token_id=0,
    )
    component = LoadedComponent(cast(OpenArtifact, None), "default", record, FullRunner())
    ids = np.ones((1, 4), np.int64)
    with pytest.raises(MemoryError, match="Failed to allocate memory"):
        component.run({"input_ids": ids})


def test_place_of_an_operator_is_its_module_and_line(tiny_model: ModelFactory) -> None:
    source_model = load_source_model(tiny_model(HfTask.TEXT_CLASSIFICATION), HfTask.TEXT_CLASSIFICATION)
    place = place_of_operator(source_model, "aten.tanh", 16)
    assert place.startswith("bert.pooler.activation (Tanh), activation.py line ")
    assert place_of_operator(source_model, "aten.fft_rfft", 16) == ""


def test_place_of_an_error_is_the_module_that_raised_it(tiny_model: ModelFactory) -> None:
    source_model = load_source_model(tiny_model(HfTask.TEXT_CLASSIFICATION), HfTask.TEXT_CLASSIFICATION)
    layer = source_model.model.bert.encoder.layer[1]
    with pytest.raises((AttributeError, TypeError)) as caught:
        layer("not a tensor")
    assert place_of_error(source_model.model, caught.value).startswith("bert.encoder.layer.1")
    assert place_of_error(source_model.model, KeyError("x")) == ""
