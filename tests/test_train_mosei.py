"""train_mosei.py as a user runs it: learning, killed, stopped and resumed, several seeds or processes, bad input."""

import csv
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation
import extract
import predict
import train_mosei
from common import checkpoint, config
from common.flat import set_lrs
from data.manifest import Clip, write_manifest
from data.mock_mosei import make_mock
from data.mosei import open_corpus
from evals import sentiment
from tests.conftest import FORK, drawn
from tests.serving import request, served
from tests.training import error, stopped_inside, weights
from tests.training import run as run_script

pytestmark = pytest.mark.usefixtures("signals")
EPOCHS = 4
# everything random is on: dropout, hidden modalities, noise
SMALL = ["--epochs", EPOCHS, "--batch-size", 8, "--fusion-dim", 16, "--lr", 1e-3, "--feature-noise", 0.1, "--no-test"]


def train(argv):
    return run_script(train_mosei, argv)


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """Intervals of a thousand draws take as long as a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "DRAWS", 20)
        yield


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosei")
    make_mock(folder, 150)
    open_corpus(folder, lambda _: None)
    return folder


@pytest.fixture
def fails(capsys):
    return lambda *argv: error(train_mosei, argv, capsys)


@pytest.fixture(scope="module")
def run(mock, tmp_path_factory):
    """A finished run with its test report."""
    out = tmp_path_factory.mktemp("run") / "out"
    argv = [arg for arg in SMALL if arg != "--no-test"]
    with drawn():
        assert train(["--data-dir", mock, *argv, "--out", out, "--histograms"]) == 0
    return out


# ---- what a run writes


def test_a_run_writes_what_the_guide_promises(run, capsys):
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {f"epoch_{n:03d}" for n in range(1, EPOCHS + 1)} | {"last", "best"} <= names
    results = json.loads((run / "results.json").read_text())
    assert set(results["test_metrics"]) == {"accuracy", "precision", "recall", "f1", "loss"}
    assert [point["epoch"] for point in results["history"]] == list(range(1, EPOCHS + 1))
    assert {"config", "timestamp", "commit", "seeds"} <= set(results)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()
    guide = {"Train/Loss", "Train/Accuracy", "Train/F1", "Val/Loss", "Val/Accuracy", "Val/F1", "Learning_Rate"}
    assert guide | {"hparam/test_accuracy", "hparam/test_f1"} <= set(tags["scalars"])
    gradients = [tag for tag in tags["histograms"] if tag.startswith("Gradients/")]
    assert any(events.Histograms(tag)[-1].histogram_value.sum_squares > 0 for tag in gradients)
    for file in ("curves.png", "eval/mosei/{best}/confusion.png", "eval/mosei/{best}/metrics.json"):
        assert (run / file.format(best=results["best"]["checkpoint"])).stat().st_size > 500


def test_best_is_the_epoch_of_the_lowest_valid_loss(run):
    results = json.loads((run / "results.json").read_text())
    losses = {point["epoch"]: point["Val/Loss"] for point in results["history"]}
    epoch = results["best"]["epochs"][0]
    assert results["best"]["value"] == losses[epoch] == min(losses.values())
    assert weights(run, "best") == weights(run, f"epoch_{epoch:03d}")


def test_eval_prints_the_numbers_of_the_training_run(run, tmp_path):
    evaluation.main(config.load(evaluation.Config, ["--ckpt", str(run), "--out", str(tmp_path)]))
    ours = json.loads((tmp_path / "metrics.json").read_text())
    theirs = json.loads((run / "results.json").read_text())["test"]
    assert ours == theirs
    rows = list(csv.DictReader(open(tmp_path / "predictions.csv")))
    right = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert right == ours["scores"]["accuracy"]["mean"]


def test_predictor_gives_what_the_report_counted(run, mock, tmp_path):
    evaluation.main(config.load(evaluation.Config, ["--ckpt", str(run), "--out", str(tmp_path)]))
    rows = list(csv.DictReader(open(tmp_path / "predictions.csv")))
    index = [row for row in json.loads((mock / "mosei_index.json").read_text()) if row["split"] == "test"]
    predictor = predict.load(run)
    items = [{"features": {m: row[f"{m}_features"] for m in ("text", "audio", "video")}} for row in index]
    found = predictor.batch(items)
    by_id = sorted(tuple(f"{p:.4f}" for p in r["probabilities"].values()) for r in found)
    names = list(found[0]["probabilities"])
    assert by_id == sorted(tuple(f"{float(row[name]):.4f}" for name in names) for row in rows)
    assert found[0]["available_modalities"] == ["text", "audio", "video"]


def test_predictor_says_what_is_missing_and_keeps_the_order(run):
    predictor = predict.load(run)
    text = np.ones(768)
    found = predictor.batch([
        {"features": {"text": text}},
        {"features": {"text": text[:5]}},
        {"text": "no encoder of ours made the text features"},
        {"clip": "nowhere.mp4"},
        "text",
        {"features": {"text": text, "audio": np.zeros(768)}},
        {"words": "typo"},
    ])  # fmt: skip
    assert found[0]["available_modalities"] == found[5]["available_modalities"] == ["text"]
    assert found[0]["probabilities"] == pytest.approx(found[5]["probabilities"], abs=1e-6)
    assert found[5]["missing"]["audio"] == "audio: all zeros"
    assert found[1] == {"error": "clip: text has shape (1, 5), the model expects (T, 768)"}
    assert found[2]["error"].startswith("clip: nothing to go by (text: made by another tool; pass its values")
    assert found[3]["error"].startswith("nowhere.mp4: nothing to go by (")
    assert found[4] == {"error": "item 4 is a str, not a dict"}
    assert found[6] == {"error": "item 6: unknown key 'words'"}
    with pytest.raises(config.UserError, match="no items to predict"):
        predictor.batch([])


def test_it_learns_what_is_planted_and_nothing_from_shuffled_labels(tmp_path):
    folder = tmp_path / "mock"
    make_mock(folder, 400, seed=5)
    argv = ["--data-dir", folder, "--lr", 2e-3, "--batch-size", 32, "--epochs", 8, "--dropout", 0.4]
    scores = {}
    for name, more in (("true", []), ("shuffled", ["--shuffle-labels"])):
        assert train([*argv, "--out", tmp_path / name, *more]) == 0
        scores[name] = json.loads((tmp_path / name / "results.json").read_text())["test"]
    accuracy = {name: found["scores"]["accuracy"]["mean"] for name, found in scores.items()}
    assert accuracy["true"] > 0.65 > 0.3 > accuracy["shuffled"]
    assert scores["true"]["constant"]["accuracy"] < 0.2


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """A run on raw clips: words and sounds of our own encoders, one clip of words alone."""
    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    clips = []
    for i in range(30):
        path = folder / f"c{i}.wav"
        soundfile.write(path, rng.normal(size=8000 + 400 * i) * (0.05 + 0.01 * i), 16000)
        split = "test" if i >= 24 else "train"
        clips.append(
            Clip(f"c{i}", str(path), f"word{i % 5} and word{i % 3}", str(i % 7 - 3), split=split, group=str(i // 2))
        )
    clips.append(Clip("silent", None, "word1 and nothing else", "1", split="test", group="s"))
    write_manifest(folder / "manifest.csv", clips)
    for encoder, pooling, store in (("hashtext", "counts", "text"), ("logmel", "stats", "audio")):
        argv = ["--encoder", encoder, "--pooling", pooling, "--manifest", folder / "manifest.csv"]
        extract.main(config.load(extract.Config, [*map(str, argv), "--out", str(folder / store)]))
    out = folder / "run"
    assert train(["--data-dir", folder, "--fusion-dim", 8, "--epochs", 2, "--lr", 1e-2, "--out", out]) == 0
    return folder, out, clips


def test_a_raw_clip_gets_the_answer_of_the_report(voices, tmp_path):
    folder, out, clips = voices
    best = json.loads((out / "results.json").read_text())["best"]["checkpoint"]
    rows = {row["id"]: row for row in csv.DictReader(open(out / "eval" / "mosei" / best / "predictions.csv"))}
    predictor = predict.load(out)
    for clip in clips[24:]:
        result = predictor(clip)
        assert result["emotion"] == rows[clip.id]["prediction"]
        for name, p in result["probabilities"].items():
            assert p == pytest.approx(float(rows[clip.id][name]), abs=1e-4)
        assert result["available_modalities"] == (["text"] if clip.id == "silent" else ["text", "audio"])
    assert len(rows) == 7
    with served(predictor, tmp_path, root=folder) as server:
        asked = {"video_path": Path(clips[24].path).name, "text": clips[24].text}
        status, answer, _ = request(server.port, "POST", "/process_video", asked)
    alone = predictor(clips[24])
    assert (status, answer["label"]) == (200, alone["emotion"])
    assert answer["score"] == pytest.approx(alone["score"], abs=6e-5)


def test_raw_clips_that_lack_something(voices, tmp_path, capsys):
    _folder, out, clips = voices
    predictor = predict.load(out)
    sound = predictor(clips[0].path, text="  ")
    assert sound["available_modalities"] == ["audio"]
    assert sound["missing"] == {"text": "c0: no text"}
    words = predictor(text="word1 and word2")
    assert words["available_modalities"] == ["text"]
    assert words["missing"] == {"audio": "audio: no audio given"}
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    shutil.copy(clips[0].path, tmp_path / "whole.wav")
    results = predict.predictions(predictor, predict.read_input(str(tmp_path), None), None, 4)
    broken, whole = results
    assert broken["id"] == "broken.wav"
    assert "nothing to go by" in broken["error"]
    assert whole["available_modalities"] == ["audio"]
    with pytest.raises(config.UserError, match="answers no questions"):
        predictor(clips[0].path, question="[reason] Why?")


def test_ids_are_no_features(voices, fails, tmp_path):
    folder, _out, _clips = voices
    argv = ["--encoder", "hashtext", "--manifest", folder / "manifest.csv", "--out", tmp_path / "ids"]
    extract.main(config.load(extract.Config, list(map(str, argv))))
    line = fails("--data-dir", folder, "--stores", f"text={tmp_path / 'ids'}", "--out", tmp_path / "out")
    assert line == (
        f"text: {tmp_path / 'ids'} holds ids of hashtext, fusion takes vectors: extract it with --pooling counts"
    )


# ---- killed, stopped, resumed


@pytest.fixture(scope="module")
def unbroken(mock, tmp_path_factory):
    from tests.conftest import run_ranks

    out = {n: tmp_path_factory.mktemp(f"unbroken{n}") / "out" for n in (1, 2)}
    for n, folder in out.items():
        assert run_ranks(n, train, ["--data-dir", mock, *SMALL, "--seeds", 2, "--out", folder]) == [0] * n
    return out


def logged(out):
    path = out / "log.jsonl"
    return sum(1 for _ in open(path)) if path.exists() else 0


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(mock, ranks, tmp_path, unbroken):
    argv = ["--data-dir", mock, *SMALL, "--seeds", 2, "--out", tmp_path / "out"]
    process = FORK.Process(target=lambda: sys.exit(train(argv)))
    process.start()
    deadline = time.monotonic() + 60
    while logged(tmp_path / "out") < 2:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    process.kill()
    process.join()
    assert ranks(1, train, [*argv, "--resume"]) == [0]
    for name in ("last", "best"):
        assert weights(tmp_path / "out", name) == weights(unbroken[1], name)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_inside_an_epoch_resumes_to_the_same_weights(mock, ranks, tmp_path, unbroken, n):
    argv = ["--data-dir", mock, *SMALL, "--seeds", 2, "--out", tmp_path / "out"]
    assert ranks(n, stopped_inside, train_mosei, argv, 20 // n) == [0] * n
    state = checkpoint.read_state(checkpoint.resolve(tmp_path / "out", prefer="last"))
    assert state["epoch"] == 1
    assert state["step"] == 20 // n
    assert ranks(n, train, [*argv, "--resume"]) == [0] * n
    for name in ("last", "best"):
        assert weights(tmp_path / "out", name) == weights(unbroken[n], name)


def test_resuming_a_finished_run_for_more_epochs(mock, tmp_path, unbroken):
    argv = ["--data-dir", mock, *SMALL, "--seeds", 2, "--out", tmp_path / "out"]
    assert train([*argv, "--epochs", 2]) == 0
    assert train(["--out", tmp_path / "out", "--resume", "--epochs", EPOCHS]) == 0
    assert weights(tmp_path / "out") == weights(unbroken[1])
    history = json.loads((tmp_path / "out" / "results.json").read_text())["history"]
    assert [point["epoch"] for point in history] == [1, 2, 3, 4]


def test_two_processes_take_the_steps_of_one(mock, ranks, tmp_path):
    """Without anything random, 2 x 4 utterances a step give the weights of 1 x 8."""
    still = ["--dropout", 0, "--modality-dropout", 0, "--epochs", 2, "--fusion-dim", 16, "--no-test"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert ranks(1, train, ["--data-dir", mock, *still, "--batch-size", 8, "--out", one]) == [0]
    assert ranks(2, train, ["--data-dir", mock, *still, "--batch-size", 4, "--out", two]) == [0, 0]
    a, b = (load_file(out / "checkpoints" / "last" / "model.safetensors") for out in (one, two))
    for name in a:
        torch.testing.assert_close(settled(name, a[name]), settled(name, b[name]), rtol=1e-4, atol=2e-6)


def settled(name, value):
    """Without the keys' biases: no score depends on them, so AdamW moves them by the sign of rounding errors."""
    return value[..., value.shape[-1] // 2 :] if name.endswith("kv.bias") else value


@pytest.mark.parametrize("context", ["none", "video"])
def test_seeds_side_by_side_end_where_each_ends_alone(mock, tmp_path, context):
    still = ["--dropout", 0, "--modality-dropout", 0, "--epochs", 2, "--batch-size", 16, "--fusion-dim", 16]
    argv = ["--data-dir", mock, *still, "--context", context, "--model.context-dropout", 0, "--no-test"]
    assert train([*argv, "--seed", 3, "--seeds", 2, "--out", tmp_path / "both"]) == 0
    both = load_file(tmp_path / "both" / "checkpoints" / "last" / "model.safetensors")
    for k, seed in enumerate((3, 4)):
        assert train([*argv, "--seed", seed, "--out", tmp_path / str(seed)]) == 0
        alone = load_file(tmp_path / str(seed) / "checkpoints" / "last" / "model.safetensors")
        for name, value in alone.items():
            part = both[name] if name.startswith(("mean", "std")) else both[name][k : k + 1]
            torch.testing.assert_close(settled(name, part), settled(name, value), rtol=1e-3, atol=1e-5)


def test_modalities_are_hidden_but_never_the_last_and_utterances_whole():
    torch.manual_seed(0)
    mask = {m: torch.ones(2, 4000, 3, dtype=torch.bool) for m in ("text", "audio", "video")}
    mask["audio"][:, :2000] = mask["video"][:, :2000] = False
    left = train_mosei.hide(mask, 0.6)
    assert all(left[m].any(-1).equal(left[m].all(-1)) for m in mask)
    assert left["text"][:, :2000].all()  # nothing else would be left of these
    assert torch.stack([part.any(-1) for part in left.values()]).any(0).all()
    gone = [1 - part[:, 2000:].any(-1).float().mean().item() for part in left.values()]
    # 0.4, 0.6 and 0.6, but for the 0.144 in which none would be left
    assert gone == pytest.approx([0.256, 0.456, 0.456], abs=0.03)
    left = train_mosei.hide(mask, 0.0, 0.3)
    heard = left["text"].all(-1)
    assert 1 - heard.float().mean() == pytest.approx(0.3, abs=0.03)
    assert all(part.equal(mask[m] & heard[..., None]) for m, part in left.items())


# ---- schedule and early stopping


def test_rates_of_a_cosine(mock, tmp_path):
    argv = ["--data-dir", mock, *SMALL, "--schedule", "cosine", "--warmup-steps", 4, "--lr", 2e-3]
    assert train([*argv, "--epochs", 3, "--out", tmp_path]) == 0
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    steps = history[-1]["step"]
    for point in history:
        # of the epoch's last step, counted from 0; the cosine from the start of the run
        cosine = 1e-7 + (2e-3 - 1e-7) * (1 + math.cos(math.pi * (point["step"] - 1) / steps)) / 2
        assert point["Learning_Rate"] == pytest.approx(cosine, rel=1e-6)
    assert history[0]["step"] > 4


def test_a_stopped_seed_stays_as_it_is(mock, tmp_path):
    """At a learning rate that only spoils, seed 0 of the watch stops after one epoch; its row never moves again."""
    argv = ["--data-dir", mock, *SMALL, "--patience", 1, "--min-delta", 10, "--epochs", 3, "--seeds", 2]
    assert train([*argv, "--out", tmp_path / "out"]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["epoch"] == 2  # all stopped: no third epoch
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(4)], lr=1.0)
    set_lrs(optimizer, [0.0, 0.5])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.5, 0.5]


