"""The embedded Prefect server, which `python -m flows` starts where no server is configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.errors import ProcessError
from flows.embedded_server import EmbeddedServer


@pytest.mark.functional
@pytest.mark.slow
def test_server_that_cannot_open_its_database_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    database = {"PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/file/prefect.db"}
    server = EmbeddedServer(tmp_path, database, timeout_s=200)
    with pytest.raises(ProcessError, match="The embedded Prefect server ended while it started") as refused:
        server.wait()
    assert "PREFECT_API_URL" in refused.value.hint
