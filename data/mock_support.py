"""A synthetic MESC: dialogues of emotional support as MultiMood's records, with clips of what the client says last.

$ python -m data.mock_support --out datasets/mock_support --train 400 --test 80
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from common.config import opt, run
from data import mock
from data.mesc import Dialogue, Turn, Utterance, dialogue_turns, write_turns
from data.synth import FPS, SAMPLE_RATE, Face, draw_face, speak

MODALITIES = ("video", "audio", "text")
# which of them carry a turn's emotion; a face takes a connector longest to read, so half of the turns have nothing else
CUES = ((1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1))
QUARTERS = {"train": (2, 3), "val": (1,), "test": (0,)}  # of the client's sentences
# the client's emotions: how they look, sound and read
SHOWN = {"anger": "angry", "sadness": "sad", "joy": "happy", "fear": "fear", "neutral": "neutral"}
STRENGTH = 2.0  # of an expression, times that of data/mock.py: the plainer a face, the sooner a connector reads it
PHRASES = 2  # of an emotion, of the four that data/mock.py has
SHARED = ("sadness", "joy")  # what the therapist feels with the client
# What the therapist does, by what the client felt when it spoke before: the words of a history are neutral, so that
# this is told by the compressor's text alone, and it has nothing to do with what the client feels now.
STRATEGY = {"anger": "restatement", "sadness": "self-disclosure", "joy": "approval", "neutral": "open question"}
RESPONSES = {
    "open question": "What do you think about the {}?",
    "restatement": "So the {} is on your mind.",
    "self-disclosure": "I know the {} from my own life.",
    "approval": "It is good that you told me of the {}.",
}
GREETING = "Hello."
# What both say in between. The shorter, the sooner a compressor that begins at random hears who felt what.
WORDS = ("Yes.", "No.", "Maybe.", "Right.")
NODS = ("I see.", "Go on.")
# What the client says where its words carry nothing, and what of: so few that no turn is known by its words, which a
# model would sooner learn by heart than look at a face.
PLAIN = {"I was thinking of the weekend.": "weekend", "I am looking at the calendar.": "calendar",
         "I am reading about the weather.": "weather"}  # fmt: skip
OPENER = "Well."  # what the client says before its sentence where there are two clips
PROBLEMS = ("Work and study", "Friends and family", "Everyday life")


@dataclass(frozen=True)
class Plan:
    """A turn, which of MODALITIES carry the client's emotion, and what its clips are made of."""

    turn: Turn
    cues: tuple[int, ...]
    frames: list[int]  # of each clip
    silent: bool  # the first clip has no sound


def make_support(
    folder: str | Path, train: int = 400, val: int = 80, test: int = 80, seed: int = 0, size: int = 64, workers: int = 1
) -> None:
    """Write train.jsonl, val.jsonl and test.jsonl with so many turns to `folder`, one of a dialogue, and their clips.

    The clips, of about 1 s and size x size pixels, are in video_data. Of 16 turns one has no clip and one a silent
    clip; the others have one or two. cues.csv says which modalities carry the client's emotion; the others are
    neutral. All but the clips' bytes, which are the encoders', depends on the arguments only, not on `workers`.
    UserError: a folder that holds something else.
    """
    folder = Path(folder)
    mock.check_folder(folder)
    first = {"train": 0, "val": train, "test": train + val}
    counts = {"train": train, "val": val, "test": test}
    plans = {split: _plan(split, first[split], n, seed) for split, n in counts.items()}
    (folder / "video_data").mkdir(parents=True, exist_ok=True)
    every = [plan for part in plans.values() for plan in part]
    mock.write_csv(folder / "cues.csv", ("id", *MODALITIES), ((plan.turn.id, *plan.cues) for plan in every))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda plan: _make_clips(folder / "video_data", plan, seed, size), every))
    for split, part in plans.items():
        write_turns(folder / f"{split}.jsonl", (plan.turn for plan in part))


