"""A synthetic data set in MERR's layout: talking heads whose faces, voices and subtitles carry emotion cues.

$ python -m data.mock --out datasets/mock --train 40 --test 12
"""

import csv
import json
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError, opt, run
from data.prompts import EMOTIONS6
from data.synth import FPS, SAMPLE_RATE, Face, Tone, draw_face, speak

MODALITIES = ("visual", "audio", "text")
# which of the modalities carry a clip's emotion; the others are at rest, whatever the label
CUES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))


@dataclass(frozen=True)
class Emotion:
    """How one emotion looks, sounds and reads, and how captions name that."""

    face: Face
    tone: Tone
    phrases: tuple[str, ...]
    looks: str
    sounds: str
    means: str
    units: tuple[str, ...]  # facial action units
    valence: float


# fmt: off
EMOTIONS = {
    "neutral": Emotion(
        Face(), Tone(),
        ("reading about", "thinking of", "looking at", "waiting for"),
        "a relaxed brow and a level mouth", "even and calm", "state a fact", (), 0.0),
    "happy": Emotion(
        Face(curve=1.0, width=1.25, gape=0.5, rate=3.5, lift=0.2, eye=0.75, flush=0.5),
        Tone(pitch=5, slope=3, accent=4, rate=5, level=4, tilt=2),
        ("so happy with", "really glad about", "delighted by", "thrilled with"),
        "raised mouth corners and narrowed smiling eyes", "bright and lively", "express joy",
        ("AU06", "AU12", "AU14"), 0.8),
    "sad": Emotion(
        Face(curve=-1.2, width=0.95, gape=0.1, rate=1.5, slant=0.8, eye=0.45),
        Tone(pitch=-4, slope=-4, accent=0.3, rate=2.3, level=-8, tilt=-4, breath=0.08),
        ("so sad about", "heartbroken over", "crying over", "grieving for"),
        "lowered mouth corners and drooping eyes", "low and slow", "speak of loss",
        ("AU01", "AU04", "AU15", "AU14"), -0.7),
    "angry": Emotion(
        Face(curve=-0.5, width=1.1, gape=0.6, rate=5.0, slant=-1.0, lift=-0.6, eye=0.8, flush=1.0),
        Tone(pitch=2, slope=0, accent=2, rate=6, level=10, tilt=4, breath=0.05),
        ("so angry about", "furious with", "sick of", "fed up with"),
        "lowered pinched brows and a tense mouth", "loud and harsh", "complain",
        ("AU04", "AU05", "AU07", "AU23"), -0.6),
    "worried": Emotion(
        Face(curve=-0.4, width=0.7, gape=0.15, rate=5.0, slant=1.0, lift=0.5, eye=1.2),
        Tone(pitch=4, slope=0, accent=1, rate=5.5, level=-2, breath=0.3, tremor=0.9),
        ("so worried about", "anxious about", "nervous about", "afraid of losing"),
        "slanted brows and a small tight mouth", "shaky and hurried", "voice a fear",
        ("AU20", "AU28"), -0.5),
    "surprise": Emotion(
        Face(width=0.75, gape=1.2, rate=1.0, lift=1.2, eye=1.6),
        Tone(pitch=9, slope=8, accent=2, rate=2.2, level=2, breath=0.12),
        ("so surprised by", "amazed at", "stunned by", "shocked by"),
        "raised brows, wide eyes and a dropped jaw", "high and rising", "show disbelief",
        ("AU01", "AU02", "AU05", "AU26"), 0.1),
    "fear": Emotion(
        Face(curve=-0.6, width=1.2, gape=0.7, rate=5.0, slant=0.8, lift=1.0, eye=1.6),
        Tone(pitch=9, slope=2, accent=2, rate=7, level=3, breath=0.3, tremor=0.9),
        ("so scared of", "terrified of", "frightened by", "hiding from"),
        "raised slanted brows, wide eyes and a stretched mouth", "shrill and trembling", "speak of danger",
        ("AU01", "AU02", "AU04", "AU05", "AU20"), -0.8),
    "contempt": Emotion(
        Face(curve=0.3, gape=0.1, rate=2.0, skew=1.0, lift=-0.2, eye=0.6),
        Tone(pitch=-3, slope=-6, accent=2, rate=3, level=1, tilt=4),
        ("far above", "laughing at", "too good for", "sneering at"),
        "one raised mouth corner and half-closed eyes", "low and drawling", "belittle it",
        ("AU10", "AU12", "AU14", "AU17"), -0.4),
    "doubt": Emotion(
        Face(curve=-0.2, width=0.8, gape=0.15, rate=2.0, skew=-0.7, arch=1.2, eye=0.9),
        Tone(slope=8, accent=1, rate=2.5, level=-4, breath=0.05),
        ("not sure about", "doubtful about", "unsure of", "sceptical about"),
        "one raised brow and a pressed mouth", "hesitant and questioning", "raise a question",
        ("AU04", "AU07"), -0.2),
    "disgust": Emotion(
        Face(curve=-0.8, width=0.75, gape=0.5, rate=2.0, slant=-0.5, lift=-0.4, eye=0.4),
        Tone(pitch=-5, slope=-2, accent=3, rate=3, level=4, breath=0.4),
        ("disgusted by", "repelled by", "sickened by", "gagging at"),
        "squeezed eyes and a curled lip", "rough and throaty", "express revulsion",
        ("AU09", "AU15"), -0.7),
}
# fmt: on
OPENINGS = ("I am", "Right now I am", "You know, I am", "To be honest, I am", "Since Monday I am")
TOPICS = (
    *("the exam", "my new job", "the long trip", "this letter", "our garden", "the phone call", "the doctor's visit"),
    *("my brother's wedding", "the match", "your cooking", "the old house", "the neighbour's dog"),
)


