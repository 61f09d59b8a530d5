"""Compiled tokenizer, model and pipeline: they answer like the source model's, load anywhere.

Over 300 lines, because all of it shares one set of compiled models.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask
from compileflow.artifact.manifest import MANIFEST_NAME
from compileflow.errors import InputError, LoadError, StoreError
from compileflow.settings import Settings
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.stores.local import LocalStore
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.shared import shared_folder
from compileflow.testing.targets import compiled_folder, hide_distributions
from tests.models import ARCHITECTURES, MAX_TOKENS, TEXT_GRAPHS, sentences

TARGETS = ("onnx-runtime", "torchscript")
PIPELINE_TASKS = tuple(task for task in TEXT_GRAPHS if task.pipeline_owner == "transformers")
# The inputs of multiple choice have an axis more: tests/unit/test_multiple_choice.py.
MODEL_TASKS = tuple(task for task in TEXT_GRAPHS if task is not HfTask.MULTIPLE_CHOICE)
ATOL = 1e-5
TEXTS = sentences()

Compiled = Callable[..., Path]


# An ONNX export takes seconds, a trace tenths: of the former, one architecture is enough for each run.
CELLS = [
    pytest.param(
        target,
        architecture,
        marks=pytest.mark.slow if (target, architecture != "bert") == ("onnx-runtime", True) else (),
    )
    for target in TARGETS
    for architecture in ARCHITECTURES
]


@pytest.fixture(scope="session")
def compiled(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compile small models once a session: `compiled(target, task, architecture)` gives a folder to read only."""

    def make(target: str, hf_task: HfTask, architecture: str = "bert") -> Path:
        return compiled_folder(tiny_model(hf_task, architecture), target, hf_task, shared_folder(tmp_path_factory))

    return make


@pytest.fixture(scope="session")
def model_of(compiled: Compiled) -> Callable[..., CompiledModel]:
    """Load compiled models once a session."""
    return cache(lambda *asked: CompiledModel.from_pretrained(compiled(*asked)))


@pytest.fixture(scope="session")
def source_of(tiny_model: Callable[..., Path]) -> Callable[[HfTask, str], Any]:
    """Load source models with transformers itself, once a session."""

    @cache
    def load(hf_task: HfTask, architecture: str) -> Any:
        folder = tiny_model(hf_task, architecture)
        return getattr(transformers, AUTO_CLASSES[hf_task]).from_pretrained(folder).eval()

    return load


@pytest.fixture
def artifact(compiled: Compiled, tmp_path: Path) -> Path:
    """A copy of one artifact, to be damaged."""
    folder = tmp_path / "artifact"
    shutil.copytree(compiled("torchscript", HfTask.TEXT_CLASSIFICATION), folder)
    return folder


def inputs_for(model: Any, rows: int, length: int, *, side: str = "right") -> dict[str, torch.Tensor]:
    """Random tokens with ragged masks, padded on a side, and both token types where the model has them."""
    random = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=random)
    places = torch.arange(length).expand(rows, length)
    # The first row is full, the later ones are shorter.
    keep = torch.tensor([max(1, length - 2 * row) for row in range(rows)])[:, None]
    mask = (places < keep if side == "right" else places >= length - keep).long()
    ids = torch.where(mask.bool(), ids, torch.tensor(model.config.pad_token_id))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = (places % 3 == 0).long() * mask
    return inputs


@pytest.mark.parametrize("hf_task", MODEL_TASKS)
@pytest.mark.parametrize(("target", "architecture"), CELLS)
class TestModelAnswersLikeItsSource:
    # Bucket edges of 1x8, 4x16 and 1x64, one beyond each, and batches that must be split.
    @pytest.mark.parametrize(
        ("rows", "length"), [(1, 1), (1, 8), (1, 9), (4, 16), (2, 17), (1, 64), (3, 8), (6, 10)]
    )
    def test_at_bucket_edges_and_with_larger_batches(
        self,
        model_of: Callable[..., CompiledModel],
        source_of: Callable[..., Any],
        target: str,
        architecture: str,
        hf_task: HfTask,
        rows: int,
        length: int,
    ) -> None:
        model, source = model_of(target, hf_task, architecture), source_of(hf_task, architecture)
        inputs = inputs_for(source, rows, length)
        with torch.inference_mode():
            assert_same_result(model(**inputs), source(**inputs), atol=ATOL)

    def test_with_left_padding_without_optional_inputs_and_as_a_tuple(
        self,
        model_of: Callable[..., CompiledModel],
        source_of: Callable[..., Any],
        target: str,
        architecture: str,
        hf_task: HfTask,
    ) -> None:
        model, source = model_of(target, hf_task, architecture), source_of(hf_task, architecture)
        assert type(model).__name__ == type(source).__name__
        left = inputs_for(source, 3, 12, side="left")
        full = inputs_for(source, 1, 11)
        ids = full["input_ids"]
        with torch.inference_mode():
            assert_same_result(model(**left), source(**left), atol=ATOL)
            assert_same_result(model(ids), source(ids), atol=ATOL)
            assert_same_result(
                model(ids, attention_mask=full["attention_mask"]),
                source(ids, attention_mask=full["attention_mask"]),
                atol=ATOL,
            )
            plain, reference = model(**left, return_dict=False), source(**left, return_dict=False)
        assert type(reference) is tuple
        assert_same_result(plain, reference, atol=ATOL)


