"""The keywords of a document stay the same, for both components."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCUMENTS = 4


def embeddings(answers: list[Any]) -> NDArray[np.float64]:
    """Return one vector of length 1 for each text: the mean of its tokens."""
    means = np.stack([np.asarray(answer, dtype=np.float64)[0].mean(axis=0) for answer in answers])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def assert_close(actual: NDArray[np.float64], expected: NDArray[np.float64], tolerances: dict[str, float]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerances["rtol"], atol=tolerances["atol"])


def best_keywords(answers: list[Any]) -> list[int]:
    """Return the number of the keyword that is most similar to each document."""
    vectors = embeddings(answers)
    return [int(best) for best in (vectors[:DOCUMENTS] @ vectors[DOCUMENTS:].T).argmax(axis=1)]


def test_embeddings_are_those_of_the_source_model(
    compiled_pipeline: Any,
    test_inputs: list[str],
    inference_params: dict[str, Any],
    expected_predictions: list[Any],
    tolerances: dict[str, float],
) -> None:
    answers = compiled_pipeline(test_inputs, **inference_params)
    assert_close(embeddings(answers), embeddings(expected_predictions), tolerances)


def test_best_keyword_of_each_document_is_the_same(
    compiled_pipeline: Any, test_inputs: list[str], expected_predictions: list[Any]
) -> None:
    assert best_keywords(compiled_pipeline(test_inputs)) == best_keywords(expected_predictions)


def test_text_alone_gets_the_same_embedding_as_in_a_list(
    compiled_pipeline: Any, test_inputs: list[str], tolerances: dict[str, float]
) -> None:
    alone = [compiled_pipeline(text) for text in test_inputs]
    assert_close(embeddings(alone), embeddings(compiled_pipeline(test_inputs)), tolerances)
