"""eval.py: a checkpoint scored again gives the numbers of its training log, wherever it lies."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
import yaml

import eval as script
import meld_train
import train_clap
import train_slm
from common import checkpoint, config
from common.config import UserError
from data.manifest import read_manifest, write_manifest
from evals.openset import Synonyms
from tests.training import changed_lines, make_lines, make_meld
from tests.training import error as refused_line
from tests.training import run as train

SCORES = ("accuracy", "uar", "weighted_f1")


def run(*argv):
    script.main(config.load(script.Config, list(map(str, argv))))


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return metrics, records


def line(scores):
    """The scores as a person reads them in the log."""
    return (
        f"accuracy {scores['accuracy']:.4f}  uar {scores['uar']:.4f}  weighted_f1 {scores['weighted_f1']:.4f}  invalid "
        f"{scores['invalid']:.1%}  ({scores['clips']} clips; majority: accuracy {scores['majority']['accuracy']:.4f} "
        f"weighted_f1 {scores['majority']['weighted_f1']:.4f})"
    )


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/best"])
def test_eval_prints_the_numbers_of_the_training_log(trained, tmp_path, capsys, place):
    run("--ckpt", trained.run / place, "--out", tmp_path)
    said = capsys.readouterr().out
    tested = json.loads((trained.run / "results.json").read_text())["test"]["score"]
    metrics, records = read(tmp_path)
    for name in (*SCORES, "macro_f1", "confusion", "per_class", "invalid", "clips", "majority"):
        assert metrics[name] == tested[name], name
    assert f"\nscore: {line(tested)}; written to {tmp_path}\n" in said
    assert f"\ntest, score      : {line(tested)}\n" in trained.said
    assert f"{trained.run}/checkpoints/{os.readlink(trained.run / 'checkpoints' / 'best')}: " in said
    assert len({record["prediction"] for record in records}) > 1  # else many a model would have these numbers
    assert len(records) == 10
    assert metrics["accuracy"] == sum(record["prediction"] == record["label"] for record in records) / 10
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_validation_clips_score_as_they_did_while_training(trained, tmp_path, capsys):
    from data.clips import DataConfig, load_splits

    state = json.loads((trained.run / "checkpoints" / "last" / "state.json").read_text())
    cfg = config.from_dict(DataConfig, state["config"]["data"])
    held_out = load_splits(cfg, state["config"]["seed"], True, lambda _: None)["valid"]
    write_manifest(tmp_path / "valid.csv", held_out)
    run("--ckpt", trained.run / "checkpoints" / "last", "--test-file", tmp_path / "valid.csv", "--out", tmp_path)
    metrics, _ = read(tmp_path)
    *_, logged = [record for line in (trained.run / "log.jsonl").read_text().splitlines()
                  if "valid/uar" in (record := json.loads(line))]  # fmt: skip
    assert logged["step"] == state["step"]
    for name in (*SCORES, "macro_f1", "invalid"):
        assert metrics[name] == logged[f"valid/{name}"], name
        assert f"valid/{name} {metrics[name]:<9.4g}" in trained.said
    assert metrics["clips"] == len(held_out)


def test_labels_are_balanced_by_what_the_checkpoint_tells_of_training(trained, tmp_path):
    folder = trained.run / "checkpoints" / "last"
    counts = json.loads((folder / "state.json").read_text())["counts"]["emotion"]
    run("--ckpt", folder, "--out", tmp_path / "plain")
    run("--ckpt", folder, "--balance", 1, "--out", tmp_path / "balanced")
    for before, after in zip(read(tmp_path / "plain")[1], read(tmp_path / "balanced")[1], strict=True):
        p = {label: value / counts[label] for label, value in before["probabilities"].items()}
        expected = {label: value / sum(p.values()) for label, value in p.items()}
        assert after["probabilities"] == pytest.approx(expected, rel=1e-4)
    assert read(tmp_path / "balanced")[0]["balance"] == 1.0

    old = shutil.copytree(folder.resolve(), tmp_path / "old")
    state = json.loads((old / "state.json").read_text())
    (old / "state.json").write_text(json.dumps({name: value for name, value in state.items() if name != "counts"}))
    for argv, error in (
        (["--ckpt", old, "--balance", 1], "--balance: the checkpoint does not tell how often each label was trained"),
        (["--ckpt", folder, "--balance", -1], "--balance: -1 is no power of 0 or more"),
        (["--ckpt", folder, "--balance", "nan"], "--balance: nan is no power of 0 or more"),
        (["--ckpt", folder, "--balance", 1, "--decode", "generate"],
         "--balance: generated answers have no probabilities of labels (--decode score)"),
    ):  # fmt: skip
        with pytest.raises(UserError) as raised:
            run(*argv)
        assert str(raised.value) == error


def test_a_copied_and_renamed_checkpoint_and_the_default_folder(trained, tmp_path):
    source = (trained.run / "checkpoints" / "best").resolve()
    copy = shutil.copytree(source, tmp_path / "elsewhere" / "my favourite")
    run("--ckpt", copy)
    run("--ckpt", trained.run, "--decode", "score")
    found, records = read(tmp_path / "elsewhere" / "eval" / "mer2023" / "my favourite")
    expected, again = read(trained.run / "eval" / "mer2023" / source.name)
    assert records == again
    assert found["checkpoint"] == str(copy)
    assert {key: value for key, value in found.items() if key != "checkpoint"} == {
        key: value for key, value in expected.items() if key != "checkpoint"
    }


def test_generated_answers_and_their_labels(trained, tmp_path, capsys):
    run("--ckpt", trained.run, "--decode", "generate", "--max-new-tokens", 4, "--out", tmp_path)
    metrics, records = read(tmp_path)
    tested = json.loads((trained.run / "results.json").read_text())["test"]["generate"]
    assert {name: metrics[name] for name in SCORES} == {name: tested[name] for name in SCORES}
    assert (metrics["decode"], metrics["max_new_tokens"], metrics["bench"]) == ("generate", 4, "mer2023")
    assert all("probabilities" not in record for record in records)


def test_some_clips_and_some_streams(trained, tmp_path):
    run("--ckpt", trained.run, "--limit", 3, "--streams", "voice", "--out", tmp_path)
    metrics, records = read(tmp_path)
    assert metrics["clips"] == len(records) == 3
    assert all("<voice>" in record["prompt"] and "<image>" not in record["prompt"] for record in records)


def test_the_prompt_layout_of_the_published_evaluation(trained, tmp_path):
    run("--ckpt", trained.run, "--limit", 1, "--prompt-layout", "original_eval", "--out", tmp_path)
    _, [record] = read(tmp_path)
    head = "<s><s>[INST] <video><image><voice><cls></video> <feature><FeatureHere></feature>"
    assert record["prompt"].startswith(head)


def test_mistakes(trained, tmp_path, monkeypatch, capsys):
    for argv, line in (
        ([], "--ckpt is needed (a run folder or a checkpoint)"),
        (["--ckpt", tmp_path], f"checkpoint {tmp_path}: holds no checkpoint (a run folder, its checkpoints/ or one "
         "checkpoint folder)"),
        (["--ckpt", trained.run, "--bench", "mer2022"],
         "--bench: 'mer2022' is not one of mer2023, mer2024, dfew, emer, mer-ov, clips, support, mosei, clap, slm, "
         "meld"),
        (["--ckpt", trained.run, "--bench", "meld"],
         "--bench meld: this checkpoint is a language model's (benchmarks: mer2023, mer2024, dfew, emer, mer-ov, "
         "clips)"),
        (["--ckpt", trained.run, "--truth", "x.csv"], "--truth: not read by the benchmark mer2023"),
        (["--ckpt", trained.run, "--bench", "dfew", "--fold", "6"], "--fold 6: dfew has the folds 1, 2, 3, 4, 5"),
        (["--ckpt", trained.run, "--bench", "dfew"], f"{trained.data}/DFEW_set_1_test.txt not found (--data-root names "
         "the folder of DFEW's lists and features)"),
        (["--ckpt", trained.run, "--bench", "emer", "--judge", "api"],
         "--judge api needs --judge-url and --judge-model"),
        (["--ckpt", trained.run, "--feature-folders", "HL-UTT=x"],
         "--feature-folders HL-UTT: the model reads image, cls, voice"),
        (["--answers", "a.csv"], "--answers needs --bench emer or mer-ov, and no --ckpt"),
        (["--ckpt", trained.run, "--prompt-layout", "trian"],
         "--prompt-layout: 'trian' is not one of train, original_eval, question_first, clean, original"),
        (["--ckpt", trained.run, "--test-file", "x.txt"],
         f"annotation_file 'x.txt' not found (looked for {trained.data}/x.txt and x.txt)"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            config.run(script.Config, script.main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"eval.py: error: {line}\n"


def test_features_of_another_tool_are_enough(merr, tmp_path, signals, capsys):
    """MER2023's own .npy folders: nothing here could have made them."""
    import train_llm

    out = tmp_path / "run"
    argv = [*merr.argv, "--out", out, "--epochs", 1, "--iters-per-epoch", 2, "--test"]
    train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    run("--ckpt", out, "--out", tmp_path / "scores")
    tested = json.loads((out / "results.json").read_text())["test"]["score"]
    metrics, _ = read(tmp_path / "scores")
    assert (metrics["bench"], metrics["labels"]) == ("clips", merr.labels)  # four labels are not MER2023's six
    assert metrics["confusion"] == tested["confusion"]


