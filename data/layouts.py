"""Every published layout of CMU-MOSEI and its kin, told apart by content and read into one form."""

import contextlib
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError
from common.weights import read_json
from data import csd, unpickle
from data.features import open_features
from data.manifest import EMOTIONS, Clip, group_of, read_manifest, read_text, source

MODALITIES = ("text", "audio", "video")
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "validation": "valid", "test": "test"}
ORDER = ("train", "valid", "test")
KINDS = {"score": "-3 to 3", "score1": "-1 to 1", "polarity": "0 negative, 1 positive"}
# what the layouts call the modalities
NAMES = {
    "text": ("text_features", "text"),
    "audio": ("audio_features", "audio"),
    "video": ("video_features", "vision_features", "video", "vision"),
}
INDEX = ("text_features", "audio_features", "video_features")  # the guide's JSON
NPY = r"(text|audio|video|y|group|position)_(train|valid|val|dev|test)"
PICKLES = (".pkl", ".pickle", ".p")
SOURCES = (".json", ".npz", ".npy", ".csd", ".csv", ".py", *PICKLES)

Features = Sequence[np.ndarray | None]


@dataclass
class Corpus:
    """Utterances by split, video and place in the video, and their features: (D,) or (T, D) each, None without any."""

    clips: list[Clip]
    features: Mapping[str, Features]
    label: str  # one of KINDS
    format: str
    facts: dict[str, Any]  # of the source, as JSON: padding, non-finite and zero features, clipped labels, notes


class Lazy(Sequence):
    """A sequence whose elements are made when they are asked for."""

    def __init__(self, length: int, get: Callable[[int], Any]) -> None:
        self.length, self.get = length, get

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.get(i)


@dataclass
class Table:
    """The rows of a file in its order, before they are arranged."""

    clips: list[Clip]  # without labels
    places: list[Any]  # what orders the utterances of a video
    scores: Sequence[float | None]
    features: Mapping[str, Features]
    notes: list[str]
    padding: dict[str, str]
    label: str = "score"


def detect(path: str | Path) -> str:
    """The layout of a file or folder by its content: store, json, npz, mmsa, mult, mag, csd or npy."""
    kind, files = _find(Path(path))
    return _layout(Path(path), _unpickle(files))[0] if kind == "pickle" else kind


def read(path: str | Path) -> Corpus:
    """The utterances of any of the layouts; features stay views of what was read."""
    path = Path(path)
    kind, files = _find(path)
    if kind == "store":
        return _read_store(files[0].parent)
    data: Any = None
    if kind == "pickle":
        kind, data = _layout(path, _unpickle(files))
    if kind == "csd":
        table = Table(*csd.read(files), padding=dict.fromkeys(MODALITIES, "none"))
    elif data is not None:
        table = {"mmsa": _read_mmsa, "mult": _read_mult, "mag": _read_mag}[kind](path, data)
    else:
        table = {"json": _read_json, "npz": _read_npz, "npy": _read_npy}[kind](files)
    return _arrange(path, kind, table)


def is_store(folder: str | Path) -> bool:
    """Whether a folder is in the converted form already, by convert or by hand."""
    return (Path(folder) / "manifest.csv").is_file()


def read_rows(folder: str | Path) -> list[Clip]:
    """The clips of a converted folder; their labels are numbers and their splits train, valid, test or None."""
    clips = read_manifest(Path(folder) / "manifest.csv")
    for clip in clips:
        if clip.split is not None:
            clip.split = _split(clip.split, clip.where)
        if clip.label is not None:
            _number(clip.label, f"{clip.where}: label")
    return clips


def label_kind(folder: str | Path) -> str:
    """What the labels of a converted folder mean, one of KINDS; without source.json, 0 and 1 alone mean polarity."""
    path = Path(folder) / "source.json"
    if path.is_file():
        return read_json(path)["label"]
    labels = {float(clip.label) for clip in read_rows(folder) if clip.label is not None}
    return "polarity" if labels == {0.0, 1.0} else "score"


# --- which layout -----------------------------------------------------------------------------------------------------


