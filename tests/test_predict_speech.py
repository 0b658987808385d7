"""predict.py with checkpoints of train_slm.py and meld_train.py: the numbers of their evaluation again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch

import eval as evaluation
import meld_train
import predict
import train_slm
from common import checkpoint, dist
from common.config import UserError
from data import mock_speech
from data.extraction import extract
from data.features import FeatureStore
from data.manifest import Clip, read_manifest, write_manifest
from data.meld import load_meld
from model import encoders
from tests.serving import request, served
from tests.training import error, run

WORDS = {"happy": "what a great day", "sad": "it is all over", "anger": "leave me alone now"}
KEYS = ["id", "available_modalities", "missing", "emotion", "confidence", "probabilities"]
SMALL = ["--device", "cpu", "--batch-size", 16, "--epochs", 2, "--lr", 3e-3, "--proj-dim", 16, "--hidden-dim", 16,
         "--model.clap.bag-dim", 4, "--seeds", 2]  # fmt: skip


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """48 clips of tones and words, four speakers in each split; one without words, one without sound."""
    root, rng = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    clips = []
    for i in range(48):
        label, split = [*WORDS][i % 3], ("train", "train", "valid", "test")[i // 12]
        t = np.arange(int(16000 * rng.uniform(0.1, 0.4))) / 16000
        wave = np.sin(2 * np.pi * (200 + 150 * (i % 3) + 20 * rng.normal()) * t) + 0.1 * rng.normal(size=len(t))
        soundfile.write(root / f"{i}.wav", 0.3 * wave.astype(np.float32), 16000)
        clips.append(Clip(f"c{i}", str(root / f"{i}.wav"), f"{WORDS[label]} {i}", label, split=split,
                          speaker=f"{split}{i % 4}"))  # fmt: skip
    clips[40].text = clips[41].path = None
    write_manifest(root / "manifest.csv", clips)
    here = dist.ranks("cpu")
    for name, encoder, pooling in (("audio", "logmel", "stats"), ("frames", "logmel", "frames"),
                                   ("text", "hashtext", "ids")):  # fmt: skip
        extract(clips, encoders.load(encoder), pooling, root / name, here, say=lambda _: None)
    return root


@pytest.fixture(scope="module")
def trained(spoken, tmp_path_factory):
    """A run on vectors of sound and on hashed words."""
    return train(train_slm, tmp_path_factory.mktemp("slm") / "out", "--data-root", spoken)


@pytest.fixture(scope="module")
def by_speaker(spoken, tmp_path_factory):
    """Two runs with sound standardised by speaker: frames, and vectors beside frames."""
    both, out = f"audio={spoken / 'frames'},stats={spoken / 'audio'}", tmp_path_factory.mktemp("norm")
    argv = ["--data-root", spoken, "--speaker-norm", "--stores"]
    return {
        "frames": train(train_slm, out / "frames", *argv, f"audio={spoken / 'frames'}"),
        "stats": train(train_slm, out / "stats", *argv, both),
    }


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A small MELD, and a run on its words with what was said before."""
    root = tmp_path_factory.mktemp("meld")
    with mock.patch.dict(mock_speech.SIZES, meld={"train": 60, "valid": 24, "test": 24}):
        mock_speech.make_mock(root / "data", "meld")
    for name in ("audio", "text"):
        shutil.rmtree(root / "data" / name)
    argv = ["--data-root", root / "data", "--features-root", root / "features", "--context", 2, "--device", "cpu",
            "--epochs", 2, "--bag-dim", 4, "--hidden-dim", 16, "--lr", 1e-2, "--seeds", 2]  # fmt: skip
    assert run(meld_train, [*argv, "--out", root / "out"]) == 0
    clips = [clip for clip in load_meld(root / "data", lambda _: None) if clip.split == "test"]
    return root / "out", clips


def train(script, out, *argv):
    assert run(script, [*argv, *SMALL, "--out", out]) == 0
    return out


def rows(run):
    """Clip id -> the row of the evaluation at the end of training."""
    file = next((run / "eval").rglob("predictions.jsonl"))
    return {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}


def unseen(spoken):
    return [clip for clip in read_manifest(spoken / "manifest.csv") if clip.split == "test"]


