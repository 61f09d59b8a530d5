"""A block restores the process: environment, threads, random states and warnings, even when it fails."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch

from compileflow._process.state import environment, torch_threads, undisturbed_process
from compileflow.testing.state import process_state, unchanged_process


def disturb() -> None:
    """Change all settings that native toolchains change."""
    os.environ["COMPILEFLOW_TEST_CHANGED"] = "after"
    os.environ["COMPILEFLOW_TEST_ADDED"] = "added"
    del os.environ["COMPILEFLOW_TEST_DELETED"]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    warnings.simplefilter("ignore")


@contextmanager
def failing() -> Iterator[None]:
    with pytest.raises(ZeroDivisionError):
        yield


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set variables to change, and restore all others even if the code under test fails to."""
    monkeypatch.setenv("COMPILEFLOW_TEST_CHANGED", "before")
    monkeypatch.setenv("COMPILEFLOW_TEST_DELETED", "before")
    monkeypatch.delenv("COMPILEFLOW_TEST_ADDED", raising=False)
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    os.environ.pop("COMPILEFLOW_TEST_ADDED", None)


@pytest.mark.usefixtures("prepared")
def test_everything_that_a_toolchain_changes_is_put_back() -> None:
    before = process_state()
    with undisturbed_process():
        disturb()
        # The proof that the comparison sees a change of each part.
        unchanged = [name for name, value in process_state().items() if value == before[name]]
        assert unchanged == ["working folder"]
    assert process_state() == before


@pytest.mark.usefixtures("prepared")
def test_everything_is_put_back_after_an_error_too() -> None:
    before = process_state()
    with failing(), undisturbed_process():
        disturb()
        raise ZeroDivisionError
    assert process_state() == before


@pytest.mark.usefixtures("prepared")
def test_suites_check_of_the_process_sees_a_change() -> None:
    with unchanged_process():
        pass
    with (
        pytest.raises(AssertionError, match=r"environment, .*random, COMPILEFLOW_TEST_ADDED, "),
        unchanged_process(),
    ):
        disturb()


@pytest.mark.usefixtures("prepared")
def test_suites_check_leaves_out_what_a_thread_of_prefect_changes() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="GlobalEventLoopThread")
    thread.start()
    try:
        with unchanged_process():
            random.random()  # noqa: S311
        with pytest.raises(AssertionError, match="torch random"), unchanged_process():
            torch.rand(())
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("prepared")
def test_random_numbers_go_on_as_if_the_block_had_not_been() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: S311

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    alone = draw()
    seed()
    with undisturbed_process():
        disturb()
        draw()
    assert draw() == alone


@pytest.mark.usefixtures("prepared")
def test_block_of_another_thread_begins_after_the_first_has_put_everything_back() -> None:
    entered = threading.Event()

    def enter() -> None:
        with undisturbed_process():
            entered.set()

    thread = threading.Thread(target=enter)
    with undisturbed_process():
        disturb()
        thread.start()
        # Without a lock, the thread would now take the changed environment for that of the process.
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()
    assert os.environ["COMPILEFLOW_TEST_CHANGED"] == "before"


def test_process_without_torch_stays_without_it() -> None:
    code = (
        "import sys\n"
        "from compileflow._process.state import undisturbed_process\n"
        "with undisturbed_process():\n"
        "    assert 'torch' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("ends", [nullcontext, failing])
def test_variables_are_set_within_the_block_alone(ends: Callable[[], AbstractContextManager[None]]) -> None:
    before = dict(os.environ)
    with ends(), environment(COMPILEFLOW_TEST_CHANGED="within", COMPILEFLOW_TEST_ADDED="within"):
        assert os.environ["COMPILEFLOW_TEST_CHANGED"] == os.environ["COMPILEFLOW_TEST_ADDED"] == "within"
        if ends is failing:
            raise ZeroDivisionError
    assert dict(os.environ) == before
    assert before["COMPILEFLOW_TEST_CHANGED"] == "before"


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("more", [1, 2])
def test_threads_are_as_asked_within_the_block_and_as_before_after_it(more: int) -> None:
    before = torch.get_num_threads()
    with torch_threads(before + more):
        assert torch.get_num_threads() == before + more
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("prepared")
def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with failing(), torch_threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("asked", [lambda: None, torch.get_num_threads])
def test_no_count_and_the_count_there_is_change_nothing(
    asked: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = asked()
    # Setting the same count again would restart the pool of some builds of torch.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail(f"set to {count}"))
    with torch_threads(count):
        pass


def test_resident_memory_grows_with_an_array() -> None:
    # A process of its own: in this one, other threads may free as much at the same time.
    script = (
        "from compileflow._process.state import resident_bytes\n"
        "before = resident_bytes()\n"
        "block = b'1' * (64 * 2**20)\n"
        "print(resident_bytes() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 56 * 2**20 < int(answer.stdout) < 128 * 2**20