@dataclass(frozen=True)
class Plan:
    """What one clip is made of."""

    id: str
    label: str
    cues: tuple[int, ...]
    text: str
    fault: str | None  # the modality that lacks its file, row or frames
    frames: int
    peak: int


def make_mock(
    root: str | Path,
    train: int = 400,
    test: int = 120,
    seed: int = 0,
    size: int = 96,
    labels: tuple[str, ...] = EMOTIONS6,
    odd: int = 0,
    workers: int = 1,
    codec: str = "mpeg4",
) -> None:
    """Write clips of about 1.2 s and size x size pixels with MERR's lists, captions and transcripts to `root`.

    The first `odd` training clips lack all frames but one, their audio track or their transcript row. cues.csv says
    which modalities carry the label. Pixels, samples and text depend on the arguments only, not on `workers`.
    UserError: a label without a face here, or a root that holds something else.
    """
    root = Path(root)
    for label in labels:
        if label not in EMOTIONS:
            raise UserError(f"mock set: unknown label {label!r} (labels: {', '.join(EMOTIONS)})")
    check_folder(root)
    trained = _plan("train", train, seed, labels, odd)
    tested = _plan("test", test, seed, labels, odd=0)
    plans = trained + tested
    (root / "video").mkdir(parents=True, exist_ok=True)
    write_csv(root / "cues.csv", ("id", *MODALITIES), ((plan.id, *plan.cues) for plan in plans))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda plan: _make_clip(root / "video" / f"{plan.id}.mp4", plan, seed, size, codec), plans))
    rows = ((plan.id, plan.text) for plan in plans if plan.fault != "text")
    write_csv(root / "transcription_en_all.csv", ("name", "sentence"), rows)
    for grain, entry in (("coarse", _coarse), ("fine", _fine)):
        entries = {plan.id: entry(plan) for plan in trained}
        (root / f"MERR_{grain}_grained.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    _write_list(root / "MERR_coarse_grained.txt", ((p.id, p.frames, p.label) for p in trained))
    _write_list(root / "MERR_fine_grained.txt", ((p.id, p.frames, p.label, EMOTIONS[p.label].valence) for p in trained))
    _write_list(root / "relative_test3_NCEV.txt", ((p.id, p.frames, p.label, -10) for p in tested))  # -10: not rated
    # EMER's layout: the truths of test clips lie apart
    _write_list(root / "EMER_NCE.txt", ((p.id, p.frames, p.label) for p in tested))
    truths = ((p.id, p.label, p.text, _fine(p)["smp_reason_caption"]) for p in tested)
    write_csv(root / "gt-eng.csv", ("names", "emotions", "subtitles", "reasons"), truths)


def check_folder(root: Path) -> None:
    """UserError where `root` holds files that are no mock set."""
    if root.exists() and any(root.iterdir()) and not (root / "cues.csv").is_file():
        raise UserError(f"{root}: holds files that are not a mock set; name an empty folder")


def _plan(split: str, n: int, seed: int, labels: tuple[str, ...], odd: int) -> list[Plan]:
    """The clips of one split in random order, labels and cues balanced."""
    rng = np.random.default_rng([seed, int(split == "test")])
    prefix = {"train": "sample", "test": "samplenew"}[split]  # both occur in MER2023
    plans = []
    for i, k in enumerate(rng.permutation(n)):
        label, cues = labels[k % len(labels)], CUES[k // len(labels) % len(CUES)]
        fault = MODALITIES[i % len(MODALITIES)] if i < odd else None
        if fault:  # the other two carry the label, so that it can still be told
            cues = tuple(int(modality != fault) for modality in MODALITIES)
        frames = 1 if fault == "visual" else int(rng.integers(14, 17))
        peak = int(rng.integers(frames // 3, 2 * frames // 3 + 1))
        text, _ = sentence(label if cues[2] else "neutral", (0,) if split == "test" else (1, 2, 3), rng)
        plans.append(Plan(f"{prefix}_{i:08d}", label, cues, text, fault, frames, peak))
    return plans


def sentence(
    label: str, quarters: Collection[int], rng: np.random.Generator, kinds: int | None = None
) -> tuple[str, str]:
    """A random sentence with one of the emotion's phrases, or of its first `kinds`, and the sentence's topic.

    Each of the four quarters of all sentences is made of the same words.
    """
    phrases = EMOTIONS[label].phrases[:kinds]
    opening, phrase = int(rng.integers(len(OPENINGS))), int(rng.integers(len(phrases)))
    topics = [topic for i, topic in enumerate(TOPICS) if (opening + phrase + i) % 4 in quarters]
    topic = topics[rng.integers(len(topics))]
    return f"{OPENINGS[opening]} {phrases[phrase]} {topic}.", topic


def _shown(plan: Plan) -> list[Emotion]:
    """The emotion that each of the modalities shows."""
    return [EMOTIONS[plan.label if carries else "neutral"] for carries in plan.cues]


def _coarse(plan: Plan) -> dict[str, Any]:
    """A clip's record in MERR_coarse_grained.json: its cues put side by side."""
    face, tone, _ = _shown(plan)
    return {
        "AU_list": list(face.units),
        "visual_prior_list": [face.looks],
        "audio_prior_list": tone.sounds,
        "peak_index": str(plan.peak),
        "pseu_emotion": plan.label,
        "text": plan.text,
        "caption": f"The face shows {face.looks}. The voice is {tone.sounds}. The subtitle says: {plan.text}",
    }


def _fine(plan: Plan) -> dict[str, Any]:
    """A clip's record in MERR_fine_grained.json: what follows from its cues."""
    face, tone, words = _shown(plan)
    cues = f"The face shows {face.looks}, the voice is {tone.sounds}, and the words {words.means}"
    return {"peak_index": str(plan.peak), "smp_reason_caption": f"{cues}, so the emotion is {plan.label}"}


def _make_clip(path: Path, plan: Plan, seed: int, size: int, codec: str) -> None:
    face, tone, _ = _shown(plan)
    image, sound = generators(seed, plan.id)
    frames = draw_face(face.face, plan.frames, plan.peak, size, image)
    voice = speak(tone.tone, max(plan.frames, 15) / float(FPS), sound)
    write_clip(path, frames, None if plan.fault == "audio" else voice, codec)


def generators(seed: int, id: str) -> list[np.random.Generator]:
    """Those of a clip's picture and of its sound."""
    return [np.random.default_rng([part, seed, *id.encode()]) for part in (0, 1)]


def write_clip(path: Path, frames: np.ndarray, voice: np.ndarray | None, codec: str = "mpeg4") -> None:
    """Video, and AAC sound where there is a voice.

    At constant quality, as the search for a bit rate takes longer than all the rest.
    """
    import av

    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="mp4") as container:
        video: Any = container.add_stream(codec, rate=FPS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.thread_count = "yuv420p", 1
        streams = [(video, [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames])]
        if voice is not None:
            options = {"flags": "+qscale", "global_quality": "236", "aac_coder": "fast"}
            audio: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=options)
            block: Any = av.AudioFrame.from_ndarray(voice[None], format="fltp", layout="mono")
            block.sample_rate = SAMPLE_RATE
            streams.append((audio, [block]))
        for stream, blocks in streams:
            for item in (*blocks, None):  # None flushes the encoder
                container.mux(stream.encode(item))
    os.replace(unfinished, path)


def _write_list(path: Path, rows: Iterable[tuple]) -> None:
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@dataclass
class Config:
    out: str = opt("datasets/mock", "folder of the set", "--out")
    train: int = opt(400, "training clips", "--train")
    test: int = opt(120, "test clips", "--test")
    seed: int = opt(0, "seed of everything drawn", "--seed")


def main(cfg: Config) -> None:
    make_mock(cfg.out, cfg.train, cfg.test, cfg.seed, workers=os.cpu_count() or 1)
    print(f"{cfg.out}: {cfg.train} training and {cfg.test} test clips")


if __name__ == "__main__":
    run(Config, main)
