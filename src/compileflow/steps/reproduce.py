"""Show a failed validation again, for the script in the bundle of its report."""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compileflow._process.folders import path_of_uri
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.verify import verify_attestations
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.artifact.verify import attestations_of
from compileflow.contracts import Arrays
from compileflow.errors import CompileflowError, MeasurementError, SignatureError, printable
from compileflow.serving.component import LoadedComponent
from compileflow.settings import get_settings
from compileflow.spec import HfTask
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.compare_outputs import compared_rows
from compileflow.validation.measure.detections import in_same_order
from compileflow.validation.measure.measurements import candidate_answer
from compileflow.validation.project_tests import GATE as PROJECT_TESTS
from compileflow.validation.project_tests import check_tests

SHOWN, NOT_SHOWN, NOT_TRIED = 1, 0, 2
# A number without a limit shows the failure if it is at least this share of the report's.
_SHARE = 0.5


def reproduce(failure: str, arrays: str, *, folder: Path, arguments: Sequence[str] | None = None) -> int:
    """Print a figure of a failed validation, measured on this machine, and return an exit code.

    Args:
        failure: JSON text of failure.json.
        arrays: JSON list of two npz files in base64, the inputs and the source model's outputs; "" if they are
            files of `folder`.
        folder: Folder of the script.
        arguments: Words of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description="Show the failure of a compiled model.")
    parser.add_argument("artifact", nargs="?", help="folder or URI of the artifact")
    parser.add_argument("--source", type=Path, help="folder of the source model, for a gate that needs it")
    parser.add_argument(
        "--tests", type=Path, help="folder of the project's own tests, for their gate; they run with your rights"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files of the models, with your rights"
    )
    try:
        return _reproduced(json.loads(failure), arrays, folder, parser.parse_args(arguments))
    except CompileflowError as error:
        sys.stderr.write(printable(f"error: {error}") + "\n")
    except Exception:  # noqa: BLE001 - Python's own exit code for it means that the failure shows
        traceback.print_exc()
    return NOT_TRIED


def _reproduced(content: Mapping[str, Any], arrays: str, folder: Path, options: argparse.Namespace) -> int:
    subject, figure = content["subject"], content["failure"]["figure"]
    if options.source is not None and not (options.source / "config.json").is_file():
        raise MeasurementError(
            f"{options.source} has no config.json.", hint="Give the folder of the source model."
        )
    location = options.artifact or _local(subject["artifact_uri"])
    # The verdict is not one that a signature could vouch for; the compile has a signature of its own.
    artifact = open_artifact(
        location,
        digest=subject["artifact_digest"],
        require_signature=False,
        trust_remote_code=options.trust_remote_code,
    )
    _check_provenance(artifact, location)
    _say(f"artifact {artifact.digest[:12]} for {subject['target']}: {subject['reason']}")
    gate = content["failure"]["gate"]
    source_dir = options.source or _source_of(subject["source_uri"])
    validates = options.source is not None or (source_dir is not None and _can_validate())
    if figure is not None and (figure["gate"] == gate or not validates):
        return _show(artifact, subject, figure, *_arrays(arrays, folder))
    if source_dir is None:
        raise MeasurementError(
            f"{gate} compares the artifact with its source model, which is not on this machine.",
            hint="Give its folder: python reproduce.py ARTIFACT --source FOLDER",
        )
    if gate == PROJECT_TESTS:
        return _test_again(artifact, content, source_dir, options.tests)
    return _prove_again(artifact, content, gate, source_dir)


def _show(
    artifact: OpenArtifact,
    subject: Mapping[str, Any],
    figure: Mapping[str, Any],
    inputs: Arrays,
    reference: Arrays,
) -> int:
    """Answer the inputs, and compare one output of one example with the source model's."""
    mask = inputs.pop("mask")
    component = LoadedComponent.load(artifact, component=subject["component"], threads=subject["threads"])
    actual, error_text = candidate_answer(component.run, inputs)
    outputs = component.record.outputs
    if HfTask(subject["hf_task"]).graph_task is HfTask.OBJECT_DETECTION:
        actual = in_same_order(outputs, reference, actual)
    case = Case(figure["case"], "", ("",) * len(mask), inputs, mask)
    output = next(record for record in outputs if record.name == figure["output"])
    rows = compared_rows(case, output, reference[output.name], actual.get(output.name), error_text)
    if figure["scale"] is not None:
        metrics.relate_to_scale(rows, {output.name: metrics.Scale(*figure["scale"])})
    value = float(rows[figure["row"]][figure["name"]])
    if error_text:
        _say(f"the compiled model fails: {error_text}")
    limit, reported = figure["limit"], figure["value"]
    words = "" if limit is None else f", the limit is {figure['comparison']} {limit:.4g}"
    _say(
        f"{figure['gate'] or figure['name']} of {output.name}, case {figure['case']!r}: {_number(value)}{words}; "
        f"the report says {_number(reported)}"
    )
    if not math.isfinite(value):
        return SHOWN
    if limit is None:
        return SHOWN if reported is None or value >= _SHARE * reported else NOT_SHOWN
    is_beyond = value > limit if figure["comparison"] == "at most" else value < limit
    return SHOWN if is_beyond else NOT_SHOWN


