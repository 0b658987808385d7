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
