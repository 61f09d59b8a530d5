"""Generated pictures with the statistics of photographs: objects that hide one another, texture, light and colour.

Sources of the statistics:
    Size of objects, and how they hide one another: Lee, Mumford and Huang, "Occlusion models for natural images",
        IJCV 41 (2001). The number of objects of radius r falls as r to the power of -3.
    Texture: Field, "Relations between the statistics of natural images and the response properties of cortical
        cells", JOSA A 4 (1987). Amplitude falls as the inverse of spatial frequency. In 135 photographs, the
        exponent was between -0.8 and -1.5, on average -1.2: Tolhurst, Tadmor and Chao, "Amplitude spectra of
        natural images", Ophthalmic Physiol. Opt. 12 (1992).
    Colour: Ruderman, Cronin and Chiao, "Statistics of cone responses to natural images: implications for visual
        coding", JOSA A 15 (1998). On a logarithmic scale, the responses of the eye's cones have three axes without
        correlation: brightness, blue-yellow and red-green, with spreads of 0.353, 0.073 and 0.007. Red, green and
        blue stand for the cones here. The spectra of these colours overlap less, so red-green varies more.
    Encoding: sRGB, IEC 61966-2-1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PIXELS = (160, 256)
_RADII = (6, 110)
_SIZE_RATIO = 1.2
_FORMS = 24
# One object for so many pixels covers most of a picture.
_PIXELS_PER_OBJECT = 600
# From log2 (red, green, blue) to brightness, blue-yellow and red-green; orthonormal, so its transpose goes back.
_COLOUR_AXES = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
# Spread of one picture's objects along these axes, in log2.
_SPREADS = np.array([1.5, 0.32, 0.12])
_LIGHT_SPREADS = np.array([0.5, 0.15, 0.05])
# Least and most spread of the texture of one object, in log2.
_TEXTURES = (0.1, 0.9)
# Share of the light that the middle of a picture reflects, as a photographer's grey card does.
_GREY = 0.18
# Brightness is held in steps of 1/128 of log2. The table turns 16 powers of two into the bytes of sRGB.
_STEPS, _POWERS = 128, 16
_TEXTURE_PIXELS = 512


class _Style(NamedTuple):
    """How a picture was taken: brightness in powers of two, contrast, and strength of colours."""

    brightness: float = 0.0
    contrast: float = 1.0
    colour: float = 1.0


_PLAIN = _Style()
# Pictures take turns.
_STYLES = (
    _PLAIN,
    _PLAIN,
    _Style(brightness=0.7, contrast=0.2),  # fog
    _PLAIN,
    _Style(brightness=-3.5),  # night
    _PLAIN,
    _Style(colour=4.0),  # saturated colours
    _Style(brightness=1.5, contrast=1.3),  # clipped highlights
)


def pictures(count: int, random: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Return pictures of several sizes, uint8 (height, width, 3)."""
    return [_picture(_STYLES[number % len(_STYLES)], random) for number in range(count)]


@cache
def falling_noise(shape: tuple[int, ...], exponent: float) -> NDArray[np.float32]:
    """Return periodic noise of variance 1 whose amplitude falls with frequency to the power of -exponent.

    The same shape gives the same noise.
    """
    grid = np.meshgrid(*map(np.fft.fftfreq, shape[:-1]), np.fft.rfftfreq(shape[-1]), indexing="ij", sparse=True)
    frequency = np.sqrt(sum(axis**2 for axis in grid))
    frequency.flat[0] = np.inf
    noise = np.random.default_rng(3).standard_normal(shape)
    plane = np.fft.irfftn(np.fft.rfftn(noise) / frequency**exponent, shape, axes=range(len(shape)))
    return np.asarray(plane / plane.std(), np.float32)


