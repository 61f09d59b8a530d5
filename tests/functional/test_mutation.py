"""The error rate of the gates: planted faults fail, honest compiles pass, and a missed limit is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forked_checks import read_results
from benchmarks.mutation.faults import FAULTS
from benchmarks.mutation.honest import honest_compiles
from benchmarks.mutation.page import missed_limits, newest, page
from compileflow import errors
from compileflow.validation.judge.suite import load_suite

ROOT = Path(__file__).parents[2]
NAME = "mask is ignored"


def fault_line(outcome: str, *gates: str, visible: str = "input 0") -> dict[str, Any]:
    line = {"check": "fault", "name": NAME, "outcome": outcome, "gates": list(gates), "visible": visible}
    return line | {"reason": "", "precision": "fp32"}


def honest_line(outcome: str, precision: str) -> dict[str, Any]:
    return {
        "check": "honest",
        "name": "bert",
        "outcome": outcome,
        "gates": [],
        "precision": precision,
        "reason": "",
    }


def test_there_are_faults_in_every_part_and_honest_compiles_of_every_precision() -> None:
    parts = {"weights", "graph", "run time", "interface file", "manifest", "bf16", "int8"}
    assert {fault.kind for fault in FAULTS.values()} == parts
    targets = {"onnx-runtime", "openvino", "torchscript"}
    assert {fault.healthy.target for fault in FAULTS.values()} == targets
    assert {healthy.target for healthy in honest_compiles().values()} == targets
    assert {fault.healthy.source.hf_task.modality for fault in FAULTS.values()} == {
        "text",
        "image",
        "audio",
        "image-text",
    }
    assert len(FAULTS) >= 60
    assert len(honest_compiles()) >= 200


def test_faults_declare_gates_of_the_suite_or_classes_of_errors() -> None:
    names = {entry.gate for entry in load_suite().gates} | set(dir(errors))
    unknown = {fault.name: set(fault.gates) - names for fault in FAULTS.values() if set(fault.gates) - names}
    assert not unknown
    assert all(fault.gates for fault in FAULTS.values())


def test_one_visible_fault_in_forty_that_passes_misses_the_limit() -> None:
    caught = [fault_line("fail", "mask_respected")] * 39
    assert not missed_limits(caught)
    (problem, name) = missed_limits([*caught, fault_line("pass")])
    assert problem == "A named gate caught 97.5% of the visible faults; the limit is 98%."
    assert name.strip().startswith(f"{NAME}: pass")
    assert not missed_limits([*caught, fault_line("pass", visible="")])


def test_a_fault_that_fails_by_a_gate_for_other_faults_is_not_caught() -> None:
    assert missed_limits([fault_line("fail", "label_order")])
    assert not missed_limits([fault_line("fail", "label_order", "mask_respected")])


def test_no_honest_fp32_compile_and_one_bf16_compile_in_a_hundred_may_be_refused() -> None:
    honest = [honest_line("pass", precision) for precision in ("fp32", "bf16") for _ in range(99)]
    assert not missed_limits([*honest, honest_line("warn", "fp32"), honest_line("fail", "bf16")])
    assert missed_limits([*honest, honest_line("fail", "fp32")])
    assert missed_limits([*honest, *[honest_line("fail", "bf16")] * 2])
    assert missed_limits([*honest, honest_line("refused", "fp32")])


def test_a_check_without_a_result_misses_a_limit() -> None:
    assert missed_limits([fault_line("no result")])


def test_the_page_counts_faults_by_the_gate_that_names_the_verdict() -> None:
    labels = {"kind": "graph", "task": "text-classification", "target": "torchscript", "versions": "torch 2"}
    line = fault_line("fail", "rel_l2", "mask_respected") | labels
    line |= {"key": "a", "reason": "fail: mask_respected measured 1, the limit is at most 0"}
    text = page({"a": line, "b": None})
    assert "| `mask_respected` | 1 | 1 |\n" in text
    assert "| **all** | 1 | 1 | 1 | 1 | 0 | 0 | 0 |\n" in text
    assert "1 of 2 checks have been run; " in text


def test_the_page_says_above_its_summary_which_limits_are_missed() -> None:
    text = page({"a": honest_line("fail", "fp32") | {"key": "a", "versions": "", "target": "openvino"}})
    before_summary, _, _ = text.partition("## Summary")
    assert "**100.0% of the honest fp32 compiles are refused; the limit is 0%.**\n" in before_summary


def test_a_result_of_an_older_suite_counts_until_the_check_is_made_again() -> None:
    results = {"old": fault_line("pass") | {"key": "old"}, "new": fault_line("fail") | {"key": "new"}}
    assert newest("fault", NAME, "old", results) == results["old"]
    assert newest("fault", NAME, "newer", results) == results["new"]
    assert newest("honest", NAME, "newer", results) is None


@pytest.mark.slow
def test_a_sample_of_faults_fails_and_a_sample_of_honest_compiles_passes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.mutation", "--results", str(results), "--sample"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    lines = list(read_results(results).values())
    faults = [line for line in lines if line["check"] == "fault"]
    assert (len(faults), len(lines)) == (7, 11)
    assert [line["name"] for line in faults if not line["visible"]] == []
