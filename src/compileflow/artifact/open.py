"""Open a compiled artifact by folder, URI or registered name: fetch it, verify every byte, then load it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from compileflow._process.cpu import missing_features
from compileflow._process.folders import move_into_place, os_errors, path_of_uri, work_folder
from compileflow._process.state import undisturbed_process
from compileflow.artifact.attestations.envelopes import stored_envelopes, write_bundle
from compileflow.artifact.attestations.require_signature import (
    RequireSignature,
    check_signed,
    check_subjects,
    required_keys,
)
from compileflow.artifact.attestations.verify import Attestations
from compileflow.artifact.integrity import (
    check_digest,
    check_digest_format,
    check_folder,
    check_registered_uri,
    check_typed_digest,
)
from compileflow.artifact.manifest import (
    INSTRUCTIONS_FOLDER,
    MANIFEST_NAME,
    ORIGINAL_FOLDER,
    ArtifactManifest,
    artifact_files,
    read_manifest,
)
from compileflow.artifact.runtime import check_runtime
from compileflow.catalog import (
    get_target,
    is_target,
    open_store,
    parse_reference,
    resolve_reference,
    target_names,
)
from compileflow.contracts import ArtifactStore, ComponentRecord, Device, Runner, Target
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.contracts.toolkit import library_errors
from compileflow.errors import (
    CompileflowError,
    IntegrityError,
    LoadError,
    ManifestError,
    SpecError,
    StoreError,
)
from compileflow.settings import Settings, get_settings
from compileflow.stores.layout import split_uri

logger = logging.getLogger(__name__)
_FETCH_AGAIN = "Do not load this artifact; fetch it again."
_TRUST = f"{_FETCH_AGAIN} trust=True loads it unverified; compiled files are native code and run with your rights."
_DELETE_CACHED = "Delete that folder and load again."
_OTHER_DIGEST = "Give the folder or URI of that artifact; `compileflow versions` lists the registered artifacts."


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact in a folder on this machine, after the comparison of its files with its manifest.

    Attributes:
        folder: Folder of the artifact.
        manifest: Manifest of the artifact.
        digest: Digest of the files that are in the folder.
        verified: False if a file is altered or unlisted, which only trust=True accepts.
        attested: Signed statements about the artifact; None if no signature was required.
        trust_remote_code: Whether the caller lets the artifact's Python files run. Never read from the artifact.
    """

    folder: Path
    manifest: ArtifactManifest
    digest: str
    verified: bool
    attested: Attestations | None = None
    trust_remote_code: bool = False

    @property
    def saved_folder(self) -> Path:
        """Folder with all files of the artifact; a copy of it is a copy of the artifact."""
        return self.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Folder with the tokenizer and its settings."""
        return self.folder

    @property
    def original_folder(self) -> Path:
        """Folder of the uncompiled pipeline, whether or not it exists."""
        return self.saved_folder / ORIGINAL_FOLDER

    def check_code(self) -> None:
        """Refuse an artifact that was compiled with Python files of its own, unless the caller trusts them.

        Raises:
            LoadError: The caller did not pass trust_remote_code=True.
        """
        if self.manifest.spec.trust_remote_code and not self.trust_remote_code:
            raise untrusted_code(self.saved_folder)

    def component(self, name: str) -> ComponentRecord:
        """Return the record of one component.

        Raises:
            LoadError: The artifact has no such component.
        """
        record = self.manifest.components.get(name)
        if record is None:
            raise LoadError(
                f"The artifact has no component {name!r}.",
                hint=f"It has: {', '.join(sorted(self.manifest.components))}.",
            )
        return record

    def load(self, record: ComponentRecord, *, device: Device | None, threads: int | None) -> Runner:
        """Load one component with the target that compiled it.

        Args:
            record: Record of the component.
            device: Device to run on. None: the device that the component was compiled for.
            threads: Number of threads that the runtime uses. None: the runtime decides.

        Raises:
            LoadError: The target is unknown or cannot run here. No compiled file was opened.
            ManifestError: The component takes any shape, but the target compiles fixed shapes only.
        """
        target, device = self.checked_target(record, device)
        with undisturbed_process():
            hint = f"Compile the model again: {self._compile_command()}"
            with library_errors(f"{target.name} cannot load {record.folder}", hint=hint):
                return target.load(self.folder / record.folder, record, device=device, threads=threads)

    def checked_target(self, record: ComponentRecord, device: Device | None) -> tuple[Target, Device]:
        """Return what `target_for` returns, after checking that it can run the component here.

        Raises:
            LoadError: The target is unknown or cannot run here.
            ManifestError: The component takes any shape, but the target compiles fixed shapes only.
        """
        target, device = self.target_for(record, device)
        if record.dynamic_axes and not target.capabilities.dynamic_axes:
            raise ManifestError(
                f"{self.folder / MANIFEST_NAME}: dynamic_axes is true, but {target.name} compiles fixed shapes "
                "only.",
                hint=_FETCH_AGAIN,
            )
        if device not in target.capabilities.devices:
            raise LoadError(
                f"{target.name} does not run on {device!r}.",
                hint=f"Choose one of: {', '.join(target.capabilities.devices)}.",
            )
        availability = target.probe()
        if not availability.can_run:
            raise LoadError(
                f"{target.name} cannot run here: {availability.run_reason or availability.reason}.",
                hint=f"Try: {availability.run_hint or availability.hint}.",
            )
        check_runtime(target, self.manifest.target.toolchain)
        if record.precision in availability.lacking:
            reason = availability.lacking[record.precision]
            raise LoadError(
                f"{target.name} cannot run {record.precision.value} here: {reason}.",
                hint="Load it on another machine, or compile it at another precision: "
                f"{self._compile_command()} --precision fp32",
            )
        cpu_features = missing_features(self.manifest.target.cpu_features)
        if cpu_features:
            raise LoadError(
                f"The artifact was compiled for a CPU with {', '.join(cpu_features)}, which this CPU lacks.",
                hint=f"Compile it on a machine like this one: {self._compile_command()}",
            )
        return target, device

    def target_for(self, record: ComponentRecord, device: Device | None) -> tuple[Target, Device]:
        """Return the target that compiled a component, and the device that it runs on if a load requests `device`.

        Raises:
            LoadError: The target is unknown.
        """
        target = self._target()
        # Only targets that compile for one particular device record it.
        compiled_for = cast("Device | None", record.load_options.get("device"))
        return target, device or compiled_for or target.capabilities.devices[0]

    def __reduce__(self) -> tuple[Any, ...]:
        is_attested = self.attested is not None
        return _open_again, (self.folder, self.digest, self.verified, is_attested, self.trust_remote_code)

    def _target(self) -> Target:
        name = self.manifest.target.name
        try:
            return get_target(name)
        except SpecError as error:
            if is_target(name):
                raise LoadError(f"The artifact needs its target: {error.message}", hint=error.hint) from error
            raise LoadError(
                f"The artifact was compiled for the unknown target {name!r}. "
                f"Known targets: {', '.join(target_names())}.",
                hint="Install the distribution that provides this target, or a newer compileflow.",
            ) from error

    def _compile_command(self) -> str:
        uri = self.manifest.source.uri
        model = str(path_of_uri(uri)) if uri.startswith("file:") else uri.removeprefix("hf://")
        return f"compileflow compile {shlex.quote(model)} --target {self.manifest.target.name}"


def path_of(location: object) -> Path:
    """Return a location as a path, also if it is a URI or a name.

    Raises:
        LoadError: The location is not text and not a path, or it is empty, which would mean the current folder.
    """
    if not isinstance(location, str | os.PathLike) or location == "":
        raise LoadError(
            f"Expected the location of an artifact, got {location!r:.80}.",
            hint="Give a folder, registry:NAME, or STORE/manifests/sha256/DIGEST.json.",
        )
    path = Path(location)
    # Raised where no user has the name after ~. Then no such folder exists either.
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def untrusted_code(folder: Path) -> LoadError:
    """Return the error for a folder that brings Python code which its caller does not trust."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return LoadError(
        f"{folder} brings its own Python code ({', '.join(paths) or 'of another repository'}), and "
        "trust_remote_code is off.",
        hint="Read that code; if you trust it, load with trust_remote_code=True.",
    )


