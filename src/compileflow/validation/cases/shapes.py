"""Shapes: the batch sizes and lengths at which both models are compared, and how full their rows are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from compileflow.contracts import ComponentRecord, TensorRecord

Shape = tuple[int, int]

# Batch sizes just below and above those at which kernels and batching usually change.
BATCH_SIZES = (1, 2, 3, 8, 9, 32, 33)
_LONGEST = 2**31
# Lengths of text at each batch size, besides the shortest one. A fault that starts at a batch size and a length
# shows at a larger pair of both, so the pairs with the most tokens are few.
_TEXT_LENGTHS: dict[int, tuple[int, ...]] = {
    1: (16, 128, 129, 256, 257, _LONGEST),
    2: (16, 128, 129, 256, 257, _LONGEST),
    3: (16, 129, 257),
    8: (16, 128, 129, 256),
    9: (16, 129, _LONGEST),
    16: (16, 128),
    32: (16, 128),
    33: (16, 257),
    64: (16,),
}
# Batch sizes that are compared at the shortest length alone, where a call costs little.
_SHORT_BATCHES = range(1, 34)
# Tokens of a batch of the longest rows; a model that takes more gets shorter rows.
_MOST_TOKENS = 9 * 512
# Elements of an output, 160 MB. The answers of fill-mask have one for each word of the vocabulary.
_MOST_VALUES = 40_000_000
# Elements of a batch of images: 33 of 224 x 224 pixels. Up to eight images always share a batch.
_MOST_PIXELS, _LEAST_BATCH = 33 * 3 * 224 * 224, 8
# Lengths of audio, in seconds, and the seconds of a batch.
_SECONDS, _MOST_SECONDS = (0.25, 1.0, 5.0), 15.0


def text_shapes(record: ComponentRecord, shortest: int) -> tuple[Shape, ...]:
    """Return the (batch size, length) pairs at which a component of text is compared, short rows first.

    They are the buckets of a static graph, and a grid for a dynamic one.

    Args:
        record: Record of the component.
        shortest: Shortest row that holds text.
    """
    if not record.dynamic_axes:
        return _buckets(record)
    longest = record.max_sequence_length
    shapes = set()
    for rows, lengths in _TEXT_LENGTHS.items():
        most = min(longest, most_tokens(record.outputs) // rows)
        for length in (shortest, *lengths):
            limit = min(most, _MOST_TOKENS // rows) if length == _LONGEST and rows > 1 else most
            shapes.add((rows, max(1, min(length, limit))))
    few = max(1, min(shortest, longest))
    shapes |= {(rows, few) for rows in _SHORT_BATCHES if rows * few <= most_tokens(record.outputs)}
    return _ordered(shapes)


def image_shapes(record: ComponentRecord, pixels: int) -> tuple[Shape, ...]:
    """Return the (batch size, 1) pairs at which a component of images is compared.

    Args:
        record: Record of the component.
        pixels: Elements of one image.
    """
    if not record.dynamic_axes:
        return _buckets(record)
    return tuple((rows, 1) for rows in BATCH_SIZES if rows <= _LEAST_BATCH or rows * pixels <= _MOST_PIXELS)


def audio_shapes(record: ComponentRecord, shortest: int, second: int) -> tuple[Shape, ...]:
    """Return the (batch size, length) pairs at which a component of audio is compared, short rows first.

    The cases of `SignalCases.generated` hold the longest row.

    Args:
        record: Record of the component.
        shortest: Shortest row that the model takes.
        second: Length of one second.
    """
    if not record.dynamic_axes:
        return _buckets(record)
    longest = record.max_sequence_length
    lengths = {shortest, *(min(longest, max(shortest, round(seconds * second))) for seconds in _SECONDS)}
    most = max(shortest, round(_MOST_SECONDS * second))
    shapes = {(rows, length) for rows in BATCH_SIZES for length in lengths if rows * length <= most}
    return _ordered(shapes | {(rows, shortest) for rows in BATCH_SIZES})


def row_lengths(rows: int, length: int, shortest: int, *, dynamic: bool) -> list[list[int]]:
    """Return the lengths of the rows of each call at a shape: full rows and ragged ones.

    A bucket gets a call of each kind. A dynamic graph gets one call of both, because it meets many more shapes.
    """
    ragged = [max(min(shortest, length), length * (rows - row) // (rows + 1)) for row in range(rows)]
    if dynamic:
        # Two of three rows are full: a full row reads more of the vocabulary for the same work.
        return [[ragged[row] if row % 3 == 1 else length for row in range(rows)]]
    return [[length] * rows, ragged]


def most_tokens(outputs: Iterable[TensorRecord]) -> int:
    """Return how many tokens a call may have, so that its outputs fit in memory."""
    return _MOST_VALUES // values_per_token(outputs)


def values_per_token(outputs: Iterable[TensorRecord]) -> int:
    """Return the elements of the largest answer to one token; 1 where all answers are about whole rows."""
    per_token = [record.axes for record in outputs if "sequence" in record.axes]
    return max((prod(axis for axis in axes if isinstance(axis, int)) for axes in per_token), default=1)


def repeated_shapes(shapes: Sequence[Shape], *, dynamic: bool) -> tuple[Shape, ...]:
    """Return the shapes that are called again: all buckets; of a grid, each batch size and each single row."""
    if not dynamic:
        return tuple(shapes)
    shortest = {rows: min(length for others, length in shapes if others == rows) for rows, _ in shapes}
    return _ordered({*shortest.items(), *(shape for shape in shapes if shape[0] == 1)})


def _buckets(record: ComponentRecord) -> tuple[Shape, ...]:
    return _ordered({(bucket.batch_size, bucket.sequence_length) for bucket in record.shape_buckets})


def _ordered(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (shape[1], shape[0])))
