"""Compile the graph of a component, with eager attention or other options if the first way fails.

A check of its first answers finds graphs that are wrong as a whole before they are stored. It is not the proof.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from compileflow._process.child_process import report_progress
from compileflow._process.failures import compile_error, failure_of
from compileflow.catalog import get_target, target_names
from compileflow.contracts import (
    Arrays,
    Capabilities,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Continuation,
    Runner,
    Target,
)
from compileflow.contracts.digests import list_files
from compileflow.errors import CompileError, CompileflowError, SpecError, first_line
from compileflow.serving.padding import run_fitted
from compileflow.source_model.decoding import OTHER_DECODER, token_positions
from compileflow.source_model.examples import example_length
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model, loaded_once, release_weights
from compileflow.source_model.places import place_of_error, place_of_operator
from compileflow.spec import HfTask, Precision
from compileflow.validation.cases.shapes import values_per_token

logger = logging.getLogger(__name__)
# Largest accepted ||reference - answer|| / ||reference||. Rounding stays far below; int8 has no limit here.
_LIMITS: Mapping[Precision, float] = {Precision.FP32: 1e-3, Precision.BF16: 0.3, Precision.FP16: 0.3}
# Longest row, in tokens, of these examples.
_LONG = 2048
# Elements of an answer of these examples, 80 MB.
_MOST_VALUES = 20_000_000
# Elements of a decoder's answer that is compared whole. Of a larger one, only the last logits are compared.
_MOST_COMPARED = 10_000_000
# Elements that are compared at once.
_PART = 1_000_000
# Namespaces of operators that torch, torchvision and ONNX have.
_NAMESPACES = ("aten", "prim", "prims", "quantized", "torchvision", "ai", "com")
_OTHER_TARGET = "Another target may compile it; `compileflow targets` lists them."


@dataclass(frozen=True)
class _Example:
    """Inputs of one shape, with the source model's answer.

    Attributes:
        rows: Rows of the inputs.
        length: Length of each row.
        inputs: The inputs.
        expected: The source model's answer.
        is_cut: Whether `expected` holds the answer to the last token alone.
    """

    rows: int
    length: int
    inputs: Arrays
    expected: Arrays
    is_cut: bool


def compile_graph(
    target: Target, source_dir: Path, source_model: SourceModel, plan: ComponentPlan, folder: Path
) -> CompiledComponent:
    """Compile a component. If its graph cannot be compiled or answers wrongly, try other ways.

    The other ways are eager attention instead of sdpa, and then the `fallback_options` of the target.

    Args:
        target: Target to compile for.
        source_dir: Folder of the source model.
        source_model: The source model, as `loaded_once` holds it.
        plan: Plan of the component.
        folder: New folder for the compiled files.

    Raises:
        CompileError: The target refused the model, or the graph does not answer like the source model.
    """
    attempts = [plan]
    if source_model.attention == "sdpa":
        attempts.append(replace(plan, attention="eager"))
    # Optional attribute of a target: options of a slower or plainer way to compile.
    if fallback_options := getattr(target, "fallback_options", None):
        options = {**plan.options, **fallback_options}
        if _suit(target, options, plan):
            attempts.append(replace(attempts[-1], spec=plan.spec.model_copy(update={"target_options": options})))
    errors: list[CompileError] = []
    for attempt in attempts:
        if errors:
            report_progress(f"trying another way, because one failed: {errors[-1].message}")
            shutil.rmtree(folder)
        trust = plan.trust_remote_code
        with loaded_once(source_dir, plan.hf_task, attention=attempt.attention, trust_remote_code=trust) as model:
            try:
                return _checked(target, source_dir, model, attempt, folder)
            except CompileError as error:
                failure = failure_of(error)
                if failure is not None and failure.kind == "disk":
                    # No other way needs less room.
                    raise
                logger.info("attempt failed: %s", error)
                errors.append(error if errors else _located(error, target, source_dir, model, attempt))
    raise errors[0]


def _source_model(source_dir: Path, plan: ComponentPlan) -> SourceModel:
    """Return the source model of a plan with its weights."""
    return load_source_model(
        source_dir, plan.hf_task, attention=plan.attention, trust_remote_code=plan.trust_remote_code
    )


def _suit(target: Target, options: Mapping[str, JsonValue], plan: ComponentPlan) -> bool:
    """Return whether options suit the precision and the task of a plan."""
    try:
        chosen_options = target.Options.model_validate(options)
        chosen_options.check_precision(plan.precision)
        chosen_options.check_task(plan.hf_task, plan.precision)
    except SpecError:
        return False
    except ValidationError:
        # A target may fall back to what a user cannot set.
        return True
    return True


def _located(
    error: CompileError, target: Target, source_dir: Path, source_model: SourceModel, plan: ComponentPlan
) -> CompileError:
    """Return an error of a target with the place in the model that it is about, and the targets that may help."""
    failure = failure_of(error)
    if failure is None or error.hint != failure.hint:
        # A target that writes its own hint knows better.
        return error
    hint, place = failure.hint, ""
    if failure.kind == "operator":
        # The weights may have been released before the graph was loaded.
        place = place_of_operator(_source_model(source_dir, plan), failure.operator, plan.max_sequence_length)
        names = [name for name, able in _others(target, plan.hf_task).items() if able.torch_operators]
        if _is_custom(failure.operator):
            hint = "Write the model with torch's own operators: targets know no others."
        elif names:
            hint = f"Choose a target that runs torch's own operators: {', '.join(names)}."
    elif failure.kind in ("branch", "shape"):
        place = place_of_error(source_model.model, error)
        names = [name for name, able in _others(target, plan.hf_task).items() if not able.dynamic_axes]
        if failure.kind == "shape" and names and target.capabilities.dynamic_axes:
            hint = f"{hint.removesuffix('.')}: {', '.join(names)}."
        elif failure.kind == "shape" and plan.hf_task.generates:
            hint = OTHER_DECODER
    located = CompileError(
        f"{error.message} In the model: {place}." if place else error.message, hint=hint, log_path=error.log_path
    )
    located.__cause__ = error
    return located


def _is_custom(operator: str) -> bool:
    """Return whether an operator is neither torch's nor ONNX's."""
    namespace, dot, _ = operator.partition(".")
    return bool(dot) and namespace not in _NAMESPACES


def _others(target: Target, hf_task: HfTask) -> dict[str, Capabilities]:
    """Return the capabilities of the other targets that compile a task here."""
    targets = [get_target(name) for name in target_names() if name != target.name]
    return {
        other.name: other.capabilities
        for other in targets
        if hf_task in other.capabilities.hf_tasks and other.probe().can_compile
    }


def component_record(
    target: Target, plan: ComponentPlan, compiled_component: CompiledComponent, folder: str
) -> ComponentRecord:
    """Return the record of a compiled component for the manifest."""
    return ComponentRecord(
        folder=folder,
        inputs=compiled_component.inputs,
        outputs=compiled_component.outputs,
        output_class=compiled_component.output_class,
        max_sequence_length=plan.max_sequence_length,
        dynamic_axes=target.capabilities.dynamic_axes,
        shape_buckets=plan.shape_buckets,
        pad_token_id=compiled_component.pad_token_id,
        precision=plan.precision,
        load_options=dict(compiled_component.load_options),
        frame_convolutions=compiled_component.frame_convolutions,
        attention=compiled_component.attention,
        padding=compiled_component.padding,
        vocab_size=compiled_component.vocab_size,
    )


def _checked(
    target: Target, source_dir: Path, source_model: SourceModel, plan: ComponentPlan, folder: Path
) -> CompiledComponent:
    folder.mkdir(parents=True)
    name = type(source_model.model).__name__
    try:
        compiled_component = target.compile(source_dir, plan, folder)
    except (CompileflowError, MemoryError):
        raise
    except OSError as error:
        raise CompileError(
            f"{target.name} cannot write its files: {first_line(error)}.",
            hint=f"Check the free space and the permissions of {folder}.",
        ) from error
    except Exception as error:
        raise compile_error(
            f"{target.name} failed on {name}: {type(error).__name__}: {first_line(error)}.",
            error,
            hint=_OTHER_TARGET,
        ) from error
    written_files = {record.path for record in list_files(folder)}
    if written_files != set(compiled_component.files):
        raise CompileError(
            f"Expected the files {sorted(compiled_component.files)} that {target.name} named, "
            f"got {sorted(written_files)}.",
            hint="Fix the target: its CompiledComponent must name every file that it writes, and no other.",
        )
    record = component_record(target, plan, compiled_component, plan.name)
    _check_first_answers(target, source_dir, folder, record, plan)
    return compiled_component


def _check_first_answers(
    target: Target, source_dir: Path, component_dir: Path, record: ComponentRecord, plan: ComponentPlan
) -> None:
    """Load a component that was just compiled, and compare it with its source model, whose weights are released.

    Where the target cannot run, nothing is compared.

    Raises:
        CompileError: The component cannot be loaded or called, or it answers differently.
    """
    if not target.probe().can_run:
        return
    report_progress("comparing a few answers with the source model")
    # A target may have released the weights when it needed them no more.
    source_model = _source_model(source_dir, plan)
    name = type(source_model.model).__name__
    try:
        examples = _answered_examples(source_model, record, generates=plan.hf_task.generates)
        # The weights of the source model and those of the runtime would be in memory together.
        release_weights(source_model)
        runner = target.load(component_dir, record, device=target.capabilities.devices[0], threads=plan.threads)
        try:
            for example in examples:
                difference = max(_difference(source_model, example, _answer(runner, record, example)), 0.0)
                limit = _LIMITS.get(record.precision)
                if limit is not None and not difference <= limit:
                    size = f" with rows of length {example.length}" if "sequence" in record.inputs[0].axes else ""
                    raise CompileError(
                        f"{target.name} compiled {name} to a model that answers a batch of {example.rows}{size} "
                        f"differently: by {difference:.2g} of the answer's norm.",
                        hint=_OTHER_TARGET,
                    )
        finally:
            runner.close()
    except (CompileError, MemoryError):
        raise
    except Exception as error:
        raise compile_error(
            f"{target.name} compiled {name} to a model that does not run: {type(error).__name__}: "
            f"{first_line(error)}.",
            error,
            hint=_OTHER_TARGET,
        ) from error


def _answered_examples(source_model: SourceModel, record: ComponentRecord, *, generates: bool) -> list[_Example]:
    """Return the examples that the source model takes, with its answers."""
    examples = []
    for rows, length in _shapes(source_model, record):
        # Other values than those of the export, which may have become constants of the graph.
        inputs = source_model.example_arrays(rows, length, variant=1)
        expected = _source_answer(source_model, inputs)
        if expected is None:
            continue
        is_cut = generates and any(value.size > _MOST_COMPARED for value in expected.values())
        if is_cut:
            # A copy, because a view would keep all logits in memory.
            expected = {name: value[:, -1:].copy() for name, value in expected.items()}
        examples.append(_Example(rows, length, inputs, expected, is_cut))
    return examples


def _answer(runner: Runner, record: ComponentRecord, example: _Example) -> Arrays:
    """Return what a loaded component answers to an example."""
    if not example.is_cut:
        return run_fitted(runner, record, example.inputs)
    if not hasattr(runner, "start"):
        return {name: value[:, -1:] for name, value in run_fitted(runner, record, example.inputs).items()}
    continuation: Continuation = runner.start()
    try:
        mask = example.inputs["attention_mask"]
        ids = example.inputs["input_ids"]
        return {record.outputs[0].name: continuation.read(ids, mask, token_positions(mask), last=True)}
    finally:
        continuation.close()


def _source_answer(source_model: SourceModel, inputs: Arrays) -> Arrays | None:
    """Return the source model's answer; None if it fails or is not finite, which the validation reports."""
    try:
        answer = source_model.run(inputs)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - models raise whatever they like
        logger.info("the source model does not take an example: %s", error)
        return None
    return answer if all(np.isfinite(value).all() for value in answer.values()) else None


