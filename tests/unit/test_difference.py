"""diff: what differs between two artifacts or reports, the cache miss between them, and unfair comparisons."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from compileflow.admin.difference import GROUPS, Side, compare
from compileflow.artifact.manifest import read_manifest
from compileflow.catalog import open_registry, open_store
from compileflow.cli import app
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.compile import recorded_parts
from compileflow.testing.registries import version_entry
from compileflow.validation.judge.verdict import GateResult, Verdict
from compileflow.validation.measure import Latency
from compileflow.validation.measure.coverage import Covered
from compileflow.validation.report import Report, ReportSubject
from tests.conftest import ModelFactory
from tests.steps import Pipeline

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
V1, V2 = ARTIFACTS / "v1-torchscript", ARTIFACTS / "v2-openvino"
DIGEST = "2" * 64
BUSY = "other processes used 1.9 of 2 processors"


def gate(outcome: str = "pass", measured: float | None = 1e-6, limit: float = 1e-4) -> GateResult:
    return GateResult.model_validate(
        {
            "gate": "rel_l2", "says": "The answers agree.", "outcome": outcome, "severity": "critical",
            "comparison": "at most", "measured": measured, "limit": limit, "margin": None, "detail": "",
        }
    )  # fmt: skip


def report(gates: tuple[GateResult, ...] = (gate(),), **fields: Any) -> Report:
    subject = ReportSubject(
        source_uri="hf://owner/model", source_revision="abc123", source_digest="1" * 64,
        architecture="BertForSequenceClassification", artifact_uri="file:///store/manifests/sha256/2.json",
        artifact_digest=DIGEST, target="onnx-runtime", hf_task="text-classification", precision="fp32",
        component="default", toolchain={"onnxruntime": "1.24.0"},
    )  # fmt: skip
    outcome = gates[0].outcome
    values = {
        "subject": subject,
        "verdict": Verdict(outcome=outcome, reason=f"{outcome}: rel_l2", gates=gates),
        "figures": {"serving_memory_bytes": 2e6},
        "noise": {},
        "latencies": (Latency("1 x 16", 10.0, 5.0, 0.5, 0.4, 0.6, 30),),
        "worst": (),
        "families": {},
        "examples_origin": "mine.txt",
        "examples_count": 300,
        "examples_digest": "4" * 64,
        "measurement_version": 5,
        "suite_digest": "3" * 64,
        "environment": {"processor": "Z80", "threads": "2", "torch": "2.13.0"},
        "coverage": (Covered(subject="shapes compared", count=3, total=3),),
    }
    return Report.model_validate(values | fields)


def side(a_report: Report | None = None, folder: Path | None = None) -> Side:
    return Side(DIGEST, read_manifest(folder) if folder else None, a_report)


def values(a: Side, b: Side) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return what differs, by group and name."""
    return {(row.group, row.name): (row.a, row.b) for row in compare(a, b).rows if not row.equal}


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, words)])


