"""Clips as samples: splits, features that are missing or broken, prompts, and randomness tied to the clip."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import UserError
from data import prompts
from data.clips import (
    AUGMENTATIONS,
    ClipData,
    DataConfig,
    Features,
    check,
    label_gaps,
    load_replay,
    load_splits,
    load_test,
    make_sample,
)
from data.features import FeatureStore, StoreWriter
from data.manifest import Clip
from data.prompts import EMOTIONS9, QUESTIONS
from tests.data.test_media import make_video

LABELS = ["happy", "sad", "neutral", "angry"]
ROWS = {"image": (4, 3), "cls": (1, 3), "face": (1, 6), "voice": (1, 5)}


def encode(text, specials=()):
    """A tokenizer whose ids can be read again."""
    return list(text.encode())


def text_of(sample):
    return "".join(bytes(piece).decode() if isinstance(piece, list) else f"<{piece}>" for piece in sample.pieces)


def silent(_):
    pass


@pytest.fixture
def root(tmp_path):
    """Features of clips a to f: all have a picture, f has no voice and e no face."""
    noise = torch.Generator().manual_seed(0)
    for name, shape, ids in (("eva", (5, 3), "abcdef"), ("face", (6,), "abcdf"), ("voice", (5,), "abcde")):
        writer = StoreWriter(tmp_path / name, {"dim": shape[-1], "encoder": name})
        for id in ids:
            writer.add(id, torch.randn(shape, generator=noise))
        writer.finish()
    return tmp_path


CLIPS = [
    Clip(id, text=None if id == "b" else f"I am {id}", label=LABELS[i % 4], captions={"reason": f"Because of {id}!"})
    for i, id in enumerate("abcdef")
]


def dataset(root, train=False, seed=0, clips=CLIPS, **settings):
    cfg = DataConfig(data_root=str(root), labels=LABELS, **settings)
    return ClipData(clips, Features(ROWS, "eva", cfg), cfg, encode, train, seed)


class Drawn:
    """An encoder of pictures that tells its frames apart."""

    modality, sample_rate = "video", None

    def frames(self, pooling):
        return 1

    def info(self, pooling):
        return {"dim": 3, "encoder": "drawn"}

    def encode(self, x, pooling):
        return x.float().mean((0, 1, 2)).expand(5, 3)


def test_pictures_encoded_online_are_those_of_the_frame_asked_for(root, tmp_path):
    make_video(tmp_path / "a.mp4", 10)  # its frames get lighter
    clip = replace(CLIPS[0], path=str(tmp_path / "a.mp4"), frame=9)
    light = []
    for frame in ("first", "peak"):
        cfg = DataConfig(data_root=str(root), frame=frame)
        features = Features(ROWS, "eva", cfg, Drawn())
        assert features.describe()["eva"] == {"dim": 3, "encoder": "drawn", "frame": frame}
        assert features(clip)["image"].shape == (4, 3)
        light.append(float(features(clip)["cls"].mean()))
        assert not features(CLIPS[1]).keys() & {"image", "cls"}  # no file
    assert light[0] + 5 < light[1]


def test_the_frame_that_is_encoded_online_is_drawn(root, tmp_path):
    make_video(tmp_path / "a.mp4", 10)
    clips = [replace(CLIPS[0], path=str(tmp_path / "a.mp4"))]
    cfg = DataConfig(data_root=str(root), labels=LABELS, enable_augmentation=True, augmentations={"frame": 0.5})
    features = Features(ROWS, "eva", cfg, Drawn())
    data = ClipData(clips, features, cfg, encode, train=True)
    light = [float(data.sample(0, epoch).values["cls"].mean()) for epoch in range(60)]
    first = float(features(clips[0])["cls"].mean())
    assert 15 < sum(value == first for value in light) < 45  # half of the samples, and those that draw the first
    assert len(set(light)) > 6
    assert max(light) > first + 50
    assert float(ClipData(clips, features, cfg, encode).sample(0).values["cls"].mean()) == first


def test_online_a_broken_video_counts_as_absent_and_too_many_end_the_run(root, tmp_path):
    said = []
    clips = [replace(clip, path=str(tmp_path / f"{clip.id}.mp4")) for clip in CLIPS]
    for clip in clips:
        (tmp_path / f"{clip.id}.mp4").write_bytes(b"no film")
    features = Features(ROWS, "eva", DataConfig(data_root=str(root)), Drawn())
    features.scan(clips, 0.2, said.append)
    assert features(clips[0]).keys() == features(clips[0]).keys() == {"face", "voice"}
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}/a.mp4: ")
    assert said[0].endswith("; its picture counts as absent")
    with pytest.raises(UserError, match=r"2 of 6 clips have no readable frame, the last: .*b\.mp4.*--max-bad 0\.2"):
        features(clips[1])


def test_features_of_other_weights_than_in_training_are_refused(root):
    features = Features(ROWS, "eva", DataConfig(data_root=str(root)))
    features.check_made(features.describe())
    made = features.describe()
    made["eva"]["weights_sha256"] = {"a": "1"}
    features.check_made(made)  # unknown here
    features.stores["eva"].info["weights_sha256"] = {"a": "2"}
    with pytest.raises(UserError, match="features 'eva' are made with other weights of eva than in training"):
        features.check_made(made)


# ---- prompts


def test_a_sample_holds_its_streams_in_prompt_order(root):
    sample = dataset(root).sample(0)
    question = "Please determine which emotion label in the video represents: happy, sad, neutral, angry."
    prompt = (
        "<s>[INST] <video><image></video> <feature><face><voice><cls></feature> "
        f"The person in video says: I am a.  [emotion] {question}  [/INST]"
    )
    assert text_of(sample) == sample.prompt == prompt
    assert bytes(sample.answer).decode() == "happy</s>"
    assert (sample.id, sample.label, sample.task, sample.target) == ("a", "happy", "emotion", "happy")
    assert {name: tuple(value.shape) for name, value in sample.values.items()} == ROWS


def test_the_clean_layout_keeps_targets_as_they_are_written(root):
    data = dataset(root, prompt_layout="clean")
    assert data.sample(0, task="reason").target == "Because of a!"
    assert bytes(data.sample(0, task="reason").answer).decode() == "Because of a!</s>"
    assert dataset(root).sample(0, task="reason").target == "because of a"
    assert "says: I am a. [emotion]" in data.sample(0).prompt


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
@pytest.mark.parametrize("chat", [True, False])
def test_turns_are_laid_out_as_llama_2_has_them(root, layout, chat):
    """Each turn <s>[INST] question [/INST] answer </s>; the clip is in the first."""
    data = dataset(root, prompt_layout=layout, chat_template=chat)
    values = data.features(CLIPS[0])
    turns = [("[reason] Why?", "He smiles."), ("Is he well?", "Yes.")]
    made = make_sample(CLIPS[0], values, data.cfg, encode, "emotion", "Which?", list(ROWS), turns=turns)
    first = make_sample(CLIPS[0], values, data.cfg, encode, "reason", "Why?", list(ROWS))
    head, tail = ("[INST] ", " [/INST]") if chat else ("", "")
    later = f"He smiles. </s><s>{head}[reason] Is he well?{tail}Yes. </s><s>{head}[emotion] Which?{tail}"
    assert made.prompt == text_of(made) == first.prompt + later
    assert made.pieces[: len(first.pieces)] == first.pieces  # answers start a segment of their own, as in training
    assert (made.id, made.task, made.answer) == ("a", "emotion", [])
    slots = [piece for piece in made.pieces if isinstance(piece, str)]
    assert sorted(slots) == sorted(ROWS)  # once each


def test_streams_that_are_missing_leave_no_slot_and_no_sentence(root):
    data = dataset(root)
    without = {sample.id: sample for sample in map(data.sample, range(6))}
    assert "<feature><face><cls></feature>" in without["f"].prompt
    assert "<feature><voice><cls></feature>" in without["e"].prompt
    assert "The person in video says" not in without["b"].prompt
    assert data.coverage() == "face 5/6, voice 5/6, eva 6/6, text 5/6"
    bare = make_sample(Clip("x"), {}, data.cfg, encode, "reason", "Why?", list(ROWS))
    assert [piece for piece in bare.pieces if isinstance(piece, str)] == []
    assert bare.answer == []


@pytest.mark.parametrize(
    ("streams", "slots", "said"),
    [(["text"], [], True), (["voice"], ["voice"], False), (["image", "cls"], ["image", "cls"], False)],
)
def test_some_streams_only(root, streams, slots, said):
    data = dataset(root)
    sample = data.only(streams).sample(0)
    assert [piece for piece in sample.pieces if isinstance(piece, str)] == slots
    assert ("says: I am a" in sample.prompt) == said
    assert data.only(streams).only([]).sample(0).prompt == data.sample(0).prompt == dataset(root).sample(0).prompt


def test_evaluation_asks_the_first_question(root):
    data = dataset(root)
    assert QUESTIONS["reason"][0] in data.sample(0, task="reason").prompt
    assert data.sample(0, task="reason").target == "because of a"
    assert "[reason_v2]" in data.sample(0, task="reason_v2").prompt
    assert data.sample(0, task="reason_v2").answer == []  # the clip has no such caption
    published = dataset(root)
    published.cfg.labels = list(EMOTIONS9)
    assert QUESTIONS["emotion"][0] in published.sample(0).prompt
    assert "Who is it?" in data.sample(0, question="Who is it?").prompt


def test_training_draws_tasks_by_their_weights(root):
    data = dataset(root, train=True, task_pool={"emotion": 3.0, "reason": 1.0})
    drawn = [data.sample(i, epoch).task for epoch in range(200) for i in range(6)]
    assert set(drawn) == {"emotion", "reason"}
    assert drawn.count("emotion") / len(drawn) == pytest.approx(0.75, abs=0.05)
    asked = {data.sample(0, epoch, task="reason").prompt.split("[reason] ")[1] for epoch in range(60)}
    assert len(asked) == len(QUESTIONS["reason"])


def test_clips_without_a_target_are_left_out_of_training(root):
    clips = [Clip("a", label="happy"), Clip("b"), Clip("c", captions={"reason": "so"})]
    data = dataset(root, train=True, clips=clips, task_pool={"emotion": 1.0})
    assert ([clip.id for clip in data.clips], data.without_task) == (["a"], 2)
    assert data.class_counts() == {"happy": 1, "sad": 0, "neutral": 0, "angry": 0}
    assert len(dataset(root, clips=clips)) == 3
    with pytest.raises(UserError) as error:
        dataset(root, train=True, clips=clips[1:], task_pool={"emotion": 1.0, "reason_v2": 1.0})
    assert str(error.value) == "no clip has a target for the tasks emotion, reason_v2"


# ---- randomness


def same(one, two):
    if (one.prompt, one.answer, [*one.values]) != (two.prompt, two.answer, [*two.values]):
        return False
    return all(torch.equal(value, two.values[name]) for name, value in one.values.items())


def test_a_training_sample_is_a_function_of_seed_pass_and_clip(root):
    data = dataset(root, train=True, enable_augmentation=True)
    first = [data.sample(i, 3) for i in range(6)]
    for generator in (random, np.random, torch):
        (generator.manual_seed if generator is torch else generator.seed)(99)
    backwards = [data.sample(i, 3) for i in reversed(range(6))][::-1]
    assert all(map(same, first, backwards))
    elsewhere = dataset(root, train=True, enable_augmentation=True, clips=CLIPS[::-1])  # at another place in the list
    assert all(same(one, elsewhere.sample(5 - i, 3)) for i, one in enumerate(first))
    assert not all(same(one, data.sample(i, 4)) for i, one in enumerate(first))
    other = dataset(root, train=True, enable_augmentation=True, seed=1)
    assert not all(same(one, other.sample(i, 3)) for i, one in enumerate(first))


def test_tokens_are_counted_without_reading(root, monkeypatch):
    data = dataset(root, train=True, task_pool={"emotion": 1.0, "reason": 1.0})
    places = {"image": 4, "cls": 1, "face": 1, "voice": 3}
    samples = {(i, epoch): data.sample(i, epoch) for i in range(6) for epoch in range(5)}
    monkeypatch.setattr(Features, "__call__", None)
    lengths = {at: data.tokens(*at, lambda slot, value: places[slot]) for at in samples}
    for at, sample in samples.items():
        slots = [places[piece] for piece in sample.pieces if isinstance(piece, str)]
        assert lengths[at] == sum(len(ids) for ids in sample.pieces if isinstance(ids, list)) + sum(slots) + len(
            sample.answer
        )
    assert len(set(lengths.values())) > 6


def test_augmentation_adds_a_tenth_of_noise_and_drops_streams(root):
    data = dataset(root, train=True, enable_augmentation=True, augmentations={"noise": 0.5, "streams": 0.5})
    plain = dataset(root).sample(0)
    ratios, kept, texts = [], [], []
    for epoch in range(600):
        sample = data.sample(0, epoch)
        kept.append(frozenset(sample.values))
        texts.append("says" in sample.prompt)
        if "voice" in sample.values and not torch.equal(sample.values["voice"], plain.values["voice"]):
            noise, voice = sample.values["voice"] - plain.values["voice"], plain.values["voice"]
            ratios.append(noise.square().mean().sqrt() / voice.std(correction=0))
    assert float(torch.stack(ratios).square().mean().sqrt()) == pytest.approx(0.1, rel=0.1)
    assert 0.25 < len(ratios) / 600 < 0.5  # half have noise, where the voice is there at all
    whole = sum(names == {"image", "cls", "face", "voice"} for names in kept)
    assert 0.5 < whole / 600 < 0.7
    assert all(("image" in names) == ("cls" in names) for names in kept)  # one stream
    assert 0.6 < sum(texts) / 600 < 0.9
    assert {said for names, said in zip(kept, texts, strict=True) if not names} == {True}  # something is always left


def test_a_tenth_of_the_coordinates_is_blanked(root):
    data = dataset(root, train=True, enable_augmentation=True, augmentations={"dropout": 0.5})
    data.blank = {"voice": torch.full((5,), 7.0)}  # as the model's means, where it standardises
    plain, gaps, changed = dataset(root).sample(0).values, {name: 0 for name in ROWS}, 0
    for epoch in range(1000):
        values = data.sample(0, epoch).values
        assert {name: value.shape for name, value in values.items()} == {name: v.shape for name, v in plain.items()}
        for name, value in values.items():
            blank = value != plain[name]
            assert (blank.all(0) == blank.any(0)).all()  # in every row
            assert torch.equal(value[blank], torch.full((int(blank.sum()),), 7.0 if name == "voice" else 0.0))
            gaps[name] += int(blank[0].sum())
        changed += any(not torch.equal(value, plain[name]) for name, value in values.items())
    for name, (_, width) in ROWS.items():
        assert gaps[name] / (1000 * width) == pytest.approx(0.05, abs=0.012), name  # half of the samples, a tenth each
    assert changed < 1000 * 0.5


def test_words_are_left_out(root):
    data = dataset(root, train=True, task_pool={"emotion": 1.0}, enable_augmentation=True, augmentations={"words": 0.5})
    plain = dataset(root).sample(0)
    words, kept = data.clips[0].text.split(), Counter()
    for epoch in range(600):
        sample = data.sample(0, epoch)
        there = {*re.findall(r"\w+", sample.prompt)}
        kept.update(there)
        assert there & {*words}
        kept["whole"] += sample.prompt == plain.prompt
    assert all(0.7 < kept[word] / 600 < 0.88 for word in words), kept
    assert 0.55 < kept["whole"] / 600 < 0.7  # .5 + .5 (.5^3 + .5^3)


def test_the_question_is_paraphrased(root):
    data = dataset(root, train=True, task_pool={"emotion": 1.0}, enable_augmentation=True,
                   augmentations={"question": 0.5})  # fmt: skip
    first, *others = prompts.label_questions(LABELS)
    asked = [data.sample(0, epoch).prompt.split("[emotion] ")[1].removesuffix("  [/INST]") for epoch in range(400)]
    assert set(asked) == {first, *others}
    assert asked.count(first) / 400 == pytest.approx(0.5, abs=0.08)
    assert dataset(root, question="nine").sample(0).prompt.count(prompts.emotion_question(EMOTIONS9)) == 1


def test_a_frame_of_several_stands_for_the_clip(root, tmp_path):
    (root / "eva").rename(tmp_path / "old")
    writer = StoreWriter(root / "eva", {"dim": 3, "encoder": "eva"})
    for id, frames in (("a", 3), ("b", 1)):  # frame k holds k
        writer.add(id, torch.arange(float(frames)).repeat_interleave(5)[:, None].expand(-1, 3))
    writer.finish()
    data = dataset(root, train=True, enable_augmentation=True, augmentations={"frame": 1.0})
    drawn = [data.sample(0, epoch).values["image"] for epoch in range(90)]
    assert {float(value[0, 0]) for value in drawn} == {0.0, 1.0, 2.0}
    assert all(len(value.unique()) == 1 and value.shape == (4, 3) for value in drawn)
    still = dataset(root, train=True).features
    assert [float(still(CLIPS[0], frame)["image"][0, 0]) for frame in (None, 0.0, 0.34, 0.99)] == [1, 0, 1, 2]
    assert float(data.sample(1, 0).values["image"][0, 0]) == 0
    assert not still.broken


def test_which_augmentations_are_on():
    cfg = DataConfig(enable_augmentation=True, augmentation_prob=0.3)
    assert cfg.augment() == dict.fromkeys(AUGMENTATIONS, 0.3)
    cfg.augmentations = {"streams": 0.1, "noise": 0.2}
    assert list(cfg.augment().items()) == [("noise", 0.2), ("streams", 0.1)]
    cfg.enable_augmentation = False
    assert cfg.augment() == {}


# ---- the order and the choice of clips


def test_from_easy_to_hard(root):
    def told(words):
        return {"reason": "so " * words} if words else {}

    clips = [
        Clip("a", text="hi", label="sad", captions=told(9)),  # picture, face, voice, text
        Clip("b", label="sad", captions=told(1)),
        Clip("e", label="sad", captions=told(5)),  # no face
        Clip("f", text="hi", label="sad", captions=told(2)),  # no voice
        Clip("x", text="hi", label="sad", captions=told(7)),  # text alone
        Clip("y", text="hi", label="sad"),
    ]
    data = dataset(root, train=True, clips=clips)

    def ranked(data, how):
        return [(difficulty, data.clips[index].id) for difficulty, index in data.easy_to_hard(how)]

    assert ranked(data, "length") == [((0,), "y"), ((1,), "b"), ((2,), "f"), ((5,), "e"), ((7,), "x"), ((9,), "a")]
    assert ranked(data, "both") == [
        ((1, 0), "y"), ((1, 7), "x"), ((2, 5), "e"), ((3, 1), "b"), ((3, 2), "f"), ((4, 9), "a")
    ]  # fmt: skip
    assert [difficulty for difficulty, _ in ranked(data, "modalities")] == [(1,), (1,), (2,), (3,), (3,), (4,)]
    assert dict(map(reversed, ranked(dataset(root, True, clips=clips, streams=["voice", "text"]), "modalities"))) == {
        "a": (2,), "b": (1,), "e": (1,), "f": (1,), "x": (1,), "y": (1,)
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        dataset(root, train=True, clips=clips, task_pool={"emotion": 1.0}).easy_to_hard("both")
    assert str(error.value) == "--data.curriculum both: no clip has a description for the tasks emotion"


def test_equally_hard_clips_come_by_lot(root):
    clips = [Clip(f"{i:02}", text="hi", label="sad" if i < 20 else "happy") for i in range(40)]
    orders = [[index for _, index in dataset(root, True, seed, clips).easy_to_hard("modalities")] for seed in (0, 1)]
    assert all(5 < sum(index < 20 for index in order[:20]) < 15 for order in orders)  # not those of the list's start
    assert orders[0] != orders[1]
    backwards = dataset(root, True, 0, clips[::-1]).easy_to_hard("modalities")
    assert [39 - index for _, index in backwards] == orders[0]  # wherever they stand in the list


def test_what_may_be_replayed(tmp_path):
    rows = ["a,happy,train,anna,1", "b,sad,valid,bob,1", "c,sad,test,cleo,1", "d,angry,,dan,2", "e,happy,,eve,1",
            "f,neutral,,bob,1"]  # fmt: skip
    path = manifest(tmp_path / "old.csv", rows)
    cfg, said = DataConfig(labels=LABELS, replay=path, manifest="new.csv", fold="2"), []
    held_out = [Clip("x", speaker="anna")]
    assert ids(load_replay(cfg, held_out, said.append)) == "ef"
    assert said == ["replay: 4 of 6 clips left out, which validation or test know"]
    assert load_replay(replace(cfg, replay=None), held_out, silent) == []
    everyone = [Clip(name, speaker=name) for name in ("anna", "bob", "dan", "eve")]
    for changed, held_out, line in (
        (cfg, everyone, f"--data.replay {path}: none of its 6 clips may be trained on"),
        (replace(cfg, labels=["happy"]), [], f"{path}:3: unknown label 'sad' (labels: happy)"),
        (
            replace(cfg, replay="lists/EMER_NCE.txt"),
            [],
            "--data.replay lists/EMER_NCE.txt: that is a published test set",
        ),
    ):
        with pytest.raises(UserError) as error:
            load_replay(changed, held_out, silent)
        assert str(error.value) == line


def test_labels_that_training_lacks():
    clips = {"train": ["happy", "sad", None], "valid": ["sad", "neutral", "neutral"], "test": ["happy"]}
    clips = {split: [Clip(f"{i}", label=label) for i, label in enumerate(labels)] for split, labels in clips.items()}
    cfg = DataConfig(labels=LABELS)
    lines = [
        "warning: no training clip is labelled neutral, angry, of the labels the question offers",
        "warning: valid clips have labels that no training clip has: neutral (2)",
    ]
    assert label_gaps(cfg, clips) == lines
    cfg.question, cfg.labels = "six", ["happy", "sad", "neutral"]
    lines[0] = (
        "warning: no training clip is labelled neutral, angry, worried, surprise, of the labels the question offers"
    )
    assert label_gaps(cfg, clips) == lines
    assert label_gaps(DataConfig(labels=["happy", "sad"]), {"train": clips["train"], "valid": []}) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"question": "six"}, "--data.question six: does not offer fear, contempt, doubt of --data.labels"),
        ({"question": "nine", "labels": ["calm"]}, "--data.question nine: does not offer calm of --data.labels"),
        ({"labels": []}, "--data.labels: none are given"),
        ({"augmentations": {"noise": 0.5}}, "--data.augmentations: needs --data.enable-augmentation"),
        ({"augmentation_prob": 1.5}, "--data.augmentation-prob: 1.5 is no probability"),
        ({"speaker_swap": -0.5}, "--data.speaker-swap: -0.5 is no probability"),
        ({"enable_augmentation": True, "augmentations": {"noise": -1.0}},
         "--data.augmentations noise: -1 is no probability"),
        ({"curriculum_share": 0.0}, "--data.curriculum-share: 0 is not above 0 and at most 1"),
        ({"curriculum_epochs": -1}, "--data.curriculum-epochs: -1 is negative"),
        ({"replay_ratio": 1.0}, "--data.replay-ratio: 1 is not between 0 and 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, line):
    check(DataConfig())
    with pytest.raises(UserError) as error:
        check(DataConfig(**settings))
    assert str(error.value) == line


def test_evaluation_is_never_augmented(root):
    data = dataset(root, enable_augmentation=True, augmentation_prob=1.0)
    assert same(data.sample(0, 1), dataset(root).sample(0, 2))


def test_shuffled_labels_are_a_control(root):
    clips = [Clip(f"{i}", label=LABELS[i % 4]) for i in range(40)]
    data = dataset(root, train=True, clips=clips, shuffle_labels=True, task_pool={"emotion": 1.0})
    true = [clip.label for clip in clips]
    assert sorted(data.labels) == sorted(true)
    assert 2 < sum(map(str.__eq__, data.labels, true)) < 25
    assert [data.sample(i).target for i in range(40)] == data.labels
    assert [data.sample(i).label for i in range(40)] == data.labels
    assert dataset(root, clips=clips, shuffle_labels=True).labels == true  # evaluation keeps its labels


# ---- features


def test_features_lie_below_the_data_or_the_features_folder(root, tmp_path):
    (tmp_path / "features").mkdir()
    (root / "voice").rename(tmp_path / "features" / "voice")
    cfg = DataConfig(data_root=str(root), features_root=str(tmp_path / "features"), labels=LABELS)
    assert Features(ROWS, "eva", cfg)(CLIPS[0]).keys() == ROWS.keys()
    cfg = replace(cfg, features_root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as error:
        Features(ROWS, "eva", cfg)
    assert str(error.value) == (
        f"features voice not found (looked for {root}/voice and {tmp_path}/nowhere/voice); "
        "extract.py makes them from media"
    )


def test_statistics_are_those_of_the_rows(root):
    features = dataset(root).features
    found = features.statistics(CLIPS)
    values = [features(clip) for clip in CLIPS]
    rows = {name: torch.cat([value[name] for value in values if name in value]).double() for name in ROWS}
    assert {name: len(value) for name, value in rows.items()} == {"image": 24, "cls": 6, "face": 5, "voice": 5}
    for name, value in rows.items():
        mean, std = found[name]
        torch.testing.assert_close(mean.double(), value.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(std.double(), value.std(0, correction=0), atol=1e-6, rtol=1e-5)


def test_a_broken_picture_counts_as_absent(root, tmp_path):
    (root / "eva").rename(tmp_path / "old")
    writer = StoreWriter(root / "eva", {"dim": 3, "encoder": "eva"})
    for id, value in (("a", torch.full((5, 3), torch.nan)), ("b", torch.zeros(4, 3)), ("c", torch.zeros(5, 3))):
        writer.add(id, value)
    writer.finish()
    features = dataset(root).features
    assert [set(features(clip)) for clip in CLIPS[:3]] == [{"face", "voice"}] * 2 + [set(ROWS)]
    assert features.broken == {
        ("eva", "a"): "eva: id 'a' has non-finite values",
        ("eva", "b"): "eva: id 'b' has shape (4, 3), the model expects (5, 3)",
    }


def test_how_the_features_were_made_is_kept(root):
    assert dataset(root).features.describe() == {
        name: {"dim": width, "encoder": name} for name, width in (("face", 6), ("voice", 5), ("eva", 3))
    }


# ---- splits


def manifest(path, rows, header="id,label,split,speaker,fold"):
    path.write_text("\n".join([header, *rows, ""]))
    return str(path)


def ids(clips):
    return "".join(clip.id for clip in clips)


def test_a_manifest_names_its_splits(tmp_path):
    rows = ["a,happy,train,s1,1", "b,sad,valid,s2,1", "c,sad,test,s3,1", "d,angry,,s4,2", "e,happy,dev,s5,2"]
    cfg = DataConfig(manifest=manifest(tmp_path / "m.csv", rows), labels=LABELS)
    splits = load_splits(cfg, 0, True, silent)
    assert (ids(splits["train"]), ids(splits["valid"]), ids(load_test(cfg, silent))) == ("ad", "be", "c")
    cfg.fold = "2"  # its clips are the test, whatever their split
    splits = load_splits(cfg, 0, False, silent)
    assert (ids(splits["train"]), ids(splits["valid"]), ids(load_test(cfg, silent))) == ("a", "b", "cde")
    cfg = DataConfig(manifest=manifest(tmp_path / "m.csv", rows[:2]), labels=LABELS)
    with pytest.raises(UserError) as error:
        load_test(cfg, silent)
    assert str(error.value) == f"{tmp_path}/m.csv: no test clips (a split column with 'test', or --fold)"


def test_a_hold_out_takes_whole_speakers(tmp_path):
    rows = [f"{i:02},happy,,s{i // 5},1" for i in range(50)]
    cfg, said = DataConfig(manifest=manifest(tmp_path / "m.csv", rows), labels=LABELS, valid_share=0.2), []
    splits = load_splits(cfg, 3, True, said.append)
    speakers = [{clip.speaker for clip in clips} for clips in splits.values()]
    assert not speakers[0] & speakers[1]
    assert [len(clips) for clips in splits.values()] == [40, 10]
    assert said == ["valid: 10 clips held out by source video or speaker (seed 3)"]
    assert ids(load_splits(cfg, 4, True, silent)["valid"]) != ids(splits["valid"])
    assert len(load_splits(cfg, 3, False, silent)["train"]) == 50


def test_a_speaker_in_train_and_valid_is_a_leak(tmp_path):
    rows = ["a,happy,train,anna,1", "b,sad,valid,anna,1", "c,sad,train,bob,1"]
    cfg = DataConfig(manifest=manifest(tmp_path / "m.csv", rows), labels=LABELS)
    with pytest.raises(UserError) as error:
        load_splits(cfg, 0, True, silent)
    assert str(error.value) == "1 groups are in both train and valid, such as 'anna'"


def test_a_list_of_validation_clips(merr):
    said = []
    listed = merr.root / "dev.txt"
    listed.write_text("unseen_00000024 12 happy\nunseen_00000025 12 sad\n")
    cfg = DataConfig(data_root=str(merr.root), labels=merr.labels, valid_file="dev.txt")
    splits = load_splits(cfg, 0, False, said.append)
    assert [len(clips) for clips in splits.values()] == [24, 2]
    assert [clip.label for clip in load_test(cfg, silent)[:4]] == merr.labels
    assert said == [f"{merr.root}/MERR_coarse_grained.txt: 24 listed (the published list has 28,618), 24 used",
                    f"{listed}: 2 listed, 2 used"]  # fmt: skip
    with pytest.raises(UserError) as error:
        load_test(replace(cfg, test_file=None), silent)
    assert str(error.value) == "--test-file is not set"


# ---- features standardised by speaker

SPEAKERS = [replace(clip, speaker="x" if clip.id in "ace" else "y") for clip in CLIPS]


def test_utterance_features_are_relative_to_their_speaker(root):
    """Against the float64 formula over the speaker's own clips; pictures stay, what is missing stays missing."""
    raw, data = dataset(root), dataset(root, clips=SPEAKERS, speaker_norm=True)
    for i, clip in enumerate(SPEAKERS):
        before, after = raw.sample(i).values, data.sample(i).values
        assert before.keys() == after.keys()
        for name in before:
            if name in ("image", "cls"):
                assert torch.equal(before[name], after[name])
                continue
            own = [raw.sample(j).values for j, other in enumerate(SPEAKERS) if other.speaker == clip.speaker]
            x = np.concatenate([values[name].numpy() for values in own if name in values]).astype(np.float64)
            expected = (before[name].numpy().astype(np.float64) - x.mean(0)) / x.std(0)
            np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert data.coverage() == f"{raw.coverage()}; standardised by all clips of their speaker"
    assert torch.equal(data.only(["voice"]).sample(0).values["voice"], data.sample(0).values["voice"])


