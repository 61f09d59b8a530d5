"""Find a compiled artifact, check every byte of it, and only then let anyone open its files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from compileflow._process.cpu import missing_features
from compileflow._process.folders import move_into_place, os_errors, work_folder
from compileflow._process.state import undisturbed_process
from compileflow.artifact.attestations.envelopes import stored_envelopes, write_bundle
from compileflow.artifact.attestations.required import RequireSignature, check_signed, required_keys
from compileflow.artifact.attestations.verify import Attested
from compileflow.artifact.integrity import check_folder, check_is_digest, check_same
from compileflow.artifact.manifest import ArtifactManifest
from compileflow.artifact.runtime import check_runtime
from compileflow.catalog import get_target, open_store, parse_reference, resolve_reference, target_names
from compileflow.contracts import ComponentRecord, Device, Runner, Target
from compileflow.errors import LoadError, SpecError, StoreError
from compileflow.settings import Settings, get_settings
from compileflow.stores.layout import split_uri

_FETCH = "Do not load this artifact; fetch it again."
_TRUST = f"{_FETCH} trust=True would load it as it is; compiled files are native code and run with your rights."
_FETCH_CACHED = "Delete that folder and load again."
_OTHER_DIGEST = "Give the folder or URI that has it; `compileflow versions` lists the registered ones."


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact in a folder of this machine, its files compared with its manifest.

    Attributes:
        folder: Where it is.
        manifest: What was made.
        digest: The folder's own, of what is there.
        verified: False only with trust=True: a file was altered, or is not in the manifest.
        attested: What trusted keys signed of it; None where no signature was required.
    """

    folder: Path
    manifest: ArtifactManifest
    digest: str
    verified: bool
    attested: Attested | None = None

    def component(self, name: str) -> ComponentRecord:
        """Return one component's record.

        Raises:
            LoadError: there is no such component.
        """
        record = self.manifest.components.get(name)
        if record is None:
            raise LoadError(
                f"The artifact has no component {name!r}.",
                hint=f"It has: {', '.join(sorted(self.manifest.components))}.",
            )
        return record

    def load(self, record: ComponentRecord, *, device: Device | None, threads: int | None) -> Runner:
        """Load one component with the target that compiled it; device None is the one it was compiled for.

        Raises:
            LoadError: the target is unknown, or cannot run it here; nothing was opened.
        """
        target = self._target()
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
        check_runtime(target, self.manifest.target.toolchain)
        if record.precision in here.lacking:
            raise LoadError(
                f"{target.name} cannot run {record.precision.value} here: {here.lacking[record.precision]}.",
                hint="Load it on a machine that can, or compile at another precision: "
                f"{self._compile_command()} --precision fp32",
            )
        lost = missing_features(self.manifest.target.cpu_features)
        if lost:
            raise LoadError(
                f"The artifact was compiled for a CPU with {', '.join(lost)}, which this one lacks.",
                hint=f"Compile it on a machine like this one: {self._compile_command()}",
            )
        with undisturbed_process():
            return target.load(self.folder / record.folder, record, device=device, threads=threads)

    def _target(self) -> Target:
        name = self.manifest.target.name
        try:
            return get_target(name)
        except SpecError as error:
            raise LoadError(
                f"The artifact was compiled for the target {name!r}; known are {', '.join(target_names())}.",
                hint="Install the distribution that brings this target, or a newer compileflow.",
            ) from error

    def _compile_command(self) -> str:
        model = self.manifest.source.uri.removeprefix("hf://").removeprefix("file://")
        return f"python -m flows compile --model {model} --target {self.manifest.target.name}"


