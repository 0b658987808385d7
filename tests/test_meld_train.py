"""meld_train.py as a user runs it: learning, stopped, killed and resumed, several seeds or processes, bad input."""

import contextlib
import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import meld_train
import train_clap
import train_slm
from common import checkpoint, config
from data import mock_speech, pairs
from data.meld import LABELS, load_meld
from evals import speech
from model import meld
from model.dialogue import Turns
from tests.conftest import drawn, run_ranks
from tests.model.test_slm import published_file
from tests.model.test_slm import tensors as published
from tests.training import error, killed_saving, make_lines, make_meld, run, stopped_inside, weights

# four steps an epoch, the last of fewer utterances; the head has dropout
SMALL = ["--device", "cpu", "--batch-size", 16, "--lr", 3e-3, "--hidden-dim", 16, "--save-every", 1, "--no-test"]
STILL = ["--model.dropout", 0]
DIM, WIDTH, HIDDEN, CLASSES = 32, 16, 16, 12  # of the features, and of the classifier


@pytest.fixture
def _still_turns(monkeypatch):
    """What was said before is read as after training, never left out at random."""
    forward = Turns.forward
    monkeypatch.setattr(Turns, "forward", lambda self, *args: forward(self.eval(), *args))


def train(argv):
    return run(meld_train, argv)


@pytest.fixture
def fails(capsys):
    return lambda *argv: error(meld_train, argv, capsys)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("series") / "meld", 61, 24, DIM)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("words") / "meld", 61, 24, stores=False)


@pytest.fixture(scope="module")
def stage3(tmp_path_factory):
    """A run of train_slm.py of two seeds, of which the first counts."""
    root = tmp_path_factory.mktemp("stage3")
    argv = ["--data-root", make_lines(root / "lines"), "--device", "cpu", "--proj-dim", WIDTH, "--hidden-dim", HIDDEN]
    assert run(train_slm, [*argv, "--epochs", 1, "--lr", 1e-2, "--seeds", 2, "--no-test", "--out", root / "out"]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def small(series, stage3):
    return ["--data-root", series, "--stage3-ckpt", stage3, *SMALL]


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    """A run of two seeds for five epochs that nobody stopped, on one process and on two."""
    out = {n: tmp_path_factory.mktemp(f"unbroken{n}") / "out" for n in (1, 2)}
    for n, folder in out.items():
        argv = [*small, "--seeds", 2, "--context", 2, "--epochs", 5, "--out", folder]
        assert run_ranks(n, train, argv) == [0] * n
    return out


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run with all that it writes, and what it said."""
    out = tmp_path_factory.mktemp("finished") / "out"
    argv = [arg for arg in small if arg != "--no-test"]
    with drawn(), contextlib.redirect_stdout(io.StringIO()) as said:
        assert train([*argv, "--epochs", 3, "--seeds", 2, "--out", out]) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The published classifier, its projectors and a head of either mode, narrow."""
    root = tmp_path_factory.mktemp("published")
    made = published(0, {"audio": DIM, "text": DIM}, WIDTH, HIDDEN, CLASSES)
    published_file(root / "slm.pt", made)
    torch.save(projectors(made), root / "clap.pt")
    torch.save({"trainable_state": {"adapter": head_b()}, "mode": "B"}, root / "meld_slm_B_best.pt")
    return root


def projectors(tensors):
    """clap_projectors.pt of a published classifier."""
    return {
        f"{m}_proj": {name: tensors[f"clap.{m}_proj.{name}"] for name in ("weight", "bias")} for m in ("audio", "text")
    }


def head_b():
    generator = torch.Generator().manual_seed(1)
    return {"weight": torch.randn(7, CLASSES, generator=generator), "bias": torch.randn(7, generator=generator)}


def results(out):
    return json.loads((out / "results.json").read_text())


def losses(out):
    return [(point["Train/Loss"], point["Val/Loss"]) for point in results(out)["history"]]


def tensors(out, name="last"):
    return load_file(out / "checkpoints" / name / checkpoint.MODEL)


# ---- what a run writes and says


def test_a_run_writes_what_is_promised(finished):
    out, said = finished
    found = results(out)
    best = found["best"]["checkpoint"]
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"epoch_001", "epoch_002", "epoch_003", "last", "best", best}
    assert {"config", "history", "test", "commit", "timestamp", "seeds", "labels", "features", "stage3"} <= set(found)
    assert found["labels"] == list(LABELS)
    assert [point["epoch"] for point in found["history"]] == [1, 2, 3]
    logged = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [record["epoch"] for record in logged] == [1, 2, 3]
    assert all({"Train/Loss", "Val/Loss", "Val/Accuracy", "Val/F1"} <= set(record) for record in logged)
    assert config.load(meld_train.Config, ["--cfg", str(out / "config.yaml")]).seeds == 2
    for file in ("curves.png", *(f"eval/meld/{best}/{name}" for name in ("confusion.png", "metrics.json"))):
        assert (out / file).stat().st_size > 500
    assert json.loads((out / "eval" / "meld" / best / "metrics.json").read_text()) == found["test"]
    rows = [json.loads(line) for line in open(out / "eval" / "meld" / best / "predictions.jsonl")]
    assert len(rows) == 24
    assert all(list(row["probabilities"]) == list(LABELS) for row in rows)
    epochs = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all(" weighted f1 " in line and " audio " in line and " text " in line for line in epochs)


