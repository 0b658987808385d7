"""A synthetic MOSEI: the training guide's JSON index with a planted seven-level sentiment signal.

$ python -m data.mock_mosei --out datasets/mosei --samples 600
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError, opt, run
from data.mock import CUES

INDEX = "mosei_index.json"
SCORES = range(-3, 4)
WIDTHS = {"text": 768, "audio": 768, "video": 25}  # BERT, wav2vec 2.0, OpenFace's action units, pose and gaze
# length of the cue where the noise has a standard deviation of 1 in every dimension
STRENGTHS = {"text": 16.0, "audio": 16.0, "video": 8.0}
# The scores lie on an arc, 40 degrees apart: neighbours look alike, yet neutral is a place of its own, not the absence
# of a cue. From 420 training utterances logistic regression then gets about .75 of unseen ones right, a small MLP .88;
# one modality alone gets about .5 and could get .57, as it is noise in half of the utterances.
ARC = np.deg2rad(40) * np.array(SCORES)


def make_mock(folder: str | Path, samples: int = 600, seed: int = 42, sequences: bool = False) -> Path:
    """Write mosei_index.json (the guide's appendix B) with `samples` utterances to `folder`; returns its path.

    Whole videos of 4 to 10 utterances go to train (70 %), val (15 %) or test (15 %); within each split the scores -3 to
    3 are even to within one utterance. Each utterance carries the cue of its score in one or two modalities, which
    cues.csv names by row of the index (row,text,audio,video as 0 or 1); the others are noise. Where the cues point is
    the same for every seed. `sequences` makes each feature a list of 3 to 6 such vectors, the cue in half of them,
    which the guide has not. UserError: under 3 samples, or a folder that holds something else.
    """
    folder = Path(folder)
    if samples < 3:
        raise UserError(f"mock set: {samples} samples, but each of the three splits needs one")
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    plans = list(_plan(samples, rng))
    with (folder / "cues.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("row", *WIDTHS), *((row, *plan.cues) for row, plan in enumerate(plans))])
    prototypes = {modality: _prototypes(modality) for modality in WIDTHS}
    records = (json.dumps(_record(plan, prototypes, rng, sequences)) for plan in plans)
    unfinished = folder / f"{INDEX}.part"
    unfinished.write_text("[\n" + ",\n".join(records) + "\n]\n", encoding="utf-8")
    os.replace(unfinished, folder / INDEX)
    return folder / INDEX


@dataclass(frozen=True)
class Plan:
    """What one utterance is made of."""

    video: str
    split: str
    score: int
    cues: tuple[int, ...]


def _check_folder(folder: Path) -> None:
    """UserError where `folder` holds more than a mock set, what was converted from it, and hidden files."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    other = sorted(name for name in names - {"cues.csv"} if not name.startswith((".", INDEX)))
    if INDEX in names and "cues.csv" not in names:
        other.append(INDEX)
    if other:
        raise UserError(f"{folder}: holds files that are not a mock set ({other[0]}); name an empty folder")


def _plan(samples: int, rng: np.random.Generator) -> Iterator[Plan]:
    """The utterances split by split and video by video, scores and cues balanced and in random order."""
    held_out = max(1, round(0.15 * samples))
    videos = 0
    for split, n in (("train", samples - 2 * held_out), ("val", held_out), ("test", held_out)):
        order = iter(rng.permutation(n))
        for size in _sizes(n, rng):
            videos += 1
            for _ in range(size):
                k = int(next(order))
                cues = CUES[k // len(SCORES) % len(CUES)]
                yield Plan(f"mock_{videos:04d}", split, SCORES[k % len(SCORES)], cues)


def _sizes(n: int, rng: np.random.Generator) -> Iterator[int]:
    """Random sizes of 4 to 10 that add up to n; n itself where it is smaller."""
    while n > 10:
        size = int(rng.integers(4, 11))
        yield (size := size if n - size >= 4 else n - 4)
        n -= size
    if n:
        yield n


def _prototypes(modality: str) -> np.ndarray:
    """The cue of each score (7, D), on an arc in a plane of the modality's own."""
    width = WIDTHS[modality]
    plane, _ = np.linalg.qr(np.random.default_rng([*modality.encode()]).normal(size=(width, 2)))
    return STRENGTHS[modality] * np.stack([np.sin(ARC), np.cos(ARC)], 1) @ plane.T


def _record(plan: Plan, prototypes: dict[str, np.ndarray], rng: np.random.Generator, sequences: bool) -> dict[str, Any]:
    """An utterance's entry in the index."""
    record: dict[str, Any] = {"video_id": plan.video}
    for (modality, cues), carries in zip(prototypes.items(), plan.cues, strict=True):
        frames = int(rng.integers(3, 7)) if sequences else 1
        features = rng.normal(size=(frames, cues.shape[1]))
        start = int(rng.integers(frames // 2 + 1))
        features[start : start + (frames + 1) // 2] += carries * cues[plan.score - SCORES[0]]
        record[f"{modality}_features"] = (features if sequences else features[0]).round(4).tolist()
    return record | {"label": plan.score, "split": plan.split}


@dataclass
class Config:
    out: str = opt("datasets/mosei", "folder of the set", "--out")
    samples: int = opt(600, "utterances of all three splits", "--samples")
    seed: int = opt(42, "seed of everything drawn", "--seed")


def main(cfg: Config) -> None:
    print(f"{make_mock(cfg.out, cfg.samples, cfg.seed)}: {cfg.samples} utterances")


if __name__ == "__main__":
    run(Config, main)
