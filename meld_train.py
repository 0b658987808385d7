"""Train a head for MELD's seven emotions on stage 3's classifier, or on words and sound themselves (stage 4).

$ python meld_train.py --fast
$ python meld_train.py --data-root datasets/MELD --stage3-ckpt out/slm --mode A --epochs 60 --batch-size 128 --lr 0.001
$ python meld_train.py --cfg configs/meld_text.yaml --seeds 5 --context 3
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
from data.meld import LABELS
from data.mock_speech import make_mock
from data.pairs import Pairs, load, sources
from evals import speech
from evals.meld import PUBLISHED, TEXT_ONLY, MeldSource, known, read_splits, stores
from model import clap, meld, slm
from model.meld import Meld, MeldConfig
from model.slm import Slm, SlmConfig

PLACE = "datasets/MELD"  # where the guide has it
FAST = {"batch_size": 64, "epochs": 15, "lr": 1e-3, "model.hidden_dim": 128, "model.dropout": 0.5}


@dataclass
class Config:
    model: MeldConfig = field(default_factory=MeldConfig)
    data: MeldSource = field(default_factory=MeldSource)
    stage3_ckpt: str | None = opt(
        None, "classifier of train_slm.py or a published file; none: words and sound themselves", "--stage3-ckpt"
    )
    clap_ckpt: str | None = opt(None, "its projectors, checked against those that it holds", "--clap-ckpt")
    class_weights: str = opt(
        "sqrt", "weight of a class: root of largest count / its count, that ratio itself, or none", "--class-weights",
        choices=("sqrt", "inverse", "none"),
    )  # fmt: skip
    shuffle_labels: bool = opt(False, "control: train on labels dealt out at random", "--shuffle-labels")
    label_smoothing: float = opt(0.1, "share of a target spread over all classes", "--label-smoothing", share=True)
    lr: float = opt(1e-3, "learning rate", "--lr")
    min_lr: float = opt(0.0, "learning rate at the end of a schedule", "--min-lr")
    warmup_steps: int = opt(0, "steps of linear warm-up", "--warmup-steps")
    schedule: str = opt("constant", "shape after it", "--schedule", choices=("constant", "linear", "cosine"))
    weight_decay: float = opt(0.01, "AdamW decay of matrices", "--weight-decay")
    table_decay: float | None = opt(None, "decay of the table of hashed words; default: weight-decay", "--table-decay")
    table_lr: float | None = opt(None, "learning rate of that table; default: lr", "--table-lr")
    table_eps: float = opt(1e-8, "AdamW epsilon of that table; far above its gradients: plain descent", "--table-eps")
    grad_clip: float = opt(0.0, "largest gradient norm of a seed; 0: no clipping", "--grad-clip")
    epochs: int = opt(60, "epochs in all", "--epochs")
    batch_size: int = opt(128, "utterances a process and step", "--batch-size")
    patience: int = opt(0, "epochs without a better --metric before a seed stops; 0: never", "--patience")
    metric: str = opt(
        "weighted_f1", "dev score that chooses the best epoch; none: the last epoch counts", "--metric",
        choices=("weighted_f1", "accuracy", "uar", "macro_f1", "loss", "none"),
    )  # fmt: skip
    seed: int = opt(17, "first seed", "--seed")
    seeds: int = opt(1, "seeds trained side by side", "--seeds")
    precision: str = opt("fp32", "arithmetic; fp32 on a CPU", "--precision", choices=("fp32", "bf16"))
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    num_workers: int = opt(4, "threads that decode and encode, the first time", "--num-workers")
    log_every: int = opt(1, "epochs between log lines", "--log-every")
    save_every: int = opt(10, "epochs between checkpoints; the best and the last are always kept", "--save-every")
    test: bool = opt(True, "read the test split once, after training", "--test")
    keep: int = opt(0, "newest checkpoints to keep besides best; 0: all", "--keep")
    ckpt: str | None = opt(None, "start from this head; published heads of stage 4 work", "--ckpt")
    out: str | None = opt(None, "run folder; default: out/<config name>", "--out")
    resume: str | None = opt(None, "go on from the run's last checkpoint, or from PATH", "--resume", bare="last")
    overwrite: bool = opt(False, "replace the run in --out", "--overwrite")
    fast: bool = opt(False, "a small run; without MELD, on a synthetic series", "--fast")


def main(cfg: Config) -> None:  # noqa: C901 (the whole run, in the order in which it happens)
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if min(cfg.seeds, cfg.epochs, cfg.batch_size) < 1 or cfg.seed < 0 or cfg.model.context < 0:
        raise UserError("--seeds, --epochs and --batch-size are at least 1, --seed and --context at least 0")
    if cfg.fast:
        torch.set_num_threads(1)  # its matrices are too small for more threads to pay
        made = not (cfg.data.data_root or Path(PLACE).is_dir())
        before = {"stage3_ckpt": "out/slm_fast"} if fast_run("out/slm_fast", made) else {}
        cfg = config.preset(cfg, {"out": "out/meld_fast", "overwrite": not cfg.resume} | before | FAST)
    cfg, start = resume_or_start(cfg, "meld", say)
    out = Path(str(cfg.out))
    dist.connect(here)
    dist.main_first(here, partial(find_data, cfg, out, say))
    cfg.data = dist.broadcast(cfg.data)

    # ---- data and model
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    stage3 = load_stage3(cfg, start, say)
    clips = read_splits(cfg.data, say)
    every = [clip for part in clips.values() for clip in part]
    default = PUBLISHED if stage3 else TEXT_ONLY
    opened = stores(cfg.data, every, stage3.made if stage3 else {}, cfg.num_workers, here, say, default)
    splits = {name: load(part, opened, LABELS, cfg.data.pairs(), cfg.model.context) for name, part in clips.items()}
    model = build(cfg, stage3, opened, splits["train"], seeds, start, say)
    for part in splits.values():
        part.standardize(model.fronts.dense, model.fronts.standardize)
    if cfg.shuffle_labels:
        splits["train"].deal_labels(cfg.seed)
    splits = {name: part.to(here.device) for name, part in splits.items()}
    train, test = splits["train"], splits["test"]
    model.to(here.device)
    weight = class_weights(train.label, cfg.class_weights)
    # what comes before a frozen backbone's head is the same in every epoch, and is made once
    given = {name: known(model, splits[name]) for name in ("valid", "test")}
    learnt = next(iter(known(model, train).values()))[0] if model.frozen else train

    # ---- one row of flat.values is one seed's head, or model
    dist.keep_memory(here.device)
    flat = Flat(model)
    share = cfg.table_lr / cfg.lr if cfg.table_lr and cfg.lr else 1.0
    optimizer = flat.adamw(cfg.lr, cfg.weight_decay, cfg.table_decay, cfg.table_eps, share)
    keeper = Keeper(out, model, flat, optimizer, here, [cfg.lr] * len(seeds), cfg.keep)
    if start is not None:
        keeper.restore(start, say)
    progress, watches = keeper.progress, keeper.watches
    rule = Rule(cfg.metric, cfg.patience)
    keeper.facts |= {
        "system": "meld", "config": config.to_dict(cfg), "sources": model.fronts.sources, "seeds": seeds,
        "labels": list(LABELS), "classes": stage3.classes if stage3 else 0,
        "stage3": config.to_dict(stage3.cfg) if stage3 else None,
        "features": {m: store.info for m, store in opened.items()},
    }  # fmt: skip
    lock = dist.main_first(here, partial(open_run, cfg, out, start))
    stop = dist.Stop()
    log = Logger(out, here.main)
    log.truncate(progress.step)
    a_step = cfg.batch_size * here.world
    iters = math.ceil(len(train) / a_step)
    total = cfg.epochs * iters
    count = sum(p[0].numel() for p in model.parameters() if p.requires_grad)
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
    say(f"{counts} utterances, {' and '.join(opened)}; mode {cfg.model.mode}, {count:,} parameters x {len(seeds)} "
        f"seeds; {a_step} a step ({here.world} processes), {iters} steps an epoch")  # fmt: skip
    say("class weights " + ", ".join(f"{label} {w:.2f}" for label, w in zip(LABELS, weight.tolist(), strict=True)))

    # ---- training: one pass of the outer loop is one epoch of all seeds
    model.train()
    bar = log.bar(total, progress.step, "train")
    stopping = False
    while progress.epoch < cfg.epochs and not all(watch.stopped for watch in watches):
        began, done = time.perf_counter(), keeper.begin(cfg.seed, iters)
        order = shuffled(len(train), seeds, progress.epoch).to(here.device)
        stopping, losses, norm = train_epoch(
            model, learnt, weight, cfg, here, flat, optimizer, progress, watches, order, done, stop, bar.update
        )
        if stopping:
            break
        progress.epoch += 1

        # ---- the epoch's numbers: the only place where the device is waited for
        stacked = torch.stack(losses)  # (S, K), this rank's part of each
        keeper.check_finite(
            stacked, norm, done, partial(train.ids, order[0].split(a_step)), "or look for wrong features"
        )
        loss = dist.all_sum(float(stacked.mean()), device=here.device)[0]
        found = speech.evaluate(model, given["valid"], LABELS, len(seeds))
        scores = next(iter(found.values()))
        mean = {way: speech.summary(part) for way, part in found.items()}
        first = next(iter(mean.values()))
        numbers = {
            "Train/Loss": loss, "Learning_Rate": optimizer.param_groups[-1]["lr"], "Gradient_Norm": float(norm.mean()),
            "Val/Loss": first["loss"]["mean"], "Val/Accuracy": first["accuracy"]["mean"],
            "Val/F1": first["weighted_f1"]["mean"],
        }  # fmt: skip
        progress.history.append({"step": progress.step, "epoch": progress.epoch, **numbers})
        improved = keeper.note(rule, scores, flat.values)
        finished = progress.epoch == cfg.epochs or all(watch.stopped for watch in watches)
        if progress.epoch % cfg.save_every == 0 or finished:
            keeper.save(f"epoch_{progress.epoch:03d}")
        if progress.epoch % cfg.log_every == 0 or finished:
            log.record(progress.step, epoch=progress.epoch, seconds=time.perf_counter() - began, **numbers)
            alone = "".join(f" {way} {part['weighted_f1']['mean']:.4f}" for way, part in list(mean.items())[1:])
            dev = numbers["Val/Loss"]
            log.say(f"epoch {progress.epoch:>3}/{cfg.epochs}  train loss {loss:.4f}  dev loss {dev:.4f} "
                    f"acc {numbers['Val/Accuracy']:.4f} weighted f1 {numbers['Val/F1']:.4f}{alone}  "
                    f"lr {numbers['Learning_Rate']:.2g} {'*' * bool(improved)}")  # fmt: skip
    bar.close()

    # ---- the end, or a stop asked for
    if stopping:
        keeper.save(f"step_{progress.step:06d}")
        say(f"stopped after step {progress.step} of {total}; go on with the same command and --resume")
    else:
        stop.release()
        flat.values.copy_(keeper.best)
        results = keeper.results()
        if here.main and cfg.test:
            results["test"], logits = speech.report(
                model, splits, LABELS, len(seeds), "test", say, given=given["test"]
            )  # fmt: skip
            place = out / "eval" / "meld" / progress.best["checkpoint"]
            speech.write(place, results["test"], logits, test)
            say(f"written to {place}")
        if here.main:
            curves_png(progress.history, out / "curves.png", ("Loss", "Accuracy", "F1"))
            (out / "results.json").write_text(json.dumps(results, indent=1))
        say(f"finished: {out / 'checkpoints'}, best epoch {', '.join(str(watch.epoch) for watch in watches)}")
    log.close()
    if lock:
        lock.release()
    dist.cleanup()


def train_epoch(
    model: Meld, learnt: Pairs, weight: Tensor, cfg: Config, here: dist.Ranks, flat: Flat,
    optimizer: torch.optim.Optimizer, progress: Progress, watches: Sequence[Watch], order: Tensor, done: int,
    stop: dist.Stop, tick: Callable[[], Any],
) -> tuple[bool, list[Tensor], Tensor]:  # fmt: skip
    """The steps of an epoch from `done` on, of the utterances order (K, N); `weight` (7,) is that of the classes.

    Returns whether a stop was asked for, this rank's part (K,) of each step's loss, and the last gradient norm (K,).
    """
    shape = "constant_with_warmup" if cfg.schedule == "constant" else f"linear_warmup_{cfg.schedule}"
    schedule = OptimConfig(
        lr=cfg.lr, min_lr=cfg.min_lr, warmup_lr=0.0, warmup_steps=cfg.warmup_steps, schedule=shape
    )  # fmt: skip
    a_step = cfg.batch_size * here.world
    total = cfg.epochs * math.ceil(order.shape[1] / a_step)
    losses: list[Tensor] = []
    norm = flat.grads.new_zeros(len(order))
    for chunk in order.split(a_step, 1)[done:]:
        if stop.asked(here):
            return True, losses, norm
        own = chunk[:, here.rank :: here.world]
        with torch.autocast(here.device.type, torch.bfloat16, enabled=cfg.precision == "bf16" and own.is_cuda):
            logits = speech.forward(model, learnt, own)
        each = F.cross_entropy(
            logits.float().flatten(0, 1), learnt.label[own].flatten(), weight, reduction="none",
            label_smoothing=cfg.label_smoothing,
        ).view(own.shape)  # fmt: skip
        # weighted mean over the step's utterances on all ranks, as cross_entropy takes it
        part = each.sum(1) / weight[learnt.label[chunk]].sum(1)
        flat.backward(part)
        if here.world > 1:
            torch.distributed.all_reduce(flat.grads)
        norm = flat.clip(cfg.grad_clip)
        lr = lr_at(progress.step, total, schedule)
        set_lrs(optimizer, [0.0 if watch.stopped else lr for watch in watches])
        optimizer.step()
        losses.append(part.detach())
        progress.step += 1
        tick()
    return False, losses, norm


@dataclass
class Stage3:
    """Stage 3's classifier, and how the features that it reads were made; a run that goes on has its weights itself."""

    cfg: SlmConfig
    sources: clap.Sources
    classes: int
    made: dict[str, dict[str, Any]]
    model: Slm | None = None