def test_the_report_is_mean_and_deviation_over_seeds(finished):
    found, said = results(finished[0])["test"], finished[1].splitlines()
    assert set(found["scores"]) == {"fused", "audio", "text"}
    assert len(found["per_seed"]) == 2
    values = [each["weighted_f1"] for each in found["per_seed"]]
    assert found["scores"]["fused"]["weighted_f1"] == {"mean": np.mean(values), "std": np.std(values)}
    row = next(i for i, line in enumerate(said) if line.startswith("model, 2 seeds"))
    assert said[row].split()[-3] == f"{np.mean(values):.4f}"
    assert said[row + 1].startswith("  std over seeds")
    assert said[row + 1].split()[-3] == f"{np.std(values):.4f}"
    assert any(line.startswith("majority (neutral)") for line in said)


def test_classes_weigh_as_the_root_of_how_rare_they_are(series, finished):
    count = Counter(clip.label for clip in load_meld(series, lambda _: None) if clip.split == "train")
    expected = {label: (max(count.values()) / max(count[label], 1)) ** 0.5 for label in LABELS}
    assert "class weights " + ", ".join(f"{label} {w:.2f}" for label, w in expected.items()) in finished[1].splitlines()
    published = torch.arange(7).repeat_interleave(torch.tensor([1109, 271, 268, 1743, 4710, 683, 1205]))
    assert [round(w, 2) for w in meld_train.class_weights(published, "sqrt").tolist()] == [
        2.06, 4.17, 4.19, 1.64, 1.00, 2.63, 1.98,
    ]  # fmt: skip
    assert meld_train.class_weights(published, "inverse").tolist() == pytest.approx(
        [4710 / n for n in (1109, 271, 268, 1743, 4710, 683, 1205)]
    )
    assert meld_train.class_weights(published, "none").tolist() == [1.0] * 7


@pytest.mark.parametrize("kind", ["sqrt", "inverse", "none"])
def test_the_loss_is_torchs_weighted_and_smoothed_one(series, small, tmp_path, kind):
    argv = [*small, *STILL, "--lr", 0, "--batch-size", 100, "--class-weights", kind, "--label-smoothing", 0.2]
    assert train([*argv, "--epochs", 1, "--out", tmp_path]) == 0
    folder = checkpoint.resolve(tmp_path)
    model, _ = meld.load(folder, checkpoint.read_state(folder))
    cfg = pairs.PairsConfig(data_root=str(series))
    clips = [clip for clip in load_meld(series, lambda _: None) if clip.split == "train"]
    data = pairs.load(clips, pairs.open_stores(cfg), LABELS, cfg)
    data.standardize(model.fronts.dense, model.fronts.standardize)
    logits, weight = speech.predict(model, data, 1)[0], meld_train.class_weights(data.label, kind)
    expected = F.cross_entropy(logits, data.label, weight, label_smoothing=0.2)
    assert losses(tmp_path)[0][0] == pytest.approx(float(expected), rel=1e-5)


def test_best_is_the_epoch_of_the_highest_weighted_f1_on_dev(small, tmp_path, capsys):
    assert train([*small, "--lr", 0.02, "--epochs", 6, "--out", tmp_path]) == 0
    scores = [point["Val/F1"] for point in results(tmp_path)["history"]]
    best = results(tmp_path)["best"]
    assert len(set(scores)) > 2
    assert (best["metric"], best["value"]) == ("weighted_f1", max(scores))
    assert best["epochs"] == [scores.index(max(scores)) + 1]
    assert weights(tmp_path, "best") == weights(tmp_path, f"epoch_{best['epochs'][0]:03d}")
    assert f", best epoch {best['epochs'][0]}\n" in capsys.readouterr().out