def open_artifact(
    location: str | Path,
    *,
    digest: str | None = None,
    trust: bool = False,
    require_signature: RequireSignature = None,
    trust_remote_code: bool = False,
    settings: Settings | None = None,
) -> OpenArtifact:
    """Open an artifact by folder, URI or registered name. A remote artifact is fetched once into a local cache.

    Args:
        location: Folder, also one that AutoCompiler wrote; STORE/manifests/sha256/DIGEST.json; or a registered
            version: registry:NAME@production, registry:NAME@3, or REGISTRY_URI#NAME@3. Without @, the newest
            version.
        digest: Expected digest, or at least its first 12 digits. None: the digest in the URI, if there is one.
        trust: Open an artifact whose files are altered or unlisted, with a warning in the log. Compiled files are
            native code, which then runs with the caller's rights.
        require_signature: True refuses an artifact that no trusted key signed. PEM files of public keys do the
            same and are trusted instead of the configured keys. None follows the settings.
        trust_remote_code: Let a later load run the artifact's Python files. Opening itself runs none of them.
        settings: Settings that name the cache and the trusted keys. None means the configured ones.

    Raises:
        ManifestError: The manifest is missing, or its schema_version is unknown.
        IntegrityError: A file is missing, altered, unlisted or outside the folder, or the digest differs.
        RegistryError: The registry has no such version, or did not answer.
        SpecError: `digest` is not a digest, or a signature is required but no key can be used.
        SignatureError: A statement beside the files is about another artifact; or a signature is required, but the
            provenance or the verdict is missing or unsigned, or the verdict is neither PASSED nor WARNED.
    """
    path, text = path_of(location), str(location)
    settings = settings or get_settings()
    keys = required_keys(require_signature, settings)
    store_uri = None
    if digest is not None:
        check_digest_format(digest)
    if parse_reference(text) is not None:
        version = resolve_reference(text, settings)
        if digest is not None:
            check_typed_digest(text, version.artifact_digest, digest, hint=_OTHER_DIGEST)
        # The URI may lead anywhere; the registered digest decides.
        check_registered_uri(version)
        text, digest = version.artifact_uri, None
    if "://" in text:
        store_uri, uri_digest = split_uri(text)
        if digest is not None:
            check_typed_digest(text, uri_digest, digest, hint=_OTHER_DIGEST)
        folder = _fetch(store_uri, uri_digest, settings)
        checked_folder = check_folder(folder, trust=trust, hint=_DELETE_CACHED)
        check_digest(str(folder), checked_folder.digest, uri_digest, hint=_DELETE_CACHED)
    else:
        folder = path.absolute()
        if not (folder / MANIFEST_NAME).exists() and (folder / INSTRUCTIONS_FOLDER / MANIFEST_NAME).is_file():
            folder /= INSTRUCTIONS_FOLDER
        # With a given digest, an altered folder is the wrong artifact, so trust=True does not help.
        checked_folder = check_folder(folder, trust=trust, hint=_TRUST if digest is None else _FETCH_AGAIN)
        if digest is not None:
            check_typed_digest(str(folder), checked_folder.digest, digest, hint=_OTHER_DIGEST)
    attestations = None
    if keys is not None:
        attestations = check_signed(folder, checked_folder, keys, store_uri=store_uri, settings=settings)
    else:
        # A fetched folder was compared with the digest of its URI.
        check_subjects(folder, checked_folder.digest, is_trusted=trust or store_uri is not None)
    return OpenArtifact(
        folder,
        checked_folder.manifest,
        checked_folder.digest,
        checked_folder.verified,
        attestations,
        trust_remote_code,
    )


