"""Scores of compiled cross-encoders, beside those of sentence-transformers for the source model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledPipeline, HfTask
from compileflow.errors import InputError, LoadError, SpecError
from compileflow.source_model.ranking_recipe import read_ranking_recipe
from compileflow.steps.compile import detect_task
from compileflow.steps.report_file import read_report
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import compiled_folder
from compileflow.validation.cases import Case
from compileflow.validation.measure.decisions import Decisions
from tests.models import build_model, sentences
from tests.steps import Pipeline

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

ATOL = 1e-5
DOCUMENTS = [*sentences()[:5], "", " ".join(sentences()[:12])]
PAIRS = [("did it arrive on time", document) for document in DOCUMENTS]
TANH = "torch.nn.modules.activation.Tanh"

MakeModel = Callable[..., Path]


@pytest.fixture
def cross_encoder(tmp_path: Path) -> MakeModel:
    """Write a small classifier: `cross_encoder(labels, "roberta", **settings of config.json)`."""

    def make(labels: int = 1, architecture: str = "bert", **settings: Any) -> Path:
        folder = build_model(tmp_path / "source", HfTask.TEXT_CLASSIFICATION, architecture=architecture)
        config = transformers.AutoConfig.from_pretrained(folder, num_labels=labels)
        torch.manual_seed(4)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
        model.save_pretrained(folder)
        config_path = folder / "config.json"
        config_path.write_text(json.dumps(json.loads(config_path.read_text("utf-8")) | settings), "utf-8")
        return folder

    return make


def reference(folder: Path) -> Any:
    return st.CrossEncoder(str(folder), device="cpu", local_files_only=True)


def saved(folder: Path, **settings: Any) -> Path:
    """Save a model with the files that sentence-transformers writes."""
    model = st.CrossEncoder(str(folder), device="cpu", local_files_only=True, **settings)
    model.save(str(folder.with_name("saved")))
    return folder.with_name("saved")


def compiled(folder: Path, **settings: Any) -> CompiledPipeline:
    artifact = compiled_folder(folder, "torchscript", HfTask.TEXT_CLASSIFICATION, folder.parent)
    return CompiledPipeline.from_pretrained(artifact, task="text-ranking", **settings)


def assert_scores(candidate: Any, expected: Any) -> None:
    assert expected.dtype == np.float32
    assert_same_result(candidate, expected, atol=ATOL)


def test_pairs_are_scored_and_documents_ranked_as_by_the_cross_encoder(cross_encoder: MakeModel) -> None:
    source = saved(
        cross_encoder(),
        activation_fn=torch.nn.Tanh(),
        max_length=40,
        prompts={"query": "find: ", "title": "the title of it: "},
        default_prompt_name="query",
    )
    pipeline, model = compiled(source), reference(source)
    expected = model.predict(PAIRS)

    assert pipeline.task == "text-ranking"
    assert pipeline.max_tokens == 40
    assert_scores(pipeline(PAIRS), expected)
    assert_scores(pipeline.predict([list(pair) for pair in PAIRS], batch_size=2), expected)
    assert_scores(np.stack(list(pipeline(iter(PAIRS)))), expected)
    assert_scores(pipeline(PAIRS[0]), expected[0])
    assert_scores(pipeline(list(PAIRS[0])), expected[0])
    for options in ({"prompt_name": "title"}, {"prompt": ""}, {"activation_fn": torch.nn.Identity()}):
        assert_scores(pipeline(PAIRS, **options), model.predict(PAIRS, **options))
    for options in ({}, {"top_k": 3}, {"return_documents": True}):
        ranked = pipeline.rank(PAIRS[0][0], DOCUMENTS, **options)
        assert_same_result(ranked, model.rank(PAIRS[0][0], DOCUMENTS, **options), atol=ATOL)
    assert pipeline([]).shape == (0,)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sentence_transformers": {"activation_fn": TANH, "version": "5.0.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
)
@pytest.mark.parametrize("labels", [1, 3])
def test_activation_is_that_of_the_configuration(
    cross_encoder: MakeModel, labels: int, settings: dict[str, Any]
) -> None:
    source = cross_encoder(labels, **settings)

    assert read_ranking_recipe(source).activation.name == type(reference(source).activation_fn).__name__
    ranks = bool(settings) and labels == 1
    assert detect_task(source) is (HfTask.TEXT_RANKING if ranks else HfTask.TEXT_CLASSIFICATION)


def test_model_with_several_labels_gives_a_score_for_each(cross_encoder: MakeModel) -> None:
    source = cross_encoder(3, "roberta")
    pipeline, model = compiled(source), reference(source)

    for options in ({}, {"apply_softmax": True}):
        assert_scores(pipeline(PAIRS, **options), model.predict(PAIRS, **options))
        assert_scores(pipeline(PAIRS[1], **options), model.predict(PAIRS[1], **options))
    with pytest.raises(InputError, match="rank needs a model with one label, this one has 3"):
        pipeline.rank("a query", DOCUMENTS)


def test_cross_encoder_passes_with_the_order_of_its_scores(cross_encoder: MakeModel, pipeline: Pipeline) -> None:
    source = saved(cross_encoder())
    request = pipeline.request(source, name="reranker")

    pipeline.run(request)
    artifact = pipeline.compile(request)
    report = read_report(pipeline.validate(request, artifact).report_uri)
    gates = {gate.gate: gate for gate in report.verdict.gates}
    served = CompiledPipeline.from_pretrained(artifact.uri)

    assert gates["order_agreement"].outcome == "pass"
    assert_scores(served(PAIRS), reference(source).predict(PAIRS))


def test_scores_that_change_their_order_are_counted() -> None:
    # Twenty scores; the last two change places, which 1 of each one's 19 neighbours sees.
    before = np.arange(20.0)[:, None]
    after = before.copy()
    after[[18, 19]] = before[[19, 18]]
    decisions = Decisions(HfTask.MULTIPLE_CHOICE)
    texts = tuple(f"text {number}" for number in range(20))
    case = Case("natural", "agreement", texts, {"input_ids": np.zeros((20, 1))}, np.ones((20, 1)))
    decisions.add(case, {"logits": before}, {"logits": after})

    rates = [row for row in decisions.rates() if row["metric"] == "order_agreement"]

    assert sum(row["trials"] for row in rates) == 20 * 19
    assert sum(row["hits"] for row in rates) == 20 * 19 - 2
    assert decisions.flips_count() == 2


def test_modules_behind_the_head_are_refused_before_the_compile(
    cross_encoder: MakeModel, pipeline: Pipeline
) -> None:
    source = saved(cross_encoder())
    modules = json.loads((source / "modules.json").read_text("utf-8"))
    more = [{"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.base.modules.dense.Dense"}]
    (source / "modules.json").write_text(json.dumps(modules + more), "utf-8")

    with pytest.raises(SpecError, match=r"one Transformer.*lists Transformer, Dense\..*text-classification"):
        pipeline.run(pipeline.request(source))
    assert pipeline.counts["compile"] == 0


def test_wrong_inputs_and_settings_are_refused(cross_encoder: MakeModel) -> None:
    source = cross_encoder()
    pipeline = compiled(source)

    for inputs in ("a text", {"text": "a", "text_pair": "b"}):
        with pytest.raises(InputError, match="Expected a pair of texts or a list of pairs, got"):
            pipeline(inputs)
    for pairs in ([("a", "b"), ("a",)], [("a", 2)]):
        with pytest.raises(InputError, match="at position"):
            pipeline(pairs)
    with pytest.raises(LoadError, match=r"no setting 'top_k'.*activation_fn, batch_size"):
        compiled(source, top_k=1)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["sbert_ce_default_activation_function"] = "a.b"
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(LoadError, match=r"The cross-encoder has the activation 'a.b'"):
        read_ranking_recipe(source)
