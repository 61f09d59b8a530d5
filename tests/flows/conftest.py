"""Fixtures of the flow tests, which run in this process against the Prefect server of the test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from tests.functional.prefect_server import PrefectServer


@pytest.fixture(scope="session", autouse=True)
def flows_on_the_server(prefect_server: PrefectServer) -> Iterator[None]:
    """Let flows that tests call talk to the server."""
    # Each run would wait a second for its heartbeat thread.
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
        # What is still under way would find no server.
        APILogWorker.drain_all()
        EventsWorker.drain_all()
