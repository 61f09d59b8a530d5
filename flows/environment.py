"""Prefect's settings for a run without a Prefect server. Variables that the user has set keep their values."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow._process.child_process import skip_slow_grammar
from compileflow._process.folders import os_errors
from compileflow.settings import Settings

if TYPE_CHECKING:
    from flows.embedded_server import EmbeddedServer

# Room that an embedded server needs to start.
_ROOM_BYTES = 4 * 2**20
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
    # Prefect's default of 20 seconds is too short for a first start on a small or busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    # An embedded server that stops while it writes prints a traceback after the run's last line.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}


def set_embedded_defaults(settings: Settings, *, progress: bool) -> EmbeddedServer | None:
    """Set the variables that are unset, and start an embedded server. Call this before Prefect is imported.

    A run uses the server of Prefect's active profile. The embedded server is for runs without one.

    Args:
        settings: An embedded server keeps its database below their home folder.
        progress: Whether Prefect prints a log line for each step.

    Returns:
        The embedded server, which still starts; None for a run that has a server.

    Raises:
        StoreError: The home folder or the folder for temporary files cannot be written, or its disk is full.
    """
    skip_slow_grammar()
    level = "INFO" if progress else "CRITICAL"
    for name, value in {**_DEFAULTS, "PREFECT_LOGGING_LEVEL": level}.items():
        os.environ.setdefault(name, value)
    # Prefect sends usage data when it is imported, unless the variables above forbid it.
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    prefect_settings = get_current_settings()
    if prefect_settings.api.url:
        return None
    home = settings.home_dir / "prefect"
    # The active profile may hold other settings than a server.
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(prefect_settings.profiles_path))
    os.environ.setdefault("PREFECT_HOME", str(home))
    with os_errors(home, "make"):
        home.mkdir(parents=True, exist_ok=True)
    check_room(home)
    # Raises an OSError if no folder for temporary files can be written.
    with os_errors(Path(os.environ.get("TMPDIR", "/tmp")), "write to"):  # noqa: S108 - the default of the system
        temporary = Path(tempfile.gettempdir())
    check_room(temporary)
    refresh_global_settings_context()
    from flows.embedded_server import EmbeddedServer

    return EmbeddedServer(
        home,
        get_current_settings().to_environment_variables(exclude_unset=True),
        timeout_s=get_current_settings().server.ephemeral.startup_timeout_seconds,
    )


def check_room(folder: Path) -> None:
    """Write a file that is deleted at once: a server on a full disk would be waited for.

    Raises:
        StoreError: The folder cannot be written, or its disk is full.
    """
    with os_errors(folder, "write to"), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_ROOM_BYTES))