def _open_again(
    folder: Path, digest: str, verified: bool, is_attested: bool, trust_remote_code: bool
) -> OpenArtifact:
    """Open the folder of a pickled artifact, after the same checks as the first time."""
    if not folder.is_dir():
        raise LoadError(
            f"The pickle needs the artifact in {folder}, which this machine does not have.",
            hint="Copy that folder to the same path, or load the artifact here by its name or URI.",
        )
    return open_artifact(
        folder,
        digest=digest,
        trust=not verified,
        require_signature=None if is_attested else False,
        trust_remote_code=trust_remote_code,
    )


def folder_to_write(dest: str | Path) -> Path:
    """Return the absolute path of a folder to write to.

    Raises:
        StoreError: The path is empty text, which would mean the current folder.
    """
    if dest == "":
        raise StoreError("Expected a folder to write to, got ''.", hint="Give its path.")
    return Path(dest).expanduser().absolute()


def copy_artifact(
    artifact: OpenArtifact, dest: str | Path, *, replace: bool = False, with_original: bool = True
) -> Path:
    """Copy an artifact's files, its attestations and its original pipeline into `dest`.

    Args:
        artifact: Artifact to copy.
        dest: Empty or absent folder.
        replace: Accept a folder that holds another artifact and no other file; the copy replaces that artifact.
        with_original: Copy the original pipeline as well.

    Raises:
        StoreError: `dest` is empty text, holds other files or cannot be written.
    """
    folder = folder_to_write(dest)
    with os_errors(folder, "write to"):
        was_present = folder.exists()
        if replace and was_present and folder.samefile(artifact.saved_folder):
            return folder
        old_paths = sorted(folder.iterdir()) if folder.is_dir() else []
        if was_present and (not folder.is_dir() or (old_paths and not (replace and _is_artifact_only(folder)))):
            raise StoreError(f"{folder} is not empty.", hint="Choose another folder.")
        # Inside the folder, which may be a mount of its own.
        copy = folder / f".copy-{uuid4().hex}"
        try:
            copy.mkdir(parents=True)
            for path in sorted(artifact.saved_folder.rglob("*")):
                relative = path.relative_to(artifact.saved_folder)
                if relative.parts[0] == ORIGINAL_FOLDER and not with_original:
                    continue
                if path.is_dir():
                    (copy / relative).mkdir()
                else:
                    shutil.copyfile(path, copy / relative)
        except BaseException:
            # A partial copy would block the next attempt.
            shutil.rmtree(copy if was_present else folder, ignore_errors=True)
            raise
        for path in old_paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in copy.iterdir():
            path.rename(folder / path.name)
        copy.rmdir()
    return folder


