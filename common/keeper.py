"""A run of K seeds side by side: which epoch was best for each, what a checkpoint of it holds, how it goes on."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, dist
from common.config import UserError
from common.flat import Flat
from common.optim import load_state_tensors, state_tensors

LOWER = ("loss", "mae", "median_rank")  # scores that are better when smaller


@dataclass(frozen=True)
class Rule:
    """How the best epoch is chosen, and when a seed stops or slows down."""

    metric: str  # "none": the last epoch counts
    patience: int = 0  # epochs without a better score before a seed stops; 0: never
    min_delta: float = 0.0
    plateau: tuple[int, float, float] | None = None  # epochs of stalled loss, what the rate is multiplied by, lowest


@dataclass
class Watch:
    """One seed's best epoch, early stopping and plateau schedule."""

    lr: float
    best: float | None = None  # of the rule's metric
    epoch: int = 0  # of the best
    bad: int = 0  # epochs since
    stopped: bool = False
    low: float = math.inf  # lowest valid loss by the plateau schedule's measure
    stalled: int = 0

    def update(self, rule: Rule, scores: dict[str, Any], epoch: int) -> bool:
        """Takes an epoch's valid scores in; True when they are the best so far."""
        value = float(epoch) if rule.metric == "none" else scores[rule.metric]
        sign = -1 if rule.metric in LOWER else 1
        better = self.best is None or sign * (value - self.best) > rule.min_delta
        if better:
            self.best, self.epoch, self.bad = value, epoch, 0
        else:
            self.bad += 1
            self.stopped = 0 < rule.patience <= self.bad
        # torch's ReduceLROnPlateau: relative threshold 1e-4, the rate falls after patience + 1 stalled epochs
        if scores["loss"] < self.low * (1 - 1e-4):
            self.low, self.stalled = scores["loss"], 0
        else:
            self.stalled += 1
        if rule.plateau is not None and self.stalled > rule.plateau[0]:
            self.lr, self.stalled = max(self.lr * rule.plateau[1], rule.plateau[2]), 0
        return better


@dataclass
class Progress:
    """What a checkpoint remembers of the run besides tensors."""

    step: int = 0
    epoch: int = 0  # epochs finished
    best: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    watches: list[dict] = field(default_factory=list)


