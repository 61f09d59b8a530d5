"""What the commands print: each text passes `printable`, because a store or a registry may have written it.

No other module of the commands calls `typer.echo` or `print`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import typer
from rich.text import Text

from compileflow.errors import printable


def say(line: str = "", *, err: bool = False) -> None:
    """Print one line to standard output, or to standard error.

    A line break, a control character or a mark that reverses text is printed as an escape.
    """
    typer.echo(printable(line), err=err)


def say_lines(text: str, *, err: bool = False) -> None:
    """Print a text of several lines, such as a log or a program."""
    for line in text.splitlines():
        say(line.expandtabs(), err=err)


def say_json(value: Any) -> None:
    """Print a value as JSON, which is plain ASCII."""
    typer.echo(json.dumps(value, indent=1))


def plain(text: str) -> Text:
    """Return a text for rich, without markup."""
    return Text(printable(text))


class _PlainFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it
        return printable(super().formatMessage(record))


def escape_log_lines() -> None:
    """Escape the warnings that Python prints in a process without a configuration of logging."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
