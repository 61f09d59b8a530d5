"""Generated recordings with the statistics of speech: vowels, fricatives and pauses over background noise.

Sources of the statistics:
    Formants of vowels: Peterson and Barney, "Control methods used in a study of the vowels", JASA 24 (1952), table
        II. Children's formants are 1.35 times men's, on average over its vowels and formants.
    Voice as a source and a filter, higher formants, tilt: Fant, "Acoustic theory of speech production" (1960).
    Peaks of fricatives: Jongman, Wayland and Wong, "Acoustic characteristics of English fricatives", JASA 108
        (2000). The means are 3820 Hz for the sound of sh, 6839 for s, 7470 for th and 7733 for f.
    Rate of syllables: Ding et al., "Temporal modulations in speech and music", Neurosci. Biobehav. Rev. 81 (2017).
        The intensity of speech varies most at about 5 Hz. The syllables here are a little slower.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compileflow.validation.cases.pictures import falling_noise

_SECONDS = (0.4, 3.0)
# Formants in Hz, means of men, of the vowels in heed, hid, head, had, hod, hawed, hood, who'd, hud and heard.
_VOWELS = np.array(
    [
        (270, 2290, 3010),
        (390, 1990, 2550),
        (530, 1840, 2480),
        (660, 1720, 2410),
        (730, 1090, 2440),
        (570, 840, 2410),
        (440, 1020, 2240),
        (300, 870, 2240),
        (640, 1190, 2390),
        (490, 1350, 1690),
    ]
)
# The fourth and fifth formant are those of a uniform tube of 17.5 cm.
_HIGHER_FORMANTS = (3500, 4500)
_BANDWIDTHS = (60, 90, 150, 200, 250)
# Children's voices are the highest, and their formants are the most above men's.
_PITCHES, _HIGHEST_SCALE = (80, 300), 1.35
# One peak serves for th and f.
_FRICATIVES = (3800, 6800, 7700)
# Strength of fricatives; their power is then about a tenth of the vowels'.
_FRICTION = 0.04
_FRAME_S, _SYLLABLES_PER_S = 0.032, 4.0
_NOISE_RATIOS_DB = (40, 30, 20, 10, 5)
_NOISE_SAMPLES = 2**18


def recordings(count: int, rate: int, random: np.random.Generator) -> list[NDArray[np.float32]]:
    """Return recordings of several lengths and talkers, float32 (samples,), at `rate` samples per second."""
    return [_recording(rate, _NOISE_RATIOS_DB[number % 5], random) for number in range(count)]


def _recording(rate: int, noise_ratio_db: float, random: np.random.Generator) -> NDArray[np.float32]:
    samples = int(random.uniform(*_SECONDS) * rate)
    hop = int(_FRAME_S * rate / 2)
    frames = samples // hop + 2
    seconds = np.arange(frames) * hop / rate
    formants, voicing, friction = _syllables(seconds, random)
    pitch = random.uniform(*_PITCHES)
    scale = 1 + (_HIGHEST_SCALE - 1) * (pitch - _PITCHES[0]) / (_PITCHES[1] - _PITCHES[0])
    # Pitch falls towards the end of a sentence and rises with each accent.
    melody = 0.12 * np.sin(2 * np.pi * (random.uniform(0.5, 1.5) * seconds + random.random())) - 0.05 * seconds
    pulses = _pulses(np.clip(pitch * np.exp(melody), *_PITCHES), hop, rate)
    window = np.hanning(2 * hop + 1)[:-1].astype(np.float32)
    spectra = np.zeros((frames, hop + 1), np.complex64)
    is_voiced, is_friction = voicing > 0, friction > 0
    framed = np.lib.stride_tricks.sliding_window_view(pulses, 2 * hop)[::hop][:frames]
    voice_filter = _voice_filter(formants[is_voiced] * scale, rate, hop) * voicing[is_voiced, None]
    spectra[is_voiced] = np.fft.rfft(framed[is_voiced] * window) * voice_filter
    noise = random.standard_normal((int(is_friction.sum()), 2 * hop), dtype=np.float32)
    spectra[is_friction] += (
        np.fft.rfft(noise * window) * _fricative_filter(rate, hop, random) * friction[is_friction, None]
    )
    parts = np.fft.irfft(spectra, 2 * hop)
    speech = np.zeros((frames + 1, hop), np.float32)
    speech[:-1] += parts[:, :hop]
    speech[1:] += parts[:, hop:]
    # The first half frame has one window only.
    speech = speech.ravel()[hop : hop + samples]
    speech *= random.uniform(0.1, 0.8) / max(float(abs(speech).max()), 1e-9)
    start = int(random.integers(_NOISE_SAMPLES - samples))
    background = falling_noise((_NOISE_SAMPLES,), 0.5)[start : start + samples]
    noise_level = speech.std() * 10 ** (-noise_ratio_db / 20)
    return np.asarray(np.clip(speech + background * noise_level, -1, 1), np.float32)


def _syllables(
    seconds: NDArray[np.float64], random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Return three formants, the strength of the voice and the strength of friction at each time."""
    count = int(seconds[-1] * _SYLLABLES_PER_S * 1.5) + 2
    lengths = random.uniform(0.7, 1.3, count) / _SYLLABLES_PER_S
    # One syllable in five is followed by a pause.
    pauses = np.where(random.random(count) < 0.2, random.uniform(0.15, 0.35, count), 0.02)
    starts = np.cumsum(lengths + pauses) - lengths - pauses
    vowels = _VOWELS[random.integers(len(_VOWELS), size=count)]
    onsets = np.where(random.random(count) < 0.5, 0.35, 0.05) * lengths
    onsets[0] = 0.35 * lengths[0]
    formants = np.stack([np.interp(seconds, starts + 0.7 * lengths, vowels[:, axis]) for axis in range(3)], axis=1)
    syllable = np.searchsorted(starts, seconds, side="right") - 1
    since, onset, length = seconds - starts[syllable], onsets[syllable], lengths[syllable]
    voiced_share = np.clip((since - onset) / (length - onset), 0, 1)
    stress = random.uniform(0.4, 1, count)[syllable]
    voicing = np.where(since >= onset, np.sin(np.pi * voiced_share), 0) * stress
    friction = (
        np.where((since < onset) & (onset > 0.1 * length), np.sin(np.pi * since / onset), 0) * _FRICTION * stress
    )
    return formants, np.maximum(voicing, 0).astype(np.float32), np.maximum(friction, 0).astype(np.float32)


