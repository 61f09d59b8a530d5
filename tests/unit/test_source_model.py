"""Loading a source model: its task, its longest input, its interface, and the models that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledModel, HfTask
from compileflow.artifact.manifest import read_manifest
from compileflow.errors import SourceError, SpecError
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import as_tuple_module, tokenizer_maximum
from compileflow.source_model.lengths import convolutions_of
from compileflow.source_model.load import load_config, load_source_model
from compileflow.source_model.tasks import tasks_of
from compileflow.source_model.text_model import longest_of
from compileflow.source_model.token_rows import TokenRows
from compileflow.spec import TEXT_TASKS, CompileSpec, ComponentSpec, ShapeBucket
from compileflow.steps.compile import detect_task
from compileflow.steps.plan import source_limits, text_buckets
from tests.in_process import InProcess
from tests.models import ARCHITECTURES, MAX_TOKENS, TEXT_GRAPHS

TinyModel = Callable[..., Path]
REMOTE_CONFIG = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).touch()
class RemoteConfig(PretrainedConfig):
    model_type = "remote-kind"
"""


def config_folder(folder: Path, **values: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hf_task", TEXT_GRAPHS)
def test_task_is_read_off_the_architecture(tiny_model: TinyModel, hf_task: HfTask, architecture: str) -> None:
    assert detect_task(tiny_model(hf_task, architecture)) is hf_task


@pytest.mark.parametrize("architectures", [["BertForPreTraining"], [], None])
def test_architecture_that_says_no_task_is_refused_with_the_tasks_there_are(
    tmp_path: Path, architectures: list[str] | None
) -> None:
    folder = config_folder(tmp_path / "model", model_type="bert", architectures=architectures)

    with pytest.raises(SpecError, match="does not determine the task") as caught:
        detect_task(folder)

    assert (architectures or ["(none in config.json)"])[0] in caught.value.message
    assert all(task.value in caught.value.hint for task in HfTask)


def test_task_of_foreign_code_needs_the_task_and_trust(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", architectures=["MyBert"], auto_map={"AutoConfig": "a.B"})
    with pytest.raises(SpecError, match="does not determine the task") as caught:
        detect_task(folder)
    assert "if you trust it, set trust_remote_code" in caught.value.hint


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_decoder_generates_text(tmp_path: Path, name: str) -> None:
    assert detect_task(config_folder(tmp_path / "model", architectures=[name])) is HfTask.TEXT_GENERATION


def test_model_of_two_parts_that_generates_text_is_refused_for_that(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", model_type="t5", architectures=["T5ForConditionalGeneration"])

    with pytest.raises(SpecError, match="T5ForConditionalGeneration generates text") as caught:
        detect_task(folder)

    assert "feature-extraction" in caught.value.hint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoders_have_a_head_for_every_task(tiny_model: TinyModel, architecture: str) -> None:
    config = load_config(tiny_model(HfTask.FILL_MASK, architecture), trust_remote_code=False)

    assert tasks_of(config) == TEXT_TASKS


def test_task_without_a_head_is_refused_with_the_tasks_there_are(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", model_type="gpt2")

    with pytest.raises(SpecError, match="gpt2 has no head for fill-mask") as caught:
        load_source_model(folder, HfTask.FILL_MASK)

    assert caught.value.hint == (
        "Choose one of: feature-extraction, sentence-similarity, text-classification, zero-shot-classification, "
        "token-classification, question-answering, text-ranking, text-generation."
    )


@pytest.mark.parametrize(
    ("saved_task", "hf_task"),
    [
        (HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION),
        (HfTask.TOKEN_CLASSIFICATION, HfTask.ZERO_SHOT_CLASSIFICATION),
    ],
)
def test_head_of_another_task_with_the_same_tensors_is_refused(
    tiny_model: TinyModel, saved_task: HfTask, hf_task: HfTask
) -> None:
    with pytest.raises(SpecError, match=rf"saved as Bert\w+, not for {hf_task}") as caught:
        load_source_model(tiny_model(saved_task), hf_task)
    assert saved_task.value in caught.value.hint


@pytest.mark.parametrize(
    "hf_task", [HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION, HfTask.QUESTION_ANSWERING]
)
def test_model_without_the_tasks_head_is_refused(tiny_model: TinyModel, hf_task: HfTask) -> None:
    with pytest.raises(SpecError, match=r"hold no (classifier|qa_outputs)\.bias.*saved as BertModel") as caught:
        load_source_model(tiny_model(HfTask.FEATURE_EXTRACTION), hf_task)

    assert hf_task.value in caught.value.message
    assert "fine-tuned" in caught.value.hint


def test_configuration_with_a_layer_too_many_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}), "utf-8")
    with pytest.raises(SourceError, match="but the weights do not hold it") as caught:
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)
    assert caught.value.hint == "Use the config.json that was saved with these weights."


