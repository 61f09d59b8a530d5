"""python -m compileflow.cli: the same command without the script."""

from compileflow.cli import app

app()
