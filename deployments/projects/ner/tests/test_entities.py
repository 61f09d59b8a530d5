"""Persons, organizations and places in English and Japanese texts stay the same."""

from __future__ import annotations

from typing import Any

import pytest


def entities(answers: list[Any]) -> list[list[tuple[str, str, int, int]]]:
    """Return label, word, start and end of each token that is part of an entity."""
    return [[(token["entity"], token["word"], token["start"], token["end"]) for token in text] for text in answers]


def scores(answers: list[Any]) -> list[float]:
    """Return the probability of each of these labels."""
    return [float(token["score"]) for text in answers for token in text]


def test_entities_and_their_scores_are_those_of_the_source_model(
    compiled_pipeline: Any,
    test_inputs: list[str],
    inference_params: dict[str, Any],
    expected_predictions: list[Any],
    tolerances: dict[str, float],
) -> None:
    answers = compiled_pipeline(test_inputs, **inference_params)
    assert entities(answers) == entities(expected_predictions)
    assert scores(answers) == pytest.approx(
        scores(expected_predictions), rel=tolerances["rtol"], abs=tolerances["atol"]
    )


def test_six_texts_at_once_get_the_answers_of_each_text_alone(
    compiled_pipeline: Any, test_inputs: list[str]
) -> None:
    together = compiled_pipeline(test_inputs[:6], batch_size=6)
    assert entities(together) == entities([compiled_pipeline(text) for text in test_inputs[:6]])


def test_long_text_is_cut_where_the_source_model_cuts_it(
    compiled_pipeline: Any, reference_pipeline: Any, test_inputs: list[str]
) -> None:
    text = " ".join(test_inputs * 20)
    assert entities([compiled_pipeline(text)]) == entities([reference_pipeline(text)])