def in_json(*words: object) -> dict[str, Any]:
    result = call(*words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def cells(difference: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {(row["group"], row["name"]): (row["a"], row["b"]) for row in difference["rows"]}


@pytest.mark.usefixtures("settings")
def test_artifacts_of_older_schemas_are_compared_by_their_manifests() -> None:
    difference = in_json(V1, V2)
    rows = cells(difference)
    assert rows["spec", "target"] == ("torchscript", "openvino")
    assert rows["spec", "default.shape_buckets"] == (["1x8", "2x16"], [])
    assert rows["graph", "default.dynamic_axes"] == (False, True)
    assert rows["toolchain", "openvino"] == (None, "2026.4.1")
    assert rows["toolchain", "manifest schema"] == (1, 2)
    assert rows["size", "artifact"] == (218537, 250141)
    weights = "components/default/model.bin"
    assert rows["files", weights] == (
        None,
        {"size_bytes": 155929, "sha256": "3dd293684d2cc33afa9768de33f173c8b61256c38840fef0c44333f8f2a494e5"},
    )
    assert ("toolchain", "torch") not in rows
    assert ("files", "tokenizer_config.json") not in rows
    changes, files = difference["cache"]
    assert changes.startswith("A is not a hit for B: changed: ")
    for part in ("manifest schema (1 -> 2)", "source model", "spec.target (torchscript -> openvino)"):
        assert part in changes
    assert "toolchain.openvino (added)" in changes
    assert "do not name its changed files" in files
    assert [line.partition(":")[0] for line in difference["not_compared"]] == [
        "The store has no report on A",
        "The store has no report on B",
    ]


@pytest.mark.usefixtures("settings")
def test_rows_come_by_group_and_equal_ones_only_on_request() -> None:
    rows = in_json(V1, V2, "--all")["rows"]
    assert [row["group"] for row in rows] == sorted((row["group"] for row in rows), key=GROUPS.index)
    torch = next(row for row in rows if row["name"] == "torch")
    assert torch == {"group": "toolchain", "name": "torch", "a": "2.13.0+cpu", "b": "2.13.0+cpu", "equal": True}
    lines = call(V1, V2).stdout.splitlines()
    assert lines[0] == f"A: {V1}, artifact 3bb5acbee27a"
    assert any(re.fullmatch(r"\W+toolchain\W+openvino\W+- \W+2026\.4\.1\W+", line) for line in lines), lines
    assert not any("tokenizer_config.json" in line for line in lines)
    assert any("tokenizer_config.json" in line for line in call(V1, V2, "--all").stdout.splitlines())


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("columns", "is_table"), [(100, True), (40, False)])
def test_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, is_table: bool) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = call(V1, V2).stdout.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert bool(table) is is_table
    assert not any(len(line) > columns or "…" in line for line in table)
    assert ("group: spec" in lines) is not is_table


@pytest.mark.usefixtures("settings")
def test_artifact_does_not_differ_from_itself() -> None:
    lines = call(V2, V2).stdout.splitlines()
    assert "Nothing that is on record differs." in lines
    assert any(line.startswith("cache: A and B are the same artifact, by their records;") for line in lines)


def test_equal_keys_with_different_files_are_pointed_out() -> None:
    a, b = Side("1" * 64, read_manifest(V2), None), Side("2" * 64, read_manifest(V2), None)
    (line,) = compare(a, b).cache
    assert "keys of A and B are equal, but their files differ" in line


def test_gates_stand_side_by_side_with_value_and_limit() -> None:
    rows = values(side(report()), side(report(gates=(gate("fail", None, 1e-3),))))
    assert rows["gates", "rel_l2"] == (
        {"outcome": "pass", "measured": 1e-6, "comparison": "at most", "limit": 1e-4},
        {"outcome": "fail", "measured": None, "comparison": "at most", "limit": 1e-3},
    )
    assert rows["verdict", "outcome"] == ("pass", "fail")
    assert set(rows) == {("gates", "rel_l2"), ("verdict", "outcome"), ("verdict", "reason")}


def test_scores_on_labels_stand_side_by_side() -> None:
    score = {
        "name": "accuracy", "source": 0.9, "compiled": 0.88, "examples": 50, "right": 45, "right_to_wrong": 1,
        "wrong_to_right": 0,
    }  # fmt: skip
    rows = values(side(report()), side(report(score=score)))
    assert rows == {("verdict", "accuracy"): (None, {"source": 0.9, "compiled": 0.88, "examples": 50})}


def test_verdict_of_one_side_is_shown_without_the_other() -> None:
    difference = compare(side(report(), V2), side(None, V2))
    rows = {(row.group, row.name): (row.a, row.b) for row in difference.rows if not row.equal}
    assert rows == {("verdict", "outcome"): ("pass", None), ("verdict", "reason"): ("pass: rel_l2", None)}
    assert difference.not_compared == ("The store has no report on B: gates and latencies are unknown.",)


