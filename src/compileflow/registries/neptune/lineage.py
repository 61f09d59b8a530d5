"""The list of compiled versions in their source version: `model/compiled_model_versions`."""

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
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.fields import COMPILED, LONGEST_STRING
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

# Another machine may write at the same time, and Neptune has no conditional write.
_TRIES = 3


def list_in_source(source_uri: str, settings: Settings, *, project: str, model: str, identity: str) -> None:
    """Add a compiled version to the list in its source version; entries of other users stay.

    A source that is read-only, deleted, or holds another value there causes only a warning: the compiled version
    itself names its source.

    Args:
        source_uri: URI of the source; a source outside Neptune has no such list.
        settings: Token, timeout and work folder.
        project: Project of the compiled version, in the form workspace/project.
        model: Id of the compiled version's model.
        identity: Id of the compiled version.

    Raises:
        RegistryUnavailableError: The server did not answer; another call completes the list.
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
            file_lock(lock, on_wait=lambda: logger.info("Another process writes to %s; waiting", source_uri)),
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
        items = _read(client, source, kind, file)
        if any(isinstance(item, dict) and _is_same(item, entry) for item in items):
            client.release()
            return
        text = json.dumps([*items, entry])
        if kind == "String":
            if len(text) > LONGEST_STRING:
                raise RegistryError(
                    f"{COMPILED} of {source} is a string of at most {LONGEST_STRING} characters.",
                    hint="Upload the list as a JSON file, which may be longer.",
                )
            client.write(source, {COMPILED: text})
        else:
            file.write_text(text, "utf-8")
            client.upload(source, COMPILED, file)
    logger.warning("Others keep writing %s of %s; %s is missing there", COMPILED, source, entry["with_id"])


def _read(client: NeptuneClient, source: str, kind: str | None, file: Path) -> list[JsonValue]:
    if kind is None:
        return []
    if kind == "String":
        body: str | bytes = str(client.fetch(source, COMPILED))
    elif kind == "File":
        client.download(source, COMPILED, file)
        body = file.read_bytes()
    else:
        raise RegistryError(
            f"Expected {COMPILED} of {source} to be a file, got a {kind}.",
            hint="Replace it by a JSON file with a list.",
        )
    try:
        items = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RegistryError(
            f"{COMPILED} of {source} does not hold JSON ({first_line(error)}).", hint="Correct it or delete it."
        ) from error
    # A user who listed one version may have left the brackets out.
    return items if isinstance(items, list) else [items]


def _is_same(item: dict[str, JsonValue], entry: dict[str, str]) -> bool:
    return all(item.get(name) == entry[name] for name in ("project", "with_id"))
