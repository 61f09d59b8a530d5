"""Start a compile over Prefect's API and wait for its end: python examples/start_run.py MODEL.

The server is named by PREFECT_API_URL, and by PREFECT_API_AUTH_STRING if it asks for a password. `make serve`
keeps both in a file. This program needs httpx and nothing of Prefect.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, NotRequired, TypedDict
from uuid import uuid4

import httpx

DEPLOYMENT = "compile-model/compile-model"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_API = "the API of a Prefect server; PREFECT_API_URL usually ends in /api."
# What Prefect answers about a path that is none of its own.
_NO_ROUTE = '{"detail":"Not Found"}'


class Request(TypedDict):
    """The fields of the form that this program sets."""

    model: str
    target: NotRequired[str]
    name: NotRequired[str]
    max_sequence_length: NotRequired[int]


class State(TypedDict):
    """Part of the state of a run."""

    type: str
    name: str
    message: str | None


def connect() -> httpx.Client:
    """Return a client of the server that the environment names.

    Raises:
        SystemExit: The environment names none, or what it names is not a URL.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise SystemExit(
            "error: PREFECT_API_URL is not set. Set it to the API of the Prefect server, for example "
            "http://127.0.0.1:4200/api."
        )
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    auth = httpx.BasicAuth(user, password) if user else None
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SystemExit(f"error: PREFECT_API_URL is not a URL: {error}.") from error
    if address.scheme not in ("http", "https"):
        raise SystemExit("error: PREFECT_API_URL does not begin with http:// or https://.")
    # A proxy of the environment does not reach a server on this machine.
    return httpx.Client(base_url=address, auth=auth, timeout=60, trust_env=False)


def start(client: httpx.Client, request: Request, *, key: str) -> str:
    """Start a run and return its id.

    Args:
        client: Client of the server.
        request: Fields of the form.
        key: The same key starts one run, however often it is sent.

    Raises:
        SystemExit: The server refuses a field; its message names the field.
    """
    deployment_id = _call(client, "GET", f"/deployments/name/{DEPLOYMENT}")["id"]
    body = {"parameters": {"request": request}, "idempotency_key": key}
    run_id: str = _call(client, "POST", f"/deployments/{deployment_id}/create_flow_run", body)["id"]
    return run_id


def wait(client: httpx.Client, run_id: str) -> State:
    """Wait until a run has ended, and return its state."""
    while True:
        state: State = _call(client, "GET", f"/flow_runs/{run_id}", retry_lost=True)["state"]
        if state["type"] in FINAL:
            return state
        time.sleep(2)


def summary(client: httpx.Client, run_id: str) -> str:
    """Return the verdict of a run and the versions that it registered, as its Prefect artifacts name them."""
    body = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    artifacts = _call(client, "POST", "/artifacts/filter", body, retry_lost=True)
    lines = [
        artifact["description"]
        for kind in ("-report", "-version")
        for artifact in artifacts
        if (artifact["key"] or "").endswith(kind)
    ]
    return "; ".join(dict.fromkeys(lines)) or "no message"


def _call(client: httpx.Client, method: str, path: str, body: object = None, *, retry_lost: bool = False) -> Any:
    """Send a request, again while the server is busy (503), and return the decoded answer.

    Args:
        client: Client of the server.
        method: HTTP method.
        path: Path below the URL of the API.
        body: Value to send as JSON.
        retry_lost: Try again as well if the server cannot be reached.

    Raises:
        SystemExit: The server does not answer, refuses the request, or is not a Prefect server.
    """
    url = client.base_url.copy_with(userinfo=b"")
    for pause_s in (2, 2, 4, 8, 0):
        try:
            response = client.request(method, path, json=body)
        except httpx.TransportError as error:
            if retry_lost and pause_s:
                time.sleep(pause_s)
                continue
            reason = str(error).rstrip(".")
            raise SystemExit(f"error: The Prefect server at {url} does not answer: {reason}.") from error
        if response.status_code != 503:
            break
        time.sleep(pause_s)
    if response.status_code == 401:
        raise SystemExit(
            f"error: The Prefect server at {url} refuses the login. Set PREFECT_API_AUTH_STRING to USER:PASSWORD."
        )
    if response.status_code == 404 and response.text == _NO_ROUTE:
        raise SystemExit(f"error: {url} is not {_API}")
    if response.is_error:
        raise SystemExit(f"error: The Prefect server answered {response.status_code}: {response.text}")
    try:
        return response.json()
    except ValueError as error:
        raise SystemExit(f"error: {url} is not {_API}") from error


def main() -> int:
    """Start a run for the arguments; return 0 if it completes."""
    parser = argparse.ArgumentParser(description="Start a compile over Prefect's API.")
    parser.add_argument("model", help="Hub id, registered version, or absolute path of a folder on the worker")
    parser.add_argument("--target", default="onnx-runtime")
    parser.add_argument("--name", help="name in the registry")
    parser.add_argument(
        "--max-sequence-length", type=int, help="longest row in tokens; default: the model's maximum"
    )
    parser.add_argument("--key", default=str(uuid4()), help="runs with the same key are one run")
    options = parser.parse_args()
    request: Request = {"model": options.model, "target": options.target}
    if options.name:
        request["name"] = options.name
    if options.max_sequence_length:
        request["max_sequence_length"] = options.max_sequence_length
    with connect() as client:
        run_id = start(client, request, key=options.key)
        sys.stdout.write(f"started the run {run_id}\n")
        try:
            state = wait(client, run_id)
        except KeyboardInterrupt:
            sys.stderr.write("stopped waiting; the run goes on\n")
            return 130
        message = state["message"] or summary(client, run_id)
    sys.stdout.write(f"{state['name']}: {message}\n")
    return 0 if state["type"] == "COMPLETED" else 1


if __name__ == "__main__":
    sys.exit(main())
