"""One thread, so that forked children are safe; ranks(): a function run by several processes as under torchrun."""

import contextlib
import faulthandler
import functools
import io
import json
import os
import pickle
import signal
import socket
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from common import dist, log

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that tests start: two of them share two cores
# renews torch's pool of threads in the child, before autograd's own, which sharded tensors start, can race for it
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
FORK = get_context("fork")
PICTURES = {"_confusion": log._confusion, "_curves": log._curves}


def pytest_collection_modifyitems(items):
    """Forking tests first: where there is a GPU, a backward pass starts threads that a forked child cannot use."""
    items.sort(key=lambda item: "ranks" not in getattr(item, "fixturenames", ()))


def child(pipe, rank, n, port, fn, args):
    os.setsid()  # with its own children it makes one group, killed together
    faulthandler.enable(file=2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.LAUNCHED, dist.PARENT = True, os.getppid()  # read at import, which was before the fork
    try:
        answer = (True, fn(*args))
        dist.cleanup()
        answer = pickle.dumps(answer)
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)


def run_ranks(n, fn, *args, timeout=60.0):
    """fn(*args) in n forked processes with torchrun's environment; the results in rank order.

    The first rank that fails fails the test with its traceback, one that hangs says where on stderr; nothing outlives
    the call.
    """
    # what DDP, sharding and logs load where they need it: seconds that no forked rank spends, once they are here
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORK.Pipe(duplex=False) for _ in range(n)]
    processes = [FORK.Process(target=child, args=(pipes[i][1], i, n, port, fn, args)) for i in range(n)]
    results, deadline = {}, time.monotonic() + timeout
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        while len(results) < n:
            waiting = {receiver: i for i, (receiver, _) in enumerate(pipes) if i not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for i in waiting.values():
                    os.kill(processes[i].pid, signal.SIGABRT)  # says on stderr where it hangs
                pytest.fail(f"ranks {sorted(waiting.values())} of {n} did not end within {timeout:g} s", pytrace=False)
            for receiver in ready:
                results[waiting[receiver]] = answer(receiver, waiting[receiver], processes)
    finally:
        for process in processes:
            end(process)
    return [results[i] for i in range(n)]


def answer(receiver, rank, processes):
    try:
        # from our own forked child
        fine, value = pickle.loads(receiver.recv_bytes())
    except EOFError:
        processes[rank].join(5)
        pytest.fail(f"rank {rank} died without an answer, exit code {processes[rank].exitcode}", pytrace=False)
    if not fine:
        pytest.fail(f"rank {rank}:\n{value}", pytrace=False)
    return value


def end(process):
    """Waits a moment for a process that has answered, then kills it with all that it started."""
    if process.pid is None:
        return
    process.join(0.5)
    with contextlib.suppress(ProcessLookupError):  # no group: nothing is left, or the child has not made it yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@pytest.fixture(name="ranks")
def ranks_fixture():
    return run_ranks


@pytest.fixture(autouse=True)
def _one_thread():
    """A script sets its own number of threads; two in each of two workers wait for each other most of the time."""
    yield
    torch.set_num_threads(1)


@functools.cache
def blank():
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))


def blank_confusion(matrix, labels, title):
    assert np.shape(matrix) == (len(labels), len(labels))
    return blank()


def blank_curves(history, names):
    assert all(point["epoch"] for point in history)
    return blank()


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures():
    """Runs save empty pages: half of the time of a small one goes to drawing."""
    with mock.patch.multiple(log, _confusion=blank_confusion, _curves=blank_curves):
        yield


@contextlib.contextmanager
def drawn():
    """Pictures as a user gets them."""
    with mock.patch.multiple(log, **PICTURES):
        yield


