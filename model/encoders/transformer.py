"""The transformer block that speech, picture and text encoders share, and loading theirs under other people's names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import check_names, check_shapes, read_json

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
ALL = (True, True, True, True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) on itself; `biases` says which of q, k, v and out have one."""

    def __init__(self, width: int, heads: int, biases: tuple[bool, bool, bool, bool] = ALL) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=bias) for bias in biases)

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """mask (B, T): frames that may be looked at; bias (B or 1, heads, T, T) is added to the logits."""
        x = x.to(self.q.weight.dtype)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        allowed = None if mask is None else mask[:, None, None]
        if bias is not None:
            bias = self.gate(q, bias).to(q.dtype)
            allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
        return self.out(F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))

    def gate(self, q: Tensor, bias: Tensor) -> Tensor:
        """The bias as queries (B, heads, T, D / heads) take it, here as it is."""
        return bias


class Block(nn.Module):
    """Attention and a two-layer MLP, each with its norm before (`pre`) or after the sum with its input.

    `alpha` multiplies the input in that sum (DeepNorm).
    """

    def __init__(
        self, width: int, heads: int, inner: int, eps: float, act: str = "gelu", pre: bool = True,
        biases: tuple[bool, bool, bool, bool] = ALL, alpha: float = 1.0,
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
            return x + self.mlp(self.norm2(x))
        x = self.norm1(self.alpha * x + self.attention(x, mask, bias))
        return self.norm2(self.alpha * x + self.mlp(x))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x.to(self.fc1.weight.dtype))))


def hidden_states(
    blocks: Iterable[nn.Module], x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
    norm: nn.Module | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """What each block reads, then what the last one gives, after `norm`; no block runs before its turn is asked for."""
    for block in blocks:
        yield x
        x = block(x, mask, bias)
    yield x if norm is None else norm(x)


def read_layers(given: str, last: int, where: str) -> tuple[range, float]:
    """Which hidden states up to number `last` an option names, and what each counts for in their sum."""
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", given):
        first, end, mean = int(match[1]), int(match[2] or match[1]), True
    elif match := re.fullmatch(r"-(\d+)", given):
        first, end, mean = last + 1 - int(match[1]), last + 1 - int(match[1]), True
    else:
        first, end, mean = {"last": last, "last4": last - 3}.get(given, -1), last, False
    if not 0 <= first <= end <= last:
        choices = f"last, last4 (the sum of the last four), a state from 0 to {last}, or a span such as 4-10 (its mean)"
        raise UserError(f"{where}: layer '{given}' is not one of {choices}")
    return range(first, end + 1), 1 / (end + 1 - first) if mean else 1.0


def mix(states: Iterable[Tensor], layers: tuple[range, float]) -> Tensor:
    """The hidden states that read_layers() chose as one."""
    wanted, share = layers
    total = None
    for number, state in enumerate(states):
        if number in wanted:
            total = state if total is None else total + state
        if number + 1 == wanted.stop:
            break
    assert total is not None
    return total if share == 1 else total * share


def cast(module: nn.Module, dtype: str, where: str) -> None:
    """Puts the products into a dtype, "fp32" or "bf16"; norms and the sums from block to block stay in fp32."""
    if dtype not in DTYPES:
        raise UserError(f"{where}: dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            part.to(DTYPES[dtype])


def read_config(
    file: Path, kind: str, names: Iterable[str], allowed: Mapping[str, Sequence[Any]], part: str | None = None
) -> dict[str, Any]:
    """What a config.json of transformers gives of `names`, in its `part` if it has that one.

    UserError: another kind of model, or not in `allowed`.
    """
    given = read_json(file)
    if part is not None and isinstance(given.get(part), dict):
        given = given[part]
    check_config(file, given, {"model_type": (kind,), **allowed})
    fields = {name: given[name] for name in names if given.get(name) is not None}
    width, heads = fields.get("hidden_size", 0), fields.get("num_attention_heads", 1)
    if width % heads:
        raise UserError(f"{file}: num_attention_heads {heads} does not divide hidden_size {width}")
    return fields


def check_config(file: Path, given: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> None:
    """UserError where a config asks for what an encoder does not compute; the first value allowed is the default."""
    for key, values in allowed.items():
        if given.get(key, values[0]) not in values:
            raise UserError(f"{file}: {key} {given[key]!r} is not supported (only {', '.join(map(repr, values))})")


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
