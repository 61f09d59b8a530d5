"""Bundle of a failed validation: the failing inputs, both models' outputs, and a script that shows the failure."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord
from compileflow.contracts.json_files import read_json
from compileflow.errors import ManifestError, first_line
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.interface import SourceModel
from compileflow.spec import CompileSpec
from compileflow.validation.cases import Case
from compileflow.validation.divergence import Divergence, failing_case, first_divergence
from compileflow.validation.judge.suite import GateEntry, load_suite
from compileflow.validation.judge.user_suite import UserSuite
from compileflow.validation.judge.verdict import GateResult, Verdict
from compileflow.validation.measure.measurements import Measurements, candidate_answer
from compileflow.validation.measure.metrics import scales_of
from compileflow.validation.measure.tendencies import SPECIAL_TOKEN_ERROR
from compileflow.validation.project_tests import GATE as PROJECT_TESTS
from compileflow.validation.settings import ValidationSettings

# Folder beside the report.
BUNDLE_FOLDER = "bundle"
REPRODUCE, FAILURE = "reproduce.py", "failure.json"
INPUTS, REFERENCE, COMPILED = "inputs.npz", "reference.npz", "compiled.npz"
LOG = "toolchain.log"
_DATA = (FAILURE, INPUTS, REFERENCE, COMPILED, LOG)
_TEMPLATE = "reproduce.py.txt"
_LATENCY = "latency_ratio"
# Larger arrays stay in their files, and the script reads them there.
_MOST_EMBEDDED_BYTES = 4_000_000
_CREDENTIALS = re.compile(r"://[^/\s@]+@")


class Figure(BaseModel):
    """One number of one output, which shows the failure.

    Attributes:
        gate: Gate that measured the number; "" if another gate failed.
        name: Column of the comparisons, such as max_abs_diff.
        value: The number; None if it is not a number.
        limit: Limit of the gate; None without one.
        comparison: Side of the limit that passes.
        case: Name of the case.
        output: Name of the output.
        row: Position of the example in the case.
        scale: Size of the output's answers, to which some numbers are relative.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    name: str
    value: float | None
    limit: float | None
    comparison: str
    case: str
    output: str
    row: int
    scale: tuple[float, float, float] | None = None


