"""The calls that a registry and a source make, each with a deadline, and with errors of the caller's own kind."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from compileflow.errors import CompileflowError, first_line
from compileflow.registries.neptune.address import Token, read_token
from compileflow.registries.neptune.operations import Kind, Value
from compileflow.registries.neptune.process import Ended, Overdue, process_for
from compileflow.settings import Settings

# Slower than this on the whole an upload is given up, however it goes on.
_SLOWEST_BYTES_PER_S = 16 * 1024
_LISTED = 8
_KEPT_LOGS = 20


class NeptuneClient:
    """Calls on one project. Nothing is started or asked before the first call.

    Args:
        project: As workspace/project.
        settings: Token, timeout and work folder.
        refused: Class of errors that trying again does not mend.
        unavailable: Class of those that it may.
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
        """Return the project's own key, the first part of every id in it."""
        if self._key is None:
            self._key = str(self._call("project_key", "opening the project"))
        return self._key

    def find(self, kind: Kind, query: str, columns: Sequence[str] = ()) -> list[dict[str, Value]]:
        """Return sys/id and the chosen fields of every model or version that an NQL query finds, by their ids."""
        found: list[dict[str, Value]] = self._call(
            "find", f"listing {kind}s", kind=kind, query=query, columns=list(columns)
        )
        return found

    def version_id(self, text: str) -> str:
        """Return a version's whole id, PRJ-KEY-3, of itself or of KEY-3.

        Raises:
            CompileflowError: of the class `refused`: there is none; the hint lists near ids.
        """
        wanted = (text, f"{self.project_key()}-{text}")
        query = " OR ".join(f'(`sys/id`:string = "{one}")' for one in wanted)
        found = [str(row["sys/id"]) for row in self.find("version", f"({query})")]
        if found:
            return found[0]
        known = [str(row["sys/id"]) for row in self.find("version", "")]
        near = get_close_matches(wanted[1], known, n=_LISTED, cutoff=0.4) or known[:_LISTED]
        raise self._refused(
            f"Neptune's project {self.project} has no model version {text!r}.",
            hint=f"Near ids: {', '.join(near)}." if near else "It has no model versions.",
        )

    def create_model(self, key: str, name: str) -> bool:
        """Make a model; False when its key is taken, in the trash perhaps."""
        return bool(self._call("create_model", f"making the model {name}", key=key, name=name))

    def create_version(self, model: str) -> str:
        """Make a version of a model and return its id."""
        return str(self._call("create_version", f"making a version of {model}", model=model))

    def write(self, identity: str, fields: Mapping[str, Value], *, kind: Kind = "version") -> None:
        """Write fields in their order; None is left out. It may take long as long as it goes on."""
        self._call("write", f"writing to {identity}", kind=kind, identity=identity, fields=dict(fields))

    def upload(self, identity: str, path: str, file: Path) -> None:
        """Upload a file as a File field; it may take long as long as bytes go out, at 16 KiB/s at least."""
        size = file.stat().st_size
        doing = f"uploading {path} of {identity}, {size} bytes"
        most_s = self._settings.neptune_timeout_s + size / _SLOWEST_BYTES_PER_S
        self._call("upload", doing, most_s=most_s, identity=identity, path=path, file=str(file.absolute()))

    def change_stage(self, identity: str, stage: str) -> None:
        """Change a version's stage."""
        self._call("stage", f"moving {identity} to {stage}", identity=identity, stage=stage)

    def trash(self, identities: Sequence[str]) -> None:
        """Move versions to the project's trash."""
        if identities:
            self._call("trash", f"trashing {', '.join(identities)}", identities=list(identities))

    def types(self, identity: str) -> dict[str, str]:
        """Return the type of every field of a version, for example "File", by its path."""
        found: dict[str, str] = self._call("types", f"reading {identity}", identity=identity)
        return found

    def fetch(self, identity: str, path: str) -> Any:
        """Return a field's value, or those of a namespace."""
        return self._call("fetch", f"reading {path} of {identity}", identity=identity, path=path)

    def download(self, identity: str, path: str, out: Path) -> None:
        """Download a File field, or a FileSet as a zip; it may take long as long as bytes come in."""
        self._call("download", f"downloading {path} of {identity}", identity=identity, path=path, out=str(out))

    def extension(self, identity: str, path: str) -> str:
        """Return the extension of a File field, without the dot."""
        return str(self._call("extension", f"reading {path} of {identity}", identity=identity, path=path))

    def release(self) -> None:
        """Close what is held open in Neptune."""
        self._call("release", "closing", project=None)

    def _call(self, operation: str, doing: str, *, most_s: float = math.inf, **arguments: Any) -> Any:
        token = read_token(self._settings, refused=self._refused)
        process = process_for(token, self._settings)
        timeout_s = self._settings.neptune_timeout_s
        chosen = {"project": self.project} | arguments
        if chosen["project"] is None:
            del chosen["project"]
        try:
            answer = process.ask(operation, chosen, timeout_s=timeout_s, most_s=most_s)
        except Overdue as error:
            raise self._unavailable(
                f"Neptune at {token.address} did not finish {doing} in {error.args[0]:g} s; "
                "its client was killed.",
                hint="Check that server and the network, and run again; "
                "COMPILEFLOW_NEPTUNE_TIMEOUT_S is the bound of one call.",
                log_path=self._keep_log(process.log_text()),
            ) from error
        except Ended as error:
            raise self._unavailable(
                f"The Neptune client ended while {doing}.",
                hint="Run again; its last words are in the log.",
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
            raise self._error(answer["error"], doing, token, process.log_text())
        return answer["value"]

    def _error(self, error: Mapping[str, Any], doing: str, token: Token, log: str) -> CompileflowError:
        kind, text = error["kind"], token.scrub(error["text"])
        if kind == "unavailable":
            return self._unavailable(
                f"Neptune at {token.address} did not answer while {doing} ({text}).",
                hint="Check that it runs and the network, then run again.",
            )
        if kind == "token":
            return self._refused(
                f"Neptune at {token.address} refused the API token.",
                hint="Set NEPTUNE_API_TOKEN to a token that this server gave.",
            )
        if kind == "forbidden":
            return self._refused(
                f"This token has no right to what {doing} in {self.project} needs.",
                hint="Ask the project's owner for a role that may write, or use another token.",
            )
        if kind == "project":
            choices = error["choices"]
            near = get_close_matches(self.project, choices, n=_LISTED, cutoff=0.4) or choices[:_LISTED]
            return self._refused(
                f"Neptune at {token.address} has no project {self.project!r}, or this token has no access to it.",
                hint=f"It shows: {', '.join(near)}." if near else "It shows no project to this token.",
            )
        if kind == "local":
            return self._refused(
                f"This machine could not go on {doing} ({text}).",
                hint="Check the disk and the rights there, and run again.",
            )
        if kind == "absent":
            return self._refused(
                f"{self.project} in Neptune lost what was to be found while {doing} ({text}).",
                hint="Somebody may have deleted it; run again.",
            )
        return self._refused(
            f"Neptune refused {doing}: {text}.",
            hint="What its client said is in the log.",
            log_path=self._keep_log(log),
        )

    def _keep_log(self, text: str) -> str:
        """Write what the client printed to this process's own file, anew each time; '' when it said nothing.

        Of earlier processes' files the newest stay.
        """
        if not text:
            return ""
        path = self._settings.log_path(f"neptune-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError:
            return ""
        # Another process may be at it, too.
        with suppress(OSError):
            for old in sorted(path.parent.glob("neptune-*.log"), key=lambda one: -one.stat().st_mtime)[
                _KEPT_LOGS:
            ]:
                old.unlink()
        return str(path)