@contextlib.contextmanager
def handlers():
    """Puts back the signal handlers that a training run in this process replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def signals():
    with handlers():
        yield


@pytest.fixture(scope="session")
def merr(tmp_path_factory):
    """MERR without its videos: 24 clips and 9 unseen ones, their features, a toy language model, a config of it all."""
    from data.features import StoreWriter
    from data.prompts import QUESTIONS, emotion_question
    from model.toy import make_toy_llm

    root, labels = tmp_path_factory.mktemp("merr"), ["happy", "sad", "neutral", "angry"]
    ids = [f"sample_{i:08}" for i in range(24)] + [f"unseen_{i:08}" for i in range(9)]
    label = {id: labels[i % 4] for i, id in enumerate(ids)}
    for file, kind in (("MERR_coarse_grained.txt", "sample"), ("relative_test3_NCEV.txt", "unseen")):
        (root / file).write_text("".join(f"{id} 12 {label[id]} -10\n" for id in ids if id.startswith(kind)))
    captions = {id: f"The brow is {'very ' * (i % 5)}tense, so {label[id]}." for i, id in enumerate(ids)}
    (root / "MERR_coarse_grained.json").write_text(json.dumps({id: {"caption": text} for id, text in captions.items()}))
    fine = {id: {"smp_reason_caption": f"The voice is low, so the emotion is {label[id]}"} for id in ids}
    (root / "MERR_fine_grained.json").write_text(json.dumps(fine))
    # not every clip has words or a voice
    said = [f"{id},we {'really ' * (i % 3)}leave today" for i, id in enumerate(ids) if i % 7]
    (root / "transcription_en_all.csv").write_text("\n".join(["name,sentence", *said, ""]))

    (root / "voice").mkdir()
    centre = {name: np.random.default_rng(7 + i).normal(size=5) for i, name in enumerate(labels)}
    patches = StoreWriter(root / "patches", {"encoder": "drawn", "image_size": 56, "pooling": "patches", "dim": 3})
    for i, id in enumerate(ids):
        rng = np.random.default_rng(i)
        if i % 9:
            np.save(root / "voice" / f"{id}.npy", (centre[label[id]] + 0.1 * rng.normal(size=5)).astype(np.float32))
        patches.add(id, torch.from_numpy(rng.normal(size=(1 + 16, 3)).astype(np.float32)))
    patches.finish()

    sentences = [emotion_question(labels), *QUESTIONS["reason"], *captions.values()]
    sentences += ["[INST] <video> </video> <feature> </feature> The person in video says: we really leave today."]
    make_toy_llm(root / "base", sentences, hidden=32, layers=1)
    config = {
        "model": {
            "llm": str(root / "base"), "features": {"voice": 5}, "visual": "patches", "visual_width": 3,
            "image_size": 56, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "grad_checkpoint": False,
        },
        "data": {"data_root": str(root), "labels": labels, "enable_augmentation": True, "valid_share": 0.25},
        "optim": {"lr": 5e-3, "min_lr": 1e-3, "warmup_steps": 0},
        "device": "cpu", "num_workers": 0, "log_every": 1, "decode": {"max_new_tokens": 4},
    }  # fmt: skip
    (root / "toy.yaml").write_text(yaml.safe_dump(config))
    return SimpleNamespace(root=root, ids=ids, labels=labels, config=config, argv=["--cfg", str(root / "toy.yaml")])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model trained for a moment on features of drawn and spoken clips: its run, their folder, what it printed."""
    import train_llm
    from common import config
    from data.features import StoreWriter, encode_clip
    from data.merr import load_merr
    from data.mock import make_mock
    from data.prompts import EMOTIONS6, emotion_question
    from model.encoders import load
    from model.toy import make_toy_llm

    root = tmp_path_factory.mktemp("trained")
    make_mock(root / "mock", 24, 10, seed=0, size=64, odd=0, workers=1)
    lists = ("MERR_coarse_grained.txt", "relative_test3_NCEV.txt")
    clips = [clip for file in lists for clip in load_merr(root / "mock", file)[0]]
    patches = load("framestats", image_size=56)
    made = {"voice": (load("logmel"), "stats", "middle"), "patches": (patches, "patches", "first")}
    for name, (encoder, pooling, frame) in made.items():
        writer = StoreWriter(root / "features" / name, encoder.info(pooling) | {"frame": frame})
        for clip in clips:
            writer.add(clip.id, encode_clip(clip, encoder, pooling, frame))
        writer.finish()
    sentences = [emotion_question(EMOTIONS6), *(clip.text for clip in clips if clip.text)]
    make_toy_llm(root / "base", sentences, hidden=32, layers=1)
    argv = [
        "--llm", root / "base", "--data-root", root / "mock", "--features-root", root / "features", "--model.features",
        "voice=504", "--visual", "patches", "--visual-width", 12, "--image-size", 56, "--full", "--normalize",
        "--labels", ",".join(EMOTIONS6), "--task-pool", "emotion=3,reason=1", "--epochs", 24, "--batch-size", 4,
        "--lr", 5e-3, "--warmup-steps", 0, "--no-grad-checkpoint", "--device", "cpu", "--num-workers", 0,
        "--valid-share", 0.3, "--evaluate", "--eval-every", 6, "--save-every", 12, "--save-best", "--test",
        "--max-new-tokens", 4, "--out", root / "run",
    ]  # fmt: skip

    with handlers(), contextlib.redirect_stdout(io.StringIO()) as said:
        train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    return SimpleNamespace(run=root / "run", data=root / "mock", said=said.getvalue())
