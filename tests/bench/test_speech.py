import math
from functools import partial

import pytest
import torch

from bench import loops, report
from bench import speech as bench
from common import config

TINY = ["--dim", "16", "--slm-rows", "48", "--clap-rows", "48", "--slm-batch", "16", "8", "--clap-batch", "24",
        "--repeats", "2", "--num-workers", "0", "--device", "cpu"]  # fmt: skip
KINDS = pytest.mark.parametrize("kind", [bench.SlmLoop, bench.ClapLoop])


def tables(text):
    """{heading: {variant: {column: number}}} of what a run prints; a cell that is empty or says BELOW is left out."""
    found = {}
    for part in text.split("\n\n")[3:]:
        (name, *columns), _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines())
        found[name] = {
            line[0]: {
                c: float(v.split()[0]) for c, v in zip(columns, line[1:], strict=True) if v not in ("", loops.BELOW)
            }
            for line in lines
        }
    return found


def test_every_variant_of_every_size_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loops, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, TINY))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/speech.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    found = tables(text.rstrip())
    assert list(found) == [
        "SLM, batch 16, 3 steps, fp32", "SLM, batch 8, 6 steps, fp32", "CLAP, batch 24, 2 steps, fp32"
    ]  # fmt: skip
    for table in found.values():
        assert table["floor"]["ms a step"] > 0
        for name in ("ours", "DataLoader, 0 workers"):
            ratios = {"overhead, times ours", "loop, times ours"}  # there where ours is above the floor
            assert set(table[name]) | ratios == set(loops.COLUMNS)
            assert ("loop, times ours" in table[name]) == (table["ours"]["loop, ms a step"] > 0)
            assert all(map(math.isfinite, table[name].values()))
        assert all(table["ours"][name] == 1 for name in {"epoch, times ours", *ratios} & set(table["ours"]))


@KINDS
def test_the_variants_see_the_same_rows_and_give_the_same_losses(kind):
    """Dropout and hidden modalities included."""
    seen, losses, weights = [], [], []
    for peer in (False, True):
        loop = kind(bench.random_pairs(50, 16), 16, lr=1e-3)
        first = loop.flat.values.clone()
        loop.model.register_forward_pre_hook(lambda _, args: seen.append(torch.cat(list(args[0].values()), -1)))
        epoch = partial(loop.loader, bench.loader(loop, 0)) if peer else loop.ours
        torch.manual_seed(0)
        losses.append(epoch(loop.steps))
        weights.append(loop.flat.values)
        assert (loop.flat.values - first).abs().max() > 1e-3
    assert len(seen) == 6  # the last two rows fill no step
    every = torch.cat([part.values for part in bench.random_pairs(50, 16).parts.values()], 1)
    assert torch.equal(torch.cat(seen[:3], 1)[0, :, 0], every[bench.shuffled(50, [0], 0)[0, :48]])
    for ours, theirs in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(ours, theirs)
    for both in (losses, weights):
        torch.testing.assert_close(*both, rtol=0, atol=0)


@KINDS
def test_the_clock_runs_from_forward_to_optimiser(kind):
    loop = kind(bench.random_pairs(48, 16), 16)
    epoch = loops.Epoch(loops.Variant(loop.clock, loop.ours, 3, turns=3))
    while not epoch.over:
        epoch.turn()
    whole, rest = epoch.times()
    assert len(loop.clock.marks) == 6
    assert 0 < rest < whole
    assert rest == pytest.approx(whole - loop.clock.ms() / 3)


def test_a_step_of_more_clips_than_there_are(capsys):
    with pytest.raises(config.UserError, match="48 clips are less than a step of 64"):
        bench.main(config.load(bench.Config, [*TINY, "--slm-batch", "64", "--no-write"]))
