"""Scores of the multimodal model: the same from one process and two, the labels chosen by their likelihood."""

import itertools
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from common import config, dist
from common.config import UserError
from data.clips import ClipData, DataConfig, Features
from data.features import StoreWriter
from data.manifest import Clip
from evals import emotion
from evals.emotion import DecodeConfig
from model import mllm
from model.mllm import MllmConfig, pack

LABELS = ["happy", "sad", "neutral", "angry"]
HERE = dist.Ranks()


@pytest.fixture(scope="module")
def world(merr, tmp_path_factory):
    """A model with random adapters and 101 clips of prompts that differ in length, some without a stream."""
    root = tmp_path_factory.mktemp("clips")
    noise = torch.Generator().manual_seed(0)
    writers = {name: StoreWriter(root / name, {"dim": width}) for name, width in (("voice", 5), ("patches", 3))}
    clips = []
    for i in range(101):
        text = None if i % 5 == 0 else "we really leave today " * (1 + i % 4)
        clip = Clip(f"clip{i:03}", text=text, label=LABELS[i % 4], captions={"reason": f"{'very ' * (i % 3)}tense"})
        if i % 7:
            writers["voice"].add(clip.id, torch.randn(5, generator=noise))
        writers["patches"].add(clip.id, torch.randn(17, 3, generator=noise))
        clips.append(clip)
    for writer in writers.values():
        writer.finish()
    cfg = config.from_dict(MllmConfig, merr.config["model"])
    model, tokenizer = mllm.build(cfg, torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    data_cfg = DataConfig(data_root=str(root), labels=LABELS)
    data = ClipData(clips, Features(cfg.rows(), cfg.visual, data_cfg), data_cfg, tokenizer.encode)
    return model.train(), tokenizer, data


def evaluated(world, cfg):
    here = dist.setup("cpu")
    model, tokenizer, data = world
    asked = [data.sample(i, task="reason") for i in range(here.rank, len(data), here.world)]
    loss = emotion.loss(model, asked, here, 8, nullcontext)
    return emotion.evaluate(model, tokenizer, data, LABELS, cfg, here), loss


@pytest.mark.parametrize("decode", ["score", "generate"])
def test_two_processes_give_the_records_of_one(world, ranks, decode):
    cfg = DecodeConfig(decode=decode, max_new_tokens=5)
    [((scores, records), loss)] = ranks(1, evaluated, world, cfg)
    both = ranks(2, evaluated, world, cfg)
    assert [record["id"] for record in records] == [f"clip{i:03}" for i in range(101)]
    assert scores["clips"] == 101
    assert len({record["answer"] for record in records}) > 1
    for (shared, parts), shared_loss in both:
        assert shared == scores
        assert shared_loss == pytest.approx(loss, rel=1e-6)
        for part, record in zip(parts, records, strict=True):
            part, record = dict(part), dict(record)
            # the matrix library adds in another order when a batch has other rows
            likely, expected = part.pop("probabilities", {}), record.pop("probabilities", {})
            assert likely == pytest.approx(expected, abs=1e-5)
            assert part == record
    assert world[0].training  # as it was before


def test_the_label_is_the_likeliest_answer(world):
    model, tokenizer, data = world
    _, records = emotion.evaluate(model, tokenizer, data, LABELS, DecodeConfig(), HERE, limit=9)
    assert len(records) == 9
    model.eval()
    for i, record in enumerate(records):
        sample = data.sample(i)
        likelihoods = []
        for label in LABELS:
            sample.answer = tokenizer.encode(f"{label}</s>")
            likelihoods.append(-model(pack([sample], model.cfg)).item())
        expected = torch.tensor(likelihoods).softmax(0)
        assert list(record["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert record["prediction"] == LABELS[int(expected.argmax())]
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert record["label"] == data.clips[i].label


def test_balanced_labels_are_divided_by_how_often_they_were_trained(world):
    model, tokenizer, data = world
    counts = {"happy": 90, "sad": 9, "angry": 30, "calm": 5}  # neutral never
    plain = emotion.evaluate(model, tokenizer, data, LABELS, DecodeConfig(), HERE, limit=20, counts=counts)[1]
    made = emotion.evaluate(model, tokenizer, data, LABELS, DecodeConfig(balance=0.7), HERE, limit=20, counts=counts)[1]
    for before, after in zip(plain, made, strict=True):
        p = {label: before["probabilities"][label] / counts.get(label, 43) ** 0.7 for label in LABELS}  # 43: the mean
        expected = {label: value / sum(p.values()) for label, value in p.items()}
        assert after["probabilities"] == pytest.approx(expected, rel=1e-5)
        assert after["prediction"] == max(expected, key=lambda label: expected[label]) == after["answer"]
    assert [r["prediction"] for r in plain] != [r["prediction"] for r in made]
    unknown = emotion.evaluate(model, tokenizer, data, LABELS, DecodeConfig(balance=0.7), HERE, limit=20)[1]
    assert unknown == plain  # nothing is known of any
    extreme = emotion.balanced(torch.tensor([[0.9, 0.1, 0.0]]), ["a", "b", "c"], {"a": 10**6, "b": 1, "c": 1}, 40.0)
    assert extreme.tolist() == [[0.0, 1.0, 0.0]]


def test_the_loss_is_a_mean_over_answer_tokens(world):
    model, _, data = world
    model.eval()
    samples = [data.sample(i, task="reason") for i in range(len(data))]
    total = sum(model(pack([sample], model.cfg)).item() for sample in samples)
    mean = total / sum(len(sample.answer) for sample in samples)
    assert emotion.loss(model, samples, HERE, 16, nullcontext) == pytest.approx(mean, rel=1e-5)


def test_clips_of_other_labels_are_left_out(world):
    model, tokenizer, data = world
    scores, records = emotion.evaluate(model, tokenizer, data, ["sad", "happy"], DecodeConfig(), HERE)
    assert {record["label"] for record in records} == {"sad", "happy"}
    assert len(scores["confusion"]) == 2
    with pytest.raises(UserError) as error:
        emotion.evaluate(model, tokenizer, data, ["calm", "doubt"], DecodeConfig(), HERE)
    assert str(error.value) == "none of the 101 clips has one of the labels calm, doubt: nothing to score"


def record(label, prediction, answer=""):
    return {"id": "a", "label": label, "prediction": prediction, "answer": answer, "task": "emotion", "target": label}


def test_an_answer_without_a_label():
    records = [record("sad", None), record("neutral", None), record("sad", "sad"), record("happy", "sad")]
    robust = emotion.score(records, LABELS)
    assert (robust["accuracy"], robust["invalid"], robust["clips"]) == (0.25, 0.5, 4)
    assert sum(map(sum, robust["confusion"])) == 2
    original = emotion.score(records, LABELS, "original")  # counts as neutral
    assert (original["accuracy"], original["invalid"]) == (0.5, 0.5)
    assert original["majority"]["accuracy"] == 0.5
    assert original["majority"]["label"] == "sad"


def test_sampling_repeats_with_its_seed(world):
    model, tokenizer, data = world
    cfg = DecodeConfig(decode="generate", temperature=1.0, max_new_tokens=6)
    one, two, other = (
        [r["answer"] for r in emotion.evaluate(model, tokenizer, data, LABELS, cfg, HERE, seed=seed, limit=12)[1]]
        for seed in (3, 3, 4)
    )
    assert one == two
    assert one != other


def test_a_question_of_a_list_of_labels(world):
    _, _, data = world
    assert "represents: happy, sad, neutral, angry." in data.sample(0).prompt
    view = ClipData(data.clips, data.features, replace(data.cfg, labels=["sad", "happy"]), data.encode)
    assert "represents: sad, happy." in view.sample(0).prompt


def test_an_answer_is_seen_growing(world):
    model, tokenizer, data = world
    model.eval()
    samples = [data.sample(i, task="reason") for i in range(20)]
    cfg, grown = DecodeConfig(decode="generate", max_new_tokens=6), {}

    def follow(id, text):
        grown.setdefault(id, []).append(text)
        return True

    followed = emotion.answer(model, tokenizer, samples, LABELS, cfg, follow=follow)
    assert followed == emotion.answer(model, tokenizer, samples, LABELS, cfg)
    for record in followed:
        texts = grown.get(record["id"], [""])
        assert texts[-1] == record["answer"].rstrip("\ufffd")  # bytes that make no character yet wait for more
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert max(map(len, grown.values())) > 1
    assert len(emotion.answer(model, tokenizer, samples, LABELS, cfg, follow=lambda id, text: False)) == 20


def test_compiled_steps_need_a_compiler(monkeypatch):
    asked = DecodeConfig(decode="generate", compile_steps=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^--compile-steps: needs a C.. compiler, and there is no no-such-compiler$"):
        emotion.check(asked, True)
    monkeypatch.setenv("CXX", sys.executable)  # any program
    emotion.check(asked, True)
