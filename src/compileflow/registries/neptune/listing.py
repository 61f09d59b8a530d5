"""Which versions a Neptune project holds: complete ones only, once each, and in the stage that counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compileflow._process.folders import work_folder
from compileflow.contracts import ModelVersion
from compileflow.registries.lookup import is_exclusive, unknown_name
from compileflow.registries.neptune import fields as layout
from compileflow.registries.neptune.client import NeptuneClient
from compileflow.settings import Settings


@dataclass(frozen=True)
class Row:
    """A complete version as Neptune lists it.

    Attributes:
        identity: Neptune's id.
        version: In Neptune's own stage, which two may be in after a kill.
        promoted_at: When its stage was changed last, UTC, ISO 8601; '' for never.
    """

    identity: str
    version: ModelVersion
    promoted_at: str


class Listing:
    """Reads a project's versions, a query or two at a time."""

    def __init__(self, client: NeptuneClient, uri: str, settings: Settings):
        self._client = client
        self._uri = uri
        self._settings = settings

    def named(self, name: str) -> list[Row]:
        """Return a name's versions, oldest first."""
        rows = [row for row in self.rows(layout.equals(layout.NAME, name)) if row.version.name == name]
        if not rows:
            raise unknown_name(self._uri, name, (row.version.name for row in self.rows("")))
        return rows

    def rows(self, query: str, *, duplicates: bool = False) -> list[Row]:
        """Return complete versions, by model and number; of one artifact in one model the first, unless asked."""
        found = self._client.find("version", layout.all_of(query, layout.IS_COMPLETE), layout.COLUMNS)
        found.sort(key=lambda row: (str(row["sys/id"]).rpartition("-")[0], layout.number_of(str(row["sys/id"]))))
        rows: list[Row] = []
        seen: set[tuple[str, str]] = set()
        for one in found:
            identity = str(one["sys/id"])
            key = (identity.rpartition("-")[0], str(one[layout.DIGEST]))
            if key not in seen or duplicates:
                seen.add(key)
                rows.append(Row(identity, self._version(identity, one), str(one[layout.PROMOTED_AT] or "")))
        return rows

    def _version(self, identity: str, row: dict[str, str | int | float | bool | None]) -> ModelVersion:
        text = row[layout.ENTRY_JSON]
        if text is None:
            # Longer than Neptune keeps of a string.
            with work_folder(self._settings.work_dir, label="entry") as work:
                self._client.download(identity, layout.ENTRY_FILE, work / "entry.json")
                self._client.release()
                text = (work / "entry.json").read_text("utf-8")
        return layout.to_version(
            identity, str(text), stage=str(row["sys/stage"]), created_at=str(row["sys/creation_time"])
        )

    def settled(self, rows: Iterable[Row]) -> list[ModelVersion]:
        """Return some of the versions of their names, newest first, each in the stage that counts."""
        rows = list(rows)
        found = settle(rows)
        held = {one.name for one in found if is_exclusive(one.stage)}
        true = {(one.name, one.version): one for name in held for one in settle(self.named(name))}
        return [true.get((one.name, one.version), one) for one in found]


def settle(rows: Iterable[Row]) -> list[ModelVersion]:
    """Return versions newest first; of two in one exclusive stage, the one that was moved there last is in it."""
    rows = list(rows)
    last: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.promoted_at):
        last[(row.version.name, row.version.stage)] = row
    found = [
        row.version
        if not is_exclusive(row.version.stage) or last[(row.version.name, row.version.stage)] is row
        else row.version.model_copy(update={"stage": "archived"})
        for row in rows
    ]
    return sorted(found, key=lambda one: (one.created_at, one.version), reverse=True)
