"""deployed_flow: decorator of all flows. A run ends with its worker, and refuses wrong parameters in one line."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ParameterTypeError, SignatureMismatchError

from compileflow.errors import SpecError

P = ParamSpec("P")
R = TypeVar("R")
_LOOK_S = 1.0


class DeployedFlow(Flow[P, R]):
    """A flow that a worker runs; create it with `deployed_flow`."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters in the types of the function.

        Raises:
            SpecError: They do not fit: only the flow can check them, or they are of an older version.
        """
        try:
            return super().validate_parameters(parameters)
        except (ParameterTypeError, SignatureMismatchError) as error:
            # Prefect lists the problems below a headline.
            headline, *problems = str(error).splitlines()
            reasons = "; ".join(problem.removeprefix(" - ") for problem in problems) or headline
            raise SpecError(
                f"The parameters do not fit this version of the flow {self.name}: "
                f"{reasons.replace('Value error, ', '')}.",
                hint="Correct them, or start a new run from the deployment.",
            ) from error


def deployed_flow(
    *,
    name: str,
    description: str,
    flow_run_name: str | Callable[[], str] | None = None,
    persist_result: bool | None = None,
) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Turn a function into a flow, as `prefect.flow` does with the same arguments."""

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        return DeployedFlow(
            function,
            name=name,
            description=description,
            flow_run_name=flow_run_name,
            persist_result=persist_result,
            on_running=[end_with_worker],
        )

    return decorate


def end_with_worker(flow: Flow[P, R], flow_run: FlowRun, state: object) -> None:
    """End this process as Crashed soon after its worker dies.

    Without that, the run could not be cancelled, and it would crash at its next log line, perhaps after an hour.
    """
    if os.environ.get("PREFECT__FLOW_RUN_ID") == str(flow_run.id):
        threading.Thread(target=_terminate_after, args=(os.getppid(),), daemon=True).start()


def _terminate_after(worker_pid: int) -> None:
    while os.getppid() == worker_pid:
        time.sleep(_LOOK_S)
    # The worker read what this process prints; a print would now raise SystemExit.
    with open(os.devnull, "w") as nothing:
        for handle in (1, 2):
            os.dup2(nothing.fileno(), handle)
    os.kill(os.getpid(), signal.SIGTERM)
