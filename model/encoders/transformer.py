"""The transformer block that speech, picture and text encoders share, and loading theirs under other people's names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.weights import check_names, check_shapes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) on itself; `biases` says which of q, k, v and out have one."""

    def __init__(self, width: int, heads: int, biases: tuple[bool, bool, bool, bool] = (True,) * 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=bias) for bias in biases)

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """mask (B, T): frames that may be looked at; bias (B or 1, heads, T, T) is added to the logits."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        allowed = None if mask is None else mask[:, None, None]
        if bias is not None:
            bias = bias.to(q.dtype)
            allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
        return self.out(F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer MLP, each with its norm before (`pre`) or after the sum with its input.

    `alpha` multiplies the input in that sum (DeepNorm).
    """

    def __init__(
        self, width: int, heads: int, inner: int, eps: float, act: str = "gelu", pre: bool = True,
        biases: tuple[bool, bool, bool, bool] = (True,) * 4, alpha: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pre, self.alpha, self.act = pre, alpha, ACTIVATIONS[act]
        self.attention = Attention(width, heads, biases)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); mask and bias as for Attention."""
        if self.pre:
            x = x + self.attention(self.norm1(x), mask, bias)
            return x + self.fc2(self.act(self.fc1(self.norm2(x))))
        x = self.norm1(self.alpha * x + self.attention(x, mask, bias))
        return self.norm2(self.alpha * x + self.fc2(self.act(self.fc1(x))))


def load_renamed(
    module: nn.Module, tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], where: Any,
    ignore: Iterable[str] = (),
) -> str:  # fmt: skip
    """Gives `module` tensors under its own names, strictly; returns the coverage ("198/198 tensors, 4 not used").

    `rules` are (pattern, replacement), of which the first that matches a whole name counts; names that match a pattern
    of `ignore` are left out. UserError: a tensor is missing, unknown, or of another shape. May be on meta before.
    """
    found: dict[str, Tensor] = {}
    unused = 0
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in ignore):
            unused += 1
            continue
        ours = next((re.sub(f"^(?:{old})$", new, name) for old, new in rules if re.fullmatch(old, name)), name)
        found[ours] = tensor
    wanted = module.state_dict()
    check_names(where, wanted, found)
    check_shapes(where, wanted, {name: tuple(tensor.shape) for name, tensor in found.items()})
    module.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}, assign=True)
    return f"{len(found)}/{len(wanted)} tensors" + (f", {unused} not used" if unused else "")