def _find(path: Path) -> tuple[str, list[Path]]:
    """The layout of `path`, "pickle" for those that only the content tells apart, and the files that hold it."""
    if not path.exists():
        raise _nothing(path)
    if path.is_file():
        return _kind(path), [path]
    if is_store(path):
        return "store", [path / "manifest.csv"]
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.suffix in SOURCES)
    of = {suffix: [file for file in files if file.suffix == suffix] for suffix in SOURCES}
    if found := [file for file in of[".json"] if _is_index(_head(file))]:
        return "json", [_only(found, "an index")]
    if found := [file for file in of[".npz"] if file.stem in SPLITS]:
        _one_each([file.stem for file in found], path)
        return "npz", found
    if of[".npz"]:
        return "npz", [_only(of[".npz"], "a corpus")]
    if of[".csd"]:
        return "csd", files
    if found := [file for file in of[".npy"] if re.fullmatch(NPY, file.stem)]:
        return "npy", found
    pickles = [file for file in files if file.suffix in PICKLES]
    if found := [file for file in pickles if file.stem in SPLITS]:  # MISA
        return "pickle", found
    if pickles:
        return "pickle", [_only(pickles, "a corpus")]
    if is_store(path / ".store"):
        return "store", [path / ".store" / "manifest.csv"]
    raise _nothing(path, f"it holds {listed([entry.name for entry in sorted(path.iterdir())]) or 'nothing'}")


def _kind(path: Path) -> str:
    """The layout of one file by its first bytes."""
    head = _head(path)
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(b"PK"):
        return "npz"
    if path.suffix == ".csv":
        if path.name == "manifest.csv":
            return "store"
        raise UserError(f"{path}: a manifest with features beside it must have the name manifest.csv")
    if head.startswith(b"\x89HDF"):
        raise UserError(f"{path}: one sequence of several: give the folder of the .csd files")
    if head.startswith(b"\x93NUMPY"):
        raise UserError(f"{path}: one array of several: give the folder of the .npy files")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        if not _is_index(head) and head.split() != [b"[]"]:
            raise UserError(f"{path}: JSON, but not a list of objects with video_id, {', '.join(INDEX)}, label, split")
        return "json"
    return "pickle"


