"""Light image classification: the inputs and answers of CompiledPipeline, from Pillow and NumPy alone."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from compileflow import CompiledPipeline, HfTask, LightPipeline
from compileflow.artifact.open import open_artifact
from compileflow.errors import InputError, LoadError, MissingPackageError, SpecError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.light.image_processor import LightImageProcessor, load_image_processor, read_image
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import hide_distributions
from compileflow.validation.measure import Measurements
from compileflow.validation.whole_artifact import WholeArtifact
from tests.conftest import ModelFactory
from tests.in_process import InProcess

TASK = HfTask.IMAGE_CLASSIFICATION
TARGETS = ("onnx-runtime", "openvino")
CLASSES = (
    *("BeitImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor"),
    *("DeiTImageProcessor", "LevitImageProcessor", "MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor"),
    *("PvtImageProcessor", "SiglipImageProcessor", "ViTImageProcessor"),
)
# What the files of public models say, besides the name of the class.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "nothing": {},
    "a number as size": {"size": 61},
    "a large number": {"size": 390},
    "the shorter edge": {"size": {"shortest_edge": 45}, "resample": 1, "crop_pct": 0.9},
    "a wide size": {"size": {"height": 31, "width": 60}, "resample": 0},
    "a crop": {"do_center_crop": True, "crop_size": {"height": 49, "width": 302}},
    "a crop alone": {"do_resize": False, "do_center_crop": True, "crop_size": 33},
    "one mean": {"image_mean": 0.3, "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.01},
    "no scale": {"do_rescale": False},
    "no mean": {"do_normalize": False, "do_convert_rgb": True},
    "neither": {"do_rescale": False, "do_normalize": False, "resample": 5},
    "nulls": {"do_center_crop": None, "do_rescale": None, "default_to_square": None, "size": 50},
    "entries without effect": {"do_reduce_labels": True, "num_channels": 1, "do_pad": False},
}
SIZES = ((1, 1), (3, 7), (300, 40), (64, 301), (223, 225), (320, 240))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a random picture."""
    values = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    # Pillow warns about palettes with transparency.
    return Image.fromarray(values[:, :, :3] if mode == "P" else values).convert(mode)


