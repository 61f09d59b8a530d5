"""A matrix of compiles: its cells, its page, and the outcome that it states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compileflow.errors import CompileError
from compileflow.selection.matrix import (
    Matrix,
    MatrixRequest,
    impossible_cell,
    matrix_markdown,
    matrix_of,
    measured_cell,
    write_matrix,
)
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.steps import Pipeline
from tests.unit.html_page import HtmlPage


def request_of(**fields: Any) -> MatrixRequest:
    return MatrixRequest.model_validate({"models": ["a/b"], "targets": ["torchscript"]} | fields)


def test_cells_are_all_combinations_with_the_shared_fields() -> None:
    matrix = request_of(
        models=["a/b", "c/d"], targets=["openvino", "torchscript"], precisions=["fp32", "bf16"],
        shared={"allow_warn": True},
    )  # fmt: skip
    cells = [(cell.model, cell.target, cell.precision.value) for cell in matrix.requests()]
    assert cells == [
        ("a/b", "openvino", "fp32"),
        ("a/b", "openvino", "bf16"),
        ("a/b", "torchscript", "fp32"),
        ("a/b", "torchscript", "bf16"),
        ("c/d", "openvino", "fp32"),
        ("c/d", "openvino", "bf16"),
        ("c/d", "torchscript", "fp32"),
        ("c/d", "torchscript", "bf16"),
    ]
    assert all(cell.allow_warn for cell in matrix.requests())


def test_repeated_combination_is_one_cell() -> None:
    assert len(request_of(models=["a/b", "a/b"], targets=["generic", "torchscript"]).requests()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["auto"]}, "a target is auto, which stands for all of them"),
        ({"targets": ["foo"]}, "Unknown target 'foo'"),
        ({"shared": {"target": "openvino"}}, "shared cannot hold 'target'"),
        ({"shared": {"alow_warn": True}}, "shared.alow_warn: this name is not known"),
        ({"models": []}, "models"),
    ],
)
def test_contradiction_is_refused_before_any_run(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        request_of(**fields)


def test_precision_that_no_machine_compiles_is_not_a_failure() -> None:
    (request,) = request_of(precisions=["int4"]).requests()
    cell = impossible_cell(request)
    assert cell is not None
    assert (cell.candidate.outcome, cell.error) == ("unavailable", "")
    assert impossible_cell(request_of().requests()[0]) is None


@pytest.fixture
def matrix(pipeline: Pipeline, tiny_model: ModelFactory, settings: Settings) -> Matrix:
    """One model that passes, one cell that no target has, and one that failed."""
    from compileflow.steps.run import run_request

    model = str(tiny_model(HfTask.TEXT_CLASSIFICATION))
    request = pipeline.request(model, name="reviews")
    passed = measured_cell(request, run_request(request, settings), settings)
    impossible = impossible_cell(pipeline.request(model, precision="int4"))
    assert impossible is not None
    error = CompileError("The toolchain <refused> the model.", hint="Choose another target.")
    failed = measured_cell(pipeline.request("other/model"), error, settings)
    return matrix_of([passed, (impossible, None), failed], settings)


def test_page_and_markdown_hold_every_cell(matrix: Matrix, tmp_path: Path) -> None:
    assert matrix.headline == "1 of 2 cells failed; 1 combination does not exist"
    write_matrix(matrix, tmp_path)
    page = HtmlPage((tmp_path / "matrix.html").read_text("utf-8"))
    page.assert_self_contained()
    for text in (
        matrix.headline,
        "reviews version 1 in sqlite:",
        "The toolchain <refused> the model.",
        "Candidates",
    ):
        assert text in page.text
    assert Matrix.model_validate(json.loads((tmp_path / "matrix.json").read_bytes())) == matrix

    lines = matrix_markdown(matrix, "file:///store/x.json").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.count("|") for row in rows] == [4, 3]
    assert "pass, " in rows[0]
    assert "error" in rows[1]
    assert any(line.startswith("- `other/model`, torchscript fp32: The toolchain <refused>") for line in lines)
