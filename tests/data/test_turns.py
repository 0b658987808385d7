"""Turns as samples: which are in which split, what of them is seen, and what never changes from training to use."""

import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config import UserError
from data.clips import DataConfig
from data.mesc import Turn, Utterance, write_turns
from data.support import PromptConfig, format_target
from data.turns import SupportConfig, TurnData, is_turns, load_turns, shuffled
from model.mllm import IGNORE_INDEX, MllmConfig, pack
from model.towers import TowerConfig
from tests.qwen import make_tokenizer

MODEL = MllmConfig(
    features={}, visual=None, max_len=700,
    towers=TowerConfig(vision_tower="framestats", num_frames=4, patches=25, audio_tower="logmel", audio_tokens=3),
)  # fmt: skip


def turn(dialogue, place, exchanges=1, **changes):
    history = [
        Utterance(role, "joy" if role == "client" else "neutral", f"{role} says {dialogue} {i}")
        for i in range(exchanges)
        for role in ("client", "therapist")
    ]
    made = Turn(
        f"{dialogue}_{place}", str(dialogue), "train", "work", "a new boss", f"I am tired {dialogue} {place}",
        f"Tell me more {dialogue} {place}", "sadness", "neutral", "open question", [f"{dialogue}_{place}.mp4"], history,
    )  # fmt: skip
    return replace(made, **changes)


LONGEST = {"clean": 700, "original": 1650}  # positions: not enough for a long history and 256 for an answer


class Streams:
    """Clips that need no files: every turn with a clip is seen, those of an even place are heard."""

    def slots(self, turn):
        return ["video", "audio"] if turn.clips else []

    def __call__(self, turn, wanted):
        values = {"video": torch.ones(4, 25, 12)} if turn.clips else {}
        values |= {"audio": torch.ones(3, 64)} if turn.clips and int(turn.id[-1]) % 2 == 0 else {}
        return {name: value for name, value in values.items() if name in wanted}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("vocabulary"))


def data(tokenizer, turns, compressed=True, most=700, **cfg):
    prompt = PromptConfig(**cfg.pop("prompt", {}))
    return TurnData(
        turns, Streams(), SupportConfig(prompt=prompt, **cfg), tokenizer.encode, MODEL.places, most, compressed
    )


def test_a_turn_has_the_slots_of_what_it_has(tokenizer):
    made = data(tokenizer, [turn(1, 0), turn(1, 1), turn(1, 2, clips=[]), turn(1, 4, exchanges=0)])
    slots = [[piece for piece in made.sample(i).pieces if isinstance(piece, str)] for i in range(4)]
    assert slots == [["video", "audio", "history"], ["video", "history"], ["history"], ["video", "audio"]]
    ids = made.sample(0).values["history"]
    mark = tokenizer.specials["<MEM>"]
    assert [int(i) for i in ids].count(mark) == 2
    assert int(ids[-1]) == mark
    batch = pack([made.sample(i) for i in range(4)], MODEL)
    assert {name: len(at) for name, (at, _) in batch.slots.items()} == {
        "video": 3 * 2 * 2 * 2,
        "audio": 6,
        "history": 6,
    }
    assert made.coverage() == "video 3/4, audio 3/4, history 3/4"
    assert made.class_counts()["client_emotion"] == {"sadness": 4}


def test_without_a_compressor_the_history_is_what_the_chat_tells(tokenizer):
    sample = data(tokenizer, [turn(1, 0, exchanges=2)], compressed=False).sample(0)
    assert "history" not in sample.values
    assert "client says 1 1" in sample.prompt
    assert "says" not in data(tokenizer, [turn(1, 0)], prompt={"modalities": ["text", "video"]}).sample(0).prompt


def test_modalities_that_are_taken_away(tokenizer):
    whole = data(tokenizer, [turn(1, 0)])
    part = whole.only(["audio", "history"])
    assert set(part.sample(0).values) == {"audio", "history"}
    assert "I am tired" not in part.sample(0).prompt
    assert set(whole.sample(0).values) == {"video", "audio", "history"}