def _check_provenance(artifact: OpenArtifact, location: str) -> None:
    """Refuse an artifact that no trusted key signed, where the settings require signatures.

    Raises:
        SignatureError: No trusted key signed its provenance, or a statement was altered.
    """
    settings = get_settings()
    if not settings.require_signature:
        return
    attestations = verify_attestations(
        artifact.digest,
        attestations_of(location, settings=settings),
        trusted_keys=load_public_keys(configured_keys(settings)),
        require_signature=False,
        manifest_source=artifact.manifest.source.digest,
    )
    if attestations.provenance is None or not attestations.provenance.signed_by:
        raise SignatureError(
            "A signature is required, but no trusted key signed the provenance.",
            hint="Compile the model again with COMPILEFLOW_SIGNING_KEY set.",
        )


def _test_again(
    artifact: OpenArtifact, content: Mapping[str, Any], source_dir: Path, tests_dir: Path | None
) -> int:
    """Run the project's own tests again. The command line names them: a path from a store could be anybody's."""
    from compileflow.steps.project_tests import run_project_tests
    from compileflow.steps.request import StepTimeouts

    if tests_dir is None:
        raise MeasurementError(
            f"The gate {PROJECT_TESTS} runs the project's own tests, which the command line does not name.",
            hint=f"Give their folder: python reproduce.py --tests {content['validation']['tests_path']}",
        )
    folder = str(tests_dir)
    check_tests(folder)
    with tempfile.TemporaryDirectory() as work:
        tests = run_project_tests(
            folder,
            artifact_dir=artifact.folder,
            source_dir=source_dir,
            registered_dir=None,
            work_dir=Path(work),
            log_path=Path(work) / "tests.log",
            timeout_s=StepTimeouts().tests_s,
            threads=content["subject"]["threads"],
            trust_remote_code=artifact.trust_remote_code,
            on_progress=lambda _: None,
        )
    for line in (*tests.output.splitlines(), f"{PROJECT_TESTS}: {tests.summary}"):
        _say(line)
    if tests.problem:
        return NOT_TRIED
    return SHOWN if tests.failed else NOT_SHOWN


def _prove_again(artifact: OpenArtifact, content: Mapping[str, Any], gate: str, source_dir: Path) -> int:
    """Validate the artifact again, for a gate that needs the source model."""
    from compileflow.steps.prove import prove_artifact
    from compileflow.steps.validate import check_libraries
    from compileflow.validation.report import REPORT_JSON, Report

    check_libraries()
    with tempfile.TemporaryDirectory() as report_dir:
        prove_artifact(
            {
                "source_dir": str(source_dir),
                "artifact_dir": str(artifact.folder),
                "artifact_uri": content["subject"]["artifact_uri"],
                "report_dir": report_dir,
                "spec": content["spec"],
                "validation": content["validation"],
                "suite": content.get("suite"),
                "threads": content["subject"]["threads"],
                "trust_remote_code": artifact.trust_remote_code,
            }
        )
        report = Report.model_validate_json((Path(report_dir) / REPORT_JSON).read_bytes())
    result = next(result for result in report.verdict.gates if result.gate == gate)
    reported = content["failure"]["measured"]
    _say(
        f"{gate}: {_number(result.measured)}, the limit is {result.comparison} {result.limit:.4g}; "
        f"the report says {_number(reported)}"
    )
    return {"fail": SHOWN, "error": NOT_TRIED}.get(result.outcome, NOT_SHOWN)


def _can_validate() -> bool:
    """Return whether the libraries of a validation are installed."""
    from compileflow.steps.validate import check_libraries

    try:
        check_libraries()
    except MeasurementError:
        return False
    return True


def _local(uri: str) -> str:
    """Return the path of a folder that exists on this machine instead of its URI."""
    if uri.startswith("file:") and path_of_uri(uri).is_dir():
        return str(path_of_uri(uri))
    return uri


def _source_of(uri: str) -> Path | None:
    folder = path_of_uri(uri) if uri.startswith("file:") else None
    return folder if folder is not None and folder.is_dir() else None


def _arrays(text: str, folder: Path) -> tuple[Arrays, Arrays]:
    """Return the inputs and the source model's outputs, from the script or from the files beside it."""
    if text:
        inputs, reference = (io.BytesIO(base64.b64decode(part)) for part in json.loads(text))
        return dict(np.load(inputs)), dict(np.load(reference))
    try:
        return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "reference.npz"))
    except OSError as error:
        raise MeasurementError(
            f"{folder} lacks inputs.npz or reference.npz.", hint="Copy the whole folder of the bundle."
        ) from error


def _say(line: str) -> None:
    sys.stdout.write(f"{printable(line)}\n")


def _number(value: float | None) -> str:
    return "no number" if value is None or not math.isfinite(value) else f"{value:.4g}"
