"""Clips as one: which frames stand for them by the published formula, and their sound in a row."""

import numpy as np
import pytest
import soundfile
import torch

from data.joined import cut, join_frames, join_sound, spread, windows
from data.media import SAMPLE_RATE, count_frames, load_audio, seconds
from tests.data import test_media
from tests.data.test_media import grey, make_video


def never(path, error):
    raise AssertionError(f"{path}: {error}")


def published(total, n):
    """VideoLLaMA2's choice of frames, in floating point."""
    if total <= n:
        return list(range(total))
    span = (total - 1) / n
    return np.round(np.array([(span * i + span * (i + 1)) / 2 for i in range(n)]) + 1e-6).astype(int).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 16, 32])
def test_frames_are_spread_by_the_published_rule(n):
    rng = np.random.default_rng(n)
    for total in [*range(1, 120), 250, 999, 4321]:
        counts = np.diff([0, *sorted(rng.integers(0, total + 1, 3)), total])  # some clips have none
        places = spread(counts.tolist(), n)
        starts = np.cumsum(counts) - counts
        joined = [start + i for start, indices in zip(starts, places, strict=True) for i in indices]
        assert joined == published(total, n), (total, n)
        assert all(0 <= i < count for count, indices in zip(counts, places, strict=True) for i in indices)


def test_frames_of_several_clips(tmp_path):
    paths = [make_video(tmp_path / f"{count}.mp4", count) for count in (10, 3, 12)]
    assert [count_frames(path) for path in paths] == [10, 3, 12]
    films = join_frames(paths, 4, never)  # places 3, 9, 15 and 21 of 25
    assert [grey(film) for film in films] == [[3, 9], [2, 8]]
    assert [grey(film) for film in join_frames([paths[2]], 3, never)] == [[2, 6, 9]]
    assert join_frames([], 3, never) == []


def test_fewer_frames_are_followed_by_black_ones(tmp_path, monkeypatch):
    small = make_video(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(test_media, "W", 32)
    films = join_frames([small, make_video(tmp_path / "b.mp4", 1)], 5, never)
    assert [tuple(film.shape) for film in films] == [(2, 48, 64, 3), (3, 48, 32, 3)]  # each in its own size
    assert [bool(frame.any()) for film in films for frame in film] == [True, True, True, False, False]


def test_clips_that_cannot_be_read_are_left_out(tmp_path):
    """Of the third one only decoding tells: its packets are there, but hold nothing."""
    good, other = (make_video(tmp_path / name, count) for name, count in (("a.mp4", 10), ("b.mkv", 12)))
    (tmp_path / "text.mp4").write_text("no film")
    hollow = make_video(tmp_path / "hollow.mp4", 30, codec="libx264")
    content = bytearray(hollow.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : content.index(b"moov")] = bytes(content.index(b"moov") - begin)
    hollow.write_bytes(content)
    assert count_frames(hollow) == 30
    soundfile.write(tmp_path / "voice.wav", np.zeros(800), SAMPLE_RATE)  # has no picture, which is no damage
    bad = [tmp_path / "absent.mp4", tmp_path / "text.mp4", hollow]
    failed = []
    films = join_frames([good, *bad, tmp_path / "voice.wav", other], 4, lambda path, error: failed.append(path))
    assert failed == bad
    assert [grey(film) for film in films] == [grey(film) for film in join_frames([good, other], 4, never)]
    assert join_frames(bad, 4, lambda path, error: None) == []


def test_sound_of_several_clips(tmp_path):
    """A clip without sound is silence where another one has sound."""
    loud, other = (make_video(tmp_path / f"{s}.mp4", round(25 * s), audio=s) for s in (0.6, 0.4))
    still = make_video(tmp_path / "still.mp4", 20)
    gap = torch.zeros(round(0.8 * SAMPLE_RATE))
    assert seconds(still) == pytest.approx(0.8)
    found = join_sound([loud, still, other], never)
    assert torch.equal(found, torch.cat([load_audio(loud), gap, load_audio(other)]))
    assert join_sound([still, still], never) is None
    assert join_sound([], never) is None


def test_sounds_that_cannot_be_read_are_left_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(800, 0.5), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.5, np.nan, 0.5]), SAMPLE_RATE, subtype="FLOAT")
    (tmp_path / "text.mp4").write_text("no sound")
    failed = {}
    found = join_sound([tmp_path / name for name in ("nan.wav", "a.wav", "text.mp4")], failed.__setitem__)
    assert torch.equal(found, load_audio(tmp_path / "a.wav"))
    assert {path.name for path in failed} == {"nan.wav", "text.mp4"}
    assert str(failed[tmp_path / "nan.wav"]) == f"{tmp_path}/nan.wav: samples that are not finite"


@pytest.mark.parametrize("length", [155_201, 32_000, 32_002, 20_000])
def test_eight_windows_of_two_seconds(length):
    samples = torch.arange(length).float()
    starts = [int(i * max(length / SAMPLE_RATE - 2, 0) / 8 * SAMPLE_RATE + 1e-6) for i in range(8)]
    parts = windows(samples).chunk(8)
    assert [int(part[0]) for part in parts] == starts
    for part in parts:
        assert len(part) == min(2 * SAMPLE_RATE, len(samples))
        assert (part.diff() == 1).all()


def test_cut_to_a_length():
    samples = torch.arange(1.0, 6.0)
    assert cut(samples, 3).tolist() == [1, 2, 3]
    assert cut(samples, 7).tolist() == [1, 2, 3, 4, 5, 0, 0]