def _shapes(source_model: SourceModel, record: ComponentRecord) -> list[tuple[int, int]]:
    """Return the (rows, length) of the examples: of each other shape than the example of the export."""
    if not record.dynamic_axes:
        bucket = min(record.shape_buckets, key=lambda bucket: (bucket.sequence_length, bucket.batch_size))
        return [(bucket.batch_size, bucket.sequence_length)]
    longest = record.max_sequence_length
    length = example_length(source_model.inputs, longest)
    export_length = example_length(source_model.inputs, longest, chunk=source_model.chunk)
    lengths = [min(longest, length * 3 // 4 + 1), min(longest, 2 * export_length + 1)]
    if source_model.tokens is not None:
        # A loop over pieces of the text may have become constant. A decoder answers with a value for each word.
        lengths.append(max(lengths[-1], min(longest, _LONG, _MOST_VALUES // values_per_token(record.outputs))))
    return list(zip((2, 1, 1), dict.fromkeys(lengths), strict=False))


def _difference(source_model: SourceModel, example: _Example, actual: Arrays) -> float:
    """Return the largest difference of an output as a share of its norm, where the mask counts tokens."""
    differences = [0.0]
    for record in source_model.outputs:
        reference, answer = example.expected[record.name], actual[record.name]
        if reference.shape != answer.shape:
            return float("inf")
        mask = example.inputs.get("attention_mask") if record.axes[:2] == ("batch", "sequence") else None
        counts = None if mask is None else mask[:, -reference.shape[1] :].astype(bool)
        squares = np.zeros(2)
        for expected_part, actual_part in zip(_parts(reference, counts), _parts(answer, counts), strict=True):
            squares += _square(expected_part), _square(expected_part - actual_part)
        norm, distance = np.sqrt(squares)
        differences.append(float(distance / norm if norm else distance))
    # numpy's maximum, unlike max(), never drops a NaN.
    return float(np.max(differences))


def _parts(values: NDArray[Any], counts: NDArray[np.bool_] | None) -> Iterator[NDArray[Any]]:
    """Yield the values of the tokens that count, in parts: a copy of all logits is as large as some layers.

    Args:
        values: Values, of shape (rows, tokens, ...) if there are counts.
        counts: Whether each token counts, of shape (rows, tokens); None for all values.
    """
    if counts is None:
        flat = values.reshape(-1)
        yield from (flat[start : start + _PART] for start in range(0, flat.size, _PART))
        return
    tokens, places = values.reshape(counts.size, -1), np.flatnonzero(counts)
    step = max(1, _PART // max(1, tokens.shape[1]))
    yield from (tokens[places[start : start + step]] for start in range(0, places.size, step))


def _square(values: NDArray[Any]) -> float:
    """Return the sum of the squares of an array, in float64 without a copy of that size."""
    flat = values.ravel()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
