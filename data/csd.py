"""CMU Multimodal SDK's computational sequences (.csd, HDF5): cut into labelled segments and averaged over each word."""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.config import UserError
from data.manifest import EMOTIONS, Clip, csv_rows, read_text

EPS = 1e-5  # seconds that two intervals must share to meet, as in the SDK
# what a sequence is, by its name or its file's: the first that fits; within one, the preferred sequence first
ROLES = {
    "phones": ("phone",),
    "labels": ("all.?labels", "sentiment", "opinion", "label"),
    "text": ("vector", "glove", "bert"),
    "words": ("word",),
    "audio": ("covarep", "smile", "audio|acoustic|mfcc|wav2vec"),
    "video": ("facet", "openface", "video|visual"),
}
FEATURES = ("text", "audio", "video")
PAUSES = ("sp", "")
FOLDS = {"0": "train", "1": "valid", "2": "test", "3": None, "train": "train", "valid": "valid", "test": "test"}
SDK = "https://github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK"


class Stream(NamedTuple):
    """One .csd file, open: its name and {video: group of features (n, D) and intervals (n, 2) in seconds}."""

    name: str
    data: Any


class Track(NamedTuple):
    """What a sequence holds of a video, by start: starts and ends (n,) in seconds, values (n, D), rows as written."""

    starts: np.ndarray
    ends: np.ndarray
    values: np.ndarray
    rows: np.ndarray


def read(files: list[Path]) -> tuple[list[Clip], list[Any], list[float | None], dict[str, list[Any]], list[str]]:
    """Clips, places in their videos, sentiment, features (T, D) by modality, and notes, of the files of one folder.

    T counts words where there is a file of words or of their vectors, else frames.
    """
    try:
        import h5py
    except ImportError:
        raise UserError("reading .csd needs h5py: pip install -r requirements-extra.txt") from None
    folder = files[0].parent
    with ExitStack() as stack:
        streams, notes = _open(h5py, [file for file in files if file.suffix == ".csd"], stack)
        if "labels" not in streams:
            raise UserError(f"{folder}: no labels among the .csd files (CMU_MOSEI_Labels.csd)")
        present = [m for m in FEATURES if m in streams]
        if not present:
            raise UserError(f"{folder}: no .csd file of text, audio or video features")
        labels = streams["labels"]
        videos = {key: re.sub(r"\[\d+\]$", "", key) for key in labels.data}
        folds = _folds(files, set(videos.values()), folder)
        outside = [key for key, video in videos.items() if video not in folds]
        if outside:
            count = sum(len(labels.data[key]["features"]) for key in outside)
            notes.append(f"{count} segments of {len({videos[key] for key in outside})} videos are in no fold: excluded")
        if unlabelled := len(set(folds) - set(videos.values())):
            notes.append(f"{unlabelled} videos of the folds have no labels")
        clips: list[Clip] = []
        scores: list[float | None] = []
        features: dict[str, list[Any]] = {m: [] for m in present}
        left_out = dict.fromkeys(present, 0)
        dropped = 0
        for key, video in videos.items():
            if video not in folds:
                continue
            segments = _track(labels, key, f"{folder}: {labels.name}")
            keep = (segments.ends - segments.starts > EPS) & np.isfinite(segments.values).all(1)
            dropped += int((~keep).sum())
            segments = Track(*(part[keep] for part in segments))
            texts, parts = _cut(streams, key, segments, left_out, str(folder))
            clips += _clips(key, video, folds[video], segments, texts, f"{folder}: {labels.name}")
            scores += segments.values[:, 0].tolist()
            for m, part in parts.items():
                features[m] += part
    notes += [f"{dropped} segments have no length or no finite label: excluded"] * bool(dropped)
    notes += [f"{m}: {cells} non-finite cells left out of the means" for m, cells in left_out.items() if cells]
    return clips, [clip.start for clip in clips], scores, features, notes