def test_a_checkpoint_of_another_base_is_refused(merr, tmp_path, signals):
    import train_llm

    base, out = shutil.copytree(merr.root / "base", tmp_path / "base"), tmp_path / "run"
    argv = [*merr.argv, "--llm", base, "--out", out, "--epochs", 1, "--iters-per-epoch", 1]
    train_llm.main(config.load(train_llm.Config, list(map(str, argv))))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError) as error:
        run("--ckpt", out)
    folder = (out / "checkpoints" / "last").resolve()
    assert str(error.value) == f"{folder}: was trained on other weights of {base} than those found here"


# ---- several checkpoints as one


@pytest.fixture(scope="module")
def adapted(merr, tmp_path_factory):
    """A LoRA run of three checkpoints."""
    import train_llm

    out = tmp_path_factory.mktemp("adapted") / "run"
    argv = [*merr.argv, "--out", out, "--epochs", 3, "--iters-per-epoch", 2]
    assert train(train_llm, argv) == 0
    return out


def test_checkpoints_combined_both_ways(adapted, tmp_path, capsys):
    folders = [adapted / "checkpoints" / f"epoch_{number:03d}" for number in (1, 2, 3)]
    each = []
    for number, folder in enumerate(folders):
        run("--ckpt", folder, "--out", tmp_path / str(number), "--device", "cpu")
        each.append(read(tmp_path / str(number))[1])
    assert each[0] != each[2]
    for how in ("weights", "predictions"):
        capsys.readouterr()
        run("--ckpt", *folders, "--combine", how, "--device", "cpu")
        place = adapted / "eval" / "clips" / f"epoch_001+epoch_002+epoch_003-{how}"
        said = capsys.readouterr().out
        assert f"{folders[0]}: {how} of {', '.join(map(str, folders))} combined, " in said
        assert "LoRA tensors" in said
        assert f"\nscore, {how} of 3 checkpoints: accuracy " in said
        assert said.endswith(f"written to {place}\n")
        metrics, records = read(place)
        assert metrics["combine"] == how
        assert metrics["checkpoint"] == " ".join(map(str, folders))
        assert len(records) == metrics["clips"] == 9
        for record, *single in zip(records, *each, strict=True):
            mean = {name: sum(one["probabilities"][name] for one in single) / 3 for name in record["probabilities"]}
            assert record["probabilities"] == pytest.approx(mean, abs=1e-6 if how == "predictions" else 0.2)
    run("--ckpt", *folders, "--combine", "predictions", "--decode", "generate", "--out", tmp_path / "told")
    assert read(tmp_path / "told")[0]["decode"] == "generate"


