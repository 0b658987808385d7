"""Train projectors that bring speech and its words together (stage 2 of the speech pipeline).

$ python train_clap.py --fast
$ python train_clap.py --data-root datasets/LAION
$ torchrun --nproc-per-node 2 train_clap.py --data-root datasets/LAION --batch-size 2048
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoint, config, dist
from common.config import UserError, opt
from common.flat import Flat, set_lrs
from common.keeper import Keeper, Progress, Rule, Watch, shuffled
from common.log import Logger, curves_png
from common.optim import OptimConfig, lr_at
from common.run import open_run, resume_or_start
from data.mock_speech import make_mock
from data.pairs import SPLITS, Pairs, PairsConfig, find_data, load, open_stores, read_clips, sources
from evals import retrieval
from model import clap
from model.clap import MODALITIES, Clap, ClapConfig, info_nce

PLACES = ("datasets/LAION",)  # where the guide has it
FAST = {"batch_size": 400, "epochs": 30, "warmup_steps": 20, "model.proj_dim": 256, "lr": 3e-3}


@dataclass
class Config:
    model: ClapConfig = field(default_factory=ClapConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    shuffle_labels: bool = opt(False, "control: train on words dealt out to voices at random", "--shuffle-labels")
    lr: float = opt(1e-3, "learning rate", "--lr")
    min_lr: float = opt(1e-6, "learning rate at the end of the cosine", "--min-lr")
    warmup_steps: int = opt(200, "steps of linear warm-up", "--warmup-steps")
    schedule: str = opt("cosine", "shape after the warm-up", "--schedule", choices=("cosine", "constant"))
    weight_decay: float = opt(0.01, "AdamW decay of matrices", "--weight-decay")
    grad_clip: float = opt(1.0, "largest gradient norm of a seed; 0: no clipping", "--grad-clip")
    epochs: int = opt(20, "epochs in all", "--epochs")
    batch_size: int = opt(4096, "pairs a process and step; a last batch that is smaller is left out", "--batch-size")
    patience: int = opt(0, "epochs without a better --metric before a seed stops; 0: never", "--patience")
    metric: str = opt(
        "r1", "valid score that chooses the best epoch: R@1 of both ways, or loss; none: the last epoch counts",
        "--metric", choices=("r1", "loss", "none"),
    )  # fmt: skip
    seed: int = opt(17, "first seed", "--seed")
    seeds: int = opt(1, "seeds trained side by side", "--seeds")
    precision: str = opt("fp32", "arithmetic; fp32 on a CPU", "--precision", choices=("fp32", "bf16"))
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    num_workers: int = opt(0, "not used: the data set lies in memory", "--num-workers")
    log_every: int = opt(1, "epochs between log lines", "--log-every")
    save_every: int = opt(1, "epochs between checkpoints; the best and the last are always kept", "--save-every")
    test: bool = opt(True, "read the test split once, after training", "--test")
    keep: int = opt(0, "newest checkpoints to keep besides best; 0: all", "--keep")
    ckpt: str | None = opt(None, "start from these projectors; published and exported files work", "--ckpt")
    out: str | None = opt(None, "run folder; default: out/<config name>", "--out")
    resume: str | None = opt(None, "go on from the run's last checkpoint, or from PATH", "--resume", bare="last")
    overwrite: bool = opt(False, "replace the run in --out", "--overwrite")
    fast: bool = opt(False, "a small run; without a data set, on a synthetic one", "--fast")


def main(cfg: Config) -> None:  # noqa: C901 (the whole run, in the order in which it happens)
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if min(cfg.seeds, cfg.epochs) < 1 or cfg.batch_size < 2 or cfg.seed < 0:
        raise UserError("--seeds and --epochs are at least 1, --batch-size at least 2, --seed at least 0")
    if cfg.fast:
        torch.set_num_threads(1)  # its matrices are too small for more threads to pay
        cfg = config.preset(cfg, {"out": "out/clap_fast", "overwrite": not cfg.resume} | FAST)
    cfg, start = resume_or_start(cfg, "clap", say)
    out = Path(str(cfg.out))
    dist.connect(here)
    dist.main_first(here, lambda: find_data(cfg.data, PLACES, cfg.fast, partial(make_mock, out / "mock", "lines"), say))
    cfg.data = dist.broadcast(cfg.data)

    # ---- data and model
    clips, stores = read_clips(cfg.data, say), open_stores(cfg.data)
    if lacking := [m for m in MODALITIES if m not in stores]:
        raise UserError(f"{cfg.data.data_root}: no store {lacking[0]}/: projectors need sound and words (--stores)")
    splits = {name: load(part, stores, [], cfg.data) for name, part in clips.items()}
    for name, part in splits.items():
        if gone := part.lacking():
            say(f"{name}: {gone}: left out")
    splits = {name: part.complete() for name, part in splits.items()}
    train = splits["train"]
    if len(train) < 2 * here.world:
        raise UserError(
            f"{cfg.data.data_root}: {len(train)} pairs of sound and words to train on, at least 2 a process"
        )
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    model = Clap(cfg.model, sources(stores, train.parts), seeds)
    if start is not None:
        say(f"resumed from {start}: {checkpoint.load_model(model, start)}")
    elif cfg.ckpt:
        say(f"weights of {cfg.ckpt}: {load_weights(model, cfg.ckpt)}")
    else:
        for m, part in train.parts.items():
            model.learn_statistics(m, part.values, part.rows)
    for part in splits.values():
        part.standardize(model.dense, model.standardize)
    if cfg.shuffle_labels:
        train.deal_words(cfg.seed)
    splits = {name: part.to(here.device) for name, part in splits.items()}
    train, valid, test = (splits[name] for name in SPLITS)
    model.to(here.device)
    say(", ".join(f"{len(part)} {name}" for name, part in splits.items()) + " clips, "
        f"{train.nbytes / 2**20:.0f} MiB to train on; {sum(p[0].numel() for p in model.parameters()):,} parameters x "
        f"{len(seeds)} seeds")  # fmt: skip
    a_step = min(cfg.batch_size, len(train) // here.world)
    iters = len(train) // (a_step * here.world)
    total = cfg.epochs * iters

    # ---- one row of flat.values is one seed's projectors
    dist.keep_memory(here.device)
    flat = Flat(model)
    optimizer = flat.adamw(cfg.lr, cfg.weight_decay)
    keeper = Keeper(out, model, flat, optimizer, here, [cfg.lr] * len(seeds), cfg.keep)
    if start is not None:
        keeper.restore(start, say)
    progress, watches = keeper.progress, keeper.watches
    rule = Rule(cfg.metric if len(valid) else "none", cfg.patience)
    keeper.facts |= {
        "system": "clap", "config": config.to_dict(cfg), "sources": model.sources, "seeds": seeds,
        "features": {m: store.info for m, store in stores.items()},
    }  # fmt: skip
    lock = dist.main_first(here, partial(open_run, cfg, out, start))
    stop = dist.Stop()
    log = Logger(out, here.main)
    log.truncate(progress.step)
    say(f"{a_step} pairs x {here.world} processes = {a_step * here.world} a step, {iters} steps an epoch")

    # ---- training: one pass of the outer loop is one epoch of all seeds
    model.train()
    bar = log.bar(total, progress.step, "train")
    stopping = False
    while progress.epoch < cfg.epochs and not all(watch.stopped for watch in watches):
        began, done = time.perf_counter(), keeper.begin(cfg.seed, iters)
        order = shuffled(len(train), seeds, progress.epoch).to(here.device)
        order = order[:, : iters * a_step * here.world]  # a short step would have fewer clips to tell apart
        stopping, losses, norm = train_epoch(
            model, train, cfg, here, flat, optimizer, progress, watches, order, a_step, done, stop, bar.update
        )
        if stopping:
            break
        progress.epoch += 1

        # ---- the epoch's numbers: the only place where the device is waited for
        stacked = torch.stack(losses)  # (S, K), this rank's part of each
        used = partial(train.ids, order[0].split(a_step * here.world))
        keeper.check_finite(stacked, norm, done, used, "or look for wrong embeddings")
        loss = dist.all_sum(float(stacked.mean()), device=here.device)[0]
        scores = retrieval.score(retrieval.embed(model, valid), valid.script) if len(valid) else [{}] * len(seeds)
        losses_ = valid_losses(model, valid, a_step * here.world) if len(valid) else [loss] * len(seeds)
        scores = [{"loss": one, "r1": 0.0} | each for one, each in zip(losses_, scores, strict=True)]
        mean = {name: sum(s[name] for s in scores) / len(seeds) for name in scores[0]}
        numbers = {
            "Train/Loss": loss, "Learning_Rate": optimizer.param_groups[0]["lr"],
            "Gradient_Norm": float(norm.mean()), "Scale": float(model.logit_scale.detach().exp().mean()),
            "Val/Loss": mean["loss"], "Val/R1": mean["r1"],
        }  # fmt: skip
        progress.history.append({"step": progress.step, "epoch": progress.epoch, **numbers})
        improved = keeper.note(rule, scores, flat.values)
        finished = progress.epoch == cfg.epochs or all(watch.stopped for watch in watches)
        if progress.epoch % cfg.save_every == 0 or finished:
            keeper.save(f"epoch_{progress.epoch:03d}")
        if progress.epoch % cfg.log_every == 0 or finished:
            log.record(progress.step, epoch=progress.epoch, seconds=time.perf_counter() - began, **numbers)
            log.say(f"epoch {progress.epoch:>3}/{cfg.epochs}  train loss {loss:.4f}  valid loss "
                    f"{mean['loss']:.4f} r1 {mean['r1']:.4f}  scale {numbers['Scale']:.1f}  lr "
                    f"{numbers['Learning_Rate']:.2g} {'*' * bool(improved)}")  # fmt: skip
    bar.close()

    # ---- the end, or a stop asked for
    if stopping:
        keeper.save(f"step_{progress.step:06d}")
        say(f"stopped after step {progress.step} of {total}; go on with the same command and --resume")
    else:
        stop.release()
        flat.values.copy_(keeper.best)
        results = keeper.results()
        if here.main and cfg.test and len(test):
            results["test"] = found = retrieval.report(model, test, "test")
            say(retrieval.table(found))
        if here.main:
            curves_png(progress.history, out / "curves.png", ("Loss", "R1"))
            (out / "results.json").write_text(json.dumps(results, indent=1))
        say(f"finished: {out / 'checkpoints'}, best epoch {', '.join(str(watch.epoch) for watch in watches)}")
    log.close()
    if lock:
        lock.release()
    dist.cleanup()


def train_epoch(
    model: Clap, train: Pairs, cfg: Config, here: dist.Ranks, flat: Flat, optimizer: torch.optim.Optimizer,
    progress: Progress, watches: Sequence[Watch], order: Tensor, a_step: int, done: int, stop: dist.Stop,
    tick: Callable[[], Any],
) -> tuple[bool, list[Tensor], Tensor]:  # fmt: skip
    """The steps of an epoch from `done` on, of the clips order (K, N), a_step of them on each rank.

    Returns whether a stop was asked for, this rank's part (K,) of each step's loss, and the last gradient norm (K,).
    """
    shape = "linear_warmup_cosine" if cfg.schedule == "cosine" else "constant_with_warmup"
    schedule = OptimConfig(
        lr=cfg.lr, min_lr=cfg.min_lr, warmup_lr=0.0, warmup_steps=cfg.warmup_steps, schedule=shape
    )  # fmt: skip
    steps = order.shape[1] // (a_step * here.world)
    order = order[:, done * a_step * here.world :]
    scripts = train.script[order].split(a_step * here.world, 1)
    batches = train.batches(order[:, here.rank :: here.world], a_step, steps - done, here.device)
    losses: list[Tensor] = []
    norm = flat.grads.new_zeros(len(watches))
    for script, (x, mask) in zip(scripts, batches, strict=True):
        if stop.asked(here):
            return True, losses, norm
        shares = [script[:, rank :: here.world] for rank in range(here.world)]
        part = step_loss(model, x, mask, (shares[here.rank], torch.cat(shares, 1)), cfg)
        flat.backward(part)
        if here.world > 1:
            torch.distributed.all_reduce(flat.grads)
        norm = flat.clip(cfg.grad_clip)
        lr = lr_at(progress.step, cfg.epochs * steps, schedule)
        set_lrs(optimizer, [0.0 if watch.stopped else lr for watch in watches])
        optimizer.step()
        model.clamp_scale()
        losses.append(part.detach())
        progress.step += 1
        tick()
    return False, losses, norm


def step_loss(
    model: Clap, x: dict[str, Tensor], mask: dict[str, Tensor], scripts: tuple[Tensor, Tensor], cfg: Config
) -> Tensor:
    """This rank's part (K,) of the contrastive loss of a step; scripts of its clips (K, b) and of all ranks' (K, B)."""
    device = model.logit_scale.device.type
    with torch.autocast(device, torch.bfloat16, enabled=cfg.precision == "bf16" and device == "cuda"):
        z = model(x, mask)
    own = {m: vectors.float() for m, vectors in z.items()}
    every = {m: dist.gather_rows(vectors) for m, vectors in own.items()}
    return info_nce(own, every, scripts, model.logit_scale.exp())


@torch.inference_mode()
def valid_losses(model: Clap, valid: Pairs, batch: int) -> list[float]:
    """Each seed's contrastive loss over batches of the size that is trained with."""
    z = retrieval.embed(model, valid)
    total = model.logit_scale.new_zeros(len(model.logit_scale))
    for rows in torch.arange(len(valid), device=valid.device).split(batch):
        part = {m: vectors[:, rows] for m, vectors in z.items()}
        script = valid.script[rows].expand(len(total), -1)
        total += info_nce(part, part, (script, script), model.logit_scale.exp()) * len(rows)
    return (total / len(valid)).tolist()


def load_weights(model: Clap, path: str) -> str:
    """Projectors of a checkpoint, or of the published files; returns what was loaded."""
    if path.endswith(clap.FILES):
        return clap.load_original(model, path)
    return checkpoint.load_model(model, checkpoint.resolve(path, prefer="best"))


if __name__ == "__main__":
    config.run(Config, main)
