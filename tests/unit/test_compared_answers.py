"""assert_same_result: what it accepts, and how its message names the first difference."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from compileflow.testing.pipelines import assert_same_result


@pytest.mark.parametrize(
    ("candidate", "reference", "says"),
    [
        ([{"score": 0.5}], [{"score": 0.6}], "answer[0]['score']: expected 0.6, got 0.5, tolerance 0.01"),
        ([{"label": "a"}], [{"label": "b"}], "answer[0]['label']: expected 'b', got 'a'"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "answer: expected the keys ['b', 'a'], got ['a', 'b']"),
        ([1, 2], [1, 2, 3], "answer: expected 3 entries, got 2"),
        ([1], (1,), "answer: expected tuple (1,), got list [1]"),
        ({"x": 1}, {"x": 1.0}, "answer['x']: expected float 1.0, got int 1"),
        (
            np.zeros((2, 2)),
            np.array([[0.0, 0.005], [1.0, 2.0]]),
            "answer[1, 0]: expected 1.0, got 0.0, tolerance 0.01 (2 of 4 elements differ)",
        ),
        (np.zeros(2, np.float32), np.zeros(2), "answer: expected ndarray of float64 with shape (2,)"),
        ((torch.zeros(2),), (torch.zeros(3),), "answer[0]: expected Tensor of torch.float32 with shape (3,)"),
        (float("nan"), 0.0, "answer: expected 0.0, got nan"),
    ],
)
def test_first_difference_is_named(candidate: Any, reference: Any, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        assert_same_result(candidate, reference, atol=0.01)


def test_equal_answers_pass_within_the_tolerance() -> None:
    answer = {"a": [0.5, "text", None, (np.float32(1),)], "b": torch.ones(2), "c": float("nan")}
    close = {"a": [0.501, "text", None, (np.float32(1.001),)], "b": torch.ones(2) + 0.001, "c": float("nan")}

    assert_same_result(close, answer, atol=0.01)
    assert_same_result([100.5], [100.0], atol=0.0, rtol=0.01)
    with pytest.raises(AssertionError, match=r"tolerance 0 \+ 0\.001 \* \|expected\|"):
        assert_same_result([100.5], [100.0], atol=0.0, rtol=0.001)
