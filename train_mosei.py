"""Train a fusion of text, audio and video features on CMU-MOSEI, or on anything laid out like it.

$ python train_mosei.py --fast
$ python train_mosei.py --data-dir datasets/mosei --seeds 5
$ torchrun --nproc-per-node 2 train_mosei.py --cfg configs/mosei_large.yaml
"""

import json
import math
import time
from collections.abc import Callable, Iterator
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
from common.keeper import Keeper, Progress, Rule, shuffled
from common.log import Logger, curves_png
from common.metrics import classification
from common.optim import OptimConfig, lr_at
from common.run import open_run, resume_or_start
from data.layouts import MODALITIES
from data.mock_mosei import make_mock
from data.mosei import inspect, open_corpus
from data.resident import cut
from data.utterances import SCHEMES, Utterances, level, load_splits
from evals import sentiment
from model.fusion import HEADS, Fusion, FusionConfig, known, load_original, losses
from model.seeds import statistics

PLACES = ("datasets/mosei", "data/mosei")  # the second is where the guide has it
# --fast with a data set is the guide's quick preset; without one, a small set is made and learnt in full
FAST = {"batch_size": 8, "epochs": 5, "patience": 2, "lr": 1e-4}
MOCK = 1500  # utterances of the synthetic set
FAST_MOCK = {"batch_size": 16, "epochs": 30, "patience": 8, "lr": 1e-3, "model.dropout": 0.4, "weight_decay": 0.05}


@dataclass
class Config:
    model: FusionConfig = field(default_factory=FusionConfig)
    data_root: str | None = opt(
        None, f"data set: file or folder, its format is found out; default: {' or '.join(PLACES)}", "--data-root"
    )
    stores: dict[str, str] = opt({}, "modality=feature store, where a manifest's features lie elsewhere", "--stores")
    label_scheme: str = opt("half_even", "how scores become seven classes", "--label-scheme", choices=SCHEMES)
    valid_share: float = opt(0.1, "share of train held out by video where there is no valid split", "--valid-share")
    split_seed: int = opt(0, "seed of that choice, the same for all seeds of training")
    max_frames: int = opt(500, "frames of an utterance; what is longer is cut", "--max-frames")
    feature_noise: float = opt(0.0, "deviation of noise on standardised features while training", "--feature-noise")
    class_weights: str = opt("none", "inverse class frequency, its root, or none", choices=("none", "inverse", "sqrt"))
    label_smoothing: float = opt(0.0, "share of a target spread over all classes", "--label-smoothing", share=True)
    shuffle_labels: bool = opt(False, "control: train on labels dealt out at random", "--shuffle-labels")
    lr: float = opt(1e-4, "learning rate", "--lr")
    min_lr: float = opt(1e-7, "lowest learning rate of a schedule", "--min-lr")
    warmup_steps: int = opt(0, "steps of linear warm-up", "--warmup-steps")
    schedule: str = opt(
        "plateau", "plateau: halved when the valid loss stalls; cosine to min-lr; or constant", "--schedule",
        choices=("plateau", "cosine", "constant"),
    )  # fmt: skip
    plateau_patience: int = opt(3, "epochs without a better valid loss before the rate falls")
    plateau_factor: float = opt(0.5, "what the rate is multiplied by then")
    weight_decay: float = opt(1e-5, "AdamW decay of matrices", "--weight-decay")
    grad_clip: float = opt(1.0, "largest gradient norm of a seed; 0: no clipping", "--grad-clip")
    epochs: int = opt(50, "epochs in all", "--epochs")
    batch_size: int = opt(16, "utterances a process and step", "--batch-size")
    patience: int = opt(5, "epochs without a better --metric before a seed stops; 0: never", "--patience")
    min_delta: float = opt(1e-4, "smallest change that counts as better")
    metric: str = opt(
        "loss", "valid score that chooses the best epoch and stops training; none: the last epoch counts", "--metric",
        choices=("loss", "accuracy", "weighted_f1", "uar", "mae", "corr", "none"),
    )  # fmt: skip
    seed: int = opt(42, "first seed", "--seed")
    seeds: int = opt(1, "seeds trained side by side", "--seeds")
    precision: str = opt("fp32", "arithmetic; fp32 on a CPU", "--precision", choices=("fp32", "bf16"))
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    resident: str = opt("auto", "data held on the device", "--resident", choices=("auto", "yes", "no"))
    num_workers: int = opt(0, "not used: the data set lies in memory", "--num-workers")
    log_every: int = opt(1, "epochs between log lines", "--log-every")
    histograms: bool = opt(False, "gradient histograms in TensorBoard", "--histograms")
    save_every: int = opt(1, "epochs between checkpoints; the best is always kept", "--save-every")
    test: bool = opt(True, "read the test split once, after training", "--test")
    keep: int = opt(0, "newest checkpoints to keep besides best; 0: all", "--keep")
    ckpt: str | None = opt(None, "start from these weights; the guide's best_model.pth works", "--ckpt")
    out: str | None = opt(None, "run folder; default: out/<config name>", "--out")
    resume: str | None = opt(None, "go on from the run's last checkpoint, or from PATH", "--resume", bare="last")
    overwrite: bool = opt(False, "replace the run in --out", "--overwrite")
    mock: bool = opt(False, "train on a synthetic set made in the run folder", "--mock")
    inspect: bool = opt(False, "print what is in the data set and stop", "--inspect")
    fast: bool = opt(False, "the guide's quick preset; without a data set, on a synthetic one", "--fast")


