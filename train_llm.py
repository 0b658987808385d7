"""Instruction-tune a language model on the face, voice and words of clips (Emotion-LLaMA) or of dialogues (MultiMood).

$ python train_llm.py --fast
$ torchrun --nproc-per-node 4 train_llm.py --cfg configs/stage1.yaml
$ torchrun --nproc-per-node 4 train_llm.py --cfg configs/multimood.yaml
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from common import checkpoint, config, deepspeed, dist, optim, shard
from common.config import UserError, opt
from common.log import Logger
from common.optim import OptimConfig, lr_at
from common.run import open_run, resume_or_start
from common.weights import find_weights, identity
from data.clips import ClipData, DataConfig
from data.loader import Order, Samples, by_length, part_of, window, windows
from data.turns import SupportConfig, is_turns
from evals import emotion
from evals.clips import ClipTask
from evals.emotion import DecodeConfig
from evals.reconstruct import ReconstructTask
from evals.turns import TurnTask
from model.mamba import compressor_identity
from model.mllm import Batch, Mllm, MllmConfig, build, checkpoint_files, pack
from model.published import load_published

Task = ClipTask | TurnTask | ReconstructTask


@dataclass
class Config:
    model: MllmConfig = field(default_factory=MllmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    support: SupportConfig = field(default_factory=SupportConfig)  # read where data_root is a file of turns
    ckpt: str | None = opt(None, "start from these weights: a previous stage's run folder or checkpoint", "--ckpt")
    out: str | None = opt(None, "run folder; default: out/<config name>", "--out")
    epochs: int = opt(30, "epochs in all", "--epochs", span=(20, 50))
    iters_per_epoch: int = opt(0, "optimiser steps an epoch; 0: one pass over the data", "--iters-per-epoch")
    batch_size: int = opt(1, "clips a process and micro-batch", "--batch-size", span=(1, 2))
    accum: int = opt(1, "micro-batches an optimiser step", "--accum")
    tokens_per_batch: int = opt(
        0, "most tokens of a micro-batch: a step takes the same clips, dealt by length to processes and as many "
        "micro-batches as that takes; 0: by number", "--tokens-per-batch",
    )  # fmt: skip
    precision: str = opt("bf16", "arithmetic; fp32 on a CPU", "--precision", choices=("fp32", "bf16", "fp16"))
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    compile: bool = opt(
        False, "torch.compile norms, rotations and MLPs of the language model: a minute before the first step",
        "--compile",
    )  # fmt: skip
    shard: str | None = opt(
        None, "hold a part of the weights on each process (FSDP2); full: gather a layer's only while it runs (ZeRO-3), "
        "grads: keep them until its backward pass (ZeRO-2)", "--shard", choices=("grads", "full"), bare="full",
    )  # fmt: skip
    offload: bool = opt(False, "--shard: hold the parts, and the optimiser's, in host memory", "--offload")
    deepspeed: str | None = opt(
        None, "DeepSpeed's JSON, for its ZeRO stage, offloading, precision, clipping, batch and optimiser; the command "
        "must not say otherwise", "--deepspeed",
    )  # fmt: skip
    tf32: bool = opt(False, "multiply float32 matrices in TF32 on a GPU; no effect on a CPU", "--tf32")
    seed: int = opt(42, "seed of everything random", "--seed")
    num_workers: int = opt(6, "threads that read clips ahead", "--num-workers")
    log_every: int = opt(50, "optimiser steps between log lines", "--log-every")
    evaluate: bool = opt(False, "score the validation clips while training", "--evaluate")
    eval_every: int = opt(5, "epochs between evaluations", "--eval-every")
    eval_batch_size: int = opt(8, "clips decoded together", "--eval-batch-size")
    eval_limit: int = opt(0, "most validation clips; 0: all")
    save_every: int = opt(1, "epochs between checkpoints", "--save-every")
    save_steps: int = opt(
        0, "also a checkpoint every so many steps; 0: none, or 500 by --save-strategy steps", "--save-steps"
    )
    save_strategy: str | None = opt(
        None, "checkpoints by steps only, by epochs only, or no others than the last and the best; none: by both",
        "--save-strategy", choices=("no", "steps", "epoch"),
    )  # fmt: skip
    save_best: bool = opt(False, "keep `best` pointing at the best checkpoint by --metric", "--save-best")
    metric: str = opt(
        "weighted_f1", "validation score that chooses the best; of a dialogue's field its weighted F1", "--metric",
        choices=tuple(dict.fromkeys((*ClipTask.METRICS, *TurnTask.METRICS, *ReconstructTask.METRICS))),
    )  # fmt: skip
    patience: int = opt(
        0, "evaluations without a better --metric that end the run, which keeps its best; 0: never", "--patience"
    )
    keep: int = opt(0, "newest checkpoints to keep besides the best; 0: all", "--keep")
    keep_best: int = opt(1, "best checkpoints that --keep never deletes", "--keep-best")
    test: bool = opt(False, "read the test split once, after training", "--test")
    resume: str | None = opt(None, "go on from the run's last checkpoint, or from PATH", "--resume", bare="last")
    overwrite: bool = opt(False, "replace the run in --out", "--overwrite")
    fast: bool = opt(
        False, "a small run on synthetic clips: no data, no weights, under three minutes on a CPU", "--fast"
    )
    dry_run: bool = opt(False, "build the model without memory, print its sizes and one sample, and stop", "--dry-run")

    def guided(self) -> bool:
        """Whether the ranges of Emotion-LLaMA's guide are about this run."""
        return not is_turns(self.data.data_root)

    def chooses(self) -> bool:
        """Whether evaluations choose a best checkpoint."""
        return self.save_best or self.patience > 0

    def saves(self) -> tuple[int, int]:
        """Epochs and steps between checkpoints, 0: none; the last and the best come besides."""
        by_epochs = self.save_every if self.save_strategy in (None, "epoch") else 0
        by_steps = {None: self.save_steps, "steps": self.save_steps or 500}.get(self.save_strategy, 0)
        return by_epochs, by_steps


