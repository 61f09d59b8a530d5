"""Claims: what the manifest says about each component, beside what the source model and the spec say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compileflow.artifact.manifest import ArtifactManifest, TargetRecord
from compileflow.artifact.open import OpenArtifact
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord, TensorRecord
from compileflow.errors import SpecError
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, tokenizer_or_none
from compileflow.spec import CompileSpec, ShapeBucket
from compileflow.steps.plan import plan_components, source_limits
from compileflow.validation.measure.interface import Claims


def expected_claims(
    artifact: OpenArtifact,
    source_model: SourceModel,
    source_dir: Path,
    requested: CompileSpec | None,
    *,
    source_digest: str = "",
) -> dict[str, Claims]:
    """Return what the manifest says about each component, beside what the source model and the request say.

    Older manifests lack some claims, and what `import_older` writes follows the older library. The place of the
    source model is not compared: the same files from another place are the same artifact.

    Args:
        artifact: The artifact.
        source_model: The source model.
        source_dir: Folder of the source model.
        requested: Spec that the artifact was compiled for; None if unknown. With it, the toolchain must be that of
            this machine, as for the cache of the compile step.
        source_digest: Digest of the source model; "" if unknown.
    """
    manifest = artifact.manifest
    spec, config = manifest.spec, load_config(source_dir, trust_remote_code=artifact.trust_remote_code)
    tokenizer = None
    if spec.hf_task.takes_text:
        tokenizer = tokenizer_or_none(source_dir, trust_remote_code=artifact.trust_remote_code)
    limits = source_limits(source_model, spec, tokenizer)
    architecture = (getattr(config, "architectures", None) or ["unknown"])[0]
    target = get_target(spec.target)
    shared_claims: dict[str, tuple[Any, Any]] = {"target.name": (spec.target, manifest.target.name)}
    if source_digest:
        shared_claims["source.digest"] = (source_digest, manifest.source.digest)
    if requested is not None:
        shared_claims |= _spec_claims(requested, spec) | _target_claims(TargetRecord.of(target), manifest.target)
    claims: dict[str, Claims] = {}
    for name, record in manifest.components.items():
        component_claims: dict[str, tuple[Any, Any]] = {
            **shared_claims,
            "architecture": (architecture, manifest.source.architecture),
            "precision": (spec.precision.value, record.precision.value),
            "dynamic_axes": (target.capabilities.dynamic_axes, record.dynamic_axes),
        }
        # Optional attribute of a target: names of the files that it writes for each component.
        if expected_files := getattr(target, "component_files", None):
            component_claims["further files"] = ("none", _further_files(manifest, record, expected_files))
        component = next(component for component in spec.components if component.name == name)
        try:
            # Whether the target takes a model that no padding leaves alone was decided before the compile.
            (plan,) = plan_components(
                spec.model_copy(update={"components": (component,)}),
                target,
                limits,
                threads=1,
                rows_fill_shapes=True,
            )
            component_claims |= {
                "max_sequence_length": (plan.max_sequence_length, record.max_sequence_length),
                "shape_buckets": (_listed(plan.shape_buckets), _listed(record.shape_buckets)),
            }
        except SpecError as error:
            component_claims["max_sequence_length"] = (error.message, record.max_sequence_length)
        # Manifests without these three are older, imported, or of a target that does not know them.
        if record.attention or record.padding is not None or record.vocab_size:
            component_claims |= _graph_claims(source_model, record)
        claims[name] = component_claims
    return claims


def _spec_claims(requested: CompileSpec, actual: CompileSpec) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the request that decide the artifact, beside those of the manifest."""
    expected_fields, actual_fields = requested.model_dump(mode="json"), actual.model_dump(mode="json")
    return {f"spec.{name}": (value, actual_fields[name]) for name, value in expected_fields.items()}


def _target_claims(expected: TargetRecord, actual: TargetRecord) -> dict[str, tuple[Any, Any]]:
    versions, claimed_versions = expected.toolchain, actual.toolchain
    return {
        "target.version": (expected.version, actual.version),
        "target.cpu_features": (expected.cpu_features, actual.cpu_features),
        **{
            f"target.toolchain.{name}": (versions.get(name), claimed_versions.get(name))
            for name in versions | claimed_versions
        },
    }


def _further_files(manifest: ArtifactManifest, record: ComponentRecord, expected_files: Sequence[str]) -> str:
    """List the files in the folder of a component that its target does not write. A load misses the others."""
    names = {file.path for file in manifest.files if file.path.startswith(f"{record.folder}/")}
    return ", ".join(sorted(names - {f"{record.folder}/{name}" for name in expected_files})) or "none"


def _graph_claims(source_model: SourceModel, record: ComponentRecord) -> dict[str, tuple[Any, Any]]:
    """Return the claims about the graph: names and axes of its inputs and outputs, class, tokens, padding."""
    claims: dict[str, tuple[Any, Any]] = {
        "inputs": (_tensors(source_model.inputs), _tensors(record.inputs)),
        "outputs": (_tensors(source_model.outputs), _tensors(record.outputs)),
        "output_class": (source_model.output_class, record.output_class),
        "pad_token_id": (source_model.pad_token_id, record.pad_token_id),
        "vocab_size": (source_model.vocab_size, record.vocab_size),
        "frame_convolutions": (source_model.frame_convolutions, record.frame_convolutions),
    }
    # Padding was measured with the attention of the compile, which may have had to give up sdpa.
    if record.attention == source_model.attention:
        claims["padding"] = (source_model.padding, record.padding)
    elif record.attention != "eager":
        claims["attention"] = (source_model.attention, record.attention)
    return claims


def _tensors(records: Sequence[TensorRecord]) -> str:
    return ", ".join(
        f"{record.name} ({record.dtype}: {' x '.join(map(str, record.axes))}"
        + (f", below {record.below})" if record.below else ")")
        for record in records
    )


def _listed(buckets: Sequence[ShapeBucket]) -> str:
    return ", ".join(sorted(map(str, buckets))) or "none"


def claimed_length(claims: Claims) -> int:
    """Return the longest row that a component must take."""
    expected, actual = claims["max_sequence_length"]
    return expected if isinstance(expected, int) else int(actual)
