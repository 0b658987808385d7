"""Speed of train_mosei.py's loop beside a DataLoader's, of seeds side by side, and of opening data; all in one run.

Random features of CMU-MOSEI's size (16,326 rows, 768 + 768 + 25), the guide's network (mlp) and for seeds side by side
also the default one (xfuse), seven classes. The variants take turns, each for a 32nd of its epoch (whole ones with
worker processes). Each round is a process of its own and gives one value of every number; the tables have the medians.
All train at a rate of 0, with the work of any other: one batch that is learnt by heart has gradients too small to be
clipped.

ours          an epoch by train_mosei.py's own train_epoch
DataLoader    the same steps on batches of a Dataset of one dict of tensors a row and the default collate
plain PyTorch the same from nn.Linear, torch's own AdamW and clip_grad_norm_, with the guide's loss.item() in every step
floor         forward, loss, backward, clipping and AdamW on one batch that never changes: no data path can beat it
overhead      (epoch - floor) / epoch; on a CPU it may be smaller than the noise of either
loop          what lies in the same epochs between an optimiser's step and the next forward, by the clock, less what
              lies there in the floor's: the same overhead without that noise, and without what it does to the model's
              own time

$ python bench/mosei.py
"""

import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.mosei", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import train_mosei
from bench.loops import Clock, Loading, Tick, Variant, rounds, rows, start, ways
from bench.report import apart, header, memory, publish, spread, table, turns
from common import dist
from common.config import opt, run
from common.flat import Flat
from common.keeper import Progress, shuffled
from data import unpickle
from data.manifest import Clip
from data.mosei import open_corpus
from data.utterances import Utterances, load_splits
from model.fusion import Fusion, FusionConfig, known

DIMS = {"text": 768, "audio": 768, "video": 25}
SEQUENCES = {"text": (768, np.float32), "audio": (74, np.float64), "vision": (35, np.float64)}  # MMSA's aligned_50
FRAMES = 50


@dataclass
class Config:
    rows: int = opt(16_326, "utterances of an epoch", "--rows")
    pickle_rows: int = opt(4_000, "utterances of the pickle; 0 leaves that part out", "--pickle-rows")
    repeats: int = opt(7, "rounds; of files a third as many", "--repeats")
    num_workers: list[int] = opt([0, 4], "worker processes of the DataLoaders", "--num-workers")
    threads: int = opt(1, "threads of PyTorch", "--threads")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


class Loop:
    """A task and its optimiser, as train_mosei.py builds them."""

    def __init__(
        self,
        data: Utterances,
        batch: int,
        seeds: int,
        device: torch.device,
        precision: str = "fp32",
        model: str = "mlp",
        lr: float = 0.0,
    ) -> None:
        self.cfg = train_mosei.Config(
            model=FusionConfig(model=model), batch_size=batch, precision=precision, grad_clip=1e-6, lr=lr
        )
        self.here, self.seeds = dist.Ranks(device=device), seeds
        fusion = Fusion(self.cfg.model, DIMS, dict.fromkeys(DIMS, 1), range(seeds)).to(device).train()
        units = torch.arange(len(data), device=device)[:, None]
        target = data.targets("7", "half_even")
        self.task = train_mosei.Task({"train": data}, fusion, target, None, units, batch, 0, True)
        self.flat = Flat(fusion)
        self.optimizer = self.flat.adamw(self.cfg.lr, self.cfg.weight_decay)
        self.clock = Clock(fusion.core, self.optimizer, device)
        self.steps = math.ceil(len(data) / batch)
        self.stop = dist.Stop()
        self.stop.release()

    def ours(self, steps: int, tick: Tick = int) -> None:
        """An epoch, or its first `steps`."""
        order = shuffled(len(self.task.units), list(range(self.seeds)), 0).to(self.here.device)
        losses = train_mosei.train_epoch(
            self.task, self.cfg, self.here, self.flat, self.optimizer, Progress(),
            order[:, : steps * self.task.a_step], 0, self.steps, [self.cfg.lr] * self.seeds, self.stop, tick,
        )[1]  # fmt: skip
        torch.stack(losses).sum().item()

    def update(self, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of one step on these frames."""
        logits, loss, objective = train_mosei.step_loss(self.task, x, mask, y, y, rows, self.cfg)
        self.flat.backward(objective)
        self.flat.clip(self.cfg.grad_clip)
        self.optimizer.step()
        return logits.detach(), loss.detach()

    def loader(self, loader: DataLoader, steps: int, tick: Tick = int) -> None:
        """The same with batches of a DataLoader."""
        losses, outputs = [], []
        for batch in islice(loader, steps):
            batch = {name: x.to(self.here.device, non_blocking=True) for name, x in batch.items()}
            y = batch.pop("label")[None]
            x = {m: value[None, :, None] for m, value in batch.items()}
            mask = {m: value.new_ones(value.shape[:3], dtype=torch.bool) for m, value in x.items()}
            logits, loss = self.update(x, mask, y, known(y).sum(1).clamp_min(1))
            losses.append(loss)
            outputs.append((logits, y))
            tick()
        torch.stack(losses).sum().item()

    def floor(self, steps: int, tick: Tick = int) -> None:
        """Steps on one batch."""
        train = self.task.splits["train"]
        index = (torch.arange(self.task.a_step, device=self.here.device) % len(train)).expand(self.seeds, -1)
        x, mask = train.gather(index)
        y = self.task.target[index]
        rows = known(y).sum(1)
        loss = torch.zeros(())
        for _ in range(min(steps, self.steps)):
            loss = self.update(x, mask, y, rows)[1]
            tick()
        loss.sum().item()


class Plain:
    """The same network from torch's own layers, optimiser and clipping, its loss looked at in every step."""

    def __init__(self, rows: int, batch: int, device: torch.device) -> None:
        self.model = nn.Sequential(
            nn.Linear(sum(DIMS.values()), 256), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.195), nn.Linear(128, 7),
        ).to(device)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.0, weight_decay=train_mosei.Config().weight_decay)
        self.clock, self.steps, self.device = Clock(self.model, self.optimizer, device), math.ceil(rows / batch), device

    def loader(self, loader: DataLoader, steps: int, tick: Tick = int) -> float:
        total = 0.0
        for batch in islice(loader, steps):
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            y = batch.pop("label")
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(torch.cat(list(batch.values()), -1)), y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e-6)
            self.optimizer.step()
            total += loss.item()
            tick()
        return total


