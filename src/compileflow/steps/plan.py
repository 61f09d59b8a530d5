"""Plan the components of a compile: the maximum length and the shape buckets that each one gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compileflow.contracts import ComponentPlan, Target
from compileflow.errors import SpecError
from compileflow.source_model.interface import maximum_length, tokenizer_maximum
from compileflow.source_model.processor import LONGEST_S, load_processor, longest_signal, probe_signals
from compileflow.spec import CompileSpec, ComponentSpec, ShapeBucket

_SHORTEST_BUCKET = 16
# Batches speed up a CPU only for rows up to this length; a single longer row keeps it busy.
_BATCH_SIZE, _BATCHED_UP_TO = 8, 128
# Name of the plan for a graph that several components share.
_SHARED = "shared"


@dataclass(frozen=True)
class SourceLimits:
    """Lengths that a source model takes.

    Attributes:
        longest: Longest row that the model has positions for; None without such a limit.
        default_length: Maximum length of a component whose spec sets none.
        default_buckets: Shape buckets of a target without dynamic axes, given the maximum length.
        padding_changes_answers: The model has no attention mask, so a padded row gets another answer.
    """

    longest: int | None
    default_length: int
    default_buckets: Callable[[int], tuple[ShapeBucket, ...]]
    padding_changes_answers: bool = False


def source_limits(source_dir: Path, config: Any, spec: CompileSpec, tokenizer: Any) -> SourceLimits:
    """Read the limits of a source model off its configuration, and its tokenizer or processor.

    Args:
        source_dir: Folder of the source model.
        config: Configuration of the source model.
        spec: What to compile.
        tokenizer: Tokenizer of a text model; None without one.
    """
    modality = spec.hf_task.modality
    if modality == "text":
        default_length = maximum_length(config, tokenizer_maximum(tokenizer))
        return SourceLimits(maximum_length(config, None), default_length, text_buckets)
    processor = load_processor(source_dir, modality, trust_remote_code=spec.trust_remote_code)
    input_names = processor(probe_signals(processor)[:1])
    default_length = longest_signal(processor)
    if default_length == 1:
        return SourceLimits(1, 1, _image_buckets)
    # One second, in the unit of the graph's sequence axis.
    second = default_length // LONGEST_S
    return SourceLimits(
        None,
        default_length,
        partial(_audio_buckets, second),
        padding_changes_answers="attention_mask" not in input_names,
    )


def plan_components(
    spec: CompileSpec, target: Target, limits: SourceLimits, *, threads: int
) -> tuple[ComponentPlan, ...]:
    """Return the plan of each component of a spec.

    Raises:
        SpecError: A component is longer than the model allows, or the target cannot pad this model.
    """
    return tuple(_plan(spec, component, target, limits, threads) for component in spec.components)


def merge_plans(plans: Sequence[ComponentPlan]) -> ComponentPlan:
    """Return one plan with the shapes of all plans.

    Components differ only in their lengths, so one graph, stored once, serves them all.
    """
    if len(plans) == 1:
        return plans[0]
    component = ComponentSpec(
        name=_SHARED,
        max_sequence_length=max(plan.max_sequence_length for plan in plans),
        shape_buckets=tuple(dict.fromkeys(bucket for plan in plans for bucket in plan.shape_buckets)),
    )
    return replace(plans[0], component=component)


def text_buckets(longest: int) -> tuple[ShapeBucket, ...]:
    """Return batch 1 at powers of two from 16 tokens up to the longest, and batch 8 at those up to 128."""
    lengths = [_SHORTEST_BUCKET << power for power in range(16) if _SHORTEST_BUCKET << power < longest]
    return tuple(
        ShapeBucket(batch_size=batch_size, sequence_length=length)
        for length in (*lengths, longest)
        for batch_size in (1, _BATCH_SIZE)
        if batch_size == 1 or length <= _BATCHED_UP_TO
    )


def _image_buckets(longest: int) -> tuple[ShapeBucket, ...]:
    return tuple(ShapeBucket(batch_size=rows, sequence_length=longest) for rows in (1, _BATCH_SIZE))


def _audio_buckets(second: int, longest: int) -> tuple[ShapeBucket, ...]:
    lengths = [length for length in (second << power for power in range(16)) if length < longest]
    return tuple(ShapeBucket(batch_size=1, sequence_length=length) for length in (*lengths, longest))


def _plan(
    spec: CompileSpec, component: ComponentSpec, target: Target, limits: SourceLimits, threads: int
) -> ComponentPlan:
    requested_length = component.max_sequence_length or component.longest_bucket
    if requested_length is not None and limits.longest is not None and requested_length > limits.longest:
        raise SpecError(
            f"Cannot compile for a sequence length of {requested_length}: the model has positions for "
            f"{limits.longest} tokens.",
            hint=f"Request {limits.longest} or fewer.",
        )
    length = requested_length or limits.default_length
    buckets = component.shape_buckets
    if target.capabilities.dynamic_axes:
        buckets = ()
    elif limits.padding_changes_answers:
        raise SpecError(
            f"{target.name} pads inputs to fixed shapes, but this model has no attention mask, so padding would "
            "change its answers.",
            hint="Choose a target with dynamic axes; `compileflow targets --json` lists them.",
        )
    elif not buckets:
        buckets = limits.default_buckets(length)
    shape = {"max_sequence_length": length, "shape_buckets": buckets}
    return ComponentPlan(spec=spec, component=component.model_copy(update=shape), threads=threads)