def _is_artifact_only(folder: Path) -> bool:
    """Return whether a folder holds an artifact, and no file that does not belong to it."""
    original = folder / ORIGINAL_FOLDER
    try:
        manifest = read_manifest(folder)
        files = {record.path for record in artifact_files(folder)}
        # The manifest does not list the files of the original pipeline, but has their digest.
        if original.is_dir() and folder_digest(list_files(original)) != manifest.source.digest:
            return False
    except (ManifestError, IntegrityError):
        return False
    return files <= {*(record.path for record in manifest.files), MANIFEST_NAME}


def cached_folder(digest: str, settings: Settings) -> Path:
    """Return the folder of an artifact in the local cache, whether or not it exists."""
    return settings.home_dir / "artifacts" / digest


def _fetch(store_uri: str, digest: str, settings: Settings) -> Path:
    folder = cached_folder(digest, settings)
    if not folder.exists():
        store = _store_with(store_uri, digest, settings)
        with work_folder(settings.work_dir, label="fetch") as work:
            store.get_folder(digest, work / "artifact")
            envelopes = stored_envelopes(store, digest)
            with os_errors(folder, "write to"):
                write_bundle(work / "artifact", envelopes)
            # Another process may have fetched it at the same time. The caller verifies the folder in either case.
            move_into_place(work / "artifact", folder)
    return folder


def _store_with(store_uri: str, digest: str, settings: Settings) -> ArtifactStore:
    """Return the store of a URI, or the configured one if only that has the folder: the store may have moved."""
    store = open_store(store_uri, settings)
    if not store.exists(digest):
        # A store that cannot be used is not the fault of this load.
        with suppress(CompileflowError):
            configured_store = open_store(settings.resolved_store_uri(), settings)
            if configured_store.exists(digest):
                logger.warning("%s lacks %s...; taking it from %s", store.uri, digest[:12], configured_store.uri)
                return configured_store
    return store
