"""Requests a second that demo.py answers: one client that waits for each answer, and many at the same time.

A small language model of random weights, with picture and voice of synthetic clips, is served by two programs: one
answers waiting requests one by one, one in batches. Each round asks the same requests of both; the table has medians
over rounds, and ratios of the same round.

one at a time         one client, the next request after the answer to the last
batches of 1, of 8    many clients at once
labels, text          the emotion is scored; an answer is written, token by token

$ python bench/serve.py
"""

import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.serve", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import torch

import train_llm
from bench.report import header, publish, spread, turns
from common import config
from common.config import UserError, opt, run
from data.features import StoreWriter, encode_clip
from data.merr import load_merr
from data.mock import make_mock
from data.prompts import EMOTIONS6, emotion_question
from model.encoders import load
from model.toy import make_toy_llm

DEMO = Path(__file__).resolve().parents[1] / "demo.py"
SIZES = {"tiny": (32, 1), "small": (256, 6)}  # width and layers of the language model
ASKED = {"labels": None, "text": "[reason] What does this person feel, and why?"}
CLIPS = 8


@dataclass
class Config:
    size: str = opt("small", "of the model", "--size", choices=tuple(SIZES))
    tiny: bool = opt(False, "a smoke run of seconds: --size tiny, one round, 8 requests", "--tiny")
    requests: int = opt(200, "in a round, of each kind", "--requests")
    clients: int = opt(16, "that ask at the same time", "--clients")
    batch_size: int = opt(8, "requests answered together", "--batch-size")
    max_new_tokens: int = opt(32, "of a written answer", "--max-new-tokens")
    rounds: int = opt(3, "turns of each variant", "--rounds")
    threads: int = opt(1, "threads of PyTorch in a server", "--threads")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


def make_run(folder: Path, size: str) -> Path:
    """A run whose model has seen one step of training: it says nothing of use, at the price of one that does."""
    make_mock(folder / "mock", CLIPS, CLIPS, seed=0)
    clips = [clip for file in ("MERR_coarse_grained.txt", "relative_test3_NCEV.txt")
             for clip in load_merr(folder / "mock", file)[0]]  # fmt: skip
    for name, encoder, pooling in (("voice", load("logmel"), "stats"),
                                   ("patches", load("framestats", image_size=56), "patches")):  # fmt: skip
        writer = StoreWriter(folder / name, encoder.info(pooling) | {"frame": "first"})
        for clip in clips:
            writer.add(clip.id, encode_clip(clip, encoder, pooling, "first"))
        writer.finish()
    hidden, layers = SIZES[size]
    sentences = [emotion_question(EMOTIONS6), *(clip.text or "" for clip in clips)]
    make_toy_llm(folder / "base", sentences, hidden=hidden, layers=layers)
    argv = [
        "--llm", folder / "base", "--data-root", folder / "mock", "--features-root", folder, "--model.features",
        "voice=504", "--visual", "patches", "--visual-width", 12, "--image-size", 56, "--full", "--normalize",
        "--labels", ",".join(EMOTIONS6), "--epochs", 1, "--iters-per-epoch", 1, "--no-grad-checkpoint", "--device",
        "cpu", "--num-workers", 0, "--out", folder / "run",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    return folder / "run"


@contextlib.contextmanager
def server(folder: Path, cfg: Config, batch_size: int) -> Iterator[int]:
    """The port of demo.py in a process of its own."""
    argv = ["--ckpt", folder / "run", "--root", folder / "mock" / "video", "--no-page", "--port", 0, "--device", "cpu",
            "--batch-size", batch_size, "--queue", 4 * cfg.clients, "--max-new-tokens", cfg.max_new_tokens]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(DEMO), *map(str, argv)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        found = next(filter(None, (re.search(r"API: http://127\.0\.0\.1:(\d+)/", line) for line in lines)), None)
        if found is None:
            raise UserError(f"demo.py ended with exit code {process.wait()}")
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()  # so that its log fills no pipe
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


def rate(port: int, clips: list[str], question: str | None, count: int, clients: int) -> tuple[float, list]:
    """Requests a second, and what was answered to each. UserError if one was refused."""
    answers: list = [None] * count
    numbers = iter(range(count))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for number in numbers:
            body = json.dumps({"video_path": clips[number % len(clips)], "question": question})
            connection.request("POST", "/process_video", body)
            answer = connection.getresponse()
            answers[number] = answer.status, json.loads(answer.read())
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if refused := [answer for status, answer in answers if status != 200]:
        raise UserError(f"{len(refused)} of {count} requests were refused: {refused[0]}")
    return count / seconds, [answer["text"] for _, answer in answers]


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    if cfg.tiny:
        cfg.size, cfg.rounds, cfg.requests, cfg.clients, cfg.max_new_tokens = "tiny", 1, 8, 4, 4
    what = f"{cfg.size}, {cfg.requests} requests a round, {cfg.rounds} rounds; median (least to most)"
    lines = header("bench/serve.py", torch.device("cpu"), cfg.threads, what)
    with TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        make_run(folder, cfg.size)
        clips = sorted(path.name for path in (folder / "mock" / "video").glob("samplenew_*.mp4"))
        ports = {size: stack.enter_context(server(folder, cfg, size)) for size in (1, cfg.batch_size)}
        variants = {"one at a time": (ports[cfg.batch_size], 1)}
        variants |= {f"{cfg.clients} clients, batches of {size}": (port, cfg.clients) for size, port in ports.items()}
        for kind, question in ASKED.items():
            lines += [f"| {kind} | requests/s | times one at a time |", "|---|---|---|"]
            lines += [*measured(variants, clips, question, cfg), ""]
    publish(lines, cfg.write)


def measured(variants: dict[str, tuple[int, int]], clips: list[str], question: str | None, cfg: Config) -> list[str]:
    """Rows of a table. UserError where the same request was not answered alike."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    texts = None
    for port, _ in set(variants.values()):
        rate(port, clips, question, len(clips), 1)  # imports and caches
    for name in turns(variants, cfg.rounds, question or "labels"):
        port, clients = variants[name]
        value, answers = rate(port, clips, question, cfg.requests, clients)
        found[name].append(value)
        texts = texts or answers
        if answers != texts:
            raise UserError(f"{name}: answers differ from those given one at a time")
    first = next(iter(found.values()))
    return [
        f"| {name} | {spread(values)} | {spread([a / b for a, b in zip(values, first, strict=True)])} |"
        for name, values in found.items()
    ]


if __name__ == "__main__":
    run(Config, main)
