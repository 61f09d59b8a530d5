"""Build an artifact's folder: plan each component, let the target compile it, write the manifest.

This is the compile step's part that runs in a fresh process, with the model and the toolchain in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compileflow._process.child import report_progress
from compileflow._process.state import undisturbed_process
from compileflow.artifact.manifest import ArtifactManifest, SourceRecord, TargetRecord
from compileflow.catalog import get_target
from compileflow.contracts import ComponentPlan, ComponentRecord, Target
from compileflow.contracts.digests import list_files
from compileflow.errors import CompileError, SourceError, SpecError
from compileflow.source_model.interface import maximum_length
from compileflow.source_model.load import load_config
from compileflow.source_model.processor import LONGEST_S, load_processor, longest_signal, probe_signals
from compileflow.sources.files import kind_of
from compileflow.spec import CompileSpec, ComponentSpec, ShapeBucket
from compileflow.steps.calibration import Calibration, calibration_batches

_SHORTEST_BUCKET = 16
# Where batches gain on a CPU; beyond, one row keeps it busy.
_BATCH_SIZE, _BATCHED_UP_TO = 8, 128
# Folder of a graph that several components share.
_SHARED = "shared"


def build_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile all components and write the artifact's folder. Runs in a fresh process."""
    source_dir, out_dir = Path(request["source_dir"]), Path(request["out_dir"])
    spec = CompileSpec.model_validate(request["spec"])
    target = get_target(spec.target)
    report_progress(f"importing {', '.join(target.toolchain())}")
    config = load_config(source_dir, trust_remote_code=spec.trust_remote_code)
    # A model from memory may come alone; one from a folder or the Hub without its tokenizer is incomplete.
    interface = _interface(source_dir, config, spec, needs_tokenizer=request.get("needs_tokenizer", True))
    calibration = Calibration.from_json(request["calibration"]) if request.get("calibration") else None
    components: dict[str, ComponentRecord] = {}
    plans = [_plan(spec, component, target, interface, request["threads"]) for component in spec.components]
    # Components differ in nothing but their lengths: one graph, stored once, serves them all.
    whole = _union(plans)
    if calibration is not None:
        whole = replace(
            whole,
            calibration=calibration_batches(
                calibration.examples,
                interface.tokenizer,
                task=spec.hf_task,
                max_length=whole.max_sequence_length,
                pad_token_id=config.pad_token_id or 0,
            ),
        )
    folder = f"components/{whole.name}"
    (out_dir / folder).mkdir(parents=True)
    with undisturbed_process():
        graph = target.compile(source_dir, whole, out_dir / folder)
    written = {record.path for record in list_files(out_dir / folder)}
    if written != set(graph.files):
        raise CompileError(
            f"{target.name} wrote {sorted(written)} and named {sorted(graph.files)}.", hint="Mend the target."
        )
    for plan in plans:
        components[plan.name] = ComponentRecord(
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
            frame_convolutions=graph.frame_convolutions,
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


@dataclass(frozen=True)
class _Interface:
    """What a source model takes, as far as its shapes go.

    Attributes:
        tokenizer: Of text models.
        positions: Longest row that the model has positions for; None where there is no such limit.
        usual: Longest row where nobody says.
        default_buckets: Of static targets, given the longest row.
        padding_counts: True where a padded row is answered otherwise than a bare one.
    """

    tokenizer: Any
    positions: int | None
    usual: int
    default_buckets: Callable[[int], tuple[ShapeBucket, ...]]
    padding_counts: bool = False


def _interface(source_dir: Path, config: Any, spec: CompileSpec, *, needs_tokenizer: bool) -> _Interface:
    modality = spec.hf_task.modality
    if modality == "text":
        tokenizer = _tokenizer(source_dir, spec.trust_remote_code) if needs_tokenizer else None
        usual = maximum_length(config, _tokenizer_maximum(tokenizer))
        return _Interface(tokenizer, maximum_length(config, None), usual, default_buckets)
    processor = load_processor(source_dir, modality, trust_remote_code=spec.trust_remote_code)
    inputs = processor(probe_signals(processor)[:1])
    usual = longest_signal(processor)
    if usual == 1:
        return _Interface(None, 1, 1, _image_buckets)
    # Seconds, in what the graph counts a row's length in.
    second = usual // LONGEST_S
    return _Interface(
        None, None, usual, partial(_audio_buckets, second), padding_counts="attention_mask" not in inputs
    )


def _image_buckets(longest: int) -> tuple[ShapeBucket, ...]:
    return tuple(ShapeBucket(batch_size=rows, sequence_length=longest) for rows in (1, _BATCH_SIZE))


def _audio_buckets(second: int, longest: int) -> tuple[ShapeBucket, ...]:
    lengths = [length for length in (second << power for power in range(16)) if length < longest]
    return tuple(ShapeBucket(batch_size=1, sequence_length=length) for length in (*lengths, longest))


def _plan(
    spec: CompileSpec, component: ComponentSpec, target: Target, interface: _Interface, threads: int
) -> ComponentPlan:
    buckets = component.shape_buckets
    asked = component.max_sequence_length or max((b.sequence_length for b in buckets), default=None)
    if asked is not None and interface.positions is not None and asked > interface.positions:
        raise SpecError(
            f"A sequence length of {asked} was asked for; the model has positions for {interface.positions} "
            "tokens.",
            hint=f"Ask for {interface.positions} or fewer.",
        )
    longest = asked or interface.usual
    if target.capabilities.dynamic_axes:
        buckets = ()
    elif interface.padding_counts:
        raise SpecError(
            f"{target.name} pads to fixed shapes, and this model has no attention mask: padding would change its "
            "answers.",
            hint="Choose a target with dynamic axes; `compileflow targets --json` lists them.",
        )
    return ComponentPlan(
        name=component.name,
        hf_task=spec.hf_task,
        precision=spec.precision,
        max_sequence_length=longest,
        shape_buckets=buckets
        if buckets or target.capabilities.dynamic_axes
        else interface.default_buckets(longest),
        options=spec.target_options,
        trust_remote_code=spec.trust_remote_code,
        threads=threads,
    )


def _union(plans: Sequence[ComponentPlan]) -> ComponentPlan:
    """Return one plan with the shapes of all."""
    if len(plans) == 1:
        return plans[0]
    return replace(
        plans[0],
        name=_SHARED,
        max_sequence_length=max(plan.max_sequence_length for plan in plans),
        shape_buckets=tuple(dict.fromkeys(bucket for plan in plans for bucket in plan.shape_buckets)),
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
    if tokenizer is None:
        return None
    # transformers writes a number of the order 1e30 where a tokenizer knows no maximum.
    maximum = tokenizer.model_max_length
    return int(maximum) if maximum < 1_000_000 else None


def _copy_interface(source_dir: Path, out_dir: Path) -> None:
    """Copy what the Hugging Face classes read: configuration, tokenizer, code; never the weights."""
    for record in list_files(source_dir):
        if kind_of(record.path) in ("config", "tokenizer", "code"):
            (out_dir / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, out_dir / record.path)