def main(cfg: Config) -> None:  # noqa: C901 (the whole run, in the order in which it happens)
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if cfg.seeds < 1 or cfg.seed < 0:
        raise UserError(f"--seed {cfg.seed} --seeds {cfg.seeds}: from 0 up, and at least one")
    if cfg.epochs < 1 or cfg.batch_size < 1:
        raise UserError(f"--epochs {cfg.epochs} --batch-size {cfg.batch_size}: at least one")
    found = next((place for place in PLACES if Path(place).exists()), None)
    made = cfg.mock or (cfg.fast and cfg.data_root is None and found is None)
    if cfg.fast:
        torch.set_num_threads(1)  # its matrices are too small for more threads to pay
        quick = FAST_MOCK if made else FAST
        cfg = config.preset(cfg, {"out": "out/mosei_fast", "overwrite": not cfg.resume} | quick)
    if cfg.inspect:
        return inspect(place_data(cfg, False, found), say) if here.main else None
    cfg, start = resume_or_start(cfg, "mosei", say)
    out = Path(str(cfg.out))
    dist.connect(here)
    cfg.data_root = root = dist.main_first(here, partial(place_data, cfg, made, found))
    if cfg.num_workers:
        say("--num-workers: not used, the data set lies in memory")

    folder = dist.main_first(here, lambda: open_corpus(root, say))
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    task = load_task(cfg, folder, seeds, start, here, say)
    model, valid = task.model, task.splits["valid"]

    # ---- one row of flat.values is one seed's model
    dist.keep_memory(here.device)
    flat = Flat(model)
    optimizer = flat.adamw(cfg.lr, cfg.weight_decay)
    keeper = Keeper(out, model, flat, optimizer, here, [cfg.lr] * len(seeds), cfg.keep)
    progress, watches = keeper.progress, keeper.watches
    if start is not None:
        keeper.restore(start, say)
        progress, watches = keeper.progress, keeper.watches
    plateau = (cfg.plateau_patience, cfg.plateau_factor, cfg.min_lr) if cfg.schedule == "plateau" else None
    rule = Rule(cfg.metric, cfg.patience, cfg.min_delta, plateau)

    lock = dist.main_first(here, partial(open_run, cfg, out, start))
    stop = dist.Stop()
    log = Logger(out, here.main)
    log.truncate(progress.step)
    iters = math.ceil(len(task.units) / (task.a_step * here.world))
    total = cfg.epochs * iters
    count = sum(p[0].numel() for p in model.parameters())
    say(f"{cfg.model.model}: {count:,} parameters x {len(seeds)} seeds; {task.a_step * here.world} "
        f"{'videos' if cfg.model.context == 'video' else 'utterances'} a step ({here.world} processes), {iters} steps "
        f"an epoch; data {'on' if task.resident else 'beside'} {here.device}, {task.size / 2**20:.0f} MiB")  # fmt: skip
    keeper.facts |= {
        "system": "mosei", "config": config.to_dict(cfg), "dims": model.dims, "frames": model.frames,
        "labels": list(HEADS[cfg.model.head]), "seeds": seeds, "features": describe(folder, cfg),
    }  # fmt: skip

    # ---- training: one pass of the outer loop is one epoch of all seeds
    model.train()
    bar = log.bar(total, progress.step, "train")
    stopping = False
    while progress.epoch < cfg.epochs and not all(watch.stopped for watch in watches):
        epoch, began = progress.epoch, time.perf_counter()
        done = keeper.begin(cfg.seed, iters)
        lrs = [0.0 if watch.stopped else watch.lr for watch in watches]
        order = shuffled(len(task.units), seeds, epoch).to(task.units.device)
        stopping, losses_, outputs, norm = train_epoch(
            task, cfg, here, flat, optimizer, progress, order, done, total, lrs, stop, bar.update
        )
        if stopping:
            break
        progress.epoch += 1
        epoch += 1

        # ---- the epoch's numbers: the only place where the device is waited for
        loss_steps = torch.stack(losses_)
        keeper.check_finite(loss_steps, norm, done, partial(used, task, order[0], here=here),
                            "or check these utterances' features with --inspect")  # fmt: skip
        train_scores = running(outputs, loss_steps, cfg, here)
        found = sentiment.predict(model, valid)
        valid_scores = [sentiment.score(one, valid, cfg.model.head, cfg.label_scheme) for one in found]
        mean = {name: sum(s[name] for s in valid_scores) / len(seeds) for name in ("loss", "accuracy", "weighted_f1")}
        lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
        numbers = {
            "Train/Loss": train_scores["loss"], "Train/Accuracy": train_scores["accuracy"],
            "Train/F1": train_scores["weighted_f1"], "Val/Loss": mean["loss"], "Val/Accuracy": mean["accuracy"],
            "Val/F1": mean["weighted_f1"], "Learning_Rate": lr, "Gradient_Norm": float(norm.mean()),
        }  # fmt: skip
        progress.history.append({"step": progress.step, "epoch": epoch, **numbers})
        improved = keeper.note(rule, valid_scores, flat.values)
        finished = epoch == cfg.epochs or all(watch.stopped for watch in watches)
        saved = epoch % cfg.save_every == 0 or finished
        if saved:
            keeper.save(f"epoch_{epoch:03d}")
        if epoch % cfg.log_every == 0 or finished:
            log.record(progress.step, epoch=epoch, seconds=time.perf_counter() - began, **numbers)
            path = f"  {out / 'checkpoints' / f'epoch_{epoch:03d}'}" if saved else ""
            marks = "".join("*" if k in improved else "." for k in range(len(seeds))).rstrip(
                "." if len(seeds) == 1 else ""
            )
            ours, theirs = (
                f"loss {s['loss']:.4f} acc {s['accuracy']:.4f} f1 {s['weighted_f1']:.4f}" for s in (train_scores, mean)
            )
            log.say(f"epoch {epoch:>3}/{cfg.epochs}  train {ours}  valid {theirs}  lr {lr:.2g}{path} {marks}")
            bar.set_postfix(loss=f"{mean['loss']:.3f}")
        if cfg.histograms:
            for name, p in model.named_parameters():
                log.histogram(f"Gradients/{name}", p.grad, progress.step)
    bar.close()

    # ---- the end, or a stop asked for
    if stopping:
        keeper.save(f"step_{progress.step:06d}")
        say(f"stopped after step {progress.step} of {total}; go on with the same command and --resume")
    else:
        stop.release()
        epochs = ", ".join(str(watch.epoch) for watch in watches)
        say(f"finished: {out / 'checkpoints'}, best epoch {epochs}" + " (early stop)" * (progress.epoch < cfg.epochs))
        if cfg.metric != "none":
            warn_overfit(progress.history, say)
        flat.values.copy_(keeper.best)
        results = keeper.results()
        if here.main and cfg.test and len(task.splits["test"]):
            results |= read_test(cfg, task, out / "eval" / "mosei" / progress.best["checkpoint"], log, say)
        if here.main:
            curves_png(progress.history, out / "curves.png", ("Loss", "Accuracy", "F1"))
            (out / "results.json").write_text(json.dumps(results, indent=1))
    log.close()
    if lock:
        lock.release()
    dist.cleanup()