class Failure(BaseModel):
    """What a report says about a failure, besides its gates.

    Attributes:
        gate: First gate that failed.
        measured: What it measured; None if that is not a number.
        figure: A number of one output that shows the failure; None if it does not show in the graph's outputs.
        divergence: First module whose output differs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    measured: float | None = None
    figure: Figure | None = None
    divergence: Divergence = Divergence()


@dataclass(frozen=True)
class Failed:
    """A failure with the arrays that show it.

    Attributes:
        failure: The failure.
        case: Case of its figure.
        reference: Outputs of the source model.
        compiled: Outputs of the compiled model; {} if it did not answer.
    """

    failure: Failure
    case: Case | None
    reference: Arrays
    compiled: Arrays

    def named(self, verdict: Verdict) -> Verdict:
        """Return the verdict with the first module that differs in its reason."""
        place = self.failure.divergence.place
        if not place:
            return verdict
        return verdict.model_copy(update={"reason": f"{verdict.reason}; the outputs first differ in {place}"})


def examine_failure(
    artifact: OpenArtifact,
    component: LoadedComponent,
    record: ComponentRecord,
    source_model: SourceModel,
    cases: Sequence[Case],
    measurements: Measurements,
    verdict: Verdict,
    user_suite: UserSuite | None,
    *,
    threads: int,
) -> Failed:
    """Find the first module that differs, and the case that shows the failure.

    Args:
        artifact: The artifact.
        component: Loaded component, as it is served.
        record: Record of the component.
        source_model: Source model in fp32.
        cases: Cases that were compared.
        measurements: Their comparisons.
        verdict: Verdict that failed.
        user_suite: Suite of the user, whose gates may have failed.
        threads: Threads of the runtime.
    """
    failed_gates = [gate for gate in verdict.gates if gate.outcome == "fail"]
    gate = next(
        (gate for gate in failed_gates if verdict.reason.startswith(f"fail: {gate.gate} ")), failed_gates[0]
    )
    compared = [case for case in cases if not case.answers_only]
    shown = [case for case in compared if case.family == "special" or gate.gate != SPECIAL_TOKEN_ERROR]
    small_case = failing_case(measurements.comparisons, shown, record.precision)
    if small_case is None and gate.gate == _LATENCY:
        divergence = Divergence(note="The gate compares time, and the answers agree.")
    elif small_case is None and (gate.suite or gate.gate == PROJECT_TESTS):
        divergence = Divergence(note="The outputs agree within compileflow's own limits.")
    else:
        divergence = first_divergence(artifact, component, record, source_model, small_case, threads=threads)
    entries = (*load_suite().gates, *(user_suite.file.gates if user_suite is not None else ()))
    entry = next(entry for entry in entries if entry.gate == gate.gate)
    figure = _figure(gate, entry, measurements, small_case)
    case = next((case for case in compared if figure is not None and case.name == figure.case), None)
    failure = Failure(
        gate=gate.gate, measured=gate.measured, figure=figure if case else None, divergence=divergence
    )
    if case is None:
        return Failed(failure, None, {}, {})
    return Failed(failure, case, source_model.run(case.inputs), candidate_answer(component.run, case.inputs)[0])


def _figure(
    gate: GateResult, entry: GateEntry, measurements: Measurements, small_case: Case | None
) -> Figure | None:
    """Return the number that the gate measured, or the worst one of the case that differs."""
    rows = [row for row in measurements.comparisons if entry.output in (None, row["output"])]
    measured: float | None
    if entry.table == "comparisons":
        name, measured, limit = entry.column, gate.measured, gate.limit
    elif small_case is not None:
        # Rates and probes need all examples, or the source model.
        name, limit = "rel_l2", None
        rows = [row for row in rows if row["case"] == small_case.name]
        largest = max(row[name] for row in rows)
        measured = float(largest) if np.isfinite([row[name] for row in rows]).all() else None
    else:
        return None

    def distance(row: dict[str, Any]) -> float:
        is_number = bool(np.isfinite(row[name]))
        if measured is None:
            return float(is_number)
        return abs(row[name] - measured) if is_number else float("inf")

    row = min(rows, key=distance)
    same = [other for other in measurements.comparisons if other["case"] == row["case"]]
    same = [other for other in same if other["output"] == row["output"]]
    scale = scales_of(measurements.comparisons).get(row["output"])
    return Figure(
        gate=gate.gate if limit is not None else "",
        name=name,
        value=measured,
        limit=limit,
        comparison=gate.comparison,
        case=row["case"],
        output=row["output"],
        row=next(position for position, other in enumerate(same) if other is row),
        scale=(scale.norm, scale.peak, scale.typical_peak) if scale else None,
    )


def write_failure_bundle(
    folder: Path,
    failed: Failed,
    subject: dict[str, Any],
    requested: CompileSpec,
    validation: ValidationSettings,
    user_suite: UserSuite | None,
) -> None:
    """Write the bundle into a new folder.

    Args:
        folder: Folder to make.
        failed: The failure.
        subject: What the report says about both models, the machine and the verdict.
        requested: What the artifact should be.
        validation: Settings of the validation.
        user_suite: Suite of the user, which is copied into failure.json.
    """
    folder.mkdir()
    content = {
        "subject": subject,
        "failure": failed.failure.model_dump(mode="json"),
        "spec": requested.model_dump(mode="json"),
        "validation": validation.model_dump(mode="json"),
        "suite": {"text": user_suite.text, "origin": user_suite.origin} if user_suite is not None else None,
    }
    text = without_passwords(json.dumps(content, indent=1, sort_keys=True))
    (folder / FAILURE).write_text(text + "\n", "utf-8")
    if failed.case is not None:
        arrays: dict[str, dict[str, Any]] = {
            INPUTS: failed.case.inputs | {"mask": np.asarray(failed.case.mask)},
            REFERENCE: failed.reference,
            COMPILED: failed.compiled,
        }
        for name, values in arrays.items():
            np.savez_compressed(folder / name, **values)
    write_script(folder)


def copy_bundle(bundle: Path, dest: Path) -> None:
    """Copy the data of a stored bundle into a new folder, and write the script there from this package.

    A file with another name, such as a module that the script would import, is left out: a writer of the store
    could run code with it.

    Args:
        bundle: Folder of the bundle, as the store has it.
        dest: Folder to make.

    Raises:
        ManifestError: The bundle lacks failure.json, or a file is not of its kind.
    """
    dest.mkdir()
    for name in _DATA:
        path = bundle / name
        if path.is_file() and not path.is_symlink():
            if path.suffix == ".npz" and not zipfile.is_zipfile(path):
                raise _unusable(path, "it is not an archive of arrays")
            shutil.copyfile(path, dest / name)
    write_script(dest)


def write_script(folder: Path) -> None:
    """Write the script of a bundle, which holds what the other files of the folder say if that is small enough.

    Raises:
        ManifestError: failure.json is missing, or it is not a JSON object.
    """
    path = folder / FAILURE
    try:
        content = read_json(path)
        text = json.dumps(content, indent=1, sort_keys=True)
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(path, first_line(error)) from error
    if not isinstance(content, dict):
        raise _unusable(path, "it is not a JSON object")
    arrays = [folder / name for name in (INPUTS, REFERENCE)]
    embedded = ""
    is_complete = all(file.is_file() for file in arrays)
    if is_complete and sum(file.stat().st_size for file in arrays) <= _MOST_EMBEDDED_BYTES:
        embedded = json.dumps([base64.b64encode(file.read_bytes()).decode() for file in arrays])
    template = (files("compileflow.validation") / "data" / _TEMPLATE).read_text("utf-8")
    literals = {"FAILURE_TEXT": repr(text), "ARRAYS_TEXT": repr(embedded)}
    # In one pass: the failure's text may hold the name of the other place.
    script = re.sub("|".join(literals), lambda match: literals[match[0]], template)
    (folder / REPRODUCE).write_text(script, "utf-8")


def _unusable(path: Path, reason: str) -> ManifestError:
    return ManifestError(
        f"{path.name} of the bundle cannot be used: {reason}.", hint="Validate the artifact again."
    )


def without_passwords(text: str) -> str:
    """Return a text without the user names and passwords of its URIs."""
    return _CREDENTIALS.sub("://", text)
