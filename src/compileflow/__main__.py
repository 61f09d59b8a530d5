"""`python -m compileflow`: the command line without the script."""

from __future__ import annotations

from compileflow.cli import app

app(prog_name="compileflow")
