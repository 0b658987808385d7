"""What was said before an utterance, and by whom: indices into a list of clips in the order of speaking."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.manifest import Clip


def previous(clips: Sequence[Clip], k: int) -> Tensor:
    """(N, k) int64: the k utterances before each one in its dialogue, the latest first; -1 for none."""
    said: dict[str, list[int]] = {}
    rows = []
    for i, clip in enumerate(clips):
        before = [] if clip.dialogue is None else said.setdefault(clip.dialogue, [])
        recent = before[::-1][:k]
        rows.append([*recent, *[-1] * (k - len(recent))])
        before.append(i)
    return torch.tensor(rows, dtype=torch.long).view(len(clips), k)


def same_speaker(clips: Sequence[Clip], index: Tensor) -> Tensor:
    """(N, k) bool: whether the utterances `index` of previous() are by the speaker of the one they go before."""
    names = dict.fromkeys(clip.speaker for clip in clips if clip.speaker is not None)
    numbers = {name: i for i, name in enumerate(names)}
    speaker = torch.tensor([-1 if clip.speaker is None else numbers[clip.speaker] for clip in clips])
    return (index >= 0) & (speaker[:, None] >= 0) & (speaker[index] == speaker[:, None])