def load_stage3(cfg: Config, start: Path | None, say: Callable[[str], None]) -> Stage3 | None:
    """The classifier of --stage3-ckpt, or what the checkpoint that the run goes on from says of it."""
    if start is not None:
        state = checkpoint.read_state(start)
        if state["stage3"] is None:
            return None
        return Stage3(
            config.from_dict(SlmConfig, state["stage3"]), state["sources"], state["classes"], state["features"]
        )
    if cfg.stage3_ckpt is None:
        if cfg.clap_ckpt:
            raise UserError("--clap-ckpt needs --stage3-ckpt: without it no projectors are used")
        return None
    if cfg.stage3_ckpt.endswith((".pt", ".pth")):
        model, classes, coverage = slm.original(cfg.stage3_ckpt)
        made: dict[str, dict[str, Any]] = {}
    else:
        folder = checkpoint.resolve(cfg.stage3_ckpt, prefer="best")
        state = checkpoint.read_state(folder)
        if state.get("system") != "slm":
            raise UserError(
                f"--stage3-ckpt {folder}: a checkpoint of system {state.get('system')}, not of train_slm.py"
            )
        model, coverage = slm.load(folder, state)
        classes, made = len(state["labels"]), state["features"]
    say(f"stage 3, {cfg.stage3_ckpt}: {coverage}")
    if cfg.clap_ckpt:
        clap.check_same(model.clap, cfg.clap_ckpt)
    return Stage3(model.cfg, model.clap.sources, classes, made, model)


