"""Frozen linears whose weights are held in 8 or 4 bits and spelled out where they are used: LoRA on smaller cards."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError

BLOCK = 64  # weights that share one scale in nf4
SUPER = 256  # scales that share one scale of their own
BITS = {"int8": 8 + 32 / 4096, "nf4": 4 + 8 / BLOCK + 64 / (BLOCK * SUPER)}  # of a weight, in rows of 4,096


@cache
def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat-4, float32: quantiles of a normal distribution, with an exact zero.

    Dettmers et al. 2023 (QLoRA): eight above zero and seven below, evenly spaced in probability, over the largest.
    """
    tail = 0.5 * (31 / 32 + 29 / 30)  # the outermost quantile: the mean of what 16 and 15 levels would take
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    above = normal.icdf(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.max()).float()


class QuantLinear(nn.Module):
    """x (..., in) -> (..., out) by a frozen weight in few bits; a bias stays as it is.

    Gradients flow to x alone. The weight is spelled out in x's dtype, or in autocast's, forward and again backward, so
    that nothing of its size outlives a product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.names: list[str] = []
        for name, tensor in self.pack(linear.weight.detach().float()).items():
            self.register_buffer(name, tensor, persistent=False)  # made of the base's files, never of a checkpoint
            self.names.append(name)

    @property
    def device(self) -> torch.device:
        return self.get_buffer(self.names[0]).device

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Weight (out, in) in few bits."""
        raise NotImplementedError  # each format its own

    def unpack(self, dtype: torch.dtype, *packed: Tensor) -> Tensor:
        """The weight (out, in) of what pack() made, in its order."""
        raise NotImplementedError  # each format its own

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) that is computed with."""
        return self.unpack(dtype, *(self.get_buffer(name) for name in self.names))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = Product.apply(x.to(dtype), self.unpack, *(self.get_buffer(name) for name in self.names))
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Product(torch.autograd.Function):
    """x @ weight.T, which keeps the packed weight for the backward pass instead of the one spelled out."""

    @staticmethod
    def forward(ctx, x: Tensor, unpack: Callable[..., Tensor], *packed: Tensor) -> Tensor:  # pyright: ignore
        ctx.unpack, ctx.dtype = unpack, x.dtype
        ctx.save_for_backward(*packed)
        return F.linear(x, unpack(x.dtype, *packed))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore
        packed = ctx.saved_tensors  # to be asked for once
        return gradient.to(ctx.dtype) @ ctx.unpack(ctx.dtype, *packed), None, *(None for _ in packed)


class Int8Linear(QuantLinear):
    """127 steps either side of zero for each row, as wide as its largest weight asks."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        return {"codes": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def unpack(self, dtype: torch.dtype, *packed: Tensor) -> Tensor:
        codes, scale = packed
        return codes.to(dtype) * scale.to(dtype)[:, None]


class Nf4Linear(QuantLinear):
    """Two weights a byte, each one of 16 levels times the largest of its block of 64; these scales in 8 bits.

    The scales, less their mean, are stored in 127 steps either side for each 256 of them (double quantisation).
    """

    def __init__(self, linear: nn.Linear) -> None:
        if linear.weight.numel() % BLOCK:
            raise UserError(f"nf4: a weight of {tuple(linear.weight.shape)} does not divide into blocks of {BLOCK}")
        super().__init__(linear)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        levels = nf4_levels().to(weight.device)
        blocks = weight.reshape(-1, BLOCK)
        largest = blocks.abs().amax(1)
        mean = largest.mean()
        rest = F.pad(largest - mean, (0, -len(largest) % SUPER)).view(-1, SUPER)
        step = rest.abs().amax(1).clamp_min(1e-12) / 127
        scales = (rest / step[:, None]).round().to(torch.int8)
        # the level nearest to each weight over the scale that will be used
        used = self._scales(scales, step, mean, len(largest)).clamp_min(1e-12)
        edges = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / used[:, None], edges).to(torch.uint8).view(-1, 2)
        return {"codes": codes[:, 0] << 4 | codes[:, 1], "scales": scales, "step": step, "mean": mean}

    @staticmethod
    def _scales(scales: Tensor, step: Tensor, mean: Tensor, count: int) -> Tensor:
        return (scales.float() * step[:, None] + mean).flatten()[:count]

    def unpack(self, dtype: torch.dtype, *packed: Tensor) -> Tensor:
        codes, scales, step, mean = packed
        pairs = pair_levels(dtype, codes.device)
        values = F.embedding(codes.int(), pairs).view(-1, BLOCK)  # (blocks, 64)
        scale = self._scales(scales, step, mean, len(values)).to(dtype)
        return (values * scale[:, None]).view(self.out_features, self.in_features)


@cache
def pair_levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels that each byte names, (256, 2)."""
    levels, byte = nf4_levels().to(device, dtype), torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1)


KINDS: dict[str, type[QuantLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}
LINEARS = (nn.Linear, QuantLinear)


def quantize(module: nn.Module, name: str, kind: str) -> None:
    """Put the linear `name` of a module into few bits."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    setattr(owner, leaf, KINDS[kind](getattr(owner, leaf)))
