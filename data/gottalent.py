"""LAION's Got Talent, acted speech in EmoNet's 40 emotions, to a manifest; the audio stays in its tars.

$ python -m data.gottalent --data-root datasets/LAION
"""

import hashlib
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from common.config import UserError, opt, run
from data.manifest import Clip, csv_rows, nearest, write_manifest
from data.media import SOUND_FILES, MediaError, tar_index

HUB = "laion/laions_got_talent_enhanced_flash_annotations_and_long_captions"
TAR = re.compile(r"([a-z]+)_([^_]+)_intense_(.+?)(_vocalbursts_fixed)?")
EXTRA = re.compile(r"additi?onal_stuff")  # misspelt in the published names
LANGUAGES = {"english": "en", "german": "de", "spanish": "es", "french": "fr"}  # the first release spelt them out
SAID = re.compile(r"<transcription_start>(.*?)</?transcription", re.DOTALL)  # the closing tag is often malformed
STAGE = re.compile(r"\([^()]*\)|\[[^][]*\]|<[^<>]*>")  # "(sighs)" and the like
DAMAGED, UNREADABLE, UNSAFE = "damaged tar", "JSON that cannot be read", "unsafe file name"
Skipped = defaultdict[str, list[str]]  # why something is left out -> where


@dataclass
class Config:
    data_root: str = opt("datasets/LAION", "folder with the tars, or with audio/<language>/<emotion>/manifest.jsonl")
    out: str | None = opt(None, "manifest to write; default: manifest.csv in the data root")
    classes: str = opt("36", "EmoNet's 40 classes, or the 36 of data/emonet.csv", choices=("36", "40"))
    languages: list[str] = opt(["en"], "languages to take: en, de, es, fr")
    test_share: float = opt(0.02, "share of the scripts whose clips are for testing")
    valid_share: float = opt(0.02, "share of the scripts whose clips are for validation")
    test_voices: list[str] = opt([], "voices that are for testing only; nobody says their scripts in train or valid")
    strict: bool = opt(False, "an unknown emotion is an error instead of being left out")
    max_bad: float = opt(0.01, "largest share of damaged tars, or of unreadable entries, that may be left out")


def emonet(classes: str = "40") -> dict[str, str]:
    """Class of every emotion name and folder word, in lower-case letters only; the classes are in their order."""
    column, table = "label" if classes == "40" else "merged36", {}
    for _, row in csv_rows(Path(__file__).with_name("emonet.csv"), (column,)):
        table |= dict.fromkeys(map(_letters, (row["label"], row[column], *row["words"].split("|"))), row[column])
    return table


def class_names(classes: str) -> list[str]:
    """The names of the 36 or 40 classes in order."""
    return list(dict.fromkeys(emonet(classes).values()))


def script_id(text: str) -> str:
    """Equal for texts that differ in case, punctuation and stage directions only."""
    spoken = _letters(STAGE.sub(" ", text)) or _letters(text) or text
    return hashlib.sha256(spoken.encode()).hexdigest()[:16]


def split_of(script: str, test: float, valid: float) -> str:
    """A script's split, by its id alone: more data never move it."""
    place = int(script, 16) / 16 ** len(script)
    return "test" if place < test else "valid" if place < test + valid else "train"


