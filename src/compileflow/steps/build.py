"""Build an artifact's folder: plan the components, let the target compile them, write the manifest.

The compile step runs this module in a child process, with the model and the toolchain in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compileflow._process.child_process import report_progress
from compileflow._process.state import undisturbed_process
from compileflow.artifact.manifest import ArtifactManifest, SourceRecord, TargetRecord
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord, Target
from compileflow.contracts.digests import list_files
from compileflow.errors import SourceError
from compileflow.source_model.load import load_config, load_tokenizer, loaded_once
from compileflow.source_model.sentence_modules import write_module_weights
from compileflow.sources.files import is_interface_file
from compileflow.spec import CompileSpec, ShapeBucket
from compileflow.steps.calibration import Calibration, calibration_batches
from compileflow.steps.graph import compile_graph, component_record
from compileflow.steps.padded_texts import check_padding
from compileflow.steps.plan import check_timed_shapes, merge_plans, plan_components, source_limits
from compileflow.steps.source_checks import check_model_type
from compileflow.validation.judge.user_suite import parse_user_suite


def build_artifact(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile all components and write the artifact's folder. Runs in a child process.

    Args:
        request: What `steps.compile` sends. "needs_tokenizer" is False for a model that was in memory, which may
            have no tokenizer. "rows_fill_shapes" is True if the caller pads each row to a compiled shape.
            "padding" holds the settings and the tolerance of `check_padding`. The user's "suite" must fit the
            model.

    Returns:
        Warnings for the user, under "warnings".

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
    check_model_type(target, spec.hf_task, config)
    tokenizer = None
    if spec.hf_task.takes_text and request.get("needs_tokenizer", True):
        tokenizer = load_tokenizer(source_dir, trust_remote_code=spec.trust_remote_code)
    report_progress("loading the source model")
    with (
        undisturbed_process(),
        loaded_once(source_dir, spec.hf_task, trust_remote_code=spec.trust_remote_code) as source_model,
    ):
        warnings = _unknown_tokens(tokenizer, source_model.vocab_size) if tokenizer is not None else []
        limits = source_limits(source_model, spec, tokenizer)
        if request.get("padding"):
            check_padding(source_model, tokenizer, target, limits, spec.hf_task, **request["padding"])
        plans = plan_components(
            spec,
            target,
            limits,
            threads=request["threads"],
            rows_fill_shapes=request.get("rows_fill_shapes", False),
        )
        merged_plan = merge_plans(plans)
        timed_shapes = [ShapeBucket.model_validate(shape) for shape in request.get("timed_shapes", ())]
        check_timed_shapes(timed_shapes, merged_plan.max_sequence_length)
        if request.get("suite"):
            suite = parse_user_suite(**request["suite"])
            suite.check(spec.hf_task, spec.precision, [record.name for record in source_model.outputs])
        calibration = Calibration.from_json(request["calibration"]) if request.get("calibration") else None
        if calibration is not None:
            batches = calibration_batches(
                calibration.examples,
                tokenizer,
                task=spec.hf_task,
                max_length=merged_plan.max_sequence_length,
                pad_token_id=source_model.pad_token_id,
            )
            merged_plan = replace(merged_plan, calibration=batches)
        folder = f"components/{merged_plan.name}"
        compiled_component = compile_graph(target, source_dir, source_model, merged_plan, out_dir / folder)
    report_progress("writing the manifest")
    _copy_interface_files(source_dir, out_dir)
    write_module_weights(source_dir, out_dir)
    _write_manifest(
        out_dir,
        spec=spec,
        source=SourceRecord(
            **request["source"], architecture=(getattr(config, "architectures", None) or ["unknown"])[0]
        ),
        target=target,
        components={plan.name: component_record(target, plan, compiled_component, folder) for plan in plans},
        calibration=calibration,
    )
    return {"warnings": warnings}


def _unknown_tokens(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return a warning if the tokenizer has tokens that the model does not have; a call with one is refused.

    Args:
        tokenizer: Tokenizer of the source model.
        vocab_size: Number of token ids that the model takes; 0 if it takes any.

    Raises:
        SourceError: The tokenizer puts such a token into every text.
    """
    vocabulary = tokenizer.get_vocab()
    unknown_tokens = [(number, token) for token, number in vocabulary.items() if number >= vocab_size > 0]
    if not unknown_tokens:
        return []
    number, token = min(unknown_tokens)
    text = (
        f"The tokenizer has tokens that the model lacks ({len(unknown_tokens)} in all), for example {token!r} "
        f"with the id {number}; the model has {vocab_size} ids"
    )
    hint = "Resize the embeddings of the model (resize_token_embeddings), or use the tokenizer saved with it."
    if max(tokenizer("a")["input_ids"], default=0) >= vocab_size:
        raise SourceError(f"{text}. The tokenizer adds such a token to every text.", hint=hint)
    return [f"{text}. Texts with such a token are refused. {hint}"]


def _copy_interface_files(source_dir: Path, out_dir: Path) -> None:
    for record in list_files(source_dir):
        if is_interface_file(record.path):
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
        target=TargetRecord.of(target),
        components=components,
        files=list_files(out_dir),
        calibration=calibration.record if calibration else None,
    ).write(out_dir)
