"""Frame grids, motion statistics and raster patches against values worked out by hand or in float64."""

import numpy as np
import pytest
import torch

from common.config import UserError
from model import encoders

MEAN, STD = np.array([0.481, 0.458, 0.408]), np.array([0.269, 0.261, 0.276])


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def framestats():
    return encoders.load("framestats", image_size=56)


def test_grid_and_luminance(framestats):
    frame = noise(64, 96, 3)
    row = framestats(frame[None, None])[0, 0].double().numpy()
    pixels = frame.double().numpy() / 255
    cells = ((pixels - MEAN) / STD).reshape(16, 4, 16, 6, 3).mean((1, 3))
    assert np.abs(row[:768].reshape(3, 16, 16) - cells.transpose(2, 0, 1)).max() < 1e-5
    light = pixels @ [0.299, 0.587, 0.114]
    edges = [np.abs(np.diff(light, axis=axis)).mean() for axis in (0, 1)]
    assert np.allclose(row[768:], [light.mean(), light.std(), *edges], atol=1e-6)


def test_same_alone_and_in_a_padded_batch(framestats):
    clips = noise(3, 5, 40, 40, 3)
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    batch = framestats(clips, mask)
    for clip, row, length in zip(clips, batch, (5, 1, 3), strict=True):
        assert (row[:length] - framestats(clip[None, :length])[0]).abs().max() <= 1e-6
        assert not row[length:].any()


def test_statistics_over_time(framestats):
    clip = noise(4, 32, 32, 3)
    frames = framestats(clip[None])[0].double().numpy()
    stats = framestats.encode(clip, "stats").double().numpy()
    expected = [frames.mean(0), frames.std(0), np.abs(np.diff(frames, axis=0)).mean(0)]
    assert np.abs(stats - np.concatenate(expected)).max() < 1e-5
    assert stats.size == framestats.out_dim("stats")
    still = framestats.encode(clip[:1], "stats").view(3, -1)
    assert torch.isfinite(still).all()
    assert not still[1:].any()


def test_patches_are_in_raster_order_after_their_mean(framestats):
    """A frame of image_size, so nothing is resized: each 14 x 14 patch is four mean colours of 7 x 7 pixels."""
    frame = noise(56, 56, 3)
    tokens = framestats.encode(frame[None], "patches").double().numpy()
    pixels = (frame.double().numpy() / 255 - MEAN) / STD
    expected = [
        [pixels[14 * r + 7 * i : 14 * r + 7 * i + 7, 14 * c + 7 * j : 14 * c + 7 * j + 7, k].mean()
         for k in range(3) for i in range(2) for j in range(2)]
        for r in range(4) for c in range(4)
    ]  # fmt: skip
    assert tokens.shape == (17, 12)
    assert np.abs(tokens[1:] - expected).max() < 1e-5
    assert np.abs(tokens[0] - np.mean(expected, 0)).max() < 1e-5


def test_a_film_is_the_patches_of_its_frames(framestats):
    clips = [noise(2, 56, 56, 3), noise(1, 40, 30, 3)]
    film = framestats.film(clips)
    assert film.shape == (3, 16, 12)
    for found, frame in zip(film, [*clips[0], *clips[1]], strict=True):
        assert torch.equal(found, framestats.patches(frame)[1:])


@pytest.mark.parametrize("size", [(48, 64), (14, 500), (9, 9)])
def test_patches_of_any_frame(framestats, size):
    colours = torch.zeros(*size, 3, dtype=torch.uint8)
    colours[size[0] // 2 :] = 255
    tokens = framestats.patches(colours)
    assert tokens.shape == (17, framestats.out_dim("patches"))
    top, bottom = tokens[1:5], tokens[13:]
    assert torch.allclose(top[:, 0], torch.tensor(-0.481 / 0.269), atol=0.05)
    assert torch.allclose(bottom[:, 0], torch.tensor(0.519 / 0.269), atol=0.05)


def test_frames_read(framestats):
    assert (framestats.frames("stats"), framestats.frames("patches")) == (16, 1)
    assert encoders.load("framestats").patches(noise(30, 30, 3)).shape == (1 + 32 * 32, 12)
    info = framestats.info("patches")
    assert (info["image_size"], info["dim"], info["options"]) == (56, 12, {"image_size": 56, "frames": 16})


def test_image_size_must_hold_whole_patches():
    with pytest.raises(UserError, match=r"^image_size: 100 is not a multiple of 14$"):
        encoders.load("framestats", image_size=100)
