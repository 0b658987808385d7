"""Features of many clips with a frozen encoder into a store: shared by ranks, resumable, passing over bad clips.

What goes into which shard is planned before anything is decoded and kept in plan.json, so that a run that was killed
and resumed, with any number of ranks, writes the very files of an unbroken one. A finished shard is never touched, an
unfinished one is redone whole. Clips that are encoded together come from one shard, so their order is part of the plan.
"""

import contextlib
import csv
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import dist
from common.checkpoint import RunLock
from common.config import UserError
from data.features import SHARD_BYTES, FeatureStore, StoreWriter, decode_clip, read_shards, replace_file, shard_files
from data.manifest import Clip
from data.media import Absent, MediaError, seconds

CHUNK = 512  # clips of a shard, and what a kill costs at most on each rank
ROWS = {"frames": 500, "tokens": 64, "patches": 1025}  # of ten seconds, a sentence and a picture of 448 pixels
TOKENS = {"cpu": 1024, "cuda": 16384}  # of a batch: on a CPU larger ones are not faster, and take more memory
AHEAD = 4  # clips of each process that are decoded before they are needed
PADDING = 0.2  # largest share of a batch that is no clip's
LINE = 30  # seconds between lines of progress where there is no terminal

Input = tuple[Tensor, float | None] | MediaError  # what is made of a clip and its seconds of sound, or why it is none


def extract(
    clips: Sequence[Clip],
    encoder: Any,
    pooling: str,
    folder: str | Path,
    here: dist.Ranks,
    *,
    frame: str = "middle",
    workers: int = 0,
    tokens: int | None = None,
    max_bad: float = 0.01,
    stop: dist.Stop | None = None,
    say: Callable[[str], None] = print,
) -> FeatureStore | None:
    """The store of the clips' features in `folder`: opened if it has them all, else made or completed; None if stopped.

    Clips that fail are listed in skipped.csv and tried again by the next call. UserError: the store was made in another
    way, more than the share `max_bad` of the clips are damaged, or none has what the encoder reads. `stop` is the
    caller's, if it has one already; only rank 0 says anything. A batch has up to `tokens` rows, padding among them.
    """
    folder = Path(folder)
    single = encoder.modality == "video" and encoder.frames(pooling) == 1
    info = encoder.info(pooling) | ({"frame": frame} if single else {})
    store = finished(folder, info, clips, encoder.modality)
    if store is not None:
        if here.main:
            say(f"{folder}: {len(store):,} clips, width {store.dim}, complete")
        return store
    lock = dist.main_first(here, lambda: RunLock(folder))
    asked = stop or dist.Stop()
    work = Work(encoder, pooling, frame, here.device, tokens)
    try:
        writer = StoreWriter(folder, info)
        chunk = chunk_size(info, pooling)
        shards = dist.main_first(here, lambda: plan(writer, clips, chunk, here.world))
        mine = [(number, [clips[i] for i in places]) for number, places in shards if number % here.world == here.rank]
        total = sum(len(places) for _, places in shards)
        progress = Progress(folder.name, sum(len(part) for _, part in mine), here, say)
        stopped = fill(writer, mine, work, workers, asked, progress)
        parts = dist.gather((stopped, progress.sound))
        if any(stopped for stopped, _ in parts):
            return None
        rate = progress.rates(total, sum(sound for _, sound in parts))
        dist.main_first(here, lambda: finish(writer, clips, rate, max_bad, say))
    finally:
        work.release()
        if stop is None:
            asked.release()
        lock.release()
    return FeatureStore(folder)


def clear(folder: str | Path) -> None:
    """Delete the store in a folder and nothing else there."""
    names = ("index.json", "plan.json", "skipped.csv")
    for path in [*shard_files(folder), *(Path(folder, name) for name in names)]:
        path.unlink(missing_ok=True)


def finished(folder: Path, info: dict[str, Any], clips: Sequence[Clip], modality: str) -> FeatureStore | None:
    """The store in `folder` if it was made in this very way and holds every clip that has a file, or words."""
    if not (folder / "index.json").is_file():
        return None
    store = FeatureStore(folder)
    wanted = (clip.id for clip in clips if ((clip.text or "").strip() if modality == "text" else clip.path))
    same = all(key in store.info and store.info[key] == value for key, value in json.loads(json.dumps(info)).items())
    return store if same and all(id in store for id in wanted) else None


# --- the plan ---------------------------------------------------------------------------------------------------------


