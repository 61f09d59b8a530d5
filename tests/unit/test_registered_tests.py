"""A registered source version's test files: read, answered by the compiled model, compared and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_store
from compileflow.contracts.digests import list_files
from compileflow.errors import MeasurementError
from compileflow.spec import HfTask
from compileflow.steps.report_file import read_report
from compileflow.steps.values import FetchedSource, ValidatedArtifact
from compileflow.validation.registered_tests import (
    RegisteredTests,
    answer_tests,
    answers_to,
    plain,
    read_registered_tests,
)
from tests.conftest import ModelFactory
from tests.steps import Pipeline

INPUTS = ["It arrived on time.", "It never came, and nobody answered.", "Good."]


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def answers_of(model: Path) -> Any:
    from transformers import pipeline as of_transformers

    return plain(of_transformers("text-classification", model=str(model))(INPUTS, top_k=None))


def validated_with(pipeline: Pipeline, model: Path, tests: Path) -> tuple[FetchedSource, ValidatedArtifact]:
    """Validate a model whose source version came with test files."""
    request = pipeline.request(model, validation={"latency_pairs": 5, "max_examples": 340})
    artifact = pipeline.compile(request)
    stored = open_store(pipeline.store_uri).put_folder(tests)
    source = pipeline.fetch(request).model_copy(update={"test_files_digest": stored.digest})
    pipeline.fetch = lambda _: source  # type: ignore[method-assign]
    return source, pipeline.validate(request, artifact)


def test_compiled_model_answers_the_registered_inputs_and_its_answers_are_kept(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    registered = answers_of(model)
    tests = write(tmp_path / "t", inputs=INPUTS, inference_params={"top_k": None}, predictions=registered)
    _, validated = validated_with(pipeline, model, tests)
    assert validated.outcome == "pass"
    assert validated.figures["registered_disagreement"] == 0.0
    report = read_report(validated.report_uri)
    assert report.examples_origin.startswith("3 test inputs of the source version, and ")
    assert "registered_predictions" in [gate.gate for gate in report.verdict.gates]
    with open_store(pipeline.store_uri).open_folder(validated.report_digest) as folder:
        stored_tests = read_registered_tests(folder / "test_files")
    assert stored_tests.inputs == tuple(INPUTS)
    assert stored_tests.parameters == {"top_k": None}
    assert stored_tests.predictions is not None
    assert RegisteredTests((), {}, tuple(registered)).disagreement(list(stored_tests.predictions)) == 0.0


def test_predictions_that_are_not_repeated_only_warn_and_say_how_many(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    registered = answers_of(model)
    registered[1] = [{"label": "NO SUCH LABEL", "score": 1.0}]
    tests = write(tmp_path / "t", inputs=INPUTS, inference_params={"top_k": None}, predictions=registered)
    _, validated = validated_with(pipeline, model, tests)
    assert validated.outcome == "warn"
    assert "registered_predictions measured 0.3333" in validated.reason


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({"label": "a", "score": 0.9}, [{"label": "a", "score": 0.904}], True),
        ([{"label": "a", "score": 0.9}], {"label": "a", "score": 0.9}, True),
        ({"label": "a", "score": 0.9}, {"label": "b", "score": 0.9}, False),
        ({"label": "a", "score": 0.9}, {"label": "a", "score": 0.88}, False),
        ({"start": 3, "answer": "x"}, {"start": 4, "answer": "x"}, False),
        ([[1.0, -2.0]], [[1.0, -2.001]], True),
        ([[1.0, -2.0]], [[1.0]], False),
        ({"label": "a"}, {"label": "a", "score": 1.0}, False),
        (1, 1.0, True),
        (True, 1, True),
        (0.5, None, False),
        (10**400, 0.5, False),
    ],
)
def test_words_must_be_equal_and_numbers_close(before: Any, after: Any, same: bool) -> None:
    assert RegisteredTests(("x",), {}, (before,)).disagreement([after]) == (0.0 if same else 1.0)


KEYWORDS = [[["order", 0.61], ["time", 0.4]], [["nobody", 0.7]], []]


@pytest.mark.parametrize(
    ("inputs", "parameters", "predictions", "judged", "note"),
    [
        (INPUTS, {}, [{"label": "A", "score": 1.0}] * 3, True, ""),
        (INPUTS, {}, [[{"label": "A", "score": 1.0}]] * 3, True, ""),
        (INPUTS, {}, KEYWORDS, False, "do not have the format of the pipeline"),
        (INPUTS, {}, [{"topic": "A"}] * 3, False, "do not have the format of the pipeline"),
        (INPUTS, {"keyphrase_ngram_range": [1, 1]}, KEYWORDS, False, "parameters are not those of the pipeline"),
        ([["a", "b"], ["c"]], {}, [[], []], False, "they are not inputs of a text-classification pipeline"),
    ],
)
def test_only_answers_in_the_format_of_the_pipeline_are_judged(
    inputs: list[Any], parameters: dict[str, Any], predictions: list[Any], judged: bool, note: str
) -> None:
    def pipeline(texts: list[str], top_k: int = 1) -> list[dict[str, Any]]:
        return [{"label": "A", "score": 1.0} for _ in texts]

    tests = RegisteredTests(tuple(inputs), parameters, tuple(predictions))
    answered = answer_tests(tests, pipeline, HfTask.TEXT_CLASSIFICATION)

    assert answered.disagreement == (0.0 if judged else None)
    assert note in answered.tests.note
    assert bool(answered.tests.note) is not judged
    assert (answered.answers is None) == (not isinstance(inputs[0], str))


def test_predictions_of_a_service_are_reported_and_not_judged(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    tests = write(
        tmp_path / "t", inputs=INPUTS, inference_params={"keyphrase_ngram_range": [1, 1]}, predictions=KEYWORDS
    )
    _, validated = validated_with(pipeline, model, tests)

    assert validated.outcome == "pass"
    assert "registered_disagreement" not in validated.figures
    assert "were not judged" in read_report(validated.report_uri).examples_origin


@pytest.mark.parametrize(
    "parameters",
    [
        {"custom_generate": "place", "trust_remote_code": True, "max_new_tokens": 2},
        {"num_workers": 4},
        {"tokenizer": "place"},
        {"top_k": {"place": 1}},
    ],
)
def test_parameters_that_run_code_or_open_files_are_never_passed_on(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", inputs=["a"], inference_params=parameters, predictions=["A"])
    tests = read_registered_tests(folder)
    assert tests.parameters == {}
    answered = answer_tests(tests, lambda texts: ["B" for _ in texts], HfTask.TEXT_GENERATION)
    assert (answered.answers, answered.disagreement) == (["B"], None)
    assert "its parameters are not those of the pipeline" in answered.tests.note


@pytest.mark.parametrize("item", ["http://127.0.0.1/secret", "/etc/passwd", {"image": "file.png"}, [[["x"]]]])
def test_inputs_that_name_files_or_addresses_are_not_opened(item: Any) -> None:
    def pipeline(_: list[Any]) -> list[Any]:
        raise AssertionError("The pipeline was called.")

    for task in (HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION):
        answered = answer_tests(RegisteredTests((item,), {}, ("A",)), pipeline, task)
        assert (answered.answers, answered.disagreement) == (None, None)
        assert "they are not inputs" in answered.tests.note


def test_questions_with_contexts_are_natural_examples_of_their_task() -> None:
    question = {"question": "Who?", "context": "Me.", "extra": 1}
    tests = RegisteredTests((question, {"question": "Who?"}, "text"), {}, None)
    assert tests.examples(HfTask.QUESTION_ANSWERING) == [{"question": "Who?", "context": "Me."}]
    assert tests.examples(HfTask.TOKEN_CLASSIFICATION) == [{"text": "text"}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"inputs": "not json"}, r"inputs\.json cannot be read"),
        ({"inputs": {}}, r"Expected a JSON list in .*inputs\.json, got dict"),
        ({"inputs": []}, "inputs.json is empty"),
        ({"inputs": ["a"], "predictions": []}, "1 test inputs and 0 predictions"),
        (
            {"inputs": ["a"], "inference_params": []},
            r"Expected a JSON object in .*inference_params\.json, got list",
        ),
        ({}, r"inputs\.json cannot be read"),
    ],
)
def test_malformed_test_files_are_one_clear_error(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=message):
        read_registered_tests(write(tmp_path / "t", **files))


def test_every_input_must_have_one_answer() -> None:
    two = RegisteredTests(("a", "b"), {"top_k": 1}, None)
    assert answers_to(two, lambda inputs, top_k: [(text, top_k) for text in inputs]) == [["a", 1], ["b", 1]]
    assert answers_to(RegisteredTests(("a",), {}, None), lambda inputs: {"answer": "x"}) == [{"answer": "x"}]
    with pytest.raises(MeasurementError, match=r"Expected one answer for each of .* 2 test inputs, got 1"):
        answers_to(two, lambda inputs, top_k: ["a"])


def test_test_files_that_the_pipeline_does_not_take_are_one_clear_error() -> None:
    def pipeline(inputs: list[str]) -> list[str]:
        return inputs

    with pytest.raises(MeasurementError, match="unexpected keyword argument 'temperature'") as caught:
        answers_to(RegisteredTests(("a",), {"temperature": 1}, None), pipeline)
    assert "inference_params.json" in caught.value.hint


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    assert plain({"score": float("nan"), "values": (1, 2.5)}) == {"score": None, "values": [1, 2.5]}
    assert list_files(write(tmp_path / "t", inputs=["a"]))
