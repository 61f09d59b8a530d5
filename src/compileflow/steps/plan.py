"""Plan the components of a compile: the maximum length and the shape buckets that each one gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compileflow.catalog import get_target, target_names
from compileflow.contracts import ComponentPlan, Target
from compileflow.errors import SpecError
from compileflow.source_model.decoding import OTHER_DECODER
from compileflow.source_model.interface import SourceModel, tokenizer_maximum
from compileflow.source_model.positions import declared_longest
from compileflow.source_model.processor import LONGEST_S, image_sizes, longest_signal
from compileflow.source_model.token_rows import text_config
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, ShapeBucket

_SHORTEST_BUCKET = 16
# Maximum length of a text component if neither the model nor its tokenizer has one.
DEFAULT_TOKENS = 512
# Maximum length of a decoder whose spec sets none. Many have positions for 100,000 tokens, and validation compares
# a logit for each word at each token.
_DECODER_TOKENS = 1024
# Batches speed up a CPU only for rows up to this length; a single longer row keeps it busy.
_BATCH_SIZE, _BATCHED_UP_TO = 8, 128
# Model types that pool a row in steps, or read it in a loop over its tokens or pieces.
_READ_IN_STEPS = (
    "cpmant",
    "deepseek_v4",
    "funnel",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
)
# Model types whose graph torch.export does not finish in minutes while the size of the images is free.
_ONE_IMAGE_SIZE = ("zoedepth",)
# Fields with the number of tokens in each piece that a model type reads in a loop.
_PIECES = {"canine": "local_transformer_stride", "minimax": "block_size"}
# Name of the plan for a graph that several components share.
_SHARED = "shared"


@dataclass(frozen=True)
class SourceLimits:
    """Lengths that a source model takes.

    Attributes:
        longest: Longest row that the model has positions for; None without such a limit.
        default_length: Maximum length of a component whose spec sets none.
        default_buckets: Shape buckets of a target without dynamic axes, given the maximum length.
        longest_piece: Longest row of a graph that takes several lengths; None without such a limit.
        padding_fault: Why a padded row gets another answer than the row alone; "" if it gets the same one.
        image_sizes: Sizes, (height, width), that the processor gives to images of different sizes.
        takes_one_size: A graph of the model takes images of one size only.
    """

    longest: int | None
    default_length: int
    default_buckets: Callable[[int], tuple[ShapeBucket, ...]]
    longest_piece: int | None = None
    padding_fault: str = ""
    image_sizes: tuple[tuple[int, int], ...] = ()
    takes_one_size: bool = False


def source_limits(source_model: SourceModel, spec: CompileSpec, tokenizer: Any) -> SourceLimits:
    """Read the limits of a source model off the model, and its tokenizer or processor.

    Args:
        source_model: The source model.
        spec: What to compile.
        tokenizer: Tokenizer of a text model; None without one.
    """
    if spec.hf_task.takes_text:
        longest = source_model.longest
        lengths = [length for length in (longest, tokenizer_maximum(tokenizer)) if length]
        return SourceLimits(
            longest,
            _default_length(spec.hf_task, lengths),
            text_buckets,
            longest_piece=_longest_piece(source_model.model.config),
            padding_fault=_padding_fault(source_model) if source_model.padding == "none" else "",
        )
    processor = source_model.processor
    assert processor is not None  # noqa: S101 - every image and audio model has one
    if spec.hf_task.modality == "image":
        return SourceLimits(
            1,
            1,
            _single_row_buckets,
            image_sizes=image_sizes(processor),
            takes_one_size=source_model.model.config.model_type in _ONE_IMAGE_SIZE,
        )
    default_length = longest_signal(processor)
    if default_length == 1:
        return SourceLimits(1, 1, _single_row_buckets)
    # One second, in the unit of the graph's sequence axis.
    second = default_length // LONGEST_S
    return SourceLimits(
        None,
        default_length,
        partial(_audio_buckets, second),
        padding_fault="" if source_model.cuts_padding else _padding_fault(source_model),
    )


def declared_limits(config: Any, hf_task: HfTask, tokenizer_maximum: int | None) -> SourceLimits:
    """Return the limits of a source model that its files show; the model itself may have narrower ones.

    Args:
        config: The fields of config.json as attributes; a field may be missing.
        hf_task: Task of the model.
        tokenizer_maximum: Longest input of the tokenizer; None without one.
    """
    if hf_task.modality == "image":
        return SourceLimits(1, 1, _single_row_buckets)
    if not hf_task.takes_text:
        return SourceLimits(None, 1, text_buckets)
    longest = declared_longest(text_config(config))
    lengths = [length for length in (longest, tokenizer_maximum) if length]
    return SourceLimits(
        longest, _default_length(hf_task, lengths), text_buckets, longest_piece=_longest_piece(config)
    )


def _default_length(hf_task: HfTask, lengths: Sequence[int]) -> int:
    """Return the maximum length of a component whose spec sets none.

    Args:
        hf_task: Task of the model.
        lengths: Longest rows of the model and of its tokenizer, as far as they have one.
    """
    if hf_task.generates:
        return min((*lengths, _DECODER_TOKENS))
    return min(lengths, default=DEFAULT_TOKENS)


def plan_components(
    spec: CompileSpec, target: Target, limits: SourceLimits, *, threads: int, rows_fill_shapes: bool = False
) -> tuple[ComponentPlan, ...]:
    """Return the plan of each component of a spec.

    Args:
        spec: What to compile.
        target: Target to compile for.
        limits: Lengths that the source model takes.
        threads: Threads that the compile may use.
        rows_fill_shapes: The caller pads each row to a compiled shape, so that nothing else pads it.

    Raises:
        SpecError: A component is longer than the model allows, or the target cannot pad this model.
    """
    if rows_fill_shapes:
        limits = replace(limits, padding_fault="")
    return tuple(_plan(spec, component, target, limits, threads) for component in spec.components)


def requested_length(spec: CompileSpec, component: ComponentSpec, limits: SourceLimits) -> int | None:
    """Return the maximum length that a component of a spec requests; None for the model's own.

    Raises:
        SpecError: The length is more than the model takes.
    """
    length = component.max_sequence_length or component.longest_bucket
    if spec.hf_task.generates and length == 1:
        raise SpecError(
            "Cannot compile text generation for a length of 1 token: a prompt would leave no room for an answer.",
            hint="Request 2 or more, for example 1024.",
        )
    if length is None or limits.longest is None or length <= limits.longest:
        return length
    if not spec.hf_task.takes_text:
        raise SpecError(
            f"Cannot compile for a sequence length of {length}: the inputs of {spec.hf_task.value} have no length "
            "that varies.",
            hint="Leave the length out, or give 1.",
        )
    raise SpecError(
        f"Cannot compile for a sequence length of {length}: the model has positions for {limits.longest} tokens.",
        hint=f"Request {limits.longest} or fewer.",
    )


def check_timed_shapes(shapes: Iterable[ShapeBucket], longest: int) -> None:
    """Refuse a shape to time whose rows are longer than the longest row of the artifact.

    Raises:
        SpecError: A shape is longer.
    """
    for shape in shapes:
        if shape.sequence_length > longest:
            raise SpecError(
                f"Cannot time the shape {shape}: the longest row of this model is {longest}.",
                hint="Give shapes with rows of at most that length.",
            )


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


def _padding_fault(source_model: SourceModel) -> str:
    if all(record.name != "attention_mask" for record in source_model.inputs):
        return "it has no attention mask that would hide the padding"
    if any("free" in record.axes for record in source_model.outputs):
        return "its outputs cannot be cut back to the length of an input"
    return "its attention mask does not hide the padding from every part of it"


def targets_of(hf_task: HfTask) -> list[str]:
    """Return the names of the targets that compile a task."""
    return [name for name in target_names() if hf_task in get_target(name).capabilities.hf_tasks]


def targets_of_any_shape(hf_task: HfTask) -> list[str]:
    """Return the names of the targets that compile a task without fixed shapes."""
    capabilities = {name: get_target(name).capabilities for name in target_names()}
    return [name for name, able in capabilities.items() if able.dynamic_axes and hf_task in able.hf_tasks]


def _single_row_buckets(longest: int) -> tuple[ShapeBucket, ...]:
    """Return batches of 1 and 8 for images, and for audio whose processor makes one length."""
    return tuple(ShapeBucket(batch_size=rows, sequence_length=longest) for rows in (1, _BATCH_SIZE))


def _audio_buckets(second: int, longest: int) -> tuple[ShapeBucket, ...]:
    lengths = [length for length in (second << power for power in range(16)) if length < longest]
    return tuple(ShapeBucket(batch_size=1, sequence_length=length) for length in (*lengths, longest))


def _longest_piece(config: Any) -> int | None:
    """Return the longest row that a model does not read in steps; 0 if it reads each row so, None if none."""
    # The text part of a composite model has a type of its own.
    for part in (config, text_config(config)):
        model_type = getattr(part, "model_type", None)
        if model_type in _READ_IN_STEPS:
            return 0
        if model_type in _PIECES:
            # config.json may lack the field.
            piece = getattr(part, _PIECES[model_type], None)
            return None if piece is None else int(piece)
    return None


def _plan(
    spec: CompileSpec, component: ComponentSpec, target: Target, limits: SourceLimits, threads: int
) -> ComponentPlan:
    length = requested_length(spec, component, limits) or limits.default_length
    buckets = component.shape_buckets
    if target.capabilities.dynamic_axes:
        if limits.longest_piece is not None and length > limits.longest_piece:
            raise SpecError(
                f"{target.name} compiles one graph for all lengths, but this model cuts a row of {length} tokens "
                "into pieces or reads it token by token, and a graph has a fixed number of steps.",
                hint=OTHER_DECODER
                if spec.hf_task.generates
                else "Choose a target with fixed shapes, such as torchscript"
                + (f", or a maximum of {limits.longest_piece} tokens." if limits.longest_piece else "."),
            )
        if limits.takes_one_size and len(limits.image_sizes) > 1:
            raise SpecError(
                f"{target.name} compiles one graph for all image sizes, but the export of this model does not end "
                "while the size is free, and its processor keeps the aspect ratio.",
                hint="Set keep_aspect_ratio to false in preprocessor_config.json.",
            )
        buckets = ()
    elif limits.padding_fault:
        choices = ", ".join(targets_of_any_shape(spec.hf_task))
        raise SpecError(
            f"{target.name} pads each input to a fixed length, and padding changes the answers of this model: "
            f"{limits.padding_fault}.",
            hint=f"Choose a target that takes inputs of any length: {choices}.",
        )
    elif len(limits.image_sizes) > 1:
        sizes = " and ".join(f"{height} x {width}" for height, width in limits.image_sizes[:2])
        raise SpecError(
            f"{target.name} compiles fixed shapes, but this model's processor keeps the aspect ratio: it makes "
            f"images of {sizes} pixels.",
            hint="Choose a target with dynamic axes; `compileflow targets --json` lists them. Or set size to a "
            "height and a width in preprocessor_config.json.",
        )
    elif not buckets:
        buckets = limits.default_buckets(length)
    shape = {"max_sequence_length": length, "shape_buckets": buckets}
    return ComponentPlan(spec=spec, component=component.model_copy(update=shape), threads=threads)
