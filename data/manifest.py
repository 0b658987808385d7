"""The way in for a user's own clips: a CSV or JSONL manifest with one row a clip."""

import contextlib
import csv
import difflib
import io
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.config import UserError

TEXTS = ("text", "label", "split", "fold", "speaker", "dialogue", "group")
SECONDS = ("start", "end")
CAPTIONS = ("reason", "reason_v2")  # the two captioning tasks; a `caption` column is the target of both
EMOTIONS: tuple[str, ...] = (
    "happy",
    "sad",
    "anger",
    "surprise",
    "disgust",
    "fear",
)  # strengths, as CMU-MOSEI orders them
COLUMNS = ("id", "path", *TEXTS, "box", *SECONDS, "frame", "caption", *CAPTIONS, *EMOTIONS)


@dataclass
class Clip:
    """One clip and what is known about it; whatever is not known is None."""

    id: str
    path: str | None = None
    text: str | None = None
    label: str | None = None
    captions: dict[str, str] = field(default_factory=dict)  # task -> target text
    split: str | None = None
    fold: str | None = None
    speaker: str | None = None
    dialogue: str | None = None
    group: str | None = None
    start: float | None = None  # seconds
    end: float | None = None
    box: str | None = None  # pixels x1,y1,x2,y2
    frame: int | None = None  # index of the peak frame
    emotions: dict[str, float] = field(default_factory=dict)  # one of EMOTIONS -> strength, 0 to 3 in CMU-MOSEI
    where: str = ""  # "file:line", for messages


