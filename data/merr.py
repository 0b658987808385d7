"""MERR and the other lists of Emotion-LLaMA: list file, caption JSON, transcript CSV and video folder to clips."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.config import UserError
from data.manifest import Clip, csv_rows, nearest, read_text

# Published sizes (paper §3 and the released lists), to tell a whole download from a partial one.
COUNTS = {
    "MERR_coarse_grained.txt": 28_618,
    "MERR_fine_grained.txt": 4_487,
    "relative_test3_NCEV.txt": 834,
    "EMER_NCE.txt": 100,
    "EMER_332_NCE.txt": 332,
}
TRANSCRIPTS = ("transcription_en_all.csv", "transcription_all_new.csv")
COARSE = ("MERR_coarse_grained.json", "AU_filter_merge.json")
FINE = ("MERR_fine_grained.json", "0512_target_smp_end.json")
FINE_FIELDS = ("smp_reason_caption", "reason_caption")
MEDIA = (".mp4", ".avi", ".mkv", ".mov", ".jpg", ".png")  # the first that exists wins


@dataclass
class Listing:
    """What became of a list file's rows."""

    file: str
    listed: int
    found: int
    skipped: list[tuple[str, str]]  # (id, reason)
    expected: int | None = None  # the published list's size
    notes: list[str] = field(default_factory=list)  # what else the reader should know

    def __str__(self) -> str:
        published = "" if self.expected in (None, self.listed) else f" (the published list has {self.expected:,})"
        skipped = f", {len(self.skipped):,} skipped (first: {': '.join(self.skipped[0])})" if self.skipped else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.file}: {self.listed:,} listed{published}, {self.found:,} used{skipped}{notes}"


def load_merr(
    root: str | Path,
    annotation_file: str,
    image_path: str | None = None,
    transcript: str | None = None,
    coarse: str | None = None,
    fine: str | None = None,
    need_video: bool = False,
    labels: Iterable[str] | None = None,
    rows: Sequence[tuple[int, str, str | None]] | None = None,
) -> tuple[list[Clip], Listing]:
    """Clips of one list with label, subtitle, captions, peak frame and video, as far as they exist under root.

    A clip is skipped for want of a video only with need_video. UserError: a named file is missing or malformed, or a
    label is not one of `labels`. `rows` are the list's (line, name, label), where it has a layout of its own.
    """
    root = Path(root)
    path = _named(root, annotation_file, "annotation_file")
    rows = _read_list(path, None if labels is None else list(labels)) if rows is None else rows
    videos = _video_index(root, image_path, need_video)
    texts = _transcript(_find(root, transcript, "transcript", TRANSCRIPTS))
    coarse_entries = read_captions(_find(root, coarse, "coarse", COARSE), ("caption",))
    fine_entries = read_captions(_find(root, fine, "fine", FINE), FINE_FIELDS)
    clips: dict[str, Clip] = {}
    skipped = []
    for line, name, label in rows:
        if name in clips:
            skipped.append((name, f"listed again in line {line}"))
            continue
        if need_video and name not in videos:
            skipped.append((name, "no video"))
            continue
        coarse_caption, coarse_peak = coarse_entries.get(name, (None, None))
        fine_caption, fine_peak = fine_entries.get(name, (None, None))
        captions = {"reason": coarse_caption, "reason_v2": fine_caption}
        clips[name] = Clip(
            id=name,
            path=videos.get(name),
            text=texts.get(name),
            label=label,
            captions={task: caption for task, caption in captions.items() if caption},
            frame=coarse_peak if fine_peak is None else fine_peak,
            where=f"{path}:{line}",
        )
    return list(clips.values()), Listing(str(path), len(rows), len(clips), skipped, COUNTS.get(path.name))


def _named(root: Path, name: str, option: str) -> Path:
    """What a user named, below root or as it is; UserError with both places if it is at neither."""
    places = dict.fromkeys([root / name, Path(name)])
    for place in places:
        if place.exists():
            return place
    raise UserError(f"{option} '{name}' not found (looked for {' and '.join(map(str, places))})")


def _find(root: Path, name: str | None, option: str, defaults: tuple[str, ...]) -> Path | None:
    """The file a user named, which must exist, or the first default under root, if there is one."""
    if name is not None:
        return _named(root, name, option)
    return next((root / default for default in defaults if (root / default).is_file()), None)


def _read_list(path: Path, labels: list[str] | None) -> list[tuple[int, str, str | None]]:
    """(line, name, label) of each row: `name label`, `name count`, or `name count label [valence]`."""
    rows = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        cells = text.split()
        if not cells:
            continue
        where = f"{path}:{line}"
        if not 2 <= len(cells) <= 4:
            raise UserError(f"{where}: {len(cells)} columns; a row is: name frame_count label [valence]")
        if len(cells) > 2 and not cells[1].isdecimal():
            raise UserError(f"{where}: frame count '{cells[1]}' is not a whole number")
        label = cells[2] if len(cells) > 2 else None if cells[1].isdecimal() else cells[1]
        if labels is not None and label is not None and label not in labels:
            match = nearest(label.lower(), labels)
            hint = f"nearest: {match}; " if match else ""
            raise UserError(f"{where}: unknown label '{label}' ({hint}labels: {', '.join(labels)})")
        rows.append((line, cells[0], label))
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def _video_index(root: Path, image_path: str | None, need_video: bool) -> dict[str, str]:
    """name -> media file, from one pass over the folder."""
    folder = root / "video" if image_path is None else _named(root, image_path, "image_path")
    if not folder.is_dir():
        if image_path is None and not need_video:
            return {}
        raise UserError(f"video folder {folder} not found (another place: --image-path)")
    best: dict[str, tuple[int, str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in MEDIA:
                rank = MEDIA.index(suffix.lower())
                best[stem] = min(best.get(stem, (rank, entry.path)), (rank, entry.path))
    return {stem: path for stem, (_, path) in best.items()}


def _transcript(path: Path | None) -> dict[str, str]:
    """name -> sentence; English wins where both columns are filled, and the first of a name's rows."""
    if path is None:
        return {}
    texts: dict[str, str] = {}
    for line, row in csv_rows(path, ("sentence", "sentence_en")):
        if "name" not in row:
            raise UserError(f"{path}:{line}: no column 'name' (found: {', '.join(row)})")
        text = _said(row.get("sentence_en")) or _said(row.get("sentence"))
        if text is not None:
            texts.setdefault(row["name"].strip(), text)
    return texts


def _said(text: str | None) -> str | None:
    """The text as it is; None for what pandas reads as a missing cell."""
    return None if text is None or text.strip().lower() in ("", "nan") else text


def read_captions(path: str | Path | None, fields: tuple[str, ...]) -> dict[str, tuple[str | None, int | None]]:
    """name -> (caption, peak frame) of a caption JSON; the first of `fields` that is filled is the caption."""
    if path is None:
        return {}
    try:
        data = json.loads(read_text(path), parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object of video name -> entry, not a {type(data).__name__}")
    return {name: _entry(entry, fields, f"{path}: entry '{name}'") for name, entry in data.items()}


def _entry(entry: object, fields: tuple[str, ...], where: str) -> tuple[str | None, int | None]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not a JSON object")
    values = [entry[field] for field in fields if entry.get(field) is not None]
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: {' or '.join(fields)} must be text")
    peak = "" if entry.get("peak_index") is None else str(entry["peak_index"]).strip()
    if peak and not peak.isdecimal():
        raise UserError(f"{where}: peak_index '{peak}' is not a frame number")
    return next(filter(None, map(_said, values)), None), int(peak) if peak else None
