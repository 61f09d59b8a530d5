"""The commands of `python -m flows`: wrong options in one line, in the words of the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flows.commands import app


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--target foo", "Unknown target 'foo'. Choose one of: aot-inductor, "),
        ("--target openvino --target foo", "Unknown target 'foo'. Choose one of: aot-inductor, "),
        ("--target auto", "a target is auto, which stands for all of them; name each one instead."),
        ("--target openvino --precision foo", "--precision: expected 'fp32', 'bf16',"),
        ("--target openvino --field foo=1", "--field foo: this name is not known."),
        ("--target openvino --field precision=fp16", "--field cannot hold 'precision', which each cell decides."),
        (
            '--target openvino --field validation={"max_examples":-1}',
            "--field validation.max_examples: expected at least 1.",
        ),
    ],
)
def test_matrix_names_the_option_that_is_wrong_in_one_line(words: str, error: str) -> None:
    result = CliRunner().invoke(app, ["matrix", "--model", "m", *words.split()])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {error}")
    assert result.output.count("\n") == 1
