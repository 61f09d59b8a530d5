"""The list in a source version of what was compiled from it: `model/compiled_model_versions`."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from compileflow._process.folders import file_lock, work_folder
from compileflow.contracts.digests import json_digest
from compileflow.errors import RegistryError, RegistryUnavailableError, SpecError, first_line
from compileflow.registries.neptune.address import parse_version
from compileflow.registries.neptune.client import NeptuneClient
from compileflow.registries.neptune.fields import COMPILED, LONGEST_STRING
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

# Another machine may write at the same time, and Neptune has no condition to write by.
_TRIES = 3


def list_in_source(source_uri: str, settings: Settings, *, project: str, model: str, identity: str) -> None:
    """Name a compiled version in the version of Neptune that it was compiled from; what others wrote stays.

    A source that may not be written, was deleted, or holds something else there costs a warning and nothing
    more: the compiled version itself names its source.

    Args:
        source_uri: The source; one that is not Neptune's has no such list.
        settings: Token, timeout and work folder.
        project: Of the compiled version, as workspace/project.
        model: Its model's id.
        identity: Its own id.

    Raises:
        RegistryUnavailableError: the server did not answer; the same call again completes the list.
    """
    if not source_uri.startswith("neptune://"):
        return
    entry = {
        "project": project,
        "model": model,
        "with_id": identity,
        "time_stamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        source, text = parse_version(source_uri)
        client = NeptuneClient(source, settings, refused=RegistryError, unavailable=RegistryUnavailableError)
        lock = settings.home_dir / "locks" / f"neptune-{json_digest([source, text])[:32]}.lock"
        with (
            file_lock(lock, on_wait=lambda: logger.info("another process writes to %s", source_uri)),
            work_folder(settings.work_dir, label="lineage") as work,
        ):
            _add(client, client.version_id(text), entry, work / "compiled_model_versions.json")
    except RegistryUnavailableError:
        raise
    except (RegistryError, SpecError) as error:
        logger.warning("%s does not list %s, which was compiled from it: %s", source_uri, identity, error)


def _add(client: NeptuneClient, source: str, entry: dict[str, str], file: Path) -> None:
    for _ in range(_TRIES):
        kind = client.types(source).get(COMPILED)
        listed = _read(client, source, kind, file)
        if any(isinstance(one, dict) and _same(one, entry) for one in listed):
            client.release()
            return
        text = json.dumps([*listed, entry])
        if kind == "String":
            if len(text) > LONGEST_STRING:
                raise RegistryError(
                    f"{COMPILED} of {source} is a string, and Neptune keeps {LONGEST_STRING} characters of one.",
                    hint="Upload it as a JSON file, which may be longer.",
                )
            client.write(source, {COMPILED: text})
        else:
            file.write_text(text, "utf-8")
            client.upload(source, COMPILED, file)
    logger.warning("%s of %s is written by others all the time; %s is missing", COMPILED, source, entry["with_id"])


def _read(client: NeptuneClient, source: str, kind: str | None, file: Path) -> list[JsonValue]:
    if kind is None:
        return []
    if kind == "String":
        body: str | bytes = str(client.fetch(source, COMPILED))
    elif kind == "File":
        client.download(source, COMPILED, file)
        body = file.read_bytes()
    else:
        raise RegistryError(f"{COMPILED} of {source} is a {kind}.", hint="Make it a JSON file with a list.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RegistryError(
            f"{COMPILED} of {source} holds no JSON ({first_line(error)}).", hint="Mend it, or delete it."
        ) from error
    # Whoever had one version to list may have left the brackets out.
    return found if isinstance(found, list) else [found]


def _same(one: dict[str, JsonValue], entry: dict[str, str]) -> bool:
    return all(one.get(name) == entry[name] for name in ("project", "with_id"))