def test_every_seed_has_its_own_best_epoch(small, tmp_path):
    assert train([*small, "--lr", 0.05, "--seeds", 3, "--epochs", 6, "--out", tmp_path]) == 0
    best = results(tmp_path)["best"]
    found, epochs = tensors(tmp_path, "best"), {e: tensors(tmp_path, f"epoch_{e:03d}") for e in best["epochs"]}
    assert len(epochs) > 1
    for k, epoch in enumerate(best["epochs"]):
        for name, value in found.items():
            if name.startswith("meld_head"):
                assert torch.equal(value[k], epochs[epoch][name][k])


def test_fast_needs_nothing_and_takes_the_classifier_of_the_stage_before(tmp_path, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 98, "valid": 24, "test": 24}
    monkeypatch.setattr(mock_speech, "SIZES", {"lines": sizes, "meld": sizes})
    fast = ["--fast", "--device", "cpu"]
    assert train([*fast, "--epochs", 2]) == 0
    assert results(tmp_path / "out/meld_fast")["stage3"] is None
    assert run(train_slm, [*fast, "--epochs", 1]) == 0
    assert train([*fast, "--epochs", 1]) == 0
    found = results(tmp_path / "out/meld_fast")
    assert found["config"]["stage3_ckpt"] == "out/slm_fast"
    assert found["test"]["clips"] == 24
    assert [point["epoch"] for point in found["history"]] == [1]
    assert "stage 3, out/slm_fast: " in capsys.readouterr().out
    assert train([*fast, "--epochs", 2, "--resume"]) == 0
    assert [point["epoch"] for point in results(tmp_path / "out/meld_fast")["history"]] == [1, 2]
    shutil.copytree(words, "datasets/MELD")  # real ones have none of the features that were made up for it
    assert train([*fast, "--epochs", 1]) == 0
    assert results(tmp_path / "out/meld_fast")["stage3"] is None


def test_it_learns_what_is_planted_and_nothing_from_shuffled_labels(tmp_path):
    folder = make_meld(tmp_path / "meld", 600, 150)
    argv = ["--data-root", folder, *SMALL, "--batch-size", 50, "--epochs", 15, "--save-every", 15, "--metric", "none"]
    accuracy = {}
    for name, more in (("true", []), ("shuffled", ["--shuffle-labels"])):
        assert train([*argv, "--out", tmp_path / name, *more]) == 0
        accuracy[name] = results(tmp_path / name)["history"][-1]["Val/Accuracy"]
    labels = [clip.label for clip in load_meld(folder, lambda _: None) if clip.split == "valid"]
    neutral = labels.count("neutral") / 150
    assert accuracy["true"] > neutral + 0.15
    assert accuracy["shuffled"] < neutral + 0.05


# ---- stopped, killed, resumed


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_inside_an_epoch_resumes_to_the_same_weights(small, ranks, tmp_path, unbroken, capfd, n):
    argv = [*small, "--seeds", 2, "--context", 2, "--epochs", 5, "--out", tmp_path]
    step = 10 // n  # of four or two steps an epoch
    assert ranks(n, stopped_inside, meld_train, argv, step) == [0] * n
    said = capfd.readouterr().out
    assert f"stopped after step {step} of {20 // n}; go on with the same command and --resume" in said
    assert checkpoint.read_state(tmp_path / "checkpoints" / "last")["step"] == step
    assert ranks(n, train, [*argv, "--resume"]) == [0] * n
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[n], name)


def test_a_classifier_that_learns_goes_on_too(small, ranks, tmp_path):
    """Its dropout and what it hides are drawn again as they were."""
    argv = [*small, "--finetune", "--seeds", 2, "--epochs", 3]
    one, two = tmp_path / "one", tmp_path / "two"
    assert ranks(1, train, [*argv, "--out", one]) == [0]
    assert ranks(1, stopped_inside, meld_train, [*argv, "--out", two], 6) == [0]
    assert ranks(1, train, [*argv, "--out", two, "--resume"]) == [0]
    for name in ("last", "best"):
        assert weights(two, name) == weights(one, name)


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(small, ranks, tmp_path, unbroken):
    """Killed while a checkpoint is written, then between its renaming and its link."""
    argv = [*small, "--seeds", 2, "--context", 2, "--epochs", 5, "--out", tmp_path]
    killed_saving(meld_train, argv, "_sync", 20)
    killed_saving(meld_train, [*argv, "--resume"], "_link", 2)
    assert ranks(1, train, [*argv, "--resume"]) == [0]
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[1], name)
    assert losses(tmp_path) == losses(unbroken[1])