def write_processor(folder: Path, content: Mapping[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


def assert_same_inputs(folder: Path, images: list[Image.Image]) -> None:
    """Compare with the processor of transformers, called as its pipelines call it."""
    light, reference = load_image_processor(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    for image in images:
        actual, expected = light(image), reference(images=image, return_tensors="np")["pixel_values"]
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected, err_msg=f"{image}")


class TestProcessor:
    @pytest.mark.parametrize("name", CLASSES)
    def test_inputs_of_each_class_are_those_of_transformers_to_the_last_bit(
        self, name: str, tmp_path: Path
    ) -> None:
        for place, settings in SETTINGS.items():
            if name == "ConvNextImageProcessor" and place == "a wide size":
                continue
            folder = write_processor(tmp_path / place, {"image_processor_type": name, **settings})
            assert_same_inputs(folder, [picture(*size) for size in SIZES])

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
    def test_modes_of_pictures_are_read_as_by_transformers(self, mode: str, tmp_path: Path) -> None:
        from transformers.image_utils import load_image

        saved = {"RGB": "png", "CMYK": "tiff"}.get(mode, "png")
        path = tmp_path / f"picture.{saved}"
        picture(30, 20, mode).save(path)
        for item in (picture(30, 20, mode), str(path)):
            np.testing.assert_array_equal(np.asarray(read_image(item)), np.asarray(load_image(item)))

    def test_colour_that_a_file_names_as_transparent_becomes_white(self, tmp_path: Path) -> None:
        image = picture(30, 20)
        image.save(tmp_path / "picture.png", transparency=image.getpixel((4, 4)))
        read = read_image(str(tmp_path / "picture.png"))
        folder = write_processor(
            tmp_path / "clip", {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 20}
        )
        assert read.info["transparency"] == image.getpixel((4, 4))
        assert_same_inputs(folder, [read])

    def test_turned_photographs_are_upright(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (40, 20))
        image.getexif()[0x0112] = 6
        image.save(tmp_path / "photo.jpg", exif=image.getexif())
        assert read_image(str(tmp_path / "photo.jpg")).size == (20, 40)

    def test_older_and_nested_files_are_read(self, tmp_path: Path) -> None:
        """microsoft/resnet-50 has such a file, and CLIP of transformers 5 the nested one."""
        older = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875}
        nested = {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 40}, "crop_size": 30}
        folder = write_processor(tmp_path, older)
        assert_same_inputs(folder, [picture(320, 240)])
        write_processor(tmp_path, {"image_processor": nested}, "processor_config.json")
        assert_same_inputs(folder, [picture(320, 240)])
        assert load_image_processor(folder)(picture(320, 240)).shape == (1, 3, 30, 30)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"image_processor_type": "SegformerImageProcessor"}, "is SegformerImageProcessor, which no light"),
            ({"size": 224}, "is unnamed, which no light pipeline has"),
            ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad True, which no light"),
            ({"image_processor_type": "CLIPImageProcessor", "use_square_size": True}, "use_square_size True"),
            (
                {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 9, "longest_edge": 20}},
                "has size {'shortest_edge': 9, 'longest_edge': 20}",
            ),
            ({"image_processor_type": "BitImageProcessor", "crop_size": {"shortest_edge": 9}}, "has crop_size {"),
            ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 9, "width": 9}}, "has size {"),
            ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "has crop_size None"),
        ],
    )
    def test_other_classes_and_settings_are_refused_with_the_way_to_the_full_interface(
        self, content: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        write_processor(tmp_path, content)
        with pytest.raises(LoadError, match=message) as caught:
            load_image_processor(tmp_path)
        assert "compileflow[hf]" in caught.value.hint

    @pytest.mark.parametrize(
        "setting",
        [
            *({"size": 0}, {"size": "large"}, {"resample": 9}, {"resample": None}, {"image_mean": None}),
            *({"image_std": [1, 2]}, {"rescale_factor": "x"}),
        ],
        ids=str,
    )
    def test_damaged_settings_are_refused(self, setting: dict[str, Any], tmp_path: Path) -> None:
        write_processor(tmp_path, {"image_processor_type": "ViTImageProcessor", **setting})
        with pytest.raises(LoadError):
            load_image_processor(tmp_path)

    def test_strip_that_would_fill_the_memory_is_refused(self, tmp_path: Path) -> None:
        write_processor(tmp_path, {"image_processor_type": "CLIPImageProcessor"})
        with pytest.raises(InputError, match=r"224 x 13440000 pixels after resizing"):
            load_image_processor(tmp_path)(Image.new("RGB", (1, 60_000)))

    def test_missing_pillow_is_named_with_its_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hide_distributions(monkeypatch, "pillow")
        with pytest.raises(MissingPackageError, match=r"needs pillow.*compileflow\[vision\]"):
            load_image_processor(tmp_path)


@pytest.fixture
def artifact(tiny_model: ModelFactory, in_process: InProcess) -> Path:
    return in_process.compiled(tiny_model(TASK), "onnx-runtime", TASK)


class TestPipeline:
    @pytest.mark.parametrize("target", TARGETS)
    def test_answers_are_those_of_the_compiled_pipeline(
        self, target: str, tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
    ) -> None:
        folder = in_process.compiled(tiny_model(TASK), target, TASK)
        images: list[Any] = [picture(*size) for size in SIZES]
        path = tmp_path / "picture.png"
        picture(33, 20, "RGBA").save(path)
        encoded = base64.b64encode(path.read_bytes()).decode()
        in_page = f"data:image/png;base64,{encoded}"
        items = [*images, picture(9, 9, "L"), picture(9, 9, "P"), str(path), encoded, in_page]
        calls: list[tuple[Any, dict[str, Any]]] = [
            *((item, {}) for item in items),
            *((items, {}), (items[:1], {}), (items, {"batch_size": 3, "top_k": 2}), (images[0], {"top_k": 9})),
            *((images, {"function_to_apply": name}) for name in ("sigmoid", "Softmax", "none", None)),
            (images[0], {"top_k": None}),
        ]
        for settings in ({}, {"top_k": 2, "function_to_apply": "none"}):
            light = LightPipeline.from_pretrained(folder, threads=1, **settings)
            full = CompiledPipeline.from_pretrained(folder, threads=1, **settings)
            for inputs, call in calls:
                assert_same_result(light(inputs, **call), full(inputs, **call), atol=1e-6)
            assert_same_result(list(light(iter(images))), [full(image) for image in images], atol=1e-6)

    @pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
    def test_kind_of_problem_decides_about_the_scores(self, problem: str, artifact: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(artifact, tmp_path / "artifact")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "problem_type": problem}), "utf-8")
        light, full = (kind.from_pretrained(folder, trust=True) for kind in (LightPipeline, CompiledPipeline))
        assert_same_result(light(picture(20, 20)), full(picture(20, 20)), atol=1e-6)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ("https://example.com/cat.png", r"from the web.*compileflow\[hf\]"),
            ("no-such-file.png", "Pillow cannot read 'no-such-file.png' as an image"),
            (b"bytes", "Expected an image, got bytes"),
            (Path("picture.png"), "Expected an image, got PosixPath"),
            (np.zeros((4, 4, 3), np.uint8), "Expected an image, got ndarray"),
            (None, "Expected an image, got NoneType"),
            ((Image.new("RGB", (4, 4)),), "Expected an image, got tuple"),
            (Image.new("RGB", (0, 4)), "no pixels"),
        ],
        ids=["URL", "absent file", "bytes", "Path", "array", "None", "tuple", "no pixels"],
    )
    def test_other_inputs_are_refused(self, item: Any, message: str, artifact: Path) -> None:
        light = LightPipeline.from_pretrained(artifact)
        with pytest.raises(InputError, match=message):
            light(item)

    def test_damaged_file_is_refused(self, artifact: Path, tmp_path: Path) -> None:
        stream = BytesIO()
        picture(50, 50).save(stream, "png")
        (tmp_path / "cut.png").write_bytes(stream.getvalue()[:2000])
        with pytest.raises(InputError, match=r"cut\.png"):
            LightPipeline.from_pretrained(artifact)(str(tmp_path / "cut.png"))

    def test_other_settings_are_refused(self, artifact: Path) -> None:
        light = LightPipeline.from_pretrained(artifact)
        with pytest.raises(SpecError, match=r"no setting 'timeout'.*compileflow\[hf\]"):
            light(picture(9, 9), timeout=3)
        for settings in ({"top_k": 0}, {"top_k": "all"}, {"function_to_apply": "relu"}):
            with pytest.raises(InputError, match=next(iter(settings))):
                light(picture(9, 9), **settings)

    def test_no_call_imports_torch_or_transformers(self, artifact: Path, tmp_path: Path) -> None:
        picture(9, 9).save(tmp_path / "picture.png")
        code = (
            "import sys\n"
            "from compileflow import LightPipeline\n"
            "LightPipeline.from_pretrained(sys.argv[1])(sys.argv[2])\n"
            "print(*{'torch', 'transformers', 'huggingface_hub', 'tokenizers', 'scipy'} & set(sys.modules))\n"
        )
        words = [sys.executable, "-W", "error", "-c", code, str(artifact), str(tmp_path / "picture.png")]
        completed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        assert completed.stdout.strip() == ""