@dataclass
class Task:
    """What is learnt, from what: standardised splits on the device, the model, and how the epoch is cut up."""

    splits: dict[str, Utterances]
    model: Fusion
    target: Tensor  # of the train split
    weight: Tensor | None  # of the classes
    units: Tensor  # (n, U): utterances, or with context the utterances of whole videos
    a_step: int  # units a process takes in a step
    size: int  # bytes of features
    resident: bool  # they lie on the device


def load_task(
    cfg: Config, folder: Path, seeds: list[int], start: Path | None, here: dist.Ranks, say: Callable[[str], None]
) -> Task:
    """Data and model; features are standardised once, by the statistics of the train split or of the checkpoint."""
    splits = load_splits(folder, cfg.stores, cfg.valid_share, cfg.split_seed, cfg.max_frames, say)
    train = splits["train"]
    dims = {m: x.shape[1] for m, x in train.values.items()}
    frames = {m: max(part.rows[m].shape[1] for part in splits.values()) for m in dims}
    model = Fusion(cfg.model, dims, frames, seeds)
    if start is not None:
        say(f"resumed from {start}: {checkpoint.load_model(model, start)}")
    elif cfg.ckpt:
        say(f"weights of {cfg.ckpt}: {load_weights(model, cfg.ckpt)}")
    elif cfg.model.normalize:
        for m in dims:
            model.set_statistics(m, *statistics(train.values[m]))
    for part in splits.values():
        sentiment.standardize(part, model)
    size = sum(x.nbytes for part in splits.values() for x in (*part.values.values(), *part.rows.values()))
    resident = here.device.type == "cpu" or cfg.resident == "yes" or (cfg.resident == "auto" and dist.fits(size, here))
    if resident:
        splits = {name: part.to(here.device) for name, part in splits.items()}
        train = splits["train"]
    target = train.targets(cfg.model.head, cfg.label_scheme)
    if cfg.shuffle_labels:
        dealt = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed))
        target = torch.cat([target[:-1][dealt.to(target.device)], target[-1:]])
    weight = class_weights(target, cfg)
    units = train.members if cfg.model.context == "video" else torch.arange(len(train), device=train.device)[:, None]
    # with context a step takes whole videos, as many as hold about batch_size utterances
    a_step = max(1, round(cfg.batch_size * len(units) / len(train)))
    counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    videos = ", ".join(str(len(part.members)) for part in splits.values())
    say(f"{counts} utterances of {videos} videos; " + ", ".join(f"{m} {frames[m]} x {dims[m]}" for m in dims))
    weight = weight if weight is None else weight.to(here.device)
    return Task(splits, model.to(here.device), target, weight, units, a_step, size, resident)


