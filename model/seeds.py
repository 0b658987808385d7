"""Layers of K models side by side: every weight is (K, ...), every input (K, B, ...).

One batched product trains K seeds at once, each as if it were alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.flat import places


class Linear(nn.Module):
    """K linear layers side by side: (K, ..., d_in) -> (K, ..., d_out)."""

    def __init__(self, k: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(k, d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(k, 1, d_out))

    def forward(self, x: Tensor) -> Tensor:
        product = Product.apply if torch.is_grad_enabled() and x.device.type == "cpu" else linear
        return product(self.weight, self.bias, x.flatten(1, -2)).view(*x.shape[:-1], self.weight.shape[1])


def linear(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """rows (K, M, d_in) -> (K, M, d_out)."""
    # weight first: its gradient then has its own memory layout, and goes to the others without a copy of its own
    return torch.baddbmm(bias.mT, weight, rows.mT).mT.contiguous()


class Product(torch.autograd.Function):
    """linear() whose weight's gradient is written where Flat wants it: .75 of the time of one of few rows on a CPU."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight, rows)
        return linear(weight, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows = ctx.saved_tensors
        of_weight, of_bias, of_rows = ctx.needs_input_grad
        return (
            torch.bmm(grad.mT, rows, out=places.pop(id(weight), None)) if of_weight else None,
            grad.sum(1, keepdim=True) if of_bias else None,
            torch.bmm(grad, weight) if of_rows else None,
        )


class Norm(nn.Module):
    """K layer norms side by side."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(k, width))
        self.bias = nn.Parameter(torch.zeros(k, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        return torch.addcmul(self.bias.view(shape), F.layer_norm(x, x.shape[-1:]), self.scale.view(shape))


class Attention(nn.Module):
    """Attention of x (K, B, S, d) on y (K, B, T, d) where `mask` (K, B, T) holds."""

    def __init__(self, k: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.kv, self.out = Linear(k, width, width), Linear(k, width, 2 * width), Linear(k, width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        k, b, s, d = x.shape
        q = self.q(x).view(k * b, s, self.heads, -1).transpose(1, 2)  # (K * B, H, S, d / H)
        key, value = self.kv(y).view(k * b, y.shape[2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        allowed = mask.reshape(k * b, 1, 1, -1)
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, key, value, allowed, p)
        return self.out(x.transpose(1, 2).reshape(k, b, s, d))


class Layer(nn.Module):
    """Pre-norm transformer layer of x on itself, or with `cross` on y."""

    def __init__(self, k: int, width: int, dropout: float, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.norm_y, self.norm_ff = Norm(k, width), Norm(k, width) if cross else None, Norm(k, width)
        self.attention = Attention(k, width, heads(width), dropout)
        self.up, self.down = Linear(k, width, 2 * width), Linear(k, 2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, y: Tensor | None = None) -> Tensor:
        own = self.norm(x)
        x = x + self.drop(self.attention(own, own if self.norm_y is None else self.norm_y(y), mask))
        return x + self.drop(self.down(self.drop(F.gelu(self.up(self.norm_ff(x))))))


def heads(width: int) -> int:
    """At most 8 heads of at least 8."""
    return math.gcd(8, max(1, width // 8))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (K, B, T, d) over the frames of mask (K, B, T), 0 where there are none -> (K, B, d)."""
    if x.shape[2] == 1:
        return torch.where(mask, x[:, :, 0], 0.0)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(2) / weight.sum(2).clamp_min(1)


class Standardized(nn.Module):
    """Keeps mean and deviation of each modality's frames over the train split, and cuts them at `limit` deviations."""

    def __init__(self, dims: dict[str, int], limit: float) -> None:
        super().__init__()
        self.limit = limit
        for m, dim in dims.items():
            self.register_buffer(f"mean_{m}", torch.zeros(dim))
            self.register_buffer(f"std_{m}", torch.ones(dim))

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (D,) of a modality's frames over the train split."""
        self.get_buffer(f"mean_{modality}").copy_(mean)
        # a column that never varies says nothing, and must not shout where it does vary
        self.get_buffer(f"std_{modality}").copy_(torch.where(std > 1e-6, std, torch.inf))

    def standardize(self, modality: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw frames (..., D) -> standardised frames, and where there is a frame: one of zeros is none.

        Values that are no numbers become the train mean. Frames that are absent become zeros.
        """
        mask = (x != 0).any(-1)
        mean, std = self.get_buffer(f"mean_{modality}"), self.get_buffer(f"std_{modality}")
        x = torch.where(torch.isfinite(x), (x.float() - mean) / std, 0.0).clamp(-self.limit, self.limit)
        return torch.where(mask[..., None], x, 0.0), mask


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) in float64 over the frames there are; cells that are no numbers do not count."""
    frames = values[(values != 0).any(-1)].double()
    finite = torch.isfinite(frames)
    n = finite.sum(0).clamp_min(1)
    frames = torch.where(finite, frames, 0.0)
    mean = frames.sum(0) / n
    std = (torch.where(finite, frames - mean, 0.0).square().sum(0) / n).sqrt()
    return mean.float(), std.float()


@torch.no_grad()
def start(module: nn.Module, seeds: Sequence[int]) -> None:
    """Draws each seed's weights from its own generator, so that it begins alike alone and among others.

    Matrices are Xavier-uniform, convolutions Kaiming-uniform, other free parameters small; biases and scales stay as
    they were made.
    """
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, p in module.named_parameters():
            if name.endswith("weight"):
                draw = nn.init.xavier_uniform_ if p.ndim == 3 else nn.init.kaiming_uniform_
                draw(p[i], generator=generator)
            elif not name.endswith(("bias", "scale")):
                p[i].normal_(std=0.02, generator=generator)
