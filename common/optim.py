"""One optimiser for all scripts: AdamW with and without decay, a learning rate from the step alone, clipping."""

import inspect
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import checkpoint

from common import shard
from common.config import UserError, opt

LAZY = (
    Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict,
    checkpoint.checkpoint, checkpoint._run_fn_with_dynamo_disabled,
)  # fmt: skip

# LAVIS' cosine, and a line like it, fall from step 0 on; the others are those of transformers, which fall from the end
# of the warm-up on
FROM_START = ("linear_warmup_cosine", "linear_warmup_linear")
SCHEDULES = (*FROM_START, "cosine", "linear", "constant", "constant_with_warmup")
# what --mm-projector-lr is for; the compressor of MultiMood's history, a projection here, was no mm_projector there
CONNECTORS = re.compile(r"projections\.(?!history\.)")


@dataclass
class OptimConfig:
    lr: float = opt(1e-5, "peak learning rate", "--lr", span=(1e-6, 1e-4))
    mm_projector_lr: float | None = opt(
        None, "peak learning rate of connectors, which keep its ratio to --lr; none: --lr's", "--mm-projector-lr"
    )
    min_lr: float | None = opt(
        None, "learning rate at the end of the schedule; none: 1e-6 of linear_warmup_*, else 0", "--min-lr"
    )
    warmup_lr: float | None = opt(
        None, "learning rate at step 0, below 0 means lr; none: 1e-6 of linear_warmup_*, else 0", "--warmup-lr"
    )
    warmup_steps: int | None = opt(
        None, "optimiser steps of linear warm-up; none: 1000 of linear_warmup_*, else 0", "--warmup-steps",
        span=(500, 2000),
    )  # fmt: skip
    warmup_ratio: float = opt(
        0.0, "share of all steps that warm up, rounded up, where --warmup-steps is none or 0", "--warmup-ratio"
    )
    schedule: str = opt(
        "linear_warmup_cosine", "shape after the warm-up: linear_warmup_* fall from step 0 on, cosine and linear from "
        "its end; constant has none", "--schedule", choices=SCHEDULES,
    )  # fmt: skip
    lr_stages: dict[str, float] = opt({}, "epoch=rate: constant rates in place of lr and schedule, the first from 0")
    weight_decay: float = opt(0.05, "AdamW decay of matrices (biases and norms: 0)", "--weight-decay", span=(0.01, 0.1))
    beta2: float = opt(0.999, "AdamW second-moment decay")
    grad_clip: float = opt(1.0, "largest gradient norm; 0 switches clipping off", "--grad-clip")


