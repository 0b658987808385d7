import torch

from data.dialogue import previous, same_speaker
from data.manifest import Clip


def said(*turns):
    return [Clip(str(i), dialogue=dialogue, speaker=speaker) for i, (dialogue, speaker) in enumerate(turns)]


def test_the_utterances_before_within_their_dialogue():
    clips = said(("a", "Ann"), ("a", "Bob"), ("b", "Ann"), ("a", "Ann"), (None, "Ann"), (None, "Ann"), ("a", "Ann"))
    index = previous(clips, 2)
    assert index.tolist() == [[-1, -1], [0, -1], [-1, -1], [1, 0], [-1, -1], [-1, -1], [3, 1]]
    assert index.dtype == torch.int64
    assert same_speaker(clips, index).tolist() == [
        [False, False], [False, False], [False, False], [False, True], [False, False], [False, False], [True, False],
    ]  # fmt: skip


def test_unknown_speakers_are_nobody():
    clips = said(("a", None), ("a", None), ("a", "Ann"))
    assert not same_speaker(clips, previous(clips, 2)).any()


def test_no_context_and_no_clips():
    clips = said(("a", "Ann"), ("a", "Ann"))
    assert previous(clips, 0).shape == same_speaker(clips, previous(clips, 0)).shape == (2, 0)
    assert previous([], 3).shape == same_speaker([], previous([], 3)).shape == (0, 3)