def test_lengths_are_known_before_any_clip_is_read(tokenizer):
    turns = [turn(1, 0), turn(2, 2, exchanges=20), turn(3, 4, clips=[], exchanges=0)]
    made = data(tokenizer, turns)
    lengths = [pack([made.sample(i)], MODEL).lengths[0] for i in range(3)]
    assert [made.tokens(i, 0, MODEL.places) for i in range(3)] == lengths


@pytest.mark.parametrize("layout", ["clean", "original"])
def test_prompts_of_training_evaluation_and_use_are_the_same(tokenizer, layout):
    rng = random.Random(layout)
    cut = 0
    for n in range(40):
        known = turn(n, 2 * rng.randint(0, 4), exchanges=rng.randint(0, 20), therapist="Go on " * rng.randint(1, 20))
        unknown = replace(known, therapist="", client_emotion=None, therapist_emotion=None, strategy=None)
        trained, used = (
            data(tokenizer, [each], prompt={"layout": layout}, most=LONGEST[layout]).sample(0)
            for each in (known, unknown)
        )
        assert trained.pieces == used.pieces
        assert not used.answer
        assert tokenizer.decode(trained.answer) == format_target(known)
        batch = pack([trained], replace(MODEL, max_len=LONGEST[layout]))
        labels = [int(label) for label in batch.labels if label != IGNORE_INDEX]
        assert labels == trained.answer  # what was too long has lost history, never the answer
        cut += trained.dropped > 0
    assert 0 < cut < 40


def files(folder, **splits):
    for name, turns in splits.items():
        write_turns(folder / f"{name}.jsonl", turns)
    return DataConfig(data_root=str(folder / "train.jsonl"), test_file=None, valid_share=0.3)


TURNS = [turn(dialogue, place) for dialogue in range(10) for place in range(3)]


def test_whole_dialogues_are_held_out(tmp_path):
    cfg, said = files(tmp_path, train=TURNS, test=[turn(20, 0)]), []
    found = load_turns(cfg, 7, True, True, said.append)
    held = {each.dialogue for each in found["valid"]}
    assert 0 < len(held) < 10
    assert not held & {each.dialogue for each in found["train"]}
    assert len(found["train"]) + len(found["valid"]) == 30
    assert [each.id for each in found["test"]] == ["20_0"]  # the file beside the training turns
    assert said[1] == f"valid: {len(found['valid'])} turns held out by dialogue (seed 7)"
    again = load_turns(cfg, 7, True, False, lambda _: None)
    assert [each.id for each in again["valid"]] == [each.id for each in found["valid"]]
    assert not again["test"]
    assert not load_turns(cfg, 7, False, False, lambda _: None)["valid"]


def test_files_of_validation_and_test(tmp_path):
    cfg = replace(files(tmp_path, train=TURNS, val=[turn(30, 0)], other=[turn(31, 0)], leak=TURNS[:3]), valid_share=0.0)
    cfg.valid_file = str(tmp_path / "val.jsonl")
    assert [each.id for each in load_turns(cfg, 0, True, False, lambda _: None)["valid"]] == ["30_0"]
    with pytest.raises(UserError) as error:
        load_turns(replace(cfg, test_file=cfg.valid_file), 0, True, True, lambda _: None)
    assert str(error.value) == f"--valid-file {cfg.valid_file}: that is the test file; choose on other turns"
    with pytest.raises(UserError) as error:
        load_turns(cfg, 0, True, True, lambda _: None)
    assert str(error.value) == f"--test-file: needs a file of turns (looked for {tmp_path / 'test.jsonl'})"
    with pytest.raises(UserError, match="1 dialogues are in both train and valid, such as"):
        load_turns(replace(cfg, valid_file=str(tmp_path / "leak.jsonl")), 0, True, False, lambda _: None)
    said = []
    load_turns(replace(cfg, test_file=str(tmp_path / "leak.jsonl")), 0, False, True, said.append)
    assert said[-1].startswith("leak: 1 dialogues are in both train and test, such as ")


