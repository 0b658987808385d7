"""train_slm.py as a user runs it: learning, stopped, killed and resumed, several seeds or processes, bad input."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_clap
import train_slm
from common import checkpoint, config
from data import mock_speech
from tests.conftest import drawn, run_ranks
from tests.training import changed_lines, error, killed_saving, make_lines, run, stopped_inside, weights

LABELS = "anger, awe, disgust, envy, fear, hope, joy, neutral, pride, relief, sadness, surprise"
# five steps an epoch, the last of fewer clips; everything random is on: dropout, hidden modalities
SMALL = ["--device", "cpu", "--batch-size", 20, "--lr", 3e-3, "--warmup-steps", 3, "--proj-dim", 16, "--hidden-dim", 16,
         "--save-every", 1, "--no-test"]  # fmt: skip
STILL = ["--model.dropout", 0, "--model.clap.dropout", 0, "--modality-dropout", 0]


def train(argv):
    return run(train_slm, argv)


@pytest.fixture
def fails(capsys):
    return lambda *argv: error(train_slm, argv, capsys)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return make_lines(tmp_path_factory.mktemp("lines") / "lines")


@pytest.fixture(scope="module")
def small(lines):
    return ["--data-root", lines, *SMALL]


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    """A run of two seeds for six epochs that nobody stopped, on one process and on two."""
    out = {n: tmp_path_factory.mktemp(f"unbroken{n}") / "out" for n in (1, 2)}
    for n, folder in out.items():
        argv = [*small, "--seeds", 2, "--epochs", 6, "--out", folder]
        assert run_ranks(n, train, argv) == [0] * n
    return out


@pytest.fixture(scope="module")
def finished(lines, tmp_path_factory):
    """A run with all that it writes, and what it said."""
    out = tmp_path_factory.mktemp("finished") / "out"
    argv = [arg for arg in SMALL if arg != "--no-test"]
    with drawn(), contextlib.redirect_stdout(io.StringIO()) as said:
        assert train(["--data-root", lines, *argv, "--epochs", 3, "--seeds", 2, "--out", out]) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def projectors(lines, tmp_path_factory):
    """A run of train_clap.py."""
    out = tmp_path_factory.mktemp("clap") / "out"
    argv = ["--data-root", lines, "--device", "cpu", "--batch-size", 20, "--epochs", 2, "--proj-dim", 16, "--no-test"]
    assert run(train_clap, [*argv, "--warmup-steps", 0, "--out", out]) == 0
    return out


def clip_ids(lines):
    return [line.split(",")[0] for line in open(lines / "manifest.csv")][1:]


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
    assert {"config", "history", "test", "commit", "timestamp", "seeds", "labels"} <= set(found)
    assert [point["epoch"] for point in found["history"]] == [1, 2, 3]
    logged = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [record["epoch"] for record in logged] == [1, 2, 3]
    for point in [*found["history"], *logged]:
        assert {"Val/Accuracy", "Val/audio Accuracy", "Val/text Accuracy"} <= set(point)
    assert set(found["test"]["scores"]) == {"fused", "audio", "text"}
    assert config.load(train_slm.Config, ["--cfg", str(out / "config.yaml")]).seeds == 2
    for file in ("curves.png", *(f"eval/slm/{best}/{name}" for name in ("confusion.png", "metrics.json"))):
        assert (out / file).stat().st_size > 500
    rows = [json.loads(line) for line in open(out / "eval" / "slm" / best / "predictions.jsonl")]
    assert len(rows) == 24
    epochs = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all("acc: fused " in line and "  audio " in line and "  text " in line for line in epochs)
    assert "majority (" in said


def test_best_is_the_epoch_of_the_highest_valid_accuracy(small, tmp_path):
    assert train([*small, "--epochs", 5, "--out", tmp_path]) == 0
    scores = [point["Val/Accuracy"] for point in results(tmp_path)["history"]]
    best = results(tmp_path)["best"]
    assert best["value"] == max(scores)
    assert best["epochs"] == [scores.index(max(scores)) + 1]
    assert weights(tmp_path, "best") == weights(tmp_path, f"epoch_{best['epochs'][0]:03d}")


def test_fast_needs_nothing_and_takes_the_projectors_of_the_stage_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mock_speech, "SIZES", {"lines": {"train": 98, "valid": 24, "test": 24}})
    assert run(train_clap, ["--fast", "--epochs", 2, "--device", "cpu"]) == 0
    assert train(["--fast", "--epochs", 2, "--device", "cpu"]) == 0
    assert "projectors of " in capsys.readouterr().out
    assert results(tmp_path / "out/slm_fast")["config"]["clap_ckpt"] == "out/clap_fast"
    assert train(["--fast", "--epochs", 1, "--device", "cpu"]) == 0
    assert [point["epoch"] for point in results(tmp_path / "out/slm_fast")["history"]] == [1]
    make_lines(tmp_path / "datasets/LAION", 60, 20)  # of other widths than what was made up for the projectors
    assert train(["--fast", "--epochs", 1, "--device", "cpu"]) == 0
    assert results(tmp_path / "out/slm_fast")["config"]["clap_ckpt"] is None
    assert run(train_clap, ["--fast", "--epochs", 1, "--device", "cpu"]) == 0
    assert train(["--fast", "--epochs", 1, "--device", "cpu"]) == 0
    assert results(tmp_path / "out/slm_fast")["config"]["clap_ckpt"] == "out/clap_fast"


def test_it_learns_what_is_planted_and_nothing_from_shuffled_labels(tmp_path):
    folder = make_lines(tmp_path / "lines", 600, 150)
    argv = ["--data-root", folder, *SMALL, "--batch-size", 50, "--epochs", 10, "--lr", 5e-3, "--save-every", 10]
    accuracy = {}
    for name, more in (("true", []), ("shuffled", ["--shuffle-labels"])):
        assert train([*argv, "--metric", "none", "--out", tmp_path / name, *more]) == 0
        last = results(tmp_path / name)["history"][-1]
        accuracy[name] = [last["Val/Accuracy"], last["Val/audio Accuracy"], last["Val/text Accuracy"]]
    fused, *alone = accuracy["true"]
    assert fused > 0.5
    assert fused > max(alone) + 0.05
    assert min(alone) > 0.25
    # four deviations of a binomial around one of twelve
    assert max(accuracy["shuffled"]) < 1 / 12 + 4 * (1 / 12 * 11 / 12 / 150) ** 0.5


# ---- stopped, killed, resumed


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_inside_an_epoch_resumes_to_the_same_weights(small, ranks, tmp_path, unbroken, capfd, n):
    argv = [*small, "--seeds", 2, "--epochs", 6, "--out", tmp_path]
    step = 14 // n  # of five or three steps an epoch
    assert ranks(n, stopped_inside, train_slm, argv, step) == [0] * n
    said = capfd.readouterr().out
    assert f"stopped after step {step} of {30 if n == 1 else 18}; go on with the same command and --resume" in said
    assert checkpoint.read_state(tmp_path / "checkpoints" / "last")["step"] == step
    assert ranks(n, train, [*argv, "--resume"]) == [0] * n
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[n], name)


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(small, ranks, tmp_path, unbroken):
    """Killed while a checkpoint is written, then between its renaming and its link."""
    argv = [*small, "--seeds", 2, "--epochs", 6, "--out", tmp_path]
    killed_saving(train_slm, argv, "_sync", 30)
    killed_saving(train_slm, [*argv, "--resume"], "_link", 4)
    assert ranks(1, train, [*argv, "--resume"]) == [0]
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[1], name)
    assert losses(tmp_path) == losses(unbroken[1])


@pytest.mark.parametrize("more", [[], ["--schedule-epochs", 6], ["--ema", 0.9]], ids=["constant", "schedule", "ema"])
def test_three_chained_runs_are_one_run(small, tmp_path, more):
    argv = [*small, "--seeds", 2, *more]
    one, chained = tmp_path / "one", tmp_path / "chained"
    assert train([*argv, "--epochs", 6, "--out", one]) == 0
    for epochs, resume in ((2, []), (4, ["--resume"]), (6, ["--resume"])):
        assert train([*argv, "--epochs", epochs, "--out", chained, *resume]) == 0
    for name in ("last", "best"):
        assert weights(chained, name) == weights(one, name)
    assert results(chained)["history"] == results(one)["history"]
    rates = [point["Learning_Rate"] for point in results(one)["history"]]
    assert (len(set(rates)) == 1) == ("--schedule-epochs" not in more)


def test_a_renamed_checkpoint_goes_on_in_another_folder(small, tmp_path, unbroken):
    argv = [*small, "--seeds", 2]
    assert train([*argv, "--epochs", 2, "--out", tmp_path / "a"]) == 0
    renamed = tmp_path / "slm_stage3_epoch001_best"
    (tmp_path / "a" / "checkpoints" / "epoch_002").rename(renamed)
    shutil.rmtree(tmp_path / "a")
    assert train([*argv, "--checkpoint", renamed, "--resume", "--epochs", 6, "--out", tmp_path / "b"]) == 0
    for name in ("last", "best"):
        assert weights(tmp_path / "b", name) == weights(unbroken[1], name)
    assert results(tmp_path / "b")["history"] == results(unbroken[1])["history"]


def test_a_best_that_is_never_beaten_is_in_the_folder_that_goes_on(small, tmp_path):
    argv = [*small, "--lr", 0, "--warmup-steps", 0]
    assert train([*argv, "--epochs", 2, "--out", tmp_path / "a"]) == 0
    ours = ["--checkpoint", tmp_path / "a" / "checkpoints" / "epoch_002", "--resume", "--epochs", 3]
    assert train([*argv, *ours, "--out", tmp_path / "b"]) == 0
    assert (tmp_path / "b" / "checkpoints" / "best").resolve().name == results(tmp_path / "b")["best"]["checkpoint"]
    assert weights(tmp_path / "b", "best") == weights(tmp_path / "a", "best")


def test_going_on_with_other_settings(small, tmp_path, capsys):
    """Batches of another size from an epoch's end; averaged weights begun later, and given up."""
    out = tmp_path / "out"
    assert train([*small, "--epochs", 2, "--out", out]) == 0
    for epochs, more in ((3, ["--batch-size", 10]), (4, ["--batch-size", 64]), (5, ["--ema", 0.5]), (6, ["--ema", 0])):
        assert train(["--out", out, "--resume", "--epochs", epochs, *more]) == 0
        assert f"changed since the run began: {'ema' if epochs > 4 else 'batch_size'}: " in capsys.readouterr().out
    assert [point["step"] for point in results(out)["history"]] == [5, 10, 20, 22, 24, 26]


