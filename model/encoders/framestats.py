"""Downsampled frames with their statistics over a clip, or one frame as raster patches; has no weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.config import UserError
from model.encoders import Encoder

GRID = 16  # cells a side of a downsampled frame
PATCH = 14  # pixels a side of a patch, as in the vision transformers this stands in for
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # of natural images, by channel


class FrameStats(Encoder):
    """RGB frames -> a 16 x 16 colour grid each, with mean, contrast and sharpness of the luminance."""

    name, modality = "framestats", "video"
    dim = 3 * GRID * GRID + 4
    poolings = ("stats", "patches")
    mean: Tensor
    std: Tensor
    grey: Tensor

    def __init__(self, image_size: int = 448, frames: int = 16) -> None:
        super().__init__(image_size=image_size, frames=frames)
        if image_size < PATCH or image_size % PATCH:
            raise UserError(f"image_size: {image_size} is not a multiple of {PATCH}")
        self.image_size, self.count = image_size, frames
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.register_buffer("grey", torch.tensor(GREY))

    def frames(self, pooling: str) -> int:
        """How many frames of a clip `pooling` reads."""
        return 1 if pooling == "patches" else self.count

    def out_dim(self, pooling: str) -> int:
        """12 for patches, 2316 for statistics."""
        return 12 if pooling == "patches" else 3 * self.dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, T, H, W, 3) uint8, mask (B, T) -> (B, T, 772), zero where the mask is false."""
        pixels = x.flatten(0, 1).float() / 255  # (B * T, H, W, 3)
        cells = nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2), GRID)
        grid = (cells - self.mean) / self.std  # (B * T, 3, 16, 16)
        light = pixels @ self.grey  # (B * T, H, W)
        edges = [light.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2)]
        spread = light.flatten(1).std(1, correction=0)
        statistics = torch.stack([light.flatten(1).mean(1), spread, *edges], 1)
        frames = torch.cat([grid.flatten(1), statistics], 1).view(*x.shape[:2], -1)  # (B, T, 772)
        return frames if mask is None else frames * mask[..., None]

    def pool(self, frames: Tensor, how: str = "stats") -> Tensor:
        """Frames (T, 772) of one clip -> (2316,): mean frame, deviation over time, mean change between frames."""
        motion = frames.diff(dim=0, prepend=frames[:1]).abs().sum(0) / max(len(frames) - 1, 1)
        return torch.cat([frames.mean(0), frames.std(0, correction=0), motion])

    def patches(self, frame: Tensor) -> Tensor:
        """One frame (H, W, 3) uint8 -> (1 + N, 12): patches of 14 x 14 pixels in raster order, after their mean.

        The frame is resized to image_size x image_size; a patch is the mean colour of each of its four quarters.
        """
        pixels = frame.permute(2, 0, 1)[None].float() / 255
        size = (self.image_size, self.image_size)
        pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        quarters = nn.functional.avg_pool2d((pixels - self.mean) / self.std, PATCH // 2)  # (1, 3, 2g, 2g)
        tokens = nn.functional.unfold(quarters, 2, stride=2)[0].T  # (N, 3 * 4)
        return torch.cat([tokens.mean(0, keepdim=True), tokens])

    def film(self, clips: Sequence[Tensor]) -> Tensor:
        """Frames (n, H, W, 3) uint8 of clips, one clip after the other -> patches of each (frames, N, 12)."""
        return torch.stack([self.patches(frame)[1:] for frames in clips for frame in frames])

    def encode(self, x: Tensor, pooling: str = "stats") -> Tensor:
        """One clip's frames (T, H, W, 3) uint8 -> (2316,), or its first frame's patches (1 + N, 12)."""
        return self.patches(x[0]) if pooling == "patches" else self.pool(self(x[None])[0])