class Keeper:
    """Saves and restores a run: weights, optimiser, each seed's best weights, random state, and what it has reached."""

    def __init__(
        self, out: Path, module: nn.Module, flat: Flat, optimizer: torch.optim.Optimizer, here: dist.Ranks,
        lrs: Sequence[float], keep: int,
    ) -> None:  # fmt: skip
        self.root, self.module, self.flat, self.optimizer = out / "checkpoints", module, flat, optimizer
        self.here, self.keep = here, keep
        self.facts: dict[str, Any] = {  # of the run, for state.json; the script adds its own
            "commit": checkpoint.commit(), "world": here.world, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip
        self.best = flat.values.clone()  # (K, P)
        self.progress = Progress()
        self.watches = [Watch(lr) for lr in lrs]
        self.extra: dict[str, Tensor] = {}  # what else changes while training, by name; set before restore()
        self._rng: dict[str, Tensor] = {}

    def restore(self, start: Path, say: Callable[[str], None]) -> None:
        """Goes on from a checkpoint; the module's own weights are loaded where the module is made."""
        state = checkpoint.read_state(start)
        self.progress = Progress(**{name: state[name] for name in vars(Progress())})
        self.watches = [Watch(**watch) for watch in self.progress.watches]
        tensors = checkpoint.read_tensors(start / checkpoint.OPTIMIZER)
        if "best" not in tensors:
            raise UserError(f"{start}: holds weights only, so --ckpt can start from it; --resume needs epoch_* or last")
        self.best.copy_(tensors.pop("best"))
        extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("extra.")}
        for name, value in self.extra.items():  # what the run had not before starts as it is
            value.copy_(extra.get(f"extra.{name}", value))
        self._rng = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng")}
        load_state_tensors(self.flat.parts, self.optimizer, tensors)
        for name, now in (("world", self.here.world), ("threads", torch.get_num_threads())):
            if state[name] != now:
                say(f"{name} was {state[name]}, is {now}: results will differ in the last digits")

    def begin(self, seed: int, iters: int) -> int:
        """Seeds the generators for the epoch at hand; returns the steps of it that a stopped run has taken."""
        progress = self.progress
        if progress.best and dist.main_first(self.here, self._best_is_elsewhere):
            self._write_best()
        # epochs before may have had another number of steps, and the stopped run more than there are now
        done = min(progress.step - (progress.history[-1]["step"] if progress.history else 0), iters - 1)
        dist.seed_all(seed, progress.epoch, self.here.rank)
        own = {name.split(".")[1]: x for name, x in self._rng.items() if name.startswith(f"rng{self.here.rank}.")}
        if done and own:
            _set_rng_state(own)
        return done

    def check_finite(self, losses: Tensor, norm: Tensor, done: int, ids: Callable[[int], list[str]], hint: str) -> None:
        """UserError if a loss (S, K) of the epoch's steps from `done` on, or the last norm (K,), is not a number.

        `ids` names the samples of a step of the epoch; `hint` is what else may help.
        """
        broken = ~torch.isfinite(losses).all(1).cpu() | (~torch.isfinite(norm).all()).cpu()
        if broken.any():
            first = int(broken.nonzero()[0, 0])
            lr = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"epoch {self.progress.epoch}, step {first + done}: loss {losses[first].tolist()}, gradient norm "
                f"{norm.tolist()}, lr {lr:.3g}, samples {', '.join(sorted(set(ids(first + done)))[:8])}; the last "
                f"checkpoint is kept: lower --lr, set --grad-clip, {hint}"
            )

    def note(self, rule: Rule, scores: Sequence[dict[str, Any]], values: Tensor) -> list[int]:
        """Takes in valid scores, reached by weights `values` (K, P); returns the seeds that are better than ever."""
        improved = []
        for k, (watch, each) in enumerate(zip(self.watches, scores, strict=True)):
            if not watch.stopped and watch.update(rule, each, self.progress.epoch):
                self.best[k] = values[k]
                improved.append(k)
        if improved:
            self._save_best(rule.metric)
        return improved

    def save(self, name: str, links: Sequence[str] = ("last",)) -> None:
        """Writes a checkpoint; one that only `best` points at has weights of several epochs, and holds no optimiser.

        With one seed it is that epoch whole, and a run can go on from it.
        """
        self.progress.watches = [asdict(watch) for watch in self.watches]
        tensors: dict[str, Tensor] = {}
        if "last" in links or (len(self.watches) == 1 and not self.extra):
            states = dist.gather(_rng_state(self.here.device))
            tensors = state_tensors(self.flat.parts, self.optimizer) | {"best": self.best}
            tensors |= {f"rng{rank}.{kind}": x for rank, part in enumerate(states) for kind, x in part.items()}
            tensors |= {f"extra.{name}": value for name, value in self.extra.items()}
        state = self.facts | vars(self.progress)
        write = partial(checkpoint.save, self.root, name, self.module, tensors, state, {}, links, self.keep)
        dist.main_first(self.here, lambda: write() and None)

    def _save_best(self, metric: str) -> None:
        name = f"best_{self.progress.epoch:03d}"
        self.progress.best = {
            "metric": metric, "checkpoint": name, "value": sum(w.best or 0.0 for w in self.watches) / len(self.watches),
            "epochs": [w.epoch for w in self.watches],
        }  # fmt: skip
        self._write_best()

    def _best_is_elsewhere(self) -> bool:
        """Whether the run goes on from another folder's checkpoint, or from before what `best` points at."""
        link = self.root / "best"
        return not link.exists() or link.resolve().name != self.progress.best["checkpoint"]

    def _write_best(self) -> None:
        name = self.progress.best["checkpoint"]
        with self.flat.holding(self.best):
            self.save(name, ("best",))
        if self.here.main:
            for old in self.root.glob("best_*"):
                if old.name != name:
                    shutil.rmtree(old)

    def results(self) -> dict[str, Any]:
        """The facts of the run and its history, for results.json."""
        return self.facts | vars(self.progress) | {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%S")}


def shuffled(n: int, seeds: Sequence[int], epoch: int) -> Tensor:
    """Each seed's order of n units in an epoch (K, n), the same alone and among other seeds."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + epoch) for seed in seeds)
    return torch.stack([torch.randperm(n, generator=generator) for generator in generators])


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