def test_a_stop_inside_an_epoch_goes_on_with_other_processes(small, ranks, tmp_path, capfd):
    argv = [*small, "--epochs", 2, "--out", tmp_path]
    assert ranks(1, stopped_inside, train_slm, argv, 9) == [0]
    assert ranks(2, train, [*argv, "--resume"]) == [0, 0]
    assert "world was 1, is 2: results will differ in the last digits" in capfd.readouterr().out
    assert results(tmp_path)["epoch"] == 2


# ---- several processes, several seeds


def test_two_processes_take_the_steps_of_one(small, ranks, tmp_path):
    """Without anything random; the last step has 19 clips, ten for one and nine for the other."""
    for n in (1, 2):
        argv = [*small, *STILL, "--batch-size", 20 // n, "--epochs", 2, "--out", tmp_path / str(n)]
        assert ranks(n, train, argv) == [0] * n
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    two = tensors(tmp_path / "2")
    for name, value in tensors(tmp_path / "1").items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)


def test_seeds_side_by_side_end_where_each_ends_alone(small, tmp_path):
    argv = [*small, *STILL, "--epochs", 2]
    assert train([*argv, "--seed", 3, "--seeds", 2, "--out", tmp_path / "both"]) == 0
    both = tensors(tmp_path / "both")
    for k, seed in enumerate((3, 4)):
        assert train([*argv, "--seed", seed, "--out", tmp_path / str(seed)]) == 0
        for name, value in tensors(tmp_path / str(seed)).items():
            part = both[name] if name.startswith(("clap.mean", "clap.std")) else both[name][k : k + 1]
            torch.testing.assert_close(part, value, rtol=1e-3, atol=1e-4)


