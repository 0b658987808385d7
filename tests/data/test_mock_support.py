"""The synthetic dialogues of emotional support: what they hold, which rules their truth follows, what carries it."""

import csv
from collections import Counter

import numpy as np
import pytest
import torch

from common import config
from common.config import UserError
from data import mock, mock_support
from data.history import history_text
from data.media import load_audio, load_frames, probe
from data.mesc import EMOTIONS, STRATEGIES, leaks, read_turns
from data.mock_support import PLAIN, make_support, strong
from data.synth import Face, draw_face, speak

SIZES = {"train": 32, "val": 8, "test": 16}
LOOKS = {"anger": "angry", "sadness": "sad", "joy": "happy", "fear": "fear", "neutral": "neutral"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("support")
    make_support(folder, **SIZES, size=40, workers=2)
    return folder


@pytest.fixture(scope="module")
def turns(root):
    return {split: read_turns(root / f"{split}.jsonl")[0] for split in SIZES}


@pytest.fixture(scope="module")
def every(turns):
    return [turn for part in turns.values() for turn in part]


@pytest.fixture(scope="module")
def cues(root):
    with (root / "cues.csv").open(newline="", encoding="utf-8") as file:
        return {row.pop("id"): {name for name, has in row.items() if has == "1"} for row in csv.DictReader(file)}


def test_records_are_read_without_a_remark(root):
    for split, size in SIZES.items():
        _, listing = read_turns(root / f"{split}.jsonl")
        assert (listing.listed, listing.found, listing.skipped, listing.notes) == (size, size, [], [])


def test_splits_hold_dialogues_and_sentences_of_their_own(turns):
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert leaks(turns[a], turns[b]) == []
        assert not {turn.dialogue for turn in turns[a]} & {turn.dialogue for turn in turns[b]}
        sentences = [{turn.client.split(". ")[-1] for turn in turns[split]} for split in (a, b)]
        assert sentences[0] & sentences[1] <= {*PLAIN}  # what carries nothing


def test_quarters_of_sentences_are_made_of_the_same_words():
    rng = np.random.default_rng(0)
    quarters = [{mock.sentence("sad", (quarter,), rng)[0] for _ in range(1500)} for quarter in range(4)]
    assert len(set.union(*quarters)) == sum(map(len, quarters)) == 240
    assert all(set(" ".join(part).split()) == set(" ".join(quarters[0]).split()) for part in quarters)


def test_emotions_and_cues_are_balanced(turns, cues):
    for part in turns.values():
        counts = Counter(turn.client_emotion for turn in part)
        assert set(counts) == set(LOOKS)
        assert max(counts.values()) - min(counts.values()) <= 1
    for name in ("video", "audio", "text"):
        assert 0.2 < np.mean([name in carried for carried in cues.values()]) < 0.6
    assert {len(carried) for carried in cues.values()} == {1, 2}


def test_the_labels_are_some_of_mescs():
    assert set(mock_support.SHOWN) <= set(EMOTIONS)
    assert set(mock_support.STRATEGY.values()) <= set(STRATEGIES)
    assert mock_support.RESPONSES.keys() == set(mock_support.STRATEGY.values())


def test_the_truth_follows_the_rules(every):
    rule = {"anger": "restatement", "sadness": "self-disclosure", "joy": "approval", "neutral": "open question"}
    for turn in every:
        felt = [said.emotion for said in turn.history if said.role == "client"]
        assert turn.strategy == rule[felt[-1] if felt else "neutral"]
        shared = turn.client_emotion in ("joy", "sadness")
        assert turn.therapist_emotion == (turn.client_emotion if shared else "neutral")
        thing = turn.client.removesuffix(".").split()[-1]
        assert f" {thing}" in turn.therapist
    assert Counter(turn.strategy for turn in every) == dict.fromkeys(rule.values(), len(every) // 4)


def test_the_history_tells_what_was_felt_in_the_memory_only(every):
    said = [utterance for turn in every for utterance in turn.history]
    assert {utterance.text for utterance in said} == {"Hello.", "Yes.", "No.", "Maybe.", "Right.", "I see.", "Go on."}
    # each of the client's words goes with each emotion
    assert len({(each.emotion, each.text) for each in said if each.role == "client"}) == 4 * 4
    for turn in every:
        told = [(each.role.capitalize(), each.emotion, each.text) for each in turn.history]
        assert turn.memory == history_text(told)
    assert {len(turn.history) for turn in every} == set(range(6))


def test_only_words_that_carry_the_emotion_name_it(every, cues):
    for turn in every:
        emotion = LOOKS[turn.client_emotion] if "text" in cues[turn.id] else "neutral"
        phrases = mock.EMOTIONS[emotion].phrases[: None if emotion == "neutral" else 2]
        assert any(f" {phrase} " in turn.client for phrase in phrases)
        assert any(plain in turn.client for plain in PLAIN) == (emotion == "neutral")


def test_faces_show_more_than_those_of_the_other_set():
    assert strong(Face()) == Face()
    assert strong(Face(curve=-1.0, eye=0.5, rate=5.0)) == Face(curve=-2.0, eye=0.1, rate=7.0)


def test_clips_are_there_or_silent_or_missing(root, every, cues):
    assert list(cues) == [turn.id for turn in every]
    assert {len(turn.clips) for turn in every} == {0, 1, 2}
    named = [clip for turn in every for clip in turn.clips]
    assert sorted(named) == sorted(path.name for path in (root / "video_data").iterdir())
    silent = set()
    for turn in every[:28]:
        for clip in turn.clips:
            found = probe(root / "video_data" / clip)
            assert 10 <= found["frames"] < 15
            assert (found["fps"], found["width"], found["height"]) == (12.5, 40, 40)
            if not found["has_audio"]:
                silent.add(turn.id)
                assert clip == turn.clips[0]
    assert silent == {"11_0", "27_0"}
    assert not any("audio" in cues[id] for id in silent)
    assert [turn.id for turn in every if not turn.clips] == ["5_0", "21_0", "37_0", "45_0"]
    assert all(cues[turn.id] == {"text"} for turn in every if not turn.clips)


def correlation(a, b):
    """Of two sounds at the shift at which they are most alike, as an encoder delays what it writes."""
    spectra = (np.fft.rfft(np.asarray(x, float), 2**15) for x in (a, b))
    products = np.fft.irfft(next(spectra) * np.conj(next(spectra)))
    return products.max() / (np.linalg.norm(a) * np.linalg.norm(b))


def test_clips_of_a_turn_are_one_take_of_what_the_cues_say(root, turns, cues):
    """Each is its part of a take of that one of the five expressions, and of the five voices, that it should show."""
    for turn in [turn for turn in turns["train"] if turn.clips and turn.client_emotion != "neutral"][:9]:
        paths = [root / "video_data" / clip for clip in turn.clips]
        found = [probe(path) for path in paths]
        ends = np.cumsum([each["frames"] for each in found])
        drawn, spoken = {}, {}
        for name in LOOKS.values():
            image, sound = mock.generators(0, turn.id)
            drawn[name] = draw_face(strong(mock.EMOTIONS[name].face), ends[-1], ends[-1] // 2, 40, image).astype(float)
            spoken[name] = speak(mock.EMOTIONS[name].tone, ends[-1] * 0.08, sound)
        shown = {m: LOOKS[turn.client_emotion] if m in cues[turn.id] else "neutral" for m in ("video", "audio")}
        for path, about, end in zip(paths, found, ends, strict=True):
            start = end - about["frames"]
            frames = load_frames(path, indices=range(about["frames"])).numpy()
            apart = {name: np.abs(take[start:end] - frames).mean() for name, take in drawn.items()}
            assert shown["video"] == min(apart, key=apart.__getitem__), path
            if about["has_audio"]:
                heard = load_audio(path)
                alike = {name: correlation(take[start * 1280 : end * 1280], heard) for name, take in spoken.items()}
                assert [name for name, value in alike.items() if value > 0.95] == [shown["audio"]], path


def test_the_arguments_alone_decide(tmp_path):
    for name, seed, workers in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        make_support(tmp_path / name, 4, 1, 2, seed=seed, size=24, workers=workers)
    for file in ("train.jsonl", "val.jsonl", "test.jsonl", "cues.csv"):
        first, second, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == second
        assert (first == other) == (file == "cues.csv")  # so few turns have the same cues
    for path in (tmp_path / "a" / "video_data").iterdir():
        assert torch.equal(load_frames(path, 4), load_frames(tmp_path / "b" / "video_data" / path.name, 4))
        assert torch.equal(load_audio(path), load_audio(tmp_path / "b" / "video_data" / path.name))


def test_real_data_are_not_overwritten(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"holds files that are not a mock set; name an empty folder$"):
        make_support(tmp_path, 1, 1, 1)
    assert (tmp_path / "train.jsonl").read_text() == "{}\n"


def test_the_command_line(tmp_path, capsys):
    argv = ["--out", str(tmp_path / "set"), "--train", "2", "--val", "1", "--test", "1", "--seed", "5"]
    mock_support.main(config.load(mock_support.Config, argv))
    assert capsys.readouterr().out == f"{tmp_path}/set: 2 training, 1 validation and 1 test turns\n"
    make_support(tmp_path / "again", 2, 1, 1, seed=5)
    assert (tmp_path / "set" / "train.jsonl").read_bytes() == (tmp_path / "again" / "train.jsonl").read_bytes()
