"""eval.py: a checkpoint scored again gives the numbers of its training log, wherever it lies."""

import json
import os
import shutil
import sys

import pytest

import eval as script
from common import config
from common.config import UserError

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
    from data.manifest import write_manifest

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
        (["--ckpt", trained.run, "--bench", "mer2022"], "--bench: 'mer2022' is not one of mer2023, clips, mosei"),
        (["--ckpt", trained.run, "--prompt-layout", "trian"],
         "--prompt-layout: 'trian' is not one of train, original_eval, question_first"),
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