def train_epoch(
    task: Task, cfg: Config, here: dist.Ranks, flat: Flat, optimizer: torch.optim.Optimizer, progress: Progress,
    order: Tensor, done: int, total: int, lrs: list[float], stop: dist.Stop, tick: Callable[[], Any],
) -> tuple[bool, list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:  # fmt: skip
    """The steps of an epoch from `done` on: whether a stop was asked for, losses (K,) a step, outputs, the last norm.

    Nothing in here waits for the device.
    """
    shape = "linear_warmup_cosine" if cfg.schedule == "cosine" else "constant_with_warmup"
    cosine = OptimConfig(
        lr=cfg.lr, min_lr=cfg.min_lr, warmup_lr=0.0, warmup_steps=cfg.warmup_steps, schedule=shape
    )  # fmt: skip
    losses_: list[Tensor] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    norm = flat.grads.new_zeros(len(order))
    set_lrs(optimizer, lrs)
    for x, mask, index, y, rows in steps(task, order, done, here):
        if stop.asked(here):
            return True, losses_, outputs, norm
        logits, loss, objective = step_loss(task, x, mask, index, y, rows, cfg)
        flat.backward(objective)
        if here.world > 1:
            torch.distributed.all_reduce(flat.grads)
        norm = flat.clip(cfg.grad_clip)
        if cfg.schedule != "plateau":
            lr = lr_at(progress.step, total, cosine)
            set_lrs(optimizer, [lr if old else 0.0 for old in lrs])
        optimizer.step()
        losses_.append(loss.detach())
        outputs.append((logits.detach(), y))
        progress.step += 1
        tick()
    return False, losses_, outputs, norm


def used(task: Task, order: Tensor, step: int, here: dist.Ranks) -> list[str]:
    """The ids of the utterances that a step of an epoch took."""
    clips = task.splits["train"].clips
    rows = task.units[order.split(task.a_step * here.world)[step]].flatten().tolist()
    return [clips[i].id for i in rows if i < len(clips)]


def read_test(cfg: Config, task: Task, place: Path, log: Logger, say: Callable[[str], None]) -> dict[str, Any]:
    """The report on the test split, for results.json; selection is over, and nothing reads the split before."""
    report, logits = sentiment.report(task.model, task.splits, cfg.label_scheme, say)
    sentiment.write(place, report, logits, task.splits["test"])
    say(f"written to {place}")
    metrics = plain(report["scores"])
    settings = {name: value for name, value in config.to_dict(cfg).items() if isinstance(value, int | float | str)}
    log.hparams(settings, {f"hparam/test_{name}": value for name, value in metrics.items()})
    return {"test": report, "test_metrics": metrics}


def steps(task: Task, order: Tensor, done: int, here: dist.Ranks) -> Iterator[tuple]:
    """Frames, masks, indices (K, B), targets and the number of rows over all ranks (K,) of each step from `done` on."""
    train, size = task.splits["train"], task.a_step * task.units.shape[1]  # of a step: utterances of a process
    order = order[:, done * task.a_step * here.world :]
    whole = known(task.target[task.units[order].flatten(1)])
    count = math.ceil(whole.shape[1] / (size * here.world))
    rows = F.pad(whole, (0, count * size * here.world - whole.shape[1])).view(len(whole), count, -1).sum(2)
    index = task.units[order[:, here.rank :: here.world]].flatten(1)
    at, y = cut(index, size, count), cut(task.target[index].to(here.device), size, count)
    rows = rows.clamp_min(1).to(here.device).unbind(1)
    batches = train.batches(index, size, count, here.device)
    for (x, mask), *step in zip(batches, at, y, rows, strict=True):
        yield x, mask, *step


def step_loss(
    task: Task, x: dict[str, Tensor], mask: dict[str, Tensor], index: Tensor, y: Tensor, rows: Tensor, cfg: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (K, B, C), each seed's part (K,) of the mean loss over the step's `rows`, and with auxiliary losses."""
    if cfg.feature_noise:
        x = {m: value + cfg.feature_noise * torch.randn_like(value) for m, value in x.items()}
    if hiding := (cfg.model.hide > 0 or cfg.model.hide_whole > 0):
        mask = hide(mask, cfg.model.hide, cfg.model.hide_whole)
    if cfg.feature_noise or hiding:
        x = {m: torch.where(mask[m][..., None], value, 0.0) for m, value in x.items()}
    videos = None
    if cfg.model.context == "video":
        there = (index < len(task.splits["train"])).to(y.device)
        videos = (task.units.shape[1], there.unflatten(1, (-1, task.units.shape[1])))
    with torch.autocast(y.device.type, torch.bfloat16, enabled=cfg.precision == "bf16" and y.is_cuda):
        logits, alone = task.model.logits(x, mask, videos)
    head = cfg.model.head
    loss = losses(logits.float(), y, head, task.weight, cfg.label_smoothing).sum(1) / rows
    if not alone:
        return logits, loss, loss
    extra = [
        losses(out.float(), y, head, task.weight, cfg.label_smoothing) * mask[m].any(-1) for m, out in alone.items()
    ]
    return logits, loss, loss + cfg.model.unimodal * torch.stack(extra).sum((0, 2)) / rows


def hide(mask: dict[str, Tensor], chance: float, whole: float = 0.0) -> dict[str, Tensor]:
    """Hides modalities of an utterance, text with two thirds of the chance; where none would be left, none.

    Then hides utterances with all they have, with the chance `whole`.
    """
    kept = {}
    for m, there in mask.items():
        shown = torch.rand(there.shape[:2], device=there.device) >= (chance * 2 / 3 if m == "text" else chance)
        kept[m] = there & shown[..., None]
    some = torch.stack([there.any(-1) for there in kept.values()]).any(0)[..., None]
    left = {m: torch.where(some, kept[m], mask[m]) for m in mask}
    if not whole:
        return left
    shown = torch.rand(some.shape, device=some.device) >= whole
    return {m: there & shown for m, there in left.items()}


def class_weights(target: Tensor, cfg: Config) -> Tensor | None:
    """Weight of each class N / (C n_c), or its root; for emotions the positives' n_without / n_with, or its root."""
    if cfg.class_weights == "none" or cfg.model.head == "regression":
        return None
    if cfg.model.head == "emotions":
        known = target[target.isfinite().all(-1)]
        weight = (1 - known).sum(0) / known.sum(0).clamp_min(1)
    else:
        counts = torch.bincount(target[target >= 0], minlength=len(HEADS[cfg.model.head]))
        weight = counts.sum() / (len(counts) * counts.clamp_min(1))
    return weight if cfg.class_weights == "inverse" else weight.sqrt()


def running(
    outputs: list[tuple[Tensor, Tensor]], loss_steps: Tensor, cfg: Config, here: dist.Ranks
) -> dict[str, float]:
    """Loss, accuracy and weighted F1 of the epoch's training steps, mean over seeds, as the weights were then."""
    logits = torch.cat([out.float() for out, _ in outputs], 1).cpu()
    y = torch.cat([y for _, y in outputs], 1).cpu()
    sums = dist.all_sum(float(loss_steps.mean(1).sum()), device=here.device)[0] / len(outputs)
    head = cfg.model.head
    there = known(y)
    y = torch.where(there if y.ndim < 3 else there[..., None], y, 0)
    if head == "regression":
        answers, y = level(logits[..., 0], cfg.label_scheme), level(y, cfg.label_scheme)
    else:
        answers = (logits > 0).float() if head == "emotions" else logits.argmax(-1)
    names = range(-3, 4) if head == "regression" else range(2 if head == "emotions" else len(HEADS[head]))
    pairs = [tuple(side[k][there[k]].flatten().tolist() for side in (y, answers)) for k in range(len(y))]
    gathered = dist.gather(pairs)
    each = []
    for k in range(len(pairs)):
        truth, said = ([v for part in gathered for v in part[k][side]] for side in (0, 1))
        each.append(classification(truth, said, list(names)))
    return {"loss": sums} | {name: sum(s[name] for s in each) / len(each) for name in ("accuracy", "weighted_f1")}


def plain(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """The guide's five test metrics, as far as the head has them, mean over seeds."""
    names = {"accuracy": "accuracy", "precision": "precision_weighted", "recall": "recall_weighted",
             "f1": "weighted_f1", "loss": "loss"}  # fmt: skip
    return {ours: scores[name]["mean"] for ours, name in names.items() if name in scores}


def load_weights(model: Fusion, path: str) -> str:
    """Weights of a checkpoint, or of the guide's best_model.pth (mlp, one seed); returns what was loaded."""
    if not path.endswith((".pth", ".pt")):
        return checkpoint.load_model(model, checkpoint.resolve(path, prefer="best"))
    return load_original(model, path)


def describe(folder: Path, cfg: Config) -> dict[str, Any]:
    """How each modality's features were made, as far as their store says."""
    found = {}
    for m in MODALITIES:
        index = Path(cfg.stores.get(m, folder / m)) / "index.json"
        if index.is_file():
            info = json.loads(index.read_text())
            found[m] = {key: value for key, value in info.items() if key not in ("ids", "shards")}
    return found


def place_data(cfg: Config, made: bool, found: str | None) -> str:
    """Where the data are: given, made on the spot, or in a place that the guide knows."""
    if made:
        mock = Path(str(cfg.out), "mock")
        if not (mock / "mosei_index.json").exists():
            print(f"making a synthetic data set below {mock}")
            make_mock(mock, MOCK)
        return str(mock)
    if cfg.data_root is not None or found is not None:
        return str(cfg.data_root or found)
    raise UserError(
        f"no index file or data for the train split in {' or '.join(PLACES)}: --data-dir says where it is, "
        "python tools/download_mosei.py --mock makes a synthetic set, --fast needs none"
    )


def warn_overfit(history: list[dict], say: Callable[[str], None]) -> None:
    """Says so when the valid loss rose while the training loss fell."""
    if len(history) < 2:
        return
    low = min(history, key=lambda point: point["Val/Loss"])
    last = history[-1]
    if last["Val/Loss"] > 1.05 * low["Val/Loss"] and last["Train/Loss"] < low["Train/Loss"]:
        say(
            f"overfitting: valid loss was lowest ({low['Val/Loss']:.4f}) in epoch {low['epoch']} and ended at "
            f"{last['Val/Loss']:.4f}: raise --dropout, --feature-noise, --modality-dropout or --weight-decay"
        )


if __name__ == "__main__":
    config.run(Config, main)