def test_a_speaker_is_standardised_over_clips_without_labels_too_but_not_over_broken_ones(root):
    clips = [replace(clip, label=None if clip.id == "c" else clip.label) for clip in SPEAKERS]
    labelled = dataset(root, train=True, clips=clips, speaker_norm=True, task_pool={"emotion": 1.0})
    everything = dataset(root, clips=SPEAKERS, speaker_norm=True)
    assert [clip.id for clip in labelled.clips] == list("abdef")
    assert torch.equal(labelled.sample(0).values["face"], everything.sample(0).values["face"])


def test_a_broken_feature_does_not_spoil_its_speaker(root, tmp_path):
    writer = StoreWriter(tmp_path / "more" / "voice", {"dim": 5, "encoder": "voice"})
    x = {id: FeatureStore(root / "voice")[id] for id in "abcde"}
    for id in x:
        writer.add(id, torch.full((5,), torch.nan) if id == "c" else x[id])
    writer.finish()
    cfg = DataConfig(data_root=str(tmp_path / "more"), labels=LABELS, speaker_norm=True)
    data = ClipData(SPEAKERS, Features({"voice": (1, 5)}, None, cfg), cfg, encode)
    assert "voice" not in data.sample(2).values
    sign = torch.sign(x["a"] - x["e"])  # of two values one is a deviation above their mean
    torch.testing.assert_close(data.sample(0).values["voice"][0], sign, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("clip", "problem"),
    [
        (replace(SPEAKERS[4], speaker=None), "--speaker-norm: clip 'e' names no speaker"),
        (
            replace(SPEAKERS[4], speaker="z"),
            "--speaker-norm: speaker z has one vector, which cannot be compared with others",
        ),
    ],
)
def test_clips_that_cannot_be_standardised_by_speaker(root, clip, problem):
    with pytest.raises(UserError) as error:
        dataset(root, clips=[*SPEAKERS[:4], clip, *SPEAKERS[5:]], speaker_norm=True)
    assert str(error.value) == problem


