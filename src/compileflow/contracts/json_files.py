"""read_json: a JSON file that a stranger may have written, in bounded time and memory."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

# The largest tokenizer.json files of public models have about 40 MB and 3 million values.
MOST_JSON_BYTES = 64 * 2**20
_MOST_VALUES = 8_000_000


def read_json(path: Path, *, most_bytes: int = MOST_JSON_BYTES, strict: bool = False) -> Any:
    """Read a JSON file in UTF-8 without BOM.

    Args:
        path: Path of the file.
        most_bytes: Largest size that is read.
        strict: Refuse names that an object repeats, and the numbers NaN and Infinity.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a regular file, too large, nested too deeply, or not such JSON; the text says which.
    """
    # Without O_NONBLOCK, the open of a named pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes / 2**20:g} MiB")
    # An empty list takes two bytes of the file and sixty of memory. Signs inside texts count as well.
    if sum(map(data.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values")
    hooks: dict[str, Any] = {"object_pairs_hook": without_repeats, "parse_constant": _refuse} if strict else {}
    try:
        return json.loads(data.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict, and raise a ValueError if a name repeats."""
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated_name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it repeats the name {repeated_name!r}")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")
