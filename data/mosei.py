"""CMU-MOSEI and its kin: converted to one form on first use, and described.

$ python -m data.mosei --data-dir data/mosei
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import UserError, opt, run
from common.weights import read_json
from data.features import StoreWriter
from data.layouts import KINDS, ORDER, SOURCES, Corpus, is_store, listed, read, survey
from data.manifest import EMOTIONS, Clip, group_of, leak_check, write_manifest

VERSION = 1  # of the conversion: a folder made by another one is made again
STALE = 3600  # seconds after which a half-made folder is nobody's


def convert(corpus: Corpus, folder: str | Path, origin: Mapping[str, Any] | None = None) -> None:
    """Writes a corpus as a converted folder, whole or not at all, in the place of an older one."""
    folder, origin = Path(folder), origin or {}
    partial, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{part}.tmp") for part in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{folder.name}.*.tmp"):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)
        partial.mkdir()
        _write(corpus, partial, origin)
        if origin and _fresh(folder, origin):  # another process was faster
            return
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        problem = f"the converted data cannot be written ({error.strerror}); copy the data to a place that can be"
        raise UserError(f"{folder}: {problem} and name it with --data-dir") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def open_corpus(path: str | Path, say: Callable[[str], object] = print) -> Path:
    """The converted folder of any of the layouts: `path` itself, or one beside it that is made when out of date.

    Of a file it is <path>.store, of a folder <path>/.store.
    """
    path = Path(path)
    if path.name == "manifest.csv" and path.is_file():
        path = path.parent
    if is_store(path):
        return path
    folder = path / ".store" if path.is_dir() else path.with_name(f"{path.name}.store")
    origin = _origin(path)
    if _fresh(folder, origin):
        return folder
    since = time.monotonic()
    corpus = read(path)
    convert(corpus, folder, origin)
    seconds = time.monotonic() - since
    say(f"{path}: {len(corpus.clips):,} utterances ({corpus.format}) converted to {folder} in {seconds:.1f} s")
    return folder


def inspect(path: str | Path, say: Callable[[str], object] = print) -> None:
    """Says what is in a file or folder of any of the layouts, and what is wrong with it."""
    corpus = read(path)
    clips = corpus.clips
    splits = {name: [i for i, clip in enumerate(clips) if (clip.split or "train") == name] for name in ORDER}
    splits = {name: rows for name, rows in splits.items() if rows}
    say(f"{path}: {corpus.format}, {len(clips):,} utterances, labels {KINDS[corpus.label]} ({corpus.label})")
    for line in [*_label_lines(corpus, splits), "", *_feature_lines(corpus, splits), ""]:
        say(line)
    say(f"duplicates (same words and features): {_duplicates(corpus)}")
    say(f"videos in more than one split: {_leaks(clips, splits)}")
    if len({group_of(clip) for clip in clips}) == len(clips) > 1:
        say("every video has one utterance: these may be whole videos with the label of their first segment")
    for note in corpus.facts.get("notes", []):
        say(f"note: {note}")


def _write(corpus: Corpus, folder: Path, origin: Mapping[str, Any]) -> None:
    for m, features in corpus.features.items():
        width = corpus.facts["features"][m]["width"]
        writer = StoreWriter(folder / m, {"encoder": f"{corpus.format} {m}", "dim": width, "dtype": "float32"})
        for i, clip in enumerate(corpus.clips):
            x = features[i]
            if x is not None:
                writer.add(clip.id, torch.from_numpy(np.array(x, dtype=np.float32)))
        writer.finish()
    write_manifest(folder / "manifest.csv", corpus.clips)
    made = {"format": corpus.format, "label": corpus.label, **origin, "version": VERSION, "facts": corpus.facts}
    (folder / "source.json").write_text(json.dumps(made, indent=1))


def _origin(path: Path) -> dict[str, Any]:
    """What tells whether a source has changed: its name, size and time, or those of a folder's data files together."""
    if not path.exists():
        return {"source": path.name, "size": 0, "mtime_ns": 0}
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in SOURCES and file.is_file()]
    stats = [file.stat() for file in files]
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    return {"source": path.absolute().name, "size": sum(stat.st_size for stat in stats), "mtime_ns": newest}


