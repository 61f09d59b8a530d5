"""NeptuneClient: the calls of a registry and a source, with deadlines and with errors of the caller's kind."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from compileflow._process.child_process import Overdue
from compileflow.errors import CompileflowError, first_line
from compileflow.registries.neptune.address import Token, read_token
from compileflow.registries.neptune.client_process import Ended, process_for
from compileflow.registries.neptune.client_session import Kind, Value
from compileflow.settings import Settings

# An upload that is slower than this on average is given up, even if it progresses.
_SLOWEST_BYTES_PER_S = 16 * 1024
_LONGEST_LIST = 8
_MOST_LOGS = 20


class NeptuneClient:
    """Calls on one project. The first call starts the client.

    Args:
        project: Project in the form workspace/project.
        settings: Token, timeout and work folder.
        refused: Class of errors that a retry cannot resolve.
        unavailable: Class of errors that a retry may resolve.
    """

    def __init__(
        self,
        project: str,
        settings: Settings,
        *,
        refused: type[CompileflowError],
        unavailable: type[CompileflowError],
    ) -> None:
        self.project = project
        self._settings = settings
        self._refused = refused
        self._unavailable = unavailable
        self._key: str | None = None

    def project_key(self) -> str:
        """Return the project's key, the first part of every id in it."""
        if self._key is None:
            self._key = str(self._call("project_key", "opening the project"))
        return self._key

    def find(
        self, kind: Kind, query: str, columns: Sequence[str] = (), *, newest: int | None = None
    ) -> list[dict[str, Value]]:
        """Return sys/id and the chosen fields of every model or version that matches an NQL query, by id.

        With `newest`, return only that many, newest first.
        """
        rows: list[dict[str, Value]] = self._call(
            "find", f"listing {kind}s", kind=kind, query=query, columns=list(columns), newest=newest
        )
        return rows

    def version_id(self, text: str) -> str:
        """Return the complete id of a version, PRJ-KEY-3, for PRJ-KEY-3 or KEY-3.

        Raises:
            CompileflowError: An error of the class `refused`: the version does not exist.
        """
        candidates = (text, f"{self.project_key()}-{text}")
        query = " OR ".join(f'(`sys/id`:string = "{candidate}")' for candidate in candidates)
        rows = self.find("version", f"({query})")
        if rows:
            return str(rows[0]["sys/id"])
        ids = [str(row["sys/id"]) for row in self.find("version", "")]
        near_ids = get_close_matches(candidates[1], ids, n=_LONGEST_LIST, cutoff=0.4) or ids[:_LONGEST_LIST]
        raise self._refused(
            f"The Neptune project {self.project} has no model version {text!r}.",
            hint=f"Similar ids: {', '.join(near_ids)}." if near_ids else "It has no model versions.",
        )

    def create_model(self, key: str, name: str) -> bool:
        """Create a model; return False if its key is taken, perhaps by a model in the trash."""
        return bool(self._call("create_model", f"creating the model {name}", key=key, name=name))

    def create_version(self, model: str) -> str:
        """Create a version of a model and return its id."""
        return str(self._call("create_version", f"creating a version of {model}", model=model))

    def write(self, identity: str, fields: Mapping[str, Value], *, kind: Kind = "version") -> None:
        """Write fields in their order, without those that are None. Progress extends the deadline."""
        self._call("write", f"writing to {identity}", kind=kind, identity=identity, fields=dict(fields))

    def upload(self, identity: str, path: str, file: Path) -> None:
        """Upload a file as a File field. Sent bytes extend the deadline, at an average of at least 16 KiB/s."""
        size = file.stat().st_size
        action = f"uploading {path} of {identity}, {size} bytes"
        limit_s = self._settings.neptune_timeout_s + size / _SLOWEST_BYTES_PER_S
        self._call("upload", action, limit_s=limit_s, identity=identity, path=path, file=str(file.absolute()))

    def change_stage(self, identity: str, stage: str) -> None:
        """Change a version's stage."""
        self._call("stage", f"moving {identity} to {stage}", identity=identity, stage=stage)

    def trash(self, identities: Sequence[str]) -> None:
        """Move versions to the project's trash."""
        if identities:
            self._call("trash", f"trashing {', '.join(identities)}", identities=list(identities))

    def types(self, identity: str) -> dict[str, str]:
        """Return the type of every field of a version, for example "File", by its path."""
        types: dict[str, str] = self._call("types", f"reading {identity}", identity=identity)
        return types

    def fetch(self, identity: str, path: str) -> Any:
        """Return a field's value, or the values in a namespace."""
        return self._call("fetch", f"reading {path} of {identity}", identity=identity, path=path)

    def download(self, identity: str, path: str, dest: Path) -> None:
        """Download a File field, or a FileSet as a zip. Received bytes extend the deadline."""
        self._call("download", f"downloading {path} of {identity}", identity=identity, path=path, dest=str(dest))

    def tracked_files(self, identity: str, path: str) -> list[dict[str, str]]:
        """Return path, location and hash of each file that an Artifact field tracks outside Neptune."""
        files: list[dict[str, str]] = self._call(
            "tracked_files", f"reading {path} of {identity}", identity=identity, path=path
        )
        return files

    def extension(self, identity: str, path: str) -> str:
        """Return the extension of a File field, without the dot."""
        return str(self._call("extension", f"reading {path} of {identity}", identity=identity, path=path))

    def release(self) -> None:
        """Close the object that is open in Neptune."""
        self._call("release", "closing")

    def _call(self, operation: str, action: str, *, limit_s: float = math.inf, **arguments: Any) -> Any:
        token = read_token(self._settings, refused=self._refused)
        process = process_for(token, self._settings)
        timeout_s = self._settings.neptune_timeout_s
        try:
            answer = process.ask(
                operation, {"project": self.project, **arguments}, timeout_s=timeout_s, limit_s=limit_s
            )
        except Overdue as error:
            raise self._unavailable(
                f"Neptune at {token.address} did not finish {action} in {error.args[0]:g} s; "
                "its client was killed.",
                hint="Check that server and the network, and run again; "
                "COMPILEFLOW_NEPTUNE_TIMEOUT_S limits one call.",
                log_path=self._keep_log(process.log_text()),
            ) from error
        except Ended as error:
            raise self._unavailable(
                f"The Neptune client ended while {action}.",
                hint="Run again; the log holds its last output.",
                log_path=self._keep_log(process.log_text()),
            ) from error
        except OSError as error:
            raise self._unavailable(
                f"The Neptune client could not be started: {first_line(error)}.",
                hint="Free some memory or processes on this machine, and run again.",
            ) from error
        if "missing" in answer:
            raise self._refused(
                f"The Neptune client cannot be imported: {token.scrub(answer['missing'])}.",
                hint="Install it: pip install 'compileflow[neptune]'.",
            )
        if "error" in answer:
            raise self._error(answer["error"], action, token, process.log_text())
        return answer["value"]

    def _error(self, error: Mapping[str, Any], action: str, token: Token, log: str) -> CompileflowError:
        kind, text = error["kind"], token.scrub(error["text"])
        if kind == "unavailable":
            return self._unavailable(
                f"Neptune at {token.address} did not answer while {action} ({text}).",
                hint="Check that it runs and the network, then run again.",
            )
        if kind == "token":
            return self._refused(
                f"Neptune at {token.address} refused the API token.",
                hint="Set NEPTUNE_API_TOKEN to a token issued by this server.",
            )
        if kind == "forbidden":
            return self._refused(
                f"This token does not have the rights for {action} in {self.project}.",
                hint="Ask the project's owner for a role with write access, or use another token.",
            )
        if kind == "project":
            choices = error["choices"]
            near_projects = (
                get_close_matches(self.project, choices, n=_LONGEST_LIST, cutoff=0.4) or choices[:_LONGEST_LIST]
            )
            return self._refused(
                f"Neptune at {token.address} has no project {self.project!r}, or this token has no access to it.",
                hint=f"Similar projects: {', '.join(near_projects)}."
                if near_projects
                else "This token has no projects.",
            )
        if kind == "local":
            return self._refused(
                f"This machine failed while {action} ({text}).",
                hint="Check the disk and the access rights, and run again.",
            )
        if kind == "absent":
            return self._refused(
                f"An object in the Neptune project {self.project} disappeared while {action} ({text}).",
                hint="Another user may have deleted it; run again.",
            )
        return self._refused(
            f"Neptune refused {action}: {text}.",
            hint="The log holds the output of its client.",
            log_path=self._keep_log(log),
        )

    def _keep_log(self, text: str) -> str:
        """Replace this process's log with the client's output and return its path; '' without output.

        Only the newest logs of other processes are kept.
        """
        if not text:
            return ""
        path = self._settings.log_path(f"neptune-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError:
            return ""
        # Another process may delete logs at the same moment.
        with suppress(OSError):
            logs = sorted(path.parent.glob("neptune-*.log"), key=lambda log: log.stat().st_mtime)
            for log in logs[:-_MOST_LOGS]:
                log.unlink()
        return str(path)
