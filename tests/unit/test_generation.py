"""Compiled decoders write what transformers writes, token by token, and planted faults are found.

Over 300 lines, because all of it shares the compiles of one small decoder.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask, Precision
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import open_artifact
from compileflow.errors import InputError
from compileflow.serving.component import LoadedComponent
from compileflow.source_model import load_source_model
from compileflow.targets import _onnx_decoder, _openvino_decoder
from compileflow.testing.shared import make_once, shared_folder
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.generation import measure_generation, measure_pieces
from compileflow.validation.writing import ComponentReader, ModelWriter, prompts_of
from tests.in_process import InProcess
from tests.models import MAX_TOKENS, build_decoder, sentences
from tests.unit.proving import reseal, validate_here

TASK = HfTask.TEXT_GENERATION
TARGETS = ("openvino", "onnx-runtime")
TEXTS = ["the train was late and", "it arrived", "where is my order today because it is late"]
CHAT = [{"role": "user", "content": "where is my order"}]
GREEDY = {"max_new_tokens": 16, "do_sample": False}

# Each export takes ten seconds.
pytestmark = pytest.mark.slow

Compiled = Callable[..., Path]


@pytest.fixture(scope="session")
def compiled(tiny_model: Callable[..., Path], in_process: InProcess, tmp_path_factory: Any) -> Compiled:
    """Compile the small decoder once a run: `compiled(target, precision)` gives a folder to read only."""

    def make(target: str, precision: Precision = Precision.FP32, **options: Any) -> Path:
        name = "-".join((target, precision, *map(str, options.values())))
        settings = {"target": target, "hf_task": TASK, "precision": precision, "options": options}
        folder = make_once(
            shared_folder(tmp_path_factory) / f"decoder-{name}",
            lambda folder: in_process.compile(tiny_model(TASK), folder / "artifact", **settings),
        )
        return folder / "artifact"

    return make


@pytest.fixture(scope="session")
def eager(tiny_model: Callable[..., Path]) -> Any:
    """The source model, loaded with transformers itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model(TASK)).eval()


@pytest.fixture(scope="session")
def model_of(compiled: Compiled) -> Callable[..., Any]:
    """Load compiled decoders once a session."""
    return cache(lambda target: CompiledModel.from_pretrained(compiled(target), threads=1))


@pytest.fixture(scope="session")
def tokens(tiny_model: Callable[..., Path]) -> Callable[[list[str]], Any]:
    """Tokenize prompts with transformers itself, padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK), padding_side="left")
    return lambda texts: tokenizer(texts, return_tensors="pt", padding=True)


class Chunks:
    """Collects what a streamer gets."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Any) -> None:
        """Add tokens."""
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        """Mark the end."""
        self.ids.append(-1)


