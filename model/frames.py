"""Learned pooling of frames: convolutions over time and bands, then mean and deviation over time.

K seeds side by side as in model/seeds.py. The columns of a frame should be bands in their order, as in log-mel, and
standardised; a clip's vector is the same alone as among longer ones.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What training changes in a clip; chosen on folds 4 and 5 of RAVDESS.
CROP = 256  # frames that a step sees of a clip, 2.6 s
SPEED = 0.15  # at most so much faster or slower, in log
SHIFT = 2.0  # at most so many bands up or down, as from a shorter or longer vocal tract
GAIN = 0.15  # deviation of the change of level
TIMES, BANDS = 20, 8  # at most so many frames, and bands of 64, are hidden

EPS = 1e-3  # of variances: a channel that hardly varies must not magnify rounding


class Conv(nn.Module):
    """K convolutions (B, K, C, T, D), each normalised over its own clip and channel and rectified."""

    def __init__(self, k: int, c_in: int, c_out: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(k, c_out, c_in, size, size))
        self.scale, self.bias = nn.Parameter(torch.ones(k, c_out)), nn.Parameter(torch.zeros(k, c_out))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x is zero where mask (B, K, T) does not hold, and so is what comes back with its own mask."""
        k, pad = len(self.weight), self.weight.shape[-1] // 2
        x = F.conv2d(x.flatten(1, 2), self.weight.flatten(0, 1), stride=self.stride, padding=pad, groups=k)
        x, mask = x.unflatten(1, (k, -1)), mask[:, :, :: self.stride]
        there = mask[:, :, None, :].to(x.dtype)
        n = (there.sum(3, keepdim=True) * x.shape[-1]).clamp_min(1)
        x = x - ((x.sum(4) * there).sum(3, keepdim=True) / n)[..., None]  # bands are summed first: few are masked then
        power = (x.square().sum(4) * there).sum(3, keepdim=True) / n
        factor = ((power + EPS).rsqrt() * self.scale[..., None])[..., None]
        return F.relu(torch.addcmul(self.bias[..., None, None], x, factor)) * there[..., None], mask


class FramePool(nn.Module):
    """Frames (K, B, T, D) and their mask (K, B, T) -> one vector (K, B, out_dim) a clip."""

    def __init__(self, k: int, dim: int, channels: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = channels
        self.convs = nn.ModuleList((Conv(k, 2, a, 5, stride=2), Conv(k, a, b, 3), Conv(k, b, c, 3)))
        self.out_dim = 2 * c * -(-dim // 8)  # bands are halved three times

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            x, mask = augment(x, mask)
        x, mask = halve(x.transpose(0, 1)[:, :, None], mask.transpose(0, 1))  # (B, K, 1, T / 2, D)
        there = mask[:, :, None, :, None].to(x.dtype)
        mean = (x * there).sum(3, keepdim=True) / there.sum(3, keepdim=True).clamp_min(1)
        # the voice as it is, and what is apart from its own average
        x, mask = self.convs[0](torch.cat([x, (x - mean) * there], 2), mask)
        x, mask = halve(x, mask)
        x, mask = self.convs[1](narrow(x), mask)
        x, mask = self.convs[2](narrow(x), mask)
        there = mask[:, :, None, :, None].to(x.dtype)
        n = there.sum(3, keepdim=True).clamp_min(1)
        mean = x.sum(3, keepdim=True) / n  # (B, K, C, 1, D / 8)
        std = (((x - mean) * there).square().sum(3, keepdim=True) / n).clamp_min(EPS).sqrt()
        return torch.cat([mean, std], 2).flatten(2).transpose(0, 1)


def halve(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the frames that there are of each two (B, K, C, T, D), and where there is any."""
    odd = mask.shape[-1] % 2
    x, mask = F.pad(x, (0, 0, 0, odd)), F.pad(mask, (0, odd))
    there = mask[:, :, None, :, None].to(x.dtype)
    n = there.unflatten(3, (-1, 2)).sum(4).clamp_min(1)
    return (x * there).unflatten(3, (-1, 2)).sum(4) / n, mask.unflatten(2, (-1, 2)).any(3)


def narrow(x: Tensor) -> Tensor:
    """Mean of each two bands (B, K, C, T, D); an odd last one stays."""
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], -1)
    return (x[..., ::2] + x[..., 1::2]) / 2


def augment(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A random piece (K, B, at most CROP, D) of each clip, at another speed, pitch and level, partly hidden.

    Draws are PyTorch's own, another for every seed and clip.
    """
    k, b, t, d = x.shape
    shape, device = (k, b, 1), x.device

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high)

    length = (mask * torch.arange(1, t + 1, device=device)).amax(-1, keepdim=True)
    speed = draw(-SPEED, SPEED).exp()
    size = min(t, CROP)
    time = torch.arange(size, device=device)
    start = draw(0, 1) * (length / speed - size).clamp_min(0)
    place = (start + time) * speed  # (K, B, size) in frames of x
    nearest = place.round().long().clamp_max(t - 1)
    mask = mask.gather(2, nearest) & (place <= length - 1)
    x = between(x, place.minimum((length - 1).clamp_min(0)), 2)
    band = torch.arange(d, device=device)
    shift = draw(-SHIFT, SHIFT) * (d / 64)
    x = between(x, (band + shift).clamp(0, d - 1), 3)
    x = x + GAIN * torch.randn(shape, device=device)[..., None]
    there = mask[..., None].to(x.dtype)
    mean = (x * there).mean(3, keepdim=True).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
    frames = mask.sum(-1, keepdim=True)
    hidden = stripe(time, frames, draw(0, TIMES), draw(0, 1))[..., None]
    hidden = hidden | stripe(band, d, draw(0, BANDS * d / 64), draw(0, 1))[..., None, :]
    return torch.where(hidden, mean, x) * there, mask


def between(x: Tensor, place: Tensor, dim: int) -> Tensor:
    """x (K, B, T, D) read along `dim` at fractional places (K, B, n), linearly between neighbours."""
    last = x.shape[dim] - 1
    low = place.long().clamp_max(max(last - 1, 0))
    other = (-1, -1, -1, x.shape[3]) if dim == 2 else (-1, -1, x.shape[2], -1)

    def spread(index: Tensor) -> Tensor:
        return (index[..., None] if dim == 2 else index[:, :, None]).expand(other)

    a, b = x.gather(dim, spread(low)), x.gather(dim, spread((low + 1).clamp_max(last)))
    return torch.lerp(a, b, spread((place - low).to(x.dtype)))


def stripe(place: Tensor, length: Tensor | int, width: Tensor, where: Tensor) -> Tensor:
    """Which places (n,) lie in a stripe of `width` (K, B, 1), the share `where` along `length` -> (K, B, n)."""
    start = where * (length - width).clamp_min(0)
    return (place >= start) & (place < start + width)