def build(
    cfg: Config, stage3: Stage3 | None, opened: dict[str, Store], train: Pairs, seeds: Sequence[int],
    start: Path | None, say: Callable[[str], None],
) -> Meld:  # fmt: skip
    """The model, and the weights that it starts from."""
    found = sources(opened, train.parts)
    if stage3 is not None:
        for m, source in stage3.sources.items():
            if m in found and found[m] != source:
                raise UserError(f"{m} of {opened[m].folder} is {found[m]}, stage 3 was trained on {source}")
        found = stage3.sources
    of_stage3, classes = (stage3.cfg, stage3.classes) if stage3 else (None, 0)
    model = Meld(cfg.model, found, len(LABELS), seeds, of_stage3, classes)
    if start is not None:
        say(f"resumed from {start}: {checkpoint.load_model(model, start)}")
        return model
    if stage3 is not None and stage3.model is not None:
        slm.copy(stage3.model, model.backbone)
    else:
        for m, part in train.parts.items():
            model.fronts.learn_statistics(m, part.values, part.rows)
    if cfg.ckpt and cfg.ckpt.endswith((".pt", ".pth")):
        say(f"head of {cfg.ckpt}: {meld.load_original(model, cfg.ckpt)}")
    elif cfg.ckpt:
        say(f"weights of {cfg.ckpt}: {checkpoint.load_model(model, checkpoint.resolve(cfg.ckpt, prefer='best'))}")
    return model


def class_weights(label: Tensor, kind: str) -> Tensor:
    """Weight (7,) of each class from the counts of the train split."""
    counts = torch.bincount(label, minlength=len(LABELS)).clamp_min(1)
    ratio = counts.max() / counts
    return {"sqrt": ratio.sqrt(), "inverse": ratio, "none": torch.ones_like(ratio)}[kind]


def find_data(cfg: Config, out: Path, say: Callable[[str], None]) -> None:
    """Fills in where MELD is, if the command does not say: in the guide's place, or with --fast made on the spot."""
    if cfg.data.data_root is not None:
        return
    found = Path(PLACE).is_dir()
    if not found and not cfg.fast:
        raise UserError(f"no data: {PLACE} not found; --data-root says where MELD's CSV files are, --fast needs none")
    cfg.data.data_root = PLACE if found else str(make_mock(out / "mock", "meld"))
    if found and cfg.fast and not cfg.data.limit:
        cfg.data.limit = 1500
        say(f"--fast: at most {cfg.data.limit} utterances of each split of {PLACE}")


if __name__ == "__main__":
    config.run(Config, main)
