from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from compileflow._process.folders import file_lock, folder_handle, os_errors, sweep, work_folder
from compileflow.errors import SourceError, StoreError
from compileflow.testing.processes import at_once, other_process, say

HERE = __name__


def own_work_folder(parent: str) -> None:
    """Runs in another process, until it is killed."""
    with work_folder(Path(parent), label="other") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("unfinished")
        say(folder)
        time.sleep(600)


def make_work_folders(parent: str) -> None:
    """Runs in several processes at once; each of them keeps sweeping the folders of the others."""
    unguarded = 0
    for _ in range(400):
        with work_folder(Path(parent), label="many") as folder:
            (folder / "file").write_text("mine")
            unguarded += not Path(f"{folder}.lock").exists()
    say(unguarded)


def hold_lock(path: str) -> None:
    """Runs in another process, until it is killed."""
    with file_lock(Path(path), on_wait=lambda: say("waiting")):
        say("held")
        time.sleep(600)


def test_work_folder_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", label="compile") as folder:
        assert list(folder.iterdir()) == []
        assert folder.name.startswith("compile-")
        (folder / "file").write_text("unfinished")
    assert list((tmp_path / "work").iterdir()) == []


def test_work_folder_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path, label="compile"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_signal_that_is_repeated_during_the_deletion_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int, _: object) -> None:
        raise InterruptedError(number)

    def be_stopped() -> None:
        with work_folder(tmp_path, label="compile") as folder:
            (folder / "file").write_text("unfinished")
            signal.raise_signal(signal.SIGTERM)

    def interrupted_rmtree(folder: Path, *, ignore_errors: bool) -> None:
        signal.raise_signal(signal.SIGTERM)
        rmtree(folder, ignore_errors=ignore_errors)

    rmtree, before = shutil.rmtree, signal.signal(signal.SIGTERM, interrupt)
    monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)
    try:
        with pytest.raises(InterruptedError):
            be_stopped()
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_folder_of_a_killed_owner_is_swept_by_the_next(tmp_path: Path) -> None:
    with other_process(f"{HERE}:own_work_folder", str(tmp_path)) as owner:
        leftover = Path(owner.line())
        owner.kill()
    assert (leftover / "sub" / "file").exists()
    with work_folder(tmp_path, label="next") as folder:
        assert not leftover.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_folder_of_a_live_owner_is_left_alone(tmp_path: Path) -> None:
    with other_process(f"{HERE}:own_work_folder", str(tmp_path)) as owner:
        their_folder = Path(owner.line())
        with work_folder(tmp_path, label="next"):
            assert (their_folder / "sub" / "file").read_text() == "unfinished"


def test_other_things_in_the_parent_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder").mkdir()
    with work_folder(tmp_path, label="next"):
        assert {"notes", "folder"} < {path.name for path in tmp_path.iterdir()}


def test_sweep_deletes_only_what_a_work_folder_leaves(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    parent = tmp_path / "parent"
    for folder in (outside, parent / "uv", parent / "read-0123456789ab"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("mine")
    for name in ("uv.lock", "poetry.lock", "read-0123456789ab.lock", "link-0123456789ab.lock"):
        (parent / name).write_text("")
    (parent / "link-0123456789ab").symlink_to(outside)
    (parent / "away-0123456789ab.lock").symlink_to(outside / "file")
    os.mkfifo(parent / "pipe-0123456789ab.lock")
    sweep(parent)
    assert (outside / "file").read_text() == "mine"
    assert {"uv", "uv.lock", "poetry.lock"} <= {path.name for path in parent.iterdir()}
    assert not [path for path in parent.iterdir() if path.name.startswith("read-")]


def test_folder_that_is_exchanged_for_a_link_is_left_alone(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "store" / "blobs" / "ab"
    for path in (precious / "ab", folder):
        path.mkdir(parents=True)
        (path / "file").write_text("mine")
    with folder_handle(folder, below=tmp_path / "store") as handle:
        (tmp_path / "store" / "blobs").rename(tmp_path / "away")
        (tmp_path / "store" / "blobs").symlink_to(precious)
        os.unlink("file", dir_fd=handle)
    assert (precious / "ab" / "file").exists()
    assert not (tmp_path / "away" / "ab" / "file").exists()
    with (
        pytest.raises(StoreError, match="blobs is a link, and a store keeps everything in its own folder"),
        folder_handle(folder, below=tmp_path / "store"),
    ):
        pass


def test_sweepers_never_take_a_new_folder_for_a_dead_one(tmp_path: Path) -> None:
    arguments = (str(tmp_path),)
    assert at_once(f"{HERE}:make_work_folders", arguments, arguments) == ["0", "0"]
    assert list(tmp_path.iterdir()) == []


def test_work_folder_below_a_plain_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"Cannot make a work folder in .*\((EEXIST|ENOTDIR)\)"),
        work_folder(tmp_path / "file" / "work", label="compile"),
    ):
        pytest.fail("the folder does not exist")


def test_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "key.lock"
    waits: list[float] = []
    with other_process(f"{HERE}:hold_lock", str(path)) as holder:
        assert holder.line() == "held"
        killer = threading.Timer(0.4, holder.kill)
        killer.start()
        with file_lock(path, on_wait=lambda: waits.append(time.monotonic()), poll_s=0.01):
            locked_at = time.monotonic()
        killer.join()
    assert len(waits) == 1
    assert locked_at - waits[0] > 0.2


def test_two_threads_exclude_each_other(tmp_path: Path) -> None:
    path, order = tmp_path / "key.lock", list[str]()
    waiting = threading.Event()

    def second() -> None:
        with file_lock(path, on_wait=waiting.set, poll_s=0.01):
            order.append("second")

    thread = threading.Thread(target=second)
    with file_lock(path, on_wait=lambda: None):
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_processes_that_a_holder_started_do_not_hold_its_lock(tmp_path: Path) -> None:
    path, waits = tmp_path / "key.lock", list[str]()
    with file_lock(path, on_wait=lambda: None):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        with file_lock(path, on_wait=lambda: waits.append("waited")):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert waits == []


def test_system_error_names_the_place_the_reason_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught, os_errors(path, "write to"):
        path.write_text("")
    assert str(path) in caught.value.message
    assert caught.value.message.endswith("Not a directory (ENOTDIR).")
    assert caught.value.hint == "A part of that path is a file; choose another folder."
    assert isinstance(caught.value.__cause__, NotADirectoryError)


def test_errors_of_ours_pass_unchanged(tmp_path: Path) -> None:
    error = SourceError("found")
    with pytest.raises(SourceError) as caught, os_errors(tmp_path, "write to"):
        raise error
    assert caught.value is error


FORKING = """
import os, sys
from pathlib import Path
from compileflow._process.folders import work_folder
with work_folder(Path(sys.argv[1]), label="mine") as folder:
    if not (child := os.fork()):
        sys.exit(0)
    os.waitpid(child, 0)
    print(folder.is_dir(), Path(f"{folder}.lock").is_file())
"""


def test_forked_process_that_ends_leaves_its_parents_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "True True\n"
    assert list(tmp_path.iterdir()) == []