def test_a_checkpoint_with_itself_and_a_run_of_another_name(adapted, tmp_path):
    copy = shutil.copytree(adapted, tmp_path / "copy", symlinks=True)
    run("--ckpt", adapted, "--out", tmp_path / "alone")
    run("--ckpt", copy / "checkpoints", adapted, "--combine", "weights")
    metrics, records = read(copy / "eval" / "clips" / "epoch_003+run.epoch_003-weights")
    alone, expected = read(tmp_path / "alone")
    assert metrics["confusion"] == alone["confusion"]
    for record, other in zip(records, expected, strict=True):
        assert record["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_fully_trained_checkpoints_combine(trained, tmp_path):
    folders = [trained.run / "checkpoints" / name for name in ("epoch_012", "epoch_024")]
    for how in ("weights", "predictions"):
        run("--ckpt", *folders, "--combine", how, "--out", tmp_path / how)
        assert read(tmp_path / how)[0]["clips"] == 10


def test_what_does_not_combine(adapted, trained, tmp_path, capsys):
    a, b = adapted / "checkpoints" / "epoch_001", (trained.run / "checkpoints" / "last").resolve()
    other = checkpoint.save(tmp_path, "epoch_002", torch.nn.Linear(1, 1), {}, {"step": 1, "system": "mosei"}, {})
    for argv, line in (
        ([other, other, "--combine", "weights"],
         f"{other}: a checkpoint of mosei is not combined, only those of train_llm.py are"),
        ([other, other], "--ckpt: 2 checkpoints, which --combine weights or --combine predictions makes one of"),
        ([a, a], "--ckpt: 2 checkpoints, which --combine weights or --combine predictions makes one of"),
        ([a, "--combine", "weights"], "--combine weights: needs several checkpoints, --ckpt A B ..."),
        ([a, b, "--combine", "weights"], f"{b} does not combine with {a}: model.full is true, not false"),
        ([a, a, "--combine", "predictions", "--num-beams", 2], "--num-beams 2: --combine predictions has no beams"),
        ([a, "x.pth", "--combine", "weights"],
         "checkpoint x.pth: not found (a run folder, its checkpoints/ or one checkpoint folder)"),
        ([a, "--model.lora_r", 4], f"{a}: a checkpoint of a run knows its shape; the options model.* are of a .pth"),
    ):  # fmt: skip
        assert refused_line(script, ["--ckpt", *argv, "--device", "cpu"], capsys) == line


# ---- a published .pth


@pytest.fixture
def published(merr, tmp_path):
    """Emotion-LLaMA as it is released, tiny: a .pth, the YAML of its shape, and the same weights as a model here."""
    from tests.model.test_published import released

    cfg = {"lora_r": 4, "lora_alpha": 8, "features": {"voice": 5}, "visual": "patches", "visual_width": 3,
           "image_size": 56}  # fmt: skip
    argv = ["--llm", merr.root / "base", "--data-root", merr.root, "--device", "cpu"]
    state = released(merr.root / "base", cfg)
    torch.save({"model": state, "epoch": 29, "scaler": None}, tmp_path / "Emotion_LLaMA.pth")
    tree = {"model": {"arch": "minigpt_v2", "llama_model": str(merr.root / "base"), **cfg},
            "prompt_layout": "original_eval", "decode": {"extract": "original", "max_new_tokens": 5}}  # fmt: skip
    (tmp_path / "released.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "Emotion_LLaMA.pth", ["--cfg", tmp_path / "released.yaml", *argv]


@pytest.mark.parametrize("decode", ["generate", "score"])
def test_a_published_file_is_evaluated_as_it_is(published, merr, tmp_path, capsys, decode):
    path, argv = published
    run("--ckpt", path, *argv, "--decode", decode)
    metrics, records = read(tmp_path / "eval" / "mer2023" / "Emotion_LLaMA")
    said = capsys.readouterr().out
    assert f"{path}: 11/11 tensors of the language model, 4/4 LoRA tensors, 6/6 projection tensors; ignored: " in said
    assert metrics["clips"] == 9
    head = "<s><s>[INST] <video><image><voice><cls></video> <feature><FeatureHere></feature>"
    assert sum(record["prompt"].startswith(head) for record in records) > 4
    assert all("happy, sad, neutral, angry, worried, surprise, fear, contempt, doubt." in r["prompt"] for r in records)
    assert metrics["extract"] == "original"


def test_a_published_file_of_another_rank_is_refused(published, capsys):
    path, argv = published
    line = refused_line(script, ["--ckpt", path, *argv, "--model.lora_r", 8], capsys)
    assert line == f"{path}: LoRA of rank 4, the model's is 8"


# ---- the speech pipeline

LINES, MELD = ("clap", "slm"), ("meld", "finetuned", "scratch", "mode_b")
KIND = {name: "meld" if name in MELD else name for name in (*LINES, *MELD)}


def two_voices(root, name, *sizes):
    """Lines whose speakers all have several in every split."""
    lines = make_lines(root / f"{name}_drawn", *sizes)
    return changed_lines(lines, root / name, speaker=lambda clip: f"voice{clip.where[-1] in '02468'}")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """One run of every kind, with a dialogue's context or several seeds where it can have them; and their data."""
    root = tmp_path_factory.mktemp("speech")
    lines, meld = two_voices(root, "lines"), make_meld(root / "meld")
    small = ["--device", "cpu", "--epochs", 2, "--seeds", 2]
    wide = [*small, "--proj-dim", 16, "--batch-size", 20]
    stage3 = ["--data-root", meld, "--stage3-ckpt", root / "slm", *small, "--hidden-dim", 16]
    commands = {
        "clap": (train_clap, ["--data-root", lines, *wide]),
        "slm": (train_slm, ["--data-root", lines, *wide, "--hidden-dim", 16, "--clap-ckpt", root / "clap", "--ema", 0.5,
                            "--speaker-norm"]),
        "meld": (meld_train, [*stage3, "--context", 2]),
        "finetuned": (meld_train, [*stage3, "--finetune"]),
        "scratch": (meld_train, ["--data-root", meld, *small, "--context", 2, "--hidden-dim", 16]),
        "mode_b": (meld_train, [*stage3, "--mode", "B"]),
    }  # fmt: skip
    for name, (module, argv) in commands.items():
        assert train(module, [*argv, "--out", root / name]) == 0
    return root


def scores(run_folder):
    return json.loads((run_folder / "results.json").read_text())["test"]


def refused(*argv):
    with pytest.raises(UserError) as error:
        run(*argv, "--device", "cpu")
    return str(error.value)


@pytest.mark.parametrize("name", KIND)
def test_a_checkpoint_alone_gives_the_numbers_of_training(speech, tmp_path, monkeypatch, name, capsys):
    """To the last digit: the data, their place and how the speakers are normalised come from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    out = speech / name
    best = json.loads((out / "results.json").read_text())["best"]["checkpoint"]
    place = out / "eval" / KIND[name] / best
    shutil.rmtree(out / "eval", ignore_errors=True)  # what training left there
    run("--ckpt", out, "--device", "cpu")
    assert json.loads((place / "metrics.json").read_text()) == scores(out)
    said = capsys.readouterr().out
    assert f"{out}/checkpoints/{best}: " in said
    assert said.endswith(f"written to {place}\n")
    if KIND[name] == "clap":
        assert len(scores(out)["per_seed"]) == 2
        return
    _, records = read(place)
    assert len(records) == scores(out)["clips"] == 24
    assert (place / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "model, 2 seeds" in said
    assert "majority (" in said
    labels = scores(out)["labels"]
    assert len(labels) == (7 if KIND[name] == "meld" else 12)
    assert all(list(record["probabilities"]) == labels for record in records)


@pytest.mark.parametrize("name", ["clap", "slm", "meld", "scratch"])
def test_the_data_at_another_place(speech, tmp_path, name):
    """The same and others; stores that the checkpoint does not read do not matter."""
    root = speech / ("meld" if KIND[name] == "meld" else "lines")
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.copytree(copy / "audio", copy / "stats")
    argv = ("--ckpt", speech / name, "--bench", KIND[name], "--device", "cpu")
    run(*argv, "--data-root", copy, "--out", tmp_path / "same")
    assert json.loads((tmp_path / "same/metrics.json").read_text()) == scores(speech / name)
    other = make_meld(tmp_path / "other", 30, 12) if KIND[name] == "meld" else two_voices(tmp_path, "other", 30, 12)
    run(*argv, "--data-root", other, "--out", tmp_path / "new")
    found = json.loads((tmp_path / "new/metrics.json").read_text())
    assert found["pairs" if KIND[name] == "clap" else "clips"] == 12


def test_another_list_of_the_same_lines(speech, tmp_path):
    clips = read_manifest(speech / "lines" / "manifest.csv")
    write_manifest(tmp_path / "half.csv", [clip for clip in clips if clip.split != "test" or clip.id < "test_0013"])
    run("--ckpt", speech / "slm", "--manifest", tmp_path / "half.csv", "--device", "cpu", "--out", tmp_path / "half")
    metrics, records = read(tmp_path / "half")
    _, every = read(speech / "slm" / "eval" / "slm" / (speech / "slm/checkpoints/best").resolve().name)
    assert metrics["clips"] == 12
    for record in records:
        [same] = [other for other in every if other["id"] == record["id"]]
        assert same["label"] == record["label"]


@pytest.mark.parametrize("name", ["clap", "slm", "meld", "scratch"])
def test_features_that_the_checkpoint_was_not_trained_on(speech, tmp_path, name):
    copy = shutil.copytree(speech / ("lines" if name in LINES else "meld"), tmp_path / "copy")
    index = json.loads((copy / "audio" / "index.json").read_text())
    argv = ("--ckpt", speech / name, "--data-root", copy, "--out", tmp_path / "out")
    for key, value in (("encoder", "auristream"), ("pooling", "max"), ("dim", 33)):
        (copy / "audio" / "index.json").write_text(json.dumps(index | {key: value}))
        here = f"{copy}/audio: {key} is {value}, the checkpoint was trained on {index[key]}"
        there = f"audio: features have {key} {value}, the model was trained on {index[key]}"
        assert refused(*argv) == (here if name in LINES else there)
    shutil.rmtree(copy / "audio")
    gone = "no store audio/, which the checkpoint reads (--stores)"
    gone = gone if name in LINES else "no features of audio, which the checkpoint reads"
    assert refused(*argv) == f"{copy}: {gone}"
    shutil.rmtree(copy / "text")
    line = refused(*argv)
    assert line.startswith(f"{copy}: holds no store" if name in LINES else "audio: 'mock_audio' is no encoder here: ")
    assert not (tmp_path / "out").exists()


def test_lines_without_a_test_split_have_some_held_out_of_train(speech, tmp_path, capsys):
    lines = changed_lines(speech / "lines", tmp_path / "lines", split=lambda clip: clip.split.replace("test", "valid"))
    run("--ckpt", speech / "clap", "--data-root", lines, "--device", "cpu", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert f"test: {found['pairs']} clips of train held out by group (seed 0)\n" in said


def test_words_alone_are_read_as_in_training(tmp_path, monkeypatch, capsys):
    """What was made of them is kept, and made again where it is not at hand."""
    monkeypatch.chdir(tmp_path)
    meld = make_meld(tmp_path / "meld", 12, 6, stores=False)
    small = ["--device", "cpu", "--epochs", 1, "--hidden-dim", 16, "--bag-dim", 2]
    assert train(meld_train, ["--data-root", meld, *small, "--context", 2, "--out", "run"]) == 0
    for argv, line in ((), r"features/meld/hashtext-ids-\w{8}: 24 clips, width 65536, complete\n"), (
        ("--features-root", "elsewhere"), r"elsewhere/hashtext-ids-\w{8}: 24 clips, width 65536, "
    ):  # fmt: skip
        capsys.readouterr()
        run("--ckpt", "run", "--device", "cpu", "--out", "scores", *argv)
        assert re.search(line, capsys.readouterr().out)
        assert read(tmp_path / "scores")[0] == scores(tmp_path / "run")


@pytest.mark.parametrize("name", KIND)
def test_a_benchmark_of_another_kind(speech, name):
    for bench in ("mer2023", "mosei", *KIND.values()):
        if bench != KIND[name]:
            line = refused("--ckpt", speech / name, "--bench", bench)
            assert line == f"--bench {bench}: this checkpoint is of another kind (benchmark: {KIND[name]})"


# ---- free-form answers, folds, other names of folders


def test_explanations_scored_offline(trained, tmp_path, capsys):
    """emer end to end: answers, their figures, the judge's scores, and the same again from the files alone."""
    run("--ckpt", trained.run, "--bench", "emer", "--test-file", "MERR_fine_grained.txt", "--limit", 6,
        "--max-new-tokens", 12, "--out", tmp_path / "emer")  # fmt: skip
    said = capsys.readouterr().out
    metrics, records = read(tmp_path / "emer")
    captions = json.loads((trained.data / "MERR_fine_grained.json").read_text())
    assert len(records) == metrics["answers"] == 6
    assert (metrics["bench"], metrics["decode"]) == ("emer", "generate")
    for record in records:
        assert record["target"] == captions[record["id"]]["smp_reason_caption"]
        assert record["target"] not in record["prompt"]
        assert "[reason_v2]" in record["prompt"]
        assert record["judge"]["by"] == metrics["judge"]
        assert record["path"].endswith(".mp4")
    mean = sum(record["judge"]["clue_overlap"] for record in records) / 6
    assert metrics["clue_overlap_1_10"] == pytest.approx(mean)
    assert metrics["clue_overlap_0_10"] == pytest.approx((mean - 1) / 0.9)
    assert metrics["texts"]["distinct"] == len({record["answer"] for record in records})
    assert metrics["texts"]["captions_found"] == metrics["texts"]["captions_wanted"] == 24
    assert "judge: lexical (word overlap, offline" in said
    assert f"answers: {metrics['texts']['distinct']} distinct of 6" in said
    assert not (tmp_path / "emer" / "confusion.png").exists()

    scored = ("clue_overlap_1_10", "label_overlap_0_10", "unanswered", "dealt", "answers")
    run("--bench", "emer", "--answers", tmp_path / "emer" / "predictions.jsonl")
    again, _ = read(tmp_path / "emer" / "emer_lexical")
    assert {name: again[name] for name in scored} == {name: metrics[name] for name in scored}
    truth = trained.data / "MERR_fine_grained.json"
    run("--bench", "emer", "--answers", tmp_path / "emer" / "answers.csv", "--truth", truth, "--out", tmp_path / "csv")
    again, _ = read(tmp_path / "csv")
    assert {name: again[name] for name in scored} == {name: metrics[name] for name in scored}


def test_the_truths_of_emer_are_found_beside_its_list(trained, tmp_path, capsys):
    run("--ckpt", trained.run, "--bench", "emer", "--max-new-tokens", 2, "--limit", 2, "--out", tmp_path)
    _, records = read(tmp_path)
    rows = (trained.data / "gt-eng.csv").read_text().splitlines()
    for record in records:
        assert any(row.startswith(f"{record['id']},") and record["target"] in row for row in rows)


def test_answers_outlive_their_judge(trained, tmp_path, monkeypatch, capsys):
    """They are on disk before a judge is asked that turns out not to be there; the next one reads them there."""
    from evals import chat
    from tests.evals.stub import serving

    monkeypatch.setattr(chat, "WAITS", ())
    argv = ["--bench", "emer", "--test-file", "MERR_fine_grained.txt", "--limit", 3, "--max-new-tokens", 4]
    judge = ["--judge", "api", "--judge-model", "stub", "--judge-cache", tmp_path / "cache.jsonl"]
    with serving(lambda messages, n: "sad" if "this description" in messages[0]["content"] else "Score: 8") as server:
        dead = server.url
    with pytest.raises(UserError, match="none of the 3 answers could be scored"):
        run("--ckpt", trained.run, *argv, *judge, "--judge-url", dead, "--out", tmp_path / "run")
    metrics, records = read(tmp_path / "run")
    assert "clue_overlap_1_10" not in metrics
    assert len(records) == 3
    with serving(lambda messages, n: "sad" if "this description" in messages[0]["content"] else "Score: 8") as server:
        answers = tmp_path / "run" / "predictions.jsonl"
        run("--bench", "emer", "--answers", answers, *judge, "--judge-url", server.url, "--judge-price-in", 1)
    metrics, records = read(tmp_path / "run" / "emer_api")
    scored = [record for record in records if record["answer"]]
    assert all(record["judge"]["clue_overlap"] == 8 for record in scored)
    assert metrics["judge_usage"]["requests"] == len(server.requests)
    assert f"judge: {len(server.requests)} questions asked" in capsys.readouterr().out


def test_open_vocabulary(trained, tmp_path, capsys):
    argv = ["--ckpt", trained.run, "--bench", "mer-ov", "--max-new-tokens", 12]
    run(*argv, "--test-file", "relative_test3_NCEV.txt", "--out", tmp_path / "labels")
    metrics, records = read(tmp_path / "labels")
    words = Synonyms()
    assert all(set(record["openset"]["truth"]) == words.meanings(record["label"]) for record in records)
    assert metrics["clips"] == 10
    assert metrics["score"] == pytest.approx((metrics["set_accuracy"] + metrics["set_recall"]) / 2)
    assert "majority (" in capsys.readouterr().out
    ids = [record["id"] for record in records[:2]]
    (tmp_path / "gt.csv").write_text(f"name,openset\n{ids[0]},\"['joyful', 'excited']\"\n{ids[1]},['mad']\n")
    (tmp_path / "predict.csv").write_text(f"name,openset\n{ids[0]},['happy']\n{ids[1]},\"['furious', 'sad']\"\n")
    run(*argv, "--test-file", "relative_test3_NCEV.txt", "--truth", tmp_path / "gt.csv", "--out", tmp_path / "gt")
    metrics, _ = read(tmp_path / "gt")
    assert metrics["clips"] == metrics["texts"]["captions_found"] == 2
    assert metrics["texts"]["captions_wanted"] == 10
    run("--bench", "mer-ov", "--answers", tmp_path / "predict.csv", "--truth", tmp_path / "gt.csv")
    metrics, _ = read(tmp_path / "mer-ov_lexical")
    assert (metrics["set_accuracy"], metrics["set_recall"]) == (0.75, 0.75)


def folded(trained, root):
    """The mock's test clips as DFEW's five folds of two."""
    root.mkdir()
    clips = (trained.data / "relative_test3_NCEV.txt").read_text().split("\n")[:10]
    for fold in range(5):
        rows = [f"{line.split()[0]} 9 {(2 * fold + i) % 7}" for i, line in enumerate(clips[2 * fold : 2 * fold + 2])]
        (root / f"DFEW_set_{fold + 1}_test.txt").write_text("\n".join([*rows, ""]))
    return root


def test_folds_of_dfew(trained, tmp_path, capsys):
    from data.prompts import DFEW7

    root = folded(trained, tmp_path / "dfew")
    features = json.loads((trained.run / "results.json").read_text())["config"]["data"]["features_root"]
    argv = ["--ckpt", trained.run, "--bench", "dfew", "--data-root", root, "--features-root", features]
    run(*argv, "--out", tmp_path / "all")
    metrics, records = read(tmp_path / "all")
    assert "represents: happy, sad, neutral, angry, surprise, disgust, fear." in records[0]["prompt"]
    assert [record["label"] for record in records] == [DFEW7[i % 7] for i in range(10)]
    assert [record["fold"] for record in records] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for fold in range(5):
        pair = records[2 * fold : 2 * fold + 2]
        recall = sum(record["prediction"] == record["label"] for record in pair) / 2  # two labels of one clip each
        assert metrics["folds"][str(fold + 1)]["uar"] == metrics["folds"][str(fold + 1)]["war"] == recall
        assert metrics["folds"][str(fold + 1)]["majority_war"] == 0.5
    assert metrics["uar"] == pytest.approx(sum(row["uar"] for row in metrics["folds"].values()) / 5)
    assert metrics["majority"]["war"] == 0.5
    assert sum(map(sum, metrics["confusion"])) == 10
    assert (tmp_path / "all" / "confusion.png").exists()
    assert f"mean  {metrics['uar']:.4f}  {metrics['war']:.4f}     10" in capsys.readouterr().out
    run(*argv, "--fold", 3, "--out", tmp_path / "one")
    one, third = read(tmp_path / "one")
    assert list(one["folds"]) == ["3"]
    assert [r["id"] for r in third] == [r["id"] for r in records[4:6]]
    assert one["war"] == metrics["folds"]["3"]["war"]


def test_folders_of_mer2024(trained, tmp_path):
    """The list, six labels in the question, and streams whose folders are called otherwise."""
    root = tmp_path / "mer2024"
    root.mkdir()
    shutil.copy(trained.data / "relative_test3_NCEV.txt", root / "MER2024-noise_NCE.txt")
    made = json.loads((trained.run / "results.json").read_text())["config"]["data"]["features_root"]
    shutil.copytree(f"{made}/voice", root / "HL_23_UTT")
    shutil.copytree(f"{made}/patches", root / "patches")
    argv = ["--ckpt", trained.run, "--bench", "mer2024", "--data-root", root, "--features-root", root]
    with pytest.raises(UserError, match=f"features voice not found .looked for {root}/voice and"):
        run(*argv)
    run(*argv, "--feature-folders", "voice=HL_23_UTT", "--out", tmp_path / "out")
    metrics, records = read(tmp_path / "out")
    assert (metrics["clips"], metrics["labels"][-1]) == (10, "surprise")
    assert "<voice>" in records[0]["prompt"]
    assert "represents: happy, sad, neutral, angry, worried, surprise." in records[0]["prompt"]
    cfg = config.load(script.Config, ["--ckpt", "x"])
    data = script.DataConfig(data_root=str(root), features_root=str(root))
    streams = ["mae_340_UTT", "HL-UTT"]
    assert script.places(cfg, "mer2024", dict.fromkeys(streams), data) == {"HL-UTT": "HL_23_UTT"}
    assert script.places(cfg, "mer2023", dict.fromkeys(streams), data) == {}


def test_figures_of_generated_labels(trained, tmp_path, capsys):
    run("--ckpt", trained.run, "--decode", "generate", "--max-new-tokens", 4, "--out", tmp_path)
    metrics, records = read(tmp_path)
    assert metrics["texts"]["distinct"] == len({record["answer"] for record in records})
    assert f"answers: {metrics['texts']['distinct']} distinct of 10" in capsys.readouterr().out