def _open(h5py: Any, files: list[Path], stack: ExitStack) -> tuple[dict[str, Stream], list[str]]:
    """The streams of a folder by role, and which of them are used."""
    ranked: dict[str, list[tuple[int, str, Any]]] = {}
    unknown = []
    for path in files:
        try:
            file = stack.enter_context(h5py.File(path, "r"))
            root = next(iter(file))
            data = file[root]["data"]
        except (OSError, KeyError, StopIteration, ValueError) as error:
            raise UserError(f"{path}: not a computational sequence ({error or 'empty'})") from None
        name = _name(file[root]) or root
        role = _role(name) or _role(root) or _role(path.stem)
        if role is None:
            unknown.append(path.name)
        else:
            ranked.setdefault(role[0], []).append((role[1], name, data))
    streams, notes = {}, [f"{name}: neither words, labels nor features by its name: not used" for name in unknown]
    for role, found in ranked.items():
        found.sort(key=lambda each: each[:2])
        streams[role] = Stream(*found[0][1:])
        others = ", ".join(name for _, name, _ in found[1:])
        if role != "phones":
            notes.append(f"{role}: {found[0][1]}" + (f" (not used: {others})" if others else ""))
    return streams, notes


def _name(root: Any) -> str | None:
    """The name in a sequence's metadata: JSON, or plain text in the first files."""
    if "metadata" not in root or "root name" not in root["metadata"]:
        return None
    raw = root["metadata"]["root name"][0]
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _role(name: str) -> tuple[str, int] | None:
    for role, patterns in ROLES.items():
        for rank, pattern in enumerate(patterns):
            if re.search(pattern, name.lower()):
                return role, rank
    return None


def _folds(files: list[Path], videos: set[str], folder: Path) -> dict[str, str]:
    """video -> split, from the fold list beside the data that knows most of its videos."""
    found = [_fold_list(file) for file in files if file.suffix == ".py"]
    found += [_fold_table(file) for file in files if file.suffix == ".csv"]
    best = max(found, key=lambda folds: len(videos & set(folds)), default={})
    if not videos & set(best):
        raise UserError(f"{folder}: no list of folds knows its videos: put cmu_mosei_std_folds.py of {SDK} beside them")
    return best


def _fold_list(path: Path) -> dict[str, str]:
    """The lists of names standard_train_fold and so on of a Python file, which is not executed."""
    folds: dict[str, str] = {}
    try:
        for node in ast.parse(read_text(path)).body:
            name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
            if match := re.fullmatch(r"standard_(train|valid|test)_fold", name):
                assert isinstance(node, ast.Assign)
                folds |= dict.fromkeys(ast.literal_eval(node.value), match[1])
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of folds ({error})") from None
    return folds


def _fold_table(path: Path) -> dict[str, str]:
    """The columns file and split (0, 1, 2 for train, valid, test; 3 for none) of a CSV; nothing of another one."""
    folds: dict[str, str] = {}
    for line, row in csv_rows(path, ("file", "split")) if _has_columns(path) else []:
        if row["split"] not in FOLDS:
            raise UserError(f"{path}:{line}: split '{row['split']}' is not one of {', '.join(FOLDS)}")
        if split := FOLDS[row["split"]]:
            folds[row["file"]] = split
    return folds


def _has_columns(path: Path) -> bool:
    header = read_text(path).split("\n", 1)[0]
    return {"file", "split"} <= {cell.strip().strip('"') for cell in header.split(",")}


def _clips(key: str, video: str, split: str, segments: Track, texts: list[str | None], where: str) -> Iterator[Clip]:
    for i, row in enumerate(segments.rows):
        id = key if key != video else f"{video}[{row}]"
        strengths = segments.values[i, 1:].tolist()
        emotions = dict(zip(EMOTIONS, strengths, strict=True)) if len(strengths) == len(EMOTIONS) else {}
        start, end = float(segments.starts[i]), float(segments.ends[i])
        place = f"{where}: {id}"
        yield Clip(id, None, texts[i], split=split, group=video, start=start, end=end, emotions=emotions, where=place)


def _track(stream: Stream, key: str, where: str) -> Track:
    if not {"features", "intervals"} <= set(stream.data[key]):
        raise UserError(f"{where}: {key} has no features or no intervals")
    features, intervals = stream.data[key]["features"][()], stream.data[key]["intervals"][()]
    if features.ndim != 2 or intervals.shape != (len(features), 2):
        raise UserError(f"{where}: {key} has features {features.shape} and intervals {intervals.shape}")
    starts = np.maximum(intervals[:, 0], 0.0)  # some start before the video does
    order = np.argsort(starts, kind="stable")
    return Track(starts[order], intervals[order, 1], features[order], order)


