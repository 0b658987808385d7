"""train_clap.py as a user runs it: learning, stopped, killed and resumed, several seeds or processes, bad input."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_clap
from common import checkpoint, config
from data import mock_speech
from tests.conftest import drawn, run_ranks
from tests.training import changed_lines, error, killed_saving, make_lines, run, stopped_inside, weights

# four steps an epoch, of which the last clips are left out; dropout is on
SMALL = ["--device", "cpu", "--batch-size", 20, "--lr", 1e-2, "--schedule", "constant", "--warmup-steps", 3,
         "--proj-dim", 16, "--no-test"]  # fmt: skip


def train(argv):
    return run(train_clap, argv)


@pytest.fixture
def fails(capsys):
    return lambda *argv: error(train_clap, argv, capsys)


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
    """A run with all that it writes."""
    out = tmp_path_factory.mktemp("finished") / "out"
    argv = [arg for arg in SMALL if arg != "--no-test"]
    with drawn():
        assert train(["--data-root", lines, *argv, "--epochs", 3, "--seeds", 2, "--out", out]) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def losses(out):
    return [(point["Train/Loss"], point["Val/Loss"]) for point in results(out)["history"]]


def tensors(out, name="last"):
    return load_file(out / "checkpoints" / name / checkpoint.MODEL)


# ---- what a run writes and says


def test_a_run_writes_what_is_promised(finished):
    found = results(finished)
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"epoch_001", "epoch_002", "epoch_003", "last", "best", found["best"]["checkpoint"]}
    assert {"config", "history", "test", "commit", "timestamp", "seeds", "sources"} <= set(found)
    assert [point["epoch"] for point in found["history"]] == [1, 2, 3]
    assert [json.loads(line)["epoch"] for line in open(finished / "log.jsonl")] == [1, 2, 3]
    scores = {f"{way}_{name}" for way in ("t2a", "a2t") for name in ("r1", "r5", "r10", "median_rank")}
    assert scores <= set(found["test"]["scores"])
    assert config.load(train_clap.Config, ["--cfg", str(finished / "config.yaml")]).seeds == 2
    assert (finished / "curves.png").stat().st_size > 500


def test_best_is_the_epoch_of_the_lowest_valid_loss_if_that_is_the_metric(small, tmp_path):
    assert train([*small, "--metric", "loss", "--epochs", 4, "--lr", 0.1, "--out", tmp_path]) == 0
    valid = [loss for _, loss in losses(tmp_path)]
    best = results(tmp_path)["best"]
    assert best["value"] == min(valid)
    assert best["epochs"] == [valid.index(min(valid)) + 1]
    assert weights(tmp_path, "best") == weights(tmp_path, f"epoch_{best['epochs'][0]:03d}")


def test_fast_needs_nothing_and_replaces_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mock_speech, "SIZES", {"lines": {"train": 98, "valid": 24, "test": 24}})
    for epochs in (3, 2):
        assert train(["--fast", "--epochs", epochs, "--device", "cpu"]) == 0
        found = results(tmp_path / "out/clap_fast")
        assert [point["epoch"] for point in found["history"]] == list(range(1, epochs + 1))
        assert found["test"]["pairs"] == 24


def test_it_learns_what_belongs_together_and_nothing_from_shuffled_words(tmp_path):
    folder = make_lines(tmp_path / "lines", 600, 150)
    argv = ["--data-root", folder, *SMALL, "--batch-size", 150, "--epochs", 15, "--save-every", 15, "--metric", "none"]
    r1 = {}
    for name, more in (("true", []), ("shuffled", ["--shuffle-labels"])):
        assert train([*argv, "--out", tmp_path / name, *more]) == 0
        r1[name] = results(tmp_path / name)["history"][-1]["Val/R1"]
    assert r1["true"] > 0.3
    # four deviations of a binomial around one of 150
    assert r1["shuffled"] < 1 / 150 + 4 * (1 / 150 * 149 / 150 / 150) ** 0.5


# ---- stopped, killed, resumed


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_inside_an_epoch_resumes_to_the_same_weights(small, ranks, tmp_path, unbroken, capfd, n):
    argv = [*small, "--seeds", 2, "--epochs", 6, "--out", tmp_path]
    step = 10 // n  # of four or two steps an epoch
    assert ranks(n, stopped_inside, train_clap, argv, step) == [0] * n
    said = capfd.readouterr().out
    assert f"stopped after step {step} of {24 // n}; go on with the same command and --resume" in said
    assert checkpoint.read_state(tmp_path / "checkpoints" / "last")["step"] == step
    assert ranks(n, train, [*argv, "--resume"]) == [0] * n
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[n], name)


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(small, ranks, tmp_path, unbroken):
    """Killed while a checkpoint is written, then between its renaming and its link."""
    argv = [*small, "--seeds", 2, "--epochs", 6, "--out", tmp_path]
    killed_saving(train_clap, argv, "_sync", 25)
    killed_saving(train_clap, [*argv, "--resume"], "_link", 3)
    assert ranks(1, train, [*argv, "--resume"]) == [0]
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[1], name)
    assert losses(tmp_path) == losses(unbroken[1])


def test_three_chained_runs_are_one_run(small, tmp_path, unbroken):
    argv = [*small, "--seeds", 2, "--out", tmp_path]
    for epochs, resume in ((2, []), (4, ["--resume"]), (6, ["--resume"])):
        assert train([*argv, "--epochs", epochs, *resume]) == 0
    for name in ("last", "best"):
        assert weights(tmp_path, name) == weights(unbroken[1], name)
    assert results(tmp_path)["history"] == results(unbroken[1])["history"]


def test_a_copied_checkpoint_goes_on_in_another_folder(small, tmp_path, unbroken):
    argv = [*small, "--seeds", 2]
    assert train([*argv, "--epochs", 2, "--out", tmp_path / "a"]) == 0
    copied = tmp_path / "projectors_of_june"
    (tmp_path / "a" / "checkpoints" / "epoch_002").rename(copied)
    assert train([*argv, "--checkpoint", copied, "--resume", "--epochs", 6, "--out", tmp_path / "b"]) == 0
    for name in ("last", "best"):
        assert weights(tmp_path / "b", name) == weights(unbroken[1], name)


def test_going_on_with_batches_of_another_size(small, tmp_path):
    for epochs, size in ((2, 20), (3, 10), (4, 60)):
        assert train([*small, "--out", tmp_path, "--resume", "--epochs", epochs, "--batch-size", size]) == 0
    assert [point["step"] for point in results(tmp_path)["history"]] == [4, 8, 17, 18]


# ---- several processes, several seeds


def test_two_processes_take_the_steps_of_one(small, ranks, tmp_path):
    """Without dropout, 2 x 10 pairs a step have the losses, the gradients and so the weights of 1 x 20."""
    for n in (1, 2):
        argv = [*small, "--dropout", 0, "--batch-size", 20 // n, "--epochs", 3, "--out", tmp_path / str(n)]
        assert ranks(n, train, argv) == [0] * n
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    two = tensors(tmp_path / "2")
    for name, value in tensors(tmp_path / "1").items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)


def test_seeds_side_by_side_end_where_each_ends_alone(small, tmp_path):
    argv = [*small, "--dropout", 0, "--epochs", 2]
    assert train([*argv, "--seed", 3, "--seeds", 2, "--out", tmp_path / "both"]) == 0
    both = tensors(tmp_path / "both")
    for k, seed in enumerate((3, 4)):
        assert train([*argv, "--seed", seed, "--out", tmp_path / str(seed)]) == 0
        for name, value in tensors(tmp_path / str(seed)).items():
            part = both[name] if name.startswith(("mean", "std")) else both[name][k : k + 1]
            torch.testing.assert_close(part, value, rtol=1e-3, atol=1e-4)


def test_the_factor_of_similarities_stays_within_its_bounds(small, tmp_path):
    argv = [*small, "--max-scale", 20, "--lr", 1, "--warmup-steps", 0, "--epochs", 3, "--out", tmp_path]
    assert train(argv) == 0
    assert all(1 - 1e-5 <= point["Scale"] <= 20 + 1e-4 for point in results(tmp_path)["history"])


# ---- published projectors


def test_the_published_projectors_start_a_run(small, fails, tmp_path):
    published = {f"{m}_proj": {"weight": torch.randn(16, 32), "bias": torch.randn(16)} for m in ("audio", "text")}
    file = tmp_path / "clap_projectors.pt"
    torch.save(published, file)
    assert train([*small, "--ckpt", file, "--lr", 0, "--epochs", 1, "--out", tmp_path / "out"]) == 0
    found = tensors(tmp_path / "out")
    assert torch.equal(found["audio_proj.weight"][0], published["audio_proj"]["weight"])
    assert torch.equal(found["text_proj.bias"][0, 0], published["text_proj"]["bias"])
    assert results(tmp_path / "out")["config"]["model"]["normalize"] is False
    line = fails(*small, "--proj-dim", 8, "--ckpt", file, "--out", tmp_path / "other")
    assert line == f"{file}: audio_proj is (16, 32), the features and --proj-dim here make it (8, 32)"


# ---- odd data and mistakes


def test_values_that_are_no_numbers_become_the_mean(lines, small, tmp_path):
    ids = [line.split(",")[0] for line in open(lines / "manifest.csv")][1:]
    broken = {ids[0]: 3, ids[1]: slice(None), next(id for id in ids if id.startswith("valid")): slice(None)}

    def features(m, id, x):
        if m == "audio" and id in broken:
            x[broken[id]] = float("nan")
        return x

    folder = changed_lines(lines, tmp_path / "lines", features)
    assert train([*small, "--data-root", folder, "--epochs", 2, "--out", tmp_path / "out"]) == 0
    assert torch.tensor(losses(tmp_path / "out")).isfinite().all()
    assert tensors(tmp_path / "out")["mean_audio"].isfinite().all()


def test_projectors_need_sound_and_words(lines, small, fails, tmp_path):
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: x if m == "audio" else None)
    line = fails(*small, "--data-root", folder, "--out", tmp_path / "out")
    assert line == f"{folder}: no store text/: projectors need sound and words (--stores)"


def test_no_data_names_the_place_and_the_way_out(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails() == (
        "no data: datasets/LAION/manifest.csv not found; --data-root names a folder with manifest.csv and the stores "
        "audio/ and text/, --fast needs none"
    )


def test_resume_from_nothing(small, fails, tmp_path):
    line = fails(*small, "--resume", tmp_path / "gone", "--out", tmp_path)
    assert line == f"--resume {tmp_path / 'gone'}: not found (first run: leave --resume out)"


def test_a_run_is_not_overwritten_by_accident(small, fails, finished):
    assert fails(*small, "--out", finished) == (
        f"{finished} holds a run: --resume goes on with it, --overwrite replaces it, --out DIR starts elsewhere"
    )


def test_flags_that_make_no_sense(small, fails):
    assert fails(*small, "--proj-dims", 12) == "unknown option --proj-dims (nearest: --proj-dim)"
    assert fails(*small, "--batch-size", 1) == (
        "--seeds and --epochs are at least 1, --batch-size at least 2, --seed at least 0"
    )


def test_a_loss_that_is_not_a_number_names_clips(small, fails, tmp_path):
    assert train([*small, "--epochs", 1, "--out", tmp_path]) == 0
    kept = weights(tmp_path)
    line = fails("--out", tmp_path, "--resume", "--epochs", 2, "--lr", 1e30)
    assert line.startswith("epoch 2, step ")
    assert "samples train_" in line
    assert "lower --lr" in line
    assert weights(tmp_path) == kept
