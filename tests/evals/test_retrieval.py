"""Retrieval against loops over queries and candidates: ties, duplicates, several seeds, a case by hand."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.manifest import Clip
from data.pairs import Pairs
from data.resident import Ragged
from evals import retrieval
from model.clap import Clap, ClapConfig

DIMS = {"audio": 5, "text": 7}


def pairs(n, script=None, seed=0):
    """n clips of one drawn vector each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n + 1)[:, None]
    parts = {
        m: Ragged(torch.cat([torch.randn(n, dim, generator=generator), torch.zeros(1, dim)]), rows)
        for m, dim in DIMS.items()
    }
    none = torch.zeros(n + 1, 0)
    script = torch.arange(n) if script is None else torch.tensor(script)
    clips = [Clip(f"clip{i}") for i in range(n)]
    return Pairs(clips, torch.full((n,), -1), script, parts, none.long(), none.bool())


def build(seeds=(1, 2)):
    sources = {m: {"dim": dim, "kind": "dense", "frames": False} for m, dim in DIMS.items()}
    return Clap(ClapConfig(proj_dim=6), sources, seeds)


def looped(query, found, script):
    """Both counts of ranks(), pair by pair."""
    every, others = [], []
    for i, q in enumerate(query.tolist()):
        similarity = [sum(a * b for a, b in zip(q, row, strict=True)) for row in found.tolist()]
        own = max(s for j, s in enumerate(similarity) if script[j] == script[i])
        every.append(sum(s >= similarity[i] for j, s in enumerate(similarity) if j != i))
        others.append(sum(s >= own for j, s in enumerate(similarity) if script[j] != script[i]))
    return every, others


@pytest.mark.parametrize("rows", [3, 2048])
@pytest.mark.parametrize("values", ["drawn", "few"])
def test_ranks_are_counts(monkeypatch, rows, values):
    monkeypatch.setattr(retrieval, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    query, found = torch.randn(2, 20, 3, dtype=torch.float64, generator=generator)
    script = torch.randint(7, (20,), generator=generator)
    if values == "few":  # whole numbers: many candidates are equally near
        query, found = query.round(), found.round()
        found[4], script[4] = found[3], script[3]  # the same clip twice
    every, others = retrieval.ranks(query, found, script)
    expected = looped(query, found, script.tolist())
    assert (every.tolist(), others.tolist()) == expected
    assert len(set(expected[0])) > 3  # not all the same
    assert all(b <= a for a, b in zip(*expected, strict=True))
    assert expected[0] != expected[1]


def test_ties_count_against_the_query():
    found = torch.eye(4)
    found[1] = found[0]  # clips 0 and 1 have the same voice
    every, others = retrieval.ranks(found, found, torch.tensor([0, 0, 1, 2]))
    assert every.tolist() == [1, 1, 0, 0]
    assert others.tolist() == [0, 0, 0, 0]
    query = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.5, 0.5], [0.9, 0.0, 0.5, 0.0], [1.0, 0.0, 1.0, 1.0]])
    every, others = retrieval.ranks(query, found, torch.tensor([0, 2, 0, 0]))
    assert every.tolist() == [3, 1, 2, 3]
    # clip 0 is right for the words of clips 2 and 3, too; clip 1, of other words, is as near as that
    assert others.tolist() == [0, 1, 1, 1]
    assert retrieval.ranks(query, found, torch.arange(4))[1].tolist() == every.tolist()


