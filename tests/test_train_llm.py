"""train_llm.py as a user runs it: killed, stopped and resumed, on several processes, and given what it cannot use."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch._dynamo  # the optimiser loads it: seconds that no forked rank spends, once it is here
import torch.utils.tensorboard
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import train_llm
from common import checkpoint, config, dist, optim
from data.clips import ClipData, Features, load_splits
from data.loader import window
from model import mllm as multimodal
from tests.conftest import FORK, end

ROOT = Path(train_llm.__file__).parent
# two epochs of 20 optimiser steps; each epoch is 3 1/3 passes over the 24 clips
STEPS, LONG = 40, ["--epochs", 2, "--iters-per-epoch", 20, "--batch-size", 2, "--save-steps", 3]

pytestmark = pytest.mark.usefixtures("signals")


def train(argv):
    """train_llm.py with this command line, in this process; its exit code."""
    sys.argv = ["train_llm.py", *map(str, argv)]
    try:
        config.run(train_llm.Config, train_llm.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def fails(capsys):
    """The one line with which a command line ends in exit code 2."""

    def line(*argv):
        capsys.readouterr()
        assert train(argv) == 2
        lines = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("warning: ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("train_llm.py: error: ")
        return lines[0].removeprefix("train_llm.py: error: ")

    return line


def model_bytes(out, name="last"):
    return (out / "checkpoints" / name / "model.safetensors").read_bytes()


def newest_step(out):
    newest = checkpoint.newest(out / "checkpoints")
    return checkpoint.read_state(newest)["step"] if newest else 0


# ---- killed


@pytest.fixture(scope="module")
def unbroken(merr, tmp_path_factory):
    """Weights of the two-process run that nobody killed."""
    from tests.conftest import run_ranks

    out = tmp_path_factory.mktemp("unbroken")
    assert run_ranks(2, train, [*merr.argv, *LONG, "--out", out]) == [0, 0]
    assert checkpoint.read_state(out / "checkpoints" / "last")["step"] == STEPS
    return model_bytes(out)


def torchrun(argv, output, whole):
    """torchrun with two processes of train_llm.py, forked from this one, which saves it the import of torch.

    Unless `whole`, its agent forks the ranks as well instead of starting Python anew.
    """

    def agent():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        from torch.distributed.run import main

        os.setsid()
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["OMP_NUM_THREADS"] = "1"
        if whole:
            main(["--standalone", "--nproc-per-node", "2", str(ROOT / "train_llm.py"), *map(str, argv)])
        else:
            one_node = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
            elastic_launch(LaunchConfig(**one_node, nproc_per_node=2, start_method="fork", max_restarts=0), rank)(argv)

    process = FORK.Process(target=agent)
    process.start()
    return process


def rank(argv):
    dist.LAUNCHED, dist.PARENT = True, os.getppid()  # read at import, which was before the fork
    sys.exit(train(argv))


def logged_steps(out):
    with suppress(FileNotFoundError):
        return sum(1 for _ in open(out / "log.jsonl"))
    return 0


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


def workers(agent, out):
    """The processes of rank 0, which holds the lock, and rank 1."""
    first = json.loads((out / ".lock").read_text())["pid"]
    both = sorted(psutil.Process(agent.pid).children(), key=lambda process: process.pid != first)
    assert [process.pid == first for process in both] == [True, False]
    return both


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "torchrun"])
def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(merr, ranks, tmp_path, unbroken, victim):
    argv, out = [*merr.argv, *LONG, "--out", tmp_path / "run"], tmp_path / "run"
    at = random.randint(4, 15)  # in the first epoch, after its first checkpoint
    agent = torchrun(argv, tmp_path / "output", whole=victim == "torchrun")
    try:
        wait_until(lambda: logged_steps(out) >= at, 60, (tmp_path / "output").read_text)
        processes = workers(agent, out)
        os.kill(agent.pid if victim == "torchrun" else processes[int(victim[-1])].pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive, f"{alive} train on; {(tmp_path / 'output').read_text()}"
        agent.join(20)
        assert agent.exitcode == (-signal.SIGKILL if victim == "torchrun" else 1)
    finally:
        end(agent)
    saved = newest_step(out)
    assert 3 <= saved < 20, f"killed at step {at}"
    assert saved % 3 == 0

    outputs = ranks(2, talking, train, [*merr.argv, "--out", out, "--resume"])
    assert [code for code, _ in outputs] == [0, 0]
    assert f"resumed from {out}/checkpoints/step_{saved:06d}: 4/4 LoRA tensors, 6/6 projection tensors" in outputs[0][1]
    assert outputs[1][1] == ""  # rank 0 alone prints
    assert model_bytes(out) == unbroken


def talking(function, *args):
    """(what function(*args) returns, what it printed)"""
    with redirect_stdout(io.StringIO()) as said:
        result = function(*args)
    return result, said.getvalue()


# ---- killed inside a save, by one process


@pytest.fixture(scope="module")
def single(merr, tmp_path_factory):
    """The folder of a one-process run that nobody stopped."""
    out = tmp_path_factory.mktemp("single") / "run"
    process = FORK.Process(target=lambda: sys.exit(train([*merr.argv, *LONG, "--out", out])))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return out


def killed_at(call, number, argv):
    """A run that dies by SIGKILL when it calls checkpoint.<call> for the `number`th time; its exit code."""

    def dies():
        calls, function = [], getattr(checkpoint, call)

        def counted(*args):
            calls.append(args)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        setattr(checkpoint, call, counted)
        train(argv)

    process = FORK.Process(target=dies)
    process.start()
    process.join(60)
    return process.exitcode


# the second save is that of step 6: before its first file, among its fsyncs, renamed but not linked
@pytest.mark.parametrize(("call", "number", "saved"), [("save_file", 3, 3), ("_sync", 12, 3), ("_link", 2, 6)])
def test_a_kill_inside_a_save_costs_at_most_that_save(merr, tmp_path, capsys, single, call, number, saved):
    out = tmp_path / "run"
    assert killed_at(call, number, [*merr.argv, *LONG, "--out", out]) == -signal.SIGKILL
    assert newest_step(out) == saved
    assert train([*merr.argv, "--out", out, "--resume"]) == 0
    assert f"resumed from {out}/checkpoints/step_{saved:06d}: " in capsys.readouterr().out
    assert model_bytes(out) == model_bytes(single)
    assert not list((out / "checkpoints").glob(".tmp-*"))


# ---- asked to stop


def stopped(argv, at, victims):
    """A run in which the ranks `victims` get SIGTERM during optimiser step `at`; its exit code."""
    schedule = train_llm.lr_at

    def lr_at(step, total, cfg):
        if step == at and int(os.environ["RANK"]) in victims:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, total, cfg)

    train_llm.lr_at = lr_at
    return train(argv)


@pytest.mark.parametrize("victims", [(0, 1), (0,), (1,)])
def test_sigterm_to_some_ranks_stops_all_after_the_same_step(merr, ranks, tmp_path, unbroken, victims):
    argv, out = [*merr.argv, *LONG, "--out", tmp_path / "run"], tmp_path / "run"
    outputs = ranks(2, talking, stopped, argv, 7, victims)
    assert [code for code, _ in outputs] == [0, 0]
    assert outputs[0][1].endswith(f"\nstopped after step 8 of {STEPS}; go on with the same command and --resume\n")
    assert newest_step(out) == 8  # no multiple of --save-steps
    assert not (out / ".lock").exists()
    assert ranks(2, train, [*argv, "--resume"]) == [0, 0]
    assert model_bytes(out) == unbroken


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_before_it_ends(merr, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    agent = torchrun([*merr.argv, *LONG, "--out", out], output, whole=True)
    try:
        wait_until(lambda: logged_steps(out) >= 2, 60, output.read_text)
        os.kill(agent.pid, signal.SIGTERM)
        agent.join(20)
        assert agent.exitcode == 1  # torchrun's own
    finally:
        end(agent)
    step = newest_step(out)
    assert f"\nstopped after step {step} of {STEPS}; go on with the same command and --resume\n" in output.read_text()
    assert (out / "checkpoints" / "last" / "optimizer.safetensors").is_file()
    assert not (out / ".lock").exists()  # rank 0 came to the end of main()


@pytest.mark.slow
def test_sigterm_to_a_plain_run(merr, tmp_path, capsys, single):
    out = tmp_path / "run"
    argv = [*merr.argv, *LONG, "--out", out]
    command = [sys.executable, str(ROOT / "train_llm.py"), *map(str, argv)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            wait_until(lambda: logged_steps(out) >= 2, 60, lambda: f"{out} has no log of two steps")
            process.terminate()
            said, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    step = newest_step(out)
    assert 2 <= step < STEPS
    assert said.splitlines()[-1] == f"stopped after step {step} of {STEPS}; go on with the same command and --resume"
    assert train([*argv, "--resume"]) == 0
    assert model_bytes(out) == model_bytes(single)


# ---- the loss is a mean over the answer tokens of the whole step


class Caught(Exception):
    """Ends a run at its first optimiser step."""


def first_step(argv):
    """Gradients of the first optimiser step, and the answer tokens of each of this rank's micro-batches."""
    gradients, counts, pack = [], [], train_llm.pack

    def catch(optimizer, clip):
        gradients.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        raise Caught

    def counted(samples, cfg):
        batch = pack(samples, cfg)
        counts.append(batch.targets)
        return batch

    optim.grad_norm, train_llm.pack = catch, counted
    with suppress(Caught):
        train(argv)
    return gradients, counts


