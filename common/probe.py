"""Linear probes, the baseline of every classifier here: logistic and ridge regression by L-BFGS."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(x: Tensor, y: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Weight (classes, D) and bias that minimise c * (sum of cross entropies) + |weight|^2 / 2."""
    return _solve(x, classes, c, lambda logits: F.cross_entropy(logits, y, reduction="sum"))


def fit_head(x: Tensor, y: Tensor, score: bool, several: bool, outputs: int, c: float) -> tuple[Tensor, Tensor]:
    """The same for classes y (N,) with -1 for unknown, for a score (ridge), or for several labels of 0 and 1.

    Rows of unknown target (NaN, -1) are left out.
    """
    known = torch.isfinite(y).all(-1) if several else torch.isfinite(y) if score else y >= 0
    x, y = x[known], y[known]
    if score:
        return _solve(x, 1, c, lambda out: 0.5 * (out[:, 0] - y).square().sum())
    if several:
        return _solve(x, outputs, c, lambda out: F.binary_cross_entropy_with_logits(out, y, reduction="sum"))
    return fit(x, y, outputs, c)


def _solve(x: Tensor, outputs: int, c: float, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return solve(x.new_zeros(outputs, x.shape[1]), lambda weight: x @ weight.T, len(x), c, objective)


def solve(
    start: Tensor, product: Callable[[Tensor], Tensor], rows: int, c: float, objective: Callable[[Tensor], Tensor],
    tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias that minimise c * objective(product(weight) + bias) + |weight|^2 / 2, from weight `start` on.

    start (outputs, D), product(weight) (rows, outputs); `tolerance` is of the gradient of that over c * rows.
    """
    weight = start.clone().requires_grad_()
    bias = start.new_zeros(len(start), requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=tolerance, tolerance_change=1e-12, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        value = (objective(product(weight) + bias) + weight.square().sum() / (2 * c)) / rows
        value.backward()
        return value

    solver.step(loss)
    return weight.detach(), bias.detach()
