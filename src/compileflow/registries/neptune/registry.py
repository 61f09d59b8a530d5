"""neptune: a project of a Neptune server as model registry, through Neptune's own client.

Neptune has no transactions. A version is therefore written in an order that stays readable after a kill at any
point: its digest first, then all other fields, and `registry/complete` last. Incomplete versions are hidden, and
the next call with the same entry completes them. Two machines that register one artifact at the same moment may
both complete a version: the smaller number stays, and the other version goes to the trash.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from compileflow._process.folders import file_lock, work_folder
from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry, VersionFiles
from compileflow.contracts.digests import json_digest
from compileflow.errors import RegistryError, RegistryUnavailableError
from compileflow.registries.lookup import check_stage, choose_version, is_exclusive, read_promotion, replaced_by
from compileflow.registries.neptune import fields as layout
from compileflow.registries.neptune.address import parse_project
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.lineage import list_in_source
from compileflow.registries.neptune.listing import Listing, Row, settle
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Another process may be creating a version that has no digest yet.
_LITTER_AGE_S = 15 * 60
_LISTED_WITHIN_S = 10.0


class NeptuneRegistry:
    """Versions of a Neptune project: a model per name, a model version per artifact."""

    def __init__(self, uri: str, settings: Settings):
        """Read neptune://workspace/project. The first call sends the first request."""
        self._project = parse_project(uri)
        self.uri = f"neptune://{self._project}"
        self._settings = settings
        self._client = NeptuneClient(
            self._project, settings, refused=RegistryError, unavailable=RegistryUnavailableError
        )
        self._listing = Listing(self._client, self.uri, settings)

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Add a version, or return the one that already holds this artifact under this name.

        With `files`, the manifest, the report, the test files and, with `neptune_upload_weights`, the artifact
        are uploaded. Without `files`, the version only refers to the store.

        Raises:
            RegistryUnavailableError: The server did not answer in time; another call completes the version.
            RegistryError: The server refused.
        """
        entry = VersionEntry.model_validate(entry.model_dump(include=set(VersionEntry.model_fields)))
        client = self._client
        with self._alone(entry.name, entry.artifact_digest):
            model = f"{client.project_key()}-{layout.model_key(entry.name)}"
            if (complete_version := self._complete(model, entry.artifact_digest)) is not None:
                return complete_version
            self._make_model(model, entry.name)
            identity = self._begin(model, entry)
            self._fill(model, identity, entry, files)
            # During the upload another machine may have completed a version, which may be in use already.
            complete_version = self._complete(model, entry.artifact_digest)
            if complete_version is not None and complete_version.version != layout.number_of(identity):
                client.release()
                client.trash([identity])
                return complete_version
            client.write(identity, {layout.COMPLETE: True})
            client.release()
            self._sweep(model, entry.artifact_digest)
            return self._read_back(model, identity, entry.artifact_digest)

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        rows = self._listing.rows(layout.equals(layout.DIGEST, artifact_digest))
        return self._listing.settled(row for row in rows if row.version.artifact_digest == artifact_digest)

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""
        rows = self._listing.rows(layout.equals("source/uri", source_uri))
        return self._listing.settled(row for row in rows if row.version.source_uri == source_uri)

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version by its number or its stage.

        Raises:
            RegistryError: The name, number or stage does not exist; the hint lists those that do.
        """
        if isinstance(version, int):
            return self._listing.settled([self._listing.numbered(name, version)])[0]
        if is_exclusive(version):
            for candidate in settle(self._listing.in_stage([name], [version])):
                if (candidate.name, candidate.stage) == (name, version):
                    return candidate
        return choose_version(name, self.versions(name), version)

    def versions(self, name: str | None = None, *, limit: int | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first, or the newest ones only.

        Raises:
            RegistryError: The name does not exist; the hint lists similar names.
        """
        if limit is not None and limit > 0:
            versions = self._listing.newest("" if name is None else layout.equals(layout.NAME, name), limit)
            if versions or name is None:
                return versions
        if name is None:
            return settle(self._listing.rows(""))[:limit]
        versions = settle(self._listing.named(name))
        return sorted(versions, key=lambda version: version.version, reverse=True)[:limit]

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the version that it replaces in staging or production.

        The new version moves first. If a kill leaves two versions in a stage, the last promoted one counts.

        Raises:
            RegistryError: The name, number or stage does not exist, or the reason is too long for Neptune.
        """
        check_stage(stage)
        with self._alone(name, "stage"):
            chosen = self._listing.numbered(name, version)
            if self._listing.settled([chosen])[0].stage != stage:
                self._move(chosen, stage, who, reason)
            for row in self._listing.in_stage([name], [stage]) if is_exclusive(stage) else []:
                if row.version.name == name and row.identity != chosen.identity:
                    self._move(row, "archived", who, replaced_by(version, stage))
            self._client.release()
            return self.get(name, version)

    def note(self, name: str, version: int, *, who: str, reason: str) -> Promotion:
        """Record a note on a version, which stays in its stage.

        Raises:
            RegistryError: The name or number does not exist, or the reason is too long for Neptune.
        """
        with self._alone(name, "stage"):
            row = self._listing.numbered(name, version)
            stage = self._listing.settled([row])[0].stage
            # The time of the last promotion decides between two versions in one stage, and a note is none.
            promotion = self._record(row, stage, who, reason, promoted=not row.promoted_at)
            self._client.release()
            return promotion

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage and every note on it, oldest first."""
        row = self._listing.numbered(name, version)
        if not row.promoted_at:
            return []
        promotions = self._client.fetch(row.identity, layout.PROMOTIONS)
        self._client.release()
        place = f"{name} {version} in Neptune"
        return [read_promotion(promotions[moment], place) for moment in sorted(promotions)]

    def _complete(self, model: str, digest: str) -> ModelVersion | None:
        """Return the complete version of an artifact. Of several, keep the first and trash the others."""
        query = layout.all_of(layout.equals("sys/model_id", model), layout.equals(layout.DIGEST, digest))
        rows = self._listing.rows(query, duplicates=True)
        for row in rows[1:]:
            logger.warning("%s repeats %s and goes to the trash", row.identity, rows[0].identity)
        self._client.trash([row.identity for row in rows[1:]])
        return self._listing.settled(rows[:1])[0] if rows else None

    def _make_model(self, model: str, name: str) -> None:
        query = layout.equals("sys/id", model)
        rows = self._client.find("model", query, [layout.NAME])
        if not rows:
            is_new = self._client.create_model(layout.model_key(name), name)
            # An old model is in the trash, or another process created it at this moment.
            rows = [{}] if is_new else _wait_for(lambda: self._client.find("model", query, [layout.NAME]))
        if not rows:
            raise RegistryError(
                f"The model {model} of {name!r} is in the trash of {self.uri}.",
                hint="Restore it in Neptune, or delete it from the trash.",
            )
        model_name = rows[0].get(layout.NAME)
        if model_name is None:
            self._client.write(model, {layout.NAME: name}, kind="model")
        elif model_name != name:
            raise RegistryError(
                f"Expected the model {model} in {self.uri} to belong to {name!r}, got {model_name!r}.",
                hint="Register under another name.",
            )

    def _begin(self, model: str, entry: VersionEntry) -> str:
        """Return the version that an earlier call left unfinished, or a new one that holds its digest."""
        query = layout.all_of(
            layout.equals("sys/model_id", model), layout.equals(layout.DIGEST, entry.artifact_digest)
        )
        incomplete_versions = sorted(
            (str(row["sys/id"]) for row in self._client.find("version", query)), key=layout.number_of
        )
        if incomplete_versions:
            logger.info("Completing %s, which an earlier run left unfinished", incomplete_versions[0])
            return incomplete_versions[0]
        identity = self._client.create_version(model)
        self._client.write(identity, {layout.DIGEST: entry.artifact_digest, layout.NAME: entry.name})
        return identity

    def _fill(self, model: str, identity: str, entry: VersionEntry, files: VersionFiles | None) -> None:
        weights = self._settings.neptune_upload_weights and files is not None
        uploads = {} if files is None else layout.uploads(files, weights=weights)
        kinds = [] if files is None else list(layout.existing_test_files(files))
        fields = layout.entry_fields(entry, _json_file(uploads.get("report/json")))
        if not weights:
            reference = {"uri": entry.artifact_uri, "digest": entry.artifact_digest}
            fields[f"{layout.ARTIFACT}/reference"] = layout.cut(json.dumps(reference))
        self._client.write(identity, {layout.NAME: entry.name, "sys/name": entry.name, **fields})
        with work_folder(self._settings.work_dir, label="registered") as work:
            card = layout.model_card(entry, kinds, weights=weights)
            (work / "model_card.json").write_text(json.dumps(card, indent=1), "utf-8")
            (work / "entry.json").write_text(layout.entry_json(entry), "utf-8")
            uploads |= {layout.CARD: work / "model_card.json", layout.ENTRY_FILE: work / "entry.json"}
            for path, file in uploads.items():
                self._client.upload(identity, path, file)
        list_in_source(entry.source_uri, self._settings, project=self._project, model=model, identity=identity)

    def _read_back(self, model: str, identity: str, digest: str) -> ModelVersion:
        version = _wait_for(lambda: self._complete(model, digest))
        if version is None:
            raise RegistryUnavailableError(
                f"{identity} was written to {self.uri}, which does not list it after {_LISTED_WITHIN_S:g} s.",
                hint="Run again; the run resumes from there.",
            )
        return version

    def _sweep(self, model: str, digest: str) -> None:
        """Trash leftovers of lost replies and kills: old incomplete versions without a digest or with this one."""
        rows = self._client.find(
            "version", layout.equals("sys/model_id", model), ["sys/creation_time", layout.DIGEST, layout.COMPLETE]
        )
        newest_time = datetime.now(UTC).timestamp() - _LITTER_AGE_S
        self._client.trash(
            [
                str(row["sys/id"])
                for row in rows
                if not row[layout.COMPLETE]
                and row[layout.DIGEST] in (None, digest)
                and datetime.fromisoformat(str(row["sys/creation_time"])).timestamp() < newest_time
            ]
        )

    def _move(self, row: Row, stage: Stage, who: str, reason: str) -> None:
        self._record(row, stage, who, reason, promoted=True)
        self._client.change_stage(row.identity, stage)

    def _record(self, row: Row, stage: Stage, who: str, reason: str, *, promoted: bool) -> Promotion:
        now_ns = time.time_ns()
        at = datetime.fromtimestamp(now_ns / 1e9, UTC).isoformat(timespec="microseconds")
        promotion = Promotion(at=at, stage=stage, who=who, reason=reason)
        text = promotion.model_dump_json()
        if len(text) > layout.LONGEST_STRING:
            raise RegistryError(
                f"The reason has {len(reason)} characters; Neptune stores {layout.LONGEST_STRING} per promotion.",
                hint="Give a shorter reason.",
            )
        fields = {f"{layout.PROMOTIONS}/{now_ns:020d}": text} | ({layout.PROMOTED_AT: at} if promoted else {})
        self._client.write(row.identity, fields)
        return promotion

    def _alone(self, *key: str) -> AbstractContextManager[None]:
        name = json_digest([self._project, *key])[:32]
        path = self._settings.home_dir / "locks" / f"neptune-{name}.lock"
        return file_lock(path, on_wait=lambda: logger.info("Another process registers %s; waiting", key[0]))


def _wait_for(query: Callable[[], _T]) -> _T:
    """Repeat a query until it has a result: a hosted server lists a new object some seconds later."""
    deadline = time.monotonic() + _LISTED_WITHIN_S
    while not (result := query()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return result


def _json_file(path: Path | None) -> JsonValue:
    if path is None:
        return None
    try:
        value: JsonValue = json.loads(path.read_text("utf-8"))
    except ValueError:
        logger.warning("%s does not hold JSON; its gates are not registered as fields", path.name)
        return None
    return value
