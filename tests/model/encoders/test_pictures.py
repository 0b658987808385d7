"""Resizing against Pillow, and every encoder's preprocessing against transformers' processors."""

import numpy as np
import pytest
import torch

from model.encoders import pictures

SIZES = [(240, 320), (100, 90), (448, 448), (31, 400), (1, 5)]


def noise(height, width, frames=1):
    """Frames (n, H, W, 3) of clouds under grain, which no filter leaves as they are."""
    generator = torch.Generator().manual_seed(height)
    clouds = torch.rand(frames, 3, height // 9 + 2, width // 9 + 2, generator=generator)
    clouds = torch.nn.functional.interpolate(clouds, (height, width), mode="bicubic")
    grain = 0.2 * torch.randn(clouds.shape, generator=generator)
    return ((clouds + grain).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_pillow_s_to_two_grey_levels(size, mode):
    """Both work in integers; one grey level is what rounding twice, across and down, can make of one."""
    from PIL import Image

    frame = noise(*size)[0]
    for side in (224, 448):
        expected = Image.fromarray(frame.numpy()).resize((side, side), Image.Resampling[mode.upper()])
        found = pictures.squash(frame.permute(2, 0, 1)[None], side, mode)[0].permute(1, 2, 0)
        off = np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))
        assert off.max() <= (2 if mode == "bicubic" else 1)
        assert (off > 0).mean() < 0.02


@pytest.mark.parametrize("size", [(240, 321), (101, 90), (60, 60)])
@pytest.mark.parametrize(
    ("function", "mode", "statistics", "processor", "options"),
    [
        ("crop", "bicubic", "CLIP", "CLIPImageProcessor", {}),
        ("crop", "bilinear", "ImageNet", "VideoMAEImageProcessor",
         {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        ("squash", "bilinear", "ImageNet", "ViTImageProcessor",
         {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        ("squash", "bicubic", "halves", "SiglipImageProcessor", {}),
    ],
)  # fmt: skip
def test_same_as_transformers(size, function, mode, statistics, processor, options):
    import transformers

    frames = noise(*size, frames=2)
    given = [frame.numpy() for frame in frames]
    films = processor.startswith("Video")
    expected = getattr(transformers, processor)(**options)([given] if films else given, return_tensors="pt")
    expected = expected["pixel_values"].flatten(0, -4)
    made = getattr(pictures, function)(frames.permute(0, 3, 1, 2), 224, mode)
    assert (pictures.scale(made, statistics) - expected).abs().max() < 1e-5


def test_a_padded_picture_keeps_its_aspect():
    frames = torch.zeros(2, 3, 40, 80, dtype=torch.uint8)
    made = pictures.pad(frames, 80, "bicubic")
    assert made.shape == (2, 3, 80, 80)
    assert (made[:, :, 20:60] == 0).all()
    assert (made[:, :, :20] == 127).all()
    assert (made[:, :, 60:] == 127).all()
    tall = pictures.pad(frames.transpose(2, 3), 80, "bicubic")
    assert torch.equal(tall, made.transpose(2, 3))


def test_scales():
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(pictures.scale(grey, "none").flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.allclose(pictures.scale(grey, "halves").flatten(), torch.tensor([-1.0, -0.6, 1.0]))
