"""Checks before a run: refuse in the first second what would otherwise fail after minutes of work."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from compileflow._process.folders import check_writable, os_errors
from compileflow._process.packages import installed_versions
from compileflow.catalog import (
    get_source,
    get_target,
    open_registry,
    open_store,
    parse_reference,
    resolve_reference,
)
from compileflow.contracts import CheckingSource
from compileflow.errors import MissingPackageError, RegistryError, RegistryUnavailableError, SourceError, SpecError
from compileflow.registries.sqlite import SqliteRegistry
from compileflow.settings import Settings
from compileflow.sources.files import CONFIG, read_errors
from compileflow.sources.folder import local_path
from compileflow.sources.gguf_file import check_gguf, is_gguf
from compileflow.sources.hub import HubSource
from compileflow.spec import HfTask
from compileflow.steps.compile import check_available, checked_target, spec_of, timed_shapes
from compileflow.steps.fetch import scheme_of
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.source_checks import check_lengths, check_model_type, check_source, read_config
from compileflow.steps.validate import check_libraries
from compileflow.stores.local import LocalStore
from compileflow.validation.judge import load_user_suite
from compileflow.validation.project_tests import check_tests

_EXTRA = re.compile(r"compileflow\[([a-z0-9,-]+)\]")
# Extras by the scheme of a store or a registry.
_SCHEMES = {"s3": "s3", "neptune": "neptune", "mlflow": "mlflow"}


def check_request(request: CompileRequest, settings: Settings, *, extras: Collection[str] = ()) -> None:
    """Check the model's folder, the target with its options and toolchain, extras, files, stores and registries.

    The checks import nothing that takes long, and ask no server.

    Args:
        request: The request.
        settings: Default store and registries.
        extras: Extras of compileflow that the caller needs as well.

    Raises:
        StoreError: The home folder or the local store cannot be written.
        RegistryError: No registry can be written, because the files are not registries or are not writable; or a
            registry on this machine does not have the version that the request names as its model.
        SourceError: The model's folder does not hold a model that transformers loads, the location of a registered
            version is wrong, or only a Hub model has a revision.
        SpecError: The model does not suit the task or the lengths, the target does
            not have an option, a file of examples does not exist, the user's suite or folder of tests cannot be
            used, or the URI of a store or registry is wrong.
        MissingPackageError: Some extras are not installed.
        TargetUnavailableError: The target's toolchain is missing, or this machine lacks the precision.
        MeasurementError: A library that the validate step needs is missing.
    """
    _check_home(settings.home_dir)
    folder = _checked_model(request, settings) if request.steps.fetch else None
    _check_extras(request, settings, extras)
    if request.target != AUTO:
        target = get_target(request.target)
        checked_target(request.spec_for(request.hf_task or target.capabilities.hf_tasks[0]))
        if request.steps.compile:
            check_available(target, request.precision)
    _check_places(request, settings)
    if request.steps.validate:
        check_libraries()
        _check_exists(request.validation.examples_path, "examples", "--examples")
        _check_suite(request, request.hf_task)
        if request.validation.tests_path is not None:
            check_tests(request.validation.tests_path)
    if request.steps.compile:
        _check_exists(request.calibration.examples_path, "calibration examples", "--calibration")
        if folder is not None:
            with read_errors():
                _check_source(folder, request)


def check_hub_model(request: CompileRequest, settings: Settings, *, files: Sequence[str] = CONFIG) -> None:
    """Refuse a Hub model that its configuration rules out, before its weights are downloaded.

    Args:
        request: The request.
        settings: Hub endpoint and token.
        files: Patterns of the files to download for the check.

    Raises:
        SourceError: The Hub does not have the model, or transformers does not load it.
        SpecError: The model does not suit the task or the lengths.
    """
    source = HubSource(settings)
    if not request.steps.compile:
        source.pin(request.model, request.revision)
        return
    with TemporaryDirectory() as folder:
        _check_source(
            source.preview(request.model, request.revision, Path(folder), patterns=files).folder, request
        )


def _check_home(home: Path) -> None:
    """Check that the home folder can be made or written, without making it."""
    with os_errors(home, "write to"):
        check_writable(home)


def _check_places(request: CompileRequest, settings: Settings) -> None:
    """Check the store and the registries, as far as that needs no server."""
    store = open_store(settings.resolved_store_uri(request.store_uri), settings)
    # A store that is read-only may hold everything already.
    if isinstance(store, LocalStore) and not store.root.is_dir():
        with os_errors(store.root, "write to the store"):
            check_writable(store.root)
    uris = settings.resolved_registry_uris(request.registry_uris) if request.steps.register else ()
    errors = []
    for registry in [open_registry(uri, settings) for uri in uris]:
        try:
            if isinstance(registry, SqliteRegistry):
                registry.check_writable()
        except RegistryError as error:
            errors.append(error)
    # A registry that fails does not stop the others, and the next run completes it.
    if errors and len(errors) == len(uris):
        raise errors[0]


def _checked_model(request: CompileRequest, settings: Settings) -> Path | None:
    """Check the name of the model, and return its folder if it is on this machine."""
    scheme = scheme_of(request.model)
    source = get_source(scheme, settings)
    if scheme == "file":
        path = local_path(request.model)
        if is_gguf(path):
            source.pin(request.model, request.revision)
            check_gguf(path)
            return None
        # Chooses the files of the model, and copies nothing.
        return source.locate(request.model, request.revision, settings.work_dir).folder
    if scheme != "hf" and request.revision is not None:
        raise SourceError(
            f"{request.model} has no revision {request.revision!r}: only a Hub model has revisions.",
            hint="Leave the revision empty.",
        )
    if isinstance(source, CheckingSource):
        source.check(request.model, request.revision)
    _check_reference(request.model, settings)
    return None


def _check_reference(model: str, settings: Settings) -> None:
    """Refuse a malformed reference to a registered version, and one that a registry on this machine lacks."""
    reference = parse_reference(model)
    if reference is None:
        return
    registry = open_registry(reference.registry_uri or settings.resolved_registry_uri(), settings)
    if isinstance(registry, SqliteRegistry):
        # The run asks a busy registry again.
        with suppress(RegistryUnavailableError):
            resolve_reference(model, settings)


def _check_source(folder: Path, request: CompileRequest) -> None:
    """Refuse what the model's folder rules out; the compile step checks a model from elsewhere."""
    spec = spec_of(request, folder)
    check_source(folder, spec)
    if request.steps.validate:
        _check_suite(request, spec.hf_task)
    target = None if request.target == AUTO else checked_target(spec)
    if target is not None:
        check_model_type(target, spec.hf_task, read_config(folder))
    check_lengths(folder, spec, target, timed_shapes=timed_shapes(request))