def _is_index(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith(b"[") and re.search(rb'"(video_id|(text|audio|video)_features)"\s*:', text) is not None


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(2**20)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _unpickle(files: list[Path]) -> Any:
    """The content of a pickle, or {split: content} of MISA's one pickle a split."""
    parts = {file.stem: unpickle.load(file) for file in files}  # our own reader: it builds plain data, runs nothing
    (name, first), *others = parts.items()
    whole = isinstance(first, dict) and set(first) & set(SPLITS)
    return first if not others and (whole or name not in SPLITS) else parts


def _layout(path: Path, data: Any) -> tuple[str, dict[str, Any]]:
    """mmsa, mult or mag, and {split: content} of what a pickle holds."""
    names = [key for key in data if key in SPLITS] if isinstance(data, dict) else []
    _one_each(names, path)
    splits = {SPLITS[name]: data[name] for name in names}
    parts = list(splits.values())
    if parts and all(isinstance(part, list | tuple) for part in parts):
        return "mag", splits
    if parts and all(isinstance(part, dict) for part in parts):
        if "labels" in parts[0]:
            return "mult", splits
        if {"regression_labels", "annotations", "raw_text"} & set(parts[0]):
            return "mmsa", splits
    found = f"a dict of {listed(map(str, data))}" if isinstance(data, dict) else f"a {type(data).__name__}"
    raise UserError(f"{path}: {found}, not one of the known pickles (MMSA, MulT or MultiBench, MAG-BERT or MISA)")


def _one_each(names: Sequence[str], path: Path) -> None:
    """UserError where two names mean one split, such as val and valid."""
    for i, name in enumerate(names):
        if twin := [other for other in names[:i] if SPLITS[other] == SPLITS[name]]:
            raise UserError(f"{path}: both {twin[0]} and {name}: which is the {SPLITS[name]} split?")


def _only(files: list[Path], what: str) -> Path:
    if len(files) > 1:
        names = listed(file.name for file in files)
        raise UserError(f"{files[0].parent}: {len(files)} files may be {what}: {names}; name one of them")
    return files[0]


def _nothing(path: Path, why: str = "") -> UserError:
    problem = f"no index file or data for the train split in {path}" + (f" ({why})" if why else "")
    return UserError(f"{problem}; make some with: python tools/download_mosei.py --mock")


def listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- the layouts ------------------------------------------------------------------------------------------------------


def _read_json(files: list[Path]) -> Table:
    """The guide's index: a list of {video_id, text_features, audio_features, video_features, label, split}."""
    path = files[0]

    def compact(item: dict[str, Any]) -> dict[str, Any]:
        # a list of a thousand floats takes ten times its array: none must outlive its own row
        for name in INDEX:
            with contextlib.suppress(ValueError, TypeError):  # the row is checked below, where its number is known
                item |= {name: np.asarray(item[name], np.float32)} if isinstance(item.get(name), list) else {}
        return item

    try:
        rows = json.loads(read_text(path), object_hook=compact)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    videos = [_index_row(row, f"{path}: row {i}") for i, row in enumerate(rows, 1)]
    repeated = len(set(videos)) < len(videos)
    seen: Counter[str] = Counter()
    clips, scores = [], []
    for i, (row, video) in enumerate(zip(rows, videos, strict=True), 1):
        where = f"{path}: row {i}"
        # an id of its own for each utterance of a video; a video_id that is one already stays
        id = f"{video}[{seen[video]}]" if repeated else video
        seen[video] += 1
        text = _words(row["text"]) if isinstance(row.get("text"), str) else None
        split = _split(row.get("split"), where)
        clips.append(Clip(id, text=text, split=split, group=source(video), where=where))
        scores.append(_number(row.get("label"), f"{where}: label"))
    _, shift, notes = _classes(np.array(scores, dtype=np.float64))
    scores = [score + shift for score in scores]
    features: dict[str, Features] = {}
    for m, name in zip(MODALITIES, INDEX, strict=True):
        found = [_array(row.get(name), f"{path}: row {i}: {name}") for i, row in enumerate(rows, 1)]
        if any(x is not None for x in found):
            features[m] = found
    return Table(clips, list(range(len(clips))), scores, features, notes, dict.fromkeys(features, "none"))


def _index_row(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    video = row.get("video_id")
    if not isinstance(video, str | int) or not str(video).strip():
        raise UserError(f"{where}: video_id {video!r} is not a name")
    return str(video).strip()


def _array(value: Any, where: str) -> np.ndarray | None:
    """A vector (D,) or a sequence (T, D) of numbers; None of nothing."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{where}: rows of unequal lengths") from None
    if not array.size:
        return None
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise UserError(f"{where}: shape {array.shape} of {array.dtype}, expected numbers (D,) or (T, D)")
    return array


def _read_npz(files: list[Path]) -> Table:
    """train.npz, val.npz and test.npz, or one file, whose name says its split or is all for training."""
    parts = {SPLITS.get(file.stem, "train"): _load_npz(file) for file in files}
    columns: dict[str, dict[str, Any]] = {}
    ids: list[list[str] | None] = []
    for file, (split, part) in zip(files, parts.items(), strict=True):
        columns[split] = _features(part, str(file))
        if "labels" not in part:
            raise UserError(f"{file}: no array 'labels' (found: {listed(part)})")
        columns[split]["labels"] = part["labels"]
        if "sample_ids" in part:
            columns[split]["sample_ids"] = part["sample_ids"]
        _same_length(columns[split], str(file))
        ids.append([_words(id) or "" for id in part["sample_ids"]] if "sample_ids" in part else None)
    scores, kind, notes = _joined({split: part["labels"] for split, part in columns.items()}, str(files[0].parent))
    clips, places = _numbered(list(columns), [len(part["labels"]) for part in columns.values()], ids, notes)
    features, padding = _padded(columns, {})
    return Table(clips, places, scores, features, notes, padding, kind)


def _load_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            if not names:
                raise UserError(f"{path}: a zip archive without arrays, not .npz")
            arrays = {}
            for name in names:
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = _load_npy(path, file)
            return arrays
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not readable as .npz ({error})") from None


def _load_npy(path: Path, file: Any) -> np.ndarray:
    """An array of a .npy file; objects in it are read as a pickle of plain data."""
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            # our own reader, as np.load(allow_pickle=True) would run what the file asks for
            return np.asarray(unpickle.load(path, file)).reshape(shape)
        if 0 in shape:
            return np.zeros(shape, dtype)
        values = np.frombuffer(file.read(), dtype)
        return values.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise UserError(f"{path}: not a readable .npy array ({error})") from None


def _read_npy(files: list[Path]) -> Table:
    """A folder of {text,audio,video,y,group,position}_{split}.npy: vectors, labels, and each row's video and place."""
    columns: dict[str, dict[str, Any]] = {}
    for file in files:
        name, _, split = file.stem.rpartition("_")
        part = columns.setdefault(SPLITS[split], {})
        if name in part:
            raise UserError(f"{file}: a second {name} of the {SPLITS[split]} split")
        with open(file, "rb") as opened:
            part[name] = _load_npy(file, opened)
    clips, places = [], []
    for split, part in columns.items():
        where = f"{files[0].parent}: {split}"
        if "y" not in part:
            raise UserError(f"{where}: no labels (y_{split}.npy)")
        rows = range(_same_length(part, where))
        groups = part.get("group", rows)
        position = part.get("position", rows)
        # the numbers of the groups start again in each split
        for i in rows:
            group = f"{split}-{int(groups[i])}"
            clips.append(Clip(f"{group}[{int(position[i])}]", split=split, group=group, where=f"{where}: row {i}"))
        places += [int(position[i]) for i in rows]
    scores, kind, notes = _joined({split: part["y"] for split, part in columns.items()}, str(files[0].parent))
    features, padding = _padded({split: _features(part, split) for split, part in columns.items()}, {})
    return Table(clips, places, scores, features, notes, padding, kind)


def _read_mmsa(path: Path, splits: dict[str, Any]) -> Table:
    """MMSA: a dict of columns a split; ids video$_$clip, true lengths by text_bert's mask and *_lengths."""
    clips, places, columns, lengths = [], [], {}, {}
    scores: list[float | None] = []
    notes: list[str] = []
    for split, part in splits.items():
        where = f"{path}: {split}"
        if "regression_labels" not in part:
            raise UserError(f"{where}: no regression_labels (found: {listed(map(str, part))})")
        columns[split] = _features(part, where)
        given = {"audio": "audio_lengths", "video": "vision_lengths"}
        lengths[split] = {m: part[name] for m, name in given.items() if name in part and m in columns[split]}
        if "text" not in columns[split]:
            notes.append(f"{split}: no vectors of text, which is absent")
        elif "text_bert" in part:
            bert = np.asarray(part["text_bert"])
            if bert.ndim != 3 or bert.shape[1] != 3:
                raise UserError(f"{where}: text_bert has shape {bert.shape}, expected (N, 3, T)")
            lengths[split]["text"] = bert[:, 1].sum(1).astype(int)
        said = {name: part[name] for name in ("id", "raw_text", "regression_labels") if name in part}
        sizes = {f"{m} lengths": values for m, values in lengths[split].items()}
        rows = range(_same_length({**columns[split], **said, **sizes}, where))
        scores += _scores(part["regression_labels"], f"{where}: regression_labels")
        for i in rows:
            id = (_words(part["id"][i]) if "id" in part else None) or f"{split}-{i}"
            video, place = _place(id)
            text = _words(part["raw_text"][i]) if "raw_text" in part else None
            clips.append(Clip(id, text=text, split=split, group=video, where=f"{where}: row {i}"))
            places.append(place)
    features, padding = _padded(columns, lengths)
    # SIMS; a few utterances of MOSEI may lie in -1 to 1 by chance
    sims = any("regression_labels_T" in part for part in splits.values()) or len(scores) >= 100
    small = all(abs(score) <= 1 for score in scores if score is not None)
    return Table(clips, places, scores, features, notes, padding, "score1" if sims and small else "score")


def _read_mult(path: Path, splits: dict[str, Any]) -> Table:
    """MulT and MultiBench: vision, audio, text and labels (N, 1, 1), (N, 6) emotions or (N, 7) both."""
    clips, columns = [], {}
    scores: list[float | None] = []
    found: list[tuple[str, float | None]] = []
    named = all("id" in part for part in splits.values())
    for split, part in splits.items():
        where = f"{path}: {split}"
        columns[split] = _features(part, where)
        if "labels" not in part:
            raise UserError(f"{where}: no labels (found: {listed(map(str, part))})")
        said = {name: part[name] for name in ("id", "labels") if name in part}
        rows = range(_same_length({**columns[split], **said}, where))
        labels = np.asarray(part["labels"])
        wide = [size for size in labels.shape[1:] if size > 1]
        if len(wide) > 1 or labels.dtype.kind not in "fiu":
            raise UserError(
                f"{where}: labels have shape {labels.shape} of {labels.dtype}, expected (N, 1, 1) or (N, K)"
            )
        width = wide[0] if wide else 1
        labels = labels.reshape(len(rows), width)
        scores += [None] * len(rows) if width == 6 else _scores(labels[:, :1], f"{where}: labels")
        for i in rows:
            emotions = dict(zip(EMOTIONS, labels[i, -6:].tolist(), strict=True)) if width in (6, 7) else {}
            clip = Clip(f"{split}-{i}", split=split, emotions=emotions, where=f"{where}: row {i}")
            if named:
                clip.id, clip.start, clip.end, start = _segment(part["id"][i], f"{where}: row {i}: id")
                found.append((clip.id, start))
            clips.append(clip)
    notes = [] if named else ["no ids: each utterance counts as a video of its own"]
    places: list[Any] = [((1, i, ""),) for i in range(len(clips))]
    if named:
        places = _name_segments(clips, found)
    features, padding = _padded(columns, {})
    return Table(clips, places, scores, features, notes, padding)


def _segment(row: Any, where: str) -> tuple[str, float | None, float | None, float | None]:
    """Id, start, end (None where no interval) and the start as written of an id: `video[3]` or (video, start, end)."""
    parts = np.asarray(row, dtype=object).reshape(-1).tolist()
    name = _words(parts[0]) or ""
    if len(parts) < 3:
        return name, None, None, None
    start, end = (_number(_words(part), where) for part in parts[1:3])
    whole = end > max(start, 0)
    return name, max(start, 0) if whole else None, end if whole else None, start


def _name_segments(clips: list[Clip], found: list[tuple[str, float | None]]) -> list[Any]:
    """Gives clips known by video and start the ids video[0], video[1]...; returns all clips' places in their videos."""
    starts: dict[str, list[float]] = {}
    for name, start in found:
        if start is not None:
            starts.setdefault(name, []).append(start)
    ranks = {name: {start: i for i, start in enumerate(sorted(set(times)))} for name, times in starts.items()}
    places = []
    for clip, (name, start) in zip(clips, found, strict=True):
        clip.group, place = _place(name)
        if start is not None:
            clip.group, place = name, _natural(str(ranks[name][start]))
            clip.id = f"{name}[{ranks[name][start]}]"
        places.append(place)
    return places


def _read_mag(path: Path, splits: dict[str, Any]) -> Table:
    """MAG-BERT and MISA: ((words, visual, acoustic[, actual words]), label, segment) an utterance, unpadded."""
    clips, places = [], []
    scores: list[float | None] = []
    found: dict[str, list[np.ndarray | None]] = {m: [] for m in MODALITIES}
    unread = 0
    for split, rows in splits.items():
        for i, row in enumerate(rows):
            where = f"{path}: {split} row {i}"
            if not _is_tuple(row) or not _is_tuple(row[0]):
                raise UserError(f"{where}: not ((words, visual, acoustic), label, segment)")
            inputs, label, segment = row[:3]
            words = np.asarray(inputs[0])
            vectors = words.ndim == 2 and words.dtype.kind == "f"
            unread += not vectors
            said = inputs[3] if len(inputs) > 3 else inputs[0] if words.dtype.kind in "USO" else []
            features = {"text": inputs[0] if vectors else None, "audio": inputs[2], "video": inputs[1]}
            for m, value in features.items():
                found[m].append(_array(value, f"{where}: {m}"))
            labels = np.asarray(label).reshape(-1)
            if not labels.size:
                raise UserError(f"{where}: no label")
            scores += _scores(labels[:1], f"{where}: label")
            id = _words(segment) or f"{split}-{i}"
            video, place = _place(id)
            text = " ".join(filter(None, map(_words, said)))
            emotions = dict(zip(EMOTIONS, labels[1:].tolist(), strict=True)) if len(labels) == 7 else {}
            clips.append(Clip(id, text=text or None, split=split, group=video, emotions=emotions, where=where))
            places.append(place)
    present = {m: values for m, values in found.items() if any(x is not None for x in values)}
    notes = [f"text is absent in {unread} utterances: words or their numbers, no vectors"] if unread else []
    return Table(clips, places, scores, present, notes, dict.fromkeys(present, "none"))


def _is_tuple(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) >= 3


def _read_store(folder: Path) -> Corpus:
    """A converted folder; features are read when they are asked for."""
    clips = read_rows(folder)
    origin = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
    features: dict[str, Features] = {}
    for m in MODALITIES:
        if (folder / m).is_dir():
            store = open_features(folder / m)
            features[m] = Lazy(len(clips), lambda i, s=store: s[clips[i].id].numpy() if clips[i].id in s else None)
    return Corpus(clips, features, label_kind(folder), origin.get("format", "store"), origin.get("facts", {}))


# --- parts of layouts -------------------------------------------------------------------------------------------------


def _features(part: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The numeric arrays (N, D) or (N, T, D) among a split's columns, by modality."""
    found = {}
    for m, names in NAMES.items():
        name = next((name for name in names if name in part), None)
        if name is None:
            continue
        array = np.asarray(part[name])
        if array.ndim not in (2, 3) or array.dtype.kind not in "fiu":
            raise UserError(
                f"{where}: {name} has shape {array.shape} of {array.dtype}, expected numbers (N, D) or (N, T, D)"
            )
        found[m] = array
    if not found:
        raise UserError(f"{where}: no text, audio or video features (found: {listed(map(str, part))})")
    return found


def _same_length(columns: Mapping[str, Any], where: str) -> int:
    """The number of rows; UserError where columns disagree, for then nothing says which rows belong together."""
    lengths = {}
    for name, column in columns.items():
        if not isinstance(column, list | tuple) and not (isinstance(column, np.ndarray) and column.ndim):
            raise UserError(f"{where}: {name} is a {type(column).__name__}, not a column of values")
        lengths[name] = len(column)
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{where}: columns of unequal lengths: {said}")
    return next(iter(lengths.values()))


def _scores(values: Any, where: str) -> list[float]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.size != len(array):
        raise UserError(f"{where}: shape {array.shape} of {array.dtype}, expected one number an utterance")
    if not np.isfinite(array).all():
        raise UserError(f"{where}: row {int(np.argmin(np.isfinite(array.reshape(-1))))} is not finite")
    return array.reshape(-1).astype(np.float64).tolist()


def _joined(columns: Mapping[str, Any], where: str) -> tuple[list[float], str, list[str]]:
    """Scores of all splits in a row, what they mean, and a note of it."""
    scores = [score for split, column in columns.items() for score in _scores(column, f"{where}: labels of {split}")]
    kind, shift, notes = _classes(np.concatenate([np.reshape(column, -1) for column in columns.values()]))
    return [score + shift for score in scores], kind, notes


def _classes(labels: np.ndarray) -> tuple[str, int, list[str]]:
    """Kind, shift and a note of labels that may be class numbers: 0 to 6, or of whole type 0 to 2 or 0 and 1."""
    if not labels.size or labels.min() < 0 or (labels % 1).any():
        return "score", 0, []
    top = int(labels.max())
    if top in (4, 5, 6):
        return "score", -3, ["labels are the classes 0 to 6: taken as scores -3 to 3"]
    if labels.dtype.kind not in "iu":
        return "score", 0, []
    if top == 2:
        return "score", -1, ["labels are the classes 0 to 2: taken as scores -1 to 1"]
    notes = ["labels are whole numbers from 0 to 3: taken as scores, though they may be classes"] if top == 3 else []
    return "polarity" if top == 1 else "score", 0, notes


def _numbered(
    splits: list[str], sizes: list[int], ids: list[list[str] | None], notes: list[str]
) -> tuple[list[Clip], list[Any]]:
    """Clips of splits that have ids, or none, and their places."""
    clips, places = [], []
    for split, size, names in zip(splits, sizes, ids, strict=True):
        for i in range(size):
            id = names[i] if names and names[i] else f"{split}-{i}"
            video, place = _place(id) if names else (id, _natural(str(i)))
            clips.append(Clip(id, split=split, group=video, where=f"{split}: row {i}"))
            places.append(place)
    if not all(ids):
        notes.append("no ids: each utterance counts as a video of its own")
    return clips, places


def _padded(
    columns: Mapping[str, Mapping[str, Any]], lengths: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Features], dict[str, str]]:
    """Features of all splits in a row without their padding, and the side of it, from all-zero rows or given lengths.

    Modalities with as many frames as each other are aligned: an utterance is cut at the same places in all of them.
    """
    features: dict[str, Features] = {}
    padding = {}
    ends: dict[tuple[str, str], np.ndarray] = {}
    names = [m for m in MODALITIES if any(m in part for part in columns.values())]
    for m in names:
        widths = {split: part[m].shape[-1] for split, part in columns.items() if m in part}
        if len(widths) < len(columns) or len(set(widths.values())) > 1:
            said = ", ".join(f"{split} {widths.get(split, 'none')}" for split in columns)
            raise UserError(f"{m} features differ in width between the splits: {said}")
        margins = np.zeros(2, dtype=np.int64)
        for split, part in columns.items():
            ends[split, m] = _ends(part[m])
            spans = ends[split, m][ends[split, m][:, 1] > 0]
            margins += (spans[:, 0].sum(), (_frames(part[m]) - spans[:, 1]).sum())
            if m in lengths.get(split, {}):
                ends[split, m] = _within(ends[split, m], np.asarray(lengths[split][m], int), _frames(part[m]))
        front, back = margins
        share = front / max(1, front + back)
        padding[m] = "none" if not front + back else "front" if share > 0.9 else "back" if share < 0.1 else "mixed"
    cut = dict(ends)
    for split, part in columns.items():
        if len(names) > 1 and len({_frames(part[m]) for m in names}) == 1:
            spans = np.stack([ends[split, m] for m in names])
            empty = spans[..., 1] == 0
            first = np.where(empty, _frames(part[names[0]]), spans[..., 0]).min(0)
            common = np.stack([first, spans[..., 1].max(0)], 1)
            cut |= {(split, m): np.where(empty[i][:, None], 0, common) for i, m in enumerate(names)}
    for m in names:
        features[m] = _views([part[m] for part in columns.values()], [cut[split, m] for split in columns])
    return features, padding


def _views(arrays: list[np.ndarray], cuts: list[np.ndarray]) -> Features:
    """The rows of arrays one after the other: vectors, or the frames from first to last."""
    place = [(part, row) for part, array in enumerate(arrays) for row in range(len(array))]

    def get(i: int) -> np.ndarray:
        part, row = place[i]
        first, last = cuts[part][row]
        return arrays[part][row, first:last] if arrays[part].ndim == 3 else arrays[part][row]

    return Lazy(len(place), get)


def _frames(array: np.ndarray) -> int:
    return array.shape[1] if array.ndim == 3 else 1


def _ends(array: np.ndarray, rows: int = 1024) -> np.ndarray:
    """(N, 2): first and one past the last frame that is not all zeros; 0, 0 where all are."""
    spans = np.zeros((len(array), 2), dtype=np.int64)
    for start in range(0, len(array), rows):  # parts, for the comparison takes an eighth of the array
        there = (array[start : start + rows] != 0).any(-1).reshape(-1, _frames(array))
        first, last = there.argmax(1), there.shape[1] - there[:, ::-1].argmax(1)
        spans[start : start + rows] = np.stack([first, last], 1) * there.any(1, keepdims=True)
    return spans


def _within(spans: np.ndarray, lengths: np.ndarray, frames: int) -> np.ndarray:
    """Spans widened to the given lengths, from the front or from the back, whichever the frames fit."""
    lengths = np.clip(lengths.reshape(-1), 0, frames)
    first, last = spans.T
    back = last <= lengths
    front = ~back & (first >= frames - lengths)
    first = np.where(back, 0, np.where(front, frames - lengths, first))
    last = np.where(back, lengths, np.where(front, frames, last))
    return np.stack([first, last], 1) * (spans[:, 1:] > 0)


def _place(id: str) -> tuple[str, Any]:
    """(video, what sorts its utterances) of `video$_$3`, `video[3]` or any other id."""
    match = re.fullmatch(r"(.+)\$_\$(.+)|(.+)\[(.+)\]", id)
    if match is None:
        return id, _natural("")
    video, clip = (match[1], match[2]) if match[1] else (match[3], match[4])
    return video, _natural(clip)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts 2 before 10."""
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text) if part)


def _words(value: Any) -> str | None:
    """Text of str or bytes; None of nothing."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = "" if value is None else str(value)
    return text.encode("utf-8", "replace").decode().strip() or None


def _split(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in SPLITS:
        raise UserError(f"{where}: split {value!r} is not one of train, valid (val, dev) and test")
    return SPLITS[value]


def _number(value: Any, where: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise UserError(f"{where} {value!r} is not a finite number")
    return number


# --- one form ---------------------------------------------------------------------------------------------------------


def _arrange(path: Path, kind: str, table: Table) -> Corpus:
    """A corpus of the rows of a file: by split, then video, then place in the video."""
    clips = table.clips
    if not any(clip.split == "train" for clip in clips):
        counts = Counter(clip.split for clip in clips)
        raise _nothing(path, ", ".join(f"{name} {count}" for name, count in counts.items()) or "no rows")
    for clip in clips:
        if not all(np.isfinite(strength) and strength >= 0 for strength in clip.emotions.values()):
            raise UserError(f"{clip.where}: the emotions {list(clip.emotions.values())} are not strengths from 0 up")
    notes = list(table.notes)
    label = table.label
    limit = {"score": 3.0, "score1": 1.0, "polarity": 1.0}[label]
    clipped = 0
    for clip, score in zip(clips, table.scores, strict=True):
        if score is not None:
            clipped += abs(score) > limit
            # as short as float32 allows; + 0.0 for there is a -0.0
            clip.label = np.format_float_positional(np.float32(np.clip(score, -limit, limit) + 0.0), trim="-")
    seen: Counter[str] = Counter()
    for clip in clips:
        seen[clip.id] += 1
        if seen[clip.id] > 1:
            clip.id = f"{clip.id}#{seen[clip.id]}"
    if again := sum(count - 1 for count in seen.values()):
        notes.append(f"{again} ids occur again; those utterances are named id#2 and so on")
    first: dict[tuple[str | None, str], int] = {}
    for i, clip in enumerate(clips):
        first.setdefault((clip.split, group_of(clip)), i)
    keys = [
        (ORDER.index(clip.split or ""), first[clip.split, group_of(clip)], place, i)
        for i, (clip, place) in enumerate(zip(clips, table.places, strict=True))
    ]
    order = [key[-1] for key in sorted(keys)]
    clips = [clips[i] for i in order]
    features = {m: Lazy(len(order), lambda i, x=x: x[order[i]]) for m, x in table.features.items()}
    found = {m: survey(x, m, clips) for m, x in features.items()}
    facts = {m: fact for m, (fact, _) in found.items() if fact["absent"] < len(clips)}
    shown = {m: Lazy(len(order), lambda i, x=features[m], there=found[m][1]: x[i] if there[i] else None) for m in facts}
    if not shown:
        raise UserError(f"{path}: no utterance has features")
    padding = {m: side for m, side in table.padding.items() if m in facts}
    facts = {"padding": padding, "clipped": clipped, "notes": notes, "features": facts}
    return Corpus(clips, shown, label, kind, facts)


def survey(features: Features, modality: str, clips: Sequence[Clip]) -> tuple[dict[str, Any], np.ndarray]:
    """Facts of one modality's features, and which utterances have any: those of zeros alone have none."""
    there = np.zeros(len(clips), dtype=bool)
    width, dtype, zero, lost = 0, "", 0, 0
    frames, broken, columns = [], [], np.zeros(0, dtype=np.int64)
    for i, clip in enumerate(clips):
        x = features[i]
        if x is None:
            continue
        if width not in (0, x.shape[-1]):
            raise UserError(f"{clip.where or clip.id}: {modality} has width {x.shape[-1]}, elsewhere {width}")
        width, dtype = x.shape[-1], str(x.dtype)
        rows = (np.atleast_2d(x) != 0).any(-1)
        there[i] = rows.any()
        zero += not there[i]
        if there[i]:
            frames.append(len(rows))
            lost += len(rows) - int(rows.sum())
            finite = np.isfinite(np.atleast_2d(x))
            if not finite.all():
                columns = (~finite).sum(0) + (columns if len(columns) else 0)
                broken.append(i)
    facts: dict[str, Any] = {"width": width, "dtype": dtype, "zero": zero, "absent": int((~there).sum()), "lost": lost}
    if frames:
        facts["frames"] = [min(frames), round(float(np.mean(frames)), 1), max(frames)]
    if broken:
        where = {"cells": int(columns.sum()), "utterances": len(broken), "columns": np.flatnonzero(columns).tolist()}
        facts["non_finite"] = where
    return facts, there
