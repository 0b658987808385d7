"""What bench/mosei.py and bench/speech.py share: ways to train take turns; a clock tells the model from the loop."""

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from threading import Semaphore, Thread
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from bench.report import apart, bar, spread
from common import dist

BELOW = "ours is not above the floor's"
WARM = 20  # most steps of each variant before the first round, and no more than a quarter of its epoch
TURNS = 32  # of an epoch: a machine that others use is not the same from one second to the next
COLUMNS = (
    "ms a step", "overhead, share of the epoch", "loop, ms a step", "loop, share of the epoch", "epoch, times ours",
    "overhead, times ours", "loop, times ours",
)  # fmt: skip


Tick = Callable[[], object]  # called after every step


class Clock:
    """Marks when a forward begins and when the optimiser's step has ended."""

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
        """From the forward to the end of the optimiser's step, over all steps marked."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.device.type == "cuda":
            return sum(a.elapsed_time(b) for a, b in pairs)
        return 1000 * sum(b - a for a, b in pairs)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Variant:
    """A way to train."""

    clock: Clock
    epoch: Callable[[int, Tick], object]  # so many steps
    steps: int
    turns: int = TURNS  # one epoch takes so many; 1 where processes work on while others have their turn


class Epoch:
    """An epoch of a variant, in a thread of its own that waits while it is not its turn."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.marks, self.ms = variant, [], 0.0
        self.each, self.steps, self.over = max(1, variant.steps // variant.turns), 0, False
        self.go, self.stopped = Semaphore(0), Semaphore(0)
        self.failed: BaseException | None = None
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.go.acquire()
        try:
            self.variant.epoch(self.variant.steps, self._tick)
        except BaseException as error:
            self.failed = error
        self.over = True
        self.stopped.release()

    def _tick(self) -> None:
        self.steps += 1
        if self.steps % self.each == 0 and self.variant.turns > 1:
            self.stopped.release()
            self.go.acquire()

    def turn(self) -> None:
        """Goes on until the next turn is another's."""
        clock = self.variant.clock
        clock.marks = self.marks
        began = time.perf_counter()
        self.go.release()
        self.stopped.acquire()
        clock.wait()
        self.ms += 1000 * (time.perf_counter() - began)
        if self.failed:
            raise self.failed

    def times(self) -> tuple[float, float]:
        """ms a step, and of it what no forward, backward or optimiser takes."""
        self.variant.clock.marks = self.marks
        return self.ms / self.steps, (self.ms - self.variant.clock.ms()) / self.steps


Times = dict[str, list[tuple[float, float]]]


def alternate(variants: dict[str, Variant]) -> dict[str, tuple[float, float]]:
    """The times of an epoch of each; their turns come in an order that is drawn anew every time."""
    for variant in variants.values():
        variant.epoch(max(1, min(WARM, variant.steps // 4)), int)
    epochs = {name: Epoch(variant) for name, variant in variants.items()}
    while left := [epoch for epoch in epochs.values() if not epoch.over]:
        for epoch in random.sample(left, len(left)):
            epoch.turn()
    return {name: epoch.times() for name, epoch in epochs.items()}


def start(threads: int, device: torch.device) -> None:
    """What a process does before it trains, as the scripts do."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # as many as asked for, whatever the cores
    torch.set_num_threads(threads)
    dist.keep_memory(device)


def a_round(build: Callable[..., dict[str, Variant]], *args: object) -> dict[str, tuple[float, float]]:
    return alternate(build(*args))


def rounds(repeats: int, what: str, build: Callable[..., dict[str, Variant]], *args: object) -> Times:
    """The times of the variants that build(*args) gives, in each of so many rounds.

    Each is a process of its own, for where its memory happens to lie makes a step some percent faster or slower.
    """
    found = [apart(a_round, build, *args) for _ in bar(repeats, what)]
    return {name: [times[name] for times in found] for name in found[0]}


class Loading(Protocol):
    """A model in training from a DataLoader, epochs of so many steps."""

    clock: Clock
    steps: int

    def loader(self, loader: DataLoader, steps: int, tick: Tick) -> object: ...


class Loop(Loading, Protocol):
    """And by the script itself, and on one batch."""

    def ours(self, steps: int, tick: Tick) -> object: ...
    def floor(self, steps: int, tick: Tick) -> object: ...


def ways(loop: Loop, peers: dict[str, Loading], loaders: dict[int, DataLoader]) -> dict[str, Variant]:
    """A loop, its floor, and `peers` with each of `loaders`, by how many workers they have."""
    variants = {
        "floor": Variant(loop.clock, loop.floor, loop.steps), "ours": Variant(loop.clock, loop.ours, loop.steps)
    }  # fmt: skip
    for what, peer in peers.items():
        for n, loader in loaders.items():
            epoch = partial(peer.loader, loader)
            variants[f"{what}, {n} workers"] = Variant(peer.clock, epoch, peer.steps, 1 if n else TURNS)
    return variants


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
