"""Command: the class of all commands, which refuses repeated options and wrong numbers in one line."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from compileflow.cli.common import fail
from compileflow.errors import SpecError, expectation


class Command(TyperCommand):
    """A command of typer that checks what typer would accept, or refuse without the value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            typer.Exit: An option that takes one value was repeated, or a value is not a number.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        as_json = "--json" in args
        values, _, parameters = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in parameters:
            if not getattr(parameter, "multiple", True) and parameters.count(parameter) > 1:
                # Typer would take the last value.
                error = SpecError(f"{_spelling(parameter)} was given more than once.", hint="Give it once.")
                fail(error, as_json=as_json)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if not isinstance(error.__cause__, ValidationError) or error.param is None:
                raise
            problem = expectation(error.__cause__.errors()[0])
            value = values.get(str(error.param.name))
            fail(SpecError(f"{_spelling(error.param)}: {problem}, got {value!r}."), as_json=as_json)


def _spelling(parameter: Any) -> str:
    return "/".join((*parameter.opts, *parameter.secondary_opts))
