"""What bench/mosei.py and bench/speech.py share: ways to train take turns; a clock tells the model from the loop."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from bench.report import spread

BELOW = "ours is not above the floor's"
WARM = 20  # most steps of each variant before the first round, and no more than a quarter of its epoch
COLUMNS = (
    "ms a step", "overhead, share of the epoch", "loop, ms a step", "loop, share of the epoch", "epoch, times ours",
    "overhead, times ours", "loop, times ours",
)  # fmt: skip


class Clock:
    """Adds up the time from the forward to the end of the optimiser's step, over the steps since it was set."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        model.register_forward_pre_hook(lambda *_: self.mark())
        optimizer.register_step_post_hook(lambda *_: self.mark())

    def mark(self) -> None:
        if self.device.type == "cuda":  # which is not waited for between steps
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.device.type == "cuda":
            return sum(a.elapsed_time(b) for a, b in pairs)
        return 1000 * sum(b - a for a, b in pairs)

    def of(self, epoch: Callable[[], object], steps: int) -> tuple[float, float]:
        """ms a step of an epoch, and of it what no forward, backward or optimiser takes."""
        self.wait()
        self.marks.clear()
        began = time.perf_counter()
        epoch()
        self.wait()
        whole = 1000 * (time.perf_counter() - began)
        return whole / steps, (whole - self.ms()) / steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Variant = tuple[Clock, Callable[[int], object], int]  # what times it, its epoch of so many steps, how many it has
Times = dict[str, list[tuple[float, float]]]


def alternate(variants: dict[str, Variant], repeats: int) -> Times:
    """What the clock says of each variant's epoch in each round; the order turns round every time."""
    times: Times = {name: [] for name in variants}
    for _, epoch, steps in variants.values():
        epoch(max(1, min(WARM, steps // 4)))
    for round in range(repeats):
        for name in list(variants)[:: 1 if round % 2 else -1]:
            clock, epoch, steps = variants[name]
            times[name].append(clock.of(partial(epoch, steps), steps))
    return times


class Loading(Protocol):
    """A model in training from a DataLoader, epochs of so many steps."""

    clock: Clock
    steps: int

    def loader(self, loader: DataLoader, steps: int) -> object: ...


class Loop(Loading, Protocol):
    """And by the script itself, and on one batch."""

    def ours(self, steps: int) -> object: ...
    def floor(self, steps: int) -> object: ...


def compare(
    name: str, loop: Loop, peers: dict[str, Loading], loaders: dict[int, DataLoader], repeats: int
) -> list[str]:  # fmt: skip
    """The table `name` of a loop, its floor, and `peers` with each of `loaders`, by how many workers they have."""
    variants: dict[str, Variant] = {
        "floor": (loop.clock, loop.floor, loop.steps), "ours": (loop.clock, loop.ours, loop.steps)
    }  # fmt: skip
    for what, peer in peers.items():
        for n, loader in loaders.items():
            variants[f"{what}, {n} workers"] = peer.clock, partial(peer.loader, loader), peer.steps
    return rows(name, alternate(variants, repeats))


def rows(name: str, times: Times) -> list[str]:
    """The table `name` of floor, ours and others, a line each: median (least to most) over rounds."""
    lines = [f"| {name} | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    floor, ours = times["floor"], times["ours"]
    for variant, each in times.items():
        cells = [spread([whole for whole, _ in each]), *[""] * (len(COLUMNS) - 1)]
        if variant != "floor":
            (over, loop), own = above(each, floor), above(ours, floor)
            cells[1:] = (
                spread([x / whole for x, (whole, _) in zip(over, each, strict=True)]), spread(loop),
                spread([x / whole for x, (whole, _) in zip(loop, each, strict=True)]),
                spread([x / y for (x, _), (y, _) in zip(each, ours, strict=True)]),
                *(times_ours(median(x), median(y)) for x, y in zip((over, loop), own, strict=True)),
            )  # fmt: skip
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return [*lines, ""]


def above(each: list[tuple[float, float]], floor: list[tuple[float, float]]) -> list[list[float]]:
    """By how much epochs, and what in them lies between the steps, take longer than the floor's."""
    return [[x[i] - y[i] for x, y in zip(each, floor, strict=True)] for i in range(2)]


def times_ours(x: float, ours: float) -> str:
    return f"{x / ours:.3g}" if ours > 0 else BELOW
