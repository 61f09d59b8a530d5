"""What a text model is found to be by running it: its attention, its rows, its longest row, and its padding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from benchmarks.architectures.tiny_models import ModelClass, write_model
from compileflow import CompiledModel
from compileflow.artifact.manifest import read_manifest
from compileflow.contracts import TensorRecord
from compileflow.errors import SourceError, SpecError
from compileflow.serving.padding import complete_inputs
from compileflow.serving.rows import PreparedItem, run_rows
from compileflow.source_model.examples import example_inputs, example_length
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model, load_tokenizer
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.source_model.token_rows import TokenRows, token_rows
from compileflow.spec import CompileSpec, HfTask
from compileflow.steps.plan import source_limits
from tests.in_process import InProcess

# The fused sdpa graph of BART answers wrongly in some versions of ONNX Runtime.
ATTENTIONS = {"bart": ("sdpa", "eager"), "xlnet": ("eager",), "deberta-v2": ("eager",)}
CLASSIFY, QUESTIONS, FEATURES = HfTask.TEXT_CLASSIFICATION, HfTask.QUESTION_ANSWERING, HfTask.FEATURE_EXTRACTION


def tiny_folder(tmp_path: Path, model_type: str, hf_task: HfTask, **values: object) -> Path:
    """Write a small random model of a type, with other values in its config.json."""
    auto_class = AUTO_CLASSES[hf_task]
    names = getattr(transformers, auto_class)._model_mapping._model_mapping[model_type]
    name = names if isinstance(names, str) else names[0]
    model_class = ModelClass(hf_task, auto_class, model_type, name)
    folder = tmp_path / f"{model_type}-model"
    write_model(model_class, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("model_type", "hf_task", "attention", "padding"),
    [
        ("bert", CLASSIFY, "sdpa", "right"),
        ("deberta-v2", CLASSIFY, "eager", "right"),
        ("mpnet", FEATURES, "eager", "right"),
        ("bart", CLASSIFY, "sdpa", "right"),
        ("llama", CLASSIFY, "sdpa", "right"),
        # Its classifier reads the last position.
        ("xlnet", CLASSIFY, "eager", "left"),
        # It reads the neighbours of a token, which the mask does not hide.
        ("mobilebert", QUESTIONS, "sdpa", "none"),
        ("convbert", CLASSIFY, "eager", "none"),
    ],
)
def test_best_attention_and_the_side_of_the_padding_are_found(
    tmp_path: Path, model_type: str, hf_task: HfTask, attention: str, padding: str
) -> None:
    source = load_source_model(tiny_folder(tmp_path, model_type, hf_task), hf_task)

    assert (source.attention, source.padding) == (attention, padding)


def test_preferred_attention_is_used(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "bert", CLASSIFY)

    assert load_source_model(folder, CLASSIFY, attention="eager").attention == "eager"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"return_dict": False}, "config.json asks for tuples"),
        ({"output_hidden_states": True, "output_attentions": True}, "config.json asks for more outputs"),
        ({"max_position_embeddings": 8}, "few positions"),
        ({"max_position_embeddings": 5}, "very few positions"),
        ({"max_position_embeddings": 4}, "the fewest positions"),
    ],
)
def test_odd_configurations_leave_the_interface_alone(
    tmp_path: Path, values: dict[str, object], reason: str
) -> None:
    folder = tiny_folder(tmp_path, "bert", CLASSIFY)
    positions = values.get("max_position_embeddings")
    if positions is not None:
        cut_positions(folder, int(str(positions)))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), "utf-8")

    source = load_source_model(folder, CLASSIFY)

    assert {record.name: record.axes for record in source.outputs} == {"logits": ("batch", 3)}, reason
    assert source.longest == (positions or config["max_position_embeddings"])


def cut_positions(folder: Path, count: int) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.position_embeddings.weight"
    weights[name] = weights[name][:count].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_model_of_two_parts_is_refused_before_it_is_loaded(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")

    with pytest.raises(SpecError, match=r"takes text and image inputs together") as caught:
        load_source_model(folder, FEATURES)

    assert "TextModel or " in caught.value.hint


@pytest.mark.parametrize("model_type", ["dbrx", "switch_transformers"])
def test_model_that_loops_over_chosen_experts_is_refused(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(SourceError, match="loops over the experts"):
        load_source_model(tiny_folder(tmp_path, model_type, FEATURES), FEATURES)


# The configuration of zaya does not tell. transformers gives xlnet a cache of its own.
@pytest.mark.parametrize("model_type", ["mamba2", "zaya", "xlnet"])
def test_decoder_that_carries_a_state_is_refused(tmp_path: Path, model_type: str) -> None:
    task = HfTask.TEXT_GENERATION
    with pytest.raises(SourceError, match="carries a state from token to token"):
        load_source_model(tiny_folder(tmp_path, model_type, task), task)


def test_model_that_returns_tuples_only_is_refused(tmp_path: Path) -> None:
    task = HfTask.IMAGE_FEATURE_EXTRACTION
    with pytest.raises(SourceError, match="its outputs are feature_maps"):
        load_source_model(tiny_folder(tmp_path, "hgnet_v2", task), task)


@pytest.mark.parametrize(
    ("model_type", "task", "says"),
    [
        ("paligemma", HfTask.FEATURE_EXTRACTION, "differently if another row of a batch is padded"),
        ("vit_mae", HfTask.IMAGE_FEATURE_EXTRACTION, "different answers to the same input"),
    ],
)
def test_model_whose_answers_vary_is_refused(tmp_path: Path, model_type: str, task: HfTask, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        load_source_model(tiny_folder(tmp_path, model_type, task), task)


def test_output_that_is_an_input_is_left_out(tmp_path: Path) -> None:
    task = HfTask.FEATURE_EXTRACTION
    source_model = load_source_model(tiny_folder(tmp_path, "qwen2_audio", task), task)
    assert [record.name for record in source_model.outputs] == ["last_hidden_state"]


def test_model_that_does_not_repeat_its_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def noisy_forward(self: BertForSequenceClassification, **inputs: object) -> object:
        answer = forward(self, **inputs)
        answer.logits = answer.logits + torch.rand(1)
        return answer

    folder = tiny_folder(tmp_path, "bert", CLASSIFY)
    noisy_forward.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(BertForSequenceClassification, "forward", noisy_forward)

    with pytest.raises(SourceError, match="different answers to the same input"):
        load_source_model(folder, CLASSIFY)


@pytest.mark.parametrize(
    ("chunk", "longest", "length"),
    [(0, 512, 16), (16, 124, 25), (256, 4096, 385), (256, 128, 128), (256, 256, 255)],
)
def test_example_has_two_parts_and_the_second_one_is_not_full(chunk: int, longest: int, length: int) -> None:
    ids = TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence"))

    assert example_length([ids], longest, chunk=chunk) == length


def test_model_of_state_spaces_says_how_long_its_parts_are(tmp_path: Path) -> None:
    source = load_source_model(tiny_folder(tmp_path, "mamba2", FEATURES), FEATURES)

    assert source.chunk == source.model.config.chunk_size
    assert source.export_tensors(124)["input_ids"].shape[1] > source.chunk


def test_exporters_find_no_function_that_numbers_the_positions_of_images(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "ernie4_5_vl_moe", FEATURES)

    source = load_source_model(folder, FEATURES)

    assert isinstance(source.model, transformers.Ernie4_5_VLMoeModel)
    assert not hasattr(source.model, "get_rope_index")
    assert [record.name for record in source.inputs] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("config", "longest_piece"),
    [
        (transformers.BertConfig(), None),
        (transformers.JambaConfig(), None),
        (transformers.FunnelConfig(), 0),
        (transformers.Qwen3_5Config(), None),
        (transformers.CanineConfig(), 128),
        (transformers.MiniMaxConfig(block_size=64), 64),
    ],
)
def test_longest_piece_follows_from_the_type_of_the_model(
    config: transformers.PreTrainedConfig, longest_piece: int | None
) -> None:
    source = SourceModel(SimpleNamespace(config=config), (), (), "", 0, 0)
    spec = CompileSpec(target="onnx-runtime", hf_task=FEATURES)

    assert source_limits(source, spec, None).longest_piece == longest_piece


def test_rows_hold_special_tokens_only_where_the_tokenizer_puts_them(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "bart", QUESTIONS)
    source = load_source_model(folder, QUESTIONS)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    end = tokenizer.eos_token_id

    ids = source.example_arrays(4, 12)["input_ids"]
    mask = source.example_arrays(4, 12)["attention_mask"]

    natural = tokenizer("why", "because", return_special_tokens_mask=True)
    ends = natural["input_ids"].count(end)
    for row, counts in zip(ids, mask, strict=True):
        text = row[counts == 1]
        assert text[0] == tokenizer.bos_token_id
        assert text[-1] == end
        assert (text == end).sum() == ends
        assert tokenizer.pad_token_id not in text
        assert (row[counts == 0] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_short_rows_keep_the_last_special_tokens(length: int) -> None:
    rows = TokenRows(50, pad_token_id=1, before=(0,), after=(2,), special_ids=frozenset({0, 1, 2, 3}))

    row = rows.row(length, np.random.default_rng(0))

    assert len(row) == length
    assert row[-1] == 2
    assert (row[:-1] == 0).sum() == (length > 2)
    assert not {1, 2, 3} & set(row[:-1].tolist())


def test_rows_without_a_tokenizer_end_as_the_configuration_says(tmp_path: Path) -> None:
    config = load_source_model(tiny_folder(tmp_path, "bart", CLASSIFY), CLASSIFY).model.config

    rows = token_rows(None, config, 100, CLASSIFY)

    assert rows.after == (config.eos_token_id,)
    assert rows.pad_token_id == config.pad_token_id


def test_examples_are_padded_on_the_left_if_asked() -> None:
    records = [
        TensorRecord(name=name, dtype="int64", axes=("batch", "sequence"))
        for name in ("input_ids", "attention_mask")
    ]

    arrays = example_inputs(
        records, 3, 6, TokenRows(50, pad_token_id=7, special_ids=frozenset({7})), pad_left=True
    )

    assert arrays["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6]
    assert ((arrays["input_ids"] == 7) == (arrays["attention_mask"] == 0)).all()


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        pytest.param("bart", "onnx-runtime", marks=pytest.mark.slow),
        ("xlnet", "openvino"),
        ("deberta-v2", "torchscript"),
    ],
)
def test_compiled_model_answers_like_its_source_row_by_row_and_in_a_list(
    tmp_path: Path, in_process: InProcess, model_type: str, target: str
) -> None:
    folder = tiny_folder(tmp_path, model_type, CLASSIFY)
    artifact = in_process.compile(folder, tmp_path / "out", target=target, hf_task=CLASSIFY)
    source = load_source_model(folder, CLASSIFY)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    compiled = CompiledModel.from_pretrained(artifact)
    record = compiled.graph.record
    names = [tensor.name for tensor in record.inputs]
    rows = []
    for text in ("no", "the train was late", "she said that the music was good, and so they went home"):
        encoded = tokenizer(text, return_tensors="np")
        rows.append({name: encoded[name] for name in names})

    expected = [source.run(row)["logits"] for row in rows]
    single = [compiled.run(row)["logits"] for row in rows]
    items = [PreparedItem([complete_inputs(record, row)], None) for row in rows]
    together = list(run_rows(compiled, items, lambda _, outputs: outputs[0]["logits"]))

    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-4)
    assert read_manifest(artifact).components["default"].attention in ATTENTIONS[model_type]
    assert record.vocab_size == source.model.config.vocab_size
