"""Scores against published matrices, scikit-learn, and formulas written out."""

import math

import numpy as np
import pytest
import torch

from common import metrics
from common.config import UserError

LABELS = ["angry", "happy", "neutral", "sad", "surprise", "worried"]
# confusion matrices published with Emotion-LLaMA's evaluation of MER2023-SEMI and MER2024-NOISE (rows: truth)
MER2023 = [
    [179, 1, 2, 1, 0, 0],
    [2, 152, 7, 4, 3, 1],
    [10, 10, 134, 6, 2, 4],
    [2, 2, 1, 250, 0, 2],
    [1, 0, 3, 1, 6, 3],
    [4, 1, 3, 2, 1, 34],
]
MER2024 = [
    [224, 0, 5, 2, 4, 1],
    [1, 213, 16, 0, 2, 1],
    [23, 24, 128, 17, 11, 29],
    [3, 2, 5, 284, 0, 1],
    [6, 1, 2, 0, 42, 4],
    [2, 0, 6, 2, 3, 106],
]


def unroll(matrix: list[list[int]]) -> tuple[list[str], list[str]]:
    y_true = [truth for truth, row in zip(LABELS, matrix, strict=True) for _ in range(sum(row))]
    y_pred = [answer for row in matrix for answer, count in zip(LABELS, row, strict=True) for _ in range(count)]
    return y_true, y_pred


def test_published_scores_of_mer2023() -> None:
    scores = metrics.classification(*unroll(MER2023), LABELS)
    assert scores["confusion"] == MER2023
    assert scores["accuracy"] == pytest.approx(0.9052757793764988, abs=1e-12)
    assert scores["weighted_f1"] == pytest.approx(0.9035772132511264, abs=1e-12)
    assert scores["precision_weighted"] == pytest.approx(0.9036254851540454, abs=1e-12)
    assert scores["recall_weighted"] == pytest.approx(scores["war"], abs=1e-12)
    assert scores["macro_f1"] == pytest.approx(0.8134, abs=5e-5)
    assert scores["uar"] == pytest.approx(0.8069, abs=5e-5)
    assert scores["per_class"]["surprise"]["support"] == 14


def test_published_scores_of_mer2024() -> None:
    scores = metrics.classification(*unroll(MER2024), LABELS)
    assert scores["accuracy"] == pytest.approx(0.852137, abs=5e-7)
    assert scores["weighted_f1"] == pytest.approx(0.845807, abs=5e-7)
    assert scores["uar"] == pytest.approx(0.8387, abs=5e-5)


@pytest.mark.parametrize("seed", range(20))
def test_classification_is_scikit_learn_s(seed: int) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 60)), int(rng.integers(2, 9))
    labels = [f"label {i}" for i in rng.permutation(k)]
    # truths often miss some labels, answers hold some that are no label
    y_true = [labels[i] for i in rng.integers(0, rng.integers(1, k + 1), n)]
    y_pred = [[*labels, "doubt", "?"][i] for i in rng.integers(0, k + 2, n)]
    ours = metrics.classification(y_true, y_pred, labels)
    given = {"labels": labels, "zero_division": 0}
    for name, average in (("weighted_f1", "weighted"), ("macro_f1", "macro")):
        assert ours[name] == pytest.approx(sk.f1_score(y_true, y_pred, average=average, **given), abs=1e-12)
    precision, recall, f1, support = sk.precision_recall_fscore_support(y_true, y_pred, **given)
    for i, label in enumerate(labels):
        row = {"precision": precision[i], "recall": recall[i], "f1": f1[i], "support": support[i]}
        assert ours["per_class"][label] == pytest.approx(row, abs=1e-12)
    assert ours["precision_weighted"] == pytest.approx(precision @ support / n, abs=1e-12)
    assert ours["recall_weighted"] == pytest.approx(recall @ support / n, abs=1e-12)
    assert ours["accuracy"] == ours["war"] == pytest.approx(sk.accuracy_score(y_true, y_pred), abs=1e-12)
    present = sorted(set(y_true))
    uar = sk.recall_score(y_true, y_pred, labels=present, average="macro", zero_division=0)
    assert ours["uar"] == pytest.approx(uar, abs=1e-12)
    assert ours["invalid"] == pytest.approx(sum(answer not in labels for answer in y_pred) / n)
    known = [i for i in range(n) if y_pred[i] in labels]
    if known:
        matrix = sk.confusion_matrix([y_true[i] for i in known], [y_pred[i] for i in known], labels=labels)
        assert ours["confusion"] == matrix.tolist()


