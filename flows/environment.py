"""Prefect's settings for a run without a Prefect server. Variables that the user has set keep their values."""

from __future__ import annotations

import os

from compileflow._process.child_process import skip_slow_grammar
from compileflow._process.folders import os_errors
from compileflow.settings import Settings

SERVER_SETTINGS = {
    # Nothing leaves the machine.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # SQLite stalls when every task run is its own write.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
}
_DEFAULTS = SERVER_SETTINGS | {
    # Prefect's default of 20 seconds is too short for a first start on a small machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # An embedded server that stops while it writes prints a traceback after the run's last line.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}


def set_embedded_defaults(settings: Settings, *, progress: bool) -> None:
    """Set the variables that are unset. Call this before Prefect is imported.

    Args:
        settings: An embedded server keeps its database below their home folder.
        progress: Whether Prefect prints a log line for each step.

    Raises:
        StoreError: The home folder cannot be written.
    """
    defaults = dict(_DEFAULTS)
    if "PREFECT_API_URL" not in os.environ:
        home = settings.home_dir / "prefect"
        with os_errors(home, "make"):
            home.mkdir(parents=True, exist_ok=True)
        defaults["PREFECT_HOME"] = str(home)
    defaults["PREFECT_LOGGING_LEVEL"] = "INFO" if progress else "CRITICAL"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    skip_slow_grammar()
