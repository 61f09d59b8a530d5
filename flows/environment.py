"""Prefect's settings for a run without a server of one's own; what the user has set stays."""

from __future__ import annotations

import os

from compileflow._process.child import skip_slow_grammar
from compileflow._process.folders import os_errors
from compileflow.settings import Settings

_DEFAULTS = {
    # Nothing leaves the machine.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Twenty seconds, Prefect's own, are not enough for a first start on a small machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # An embedded server that is stopped while it writes prints a traceback after the run's last line.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # SQLite stalls when each task run is written on its own.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
}


def set_embedded_defaults(settings: Settings, *, progress: bool) -> None:
    """Set what is unset, before Prefect is imported.

    Args:
        settings: An embedded server keeps its database below their home.
        progress: Whether the run prints a line a step.

    Raises:
        StoreError: their home cannot be written.
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
