"""Command line: python -m deployments.deploy: make a server agree with the files of deployments."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from httpx import HTTPError, TransportError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, TypeAdapter, ValidationError

from compileflow.errors import CompileflowError, ProcessError, SpecError, first_line, first_problem

_ROOT = Path(__file__).parents[1]
# Marks the deployments and the automations that these files own.
TAG = "compileflow"


def main(arguments: Sequence[str] | None = None) -> int:
    """Apply the files to the server of the active profile; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        apply(options.prefect_file, options.automations, report=typer.echo)
    except CompileflowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def apply(prefect_file: Path, automations_file: Path, *, report: Callable[[str], None]) -> None:
    """Make the server agree with the files. It also loses schedules and automations that left the files.

    Args:
        prefect_file: Deployments, in the form of `prefect deploy`.
        automations_file: Automations, as a list in the form of Prefect's API.
        report: Called with a line for each thing that was applied or removed.

    Raises:
        SpecError: A file is wrong, or no server is set.
        ProcessError: The server refuses something, or does not answer.
    """
    if not PREFECT_API_URL.value():
        # Prefect would start a server for this command alone.
        raise SpecError(
            "PREFECT_API_URL is not set.",
            hint="Set it to the API of your server, or in the active Prefect profile.",
        )
    deployments = _read(prefect_file, "deployments")
    try:
        TypeAdapter(list[_Deployment]).validate_python(deployments)
    except ValidationError as error:
        raise SpecError(f"{prefect_file} is wrong: {first_problem(error)}.", hint="Correct the file.") from error
    automations = [_automation(entry) for entry in _read(automations_file, "automations")]
    try:
        with get_client(sync_client=True) as client:
            for name in dict.fromkeys(entry["work_pool"]["name"] for entry in deployments):
                _ensure_pool(client, name, report)
            _deploy(prefect_file)
            _finish_deployments(client, deployments, report)
            _apply_automations(client, automations, report)
    except HTTPError as error:
        verb = "does not answer" if isinstance(error, TransportError) else "refuses the deployments"
        raise ProcessError(
            f"The Prefect server {verb}: {first_line(error).rstrip('.')}.",
            hint="Check PREFECT_API_URL and PREFECT_API_AUTH_STRING.",
        ) from error


class _Pool(BaseModel):
    name: str


class _Deployment(BaseModel):
    """What is needed of an entry; Prefect reads the rest."""

    name: str
    entrypoint: str
    work_pool: _Pool


def _read(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = yaml.safe_load(path.read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"{path} has no list of {key}: {first_line(error)}.", hint="Correct the file.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SpecError(f"{path} has no list of {key} with fields.", hint="Correct the file.")
    return entries


def _automation(entry: dict[str, Any]) -> AutomationCore:
    try:
        return AutomationCore.model_validate({**entry, "tags": [TAG]})
    except ValidationError as error:
        raise SpecError(
            f"The automation {entry.get('name')!r} is wrong: {first_problem(error)}.", hint="Correct the file."
        ) from error


def _ensure_pool(client: SyncPrefectClient, name: str, report: Callable[[str], None]) -> None:
    """Create a process work pool unless a pool of that name exists; its type may be another one."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        report(f"created the work pool {name}")


def _deploy(prefect_file: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        sys.stderr.write(process.stdout + process.stderr)
        raise ProcessError("prefect deploy failed.", hint="Correct what it prints above.")


def _finish_deployments(
    client: SyncPrefectClient, deployments: list[dict[str, Any]], report: Callable[[str], None]
) -> None:
    """Do what `prefect deploy` leaves out: refuse unknown parameters, and delete schedules that left the file."""
    entries = {(entry["entrypoint"], entry["name"]): entry for entry in deployments}
    for deployment in client.read_deployments():
        entry = entries.get((deployment.entrypoint or "", deployment.name))
        if entry is not None:
            schema = _form_schema(deployment.parameter_openapi_schema or {})
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
            report(f"applied the deployment {client.read_flow(deployment.flow_id).name}/{deployment.name}")
        elif TAG not in deployment.tags:
            continue
        if entry is None or not entry.get("schedules"):
            for schedule in client.read_deployment_schedules(deployment.id):
                client.delete_deployment_schedule(deployment.id, schedule.id)
                report(f"removed the schedule {schedule.slug or schedule.id} of {deployment.name}")


def _form_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a flow's schema for the form: unknown parameters are refused, and None is called Empty."""
    definitions = schema.get("definitions", {}).values()
    fields = [field for part in (schema, *definitions) for field in part.get("properties", {}).values()]
    for choice in (choice for field in fields for choice in field.get("anyOf", ())):
        choice.setdefault("title", "Empty" if choice.get("type") == "null" else "Value")
    return {**schema, "additionalProperties": False}


def _apply_automations(
    client: SyncPrefectClient, automations: list[AutomationCore], report: Callable[[str], None]
) -> None:
    """Create or update the automations by name, and delete tagged ones that left the file.

    An update makes the server forget the runs that an automation waits for, so an equal one is left alone.
    """
    old_automations = {old.name: old for old in client.read_automations() if TAG in old.tags}
    for automation in automations:
        old = old_automations.pop(automation.name, None)
        if old is None:
            client.create_automation(automation)
        elif AutomationCore.model_validate(old.model_dump()) != automation:
            client.update_automation(old.id, automation)
        report(f"applied the automation {automation.name!r}")
    for name, old in old_automations.items():
        client.delete_automation(old.id)
        report(f"removed the automation {name!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m deployments.deploy",
        description="Bring work pools, deployments, schedules and automations to the server of PREFECT_API_URL.",
    )
    for option, name in (("--prefect-file", "prefect.yaml"), ("--automations", "automations.yaml")):
        parser.add_argument(
            option, type=Path, default=_ROOT / "deployments" / name, help="file to apply (default: %(default)s)"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