def test_shuffled_turns_keep_all_but_their_answers():
    turns = [turn(n, 0, therapist=f"answer {n}", strategy=["approval", "others"][n % 2]) for n in range(20)]
    other = shuffled(turns, 3)
    assert [each.client for each in other] == [each.client for each in turns]
    assert sorted(each.therapist for each in other) == sorted(each.therapist for each in turns)
    assert [each.therapist for each in other] != [each.therapist for each in turns]
    truth = {each.therapist: each.strategy for each in turns}
    assert all(truth[each.therapist] == each.strategy for each in other)  # an answer moves as a whole
    assert shuffled(turns, 3) == other


def test_what_a_file_of_turns_is():
    assert is_turns("datasets/mesc/train.jsonl")
    assert is_turns("TRAIN.JSON")
    assert not is_turns("datasets/MERR")


def test_a_turn_that_cannot_fit_is_named(tokenizer):
    long = turn(1, 0, therapist="word " * 400)
    with pytest.raises(UserError, match=r"turn 1_0 takes \d+ positions without its history"):
        data(tokenizer, [long], most=300).sample(0)


def test_fields_are_asked_as_they_are_known(tokenizer):
    unlabelled = turn(1, 0, client_emotion=None)
    sample = data(tokenizer, [unlabelled]).sample(0)
    assert "Client's emotion" not in sample.prompt + sample.target
    assert SimpleNamespace(**vars(sample)).target.startswith("Therapist's emotion: neutral \nTherapist's strategy:")


def test_augmentation_adds_a_tenth_of_noise_and_leaves_some_streams_out_but_the_history(tokenizer, monkeypatch):
    rows = {"video": torch.randn(4, 25, 12), "audio": 5 * torch.randn(3, 64)}
    monkeypatch.setattr(Streams, "__call__", lambda _, turn, wanted: {n: v for n, v in rows.items() if n in wanted})
    plain = data(tokenizer, [turn(1, 0)])
    made = plain.augmented({"streams": 0.5}, seed=3)
    kept = Counter(
        (*each.values, "text" if "Client: " in each.prompt else "") for each in (made.sample(0, e) for e in range(400))
    )
    parts = {(*some, "history", words) for some in ((), *zip(rows), (*rows,)) for words in ("text", "")}
    assert set(kept) == parts - {("history", "")}
    assert 0.44 < kept[*rows, "history", "text"] / 400 < 0.56

    noisy = plain.augmented({"noise": 1.0}, seed=3).sample(0).values
    for name, value in rows.items():
        assert 0.08 < float((noisy[name] - value).std() / value.std()) < 0.12
    same = [plain.augmented({"noise": 0.5, "streams": 0.5}, seed).sample(0, 7) for seed in (4, 4, 5)]
    assert same[0].pieces == same[1].pieces
    assert all(torch.equal(same[0].values[name], same[1].values[name]) for name in same[0].values)
    assert same[0].pieces != same[2].pieces or any(
        not torch.equal(same[0].values[name], same[2].values[name]) for name in rows if name in same[0].values
    )
    assert torch.equal(plain.sample(0, 7).values["audio"], rows["audio"])


def test_augmentation_leaves_half_of_the_words_out_but_no_label_and_no_answer(tokenizer):
    said = [Utterance("client", "sadness", "one two three four"), Utterance("therapist", "neutral", "five six")]
    words = "seven eight nine ten eleven twelve"
    full = turn(1, 0, client=words, situation="thirteen", history=said)
    made = data(tokenizer, [full], prompt={"history_labels": True}).augmented({"words": 0.5}, seed=3)
    plain, kept, whole = data(tokenizer, [full], prompt={"history_labels": True}).sample(0), Counter(), 0
    for epoch in range(600):
        sample = made.sample(0, epoch)
        there = {*re.findall(r"[a-z]+", sample.prompt)}
        kept.update(there)
        whole += sample.prompt == plain.prompt
        assert sample.answer == plain.answer
        assert sample.prompt.count("sadness") == plain.prompt.count("sadness")
        assert "thirteen" in sample.prompt  # the only word of its text
        assert there & {"five", "six"}
    assert 0.44 < whole / 600 < 0.57
    assert all(0.69 < kept[word] / 600 < 0.82 for word in words.split())  # half of the samples lose half of them
    assert made.sample(0, 5).prompt == made.sample(0, 5).prompt