# ---- projectors of the stage before


def test_projectors_stay_as_they_are(small, projectors, tmp_path, capsys):
    argv = [*small, "--seeds", 2, "--clap-ckpt", projectors, "--epochs", 2, "--out", tmp_path]
    assert train(argv) == 0
    said, theirs, ours = capsys.readouterr().out, tensors(projectors, "best"), tensors(tmp_path)
    assert f"projectors of {projectors / 'checkpoints'}/best_" in said
    kept = {name for name in ours if name.startswith("clap.")}
    assert kept == {f"clap.{name}" for name in theirs}
    for name, value in theirs.items():
        for seed in range(2):
            found = ours[f"clap.{name}"]
            assert torch.equal(found if name.startswith(("mean", "std")) else found[seed : seed + 1], value)
    learning = sum(value[0].numel() for name, value in ours.items() if name not in kept)
    assert f"; {learning:,} parameters x 2 seeds; " in said


def test_a_resumed_run_has_its_own_projectors(small, projectors, tmp_path):
    clap, one, two = tmp_path / "clap", tmp_path / "one", tmp_path / "two"
    shutil.copytree(projectors, clap, symlinks=True)
    argv = [*small, "--clap-ckpt", clap]
    assert train([*argv, "--epochs", 2, "--out", one]) == 0
    assert train([*argv, "--epochs", 1, "--out", two]) == 0
    shutil.rmtree(clap)
    assert train([*argv, "--epochs", 2, "--out", two, "--resume"]) == 0
    assert weights(two) == weights(one)


