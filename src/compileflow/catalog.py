"""The catalog: names of targets, sources, stores and registries, and the classes behind the names.

Each name stands for a "module:Class" string, which is imported when the name is first used. Such a string is an
import, and imports go one way: only this module holds such strings, and each of them names a plugin in the band
below. A third party adds a target, a store or a registry by an entry point in the group `compileflow.targets`,
`compileflow.stores` or `compileflow.registries`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from compileflow.contracts import ArtifactStore, ModelRegistry, ModelVersion, Source, Target
from compileflow.errors import SpecError, first_line
from compileflow.registries import references
from compileflow.registries.references import Reference
from compileflow.settings import Settings, get_settings
from compileflow.spec import TARGET_ALIASES

TARGETS: Mapping[str, str] = {
    "aot-inductor": "compileflow.targets.aot_inductor:AotInductorTarget",
    "blade": "compileflow.targets.blade:BladeTarget",
    "hyperdex": "compileflow.targets.hyperdex:HyperdexTarget",
    "neuron": "compileflow.targets.neuron:NeuronTarget",
    "neuronx": "compileflow.targets.neuronx:NeuronxTarget",
    "onnx-runtime": "compileflow.targets.onnx_runtime:OnnxRuntimeTarget",
    "openvino": "compileflow.targets.open_vino:OpenVinoTarget",
    "torchscript": "compileflow.targets.torchscript:TorchScriptTarget",
}
SOURCES: Mapping[str, str] = {
    "file": "compileflow.sources.folder:FolderSource",
    "hf": "compileflow.sources.hub:HubSource",
    "mlflow": "compileflow.sources.mlflow_version:MlflowSource",
    "neptune": "compileflow.sources.neptune_version:NeptuneSource",
    "registry": "compileflow.sources.registered_version:RegisteredVersionSource",
}
STORES: Mapping[str, str] = {
    "file": "compileflow.stores.local:LocalStore",
    "s3": "compileflow.stores.s3.store:S3Store",
}
REGISTRIES: Mapping[str, str] = {
    "mlflow": "compileflow.registries.mlflow.registry:MlflowRegistry",
    "neptune": "compileflow.registries.neptune.registry:NeptuneRegistry",
    "sqlite": "compileflow.registries.sqlite:SqliteRegistry",
}


def target_names() -> tuple[str, ...]:
    """Return the names of all targets, including those of third parties, sorted."""
    return tuple(sorted(_with_entry_points("targets")))


def is_target(name: str) -> bool:
    """Return whether a target has this name, or had it in older specs, even if its class cannot be imported."""
    return TARGET_ALIASES.get(name, name) in _with_entry_points("targets")


def get_target(name: str) -> Target:
    """Return the target with this name.

    Raises:
        SpecError: The target is unknown, or the class of a third party cannot be imported.
    """
    target: Target = _load("target", TARGET_ALIASES.get(name, name), _with_entry_points("targets"))()
    return target


def get_source(scheme: str, settings: Settings) -> Source:
    """Return the source for a URI scheme, for example "hf".

    Raises:
        SpecError: The scheme is unknown. The hint lists the known schemes.
    """
    kind = _load("source", scheme, SOURCES)
    if scheme == "registry":
        # This source needs registries and stores by name, but sources must not import the catalog above them.
        source: Source = kind(settings, resolve_reference=resolve_reference, open_store=open_store)
    else:
        source = kind(settings)
    return source


def open_store(uri: str, settings: Settings | None = None) -> ArtifactStore:
    """Open the artifact store at a URI, for example s3://bucket/prefix; settings None means the configured ones.

    Raises:
        SpecError: The scheme is unknown, or the URI is not valid for its scheme.
    """
    kind = _load("artifact store", _scheme(uri), _with_entry_points("stores"))
    store: ArtifactStore = kind(uri, settings or get_settings())
    return store


def open_registry(uri: str, settings: Settings | None = None) -> ModelRegistry:
    """Open the model registry at a URI, for example sqlite:///FILE; settings None means the configured ones.

    Raises:
        SpecError: The scheme is unknown, or the URI is not valid for its scheme.
    """
    kind = _load("model registry", _scheme(uri), _with_entry_points("registries"))
    registry: ModelRegistry = kind(uri, settings or get_settings())
    return registry


def registry_schemes() -> tuple[str, ...]:
    """Return the URI schemes of all registries, including those of third parties, sorted."""
    return tuple(sorted(_with_entry_points("registries")))


def parse_reference(text: str) -> Reference | None:
    """Read a reference to a registered version, as `references.parse_reference`, with the known URI schemes.

    Raises:
        SpecError: The text is a reference, but its name, stage or number is invalid.
    """
    return references.parse_reference(text, registry_schemes())


def resolve_reference(text: str, settings: Settings) -> ModelVersion:
    """Ask the registry for the version that a reference means now.

    Raises:
        SpecError: The text is not a reference.
        RegistryError: The registry has no such name, number or stage. The hint lists the existing ones.
        RegistryUnavailableError: The registry did not answer.
    """
    reference = parse_reference(text)
    if reference is None:
        raise SpecError(f"{text!r} is not a reference to a registered model.", hint=f"Write {references.FORMS}.")
    registry = open_registry(reference.registry_uri or settings.resolved_registry_uri(), settings)
    if reference.ref is None:
        return registry.versions(reference.name)[0]
    return registry.get(reference.name, reference.ref)


def _scheme(uri: str) -> str:
    return uri.partition(":")[0]


@cache
def _with_entry_points(kind: str) -> Mapping[str, str]:
    built_in = {"targets": TARGETS, "stores": STORES, "registries": REGISTRIES}[kind]
    # A third party cannot replace a built-in class.
    return {point.name: point.value for point in entry_points(group=f"compileflow.{kind}")} | dict(built_in)


def _load(kind: str, name: str, classes: Mapping[str, str]) -> Any:
    if name not in classes:
        prefix = "Choose one of" if kind == "target" else "Write a URI whose scheme is one of"
        raise SpecError(f"Unknown {kind} {name!r}.", hint=f"{prefix}: {', '.join(sorted(classes))}.")
    module, _, attribute = classes[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        if module.startswith("compileflow."):
            raise
        raise SpecError(
            f"The {kind} {name!r} cannot be imported from {classes[name]}: {first_line(error)}.",
            hint="Update or uninstall the distribution that provides it.",
        ) from error