def test_training_clips_are_moved_to_other_voices(root):
    """A swapped feature has the mean and deviation of one place between two speakers, in every stream the same."""
    settings = {"clips": SPEAKERS, "speaker_swap": 1.0, "task_pool": {"emotion": 1.0}}
    raw, data = dataset(root), dataset(root, train=True, **settings)
    x = {}
    for speaker in "xy":
        for name in ("face", "voice"):
            own = [raw.sample(j).values for j, clip in enumerate(SPEAKERS) if clip.speaker == speaker]
            rows = np.concatenate([v[name].numpy() for v in own if name in v]).astype(np.float64)
            x[speaker, name] = rows.mean(0), rows.std(0)
    pairs = set()
    for epoch in range(40):
        before, after = raw.sample(0).values, data.sample(0, epoch).values
        assert torch.equal(before["image"], after["image"])
        fits = []
        for one, other in itertools.product("xy", repeat=2):
            mean, std = (np.stack([x[one, "face"][i], x[other, "face"][i]]) for i in range(2))
            z = (before["face"][0].numpy() - x["x", "face"][0]) / x["x", "face"][1]
            a, b = z * std[0] + mean[0], z * std[1] + mean[1]
            found = after["face"][0].numpy()
            share = float(((found - a) * (b - a)).sum() / max(((b - a) ** 2).sum(), 1e-12))
            if -1e-4 <= share <= 1 + 1e-4 and np.allclose(found, a + share * (b - a), atol=1e-4):
                fits.append((one, other, share))
        assert fits
        voices = [a + s * (b - a) for p, q, s in fits for a, b in [[self_to(before, x, v) for v in (p, q)]]]
        assert any(np.allclose(after["voice"][0].numpy(), voice, atol=1e-4) for voice in voices)
        pairs.add(round(float(after["face"][0, 0]), 4))
    assert len(pairs) > 10
    assert torch.equal(
        data.sample(0, 3).values["voice"], dataset(root, train=True, **settings).sample(0, 3).values["voice"]
    )
    for same in (dataset(root, train=True, speaker_norm=True, **settings), dataset(root, **settings)):
        norm = dataset(root, clips=SPEAKERS, speaker_norm=same.cfg.speaker_norm)
        assert torch.equal(same.sample(0).values["face"], norm.sample(0).values["face"])
    with pytest.raises(UserError) as error:
        dataset(root, train=True, speaker_swap=0.5)
    assert str(error.value) == "--data.speaker-swap: clip 'a' names no speaker"


def self_to(before, x, speaker):
    """Clip a's voice as the other speaker would have it."""
    z = (before["voice"][0].numpy() - x["x", "voice"][0]) / x["x", "voice"][1]
    return z * x[speaker, "voice"][1] + x[speaker, "voice"][0]
