"""`python -m flows`: the commands that run requests as Prefect flows."""

from __future__ import annotations

from compileflow._process.end_at_once import end_at_once

if __name__ == "__main__":
    # Before the other imports, which a signal may interrupt.
    end_at_once()
    import gc

    # Imports make many objects and no garbage. A run starts the collector again.
    gc.disable()

from flows.commands import app

if __name__ == "__main__":
    from compileflow.cli.common import run_app

    run_app(app, "python -m flows")
