import numpy as np
import pytest

from data.synth import FPS, SAMPLE_RATE, Face, Tone, draw_face, speak


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mouth_hole(video: np.ndarray) -> np.ndarray:
    """Dark red pixels of the lower half by frame."""
    red, green, blue = video[:, video.shape[1] // 2 :].astype(int).transpose(3, 0, 1, 2)
    return ((red - green > 35) & (red < 100) & (blue < 60)).sum((1, 2))


def strongest(signal: np.ndarray, rate: float) -> float:
    """Frequency of the largest Fourier component above 0.5 Hz."""
    spectrum = np.abs(np.fft.rfft(signal - signal.mean()))
    frequencies = np.fft.rfftfreq(len(signal), 1 / rate)
    return frequencies[np.argmax(spectrum * (frequencies > 0.5))]


@pytest.mark.parametrize(("frames", "size"), [(15, 96), (1, 96), (3, 56), (2, 224)])
def test_draw_face_gives_frames(frames: int, size: int) -> None:
    video = draw_face(Face(), frames, 0, size, rng())
    assert video.shape == (frames, size, size, 3)
    assert video.dtype == np.uint8


@pytest.mark.parametrize("rate", [1.5, 5.0])
def test_mouth_opens_at_its_rate(rate: float) -> None:
    hole = mouth_hole(draw_face(Face(rate=rate, gape=1.0), 75, 37, 96, rng()))
    assert strongest(hole, float(FPS)) == pytest.approx(rate, rel=0.15)


def test_mouth_opens_as_far_as_gape() -> None:
    small, large = (mouth_hole(draw_face(Face(gape=gape), 15, 7, 96, rng())).max() for gape in (0.3, 1.2))
    assert large > 2 * small > 0


def test_smile_raises_the_mouth_corners() -> None:
    rest, smile, frown = (draw_face(Face(curve=curve), 1, 0, 96, rng()).astype(int)[0] for curve in (0.0, 1.0, -1.0))
    rows = np.arange(96)
    for changed, corners_up in ((smile, True), (frown, False)):
        difference = np.abs(changed - rest).sum(-1)
        corner, centre = difference[:, 30:36].sum(1), difference[:, 45:51].sum(1)
        assert ((rows @ corner / corner.sum()) < (rows @ centre / centre.sum())) == corners_up


def test_expression_is_strongest_at_the_peak() -> None:
    rest, raised = (draw_face(Face(lift=lift), 15, 10, 240, rng(4)).astype(int) for lift in (0.0, 0.5))
    change = np.abs(raised - rest).sum((1, 2, 3))
    assert np.argmax(change) == 10
    assert change.min() > 0


def test_people_differ() -> None:
    one, same, other = (draw_face(Face(), 2, 0, 96, rng(seed)).astype(int) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).mean() > 10


def test_voice_has_its_level_and_tempo() -> None:
    for tone, level in ((Tone(), 0), (Tone(level=10, rate=6), 10), (Tone(level=-8, rate=2.5), -8)):
        voice = speak(tone, 4.0, rng(1))
        assert voice.shape == (4 * SAMPLE_RATE,)
        assert voice.dtype == np.float32
        envelope = (voice.reshape(-1, 160) ** 2).mean(1)
        assert 10 * np.log10(envelope.mean()) == pytest.approx(20 * np.log10(0.05) + level - 2, abs=2.5)
        assert strongest(envelope, 100) == pytest.approx(tone.rate, rel=0.1)


def test_voice_has_its_pitch() -> None:
    periods = []
    for pitch in (0.0, 7.0):
        voice = speak(Tone(pitch=pitch, slope=0, accent=0, breath=0), 1.0, rng(2))
        spectrum = np.abs(np.fft.rfft(voice)) ** 2
        periods.append(60 + np.argmax(np.fft.irfft(spectrum)[60:160]))  # autocorrelation, 100 to 267 Hz
    assert periods[0] / periods[1] == pytest.approx(2 ** (7 / 12), rel=0.03)
