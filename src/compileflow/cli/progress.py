"""Progress of a run on standard error: a live line per step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from compileflow.cli.output import say
from compileflow.errors import printable
from compileflow.steps.request import NOTE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.progress import Progress as LiveProgress

    from compileflow.steps.run import Progress


class PlainProgress:
    """One line when a step starts, and one for each of its progress lines, with the seconds since its start."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Show one step."""
        start = time.monotonic()
        _echo(f"{self._prefix}{name} ...")

        def show(line: str) -> None:
            _echo(f"{self._prefix}{name}: {line} ({time.monotonic() - start:.1f} s)")

        yield show


def _echo(line: str) -> None:
    # A full disk or a closed pipe does not stop the run.
    with suppress(OSError):
        say(line, err=True)


class TerminalProgress:
    """A spinner, the elapsed time and the last progress line of each step; a note stays above them."""

    def __init__(self, live: LiveProgress, prefix: str = "") -> None:
        self._live = live
        self._prefix = prefix

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Show one step; its line stays when it ends."""
        task = self._live.add_task("", total=None, step=printable(f"{self._prefix}{name}"))

        def show(line: str) -> None:
            line = printable(line)
            if line.startswith(NOTE):
                self._live.console.print(line, markup=False, highlight=False)
            else:
                self._live.update(task, description=line)

        try:
            yield show
        except BaseException as error:
            show("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            self._live.update(task, total=1, completed=1)


class NoProgress:
    """No output."""

    def step(self, name: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show nothing."""
        return nullcontext(lambda line: None)


@contextmanager
def progress_display(enabled: bool, *, prefix: str = "") -> Iterator[Progress]:
    """Yield the display that fits standard error.

    Args:
        enabled: False shows nothing.
        prefix: Text before the name of each step, to tell several runs apart.
    """
    # The bars of huggingface_hub would tear a live display, and fill a log with lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not enabled:
        yield NoProgress()
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainProgress(prefix)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[step]}", markup=False),
        TimeElapsedColumn(),
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
    )
    with Progress(*columns, console=console, expand=True) as live:
        yield TerminalProgress(live, prefix)
