"""Build an artifact's folder: plan the components, let the target compile them, write the manifest.

The compile step runs this module in a child process, with the model and the toolchain in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compileflow._process.child_process import report_progress
from compileflow._process.state import undisturbed_process
from compileflow.artifact.manifest import ArtifactManifest, SourceRecord, TargetRecord
from compileflow.catalog import get_target
from compileflow.contracts import CompiledComponent, ComponentPlan, ComponentRecord, Target
from compileflow.contracts.digests import list_files
from compileflow.errors import CompileError, SourceError, first_line
from compileflow.source_model.load import load_config
from compileflow.sources.files import kind_of
from compileflow.spec import CompileSpec
from compileflow.steps.calibration import Calibration, calibration_batches
from compileflow.steps.plan import merge_plans, plan_components, source_limits


def build_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile all components and write the artifact's folder. Runs in a child process.

    Args:
        request: What `steps.compile` sends. "needs_tokenizer" is False for a model that was in memory, which may
            have no tokenizer.

    Raises:
        SpecError: The spec does not fit the model or the target.
        SourceError: The source model cannot be loaded.
        CompileError: The target refused the model.
    """
    source_dir, out_dir = Path(request["source_dir"]), Path(request["out_dir"])
    spec = CompileSpec.model_validate(request["spec"])
    target = get_target(spec.target)
    report_progress(f"importing {', '.join(target.toolchain())}")
    config = load_config(source_dir, trust_remote_code=spec.trust_remote_code)
    tokenizer = None
    if spec.hf_task.modality == "text" and request.get("needs_tokenizer", True):
        tokenizer = _load_tokenizer(source_dir, spec.trust_remote_code)
    limits = source_limits(source_dir, config, spec, tokenizer)
    plans = plan_components(spec, target, limits, threads=request["threads"])
    merged_plan = merge_plans(plans)
    calibration = Calibration.from_json(request["calibration"]) if request.get("calibration") else None
    if calibration is not None:
        batches = calibration_batches(
            calibration.examples,
            tokenizer,
            task=spec.hf_task,
            max_length=merged_plan.max_sequence_length,
            pad_token_id=config.pad_token_id or 0,
        )
        merged_plan = replace(merged_plan, calibration=batches)
    folder = f"components/{merged_plan.name}"
    compiled_component = _compile(target, source_dir, merged_plan, out_dir / folder)
    report_progress("writing the manifest")
    _copy_interface_files(source_dir, out_dir)
    _write_manifest(
        out_dir,
        spec=spec,
        source=SourceRecord(
            **request["source"], architecture=(getattr(config, "architectures", None) or ["unknown"])[0]
        ),
        target=target,
        components=_component_records(
            plans, compiled_component, folder, dynamic_axes=target.capabilities.dynamic_axes
        ),
        calibration=calibration,
    )
    return {}


def _load_tokenizer(source_dir: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    hint = "Save the tokenizer into the model's folder with save_pretrained."
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # The Rust library behind fast tokenizers raises bare exceptions.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SourceError(f"The source model's tokenizer cannot be loaded: {reason}.", hint=hint) from error
    # Without tokenizer files, transformers returns a tokenizer that has only special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise SourceError(
            f"The source model's tokenizer has no vocabulary: it has {len(tokenizer)} tokens, all special.",
            hint=hint,
        )
    return tokenizer


def _compile(target: Target, source_dir: Path, plan: ComponentPlan, folder: Path) -> CompiledComponent:
    folder.mkdir(parents=True)
    with undisturbed_process():
        compiled_component = target.compile(source_dir, plan, folder)
    written_files = {record.path for record in list_files(folder)}
    if written_files != set(compiled_component.files):
        raise CompileError(
            f"Expected the files {sorted(compiled_component.files)} that {target.name} named, "
            f"got {sorted(written_files)}.",
            hint="Fix the target: its CompiledComponent must name every file that it writes, and no other.",
        )
    return compiled_component


def _component_records(
    plans: Sequence[ComponentPlan], compiled_component: CompiledComponent, folder: str, *, dynamic_axes: bool
) -> dict[str, ComponentRecord]:
    return {
        plan.name: ComponentRecord(
            folder=folder,
            inputs=compiled_component.inputs,
            outputs=compiled_component.outputs,
            output_class=compiled_component.output_class,
            max_sequence_length=plan.max_sequence_length,
            dynamic_axes=dynamic_axes,
            shape_buckets=plan.shape_buckets,
            pad_token_id=compiled_component.pad_token_id,
            precision=plan.precision,
            load_options=dict(compiled_component.load_options),
            frame_convolutions=compiled_component.frame_convolutions,
        )
        for plan in plans
    }


def _copy_interface_files(source_dir: Path, out_dir: Path) -> None:
    """Copy the files that the Hugging Face classes read: configuration, tokenizer and code, not the weights."""
    for record in list_files(source_dir):
        if kind_of(record.path) in ("config", "tokenizer", "code"):
            (out_dir / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, out_dir / record.path)


def _write_manifest(
    out_dir: Path,
    *,
    spec: CompileSpec,
    source: SourceRecord,
    target: Target,
    components: dict[str, ComponentRecord],
    calibration: Calibration | None,
) -> None:
    ArtifactManifest(
        spec=spec,
        source=source,
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
