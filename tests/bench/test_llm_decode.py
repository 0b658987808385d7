"""The decoding benchmark: both variants on the tiny model, and what it refuses."""

import numpy as np
import pytest
import torch

from bench import llm_decode as bench
from bench import report
from common import config
from common.config import UserError
from tests.bench.test_llm_train import Here

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_every_table_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "Apart", Here)
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e9)  # a second, for every turn
    # this process may keep what other tests freed
    monkeypatch.setattr(bench, "memory", {"VmRSS": 100.0, "VmHWM": 150.0}.__getitem__)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Before\n")
    bench.main(config.load(bench.Config, ["--tiny", "--device", "cpu", "--threads", "1"]))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Before\n\n## bench/llm_decode.py, ")
    assert text.removeprefix("# Before\n\n") in capsys.readouterr().out
    parts = [part.strip().splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    found = {part[0].split("|")[1].strip(): [line.split("|")[1:-1] for line in part[2:]] for part in parts}
    cases = ["alone: 1 of 12 to 12, 6 new", "ragged: 4 of 4 to 12, 6 new"]
    assert list(found) == [*cases, "9 labels, 9 prompts", "--size 7b, needs a GPU"]
    for case in cases:
        assert [row[0].strip() for row in found[case]] == ["ours", "transformers", "ours / transformers"]
        assert all(float(cell.split()[0]) > 0 for row in found[case] for cell in row[1:-1])
    assert len(found["9 labels, 9 prompts"]) == 1 + len(bench.GENERATED)
    assert text.count("the same tokens: 100.0%") == 2
    assert "probabilities of 4 prompts within " in text


def test_each_is_beside_its_like():
    seconds = {"ours": 2.0, bench.PEER: 8.0, bench.COMPILED: 1.0, bench.COMPILED_PEER: 4.0}
    variants = {
        name: lambda method, case, prompts, s=s: bench.Turn(s, 1.0, 1.0, [[5]] * len(prompts))
        for name, s in seconds.items()
    }
    job = bench.Job("tiny", "", torch.device("cpu"), 1, 0)
    rows = [line.split("|")[1:3] for line in bench.decoding(variants, job, 3) if " / " in line]
    assert [(pair.strip(), float(value.split()[0])) for pair, value in rows] == 2 * [
        ("ours / transformers", 0.25), ("ours, compiled / transformers", 0.125),
        ("transformers, compiled / transformers", 0.5), ("ours, compiled / transformers, compiled", 0.25),
    ]  # fmt: skip


def test_adapters_are_merged_alike(tmp_path):
    """The first test would not notice if neither had them."""
    bench.make_weights(tmp_path, "tiny", 0)
    job = bench.Job("tiny", str(tmp_path), torch.device("cpu"), 1, 0)
    ours, theirs = bench.Ours(job).llm.state_dict(), bench.Peer(job).llm.state_dict()
    from safetensors.torch import load_file

    base = load_file(tmp_path / "model.safetensors")
    for name, weight in theirs.items():
        own = ours.get(name.replace("q_proj.", "q_proj.base.").replace("v_proj.", "v_proj.base."), ours.get(name))
        torch.testing.assert_close(own, weight)
        assert torch.equal(weight, base[name]) == ("q_proj" not in name and "v_proj" not in name)


def test_other_answers_are_refused():
    assert bench.same_tokens([[1, 2], [3]], [[1, 2], [3]]) == 1
    with pytest.raises(UserError, match=r"^prompt 1: ours continues \[3\], transformers \[4\]"):
        bench.same_tokens([[1, 2], [3]], [[1, 2], [4]])
    assert bench.same_tokens([[1, 2], [3]], [[1, 2], [4]], exact=False) == 0.5
    p = np.array([[0.4, 0.6]])
    assert bench.probability_gap(p, p + 1e-6, 1e-5) == pytest.approx(1e-6)
    with pytest.raises(UserError, match=r"probabilities differ by 0\.001 from those of one sequence at a time"):
        bench.probability_gap(p, p + 1e-3, 1e-5)
    with pytest.raises(UserError):
        bench.probability_gap(p * np.nan, p, 1e-5)


def test_bytes_of_a_step():
    shape = bench.SIZES["7b"]
    assert bench.step_bytes(shape, [[1]], 0, True) == pytest.approx(13.21e9, rel=1e-3)
    longer = bench.step_bytes(shape, [[1] * 101], 0, True) - bench.step_bytes(shape, [[1]], 0, True)
    assert longer == 100 * 2 * 32 * 4096 * 2  # 0.524 MB a token