def test_a_resumed_run_has_its_own_classifier(series, stage3, tmp_path):
    theirs, one, two = tmp_path / "slm", tmp_path / "one", tmp_path / "two"
    shutil.copytree(stage3, theirs, symlinks=True)
    argv = ["--data-root", series, "--stage3-ckpt", theirs, *SMALL]
    assert train([*argv, "--epochs", 2, "--out", one]) == 0
    assert train([*argv, "--epochs", 1, "--out", two]) == 0
    shutil.rmtree(theirs)
    assert train([*argv, "--epochs", 2, "--out", two, "--resume"]) == 0
    assert weights(two) == weights(one)


# ---- several processes, several seeds


@pytest.mark.parametrize("more", [["--class-weights", "inverse"], ["--context", 2]], ids=["weights", "context"])
@pytest.mark.usefixtures("_still_turns")
def test_two_processes_take_the_steps_of_one(small, ranks, tmp_path, more):
    """Without anything random; the last step has 13 utterances, seven for one and six for the other."""
    for n in (1, 2):
        argv = [*small, *STILL, *more, "--batch-size", 16 // n, "--epochs", 3, "--out", tmp_path / str(n)]
        assert ranks(n, train, argv) == [0] * n
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    two = tensors(tmp_path / "2")
    for name, value in tensors(tmp_path / "1").items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [[], ["--context", 2]], ids=["alone", "context"])
@pytest.mark.usefixtures("_still_turns")
def test_seeds_side_by_side_end_where_each_ends_alone(small, tmp_path, more):
    argv = [*small, *STILL, *more, "--epochs", 2]
    assert train([*argv, "--seed", 3, "--seeds", 2, "--out", tmp_path / "both"]) == 0
    both = tensors(tmp_path / "both")
    for k, seed in enumerate((3, 4)):
        assert train([*argv, "--seed", seed, "--out", tmp_path / str(seed)]) == 0
        for name, value in tensors(tmp_path / str(seed)).items():
            part = both[name] if name.startswith("backbone.") else both[name][k : k + 1]
            torch.testing.assert_close(part, value, rtol=1e-3, atol=1e-4)


# ---- what learns


def test_a_frozen_classifier_stays_as_stage_3_left_it(small, stage3, tmp_path):
    assert train([*small, "--seeds", 2, "--epochs", 2, "--out", tmp_path]) == 0
    ours, theirs = tensors(tmp_path), tensors(stage3, "best")
    assert {name for name in ours if name.startswith("backbone.")} >= {f"backbone.{name}" for name in theirs}
    for name, value in theirs.items():
        if value.ndim > 1:
            assert torch.equal(ours[f"backbone.{name}"], value[:1]), name  # of its two seeds the first
        elif "logit_scale" not in name:
            assert torch.equal(ours[f"backbone.{name}"], value), name
    assert all(not torch.equal(value[0], value[1]) for name, value in ours.items() if name.startswith("meld_head.1"))


def test_finetuning_moves_it(small, stage3, tmp_path, capsys):
    assert train([*small, "--finetune", "--seeds", 2, "--epochs", 1, "--out", tmp_path]) == 0
    ours, theirs = tensors(tmp_path), tensors(stage3, "best")
    for name in ("clap.audio_proj.weight", "prosody_lin.weight", "W_q.weight", "norms.0.scale"):
        assert not torch.equal(ours[f"backbone.{name}"], theirs[name][:1].expand_as(ours[f"backbone.{name}"])), name
    for name in ("clap.mean_audio", "clap.std_text"):
        assert torch.equal(ours[f"backbone.{name}"], theirs[name])
    assert "mode A, " in capsys.readouterr().out


def test_mode_b_is_a_layer_over_class_scores(small, tmp_path, capsys):
    assert train([*small, "--mode", "B", "--seeds", 2, "--epochs", 1, "--out", tmp_path]) == 0
    assert f"; mode B, {7 * CLASSES + 7} parameters x 2 seeds; " in capsys.readouterr().out
    assert tensors(tmp_path)["adapter.weight"].shape == (2, 7, CLASSES)