def gottalent_clips(cfg: Config) -> tuple[list[Clip], Skipped]:
    """All clips with their splits, and what is left out; UserError if too much is damaged or nothing is left."""
    root, table, skipped = Path(cfg.data_root), emonet(cfg.classes), Skipped(list)
    tars = sorted([*root.glob("*.tar"), *root.glob("*/*.tar")])
    lists = sorted(root.glob("audio/*/*/manifest.jsonl"))
    if not tars and not lists:
        hint = f"hf download {HUB} --repo-type dataset --local-dir {root}"
        raise UserError(f"{root}: no .tar and no audio/<language>/<emotion>/manifest.jsonl (get the tars: {hint})")
    if tars and lists:  # unpacking lost the voices, and often all tars of an emotion but one
        skipped["list beside the tars"] = list(map(str, lists))
    clips: dict[str, Clip] = {}
    for emotion, clip in _in_tars(tars, cfg, skipped) if tars else _in_lists(lists, root, cfg, skipped):
        first = re.split(r"[\W_]+", emotion)[0]
        clip.label = table.get(_letters(emotion)) or table.get(_letters(first))
        if clip.label is None and cfg.strict:
            hint = nearest(_letters(first), table) or "none, see data/emonet.csv"
            raise UserError(f"{clip.where}: unknown emotion '{first}' (nearest: {hint})")
        if clip.label is None:
            skipped[f"unknown emotion '{first}'"].append(clip.where)
        elif clip.id in clips:
            skipped["second clip of an id"].append(clip.where)
        else:
            clips[clip.id] = clip
    lost = len(skipped[UNREADABLE]) + len(skipped[UNSAFE])
    for kinds, of, unit in (([DAMAGED], len(tars), "tars"), ([UNREADABLE, UNSAFE], len(clips) + lost, "clips")):
        bad = {kind: skipped[kind] for kind in kinds}
        count = sum(map(len, bad.values()))
        if count > cfg.max_bad * of:
            problem = f"{count:,} of {of:,} {unit} are bad, more than --max-bad {cfg.max_bad:g}"
            raise UserError(f"{root}: {problem}: {'; '.join(_report(bad))}")
    kept = _split(list(clips.values()), cfg, skipped)
    if not any(clip.split == "train" for clip in kept):
        raise UserError(f"{root}: none of {len(kept):,} clips is for training; left out: {'; '.join(_report(skipped))}")
    return kept, skipped


def main(cfg: Config) -> None:
    clips, skipped = gottalent_clips(cfg)
    out = Path(cfg.out or Path(cfg.data_root, "manifest.csv"))
    write_manifest(out, clips)
    voices, labels, scripts = ({getattr(clip, key) for clip in clips} - {None} for key in ("speaker", "label", "group"))
    splits = [f"{name} {sum(clip.split == name for clip in clips):,}" for name in ("train", "valid", "test")]
    counts = f"{len(voices)} voices, {len(labels)} of {cfg.classes} classes, {len(scripts):,} scripts"
    print(f"{out}: {len(clips):,} clips, {counts}; {', '.join(splits)}")
    for reason in _report(skipped):
        print(f"left out: {reason}")


def _in_tars(tars: list[Path], cfg: Config, skipped: Skipped) -> Iterator[tuple[str, Clip]]:
    """(emotion, clip) of all clips in the tars of the wanted languages."""
    chosen: dict[tuple[str, str, str], Path] = {}
    # some came again under language codes or with their vocal bursts mended: the later one replaces the earlier
    for path in sorted(tars, key=_release):
        name = TAR.fullmatch(path.stem.lower())
        language = _language(name[1]) if name else ""
        if name is None:
            skipped["extra tar" if EXTRA.match(path.stem.lower()) else "tar of another name"].append(str(path))
        elif language not in cfg.languages:
            skipped[f"tar of language {language}"].append(str(path))
        else:
            if (key := (language, name[2], name[3])) in chosen:
                skipped["older tar of a voice and emotion"].append(str(chosen[key]))
            chosen[key] = path
    for (language, voice, words), path in tqdm(sorted(chosen.items()), "tars", disable=not sys.stderr.isatty()):
        try:
            index = tar_index(path)
        except MediaError as error:
            skipped[DAMAGED].append(str(error))
            continue
        with open(path, "rb") as file:
            for stem, name, (offset, size) in _pairs(path, index, skipped):
                file.seek(offset)
                where = f"{path}/{name}"
                entry = _json(file.read(size), where, skipped)
                said = SAID.search(str(entry.get("annotation")))
                text = _text(said and said[1]) or _text(entry.get("flash_transcription"))
                if text:
                    id = f"{language}_{voice}_{words}_{stem}"
                    yield words, Clip(id, where, text, speaker=voice, group=script_id(text), where=where)
                elif entry:
                    skipped["no transcript"].append(where)