def main(cfg: Config) -> None:  # noqa: C901 (the whole run, in the order in which it happens)
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if cfg.seed < 0:
        raise UserError(f"--seed: {cfg.seed} is negative")
    cfg = deepspeed.apply(cfg, here.world, say)
    if cfg.fast:
        torch.set_num_threads(1)  # its matrices are too small for more to pay
        dist.connect(here, bool(cfg.shard))
        cfg = dist.main_first(here, partial(task_of(cfg).prepare_fast, cfg))
    dist.keep_memory(here.device)
    if cfg.dry_run:
        return task_of(cfg)(cfg).dry_run(say)
    cfg, start = resume_or_start(cfg, "llm", say)
    out = Path(cfg.out)
    precision = cfg.precision if here.device.type == "cuda" else "fp32"  # bf16 is slower than fp32 on most CPUs
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    amp = partial(torch.autocast, here.device.type, dtype, enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(here.device.type, enabled=precision == "fp16")
    dist.use_tf32(cfg.tf32, here.device)

    # ---- data and model, checked before any connection is opened
    task = task_of(cfg)(cfg)
    *_, previous = together(
        *task.opens(here.device, say),
        lambda: find_weights(cfg.model.llm, "language model") if start is None or not cfg.model.full else None,
        lambda: check_choice(cfg, task),
        lambda: check_shard(cfg, here.device),
        lambda: optim.check(cfg.optim),
        lambda: checkpoint.resolve(cfg.ckpt, prefer="best") if cfg.ckpt and not cfg.ckpt.endswith(".pth") else None,
    )
    mapped = cfg.shard is not None and cfg.model.quant == "none"  # no process ever holds all of the base
    home = torch.device("cpu") if mapped else here.device
    mllm, tokenizer = build(cfg.model, torch.float32 if cfg.model.full else dtype, home, start, mapped)
    if mllm.llm.coverage:
        say(f"{cfg.model.llm}: {mllm.llm.coverage}")
    parts = task.parts(tokenizer, say)
    if cfg.patience and not task.valid:
        raise UserError("--patience: there are no validation clips (--valid-file, or --data.valid-share above 0)")
    per_step = cfg.batch_size * here.world * cfg.accum
    order, iters = plan(cfg, parts, per_step, say)
    optim.warmup(cfg.epochs * iters, cfg.optim)  # what it cannot be is said before anything is trained
    if start is None:
        task.fit(mllm, say)
    if cfg.compile:
        mllm.llm.compile_parts()
    if cfg.shard:
        dist.connect(here, sharded=True)
        layers, release = mllm.llm.model.layers, cfg.shard == "full"
        shard.shard(mllm, layers, here, dtype, release, cfg.offload, ("score", "generate", "tally"))
    optimizer = optim.build(mllm, cfg.optim)
    progress = begin(cfg, mllm, optimizer, scaler, start, previous, here, say)
    task.follow(mllm)

    dist.connect(here)
    lock = dist.main_first(here, partial(open_run, cfg, out, start))
    stop = dist.Stop()
    log = Logger(out, here.main)
    log.truncate(progress.step)
    ddp = mllm
    if here.world > 1 and not cfg.shard:
        ids = [here.device.index] if here.device.type == "cuda" else None
        ddp = DDP(mllm, device_ids=ids, broadcast_buffers=False)
    total = cfg.epochs * iters
    trained = sum(p.numel() for p in mllm.parameters() if p.requires_grad)
    cut = f", dealt by length, a micro-batch up to {cfg.tokens_per_batch} tokens" if cfg.tokens_per_batch else ""
    say(f"batch {cfg.batch_size} x {here.world} processes x {cfg.accum} accumulated = {per_step}{cut}; {iters} steps "
        f"an epoch, {total} in all; {trained:,} parameters train; {precision} on {here.device.type}")  # fmt: skip
    facts = {
        "config": config.to_dict(cfg), "commit": checkpoint.commit(), "labels": task.labels, "counts": task.counts,
        "features": task.describe(), "base": None if cfg.model.full else identity(find_weights(cfg.model.llm)),
        "compressor": compressor_identity(frozen) if (frozen := cfg.model.towers.frozen_compressor) else None,
        "world": here.world, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    files = checkpoint_files(mllm, tokenizer)

    saved = progress.step if start else -1  # step of the newest checkpoint; every rank knows it without looking

    def save(name: str) -> None:
        nonlocal saved
        saved = progress.step
        state = facts | vars(progress) | {"epoch": progress.step // iters, "scaler": scaler.state_dict()}
        links = ("last", "best") if name == progress.best.get("checkpoint") else ("last",)
        spare = [point["checkpoint"] for point in progress.ranking]
        shard.release(mllm)  # an evaluation leaves weights gathered
        tensors = optim.state_tensors(mllm, optimizer)
        written = checkpoint.save_parts(out / "checkpoints", name, mllm, tensors, here) if cfg.shard else None
        what = (mllm, tensors, state, files)
        write = partial(checkpoint.save, out / "checkpoints", name, *what, links, cfg.keep, spare, written)
        dist.main_first(here, lambda: write() and None)

    # the ranks gather a sharded layer together, so each is asked about all clips; in autocast, whose dtype layers have
    asked, scoring = (replace(here, rank=0, world=1), amp) if cfg.shard else (here, nullcontext)

    # ---- training: one pass of this loop is one optimiser step
    mllm.train()
    meter = Meter()
    bar = log.bar(total, progress.step, "train")
    steps = range(progress.step, progress.step if progress.ended(cfg, total) else total)
    for micro_batches in meter.waiting(windows(parts, map(dealt(cfg, parts, order, here), steps), cfg.num_workers)):
        batches = [pack(samples, cfg.model).to(here.device) for samples in micro_batches]
        if stop.orphaned():
            raise SystemExit("torchrun is gone: this rank stops")
        tokens, stopping = dist.all_sum(sum(b.targets for b in batches), stop.requested, device=here.device)
        if stopping:
            break
        dist.seed_all(cfg.seed, progress.step, here.rank)
        loss_sum = 0.0
        for i, batch in enumerate(batches):
            # sharded gradients are summed up sharded: whole ones, kept for the last micro-batch, would not fit
            last = i == len(batches) - 1 or ddp is mllm
            with answering_oom(batch, here.device), nullcontext() if last else ddp.no_sync():
                with amp():
                    loss = ddp(batch)
                # gradients are averaged over ranks, the loss is a mean over the answer tokens of the whole step
                scaler.scale(loss * (here.world / max(tokens, 1))).backward()
            loss_sum += float(loss.detach())
        scaler.unscale_(optimizer)
        norm = optim.grad_norm(optimizer, cfg.optim.grad_clip)
        lr = lr_at(progress.step, total, cfg.optim, iters)
        # fp16: the scaler skips a step whose gradient overflowed
        broken = not math.isfinite(loss_sum) or (not math.isfinite(norm) and precision != "fp16")
        if dist.all_sum(broken, device=here.device)[0]:
            ids = ", ".join(sample.id for samples in micro_batches for sample in samples)
            raise UserError(
                f"step {progress.step}: loss {loss_sum / max(tokens, 1):.4g}, gradient norm {norm:.4g}, lr {lr:.3g}, "
                f"clips {ids}; the last checkpoint is kept: lower --lr, set --grad-clip, or check these clips' features"
            )
        optim.set_lr(optimizer, lr)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        step, epoch, at_end = progress.step, progress.step // iters, progress.step % iters == 0
        bar.update()
        meter.add(loss_sum, tokens)
        if step % cfg.log_every == 0 or step == total:
            numbers = meter.read(here) | ({"pool": order.pool((step - 1) * per_step)} if order.ramp else {})
            progress.history.append({"step": step, "loss": numbers["loss"]})
            log(step, epoch=step / iters, lr=lr, grad_norm=norm, **numbers)
            bar.set_postfix(loss=f"{numbers['loss']:.3f}")

        name, better = f"epoch_{epoch:03d}", False
        if at_end and task.valid and cfg.evaluate and (epoch % cfg.eval_every == 0 or step == total):
            with scoring():
                scores = task.validate(mllm, tokenizer, asked, amp, log, step)
            better = progress.scored(cfg, task, scores, epoch, name)
        ended = progress.ended(cfg, total)
        by_epochs, by_steps = cfg.saves()
        if at_end and ((by_epochs and epoch % by_epochs == 0) or better or ended):
            save(name)
        elif by_steps and step % by_steps == 0:
            save(f"step_{step:06d}")
        if ended:
            break
    bar.close()

    # ---- the end, or a stop asked for
    if not progress.ended(cfg, total):
        if saved < progress.step:
            save(f"step_{progress.step:06d}")
        say(f"stopped after step {progress.step} of {total}; go on with the same command and --resume")
    else:
        stop.release()  # not before a stop has saved: schedulers send SIGTERM more than once
        results = facts | vars(progress) | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S")}
        say(f"finished: {out / 'checkpoints'}{progress.summary(cfg, total)}")
        warn_overfit(progress.history, say)
        if cfg.test:
            checkpoint.load_model(mllm, out / "checkpoints" / ("best" if progress.best else "last"))
            with scoring():
                results["test"] = task.test(mllm, tokenizer, asked, say)
        if here.main:
            (out / "results.json").write_text(json.dumps(results, indent=1))
    log.close()
    if lock:
        lock.release()
    # DDP goes before the group: were it the group's last user, it would wait for threads that wait for Python's lock
    del ddp
    dist.cleanup()


def task_of(cfg: Config) -> type[Task]:
    """What the run is about: clips (Emotion-LLaMA), turns of dialogues or what was said before them (MultiMood)."""
    if cfg.support.reconstruct != "none":
        return ReconstructTask
    return TurnTask if is_turns(cfg.data.data_root) else ClipTask


def together(*attempts: Callable) -> list:
    """The results of all attempts, or one UserError that names everything that is wrong."""
    results, problems = [], []
    for attempt in attempts:
        try:
            results.append(attempt())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return results


def check_choice(cfg: Config, task: Task) -> None:
    """UserError where the run cannot choose a checkpoint, or stop, as it is asked to."""
    for flag, value in (("--patience", cfg.patience), ("--tokens-per-batch", cfg.tokens_per_batch)):
        if value < 0:
            raise UserError(f"{flag}: {value} is negative")
    if cfg.keep_best < 1:
        raise UserError(f"--keep-best: {cfg.keep_best} is below 1")
    if cfg.patience and not cfg.evaluate:
        raise UserError("--patience: needs --evaluate")
    if cfg.keep_best > 1 and not cfg.chooses():
        raise UserError("--keep-best: needs --save-best")
    emotion.check(cfg.decode, True)
    if cfg.metric not in task.METRICS:
        raise UserError(f"--metric {cfg.metric}: not a score of these data ({', '.join(task.METRICS)})")


def check_shard(cfg: Config, device: torch.device) -> None:
    """UserError where the parameters cannot be sharded as asked."""
    if cfg.offload and not cfg.shard:
        raise UserError("--offload: needs --shard")
    if cfg.offload and device.type == "cpu":
        raise UserError("--offload: there is no GPU here whose memory it could spare")
    if cfg.shard and cfg.precision == "fp16":
        raise UserError("--shard: not in fp16, use --precision bf16")
    if cfg.shard and cfg.decode.temperature > 0:
        raise UserError("--shard: all processes must choose the same tokens, so --temperature must be 0")
    if cfg.shard and cfg.decode.cuda_graphs:
        raise UserError("--shard: layers are gathered at every step, so --cuda-graphs cannot replay it")
    if cfg.shard and cfg.decode.compile_steps:
        raise UserError("--shard: layers are gathered at every step, so --compile-steps cannot compile it")


def plan(cfg: Config, parts: Sequence[Samples], per_step: int, say: Callable[[str], None]) -> tuple[Order, int]:
    """The order of training samples, and the optimiser steps of an epoch."""
    size, replayed = len(parts[0]), sum(map(len, parts[1:]))
    ratio = cfg.data.replay_ratio if replayed else 0.0
    iters = cfg.iters_per_epoch or max(1, int(size / (1 - ratio)) // per_step)
    if cfg.data.curriculum == "none":
        return Order(size, cfg.seed, replay=replayed, ratio=ratio), iters
    assert isinstance(parts[0], ClipData)
    ranked = parts[0].easy_to_hard(cfg.data.curriculum)
    ramp = cfg.data.curriculum_epochs * iters * per_step
    share = cfg.data.curriculum_share
    order = Order(size, cfg.seed, [index for _, index in ranked], share, ramp, replayed, ratio)
    kind = {"modalities": "streams", "length": "words", "both": "streams, words"}[cfg.data.curriculum]
    easy, hard = (", ".join(map(str, ranked[at][0])) for at in (0, -1))
    say(f"curriculum {cfg.data.curriculum}: {order.pool(0)} of {size} clips at first, all after "
        f"{cfg.data.curriculum_epochs} epochs; {kind}: from {easy} to {hard}")  # fmt: skip
    return order, iters


def dealt(cfg: Config, parts: Sequence[Samples], order: Order, here: dist.Ranks) -> Callable[[int], list]:
    """Step -> (pass, index) of this rank's micro-batches in it."""
    ranks = {"rank": here.rank, "world": here.world}
    if not cfg.tokens_per_batch:
        return partial(window, order=order, batch=cfg.batch_size, accum=cfg.accum, **ranks)

    def length(epoch: int, index: int) -> int:
        part, index = part_of(parts, index)
        return part.tokens(index, epoch, cfg.model.places)

    per_step = cfg.batch_size * here.world * cfg.accum
    return partial(by_length, order=order, length=length, per_step=per_step, most=cfg.tokens_per_batch, **ranks)


@contextmanager
def answering_oom(batch: Batch, device: torch.device) -> Iterator[None]:
    """A UserError that says how large the batch was, and what makes it smaller, where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0
        raise UserError(
            f"out of memory with {len(batch.ids)} clips of {sum(batch.lengths):,} tokens, at a peak of {peak:.1f} GiB: "
            "lower --batch-size and raise --accum, or --tokens-per-batch; --grad-checkpoint, --quant and --image-size "
            "save memory too"
        ) from None


def begin(
    cfg: Config, mllm: Mllm, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, start: Path | None,
    previous: Path | None, here: dist.Ranks, say: Callable[[str], None],
) -> "Progress":  # fmt: skip
    """Where the run begins: fresh, from a previous stage's weights, or where it stopped, with all that it had then."""
    if start is None:
        if previous is not None:
            say(f"weights of {previous}: {checkpoint.load_model(mllm, previous)}")
        elif cfg.ckpt:
            say(f"weights of {cfg.ckpt}: {load_published(mllm, cfg.ckpt)}")
        return Progress()
    say(f"resumed from {start}: {checkpoint.load_model(mllm, start)}")
    optim.load_state_tensors(mllm, optimizer, checkpoint.read(start, checkpoint.OPTIMIZER))
    state = checkpoint.read_state(start)
    scaler.load_state_dict(state["scaler"])
    for name, now in (("world", here.world), ("threads", torch.get_num_threads())):
        if state[name] != now:
            say(f"{name} was {state[name]}, is {now}: results will differ in the last digits")
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    if progress.best and not progress.ranking:  # a checkpoint of the time before --keep-best
        progress.ranking = [progress.best]
    if progress.best and progress.best["metric"] != cfg.metric:
        say(f"the best by {progress.best['metric']} so far says nothing about {cfg.metric}: the choice begins anew")
        progress = Progress(progress.step, history=progress.history)
    return progress


@dataclass
class Progress:
    """What a checkpoint remembers of the run besides tensors."""

    step: int = 0  # optimiser steps taken
    best: dict = field(default_factory=dict)  # metric, value, checkpoint
    history: list[dict] = field(default_factory=list)
    ranking: list[dict] = field(default_factory=list)  # the best, and those after it that --keep-best keeps
    stale: int = 0  # evaluations since the best

    def scored(self, cfg: Config, task: Task, scores: dict, epoch: int, name: str) -> bool:
        """Takes in the validation scores that checkpoint `name` will have; True when it is to be kept for them."""
        if cfg.metric not in scores:
            raise UserError(f"--metric {cfg.metric}: none of the validation clips that were scored gives it")
        value = scores[cfg.metric]
        self.history.append({"step": self.step, "epoch": epoch, "valid_loss": scores["loss"], cfg.metric: value})
        if not cfg.chooses():
            return False
        sign = 1 if cfg.metric in task.LOWER else -1
        point = {"metric": cfg.metric, "value": value, "checkpoint": name}
        self.ranking = sorted([*self.ranking, point], key=lambda each: sign * each["value"])[: cfg.keep_best]
        self.best, self.stale = self.ranking[0], 0 if self.ranking[0] is point else self.stale + 1
        return point in self.ranking

    def ended(self, cfg: Config, total: int) -> bool:
        """Whether the last step is taken, or patience is at its end."""
        return self.step >= total or 0 < cfg.patience <= self.stale

    def summary(self, cfg: Config, total: int) -> str:
        """How and how well it ended."""
        early = f" after step {self.step} of {total}, {self.stale} evaluations without a better {cfg.metric}"
        best = f", best {self.best['metric']} {self.best['value']:.4f}" if self.best else ""
        return (early if self.step < total else "") + best


class Meter:
    """Loss, speed and the share of time spent waiting for data since the last reading."""

    def __init__(self) -> None:
        self.hinted = False
        self._reset()

    def _reset(self) -> None:
        self.loss, self.tokens, self.waited, self.since = 0.0, 0.0, 0.0, time.perf_counter()

    def waiting(self, source: Iterator) -> Iterator:
        """`source`, with the time it takes to deliver counted."""
        while True:
            began = time.perf_counter()
            item = next(source, None)
            self.waited += time.perf_counter() - began
            if item is None:
                return
            yield item

    def add(self, loss_sum: float, tokens: float) -> None:
        self.loss, self.tokens = self.loss + loss_sum, self.tokens + tokens

    def read(self, here: dist.Ranks) -> dict[str, float]:
        """Mean loss of an answer token over all ranks, answer tokens a second, share of waiting."""
        seconds = time.perf_counter() - self.since
        loss = dist.all_sum(self.loss, device=here.device)[0] / max(self.tokens, 1)
        share = self.waited / seconds
        if share > 0.2 and here.main and not self.hinted:
            print(f"{share:.0%} of the time goes to waiting for data: raise --num-workers")
            self.hinted = True
        numbers = {"loss": loss, "answer_tokens_per_s": self.tokens / seconds, "data_wait": share}
        self._reset()
        return numbers


def warn_overfit(history: list[dict], say: Callable[[str], None]) -> None:
    """Says so when the loss on unseen clips rose while the training loss fell."""
    valid = [(point["step"], point["valid_loss"]) for point in history if "valid_loss" in point]
    losses = [point["loss"] for point in history if "loss" in point]
    if len(valid) > 1 and len(losses) > 1 and losses[-1] < losses[0]:
        at, low = min(valid, key=lambda point: point[1])
        if valid[-1][1] > 1.05 * low:
            say(
                f"overfitting: valid loss was lowest ({low:.4f}) at step {at} and ended at {valid[-1][1]:.4f}, while "
                f"the train loss fell to {losses[-1]:.4f}: stop earlier, raise --weight-decay or, of adapters, "
                "--dropout, or train with --enable-augmentation"
            )


if __name__ == "__main__":
    config.run(Config, main)
