"""Emotional support: the closed fields by a linear model, to stand beside a language model's scores of them.

TF-IDF of what is said, and the labels before it, go into multinomial logistic regression.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import metrics, probe
from common.config import UserError
from data.mesc import Turn, Utterance

C = (1.0, 3.0, 10.0)  # inverse strengths of the penalty
LEAST = 3  # training turns that a term is in; the rarer ones are most of all terms, and add nothing
TOLERANCE = 1e-7  # of the gradient; probabilities are then right to 1e-5
WORD = re.compile(r"\b\w\w+\b|[^\w\s]")


def _before(turn: Turn, role: str) -> Utterance:
    """What a side said last before the client's turn."""
    return next((said for said in reversed(turn.history) if said.role == role), Utterance(role, None, ""))


# Each part has terms of its own: one word of the client and of the therapist are two features.
PARTS: dict[str, Callable[[Turn], str]] = {
    "client": lambda turn: turn.client,
    "client_before": lambda turn: _before(turn, "client").text,
    "therapist_before": lambda turn: _before(turn, "therapist").text,
    "client_emotion_before": lambda turn: _before(turn, "client").emotion or "",
    "strategy_before": lambda turn: _before(turn, "therapist").strategy or "",
}
CHOICES = (
    ("client",),
    ("client", "client_before", "therapist_before"),
    ("client_emotion_before", "strategy_before"),
    ("client", "client_emotion_before", "strategy_before"),
    tuple(PARTS),
)
Row = dict[int, float]  # column -> value; the other columns are 0


def terms(text: str) -> list[str]:
    """Words of two characters and more in lower case and signs, and each pair of neighbours."""
    words = WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


class Tfidf:
    """Weights of the terms of texts as scikit-learn's TfidfVectorizer defines them: smooth idf, L2 norm."""

    def __init__(self, texts: Sequence[str], least: int = 1) -> None:
        """Learn the terms that at least `least` of the texts have."""
        counts = Counter(term for text in texts for term in set(terms(text)))
        kept = sorted(term for term, n in counts.items() if n >= least)
        self.columns = {term: i for i, term in enumerate(kept)}
        self.idf = [math.log((1 + len(texts)) / (1 + counts[term])) + 1 for term in kept]

    def row(self, text: str) -> Row:
        """The weights of the text's terms, as far as they are known, of norm 1; without such terms empty."""
        counts = Counter(self.columns[term] for term in terms(text) if term in self.columns)
        row = {column: n * self.idf[column] for column, n in counts.items()}
        norm = math.hypot(*row.values())
        return {column: value / norm for column, value in row.items()}


class Features:
    """The rows of some of PARTS side by side, each with the terms that it has in `turns`."""

    def __init__(self, parts: Sequence[str], turns: Sequence[Turn]) -> None:
        self.parts = [(PARTS[part], Tfidf([PARTS[part](turn) for turn in turns], LEAST)) for part in parts]
        self.width = sum(len(table.idf) for _, table in self.parts)

    def rows(self, turns: Sequence[Turn]) -> list[Row]:
        rows: list[Row] = [{} for _ in turns]
        first = 0
        for text, table in self.parts:
            for row, turn in zip(rows, turns, strict=True):
                row |= {first + column: value for column, value in table.row(text(turn)).items()}
            first += len(table.idf)
        return rows


class Product(torch.autograd.Function):
    """Sparse rows times a table (D, K), and the table's gradient: each is a weighted sum of the other's rows.

    Autograd's own gradient of an embedding bag takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, forth: Sequence[Tensor], back: Sequence[Tensor]) -> Tensor:
        ctx.back = back
        return _sums(table, *forth)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grads[0], *ctx.back), None, None


def _sums(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


def product(rows: Sequence[Row], width: int) -> Callable[[Tensor], Tensor]:
    """The function that makes of weight (classes, width), in float64, rows times weight (rows, classes)."""
    columns = torch.tensor([column for row in rows for column in row], dtype=torch.long)
    values = torch.tensor([value for row in rows for value in row.values()], dtype=torch.float64)
    sizes = torch.tensor([len(row) for row in rows])
    order = columns.argsort(stable=True)
    places = torch.arange(len(rows)).repeat_interleave(sizes)[order]
    counts = columns.bincount(minlength=width)
    forth = columns, sizes.cumsum(0) - sizes, values
    back = places, counts.cumsum(0) - counts, values[order]
    return lambda weight: Product.apply(weight.T.contiguous(), forth, back)


def fit(x: Callable[[Tensor], Tensor], y: Tensor, start: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Weight and bias as probe.fit() finds them, searched from weight `start` (classes, width) on; x is a product()."""
    return probe.solve(start, x, len(y), c, partial(F.cross_entropy, target=y, reduction="sum"), TOLERANCE)


@dataclass
class Model:
    """Answers for turns; of training turns of one label it is that label."""

    features: Features
    labels: list[str]
    weight: Tensor  # (labels, features)
    bias: Tensor

    def answers(self, turns: Sequence[Turn]) -> list[str]:
        scores = product(self.features.rows(turns), self.features.width)(self.weight) + self.bias
        return [self.labels[i] for i in scores.argmax(1).tolist()]


def baseline(
    train: Sequence[Turn], valid: Sequence[Turn], test: Sequence[Turn], field: str, labels: Sequence[str],
    choices: Sequence[Sequence[str]] = CHOICES,
) -> dict[str, Any]:  # fmt: skip
    """Scores on test of the linear model of a field that is best on valid, and of the majority of train.

    What it reads, one of `choices` of PARTS, and its C have the best weighted F1 on valid, or are the first of equals;
    "tried" lists them all. Turns without the field are left out. UserError: none is left, or a label is unknown.
    """
    splits = {"train": train, "valid": valid, "test": test}
    known = {split: [turn for turn in turns if getattr(turn, field)] for split, turns in splits.items()}
    if empty := [split for split, turns in known.items() if not turns]:
        raise UserError(f"{field}: no turn of {empty[0]} has one")
    truths = {split: [getattr(turn, field) for turn in turns] for split, turns in known.items()}
    for split, given in truths.items():
        if strange := [truth for truth in given if truth not in labels]:
            raise UserError(f"{field} of {split}: unknown label '{strange[0]}' (labels: {', '.join(labels)})")
    seen = [label for label in labels if label in truths["train"]]
    y = torch.tensor([seen.index(truth) for truth in truths["train"]])
    tried: list[dict[str, Any]] = []
    models: list[Model] = []
    for parts in choices:
        features = Features(parts, known["train"])
        x = product(features.rows(known["train"]), features.width)
        weight = torch.zeros(len(seen), features.width, dtype=torch.float64)
        for c in C:
            weight, bias = fit(x, y, weight, c)
            model = Model(features, seen, weight, bias)
            scores = metrics.classification(truths["valid"], model.answers(known["valid"]), labels)
            tried.append({"parts": list(parts), "c": c, "weighted_f1": scores["weighted_f1"]})
            models.append(model)
    best = max(range(len(tried)), key=lambda i: tried[i]["weighted_f1"])
    scores = metrics.classification(truths["test"], models[best].answers(known["test"]), labels)
    return {
        "rows": len(truths["test"]),
        **scores,
        "parts": tried[best]["parts"],
        "c": tried[best]["c"],
        "features": models[best].features.width,
        "tried": tried,
        "majority": metrics.majority(truths["test"], labels, truths["train"]),
    }
