"""Log-mel frames against a float64 formula, alone and in batches; their statistics against NumPy and real speech."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import UserError
from model import encoders

SHARED = os.environ.get("EMOTORCH_DATA")


@pytest.fixture(scope="module")
def logmel():
    return encoders.load("logmel")


def speech(seconds, seed=0):
    return torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed)) * 0.1


def reference(samples):
    """HTK mel filters between 20 and 8000 Hz over a Hann-windowed power spectrum, all in float64."""

    def to_mel(f):
        return 2595 * np.log10(1 + f / 700)

    edges = 700 * (10 ** (np.linspace(to_mel(20), to_mel(8000), 66) / 2595) - 1)
    bins = np.arange(257) * 16000 / 512
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.clip(np.minimum(rise, fall), 0, None)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = [samples[i : i + 512] * window for i in range(0, len(samples) - 511, 160)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    return np.log10(power @ filters.T + 1e-4)


def test_frames_match_the_formula(logmel):
    samples = speech(0.5)
    frames = logmel(samples[None])[0]
    expected = reference(samples.double().numpy())
    assert frames.shape == expected.shape == (47, 64)
    assert np.abs(frames.numpy() - expected).max() < 1e-4


def test_same_alone_and_in_a_padded_batch(logmel):
    clips = [speech(seconds, seed) for seed, seconds in enumerate((0.7, 0.01, 1.3, 0.0321))]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(clip) for clip in clips])[:, None]
    frames = logmel(batch, mask)
    lengths = logmel.lengths(mask.sum(1))
    assert frames.shape == (4, lengths.max(), 64)
    for clip, row, length in zip(clips, frames, lengths.tolist(), strict=True):
        alone = logmel(clip[None])[0]
        assert len(alone) == length
        assert (row[:length] - alone).abs().max() <= 1e-6
        assert not row[length:].any()


@pytest.mark.parametrize("samples", [1, 511, 512, 671, 672])
def test_clips_shorter_than_a_window_have_one_frame(logmel, samples):
    frames = logmel(speech(1)[None, :samples])
    assert frames.shape == (1, 2 if samples == 672 else 1, 64)
    assert torch.isfinite(logmel.encode(speech(1)[:samples], "stats")).all()


def test_silence_is_the_floor(logmel):
    assert torch.allclose(logmel(torch.zeros(1, 4000)), torch.tensor(-4.0))


def test_statistics(logmel):
    frames = logmel(speech(0.4)[None])[0]
    stats = logmel.encode(speech(0.4), "stats").view(6, 84).double().numpy()
    x = frames.double().numpy()
    n = np.arange(64)
    dct = np.sqrt(2 / 64) * np.cos(np.pi / 64 * (n[:, None] + 0.5) * np.arange(20))
    dct[:, 0] /= np.sqrt(2)
    bands = np.concatenate([x, x @ dct], 1)
    step = np.concatenate([np.zeros((1, 84)), np.diff(bands, axis=0)])
    padded = np.pad(bands, ((4, 4), (0, 0)), "edge")
    slope = sum(k * padded[4 + k : len(padded) - 4 + k] for k in range(-4, 5)) / 60  # 2 * (1 + 4 + 9 + 16)
    expected = [bands.mean(0), bands.std(0), step.std(0), slope.std(0), np.abs(step).mean(0), np.abs(slope).mean(0)]
    assert np.abs(stats - expected).max() < 1e-5
    assert logmel.out_dim("stats") == stats.size
    assert logmel.encode(speech(0.4), "frames").shape == (37, logmel.out_dim("frames"))


def test_info_rebuilds_the_encoder(logmel):
    info = logmel.info("stats")
    assert (info["encoder"], info["dim"], info["pooling"], info["dtype"]) == ("logmel", 504, "stats", "float32")
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(speech(0.3), "stats"), logmel.encode(speech(0.3), "stats"))
    assert not again.training


def test_wrong_names():
    with pytest.raises(UserError, match=r"^unknown encoder 'logmell' \(nearest: logmel; there are logmel, framestats,"):
        encoders.load("logmell")
    with pytest.raises(UserError, match=r"^encoder logmel has no option image_size \(options: none\)$"):
        encoders.load("logmel", image_size=56)
    with pytest.raises(UserError, match=r"^encoder logmel has no weights to load from weights/logmel$"):
        encoders.load("logmel", "weights/logmel")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED, reason="EMOTORCH_DATA is not set")
def test_statistics_tell_emotions_of_unseen_speakers(logmel):
    """Linear probe on fold 4 of RAVDESS, four unseen actors, eight emotions: chance is 0.125."""
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from data.media import load_audio

    audio = Path(str(SHARED), "audio")
    files = {path.stem: path for path in (audio / "ravdess16k").glob("*/*.flac")}
    parts = []
    for part, step in (("train", 3), ("test", 1)):
        with open(audio / f"emobox_folds/ravdess/ravdess_{part}_fold_4.txt") as file:
            names, labels = zip(*list(csv.reader(file, delimiter="\t"))[::step], strict=True)
        parts.append((np.stack([logmel.encode(load_audio(files[name]), "stats").numpy() for name in names]), labels))
    (x, y), (test_x, test_y) = parts
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=300)).fit(x, y)
    assert recall_score(test_y, probe.predict(test_x), average="macro") > 0.45