def _release(path: Path) -> tuple[bool, bool]:
    return path.stem.endswith("_vocalbursts_fixed"), path.stem.split("_")[0] not in LANGUAGES


def _pairs(path: Path, index: dict[str, tuple[int, int]], skipped: Skipped) -> Iterator[tuple[str, str, tuple]]:
    """(stem, audio file, place of its JSON) of each clip in a tar."""
    audio = {name.rpartition(".")[0]: name for name in index if PurePosixPath(name).suffix.lower() in SOUND_FILES}
    for name in index:
        if name.endswith(".json") and name.removesuffix(".json") not in audio:
            skipped["JSON without audio"].append(f"{path}/{name}")
    for stem, name in audio.items():
        if _unsafe(name):
            skipped[UNSAFE].append(f"{path}: {name!r}")
        elif f"{stem}.json" not in index:
            skipped["audio without JSON"].append(f"{path}/{name}")
        elif not index[name][1]:
            skipped["missing or empty audio"].append(f"{path}/{name}")
        else:
            yield PurePosixPath(stem).name, name, index[f"{stem}.json"]


def _in_lists(lists: list[Path], root: Path, cfg: Config, skipped: Skipped) -> Iterator[tuple[str, Clip]]:
    """(emotion, clip) of all clips in the unpacked lists of the wanted languages."""
    for path in tqdm(lists, "lists", disable=not sys.stderr.isatty()):
        folder, language = path.parent.name, _language(path.parent.parent.name)
        if language not in cfg.languages:
            skipped[f"list of language {language}"].append(str(path))
            continue
        for line, content in enumerate(path.read_bytes().split(b"\n"), 1):
            where = f"{path}:{line}"
            row = _json(content, where, skipped) if content.strip() else {}
            file, text, emotion, voice = (_text(row.get(key)) for key in ("file", "transcript", "label", "voice"))
            media = root / file
            if not (file and text and emotion):
                if row:
                    skipped["row without file, transcript or label"].append(where)
            elif _unsafe(file):
                skipped[UNSAFE].append(f"{where}: {file!r}")
            elif not (media.is_file() and media.stat().st_size):
                skipped["missing or empty audio"].append(f"{where}: {file}")
            else:
                id = "_".join(filter(None, (language, voice, folder, media.stem)))
                yield emotion, Clip(id, str(media), text, speaker=voice or None, group=script_id(text), where=where)


def _split(clips: list[Clip], cfg: Config, skipped: Skipped) -> list[Clip]:
    """The clips with their splits, without those of train and valid whose script a held-out voice says."""
    voices, held = {clip.speaker for clip in clips if clip.speaker}, set(cfg.test_voices)
    if unknown := held - voices:
        raise UserError(f"--test-voices: no {', '.join(sorted(unknown))} here (voices: {', '.join(sorted(voices))})")
    scripts, kept = {clip.group for clip in clips if clip.speaker in held}, []
    for clip in clips:
        split = split_of(clip.group or "", cfg.test_share, cfg.valid_share)
        clip.split = "test" if clip.speaker in held else split
        if clip.split != "test" and clip.group in scripts:
            skipped["script of a held-out voice"].append(clip.where)
        else:
            kept.append(clip)
    return kept


def _report(skipped: dict[str, list[str]]) -> list[str]:
    return [f"{len(where):,} x {reason} (first: {where[0]})" for reason, where in skipped.items() if where]


def _language(name: str) -> str:
    return LANGUAGES.get(name.lower(), name.lower())


def _json(content: bytes, where: str, skipped: Skipped) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        row = None
    if not (row and isinstance(row, dict)):
        skipped[UNREADABLE].append(where)
        return {}
    return row


def _text(value: object) -> str:
    """One line without characters that do not print; empty for what is no text."""
    text = value if isinstance(value, str) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _unsafe(name: str) -> bool:
    """Whether a name from outside leads out of its folder or cannot be written down."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not name.isprintable()


if __name__ == "__main__":
    run(Config, main)