@pytest.mark.parametrize("hf_task", PIPELINE_TASKS)
@pytest.mark.parametrize(("target", "architecture"), CELLS)
def test_pipeline_answers_like_transformers_own(
    compiled: Compiled, tiny_model: Callable[..., Path], target: str, architecture: str, hf_task: HfTask
) -> None:
    pipeline = CompiledPipeline.from_pretrained(compiled(target, hf_task, architecture))
    reference = transformers.pipeline(hf_task.value, model=str(tiny_model(hf_task, architecture)))
    texts = [TEXTS[0], "", " ".join(TEXTS[:40]), TEXTS[1]]
    if hf_task is HfTask.FILL_MASK:
        mask = pipeline.tokenizer.mask_token
        texts = [f"the {mask} is here", f"{mask}", f"{mask} {' '.join(TEXTS[:40])}", f"a {mask}."]
    # A compiled pipeline always truncates; pipelines of transformers truncate with one of three settings.
    truncated: dict[str, Any] = {
        HfTask.FEATURE_EXTRACTION: {"truncation": True},
        HfTask.TEXT_CLASSIFICATION: {"truncation": True},
        HfTask.TOKEN_CLASSIFICATION: {},
        HfTask.FILL_MASK: {"tokenizer_kwargs": {"truncation": True}},
    }[hf_task]
    # Hugging Face's pipelines give one prediction fewer brackets, so that each is called both ways.
    expected = [reference(text, **truncated) for text in texts]

    for text, answer in zip(texts, expected, strict=True):
        assert_same_result(pipeline(text), answer)
    assert_same_result(pipeline(texts), reference(texts, **truncated))
    # transformers' own batches give features of the padding back; ours are those of one text at a time.
    assert_same_result(pipeline(texts, batch_size=3), reference(texts, **truncated))

    def generate() -> Iterator[str]:
        yield from texts

    streamed = list(pipeline(generate()))
    assert_same_result(streamed, list(reference(generate(), **truncated)))
    assert len(streamed) == len(texts)


@pytest.mark.parametrize("target", TARGETS)
def test_pipeline_passes_settings_of_its_task_on(
    compiled: Compiled, tiny_model: Callable[..., Path], target: str
) -> None:
    hf_task = HfTask.TOKEN_CLASSIFICATION
    settings: dict[str, Any] = {"aggregation_strategy": "simple"}
    pipeline = CompiledPipeline.from_pretrained(compiled(target, hf_task), **settings)
    reference = transformers.pipeline(hf_task.value, model=str(tiny_model(hf_task)), **settings)
    assert_same_result(pipeline(TEXTS[:3]), reference(TEXTS[:3]))

    hf_task = HfTask.TEXT_CLASSIFICATION
    pipeline = CompiledPipeline.from_pretrained(compiled(target, hf_task), top_k=None)
    reference = transformers.pipeline(hf_task.value, model=str(tiny_model(hf_task)), top_k=None)
    assert_same_result(pipeline(TEXTS[:3]), reference(TEXTS[:3]))
    pair = {"text": TEXTS[0], "text_pair": "a second text"}
    assert_same_result(pipeline(pair), reference(pair))


