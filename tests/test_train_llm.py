"""train_llm.py as a user runs it: killed, stopped and resumed, on several processes, and given what it cannot use."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import train_llm
from common import checkpoint, config, dist, optim
from data.clips import ClipData, Features, load_splits
from data.loader import Order, window
from evals import emotion
from model import mllm as multimodal
from tests.conftest import FORK, end
from tests.training import talking

ROOT = Path(train_llm.__file__).parent
# two epochs of 20 optimiser steps; each epoch is 3 1/3 passes over the 24 clips
STEPS, LONG = 40, ["--epochs", 2, "--iters-per-epoch", 20, "--batch-size", 2, "--save-steps", 3]
TOO_FAST = ["--lr", "1e30", "--schedule", "constant", "--grad-clip", 0]

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


def torchrun(argv, output, whole=False):
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
    """Process ids of rank 0, which holds the lock, and of rank 1."""
    first = json.loads((out / ".lock").read_text())["pid"]
    children = map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())
    both = sorted(children, key=lambda pid: pid != first)
    assert [pid == first for pid in both] == [True, False]
    return both


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "torchrun"])
def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(merr, ranks, tmp_path, unbroken, victim):
    argv, out = [*merr.argv, *LONG, "--out", tmp_path / "run"], tmp_path / "run"
    at = random.randint(4, 15)  # in the first epoch, after its first checkpoint
    agent, processes = torchrun(argv, tmp_path / "output", whole=victim == "torchrun"), []
    try:
        wait_until(lambda: logged_steps(out) >= at, 60, (tmp_path / "output").read_text)
        processes = workers(agent, out)
        os.kill(agent.pid if victim == "torchrun" else processes[int(victim[-1])], signal.SIGKILL)
        wait_until(lambda: all(map(gone, processes)), 20, (tmp_path / "output").read_text)  # nobody trains on
        agent.join(20)
        assert agent.exitcode == (-signal.SIGKILL if victim == "torchrun" else 1)
    finally:
        end(agent)
        for pid in processes:  # each leads a session of its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    saved = newest_step(out)
    assert 3 <= saved < 20, f"killed at step {at}"
    assert saved % 3 == 0

    outputs = ranks(2, talking, train, [*merr.argv, "--out", out, "--resume"])
    assert [code for code, _ in outputs] == [0, 0]
    assert f"resumed from {out}/checkpoints/step_{saved:06d}: 4/4 LoRA tensors, 6/6 projection tensors" in outputs[0][1]
    assert outputs[1][1] == ""  # rank 0 alone prints
    assert model_bytes(out) == unbroken


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
    """A run in which the ranks `victims` get SIGTERM during optimiser step `at`, and again while it is saved.

    Its exit code. Rank 1 is slow to see what is on the disk.
    """
    schedule, write, look = train_llm.lr_at, checkpoint.save_file, checkpoint.newest
    rank = int(os.environ["RANK"])

    def lr_at(step, total, cfg, iters):
        if step == at and rank in victims:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, total, cfg, iters)

    def save_file(tensors, path):
        if f"step_{at + 1:06d}" in str(path) and rank in victims:
            os.kill(os.getpid(), signal.SIGTERM)
        write(tensors, path)

    def newest(root):
        time.sleep(0.3 * rank)
        return look(root)

    train_llm.lr_at, checkpoint.save_file, checkpoint.newest = lr_at, save_file, newest
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
        assert agent.exitcode == 1, output.read_text()  # torchrun's own
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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
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
    for epoch, index in window(0, Order(len(data), cfg.seed), 8, 1, 0, 1)[0]:
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
    dealt, uneven = zip(*ranks(2, first_step, [*argv, "--batch-size", 4, "--tokens-per-batch", 100]), strict=True)
    assert len(uneven[0]) == len(uneven[1]) > 1
    assert sum(map(sum, uneven)) == first + second
    reference = dense_gradients([*argv, "--batch-size", 8])
    assert max(float(gradient.abs().max()) for gradient in reference) > 0.1
    for found in (one, accumulated, of_rank, of_other, *dealt):
        for gradient, expected in zip(found, reference, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


# ---- a user's mistakes


def rewrite(out, change):
    """Lets `change` edit the tensors of the last checkpoint."""
    path = out / "checkpoints" / "last" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def run(single, tmp_path):
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(single, tmp_path / "run", symlinks=True))


@pytest.fixture
def data(merr, tmp_path):
    """A copy of the data, to spoil."""
    return Path(shutil.copytree(merr.root, tmp_path / "merr"))


def test_an_unknown_option_names_the_nearest(fails):
    assert fails("--optim.lrr", "1") == "unknown option --optim.lrr (nearest: --optim.lr)"
    assert fails("--epochs", "two") == "--epochs: 'two' is not an int"


def test_what_is_missing_is_named_all_at_once(merr, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    name = "meta-llama/Llama-2-7b-chat-hf"
    assert fails(*merr.argv, "--llm", name, "--data-root", "none", "--features-root", "made") == (
        "annotation_file 'MERR_coarse_grained.txt' not found (looked for none/MERR_coarse_grained.txt and "
        "MERR_coarse_grained.txt); "
        "features voice, patches not found (looked for none/voice and made/voice); extract.py makes them from media; "
        f"language model '{name}' not found (looked in {name}, weights/{name}, weights/Llama-2-7b-chat-hf, "
        f"{tmp_path}/cache); get them with: hf download {name} --local-dir weights/{name} "
        "(gated: accept the licence first)"
    )
    assert not Path("out").exists()


def test_a_published_test_set_does_not_choose_the_checkpoint(merr, fails):
    assert fails(*merr.argv, "--valid-file", "lists/relative_test3_NCEV.txt") == (
        "--valid-file lists/relative_test3_NCEV.txt: that is a published test set; choose on other clips"
    )


def test_features_of_another_width_or_shape(merr, fails, data):
    argv = [*merr.argv, "--data-root", data]
    assert fails(*argv, "--model.features", "voice=4") == "features 'voice' are 5 wide, the model expects 4"
    assert fails(*argv, "--visual-width", "4") == "features 'patches' are 3 wide, the model expects 4"
    assert fails(*argv, "--image-size", "112") == (
        "visual tokens 'patches' are made at --image-size 56, 17 a picture; the model expects 1 + 64"
    )


# ---- visual tokens made online


def of_videos(trained, out, *more):
    """Two optimiser steps on drawn and spoken clips."""
    root = trained.run.parent
    return [
        "--llm", root / "base", "--data-root", trained.data, "--features-root", root / "features", "--model.features",
        "voice=504", "--visual", "patches", "--visual-width", 12, "--image-size", 56, "--lora-r", 4, "--normalize",
        "--task-pool", "emotion", "--epochs", 1, "--iters-per-epoch", 2, "--batch-size", 4, "--device", "cpu",
        "--no-grad-checkpoint", "--valid-share", 0, "--out", out, *more,
    ]  # fmt: skip


def test_tokens_made_online_train_the_same_weights_as_a_store(trained, tmp_path, capsys):
    online = ["--visual-encoder", "framestats", "--num-workers", 2]
    assert train(of_videos(trained, tmp_path / "store", "--num-workers", 0)) == 0
    assert train(of_videos(trained, tmp_path / "online", *online)) == 0
    assert model_bytes(tmp_path / "online") == model_bytes(tmp_path / "store")
    made = checkpoint.read_state(tmp_path / "online" / "checkpoints" / "last")["features"]["patches"]
    assert made | {"encoder": "framestats", "frame": "first", "pooling": "patches", "image_size": 56} == made
    middle = of_videos(trained, tmp_path / "middle", *online, "--data.frame", "middle")
    assert train(middle) == 0
    assert model_bytes(tmp_path / "middle") != model_bytes(tmp_path / "store")
    capsys.readouterr()
    again = of_videos(trained, tmp_path / "online", *online, "--resume")
    assert train(again) == 0
    assert "resumed" in capsys.readouterr().out


def test_an_encoder_that_does_not_fit_the_picture(trained, tmp_path, fails):
    argv = of_videos(trained, tmp_path / "none", "--visual-encoder")
    assert fails(*argv, "framestats", "--model.visual-options", "image_size=112") == (
        "visual tokens 'patches' are made at --image-size 112, 65 a picture; the model expects 1 + 16"
    )
    assert fails(*argv, "framestats", "--visual-width", "13") == "features 'patches' are 12 wide, the model expects 13"
    assert fails(*argv, "logmel") == "--visual-encoder logmel: gives no tokens of a picture's patches"
    assert "nearest: eva" in fails(*argv, "eve")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((3, 5)), "{0}: id '{1}' has 3 rows, expected one utterance vector (or pooling mean or frames)"),
        (np.zeros(6), "{0}: id '{1}' has width 6, 'sample_00000001' has 5"),
        (np.full(5, np.nan), "voice: id '{1}' has non-finite values"),
        (np.full(5, -np.inf), "voice: id '{1}' has non-finite values"),
    ],
    ids=["T,D", "width", "nan", "inf"],
)
def test_broken_features_are_absent_or_too_many(merr, fails, data, tmp_path, capsys, value, reason):
    first, second = "sample_00000004", "sample_00000007"
    for name in (first, second):
        np.save(data / "voice" / f"{name}.npy", value.astype(np.float32))
    argv = [*merr.argv, "--data-root", data, "--out", tmp_path / "run", "--epochs", 1, "--iters-per-epoch", 12]
    line = f"2 of 24 clips have broken features, the first: {reason.format(data / 'voice', first)}"
    assert fails(*argv) == f"{line}; more than --max-bad 0.01"
    assert not (tmp_path / "run").exists()
    assert train([*argv, "--max-bad", 0.1]) == 0
    assert f"{line}; these streams count as absent\n" in capsys.readouterr().out
    weights = load_file(tmp_path / "run/checkpoints/last/model.safetensors").values()
    assert all(torch.isfinite(each).all() for each in weights)


def test_an_unknown_label_is_named_with_its_line(merr, fails, data):
    path = data / "MERR_coarse_grained.txt"
    path.write_text(path.read_text().replace("sample_00000002 12 neutral", "sample_00000002 12 Hapy"))
    labels = ", ".join(merr.labels)
    line = f"{path}:3: unknown label 'Hapy' (nearest: happy; labels: {labels})"
    assert fails(*merr.argv, "--data-root", data) == line
    manifest = data / "clips.csv"
    manifest.write_text("id,label,text\na,happy,yes\nb,glad,no\n")
    assert fails(*merr.argv, "--manifest", manifest) == f"{manifest}:3: unknown label 'glad' (labels: {labels})"


def test_a_run_is_not_overwritten_by_accident(merr, fails, run):
    before = model_bytes(run)
    argv = [*merr.argv, "--out", run, "--epochs", 1, "--iters-per-epoch", 2]
    assert fails(*argv) == (
        f"{run} holds a run: --resume goes on with it, --overwrite replaces it, --out DIR starts elsewhere"
    )
    assert model_bytes(run) == before
    assert train([*argv, "--overwrite"]) == 0
    assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")] == ["epoch_001"]
    assert logged_steps(run) == 2


def test_resume_without_anything_to_go_on_from(merr, fails, tmp_path, capsys):
    missing = tmp_path / "old"
    assert fails(*merr.argv, "--resume", missing) == f"--resume {missing}: not found (first run: leave --resume out)"
    missing.mkdir()
    assert fails(*merr.argv, "--resume", missing) == (
        f"checkpoint {missing}: holds no checkpoint (a run folder, its checkpoints/ or one checkpoint folder)"
    )
    out = tmp_path / "run"
    assert train([*merr.argv, "--out", out, "--epochs", 1, "--iters-per-epoch", 2, "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"--resume: {out} holds no checkpoint yet, starting fresh\n")
    assert newest_step(out) == 2


def test_a_checkpoint_with_a_missing_or_an_extra_tensor(merr, fails, run):
    file = (run / "checkpoints" / "last").resolve() / "model.safetensors"
    name = "projections.voice.bias"
    rewrite(run, lambda tensors: tensors.pop(name))
    assert fails(*merr.argv, "--out", run, "--resume") == f"{file}: 9/10 tensors match the model; 1 missing: {name}"
    rewrite(run, lambda tensors: tensors.update({name: torch.zeros(32), "head.weight": torch.zeros(2)}))
    assert fails(*merr.argv, "--out", run, "--resume") == (
        f"{file}: 10/10 tensors match the model; 1 unexpected: head.weight"
    )


def test_a_change_of_shape_cannot_be_resumed(merr, fails, run):
    file = (run / "checkpoints" / "last").resolve() / "model.safetensors"
    attention = "llm.model.layers.0.self_attn"
    assert fails(*merr.argv, "--out", run, "--resume", "--lora-r", "2") == (
        f"{file}: 4 tensors of the wrong shape: {attention}.q_proj.lora_A.weight is (4, 32), not (2, 32), "
        f"{attention}.q_proj.lora_B.weight is (32, 4), not (32, 2), "
        f"{attention}.v_proj.lora_A.weight is (4, 32), not (2, 32), ..."
    )


def test_a_full_disk_keeps_what_was_saved(merr, fails, tmp_path, monkeypatch, single):
    out, write = tmp_path / "run", checkpoint.save_file

    def full(tensors, path):
        if "step_000006" in str(path) and str(path).endswith("optimizer.safetensors"):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert fails(*merr.argv, *LONG, "--out", out) == (
        f"cannot save {out}/checkpoints/step_000006: no space left on the disk; earlier checkpoints are kept"
    )
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["last", "step_000003"]
    monkeypatch.setattr(checkpoint, "save_file", write)
    assert train([*merr.argv, "--out", out, "--resume"]) == 0
    assert model_bytes(out) == model_bytes(single)


def test_a_loss_that_is_not_a_number_stops_the_run(merr, fails, tmp_path):
    out = tmp_path / "run"
    line = fails(*merr.argv, *LONG, *TOO_FAST, "--save-steps", 1, "--out", out)
    ids = ", ".join(merr.ids[index] for _, index in window(1, Order(24, 42), 2, 1, 0, 1)[0])
    assert line == (
        f"step 1: loss nan, gradient norm nan, lr 1e+30, clips {ids}; the last checkpoint is kept: "
        "lower --lr, set --grad-clip, or check these clips' features"
    )
    assert newest_step(out) == 1


def test_too_little_memory_is_answered(merr, fails, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(multimodal.HeadLoss, "backward", staticmethod(full))
    line = fails(*merr.argv, "--out", tmp_path / "run", "--batch-size", 4)
    assert line.startswith("out of memory with 4 clips of ")
    assert " tokens, at a peak of 0.0 GiB: lower --batch-size and raise --accum, or --tokens-per-batch; " in line


def stopped_by_a_mistake(argv, path):
    """The exit code and what is on stderr of a rank."""
    descriptor = os.open(path + os.environ["RANK"], os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", closefd=False)  # pytest's own goes elsewhere
    return train(argv)


def test_every_rank_stops_and_names_its_own_clips(merr, ranks, tmp_path):
    argv = [*merr.argv, *LONG, *TOO_FAST, "--out", tmp_path / "run"]
    assert ranks(2, stopped_by_a_mistake, argv, str(tmp_path / "said")) == [2, 2]
    for rank in (0, 1):
        ids = ", ".join(merr.ids[index] for _, index in window(1, Order(24, 42), 2, 1, rank, 2)[0])
        said = (tmp_path / f"said{rank}").read_text()
        assert f"train_llm.py: error: step 1: loss nan, gradient norm nan, lr 1e+30, clips {ids}; " in said
        assert "Traceback" not in said


def test_a_run_folder_in_use_is_locked(merr, fails, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        host = os.uname().nodename
        (out / ".lock").write_text(json.dumps({"host": host, "pid": other.pid}))
        assert fails(*merr.argv, "--out", out) == (
            f"{out} is in use by process {other.pid} on {host}; choose another --out, or delete {out}/.lock if that "
            "process is gone"
        )
        other.kill()
        wait_until(lambda: gone(other.pid), 5, lambda: "sleep sleeps on")
        # a zombie, as the ranks of a killed torchrun may be: its lock is nobody's
        assert train([*merr.argv, "--out", out, "--epochs", 1, "--iters-per-epoch", 1]) == 0
    assert not (out / ".lock").exists()


# ---- resuming with other settings, and stage 2


def test_flags_change_a_resumed_run_and_are_listed(merr, run, capsys):
    argv = [*merr.argv, "--out", run, "--resume", "--epochs", 3, "--lr", "1e-4"]
    assert train(argv) == 0
    said = capsys.readouterr().out
    assert "changed since the run began: optim.lr: 0.005 -> 0.0001\n" in said
    assert "changed since the run began: epochs: 2 -> 3\n" in said
    state = checkpoint.read_state(run / "checkpoints" / "last")
    assert (state["step"], state["epoch"], state["config"]["epochs"], state["config"]["batch_size"]) == (60, 3, 3, 2)


def test_stage_2_starts_from_the_weights_of_stage_1(merr, tmp_path, capsys, fails, single):
    out = tmp_path / "stage2"
    argv = [*merr.argv, "--annotation-file", "MERR_coarse_grained.txt", "--task-pool", "reason_v2=1", "--epochs", 1,
            "--iters-per-epoch", 1, "--out", out, "--lr", "1e-9", "--min-lr", "1e-9", "--ckpt"]  # fmt: skip
    assert train([*argv, single]) == 0
    folder = (single / "checkpoints" / "last").resolve()
    assert f"weights of {folder}: 4/4 LoRA tensors, 6/6 projection tensors\n" in capsys.readouterr().out
    first, second = (load_file(path / "checkpoints/last/model.safetensors") for path in (single, out))
    assert first.keys() == second.keys()
    for name, value in first.items():  # one step at a learning rate of next to nothing
        torch.testing.assert_close(second[name], value, atol=1e-7, rtol=1e-6)
    assert checkpoint.read_state(out / "checkpoints" / "last")["step"] == 1  # its own count, not stage 1's

    copy = Path(shutil.copytree(single, tmp_path / "stage1", symlinks=True))
    rewrite(copy, lambda tensors: tensors.pop("projections.cls.weight"))
    file = (copy / "checkpoints" / "last").resolve() / "model.safetensors"
    assert fails(*argv, copy, "--overwrite") == (
        f"{file}: 9/10 tensors match the model; 1 missing: projections.cls.weight"
    )
    assert fails(*argv, tmp_path / "none", "--overwrite") == (
        f"checkpoint {tmp_path}/none: not found (a run folder, its checkpoints/ or one checkpoint folder)"
    )


# ---- flags of transformers' trainer, and DeepSpeed's file

EPOCHS = ["--num_train_epochs", 3, "--iters-per-epoch", 2, "--per_device_train_batch_size", 2]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--save_strategy steps --save_steps 1 --save_total_limit 99", "s1 s2 s3 s4 s5 e3"),
        ("--save_strategy steps --save_steps 2 --save_total_limit 1", "e3"),
        ("--save_strategy steps", "e3"),  # every 500 steps
        ("--save_strategy epoch --save_steps 1", "e1 e2 e3"),
        ("--save_strategy epoch --save_every 2", "e2 e3"),
        ("--save_strategy no --save_steps 1", "e3"),
        ("--save_steps 3", "e1 s3 e2 e3"),
    ],
)
def test_which_checkpoints_a_strategy_saves(merr, tmp_path, flags, names):
    assert train([*merr.argv, *EPOCHS, *flags.split(), "--output_dir", tmp_path]) == 0
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert kept == [{"e": "epoch_00", "s": "step_00000"}[name[0]] + name[1] for name in names.split()]
    assert os.readlink(tmp_path / "checkpoints/last") == "epoch_003"


def test_without_checkpoints_by_time_the_best_is_kept(merr, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.8, 0.4], "uar")
    more = ["--evaluate", "--eval-every", 1, "--save-best", "--metric", "uar", "--save_strategy", "no"]
    assert train([*merr.argv, *EPOCHS, *more, "--out", tmp_path]) == 0
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert kept == ["epoch_001", "epoch_002", "epoch_003"]  # the first was the best then
    assert os.readlink(tmp_path / "checkpoints/best") == "epoch_002"


def test_rates_of_connectors_and_the_cosine_resume_exactly(merr, tmp_path, monkeypatch):
    argv = [*merr.argv, *EPOCHS, "--learning_rate", 2e-3, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.2]
    argv += ["--min-lr", 0, "--mm_projector_lr", 4e-3, "--save_strategy", "steps", "--save_steps", 3]
    argv += ["--logging_steps", 1, "--tf32", "True"]
    asked, groups, set_lr = [], [], optim.set_lr
    monkeypatch.setattr(dist, "use_tf32", lambda on, device: asked.append((on, device.type)))

    def watched(optimizer, lr):
        set_lr(optimizer, lr)
        groups.append({group["lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(optim, "set_lr", watched)
    assert train([*argv, "--out", tmp_path / "whole"]) == 0
    assert asked == [(True, "cpu")]
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    rates = [0, 2e-3 / 2, *(1e-3 * (1 + np.cos(np.pi * i / 4)) for i in range(4))]  # two of six steps warm up
    assert [record["lr"] for record in log if "lr" in record] == pytest.approx(rates)
    assert [sorted(each) for each in groups[1:]] == [pytest.approx([lr, 2 * lr]) for lr in rates[1:]]

    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    shutil.rmtree(tmp_path / "part/checkpoints/epoch_003")
    (tmp_path / "part/checkpoints/last").unlink()
    assert train([*argv, "--out", tmp_path / "part", "--resume"]) == 0
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")


def test_deepspeeds_file_sets_what_the_command_leaves_open(merr, tmp_path, fails, capsys):
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps({
        "zero_optimization": {"stage": 1, "overlap_comm": True}, "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto",
    }))  # fmt: skip
    argv = [*merr.argv, "--epochs", 1, "--iters-per-epoch", 1, "--deepspeed", file, "--out", tmp_path / "run"]
    assert train([*argv, "--accum", 2]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "zero1.json: stage 1 -> no --shard, gradient_clipping 0.5 -> --grad-clip 0.5, "
        "train_micro_batch_size_per_gpu 2 -> --batch-size 2\nzero1.json: not needed here: overlap_comm\n"
    )
    assert "batch 2 x 1 processes x 2 accumulated = 4" in said
    saved = checkpoint.read_state(tmp_path / "run/checkpoints/last")["config"]
    assert (saved["deepspeed"], saved["optim"]["grad_clip"], saved["shard"]) == (str(file), 0.5, None)
    assert fails(*argv, "--overwrite", "--max_grad_norm", 1.0) == (
        f"--max_grad_norm 1.0 and {file}: gradient_clipping 0.5 give optim.grad_clip different values"
    )


# ---- the log, the best checkpoint, the control


def test_a_run_writes_what_it_promises(merr, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*merr.argv, "--out", out, "--epochs", 3, "--batch-size", 4, "--accum", 2, "--evaluate", "--eval-every", 1]
    assert train([*argv, "--save-best", "--metric", "loss", "--keep", 1, "--test"]) == 0
    said = capsys.readouterr().out
    assert "valid: 6 clips held out by source video or speaker (seed 42)\n" in said
    sizes = "batch 4 x 1 processes x 2 accumulated = 8; 2 steps an epoch, 6 in all; 1,248 parameters train; fp32 on cpu"
    assert f"{sizes}\n" in said
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["valid/loss"] for record in records if "valid/loss" in record}
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    assert os.readlink(out / "checkpoints" / "best") == f"epoch_{best // 2:03d}"
    assert os.readlink(out / "checkpoints" / "last") == "epoch_003"
    kept = {path.name for path in checkpoint.checkpoints(out / "checkpoints")}
    assert kept == {"epoch_003", f"epoch_{best // 2:03d}"}
    results = json.loads((out / "results.json").read_text())
    assert results["best"] == {"metric": "loss", "value": losses[best], "checkpoint": f"epoch_{best // 2:03d}"}
    assert results["test"]["score"]["clips"] == 9
    assert (out / "config.yaml").is_file()
    assert list((out / "tensorboard").glob("events*"))


def test_the_test_split_is_read_with_the_streams_that_were_trained(merr, tmp_path, monkeypatch):
    prompts, answer = [], emotion.answer

    def reading(mllm, tokenizer, samples, *rest, **others):
        prompts.extend(sample.prompt for sample in samples)
        return answer(mllm, tokenizer, samples, *rest, **others)

    monkeypatch.setattr(emotion, "answer", reading)
    argv = ["--data.streams", "voice", "--epochs", 1, "--iters-per-epoch", 1, "--test", "--out", tmp_path / "run"]
    assert train([*merr.argv, *argv]) == 0
    assert len(prompts) == 2 * 9
    assert not any("<image>" in prompt or "person in video says" in prompt for prompt in prompts)


# ---- the order of clips, replay, augmentation


CURRICULUM = [
    "--data.curriculum", "both", "--data.curriculum-epochs", 2, "--data.curriculum-share", 0.2, "--task-pool", "reason",
    "--data.replay", "MERR_coarse_grained.txt", "--data.replay-ratio", 0.25, "--augmentation-prob", 0.7,
    "--optim.lr-stages", "0=5e-3,1=1e-3", "--epochs", 3, "--iters-per-epoch", 5, "--batch-size", 4,
]  # fmt: skip


def said_and_log(argv, out, capsys):
    capsys.readouterr()
    assert train([*argv, "--out", out]) == 0
    return capsys.readouterr().out, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_curriculum_with_replay_is_logged_and_resumes_in_its_middle(merr, tmp_path, capsys):
    argv, out = [*merr.argv, *CURRICULUM, "--save-steps", 4], tmp_path / "run"
    said, log = said_and_log(argv, out, capsys)
    assert "curriculum both: 5 of 24 clips at first, all after 2 epochs; streams, words: from 1, " in said
    coverage = "(voice 21/24, patches 24/24, text 20/24)"
    assert f"replay: 24 clips of MERR_coarse_grained.txt {coverage}, 25% of the samples\n" in said
    assert "augmentation: question 0.7, frame 0.7, noise 0.7, dropout 0.7, streams 0.7, words 0.7\n" in said
    pools = {record["step"]: record["pool"] for record in log}
    assert pools[1] == 5
    assert pools[10] < 24  # the step before the end of the second epoch
    assert {pools[step] for step in range(11, 16)} == {24}
    assert sorted(pools.values()) == list(pools.values())
    assert [record["lr"] for record in log] == [5e-3] * 5 + [1e-3] * 10
    for step in (4, 8):  # in the middle of the first and of the second epoch
        again = tmp_path / f"from_{step}"
        start = out / "checkpoints" / f"step_{step:06d}"
        assert train([*argv, "--resume", start, "--out", again]) == 0
        assert model_bytes(again) == model_bytes(out)
        assert [json.loads(line)["pool"] for line in (again / "log.jsonl").read_text().splitlines()] == [
            pools[later] for later in range(step + 1, 16)
        ]


def test_coordinates_dropped_before_standardising_become_the_mean(merr, tmp_path, monkeypatch):
    seen, whole = [], train_llm.windows
    monkeypatch.setattr(train_llm, "windows", lambda parts, *args: seen.extend(parts) or whole(parts, *args))
    argv = [*merr.argv, *CURRICULUM, "--normalize", "--save-steps", 4]
    assert train([*argv, "--out", tmp_path / "run"]) == 0
    start = tmp_path / "run/checkpoints/step_000008"
    assert train([*argv, "--resume", start, "--out", tmp_path / "again"]) == 0
    voices = [np.load(file) for id in merr.ids[:24] if (file := merr.root / "voice" / f"{id}.npy").exists()]
    assert len(seen) == 4  # own and replayed clips, twice
    for part in seen:
        assert part.blank.keys() == {"image", "cls", "voice"}
        np.testing.assert_allclose(part.blank["voice"], np.mean(voices, 0, np.float64), atol=1e-6)
    assert model_bytes(tmp_path / "again") == model_bytes(tmp_path / "run")


def first_ids(argv):
    """The clips of the first two optimiser steps of this rank."""
    ids, pack = [], train_llm.pack

    def noted(samples, cfg):
        ids.extend((sample.id, sample.task, sample.prompt) for sample in samples)
        return pack(samples, cfg)

    train_llm.pack = noted
    assert train([*argv, "--epochs", 1, "--iters-per-epoch", 2]) == 0
    return ids


def test_a_curriculum_with_replay_takes_the_same_clips_however_it_is_split(merr, ranks, tmp_path):
    argv = [*merr.argv, *CURRICULUM, "--out"]
    [whole] = ranks(1, first_ids, [*argv, tmp_path / "a", "--batch-size", 8])
    [accumulated] = ranks(1, first_ids, [*argv, tmp_path / "b", "--batch-size", 4, "--accum", 2])
    first, second = ranks(2, first_ids, [*argv, tmp_path / "c", "--batch-size", 4])
    assert len(whole) == 16
    assert accumulated == whole
    assert first[:4] + second[:4] + first[4:] + second[4:] == whole
    assert [task for _, task, _ in whole].count("emotion") > 0  # only replayed clips are asked for it
    assert {task for i, (_, task, _) in enumerate(whole) if i % 4 != 3} == {"reason"}


def test_an_epoch_is_one_pass_over_the_own_clips(merr, tmp_path, capsys):
    argv = [*merr.argv, "--data.replay", "MERR_coarse_grained.txt", "--data.replay-ratio", 0.25, "--batch-size", 4]
    said, _ = said_and_log([*argv, "--epochs", 1], tmp_path / "run", capsys)
    assert "8 steps an epoch, 8 in all" in said  # 24 own and 8 replayed samples


def test_replay_leaves_out_what_validation_knows(merr, tmp_path, capsys):
    argv = [*merr.argv, "--data.replay", "MERR_coarse_grained.txt", "--epochs", 1, "--iters-per-epoch", 1, "--evaluate"]
    said, _ = said_and_log(argv, tmp_path / "run", capsys)
    assert "replay: 6 of 24 clips left out, which validation or test know\n" in said
    assert "replay: 18 clips of " in said


def test_two_tasks_are_mixed_by_their_weights(merr, ranks, tmp_path):
    """reason for 30 % of the samples, reason_v2 for 70 %: each asks its own question and has its own target."""
    argv = [*merr.argv, "--task-pool", "reason=0.3,reason_v2=0.7", "--out", tmp_path / "run", "--batch-size", 200]
    [drawn] = ranks(1, first_ids, argv)
    tasks = [task for _, task, _ in drawn]
    assert len(tasks) == 400
    assert set(tasks) == {"reason", "reason_v2"}
    assert tasks.count("reason") / 400 == pytest.approx(0.3, abs=0.07)
    assert all(f"[{task}]" in prompt for _, task, prompt in drawn)


def test_labels_that_training_lacks_are_named_at_the_start(merr, data, tmp_path, capsys):
    path = data / "MERR_coarse_grained.txt"
    rows = [row for row in path.read_text().splitlines() if "neutral" not in row]
    path.write_text("\n".join(rows))
    argv = [*merr.argv, "--data-root", data, "--epochs", 1, "--iters-per-epoch", 1]
    said, _ = said_and_log(argv, tmp_path / "run", capsys)
    assert "warning: no training clip is labelled neutral, of the labels the question offers\n" in said
    assert "warning: test clips have labels that no training clip has: neutral (2)\n" in said
    (data / "relative_test3_NCEV.txt").unlink()  # needed for --test only
    said, _ = said_and_log(argv, tmp_path / "other", capsys)
    assert said.count("warning: ") == 1


# ---- choosing and stopping


def scripted(monkeypatch, values, metric):
    """Evaluations that give these values of `metric` one after the other; what else they give is their own."""
    whole, script = emotion.evaluate, iter(values)

    def evaluate(*args, **others):
        scores, records = whole(*args, **others)
        return scores | {metric: next(script)}, records

    monkeypatch.setattr(emotion, "evaluate", evaluate)


STOPPING = ["--iters-per-epoch", 2, "--batch-size", 2, "--evaluate", "--eval-every", 1, "--epochs", 9, "--patience", 2]


def test_patience_ends_a_run_and_resumes_exactly(merr, tmp_path, capsys, monkeypatch):
    """The second evaluation is the best; two later without a better one, a tie among them, end the run."""
    values, out = [0.5, 0.7, 0.7, 0.6, 0.9, 0.9], tmp_path / "run"
    argv = [*merr.argv, *STOPPING, "--metric", "uar"]
    with monkeypatch.context() as patch:
        scripted(patch, values, "uar")
        said, log = said_and_log(argv, out, capsys)
    end = "after step 8 of 18, 2 evaluations without a better uar, best uar 0.7000"
    assert f"finished: {out}/checkpoints {end}\n" in said
    assert [record["valid/uar"] for record in log if "valid/uar" in record] == values[:4]
    last, results = checkpoint.read_state(out / "checkpoints/last"), json.loads((out / "results.json").read_text())
    assert (last["step"], last["stale"]) == (8, 2)
    assert os.readlink(out / "checkpoints/best") == "epoch_002"
    assert results["best"] == {"metric": "uar", "value": 0.7, "checkpoint": "epoch_002"}
    assert train([*argv, "--out", out, "--resume"]) == 0  # it stays ended
    assert capsys.readouterr().out.endswith(f"finished: {out}/checkpoints {end}\n")

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        scripted(patch, values[3:], "uar")
        assert train([*argv, "--resume", out / "checkpoints/epoch_003", "--out", again]) == 0
    assert end in capsys.readouterr().out
    assert model_bytes(again) == model_bytes(out)
    other = checkpoint.read_state(again / "checkpoints/last")
    assert {**other, "config": None} == {**last, "config": None}
    with monkeypatch.context() as patch:  # with more patience it goes on
        scripted(patch, values[4:] + [0.1] * 9, "uar")
        assert train([*argv, "--out", out, "--resume", "--patience", 3]) == 0
    assert checkpoint.read_state(out / "checkpoints/last")["step"] == 16  # best at epoch 5, then three without a better


def test_patience_on_two_processes(merr, ranks, tmp_path):
    argv = [*merr.argv, *STOPPING, "--metric", "loss", "--lr", "1e-9", "--min-lr", "0", "--out", tmp_path / "run"]
    assert ranks(2, train, argv) == [0, 0]  # a rank that trained on would wait for the other
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "last")
    assert state["step"] < 18
    assert state["stale"] == 2


@pytest.mark.parametrize(("metric", "best"), [("uar", [5, 2, 6]), ("invalid", [1, 3, 4])])
def test_the_best_checkpoints_are_kept(merr, tmp_path, monkeypatch, metric, best):
    values, out = [0.1, 0.6, 0.2, 0.4, 0.8, 0.5, 0.45], tmp_path / "run"
    argv = [*merr.argv, "--iters-per-epoch", 1, "--batch-size", 2, "--evaluate", "--eval-every", 1, "--save-best"]
    argv += ["--save-every", 7, "--epochs", 7, "--keep", 1, "--keep-best", 3, "--metric", metric, "--out", out]
    scripted(monkeypatch, values, metric)
    assert train(argv) == 0
    names = [f"epoch_{epoch:03d}" for epoch in best]
    kept = {path.name for path in checkpoint.checkpoints(out / "checkpoints")}
    assert kept == {*names, "epoch_007"}
    assert os.readlink(out / "checkpoints" / "best") == names[0]
    ranking = json.loads((out / "results.json").read_text())["ranking"]
    assert [point["checkpoint"] for point in ranking] == names
    assert [point["value"] for point in ranking] == sorted(values, reverse=metric == "uar")[:3]


def test_clue_overlap_chooses_in_a_pool_with_labels(merr, tmp_path, capsys):
    """The best of a run on emotion and reason by how well it describes: the validation clips are asked to reason."""
    argv = [*merr.argv, "--evaluate", "--eval-every", 1, "--epochs", 2, "--iters-per-epoch", 2, "--save-best"]
    said, log = said_and_log([*argv, "--metric", "clue_overlap", "--max-new-tokens", 6], tmp_path / "run", capsys)
    scores = [record["valid/clue_overlap"] for record in log if "valid/clue_overlap" in record]
    assert len(scores) == 2
    assert checkpoint.read_state(tmp_path / "run/checkpoints/last")["best"]["value"] == max(scores)
    answers = [record["valid/distinct_answers"] for record in log if "valid/loss" in record]
    assert f"  reason: answers: {int(answers[0])} distinct of 6, " in said
    assert ", captions found 6/6" in said
    assert all(0 <= record["valid/label_overlap"] <= 10 for record in log if "valid/loss" in record)


def test_a_best_of_another_metric_is_forgotten(merr, tmp_path, capsys):
    argv = [*merr.argv, "--evaluate", "--eval-every", 1, "--iters-per-epoch", 2, "--save-best"]
    argv += ["--out", tmp_path / "run"]
    assert train([*argv, "--epochs", 1, "--metric", "uar"]) == 0
    assert train([*argv, "--epochs", 2, "--metric", "loss", "--resume"]) == 0
    assert "the best by uar so far says nothing about loss: the choice begins anew\n" in capsys.readouterr().out
    best = checkpoint.read_state(tmp_path / "run/checkpoints/last")["best"]
    assert (best["metric"], best["checkpoint"]) == ("loss", "epoch_002")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--patience", 3], "--patience: needs --evaluate"),
        (["--patience", -1, "--evaluate"], "--patience: -1 is negative"),
        (["--keep-best", 0], "--keep-best: 0 is below 1"),
        (["--keep-best", 2], "--keep-best: needs --save-best"),
        (["--patience", 3, "--evaluate", "--valid-share", 0],
         "--patience: there are no validation clips (--valid-file, or --data.valid-share above 0)"),
        (["--evaluate", "--metric", "clue_overlap", "--task-pool", "emotion"],
         "--metric clue_overlap: --data.task-pool has no task with descriptions"),
        (["--metric", "bleu"], "--metric: 'bleu' is not one of weighted_f1, accuracy, war, uar, macro_f1, "
         "precision_weighted, recall_weighted, invalid, clue_overlap, label_overlap, loss, "
         "client_emotion, therapist_emotion, strategy, token_accuracy"),
        (["--data.curriculum", "hard"], "--data.curriculum: 'hard' is not one of none, modalities, length, both"),
        (["--data.curriculum", "length", "--task-pool", "emotion"],
         "--data.curriculum length: no clip has a description for the tasks emotion"),
        (["--data.curriculum-share", 2, "--optim.lr-stages", "3=1e-5"],
         "--data.curriculum-share: 2 is not above 0 and at most 1; --optim.lr-stages: begins at epoch 3, not at 0"),
        (["--optim.lr-stages", "0=fast"], "--optim.lr-stages: 'fast' is not a float"),
        (["--warmup_ratio", 1.5], "--warmup-ratio: 1.5 is no share of the steps (0 to 1)"),
        (["--epochs", 2, "--iters-per-epoch", 50, "--warmup-steps", 5, "--warmup-ratio", 0.1],
         "--warmup-steps 5 and --warmup-ratio 0.1, which makes 10 of 100 steps: give one of them "
         "(--warmup-steps 0 leaves it to the ratio)"),
        (["--data.replay", "old.txt"], "annotation_file 'old.txt' not found (looked for {root}/old.txt and old.txt)"),
        (["--tokens-per-batch", "-1"], "--tokens-per-batch: -1 is negative"),
        (["--num-k-vid", 3], "--num-k-vid: not read by clips"),
        (["--mamba-compressor", "mamba"], "--mamba-compressor: not read by clips"),
        (["--data.augmentations", "blur=0.5"],
         "--data.augmentations: 'blur' is not one of question, frame, noise, dropout, streams, words"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(merr, fails, tmp_path, argv, line):
    out = tmp_path / "run"
    assert fails(*merr.argv, *argv, "--out", out) == line.format(root=merr.root)
    assert not out.exists()
