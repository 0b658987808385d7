"""The training benchmark: both variants on the tiny model, and what it refuses."""

import math
import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import llm_train as bench
from bench import report
from common import config
from common.config import UserError

pytest.importorskip("transformers")
pytest.importorskip("peft")
CPU = torch.device("cpu")


class Here:
    """Apart, in this process, which has imported everything."""

    def __init__(self, kind, job):
        self.began, self.held = 0.0, kind(job)

    def __call__(self, method, *args):
        return getattr(self.held, method)(*args)

    def close(self):
        pass


def tables(text):
    """{heading: {row: [cells]}} of what a run prints."""
    found = {}
    for part in text.split("\n\n"):
        if part.startswith("| "):
            (name, *_), _, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in part.strip().splitlines())
            found[name] = {line[0]: line[1:] for line in lines}
    return found


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(bench, "Apart", Here)
    monkeypatch.setattr(bench.dist, "keep_memory", lambda device: None)
    monkeypatch.setattr(bench, "matmul_rate", lambda device, half: 1e12)  # seconds, for every turn
    # this process may keep what other tests freed
    monkeypatch.setattr(bench, "memory", {"VmRSS": 100.0, "VmHWM": 150.0}.__getitem__)


def job(case, folder, steps=3):
    bench.make_weights(folder, "tiny", 0)
    return bench.Job("tiny", case, str(folder), CPU, 1, steps, 0)


@pytest.mark.usefixtures("here")
def test_every_case_is_measured_and_both_train_alike(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, ["--tiny", "--device", "cpu", "--threads", "1"]))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/llm_train.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    found = tables(text)
    assert list(found) == [*bench.CASES["tiny"], "--size 7b, needs a GPU"]
    for case in bench.CASES["tiny"]:
        rows = found[case]
        assert list(rows) == ["ours", bench.PEER, "ours / theirs"]
        for name in ("ours", bench.PEER):
            seconds, samples, tokens, memory, share, first = (float(cell.split()[0]) for cell in rows[name])
            assert samples == pytest.approx(bench.CASES["tiny"][case].samples / seconds, rel=0.01)
            assert samples < tokens
            assert min(share, first) > 0
            assert memory == 50
        assert len(rows["ours / theirs"]) == len(bench.COLUMNS)
    assert text.count("losses of 4 steps within ") == 3
    assert set(map(tuple, found["--size 7b, needs a GPU"].values())) == {("not measured",)}


def test_an_object_in_another_process():
    counter = bench.Apart(Counter, "banana")
    try:
        assert counter("most_common", 1) == [("a", 3)]
        assert counter("update", "nnn") is None
        assert counter("most_common", 1) == [("n", 5)]  # it is still the same one
        assert 0 < counter.began <= time.time()
        assert counter.pool.submit(os.getpid).result() != os.getpid()
    finally:
        counter.close()


@pytest.mark.usefixtures("here")
def test_another_loss_is_refused(monkeypatch, tmp_path):
    loss = bench.Peer.loss
    monkeypatch.setattr(bench.Peer, "loss", lambda self, samples: loss(self, samples) * 1.001)
    with pytest.raises(UserError, match=r"^step 0: loss \d.*, transformers \+ peft \d.*: they do not do the same"):
        bench.measure(job("ragged", tmp_path), 1, 1)


def test_gaps():
    assert bench.loss_gap([1.0, 2.0], [1.0, 2.0001], 1e-4) == pytest.approx(5e-5, rel=1e-3)
    with pytest.raises(UserError, match="step 1: loss nan"):
        bench.loss_gap([1.0, math.nan], [1.0, 1.0], 1.0)
    a, b = ({"a": np.ones(4), "b": np.full(4, x)} for x in (1.0, 1.01))
    assert bench.weight_gap(a, b, 0.1) == pytest.approx(0.01 / 1.01)
    with pytest.raises(UserError, match=r"b: trained weights differ by 0\.0099"):
        bench.weight_gap(a, b, 1e-3)
    with pytest.raises(UserError, match="in one of the two only: b"):
        bench.weight_gap(a, {"a": np.ones(4)}, 1e-3)


def test_samples_are_as_long_as_the_case_says():
    case = bench.CASES["small"]["ragged"]
    drawn = bench.draw(case, 100, 3, 0)
    lengths = [sample.length for samples in drawn for sample in samples]
    assert len(lengths) == 24
    assert 80 <= min(lengths) < 160 < 340 < max(lengths) <= 420
    assert all(20 <= len(sample.answer) <= 120 for samples in drawn for sample in samples)
    assert drawn[0][0].pieces == bench.draw(case, 100, 1, 0)[0][0].pieces != drawn[1][0].pieces
    dense = bench.draw(bench.CASES["small"]["dense"], 100, 1, 0)[0]
    assert [(sample.length, len(sample.answer)) for sample in dense] == [(256, 255)] * 4


class Matmuls(TorchDispatchMode):
    """Adds up the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.flops += 2 * out.numel() * args[-2].shape[1]
        return out


@pytest.mark.parametrize("case", bench.CASES["tiny"])
def test_flops_are_those_of_the_matmuls(case, tmp_path):
    trainer = bench.Ours(job(case, tmp_path))
    samples = next(trainer.drawn)
    with Matmuls() as counted:
        trainer.step(samples)
    squares = sum(sample.length**2 for sample in samples)
    attention = 2 * trainer.shape["num_hidden_layers"] * trainer.shape["hidden_size"] * squares
    attention *= 4 if trainer.case.checkpointing else 3
    assert bench.flops(trainer.shape, trainer.case, samples) - attention == counted.flops


def test_a_profile_adds_up(tmp_path):
    lines = bench.profile(job("ragged", tmp_path))
    rows = {line[0]: line[1:] for line in ([c.strip() for c in line.split("|")[1:-1]] for line in lines[2:-1])}
    assert {*bench.GROUPS, "other", "all, profiled", "all, not profiled"} < set(rows)
    shares = [float(rows[name][1].rstrip("%")) for name in (*bench.GROUPS, "other")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert rows["matmul"][1] != "0.0%" != rows["attention"][1]
    assert any("GFLOP/s of a matmul" in name for name in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "7b"], "--size 7b: needs a GPU"),
        (["--cases", "packed"], "--cases packed: --size small has dense, dense-checkpointing, ragged"),
    ],
)
def test_what_cannot_be_measured(flags, message):
    with pytest.raises(UserError) as error:
        bench.main(config.load(bench.Config, [*flags, "--device", "cpu", "--threads", "1"]))
    assert str(error.value) == message
