import torch

from bench import mosei as bench
from bench import report
from common import config

TINY = ["--rows", "200", "--pickle-rows", "20", "--repeats", "1", "--num-workers", "0", "--device", "cpu"]


def test_every_variant_is_measured(tmp_path, monkeypatch, capsys):
    # here everything is imported, and memory that others freed may be taken again
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "memory", {"VmRSS": 100.0, "VmHWM": 150.0}.__getitem__)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, TINY))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/mosei.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    lines = [line.strip("| ").partition(" | ") for line in text.splitlines()]
    rows = {name: value for name, _, value in lines if value}
    for name in ("ours, batch 16", "floor, batch 512", "DataLoader, 0 workers, batch 16", "xfuse, 5 seeds, batch 16"):
        assert float(rows[f"{name}: ms a step"].split()[0]) > 0
    assert float(rows["xfuse: 5 x one seed, times 5 seeds at once, batch 16"].split()[0]) > 0
    for name in ("converted store, ready to train: ms; peak MiB", "pickle.load, times converted store: time; peak"):
        assert rows[name].endswith("; 50" if "MiB" in name else "; 1 (1 to 1)")


def test_the_variants_do_the_same_work():
    data = bench.random_utterances(48)
    weights = []
    for peer in (False, True):
        torch.manual_seed(0)
        loop = bench.Loop(data, 16, 1, torch.device("cpu"))
        loop.task.model.eval()  # no dropout
        if peer:
            order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
            loop.loader(torch.utils.data.DataLoader(bench.Rows(data), 16, sampler=order), 9)
        else:
            loop.ours(9)
        weights.append(loop.flat.values)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_pairs_are_of_the_same_rounds():
    times = {"fast": [0.0, 1.0, 2.0, 3.0], "slow": [0.5, 3.5]}
    assert bench.pairs(times, "fast", "slow") == [(0.0, 0.5), (3.0, 3.5)]
    assert bench.pairs(times, "slow", "fast") == [(0.5, 0.0), (3.5, 3.0)]
