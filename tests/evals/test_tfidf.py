"""TF-IDF and its logistic regression against scikit-learn's; what is chosen, and from what."""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.config import UserError
from data.mesc import EMOTIONS, STRATEGIES, Turn, Utterance
from evals import tfidf

TEXTS = [
    "I told you, I TOLD you!", "a b c", "", "Why don't you ask me? You never ask.", "él está aquí; 42 years, naïve",
    "you you you never", "snake_case stays one word", "...", "I'm sad. I'm so sad.\nNever mind",
]  # fmt: skip
UNSEEN = ["Zebras never told", "zebras", "you told you", ""]
CUES = {"anger": "hate shout stupid", "sadness": "cry tears lost", "joy": "laugh sunny great"}
PATTERN = r"(?u)\b\w\w+\b|[^\w\s]"
WORDS = [("client",)]


def dense(rows, width):
    table = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        table[i, list(row)] = list(row.values())
    return table


def turn(emotion, client="", *before):
    """A turn whose history is (role, emotion, text, strategy) each."""
    history = [Utterance(*said) for said in before]
    return Turn("0_0", "0", None, "", "", client, "Go on.", emotion, "neutral", "restatement", history=history)


def drawn(n, seed):
    """Turns whose client says words of an emotion, now and then of another, among words that all say."""
    rng, turns = random.Random(seed), []
    for _ in range(n):
        emotion = rng.choice(list(CUES))
        told = emotion if rng.random() < 0.8 else rng.choice(list(CUES))
        words = rng.choices(CUES[told].split(), k=2) + rng.choices("the of and this that with".split(), k=4)
        rng.shuffle(words)
        turns.append(turn(emotion, " ".join(words)))
    return turns


def score(test):
    return tfidf.baseline(drawn(100, 0), drawn(60, 1), test, "client_emotion", EMOTIONS, WORDS)


@pytest.mark.parametrize("least", [1, 2])
def test_weights_are_scikit_learn_s(least):
    reference = TfidfVectorizer(ngram_range=(1, 2), min_df=least, token_pattern=PATTERN)
    wanted = reference.fit_transform(TEXTS).toarray()
    own = tfidf.Tfidf(TEXTS, least)
    assert list(own.columns) == list(reference.get_feature_names_out())
    np.testing.assert_allclose(own.idf, reference.idf_, rtol=0, atol=1e-12)
    for texts, table in ((TEXTS, wanted), (UNSEEN, reference.transform(UNSEEN).toarray())):
        np.testing.assert_allclose(dense([own.row(text) for text in texts], len(own.idf)), table, rtol=0, atol=1e-12)
    assert own.row("") == own.row("zebras") == {}