def same(result, row):
    return result["emotion"] == row["prediction"] and result["probabilities"] == pytest.approx(
        row["probabilities"], abs=1e-5
    )


def answers(predictor, clips, size=4):
    return {result["id"]: result for result in predict.predictions(predictor, clips, None, size)}


# ---- sound and words


def test_a_clip_gets_the_row_of_the_evaluation(spoken, trained):
    predictor, expected = predict.load(trained), rows(trained)
    assert len({str(row["probabilities"]) for row in expected.values()}) == 12
    for clip in unseen(spoken):
        result = predictor(clip)
        assert list(result) == KEYS
        assert same(result, expected[clip.id]), clip.id
        assert result["confidence"] == max(result["probabilities"].values())
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    batched = answers(predictor, unseen(spoken), 5)
    assert list(batched) == [*expected]
    assert all(same(result, expected[id]) for id, result in batched.items())


def test_over_http_a_clip_gets_the_same_answer(spoken, trained, tmp_path):
    expected = rows(trained)
    with served(predict.load(trained), tmp_path, root=spoken) as server:
        for clip in unseen(spoken)[:3]:
            body = {"data": [str(Path(clip.path).relative_to(spoken)), None, clip.text]}
            status, answer, _ = request(server.port, "POST", "/api/predict", body)
            assert (status, answer["label"]) == (200, expected[clip.id]["prediction"])
            assert answer["probabilities"] == pytest.approx(expected[clip.id]["probabilities"], abs=6e-5)
        status, answer, _ = request(server.port, "POST", "/api/predict", {"data": [None, "Why?", "Well."]})
        assert (status, answer["code"]) == (400, "bad_request")


def test_what_is_not_there_is_missing(spoken, trained, capsys):
    predictor, expected, clips = predict.load(trained), rows(trained), {clip.id: clip for clip in unseen(spoken)}
    result = predictor(clips["c40"])
    assert (result["available_modalities"], result["missing"]) == (["audio"], {"text": "c40: no text"})
    result = predictor(clips["c41"])
    assert (result["available_modalities"], result["missing"]) == (["text"], {"audio": "audio: no audio given"})
    words = predictor(text=clips["c41"].text)
    assert same(words, expected["c41"])
    assert predictor(text="...", audio=clips["c40"].path)["missing"] == {"text": "text: empty"}
    with pytest.raises(predict.MediaError) as problem:
        predictor()
    assert str(problem.value) == "clip: nothing to go by (audio: no audio given; clip: no text)"
    with pytest.raises(UserError, match="answers no questions"):
        predictor(clips["c40"], question="[reason] Why?")
    argv = ["--ckpt", trained, "--input", clips["c42"].path, "--text", clips["c42"].text]
    assert run(predict, argv) == 0
    label = expected["c42"]["prediction"]
    assert capsys.readouterr().out.splitlines()[1].startswith(f"42: {label}  [{label} ")
    for option, value in (("--temperature", 0.5), ("--question", "[reason] Why?")):
        assert error(predict, [*argv, option, value], capsys) == f"{option}: not read by this checkpoint"
    line = error(evaluation, ["--ckpt", trained, "--balance", 0.5], capsys)
    assert line == "--balance: not read by the benchmark slm"


def test_features_in_place_of_a_clip(spoken, trained, monkeypatch):
    monkeypatch.setattr(encoders, "load", None)  # they are not needed
    predictor, expected = predict.load(trained), rows(trained)
    stores = {name: FeatureStore(spoken / name) for name in ("audio", "text")}
    for id in ("c42", "c43"):
        given = {"audio": stores["audio"][id].numpy(), "text": stores["text"][id].tolist()}
        result = predictor(features=given)
        assert result["available_modalities"] == ["audio", "text"]
        assert same(result, expected[id])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"audio": np.ones(7)}, "clip: audio has shape (1, 7), the model expects (T, 504)"),
        ({"audio": np.ones((3, 504))}, "clip: audio has 3 frames, the model expects one vector"),
        ({"video": np.ones(7)}, "clip: features 'video', the model has audio, text"),
        ({"text": [3, 2**16]}, "clip: text must be whole numbers (T,) from 0 to 65535"),
        ({"text": [0.5]}, "clip: text must be whole numbers (T,) from 0 to 65535"),
    ],
)
def test_features_of_another_model(trained, given, problem):
    with pytest.raises(UserError) as found:
        predict.load(trained)(features=given)
    assert str(found.value) == problem


