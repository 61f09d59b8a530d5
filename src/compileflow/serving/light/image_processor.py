"""LightImageProcessor: images as inputs of a model, as transformers' processors prepare them with Pillow.

Source: transformers/image_processing_backends.py and models/*/image_processing_pil_*.py, release 5.23. Pillow is
imported inside the functions.
"""

from __future__ import annotations

import os
from base64 import decodebytes
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow._process.packages import check_installed
from compileflow.contracts.toolkit import library_errors
from compileflow.errors import InputError, LoadError, first_line
from compileflow.serving.full_interface import FULL_INTERFACE
from compileflow.source_model.processor import PROCESSOR_FILES
from compileflow.source_model.sentence_files import DAMAGED, read_file, typed

# A strip whose shorter edge grows to the size of the model would fill the memory.
_MOST_PIXELS = 2**27
# Where ConvNext stops cropping.
_UNCROPPED_EDGE = 384
_BILINEAR, _BICUBIC = 2, 3
_HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_EDGE: Mapping[str, Any] = {"default_to_square": False}
_CROPPED: Mapping[str, Any] = {"do_center_crop": True, "crop_size": 224}


def _defaults(colours: Mapping[str, Any], size: Any, **settings: Any) -> Mapping[str, Any]:
    """Return the settings of a class where its file has none."""
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    return {**common, **colours, "size": size, "resample": _BICUBIC, "default_to_square": True, **settings}


# The classes whose steps are those of `LightImageProcessor`.
_CLASSES: Mapping[str, Mapping[str, Any]] = {
    "BeitImageProcessor": _defaults(_HALVES, 224, crop_size=224),
    "BitImageProcessor": _defaults(_CLIP, 224, do_convert_rgb=True, **_EDGE, **_CROPPED),
    "CLIPImageProcessor": _defaults(_CLIP, 224, do_convert_rgb=True, **_EDGE, **_CROPPED),
    "ConvNextImageProcessor": _defaults(_HALVES, 384, crop_pct=224 / 256, **_EDGE),
    "DeiTImageProcessor": _defaults(_HALVES, 256, **_CROPPED),
    "LevitImageProcessor": _defaults(_IMAGENET, 224, **_EDGE, **_CROPPED),
    "MobileNetV1ImageProcessor": _defaults(_HALVES, 256, resample=_BILINEAR, **_EDGE, **_CROPPED),
    "MobileNetV2ImageProcessor": _defaults(_HALVES, 256, resample=_BILINEAR, **_EDGE, **_CROPPED),
    "PvtImageProcessor": _defaults(_IMAGENET, 224),
    "SiglipImageProcessor": _defaults(_HALVES, {"height": 224, "width": 224}, do_convert_rgb=True, **_EDGE),
    "ViTImageProcessor": _defaults(_HALVES, 224, resample=_BILINEAR),
}


@dataclass(frozen=True, eq=False)
class LightImageProcessor:
    """Turns an image into the input of a model.

    Attributes:
        size: Width and height to resize to, or the shorter edge; None keeps the size.
        resample: Number of Pillow's filter.
        crops: Widths and heights to which the middle is cut, one after the other; what is missing becomes black.
        levels: Input for each level of a colour, shape (3, 256).
        on_white: Whether transparent pixels become white.
    """

    size: tuple[int, int] | int | None
    resample: int
    crops: tuple[tuple[int, int], ...]
    levels: NDArray[Any]
    on_white: bool

    def __call__(self, image: Any) -> NDArray[Any]:
        """Return the input for an image of `read_image`, shape (1, 3, height, width).

        Raises:
            InputError: The image has no pixels, or would fill the memory after resizing.
        """
        from PIL import Image

        if 0 in image.size:
            raise InputError("The image has no pixels.", hint="Leave it out.")
        # An RGB image may name one colour that is transparent.
        if self.on_white and image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        if self.size is not None:
            size = _scaled(image.size, self.size) if isinstance(self.size, int) else self.size
            image = image.resize(size, self.resample)
        for width, height in self.crops:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)
        return np.stack([levels[pixels[:, :, colour]] for colour, levels in enumerate(self.levels)])[None]


