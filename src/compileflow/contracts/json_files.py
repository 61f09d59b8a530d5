"""read_json and its parts: JSON that a stranger may have written, in bounded time and memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from compileflow._process.folders import open_regular
from compileflow.contracts.digests import canonical_json

# The largest tokenizer.json files of public models have about 40 MB and 3 million values.
MOST_JSON_BYTES = 64 * 2**20
_MOST_VALUES = 8_000_000
# Limits of strict JSON, far above what compileflow writes. Each 64-bit number has at most 20 characters.
_MOST_LEVELS = 100
_LONGEST_INTEGER = 20


def read_json(path: Path, *, most_bytes: int = MOST_JSON_BYTES, strict: bool = False) -> Any:
    """Read a JSON file in UTF-8 without BOM.

    Args:
        path: Path of the file.
        most_bytes: Largest size that is read.
        strict: See `parse_json`.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a regular file, or `parse_json` refuses its content; the text says why.
    """
    return parse_json(read_bytes(path, most_bytes=most_bytes, follow_links=True), most_bytes, strict=strict)


def read_bytes(path: Path, *, most_bytes: int, follow_links: bool = False) -> bytes:
    """Read a file whose kind and size are checked first.

    Args:
        path: Path of the file.
        most_bytes: Largest size that is read.
        follow_links: Read what a link at `path` leads to.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is a link, not a regular file or too large; the text says which.
    """
    with os.fdopen(open_regular(path, follow_links=follow_links), "rb") as stream:
        if os.fstat(stream.fileno()).st_size <= most_bytes:
            data = stream.read(most_bytes + 1)
            if len(data) <= most_bytes:
                return data
    raise _too_large(most_bytes)


def parse_json(data: bytes, most_bytes: int, *, strict: bool) -> Any:
    """Return the value of JSON in UTF-8 without BOM.

    Args:
        data: Bytes of the JSON.
        most_bytes: Largest size that is parsed.
        strict: Refuse what a later step may trip over: names that an object repeats, NaN, Infinity and numbers of
            over 64 bits, text that is not Unicode, and more than 100 levels.

    Raises:
        ValueError: It is too large, nested too deeply, or not such JSON; the text says which.
    """
    if len(data) > most_bytes:
        raise _too_large(most_bytes)
    # An empty list takes two bytes of the file and sixty of memory. Signs inside texts count as well.
    if sum(map(data.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values")
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"object_pairs_hook": without_repeats, "parse_constant": _refuse, "parse_int": _integer}
    try:
        value = json.loads(data.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if strict:
        _check_levels(value)
        # Refuses numbers that overflow and text that is not Unicode.
        canonical_json(value)
    return value


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict, and raise a ValueError if a name repeats."""
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated_name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it repeats the name {repeated_name!r:.80}")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_LEVELS):
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [item for part in nested for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _too_large(most_bytes: int) -> ValueError:
    return ValueError(f"it is larger than {most_bytes / 2**20:g} MiB")