def _cut(
    streams: dict[str, Stream], key: str, segments: Track, left_out: dict[str, int], where: str
) -> tuple[list[str | None], dict[str, list[Any]]]:
    """The text and the features of each segment of a video."""
    count = len(segments.starts)
    tracks = {
        role: _track(stream, key, f"{where}: {stream.name}")
        for role, stream in streams.items()
        if role not in ("labels", "phones") and key in stream.data
    }
    texts: list[str | None] = [None] * count
    words = None
    if "words" in tracks:
        said = [_decode(row[0]) for row in tracks["words"].values]
        keep = np.array([word not in PAUSES for word in said], dtype=bool)
        words = Track(*(part[keep] for part in tracks["words"]))
        spoken = np.array([word for word in said if word not in PAUSES], dtype=object)
        segment, word = meeting(segments.starts, segments.ends, words.starts, words.ends)
        texts = [" ".join(spoken[word[segment == i]]) or None for i in range(count)]
    elif "text" in tracks:
        words = Track(*(part[(tracks["text"].values != 0).any(1)] for part in tracks["text"]))
    aligned = {m: tracks.get(m) for m in FEATURES if m in streams}
    if words is None:
        return texts, {m: _frames(track, segments) for m, track in aligned.items()}
    # a segment without words counts as one long word
    segment, word = meeting(segments.starts, segments.ends, words.starts, words.ends)
    silent = np.setdiff1d(np.arange(count), segment)
    starts, ends = (
        np.concatenate([a, b[silent]]) for a, b in ((words.starts, segments.starts), (words.ends, segments.ends))
    )
    segment = np.concatenate([segment, silent])
    word = np.concatenate([word, len(words.starts) + np.arange(len(silent))])
    parts: dict[str, list[Any]] = {}
    for m, track in aligned.items():
        if track is None:
            parts[m] = [None] * count
            continue
        means, cells = average(track, starts, ends)
        left_out[m] += cells
        parts[m] = [means[word[segment == i]] for i in range(count)]
    return texts, parts


def _frames(track: Track | None, segments: Track) -> list[np.ndarray | None]:
    """The frames of each segment, (T, D) float32."""
    if track is None:
        return [None] * len(segments.starts)
    segment, frame = meeting(segments.starts, segments.ends, track.starts, track.ends)
    values = track.values.astype(np.float32)
    return [values[frame[segment == i]] for i in range(len(segments.starts))]


def meeting(
    starts: np.ndarray, ends: np.ndarray, others: np.ndarray, until: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j) of intervals i and intervals j, `others` to `until`, sorted by start, that share more than EPS."""
    # ends need not be sorted: no interval before the first whose running maximum passes the start can meet it
    first = np.searchsorted(np.maximum.accumulate(until), starts, "right")
    last = np.maximum(np.searchsorted(others, ends, "left"), first)
    counts = last - first
    i = np.repeat(np.arange(len(starts)), counts)
    j = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
    shared = np.minimum(ends[i], until[j]) - np.maximum(starts[i], others[j]) > EPS
    return i[shared], j[shared]


def average(track: Track, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, int]:
    """(N, D) float32 means of the frames that meet each of N intervals, and how many non-finite cells they leave out.

    A column without a finite cell gives NaN, an interval without frames zeros.
    """
    interval, frame = meeting(starts, ends, track.starts, track.ends)
    values = track.values.astype(np.float64)
    finite = np.isfinite(values)
    sums, counts = np.zeros((len(starts), values.shape[1])), np.zeros((len(starts), values.shape[1]))
    if len(interval):
        which, first = np.unique(interval, return_index=True)
        sums[which] = np.add.reduceat(np.where(finite, values, 0.0)[frame], first)
        counts[which] = np.add.reduceat(finite[frame], first, dtype=np.float64)
        sums[which] = np.where(counts[which] > 0, sums[which], np.nan)
    used = np.unique(frame)
    return (sums / np.maximum(counts, 1)).astype(np.float32), int((~finite[used]).sum())


def _decode(word: Any) -> str:
    return (word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)).strip()