def test_the_published_network_to_the_parameter(tmp_path, capsys):
    folder = make_lines(tmp_path / "lines", 72, 2, dim=768, emotions=[f"emotion{i}" for i in range(36)])
    file = tmp_path / "clap_projectors.pt"
    published = {
        f"{m}_proj": {"weight": torch.randn(768, 768) * 0.02, "bias": torch.randn(768)} for m in ("audio", "text")
    }
    torch.save(published, file)
    argv = ["--data-root", folder, "--num-emotions", 36, "--clap-ckpt", file, "--form", "original", "--device", "cpu"]
    assert train([*argv, "--epochs", 1, "--no-test", "--out", tmp_path / "out"]) == 0
    said = capsys.readouterr().out
    assert f"projectors of {file}: 4/4 tensors of the projectors" in said
    assert " of 36 classes; 6,332,452 parameters x 1 seeds; " in said
    found = tensors(tmp_path / "out")
    assert torch.equal(found["clap.audio_proj.weight"][0], published["audio_proj"]["weight"])
    assert torch.equal(found["clap.text_proj.bias"][0, 0], published["text_proj"]["bias"])
    assert results(tmp_path / "out")["config"]["model"]["clap"]["normalize"] is False


# ---- odd data


def test_values_that_are_no_numbers_become_the_mean(lines, small, tmp_path):
    ids = clip_ids(lines)
    broken = {ids[0]: (3, "nan"), ids[1]: (slice(None), "inf"), next(i for i in ids if i[0] == "v"): (0, "nan")}
    kept = []

    def features(m, id, x):
        if m == "audio":
            if id in broken:
                column, value = broken[id]
                x[column] = float(value)
            kept.extend([x] if id.startswith("train") else [])
        return x

    folder = changed_lines(lines, tmp_path / "lines", features)
    assert train([*small, "--data-root", folder, "--epochs", 2, "--out", tmp_path / "out"]) == 0
    assert torch.tensor(losses(tmp_path / "out")).isfinite().all()
    frames = torch.stack(kept)
    mean = torch.where(frames.isfinite(), frames, torch.nan).nanmean(0)
    torch.testing.assert_close(tensors(tmp_path / "out")["clap.mean_audio"], mean)


