"""Turns of therapists as instruction samples: which are in which split, and the prompt and the answer of each."""

import copy
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.config import UserError, opt
from data.clips import DataConfig, noisy, some, thinned
from data.history import history_ids
from data.manifest import Clip, split_by_group
from data.mesc import EMOTIONS, STRATEGIES, Turn, leaks, memory_text, read_turns
from data.prompts import Encode
from data.reconstruct import KINDS
from data.support import CHATML, Chat, PromptConfig, TurnSample, make_sample

FILES = (".json", ".jsonl")
AUGMENTATIONS = ("noise", "streams", "words")  # those of data/clips.py that turns have
DROPPED = ("video", "audio", "text")  # what "streams" leaves out; without its history a turn would be another one
CLOSED = {"client_emotion": EMOTIONS, "therapist_emotion": EMOTIONS, "strategy": STRATEGIES}


@dataclass
class SupportConfig:
    num_k_vid: int = opt(5, "latest clips of the client's turn that are seen and heard", "--num-k-vid")
    memory_tokens: int = opt(512, "most tokens of the history that the compressor reads, the newest utterances")
    answer_room: int = opt(256, "positions that a prompt leaves to the answer, in training as in evaluation")
    prompt: PromptConfig = field(default_factory=PromptConfig)
    reconstruct: str = opt(
        "none", "in place of answering turns pretrain the compressor alone: its memory of the histories' utterances or "
        "of whole dialogues is to be written out", "--reconstruct", choices=KINDS,
    )  # fmt: skip


def is_turns(file: str | Path) -> bool:
    """Whether a data_root is a file of turns, not a folder of clips."""
    return str(file).lower().endswith(FILES)


class Streams(Protocol):
    """What gives the values of a turn's video and sound: TurnStreams."""

    def slots(self, turn: Turn) -> list[str]: ...

    def __call__(self, turn: Turn, wanted: Collection[str]) -> dict[str, Tensor]: ...


class TurnData:
    """The samples of a list of turns, the same in training and in evaluation unless training is to augment them.

    `places` are the positions that a slot's value takes, as MllmConfig.places() tells them; with `compressed` the
    history becomes the slot of that name too.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        streams: Streams,
        cfg: SupportConfig,
        encode: Encode,
        places: Callable[..., int],
        most: int,
        compressed: bool,
        chat: Chat = CHATML,
    ) -> None:
        self.turns, self.streams, self.cfg, self.chat = list(turns), streams, cfg, chat
        self.encode, self.places, self.most, self.compressed = encode, places, most, compressed
        self.augment: dict[str, float] = {}
        self.seed = 0

    def __len__(self) -> int:
        return len(self.turns)

    def only(self, modalities: Sequence[str]) -> "TurnData":
        """The same turns with these modalities alone."""
        view = copy.copy(self)
        view.cfg = replace(self.cfg, prompt=replace(self.cfg.prompt, modalities=list(modalities)))
        return view

    def augmented(self, probabilities: Mapping[str, float], seed: int) -> "TurnData":
        """The same turns by these probabilities of AUGMENTATIONS: with noise, some of DROPPED alone, fewer words."""
        view = copy.copy(self)
        view.augment, view.seed = dict(probabilities), seed
        return view

    def sample(self, index: int, epoch: int = 0) -> TurnSample:
        """Turn `index` as a sample; only augmentation draws anything."""
        turn, given, view = self.turns[index], self.cfg.prompt.modalities, self
        if not self.augment:
            return self._made(turn, self.streams(turn, given))
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        noise, fewer, thin = (rng.random() < self.augment.get(name, 0.0) for name in AUGMENTATIONS)
        there = [name for name in DROPPED if name in given and name in {"text", *self.streams.slots(turn)}]
        if fewer and len(there) > 1:
            kept = some(there, rng)
            view = self.only([name for name in given if name in kept or name not in there])
        values = self.streams(turn, view.cfg.prompt.modalities)
        if thin:
            past = [replace(said, text=thinned(said.text, rng)) for said in turn.history]
            turn = replace(turn, client=thinned(turn.client, rng), situation=thinned(turn.situation, rng), history=past)
        return view._made(turn, noisy(values, rng) if noise else values)

    def tokens(self, index: int, epoch: int, places: Callable[..., int]) -> int:
        """Positions that sample() takes, where augmentation leaves nothing out; no clip is read for it."""
        turn = self.turns[index]
        return self._made(turn, dict.fromkeys(self.streams.slots(turn), torch.empty(0, 0))).positions(places)

    def _made(self, turn: Turn, values: Mapping[str, Tensor]) -> TurnSample:
        values = {name: value for name, value in values.items() if name in self.cfg.prompt.modalities}
        if self.compressed and "history" in self.cfg.prompt.modalities:
            ids = history_ids(memory_text(turn), self.encode, self.cfg.memory_tokens)
            values |= {"history": torch.tensor(ids)} if ids else {}
        slots = {name: self.places(name, value) for name, value in values.items()}
        room = self.cfg.answer_room
        return make_sample(turn, values, slots, self.cfg.prompt, self.encode, self.most, room, self.chat)

    def coverage(self) -> str:
        """ "video 90/120, audio 90/120, history 101/120": how many turns have each stream, as far as files tell."""
        counts = Counter(name for turn in self.turns for name in self.streams.slots(turn))
        if "history" in self.cfg.prompt.modalities:
            counts["history"] = sum(bool(turn.history) for turn in self.turns)
        names = [name for name in self.cfg.prompt.modalities if name in ("video", "audio", "history")]
        return ", ".join(f"{name} {counts[name]}/{len(self)}" for name in names) or "text alone"

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Of each field of closed choice how often each label is the truth."""
        return {name: dict(Counter(filter(None, (getattr(turn, name) for turn in self.turns)))) for name in CLOSED}


