"""Train the emotion classifier over projected speech and words (stage 3 of the speech pipeline, "SLM").

$ python train_slm.py --fast
$ python train_slm.py --num-emotions 36 --data-root datasets/LAION --clap-ckpt out/clap --epochs 50
$ python train_slm.py --cfg configs/ravdess_slm.yaml --fold 1
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import checkpoint, config, dist
from common.config import UserError, opt
from common.flat import Flat, set_lrs
from common.keeper import Keeper, Progress, Rule, Watch, shuffled
from common.log import Logger, curves_png
from common.optim import OptimConfig, lr_at
from common.run import fast_run, open_run, resume_or_start
from data.features import Store
from data.mock_speech import make_mock
from data.pairs import SPLITS, Pairs, PairsConfig, classes, find_data, find_root, load, open_stores, read_clips, sources
from data.resident import cut
from evals import speech
from model import clap, slm
from model.clap import Clap
from model.slm import Slm, SlmConfig

PLACES = ("datasets/LAION",)  # where the guide has it
FAST = {
    "batch_size": 64, "epochs": 12, "lr": 5e-4, "model.hidden_dim": 256, "model.modality_dropout": 0.4,
    "model.dropout": 0.5, "weight_decay": 0.05,
}  # fmt: skip


@dataclass
class Config:
    model: SlmConfig = field(default_factory=SlmConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    num_emotions: int | None = opt(
        None, "classes that the data must have; default: as many as they have", "--num-emotions"
    )
    clap_ckpt: str | None = opt(
        None, "projectors of train_clap.py, exported or published, which then stay as they are; none: they learn too",
        "--clap-ckpt",
    )  # fmt: skip
    shuffle_labels: bool = opt(False, "control: train on labels dealt out at random", "--shuffle-labels")
    label_smoothing: float = opt(0.0, "share of a target spread over all classes", "--label-smoothing", share=True)
    ema: float = opt(0.0, "decay of averaged weights, which are then scored and kept as best; 0: none", "--ema")
    lr: float = opt(1e-4, "learning rate", "--lr")
    min_lr: float = opt(1e-6, "learning rate at the end of a cosine", "--min-lr")
    warmup_steps: int = opt(0, "steps of linear warm-up", "--warmup-steps")
    schedule_epochs: int = opt(
        0, "epochs of a cosine to min-lr, however many this run has; 0: the rate stays", "--schedule-epochs"
    )
    weight_decay: float = opt(0.01, "AdamW decay of matrices", "--weight-decay")
    direct_decay: float | None = opt(
        None,
        "decay of the linear path beside the network, and of hashed words; default: weight-decay",
        "--direct-decay",
    )
    grad_clip: float = opt(0.0, "largest gradient norm of a seed; 0: no clipping", "--grad-clip")
    epochs: int = opt(50, "epochs in all", "--epochs")
    batch_size: int = opt(512, "clips a process and step", "--batch-size")
    patience: int = opt(0, "epochs without a better --metric before a seed stops; 0: never", "--patience")
    metric: str = opt(
        "accuracy", "valid score that chooses the best epoch; none: the last epoch counts", "--metric",
        choices=("accuracy", "weighted_f1", "uar", "loss", "none"),
    )  # fmt: skip
    seed: int = opt(17, "first seed", "--seed")
    seeds: int = opt(1, "seeds trained side by side", "--seeds")
    precision: str = opt("fp32", "arithmetic; fp32 on a CPU", "--precision", choices=("fp32", "bf16"))
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    resident: str = opt("auto", "data held on the device", "--resident", choices=("auto", "yes", "no"))
    num_workers: int = opt(0, "not used: the data set lies in memory", "--num-workers")
    log_every: int = opt(1, "epochs between log lines", "--log-every")
    save_every: int = opt(10, "epochs between checkpoints; the best and the last are always kept", "--save-every")
    test: bool = opt(True, "read the test split once, after training", "--test")
    keep: int = opt(0, "newest checkpoints to keep besides best; 0: all", "--keep")
    ckpt: str | None = opt(None, "start from these weights; published checkpoints of stage 3 work", "--ckpt")
    out: str | None = opt(None, "run folder; default: out/<config name>", "--out")
    resume: str | None = opt(None, "go on from the run's last checkpoint, or from PATH", "--resume", bare="last")
    overwrite: bool = opt(False, "replace the run in --out", "--overwrite")
    fast: bool = opt(False, "a small run; without a data set, on a synthetic one", "--fast")


def main(cfg: Config) -> None:  # noqa: C901 (the whole run, in the order in which it happens)
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if min(cfg.seeds, cfg.epochs, cfg.batch_size) < 1 or cfg.seed < 0:
        raise UserError("--seeds, --epochs and --batch-size are at least 1, --seed at least 0")
    if cfg.fast:
        torch.set_num_threads(1)  # its matrices are too small for more threads to pay
        made = not (cfg.data.data_root or cfg.data.manifest or find_root(PLACES))
        before = {"clap_ckpt": "out/clap_fast"} if fast_run("out/clap_fast", made) else {}
        cfg = config.preset(cfg, {"out": "out/slm_fast", "overwrite": not cfg.resume} | before | FAST)
    cfg, start = resume_or_start(cfg, "slm", say)
    out = Path(str(cfg.out))
    dist.connect(here)
    dist.main_first(here, lambda: find_data(cfg.data, PLACES, cfg.fast, partial(make_mock, out / "mock", "lines"), say))
    cfg.data = dist.broadcast(cfg.data)

    # ---- data and model
    clips, stores = read_clips(cfg.data, say), open_stores(cfg.data)
    labels = classes(clips)
    if cfg.num_emotions not in (None, len(labels)):
        raise UserError(f"--num-emotions {cfg.num_emotions}: the data have {len(labels)} classes: {', '.join(labels)}")
    splits = {name: load(part, stores, labels, cfg.data) for name, part in clips.items()}
    splits["train"] = splits["train"].labelled()
    for name, part in splits.items():
        if gone := part.lacking():
            say(f"{name}: {gone}")
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    model = build(cfg, splits["train"], stores, len(labels), seeds, start, say)
    for part in splits.values():
        part.standardize(model.clap.dense, model.clap.standardize)
    if cfg.shuffle_labels:
        splits["train"].deal_labels(cfg.seed)
    size = sum(part.nbytes for part in splits.values())
    resident = here.device.type == "cpu" or cfg.resident == "yes" or (cfg.resident == "auto" and dist.fits(size, here))
    splits = {name: part.to(here.device) if resident else part for name, part in splits.items()}
    train, valid, test = (splits[name] for name in SPLITS)
    model.to(here.device)

    # ---- one row of flat.values is one seed's model
    dist.keep_memory(here.device)
    flat = Flat(model)
    optimizer = flat.adamw(cfg.lr, cfg.weight_decay, cfg.direct_decay)
    keeper = Keeper(out, model, flat, optimizer, here, [cfg.lr] * len(seeds), cfg.keep)
    ema = flat.values.clone() if cfg.ema else None
    if ema is not None:
        keeper.extra["ema"] = ema
    if start is not None:
        keeper.restore(start, say)
    progress, watches = keeper.progress, keeper.watches
    rule = Rule(cfg.metric if len(valid) else "none", cfg.patience)
    keeper.facts |= {
        "system": "slm", "config": config.to_dict(cfg), "sources": model.clap.sources, "labels": labels, "seeds": seeds,
        "frozen": model.frozen, "features": {m: store.info for m, store in stores.items()},
    }  # fmt: skip
    lock = dist.main_first(here, partial(open_run, cfg, out, start))
    stop = dist.Stop()
    log = Logger(out, here.main)
    log.truncate(progress.step)
    a_step = cfg.batch_size * here.world
    iters = math.ceil(len(train) / a_step)
    total = cfg.epochs * iters
    count = sum(p[0].numel() for p in model.parameters() if p.requires_grad)
    counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    say(f"{counts} clips of {len(labels)} classes; {count:,} parameters x {len(seeds)} seeds; {a_step} clips a step "
        f"({here.world} processes), {iters} steps an epoch; data {'on' if resident else 'beside'} {here.device}, "
        f"{size / 2**20:.0f} MiB")  # fmt: skip

    # ---- training: one pass of the outer loop is one epoch of all seeds
    model.train()
    bar = log.bar(total, progress.step, "train")
    stopping = False
    while progress.epoch < cfg.epochs and not all(watch.stopped for watch in watches):
        began, done = time.perf_counter(), keeper.begin(cfg.seed, iters)
        order = shuffled(len(train), seeds, progress.epoch).to(train.device)
        stopping, losses, right, norm = train_epoch(
            model, train, cfg, here, flat, optimizer, ema, progress, watches, order, done, stop, bar.update
        )
        if stopping:
            break
        progress.epoch += 1

        # ---- the epoch's numbers: the only place where the device is waited for
        stacked = torch.stack(losses)  # (S, K), this rank's part of each
        keeper.check_finite(
            stacked, norm, done, partial(train.ids, order[0].split(a_step)), "or look for wrong features"
        )
        loss, hits = dist.all_sum(float(stacked.mean()), float(right.mean()), device=here.device)
        with flat.holding(ema):
            found = speech.evaluate(model, speech.views(valid), labels, len(seeds)) if len(valid) else {}
        scores = next(iter(found.values())) if found else [{"loss": loss}] * len(seeds)
        mean = {way: speech.summary(part) for way, part in found.items()}
        numbers = {"Train/Loss": loss, "Train/Accuracy": hits / len(order[0][done * a_step :]),
                   "Learning_Rate": optimizer.param_groups[0]["lr"], "Gradient_Norm": float(norm.mean())}  # fmt: skip
        for i, (way, part) in enumerate(mean.items()):
            names = (
                {"Loss": "loss", "Accuracy": "accuracy", "F1": "weighted_f1"} if i == 0 else {"Accuracy": "accuracy"}
            )
            numbers |= {f"Val/{way} {n}" if i else f"Val/{n}": part[key]["mean"] for n, key in names.items()}
        progress.history.append({"step": progress.step, "epoch": progress.epoch, **numbers})
        improved = keeper.note(rule, scores, flat.values if ema is None else ema)
        finished = progress.epoch == cfg.epochs or all(watch.stopped for watch in watches)
        if progress.epoch % cfg.save_every == 0 or finished:
            keeper.save(f"epoch_{progress.epoch:03d}")
        if progress.epoch % cfg.log_every == 0 or finished:
            log.record(progress.step, epoch=progress.epoch, seconds=time.perf_counter() - began, **numbers)
            said = "  ".join(f"{way} {part['accuracy']['mean']:.4f}" for way, part in mean.items())
            log.say(f"epoch {progress.epoch:>3}/{cfg.epochs}  train loss {loss:.4f} acc {numbers['Train/Accuracy']:.4f}"
                    + (f"  valid loss {numbers['Val/Loss']:.4f} acc: {said}" if mean else "")
                    + f"  lr {numbers['Learning_Rate']:.2g} {'*' * bool(improved and found)}")  # fmt: skip
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
            note = "sound standardised by all clips of its speaker" if cfg.data.speaker_norm else ""
            results["test"], logits = speech.report(model, splits, labels, len(seeds), "test", say, note)
            place = out / "eval" / "slm" / progress.best["checkpoint"]
            speech.write(place, results["test"], logits, test)
            say(f"written to {place}")
        if here.main:
            curves_png(progress.history, out / "curves.png", ("Loss", "Accuracy"))
            (out / "results.json").write_text(json.dumps(results, indent=1))
        say(f"finished: {out / 'checkpoints'}, best epoch {', '.join(str(watch.epoch) for watch in watches)}")
    log.close()
    if lock:
        lock.release()
    dist.cleanup()


def train_epoch(
    model: Slm, train: Pairs, cfg: Config, here: dist.Ranks, flat: Flat, optimizer: torch.optim.Optimizer,
    ema: Tensor | None, progress: Progress, watches: Sequence[Watch], order: Tensor, done: int, stop: dist.Stop,
    tick: Callable[[], Any],
) -> tuple[bool, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """The steps of an epoch from `done` on, of the clips order (K, N).

    Returns whether a stop was asked for, and of this rank the part (K,) of each step's loss and the right answers (K,);
    and the last gradient norm (K,).
    """
    shape = "linear_warmup_cosine" if cfg.schedule_epochs else "constant_with_warmup"
    schedule = OptimConfig(
        lr=cfg.lr, min_lr=cfg.min_lr, warmup_lr=0.0, warmup_steps=cfg.warmup_steps, schedule=shape
    )  # fmt: skip
    a_step = cfg.batch_size * here.world
    steps = math.ceil(order.shape[1] / a_step)
    total = cfg.schedule_epochs * steps
    own = order[:, done * a_step + here.rank :: here.world]
    labels = cut(train.label[own].to(here.device), cfg.batch_size, steps - done)
    batches = train.batches(own, cfg.batch_size, steps - done, here.device)
    losses: list[Tensor] = []
    right = torch.zeros(len(order), device=here.device)
    norm = flat.grads.new_zeros(len(order))
    for i, (y, (x, mask)) in enumerate(zip(labels, batches, strict=True), done):
        if stop.asked(here):
            return True, losses, right, norm
        logits, part = step_loss(model, x, mask, y, cfg)
        part = part / min(a_step, order.shape[1] - i * a_step)  # clips of all ranks
        flat.backward(part)
        if here.world > 1:
            torch.distributed.all_reduce(flat.grads)
        if cfg.grad_clip:
            norm = flat.clip(cfg.grad_clip)
        lr = lr_at(progress.step, total, schedule)
        set_lrs(optimizer, [0.0 if watch.stopped else lr for watch in watches])
        optimizer.step()
        if ema is not None:
            ema.lerp_(flat.values, 1 - cfg.ema)
        losses.append(part.detach())
        right += (logits.argmax(-1) == y).sum(1)
        progress.step += 1
        tick()
    # where nothing is clipped, one look at the last step's gradients is enough
    return False, losses, right, norm if cfg.grad_clip else flat.clip(0.0)


def step_loss(
    model: Slm, x: dict[str, Tensor], mask: dict[str, Tensor], y: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Logits (K, B, C) of clips, and the sum (K,) of their losses."""
    with torch.autocast(y.device.type, torch.bfloat16, enabled=cfg.precision == "bf16" and y.is_cuda):
        logits = model(x, mask)
    each = F.cross_entropy(
        logits.float().flatten(0, 1), y.flatten(), reduction="none", label_smoothing=cfg.label_smoothing
    )
    return logits, each.view(y.shape).sum(1)