def test_a_product_and_its_gradient_are_those_of_the_dense_rows():
    rows = [{2: 0.5, 0: 1.0}, {}, {1: -1.0, 2: 2.0}, {2: 3.0}]
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.from_numpy(dense(rows, 5))
    torch.testing.assert_close(tfidf.product(rows, 5)(weight), x @ weight.T, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(tfidf.product(rows, 5), (weight,))


@pytest.mark.parametrize("c", tfidf.C)
def test_a_fit_is_scikit_learn_s_wherever_it_begins(c):
    turns = drawn(100, 0)
    features = tfidf.Features(["client"], turns)
    rows = features.rows(turns)
    y = torch.tensor([list(CUES).index(turn.client_emotion) for turn in turns])
    start = torch.randn(3, features.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = tfidf.fit(tfidf.product(rows, features.width), y, start, c)
    x, unseen = dense(rows, features.width), dense(features.rows(drawn(50, 2)), features.width)
    expected = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(x, y.numpy())
    np.testing.assert_allclose(weight, expected.coef_, rtol=0, atol=1e-4)
    p = (torch.from_numpy(unseen) @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(p, expected.predict_proba(unseen), rtol=0, atol=1e-4)


def test_parts_have_features_of_their_own():
    before = [("client", "anger", "never cry", None), ("therapist", "neutral", "never ask", "open question")]
    old = [("client", "joy", "older", None), ("therapist", None, "older", "approval")]
    turns = [turn("joy", "never mind", *old, *before)] * 3 + [turn("joy", "hello there")] * 3
    features = tfidf.Features(list(tfidf.PARTS), turns)
    tables = {part: list(table.columns) for part, (_, table) in zip(tfidf.PARTS, features.parts, strict=True)}
    assert tables == {
        "client": ["hello", "hello there", "mind", "never", "never mind", "there"],
        "client_before": ["cry", "never", "never cry"],
        "therapist_before": ["ask", "never", "never ask"],
        "client_emotion_before": ["anger"],
        "strategy_before": ["open", "open question", "question"],
    }
    first, _, _, opening, *_ = dense(features.rows(turns), features.width)
    assert features.width == 6 + 3 + 3 + 1 + 3
    np.testing.assert_allclose(np.flatnonzero(first), [2, 3, 4, *range(6, 16)])
    assert set(np.flatnonzero(opening)) == {0, 1, 5}  # nothing was said before
    assert first[12] == 1.0


def test_words_beat_the_majority():
    found = score(drawn(200, 2))
    assert found["accuracy"] > 0.75
    assert found["rows"] == 200
    assert found["majority"]["accuracy"] < 0.45
    assert found["parts"] == ["client"]
    assert found["features"] == tfidf.Features(["client"], drawn(100, 0)).width


def test_the_best_on_valid_is_chosen_and_the_first_of_equals():
    """The labels before say it all here, words nothing; then nothing says anything."""
    choices = [("client",), ("client_emotion_before", "strategy_before")]
    rng = random.Random(0)
    told = [
        turn(label, rng.choice(["well well", "so so"]), ("client", label, "hello", None))
        for label in rng.choices(list(CUES), k=90)
    ]
    found = tfidf.baseline(told[:60], told[60:], told, "client_emotion", EMOTIONS, choices)
    assert found["parts"] == ["client_emotion_before", "strategy_before"]
    assert found["accuracy"] == 1.0
    assert [(tuple(each["parts"]), each["c"]) for each in found["tried"]] == [*product(choices, tfidf.C)]
    silent = [replace(turn, client="", history=[]) for turn in told]
    found = tfidf.baseline(silent[:60], silent[60:], silent, "client_emotion", EMOTIONS, choices)
    assert (found["parts"], found["c"], found["features"]) == (["client"], tfidf.C[0], 0)


def test_what_is_chosen_does_not_depend_on_test():
    test = drawn(60, 2)
    others = [turn.client_emotion for turn in test]
    random.Random(3).shuffle(others)
    shuffled = [replace(turn, client_emotion=other) for turn, other in zip(test, others, strict=True)]
    a, b, again = score(test), score(shuffled), score(test)
    assert a == again
    assert a["accuracy"] > b["accuracy"]
    assert all(a[name] == b[name] for name in ("parts", "c", "features", "tried"))
    answered = [np.sum(found["confusion"], 0).tolist() for found in (a, b)]
    assert answered[0] == answered[1]


def test_valid_decides_the_strength():
    """Where the words of valid mean other emotions than in train, another C is best."""
    given = score(drawn(60, 2))
    turned = dict(zip(CUES, [*list(CUES)[1:], "anger"], strict=True))
    valid = [replace(turn, client_emotion=turned[turn.client_emotion]) for turn in drawn(60, 1)]
    other = tfidf.baseline(drawn(100, 0), valid, drawn(60, 2), "client_emotion", EMOTIONS, WORDS)
    assert [each["c"] for each in given["tried"]] == list(tfidf.C)
    for found in (given, other):
        top = max(each["weighted_f1"] for each in found["tried"])
        assert found["c"] == next(each["c"] for each in found["tried"] if each["weighted_f1"] == top)
    assert given["c"] != other["c"]


def test_turns_without_the_field_are_left_out():
    test = drawn(60, 2)
    unknown = [replace(turn, client_emotion=None, client="hate hate") for turn in test]
    train, valid = ([*turns, *unknown] for turns in (drawn(100, 0), drawn(60, 1)))
    found = tfidf.baseline(train, valid, [*unknown, *test], "client_emotion", EMOTIONS, WORDS)
    assert found == score(test)


def test_training_turns_of_one_label_make_a_constant_answer():
    turns = [replace(turn, therapist_emotion="fear") for turn in drawn(20, 0)]
    found = tfidf.baseline(turns, drawn(20, 1), [*turns[:5], *drawn(15, 2)], "therapist_emotion", EMOTIONS, WORDS)
    assert found["accuracy"] == found["majority"]["accuracy"] == 0.25
    assert found["majority"]["label"] == "fear"


def test_mistakes():
    turns = drawn(9, 0)
    none = [replace(turn, strategy=None) for turn in turns]
    for i, split in enumerate(("train", "valid", "test")):
        splits = [none if i == j else turns for j in range(3)]
        with pytest.raises(UserError, match=f"strategy: no turn of {split} has one"):
            tfidf.baseline(*splits, "strategy", STRATEGIES)
        splits = [[*turns, replace(turns[0], strategy="silence")] if i == j else turns for j in range(3)]
        with pytest.raises(UserError, match=rf"strategy of {split}: unknown label 'silence' \(labels: open question,"):
            tfidf.baseline(*splits, "strategy", STRATEGIES)