def chunk_size(info: dict[str, Any], pooling: str) -> int:
    """How many clips a shard has, by an estimate of their bytes."""
    width = info["dim"] if info.get("kind", "dense") == "dense" else 1
    return max(1, min(CHUNK, SHARD_BYTES // (4 * width * ROWS.get(pooling, 1))))


def plan(writer: StoreWriter, clips: Sequence[Clip], chunk: int, world: int) -> list[tuple[int, list[int]]]:
    """What is left to do: numbers of shards, and the places in `clips` of what they are made of.

    It is the rest of what an earlier call planned for this very list, else all clips that are in no shard, in chunks
    numbered on. Those that failed before are among the latter, so they are tried again once nothing else is left.
    """
    parts = read_plan(writer.folder)
    there = {shard.number for shard in writer.shards}
    for part in reversed(parts):
        before = {id for shard in writer.shards if shard.number < part["first"] for id in shard.ids}
        places = [i for i, clip in enumerate(clips) if clip.id not in before]
        if digest([clips[i].id for i in places]) == part["ids_sha256"]:
            shards = numbered(part["first"], places, part["chunk"])
            left = [(n, [i for i in some if clips[i].id not in writer.done]) for n, some in shards if n not in there]
            if any(some for _, some in left):
                return [(n, some) for n, some in left if some]
    places = [i for i, clip in enumerate(clips) if clip.id not in writer.done]
    if not places:
        return []
    chunk = min(chunk, -(-len(places) // world))  # every rank gets something
    first = max([writer.next, *(part["first"] - (-part["clips"] // part["chunk"]) for part in parts)])
    made = {"first": first, "clips": len(places), "chunk": chunk, "ids_sha256": digest([clips[i].id for i in places])}
    write_plan(writer.folder, [*parts, made])
    return numbered(first, places, chunk)


def numbered(first: int, places: list[int], chunk: int) -> list[tuple[int, list[int]]]:
    return [(first + i // chunk, places[i : i + chunk]) for i in range(0, len(places), chunk)]


def digest(ids: list[str]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """What was planned call by call: first shard, clips, clips a shard, and sha256 of the ids."""
    path = folder / "plan.json"
    try:
        parts = json.loads(path.read_text())["parts"] if path.is_file() else []
        return [{"ids_sha256": part["ids_sha256"], **{k: int(part[k]) for k in ("first", "clips", "chunk")}}
                for part in parts]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the plan of an extraction ({error}); delete it and --resume") from None


def write_plan(folder: Path, parts: list[dict[str, Any]]) -> None:
    if parts:
        replace_file(folder / "plan.json", json.dumps({"parts": parts}, sort_keys=True).encode())
    else:
        (folder / "plan.json").unlink(missing_ok=True)


# --- the work ---------------------------------------------------------------------------------------------------------


class Work:
    """How clips become features: read() decodes in any process, take() and rest() encode where the weights are."""

    def __init__(self, encoder: Any, pooling: str, frame: str, device: torch.device, tokens: int | None) -> None:
        self.encoder, self.pooling, self.frame, self.device = encoder, pooling, frame, device
        self.batched = getattr(encoder, "batched", False)
        if self.batched:
            encoder.to(device)
        self.tokens = TOKENS.get(device.type, TOKENS["cpu"]) if tokens is None else tokens
        self.found: dict[str, Input] = {}
        self.batch: list[tuple[Clip, Tensor, float | None, int]] = []

    def order(self, clips: list[Clip], pool: Executor | None) -> list[Clip]:
        """The clips as they are best encoded together, longest first; memory runs out at once or never."""
        if not self.batched or self.encoder.modality == "video":  # of which all are equally long
            return clips
        sizes = list(map(self.guess, clips) if pool is None else pool.map(_guess, clips, chunksize=16))
        return [clips[i] for i in sorted(range(len(clips)), key=lambda i: -sizes[i])]

    def guess(self, clip: Clip) -> float:
        """About how long a clip is, without decoding it."""
        if self.encoder.modality == "text":
            return len(clip.text or "")
        return (clip.path and seconds(clip.path, clip.start, clip.end)) or 0

    @torch.inference_mode()
    def read(self, clip: Clip) -> Input:
        """What take() needs of a clip, or why it has no features."""
        with one_thread() if self.batched else contextlib.nullcontext():
            try:
                x = decode_clip(clip, self.encoder, self.pooling, self.frame)
                length = len(x) / self.encoder.sample_rate if self.encoder.modality == "audio" else None
                return self.encoder.prepare(x) if self.batched else self.encoder.encode(x, self.pooling), length
            except MediaError as error:
                return error

    def take(self, clip: Clip, given: Input) -> None:
        """Keep the features of a clip, or have it wait until enough are there to be encoded together."""
        if isinstance(given, MediaError) or not self.batched:
            self.keep(clip, given)
            return
        rows = int(self.encoder.lengths(torch.tensor(len(given[0]))))
        if not fits([*(size for *_, size in self.batch), rows], self.tokens):
            self.encode()
        self.batch.append((clip, *given, rows))

    def keep(self, clip: Clip, given: Input) -> None:
        if not isinstance(given, MediaError) and not torch.isfinite(given[0]).all():
            given = MediaError(f"{clip.path}: non-finite features")
        self.found[clip.id] = given

    @torch.inference_mode()
    def encode(self) -> None:
        """Encode the clips that wait."""
        if not self.batch:
            return
        clips, inputs, lengths, rows = zip(*self.batch, strict=True)
        self.batch = []
        sizes = torch.tensor([len(x) for x in inputs])
        try:
            x = pad_sequence(list(inputs), batch_first=True).to(self.device)
            mask = torch.arange(x.shape[1]) < sizes[:, None]
            states = self.encoder(x, None if mask.all() else mask.to(self.device))
            pooled = [self.encoder.pool(state[:n], self.pooling) for state, n in zip(states, rows, strict=True)]
            flat = torch.cat([value.flatten() for value in pooled]).cpu()  # once, for each transfer waits for the GPU
        except torch.OutOfMemoryError:
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0
            raise UserError(
                f"out of memory with {len(rows)} clips of {len(rows) * max(rows):,} tokens, at a peak of {peak:.1f} "
                f"GiB: lower --tokens-per-batch (now {self.tokens:,}), or give --options dtype=bf16"
            ) from None
        values = flat.split([value.numel() for value in pooled])
        for clip, value, like, length in zip(clips, values, pooled, lengths, strict=True):
            self.keep(clip, (value.view(like.shape), length))

    def rest(self) -> dict[str, Input]:
        """All that was kept since the last call, by id."""
        self.encode()
        found, self.found = self.found, {}
        return found

    def release(self) -> None:
        """Give the device's memory back."""
        self.batch, self.found = [], {}
        if self.batched:
            self.encoder.to("cpu")


def fits(rows: list[int], tokens: int) -> bool:
    """Whether clips of so many rows may make one batch; any clip may be alone."""
    padded = len(rows) * max(rows)
    return len(rows) == 1 or (padded <= tokens and padded - sum(rows) <= PADDING * padded)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out the same in this process and in those that decode, which have one thread each."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def fill(
    writer: StoreWriter, shards: list[tuple[int, list[Clip]]], work: Work, workers: int, stop: dist.Stop,
    progress: "Progress",
) -> bool:  # fmt: skip
    """Write each shard when the last of its clips is encoded; whether a stop cut it short."""
    pool = readers(work, workers) if workers and shards else None
    try:
        clips = (clip for _, part in shards for clip in work.order(part, pool))  # clips of the next shard are on hand
        inputs = in_order(work.read, clips, pool, AHEAD * workers)
        for number, part in shards:
            for clip, given in islice(inputs, len(part)):
                work.take(clip, given)
                progress.step(0 if isinstance(given, MediaError) else given[1] or 0)
                if stop.requested or stop.orphaned():
                    return True
            found = work.rest()
            good = [(clip.id, *value) for clip in part if not isinstance(value := found[clip.id], MediaError)]
            skipped = {clip.id: why(clip, value) for clip in part if isinstance(value := found[clip.id], MediaError)}
            ids, values, lengths = zip(*good, strict=True) if good else ((), (), ())
            writer.write(number, ids, values, lengths, skipped)
    except BrokenProcessPool:
        raise UserError(
            f"a process that decodes clips was killed, maybe for want of memory: lower --num-workers (now {workers}); "
            "finished shards are kept, go on with --resume"
        ) from None
    finally:
        progress.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return False


def readers(work: Work, count: int) -> ProcessPoolExecutor:
    """Processes that hold `work`, weights and all: by forking where that is safe, so that nothing is copied."""
    context = get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work, os.getpid()))


_work: Work  # of a process that decodes


def _begin(work: Work, parent: int) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us when the shard is whole
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent that was killed cannot

    threading.Thread(target=watch, daemon=True).start()


def _guess(clip: Clip) -> float:
    return _work.guess(clip)


def _read(clip: Clip) -> tuple[Any, float | None] | MediaError:
    """Work.read() with an array in place of the tensor, which would take a file and shared memory to hand over."""
    given = _work.read(clip)
    return given if isinstance(given, MediaError) else (given[0].numpy(), given[1])


def received(given: tuple[Any, float | None] | MediaError) -> Input:
    return given if isinstance(given, MediaError) else (torch.from_numpy(given[0]), given[1])


def why(clip: Clip, error: MediaError) -> tuple[str, bool]:
    """The reason without the clip's path, and whether it is damage."""
    return str(error).removeprefix(f"{clip.path}: "), not isinstance(error, Absent)


def in_order(
    read: Callable[[Clip], Input], clips: Iterable[Clip], pool: Executor | None, ahead: int
) -> Iterator[tuple[Clip, Input]]:
    """Each clip with what is read of it, in order; the pool's processes are up to `ahead` clips before that."""
    if pool is None:
        yield from ((clip, read(clip)) for clip in clips)
        return
    waiting = deque()
    for clip in clips:
        waiting.append((clip, pool.submit(_read, clip)))
        if len(waiting) > ahead:
            clip, result = waiting.popleft()
            yield clip, received(result.result())
    while waiting:
        clip, result = waiting.popleft()
        yield clip, received(result.result())


class Progress:
    """Clips and hours of sound a second, and the time left: in a bar on a terminal, else a line every half minute."""

    def __init__(self, name: str, total: int, here: dist.Ranks, say: Callable[[str], None]) -> None:
        self.name, self.total, self.world, self.say = name, total, here.world, say
        self.main, terminal = here.main, sys.stderr.isatty()
        self.bar = tqdm(desc=name, total=total, unit=" clips", disable=not (here.main and terminal))
        self.lines = here.main and not terminal
        self.began = self.last = time.perf_counter()
        self.clips, self.sound = 0, 0.0

    def step(self, sound: float) -> None:
        """One clip more, with so many seconds of sound."""
        self.clips, self.sound = self.clips + 1, self.sound + sound
        self.bar.update()
        now = time.perf_counter()
        if now - self.last < (LINE if self.lines else 1):
            return
        self.last = now
        if self.sound:
            self.bar.set_postfix_str(f"{self.sound / 3600 / (now - self.began):.2g} hours of sound/s", refresh=False)
        if self.lines:
            left = (now - self.began) * (self.total - self.clips) / self.clips / 60
            done, total = self.clips * self.world, self.total * self.world  # ranks have about the same to do
            rates = self.rates(done, self.sound * self.world)
            self.say(f"{self.name}: {done:,} of {total:,} clips, {rates}, {left:.1f} minutes left")

    def rates(self, clips: int, sound: float) -> str:
        """So many clips and seconds of sound since the beginning, a second."""
        taken = time.perf_counter() - self.began
        hours = f", {sound / 3600 / taken:.2g} hours of sound/s" if sound else ""
        return f"{clips / taken:,.3g} clips/s{hours}"

    def close(self) -> None:
        self.bar.close()


def finish(writer: StoreWriter, clips: Sequence[Clip], rate: str, max_bad: float, say: Callable[[str], None]) -> None:
    """Write skipped.csv and the store's index; UserError when too many clips are bad or none is left."""
    shards = list(read_shards(writer.folder))
    done, total = {id for shard in shards for id in shard.ids}, len(clips)
    reasons = {id: reason for shard in shards for id, reason in shard.skipped.items()}
    skipped = [(clip, *reasons[clip.id]) for clip in clips if clip.id not in done]
    parts = read_plan(writer.folder)
    # a call that got nothing leaves nothing: clips that stay bad do not add a shard each time they are tried
    while parts and not any(shard.ids for shard in shards if shard.number >= parts[-1]["first"]):
        first = parts.pop()["first"]
        for shard in shards:
            if shard.number >= first:
                shard.path.unlink(missing_ok=True)
        write_plan(writer.folder, parts)
    listing = writer.folder / "skipped.csv"
    listing.unlink(missing_ok=True)
    if skipped:
        with open(listing, "w", newline="", encoding="utf-8") as file:
            rows = [(clip.id, clip.path, reason) for clip, reason, _ in skipped]
            csv.writer(file).writerows([("id", "path", "reason"), *rows])
        bad = sum(broken for *_, broken in skipped)
        absent = len(skipped) - bad
        clip, reason, _ = skipped[0]
        first = reason if reason.startswith(f"{clip.id}: ") else f"{clip.path}: {reason}"
        say(f"skipped {bad:,} bad clips and {absent:,} without the modality ({listing}), the first: {first}")
        if bad > max_bad * total:
            raise UserError(
                f"{bad:,} of {total:,} clips are bad, more than --max-bad {max_bad:g} (listed in {listing}); "
                "the others are kept: mend the files or raise --max-bad, and --resume"
            )
        if absent == total:
            raise UserError(f"none of the {total:,} clips has what {writer.info['encoder']} reads (see {listing})")
    count = writer.finish()
    say(f"{writer.folder}: {count:,} clips, width {writer.info['dim']}, {rate}")
