"""The order of training samples as a pure function of the step, read ahead by threads."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from data.clips import ClipData, Sample

AHEAD = 2  # windows prepared beyond the one in use


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples in pass `epoch` over the data."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def window(
    step: int, size: int, seed: int, batch: int, accum: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """(pass, index) of this rank's micro-batches in optimiser step `step`.

    Passes over the data follow each other without a gap, whatever an epoch's length is; 1 x 8, 2 ranks x 4 and 2
    accumulated x 4 take the same samples.
    """
    micro_batches = []
    for micro in range(accum):
        first = ((step * accum + micro) * world + rank) * batch
        places = [divmod(first + j, size) for j in range(batch)]
        micro_batches.append([(epoch, int(permutation(size, seed, epoch)[at])) for epoch, at in places])
    return micro_batches


def windows(
    data: ClipData, steps: range, seed: int, batch: int, accum: int, rank: int, world: int, workers: int
) -> Iterator[list[list[Sample]]]:
    """Each step's micro-batches of samples; with workers > 0 prepared by threads ahead of their use."""
    plan = (window(step, len(data), seed, batch, accum, rank, world) for step in steps)
    if workers <= 0:
        for micro_batches in plan:
            yield [[data.sample(i, epoch) for epoch, i in micro] for micro in micro_batches]
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for micro_batches in plan:
            waiting.append([[pool.submit(data.sample, i, epoch) for epoch, i in micro] for micro in micro_batches])
            if len(waiting) > AHEAD:
                yield [[future.result() for future in micro] for micro in waiting.popleft()]
        while waiting:
            yield [[future.result() for future in micro] for micro in waiting.popleft()]