def test_an_invalid_answer_is_wrong_and_in_no_column() -> None:
    scores = metrics.classification(["a", "a", "b", "b"], ["a", None, "b", "nonsense"], ["a", "b"])
    assert scores["confusion"] == [[1, 0], [0, 1]]
    assert (scores["accuracy"], scores["invalid"]) == (0.5, 0.5)
    assert scores["per_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}


def test_containers_of_any_kind_give_the_same_scores() -> None:
    y_true, y_pred = [0, 1, 2, 2, 1], [0, 2, 2, 2, 1]
    expected = metrics.classification(y_true, y_pred, [0, 1, 2])
    assert metrics.classification(np.array(y_true), np.array(y_pred), range(3)) == expected
    assert metrics.classification(torch.tensor(y_true), torch.tensor(y_pred), (0, 1, 2)) == expected


def test_an_unknown_truth_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown label 'joy' \(labels: angry, happy\)"):
        metrics.classification(["angry", "joy"], ["angry", "angry"], ["angry", "happy"])
    with pytest.raises(UserError, match=r"unknown label '' \(labels: angry\)"):
        metrics.classification([""], ["angry"], ["angry"])


def test_nothing_to_score() -> None:
    with pytest.raises(UserError, match="nothing to score: no samples"):
        metrics.classification([], [], ["a"])
    with pytest.raises(UserError, match="nothing to score: no samples"):
        metrics.sentiment([], [])
    with pytest.raises(ValueError, match="2 truths, 1 predictions"):
        metrics.sentiment([1, 2], [1])
    with pytest.raises(ValueError, match="1 truths, 2 predictions"):
        metrics.classification(["a"], ["a", "a"], ["a"])


def test_majority() -> None:
    y_true = ["a", "b", "b", "c"]
    scores = metrics.majority(y_true, ["a", "b", "c"])
    assert (scores["label"], scores["accuracy"]) == ("b", 0.5)
    assert scores["uar"] == pytest.approx(1 / 3)
    assert scores["weighted_f1"] == pytest.approx(0.5 * (2 * 0.5 * 1 / 1.5))
    other = metrics.majority(y_true, ["a", "b", "c"], train=["c", "c", "a"])
    assert (other["label"], other["accuracy"]) == ("c", 0.25)
    assert metrics.majority(["b", "a"], ["a", "b"])["label"] == "a"  # a tie: the first label


def slow_sentiment(y_true: list[float], y_pred: list[float]) -> dict[str, float]:
    """The scores written out with Python floats; Python's round is half to even."""

    def bins(value: float, top: int) -> int:
        return round(max(-top, min(top, value)))

    def two_class(pairs: list[tuple[bool, bool]]) -> tuple[float, float]:
        total = 0.0
        for side in (False, True):
            hit = sum(y == p == side for y, p in pairs)
            truths, answers = sum(y == side for y, _ in pairs), sum(p == side for _, p in pairs)
            total += truths * (2 * hit / (truths + answers) if truths + answers else 0.0)
        return sum(y == p for y, p in pairs) / len(pairs), total / len(pairs)

    pairs = list(zip(y_true, y_pred, strict=True))
    n = len(pairs)
    has0 = two_class([(y >= 0, p >= 0) for y, p in pairs])
    non0 = two_class([(y > 0, p > 0) for y, p in pairs if y != 0])
    mean_y, mean_p = math.fsum(y_true) / n, math.fsum(y_pred) / n
    var_y, var_p = math.fsum((y - mean_y) ** 2 for y in y_true), math.fsum((p - mean_p) ** 2 for p in y_pred)
    return {
        "acc2_has0": has0[0],
        "f1_has0": has0[1],
        "acc2_non0": non0[0],
        "f1_non0": non0[1],
        "acc5": sum(bins(y, 2) == bins(p, 2) for y, p in pairs) / n,
        "acc7": sum(bins(y, 3) == bins(p, 3) for y, p in pairs) / n,
        "mae": math.fsum(abs(y - p) for y, p in pairs) / n,
        "corr": math.fsum((y - mean_y) * (p - mean_p) for y, p in pairs) / math.sqrt(var_y * var_p),
    }


@pytest.mark.parametrize("seed", range(10))
def test_sentiment_is_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y_true = (rng.integers(-9, 10, 200) / 3).tolist()  # CMU-MOSEI labels are thirds, zeros among them
    y_pred = (np.array(y_true) + rng.normal(0, 1.5, 200)).tolist()
    y_pred[:40] = (rng.integers(-8, 9, 40) / 2).tolist()  # halves and zeros
    assert metrics.sentiment(y_true, y_pred) == pytest.approx(slow_sentiment(y_true, y_pred), abs=1e-12)


def test_sentiment_by_hand() -> None:
    # halves round to the even side: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0
    scores = metrics.sentiment([0, 2, 2, 0, 3, -3], [0.5, 1.5, 2.5, -0.5, 9, -9])
    assert (scores["acc7"], scores["acc5"]) == (1.0, 1.0)
    assert scores["mae"] == pytest.approx((0.5 * 4 + 6 * 2) / 6)  # not clipped
    assert scores["acc2_has0"] == pytest.approx(5 / 6)  # 0 against -0.5 disagrees
    assert scores["acc2_non0"] == 1.0  # and is left out here
    # a prediction of exactly 0 is not positive once neutral rows are dropped
    assert metrics.sentiment([1.0, -1.0], [0.0, 0.0])["acc2_non0"] == 0.5
    assert metrics.sentiment([1.0, -1.0], [0.0, 0.0])["acc2_has0"] == 0.5
    # only +-3 tells seven classes from five
    assert metrics.sentiment([3.0], [2.0])["acc5"] == 1.0
    assert metrics.sentiment([3.0], [2.0])["acc7"] == 0.0


def test_sentiment_of_constants() -> None:
    scores = metrics.sentiment([0.0, 0.0, 0.0], np.full(3, 0.1, dtype=np.float32))
    assert (scores["corr"], scores["acc2_non0"], scores["f1_non0"]) == (0.0, 0.0, 0.0)
    assert metrics.sentiment([0.1, 0.2, 0.3], [0.1] * 3)["corr"] == 0.0


def field_sentiment(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """MMSA's scores with NumPy and scikit-learn, as the field computes them; 0 where they are not defined."""
    sk = pytest.importorskip("sklearn.metrics")
    kept = y != 0
    scores = {
        "acc2_has0": sk.accuracy_score(y >= 0, p >= 0),
        "f1_has0": sk.f1_score(y >= 0, p >= 0, average="weighted", zero_division=0),
        "acc2_non0": sk.accuracy_score(y[kept] > 0, p[kept] > 0) if kept.any() else 0.0,
        "f1_non0": sk.f1_score(y[kept] > 0, p[kept] > 0, average="weighted", zero_division=0) if kept.any() else 0.0,
        "mae": np.mean(np.absolute(p - y)),
        "corr": np.corrcoef(p, y)[0][1] if y.std() and p.std() else 0.0,
    }
    for top, name in ((2, "acc5"), (3, "acc7")):
        scores[name] = np.mean(np.round(np.clip(p, -top, top)) == np.round(np.clip(y, -top, top)))
    return scores


HALVES = np.arange(-9, 10) / 2
EDGES = {
    "all zeros": (np.zeros(5), np.zeros(5)),
    "zero truths": (np.zeros(4), np.array([-1e-9, 0.0, 1e-9, 2.0])),
    "minus zero": (np.array([-0.0, 1.0, -1.0]), np.array([0.0, -0.0, -0.0])),
    "only positive": (np.array([0.5, 1.5, 2.5]), np.array([1.0, -1.0, 2.5])),
    "only negative": (np.array([-0.5, -1.5, -2.5]), np.array([-1.0, 1.0, -0.0])),
    "halves": (np.repeat(HALVES.clip(-3, 3), len(HALVES)), np.tile(HALVES, len(HALVES))),
    "outside": (np.array([-3.0, 3.0, 2.0, -2.0]), np.array([-3.6, 40.0, 3.5, -1e6])),
    "one row": (np.array([1.0]), np.array([-1.0])),
}


@pytest.mark.parametrize("case", EDGES)
def test_sentiment_is_the_field_s_at_the_edges(case: str) -> None:
    y_true, y_pred = EDGES[case]
    expected = field_sentiment(y_true, y_pred)
    assert metrics.sentiment(y_true, y_pred) == pytest.approx(expected, abs=1e-12)
    assert metrics.sentiment(torch.tensor(y_true), y_pred.tolist()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_sentiment_is_the_field_s_on_random_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y_true, y_pred = rng.integers(-9, 10, 300) / 3, rng.normal(0, 3, 300)
    assert metrics.sentiment(y_true, y_pred) == pytest.approx(field_sentiment(y_true, y_pred), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_emotions_are_the_weighted_accuracy_and_f1_of_each(seed: int) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    names = ("happy", "sad", "fear")
    y = rng.random((80, 3)) < [0.5, 0.3, 0.1]
    p = rng.random((80, 3)) < 0.4
    found = metrics.emotions(y, torch.tensor(p), names)
    expected = {}
    for i, name in enumerate(names):
        tp, tn = int((y[:, i] & p[:, i]).sum()), int((~y[:, i] & ~p[:, i]).sum())
        positive, negative = int(y[:, i].sum()), int((~y[:, i]).sum())
        f1 = sk.f1_score(y[:, i], p[:, i], average="weighted", zero_division=0)
        expected[name] = {"wa": (tp * negative / positive + tn) / (2 * negative), "weighted_f1": f1}
        assert found["per_emotion"][name] == pytest.approx(expected[name], abs=1e-12)
    assert found["wa"] == pytest.approx(sum(each["wa"] for each in expected.values()) / 3, abs=1e-12)
    assert found["weighted_f1"] == pytest.approx(sum(each["weighted_f1"] for each in expected.values()) / 3, abs=1e-12)
    assert found["accuracy"] == pytest.approx((y == p).mean(), abs=1e-12)


def test_emotions_never_or_always_present() -> None:
    y = np.array([[0, 1], [0, 1], [0, 1], [0, 1]])
    found = metrics.emotions(y, np.array([[0, 1], [0, 1], [0, 1], [1, 0]]), ("never", "always"))
    assert found["per_emotion"]["never"]["wa"] == 0.75
    assert found["per_emotion"]["always"]["wa"] == 0.75
    with pytest.raises(UserError, match="nothing to score: no samples"):
        metrics.emotions(np.zeros((0, 2)), np.zeros((0, 2)), ("never", "always"))


@pytest.mark.parametrize("k", [2, 3, 7])
def test_kappa_is_scikit_learn_s(k: int) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(k)
    for spread in (0.3, 1.0, 5.0):
        y = rng.integers(0, k, 200)
        p = np.rint(y + rng.normal(0, spread, 200)).clip(0, k - 1).astype(int)
        matrix = sk.confusion_matrix(y, p, labels=range(k))
        expected = sk.cohen_kappa_score(y, p, weights="quadratic", labels=range(k))
        assert metrics.kappa(matrix) == pytest.approx(expected, abs=1e-12)


def test_kappa_of_chance_and_of_one_class() -> None:
    assert metrics.kappa([[4, 0, 0], [0, 3, 0], [0, 0, 2]]) == 1.0
    assert metrics.kappa([[0, 0, 5], [0, 0, 0], [5, 0, 0]]) == pytest.approx(-1.0)
    assert metrics.kappa([[3, 0], [7, 0]]) == 0.0  # always the same answer
    assert metrics.kappa([[9, 0], [0, 0]]) == 0.0  # nothing to agree on


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_the_loop_s(bins: int) -> None:
    rng = np.random.default_rng(bins)
    sure = np.concatenate([rng.random(300), [0.0, 1.0, 1.0]])
    right = rng.random(303) < sure**2
    expected = 0.0
    for low in range(bins):
        last = low == bins - 1
        held = [i for i, c in enumerate(sure) if c >= low / bins and (last or c < (low + 1) / bins)]
        if held:
            gap = np.mean(right[held]) - np.mean(sure[held])
            expected += len(held) / len(sure) * abs(float(gap))
    assert metrics.calibration_error(sure, right, bins) == pytest.approx(expected, abs=1e-12)
    assert metrics.calibration_error([1.0, 1.0], [True, True], bins) == 0.0
    assert metrics.calibration_error([1.0, 1.0], [False, False], bins) == 1.0


def test_table() -> None:
    y_true, y_pred = unroll(MER2023)
    scores = metrics.classification(y_true, y_pred, LABELS)
    lines = metrics.table(scores, metrics.majority(y_true, LABELS)).splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "f1", "support"]
    assert lines[4].split() == ["sad", "0.9470", "0.9728", "0.9597", "257"]
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[8].split() == ["model", "majority", "(sad)"]
    assert lines[9].split() == ["accuracy", "0.9053", "0.3082"]
    assert lines[12].split()[:2] == ["weighted_f1", "0.9036"]
    assert len({len(line) for line in lines[8:]}) == 1
    assert metrics.table({"mae": 0.5, "acc7": 0.25}).splitlines() == ["mae    0.5000", "acc7   0.2500"]


def test_clue_overlap_is_the_f1_of_content_words() -> None:
    truth, answer = "Her voice trembles, her voice breaks; tears.", "a trembling voice and tears, tears"
    a, b = {"voice": 2, "trembles": 1, "breaks": 1, "tears": 1}, {"trembling": 1, "voice": 1, "tears": 2}
    assert metrics.content_words(truth) == a
    assert metrics.content_words(answer) == b
    precision, recall = 2 / 4, 2 / 5
    assert metrics.clue_overlap(truth, answer) == pytest.approx(10 * 2 * precision * recall / (precision + recall))
    assert metrics.clue_overlap("this person is in the video", "this person is in the video") == 0  # says nothing
    assert metrics.clue_overlap("声音颤抖", "声音发抖") == pytest.approx(
        10 / 3
    )  # 声音 of 声音 音颤 颤抖 | 声音 音发 发抖
    assert metrics.clue_overlap("", "") == 0
