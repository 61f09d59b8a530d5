"""Tasks of images and audio besides classification: shapes that follow from the input, decisions, and verdicts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import compileflow
from benchmarks.architectures.tiny_models import ModelClass, write_model
from compileflow import CompiledModel, CompiledPipeline, LightPipeline
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.errors import LoadError, SourceError, SpecError
from compileflow.source_model.load import load_source_model
from compileflow.source_model.processor import load_processor
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import ComponentSpec, HfTask
from compileflow.steps.compile import detect_task
from compileflow.testing.pipelines import assert_same_result
from compileflow.validation.cases import SignalCases
from compileflow.validation.cases.case import Case
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.detections import in_same_order
from tests.conftest import ModelFactory
from tests.in_process import BUCKETS, InProcess
from tests.models import build_model
from tests.steps import Pipeline
from tests.unit.proving import validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")
NEW_TASKS = (
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
    HfTask.IMAGE_FEATURE_EXTRACTION,
    HfTask.IMAGE_SEGMENTATION,
    HfTask.OBJECT_DETECTION,
    HfTask.DEPTH_ESTIMATION,
    HfTask.AUDIO_FRAME_CLASSIFICATION,
    HfTask.AUDIO_XVECTOR,
)


def images(*sizes: tuple[int, int]) -> list[Any]:
    """Return one random picture of each (height, width)."""
    from PIL import Image

    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def build_dinov2(folder: Path, processor: Any) -> Path:
    """Write a small classifier that takes images of any size."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    transformers.Dinov2ForImageClassification(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_detr(folder: Path, processor: Any) -> Path:
    """Write a small detector with a mask of pixels."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
    )
    transformers.DetrForObjectDetection(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def keeps_aspect_ratio() -> Any:
    """A processor that resizes the shorter side to 32 pixels."""
    return transformers.BitImageProcessor(size={"shortest_edge": 32}, do_resize=True, do_center_crop=False)


class TestImagesOfAnySize:
    @pytest.fixture
    def source(self, tmp_path: Path, keeps_aspect_ratio: Any) -> Path:
        return build_dinov2(tmp_path / "model", keeps_aspect_ratio)

    def test_height_and_width_are_free_where_the_processor_keeps_the_aspect_ratio(self, source: Path) -> None:
        (pixels,) = load_source_model(source, HfTask.IMAGE_CLASSIFICATION).inputs
        assert pixels.axes == ("batch", 3, "height", "width")

    def test_number_of_patches_is_a_size_that_follows_from_the_image(self, source: Path) -> None:
        states = load_source_model(source, HfTask.IMAGE_FEATURE_EXTRACTION).outputs[0]
        assert (states.name, states.axes) == ("last_hidden_state", ("batch", "free", 32))

    def test_equal_numbers_of_patches_of_two_images_are_not_taken_for_a_fixed_size(self, tmp_path: Path) -> None:
        # 64 x 96 pixels become 2 x 3 patches, and 200 x 72 pixels, cut to the longest edge, 3 x 2.
        processor = transformers.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
        source = build_detr(tmp_path / "model", processor)
        outputs = {record.name: record for record in load_source_model(source, HfTask.OBJECT_DETECTION).outputs}
        assert outputs["encoder_last_hidden_state"].axes == ("batch", "free", 16)
        assert outputs["pred_boxes"].axes == ("batch", 6, 4)

    @pytest.mark.parametrize("target", ["openvino", pytest.param("onnx-runtime", marks=pytest.mark.slow)])
    def test_pictures_of_any_shape_are_answered_as_by_transformers(
        self, source: Path, in_process: InProcess, tmp_path: Path, target: str
    ) -> None:
        task = HfTask.IMAGE_CLASSIFICATION
        artifact = in_process.compile(source, tmp_path / "artifact", target=target, hf_task=task)
        compiled, reference = CompiledPipeline.from_pretrained(artifact), transformers.pipeline(task, str(source))
        pictures = images((32, 32), (48, 64), (100, 40), (48, 64))
        for picture in pictures:
            assert_same_result(compiled(picture), reference(picture), atol=1e-5)
        assert_same_result(compiled(pictures, batch_size=4), reference(pictures), atol=1e-5)
        light = LightPipeline.from_pretrained(artifact, batch_size=4)
        assert_same_result(light(pictures), reference(pictures), atol=1e-5)

    @pytest.mark.slow
    def test_proof_of_such_a_compile_passes(self, source: Path, in_process: InProcess, tmp_path: Path) -> None:
        task = HfTask.IMAGE_CLASSIFICATION
        artifact = in_process.compile(source, tmp_path / "artifact", target="openvino", hf_task=task)
        proof = validate_here(source, artifact, tmp_path / "report", max_examples=300)
        assert proof.outcome == "pass", proof.reason

    def test_batches_of_the_proof_have_images_of_one_size(
        self, source: Path, in_process: InProcess, tmp_path: Path
    ) -> None:
        source_model = load_source_model(source, HfTask.IMAGE_CLASSIFICATION)
        record = ComponentRecord(
            folder="components/default",
            inputs=source_model.inputs,
            outputs=source_model.outputs,
            output_class=source_model.output_class,
            max_sequence_length=1,
            dynamic_axes=True,
        )
        builder = SignalCases(load_processor(source, "image", trust_remote_code=False), record)
        cases = builder.generated() + builder.shape_cases(builder.shapes(), seed=1)
        assert {len(case.texts) for case in cases} == {1, 2, 3, 8, 9, 32, 33}
        for case in cases:
            assert source_model.run(case.inputs)["logits"].shape == (len(case.texts), 3)

    def test_fixed_shapes_are_refused_before_the_compile(
        self, source: Path, in_process: InProcess, tmp_path: Path
    ) -> None:
        with pytest.raises(
            SpecError, match=r"keeps the aspect ratio: it makes images of 32 x 48 and 88 x 32 pixels"
        ):
            in_process.compile(
                source, tmp_path / "artifact", target="torchscript", hf_task=HfTask.IMAGE_CLASSIFICATION
            )

    def test_model_whose_export_needs_one_size_is_refused_before_the_compile(
        self, in_process: InProcess, tmp_path: Path
    ) -> None:
        task = HfTask.DEPTH_ESTIMATION
        write_model(
            ModelClass(task, AUTO_CLASSES[task], "zoedepth", "ZoeDepthForDepthEstimation"), tmp_path / "model"
        )
        with pytest.raises(SpecError, match="does not end while the size is free") as caught:
            in_process.compile(tmp_path / "model", tmp_path / "artifact", target="openvino", hf_task=task)
        assert "keep_aspect_ratio" in caught.value.hint

    def test_model_of_one_size_under_such_a_processor_is_refused_in_one_line(
        self, tiny_model: ModelFactory, tmp_path: Path, keeps_aspect_ratio: Any
    ) -> None:
        folder = Path(shutil.copytree(tiny_model(HfTask.IMAGE_CLASSIFICATION), tmp_path / "vit"))
        keeps_aspect_ratio.save_pretrained(folder)
        with pytest.raises(SourceError, match="ViTForImageClassification does not run on the inputs") as caught:
            load_source_model(folder, HfTask.IMAGE_CLASSIFICATION)
        assert "\n" not in str(caught.value)
        assert "height and a width" in caught.value.hint


class TestAudioOfFixedLength:
    @pytest.fixture
    def whisper(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        config = transformers.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
            vocab_size=60,
            num_mel_bins=8,
            max_source_positions=100,
            classifier_proj_size=16,
            num_labels=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        transformers.WhisperForAudioClassification(config).eval().save_pretrained(tmp_path / "whisper")
        extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
        extractor.save_pretrained(tmp_path / "whisper")
        return tmp_path / "whisper"

    def test_every_recording_fills_the_length_that_the_encoder_takes(self, whisper: Path) -> None:
        (features,) = load_source_model(whisper, HfTask.AUDIO_CLASSIFICATION).inputs
        assert (features.name, features.axes) == ("input_features", ("batch", 8, 200))

    @pytest.mark.parametrize("target", ["torchscript", pytest.param("openvino", marks=pytest.mark.slow)])
    def test_whisper_classifies_as_in_transformers(
        self, whisper: Path, in_process: InProcess, tmp_path: Path, target: str
    ) -> None:
        task = HfTask.AUDIO_CLASSIFICATION
        artifact = in_process.compile(
            whisper, tmp_path / "artifact", target=target, hf_task=task, components=[ComponentSpec()]
        )
        compiled, reference = CompiledPipeline.from_pretrained(artifact), transformers.pipeline(task, str(whisper))
        random = np.random.default_rng(2)
        sounds = [random.standard_normal(samples, dtype=np.float32) for samples in (400, 16_000, 40_000)]
        assert_same_result(compiled(sounds), reference(sounds), atol=1e-5)


class TestTowersOfClip:
    @pytest.fixture
    def clip(self, tiny_model: ModelFactory) -> Path:
        return tiny_model(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION)

    def test_model_of_both_towers_is_found_by_its_processor_and_its_tokenizer(self, clip: Path) -> None:
        assert detect_task(clip) is HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION

    @pytest.mark.parametrize("task", [HfTask.FEATURE_EXTRACTION, HfTask.IMAGE_FEATURE_EXTRACTION])
    def test_both_towers_at_once_have_no_features_of_one_input(self, clip: Path, task: HfTask) -> None:
        with pytest.raises(SpecError, match=f"(takes text and image inputs together|clip has no head).*{task}"):
            load_source_model(clip, task)

    def test_image_tower_with_its_projection_answers_with_embeddings(
        self, clip: Path, in_process: InProcess, tmp_path: Path
    ) -> None:
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
        processor = transformers.AutoImageProcessor.from_pretrained(clip)
        tower.save_pretrained(tmp_path / "tower")
        processor.save_pretrained(tmp_path / "tower")
        task = detect_task(tmp_path / "tower")
        artifact = in_process.compile(
            tmp_path / "tower", tmp_path / "artifact", target="torchscript", hf_task=task
        )
        embed = CompiledPipeline.from_pretrained(artifact)
        reference = transformers.pipeline(task, tower, image_processor=processor)
        pictures = images((40, 40), (64, 48))
        assert_same_result(embed(pictures), reference(pictures), atol=1e-5)
        assert np.shape(embed(pictures[0])) == (1, 16)

    def test_text_tower_with_its_projection_answers_with_embeddings(
        self, clip: Path, in_process: InProcess, tmp_path: Path
    ) -> None:
        tower = transformers.CLIPTextModelWithProjection.from_pretrained(clip)
        tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
        tower.save_pretrained(tmp_path / "tower")
        tokenizer.save_pretrained(tmp_path / "tower")
        artifact = in_process.compile(
            tmp_path / "tower", tmp_path / "artifact", target="torchscript", hf_task=HfTask.FEATURE_EXTRACTION
        )
        embed = CompiledPipeline.from_pretrained(artifact)
        reference = transformers.pipeline("feature-extraction", tower, tokenizer=tokenizer)
        texts = ["a cat", "two dogs in a wide street"]
        assert_same_result(embed(texts), reference(texts), atol=1e-5)
        assert np.shape(embed(texts[0])) == (1, 16)


class TestDecisions:
    def test_segmentation_counts_pixels_and_whole_pictures(self) -> None:
        before = np.zeros((1, 2, 2, 2), np.float32)
        before[0, 0, 0] = before[0, 1, 1] = 5.0
        after = before.copy()
        after[0, :, 0, 0] = after[0, ::-1, 0, 0]
        decisions = decided(HfTask.IMAGE_SEGMENTATION, {"logits": before}, {"logits": after})
        (rate,) = decisions.rates()
        assert (rate["metric"], rate["hits"], rate["trials"]) == ("label_agreement", 3, 4)
        # The upper label keeps one pixel of two, the lower one gets a third.
        assert decisions.scalars()["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
        (flip,) = decisions.flips(str)
        assert (flip.before, flip.after) == ("row 0, column 0: cat", "row 0, column 0: dog")

    def test_labels_of_an_image_are_compared_over_the_texts(self) -> None:
        before = {"logits_per_image": np.array([[3.0, 1.0]], np.float32)}
        (rate,) = decided(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION, before, before).rates()
        assert (rate["metric"], rate["hits"], rate["trials"]) == ("label_agreement", 1, 1)
        after = {"logits_per_image": np.array([[1.0, 3.0]], np.float32)}
        (flip,) = decided(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION, before, after).flips(str)
        assert (flip.before, flip.after) == ("cat", "dog")

    def test_detections_may_come_in_another_order(self) -> None:
        before = detections()
        after = {name: value[:, ::-1] for name, value in before.items()}
        (rate,) = decided(HfTask.OBJECT_DETECTION, before, after).rates()
        assert (rate["metric"], rate["hits"], rate["trials"]) == ("box_agreement", 3, 3)

    def test_outputs_are_compared_in_the_order_of_the_source_models_queries(self) -> None:
        # Two layers, one row, three queries.
        before = detections() | {"states": np.arange(12, dtype=np.float32).reshape(2, 1, 3, 2)}
        axes = {"logits": ("batch", 3, 3), "pred_boxes": ("batch", 3, 4), "states": (2, "batch", 3, 2)}
        records = [TensorRecord(name=name, dtype="float32", axes=sizes) for name, sizes in axes.items()]
        swapped = {name: value.take([1, 0, 2], 2 if name == "states" else 1) for name, value in before.items()}
        for name, value in in_same_order(records, before, swapped).items():
            np.testing.assert_array_equal(value, before[name])
        lost = detections()
        lost["logits"][0, 1] = lost["logits"][0, 0]
        np.testing.assert_array_equal(in_same_order(records[:2], before, lost)["logits"], lost["logits"])

    @pytest.mark.parametrize(("step", "hits"), [(0.009, 3), (0.011, 2)])
    def test_box_may_move_by_one_percent_of_the_image(self, step: float, hits: int) -> None:
        before, after = detections(), detections()
        after["pred_boxes"][0, 1, 0] += step
        decisions = decided(HfTask.OBJECT_DETECTION, before, after)
        assert decisions.rates()[0]["hits"] == hits
        assert decisions.flips_count() == 3 - hits

    def test_detection_with_another_label_is_lost(self) -> None:
        before, after = detections(), detections()
        after["logits"][0, 0] = [0.0, 4.0, 0.0]
        decisions = decided(HfTask.OBJECT_DETECTION, before, after)
        assert decisions.rates()[0]["hits"] == 2
        (flip,) = decisions.flips(str)
        assert flip.before.startswith("cat at [")
        assert flip.after.startswith("dog at [")

    def test_depths_may_differ_by_one_percent_of_their_range(self) -> None:
        before = np.linspace(100, 200, 50, dtype=np.float32).reshape(1, 5, 10)
        after = before + np.where(np.arange(10) == 3, 1.1, 0.9).astype(np.float32)
        decisions = decided(HfTask.DEPTH_ESTIMATION, {"predicted_depth": before}, {"predicted_depth": after})
        (rate,) = decisions.rates()
        assert (rate["metric"], rate["hits"], rate["trials"]) == ("depth_agreement", 45, 50)

    def test_frames_decide_about_each_label(self) -> None:
        before = np.array([[[2.0, -2.0], [1.0, -1.0], [3.0, 3.0]]], np.float32)
        after = before.copy()
        after[0, 1, 1] = 1.0
        # The last frame is padding.
        decisions = decided(
            HfTask.AUDIO_FRAME_CLASSIFICATION, {"logits": before}, {"logits": after}, mask=[[1, 1, 0]]
        )
        (rate,) = decisions.rates()
        assert (rate["hits"], rate["trials"]) == (3, 4)
        assert decisions.flips(str)[0].before == "frame 1, dog: no"

    @pytest.mark.parametrize(
        ("task", "name"), [(HfTask.IMAGE_FEATURE_EXTRACTION, "image_embeds"), (HfTask.AUDIO_XVECTOR, "embeddings")]
    )
    def test_embeddings_keep_their_neighbours(self, task: HfTask, name: str) -> None:
        embeddings = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
        (first, *_) = decided(task, {name: embeddings}, {name: embeddings}).rates()
        assert (first["metric"], first["hits"], first["trials"]) == ("neighbour_overlap", 10, 10)
        other = decided(task, {name: embeddings}, {name: embeddings[::-1].copy()})
        assert sum(rate["hits"] for rate in other.rates()) < 120


def decided(task: HfTask, before: Arrays, after: Arrays, *, mask: Any = None) -> Decisions:
    """Return the decisions about one batch of outputs."""
    rows = len(next(iter(before.values())))
    mask = np.ones((rows, 1), int) if mask is None else np.array(mask)
    decisions = Decisions(task, {0: "cat", 1: "dog"})
    case = Case("case", "agreement", tuple(f"picture {row}" for row in range(rows)), {}, mask)
    decisions.add(case, before, after)
    return decisions


def detections() -> Arrays:
    """Return three detections with the labels cat, dog, and one that is surely nothing."""
    logits = np.array([[[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.5, 9.0]]], np.float32)
    boxes = np.array([[[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]]], np.float32)
    return {"logits": logits, "pred_boxes": boxes}


class TestWholeWay:
    @pytest.mark.parametrize("task", NEW_TASKS)
    def test_task_is_read_off_the_folder(self, tiny_model: ModelFactory, task: HfTask) -> None:
        assert detect_task(tiny_model(task)) is task

    @pytest.mark.parametrize(
        "task",
        [
            pytest.param(task, marks=[] if task is HfTask.OBJECT_DETECTION else pytest.mark.slow)
            for task in NEW_TASKS
        ],
    )
    def test_compile_of_another_model_is_blocked(
        self, tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, task: HfTask
    ) -> None:
        target = "onnx-runtime" if task is HfTask.AUDIO_XVECTOR else "torchscript"
        artifact = in_process.compiled(tiny_model(task), target, task)
        source = build_model(tmp_path / "model", task)
        alter_one_tensor(source)
        proof = validate_here(source, artifact, tmp_path / "report", max_examples=16)
        assert proof.outcome == "fail"

    @pytest.mark.slow
    @pytest.mark.parametrize("task", NEW_TASKS)
    def test_task_is_registered_with_its_verdict_and_served(
        self, tiny_model: ModelFactory, pipeline: Pipeline, task: HfTask
    ) -> None:
        target = "openvino" if task is HfTask.AUDIO_XVECTOR else "torchscript"
        buckets = () if target == "openvino" else BUCKETS[task.modality]
        request = pipeline.request(
            tiny_model(task), name="pictures", target=target, shape_buckets=[b.model_dump() for b in buckets]
        )
        version = pipeline.run(request)
        assert version.spec["hf_task"] == task
        uri = pipeline.compile(request).uri
        if task.pipeline_owner is None:
            assert CompiledModel.from_pretrained(uri).manifest.hf_task is task
        else:
            assert CompiledPipeline.from_pretrained(uri).task == task

    @pytest.mark.parametrize("task", [HfTask.AUDIO_FRAME_CLASSIFICATION, HfTask.AUDIO_XVECTOR])
    def test_task_without_a_pipeline_names_the_way_to_call_the_model(self, task: HfTask) -> None:
        with pytest.raises(LoadError, match=f"transformers has no pipeline for {task}") as caught:
            compileflow.pipeline(task, model="anything")
        assert "CompiledModel.from_pretrained" in caught.value.hint

    def test_frames_are_answered_by_the_model_and_no_pipeline_is_made(
        self, tiny_model: ModelFactory, in_process: InProcess
    ) -> None:
        task = HfTask.AUDIO_FRAME_CLASSIFICATION
        artifact = in_process.compiled(tiny_model(task), "torchscript", task)
        with pytest.raises(LoadError, match="no pipeline"):
            CompiledPipeline.from_pretrained(artifact)
        model = CompiledModel.from_pretrained(artifact)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(artifact)
        sound = np.random.default_rng(0).standard_normal(9000, dtype=np.float32)
        outputs = model(**extractor(sound, sampling_rate=16_000, return_tensors="pt"))
        assert type(outputs).__name__ == "TokenClassifierOutput"
        assert outputs.logits.shape == (1, 112, 2)

    def test_fixed_shapes_have_no_x_vectors(self, tiny_model: ModelFactory) -> None:
        # Their graph takes no mask, so a padded row would get another answer.
        records = load_source_model(tiny_model(HfTask.AUDIO_XVECTOR), HfTask.AUDIO_XVECTOR)
        assert [record.name for record in records.inputs] == ["input_values"]
        # 16 frames: 15 for the convolutions of the head, and another one for a deviation.
        assert records.frame_convolutions[-1] == (2, 1)


def alter_one_tensor(folder: Path) -> None:
    """Add a little noise to the last matrix of a model's weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    name = [name for name, value in weights.items() if value.ndim >= 2][-1]
    weights[name] += 0.02 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, path, {"format": "pt"})
