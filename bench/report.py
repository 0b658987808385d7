"""What the scripts of this folder share: turns, a process of its own, its memory, how a report begins and ends."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")

RESULTS = Path(__file__).with_name("RESULTS.md")


def bar(count: int, what: str) -> Iterable[int]:
    """range(count), whose course and rest a terminal shows."""
    return tqdm(range(count), what, unit="round", leave=False, disable=not sys.stderr.isatty())


def turns(names: Iterable[str], rounds: int, what: str) -> Iterator[str]:
    """Each of names in every round, backwards in every second one."""
    order = list(names)
    for i in bar(rounds, what):
        yield from order[:: -1 if i % 2 else 1]


def apart(function: Callable[..., T], *args: object) -> T:
    """function(*args) in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory(name: str) -> float:
    """MiB, of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def spread(values: Sequence[float]) -> str:
    """Median (least to most); nothing of no values."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else ""


def header(script: str, device: torch.device, threads: int, what: str, packages: Iterable[str] = ()) -> list[str]:
    """The first lines of a report: date, machine, load, versions of torch and of `packages`, and what was run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    versions = ", ".join([f"torch {torch.__version__}", *(f"{package} {version(package)}" for package in packages)])
    return [
        f"## {script}, {time.strftime('%Y-%m-%d')}", "",
        f"{name}, {threads} threads, load {load} at the start, {versions}; {what}", "",
    ]  # fmt: skip


def table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a table of two columns."""
    return [f"| {title} | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), ""]


def publish(lines: Iterable[str], write: bool) -> None:
    """Prints a report, and appends it to RESULTS.md if it is to be written."""
    text = "\n".join(lines)
    print(text)
    if write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")
