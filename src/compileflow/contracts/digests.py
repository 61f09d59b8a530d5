"""Digests: the SHA-256 of files, folders and JSON values, in one definition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from compileflow.errors import IntegrityError

SHA256 = r"^[0-9a-f]{64}$"


def safe_relative_path(path: str) -> str:
    """Return `path` if it is a POSIX path to a file below its folder.

    Raises:
        ValueError: The path leaves its folder, is not in its shortest form, or is not Unicode text.
    """
    parts = PurePosixPath(path).parts
    windows_like = "\\" in path or (len(path) > 1 and path[1] == ":")
    if not parts or path.startswith("/") or ".." in parts or windows_like or "\0" in path:
        raise ValueError(f"path {path!r} leaves its folder")
    if str(PurePosixPath(path)) != path:
        raise ValueError(f"path {path!r} is not in its shortest form")
    if path != path.encode("utf-8", "replace").decode():
        raise ValueError(f"path {path!r} is not Unicode text")
    return path


class FileRecord(BaseModel):
    """One file of a folder: its relative path, its size, and the SHA-256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(safe_relative_path)]
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value as UTF-8, with sorted keys and without spaces: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical bytes, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(
    folder: Path,
    *,
    paths: Iterable[str] | None = None,
    without: Collection[str] = (),
    at_once: int = 1,
    digest_of: Callable[[Path], str] = file_digest,
) -> tuple[FileRecord, ...]:
    """Hash the files below a folder and return their records, sorted by path.

    Args:
        folder: Folder of the files.
        paths: Relative paths of the files to hash. None: all files.
        without: Paths that are left out: a file in `folder`, or with a slash at the end, a folder in it.
        at_once: Number of files that are hashed at once, in threads. SHA-256 releases Python's global lock.
        digest_of: Returns the SHA-256 of a file. A caller that needs the bytes can read and hash the file itself.

    Raises:
        IntegrityError: The folder does not exist, or an entry is neither a file nor a folder, is a link that leads
            out of the folder, or has a name that some operating systems do not allow.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise IntegrityError(f"{folder} is not a folder.", hint="Give an existing folder.")
    try:
        names = sorted(paths if paths is not None else _walk(root))
    except RecursionError as error:
        raise IntegrityError(f"{folder} has folders nested too deeply.", hint="Give another folder.") from error
    names = [name for name in names if not {name, name[: name.find("/") + 1]} & {*without}]
    try:
        with ThreadPoolExecutor(at_once) as threads:
            return tuple(threads.map(lambda name: _record(root, name, digest_of), names))
    except ValidationError as error:
        problem = error.errors()[0]
        raise IntegrityError(
            f"{folder}: {problem['input']!r} is not a portable file name: {problem['msg']}.",
            hint="Rename that file.",
        ) from error


def listing_bytes(files: Iterable[FileRecord]) -> bytes:
    """Return the listing of a folder as canonical JSON. The SHA-256 of these bytes is the folder's digest."""
    records = [record.model_dump() for record in sorted(files, key=lambda record: record.path)]
    return canonical_json({"schema_version": 1, "files": records})


def folder_digest(files: Iterable[FileRecord]) -> str:
    """Return the digest of a folder: the SHA-256 of its listing."""
    return hashlib.sha256(listing_bytes(files)).hexdigest()


def _record(root: Path, name: str, digest_of: Callable[[Path], str]) -> FileRecord:
    path = root / name
    return FileRecord(path=name, size_bytes=path.stat().st_size, sha256=digest_of(path))


def _walk(root: Path) -> list[str]:
    names = []
    for path in root.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file() or not path.resolve().is_relative_to(root):
            raise IntegrityError(
                f"{path.name} in {root} is a link out of the folder, or not a regular file.",
                hint="Replace it with the file itself.",
            )
        names.append(path.relative_to(root).as_posix())
    return names
