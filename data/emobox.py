"""RAVDESS speech with EmoBox's six speaker-disjoint folds (Ma et al., Interspeech 2024) to a manifest.

$ python -m data.emobox --audio DIR --folds DIR --out datasets/ravdess/manifest.csv
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, opt, run
from data.manifest import Clip, read_text, write_manifest

FOLDS = 6
# Fields 3, 5 and 7 of a RAVDESS file name (Livingstone and Russo, 2018): emotion, statement, actor.
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}


@dataclass
class Config:
    audio: str = opt("datasets/ravdess/audio", "folder with the speech files, as Actor_NN/ or flat", "--audio")
    folds: str = opt("datasets/ravdess/folds", "folder with EmoBox's ravdess_{train,test}_fold_K.txt", "--folds")
    out: str = opt("datasets/ravdess/manifest.csv", "manifest to write", "--out")


def emobox_clips(audio_root: str | Path, folds_root: str | Path) -> list[Clip]:
    """All clips sorted by id, each with the fold whose test list holds it; UserError if lists or files disagree."""
    audio = _audio_files(Path(audio_root))
    clips: dict[str, Clip] = {}
    for fold in _folds():
        for where, id, label in _read_list(Path(folds_root) / f"ravdess_test_fold_{fold}.txt"):
            if id in clips:
                raise UserError(f"{where}: '{id}' is a test clip of {clips[id].where} as well")
            clips[id] = _clip(id, label, fold, audio.get(id), where)
    for fold in _folds():
        _check_train_list(Path(folds_root) / f"ravdess_train_fold_{fold}.txt", fold, clips)
    missing = [id for id, clip in clips.items() if clip.path is None]
    if missing:
        raise UserError(f"{audio_root}: {len(missing)} of {len(clips)} listed clips have no file (first: {missing[0]})")
    unlisted = sorted(audio.keys() - clips.keys())
    if unlisted:
        raise UserError(f"{folds_root}: {len(unlisted)} clips are in no test list (first: {unlisted[0]})")
    return [clips[id] for id in sorted(clips)]


def identical_files(clips: Iterable[Clip]) -> list[list[str]]:
    """Ids of clips whose files are the same byte for byte."""
    ids: dict[bytes, list[str]] = {}
    for clip in clips:
        if clip.path:
            ids.setdefault(hashlib.sha256(Path(clip.path).read_bytes()).digest(), []).append(clip.id)
    return [same for same in ids.values() if len(same) > 1]


def main(cfg: Config) -> None:
    clips = emobox_clips(cfg.audio, cfg.folds)
    write_manifest(cfg.out, clips)
    speakers, labels = ({getattr(clip, name) for clip in clips} for name in ("speaker", "label"))
    print(f"{cfg.out}: {len(clips):,} clips, {len(speakers)} speakers, {len(labels)} labels, {FOLDS} folds")
    for same in identical_files(clips):
        print(f"note: {' and '.join(same)} are the same recording; all are kept")


def _folds() -> list[str]:
    return [str(fold) for fold in range(1, FOLDS + 1)]


def _audio_files(root: Path) -> dict[str, str]:
    """id -> path of every speech file (field 2 of the name is 01) at any depth."""
    if not root.is_dir():
        raise UserError(f"audio folder {root} not found")
    files = sorted(path for path in root.rglob("??-01-*") if path.suffix.lower() in (".wav", ".flac"))
    return {path.stem: str(path) for path in reversed(files)}


def _read_list(path: Path) -> list[tuple[str, str, str]]:
    """(file:line, id, lower-case label) of each `id<TAB>label` row."""
    rows = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        cells = text.split()
        if not cells:
            continue
        if len(cells) != 2:
            raise UserError(f"{path}:{line}: {len(cells)} columns; a row is: id label")
        rows.append((f"{path}:{line}", cells[0], cells[1].lower()))
    return rows


def _clip(id: str, label: str, fold: str, path: str | None, where: str) -> Clip:
    fields = id.split("-")
    if len(fields) != 7 or fields[2] not in (f"{n:02}" for n in range(1, 9)) or fields[4] not in STATEMENTS:
        raise UserError(f"{where}: '{id}' is not a RAVDESS file name")
    if label != EMOTIONS[int(fields[2]) - 1]:
        raise UserError(f"{where}: label '{label}', but '{id}' is {EMOTIONS[int(fields[2]) - 1]}")
    speaker = f"Actor_{fields[6]}"
    text = STATEMENTS[fields[4]]
    return Clip(id, path, text, label, fold=fold, speaker=speaker, group=speaker, where=where)


def _check_train_list(path: Path, fold: str, clips: dict[str, Clip]) -> None:
    """A fold's train list must be every clip its test list leaves, with no speaker on both sides."""
    train = {id: label for _, id, label in _read_list(path)}
    rest = {id: clip.label for id, clip in clips.items() if clip.fold != fold}
    if train != rest:
        odd = sorted(id for id in train.keys() | rest.keys() if train.get(id) != rest.get(id))
        raise UserError(f"{path}: not the rest of fold {fold}: {len(odd)} clips differ (first: {odd[0]})")
    tested = {clip.speaker for clip in clips.values() if clip.fold == fold}
    shared = tested & {clips[id].speaker for id in train}
    if shared:
        raise UserError(f"{path}: {', '.join(sorted(map(str, shared)))} is in train and test of fold {fold}")


if __name__ == "__main__":
    run(Config, main)