def _pulses(pitch: NDArray[np.float64], hop: int, rate: int) -> NDArray[np.float32]:
    """Return one pulse per period of the pitch, which is given at each hop; each lies between two samples."""
    turns = np.concatenate([[0], np.cumsum(pitch * hop / rate)])
    places = np.interp(np.arange(1, int(turns[-1])), turns, np.arange(len(turns)) * hop)
    first = places.astype(int)
    pulses = np.zeros((len(turns) + 1) * hop, np.float32)
    pulses[first] = 1 - (places - first)
    pulses[first + 1] += (places - first).astype(np.float32)
    return pulses


def _voice_filter(formants: NDArray[np.float64], rate: int, hop: int) -> NDArray[np.complex64]:
    """Return the response of the vocal tract, (times, frequencies), with the tilt of the voice and of the lips."""
    frequency = np.arange(hop + 1, dtype=np.float32) * (rate / 2 / hop)
    # The pulses of the voice fall by 12 dB an octave, and the lips add 6.
    response = np.broadcast_to(1 / (1 + frequency / 100), (len(formants), hop + 1)).astype(np.complex64)
    higher = np.broadcast_to(_HIGHER_FORMANTS, (len(formants), len(_HIGHER_FORMANTS)))
    for centre, bandwidth in zip(np.hstack([formants, higher]).T.astype(np.float32), _BANDWIDTHS, strict=True):
        squares = (centre**2)[:, None]
        response *= squares / (squares - frequency**2 + np.complex64(1j * bandwidth) * frequency)
    return response


def _fricative_filter(rate: int, hop: int, random: np.random.Generator) -> NDArray[np.complex64]:
    """Return the response of one broad resonance, below the highest frequency that the rate can hold."""
    frequency = np.arange(hop + 1, dtype=np.float32) * (rate / 2 / hop)
    centre, bandwidth = min(random.choice(_FRICATIVES), 0.45 * rate), 2000
    band = 1j * bandwidth * frequency
    return np.asarray(band / (centre**2 - frequency**2 + band), np.complex64)
