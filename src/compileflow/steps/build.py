"""Build an artifact's folder: plan each component, let the target compile it, write the manifest.

This is the compile step's part that runs in a fresh process, with the model and the toolchain in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compileflow.catalog import get_target
from compileflow.contracts import ComponentPlan, Target
from compileflow.digests import list_files
from compileflow.errors import CompileError, SourceError, SpecError
from compileflow.isolation import report_progress
from compileflow.manifest import ArtifactManifest, ComponentRecord, SourceRecord, TargetRecord
from compileflow.process_state import undisturbed_process
from compileflow.source_graph import load_config, maximum_length
from compileflow.sources.files import kind_of
from compileflow.spec import CompileSpec, ComponentSpec, ShapeBucket
from compileflow.steps.calibration import Calibration, calibration_batches

_SHORTEST_BUCKET = 16
# Where batches gain on a CPU; beyond, one row keeps it busy.
_BATCH_SIZE, _BATCHED_UP_TO = 8, 128


def build_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile all components and write the artifact's folder. Runs in a fresh process."""
    source_dir, out_dir = Path(request["source_dir"]), Path(request["out_dir"])
    spec = CompileSpec.model_validate(request["spec"])
    target = get_target(spec.target)
    report_progress(f"importing {', '.join(target.toolchain())}")
    config = load_config(source_dir, trust_remote_code=spec.trust_remote_code)
    tokenizer = _tokenizer(source_dir, spec.trust_remote_code)
    calibration = Calibration.from_json(request["calibration"]) if request.get("calibration") else None
    components = {}
    for component in spec.components:
        plan = _plan(spec, component, target, config, _tokenizer_maximum(tokenizer), request["threads"])
        if calibration is not None:
            plan = replace(
                plan,
                calibration=calibration_batches(
                    calibration.examples,
                    tokenizer,
                    task=spec.hf_task,
                    max_length=plan.max_sequence_length,
                    pad_token_id=config.pad_token_id or 0,
                ),
            )
        folder = f"components/{component.name}"
        (out_dir / folder).mkdir(parents=True)
        with undisturbed_process():
            graph = target.compile(source_dir, plan, out_dir / folder)
        written = {record.path for record in list_files(out_dir / folder)}
        if written != set(graph.files):
            raise CompileError(
                f"{target.name} wrote {sorted(written)} and named {sorted(graph.files)}.",
                hint="Mend the target.",
            )
        components[component.name] = ComponentRecord(
            folder=folder,
            inputs=graph.inputs,
            outputs=graph.outputs,
            output_class=graph.output_class,
            max_sequence_length=plan.max_sequence_length,
            dynamic_axes=target.capabilities.dynamic_axes,
            shape_buckets=plan.shape_buckets,
            pad_token_id=graph.pad_token_id,
            precision=plan.precision,
            load_options=dict(graph.load_options),
        )
    report_progress("writing the manifest")
    _copy_interface(source_dir, out_dir)
    architectures = getattr(config, "architectures", None) or ["unknown"]
    ArtifactManifest(
        spec=spec,
        source=SourceRecord(**request["source"], architecture=architectures[0]),
        target=TargetRecord(
            name=target.name,
            version=target.version,
            toolchain=target.toolchain(),
            cpu_features=target.cpu_features(),
        ),
        components=components,
        files=list_files(out_dir),
        calibration=calibration.record if calibration else None,
    ).write(out_dir)
    return {}


def default_buckets(longest: int) -> tuple[ShapeBucket, ...]:
    """Return batch 1 at powers of two from 16 tokens up to the longest, and batch 8 at those up to 128."""
    lengths = [_SHORTEST_BUCKET << power for power in range(16) if _SHORTEST_BUCKET << power < longest]
    return tuple(
        ShapeBucket(batch_size=batch_size, sequence_length=length)
        for length in (*lengths, longest)
        for batch_size in (1, _BATCH_SIZE)
        if batch_size == 1 or length <= _BATCHED_UP_TO
    )


def _plan(
    spec: CompileSpec,
    component: ComponentSpec,
    target: Target,
    config: Any,
    tokenizer_maximum: int | None,
    threads: int,
) -> ComponentPlan:
    positions = maximum_length(config, None)
    buckets = component.shape_buckets
    asked = component.max_sequence_length or max((b.sequence_length for b in buckets), default=None)
    if asked is not None and asked > positions:
        raise SpecError(
            f"A sequence length of {asked} was asked for; the model has positions for {positions} tokens.",
            hint=f"Ask for {positions} or fewer.",
        )
    longest = asked or maximum_length(config, tokenizer_maximum)
    if target.capabilities.dynamic_axes:
        buckets = ()
    return ComponentPlan(
        name=component.name,
        hf_task=spec.hf_task,
        precision=spec.precision,
        max_sequence_length=longest,
        shape_buckets=buckets if buckets or target.capabilities.dynamic_axes else default_buckets(longest),
        options=spec.target_options,
        trust_remote_code=spec.trust_remote_code,
        threads=threads,
    )


def _tokenizer(source_dir: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"The source model's tokenizer cannot be loaded: {error}",
            hint="Save the tokenizer into the model's folder, with save_pretrained.",
        ) from error
    # Where there are no tokenizer files, transformers makes a tokenizer that knows no word.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise SourceError(
            f"The source model's tokenizer has no vocabulary: it knows {len(tokenizer)} tokens, all special.",
            hint="Save the tokenizer into the model's folder, with save_pretrained.",
        )
    return tokenizer


def _tokenizer_maximum(tokenizer: Any) -> int | None:
    # transformers writes a number of the order 1e30 where a tokenizer knows no maximum.
    maximum = tokenizer.model_max_length
    return int(maximum) if maximum < 1_000_000 else None


def _copy_interface(source_dir: Path, out_dir: Path) -> None:
    """Copy what the Hugging Face classes read: configuration, tokenizer, code; never the weights."""
    for record in list_files(source_dir):
        if kind_of(record.path) in ("config", "tokenizer", "code"):
            (out_dir / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, out_dir / record.path)