@pytest.mark.parametrize("target", TARGETS)
def test_question_answering_finds_the_span_that_the_source_model_finds(
    compiled: Compiled,
    model_of: Callable[..., CompiledModel],
    source_of: Callable[..., Any],
    target: str,
) -> None:
    hf_task = HfTask.QUESTION_ANSWERING
    tokenizer = CompiledTokenizer.from_pretrained(compiled(target, hf_task))
    encoded = tokenizer(["who was it", "where"], TEXTS[:2], return_tensors="pt")
    answer = model_of(target, hf_task, "bert")(**encoded)
    with torch.inference_mode():
        expected = source_of(hf_task, "bert")(**encoded)

    for name in ("start_logits", "end_logits"):
        assert answer[name].shape == encoded["input_ids"].shape
        assert answer[name].argmax(1).tolist() == expected[name].argmax(1).tolist()


def test_tokenizer_fits_the_compiled_model_by_default_and_the_call_wins(artifact: Path) -> None:
    tokenizer = CompiledTokenizer.from_pretrained(artifact)

    assert tokenizer.tokenization_settings == {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
    long = tokenizer(["short", " ".join(TEXTS[:40])], return_tensors="pt")
    assert long["input_ids"].shape == (2, MAX_TOKENS)
    assert long["attention_mask"].sum(1)[0] < MAX_TOKENS
    assert len(tokenizer(" ".join(TEXTS), max_length=5)["input_ids"]) == 5
    assert [len(row) for row in tokenizer(["a", "a b c"], padding=False)["input_ids"]] == [3, 5]


def test_tokenizer_hands_everything_else_on(artifact: Path) -> None:
    tokenizer = CompiledTokenizer.from_pretrained(artifact)
    wrapped = transformers.AutoTokenizer.from_pretrained(artifact)

    assert tokenizer.unk_token_id == wrapped.unk_token_id
    assert tokenizer._tokenizer.get_vocab_size() == len(wrapped)
    assert len(tokenizer) == len(wrapped)
    assert tokenizer.decode(tokenizer("the")["input_ids"]) == wrapped.decode(wrapped("the")["input_ids"])
    assert tokenizer.model_max_length == MAX_TOKENS
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = tokenizer.no_such_attribute


def test_attribute_set_on_the_tokenizer_reaches_the_one_that_pads(artifact: Path) -> None:
    tokenizer = CompiledTokenizer.from_pretrained(artifact)
    tokenizer.padding_side = "left"
    tokenizer.tokenization_settings = {"padding": "max_length", "max_length": 6}
    tokenizer.note = "own"

    assert tokenizer("a")["attention_mask"] == [0, 0, 0, 1, 1, 1]
    assert tokenizer.tokenizer.padding_side == "left"
    assert not hasattr(tokenizer.tokenizer, "note")


def test_pipeline_hands_its_parts_on(artifact: Path) -> None:
    pipeline = CompiledPipeline.from_pretrained(artifact)

    assert isinstance(pipeline.model, CompiledModel)
    assert isinstance(pipeline.tokenizer, CompiledTokenizer)
    assert pipeline.task == "text-classification"
    assert pipeline.model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert "text-classification" in repr(pipeline)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = pipeline.no_such_attribute


def test_model_has_the_source_models_config(artifact: Path) -> None:
    model = CompiledModel.from_pretrained(artifact)

    assert model.num_labels == 3
    assert model.config.model_type == "bert"
    assert model.eval() is model
    assert model.to("cpu") is model
    assert not model.can_generate()
    assert repr(model) == (
        "CompiledModel(BertForSequenceClassification, target='torchscript', component='default')"
    )
    assert CompiledModel.__name__ == "CompiledModel"
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute
    with pytest.raises(LoadError, match=r"cannot be moved to cuda.*device='cuda'"):
        model.to("cuda")


def test_model_refuses_what_the_graph_cannot_give(artifact: Path) -> None:
    model = CompiledModel.from_pretrained(artifact)
    ids = torch.ones((1, 4), dtype=torch.long)

    with pytest.raises(InputError, match="output_attentions=True"):
        model(ids, output_attentions=True)
    with pytest.raises(InputError, match="no input 'labels'"):
        model(ids, labels=torch.tensor([1]))
    with pytest.raises(InputError, match=r"65 tokens.*at most 64"):
        model(torch.ones((1, 65), dtype=torch.long))
    with pytest.raises(InputError, match=r"different lengths.*padding=True"):
        model([[1, 2, 3], [1, 2]])
    assert model(ids, output_attentions=False, position_ids=None).logits.shape == (1, 3)


def test_lists_arrays_and_tensors_give_the_same_answer(artifact: Path) -> None:
    model = CompiledModel.from_pretrained(artifact)
    ids = [[5, 6, 7], [8, 9, 10]]

    answers = [
        model(form).logits
        for form in (ids, np.array(ids, dtype=np.int32), torch.tensor(ids), torch.tensor(ids).T.contiguous().T)
    ]

    for answer in answers:
        assert torch.equal(answer, answers[0])
    arrays = model.run({"input_ids": ids})
    assert list(arrays) == ["logits"]
    np.testing.assert_array_equal(arrays["logits"], answers[0].numpy())


def test_closed_model_says_so(artifact: Path) -> None:
    model = CompiledModel.from_pretrained(artifact)
    model.close()
    model.close()

    with pytest.raises(InputError, match="closed"):
        model([[1, 2]])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [CompiledTokenizer, CompiledModel, CompiledPipeline])
