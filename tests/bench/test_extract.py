import math

import numpy as np
import pytest

from bench import extract as bench
from bench import report
from common import config
from common.config import UserError

TINY = ["--clips", "9", "--width", "64", "--layers", "1", "--repeats", "1", "--checked", "3", "--device", "cpu"]


def test_both_are_measured_and_ours_gives_the_states_of_clips_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(bench, "MEDIAN", 0.4)
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))  # here everything is imported
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, TINY))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/extract.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    rows = dict([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| "))
    numbers = {name: float(value.split()[0]) for name, value in rows.items() if value}
    assert len(numbers) == 10
    assert all(map(math.isfinite, numbers.values()))
    assert numbers["ours: largest difference from one clip at a time"] < 1e-4
    assert numbers["transformers: largest difference from one clip at a time"] > 1e-2


def test_durations_are_those_of_the_lists(tmp_path):
    for i, split in enumerate(("train", "dev", "test"), 1):
        lines = ["StartTime,EndTime", f'"00:59:59,500","01:00:0{i},750"', '"00:00:09,000","00:09:00,000"']
        (tmp_path / f"{split}_sent_emo.csv").write_text("\n".join(lines))
    drawn = bench.durations(bench.Config(meld=str(tmp_path), clips=50))
    assert {*drawn.round(3).tolist()} == {1.25 + i for i in (1, 2, 3)}
    again = bench.durations(bench.Config(clips=50))
    assert np.array_equal(again, bench.durations(bench.Config(clips=50)))
    assert 1 < np.median(again) < 5
    (tmp_path / "dev_sent_emo.csv").write_text("StartTime\n0\n")
    with pytest.raises(UserError, match=r"dev_sent_emo\.csv: no StartTime and EndTime in every line$"):
        bench.durations(bench.Config(meld=str(tmp_path)))
