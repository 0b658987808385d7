"""Features of many clips in memory, back to back, gathered by index on their device: no loader, no padding."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from data.features import Store

GATHERED = 2 * 2**20  # bytes gathered at a time: what a cache holds until it is read
Batch = tuple[dict[str, Tensor], dict[str, Tensor]]  # features and masks by modality


@dataclass
class Ragged:
    """Frames of N clips; the last row of `values` is zeros and stands for no frame."""

    values: Tensor  # (S + 1, D), or ids (S + 1,)
    rows: Tensor  # (N + 1, T), where each frame is in values; S for none; the last clip has none

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (K, B, T, D), or ids (K, B, T), and mask (K, B, T) of the clips index (K, B); N stands for none."""
        rows = self.rows.index_select(0, index.flatten())  # (K * B, T)
        x = self.values.index_select(0, rows.flatten())
        mask = (rows < len(self.values) - 1).view(*index.shape, rows.shape[1])
        return x.view(*mask.shape, *x.shape[1:]), mask

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


def gather(parts: Mapping[str, Ragged], index: Tensor) -> Batch:
    """Features (K, B, T, D), or ids (K, B, T), and masks (K, B, T) of the clips index (K, B); N stands for none."""
    found = {m: part.gather(index) for m, part in parts.items()}
    return {m: x for m, (x, _) in found.items()}, {m: mask for m, (_, mask) in found.items()}


def batches(parts: Mapping[str, Ragged], steps: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
    """What gather() finds for each of steps (K, B), on `device`.

    Many small steps are gathered together, for a slice of what is there costs a tenth of a gather of its own. Where the
    host gathers and has a core to spare, a thread does so while the steps before are used.
    """
    a_clip = sum(part.rows.shape[1] * part.values[0].nbytes for part in parts.values())
    together = max(1, GATHERED // max(1, a_clip * max(step.numel() for step in steps)))

    def some(first: int) -> list[Batch]:
        few = steps[first : first + together]
        sizes = [step.shape[1] for step in few]
        x, mask = ({m: part.to(device).split(sizes, 1) for m, part in half.items()}
                   for half in gather(parts, torch.cat(list(few), 1)))  # fmt: skip
        return [({m: p[i] for m, p in x.items()}, {m: p[i] for m, p in mask.items()}) for i in range(len(few))]

    firsts = range(0, len(steps), together)
    resident = all(part.values.device.type == device.type for part in parts.values())
    # a GPU is not waited for, and on a CPU whose every core works on the model a thread would be in its way
    if resident and (device.type != "cpu" or torch.get_num_threads() >= (os.cpu_count() or 1)):
        for first in firsts:
            yield from some(first)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(some, 0)
        for first in firsts:
            made = coming.result()
            if first + together < len(steps):
                coming = thread.submit(some, first + together)
            yield from made


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
