"""predict.py: the answers of eval.py from the raw clips, and a bad file among good ones."""

import io
import itertools
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import eval as evaluation
import predict
import train_llm
from common import config
from common.config import UserError
from data import prompts
from data.features import FeatureStore
from data.manifest import Clip, read_manifest, write_manifest
from data.merr import load_merr
from data.prompts import EMOTIONS6
from tests.conftest import handlers

KEYS = ["id", "available_modalities", "missing", "emotion", "confidence", "probabilities"]


def run(*argv):
    predict.main(config.load(predict.Config, list(map(str, argv))))


@pytest.fixture(scope="module")
def predictor(trained):
    return predict.load(trained.run)


@pytest.fixture(scope="module")
def clips(trained):
    return load_merr(trained.data, "relative_test3_NCEV.txt")[0]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Clip id -> eval.py's record."""
    out = tmp_path_factory.mktemp("eval")
    evaluation.main(config.load(evaluation.Config, ["--ckpt", str(trained.run), "--out", str(out)]))
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return {record["id"]: record for record in records}


def test_a_raw_clip_gets_the_answer_of_the_evaluation(predictor, clips, evaluated):
    assert len({record["prediction"] for record in evaluated.values()}) > 1
    for clip in clips:
        result, expected = predictor(clip.path, text=clip.text), evaluated[clip.id]
        assert list(result) == KEYS
        assert result["emotion"] == expected["prediction"]
        assert result["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
        assert list(result["probabilities"]) == list(EMOTIONS6)
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert result["confidence"] == max(result["probabilities"].values())
        assert (result["available_modalities"], result["missing"]) == (["voice", "patches", "text"], {})


def test_features_instead_of_media(trained, predictor, clips, evaluated):
    stores = {name: FeatureStore(trained.run.parent / "features" / name) for name in ("voice", "patches")}
    for clip in clips[:3]:
        values = {name: store[clip.id] for name, store in stores.items()}
        values["voice"] = values["voice"].numpy().tolist()
        result = predictor(features=values, text=clip.text)
        assert result["probabilities"] == pytest.approx(evaluated[clip.id]["probabilities"], abs=1e-5)
    with pytest.raises(UserError) as error:
        predictor(features={"voice": np.zeros(7)}, text="hello")
    assert str(error.value) == "clip: voice has shape (1, 7), the model expects (1, 504)"
    with pytest.raises(UserError) as error:
        predictor(features={"voice": np.full(504, np.nan)}, text="hello")
    assert str(error.value) == "clip: voice has non-finite values"


def test_what_is_not_given_is_missing(predictor, clips):
    result = predictor(text="I am so happy about it.")
    assert result["available_modalities"] == ["text"]
    assert result["missing"] == {"voice": "voice: no audio given", "patches": "patches: no video given"}
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    result = predictor(audio=clips[0].path)
    assert result["available_modalities"] == ["voice"]
    assert result["missing"] == {"patches": "patches: no video given", "text": "no transcript given"}
    assert predictor(video=clips[0].path)["available_modalities"] == ["patches"]
    for text in ("", "  "):  # nothing said is no transcript
        assert predictor(clips[0].path, text=text)["available_modalities"] == ["voice", "patches"]
    with pytest.raises(predict.MediaError) as error:
        predictor()
    assert str(error.value) == (
        "clip: nothing to go by (no transcript given; voice: no audio given; patches: no video given)"
    )


def test_a_question_of_ones_own(predictor, clips):
    predictor.decode.max_new_tokens = 5
    result = predictor(clips[0].path, question="[reason] Why?")
    assert list(result) == ["id", "available_modalities", "missing", "answer", "emotion"]
    sample, _ = predictor.sample(Clip("a", clips[0].path), "[reason] Why?")
    assert sample.prompt.endswith("</feature>  [reason] Why?  [/INST]")
    assert "probabilities" in predictor(clips[0].path, question="[emotion]")
    assert predictor.sample(Clip("a", clips[0].path), "[emotion]")[0].prompt == (
        predictor.sample(Clip("a", clips[0].path), None)[0].prompt
    )


def test_answers_are_followed_by_the_ids_of_their_clips(predictor, clips):
    predictor.decode.max_new_tokens, why, grown = 5, "[reason] Why?", {}
    samples, missing = [], {}
    for clip in clips[:3]:
        sample, missing[clip.id] = predictor.sample(clip, why)
        samples.append(sample)
    results = predictor.answer(samples, why, missing, lambda id, text: grown.setdefault(id, []).append(text) or True)
    assert {result["id"]: result["answer"] for result in results} == {id: texts[-1] for id, texts in grown.items()}
    assert results == predictor.answer(samples, why, missing)


def test_a_second_question_after_the_first(predictor, clips):
    """Llama 2's chat, laid out here with SentencePiece: <s>[INST] q1 [/INST] a1 </s><s>[INST] q2 [/INST]."""
    clip, encode = Clip("a", clips[0].path, text="hello"), predictor.tokenizer.pieces.encode
    bos, eos = predictor.tokenizer.pieces.bos_id(), predictor.tokenizer.pieces.eos_id()
    turns = [("[reason] Why?", "he smiles")]
    sample = predictor.sample(clip, "[emotion] Which?", turns=turns)[0]
    laid_out = [
        bos, *encode("[INST] <video>"), "image", *encode("</video> <feature>"), "voice", "cls",
        *encode("</feature> The person in video says: hello.  [reason] Why?  [/INST]"), *encode("he smiles "), eos,
        bos, *encode("[INST] [emotion] Which? [/INST]"),
    ]  # fmt: skip
    flat = itertools.chain.from_iterable([piece] if isinstance(piece, str) else piece for piece in sample.pieces)
    assert list(flat) == laid_out
    assert {name: value.shape for name, value in sample.values.items()} == predictor.mllm.cfg.rows()
    whole = predictor.sample(clip, "[emotion]", turns=[*turns, ("[emotion]", "happy")])[0].prompt
    asked = prompts.emotion_question(EMOTIONS6)
    assert whole.endswith(
        f"he smiles </s><s>[INST] [emotion] {asked} [/INST]happy </s><s>[INST] [emotion] {asked} [/INST]"
    )


def test_what_was_said_before_changes_the_answer(predictor, clips):
    alone = predictor(clips[0].path, text=clips[0].text)
    turns = [("[reason] Why?", "the voice is low and slow")]
    after = predictor(clips[0].path, text=clips[0].text, turns=turns)
    assert after["probabilities"] != pytest.approx(alone["probabilities"], abs=1e-4)
    assert list(after) == KEYS
    [batched] = predictor.batch([{"clip": clips[0].path, "text": clips[0].text, "turns": turns}])
    assert batched["probabilities"] == pytest.approx(after["probabilities"], abs=1e-6)


def chat(monkeypatch, questions, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{question}\n" for question in questions)))
    run("--chat", *argv)


def test_a_conversation_from_the_keyboard(trained, predictor, clips, monkeypatch, capsys):
    argv = ["--ckpt", trained.run, "--input", clips[0].path, "--text", clips[0].text, "--max-new-tokens", 5]
    chat(monkeypatch, ["[reason] Why?", "", "[emotion]"], *argv)
    *_, why, which = capsys.readouterr().out.splitlines()
    predictor.decode.max_new_tokens = 5
    clip = Clip(clips[0].id, clips[0].path, clips[0].text)
    first = predictor(clip, question="[reason] Why?")
    assert why == predict.line(first)
    second = predictor(clip, question="[emotion]", turns=[("[reason] Why?", first["answer"])])
    assert which == predict.line(second)
    assert which != predict.line(predictor(clip, question="[emotion]"))
    for more, line in (
        (["--input", trained.data / "video"], "--chat: is about one clip, not 34"),
        (["--question", "Why?"], "--chat: takes no --question"),
        (["--out", "answers.jsonl"], "--chat: takes no --out"),
    ):
        with pytest.raises(UserError) as error:
            chat(monkeypatch, [], *argv, *more)
        assert str(error.value) == line


@pytest.mark.parametrize("how", ["weights", "predictions"])
def test_checkpoints_combined(trained, clips, how):
    """The answers of eval.py with the same checkpoints; one twice is that one."""
    folders = [trained.run / "checkpoints" / name for name in ("epoch_012", "epoch_024")]
    each = [predict.load(folder)(clips[0].path, text=clips[0].text)["probabilities"] for folder in folders]
    both = predict.load(folders, combine=how)
    assert both.coverage.startswith(f"{how} of {folders[0]}, {folders[1]} combined, ")
    found = both(clips[0].path, text=clips[0].text)["probabilities"]
    if how == "predictions":
        mean = {name: (each[0][name] + each[1][name]) / 2 for name in found}
        assert found == pytest.approx(mean, abs=1e-6)
    twice = predict.load([folders[0]] * 2, combine=how)
    assert twice(clips[0].path, text=clips[0].text)["probabilities"] == pytest.approx(each[0], abs=1e-5)
    answer = both(clips[0].path, text=clips[0].text, question="[reason] Why?")
    assert isinstance(answer["answer"], str)


def test_a_published_file(merr, clips, tmp_path, capsys):
    """Emotion-LLaMA as it is released, tiny, on a picture that is encoded here; its voice another tool made."""
    from tests.model.test_published import released

    base = merr.root / "base"
    cfg = {"lora_r": 4, "lora_alpha": 8, "features": {"voice": 5}, "visual": "patches", "visual_width": 12,
           "visual_encoder": "framestats", "image_size": 56}  # fmt: skip
    torch.save({"model": released(base, cfg)}, tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": cfg, "prompt_layout": "original_eval"}))
    run("--ckpt", tmp_path / "x.pth", "--cfg", tmp_path / "x.yaml", "--llm", base, "--device", "cpu", "--input",
        clips[0].path, "--text", "we leave")  # fmt: skip
    said = capsys.readouterr().out
    assert "4/4 LoRA tensors, 6/6 projection tensors; ignored: " in said
    assert f"\n{clips[0].id}: " in said
    assert "(without voice)" in said


def test_a_folder_with_one_broken_file(trained, predictor, clips, tmp_path, capsys):
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for clip, name in zip(clips[:3], ("a.mp4", "c.mp4", "more/a.mp4"), strict=True):
        shutil.copy(clip.path, folder / name)
    (folder / "b.mp4").write_bytes(b"not a film")
    (folder / "notes.txt").write_text("not a clip")
    run("--ckpt", trained.run, "--input", folder, "--batch-size", 2, "--out", tmp_path / "answers.jsonl")
    results = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [result["id"] for result in results] == ["a.mp4", "b.mp4", "c.mp4", "more/a.mp4"]
    good = [result for result in results if result["id"] != "b.mp4"]
    for result, clip in zip(good, clips[:3], strict=True):
        assert result["probabilities"] == pytest.approx(predictor(clip.path)["probabilities"], abs=1e-5)
    broken = results[1]["error"]
    assert list(results[1]) == ["id", "error"]
    assert str(folder / "b.mp4") in broken
    said = capsys.readouterr().out.splitlines()
    assert said[2] == f"b.mp4: skipped: {broken}"
    emotion, confidence = results[0]["emotion"], results[0]["confidence"]
    assert said[1].startswith(f"a.mp4: {emotion}  [{emotion} {confidence:.2f}, ")
    assert said[1].endswith("]  (without text)")
    assert said[-1] == "1 of 4 clips could not be read"


def test_a_manifest(trained, clips, evaluated, tmp_path, capsys):
    rows = [f'{clip.id},{clip.path},"{clip.text}"' for clip in clips[:3]]
    (tmp_path / "clips.csv").write_text("\n".join(["id,path,text", *rows, "gone,gone.mp4,", ""]))
    run("--ckpt", trained.run, "--input", tmp_path / "clips.csv", "--out", tmp_path / "answers.jsonl")
    results = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [result.get("emotion") for result in results[:3]] == [evaluated[clip.id]["prediction"] for clip in clips[:3]]
    assert list(results[3]) == ["id", "error"]
    assert str(tmp_path / "gone.mp4") in results[3]["error"]


@pytest.fixture(scope="module")
def by_speaker(trained, clips, tmp_path_factory):
    """A run whose voices are standardised by speaker, and the manifest of its clips."""
    root = tmp_path_factory.mktemp("by_speaker")
    known = load_merr(trained.data, "MERR_coarse_grained.txt")[0]
    rows = [replace(clip, split=split, speaker=f"{split}{i % 2}", group=None)
            for split, part in (("train", known), ("test", clips)) for i, clip in enumerate(part)]  # fmt: skip
    write_manifest(root / "manifest.csv", rows)
    argv = ["--ckpt", trained.run, "--cfg", trained.run / "config.yaml", "--manifest", root / "manifest.csv",
            "--speaker-norm", "--epochs", 2, "--no-evaluate", "--no-save-best", "--out", root / "run"]  # fmt: skip
    with handlers():
        train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    return root


def test_a_checkpoint_says_that_speakers_are_standardised(by_speaker, clips, tmp_path, capsys):
    """eval.py and predict.py do as training did; a clip whose speaker is unknown or alone is refused."""
    evaluation.main(config.load(evaluation.Config, ["--ckpt", str(by_speaker / "run"), "--out", str(tmp_path)]))
    assert "; standardised by all clips of their speaker)" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    trained = json.loads((by_speaker / "run" / "results.json").read_text())["test"]["score"]
    assert metrics["speaker_norm"] is True
    assert (metrics["confusion"], metrics["uar"]) == (trained["confusion"], trained["uar"])
    expected = {r["id"]: r for r in map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())}
    model = predict.load(by_speaker / "run")
    rows = [clip for clip in read_manifest(by_speaker / "manifest.csv") if clip.split == "test"]
    found = {result["id"]: result for result in predict.predictions(model, rows, None, 1)}
    assert list(found) == [clip.id for clip in rows] == list(expected)
    for id, result in found.items():
        assert result["probabilities"] == pytest.approx(expected[id]["probabilities"], abs=1e-4)
    problem = "no other clip of its speaker is known, by which the sound would be standardised (a manifest can name it)"
    with pytest.raises(UserError) as error:
        model(rows[0])
    assert str(error.value) == f"{rows[0].id}: {problem}"
    others = [replace(rows[0], speaker=None), replace(rows[1], speaker=None), *rows[2:]]
    found = list(predict.predictions(model, others, None, 99))
    assert [list(result) for result in found[:2]] == [["id", "error"]] * 2
    assert all("emotion" in result for result in found[2:])
    assert model(text="what a day")["available_modalities"] == ["text"]


def test_one_file_and_its_words(trained, clips, evaluated, capsys):
    run("--ckpt", trained.run / "checkpoints" / "best", "--input", clips[0].path, "--text", clips[0].text)
    expected = evaluated[clips[0].id]["prediction"]
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{clips[0].id}: {expected}  [{expected} ")


def test_mistakes(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for argv, line in (
        ([], "--ckpt is needed (see --help)"),
        (["--ckpt", trained.run], "--input is needed (see --help)"),
        (["--ckpt", trained.run, "--input", tmp_path / "x.mp4"],
         f"--input '{tmp_path}/x.mp4': not found (a media file, a folder or a .csv/.jsonl manifest)"),
        (["--ckpt", trained.run, "--input", tmp_path / "x.csv"], f"{tmp_path}/x.csv not found"),
        (["--ckpt", trained.run, "--input", tmp_path / "empty"],
         f"--input {tmp_path}/empty: no media files ({', '.join(sorted(predict.MEDIA))})"),
        (["--ckpt", tmp_path / "none", "--input", trained.data / "video"],
         f"checkpoint {tmp_path}/none: not found (a run folder, its checkpoints/ or one checkpoint folder)"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            config.run(predict.Config, predict.main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"predict.py: error: {line}\n"


def test_features_of_another_tool_must_be_given(merr, tmp_path, signals):
    import train_llm

    out = tmp_path / "run"
    argv = [*merr.argv, "--out", out, "--epochs", 1, "--iters-per-epoch", 1]
    train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    predictor = predict.load(out)
    result = predictor(features={"voice": np.ones(5), "patches": torch.ones(17, 3)})
    assert result["available_modalities"] == ["voice", "patches"]
    assert list(result["probabilities"]) == merr.labels
    result = predictor(clip="film.mp4", text="we leave")
    assert result["missing"]["voice"] == "voice: made by another tool; pass its values as features"