def _fresh(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether a folder was converted from just this source, or all that is left of it."""
    if not (folder / "source.json").is_file():
        return False
    made = read_json(folder / "source.json")
    same = {key: made.get(key) for key in origin} == origin and made.get("version") == VERSION
    return same or not origin["size"]


# --- the report -------------------------------------------------------------------------------------------------------


def _label_lines(corpus: Corpus, splits: dict[str, list[int]]) -> Iterator[str]:
    """A table of the splits: utterances, videos, labels and their balance over the classes."""
    factor = 3 if corpus.label == "score1" else 1
    levels = (0, 1) if corpus.label == "polarity" else range(-3, 4)
    heads = "".join(f"{level:7d}" for level in levels)
    yield f"{'split':<7}{'utterances':>11}{'videos':>8}{'min':>8}{'mean':>8}{'max':>8}{heads}"
    moved = total = 0
    for name, rows in splits.items():
        clips = [corpus.clips[i] for i in rows]
        y = np.array([float(clip.label) for clip in clips if clip.label is not None])
        line = f"{name:<7}{len(rows):11,}{len({group_of(clip) for clip in clips}):8,}"
        if not len(y):
            yield f"{line}  no labels of sentiment"
            continue
        rounded = np.rint(y * factor)
        moved += int((rounded != np.sign(y) * np.ceil(np.abs(y * factor))).sum())
        total += len(y)
        shares = "".join(f"{(rounded == level).mean():7.1%}" for level in levels)
        yield f"{line}{y.min():8.3f}{y.mean():8.3f}{y.max():8.3f}{shares}"
    if total and corpus.label != "polarity":
        yield f"classes by rounding, halves to even; CMU's bins put {moved / total:.1%} of the labels in another class"
    emotions = {name: sum(clip.emotions.get(name, 0) > 0 for clip in corpus.clips) for name in EMOTIONS}
    if known := sum(bool(clip.emotions) for clip in corpus.clips):
        yield "emotions present: " + ", ".join(f"{name} {count / known:.1%}" for name, count in emotions.items())
    if corpus.facts.get("clipped"):
        yield f"labels outside of the range: {corpus.facts['clipped']:,} (clipped)"


def _feature_lines(corpus: Corpus, splits: dict[str, list[int]]) -> Iterator[str]:
    """A table of the modalities: width, type, padding, lengths, and shares of utterances that have none."""
    heads = "".join(f"{f'none in {name}':>15}" for name in splits)
    title = f"{'modality':<9}{'width':>6}{'dtype':>9}{'padding':>9}{'frames min/mean/max':>21}{'zero frames':>13}"
    yield f"{title}{'all zero':>10}{heads}"
    broken = []
    for m, features in corpus.features.items():
        facts, there = survey(features, m, corpus.clips)
        facts |= corpus.facts.get("features", {}).get(m, {})
        frames = "/".join(f"{value:g}" for value in facts.get("frames", [0, 0, 0]))
        line = f"{m:<9}{facts['width']:6}{facts['dtype']:>9}{corpus.facts.get('padding', {}).get(m, 'none'):>9}"
        shares = "".join(f"{1 - there[rows].mean():15.1%}" for rows in splits.values())
        yield f"{line}{frames:>21}{facts['lost']:13,}{facts['zero']:10,}{shares}"
        if bad := facts.get("non_finite"):
            where = f"columns {listed(map(str, bad['columns']))}"
            broken.append(f"{m}: {bad['cells']:,} non-finite values in {bad['utterances']:,} utterances, {where}")
    yield from broken


def _duplicates(corpus: Corpus) -> str:
    """How many utterances have an earlier twin, within a split and across."""
    first: dict[bytes, Clip] = {}
    found: dict[str, list[tuple[Clip, Clip]]] = {}
    for i, clip in enumerate(corpus.clips):
        digest = hashlib.blake2b((clip.text or "").encode())
        parts = [(m, x[i]) for m, x in corpus.features.items()]
        for m, x in parts:
            digest.update(m.encode() if x is None else np.array(x, dtype=np.float32).tobytes())
        if all(x is None for _, x in parts):
            continue
        twin = first.setdefault(digest.digest(), clip)
        if twin is not clip:
            where = f"within {clip.split}" if clip.split == twin.split else f"across {twin.split} and {clip.split}"
            found.setdefault(where, []).append((twin, clip))
    lines = [f"{len(pairs)} {where} ({pairs[0][0].id} = {pairs[0][1].id})" for where, pairs in found.items()]
    return ", ".join(lines) or "none"


def _leaks(clips: Sequence[Clip], splits: dict[str, list[int]]) -> str:
    names = list(splits)
    lines = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shared := leak_check([clips[k] for k in splits[a]], [clips[k] for k in splits[b]]):
                lines.append(f"{len(shared)} in {a} and {b} ({listed(shared, 3)})")
    return ", ".join(lines) or "none"


@dataclass
class Config:
    data_dir: str = opt("data/mosei", "file or folder of any of the layouts", "--data-dir")


if __name__ == "__main__":
    run(Config, lambda cfg: inspect(cfg.data_dir))
