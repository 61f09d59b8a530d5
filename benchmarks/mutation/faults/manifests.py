"""Faults in the manifest: what a load believes about the graph."""

from __future__ import annotations

from typing import Any

from benchmarks.mutation.fault import component_of, in_manifest
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    EMBEDDER,
    ENGLISH_CLASSIFIER,
    NUMBERS,
    READER,
    SPEECH,
    TAGGER,
    onnx,
    openvino,
    torchscript,
)

CONTRACT = (
    "manifest_claims",
    "pipeline_answers",
    "LoadError",
    "ManifestError",
    "output_shapes",
    "MeasurementError",
)


@in_manifest(onnx(CLASSIFIER), *CONTRACT)
def longest_row_has_24_tokens(manifest: dict[str, Any]) -> None:
    component_of(manifest)["max_sequence_length"] = 24


@in_manifest(torchscript(READER), *CONTRACT, *NUMBERS, "exact_span")
def outputs_are_in_another_order(manifest: dict[str, Any]) -> None:
    first, second = component_of(manifest)["outputs"]
    first["name"], second["name"] = second["name"], first["name"]


@in_manifest(torchscript(TAGGER), *CONTRACT, *NUMBERS)
def inputs_are_in_another_order(manifest: dict[str, Any]) -> None:
    inputs = component_of(manifest)["inputs"]
    inputs[1]["name"], inputs[2]["name"] = inputs[2]["name"], inputs[1]["name"]


@in_manifest(torchscript(CLASSIFIER), *CONTRACT)
def outputs_are_of_another_class(manifest: dict[str, Any]) -> None:
    component_of(manifest)["output_class"] = "transformers.modeling_outputs:TokenClassifierOutput"


@in_manifest(openvino(EMBEDDER), *CONTRACT, *NUMBERS)
def model_is_computed_in_bf16(manifest: dict[str, Any]) -> None:
    component_of(manifest)["precision"] = "bf16"


@in_manifest(onnx(ENGLISH_CLASSIFIER), *CONTRACT)
def half_of_the_token_ids_are_refused(manifest: dict[str, Any]) -> None:
    component_of(manifest)["vocab_size"] = 15_000


@in_manifest(torchscript(CLASSIFIER), *CONTRACT, *NUMBERS)
def padding_is_on_the_left(manifest: dict[str, Any]) -> None:
    component_of(manifest)["padding"] = "left"


@in_manifest(openvino(TAGGER), *CONTRACT)
def rows_are_padded_with_another_token(manifest: dict[str, Any]) -> None:
    component_of(manifest)["pad_token_id"] = 7


@in_manifest(openvino(SPEECH), *CONTRACT)
def frames_are_counted_without_the_last_convolutions(manifest: dict[str, Any]) -> None:
    component_of(manifest)["frame_convolutions"].pop()


@in_manifest(onnx(CLASSIFIER), *CONTRACT)
def task_is_ranking(manifest: dict[str, Any]) -> None:
    manifest["spec"]["hf_task"] = "text-ranking"