# ---- words alone


def test_words_alone_are_embedded_once(words, tmp_path, capsys):
    kept = tmp_path / "features"
    argv = ["--data-root", words, "--features-root", kept, *SMALL[:-1], "--bag-dim", 2, "--epochs", 1]
    assert train([*argv, "--context", 2, "--seeds", 2, "--out", tmp_path / "one"]) == 0
    said = capsys.readouterr().out
    assert f"{words}: no clips, only words" in said
    assert re.search(rf"{kept}/hashtext-ids-\w{{8}}: 109 clips, width 65536, ", said)
    assert "61 train, 24 valid, 24 test utterances, text; mode A, " in said
    found = results(tmp_path / "one")
    assert set(found["test"]["scores"]) == {"text"}
    assert found["features"]["text"]["encoder"] == "hashtext"
    assert train([*argv, "--epochs", 2, "--out", tmp_path / "one", "--resume"]) == 0
    assert re.search(rf"{kept}/hashtext-ids-\w{{8}}: 109 clips, width 65536, complete", capsys.readouterr().out)
    assert train([*argv, "--encoders", "text=hashtext:counts", "--out", tmp_path / "two"]) == 0
    assert re.search(rf"{kept}/hashtext-counts-\w{{8}}: 109 clips, width 1024, ", capsys.readouterr().out)