def open_artifact(
    location: str | Path,
    *,
    digest: str | None = None,
    trust: bool = False,
    require_signature: RequireSignature = None,
    settings: Settings | None = None,
) -> OpenArtifact:
    """Open an artifact by folder, URI or registered name; what is not here is fetched once and kept in a cache.

    Args:
        location: Folder, STORE/manifests/sha256/DIGEST.json, or a version's name as registry:NAME@production,
            registry:NAME@3, or REGISTRY_URI#NAME@3; without @ the newest.
        digest: The artifact's own, or its first 12 digits and more. None: the one in the URI, if it is one.
        trust: Open it although files were altered or added, with a warning in the log. Compiled files are native
            code, which then runs with the caller's rights.
        require_signature: True refuses what no trusted key signed; so do public keys' PEM files, which are trusted
            instead. None: as the settings say.
        settings: Where the cache is, and which keys are trusted. None: as configured.

    Raises:
        ManifestError: there is no manifest, or of an unknown schema_version.
        IntegrityError: a file is missing, altered, unlisted or outside the folder, or the digest another.
        RegistryError: the registry has no such version, or did not answer.
        SpecError: `digest` is no digest, or a signature is required and no key can be used.
        SignatureError: one is required, and provenance or verdict lack it, are on another artifact, or the verdict
            is neither PASSED nor WARNED.
    """
    text = str(location)
    settings = settings or get_settings()
    keys = required_keys(require_signature, settings)
    store_uri = None
    if digest is not None:
        check_is_digest(digest)
    if parse_reference(text) is not None:
        version = resolve_reference(text, settings)
        if digest is not None:
            check_same(text, version.artifact_digest, digest, hint=_OTHER_DIGEST)
        # Whatever stands at that URI, what was registered is this digest.
        text, digest = version.artifact_uri, version.artifact_digest
    if "://" in text:
        store_uri, named = split_uri(text)
        if digest is not None:
            check_same(text, named, digest, hint=_OTHER_DIGEST)
        folder = _fetched(store_uri, named, settings)
        checked = check_folder(folder, trust=trust, hint=_FETCH_CACHED)
        check_same(str(folder), checked.digest, named, hint=_FETCH_CACHED)
    else:
        folder = Path(location).expanduser().absolute()
        # Whoever names the digest wants that artifact and no other; to trust this one would not help.
        checked = check_folder(folder, trust=trust, hint=_TRUST if digest is None else _FETCH)
        if digest is not None:
            check_same(str(folder), checked.digest, digest, hint=_OTHER_DIGEST)
    attested = None
    if keys is not None:
        attested = check_signed(folder, checked, keys, store_uri=store_uri, settings=settings)
    return OpenArtifact(folder, checked.manifest, checked.digest, checked.verified, attested)


def copy_artifact(artifact: OpenArtifact, dest: str | Path) -> Path:
    """Copy an artifact's files, and what is said of it, into `dest`, which must be empty or absent."""
    out = Path(dest).expanduser().absolute()
    with os_errors(out, "write to"):
        was_there = out.exists()
        if was_there and (not out.is_dir() or any(out.iterdir())):
            raise StoreError(f"{out} is not empty.", hint="Choose another folder.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in sorted(artifact.folder.rglob("*")):
                copy = out / path.relative_to(artifact.folder)
                if path.is_dir():
                    copy.mkdir()
                else:
                    shutil.copyfile(path, copy)
        except BaseException:
            # Half of an artifact would stand in the way of the next try.
            shutil.rmtree(out, ignore_errors=True)
            if was_there:
                out.mkdir(exist_ok=True)
            raise
    return out


def cached_folder(digest: str, settings: Settings) -> Path:
    """Return where the local cache has an artifact, if it has it."""
    return settings.home_dir / "artifacts" / digest


def _fetched(store_uri: str, digest: str, settings: Settings) -> Path:
    folder = cached_folder(digest, settings)
    if not folder.exists():
        store = open_store(store_uri, settings)
        with work_folder(settings.work_dir, label="fetch") as work:
            store.get_folder(digest, work / "artifact")
            said = stored_envelopes(store, digest)
            with os_errors(folder, "write to"):
                write_bundle(work / "artifact", said)
            # A folder that another process fetched meanwhile is verified below like any other.
            move_into_place(work / "artifact", folder)
    return folder
