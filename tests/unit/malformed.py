"""Malformed JSON files: values of a sound file replaced, left out or added, and damage to its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from compileflow.contracts.digests import file_digest

Path_ = tuple[str | int, ...]
ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e"


def nested(depth: int, innermost: Any = 1) -> Any:
    value = innermost
    for _ in range(depth):
        value = [value]
    return value


# Values that some reader may not expect where a sound file has another one.
HOSTILE = (
    None, True, False, 0, 1, -1, 3.5, 2**31, 2**63, 10**30, 10**9, -(10**12), 1e300, float("nan"), float("inf"),
    "", "x", "x" * 20_000, ESCAPES, "a\0b", "\ud800", "../../etc/passwd", "/dev/zero", "sdpa", "1e9",
    [], {}, [None], [[]], {"": None}, {"type": "Sequence"}, [1] * 2000, {str(n): n for n in range(2000)},
    nested(60), nested(200), {"__class__": "os.system"}, ["os", "system"], "os:system", "transformers:pipeline",
)  # fmt: skip
NAMES = ("", "auto_map", "__proto__", ESCAPES, "x" * 5000, "trust_remote_code", "num_labels", "custom_pipelines")


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value below a JSON value, but only some of a long list or object."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in list(items)[:30]:
        yield from places(item, (*path, name))


def changed(value: Any, path: Path_, change: Callable[[Any, Any], object]) -> Any:
    """Return a copy of a JSON value after `change(parent, name)` at a path; the root has a parent as well."""
    root = {"": json.loads(json.dumps(value))}
    parent: Any = root
    full_path = ("", *path)
    for name in full_path[:-1]:
        parent = parent[name]
    change(parent, full_path[-1])
    return root.get("", {})


def _put(value: Any) -> Callable[[Any, Any], None]:
    def put(parent: Any, name: Any) -> None:
        parent[name] = value

    return put


def _drop(parent: Any, name: Any) -> None:
    del parent[name]


def _add(name: str, value: Any) -> Callable[[Any, Any], None]:
    def add(parent: Any, place: Any) -> None:
        target = parent[place] if isinstance(parent[place], dict | list) else parent
        if isinstance(target, dict):
            target[name] = value
        else:
            target.append(value)

    return add


def values(sound: Any) -> st.SearchStrategy[bytes]:
    """Draw a file that differs from a sound JSON value in one to three places."""
    hostile = st.sampled_from(HOSTILE)
    changes = st.one_of(st.builds(_put, hostile), st.just(_drop), st.builds(_add, st.sampled_from(NAMES), hostile))

    @st.composite
    def draw_value(draw: Any) -> bytes:
        value = sound
        for _ in range(draw(st.integers(1, 3))):
            value = changed(value, draw(st.sampled_from(list(places(value)))), draw(changes))
        return json.dumps(value).encode()

    return draw_value()


def texts(sound: Any) -> st.SearchStrategy[bytes]:
    """Draw a file whose text is damaged: cut off, in another encoding, with repeated names or nested deeply."""
    data = json.dumps(sound, indent=1).encode()
    deep = b"[" * 100_000 + b"]" * 100_000
    whole = [
        b"", b"null", b"[]", b"{}", b"\xff\xfe\x00", b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), deep,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data.replace(b"{", b'{"x": 1, "x": 2, ', 1), data + data,
        data.replace(b": ", b": NaN, \"", 1), b'{"a": ' + b"9" * 10_000 + b"}",
    ]  # fmt: skip
    cut = st.integers(0, len(data) - 1).map(lambda length: data[:length])
    overwritten = st.tuples(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda change: data[: change[0]] + change[1] + data[change[0] + len(change[1]) :]
    )
    return st.one_of(st.sampled_from(whole), cut, overwritten)


def malformed(sound: Any) -> st.SearchStrategy[bytes]:
    """Draw a malformed file of either kind."""
    return st.one_of(values(sound), values(sound), texts(sound))


def reseal(folder: Path, *names: str) -> None:
    """Write the digests of some files into the manifest, which may list new files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    records = {record["path"]: record for record in manifest["files"]}
    for name in names:
        file = folder / name
        records[name] = {"path": name, "size_bytes": file.stat().st_size, "sha256": file_digest(file)}
    manifest["files"] = [records[name] for name in sorted(records)]
    path.write_text(json.dumps(manifest), "utf-8")