def test_vectors_that_are_all_alike_find_nothing():
    alike = {m: torch.full((1, 20, 4), 0.5) for m in ("text", "audio")}
    (found,) = retrieval.score(alike, torch.arange(20) // 2)
    assert found["r1"] == found["t2a_r10"] == found["dedup_a2t_r10"] == 0.0
    assert (found["t2a_median_rank"], found["dedup_t2a_median_rank"]) == (20.0, 19.0)


def test_scores_by_hand():
    text = torch.eye(5)
    audio = torch.tensor([  # how near the voice of each row is to the words of each column
        [0.90, 0.1, 0.0, 0.8, 0.5],
        [0.00, 0.5, 0.2, 0.0, 0.4],
        [0.00, 0.6, 0.5, 0.6, 0.0],
        [0.00, 0.2, 0.0, 0.3, 0.3],
        [0.45, 0.0, 0.0, 0.4, 0.3],
    ])  # fmt: skip
    (found,) = retrieval.score({"text": text[None], "audio": audio[None]}, torch.tensor([0, 1, 2, 3, 0]))
    counts = {
        "t2a": [0, 1, 0, 3, 3], "dedup_t2a": [0, 1, 0, 3, 0],  # clips 0 and 4 say the same words
        "a2t": [0, 0, 2, 1, 2], "dedup_a2t": [0, 0, 2, 1, 0],
    }  # fmt: skip
    for way, rank in counts.items():
        assert found[f"{way}_r1"] == pytest.approx(rank.count(0) / 5)
        assert (found[f"{way}_r5"], found[f"{way}_r10"]) == (1.0, 1.0)
        assert found[f"{way}_median_rank"] == sorted(rank)[2] + 1
        assert found[f"{way}_mrr"] == pytest.approx(sum(1 / (each + 1) for each in rank) / 5)
    assert found["r1"] == pytest.approx((3 / 5 + 3 / 5) / 2)
    assert set(retrieval.NAMES) <= set(found)


def test_scores_of_seeds_are_their_own():
    generator = torch.Generator().manual_seed(0)
    vectors = {m: F.normalize(torch.randn(3, 30, 4, generator=generator), dim=-1) for m in ("text", "audio")}
    vectors["audio"][2] = vectors["text"][2]
    script = torch.arange(30) // 2
    each = retrieval.score(vectors, script)
    assert len(each) == 3
    for k in range(3):
        assert retrieval.score({m: x[k : k + 1] for m, x in vectors.items()}, script) == [each[k]]
    assert each[2]["r1"] == each[2]["t2a_mrr"] == 1.0 == each[2]["a2t_median_rank"]
    assert each[0]["r1"] < 0.5


@pytest.mark.parametrize("rows", [16, 2048])
def test_embeddings_are_the_models(monkeypatch, rows):
    monkeypatch.setattr(retrieval, "ROWS", rows)
    model, data = build().train(), pairs(21)
    data.parts["audio"].rows[3] = 21  # a clip without sound
    vectors = retrieval.embed(model, data)
    assert model.training  # as it was
    model.eval()
    for m, dim in DIMS.items():
        x = data.parts[m].values[data.parts[m].rows[:-1, 0]].expand(2, -1, dim)
        torch.testing.assert_close(vectors[m], model.project(m, x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_report_and_table(seeds):
    model, data = build(seeds), pairs(8, [0, 0, 1, 2, 3, 4, 5, 6])
    found = retrieval.report(model, data, "valid")
    each = retrieval.score(retrieval.embed(model, data), data.script)
    assert (found["split"], found["pairs"], found["per_seed"]) == ("valid", 8, each)
    assert found["chance"] == {
        f"{way}_r{at}": share for way in ("t2a", "a2t") for at, share in ((1, 0.125), (5, 0.625), (10, 1.0))
    }
    for name, cell in found["scores"].items():
        values = [scores[name] for scores in each]
        assert cell["mean"] == pytest.approx(np.mean(values))
        assert cell["std"] == pytest.approx(np.std(values))
    assert json.loads(json.dumps(found)) == found

    lines = retrieval.table(found).splitlines()
    assert lines[0] == "valid: 8 pairs"
    assert lines[1].split() == ["r1", "r5", "r10", "median_rank", "mrr"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    numbers = [f"{found['scores'][f'dedup_a2t_{name}']['mean']:.4f}" for name in lines[1].split()]
    row = next(line for line in lines if line.startswith("audio to text, same words are right"))
    assert row.split()[-5:] == numbers
    assert lines[-1].split() == ["guessing", "0.1250", "0.6250", "1.0000", "4.5000"]
    assert sum("std over seeds" in line for line in lines) == (4 if len(seeds) > 1 else 0)