def _scaled(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return a width and a height whose shorter one is `edge`, in the ratio of `size`."""
    width, height = (int(edge * side / min(size)) for side in size)
    if width * height > _MOST_PIXELS:
        raise InputError(
            f"An image of {size[0]} x {size[1]} pixels would have {width} x {height} pixels after resizing.",
            hint="Cut the image.",
        )
    return width, height


def read_image(item: Any) -> Any:
    """Return an image of Pillow, upright and in RGB.

    Args:
        item: Path of a file, an image in base64, or an image of Pillow.

    Raises:
        InputError: The item is none of these, or Pillow cannot read it.
    """
    from PIL import Image, ImageOps

    if isinstance(item, str) and item.startswith(("http://", "https://")):
        raise InputError("A light pipeline does not load images from the web.", hint=f"{FULL_INTERFACE}.")
    if not isinstance(item, str | Image.Image):
        raise InputError(
            f"Expected an image, got {type(item).__name__}.",
            hint="Pass a path or an image in base64 as str, or an image of Pillow.",
        )
    try:
        if isinstance(item, Image.Image):
            return ImageOps.exif_transpose(item).convert("RGB")
        encoded = item.split(",", 1)[1] if item.startswith("data:image/") else item
        with Image.open(item if os.path.isfile(item) else BytesIO(decodebytes(encoded.encode()))) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    # Pillow's readers raise whatever they like.
    except Exception as error:
        raise InputError(
            f"Pillow cannot read {item!r:.80} as an image: {type(error).__name__}: {first_line(error)}.",
            hint="Pass the path of an image file, or its bytes in base64.",
        ) from error


def load_image_processor(folder: Path) -> LightImageProcessor:
    """Read the image processor in a folder.

    Raises:
        LoadError: The class is not a light one, a setting is not supported, or a file cannot be read.
        MissingPackageError: Pillow is not installed.
    """
    check_installed(("pillow",), subject="A light pipeline of images", extra="vision")
    file, newer_file = PROCESSOR_FILES
    content = typed(read_file(folder / newer_file, {}), "image_processor", dict, newer_file)
    if content is None:
        content = read_file(folder / file, {})
    older_name = str(content.get("feature_extractor_type", "unnamed"))
    name = content.get("image_processor_type") or older_name.replace("FeatureExtractor", "ImageProcessor")
    name = str(name).removesuffix("Fast")
    if name not in _CLASSES:
        raise LoadError(
            f"The image processor is {name}, which no light pipeline has.",
            hint=f"They have: {', '.join(_CLASSES)}. {FULL_INTERFACE}.",
        )
    settings = {**_CLASSES[name], **content}
    for setting in ("do_pad", "use_square_size"):
        if settings.get(setting):
            raise _unsupported(setting, settings)
    with library_errors("The settings of the image processor cannot be used", hint=DAMAGED):
        return _with_settings(name, settings)


def _with_settings(name: str, settings: Mapping[str, Any]) -> LightImageProcessor:
    from PIL import Image

    size, crops = None, []
    if settings["do_resize"]:
        size = _size("size", settings, is_square=settings["default_to_square"])
        if name == "ConvNextImageProcessor":
            if not isinstance(size, int):
                raise _unsupported("size", settings)
            if size < _UNCROPPED_EDGE:
                crops.append((size, size))
            size = int(size / settings["crop_pct"]) if crops else (size, size)
        elif name == "LevitImageProcessor" and isinstance(size, int):
            size = int(256 / 224 * size)
    if settings.get("do_center_crop"):
        crop = _size("crop_size", settings, is_square=True)
        if isinstance(crop, int):
            raise _unsupported("crop_size", settings)
        crops.append(crop)
    levels: NDArray[Any] = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    if settings["do_rescale"]:
        levels = (levels.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    if settings["do_normalize"]:
        levels = (levels.astype(np.float32) - _colours(settings["image_mean"])) / _colours(settings["image_std"])
    return LightImageProcessor(
        size=size,
        resample=Image.Resampling(settings["resample"]),
        crops=tuple(crops),
        levels=levels,
        on_white=bool(settings.get("do_convert_rgb")),
    )


def _size(name: str, settings: Mapping[str, Any], *, is_square: bool) -> tuple[int, int] | int:
    """Return a width and a height, or the shorter edge."""
    value = settings.get(name)
    if isinstance(value, int):
        value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
    if not isinstance(value, Mapping) or value.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise _unsupported(name, settings)
    if any(type(edge) is not int or edge < 1 for edge in value.values()):
        raise ValueError(f"{name} is {value}")
    return value["shortest_edge"] if "shortest_edge" in value else (value["width"], value["height"])


def _colours(value: Any) -> NDArray[np.float32]:
    """Return one number for each colour, shape (3, 1)."""
    numbers = [float(number) for number in value] if isinstance(value, list | tuple) else float(value)
    return np.full(3, numbers, np.float32)[:, None]


def _unsupported(name: str, settings: Mapping[str, Any]) -> LoadError:
    return LoadError(
        f"The image processor has {name} {settings.get(name)!r:.80}, which no light pipeline has.",
        hint=f"{FULL_INTERFACE}.",
    )
