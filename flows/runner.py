"""Run flows for the commands, and collect their results and errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import TerminationSignal
from prefect.logging import get_logger
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from compileflow._process.interrupts import Stopped
from compileflow.errors import CompileflowError, ProcessError, first_line, without_secrets
from compileflow.selection.matrix import MatrixRequest
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from flows.compile_model import compile_model

if TYPE_CHECKING:
    from flows.embedded_server import EmbeddedServer

_ANSWER_S = 10.0


def run_requests(
    requests: Sequence[CompileRequest], embedded: EmbeddedServer | None
) -> list[CompileResult | CompileflowError]:
    """Run each request as its own flow run; a run that fails does not stop the others.

    Args:
        requests: The requests, in order.
        embedded: Server of the runs, which ends with them; None for the configured one.

    Raises:
        Stopped: SIGTERM arrived; Prefect handles that signal within a flow.
        ProcessError: The server does not answer.
    """
    with _server(embedded):
        return [_run(request) for request in requests]


def run_matrix(
    request: MatrixRequest,
    embedded: EmbeddedServer | None,
    *,
    deployment: str | None,
    at_once: int,
    dask: str | None,
) -> str:
    """Run compile_matrix and return the URI of the stored matrix, whether or not cells failed.

    Raises:
        Stopped: SIGTERM arrived.
        CompileflowError: The flow itself failed, or the server does not answer.
    """
    from flows.compile_matrix import compile_matrix

    with _server(embedded):
        outcome = _outcome(lambda: compile_matrix(request, deployment, at_once, dask=dask, return_state=True))
    if isinstance(outcome, str):
        return outcome
    if isinstance(outcome, CompileflowError) and not outcome.report_uri:
        raise outcome
    return str(outcome.report_uri)


@contextmanager
def _server(embedded: EmbeddedServer | None) -> Iterator[None]:
    """Let the flows in the block use the server, once it answers, and log which one it is."""
    # All that is imported stays. The command has stopped the collector.
    gc.freeze()
    gc.enable()
    try:
        with _settings_for(embedded):
            yield
    except TerminationSignal as error:
        raise Stopped(error.signal) from error
    finally:
        if embedded is not None:
            embedded.stop()


@contextmanager
def _settings_for(embedded: EmbeddedServer | None) -> Iterator[None]:
    """Apply the settings of a command's runs.

    Raises:
        ProcessError: The server does not answer, or it refuses the client.
    """
    settings: dict[Any, Any] = {}
    if "heartbeat_frequency" not in get_current_settings().flows.model_fields_set:
        # Automations look after the runs of deployments only, and a run would wait a second for its heartbeat.
        settings[PREFECT_FLOWS_HEARTBEAT_FREQUENCY] = None
    url = PREFECT_API_URL.value()
    if embedded is not None:
        embedded.wait()
        # It has no pages that a log line could name.
        settings |= {PREFECT_API_URL: embedded.url, PREFECT_UI_URL: ""}
    elif url:
        _check_answer(url)
    name = f"embedded, in {PREFECT_HOME.value()}" if embedded or not url else without_secrets(url)
    get_logger("compileflow").info("Prefect server: %s", name)
    with temporary_settings(settings):
        yield
        # What is still under way would find no server.
        APILogWorker.drain_all()
        EventsWorker.drain_all()


def _check_answer(url: str) -> None:
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": _ANSWER_S}, sync_client=True) as client,
        ):
            client.read_flows(limit=1)
    except Exception as error:
        raise ProcessError(
            f"The Prefect server at {url} does not answer: {first_line(error)}.",
            hint="Start it, or set PREFECT_API_URL to another one, in the environment or in Prefect's profile.",
        ) from error


def _run(request: CompileRequest) -> CompileResult | CompileflowError:
    outcome: CompileResult | CompileflowError = _outcome(lambda: compile_model(request, return_state=True))
    return outcome


def _outcome(run: Callable[[], State[Any]]) -> Any:
    """Return the result of a flow, or its error as one of compileflow's tree."""
    try:
        state = run()
    except CompileflowError as error:
        return error
    except Exception as error:  # noqa: BLE001 - Prefect raises what its client and its database raise
        return ProcessError(
            f"Prefect cannot run the flow: {type(error).__name__}: {first_line(error)}.",
            hint="Check the Prefect server of PREFECT_API_URL; without one, unset the variable."
            if PREFECT_API_URL.value()
            else "If the machine is busy, raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, or set "
            "PREFECT_API_URL to a server.",
        )
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, CompileResult | CompileflowError | str):
        return outcome
    return ProcessError(f"The run ended as {state.name}: {state.message}")