class TestValidation:
    @pytest.mark.parametrize("shift", [0, 1])
    def test_validation_finds_a_light_path_that_drifts(
        self, shift: int, artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = LightImageProcessor.__call__

        def shifted(processor: LightImageProcessor, image: Any) -> Any:
            """Move the picture, as a wrong rounding of the middle would."""
            return np.roll(original(processor, image), shift, axis=-1)

        monkeypatch.setattr(LightImageProcessor, "__call__", shifted)
        measurements = measured(artifact, artifact)
        assert measurements.scalars["pipeline_answers"] == 0
        # The odd picture has one colour.
        assert measurements.scalars["light_answers"] == 4 * shift

    def test_artifact_that_no_light_pipeline_serves_is_not_compared(self, artifact: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(artifact, tmp_path / "artifact")
        content = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        write_processor(folder, {**content, "image_processor_type": "SegformerImageProcessor"})
        measurements = measured(folder, folder)
        assert "pipeline_answers" in measurements.scalars
        assert "light_answers" not in measurements.scalars


def measured(artifact: Path, source: Path) -> Measurements:
    opened = open_artifact(artifact, trust=True)
    component = LoadedComponent.load(opened, threads=1)
    measurements = Measurements()
    WholeArtifact(opened, source).measure_component(measurements, component, {}, max_length=1)
    component.close()
    return measurements