def test_report_without_its_artifact_is_compared_by_what_it_says_itself() -> None:
    difference = compare(side(report()), side(None, V2))
    rows = {(row.group, row.name): (row.a, row.b) for row in difference.rows}
    assert rows["source", "uri"] == ("hf://owner/model", "file:///models/tiny")
    assert rows["spec", "target"] == ("onnx-runtime", "openvino")
    assert rows["toolchain", "onnxruntime"] == ("1.24.0", None)
    assert "files" not in {group for group, _ in rows}
    assert difference.cache == ()
    assert difference.not_compared[0].startswith("The store does not hold the artifact of A: ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"examples_origin": "yours.txt"},
            "inputs differ: 300 examples from mine.txt in A, 300 examples from yours",
        ),
        ({"examples_count": 40}, "inputs differ: 300 examples from mine.txt in A, 40"),
        ({"examples_digest": "5" * 64}, "inputs differ: A and B have other content in 300 examples from mine.txt"),
        ({"measurement_version": 6}, "measurements have other versions: 5 in A, 6 in B"),
        ({"suite_digest": "5" * 64}, "suites differ"),
        ({"user_suite_digest": "5" * 64}, "suites differ"),
        ({"environment": {"processor": "Z80", "threads": "4"}}, "different machines or settings: threads, torch."),
        (
            {"latencies": (Latency("1 x 16", 10.0, 5.0, 0.5, 0.4, 0.6, 30, busy=BUSY),)},
            "Latencies of B were measured on a busy machine: 1 x 16.",
        ),
    ],
)
def test_unfair_comparison_says_so(changes: dict[str, Any], says: str) -> None:
    (line,) = compare(side(report()), side(report(**changes))).unfair
    assert says in line


def test_fair_comparison_of_new_latencies_says_nothing() -> None:
    latencies = (Latency("1 x 16", 10.0, 6.0, 0.6, 0.5, 0.7, 30),)
    difference = compare(side(report(), V2), side(report(latencies=latencies), V2))
    assert (difference.unfair, difference.not_compared) == ((), ())
    assert [(row.group, row.name) for row in difference.rows if not row.equal] == [("latency", "1 x 16")]


def test_older_report_says_what_it_does_not_record() -> None:
    older = report(examples_digest="", measurement_version=None)
    difference = compare(side(report(), V2), side(older, V2))
    assert difference.unfair == ()
    assert difference.not_compared == (
        "The report of B is older and does not record the examples and the version of the measurements.",
    )


@pytest.mark.usefixtures("settings")
def test_report_is_read_from_its_json_file_and_a_busy_machine_is_marked(tmp_path: Path) -> None:
    latency = Latency("1 x 16", 10.0, 5.0, 0.5, 0.4, 0.6, 30, busy=BUSY)
    for name, content in (("a.json", report()), ("b.json", report(latencies=(latency,)))):
        (tmp_path / name).write_text(content.model_dump_json())
    lines = [line.strip("│ ") for line in call(tmp_path / "a.json", tmp_path / "b.json").stdout.splitlines()]
    row = next(line for line in lines if line.startswith("latency"))
    assert "0.50 of eager (0.40 to 0.60), 5.00 ms" in row
    assert "5.00 ms, busy machine" in row
    assert "not fair: Latencies of B were measured on a busy machine: 1 x 16." in lines


