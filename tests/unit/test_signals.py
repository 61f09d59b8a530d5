"""Images and audio: their processors, the shapes of their models, and their validation."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compileflow import CompiledPipeline
from compileflow.artifact.open import open_artifact
from compileflow.catalog import get_target
from compileflow.errors import InputError, MeasurementError, SourceError, SpecError
from compileflow.selection.run import run_any_target
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.lengths import frame_convolutions, frames_of, shortest_input
from compileflow.source_model.load import load_source_model
from compileflow.source_model.processor import LONGEST_S, load_processor, longest_signal
from compileflow.source_model.tasks import task_of_architecture
from compileflow.spec import ComponentSpec, HfTask, Modality, Precision
from compileflow.steps.compile import detect_task
from compileflow.testing.pipelines import assert_same_result
from compileflow.validation.cases import (
    check_signals,
    generated_count,
    generated_signals,
    load_signals,
    signals_digest,
)
from compileflow.validation.judge import gates_for
from compileflow.validation.judge.rates import rate_bounds
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import SIGNAL_TASKS
from tests.steps import Pipeline
from tests.unit.proving import reseal, validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

IMAGES, SOUNDS, SPEECH = HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION, HfTask.SPEECH_RECOGNITION
CONVOLUTIONS = ((10, 5), (3, 2), (2, 2))


@pytest.mark.parametrize("length", [30, 31, 34, 35, 100, 399, 400, 401, 16_000])
def test_frames_are_those_that_pytorchs_convolutions_make(length: int) -> None:
    signal = torch.zeros(1, 1, length)
    for kernel, stride in CONVOLUTIONS:
        signal = torch.nn.functional.conv1d(signal, torch.ones(1, 1, kernel), stride=stride)
    assert frames_of(CONVOLUTIONS, length) == signal.shape[-1]


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_shortest_input_gives_so_many_frames_and_one_element_less_gives_fewer(frames: int) -> None:
    shortest = shortest_input(CONVOLUTIONS, frames)
    assert frames_of(CONVOLUTIONS, shortest) == frames
    assert frames_of(CONVOLUTIONS, shortest - 1) == frames - 1


def test_architecture_whose_frames_its_configuration_does_not_explain_is_refused() -> None:
    class Config:
        model_type = "strange"
        conv_kernel, conv_stride = (10,), (5,)

    with pytest.raises(SpecError, match=r"Expected 19 frames for an input of length 100.*got 7 from strange"):
        frame_convolutions(Config(), [(100, 7)])


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("ViTForImageClassification", IMAGES),
        ("Wav2Vec2ForSequenceClassification", SOUNDS),
        ("HubertForSequenceClassification", SOUNDS),
        ("ASTForAudioClassification", SOUNDS),
        ("WavLMForCTC", SPEECH),
        ("BertForSequenceClassification", HfTask.TEXT_CLASSIFICATION),
        ("SegformerForSemanticSegmentation", HfTask.IMAGE_SEGMENTATION),
        ("YolosForObjectDetection", HfTask.OBJECT_DETECTION),
        ("DPTForDepthEstimation", HfTask.DEPTH_ESTIMATION),
        ("CLIPVisionModelWithProjection", HfTask.IMAGE_FEATURE_EXTRACTION),
        ("SiglipVisionModel", HfTask.IMAGE_FEATURE_EXTRACTION),
        ("CLIPTextModelWithProjection", HfTask.FEATURE_EXTRACTION),
        ("WavLMForXVector", HfTask.AUDIO_XVECTOR),
        ("Wav2Vec2ForAudioFrameClassification", HfTask.AUDIO_FRAME_CLASSIFICATION),
        ("T5ForConditionalGeneration", None),
        ("GPT2LMHeadModel", HfTask.TEXT_GENERATION),
        ("Qwen3ForCausalLM", HfTask.TEXT_GENERATION),
        ("FlaubertWithLMHeadModel", None),
        ("GPT2DoubleHeadsModel", None),
    ],
)
def test_task_is_read_off_the_class_name(name: str, task: HfTask | None) -> None:
    assert task_of_architecture(name) is task


@pytest.mark.parametrize("hf_task", SIGNAL_TASKS)
def test_task_is_read_off_a_saved_model(tiny_model: ModelFactory, hf_task: HfTask) -> None:
    assert detect_task(tiny_model(hf_task)) is hf_task


def test_speech_model_has_no_head_for_text(tiny_model: ModelFactory) -> None:
    with pytest.raises(SpecError, match="has no head for feature-extraction") as caught:
        load_source_model(tiny_model(SPEECH), HfTask.FEATURE_EXTRACTION)
    assert "automatic-speech-recognition" in caught.value.hint
    assert "text" not in caught.value.hint


def test_half_a_minute_is_the_longest_recording_by_default(tiny_model: ModelFactory) -> None:
    assert (
        longest_signal(load_processor(tiny_model(SPEECH), "audio", trust_remote_code=False)) == LONGEST_S * 16_000
    )
    assert longest_signal(load_processor(tiny_model(IMAGES), "image", trust_remote_code=False)) == 1


def test_model_without_its_processor_is_refused(tiny_model: ModelFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(IMAGES), tmp_path / "model"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="image processor cannot be loaded"):
        load_source_model(folder, IMAGES)


def without_mask(source: Path, folder: Path) -> Path:
    """Copy a speech model whose processor makes no attention mask, as wav2vec2-base has it."""
    from transformers import Wav2Vec2FeatureExtractor

    shutil.copytree(source, folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


def test_fixed_shapes_are_refused_where_padding_would_change_the_answers(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    source = without_mask(tiny_model(SPEECH), tmp_path / "model")
    with pytest.raises(
        SpecError,
        match="torchscript pads each input to a fixed length, and padding changes the answers of this model: "
        "it has no attention mask that would hide the padding",
    ) as caught:
        in_process.compile(source, tmp_path / "artifact", target="torchscript", hf_task=SPEECH)
    assert caught.value.hint.endswith("any length: aot-inductor, onnx-runtime, openvino.")


@pytest.mark.slow
def test_speech_without_a_mask_is_never_padded(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    import transformers

    source = without_mask(tiny_model(SPEECH), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(source, feat_extract_norm="group")
    torch.manual_seed(1)
    transformers.AutoModelForCTC.from_config(config).eval().save_pretrained(source)
    folder = in_process.compile(source, tmp_path / "artifact", target="openvino", hf_task=SPEECH)
    random = np.random.default_rng(2)
    sounds = [random.standard_normal(length, dtype=np.float32) for length in (4000, 9000, 4000, 5000, 9000)]
    reference = transformers.pipeline(SPEECH.value, model=str(source))
    assert_same_result(CompiledPipeline.from_pretrained(folder)(sounds, batch_size=4), reference(sounds))


def test_images_have_no_lengths_to_ask_for(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="sequence length of 16"):
        in_process.compile(
            tiny_model(IMAGES),
            tmp_path / "artifact",
            target="torchscript",
            hf_task=IMAGES,
            components=[ComponentSpec(max_sequence_length=16)],
        )


@pytest.fixture(scope="module")
def speech(tiny_model: ModelFactory, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("speech") / "artifact"
    return in_process.compile(tiny_model(SPEECH), out_dir, target="torchscript", hf_task=SPEECH)


def test_padded_speech_is_answered_with_as_many_frames_as_the_bare_one(
    tiny_model: ModelFactory, speech: Path
) -> None:
    source = load_source_model(tiny_model(SPEECH), SPEECH)
    graph = LoadedComponent.load(open_artifact(speech))
    for rows, length in ((1, 8000), (1, 5003), (3, 12_345), (9, 777)):
        inputs = example_inputs(source.inputs, rows, length)
        answer, reference = graph.run(inputs)["logits"], source.run(inputs)["logits"]
        assert answer.shape == reference.shape == (rows, frames_of(source.frame_convolutions, length), 32)
        np.testing.assert_allclose(answer, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_values": np.zeros((1, 20), np.float32)}, "20 elements per row.*at least 60"),
        (
            {"input_values": np.zeros((1, 48_001), np.float32)},
            "48001 elements per row.*at most 48000.*shorter pieces",
        ),
        ({"input_values": np.zeros((1, 8000), np.int16)}, "expected floats of shape.*got int16"),
        ({"input_ids": np.ones((1, 4), np.int64)}, "no input 'input_ids'.*input_values, attention_mask"),
        ({}, "without input_values.*processor first"),
        (
            {"input_values": np.zeros((1, 900), np.float32), "attention_mask": np.ones((1, 800), np.int64)},
            "attention_mask has shape",
        ),
    ],
)
def test_audio_that_does_not_fit_is_refused_with_what_is_needed(
    speech: Path, inputs: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        LoadedComponent.load(open_artifact(speech)).run(inputs)


@pytest.mark.parametrize("threads", [0, -1, 5000, "2", 2.5, True])
def test_threads_that_no_runtime_takes_are_refused(speech: Path, threads: Any) -> None:
    with pytest.raises(InputError, match=f"threads as a whole number from 1 to 1024, got {threads!r}"):
        LoadedComponent.load(open_artifact(speech), threads=threads)


def test_speech_that_mishears_one_letter_fails_and_the_report_names_it(
    tiny_model: ModelFactory, speech: Path, tmp_path: Path
) -> None:
    characters = (
        LoadedComponent.load(open_artifact(speech))
        .run({"input_values": np.random.default_rng(1).standard_normal((1, 40_000), dtype=np.float32)})["logits"]
        .argmax(-1)
    )
    letter = int(np.bincount(characters.ravel()).argmax())
    broken = Path(shutil.copytree(speech, tmp_path / "broken"))
    path = broken / "components" / "default" / "model.pt"
    holder = torch.jit.load(str(path))
    weights = holder.state_dict()
    for ending in ("lm_head.weight", "lm_head.bias"):
        (name, *_) = (key for key in weights if key.endswith(ending))
        pair = [letter, (letter + 1) % 32]
        weights[name][pair] = weights[name][pair[::-1]].clone()
    torch.jit.save(holder, str(path))
    reseal(broken)
    proof = validate_here(tiny_model(SPEECH), broken, tmp_path / "report")
    assert proof.outcome == "fail"
    assert proof.gate("exact_transcript")["outcome"] == "fail"
    assert proof.report["flips_count"] > 0


class TestExamples:
    def test_generated_ones_are_always_the_same_and_differ_from_one_another(
        self, tiny_model: ModelFactory
    ) -> None:
        for task in (IMAGES, SOUNDS):
            processor = load_processor(tiny_model(task), task.modality, trust_remote_code=False)
            first, second = (generated_signals(processor, 6) for _ in range(2))
            for signal, repeated in zip(first, second, strict=True):
                np.testing.assert_array_equal(signal.values, repeated.values)
            rows = [processor([signal.values])[next(iter(processor([signal.values])))] for signal in first]
            sizes = {row.tobytes()[:4096] for row in rows}
            assert len(sizes) == len(first)

    def test_own_images_and_recordings_are_read_by_name(self, tiny_model: ModelFactory, tmp_path: Path) -> None:
        from PIL import Image

        for name, value in (("b.png", 200), ("a.png", 10)):
            Image.fromarray(np.full((8, 9, 3), value, np.uint8)).save(tmp_path / name)
        processor = load_processor(tiny_model(IMAGES), "image", trust_remote_code=False)
        signals, origin, digest = load_signals(processor, str(tmp_path), 10)
        assert [(signal.name, int(signal.values[0, 0, 0])) for signal in signals] == [
            ("a.png", 10),
            ("b.png", 200),
        ]
        assert (origin, digest) == (tmp_path.name, signals_digest(str(tmp_path), "image", 10))
        (tmp_path / "b.png").unlink()
        assert signals_digest(str(tmp_path), "image", 10) != digest

        write_wav(tmp_path / "c.wav", rate=16_000)
        ears = load_processor(tiny_model(SPEECH), "audio", trust_remote_code=False)
        (sound,), _, _ = load_signals(ears, str(tmp_path), 10)
        assert (sound.name, sound.values.dtype, sound.values.shape) == ("c.wav", np.float32, (1600,))
        assert 0.4 < np.abs(sound.values).max() < 0.6

    def test_files_that_cannot_be_used_are_refused(self, tiny_model: ModelFactory, tmp_path: Path) -> None:
        ears = load_processor(tiny_model(SPEECH), "audio", trust_remote_code=False)
        with pytest.raises(MeasurementError, match="holds no audio file"):
            load_signals(ears, str(tmp_path), 10)
        write_wav(tmp_path / "slow.wav", rate=8000)
        with pytest.raises(
            MeasurementError, match=r"expected 16000 samples per second of 16 bits, slow\.wav has 8000"
        ):
            load_signals(ears, str(tmp_path), 10)
        (tmp_path / "slow.wav").write_bytes(b"no recording")
        with pytest.raises(MeasurementError, match=r"cannot be used: .*slow\.wav: file does not start with RIFF"):
            load_signals(ears, str(tmp_path), 10)

    @pytest.mark.parametrize(
        ("name", "kept", "reason"),
        [
            ("a.jpg", 0.5, "image file is truncated"),
            ("a.png", 0.5, "Truncated File Read"),
            ("a.webp", 0.5, "could not create decoder object"),
            ("a.bmp", 0.0, "cannot identify image file"),
            ("a.wav", 0.0, "EOFError"),
            ("a.wav", 0.01, "it holds no samples"),
        ],
    )
    def test_file_that_is_cut_off_is_named_without_a_model(
        self, tmp_path: Path, name: str, kept: float, reason: str
    ) -> None:
        path = tmp_path / "cat" / name
        path.parent.mkdir()
        modality: Modality = "audio" if path.suffix == ".wav" else "image"
        write_signal(path)
        check_signals(str(tmp_path), modality, 10, by_class=True)
        data = path.read_bytes()
        path.write_bytes(data[: max(44 if kept else 0, int(len(data) * kept))])
        with pytest.raises(MeasurementError) as caught:
            check_signals(str(tmp_path), modality, 10, by_class=True)
        assert caught.value.message.startswith(f"The examples cannot be used: {path}: ")
        assert reason in caught.value.message
        assert caught.value.hint.startswith("Repair or remove that file.")

    def test_only_files_that_validation_uses_are_checked(self, tmp_path: Path) -> None:
        write_signal(tmp_path / "b.png")
        (tmp_path / "a.png").mkdir()
        # The sample of one file is the second one.
        check_signals(str(tmp_path), "image", 1)
        for check in (
            lambda: check_signals(str(tmp_path), "image", 2),
            lambda: signals_digest(str(tmp_path), "image", 2),
        ):
            with pytest.raises(MeasurementError, match=r"cannot be used: .*a\.png: .*Is a directory"):
                check()


@pytest.mark.parametrize(("task", "name"), [(IMAGES, "a.png"), (SOUNDS, "a.wav")])
@pytest.mark.parametrize("target", ["torchscript", "auto"])
def test_unreadable_examples_are_refused_before_the_compile(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path, task: HfTask, name: str, target: str
) -> None:
    write_signal(tmp_path / name, rate=8000)
    if task is IMAGES:
        (tmp_path / name).write_text("not an image")
    auto = {"targets": ["torchscript", "onnx-runtime"]} if target == "auto" else {}
    fields = {"hf_task": task, "target": target, "auto": auto, "shape_buckets": ()}
    request = pipeline.request(tiny_model(task), validation={"examples_path": str(tmp_path)}, **fields)
    with pytest.raises(
        SpecError, match=rf"^The examples cannot be used: .*{name}: (cannot identify|expected 16000)"
    ):
        run_any_target(request, pipeline.settings)
    assert pipeline.counts == {"compile": 0, "validate": 0}


def write_signal(path: Path, *, rate: int = 16_000) -> None:
    """Write a small image, or a tenth of a second of a tone, in the format that the name stands for."""
    from PIL import Image

    if path.suffix == ".wav":
        write_wav(path, rate=rate)
    else:
        pixels = np.random.default_rng(3).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def write_wav(path: Path, *, rate: int) -> None:
    """Write a tenth of a second of a tone, 16 bits, one channel."""
    tone = 0.5 * np.sin(np.arange(rate // 10) * 0.1)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((tone * 32767).astype("<i2").tobytes())


class TestComponentsOfOneGraph:
    @pytest.mark.parametrize("target", ["torchscript", pytest.param("onnx-runtime", marks=pytest.mark.slow)])
    def test_word_and_document_share_one_copy_of_the_weights(
        self, tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, target: str
    ) -> None:
        alone, both = (
            self.compile(in_process, tiny_model, tmp_path / n, target, n) for n in ("document", "word document")
        )
        sizes = [open_artifact(folder).manifest.size_bytes for folder in (alone, both)]
        weights = (tiny_model(HfTask.TEXT_CLASSIFICATION) / "model.safetensors").stat().st_size
        assert sizes[0] > weights
        # Another shape adds its operators, and a second copy of the weights would add more than these.
        assert sizes[1] - sizes[0] < weights
        manifest = open_artifact(both).manifest
        assert {name: record.max_sequence_length for name, record in manifest.components.items()} == {
            "word": 8, "document": 64
        }  # fmt: skip
        assert len({record.folder for record in manifest.components.values()}) == 1

    def test_each_component_keeps_its_own_lengths(
        self, tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
    ) -> None:
        folder = self.compile(in_process, tiny_model, tmp_path / "both", "torchscript", "word document")
        source = load_source_model(tiny_model(HfTask.TEXT_CLASSIFICATION), HfTask.TEXT_CLASSIFICATION)
        artifact = open_artifact(folder)
        inputs = source.example_arrays(2, 8)
        for component in ("word", "document"):
            answer = LoadedComponent.load(artifact, component=component).run(inputs)
            np.testing.assert_allclose(answer["logits"], source.run(inputs)["logits"], rtol=0, atol=1e-5)
        longer = source.example_arrays(1, 9)
        with pytest.raises(InputError, match=r"9 tokens.*at most 8"):
            LoadedComponent.load(artifact, component="word").run(longer)
        LoadedComponent.load(artifact, component="document").run(longer)

    @staticmethod
    def compile(in_process: InProcess, tiny_model: ModelFactory, out_dir: Path, target: str, names: str) -> Path:
        """Compile the named components: word of 8 tokens, document of 64."""
        lengths = {"word": 8, "document": 64}
        dynamic = get_target(target).capabilities.dynamic_axes
        components = [
            ComponentSpec(name=name, max_sequence_length=lengths[name])
            if dynamic
            else ComponentSpec.model_validate(
                {"name": name, "shape_buckets": [{"batch_size": 1, "sequence_length": lengths[name]}]}
            )
            for name in names.split()
        ]
        source = tiny_model(HfTask.TEXT_CLASSIFICATION)
        return in_process.compile(
            source, out_dir, target=target, hf_task=HfTask.TEXT_CLASSIFICATION, components=components
        )


@pytest.mark.parametrize(
    ("task", "precision", "count"),
    [
        (HfTask.IMAGE_CLASSIFICATION, Precision.FP32, 64),
        (HfTask.IMAGE_CLASSIFICATION, Precision.BF16, 272),
        (HfTask.AUDIO_CLASSIFICATION, Precision.INT8, 272),
        (HfTask.IMAGE_SEGMENTATION, Precision.BF16, 64),
    ],
)
def test_generated_examples_suffice_for_the_limit_of_their_rate(
    task: HfTask, precision: Precision, count: int
) -> None:
    assert generated_count(task, precision) == count
    if task is not HfTask.IMAGE_SEGMENTATION and precision is Precision.BF16:
        (gate,) = (gate for gate in gates_for(precision, task, {}) if gate.entry.gate == "label_agreement")
        assert rate_bounds(count, count)[0] >= gate.limit
