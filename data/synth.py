"""Drawn talking heads and synthetic voices whose expression and tone are set by a few numbers."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

SAMPLE_RATE = 16000
FPS = Fraction(25, 2)


@dataclass(frozen=True)
class Face:
    """An expression; the defaults are the face at rest, opening and closing its mouth."""

    curve: float = 0.0  # mouth corners, up is positive
    width: float = 1.0  # mouth, times the width at rest
    gape: float = 0.3  # largest opening of the mouth
    rate: float = 3.0  # openings a second
    skew: float = 0.0  # one mouth corner above the other
    slant: float = 0.0  # inner ends of the brows, up is positive
    lift: float = 0.0  # both brows
    arch: float = 0.0  # one brow
    eye: float = 1.0  # opening of the lids
    flush: float = 0.0  # red of the cheeks


@dataclass(frozen=True)
class Tone:
    """A way of speaking; the defaults are the voice at rest."""

    pitch: float = 0.0  # semitones above the speaker's own
    slope: float = -1.0  # semitones over the clip
    accent: float = 1.0  # semitones between syllables
    rate: float = 4.0  # syllables a second
    level: float = 0.0  # dB
    tilt: float = 0.0  # dB an octave
    breath: float = 0.03  # share of noise
    tremor: float = 0.0  # depth of a 7 Hz amplitude modulation


@dataclass
class Canvas:
    """Colour planes (3, ..., H, W) float32 and where their pixels lie: the head's centre is 0, its top about -1."""

    planes: np.ndarray
    x: np.ndarray  # (W,)
    y: np.ndarray  # (H, 1)
    scale: float  # pixels a unit

    def inside(self, depth: np.ndarray) -> np.ndarray:
        """Antialiased coverage of pixels that lie `depth` units inside an edge."""
        return np.clip(depth * self.scale + 0.5, 0, 1)

    def ellipse(self, x: np.ndarray, y: np.ndarray, rx: Any, ry: Any) -> np.ndarray:
        """Coverage of the ellipse with these half axes around x = y = 0."""
        depth = (1 - np.sqrt((x / rx) ** 2 + (y / ry) ** 2)) * np.minimum(rx, ry, dtype=np.float32)
        return self.inside(depth)

    def paint(self, coverage: np.ndarray, colour: Any) -> None:
        """Blend `colour` over the planes where coverage (..., H, W) is above 0."""
        for plane, value in zip(self.planes, colour, strict=True):
            plane += coverage * (np.float32(value) - plane)