@pytest.mark.parametrize(
    ("saved_task", "hf_task"),
    [
        (HfTask.TEXT_CLASSIFICATION, HfTask.TEXT_CLASSIFICATION),
        # The weights of a model with a head have a prefix that the bare model does not have, and the reverse.
        (HfTask.TEXT_CLASSIFICATION, HfTask.FEATURE_EXTRACTION),
    ],
)
def test_weights_of_more_layers_than_the_configuration_has_are_refused(
    tiny_model: TinyModel, tmp_path: Path, saved_task: HfTask, hf_task: HfTask
) -> None:
    folder = Path(shutil.copytree(tiny_model(saved_task), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")
    expected = r"hold \S*encoder\.layer\.1\.\S+, but num_hidden_layers is 1 in config\.json; \d+ tensors"
    with pytest.raises(SourceError, match=expected):
        load_source_model(folder, hf_task)


def test_pickle_that_would_run_code_is_refused_without_advice_to_run_it(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "ran").touch, ()

    folder = Path(shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is not a plain weights file") as caught:
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)
    assert "safetensors" in caught.value.hint
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_wrong_value_in_the_configuration_is_to_be_corrected(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", model_type="bert", hidden_size="32")
    with pytest.raises(SourceError, match="hidden_size") as caught:
        load_config(folder, trust_remote_code=False)
    assert caught.value.hint == "Correct config.json, or use the one that was saved with the weights."


def test_head_of_another_size_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model(HfTask.TEXT_CLASSIFICATION)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["id2label"] = {str(number): f"label-{number}" for number in range(7)}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    folder = config_folder(tmp_path / "model", **config)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())

    with pytest.raises(SourceError, match=r"Expected classifier\.(bias|weight) of shape \(7.*got shape \(3"):
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)


def test_weights_that_are_no_weights_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model(HfTask.TEXT_CLASSIFICATION)
    folder = config_folder(tmp_path / "model", **json.loads((source / "config.json").read_text("utf-8")))

    with pytest.raises(SourceError, match="weights cannot be loaded"):
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)

    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(SourceError, match="weights cannot be loaded"):
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hf_task", TEXT_GRAPHS)
def test_interface_is_read_off_the_source_model(tiny_model: TinyModel, hf_task: HfTask, architecture: str) -> None:
    source_model = load_source_model(tiny_model(hf_task, architecture), hf_task)

    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if architecture == "bert" else [])
    assert [record.name for record in source_model.inputs] == inputs
    batch, sequence = "batch", "sequence"
    axes = {
        HfTask.FEATURE_EXTRACTION: {"last_hidden_state": (batch, sequence, 32), "pooler_output": (batch, 32)},
        HfTask.TEXT_CLASSIFICATION: {"logits": (batch, 3)},
        HfTask.TOKEN_CLASSIFICATION: {"logits": (batch, sequence, 5)},
        HfTask.FILL_MASK: {"logits": (batch, sequence, source_model.vocab_size)},
        HfTask.MULTIPLE_CHOICE: {"logits": (batch, 1)},
        HfTask.QUESTION_ANSWERING: {"start_logits": (batch, sequence), "end_logits": (batch, sequence)},
    }[hf_task]
    if architecture == "distilbert":
        axes.pop("pooler_output", None)
    assert {record.name: record.axes for record in source_model.outputs} == axes
    assert not source_model.model.training

    example = source_model.example_tensors(2, 5)
    assert list(example) == inputs
    with torch.no_grad():
        answers = as_tuple_module(source_model)(*example.values())
    reference = source_model.run(example)
    assert list(reference) == list(axes)
    for answer, value in zip(answers, reference.values(), strict=True):
        np.testing.assert_array_equal(answer.numpy(), value)


