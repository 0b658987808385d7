"""Speed of the loops of train_slm.py and train_clap.py beside a DataLoader's of the same models, all in one run.

Random embeddings of the published widths. The variants of a size take the same batches in turns, each for a 32nd of its
epoch (whole ones with worker processes). Each round is a process of its own and gives one value of every number; the
tables have the medians. All train at a rate of 0, with the work of any other: one batch that is learnt by heart has
gradients too small to be clipped.

ours          an epoch by the script's own train_epoch
DataLoader    the same steps on batches of a Dataset of one dict of tensors a clip and the default collate; its worker
              processes live on between epochs, for these are shorter than those of whole data sets
floor         forward, loss, backward, clipping and AdamW on one batch that never changes: no data path can beat it
overhead      (epoch - floor) / epoch; on a CPU it may be smaller than the noise of either
loop          what lies in the same epochs between an optimiser's step and the next forward, by the clock, less what
              lies there in the floor's: the same overhead without that noise, and without what it does to the model's
              own time

$ python bench/speech.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.speech", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import train_clap
import train_slm
from bench.loops import Clock, Tick, Variant, rounds, rows, start, ways
from bench.report import header, publish
from common import dist
from common.config import UserError, opt, run
from common.flat import Flat
from common.keeper import Progress, Watch, shuffled
from data.manifest import Clip
from data.pairs import MODALITIES, Pairs
from data.resident import Ragged
from model.clap import Clap, ClapConfig
from model.slm import Slm, SlmConfig

CLASSES = 36
SCRIPTS = 0.9  # as many different ones as clips


@dataclass
class Config:
    dim: int = opt(768, "width of both embeddings and of what they are projected to", "--dim")
    slm_rows: int = opt(4096, "clips of an epoch of the SLM", "--slm-rows")
    slm_batch: list[int] = opt([512, 64], "clips of a step of the SLM", "--slm-batch")
    clap_rows: int = opt(32_768, "pairs of an epoch of CLAP", "--clap-rows")
    clap_batch: list[int] = opt([4096, 512], "pairs of a step of CLAP", "--clap-batch")
    repeats: int = opt(5, "rounds", "--repeats")
    num_workers: list[int] = opt([0, 4], "worker processes of the DataLoaders", "--num-workers")
    threads: int = opt(1, "threads of PyTorch", "--threads")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


class Loop:
    """A model and its optimiser, as a script builds them, over data whose answers are `labels` (N,)."""

    def __init__(self, model: Slm | Clap, cfg: Any, data: Pairs, labels: Tensor) -> None:
        self.here, self.cfg, self.data, self.labels = dist.Ranks(device=data.device), cfg, data, labels
        self.model: Any = model.to(data.device).train()
        self.flat = Flat(model)
        self.optimizer = self.flat.adamw(cfg.lr, cfg.weight_decay)
        self.clock = Clock(model, self.optimizer, data.device)
        self.watches = [Watch(cfg.lr)]
        self.steps = len(data) // cfg.batch_size
        self.stop = dist.Stop()
        self.stop.release()

    def train_epoch(self, order: Tensor, tick: Tick) -> list[Tensor]:
        """Losses (1,) of the script's steps over the clips order (1, N)."""
        raise NotImplementedError  # each script has its own loop

    def step_loss(self, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean loss (1,) of a step's clips, and logits (1, B, C) if their answers are counted."""
        raise NotImplementedError  # each script has its own loss

    def after(self) -> None:
        """What the script does after the optimiser's step."""

    def look(self) -> None:
        """The gradient norm that the scripts look at once an epoch where nothing is clipped."""
        if not self.cfg.grad_clip:
            self.flat.clip(0.0)

    def order(self) -> Tensor:
        """The clips (1, N) of an epoch, the same for every variant."""
        return shuffled(len(self.data), [0], 0)[:, : self.steps * self.cfg.batch_size]

    def ours(self, steps: int, tick: Tick = int) -> Tensor:
        """Losses of an epoch, or of its first `steps`."""
        order = self.order()[:, : steps * self.cfg.batch_size].to(self.here.device)
        return torch.cat(self.train_epoch(order, tick))

    def update(self, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and logits of one step on these features."""
        loss, logits = self.step_loss(x, mask, y)
        self.flat.backward(loss)
        if self.cfg.grad_clip:
            self.flat.clip(self.cfg.grad_clip)
        self.optimizer.step()
        self.after()
        return loss.detach(), logits

    def loader(self, loader: DataLoader, steps: int, tick: Tick = int) -> Tensor:
        """The same with batches of a DataLoader."""
        losses: list[Tensor] = []
        right = torch.zeros(1, device=self.here.device)
        for batch in islice(loader, steps):
            batch = {name: x.to(self.here.device, non_blocking=True) for name, x in batch.items()}
            y = batch.pop("label")[None]
            x = {m: value[None, :, None] for m, value in batch.items()}
            mask = {m: value.new_ones(value.shape[:3], dtype=torch.bool) for m, value in x.items()}
            loss, logits = self.update(x, mask, y)
            losses.append(loss)
            if logits is not None:
                right += (logits.argmax(-1) == y).sum(1)
            tick()
        self.look()
        return torch.cat(losses)

    def floor(self, steps: int, tick: Tick = int) -> None:
        """Steps on one batch."""
        index = torch.arange(self.cfg.batch_size, device=self.here.device)[None]
        x, mask = self.data.gather(index)
        y = self.labels[index]
        for _ in range(steps):
            self.update(x, mask, y)
            tick()
        self.look()


class SlmLoop(Loop):
    """Stage 3 on projectors that stay as they are, as the guide trains it."""

    def __init__(self, data: Pairs, batch: int, precision: str = "fp32", lr: float = 0.0) -> None:
        sources = sources_of(data)
        model = Slm(SlmConfig(ClapConfig(proj_dim=sources["text"]["dim"])), sources, CLASSES, [0])
        model.freeze_projectors()
        super().__init__(model, train_slm.Config(batch_size=batch, precision=precision, lr=lr), data, data.label)

    def train_epoch(self, order: Tensor, tick: Tick) -> list[Tensor]:
        return train_slm.train_epoch(
            self.model, self.data, self.cfg, self.here, self.flat, self.optimizer, None, Progress(), self.watches,
            order, 0, self.stop, tick,
        )[1]  # fmt: skip

    def step_loss(self, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = train_slm.step_loss(self.model, x, mask, y, self.cfg)
        return loss / y.shape[1], logits


class ClapLoop(Loop):
    """Stage 2."""

    def __init__(self, data: Pairs, batch: int, precision: str = "fp32", lr: float = 0.0) -> None:
        sources = sources_of(data)
        model = Clap(ClapConfig(proj_dim=sources["text"]["dim"]), sources, [0])
        # the rate of every step is the same, as the other variants have it, and every step is clipped
        cfg = train_clap.Config(
            batch_size=batch, precision=precision, warmup_steps=0, schedule="constant", grad_clip=1e-6, lr=lr
        )
        super().__init__(model, cfg, data, data.script)

    def train_epoch(self, order: Tensor, tick: Tick) -> list[Tensor]:
        return train_clap.train_epoch(
            self.model, self.data, self.cfg, self.here, self.flat, self.optimizer, Progress(), self.watches,
            order, self.cfg.batch_size, 0, self.stop, tick,
        )[1]  # fmt: skip

    def step_loss(self, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor) -> tuple[Tensor, None]:
        return train_clap.step_loss(self.model, x, mask, (y, y), self.cfg), None

    def after(self) -> None:
        self.model.clamp_scale()


class Rows(Dataset):
    """One clip at a time, as most training scripts have it."""

    def __init__(self, data: Pairs, labels: Tensor) -> None:
        self.values = {m: part.values.cpu() for m, part in data.parts.items()}
        self.labels = labels.cpu()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {m: x[i] for m, x in self.values.items()} | {"label": self.labels[i]}


def random_pairs(rows: int, dim: int) -> Pairs:
    """Standardised embeddings without signal, one of sound and one of words a clip."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(rows + 1)[:, None]
    parts = {
        m: Ragged(torch.cat([torch.randn(rows, dim, generator=generator), torch.zeros(1, dim)]), place)
        for m in MODALITIES
    }
    label = torch.randint(CLASSES, (rows,), generator=generator)
    script = torch.randint(max(1, round(SCRIPTS * rows)), (rows,), generator=generator)
    clips = [Clip(str(i)) for i in range(rows)]
    nothing = torch.zeros(rows + 1, 0, dtype=torch.long)
    return Pairs(clips, label, script, parts, nothing, nothing.bool())


def sources_of(data: Pairs) -> dict[str, dict[str, Any]]:
    return {m: {"dim": part.values.shape[1], "kind": "dense", "frames": False} for m, part in data.parts.items()}


def loader(loop: Loop, workers: int) -> DataLoader:
    """The clips of an epoch in its order; the generator is its own, so that dropout draws what it draws in ours."""
    return DataLoader(
        Rows(loop.data, loop.labels), loop.cfg.batch_size, sampler=loop.order()[0].tolist(), num_workers=workers,
        pin_memory=loop.here.device.type == "cuda", persistent_workers=workers > 0, generator=torch.Generator(),
    )  # fmt: skip


def ways_to_train(
    cfg: Config, device: torch.device, precision: str, kind: Callable[[Pairs, int, str], Loop], count: int, batch: int
) -> dict[str, Variant]:  # fmt: skip
    """Those of one model and batch size, on so many clips."""
    start(cfg.threads, device)
    data = random_pairs(count, cfg.dim).to(device)
    loop, peer = (kind(data, batch, precision) for _ in range(2))
    return ways(loop, {"DataLoader": peer}, {n: loader(peer, n) for n in cfg.num_workers})


def main(cfg: Config) -> None:
    device = dist.ranks(cfg.device).device
    what = f"width {cfg.dim}, {cfg.repeats} rounds; median (least to most)"
    start(cfg.threads, device)
    lines = header("bench/speech.py", device, cfg.threads, what)
    sizes = ((SlmLoop, cfg.slm_rows, cfg.slm_batch), (ClapLoop, cfg.clap_rows, cfg.clap_batch))
    for kind, count, batches in sizes:
        for batch in batches:
            if batch > count:
                raise UserError(f"{count} clips are less than a step of {batch}")
            for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
                name = f"{'SLM' if kind is SlmLoop else 'CLAP'}, batch {batch}, {count // batch} steps, {precision}"
                case = cfg, device, precision, kind, count, batch
                lines += rows(name, rounds(cfg.repeats, name, ways_to_train, *case))
    publish(lines, cfg.write)


if __name__ == "__main__":
    run(Config, main)