class Rows(Dataset):
    """One utterance at a time, as most training scripts have it."""

    def __init__(self, data: Utterances) -> None:
        self.values = {m: x.cpu() for m, x in data.values.items()}
        self.target = data.targets("7", "half_even").cpu()

    def __len__(self) -> int:
        return len(self.target) - 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {m: x[i] for m, x in self.values.items()} | {"label": self.target[i]}


def random_utterances(rows: int) -> Utterances:
    """Standardised features without signal, one frame of each modality an utterance."""
    generator = torch.Generator().manual_seed(0)
    values = {
        m: torch.cat([torch.randn(rows, dim, generator=generator), torch.zeros(1, dim)]) for m, dim in DIMS.items()
    }
    frames = torch.arange(rows + 1)[:, None]
    score = torch.randint(-3, 4, (rows,), generator=generator).float()
    members = torch.arange(rows)[:, None]
    clips = [Clip(str(i)) for i in range(rows)]
    places = dict.fromkeys(DIMS, frames)
    return Utterances(clips, "score", score, torch.full((rows, 6), torch.nan), values, places, members)


def ways_to_train(cfg: Config, device: torch.device, precision: str, batch: int) -> dict[str, Variant]:
    start(cfg.threads, device)
    data = random_utterances(cfg.rows)
    loop, peer = (Loop(data.to(device), batch, 1, device, precision) for _ in range(2))
    loaders = {
        n: DataLoader(
            Rows(data), batch, shuffle=True, num_workers=n, pin_memory=device.type == "cuda", persistent_workers=n > 0
        )
        for n in cfg.num_workers
    }  # fmt: skip
    peers: dict[str, Loading] = {"DataLoader": peer}
    if precision == "fp32":
        peers["plain PyTorch, DataLoader"] = Plain(len(data), batch, device)
    return ways(loop, peers, loaders)


def seeds_together(cfg: Config, device: torch.device, precision: str, model: str) -> dict[str, Variant]:
    start(cfg.threads, device)
    data = random_utterances(cfg.rows).to(device)
    loops = {f"{k} seed{'s' * (k > 1)}": Loop(data, 16, k, device, precision, model) for k in (1, 5)}
    # enough steps for a steady time: xfuse takes several times longer
    return {name: Variant(loop.clock, loop.ours, min(loop.steps, 200)) for name, loop in loops.items()}