def lr_at(step: int, total: int, cfg: OptimConfig, iters: int = 1) -> float:
    """Learning rate of optimiser step `step` (0-based) out of `total`, `iters` an epoch.

    linear_warmup_cosine is LAVIS' LinearWarmupCosineLRScheduler: the cosine is counted from step 0, not from the end of
    the warm-up, so the rate drops a little where the warm-up ends.
    """
    peak = [rate for epoch, rate in stages(cfg) if epoch <= step // iters][-1]
    early = cfg.schedule in FROM_START
    low = 1e-6 if early else 0.0
    start, end = (low if rate is None else rate for rate in (cfg.warmup_lr, cfg.min_lr))
    start = peak if start < 0 else start
    warm = warmup(total, cfg)
    if step < warm:
        return min(peak, start + (peak - start) * step / max(warm, 1))
    if cfg.schedule.startswith("constant") or cfg.lr_stages:
        return peak
    begin = 0 if early else warm
    done = min((step - begin) / max(total - begin, 1), 1.0)
    if cfg.schedule.endswith("linear"):
        return cfg.lr + (end - cfg.lr) * done
    return end + (cfg.lr - end) * 0.5 * (1 + math.cos(math.pi * done))


def warmup(total: int, cfg: OptimConfig) -> int:
    """Steps of the warm-up out of `total`. UserError: --warmup-steps and --warmup-ratio give different ones."""
    if cfg.schedule == "constant" and not cfg.lr_stages:
        return 0
    by_ratio = math.ceil(cfg.warmup_ratio * total)
    if cfg.warmup_ratio and cfg.warmup_steps not in (None, 0, by_ratio):
        raise UserError(
            f"--warmup-steps {cfg.warmup_steps} and --warmup-ratio {cfg.warmup_ratio:g}, which makes {by_ratio} of "
            f"{total} steps: give one of them (--warmup-steps 0 leaves it to the ratio)"
        )
    if cfg.warmup_ratio or cfg.warmup_steps is not None:
        return cfg.warmup_steps or by_ratio
    return 1000 if cfg.schedule in FROM_START else 0


def check(cfg: OptimConfig) -> None:
    """UserError where rates are none, before anything is built."""
    stages(cfg)
    if not 0 <= cfg.warmup_ratio <= 1:
        raise UserError(f"--warmup-ratio: {cfg.warmup_ratio:g} is no share of the steps (0 to 1)")
    if cfg.mm_projector_lr is not None and not (cfg.mm_projector_lr >= 0 and stages(cfg)[0][1] > 0):
        raise UserError(f"--mm-projector-lr {cfg.mm_projector_lr:g}: needs to be 0 or more, and --lr to be above 0")


def stages(cfg: OptimConfig) -> list[tuple[int, float]]:
    """(first epoch, rate) of the stages, in order: lr alone where none are set. UserError: none begins at epoch 0."""
    where, found = "--optim.lr-stages", [(0, cfg.lr)] if not cfg.lr_stages else []
    for epoch, rate in cfg.lr_stages.items():
        if not epoch.isdecimal():
            raise UserError(f"{where}: {epoch!r} is no epoch")
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"{where}: {rate:g} from epoch {epoch} is no learning rate")
        found.append((int(epoch), rate))
    if min(found)[0]:
        raise UserError(f"{where}: begins at epoch {min(found)[0]}, not at 0")
    return sorted(found)


class AdamW(torch.optim.AdamW):
    """torch's own, without what imports torch._dynamo, for a second, into programs that compile nothing."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, *args: Any, **options: Any) -> None:
        if "torch._dynamo" not in sys.modules:
            for function in LAZY:
                # it would import it at its first call, to be wrapped by it; the plain function stands for the wrapped
                inspect.unwrap(function).__dict__["__dynamo_disable"] = inspect.unwrap(function)
        super().__init__(*args, **options)


def build(module: nn.Module, cfg: OptimConfig) -> AdamW:
    """Fused AdamW over what trains in `module`; vectors, biases, norms and Mamba's A_log are not decayed."""
    share = 1.0 if cfg.mm_projector_lr is None else cfg.mm_projector_lr / stages(cfg)[0][1]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {
        (rate, decay): [] for rate in (1.0, share) for decay in (cfg.weight_decay, 0.0)
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn", "A_log"))
            key = share if CONNECTORS.search(name) else 1.0, 0.0 if spared else cfg.weight_decay
            groups[key].append(parameter)
    made = [{"params": held, "share": key[0], "weight_decay": key[1]} for key, held in groups.items() if held]
    return AdamW(made, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8, fused=True)


def grad_norm(optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Global gradient norm, after which gradients are scaled down to `clip` if it is larger (0: left alone)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = shard.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return float(norm)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate; connectors that have their own get it in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


def state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name ("exp_avg.<name>", …), so that it survives a reordering of parameters."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{key}.{names[id(p)]}": value if torch.is_tensor(value) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:  # fmt: skip
    """Inverse of state_tensors; parameters without state (no step taken yet) stay without.

    State of something else, of another shape or in part is a UserError.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    states: dict[str, dict[str, tuple[int, ...]]] = {}
    for full, shape in shard.shapes(tensors).items():
        key, _, name = full.partition(".")
        states.setdefault(name, {})[key] = shape
    for name, state in states.items():
        parameter = parameters.get(name)
        if parameter is None or state != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise UserError(f"optimiser state of {name!r} ({', '.join(sorted(state))}) does not fit what trains here")
        # AdamW's fused kernel wants its step counter beside the parameter, in float32
        optimizer.state[parameter] = {key: shard.like(tensors[f"{key}.{name}"], parameter) for key in state}