def _check_extras(request: CompileRequest, settings: Settings, extras: Collection[str]) -> None:
    missing = {extra: packages for extra in _extras_of(request, settings) if (packages := _missing_from(extra))}
    missing |= {extra: packages for extra in extras if (packages := _missing_from(extra))}
    if missing:
        names = list(dict.fromkeys(name for packages in missing.values() for name in packages))
        raise MissingPackageError(
            f"This run needs {', '.join(names)}, which {'is' if len(names) == 1 else 'are'} not installed.",
            hint=f"Run: pip install 'compileflow[{','.join(missing)}]'",
        )


def _extras_of(request: CompileRequest, settings: Settings) -> Iterator[str]:
    if request.target != AUTO and request.steps.compile:
        availability = get_target(request.target).probe()
        if not availability.can_compile:
            for names in _EXTRA.findall(availability.hint):
                yield from names.split(",")
    if request.steps.validate:
        yield "validation"
        if request.validation.tests_path is not None:
            yield "project-tests"
    uris = [settings.resolved_store_uri(request.store_uri), request.model]
    if request.steps.register:
        uris += settings.resolved_registry_uris(request.registry_uris)
    for uri in uris:
        if uri.partition(":")[0] in _SCHEMES:
            yield _SCHEMES[uri.partition(":")[0]]
    if settings.signing_key is not None:
        yield "signing"


def _check_suite(request: CompileRequest, hf_task: HfTask | None) -> None:
    """Check the user's suite, as far as the task is known; the outputs are known once the model is loaded."""
    if request.validation.suite_path is not None:
        suite = load_user_suite(request.validation.suite_path)
        if hf_task is not None:
            suite.check(hf_task, None if request.target == AUTO else request.precision)


def _missing_from(extra: str) -> list[str]:
    """Return the distributions of one of compileflow's extras that are not installed."""
    names = list(_packages_of(extra, [Requirement(line) for line in requires("compileflow") or ()]))
    versions = installed_versions(names)
    return [name for name in names if name not in versions]


def _packages_of(extra: str, requirements: Sequence[Requirement]) -> Iterator[str]:
    """Yield the distributions of an extra and of the extras that it includes."""
    for requirement in requirements:
        marker = requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        if requirement.name == "compileflow":
            for included in sorted(requirement.extras):
                yield from _packages_of(included, requirements)
        else:
            yield requirement.name


def _check_exists(path: str | None, what: str, option: str) -> None:
    if path is not None and not Path(path).expanduser().exists():
        raise SpecError(f"The {what} {path} do not exist.", hint=f"Check the path of {option}.")
