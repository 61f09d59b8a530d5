"""Generated pictures and recordings have the statistics of photographs and speech."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compileflow.validation.cases.pictures import pictures
from compileflow.validation.cases.speech import recordings

RATE = 16_000


def amplitude_slope(picture: NDArray[np.uint8]) -> float:
    """Return the slope of amplitude over spatial frequency on logarithmic axes."""
    size = min(picture.shape[:2])
    grey = picture[:size, :size].mean(axis=-1)
    window = np.hanning(size)
    amplitude = abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    edges = np.geomspace(4 / size, 0.4, 12)
    band = np.digitize(frequency, edges)
    means = [amplitude[band == number].mean() for number in range(1, len(edges))]
    return float(np.polyfit(np.log(edges[1:] * edges[:-1]) / 2, np.log(means), 1)[0])


def test_amplitude_of_pictures_falls_as_in_photographs() -> None:
    slopes = [amplitude_slope(picture) for picture in pictures(24, np.random.default_rng(1))]
    # Tolhurst, Tadmor and Chao (1992) measured -0.8 to -1.5 on single photographs, -1.2 on average.
    assert -1.35 < np.mean(slopes) < -0.9
    assert -1.6 < min(slopes) < max(slopes) < -0.7


def test_colour_channels_of_pictures_correlate_but_are_not_grey() -> None:
    correlations = [
        np.asarray(np.corrcoef(picture.reshape(-1, 3).T))[np.triu_indices(3, 1)]
        for picture in pictures(24, np.random.default_rng(2))
    ]
    assert np.median(correlations, axis=0).min() > 0.8
    assert np.max(correlations) < 1


def test_pictures_are_of_several_sizes_bright_dark_faint_and_colourful() -> None:
    sample = pictures(16, np.random.default_rng(3))
    assert all(picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 for picture in sample)
    assert len({picture.shape for picture in sample}) > 8
    means, contrasts = (np.array([measure(picture) for picture in sample]) for measure in (np.mean, np.std))
    assert means.min() < 60 < 160 < means.max()
    assert contrasts.min() < 15 < 35 < contrasts.max()
    colourfulness = [np.ptp(picture.astype(int), axis=-1).mean() for picture in sample]
    assert max(colourfulness) > 3 * np.median(colourfulness)


def test_recordings_have_voiced_unvoiced_and_quiet_parts() -> None:
    crossings, powers = [], []
    for sound in recordings(20, RATE, np.random.default_rng(4)):
        frames = np.lib.stride_tricks.sliding_window_view(sound, 480)[::240]
        crossings.append((np.diff(np.signbit(frames), axis=1)).mean(axis=1))
        powers.append((frames**2).mean(axis=1) / (sound**2).mean())
    crossing, power = np.concatenate(crossings), np.concatenate(powers)
    is_loud = power > 0.05
    assert np.mean(is_loud & (crossing < 0.2)) > 0.3
    assert np.mean(is_loud & (crossing > 0.3)) > 0.02
    assert np.mean(power < 0.05) > 0.05


def test_long_term_spectrum_of_speech_falls() -> None:
    bands = [(250, 500), (500, 1000), (1000, 2000), (2000, 4000)]
    powers = np.zeros(len(bands))
    for sound in recordings(30, RATE, np.random.default_rng(5)):
        spectrum = abs(np.fft.rfft(sound)) ** 2 / (sound**2).sum() / len(sound)
        frequency = np.fft.rfftfreq(len(sound), 1 / RATE)
        powers += [spectrum[(low <= frequency) & (frequency < high)].mean() for low, high in bands]
    fall = -10 * np.log10(powers[-1] / powers[0])
    assert 10 < fall < 45
    assert powers[2] < powers[1]


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_recordings_have_the_lengths_and_range_of_recordings(rate: int) -> None:
    sounds = recordings(6, rate, np.random.default_rng(6))
    for sound in sounds:
        assert sound.dtype == np.float32
        assert 0.4 * rate - 1 <= sound.size <= 3 * rate
        assert 0.05 < abs(sound).max() <= 1
    assert len({sound.size for sound in sounds}) == 6


def drawn(seed: int) -> list[NDArray[Any]]:
    random = np.random.default_rng(seed)
    return [*pictures(3, random), *recordings(3, RATE, random)]


def test_seed_decides_what_is_generated() -> None:
    for signal, repeated, different in zip(drawn(7), drawn(7), drawn(8), strict=True):
        np.testing.assert_array_equal(signal, repeated)
        assert not np.array_equal(signal, different)
