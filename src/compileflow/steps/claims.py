"""Claims: what the manifest says about each component, beside what the source model and the spec say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    artifact: OpenArtifact, source_model: SourceModel, source_dir: Path, requested: CompileSpec
) -> dict[str, Claims]:
    """Return what the manifest says about each component, beside what the source model and the request say.

    Older manifests lack some claims, and what `import_older` writes follows the older library.
    """
    manifest = artifact.manifest
    spec, config = manifest.spec, load_config(source_dir, trust_remote_code=artifact.trust_remote_code)
    tokenizer = None
    if spec.hf_task.takes_text:
        tokenizer = tokenizer_or_none(source_dir, trust_remote_code=artifact.trust_remote_code)
    limits = source_limits(source_model, spec, tokenizer)
    architecture = (getattr(config, "architectures", None) or ["unknown"])[0]
    claims: dict[str, Claims] = {}
    for name, record in manifest.components.items():
        component_claims: dict[str, tuple[Any, Any]] = {
            **_spec_claims(requested, spec),
            "architecture": (architecture, manifest.source.architecture),
            "precision": (spec.precision.value, record.precision.value),
            "dynamic_axes": (get_target(spec.target).capabilities.dynamic_axes, record.dynamic_axes),
        }
        component = next(component for component in spec.components if component.name == name)
        try:
            # Whether the target takes a model that no padding leaves alone was decided before the compile.
            (plan,) = plan_components(
                spec.model_copy(update={"components": (component,)}),
                get_target(spec.target),
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
        if record.attention:
            component_claims |= _graph_claims(source_model, record)
        claims[name] = component_claims
    return claims


def _spec_claims(requested: CompileSpec, actual: CompileSpec) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the request that decide the artifact, beside those of the manifest."""
    expected_fields, actual_fields = requested.model_dump(mode="json"), actual.model_dump(mode="json")
    return {f"spec.{name}": (value, actual_fields[name]) for name, value in expected_fields.items()}


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
    # Padding was measured with the attention of the compile.
    if record.attention == source_model.attention:
        claims["padding"] = (source_model.padding, record.padding)
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