def test_saved_artifact_loads_elsewhere(compiled: Compiled, tmp_path: Path, target: str, kind: type[Any]) -> None:
    source = compiled(target, HfTask.TEXT_CLASSIFICATION)
    first = tmp_path / "first"
    kind.from_pretrained(source).save_pretrained(first)
    assert (first / MANIFEST_NAME).read_bytes() == (source / MANIFEST_NAME).read_bytes()
    first.rename(tmp_path / "second")

    reloaded = CompiledPipeline.from_pretrained(tmp_path / "second")

    assert_same_result(reloaded(TEXTS[:3]), CompiledPipeline.from_pretrained(source)(TEXTS[:3]))


def test_saving_into_a_folder_that_is_not_empty_is_refused(artifact: Path, tmp_path: Path) -> None:
    tokenizer = CompiledTokenizer.from_pretrained(artifact)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").write_text("mine")

    with pytest.raises(StoreError, match="not empty"):
        tokenizer.save_pretrained(occupied)

    assert [path.name for path in occupied.iterdir()] == ["file"]


def test_copies_answer_like_the_original(artifact: Path) -> None:
    tokenizer, pipeline = CompiledTokenizer.from_pretrained(artifact), CompiledPipeline.from_pretrained(artifact)
    model = pipeline.model

    for copied in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(copied, CompiledTokenizer)
        assert copied(TEXTS[0]) == tokenizer(TEXTS[0])
        assert copied.tokenization_settings == tokenizer.tokenization_settings
    assert torch.equal(copy.copy(model)([[5, 6]]).logits, model([[5, 6]]).logits)
    assert copy.copy(pipeline)(TEXTS[0]) == pipeline(TEXTS[0])


@pytest.mark.parametrize("kind", [CompiledTokenizer, CompiledModel, CompiledPipeline])
def test_wrapper_without_its_inside_has_no_attributes_and_does_not_recurse(kind: type[Any]) -> None:
    # Copying and unpickling ask such an object for __setstate__ and more.
    empty = kind.__new__(kind)

    with pytest.raises(AttributeError):
        _ = empty.unk_token_id


@pytest.mark.parametrize("kind", [CompiledModel, CompiledPipeline])
def test_missing_runtime_is_one_clear_error(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    folder = compiled("onnx-runtime", HfTask.TEXT_CLASSIFICATION)
    hide_distributions(monkeypatch, "onnxruntime")

    with pytest.raises(LoadError) as caught:
        kind.from_pretrained(folder)

    assert str(caught.value) == (
        "onnx-runtime cannot run here: onnxruntime is not installed. Try: pip install 'compileflow[onnx-runtime]'."
    )


def test_exporter_is_not_needed_to_run(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_distributions(monkeypatch, "onnx", "onnxscript")

    model = CompiledModel.from_pretrained(compiled("onnx-runtime", HfTask.TEXT_CLASSIFICATION))

    assert model([[5, 6]]).logits.shape == (1, 3)


def test_store_uri_is_fetched_once_into_the_local_cache(
    artifact: Path, settings: Settings, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    stored = LocalStore(root.as_uri(), settings).put_folder(artifact)
    pipeline = CompiledPipeline.from_pretrained(stored.uri)
    cached = settings.home_dir / "artifacts" / stored.digest
    shutil.rmtree(root)

    reloaded = CompiledPipeline.from_pretrained(stored.uri)

    assert reloaded(TEXTS[0]) == pipeline(TEXTS[0])
    assert Path(reloaded.model.name_or_path) == cached
    assert [path.name for path in cached.parent.iterdir()] == [stored.digest]