def training(cfg: Config, device: torch.device, precision: str) -> list[str]:
    """Lines of the tables of ways to train, and of seeds side by side."""
    lines: list[str] = []
    for batch in (16, 512):
        name = f"mlp, batch {batch}, {math.ceil(cfg.rows / batch)} steps, {precision}"
        lines += rows(name, rounds(cfg.repeats, name, ways_to_train, cfg, device, precision, batch))
    for name in ("mlp", "xfuse"):
        times = rounds(cfg.repeats, f"{name}, seeds together", seeds_together, cfg, device, precision, name)
        found = {k: [whole for whole, _ in each] for k, each in times.items()}
        ratio = [5 * one / five for one, five in zip(*found.values(), strict=True)]
        lines += table(f"{name}, batch 16, {precision}", [
            *((f"{k}: ms a step", spread(each)) for k, each in found.items()),
            ("5 x one seed, times 5 seeds at once", spread(ratio)),
        ])  # fmt: skip
    return lines


# --- opening data -----------------------------------------------------------------------------------------------------


def write_pickle(path: Path, rows: int) -> None:
    """A pickle laid out like MMSA's aligned_50.pkl: random, 5 to 50 frames an utterance, zeros after them."""
    rng = np.random.default_rng(0)
    corpus = {}
    for split, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        n = round(rows * share)
        there = np.arange(FRAMES) < rng.integers(5, FRAMES + 1, n)[:, None]
        part: dict[str, Any] = {
            name: rng.standard_normal((n, FRAMES, dim), np.float32).astype(kind) * there[..., None].astype(kind)
            for name, (dim, kind) in SEQUENCES.items()
        }
        part["text_bert"] = np.stack([there * 100, there, there * 0], 1).astype(np.int64)
        part["id"] = [f"{split}{i // 5}$_${i % 5}" for i in range(n)]
        part["raw_text"] = np.array([f"words {i}" for i in range(n)])
        part["regression_labels"] = rng.uniform(-3, 3, n)
        corpus[split] = part
    with path.open("wb") as file:
        pickle.dump(corpus, file, protocol=4)


def load_pickle(path: Path) -> None:
    with path.open("rb") as file:
        pickle.load(file)  # the peer being timed, on a file that write_pickle made a moment ago


def load_as_mmsa(path: Path) -> list[np.ndarray]:
    """What MMSA keeps of the file: every split from a reading of its own, its features as float32."""
    kept = []
    for split in ("train", "valid", "test"):
        with path.open("rb") as file:
            part = pickle.load(file)[split]  # the same file, made here
        kept += [part[name].astype(np.float32) for name in (*SEQUENCES, "text_bert")]
    return kept


def load_store(path: Path) -> None:
    load_splits(path, {}, 0.1, 0, 500, lambda _: None)


def convert(path: Path) -> None:
    open_corpus(path, lambda _: None)


def measured(load: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """ms that load(path) takes and MiB that memory grows at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, began = memory("VmRSS"), time.perf_counter()
    load(path)
    return 1000 * (time.perf_counter() - began), memory("VmHWM") - before


def opening(cfg: Config) -> list[tuple[str, str]]:
    """Rows of the table: a pickle read whole, by ours and by the standard library, and its converted form."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "aligned_50.pkl")
        write_pickle(path, cfg.pickle_rows)
        size = path.stat().st_size / 2**20
        once = apart(measured, convert, path)
        loads = {
            "pickle.load": (load_pickle, path),
            "data.unpickle.load": (unpickle.load, path),
            "MMSA's three readings": (load_as_mmsa, path),
            "converted store, ready to train": (load_store, Path(f"{path}.store")),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
        for name in turns(loads, max(1, cfg.repeats // 3), "opening data"):
            found[name].append(apart(measured, *loads[name]))
    lines = [(f"pickle of {cfg.pickle_rows:,} x {FRAMES}: MiB", f"{size:.0f}"),
              ("converting it, once: ms; peak MiB", f"{once[0]:.0f}; {once[1]:.0f}")]  # fmt: skip
    for name, values in found.items():
        ms, peak = ([value[i] for value in values] for i in range(2))
        lines.append((f"{name}: ms; peak MiB", f"{spread(ms)}; {median(peak):.0f}"))
    for name in list(loads)[:3]:
        both = list(zip(found[name], found["converted store, ready to train"], strict=True))
        time_ratio, memory_ratio = (spread([x[i] / y[i] for x, y in both]) for i in range(2))
        lines.append((f"{name}, times converted store: time; peak", f"{time_ratio}; {memory_ratio}"))
    return lines


# --- the report -------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    device = dist.ranks(cfg.device).device
    what = f"{cfg.rows:,} rows, {cfg.repeats} rounds; median (least to most)"
    start(cfg.threads, device)
    lines = header("bench/mosei.py", device, cfg.threads, what)
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
        lines += training(cfg, device, precision)
    if cfg.pickle_rows:
        lines += table("opening data", opening(cfg))
    publish(lines, cfg.write)


if __name__ == "__main__":
    run(Config, main)
