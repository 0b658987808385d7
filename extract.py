"""Features from raw media with a frozen encoder: a store that every training script reads, resumable.

$ python extract.py --encoder logmel --manifest clips.csv --out features/logmel
$ torchrun --nproc-per-node 2 extract.py --encoder framestats --data-root datasets/MERR --out features/framestats
"""

import csv
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import config, dist
from common.config import UserError, opt
from data.features import StoreWriter, encode_clip, shard_files
from data.manifest import Clip, read_manifest
from data.media import Absent, MediaError
from data.merr import load_merr
from model import encoders


@dataclass
class Config:
    encoder: str = opt("logmel", "which encoder reads the clips", choices=tuple(encoders.ENCODERS))
    pooling: str | None = opt(None, "what is kept of a clip; default: the encoder's first")
    manifest: str | None = opt(None, "CSV or JSONL list of clips")
    data_root: str | None = opt(None, "folder in the layout of MERR, in place of a manifest")
    annotation_file: str = opt("MERR_coarse_grained.txt", "list of clips below data-root")
    image_path: str | None = opt(None, "folder of the videos; default: data-root/video")
    out: str | None = opt(None, "folder of the store; default: features/<encoder>")
    frame: str = opt("middle", "the frame that stands for a clip where one does", choices=("first", "middle", "peak"))
    image_size: int | None = opt(None, "side in pixels that a frame is resized to; default: the encoder's")
    num_workers: int = opt(2, "threads that decode and encode; 0: none beside the main one")
    max_bad: float = opt(0.01, "largest share of clips that may fail")
    resume: bool = opt(False, "continue the extraction in --out")
    overwrite: bool = opt(False, "delete the store in --out first")


def main(cfg: Config) -> None:
    options: dict[str, Any] = {} if cfg.image_size is None else {"image_size": cfg.image_size}
    encoder = encoders.load(cfg.encoder, **options)
    pooling = encoder.poolings[0] if cfg.pooling is None else cfg.pooling
    if pooling not in encoder.poolings:
        raise UserError(f"--pooling: '{pooling}' is not one of {', '.join(encoder.poolings)} ({cfg.encoder})")
    info = encoder.info(pooling) | ({"frame": cfg.frame} if pooling == "patches" else {})
    out = Path(cfg.out or Path("features", cfg.encoder))
    old = [*shard_files(out), *out.glob("index.json")]
    if old and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} holds a store: --resume goes on with it, --overwrite replaces it, --out DIR is another")
    here = dist.ranks("cpu")
    clips = read_clips(cfg, here.main)

    dist.connect(here)
    if cfg.overwrite and here.main:
        for path in [*old, out / "skipped.csv"]:
            path.unlink(missing_ok=True)
    dist.barrier()
    stop = dist.Stop()
    writer = StoreWriter(out, info, here.rank)
    mine = [clip for clip in clips[here.rank :: here.world] if clip.id not in writer.done]
    work = partial(attempt, encoder=encoder, pooling=pooling, frame=cfg.frame)
    skipped: list[tuple[Clip, MediaError]] = []
    stopped = False
    began, hidden = time.perf_counter(), not (here.main and sys.stderr.isatty())
    results = in_order(work, mine, cfg.num_workers)
    try:
        for clip, features in tqdm(results, out.name, len(mine), unit=" clips", disable=hidden):
            if isinstance(features, MediaError):
                skipped.append((clip, features))
            else:
                writer.add(clip.id, features)
            stopped = stop.requested or stop.orphaned()
            if stopped:
                break
    finally:
        writer.close()
    rate = len(mine) * here.world / (time.perf_counter() - began)

    parts = dist.gather((skipped, stopped))
    if any(part[1] for part in parts):
        if here.main:
            print(f"stopped; the same command with --resume continues {out}")
    else:
        every = [entry for part, _ in parts for entry in part]
        dist.main_first(here, lambda: finish(writer, every, len(clips), rate, cfg.max_bad))
    dist.cleanup()


def read_clips(cfg: Config, talk: bool) -> list[Clip]:
    """The clips of the manifest or of the MERR list."""
    if cfg.manifest is not None and cfg.data_root is None:
        return read_manifest(cfg.manifest)
    if cfg.data_root is None or cfg.manifest is not None:
        raise UserError("give one of --manifest FILE and --data-root DIR")
    clips, listing = load_merr(cfg.data_root, cfg.annotation_file, cfg.image_path)
    if talk:
        print(listing)
    return clips


def attempt(clip: Clip, encoder: encoders.Encoder, pooling: str, frame: str) -> torch.Tensor | MediaError:
    """The features of a clip, or why it has none."""
    try:
        features = encode_clip(clip, encoder, pooling, frame)
    except MediaError as error:
        return error
    if not torch.isfinite(features).all():
        return MediaError(f"{clip.path}: non-finite features")
    return features


def in_order(work: Callable, clips: Iterable[Clip], workers: int) -> Iterator[tuple[Clip, torch.Tensor | MediaError]]:
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


def finish(writer: StoreWriter, skipped: list, total: int, rate: float, max_bad: float) -> None:
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
        print(f"skipped {bad:,} bad clips and {absent:,} without the modality ({listing}), the first: {skipped[0][1]}")
        if bad > max_bad * total:
            raise UserError(
                f"{bad:,} of {total:,} clips are bad, more than --max-bad {max_bad:g} (listed in {listing}); "
                "the others are kept: mend the files or raise --max-bad, and --resume"
            )
        if absent == total:
            raise UserError(f"none of the {total:,} clips has what {writer.info['encoder']} reads (see {listing})")
    count = writer.finish()
    print(f"{writer.folder}: {count:,} clips, width {writer.info['dim']}, {rate:,.0f} clips/s")


if __name__ == "__main__":
    config.run(Config, main)