def _picture(style: _Style, random: np.random.Generator) -> NDArray[np.uint8]:
    height, width = (int(size) for size in random.integers(*_PIXELS, 2))
    count = height * width // _PIXELS_PER_OBJECT
    labels = _objects(height, width, count, random)
    # Each object has its colour and its amount of texture: a wall has little, leaves have much.
    spreads = _SPREADS * style.contrast * random.uniform(0.7, 1.3) * (1, style.colour, style.colour)
    colours = random.standard_normal((count + 1, 3)) * spreads + random.standard_normal(3) * _LIGHT_SPREADS
    palette = colours @ _COLOUR_AXES + np.log2(_GREY) + style.brightness + _POWERS - 1
    texture = random.uniform(*_TEXTURES, count + 1).astype(np.float32) * style.contrast
    light = np.take(texture, labels) * _texture_crop(height, width, random)
    light += _shading(height, width, random) * style.contrast
    light_steps = (light * _STEPS).astype(np.int16)
    picture = np.empty((height, width, 3), np.uint8)
    for channel, shades in enumerate((palette.T * _STEPS).astype(np.int16)):
        picture[..., channel] = np.take(_encoding(), np.take(shades, labels) + light_steps, mode="clip")
    return picture


def _objects(height: int, width: int, count: int, random: np.random.Generator) -> NDArray[np.intp]:
    """Return the number of the object that each pixel shows: objects lie over one another, 0 is the ground."""
    labels = np.zeros((height, width), np.intp)
    places = random.random((count, 2)) * (height, width)
    # The share of objects larger than r falls as r to the power of -2, so their density as r to the power of -3.
    smallest, largest = (radius**-2.0 for radius in _RADII)
    radii = random.uniform(largest, smallest, count) ** -0.5
    sizes = np.rint(np.log(radii / _RADII[0]) / np.log(_SIZE_RATIO)).astype(int)
    forms = random.integers(_FORMS, size=count)
    for label, ((row, column), size, form) in enumerate(
        zip(places.astype(int), sizes, forms, strict=True), start=1
    ):
        stencil = _stencil(int(size), int(form))
        half = len(stencil) // 2
        top, left = row - half, column - half
        part = labels[max(0, top) : top + len(stencil), max(0, left) : left + len(stencil)]
        seen = stencil[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]]
        np.copyto(part, label, where=seen)
    return labels


@cache
def _stencil(size: int, form: int) -> NDArray[np.bool_]:
    """Return True inside an object: an ellipse, or a rectangle that is nearly upright."""
    radius = _RADII[0] * _SIZE_RATIO**size
    half = int(1.5 * radius)
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    is_rectangle = form % 3 == 0
    # Walls, doors and horizons stand upright or lie flat, more or less.
    tilt = np.pi * form / _FORMS if not is_rectangle else 0.2 * (form / _FORMS - 0.5)
    across, along = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    # 7 has no common divisor with the number of forms, so stretch and tilt do not go together.
    across *= 0.6 + 0.8 * (7 * form % _FORMS) / _FORMS
    distance = np.maximum(abs(across), abs(along)) / 0.9 if is_rectangle else np.hypot(across, along)
    return np.asarray(distance < 1)


def _shading(height: int, width: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Return light that comes from above and from one side, in log2."""
    down, right = random.uniform(-1.5, 0.3), random.uniform(-0.7, 0.7)
    rows, columns = (np.linspace(-0.5, 0.5, size, dtype=np.float32) for size in (height, width))
    return rows[:, None] * np.float32(down) + columns * np.float32(right)


def _texture_crop(height: int, width: int, random: np.random.Generator) -> NDArray[np.float32]:
    top, left = (int(random.integers(_TEXTURE_PIXELS - size)) for size in (height, width))
    crop = falling_noise((_TEXTURE_PIXELS, _TEXTURE_PIXELS), 1.0)[top : top + height, left : left + width]
    return crop[:: random.choice((-1, 1)), :: random.choice((-1, 1))]


@cache
def _encoding() -> NDArray[np.uint8]:
    """Return the byte of sRGB for each step of brightness; the highest step is white."""
    linear = 2.0 ** (np.arange(_POWERS * _STEPS) / _STEPS - _POWERS + 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (np.clip(encoded, 0, 1) * 255 + 0.5).astype(np.uint8)