def draw_face(face: Face, frames: int, peak: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(frames, size, size, 3) uint8: a random person whose expression is strongest at frame `peak`."""
    margin = round(size / 48)  # room for the sway of the camera
    side = size + 2 * margin
    scale = 0.46 * size * rng.uniform(0.97, 1.03)
    x, y = (np.arange(side, dtype=np.float32) - side * rng.uniform(0.485, 0.515, (2, 1)).astype(np.float32)) / scale
    skin = np.array([225, 180, 150]) * rng.uniform(0.75, 1.05) + rng.uniform(-6, 6, 3)
    hair, iris = np.array([70, 45, 30]) * rng.uniform(0.3, 1.6), rng.uniform(20, 80, 3)
    canvas = Canvas(np.zeros((3, side, side), np.float32), x, y[:, None], scale)
    _draw_head(canvas, face.flush, skin, hair, rng)

    i = np.arange(frames, dtype=np.float32)[:, None, None]
    strength = 0.75 + 0.25 * np.exp(-(((i - peak) / 3) ** 2))
    lids = 1 + (face.eye - 1) * strength
    blink = int(rng.integers(-frames, frames))  # a negative number is no blink
    if blink >= 0 and blink != peak:
        lids[blink] *= 0.25
    speech = np.sin(np.pi * (face.rate * rng.uniform(0.9, 1.1) * i / float(FPS) + rng.random())) ** 2
    gape = np.maximum(face.gape * (0.3 + 0.7 * speech), 0.02)

    video = np.repeat(_pixels(canvas.planes)[None], frames, 0)  # (F, H, W, 3)
    columns = slice(*np.searchsorted(x, (-0.7, 0.7)))
    for top, bottom in ((-0.66, 0.12), (0.18, 0.86)):  # only the eyes and the mouth move
        rows = slice(*np.searchsorted(y, (top, bottom)))
        patch = np.repeat(canvas.planes[:, None, rows, columns], frames, 1)
        part = Canvas(patch, x[columns], y[rows, None], scale)
        if top < 0:
            _draw_eyes(part, face, strength, lids, iris, hair * 0.8)
        else:
            _draw_mouth(part, face, strength, gape, skin * (0.8, 0.5, 0.5))
        video[:, rows, columns] = _pixels(patch)
    swing = np.sin(rng.uniform(0.2, 0.5, 2) * i[:, 0] + rng.uniform(0, 6, 2))  # (F, 2)
    sway = margin + np.rint(margin * swing).astype(int)
    return np.stack([frame[dy : dy + size, dx : dx + size] for frame, (dy, dx) in zip(video, sway, strict=True)])


def _pixels(planes: np.ndarray) -> np.ndarray:
    """(3, ..., H, W) -> (..., H, W, 3) uint8."""
    return np.stack(list(planes.astype(np.uint8)), -1)


def _draw_head(canvas: Canvas, flush: float, skin: np.ndarray, hair: np.ndarray, rng: np.random.Generator) -> None:
    """What no frame changes: background, shoulders, hair, neck, skin, fringe, nose and cheeks."""
    x, y = canvas.x, canvas.y
    top, bottom, clothes = rng.uniform(60, 190, (3, 3, 1, 1)).astype(np.float32)
    canvas.planes += top + (bottom - top) * (y - y[0]) / (y[-1] - y[0])
    canvas.paint(canvas.ellipse(x, y - 1.45, 1.0, 0.6), clothes)
    canvas.paint(canvas.ellipse(x, y + 0.15, 0.82, rng.uniform(0.86, 0.95)), hair)
    canvas.paint(canvas.ellipse(x, y - 0.85, 0.28, 0.35), skin * 0.85)
    canvas.paint(canvas.ellipse(x, y, 0.72, 0.92), skin)
    canvas.paint(canvas.ellipse(x, y, 0.74, 0.94) * canvas.inside(rng.uniform(-0.72, -0.64) - y), hair)
    canvas.paint(canvas.ellipse(x, y - 0.12, 0.06, 0.16), skin * 0.82)
    canvas.paint(0.6 * flush * canvas.ellipse(np.abs(x) - 0.44, y - 0.22, 0.2, 0.15), (215, 70, 70))
    canvas.planes += rng.normal(0, 2, (len(y), len(x))).astype(np.float32)
    np.clip(canvas.planes, 0, 255, out=canvas.planes)


def _draw_eyes(canvas: Canvas, face: Face, strength: np.ndarray, lids: np.ndarray, iris: Any, brow: Any) -> None:
    x, y = np.abs(canvas.x) - 0.32, canvas.y  # both eyes at once
    white = canvas.ellipse(x, y + 0.1, 0.18, 0.11 * lids)
    canvas.paint(white, (240, 240, 240))
    canvas.paint(white * canvas.ellipse(x, y + 0.1, 0.08, 0.09), iris)
    raised = 0.12 * face.lift + 0.16 * face.arch * (canvas.x > 0) - 0.4 * face.slant * x
    canvas.paint(canvas.inside(0.055 - np.abs(y + 0.36 + strength * raised)) * canvas.inside(0.21 - np.abs(x)), brow)


def _draw_mouth(canvas: Canvas, face: Face, strength: np.ndarray, gape: np.ndarray, lips: Any) -> None:
    half = 0.38 * (1 + (face.width - 1) * strength)
    q = canvas.x / half  # -1 and 1 are the corners
    gap = 0.18 * gape * np.clip(1 - q**2, 0, 1)
    line = 0.46 - strength * (0.24 * face.curve * (q**2 - 0.4) + 0.12 * face.skew * q) + 0.7 * gap
    distance, within = np.abs(canvas.y - line), canvas.inside(half - np.abs(canvas.x))
    canvas.paint(canvas.inside(gap + 0.06 - distance) * within, lips)
    canvas.paint(canvas.inside(gap - distance) * within, (70, 15, 20))


def speak(tone: Tone, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """(seconds * SAMPLE_RATE,) float32: vowel-like syllables of a random speaker."""
    t = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    beat = t * tone.rate * rng.uniform(0.95, 1.05) + rng.random()
    syllable = beat.astype(int)
    count = syllable[-1] + 1
    envelope = np.sqrt(np.sin(np.pi * (beat % 1)))
    if tone.tremor:
        envelope *= 1 - tone.tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 7 * t + rng.uniform(0, 6)))
    accents = (tone.accent * rng.uniform(-1, 1, count)).astype(np.float32)
    f0 = 160 * np.exp2((tone.pitch + rng.uniform(-2, 2) + tone.slope * (t / seconds - 0.5) + accents[syllable]) / 12)

    # one period of each syllable's vowel: two formants over a falling harmonic spectrum, Hz
    harmonics = np.arange(1, 40) * float(f0.mean())
    formants = np.stack([rng.uniform(350, 800, count), rng.uniform(1000, 2200, count)], 1) * rng.uniform(0.93, 1.07)
    vowels = np.exp(-(((harmonics - formants[:, :, None]) / 250) ** 2)).sum(1) + 0.05  # (syllables, harmonics)
    fall = 10 ** ((tone.tilt - 6) * np.log2(harmonics / 500) / 20) * (harmonics < 7000)
    period = np.fft.irfft(np.pad(vowels * fall, ((0, 0), (1, 0))), 256).astype(np.float32)
    wave = period[syllable, (np.cumsum(f0, dtype=np.float64) / SAMPLE_RATE % 1 * 256).astype(int)]
    wave /= np.sqrt(np.mean(wave**2))
    noise = rng.standard_normal(len(t), dtype=np.float32)
    wave = envelope * (wave + 3 * tone.breath * noise)
    wave *= 0.05 * 10 ** ((tone.level + rng.uniform(-1.5, 1.5)) / 20)
    return np.clip(wave + 3e-4 * noise, -1, 1)  # room noise: real silence is never exactly zero
