"""The protocols that targets, sources, stores and registries implement, and the values that they exchange."""

from __future__ import annotations

from compileflow.contracts.digests import SHA256, FileRecord
from compileflow.contracts.records import Attention, Axis, ComponentRecord, Padding, TensorRecord
from compileflow.contracts.registries import (
    STAGES,
    ModelRegistry,
    ModelVersion,
    Promotion,
    Stage,
    VersionEntry,
    VersionFiles,
    without_credentials,
)
from compileflow.contracts.sources import CheckingSource, ListingSource, LocatedSource, Source, SourceVersion
from compileflow.contracts.stores import ArtifactStore, Collected, StoredFolder
from compileflow.contracts.targets import (
    Arrays,
    Availability,
    Capabilities,
    CompiledComponent,
    CompiledGraph,
    ComponentPlan,
    Continuation,
    Device,
    GeneratingRunner,
    ObservableTarget,
    Runner,
    Target,
    TargetOptions,
    WritingRunner,
)
from compileflow.contracts.verdicts import (
    ACCEPTED_OUTCOMES,
    LATENCY_ON_BUSY_MACHINE,
    OUTCOMES,
    PENDING,
    AcceptedOutcome,
    Outcome,
)

__all__ = [
    "ACCEPTED_OUTCOMES",
    "LATENCY_ON_BUSY_MACHINE",
    "OUTCOMES",
    "PENDING",
    "SHA256",
    "STAGES",
    "AcceptedOutcome",
    "Arrays",
    "ArtifactStore",
    "Attention",
    "Availability",
    "Axis",
    "Capabilities",
    "CheckingSource",
    "Collected",
    "CompiledComponent",
    "CompiledGraph",
    "ComponentPlan",
    "ComponentRecord",
    "Continuation",
    "Device",
    "FileRecord",
    "GeneratingRunner",
    "ListingSource",
    "LocatedSource",
    "ModelRegistry",
    "ModelVersion",
    "ObservableTarget",
    "Outcome",
    "Padding",
    "Promotion",
    "Runner",
    "Source",
    "SourceVersion",
    "Stage",
    "StoredFolder",
    "Target",
    "TargetOptions",
    "TensorRecord",
    "VersionEntry",
    "VersionFiles",
    "WritingRunner",
    "without_credentials",
]
