"""The order of training samples as a pure function of their number, read ahead by threads."""

from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from heapq import heapreplace
from typing import Any, Protocol

import numpy as np

AHEAD = 2  # windows prepared beyond the one in use


class Samples(Protocol):
    """What samples are taken from: ClipData or TurnData."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Any: ...

    def tokens(self, index: int, epoch: int, places: Callable[..., int]) -> int: ...


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Order of `size` samples in pass `epoch` over them."""
    return np.random.default_rng([seed, epoch]).permutation(size)


class Order:
    """Which clip the n-th sample takes: passes over `size` clips without a gap, each in a random order of its own.

    With a curriculum, `ranked` lists the clips from easy to hard. A pass that begins among the first `ramp` samples
    takes the easiest ones only: the part `share` of all at the start, linearly more later, all from sample `ramp` on,
    where the pass at hand is cut off. With `replay` clips of another set, whose indices follow, the part `ratio` of the
    samples, evenly spread, is theirs.
    """

    def __init__(
        self, size: int, seed: int, ranked: Sequence[int] | None = None, share: float = 1.0, ramp: int = 0,
        replay: int = 0, ratio: float = 0.0,
    ) -> None:  # fmt: skip
        self.size, self.seed, self.ranked = size, seed, ranked
        self.replay, self.ratio = replay, Fraction(str(ratio)) if replay else Fraction(0)
        self.share, self.ramp = share, ramp - int(ramp * self.ratio)  # from here on in samples of our own
        self.starts = [0]  # of the passes over a part of the clips, and of the first over all
        while self.starts[-1] < self.ramp:
            begin = self.starts[-1]
            self.starts.append(min(begin + self._pool(begin), self.ramp))

    def __call__(self, n: int) -> tuple[int, int]:
        """(pass, index) of sample n, counted from 0 over all steps and ranks."""
        replayed = int(n * self.ratio)
        if int((n + 1) * self.ratio) > replayed:
            epoch, at = divmod(replayed, self.replay)
            return epoch, self.size + int(permutation(self.replay, self.seed, epoch)[at])
        n -= replayed
        epoch = bisect(self.starts, n) - 1
        if self.ranked is not None and n < self.ramp:
            begin = self.starts[epoch]
            return epoch, self.ranked[permutation(self._pool(begin), self.seed, epoch)[n - begin]]
        more, at = divmod(n - self.starts[-1], self.size)
        return epoch + more, int(permutation(self.size, self.seed, epoch + more)[at])

    def pool(self, n: int) -> int:
        """How many of our own clips take part in the pass that sample n belongs to."""
        n -= int(n * self.ratio)
        return self._pool(self.starts[bisect(self.starts, n) - 1])

    def _pool(self, begin: int) -> int:
        if begin >= self.ramp:
            return self.size
        return max(1, round(self.size * (self.share + (1 - self.share) * begin / self.ramp)))


def window(step: int, order: Order, batch: int, accum: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """(pass, index) of this rank's micro-batches in optimiser step `step`.

    Passes over the data follow each other without a gap, whatever an epoch's length is; 1 x 8, 2 ranks x 4 and 2
    accumulated x 4 take the same samples.
    """
    firsts = [((step * accum + micro) * world + rank) * batch for micro in range(accum)]
    return [[order(first + j) for j in range(batch)] for first in firsts]


def deal(lengths: Sequence[int], most: int, world: int) -> list[list[list[int]]]:
    """A step's samples by rank and micro-batch, which has at most `most` tokens or one sample that is longer.

    As few micro-batches as that allows, as many on one rank as on another and about equally long: the longest sample
    that is left goes to what is shortest by then.
    """
    ranked = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most = max(most, lengths[ranked[0]])
    for accum in range(-(-sum(lengths) // (world * most)), len(lengths) // world + 1):
        piles: list[list[int]] = [[] for _ in range(world * accum)]
        heap = [(0, n) for n in range(len(piles))]
        for i in ranked:
            size, n = heap[0]
            heapreplace(heap, (size + lengths[i], n))
            piles[n].append(i)
        if max(heap)[0] <= most:
            break
    return [[sorted(pile) for pile in piles[rank::world]] for rank in range(world)]


def by_length(
    step: int, order: Order, length: Callable[[int, int], int], per_step: int, most: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """window() of the same samples, `per_step` on all ranks together, dealt by their length in tokens.

    length(pass, index) is asked for every sample of the step on every rank.
    """
    places = [order(step * per_step + n) for n in range(per_step)]
    return [[places[i] for i in micro] for micro in deal([length(*place) for place in places], most, world)[rank]]


def part_of(parts: Sequence[Samples], index: int) -> tuple[Samples, int]:
    """Which part an index belongs to, and its index there; the indices of a part follow those of the parts before."""
    for part in parts[:-1]:
        if index < len(part):
            return part, index
        index -= len(part)
    return parts[-1], index


def windows(
    parts: Sequence[Samples], plan: Iterable[list[list[tuple[int, int]]]], workers: int
) -> Iterator[list[list[Any]]]:
    """The samples of each step's micro-batches of (pass, index); with workers > 0 threads prepare them in advance."""

    def sample(epoch: int, index: int) -> Any:
        part, index = part_of(parts, index)
        return part.sample(index, epoch)

    if workers <= 0:
        for micro_batches in plan:
            yield [[sample(*place) for place in micro] for micro in micro_batches]
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for micro_batches in plan:
            waiting.append([[pool.submit(sample, *place) for place in micro] for micro in micro_batches])
            if len(waiting) > AHEAD:
                yield [[future.result() for future in micro] for micro in waiting.popleft()]
        while waiting:
            yield [[future.result() for future in micro] for micro in waiting.popleft()]
