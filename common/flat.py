"""Small models at full speed: the parameters of K seeds in one tensor, their gradients in another."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from common.optim import AdamW

KINDS = ("apart", "decayed", "plain")
STATE = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a parameter
# where Flat.backward wants the gradient of a parameter, by its id: whoever computes it may take the place and fill it
places: dict[int, Tensor] = {}


class Flat:
    """Moves a module's parameters (K, ...) into one (K, P) tensor and gives them gradients in another.

    One reduction then clips, sums over ranks or clears all gradients, every seed has its own learning rate, and a
    seed's best weights are one row.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        # what decays alike is one stretch of a row: tables and direct paths, then matrices, then biases and scales
        named.sort(key=lambda pair: KINDS.index(_kind(*pair)))
        k = len(named[0][1])
        self.values = torch.cat([p.detach().reshape(k, -1) for _, p in named], 1)
        self.grads = torch.zeros_like(self.values)
        self.own = [p for _, p in named]
        self.views: list[Tensor] = []
        first = 0
        ends: dict[str, int] = {}
        for name, p in named:
            last = first + p[0].numel()
            p.data = self.values[:, first:last].view(p.shape)
            p.grad = self.grads[:, first:last].view(p.shape)
            self.views.append(p.grad)
            ends[_kind(name, p)] = first = last
        # the optimiser sees two or three parameters a seed
        self.parts = nn.ParameterDict()
        for seed in range(k):
            for name, (start, end) in zip(ends, pairwise([0, *ends.values()]), strict=True):
                part = nn.Parameter(self.values[seed, start:end])
                part.grad = self.grads[seed, start:end]
                self.parts[f"{name}_{seed}"] = part

    def adamw(
        self, lr: float, weight_decay: float, apart: float | None = None, eps: float = 1e-8, share: float = 1.0
    ) -> AdamW:  # fmt: skip
        """Fused AdamW, its groups seed by seed; `apart` is the decay of tables and direct paths, where another.

        Their epsilon is `eps` and their rate `share` times the others': an epsilon far above gradients makes of AdamW
        gradient descent with momentum, at the rate lr / eps.
        """
        decays = {"apart": weight_decay if apart is None else apart, "decayed": weight_decay, "plain": 0.0}
        groups: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            kind = name.rpartition("_")[0]
            own = {"eps": eps, "share": share} if kind == "apart" else {"share": 1.0}
            groups.append({"params": [part], "weight_decay": decays[kind]} | own)
        return FlatAdamW(groups, lr=lr, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of each seed's `loss` (K,), in place of the last ones."""
        # not loss.backward(), which adds to gradients that must be cleared first: two passes over all of them more
        places.update(zip(map(id, self.own), self.views, strict=True))
        try:
            grads = torch.autograd.grad(loss.sum(), self.own, materialize_grads=True)
        finally:
            places.clear()
        if self.grads.is_cuda:  # where nothing takes its place, and one launch is less than many
            torch.cat([grad.reshape(len(self.grads), -1) for grad in grads], 1, out=self.grads)
            return
        for view, grad in zip(self.views, grads, strict=True):
            if grad.data_ptr() != view.data_ptr():
                view.copy_(grad)

    def clip(self, most: float) -> Tensor:
        """Gradient norm of each seed (K,), after which gradients are scaled down to `most` (0: left alone)."""
        norm = self.grads.norm(dim=1)
        # on a CPU it costs nothing to look, and a pass over all gradients to multiply by 1
        if most > 0 and (norm.is_cuda or bool((norm > most).any())):
            self.grads.mul_((most / (norm + 1e-6)).clamp(max=1.0)[:, None])
        return norm

    @contextlib.contextmanager
    def holding(self, values: Tensor | None) -> Iterator[None]:
        """Other weights (K, P) for the time of a with block; None: those there are."""
        if values is None:
            yield
            return
        own = self.values.clone()
        self.values.copy_(values)
        try:
            yield
        finally:
            self.values.copy_(own)


class FlatAdamW(AdamW):
    """AdamW of a Flat's parts, one call of its kernel for all that share their rates; torch's own makes one a seed."""

    @torch.no_grad()
    def step(self) -> None:
        alike: dict[tuple[float, ...], list[list[Tensor]]] = {}
        for group in self.param_groups:
            lists = alike.setdefault((group["lr"], group["weight_decay"], group["eps"]), [[], [], [], [], []])
            (part,) = group["params"]
            state = self.state[part]
            if not state:
                state |= {name: torch.zeros_like(part if name != "step" else part[0]) for name in STATE}
            for each, x in zip(lists, (part, part.grad, *(state[name] for name in STATE)), strict=True):
                each.append(x)
        for (lr, decay, eps), (parts, grads, means, squares, steps) in alike.items():
            adamw(
                parts, grads, means, squares, [], steps, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr,
                weight_decay=decay, eps=eps, maximize=False,
            )  # fmt: skip


def set_lrs(optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
    """Gives each seed's groups its learning rate."""
    each = len(optimizer.param_groups) // len(lrs)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lrs[i // each] * group.get("share", 1.0)


def _kind(name: str, p: Tensor) -> str:
    if name.endswith(("table", "direct.weight")):
        return "apart"
    return "plain" if p.ndim < 3 or name.endswith("bias") else "decayed"
