"""Synthetic embeddings of acted lines and of a MELD-like series, whose emotion shows a little in either.

$ python -m data.mock_speech --kind lines --out datasets/mock_lines
$ python -m data.mock_speech --kind meld --out datasets/mock_meld
"""

import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import UserError, opt, run
from data.features import StoreWriter
from data.manifest import Clip, write_manifest
from data.meld import LABELS, load_meld

KINDS = ("lines", "meld")
DIM = 256  # of both embeddings
EMOTIONS = (*LABELS, "awe", "envy", "hope", "pride", "relief")
CONTENT = 16  # dimensions of what a line says, which voice and words share
# lengths beside noise of deviation 1 in every dimension; logistic regression on both then gets about .8 of the labels
CUE, SAID = {"audio": 3.3, "text": 3.3}, 1.7
SIZES = {"lines": {"train": 2400, "valid": 200, "test": 200}, "meld": {"train": 1500, "valid": 250, "test": 300}}
# MELD's own shares, so that always answering neutral is the baseline it is there
SHARES = dict(zip(LABELS, (0.11, 0.03, 0.03, 0.17, 0.47, 0.07, 0.12), strict=True))


def make_mock(folder: str | Path, kind: str, seed: int = 17) -> Path:
    """Writes a data root for the speech pipeline: lists, and stores audio/ and text/.

    "lines" has a manifest.csv of acted lines, each script said by one or two voices, scripts apart in the splits;
    "meld" has MELD's three CSV files, dialogues of 4 to 10 utterances, and its seven labels. Where cues point is the
    same for every seed and for both kinds, so that what is learnt from one serves the other.
    """
    folder = Path(folder)
    listing = "manifest.csv" if kind == "lines" else "train_sent_emo.csv"
    if (folder / listing).is_file() and (folder / "text" / "index.json").is_file():
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds something else than a whole mock set; name an empty folder")
    made = folder.with_name(f"{folder.name}.part")  # renamed when whole: a stopped run leaves nothing behind
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "lines":
        clips = _lines(rng)
        write_manifest(made / "manifest.csv", clips)
    else:
        _write_meld(made, rng)
        clips = load_meld(made, lambda _: None)
    _write_stores(made, clips, rng)
    os.replace(made, folder)
    return folder


def _lines(rng: np.random.Generator) -> list[Clip]:
    """Acted lines; two of three scripts of train are said twice, those of valid and test once."""
    clips: list[Clip] = []
    for split, count in SIZES["lines"].items():
        script, before = 0, len(clips)
        while len(clips) - before < count:
            script += 1
            label = EMOTIONS[script % len(EMOTIONS)]
            voices = 2 if split == "train" and script // len(EMOTIONS) % 3 else 1
            for voice in rng.choice(11, voices, replace=False):
                id = f"{split}_{script:04d}_{voice:02d}"
                clips.append(Clip(id, None, f"Line {script} of {split}.", label, split=split, speaker=f"voice{voice}",
                                  group=f"{split}_{script}"))  # fmt: skip
    return clips


def _write_meld(folder: Path, rng: np.random.Generator) -> None:
    for ours, name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        with open(folder / f"{name}_sent_emo.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"])
            done = dialogue = 0
            while done < SIZES["meld"][ours]:
                size = min(int(rng.integers(4, 11)), SIZES["meld"][ours] - done)
                for place in range(size):
                    label = rng.choice(LABELS, p=list(SHARES.values()))
                    speaker = f"Person {rng.integers(3)}"
                    writer.writerow([done, f"Line {done} of {name}.", speaker, label, dialogue, place])
                    done += 1
                dialogue += 1


def _write_stores(folder: Path, clips: Sequence[Clip], rng: np.random.Generator) -> None:
    """Both embeddings of every clip: the cue of its label, what it says, and noise."""
    said = {text: rng.normal(size=CONTENT) for text in dict.fromkeys(clip.text for clip in clips)}
    for m in ("audio", "text"):
        fixed = np.random.default_rng([*m.encode()])
        basis, _ = np.linalg.qr(fixed.normal(size=(DIM, len(EMOTIONS) + CONTENT)))
        cues, content = basis[:, : len(EMOTIONS)].T * CUE[m], basis[:, len(EMOTIONS) :].T * SAID
        writer = StoreWriter(folder / m, {"encoder": f"mock_{m}", "pooling": "mean", "dim": DIM, "dtype": "float32"})
        for clip in clips:
            x = rng.normal(size=DIM) + said[clip.text] @ content + cues[EMOTIONS.index(str(clip.label))]
            writer.add(clip.id, torch.tensor(x, dtype=torch.float32))
        writer.finish()


@dataclass
class Config:
    kind: str = opt("lines", "acted lines for stages 2 and 3, or a series for stage 4", "--kind", choices=KINDS)
    out: str = opt("datasets/mock_lines", "folder of the set", "--out")
    seed: int = opt(17, "seed of everything drawn", "--seed")


def main(cfg: Config) -> None:
    print(make_mock(cfg.out, cfg.kind, cfg.seed))


if __name__ == "__main__":
    run(Config, main)