def spoilt(folder: Path) -> dict[str, object]:
    """Write what cannot be compared, and return it by name."""
    (folder / "empty").mkdir()
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text("{}")
    shutil.copytree(V2, folder / "newer")
    (folder / "newer" / "manifest.json").write_text('{"schema_version": 99}')
    return {
        "absent": folder / "nothing", "empty": folder / "empty", "broken": folder / "broken.json",
        "not a report": folder / "other.json", "of a newer version": folder / "newer",
        "unknown digest": "f" * 64, "unknown name": "registry:nothing", "unknown URI": "s3x://b/manifests/x.json",
    }  # fmt: skip


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "nothing does not exist"),
        ("empty", "empty is neither an artifact nor a report"),
        ("broken", "broken.json is not a report"),
        ("not a report", "other.json is not a report: subject: "),
        ("of a newer version", "found 99"),
        ("unknown digest", "does not hold the folder ffffffffffff"),
        ("unknown name", "has no model 'nothing'"),
        ("unknown URI", "neither an artifact folder nor an artifact URI"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, name: str, says: str) -> None:
    location = spoilt(tmp_path)[name]
    for words in ((location, V2), (V2, location)):
        result = call(*words)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("error: ")
        assert says in result.stderr
        assert says in json.loads(call(*words, "--json").stdout)["error"]["message"]


def test_registered_version_and_digest_name_an_artifact(settings: Settings) -> None:
    folder = open_store(settings.resolved_store_uri()).put_folder(V2)
    manifest = read_manifest(V2)
    entry = version_entry("old", 1).model_copy(
        update={
            "artifact_uri": folder.uri,
            "artifact_digest": folder.digest,
            "source_digest": manifest.source.digest,
            "target": manifest.target.name,
            "spec": manifest.spec.model_dump(mode="json"),
        }
    )
    open_registry(settings.resolved_registry_uri()).register(entry)
    for location in ("registry:old", "registry:old@1", folder.digest, folder.uri):
        difference = in_json(location, V2)
        assert difference["a"] == {"location": location, "artifact_digest": folder.digest}
        assert difference["cache"] == [
            "A and B are the same artifact, by their records; `compileflow verify` checks their files."
        ]
    for command in ("inspect", "verify"):
        words = [command, folder.digest, "--json", *(["--integrity-only"] if command == "verify" else [])]
        assert CliRunner().invoke(app, words).exit_code == 0


def test_two_compiles_are_compared_with_reports_and_the_cache_miss(
    settings: Settings, pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    model, bucket = tiny_model(HfTask.TEXT_CLASSIFICATION), {"batch_size": 1, "sequence_length": 16}
    quick = {"latency_pairs": 5, "max_examples": 20}
    small = pipeline.request(model, name="small", shape_buckets=[bucket], validation=quick, allow_warn=True)
    version = pipeline.run(small)
    other = pipeline.compile(small.model_copy(update={"max_sequence_length": 16}))
    store = open_store(pipeline.store_uri)
    for artifact in (pipeline.compile(small), other):
        record = store.get_record("compile", artifact.cache_key)
        assert record is not None
        parts = record["parts"]
        assert isinstance(parts, dict)
        with store.open_folder(artifact.digest) as folder:
            recorded = recorded_parts(read_manifest(folder))
        # The manifest records every part of the key but the files of the source model.
        files = {name for name in parts if name not in recorded}
        assert {name.partition(" ")[0] for name in files} <= {"config", "file", "tokenizer", "weights"}
        assert {name: parts[name] for name in recorded if name != "source model"} == {
            name: value for name, value in recorded.items() if name != "source model"
        }
    command = [sys.executable, "-m", "compileflow", "diff", "registry:small", other.uri]
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "spec.default.max_sequence_length (null -> 16)" in completed.stdout
    assert "not compared: The store has no report on B" in completed.stdout
    reports = in_json(version.report_uri, "registry:small", "--all")
    assert reports["unfair"] == reports["not_compared"] == []
    assert all(row["equal"] for row in reports["rows"])
    rows = cells(reports)
    assert rows["verdict", "outcome"] == (version.verdict, version.verdict)
    assert rows["inputs", "measurement version"][0] is not None
    assert rows["inputs", "examples digest"][0] is not None
    assert {group for group, _ in rows} == set(GROUPS)
