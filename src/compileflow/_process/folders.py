"""Work folders that are deleted even if their owner is killed, file locks, safe opens, and errors about paths."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from compileflow._process.interrupts import signals_deferred
from compileflow.errors import CompileflowError, StoreError, redacted

_LOCK_SUFFIX = ".lock"
# What `work_folder` calls the lock of a folder.
_LOCK_NAME = re.compile(r"[a-z-]+-[0-9a-f]{12}\.lock")


@contextmanager
def work_folder(parent: Path, *, label: str, below: Path | None = None) -> Iterator[Path]:
    """Give an empty folder below `parent` and delete it after the block.

    The next caller deletes a folder whose owner was killed: its lock file is not locked any more. With `below`, it
    deletes nothing in a folder behind a link; see `folder_handle`.

    Raises:
        StoreError: `parent` cannot be written.
    """
    with os_errors(parent, "make a work folder in"):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent, below=below)
        folder = parent / f"{label}-{uuid.uuid4().hex[:12]}"
        owner = os.getpid()
        lock = _lock_for(folder)
    try:
        with os_errors(parent, "make a work folder in"):
            folder.mkdir()
        yield folder
    finally:
        # A process that was forked within the block also runs this, at its own end.
        if os.getpid() == owner:
            with signals_deferred():
                shutil.rmtree(folder, ignore_errors=True)
                Path(f"{folder}{_LOCK_SUFFIX}").unlink(missing_ok=True)
        os.close(lock)


def _lock_for(folder: Path) -> int:
    while True:
        lock = open_regular(Path(f"{folder}{_LOCK_SUFFIX}"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Between open and flock another process may have swept the new lock file as a dead owner's.
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)


def sweep(parent: Path, *, below: Path | None = None) -> None:
    """Delete the work folders of dead owners below `parent`, and nothing else that lies there.

    Args:
        parent: Folder of the work folders; it may be missing.
        below: No part of the path of `parent` below this folder may be a link.
    """
    with suppress(FileNotFoundError), folder_handle(parent, below=below or parent) as folder:
        for name in filter(_LOCK_NAME.fullmatch, os.listdir(folder)):
            try:
                lock = open_regular(Path(name), os.O_RDWR, dir_fd=folder)
            except (FileNotFoundError, ValueError):
                continue
            try:
                with suppress(BlockingIOError, FileNotFoundError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Another process may have reused the name in the meantime: delete only the locked inode.
                    if os.fstat(lock).st_ino == os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino:
                        shutil.rmtree(name.removesuffix(_LOCK_SUFFIX), ignore_errors=True, dir_fd=folder)
                        os.unlink(name, dir_fd=folder)
            finally:
                os.close(lock)


@contextmanager
def file_lock(path: Path, *, on_wait: Callable[[], None], poll_s: float = 0.1) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel frees it when the holder ends, even if it is killed.

    Args:
        path: Lock file; created if it is missing, never deleted.
        on_wait: Called once if another process holds the lock.
        poll_s: Seconds between tries.

    Raises:
        StoreError: `path` cannot be written, or it is a link or another thing that is not a regular file.
    """
    with os_errors(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = open_regular(path, os.O_RDWR | os.O_CREAT)
        except ValueError as error:
            raise StoreError(f"Cannot lock {path}: {error}.", hint="Delete it and run again.") from error
    try:
        has_waited = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not has_waited:
                    on_wait()
                    has_waited = True
                time.sleep(poll_s)
        yield
    finally:
        os.close(handle)


def open_regular(
    path: Path, flags: int = os.O_RDONLY, *, follow_links: bool = False, dir_fd: int | None = None
) -> int:
    """Open a file that a stranger may have put there, and return its handle.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`.
        follow_links: Open what a link at `path` leads to.
        dir_fd: Handle of the folder that `path` is relative to; None for the working folder.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is a link or not a regular file; the text says which.
    """
    # Without O_NONBLOCK, the open of a named pipe would wait for its other end.
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags, 0o644, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link") from error
        # Of a socket, and of a folder that is to be written.
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise ValueError("it is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a regular file")
    return handle


def check_no_link(path: Path, *, below: Path) -> None:
    """Refuse a path with a link among its parts below a folder: the writer of the link chose where it leads.

    Raises:
        StoreError: A part of the path is a link.
    """
    for part in (path, *path.parents):
        if part == below:
            return
        if part.is_symlink():
            raise _is_link(part)


@contextmanager
def folder_handle(folder: Path, *, below: Path) -> Iterator[int]:
    """Give the handle of a folder. What is done relative to it is done there, even if a link takes its place.

    Raises:
        FileNotFoundError: The folder does not exist.
        StoreError: A part of its path below `below` is a link.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    handle, part = os.open(below, flags), below
    try:
        for name in folder.relative_to(below).parts:
            part /= name
            try:
                inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR) and part.is_symlink():
                    raise _is_link(part) from error
                raise
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _is_link(path: Path) -> StoreError:
    return StoreError(
        f"{path} is a link, and a store keeps everything in its own folder.",
        hint="Move the folder that it leads to into the store, or mount it there.",
    )


def check_writable(folder: Path) -> None:
    """Check that a folder can be made or written, without making it.

    Raises:
        OSError: It cannot.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def path_of_uri(uri: str) -> Path:
    """Return the path that a file: URI names. A "#" or "?" that is not escaped is part of the path."""
    path = uri.removeprefix("file:").removeprefix("//").removeprefix("localhost")
    return Path(unquote(path))


def move_into_place(folder: Path, dest: Path) -> None:
    """Move a finished folder to its content-addressed place; an existing folder stays.

    Two processes may create the same folder at once. The first one wins, and the caller verifies the result.

    Raises:
        StoreError: `dest` cannot be written.
    """
    with os_errors(dest, "write to"):
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.replace(dest)
        except OSError:
            if not dest.exists():
                raise


@contextmanager
def file_written_whole(path: Path, *, partial: Path | None = None, read_only: bool = False) -> Iterator[Path]:
    """Give a temporary path to write, and move that file to `path` at the end: readers see all of it or nothing.

    If the block fails, the temporary file is deleted and `path` stays as it is.

    Args:
        path: Final path of the file; its folder is created.
        partial: Temporary path on the same file system. None: a new name beside `path`.
        read_only: Make the file read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        yield partial
        if read_only:
            partial.chmod(0o444)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(file: Path, dest: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot link."""
    try:
        dest.hardlink_to(file)
    except FileExistsError:
        # A copy would write through `dest` into whatever shares its bytes.
        raise
    except OSError:
        # The two paths are on different file systems, or the file system has no links.
        shutil.copyfile(file, dest)


@contextmanager
def os_errors(path: Path, action: str, *, kind: type[CompileflowError] = StoreError) -> Iterator[None]:
    """Turn an error of the operating system about `path` into one line with a hint."""
    try:
        yield
    except CompileflowError:
        raise
    except OSError as error:
        hints = {
            "ENOSPC": "Free some space on that disk, or use a folder on a larger one.",
            "EDQUOT": "Free some of your quota, or use a folder on another disk.",
            "EACCES": "Give this user access to it, or choose another folder.",
            "EPERM": "Give this user access to it, or choose another folder.",
            "EROFS": "That file system is read-only; choose another folder.",
            "ENOTDIR": "A part of that path is a file; choose another folder.",
            "EEXIST": "A part of that path is a file; choose another folder.",
        }
        name = _errno_name(error.errno)
        hint = hints.get(name, "Check that folder.")
        raise kind(f"Cannot {action} {path}: {error.strerror or error} ({name}).", hint=hint) from redacted(error)


def _errno_name(number: int | None) -> str:
    import errno

    return errno.errorcode.get(number or 0, "unknown error")