def _plan(split: str, first: int, n: int, seed: int) -> list[Plan]:
    """The turns of one split, emotions and cues balanced, and apart from them what came before."""
    rng = np.random.default_rng([seed, [*QUARTERS].index(split)])
    emotions, before = list(SHOWN), list(STRATEGY)
    plans = []
    for i, (k, j) in enumerate(zip(rng.permutation(n), rng.permutation(n), strict=True)):
        emotion, cues = emotions[k % len(emotions)], CUES[k // len(emotions) % len(CUES)]
        clips, silent = int(rng.integers(1, 3)), i % 16 == 11
        if silent:  # the others carry the emotion, so that it can still be told
            cues = (1, 0, 1)
        elif i % 16 == 5:
            cues, clips = (0, 0, 1), 0
        felt = _felt(before[j % len(before)], rng)
        turn = _turn(Dialogue(str(first + i), [], split=split), emotion, bool(cues[2]), felt, clips, rng)
        plans.append(Plan(turn, cues, rng.integers(10, 15, clips).tolist(), silent))
    return plans


def _felt(last: str, rng: np.random.Generator) -> list[str]:
    """What the client felt in up to two turns before, the latest one last; none is as good as a neutral one."""
    if last == "neutral" and rng.random() < 0.4:
        return []
    return [*rng.choice([*STRATEGY], rng.integers(2)).tolist(), last]


def _turn(dialogue: Dialogue, emotion: str, told: bool, felt: list[str], clips: int, rng: np.random.Generator) -> Turn:
    """The last turn of `dialogue`, which is empty yet; `told`: the client's words carry its emotion."""
    quarters = QUARTERS[str(dialogue.split)]
    said, shown = dialogue.utterances, dialogue.clips
    if rng.random() < 0.3:
        said.append(Utterance("therapist", "neutral", GREETING))
    for past in felt:
        said.append(Utterance("client", past, str(rng.choice(WORDS))))
        said.append(Utterance("therapist", _shared(past), str(rng.choice(NODS))))
    shown += [""] * len(said)
    if told and emotion != "neutral":
        text, topic = mock.sentence(SHOWN[emotion], quarters, rng, PHRASES)
        thing = topic.partition(" ")[2]
    else:
        text, thing = [*PLAIN.items()][rng.integers(len(PLAIN))]
    for words in (OPENER, text) if clips > 1 else (text,):
        shown.append(f"dia{dialogue.id}_utt{len(said)}.mp4" if clips else "")
        said.append(Utterance("client", emotion, words))
    strategy = STRATEGY[felt[-1] if felt else "neutral"]
    said.append(Utterance("therapist", _shared(emotion), RESPONSES[strategy].format(thing), strategy))
    dialogue.problem, dialogue.situation = str(rng.choice(PROBLEMS)), f"The client speaks of the {thing}."
    turn = dialogue_turns(dialogue)[-1]
    turn.id = f"{dialogue.id}_0"  # as read_turns() will call the only one of a dialogue
    return turn


def _shared(emotion: str) -> str:
    """What the therapist feels."""
    return emotion if emotion in SHARED else "neutral"


def strong(face: Face) -> Face:
    """An expression STRENGTH times as far from the face at rest, its eyes never quite shut."""
    rest = Face()
    face = Face(*(at + STRENGTH * (to - at) for at, to in zip(astuple(rest), astuple(face), strict=True)))
    return replace(face, gape=max(face.gape, 0.0), eye=max(face.eye, 0.1))


def _make_clips(folder: Path, plan: Plan, seed: int, size: int) -> None:
    """One take of a face and a voice, cut into the clips of a turn."""
    if not plan.frames:
        return
    emotion = mock.EMOTIONS[SHOWN[str(plan.turn.client_emotion)]]
    seen, heard = (emotion if carries else mock.EMOTIONS["neutral"] for carries in plan.cues[:2])
    image, sound = mock.generators(seed, plan.turn.id)
    frames = draw_face(strong(seen.face), sum(plan.frames), sum(plan.frames) // 2, size, image)
    voice = speak(heard.tone, sum(plan.frames) / float(FPS), sound)
    start = 0
    for i, (name, count) in enumerate(zip(plan.turn.clips, plan.frames, strict=True)):
        samples = voice[start * SAMPLE_RATE // FPS : (start + count) * SAMPLE_RATE // FPS]
        mock.write_clip(folder / name, frames[start : start + count], None if plan.silent and i == 0 else samples)
        start += count


@dataclass
class Config:
    out: str = opt("datasets/mock_support", "folder of the set", "--out")
    train: int = opt(400, "training turns", "--train")
    val: int = opt(80, "validation turns", "--val")
    test: int = opt(80, "test turns", "--test")
    seed: int = opt(0, "seed of everything drawn", "--seed")


def main(cfg: Config) -> None:
    make_support(cfg.out, cfg.train, cfg.val, cfg.test, cfg.seed, workers=os.cpu_count() or 1)
    print(f"{cfg.out}: {cfg.train} training, {cfg.val} validation and {cfg.test} test turns")


if __name__ == "__main__":
    run(Config, main)