def test_a_table_of_words_with_an_optimiser_of_its_own(words, tmp_path):
    table = ["--hidden-dim", 0, "--table-lr", 0.2, "--table-eps", 0.03, "--table-decay", 0.02, "--schedule", "linear"]
    argv = [
        "--data-root",
        words,
        "--features-root",
        tmp_path / "features",
        *SMALL,
        *table,
        "--seeds",
        2,
        "--context",
        1,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train([*argv, "--epochs", 3, "--lr", 0.01, "--out", one]) == 0
    assert tensors(one)["backbone.fronts.text.table"].shape == (2, 65536, 7)
    assert results(one)["history"][-1]["Train/Loss"] < results(one)["history"][0]["Train/Loss"]
    shutil.copytree(one, two, symlinks=True)
    argv = ["--out", two, "--resume", two / "checkpoints" / "epoch_001"]
    assert train(argv) == 0
    for name in ("last", "best"):
        assert weights(two, name) == weights(one, name)


def test_words_alone_on_a_classifier_of_sound_and_words(small, words, series, tmp_path, capsys):
    argv = [*small, "--data-root", words, "--stores", f"text={series / 'text'}", "--out", tmp_path]
    for epochs, resume in ((1, []), (2, ["--resume"])):
        assert train([*argv, "--epochs", epochs, *resume]) == 0
        assert " test utterances, text; mode A, " in capsys.readouterr().out
    assert torch.tensor(losses(tmp_path)).isfinite().all()


def test_a_classifier_of_words_leaves_sound_unread(series, tmp_path, capsys):
    lines = make_lines(tmp_path / "lines")
    shutil.rmtree(lines / "audio")
    argv = ["--data-root", lines, "--device", "cpu", "--proj-dim", 16, "--hidden-dim", 16, "--no-test"]
    assert run(train_slm, [*argv, "--epochs", 1, "--out", tmp_path / "slm"]) == 0
    argv = [arg for arg in SMALL if arg != "--no-test"]
    argv = ["--data-root", series, "--stage3-ckpt", tmp_path / "slm", *argv, "--epochs", 1, "--out", tmp_path / "out"]
    assert train(argv) == 0
    assert " test utterances, text; mode A, " in capsys.readouterr().out
    assert set(results(tmp_path / "out")["test"]["scores"]) == {"text"}


# ---- published files


def test_the_published_command(tmp_path, capsys, fails):
    """Every flag of it, at its sizes, and its file of a run that there has not been."""
    series = make_meld(tmp_path / "MELD", 30, 8, 768)
    made = published(0, {"audio": 768, "text": 768}, 768, 1024, 36)
    published_file(tmp_path / "slm_stage3_epoch149_best.pt", made)
    torch.save(projectors(made), tmp_path / "clap_projectors.pt")
    out = tmp_path / "checkpointA_balanced"
    argv = [
        "--data-root", series, "--stage3-ckpt", tmp_path / "slm_stage3_epoch149_best.pt",
        "--clap-ckpt", tmp_path / "clap_projectors.pt", "--mode", "A", "--epochs", 1, "--batch-size", 128,
        "--lr", 0.001, "--weight-decay", 0.01, "--num-workers", 4, "--save-dir", out, "--seed", 17,
    ]  # fmt: skip
    missing = out / "meld_slm_A_best.pt"
    line = fails(*argv, "--resume", missing)
    assert line == f"--resume {missing}: not found (first run: leave --resume out)"
    assert not out.exists()
    assert train([*argv, "--device", "cpu", "--no-test"]) == 0
    said = capsys.readouterr().out
    assert f"stage 3, {tmp_path / 'slm_stage3_epoch149_best.pt'}: 16/16 tensors of the SLM" in said
    assert "; mode A, 3,948,039 parameters x 1 seeds; 128 a step (1 processes), 1 steps an epoch" in said
    assert train([*argv, "--device", "cpu", "--no-test", "--epochs", 2, "--resume", out]) == 0
    said = capsys.readouterr().out
    assert "changed since the run began: epochs: 1 -> 2" in said
    assert f"resumed from {out}/checkpoints/epoch_001: " in said
    assert [point["epoch"] for point in results(out)["history"]] == [1, 2]
    for name, value in made.items():
        kept = tensors(out)[f"backbone.{name}"][0]
        assert torch.equal(kept.flatten(), value.flatten()), name


def test_a_published_head_starts_a_run(series, files, tmp_path, capsys, fails):
    argv = ["--data-root", series, "--stage3-ckpt", files / "slm.pt", *SMALL, "--epochs", 1, "--lr", 0]
    head = files / "meld_slm_B_best.pt"
    assert train([*argv, "--mode", "B", "--ckpt", head, "--seeds", 2, "--out", tmp_path / "out"]) == 0
    assert f"head of {head}: 2/2 tensors of the head" in capsys.readouterr().out
    found = tensors(tmp_path / "out")
    for k in range(2):
        assert torch.equal(found["adapter.weight"][k], head_b()["weight"])
        assert torch.equal(found["adapter.bias"][k, 0], head_b()["bias"])
    line = fails(*argv, "--mode", "A", "--ckpt", head, "--out", tmp_path / "other")
    assert line.startswith(f"{head}: 0/6 tensors match the model; 6 missing: meld_head.")


def test_projectors_that_are_not_stage_3s(small, files, fails, tmp_path, stage3):
    argv = ["--data-root", small[1], "--stage3-ckpt", files / "slm.pt", *SMALL, "--out", tmp_path / "out"]
    what = "is not the one that the classifier was trained with"
    right = projectors(published(0, {"audio": DIM, "text": DIM}, WIDTH, HIDDEN, CLASSES))
    wrong = tmp_path / "clap.pt"
    torch.save(right | {"text_proj": right["text_proj"] | {"bias": right["text_proj"]["bias"] + 1e-3}}, wrong)
    assert fails(*argv, "--clap-ckpt", wrong) == f"--clap-ckpt {wrong}: text_proj.bias {what}"
    torch.save(projectors(published(0, {"audio": DIM, "text": DIM}, WIDTH + 1)), wrong)
    assert fails(*argv, "--clap-ckpt", wrong) == f"--clap-ckpt {wrong}: audio_proj.weight {what}"
    line = fails(*argv, "--clap-ckpt", files / "slm.pt", "--epochs", 0)
    assert line == "--seeds, --epochs and --batch-size are at least 1, --seed and --context at least 0"
    lines = make_lines(tmp_path / "lines")
    run(train_clap, ["--data-root", lines, "--device", "cpu", "--epochs", 1, "--batch-size", 20, "--proj-dim", 16,
                     "--no-test", "--out", tmp_path / "other"])  # fmt: skip
    line = fails(*small, "--clap-ckpt", tmp_path / "other", "--out", tmp_path / "out")
    assert line.startswith(f"--clap-ckpt {tmp_path / 'other'}: ")
    assert line.endswith(what)
    assert not (tmp_path / "out").exists()
    line = fails("--data-root", small[1], *SMALL, "--clap-ckpt", files / "clap.pt", "--out", tmp_path / "out")
    assert line == "--clap-ckpt needs --stage3-ckpt: without it no projectors are used"


def test_the_projectors_of_stage_3_are_accepted(files, series, tmp_path):
    for i, same in enumerate(("clap.pt", "slm.pt")):  # the classifier's file holds them too
        argv = ["--data-root", series, "--stage3-ckpt", files / "slm.pt", "--clap-ckpt", files / same, *SMALL]
        assert train([*argv, "--epochs", 1, "--out", tmp_path / str(i)]) == 0


# ---- mistakes


def test_no_data_names_the_place_and_the_way_out(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails() == (
        "no data: datasets/MELD not found; --data-root says where MELD's CSV files are, --fast needs none"
    )
    line = fails("--data-root", "nowhere")
    assert line.startswith("nowhere/train_sent_emo.csv not found, nor below nowhere in MELD.Raw/, ")
    assert not (tmp_path / "out").exists()


def test_stage_3_that_is_not_there_or_something_else(small, series, fails, unbroken, tmp_path):
    argv, gone = ["--data-root", series, *SMALL, "--out", tmp_path / "out"], tmp_path / "slm"
    line = fails(*argv, "--stage3-ckpt", gone)
    assert line == f"checkpoint {gone}: not found (a run folder, its checkpoints/ or one checkpoint folder)"
    assert fails(*argv, "--stage3-ckpt", f"{gone}.pt").startswith(f"{gone}.pt: not readable as tensors only (")
    best = (unbroken[1] / "checkpoints" / "best").resolve()
    line = fails(*argv, "--stage3-ckpt", unbroken[1])
    assert line == f"--stage3-ckpt {best}: a checkpoint of system meld, not of train_slm.py"


def test_features_that_stage_3_does_not_know(small, files, words, fails, tmp_path):
    other = make_meld(tmp_path / "meld", 12, 5, 40)
    line = fails(*small, "--data-root", other, "--out", tmp_path / "out")
    assert line == "audio: features have dim 40, the model was trained on 32"
    line = fails("--data-root", other, "--stage3-ckpt", files / "slm.pt", *SMALL, "--out", tmp_path / "out")
    ours, theirs = ({"dim": dim, "kind": "dense", "frames": False} for dim in (40, 32))
    assert line == f"audio of {other / 'audio'} is {ours}, stage 3 was trained on {theirs}"
    line = fails(*small, "--data-root", words, "--out", tmp_path / "out")
    assert line == "audio: 'mock_audio' is no encoder here: --stores audio=FOLDER names MELD's features"
    line = fails(*small, "--data-root", words, "--encoders", "text=hashtext", "--out", tmp_path / "out")
    assert line == "text: features have encoder hashtext, the model was trained on mock_text"


def test_mode_b_without_stage_3(series, fails, tmp_path):
    line = fails("--data-root", series, *SMALL, "--mode", "B", "--out", tmp_path)
    assert line == "--mode B reads stage 3's class scores: --stage3-ckpt names its checkpoint"


def test_resume_and_overwrite(small, fails, unbroken, tmp_path, capsys):
    assert fails(*small, "--out", unbroken[1]) == (
        f"{unbroken[1]} holds a run: --resume goes on with it, --overwrite replaces it, --out DIR starts elsewhere"
    )
    line = fails("--resume", unbroken[1] / "checkpoints" / "best", "--epochs", 9)
    assert line.endswith(": holds weights only, so --ckpt can start from it; --resume needs epoch_* or last")
    assert train([*small, "--epochs", 1, "--resume", "--out", tmp_path / "out"]) == 0
    assert f"--resume: {tmp_path / 'out'} holds no checkpoint yet, starting fresh" in capsys.readouterr().out


def test_flags_that_make_no_sense(small, fails):
    assert fails(*small, "--stage-3-ckpt", "x") == "unknown option --stage-3-ckpt (nearest: --stage3-ckpt)"
    assert fails(*small, "--context", -1) == (
        "--seeds, --epochs and --batch-size are at least 1, --seed and --context at least 0"
    )
    assert fails(*small, "--mode", "C") == "--mode: 'C' is not one of A, B"


def test_a_loss_that_is_not_a_number_names_utterances(small, fails, tmp_path):
    assert train([*small, "--epochs", 1, "--out", tmp_path]) == 0
    kept = weights(tmp_path)
    line = fails("--out", tmp_path, "--resume", "--epochs", 2, "--lr", 1e30)
    assert line.startswith("epoch 2, step ")
    assert "samples train_dia" in line
    assert "lower --lr" in line
    assert weights(tmp_path) == kept