class StopAt(transformers.StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row has the length."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("target", TARGETS)
class TestGenerateIsTransformersOwn:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_beams": 2},
            {"num_beams": 3, "num_return_sequences": 2},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
            {"use_cache": False},
            {"min_new_tokens": 16},
            {"bad_words_ids": [[100], [101]]},
            {"logits_processor": [transformers.TemperatureLogitsWarper(0.5)]},
            {"stopping_criteria": [StopAt(24)]},
        ],
        ids=lambda settings: " ".join(settings) or "greedy",
    )
    @pytest.mark.parametrize("rows", [1, 3])
    def test_same_tokens(
        self, model_of: Any, eager: Any, tokens: Any, target: str, settings: dict[str, Any], rows: int
    ) -> None:
        inputs = tokens(TEXTS[:rows])
        expected = eager.generate(**inputs, **(GREEDY | settings))
        assert model_of(target).generate(**inputs, **(GREEDY | settings)).tolist() == expected.tolist()

    def test_same_samples(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        def sample(model: Any) -> Any:
            torch.manual_seed(7)
            settings = {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 2}
            return model.generate(**tokens(TEXTS), max_new_tokens=16, **settings).tolist()

        assert sample(model_of(target)) == sample(eager)

    def test_streamer_gets_each_token(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        def stream(model: Any) -> list[int]:
            chunks = Chunks()
            model.generate(**tokens(TEXTS[:1]), streamer=chunks, **GREEDY)
            return chunks.ids

        assert stream(model_of(target)) == stream(eager)

    def test_text_ends_with_the_end_token(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        inputs = tokens(TEXTS)
        end = int(eager.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] + 2])
        expected = eager.generate(**inputs, **GREEDY, eos_token_id=end)
        assert model_of(target).generate(**inputs, **GREEDY, eos_token_id=end).tolist() == expected.tolist()

    def test_rows_go_on_from_an_earlier_answer(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        def turn(model: Any) -> Any:
            inputs = tokens(TEXTS[:1])
            answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            prompt = torch.cat([answer.sequences, torch.tensor([[30, 40, 50]])], dim=1)
            mask = torch.ones_like(prompt)
            past = answer.past_key_values
            return model.generate(prompt, attention_mask=mask, past_key_values=past, **GREEDY).tolist()

        assert turn(model_of(target)) == turn(eager)

    def test_logits_of_a_call(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        inputs = tokens(TEXTS)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = eager(**inputs, position_ids=positions).logits
        answer = model_of(target)(**inputs)
        keep = inputs["attention_mask"].bool()
        assert type(answer).__name__ == "CausalLMOutputWithPast"
        torch.testing.assert_close(answer.logits[keep], expected[keep], atol=2e-4, rtol=1e-4)

    def test_eight_threads_get_the_answers_of_one(
        self, model_of: Any, eager: Any, tokens: Any, target: str
    ) -> None:
        inputs = [tokens([f"{text} {number}"]) for number in range(4) for text in TEXTS[:2]]
        expected = [eager.generate(**row, **GREEDY).tolist() for row in inputs]
        ready = threading.Barrier(8)

        def ask(row: Any) -> Any:
            ready.wait()
            return model_of(target).generate(**row, **GREEDY).tolist()

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, inputs)) == expected

    def test_generation_ends_at_the_longest_row(
        self, model_of: Any, tokens: Any, target: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        answer = model_of(target).generate(**tokens(TEXTS[:1]), do_sample=False, max_new_tokens=200)
        assert answer.shape[1] <= MAX_TOKENS
        assert f"generation ends at {MAX_TOKENS} tokens" in caplog.text

    def test_prompt_without_room_is_refused(self, model_of: Any, target: str) -> None:
        prompt = torch.full((1, MAX_TOKENS), 20)
        with pytest.raises(InputError, match=f"prompt has {MAX_TOKENS} tokens") as caught:
            model_of(target).generate(prompt, max_new_tokens=1)
        assert "larger maximum length" in caught.value.hint

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]}, "no input labels"),
            ({"input_ids": [[1, 2]], "output_attentions": True}, "output_attentions=True"),
            ({"input_ids": [[1, 99_999]]}, "99999"),
            ({"inputs_embeds": [[0.5]]}, "input_ids"),
            ({"input_ids": [[]]}, "shape"),
        ],
    )
    def test_wrong_call_is_refused(self, model_of: Any, target: str, arguments: dict[str, Any], says: str) -> None:
        with pytest.raises(InputError, match=says):
            model_of(target)(**arguments)

    def test_other_cache_is_refused(self, model_of: Any, eager: Any, tokens: Any, target: str) -> None:
        model, inputs = model_of(target), tokens(TEXTS[:1])
        with pytest.raises(InputError, match="own cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(InputError, match="own cache"):
            model.generate(**inputs, max_new_tokens=2, past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("target", TARGETS)
class TestPipeline:
    @pytest.mark.parametrize(
        ("prompt", "settings"),
        [
            (TEXTS[0], {}),
            (TEXTS, {}),
            (TEXTS, {"batch_size": 3}),
            (CHAT, {}),
            ([CHAT, CHAT], {}),
            ([*CHAT, {"role": "assistant", "content": "it is"}], {}),
            (TEXTS[0], {"return_full_text": False}),
            (TEXTS[0], {"num_return_sequences": 2, "num_beams": 2}),
            (TEXTS[0], {"return_tensors": True}),
            (TEXTS[0], {"stop_sequence": "the"}),
        ],
    )
    def test_answers_like_transformers(
        self,
        compiled: Compiled,
        tiny_model: Callable[..., Path],
        target: str,
        prompt: Any,
        settings: dict[str, Any],
    ) -> None:
        pipeline = CompiledPipeline.from_pretrained(compiled(target), threads=1)
        expected = transformers.pipeline("text-generation", model=str(tiny_model(TASK)), device="cpu")
        assert pipeline(prompt, **GREEDY, **settings) == expected(prompt, **GREEDY, **settings)

    def test_chat_without_a_template_is_refused(self, compiled: Compiled, target: str) -> None:
        pipeline = CompiledPipeline.from_pretrained(compiled(target), threads=1)
        pipeline.tokenizer.tokenizer.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            pipeline(CHAT)
        assert pipeline(TEXTS[0], **GREEDY)

    def test_tokenizer_pads_prompts_on_the_left_and_cuts_none(self, compiled: Compiled, target: str) -> None:
        tokenizer = CompiledTokenizer.from_pretrained(compiled(target))
        encoded = tokenizer(["the", " ".join(TEXTS * 9)], return_tensors="pt")
        assert encoded["attention_mask"][0, 0] == 0
        assert encoded["attention_mask"][:, -1].all()
        assert encoded["input_ids"].shape[1] > MAX_TOKENS


class TestArtifact:
    def test_manifest_names_each_format_that_changes_numbers(self, compiled: Compiled) -> None:
        options = read_manifest(compiled("openvino")).components["default"].load_options
        assert options["inference_precision"] == "f32"
        assert options["kv_cache_precision"] == "f32"
        assert options["dynamic_quantization_group_size"] == 0

    def test_weights_are_stored_once(self, compiled: Compiled, tiny_model: Callable[..., Path]) -> None:
        weights = (tiny_model(TASK) / "model.safetensors").stat().st_size
        for target in TARGETS:
            assert read_manifest(compiled(target)).size_bytes < 1.2 * weights + 300_000

    @pytest.mark.parametrize("target", TARGETS)
    def test_passes_validation(
        self, compiled: Compiled, tiny_model: Callable[..., Path], tmp_path: Path, target: str
    ) -> None:
        proof = validate_here(tiny_model(TASK), compiled(target), tmp_path / "report", max_examples=16)
        assert (proof.outcome, proof.gate("generations")["measured"]) == ("pass", 0.0), proof.reason
        assert "perplexity" in proof.gate("perplexity_change")["detail"]

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
    def test_weights_in_few_bits_are_smaller_and_close(
        self, compiled: Compiled, eager: Any, tokens: Any, target: str, precision: Precision
    ) -> None:
        folder = compiled(target, precision)
        model = CompiledModel.from_pretrained(folder, threads=1)
        inputs = tokens(TEXTS[:1])
        with torch.no_grad():
            expected = eager(**inputs).logits
        difference = torch.linalg.norm(model(**inputs).logits - expected) / torch.linalg.norm(expected)
        # One step of 8 bits is 1/127 of the largest weight, one of 4 bits 1/15 of the range of a group.
        assert 1e-5 < float(difference) < (0.1 if precision is Precision.INT8 else 0.7)
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 16


@pytest.fixture
def measured(compiled: Compiled, tiny_model: Callable[..., Path]) -> Iterator[Callable[[str], Measurements]]:
    """Measure what a target writes against the source model: `measured(target)`."""
    source = load_source_model(tiny_model(TASK), TASK)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
    rows = [tokenizer(text)["input_ids"] for text in sentences()[:8]]
    components: list[LoadedComponent] = []

    def measure(target: str) -> Measurements:
        component = LoadedComponent.load(open_artifact(compiled(target)), threads=1)
        components.append(component)
        prompts = prompts_of([], 0, MAX_TOKENS)
        prompts = type(prompts)([row[:24] for row in rows], sentences()[:8], source.pad_token_id, MAX_TOKENS, 12)
        measurements = Measurements()
        writers = (
            ModelWriter(model, source.pad_token_id, source.vocab_size)
            for model in (source.model, CompiledModel.from_component(component))
        )
        measure_pieces(measurements, source.run, ComponentReader(component), prompts)
        measure_generation(measurements, *writers, prompts, progress=lambda _: None)
        return measurements

    yield measure
    for component in components:
        component.close()


def off_by_one(monkeypatch: pytest.MonkeyPatch, continuation: Any) -> None:
    """Number the tokens after the prompt from one too many."""
    read = continuation.read
    monkeypatch.setattr(
        continuation, "read", lambda self, ids, mask, places: read(self, ids, mask, places + (self.length > 0))
    )


def mask_ignored(monkeypatch: pytest.MonkeyPatch, continuation: Any) -> None:
    """Read the padding as text."""
    read = continuation.read
    monkeypatch.setattr(
        continuation, "read", lambda self, ids, mask, places: read(self, ids, np.ones_like(mask), places)
    )


def reorder_dropped(monkeypatch: pytest.MonkeyPatch, continuation: Any) -> None:
    """Leave the rows of a beam search in their places."""
    monkeypatch.setattr(continuation, "reorder", lambda self, rows: None)


def rows_exchanged(monkeypatch: pytest.MonkeyPatch, continuation: Any) -> None:
    """Exchange the first two rows of the cache after the prompt."""
    read = continuation.read

    def exchange(self: Any, ids: Any, mask: Any, places: Any) -> Any:
        if self.length > 0 and len(ids) > 1:
            self.reorder(np.array([1, 0, *range(2, len(ids))]))
        return read(self, ids, mask, places)

    monkeypatch.setattr(continuation, "read", exchange)


FAULTS = [
    (off_by_one, "piece_error"),
    (off_by_one, "generations"),
    (mask_ignored, "batch_rows"),
    (reorder_dropped, "beams"),
    (rows_exchanged, "generations"),
    (rows_exchanged, "batch_rows"),
]


class TestPlantedFaults:
    @pytest.mark.parametrize("target", TARGETS)
    def test_correct_artifact_has_none(self, measured: Callable[[str], Measurements], target: str) -> None:
        measurements = measured(target)
        assert measurements.scalars.pop("piece_error") < 1e-4
        assert measurements.scalars == dict.fromkeys(measurements.scalars, 0.0)
        assert len(measurements.scalars) == 7

    @pytest.mark.parametrize(("plant", "name"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
    @pytest.mark.parametrize("target", TARGETS)
    def test_is_found(
        self,
        measured: Callable[[str], Measurements],
        monkeypatch: pytest.MonkeyPatch,
        target: str,
        plant: Callable[..., None],
        name: str,
    ) -> None:
        decoders = {
            "openvino": _openvino_decoder.OpenVinoContinuation,
            "onnx-runtime": _onnx_decoder.OnnxContinuation,
        }
        plant(monkeypatch, decoders[target])
        assert measured(target).scalars[name] > 1e-3

    def test_cache_of_an_earlier_request_is_found(
        self, measured: Callable[[str], Measurements], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = _openvino_decoder.OpenVinoContinuation.__init__

        class Unforgetful:
            """A request that keeps its state."""

            def __init__(self, request: Any):
                self.infer = request.infer
                self.reset_state = lambda: None

        def keep(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
            start(self, request if isinstance(request, Unforgetful) else Unforgetful(request), *args, **kwargs)

        monkeypatch.setattr(_openvino_decoder.OpenVinoContinuation, "__init__", keep)
        assert measured("openvino").scalars["generations"] > 0

    @pytest.mark.parametrize(
        "settings",
        [{"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {"tie_word_embeddings": True}],
        ids=["wrong rope scale", "tied weights untied"],
    )
    def test_other_arithmetic_fails(self, compiled: Compiled, tmp_path: Path, settings: dict[str, Any]) -> None:
        """The source model has other settings than the artifact was compiled from."""
        source = build_decoder(tmp_path / "source", **settings)
        proof = validate_here(source, compiled("openvino"), tmp_path / "report", max_examples=8)
        failed = {gate["gate"] for gate in proof.report["verdict"]["gates"] if gate["outcome"] == "fail"}
        assert proof.outcome == "fail"
        assert {"rel_l2", "next_token", "kl_mean", "cached_reading", "generations"} <= failed

    def test_end_token_that_the_artifact_lost_fails(
        self, compiled: Compiled, tiny_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "artifact"
        shutil.copytree(compiled("openvino"), folder)
        path = folder / "generation_config.json"
        settings = json.loads(path.read_text("utf-8"))
        del settings["eos_token_id"]
        path.write_text(json.dumps(settings), "utf-8")
        reseal(folder)
        proof = validate_here(tiny_model(TASK), folder, tmp_path / "report", max_examples=8)
        assert (proof.outcome, proof.gate("interface_files")["outcome"]) == ("fail", "fail")
