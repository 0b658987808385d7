"""Histories as samples: what they are made of, what the memory tells of them, and whose memory the control gives."""

import pytest

from data.history import history_text
from data.mesc import Turn, Utterance
from data.reconstruct import PROMPTS, Reconstructions, histories
from model.mllm import MllmConfig, pack
from tests.qwen import make_tokenizer


def turn(dialogue, place, said, memory=None):
    history = [Utterance(role, "joy", text) for role, text in said]
    return Turn(f"{dialogue}_{place}", dialogue, None, "", "", "now", "then", None, None, None, [], history, memory)


OPENING = [("client", "Nobody listens."), ("therapist", "Okay.")]
TURNS = [
    turn("1", 0, []),
    turn("1", 1, OPENING),
    turn("1", 2, [*OPENING, ("client", "She is late."), ("therapist", "Okay.")]),
    turn("2", 0, [("therapist", "Okay."), ("client", "The video, again?")]),
    turn("3", 0, [], "Client(fear) From a file. <MEM> <MEM> Therapist(joy) Yes.<MEM> what no mark sums up"),
    turn("4", 0, OPENING),
    turn("5", 0, []),
]


def test_utterances_are_told_once():
    assert histories(TURNS, "utterances") == [
        ("1_1:0", ["Client(joy) Nobody listens."]), ("1_1:1", ["Therapist(joy) Okay."]),
        ("1_2:2", ["Client(joy) She is late."]), ("2_0:1", ["Client(joy) The video, again?"]),
        ("3_0:0", ["Client(fear) From a file."]), ("3_0:2", ["Therapist(joy) Yes."]),
    ]  # fmt: skip


def test_dialogues_are_the_longest_memory_of_each():
    found = dict(histories([*TURNS, turn("4", 1, OPENING[:1]), turn("6", 0, OPENING)], "dialogues"))
    assert list(found) == ["1_2", "2_0", "3_0", "4_0"]  # 5 has no history, 6 that of 4
    assert found["1_2"] == [
        "Client(joy) Nobody listens.", "Therapist(joy) Okay.", "Client(joy) She is late.", "Therapist(joy) Okay.",
    ]  # fmt: skip
    assert found["3_0"] == ["Client(fear) From a file.", "", "Therapist(joy) Yes."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_prompt_is_the_memory_and_the_answer_its_text(tokenizer, kind):
    made = Reconstructions(histories(TURNS, kind), kind, tokenizer.encode)
    assert (len(made), made.cut, made.lost) == ({"utterances": 6, "dialogues": 4}[kind], 0, 0)
    mark = tokenizer.specials["<MEM>"]
    for sample in map(made.sample, range(len(made))):
        ids, lines = sample.values["history"].tolist(), sample.target.split("\n")
        assert [piece for piece in sample.pieces if isinstance(piece, str)] == ["history"]
        said = "".join(piece if isinstance(piece, str) else tokenizer.decode(piece) for piece in sample.pieces)
        assert said == f"user\n{PROMPTS[kind]}\nHistory: history\nassistant\n"  # and control tokens
        assert (ids[-1], ids.count(mark)) == (mark, len(lines))
        assert ids == tokenizer.encode("".join(f"{line} <MEM> " for line in lines).rstrip())
        assert mark not in sample.answer
        assert tokenizer.decode(sample.answer) == sample.target
        assert sample.answer[-1] == tokenizer.eos_id
    cfg = MllmConfig(features={}, visual=None)
    batch = pack(made.samples, cfg)
    assert batch.lengths == [made.tokens(i, 0, cfg.places) for i in range(len(made))]
    assert batch.targets == sum(len(sample.answer) for sample in made.samples)


def test_the_memory_as_training_reads_it_is_the_one_of_whole_turns(tokenizer):
    """The ids are those that the same history has in a turn's prompt."""
    said = [("Client", "joy", "Nobody listens."), ("Therapist", "neutral", "Okay.")]
    utterances = ["Client(joy) Nobody listens.", "Therapist(neutral) Okay."]
    sample = Reconstructions([("1", utterances)], "dialogues", tokenizer.encode).sample(0)
    assert sample.values["history"].tolist() == tokenizer.encode(history_text(said).rstrip())


def test_what_is_too_long_keeps_its_newest_utterances_whole(tokenizer):
    said = [f"Client(joy) She is late, {i}." for i in range(100)]
    size = len(tokenizer.encode(f"{said[50]} <MEM> "))
    found = [("long", said), ("word", ["Client(joy) " + "again " * 600]), ("last", [*said[:3], "late " * 600])]
    made = Reconstructions([*found, ("short", said[:2])], "dialogues", tokenizer.encode, 512)
    assert [sample.id for sample in made.samples] == ["long", "short"]
    assert (made.cut, made.lost) == (1, 2)
    sample = made.sample(0)
    ids, kept = sample.values["history"].tolist(), sample.target.split("\n")
    assert 512 - size < len(ids) <= 512
    assert kept == said[-len(kept) :]
    assert ids == tokenizer.encode("".join(f"{text} <MEM> " for text in kept).rstrip())


@pytest.mark.parametrize("count", [2, 5, 6])
def test_the_control_gives_each_the_memory_of_another(tokenizer, count):
    made = Reconstructions(histories(TURNS, "utterances")[:count], "utterances", tokenizer.encode)
    other = made.shuffled()
    assert [(s.id, s.answer) for s in other.samples] == [(s.id, s.answer) for s in made.samples]
    memories = [[tuple(s.values["history"].tolist()) for s in each.samples] for each in (made, other)]
    assert sorted(memories[0]) == sorted(memories[1])
    assert all(a != b for a, b in zip(*memories, strict=True))
