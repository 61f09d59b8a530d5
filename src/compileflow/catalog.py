"""Names of targets, sources, stores and registries, and the classes behind them; nothing is imported early."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from compileflow.contracts import ArtifactStore, ModelRegistry, ModelVersion, Source, Target
from compileflow.errors import SpecError
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
    "sqlite": "compileflow.registries.sqlite:LocalRegistry",
}


def target_names() -> tuple[str, ...]:
    """Return the names of all known targets, ours and third parties', sorted."""
    return tuple(sorted(_with_entry_points("targets")))


def get_target(name: str) -> Target:
    """Return the target of that name.

    Raises:
        SpecError: no such target; the message lists those there are.
    """
    target: Target = _load("target", TARGET_ALIASES.get(name, name), _with_entry_points("targets"))()
    return target


def get_source(scheme: str, settings: Settings) -> Source:
    """Return the source for a URI scheme, for example "hf"."""
    kind = _load("source", scheme, SOURCES)
    if scheme == "registry":
        # This source stands on registries and stores, which it can only name through the catalog above it.
        source: Source = kind(settings, resolve_reference=resolve_reference, open_store=open_store)
    else:
        source = kind(settings)
    return source


def open_store(uri: str, settings: Settings | None = None) -> ArtifactStore:
    """Open the artifact store at `uri`, for example s3://bucket/prefix; settings None: as configured."""
    kind = _load("artifact store", _scheme(uri), _with_entry_points("stores"))
    store: ArtifactStore = kind(uri, settings or get_settings())
    return store


def open_registry(uri: str, settings: Settings | None = None) -> ModelRegistry:
    """Open the model registry at `uri`, for example neptune://workspace/project; settings None: as configured."""
    kind = _load("model registry", _scheme(uri), _with_entry_points("registries"))
    found: ModelRegistry = kind(uri, settings or get_settings())
    return found


def registry_schemes() -> tuple[str, ...]:
    """Return the schemes of all registries' URIs, ours and third parties', sorted."""
    return tuple(sorted(_with_entry_points("registries")))


def parse_reference(text: str) -> Reference | None:
    """Read a reference to a registered version; see `references.parse_reference`.

    Raises:
        SpecError: the text is a reference, and its name, stage or number is not possible.
    """
    return references.parse_reference(text, registry_schemes())


def resolve_reference(text: str, settings: Settings) -> ModelVersion:
    """Ask the registry which version a reference means now.

    Raises:
        SpecError: it is no reference.
        RegistryError: there is no such name, number or stage; the hint lists what there is.
        RegistryUnavailableError: the registry did not answer.
    """
    reference = parse_reference(text)
    if reference is None:
        raise SpecError(f"{text!r} is no reference to a registered model.", hint=f"Write {references.FORMS}.")
    registry = open_registry(reference.registry_uri or settings.resolved_registry_uri(), settings)
    if reference.ref is None:
        return registry.versions(reference.name)[0]
    return registry.get(reference.name, reference.ref)


def _scheme(uri: str) -> str:
    return uri.partition(":")[0]


@cache
def _with_entry_points(kind: str) -> Mapping[str, str]:
    own = {"targets": TARGETS, "stores": STORES, "registries": REGISTRIES}[kind]
    return {point.name: point.value for point in entry_points(group=f"compileflow.{kind}")} | dict(own)


def _load(kind: str, name: str, known: Mapping[str, str]) -> Any:
    if name not in known:
        raise SpecError(f"Unknown {kind} {name!r}.", hint=f"Choose one of: {', '.join(sorted(known))}.")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