def test_clips_without_sound_or_without_a_label(lines, small, tmp_path, capsys):
    """A third has no sound; a fifth of train has no label and is left out."""
    ids = clip_ids(lines)
    unknown = [id for id in ids if id.startswith("train")][::5]
    folder = changed_lines(
        lines, tmp_path / "lines", lambda m, id, x: None if m == "audio" and ids.index(id) % 3 == 0 else x,
        label=lambda clip: None if clip.id in unknown else clip.label,
    )  # fmt: skip
    assert train([*small, "--data-root", folder, "--epochs", 1, "--out", tmp_path / "out"]) == 0
    assert f"{99 - len(unknown)} train, 24 valid, 24 test clips of 12 classes" in capsys.readouterr().out
    assert torch.tensor(losses(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("only", ["audio", "text"])
def test_one_modality_alone(lines, small, tmp_path, capsys, only):
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: x if m == only else None)
    argv = [arg for arg in small if arg != "--no-test"]
    assert train([*argv, "--data-root", folder, "--epochs", 1, "--out", tmp_path / "out"]) == 0
    assert f"model, 1 seed, {only}" in capsys.readouterr().out
    assert set(results(tmp_path / "out")["test"]["scores"]) == {only}


# ---- mistakes


def test_another_number_of_classes(small, fails, tmp_path):
    line = fails(*small, "--num-emotions", 36, "--out", tmp_path)
    assert line == f"--num-emotions 36: the data have 12 classes: {LABELS}"
    assert not (tmp_path / "checkpoints").exists()


def test_no_data_names_the_place_and_the_way_out(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails() == (
        "no data: datasets/LAION/manifest.csv not found; --data-root names a folder with manifest.csv and the stores "
        "audio/ and text/, --fast needs none"
    )
    assert fails("--data-root", "nowhere") == (
        "nowhere/manifest.csv not found: --data-root names a folder with manifest.csv, --manifest another list"
    )


def test_no_projectors_where_clap_ckpt_says(small, fails, tmp_path):
    gone, argv = tmp_path / "clap", [*small, "--out", tmp_path / "out"]
    line = fails(*argv, "--clap-ckpt", gone)
    assert line == f"checkpoint {gone}: not found (a run folder, its checkpoints/ or one checkpoint folder)"
    assert fails(*argv, "--clap-ckpt", f"{gone}.pt").startswith(f"{gone}.pt: not readable as tensors only (")


def test_projectors_of_something_else(lines, small, fails, projectors, tmp_path, unbroken):
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: x[:30] if m == "audio" else x)
    line = fails(*small, "--data-root", folder, "--clap-ckpt", projectors, "--out", tmp_path / "out")
    ours, theirs = "{'audio': {'dim': 30, ", "{'audio': {'dim': 32, "
    assert line.startswith(f"{projectors}: its projectors read {theirs}")
    assert f", the data here are {ours}" in line
    line = fails(*small, "--clap-ckpt", unbroken[1], "--out", tmp_path / "out")
    assert line == f"--clap-ckpt {unbroken[1]}: not a run of train_clap.py"
    torch.save({"audio_proj": {"weight": torch.zeros(16, 9), "bias": torch.zeros(16)},
                "text_proj": {"weight": torch.zeros(16, 9), "bias": torch.zeros(16)}}, tmp_path / "p.pt")  # fmt: skip
    line = fails(*small, "--clap-ckpt", tmp_path / "p.pt", "--out", tmp_path / "out")
    assert line == f"{tmp_path / 'p.pt'}: audio_proj is (16, 9), the features and --proj-dim here make it (16, 32)"


def test_resume_from_nothing(small, fails, tmp_path, capsys):
    line = fails(*small, "--resume", "checkpoints/slm_stage3_epoch049.pt", "--out", tmp_path)
    assert line == "--resume checkpoints/slm_stage3_epoch049.pt: not found (first run: leave --resume out)"
    assert train([*small, "--epochs", 1, "--resume", "--out", tmp_path / "out"]) == 0
    assert f"--resume: {tmp_path / 'out'} holds no checkpoint yet, starting fresh" in capsys.readouterr().out


def test_best_alone_cannot_go_on(fails, unbroken):
    best = (unbroken[1] / "checkpoints" / "best").resolve()
    line = fails("--resume", unbroken[1] / "checkpoints" / "best", "--epochs", 9)
    assert line == f"{best}: holds weights only, so --ckpt can start from it; --resume needs epoch_* or last"


def test_a_run_is_not_overwritten_by_accident(small, fails, unbroken):
    assert fails(*small, "--out", unbroken[1]) == (
        f"{unbroken[1]} holds a run: --resume goes on with it, --overwrite replaces it, --out DIR starts elsewhere"
    )


def test_flags_that_make_no_sense(small, fails):
    assert fails(*small, "--num-emotion", 12) == "unknown option --num-emotion (nearest: --num-emotions)"
    assert fails(*small, "--epochs", 0) == "--seeds, --epochs and --batch-size are at least 1, --seed at least 0"
    assert fails(*small, "--epochs", "many").startswith("--epochs: 'many' ")


def test_a_change_of_shape_cannot_be_resumed(small, fails, tmp_path):
    assert train([*small, "--epochs", 1, "--out", tmp_path]) == 0
    kept = weights(tmp_path)
    line = fails("--out", tmp_path, "--resume", "--epochs", 2, "--hidden-dim", 24)
    assert "of the wrong shape" in line
    assert weights(tmp_path) == kept


def test_a_loss_that_is_not_a_number_names_clips(small, fails, tmp_path):
    assert train([*small, "--epochs", 1, "--out", tmp_path]) == 0
    kept = weights(tmp_path)
    line = fails("--out", tmp_path, "--resume", "--epochs", 2, "--lr", 1e30)
    assert line.startswith("epoch 2, step ")
    assert "samples train_" in line
    assert "lower --lr" in line
    assert weights(tmp_path) == kept


# ---- what data may lack


def test_a_rank_without_clips_takes_the_step_too(lines, ranks, tmp_path):
    """The last of 99 clips is a step of its own."""
    for n in (1, 2):
        argv = ["--data-root", lines, *SMALL, *STILL, "--batch-size", 14 // n, "--epochs", 2]
        argv += ["--out", tmp_path / str(n)]
        assert ranks(n, lambda argv: run(train_slm, argv), argv) == [0] * n
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("only", ["audio", "text"])
def test_the_original_form_with_one_modality(lines, tmp_path, only):
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: x if m == only else None)
    argv = ["--data-root", folder, *SMALL, "--form", "original", "--epochs", 1, "--out", tmp_path / "out"]
    assert run(train_slm, argv) == 0


def test_projectors_that_were_frozen_learn_on(lines, tmp_path):
    """A checkpoint of a run with --clap-ckpt starts one without."""
    clap = ["--data-root", lines, "--device", "cpu", "--batch-size", 20, "--epochs", 1, "--proj-dim", 16, "--no-test"]
    assert run(train_clap, [*clap, "--out", tmp_path / "clap"]) == 0
    argv = ["--data-root", lines, *SMALL, "--epochs", 1]
    assert run(train_slm, [*argv, "--clap-ckpt", tmp_path / "clap", "--out", tmp_path / "a"]) == 0
    assert run(train_slm, [*argv, "--ckpt", tmp_path / "a", "--out", tmp_path / "b"]) == 0
    argv += ["--ckpt", tmp_path / "b", "--clap-ckpt", tmp_path / "clap"]
    assert run(train_slm, [*argv, "--out", tmp_path / "c"]) == 0


def test_projectors_that_make_everything_alike_find_nothing(lines, tmp_path):
    """Ties count against a query."""
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: torch.ones_like(x))
    argv = ["--data-root", folder, "--device", "cpu", "--batch-size", 20, "--epochs", 1, "--out", tmp_path / "out"]
    assert run(train_clap, argv) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["test"]["scores"]["t2a_r1"]["mean"] < 0.5


@pytest.mark.parametrize("script", [train_clap, train_slm])
def test_stores_with_none_of_the_clips(lines, tmp_path, script, capsys):
    folder = changed_lines(lines, tmp_path / "lines", id=lambda clip: f"other_{clip.id}")
    assert run(script, ["--data-root", folder, "--device", "cpu", "--epochs", 1, "--out", tmp_path / "out"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pairs_without_sound_or_words_are_no_pairs(lines, tmp_path):
    ids = clip_ids(lines)
    folder = changed_lines(
        lines, tmp_path / "lines", lambda m, id, x: None if m == "audio" and ids.index(id) % 2 else x
    )
    argv = ["--data-root", folder, "--device", "cpu", "--batch-size", 20, "--epochs", 1, "--out", tmp_path / "out"]
    assert run(train_clap, argv) == 0
    assert results(tmp_path / "out")["test"]["pairs"] == 12
