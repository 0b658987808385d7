"""Features of many clips in memory, back to back, gathered by index on their device: no loader, no padding."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from data.features import Store

GATHERED = 8 * 2**20  # bytes gathered at a time: what a cache holds until it is read
Batch = tuple[dict[str, Tensor], dict[str, Tensor]]  # features and masks by modality


@dataclass
class Ragged:
    """Frames of N clips; the last row of `values` is zeros and stands for no frame."""

    values: Tensor  # (S + 1, D), or ids (S + 1,)
    rows: Tensor  # (N + 1, T), where each frame is in values; S for none; the last clip has none

    def gather(self, index: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Frames (K, B, T, D), or ids (K, B, T), and mask (K, B, T) of the clips index (K, B); N stands for none.

        Where there is `out`, an earlier answer of the same shape, they take its place.
        """
        x, mask = out or (None, None)
        rows = self.rows.index_select(0, index.flatten())  # (K * B, T)
        shape = *index.shape, rows.shape[1]
        x = torch.index_select(self.values, 0, rows.flatten(), out=None if x is None else x.flatten(0, 2))
        mask = torch.lt(rows, len(self.values) - 1, out=None if mask is None else mask.flatten(0, 1))
        return x.view(*shape, *x.shape[1:]), mask.view(shape)

    def map(self, transform: Callable[[Tensor], tuple[Tensor, Tensor]]) -> "Ragged":
        """The same clips with transform(frames) -> (frames, where there is one); what transform drops is gone."""
        values, there = transform(self.values)
        moved = torch.where(there, torch.arange(len(values), device=values.device), len(values) - 1)
        return Ragged(values, moved[self.rows])

    def to(self, device: torch.device) -> "Ragged":
        return Ragged(self.values.to(device), self.rows.to(device))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.rows.nbytes


def gather(parts: Mapping[str, Ragged], index: Tensor, out: Batch | None = None) -> Batch:
    """Features (K, B, T, D), or ids (K, B, T), and masks (K, B, T) of the clips index (K, B); N stands for none.

    Where there is `out`, an earlier answer of the same shape, they take its place.
    """
    x, mask = out or ({}, {})
    found = {m: part.gather(index, out and (x[m], mask[m])) for m, part in parts.items()}
    return {m: x for m, (x, _) in found.items()}, {m: mask for m, (_, mask) in found.items()}


def cut(x: Tensor, size: int, steps: int) -> tuple[Tensor, ...]:
    """x (K, N, ...) in `steps` pieces (K, size, ...); those at its end may be shorter, or empty."""
    pieces = x.split(size, 1)
    return pieces + (x[:, :0],) * (steps - len(pieces))


def batches(
    parts: Mapping[str, Ragged], index: Tensor, size: int, steps: int, device: torch.device
) -> Iterator[Batch]:  # fmt: skip
    """What gather() finds for each of `steps` pieces (K, size) of index (K, N), on `device`.

    Each is good until the next is asked for: many small steps are gathered together, always into the same memory, which
    is cut up once. Where the host gathers and has a core to spare, a thread does so while the steps before are used.
    """
    a_clip = sum(part.rows.shape[1] * part.values[0].nbytes for part in parts.values())
    together = max(1, GATHERED // max(1, a_clip * size * len(index)))

    firsts = range(0, steps, together)
    resident = all(part.values.device.type == device.type for part in parts.values())
    made: dict[tuple[int, ...], tuple[Batch, list[Batch]]] = {}  # by which of two turns, steps and clips

    def some(first: int, turn: int = 0) -> list[Batch]:
        few = min(together, steps - first)
        clips = index[:, first * size : (first + few) * size]
        place = turn, few, clips.shape[1]
        if place in made:
            gather(parts, clips, made[place][0])
            return made[place][1]
        found = gather(parts, clips)
        x, mask = ({m: cut(part.to(device), size, few) for m, part in half.items()} for half in found)
        cuts = [({m: p[i] for m, p in x.items()}, {m: p[i] for m, p in mask.items()}) for i in range(few)]
        if resident:
            made[place] = found, cuts
        return cuts

    # a GPU is not waited for, and on a CPU whose every core works on the model a thread would be in its way
    if resident and (device.type != "cpu" or torch.get_num_threads() >= (os.cpu_count() or 1)):
        for first in firsts:
            yield from some(first)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(some, 0)
        for turn, first in enumerate(firsts, 1):
            ready = coming.result()
            if first + together < steps:
                coming = thread.submit(some, first + together, turn % 2)
            yield from ready


def read(ids: Sequence[str], store: Store, max_frames: int) -> Ragged:
    """The features of clips in their order; what is beyond max_frames is cut, and clips the store lacks have none."""
    pieces, found = store.take([id for id in ids if id in store])
    if store.info.get("kind") == "ids":
        values = torch.cat([*pieces, torch.zeros(1, dtype=torch.int32)]).int()
        there = torch.ones(len(values), dtype=torch.bool)
    else:
        values = torch.cat([*(piece.float() for piece in pieces), torch.zeros(1, store.dim)])
        there = (values != 0).any(-1)  # a frame of zeros is a lost one
    each = iter(found)
    lengths = torch.tensor([next(each) if id in store else 0 for id in ids] + [0])
    none = len(values) - 1
    place = torch.arange(max(1, min(max_frames, int(lengths.max()))))
    starts = lengths.cumsum(0) - lengths
    rows = torch.where(place < lengths[:, None], starts[:, None] + place, none)
    return Ragged(values, torch.where(there[rows], rows, none))
