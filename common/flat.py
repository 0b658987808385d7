"""Small models at full speed: the parameters of K seeds in one tensor, their gradients in another."""

import warnings

import torch
from torch import Tensor, nn


class Flat:
    """Moves a module's parameters (K, ...) into one (K, P) tensor and gives them gradients in another.

    One reduction then clips, sums over ranks or clears all gradients, every seed has its own learning rate, and a
    seed's best weights are one row.
    """

    def __init__(self, module: nn.Module) -> None:
        # each seed's parameters lie together, so one parameter of all seeds does not: autograd warns, without effect
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        # matrices first, so that what decays is one stretch of a row
        named.sort(key=lambda pair: pair[1].ndim < 3 or pair[0].endswith("bias"))
        k = len(named[0][1])
        self.values = torch.cat([p.detach().reshape(k, -1) for _, p in named], 1)
        self.grads = torch.zeros_like(self.values)
        self.decayed = sum(p[0].numel() for name, p in named if p.ndim >= 3 and not name.endswith("bias"))
        first = 0
        for _, p in named:
            last = first + p[0].numel()
            p.data = self.values[:, first:last].view(p.shape)
            p.grad = self.grads[:, first:last].view(p.shape)
            first = last
        # the optimiser sees two parameters a seed
        self.parts = nn.ParameterDict()
        for seed in range(k):
            for name, span in (("decayed", slice(0, self.decayed)), ("plain", slice(self.decayed, None))):
                part = nn.Parameter(self.values[seed, span])
                part.grad = self.grads[seed, span]
                self.parts[f"{name}_{seed}"] = part

    def adamw(self, lr: float, weight_decay: float) -> torch.optim.AdamW:
        """Fused AdamW with two groups a seed, seed by seed."""
        groups = [
            {"params": [part], "weight_decay": weight_decay if name.startswith("decayed") else 0.0}
            for name, part in self.parts.items()
        ]
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    def clip(self, most: float) -> Tensor:
        """Gradient norm of each seed (K,), after which gradients are scaled down to `most` (0: left alone)."""
        norm = self.grads.norm(dim=1)
        # on a CPU it costs nothing to look, and a pass over all gradients to multiply by 1
        if most > 0 and (norm.is_cuda or bool((norm > most).any())):
            self.grads.mul_((most / (norm + 1e-6)).clamp(max=1.0)[:, None])
        return norm

    def zero_grad(self) -> None:
        self.grads.zero_()


def set_lrs(optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
    """Gives each seed's two groups its learning rate."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lrs[i // 2]
