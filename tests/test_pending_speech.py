"""Tests of bugs that lie outside train_clap.py, train_slm.py and common/: red until those are mended, then to be moved
into tests/test_train_slm.py / tests/test_train_clap.py. Run: copy to tests/, pytest tests/pending_speech_tests.py"""

import json

import pytest
import torch

import train_clap
import train_slm
from data.manifest import Clip
from data.pairs import standardize_speakers
from data.resident import Ragged
from tests.test_train_slm import SMALL, STILL, clip_ids, losses, results
from tests.training import changed_lines, make_lines, run


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return make_lines(tmp_path_factory.mktemp("lines") / "lines")


def test_a_rank_without_clips_takes_the_step_too(lines, ranks, tmp_path):
    """The last of 99 clips is a step of its own (model/seeds.py Linear: view(..., -1) of nothing)."""
    for n in (1, 2):
        argv = ["--data-root", lines, *SMALL, *STILL, "--batch-size", 14 // n, "--epochs", 2, "--out", tmp_path / str(n)]
        assert ranks(n, lambda argv: run(train_slm, argv), argv) == [0] * n
    for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("only", ["audio", "text"])
def test_the_original_form_with_one_modality(lines, tmp_path, only):
    folder = changed_lines(lines, tmp_path / "lines", lambda m, id, x: x if m == only else None)
    argv = ["--data-root", folder, *SMALL, "--form", "original", "--epochs", 1, "--out", tmp_path / "out"]
    assert run(train_slm, argv) == 0


def test_projectors_that_were_frozen_learn_on(lines, tmp_path):
    """A checkpoint of a run with --clap-ckpt starts one without (clap.logit_scale is in one, not in the other)."""
    clap = ["--data-root", lines, "--device", "cpu", "--batch-size", 20, "--epochs", 1, "--proj-dim", 16, "--no-test"]
    assert run(train_clap, [*clap, "--out", tmp_path / "clap"]) == 0
    argv = ["--data-root", lines, *SMALL, "--epochs", 1]
    assert run(train_slm, [*argv, "--clap-ckpt", tmp_path / "clap", "--out", tmp_path / "a"]) == 0
    assert run(train_slm, [*argv, "--ckpt", tmp_path / "a", "--out", tmp_path / "b"]) == 0
    assert run(train_slm, [*argv, "--ckpt", tmp_path / "b", "--clap-ckpt", tmp_path / "clap", "--out", tmp_path / "c"]) == 0


def test_projectors_that_make_everything_alike_find_nothing(lines, tmp_path):
    """Stores that hold none of the clips, or vectors that are all equal, give R@1 1.0 today: ties count as found."""
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


def test_a_broken_clip_does_not_silence_its_speaker():
    values = torch.randn(4, 3)
    values[0], values[3] = torch.nan, 0.0
    part = Ragged(values, torch.tensor([[0], [1], [2], [3]]))
    standardize_speakers(part, [Clip(f"c{i}", None, "words", "joy", speaker="s") for i in range(3)])
    assert part.values[1:3].isfinite().all()
