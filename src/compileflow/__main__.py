"""`compileflow`, and `python -m compileflow` without the script: the command line."""

from __future__ import annotations

from compileflow._process.end_at_once import end_at_once


def main() -> None:
    """Run the command line."""
    # Before the other imports, which a signal may interrupt.
    end_at_once()
    from compileflow.cli import app
    from compileflow.cli.common import run_app

    run_app(app, "compileflow")


if __name__ == "__main__":
    main()
