"""Features of many clips with a frozen encoder into a store: shared by ranks, resumable, passing over bad clips."""

import csv
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import dist
from common.checkpoint import RunLock
from common.config import UserError
from data.features import FeatureStore, StoreWriter, decode_clip, shard_files
from data.manifest import Clip
from data.media import Absent, MediaError

Result = tuple[Tensor, float | None] | MediaError  # features and seconds of sound, or why there are none


def extract(
    clips: Sequence[Clip],
    encoder: Any,
    pooling: str,
    folder: str | Path,
    here: dist.Ranks,
    *,
    frame: str = "middle",
    workers: int = 0,
    max_bad: float = 0.01,
    stop: dist.Stop | None = None,
    say: Callable[[str], None] = print,
) -> FeatureStore | None:
    """The store of the clips' features in `folder`: opened if it has them all, else made or completed; None if stopped.

    Clips that fail are listed in skipped.csv and tried again by the next call. UserError: the store was made in another
    way, more than the share `max_bad` of the clips are damaged, or none has what the encoder reads. `stop` is the
    caller's, if it has one already; only rank 0 says anything.
    """
    folder = Path(folder)
    info = encoder.info(pooling) | ({"frame": frame} if pooling == "patches" else {})
    store = finished(folder, info, clips, encoder.modality)
    if store is not None:
        if here.main:
            say(f"{folder}: {len(store):,} clips, width {store.dim}, complete")
        return store
    lock = dist.main_first(here, lambda: RunLock(folder))
    asked = stop or dist.Stop()
    try:
        writer = StoreWriter(folder, info, here.rank)
        mine = [clip for clip in clips[here.rank :: here.world] if clip.id not in writer.done]
        results = in_order(partial(attempt, encoder=encoder, pooling=pooling, frame=frame), mine, workers)
        began, hidden = time.perf_counter(), not (here.main and sys.stderr.isatty())
        bar = tqdm(results, folder.name, len(mine), unit=" clips", disable=hidden)
        parts = dist.gather(fill(writer, bar, asked))
        rate = len(mine) * here.world / (time.perf_counter() - began)
        if any(stopped for _, stopped in parts):
            return None
        skipped = [entry for part, _ in parts for entry in part]
        dist.main_first(here, lambda: finish(writer, skipped, len(clips), rate, max_bad, say))
    finally:
        if stop is None:
            asked.release()
        lock.release()
    return FeatureStore(folder)


def clear(folder: str | Path) -> None:
    """Delete the store in a folder and nothing else there."""
    for path in [*shard_files(folder), Path(folder, "index.json"), Path(folder, "skipped.csv")]:
        path.unlink(missing_ok=True)


def finished(folder: Path, info: dict[str, Any], clips: Sequence[Clip], modality: str) -> FeatureStore | None:
    """The store in `folder` if it was made in this very way and holds every clip that has a file, or words."""
    if not (folder / "index.json").is_file():
        return None
    store = FeatureStore(folder)
    wanted = (clip.id for clip in clips if ((clip.text or "").strip() if modality == "text" else clip.path))
    same = all(key in store.info and store.info[key] == value for key, value in json.loads(json.dumps(info)).items())
    return store if same and all(id in store for id in wanted) else None


def fill(
    writer: StoreWriter, results: Iterable[tuple[Clip, Result]], stop: dist.Stop
) -> tuple[list[tuple[Clip, MediaError]], bool]:
    """Write the results as they come; the clips without features, and whether a stop cut it short."""
    skipped = []
    try:
        for clip, result in results:
            if isinstance(result, MediaError):
                skipped.append((clip, result))
            else:
                writer.add(clip.id, *result)
            if stop.requested or stop.orphaned():
                return skipped, True
    finally:
        writer.close()
    return skipped, False


@torch.inference_mode()
def attempt(clip: Clip, encoder: Any, pooling: str, frame: str) -> Result:
    """The features of a clip and how long its sound is, or why it has none."""
    try:
        x = decode_clip(clip, encoder, pooling, frame)
        features = encoder.encode(x, pooling)
    except MediaError as error:
        return error
    if not torch.isfinite(features).all():
        return MediaError(f"{clip.path}: non-finite features")
    return features, len(x) / encoder.sample_rate if encoder.modality == "audio" else None


def in_order(work: Callable[[Clip], Result], clips: Iterable[Clip], workers: int) -> Iterator[tuple[Clip, Result]]:
    """Each clip with its result, in order; threads suffice, for decoders and kernels let go of Python's lock."""
    if not workers:
        yield from ((clip, work(clip)) for clip in clips)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        try:
            for clip in clips:
                waiting.append((clip, pool.submit(work, clip)))
                if len(waiting) > 4 * workers:
                    clip, result = waiting.popleft()
                    yield clip, result.result()
            for clip, result in waiting:
                yield clip, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def finish(
    writer: StoreWriter, skipped: list, total: int, rate: float, max_bad: float, say: Callable[[str], None]
) -> None:
    """Write skipped.csv and the store's index; UserError when too many clips are bad or none is left."""
    listing = writer.folder / "skipped.csv"
    listing.unlink(missing_ok=True)
    if skipped:
        with open(listing, "w", newline="", encoding="utf-8") as file:
            reasons = [str(error).removeprefix(f"{clip.path}: ") for clip, error in skipped]
            rows = [(clip.id, clip.path, reason) for (clip, _), reason in zip(skipped, reasons, strict=True)]
            csv.writer(file).writerows([("id", "path", "reason"), *rows])
        bad = sum(not isinstance(error, Absent) for _, error in skipped)
        absent = len(skipped) - bad
        say(f"skipped {bad:,} bad clips and {absent:,} without the modality ({listing}), the first: {skipped[0][1]}")
        if bad > max_bad * total:
            raise UserError(
                f"{bad:,} of {total:,} clips are bad, more than --max-bad {max_bad:g} (listed in {listing}); "
                "the others are kept: mend the files or raise --max-bad, and --resume"
            )
        if absent == total:
            raise UserError(f"none of the {total:,} clips has what {writer.info['encoder']} reads (see {listing})")
    count = writer.finish()
    say(f"{writer.folder}: {count:,} clips, width {writer.info['dim']}, {rate:,.0f} clips/s")
