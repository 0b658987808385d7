"""Scores of classifiers and of sentiment regressors, from plain sequences, in float64."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.config import UserError

Values = Sequence[Any] | ArrayLike


def classification(y_true: Values, y_pred: Values, labels: Sequence[Hashable]) -> dict[str, Any]:
    """Scores of predicted classes; a prediction outside `labels` is wrong, `invalid` is the share of those.

    war is accuracy, uar the mean recall over the classes of y_true; macro and weighted F1 run over all of `labels`
    with 0 for 0/0. confusion[i][j] counts truth labels[i] answered labels[j]. A truth outside `labels`: UserError.
    """
    index = {label: i for i, label in enumerate(labels)}
    truths, answers = _list(y_true), _list(y_pred)
    if len(truths) != len(answers):
        raise ValueError(f"{len(truths)} truths, {len(answers)} predictions")
    if not truths:
        raise UserError("nothing to score: no samples")
    if strange := [truth for truth in truths if truth not in index]:
        raise UserError(f"unknown label {strange[0]!r} (labels: {', '.join(map(str, labels))})")

    n, k = len(truths), len(labels)
    counts = np.zeros((k, k + 1), dtype=np.int64)  # the last column holds invalid answers
    np.add.at(counts, ([index[truth] for truth in truths], [index.get(answer, k) for answer in answers]), 1)
    confusion = counts[:, :k]
    support, hits = counts.sum(1), confusion.diagonal()
    precision, recall = _ratio(hits, confusion.sum(0)), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + confusion.sum(0))
    accuracy = float(hits.sum() / n)
    columns = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    per_class = {label: {name: column[i].item() for name, column in columns.items()} for label, i in index.items()}
    return {
        "accuracy": accuracy,
        "war": accuracy,
        "uar": float(recall[support > 0].mean()),
        "weighted_f1": float(f1 @ support / n),
        "macro_f1": float(f1.mean()),
        "precision_weighted": float(precision @ support / n),
        "recall_weighted": float(recall @ support / n),
        "invalid": float(counts[:, k].sum() / n),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def majority(y_true: Values, labels: Sequence[Hashable], train: Values | None = None) -> dict[str, Any]:
    """The scores of always answering the most frequent label of `train`, or of `y_true`; "label" names it."""
    truths = _list(y_true)
    counts = Counter(truths if train is None else _list(train))
    label = max(labels, key=lambda each: counts[each])
    return {"label": label, **classification(truths, [label] * len(truths), labels)}


def sentiment(y_true: Values, y_pred: Values) -> dict[str, float]:
    """The CMU-MOSEI scores of MMSA: truths lie in [-3, 3], predictions are any numbers.

    acc7 and acc5 compare after clipping to +-3 and +-2 and rounding half to even. has0 splits at >= 0 on all rows, non0
    at > 0 on the rows whose truth is not 0; their F1 is weighted by support. corr is 0 when either side is constant.
    """
    y, p = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (y_true, y_pred))
    if len(y) != len(p):
        raise ValueError(f"{len(y)} truths, {len(p)} predictions")
    if not len(y):
        raise UserError("nothing to score: no samples")
    acc2_has0, f1_has0 = _two_class(y >= 0, p >= 0)
    acc2_non0, f1_non0 = _two_class(y[y != 0] > 0, p[y != 0] > 0)
    return {
        "acc2_has0": acc2_has0,
        "f1_has0": f1_has0,
        "acc2_non0": acc2_non0,
        "f1_non0": f1_non0,
        "acc5": float((np.rint(np.clip(y, -2, 2)) == np.rint(np.clip(p, -2, 2))).mean()),
        "acc7": float((np.rint(np.clip(y, -3, 3)) == np.rint(np.clip(p, -3, 3))).mean()),
        "mae": float(np.abs(p - y).mean()),
        "corr": 0.0 if np.ptp(y) == 0 or np.ptp(p) == 0 else float(np.corrcoef(y, p)[0, 1]),
    }


def emotions(y_true: ArrayLike, y_pred: ArrayLike, names: Sequence[str]) -> dict[str, Any]:
    """The CMU-MOSEI scores of presence (N, E): wa, the mean of recall and specificity, and weighted F1 an emotion.

    An emotion that is never, or always, present takes the one of the two that exists as its wa.
    """
    y, p = np.asarray(y_true, dtype=bool), np.asarray(y_pred, dtype=bool)
    if not len(y):
        raise UserError("nothing to score: no samples")
    each: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        rates = [float((p[y[:, i] == side, i] == side).mean()) for side in (True, False) if (y[:, i] == side).any()]
        each[name] = {"wa": sum(rates) / len(rates), "weighted_f1": _two_class(y[:, i], p[:, i])[1]}
    mean = {key: float(np.mean([scores[key] for scores in each.values()])) for key in ("wa", "weighted_f1")}
    return {**mean, "accuracy": float((y == p).mean()), "per_emotion": each}


def kappa(confusion: ArrayLike) -> float:
    """Quadratic-weighted kappa of a confusion matrix of ordered classes; 0 when all is chance or one class."""
    counts = np.asarray(confusion, dtype=np.float64)
    n, k = counts.sum(), len(counts)
    gap = (np.arange(k)[:, None] - np.arange(k)) ** 2
    expected = (gap * np.outer(counts.sum(1), counts.sum(0))).sum() / n
    return float(1 - (gap * counts).sum() / expected) if expected else 0.0


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| over bins of equal width, weighted by their share."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(place, right - sure, minlength=bins))
    return float(gaps.sum() / len(sure))


# words that any description of anybody has
_EVERYWHERE = frozenset(
    "about also although another appear appears because been being between both character clip could describe does "
    "down during each emotion emotional emotions even evident express expressed expresses expressing expression "
    "expressions feel feeling feelings feels from have having here himself herself his her however indicate indicates "
    "indicating into itself just like likely look looks make makes might mind more most much number only other over "
    "overall person possible possibly rather same seem seems several should show showing shows since some something "
    "speaker state still such suggest suggesting suggests than that their them themselves then there therefore these "
    "they this those though through towards under upon very video well were what when where whether which while will "
    "with within without woman would your".split()
)


def content_words(text: str) -> Counter:
    """Words of four letters and more that say something; of Chinese text the pairs of neighbouring characters."""
    words = Counter(re.findall(r"[^\W\d_\u3400-\u9fff]{4,}", text.lower()))
    pairs = (run[i : i + 2] for run in re.findall(r"[\u3400-\u9fff]+", text) for i in range(len(run) - 1))
    return Counter({word: n for word, n in words.items() if word not in _EVERYWHERE}) + Counter(pairs)


def clue_overlap(reference: str, answer: str) -> float:
    """0 to 10: ten times the F1 of the content words that two descriptions share.

    A lexical, offline stand-in for EMER's judged clue overlap: for choosing checkpoints, not comparable with it.
    """
    a, b = content_words(reference), content_words(answer)
    shared, total = (a & b).total(), a.total() + b.total()
    return 20.0 * shared / total if total else 0.0


def line(scores: dict[str, Any]) -> str:
    """The main scores in one line, beside always answering the most frequent class."""
    names = ("accuracy", "uar", "weighted_f1")
    own = "  ".join(f"{name} {scores[name]:.4f}" for name in names)
    majority = scores["majority"]
    return (
        f"{own}  invalid {scores['invalid']:.1%}  ({scores['clips']} clips; majority: accuracy "
        f"{majority['accuracy']:.4f} weighted_f1 {majority['weighted_f1']:.4f})"
    )


def table(scores: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    """Scores as aligned text: the classes, then every summary number with the baseline's beside it."""
    lines = []
    if classes := scores.get("per_class"):
        width = max(len(str(label)) for label in [*classes, "class"])
        lines.append(f"{'class':<{width}}  precision  recall      f1  support")
        for label, row in classes.items():
            numbers = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['support']:7d}"
            lines.append(f"{label!s:<{width}}  {numbers}")
        lines.append("")
    rows = {name: value for name, value in scores.items() if isinstance(value, float)}
    width = max(map(len, rows))
    beside = f"majority ({baseline['label']})" if baseline else ""
    lines += [f"{'':<{width}}    model  {beside}"] if baseline else []
    for name, value in rows.items():
        other = f"  {baseline[name]:{len(beside)}.4f}" if baseline and name in baseline else ""
        lines.append(f"{name:<{width}}  {value:7.4f}{other}")
    return "\n".join(lines)


def _list(values: Values) -> list[Any]:
    """A list of Python objects; None stays None."""
    return np.asarray(values, dtype=object).tolist()


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _two_class(y: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """Accuracy and support-weighted F1 of booleans; 0 for no rows."""
    if not len(y):
        return 0.0, 0.0
    scores = classification(y, p, (False, True))
    return scores["accuracy"], scores["weighted_f1"]
