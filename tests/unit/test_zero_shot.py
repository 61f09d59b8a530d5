"""Zero-shot classification with a model compiled for text classification, compared with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from compileflow import CompiledPipeline, HfTask
from compileflow.errors import LoadError
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.shared import shared_folder
from compileflow.testing.targets import compiled_folder
from tests.models import sentences
from tests.unit.run_counter import counted

TARGETS = ("torchscript", "onnx-runtime")
TEXTS = [*sentences()[:6], "a", " ".join(sentences()[:40]), *sentences()[6:9]]
LABELS = ["politics", "public health", "a much longer label of several words", "science"]


@pytest.fixture(scope="session")
def nli_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text classification whose labels are those of natural language inference."""
    folder = tmp_path_factory.mktemp("models") / "nli"
    shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = ("contradiction", "neutral", "entailment")
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="session")
def reference(nli_model: Path) -> Any:
    """transformers' own pipeline around the source model."""
    return transformers.pipeline("zero-shot-classification", model=str(nli_model), device="cpu")


@pytest.fixture(params=TARGETS)
def pipeline(
    request: pytest.FixtureRequest, nli_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> CompiledPipeline:
    """The compiled model, asked for the task that it was not compiled for."""
    folder = compiled_folder(nli_model, request.param, HfTask.TEXT_CLASSIFICATION, shared_folder(tmp_path_factory))
    return CompiledPipeline.from_pretrained(folder, task="zero-shot-classification")


@pytest.mark.parametrize(
    "settings",
    [
        {"candidate_labels": LABELS},
        {"candidate_labels": LABELS, "multi_label": True},
        {"candidate_labels": "politics, public health,science"},
        {"candidate_labels": LABELS[:1]},
        {"candidate_labels": LABELS, "hypothesis_template": "It is about {}."},
    ],
)
def test_text_and_list_are_answered_as_in_transformers(
    pipeline: CompiledPipeline, reference: Any, settings: dict[str, Any]
) -> None:
    expected = reference(TEXTS, **settings)
    labels, other_settings = (
        settings["candidate_labels"],
        {k: v for k, v in settings.items() if k != "candidate_labels"},
    )

    assert_same_result(pipeline(TEXTS[0], **settings), reference(TEXTS[0], **settings))
    # The labels may also be passed by position.
    assert_same_result(pipeline(TEXTS, labels, **other_settings), expected)
    for batch_size in (None, 1, 3, 64):
        assert_same_result(pipeline(TEXTS, batch_size=batch_size, **settings), expected)
    assert len({tuple(answer["labels"]) for answer in expected}) > 1 or len(expected[0]["labels"]) == 1


def test_hypotheses_of_all_texts_share_calls(pipeline: CompiledPipeline) -> None:
    # Each pair is 9 to 16 tokens: the static graph's bucket of several rows is 4x16.
    texts, labels = ["the", "of", "and", "in"], ["one", "new", "more"]
    runs = counted(pipeline)

    pipeline(texts, candidate_labels=labels, hypothesis_template="it is all of the {}")

    dynamic = pipeline.model.graph.record.dynamic_axes
    assert [rows for rows, _ in runs.shapes] == ([12] if dynamic else [4, 4, 4])


def test_text_without_words_and_missing_labels_fail_as_in_transformers(
    pipeline: CompiledPipeline, reference: Any
) -> None:
    for texts, labels in ((["one", ""], LABELS), (["one", "two"], [])):
        with pytest.raises(ValueError, match="at least one label and at least one sequence") as expected:
            reference(texts, candidate_labels=labels)
        with pytest.raises(ValueError, match="at least one label and at least one sequence") as caught:
            pipeline(texts, candidate_labels=labels)
        assert str(caught.value) == str(expected.value)


def test_task_that_the_graph_does_not_serve_is_refused_with_those_it_serves(
    nli_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = compiled_folder(nli_model, "torchscript", HfTask.TEXT_CLASSIFICATION, shared_folder(tmp_path_factory))

    with pytest.raises(LoadError, match=r"fill-mask.*It serves: text-classification, zero-shot-classification"):
        CompiledPipeline.from_pretrained(folder, task="fill-mask")
