"""Histories to be written out from the compressor's memory of them, which is how it learns before all else does."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from data.history import MEM, history_ids
from data.mesc import Turn, memory_text
from data.prompts import Encode, Sample, Slot, encode_answer, encode_segments
from data.support import CHATML, Chat

PROMPTS = {
    "utterances": "Say once more what was said, word for word.",
    "dialogues": "Write the whole conversation down once more, word for word, a line an utterance.",
}
KINDS = ("none", *PROMPTS)
History = tuple[str, list[str]]  # id; utterances without their marks, oldest first


def histories(turns: Sequence[Turn], kind: str) -> list[History]:
    """What the compressor reads of these turns, none twice: each utterance alone, or the longest of each dialogue."""
    memories = [(turn, _spoken(turn)) for turn in turns]
    if kind == "utterances":
        found = [(f"{turn.id}:{i}", [text]) for turn, said in memories for i, text in enumerate(said)]
    else:
        longest: dict[str, History] = {}
        for turn, said in memories:
            _, known = longest.get(turn.dialogue, ("", []))
            if sum(map(len, said)) > sum(map(len, known)):
                longest[turn.dialogue] = turn.id, said
        found = list(longest.values())
    distinct: dict[tuple[str, ...], str] = {}
    for id, said in found:
        if any(said):
            distinct.setdefault(tuple(said), id)
    return [(id, list(said)) for said, id in distinct.items()]


def _spoken(turn: Turn) -> list[str]:
    return [text.strip() for text in memory_text(turn).split(MEM)[:-1]]


class Reconstructions:
    """Histories as samples: the memory of each is the prompt, its text the answer.

    Of one of more than `most` tokens its newest utterances are taken, `cut` counts these; `lost` are the histories
    whose newest utterance alone is too long, which are left out.
    """

    def __init__(
        self, found: Sequence[History], kind: str, encode: Encode, most: int = 512, chat: Chat = CHATML
    ) -> None:
        shown = chat([("user", [f"{PROMPTS[kind]}\nHistory: ", Slot("history")])])
        prompt = "".join(part if isinstance(part, str) else f"<{part.name}>" for part in shown)
        pieces = encode_segments(shown, encode)
        self.samples: list[Sample] = []
        self.cut = 0
        for id, said in found:
            ids = history_ids("".join(f"{text} {MEM} " for text in said), encode, most)
            if ids:
                dropped = len(said) - ids.count(ids[-1])  # one mark an utterance, the last id is one
                told = "\n".join(said[dropped:])
                values = {"history": torch.tensor(ids)}
                self.samples.append(Sample(id, pieces, encode_answer(told, encode), values, prompt, told))
                self.cut += dropped > 0
        self.lost = len(found) - len(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        return self.samples[index]

    def tokens(self, index: int, epoch: int, places: Callable[..., int]) -> int:
        """Positions that a sample takes."""
        return self.samples[index].positions(places)

    def shuffled(self) -> "Reconstructions":
        """A control: the samples, of which there are two at least, each with the memory of another one."""
        view, half = copy.copy(self), len(self) // 2
        others = self.samples[half:] + self.samples[:half]
        view.samples = [
            replace(sample, values=other.values) for sample, other in zip(self.samples, others, strict=True)
        ]
        return view
