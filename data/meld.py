"""MELD (Poria et al., 2019): scenes of "Friends", utterance by utterance, as published, to a manifest.

$ python -m data.meld --data-root datasets/MELD --out datasets/MELD/manifest.csv
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, opt, run
from data.manifest import Clip, csv_rows, nearest, write_manifest

LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
SPLITS = {"train": "train", "dev": "valid", "test": "test"}  # MELD's name -> ours
COUNTS = {"train": 9_989, "valid": 1_109, "test": 2_610}  # as published, to tell a whole list from a cut one
COLUMNS = ("Dialogue_ID", "Utterance_ID", "Utterance", "Speaker", "Emotion")
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
# The archive, a checkout of its GitHub repository and Kaggle's copy differ in where things lie; each of these places
# may have folders train/, dev/ and test/ of its own, for the archive holds three more.
PLACES = ("", "MELD.Raw", "data/MELD", "MELD", "MELD-RAW/MELD.Raw")
NO_CLIP = {"train_dia125_utt3": "its file is damaged", "dev_dia110_utt7": "it was never published"}
# Seconds of the clip in which the utterance is said, where the clip was cut wrongly. The first's end is typed 5 minutes
# late and its start is that of the utterance before it; the second's start is 4 minutes early, and the next utterance
# follows its end; the third runs on for half a minute after the words.
WINDOWS: dict[str, tuple[float | None, float | None]] = {
    "test_dia38_utt4": (1.9, 5.0),
    "test_dia220_utt0": (232.0, None),
    "train_dia309_utt0": (None, 10.0),
}
STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "..."})


@dataclass
class Config:
    data_root: str = opt("datasets/MELD", "folder with the three CSV files and, if there are any, the clips")
    out: str | None = opt(None, "manifest to write; default: manifest.csv in data-root")


def load_meld(root: str | Path, say: Callable[[str], None] = print) -> list[Clip]:
    """All utterances in the order of split, dialogue and utterance, each with its clip if there is a file.

    The lists say what there is: files that they do not name are not looked at. How many clips are missing goes to
    `say`; to have none is normal, for the words can be used alone. UserError: a list is missing or malformed.
    """
    root = Path(root)
    clips: list[Clip] = []
    files = 0
    for split in SPLITS:
        folder = _find(root, split, FOLDERS[split])
        present = set(os.listdir(folder)) if folder else set()
        part = _read_list(_list_file(root, split), split)
        for clip in part.values():
            name = f"{clip.id.removeprefix(f'{split}_')}.mp4"
            if folder and name in present and clip.id not in NO_CLIP:
                clip.path = str(folder / name)
        files += len(present)
        clips += [part[key] for key in sorted(part)]
    missing = [clip.id for clip in clips if clip.path is None and clip.id not in NO_CLIP]
    if not files:
        say(f"{root}: no clips, only words")
    elif missing:
        say(f"{root}: {len(missing):,} of {len(clips):,} utterances have no clip (first: {missing[0]})")
    return clips


def main(cfg: Config) -> None:
    out = cfg.out or Path(cfg.data_root, "manifest.csv")
    clips = load_meld(cfg.data_root)
    write_manifest(out, clips)
    found, dialogues = sum(clip.path is not None for clip in clips), len({clip.dialogue for clip in clips})
    print(f"{out}: {len(clips):,} utterances of {dialogues:,} dialogues, {found:,} with a clip")
    for split, published in COUNTS.items():
        labels = Counter(clip.label for clip in clips if clip.split == split)
        count = labels.total()
        note = "" if count == published else f" (published: {published:,})"
        print(f"{split}: {count:,}{note}; " + ", ".join(f"{name} {labels[name]:,}" for name in LABELS))


def _find(root: Path, split: str, name: str) -> Path | None:
    """A list or a folder of clips in one of the usual places."""
    places = (root / place / below / name for place in PLACES for below in ("", split))
    return next((place for place in places if place.exists()), None)


def _list_file(root: Path, split: str) -> Path:
    path = _find(root, split, f"{split}_sent_emo.csv")
    if path is None:
        places = ", ".join(f"{place}/" for place in PLACES if place)
        raise UserError(f"{root / f'{split}_sent_emo.csv'} not found, nor below {root} in {places}")
    return path


def _read_list(path: Path, split: str) -> dict[tuple[int, int], Clip]:
    """(dialogue, utterance) -> clip, of one list; older copies of the lists are in Windows' encoding."""
    clips: dict[tuple[int, int], Clip] = {}
    for line, row in csv_rows(path, COLUMNS, fallback="cp1252"):
        where = f"{path}:{line}"
        lacking = [name for name in COLUMNS if name not in row]
        if lacking:
            raise UserError(f"{where}: no column '{lacking[0]}' (found: {', '.join(row)})")
        for name in COLUMNS[:2]:
            if not row[name].strip().isdecimal():
                raise UserError(f"{where}: {name} '{row[name]}' is not a whole number")
        label = row["Emotion"].strip().lower()
        if label not in LABELS:
            match = nearest(label, LABELS)
            hint = f"nearest: {match}; " if match else ""
            raise UserError(f"{where}: unknown emotion '{row['Emotion']}' ({hint}emotions: {', '.join(LABELS)})")
        key = dialogue, utterance = int(row["Dialogue_ID"]), int(row["Utterance_ID"])
        if key in clips:
            raise UserError(f"{where}: utterance {utterance} of dialogue {dialogue} again (first: {clips[key].where})")
        name = f"{split}_dia{dialogue}"
        start, end = WINDOWS.get(f"{name}_utt{utterance}", (None, None))
        clips[key] = Clip(
            f"{name}_utt{utterance}",
            text=_plain(row["Utterance"]),
            label=label,
            split=SPLITS[split],
            speaker=_plain(row["Speaker"]),
            dialogue=name,
            start=start,
            end=end,
            where=where,
        )
    if not clips:
        raise UserError(f"{path}: no utterances")
    return clips


def _plain(text: str) -> str | None:
    """The text in one form: straight quotes, single spaces; None if there is none.

    The copies differ, and each is a mixture: quotes are straight, curly, or Windows' codes 0x91 to 0x94 kept as they
    were.
    """
    text = re.sub("[\x80-\x9f]", lambda code: code[0].encode("latin-1").decode("cp1252", "ignore"), text)
    return " ".join(text.translate(STRAIGHT).split()) or None


if __name__ == "__main__":
    run(Config, main)
