"""settle: validate an artifact whose verdict is pending-device, where the device is, without its source model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compileflow._process.folders import work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import read_manifest
from compileflow.catalog import open_store
from compileflow.contracts import (
    ACCEPTED_OUTCOMES,
    PENDING,
    ArtifactStore,
    ModelVersion,
    without_credentials,
)
from compileflow.errors import (
    CompileflowError,
    IntegrityError,
    SignatureError,
    SpecError,
    TargetUnavailableError,
)
from compileflow.settings import Settings
from compileflow.steps.attest import Attester
from compileflow.steps.pending import PendingValidation, recorded_tests
from compileflow.steps.register import check_verdict, register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import Versions, register_in_each
from compileflow.steps.toolchain_logs import write_logs
from compileflow.steps.validate import CHILD, IMPORTS, STEP, WAITING, lacking_device, report_on
from compileflow.steps.values import ValidatedArtifact
from compileflow.stores.layout import split_uri
from compileflow.validation.bundle import BUNDLE_FOLDER
from compileflow.validation.recorded_reference import REFERENCE_FOLDER, recorded_source_dir, recorded_threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """A verdict that was pending, and what a registration needs besides it."""

    pending: PendingValidation
    validated: ValidatedArtifact

    @property
    def request(self) -> CompileRequest:
        """Request of the compile, or one with the defaults if it is unknown."""
        return self.pending.request or CompileRequest(model=self.pending.source.uri)


def settle_artifact(
    artifact_uri: str,
    *,
    settings: Settings,
    timeout_s: float,
    registry_uris: Sequence[str] = (),
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] = logger.info,
) -> Settled:
    """Compare an artifact with the recorded answers of its source model, judge the differences, store the report.

    Latency is not compared, because that needs both models on one machine.

    Args:
        artifact_uri: URI of the artifact in its store.
        settings: Credentials, work folder, signing key.
        timeout_s: Time limit of the child process.
        registry_uris: Registries to register in. Empty: those of the compile request; the settings must name them.
        trust_remote_code: Run Python files of the source model and of the artifact.
        on_progress: Called with one line for each stage.

    Raises:
        SpecError: The last verdict on the artifact is not pending-device, or only the store names a registry.
        TargetUnavailableError: This machine lacks the device as well.
        SignatureError: This run has a key, and no trusted key signed the record of what waits.
        MeasurementError: A call has no recorded answer.
        ProcessError: The child process died.
    """
    store_uri, digest = split_uri(artifact_uri)
    store = open_store(store_uri, settings)
    attester = Attester.of(store, settings)
    with store.lock(f"settle/{digest}", on_wait=lambda: on_progress("another run settles it; waiting")):
        waiting = _waiting(store, digest)
        with (
            store.open_folder(waiting.report_digest) as report_dir,
            store.open_folder(digest) as artifact_dir,
            work_folder(settings.work_dir, label="settle") as work,
        ):
            if reason := lacking_device(read_manifest(artifact_dir)):
                raise TargetUnavailableError(f"{reason}.", hint="Settle it on a machine with the device.")
            reference = report_dir / REFERENCE_FOLDER
            pending = PendingValidation.read(reference)
            if reason := attester.lacks_pending(digest, waiting.report_digest, pending.request_digest):
                raise SignatureError(
                    f"The recorded answers for {digest[:12]} cannot be trusted: {reason}.",
                    hint="Compile it again with a key that this machine trusts.",
                )
            request = _request(pending, store_uri, settings, registry_uris)
            tests_dir = recorded_tests(reference)
            threads = recorded_threads(reference)
            (work / "report").mkdir()
            child = run_in_child(
                CHILD,
                {
                    "source_dir": str(recorded_source_dir(reference)),
                    "source_digest": pending.source.digest,
                    "recorded_dir": str(reference),
                    "tests_dir": str(tests_dir) if tests_dir else None,
                    "artifact_dir": str(artifact_dir),
                    "artifact_uri": artifact_uri,
                    "report_dir": str(work / "report"),
                    "spec": pending.spec.model_dump(mode="json") if pending.spec else None,
                    "validation": pending.local_validation(reference).model_dump(mode="json"),
                    "suite": pending.suite,
                    "threads": threads,
                    "trust_remote_code": trust_remote_code,
                },
                work_dir=work,
                log_path=settings.log_path(f"settle-{digest[:12]}"),
                timeout_s=timeout_s,
                threads=threads,
                imports=IMPORTS,
                on_progress=on_progress,
            )
            write_logs(work / "report" / BUNDLE_FOLDER, store, digest, {STEP: child.log})
            stored_folder = store.put_folder(work / "report")
            attester.validated(
                digest,
                work / "report",
                stored_folder=stored_folder,
                source_digest=pending.source.digest,
                request_digest=pending.request_digest,
            )
        validated = ValidatedArtifact(
            artifact_digest=digest,
            report_uri=stored_folder.uri,
            report_digest=stored_folder.digest,
            cached=False,
            why="this machine has the device",
            **child.value,
        )
        store.put_record("report-of", digest, validated.model_dump(mode="json"))
        if not request.steps.register or validated.outcome not in ACCEPTED_OUTCOMES:
            store.put_record(WAITING, digest, {})
    # The machine that compiled may know the store by another URI.
    artifact = pending.artifact.model_copy(update={"uri": artifact_uri})
    return Settled(pending.model_copy(update={"artifact": artifact, "request": request}), validated)


def end_waiting(settled: Settled, settings: Settings) -> None:
    """Note that a settled artifact is registered. Until then, the same call settles it again."""
    store_uri, digest = split_uri(settled.pending.artifact.uri)
    open_store(store_uri, settings).put_record(WAITING, digest, {})


def register_settled(settled: Settled, settings: Settings) -> Versions:
    """Register a settled artifact as its compile request asks.

    Raises:
        VerdictError: The verdict does not allow registration.
        RegistryError: Some registries failed; settling the artifact again completes them.
    """
    pending, request = settled.pending, settled.request
    check_verdict(settled.validated, allow_warn=request.allow_warn or not request.steps.register)
    if not request.steps.register:
        return {}

    def register_one(registry_uri: str) -> ModelVersion | CompileflowError:
        try:
            return register_version(
                pending.source,
                pending.artifact,
                settled.validated,
                name=request.name,
                allow_warn=request.allow_warn,
                store_uri=split_uri(pending.artifact.uri)[0],
                registry_uri=registry_uri,
                settings=settings,
            )
        except CompileflowError as error:
            return error

    versions = register_in_each(settings.resolved_registry_uris(request.registry_uris), register_one)
    end_waiting(settled, settings)
    return versions


def _request(
    pending: PendingValidation, store_uri: str, settings: Settings, registry_uris: Sequence[str]
) -> CompileRequest:
    """Return the request of the compile, with the store and the registries of this machine.

    A writer of the store could name a registry of their own there, which would get this machine's credentials.

    Raises:
        SpecError: The request names a registry that neither the settings nor the caller names.
    """
    request = pending.request or CompileRequest(model=pending.source.uri)
    uris = tuple(registry_uris)
    if not uris:
        configured_uris = {without_credentials(uri): uri for uri in settings.resolved_registry_uris()}
        requested_uris = list(map(without_credentials, request.registry_uris))
        unknown_uris = [uri for uri in requested_uris if uri not in configured_uris]
        if unknown_uris:
            raise SpecError(
                f"The compile asked for {', '.join(unknown_uris)}, which the settings here do not name.",
                hint="If that is right, name each registry with --registry, or in COMPILEFLOW_REGISTRY_URI.",
            )
        uris = tuple(configured_uris[uri] for uri in requested_uris)
    return request.model_copy(
        update={"registry_uris": uris, "store_uri": store_uri, "aws_credentials_block": None}
    )


def _waiting(store: ArtifactStore, digest: str) -> ValidatedArtifact:
    if not store.exists(digest):
        raise IntegrityError(
            f"The store {store.uri} has no artifact {digest[:12]}.",
            hint="Set COMPILEFLOW_STORE_URI to the store of the machine that compiled it.",
        )
    waiting = report_on(store, digest, kind=WAITING)
    if waiting is None:
        last = report_on(store, digest)
        found = "no verdict" if last is None else f"the verdict {last.outcome}"
        raise SpecError(
            f"Expected an artifact with the verdict {PENDING}, but {digest[:12]} has {found}.",
            hint="Give the URI of an artifact that was compiled without its device.",
        )
    return waiting
