"""Find a compiled artifact, check every byte of it, and only then let anyone open its files."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from compileflow.catalog import get_target, open_store
from compileflow.contracts import Device, Runner
from compileflow.cpu import missing_features
from compileflow.digests import folder_digest
from compileflow.errors import IntegrityError, LoadError, ManifestError, StoreError
from compileflow.manifest import ArtifactManifest, verify_folder
from compileflow.process_state import undisturbed_process
from compileflow.settings import Settings, get_settings
from compileflow.workspace import os_errors, work_folder

_URI = re.compile(r"(?P<store>[a-z0-9]+://.+)/manifests/sha256/(?P<digest>[0-9a-f]{64})\.json")


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact whose digests were verified, in a folder of this machine."""

    folder: Path
    manifest: ArtifactManifest
    digest: str

    def load(self, component: str, *, device: Device | None, threads: int | None) -> Runner:
        """Load one component with the target that compiled it; device None is the one it was compiled for.

        Raises:
            LoadError: no such component, or the target cannot run here.
        """
        record = self.manifest.components.get(component)
        if record is None:
            raise LoadError(
                f"The artifact has no component {component!r}.",
                hint=f"It has: {', '.join(sorted(self.manifest.components))}.",
            )
        target = get_target(self.manifest.target.name)
        # A target may compile for one of its devices; any other takes what it has first.
        compiled_for = cast("Device | None", record.load_options.get("device"))
        device = device or compiled_for or target.capabilities.devices[0]
        if device not in target.capabilities.devices:
            raise LoadError(
                f"{target.name} does not run on {device!r}.",
                hint=f"Choose one of: {', '.join(target.capabilities.devices)}.",
            )
        here = target.probe()
        if not here.can_run:
            raise LoadError(f"{target.name} cannot run here: {here.reason}.", hint=f"Try: {here.hint}.")
        if record.precision in here.lacking:
            raise LoadError(
                f"{target.name} cannot run {record.precision.value} here: {here.lacking[record.precision]}.",
                hint="Load it on a machine that can, or compile at another precision.",
            )
        lost = missing_features(self.manifest.target.cpu_features)
        if lost:
            raise LoadError(
                f"The artifact was compiled for a CPU with {', '.join(lost)}, which this one lacks.",
                hint="Compile it on a machine like this one.",
            )
        with undisturbed_process():
            return target.load(self.folder / record.folder, record, device=device, threads=threads)


def split_uri(uri: str) -> tuple[str, str]:
    """Split a stored folder's URI into the store's URI and the digest.

    Raises:
        ManifestError: it is not such a URI.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ManifestError(
            f"{uri!r} is neither an artifact folder nor an artifact URI.",
            hint="Give a folder, or STORE/manifests/sha256/DIGEST.json as `compileflow versions` shows it.",
        )
    return match["store"], match["digest"]


def open_artifact(location: str | Path, *, settings: Settings | None = None) -> OpenArtifact:
    """Open an artifact by folder or by URI; a URI is fetched once and kept in the local cache.

    Raises:
        ManifestError: there is no manifest, or of an unknown schema_version.
        IntegrityError: a file is missing, altered, unlisted, or outside the folder.
    """
    text = str(location)
    expected = None
    folder = Path(location).expanduser().absolute()
    if "://" in text:
        store_uri, expected = split_uri(text)
        folder = _fetched(store_uri, expected, settings or get_settings())
    manifest, files = verify_folder(folder)
    digest = folder_digest(files)
    if expected is not None and digest != expected:
        raise IntegrityError(
            f"{folder} has the digest {digest[:12]}..., asked for was {expected[:12]}...",
            hint="Delete that folder and load again.",
        )
    return OpenArtifact(folder, manifest, digest)


def copy_artifact(artifact: OpenArtifact, dest: str | Path) -> Path:
    """Copy an artifact's files into `dest`, which must be empty or absent."""
    out = Path(dest).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} is not empty.", hint="Choose another folder.")
    with os_errors(out, "write to"):
        shutil.copytree(artifact.folder, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return out


def _fetched(store_uri: str, digest: str, settings: Settings) -> Path:
    folder = settings.home_dir / "artifacts" / digest
    if not folder.exists():
        with work_folder(settings.work_dir, label="fetch") as work:
            open_store(store_uri).get_folder(digest, work / "artifact")
            with os_errors(folder, "write to"):
                folder.parent.mkdir(parents=True, exist_ok=True)
                try:
                    (work / "artifact").replace(folder)
                except OSError:
                    # Another process fetched it in the meantime; it is verified below like any other.
                    if not folder.exists():
                        raise
    return folder