def test_values_that_are_no_numbers_and_a_broken_file(spoken, trained, tmp_path):
    predictor = predict.load(trained)
    result = predictor(features={"audio": np.full(504, np.nan)}, text="well")
    assert result["missing"] == {"audio": "audio: no finite value"}
    partly = np.ones(504)
    partly[3] = np.inf
    assert np.isfinite([*predictor(features={"audio": partly})["probabilities"].values()]).all()
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    found = answers(predictor, [Clip("a", str(tmp_path / "broken.wav")), unseen(spoken)[0]])
    assert list(found["a"]) == ["id", "error"]
    assert same(found["c36"], rows(trained)["c36"])


# ---- sound standardised by speaker


@pytest.mark.parametrize("kind", ["frames", "stats"])
def test_a_manifest_is_standardised_by_its_speakers(spoken, by_speaker, kind):
    found, expected = answers(predict.load(by_speaker[kind]), unseen(spoken), 1), rows(by_speaker[kind])
    assert list(found) == [*expected]
    for id, result in found.items():
        assert same(result, expected[id]), id
        assert "speaker" not in result["missing"]


def test_the_only_clip_of_a_speaker(spoken, by_speaker):
    clip, problem = unseen(spoken)[0], "no other clip of its speaker is known, by which the sound would be standardised"
    result = predict.load(by_speaker["frames"])(clip)
    assert result["missing"] == {"speaker": problem}
    predictor = predict.load(by_speaker["stats"])
    with pytest.raises(UserError) as found:
        predictor(clip)
    assert str(found.value) == f"c36: {problem} (a manifest can name it)"
    assert predictor(text="what a day")["available_modalities"] == ["text"]
    others = answers(predictor, [replace(clip, speaker=None), *unseen(spoken)[4:]], 99)
    assert list(others["c36"]) == ["id", "error"]
    assert "probabilities" in others["c40"]


# ---- a dialogue


def test_a_manifest_has_what_was_said_before(series, tmp_path):
    out, clips = series
    write_manifest(tmp_path / "test.csv", clips)
    expected, predictor = rows(out), predict.load(out)
    for size in (1, 100):
        found = answers(predictor, read_manifest(tmp_path / "test.csv"), size)
        assert list(found) == [*expected]
        assert all(same(result, expected[id]) for id, result in found.items())
    firsts = [id for id in found if id.endswith("utt0")]
    assert [id for id, result in found.items() if result["missing"]] == firsts
    assert found[firsts[0]]["missing"] == {"context": "no earlier utterance of its dialogue is known"}


def test_an_utterance_alone_is_the_first_of_its_dialogue(series):
    out, clips = series
    predictor, expected = predict.load(out), rows(out)
    first, second = clips[:2]
    assert same(predictor(first), expected[first.id])
    result = predictor(second)
    assert not same(result, expected[second.id])
    assert result["missing"] == {"context": "no earlier utterance of its dialogue is known"}


def test_batches_keep_together_what_belongs_together():
    clips = [Clip(str(i), dialogue=name) for i, name in enumerate(["a", "b", "a", None, None, "c", "c", "c"])]

    def ids(size, together):
        return ["".join(clip.id for clip in part) for part in predict.batches(clips, size, together)]

    assert ids(3, None) == ["012", "345", "67"]
    assert ids(1, "dialogue") == ["012", "3", "4", "567"]
    assert ids(4, "dialogue") == ["0123", "4567"]
    assert ids(99, "dialogue") == ["01234567"]
    assert list(predict.batches([], 3, "dialogue")) == []


# ---- other checkpoints


def test_projectors_predict_no_emotion(tmp_path, capsys):
    checkpoint.save(tmp_path, "epoch_001", torch.nn.Linear(1, 1), {}, {"step": 1, "system": "clap"}, {})
    line = error(predict, ["--ckpt", tmp_path, "--input", __file__], capsys)
    problem = "projectors predict no emotion; train_slm.py --clap-ckpt makes a classifier of them"
    assert line == f"{tmp_path / 'epoch_001'}: {problem}"
