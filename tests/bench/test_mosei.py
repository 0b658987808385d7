import pytest
import torch

from bench import loops, report
from bench import mosei as bench
from common import config

TINY = ["--rows", "200", "--pickle-rows", "20", "--repeats", "1", "--num-workers", "0", "--device", "cpu"]


def test_every_variant_is_measured(tmp_path, monkeypatch, capsys):
    # here everything is imported, and memory that others freed may be taken again
    for module in (bench, loops):
        monkeypatch.setattr(module, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "memory", {"VmRSS": 100.0, "VmHWM": 150.0}.__getitem__)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, TINY))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/mosei.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    heads = {line[0] for line in lines if line[1:] == list(loops.COLUMNS)}
    assert heads == {"mlp, batch 16, 13 steps, fp32", "mlp, batch 512, 1 steps, fp32"}
    names = ("floor", "ours", "DataLoader, 0 workers", "plain PyTorch, DataLoader, 0 workers")
    ways = [line for line in lines if line[0] in names]
    assert len(ways) == 8
    assert all(float(line[1].split()[0]) > 0 for line in ways)
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert float(rows["5 x one seed, times 5 seeds at once"].split()[0]) > 0
    for name in ("converted store, ready to train: ms; peak MiB", "pickle.load, times converted store: time; peak"):
        assert rows[name].endswith("; 50" if "MiB" in name else "; 1 (1 to 1)")


def test_the_plain_network_is_the_same():
    data = bench.random_utterances(32)
    loop, plain = bench.Loop(data, 16, 1, torch.device("cpu")), bench.Plain(32, 16, torch.device("cpu"))
    assert plain.steps == loop.steps
    own = [p for name, p in loop.task.model.named_parameters()]
    for p, theirs in zip(own, plain.model.parameters(), strict=True):
        theirs.data.copy_(p[0].view(theirs.shape))
    x, mask = data.gather(torch.arange(16)[None])
    expected = loop.task.model.eval().logits(x, mask)[0][0]
    found = plain.model.eval()(torch.cat([value[0, :, 0] for value in x.values()], -1))
    torch.testing.assert_close(found, expected)
    assert [m.p for m in plain.model if isinstance(m, torch.nn.Dropout)] == pytest.approx([0.3, 0.195])


def test_the_variants_do_the_same_work():
    data = bench.random_utterances(48)
    weights = []
    for peer in (False, True):
        torch.manual_seed(0)
        loop = bench.Loop(data, 16, 1, torch.device("cpu"), lr=1e-3)
        first = loop.flat.values.clone()
        loop.task.model.eval()  # no dropout
        if peer:
            order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
            loop.loader(torch.utils.data.DataLoader(bench.Rows(data), 16, sampler=order), 9)
        else:
            loop.ours(9)
        weights.append(loop.flat.values)
        assert (loop.flat.values - first).abs().max() > 1e-3
    torch.testing.assert_close(*weights, rtol=0, atol=0)