def dense_gradients(argv):
    """The same gradients one sample at a time: no packing, no DDP, the embeddings put together here."""
    cfg = config.load(train_llm.Config, list(map(str, argv)))
    model, tokenizer = multimodal.build(cfg.model, torch.float32, torch.device("cpu"))
    optimizer = optim.build(model, cfg.optim)
    clips = load_splits(cfg.data, cfg.seed, False, lambda _: None)["train"]
    data = ClipData(clips, Features(cfg.model.rows(), "patches", cfg.data), cfg.data, tokenizer.encode, True, cfg.seed)
    total, tokens = torch.zeros(()), 0
    for epoch, index in window(0, len(data), cfg.seed, 8, 1, 0, 1)[0]:
        sample = data.sample(index, epoch)
        parts = []
        for piece in sample.pieces:
            if isinstance(piece, str):
                linear = model.projections[piece]
                parts.append(sample.values[piece].reshape(-1, linear.in_features) @ linear.weight.T + linear.bias)
            else:
                parts.append(model.llm.model.embed_tokens.weight[piece])
        parts.append(model.llm.model.embed_tokens.weight[sample.answer])
        logits = model.llm(inputs_embeds=torch.cat(parts)[None])[0]
        n = len(sample.answer)
        total = total + F.cross_entropy(logits[-n - 1 : -1], torch.tensor(sample.answer), reduction="sum")
        tokens += n
    (total / tokens).backward()
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def test_batches_ranks_and_accumulation_give_the_same_gradients(merr, ranks, tmp_path):
    argv = [*merr.argv, "--full", "--iters-per-epoch", 1, "--out", tmp_path / "run"]
    [(one, counts)] = ranks(1, first_step, [*argv, "--batch-size", 8])
    [(accumulated, halves)] = ranks(1, first_step, [*argv, "--batch-size", 4, "--accum", 2])
    (of_rank, [first]), (of_other, [second]) = ranks(2, first_step, [*argv, "--batch-size", 4])
    assert halves == [first, second]
    assert counts == [first + second]
    assert first != second  # else a mean of means would be right too
    reference = dense_gradients([*argv, "--batch-size", 8])
    assert max(float(gradient.abs().max()) for gradient in reference) > 0.1
    for found in (one, accumulated, of_rank, of_other):
        for gradient, expected in zip(found, reference, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