# ---- mistakes


@pytest.mark.parametrize("flag", ["--dropout", "--modality-dropout", "--model.context-dropout", "--label-smoothing"])
def test_no_chance_is_above_one(fails, flag):
    assert fails("--fast", flag, 1.5) == f"{flag}: 1.5 is not from 0 to 1"


def test_no_data_names_the_places_and_the_way_out(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails() == (
        "no index file or data for the train split in datasets/mosei or data/mosei: --data-dir says where it is, "
        "python tools/download_mosei.py --mock makes a synthetic set, --fast needs none"
    )


def test_the_guides_place_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_mock(tmp_path / "data" / "mosei", 60)
    assert train(["--fast", "--fusion-dim", 8, "--no-test"]) == 0
    cfg = json.loads((tmp_path / "out/mosei_fast/results.json").read_text())["config"]
    assert (cfg["data_root"], cfg["batch_size"], cfg["epochs"], cfg["patience"], cfg["lr"]) == (
        "data/mosei", 8, 5, 2, 1e-4)  # fmt: skip


def test_inspecting_needs_no_run_folder(mock, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "out" / "mosei", symlinks=True)
    assert train(["--data-dir", mock, "--inspect"]) == 0
    assert "150 utterances" in capsys.readouterr().out


def test_half_precision_is_not_offered(mock, fails):
    assert fails("--data-dir", mock, "--fp16") == "--fp16: not offered here, only fp32, bf16"


def test_no_epoch_and_no_batch(mock, fails):
    assert fails("--data-dir", mock, "--epochs", 0) == "--epochs 0 --batch-size 16: at least one"


def test_a_run_is_not_overwritten_by_accident(mock, fails, run):
    assert fails("--data-dir", mock, "--out", run).startswith(f"{run} holds a run: --resume goes on with it")


def test_resume_from_nothing(mock, fails, tmp_path):
    line = fails("--data-dir", mock, "--resume", "checkpoints/checkpoint_epoch_10.pth")
    assert line == "--resume checkpoints/checkpoint_epoch_10.pth: not found (first run: leave --resume out)"


def test_a_change_of_shape_cannot_be_resumed(mock, fails, run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    line = fails("--out", tmp_path / "run", "--resume", "--fusion-dim", 24)
    assert "model.safetensors" in line
    assert "of the wrong shape" in line


def test_a_checkpoint_with_a_missing_or_an_extra_tensor(mock, fails, run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"
    tensors = load_file(file)
    tensors["surplus"] = tensors.pop("classifier.weight")
    save_file(tensors, file)
    line = fails("--out", tmp_path / "run", "--resume", "--epochs", 9)
    assert "1 missing: classifier.weight" in line
    assert "1 unexpected: surplus" in line


def test_labels_that_do_not_fit_the_head(fails, tmp_path):
    for split, n in (("train", 12), ("test", 6)):
        for name, width in (("text", 4), ("audio", 3), ("video", 2)):
            np.save(tmp_path / f"{name}_{split}.npy", np.random.default_rng(0).normal(size=(n, width)))
        np.save(tmp_path / f"y_{split}.npy", np.arange(n) % 2)
        np.save(tmp_path / f"group_{split}.npy", np.arange(n) // 2)
        np.save(tmp_path / f"position_{split}.npy", np.arange(n) % 2)
    line = fails("--data-dir", tmp_path, "--out", tmp_path / "out")
    assert line == "--head 7: the labels are only negative and positive here: --head 2"
    assert train(["--data-dir", tmp_path, "--head", 2, "--epochs", 1, "--out", tmp_path / "out"]) == 0


def test_a_loss_that_is_not_a_number_names_utterances(mock, fails, tmp_path):
    out = tmp_path / "out"
    assert train(["--data-dir", mock, *SMALL, "--epochs", 1, "--out", out]) == 0
    kept = weights(out)
    line = fails("--out", out, "--resume", "--epochs", 2, "--lr", 1e30, "--grad-clip", 0, "--schedule", "constant")
    assert line.startswith("epoch 2, step ")
    assert "utterances" in line
    assert "lower --lr" in line
    assert weights(out) == kept


def test_the_guides_checkpoint_starts_a_run(mock, fails, tmp_path):
    width = {"fusion_layers.0": (256, 1561), "fusion_layers.3": (128, 256), "classifier": (7, 128)}
    state = {f"{name}.weight": torch.randn(shape) * 0.01 for name, shape in width.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in width.items()}
    path = tmp_path / "best_model.pth"
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "metrics": {"f1": 0.5}}, path)
    argv = ["--data-dir", mock, "--ckpt", path, "--epochs", 1, "--lr", 0, "--no-test"]
    assert train([*argv, "--model", "mlp", "--out", tmp_path / "out"]) == 0
    found = load_file(tmp_path / "out" / "checkpoints" / "last" / "model.safetensors")
    assert torch.equal(found["core.fusion_layers.3.weight"][0], state["fusion_layers.3.weight"])
    assert torch.equal(found["classifier.bias"][0, 0], state["classifier.bias"])