def test_model_without_pooler_weights_has_no_pooler_output(
    tiny_model: TinyModel, in_process: InProcess, tmp_path: Path
) -> None:
    source = tiny_model(HfTask.FEATURE_EXTRACTION)
    folder = tmp_path / "model"
    model = transformers.BertModel.from_pretrained(source, add_pooling_layer=False)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    source_model = load_source_model(folder, HfTask.FEATURE_EXTRACTION)
    assert [record.name for record in source_model.outputs] == ["last_hidden_state"]

    shape = ShapeBucket(batch_size=1, sequence_length=8)
    in_process.compile(
        folder,
        tmp_path / "out",
        target="torchscript",
        hf_task=HfTask.FEATURE_EXTRACTION,
        components=[ComponentSpec(shape_buckets=(shape,))],
    )
    ids = torch.tensor([[5, 6, 7]])
    answer = CompiledModel.from_pretrained(tmp_path / "out")(ids)
    with torch.no_grad():
        expected = model.eval()(ids)
    assert answer.pooler_output is None
    torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "values", "longest"),
    [
        ("bert", {"max_position_embeddings": 512}, 512),
        # Positions are numbered from pad_token_id + 1.
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("xlm-roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("longformer", {"max_position_embeddings": 4098, "pad_token_id": 1, "attention_window": 4}, 4096),
        ("esm", {"max_position_embeddings": 66, "pad_token_id": 1, "position_embedding_type": "absolute"}, 64),
        ("opt", {"max_position_embeddings": 64, "ffn_dim": 32, "word_embed_proj_dim": 16}, 64),
        ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, None),
        ("bert", {"max_position_embeddings": 8}, 8),
    ],
)
def test_longest_input_is_what_there_are_positions_for(
    model_type: str, values: dict[str, Any], longest: int | None
) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=100, **size, **values)

    assert longest_of(transformers.AutoModel.from_config(config).eval()) == longest


@pytest.mark.parametrize(("tokenizer_maximum", "longest"), [(None, 64), (32, 32), (1024, 64)])
def test_tokenizer_shortens_the_default_length(
    tiny_model: TinyModel, tmp_path: Path, tokenizer_maximum: int | None, longest: int
) -> None:
    source = tiny_model(HfTask.TEXT_CLASSIFICATION)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = tokenizer_maximum or 10**30
    spec = CompileSpec(target="onnx-runtime", hf_task=HfTask.TEXT_CLASSIFICATION)

    limits = source_limits(load_source_model(source, HfTask.TEXT_CLASSIFICATION), spec, tokenizer)

    assert limits.default_length == longest
    assert limits.longest == 64


def test_tokenizer_without_a_maximum_has_none() -> None:
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    assert tokenizer.model_max_length > 10**29
    assert tokenizer_maximum(tokenizer) is None
    tokenizer.model_max_length = 8192
    assert tokenizer_maximum(tokenizer) == 8192
    assert tokenizer_maximum(None) is None