def build(
    cfg: Config, train: Pairs, stores: dict[str, Store], classes: int, seeds: Sequence[int], start: Path | None,
    say: Callable[[str], None],
) -> Slm:  # fmt: skip
    """The model with its projectors, and the weights that it starts from."""
    frozen = bool(cfg.clap_ckpt)
    projectors = None
    if cfg.clap_ckpt and start is None and not cfg.clap_ckpt.endswith(clap.FILES):
        folder = checkpoint.resolve(cfg.clap_ckpt, prefer="best")
        state = checkpoint.read_state(folder)
        if state.get("system") != "clap":
            raise UserError(f"--clap-ckpt {cfg.clap_ckpt}: not a run of train_clap.py")
        projectors, coverage = clap.load(folder, state)
        cfg.model.clap = projectors.cfg
        say(f"projectors of {folder}: {coverage}")
    model = Slm(cfg.model, sources(stores, train.parts), classes, seeds)
    if start is None and not cfg.ckpt:
        if projectors is not None:
            take_projectors(model.clap, projectors, str(cfg.clap_ckpt))
        elif cfg.clap_ckpt:
            say(f"projectors of {cfg.clap_ckpt}: {clap.load_original(model.clap, cfg.clap_ckpt)}")
        else:
            for m, part in train.parts.items():
                model.clap.learn_statistics(m, part.values, part.rows)
    if frozen:
        model.freeze_projectors()
    if start is not None:
        say(f"resumed from {start}: {checkpoint.load_model(model, start)}")
    elif cfg.ckpt and cfg.ckpt.endswith((".pt", ".pth")):
        say(f"weights of {cfg.ckpt}: {slm.load_original(model, cfg.ckpt)}")
    elif cfg.ckpt:
        folder = checkpoint.resolve(cfg.ckpt, prefer="best")
        say(f"weights of {folder}: {checkpoint.load_model(model, folder)}")
    return model


def take_projectors(own: Clap, projectors: Clap, where: str) -> None:
    """Copies what train_clap.py trained into every seed; of several seeds there, the first."""
    if own.sources != projectors.sources:
        raise UserError(f"{where}: its projectors read {projectors.sources}, the data here are {own.sources}")
    slm.copy(projectors, own)


if __name__ == "__main__":
    config.run(Config, main)