def read_manifest(path: str | Path) -> list[Clip]:
    """Read a .csv or .jsonl manifest; relative media paths start at its folder. UserError names file and line."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{path}: a manifest is a .csv or .jsonl file")
    rows = csv_rows(path, ("id", "path")) if path.suffix.lower() == ".csv" else jsonl_rows(path)
    clips: dict[str, Clip] = {}
    unknown: dict[str, None] = {}
    for line, row in rows:
        where = f"{path}:{line}"
        clip = _clip(row, path.parent, where)
        if clip.id in clips:
            raise UserError(f"{where}: duplicate id '{clip.id}' (first at {clips[clip.id].where})")
        clips[clip.id] = clip
        unknown |= dict.fromkeys(name for name in row if name not in COLUMNS)
    if not clips:
        raise UserError(f"{path}: no clips")
    if unknown and os.environ.get("RANK", "0") == "0":
        print(f"{path}: columns not used: {', '.join(map(_with_nearest, unknown))}", file=sys.stderr)
    return list(clips.values())


def write_manifest(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write clips as CSV, only the columns in use; media below the manifest's folder get relative paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [_row(clip, path.parent) for clip in clips]
    columns = [name for name in COLUMNS if name == "id" or any(row.get(name) is not None for row in rows)]
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def read_text(path: str | Path, fallback: str | None = None) -> str:
    """The text of a file, UTF-8 without its byte order mark, or else in the encoding `fallback`.

    UserError: it is missing or something else.
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} not found") from None
    try:
        # line ends stay as they are: a quoted CSV cell may hold them
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is not None:
            with contextlib.suppress(UnicodeDecodeError):
                return content.decode(fallback)
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def csv_rows(
    path: str | Path, needs: tuple[str, ...], fallback: str | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a CSV file whose header must have one of the columns `needs`; see read_text."""
    reader = csv.reader(io.StringIO(read_text(path, fallback), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1  # a quoted cell may span lines: report its first
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header, needs, f"{path}:{start}")
            elif len(cells) != len(header):
                raise UserError(f"{path}:{start}: {len(cells)} cells, the header has {len(header)}")
            else:
                yield start, {name: cell for name, cell in zip(header, cells, strict=True) if name}
    except csv.Error as error:
        raise UserError(f"{path}:{line}: {error}") from None


def group_of(clip: Clip) -> str:
    """What must stay on one side of a split: the clip's group, dialogue, speaker or source video."""
    return clip.group or clip.dialogue or clip.speaker or source(clip.id)


def source(id: str) -> str:
    """The source video in an utterance id: `video[3]` (CMU Multimodal SDK), `video$_$3` (MMSA); else the id."""
    return re.sub(r"(?<=.)(\[\d+\]|\$_\$\d+)$", "", id)


def split_by_group(clips: list[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Hold out about `share` of the clips in whole groups -> (train, held), each in the given order."""
    if not 0 <= share < 1:
        raise UserError(f"held-out share {share} is not in [0, 1)")
    sizes: dict[str, int] = {}
    for clip in clips:
        sizes[group_of(clip)] = sizes.get(group_of(clip), 0) + 1
    if share and len(sizes) < 2:
        raise UserError(f"nothing can be held out: all {len(clips)} clips are of one group")
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    target = share * len(clips)
    held, filled = set(), 0
    for name in names:
        if abs(filled + sizes[name] - target) < abs(filled - target):
            held.add(name)
            filled += sizes[name]
    if share and not held:  # every group is more than twice the share
        held.add(min(names, key=lambda name: sizes[name]))
    if len(held) == len(sizes):
        held.discard(names[-1])
    train = [clip for clip in clips if group_of(clip) not in held]
    return train, [clip for clip in clips if group_of(clip) in held]


def leak_check(a: Iterable[Clip], b: Iterable[Clip]) -> list[str]:
    """The groups that are on both sides, sorted; empty when nothing leaks."""
    return sorted({group_of(clip) for clip in a} & {group_of(clip) for clip in b})


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of the words, None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(words), 1)), None)


def _with_nearest(name: str) -> str:
    match = nearest(name.lower(), COLUMNS[: -len(EMOTIONS)])  # short words, near to many
    return f"{name} (nearest: {match})" if match else name


def _check_header(header: list[str], needs: tuple[str, ...], where: str) -> None:
    named = [name for name in header if name]  # pandas writes its index under an empty name
    found = f"(found: {', '.join(named)})"
    if len(set(named)) < len(named):
        raise UserError(f"{where}: a column name occurs twice {found}")
    if not set(needs) & set(named):
        raise UserError(f"{where}: no column {' or '.join(map(repr, needs))} {found}")


def jsonl_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSON Lines file; UserError names file and line."""
    # split("\n"): str.splitlines also breaks at U+2028, which JSON allows inside a string
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)  # NaN is how pandas says "missing"
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        yield number, row


def _clip(row: dict, folder: Path, where: str) -> Clip:
    media = _text(row.get("path"), "path", where)
    id = _text(row.get("id"), "id", where) or (Path(media).stem if media else None)
    if id is None:
        raise UserError(f"{where}: neither id nor path is given")
    start, end = (_number(row.get(name), name, where) for name in SECONDS)
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end {end:g} is not after start {start or 0.0:g}")
    frame = _number(row.get("frame"), "frame", where)
    if frame is not None and frame != int(frame):
        raise UserError(f"{where}: frame {frame:g} is not a whole number")
    caption = _text(row.get("caption"), "caption", where)
    captions = {task: _text(row.get(task), task, where) or caption for task in CAPTIONS}
    strengths = {name: _number(row.get(name), name, where) for name in EMOTIONS}
    return Clip(
        id,
        str(folder / media) if media else None,
        **{name: _text(row.get(name), name, where) for name in TEXTS},
        box=_box(row.get("box"), where),
        captions={task: text for task, text in captions.items() if text},
        start=start,
        end=end,
        frame=None if frame is None else int(frame),
        emotions={name: strength for name, strength in strengths.items() if strength is not None},
        where=where,
    )


def _text(value: object, name: str, where: str) -> str | None:
    if isinstance(value, list | dict):
        raise UserError(f"{where}: {name} must be text, not a {type(value).__name__}")
    return None if value is None else str(value).strip() or None


def _box(value: object, where: str) -> str | None:
    text = _text(",".join(map(str, value)) if isinstance(value, list) else value, "box", where)
    if text is None:
        return None
    try:
        left, top, right, bottom = map(float, text.split(","))
        whole = round(left) < round(right) and round(top) < round(bottom)
    except (ValueError, OverflowError):  # not four numbers, or none that are finite
        whole = False
    if not whole:
        raise UserError(f"{where}: box '{text}' is not x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2")
    return text


def _number(value: object, name: str, where: str) -> float | None:
    text = _text(value, name, where)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"{where}: {name} '{text}' is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise UserError(f"{where}: {name} {text} must be finite and not negative")
    return number


def _row(clip: Clip, folder: Path) -> dict:
    media = clip.path and Path(os.path.abspath(clip.path))
    root = Path(os.path.abspath(folder))
    if media and media.is_relative_to(root):
        media = media.relative_to(root)
    return vars(clip) | clip.captions | clip.emotions | {"path": media}
