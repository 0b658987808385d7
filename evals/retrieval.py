"""Finding the words that belong to a voice, and the voice that belongs to words, among all clips of a split."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.log import table_lines
from data.pairs import Pairs
from model.clap import Clap

ROWS = 2048  # queries at a time
AT = (1, 5, 10)
WAYS = {"t2a": ("text", "audio"), "a2t": ("audio", "text")}
NAMES = tuple(f"{way}_r{at}" for way in WAYS for at in AT)


@torch.inference_mode()
def embed(model: Clap, data: Pairs) -> dict[str, Tensor]:
    """Unit vectors (K, N, proj_dim) of all clips; the data must hold standardised features."""
    was_training = model.training
    model.eval()
    parts: list[dict[str, Tensor]] = []
    for index in torch.arange(len(data), device=data.device).split(ROWS // 8):
        x, mask = data.gather(index.expand(len(model.logit_scale), -1))
        parts.append(model(x, mask))
    model.train(was_training)
    return {m: torch.cat([part[m] for part in parts], 1) for m in parts[0]}


def ranks(query: Tensor, found: Tensor, script: Tensor) -> tuple[Tensor, Tensor]:
    """How many other candidates (N,) lie as near to each query (N, d) as its own, or nearer; and of other scripts.

    Other clips with the query's words are right answers too: the second count leaves them out, and takes the nearest
    right answer for the query's own. Ties count against the query, or vectors that are all alike would find everything.
    """
    every, others = [], []
    for rows in torch.arange(len(query), device=query.device).split(ROWS):
        similarity = query[rows] @ found.T  # (b, N)
        right = script[rows][:, None] == script
        every.append((similarity >= similarity.gather(1, rows[:, None])).sum(1) - 1)
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        others.append(((similarity >= best) & ~right).sum(1))
    return torch.cat(every), torch.cat(others)


def score(vectors: dict[str, Tensor], script: Tensor) -> list[dict[str, float]]:
    """For each seed R@1, 5, 10, median rank (from 1) and mean reciprocal rank both ways; `dedup_` by script.

    r1 is the mean of the dedup R@1 of both ways, by which a checkpoint is chosen.
    """
    out = []
    for k in range(len(vectors["text"])):
        found: dict[str, float] = {}
        for way, (one, other) in WAYS.items():
            both = ranks(vectors[one][k], vectors[other][k], script)
            for prefix, rank in zip(("", "dedup_"), both, strict=True):
                rank = rank.double()
                found |= {f"{prefix}{way}_r{at}": float((rank < at).double().mean()) for at in AT}
                found[f"{prefix}{way}_median_rank"] = float(rank.quantile(0.5)) + 1
                found[f"{prefix}{way}_mrr"] = float((1 / (rank + 1)).mean())
        found["r1"] = (found["dedup_t2a_r1"] + found["dedup_a2t_r1"]) / 2
        out.append(found)
    return out


def report(model: Clap, data: Pairs, split: str) -> dict[str, Any]:
    """All scores of a split, mean and standard deviation over seeds, and those of guessing."""
    each = score(embed(model, data), data.script)
    n = len(data)
    summary = {
        name: {"mean": float(np.mean([s[name] for s in each])), "std": float(np.std([s[name] for s in each]))}
        for name in each[0]
    }
    chance = {f"{way}_r{at}": min(1.0, at / n) for way in WAYS for at in AT}
    return {"split": split, "pairs": n, "scores": summary, "per_seed": each, "chance": chance}


def table(found: dict[str, Any]) -> str:
    """The report as aligned text."""
    columns = ("r1", "r5", "r10", "median_rank", "mrr")
    rows: list[Sequence[str]] = [("", *columns)]
    for way, said in (("t2a", "text to audio"), ("a2t", "audio to text")):
        for prefix, note in (("", ""), ("dedup_", ", same words are right")):
            cells = [found["scores"][f"{prefix}{way}_{name}"] for name in columns]
            rows.append((said + note, *(f"{cell['mean']:.4f}" for cell in cells)))
            if len(found["per_seed"]) > 1:
                rows.append(("  std over seeds", *(f"{cell['std']:.4f}" for cell in cells)))
    guess = found["chance"]
    rows.append(("guessing", *(f"{guess[f't2a_r{at}']:.4f}" for at in AT), f"{(found['pairs'] + 1) / 2:.4f}", ""))
    return f"{found['split']}: {found['pairs']} pairs\n" + table_lines(rows)