def test_roberta_runs_at_its_longest_and_not_beyond(tiny_model: TinyModel) -> None:
    source_model = load_source_model(tiny_model(HfTask.TEXT_CLASSIFICATION, "roberta"), HfTask.TEXT_CLASSIFICATION)
    longest = source_model.longest
    assert longest == MAX_TOKENS
    ids = np.full((1, longest + 1), 7, dtype=np.int64)
    mask = np.ones_like(ids)

    assert source_model.run({"input_ids": ids[:, 1:], "attention_mask": mask[:, 1:]})["logits"].shape == (1, 3)
    with pytest.raises(RuntimeError, match="out of bounds"):
        source_model.run({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "component",
    [
        ComponentSpec(max_sequence_length=MAX_TOKENS + 1),
        ComponentSpec(shape_buckets=(ShapeBucket(batch_size=1, sequence_length=MAX_TOKENS + 1),)),
    ],
)
def test_more_tokens_than_positions_are_refused(
    tiny_model: TinyModel, in_process: InProcess, tmp_path: Path, architecture: str, component: ComponentSpec
) -> None:
    with pytest.raises(SpecError, match=r"sequence length of 65: .*64 tokens.*Request 64 or fewer"):
        in_process.compile(
            tiny_model(HfTask.FILL_MASK, architecture),
            tmp_path / "out",
            target="torchscript",
            hf_task=HfTask.FILL_MASK,
            components=[component],
        )


def test_default_shapes_reach_up_to_the_models_longest(
    tiny_model: TinyModel, in_process: InProcess, tmp_path: Path
) -> None:
    in_process.compile(
        tiny_model(HfTask.TEXT_CLASSIFICATION),
        tmp_path / "out",
        target="torchscript",
        hf_task=HfTask.TEXT_CLASSIFICATION,
        components=[ComponentSpec(max_sequence_length=20)],
    )

    record = read_manifest(tmp_path / "out").components["default"]
    assert [str(bucket) for bucket in record.shape_buckets] == ["1x16", "8x16", "1x20", "8x20"]
    assert record.max_sequence_length == 20
    assert [str(bucket) for bucket in text_buckets(64)] == ["1x16", "8x16", "1x32", "8x32", "1x64", "8x64"]
    assert [str(bucket) for bucket in text_buckets(8)] == ["1x8", "8x8"]


def test_source_without_a_tokenizer_is_refused(
    tiny_model: TinyModel, in_process: InProcess, tmp_path: Path
) -> None:
    source = tiny_model(HfTask.TEXT_CLASSIFICATION)
    folder = config_folder(tmp_path / "model", **json.loads((source / "config.json").read_text("utf-8")))

    with pytest.raises(
        SourceError, match=r"has no tokenizer: no file .* such as tokenizer\.json.*save_pretrained"
    ):
        in_process.compile(
            folder,
            tmp_path / "out",
            target="torchscript",
            hf_task=HfTask.TEXT_CLASSIFICATION,
            components=[ComponentSpec()],
        )


def test_configuration_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", model_type="no-such-kind")

    with pytest.raises(SourceError, match=r"config\.json.*no-such-kind"):
        load_config(folder, trust_remote_code=False)


def test_remote_code_does_not_run_unless_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers copies trusted code into its own cache, which is not ours to fill.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    marker = tmp_path / "code-ran"
    folder = config_folder(
        tmp_path / "model",
        model_type="remote-kind",
        auto_map={"AutoConfig": "configuration_remote.RemoteConfig"},
    )
    (folder / "configuration_remote.py").write_text(REMOTE_CONFIG.format(marker=str(marker)), "utf-8")

    with pytest.raises(SpecError, match=r"own Python code, and trust_remote_code is off.*Read that code"):
        load_source_model(folder, HfTask.TEXT_CLASSIFICATION)
    assert not marker.exists()

    assert load_config(folder, trust_remote_code=True).model_type == "remote-kind"
    assert marker.exists()


def test_examples_are_ragged_full_once_and_always_the_same(tiny_model: TinyModel) -> None:
    records = load_source_model(tiny_model(HfTask.FEATURE_EXTRACTION), HfTask.FEATURE_EXTRACTION).inputs

    first, second = (example_inputs(records, 4, 8, TokenRows(600)) for _ in range(2))

    assert list(first) == ["input_ids", "attention_mask", "token_type_ids"]
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    assert first["attention_mask"].sum(1).tolist() == [2, 4, 6, 8]
    assert not (first["input_ids"] * (1 - first["attention_mask"])).any()
    assert set(first["token_type_ids"][3]) == {0, 1}


def test_single_kernel_of_a_text_model_is_not_taken_for_convolutions_between_audio_and_frames() -> None:
    assert convolutions_of(transformers.MambaConfig(conv_kernel=4)) == ()
    assert convolutions_of(transformers.Wav2Vec2Config())[:2] == ((10, 5), (3, 2))