def load_turns(
    cfg: DataConfig, seed: int, held_out: bool, test: bool, say: Callable[[str], None]
) -> dict[str, list[Turn]]:
    """train, valid and test turns; valid is empty unless given or `held_out`, test unless asked for.

    UserError: dialogues are in train and valid, or the validation file is the test file.
    """
    if cfg.valid_file and cfg.test_file and Path(cfg.valid_file).resolve() == Path(cfg.test_file).resolve():
        raise UserError(f"--valid-file {cfg.valid_file}: that is the test file; choose on other turns")

    def read(file: str) -> list[Turn]:
        turns, listing = read_turns(file, cfg.max_bad)
        say(str(listing))
        return turns

    train, valid = read(cfg.data_root), read(cfg.valid_file) if cfg.valid_file else []
    if held_out and not cfg.valid_file and cfg.valid_share > 0:
        _, chosen = split_by_group([Clip(turn.id, group=turn.dialogue) for turn in train], cfg.valid_share, seed)
        ids = {clip.id for clip in chosen}
        train, valid = [turn for turn in train if turn.id not in ids], [turn for turn in train if turn.id in ids]
        say(f"valid: {len(valid)} turns held out by dialogue (seed {seed})")
    tested = read(test_file(cfg)) if test else []
    if shared := leaks(train, valid):
        raise UserError(f"{len(shared)} dialogues are in both train and valid, such as {shared[0]!r}")
    if shared := leaks(train, tested):
        say(f"leak: {len(shared)} dialogues are in both train and test, such as {shared[0]!r}")
    if cfg.shuffle_labels:
        train = shuffled(train, seed)
    return {"train": train, "valid": valid, "test": tested}


def test_file(cfg: DataConfig) -> str:
    """The file of test turns: the one that is set, or the one beside the training turns."""
    if cfg.test_file and is_turns(cfg.test_file):
        return cfg.test_file
    beside = Path(cfg.data_root).with_name("test" + Path(cfg.data_root).suffix)
    if not beside.is_file():
        raise UserError(f"--test-file: needs a file of turns (looked for {beside})")
    return str(beside)


def shuffled(turns: Sequence[Turn], seed: int) -> list[Turn]:
    """A control: the turns with each other's answers."""
    order = np.random.default_rng(seed).permutation(len(turns))
    names = ("therapist", *CLOSED)
    given = [{name: getattr(turns[i], name) for name in names} for i in order]
    return [replace(turn, **answer) for turn, answer in zip(turns, given, strict=True)]
