"""Scores of emotional support's four fields against scikit-learn, with answers that cannot be read."""

import random

import pytest
from sklearn import metrics as reference

from common.config import UserError
from data.mesc import EMOTIONS, STRATEGIES
from data.support import FIELDS
from evals import support, texts

CLOSED = {"client_emotion": EMOTIONS, "therapist_emotion": EMOTIONS, "strategy": STRATEGIES}


def target(client="anger", therapist="neutral", strategy="Open question", response="Why is that?"):
    return dict(zip(FIELDS, (client, therapist, strategy, response), strict=True))


def written(fields):
    return " \n".join(f"{FIELDS[name]}: {text}" for name, text in fields.items() if text is not None)


def drawn(n=200):
    """Records, and what is said in each closed field: a label in any case, none of them, or nothing."""
    rng, records, said = random.Random(0), [], []
    for i in range(n):
        truth = target(*(rng.choice(labels[:4]) for labels in CLOSED.values()))
        truth["strategy"] = truth["strategy"].title()
        if rng.random() < 0.1:
            truth["client_emotion"] = None
        answer = {}
        for name, labels in CLOSED.items():
            right = rng.random() < 0.5 and truth[name]
            answer[name] = truth[name] if right else rng.choice([*labels[:5], "perplexed", None])
        shown = {name: text and rng.choice([text.upper(), f"  {text} "]) for name, text in answer.items()}
        records.append({"id": f"7_{i}", "target": truth, "answer": written(shown | {"response": "Why?"})})
        said.append(answer)
    return records, said


def test_closed_fields_against_scikit_learn():
    records, said = drawn()
    found = support.evaluate(records)
    assert found["records"] == 200
    lost = 0
    for record, answer in zip(records, said, strict=True):
        lost += any(record["target"][name] and answer[name] is None for name in CLOSED)
    assert found["unparsable"] == lost > 20
    for name, labels in CLOSED.items():
        kept = [i for i, record in enumerate(records) if record["target"][name]]
        truth = [records[i]["target"][name].lower() for i in kept]
        answers = [(said[i][name] or "nothing").lower() for i in kept]
        scores = found["fields"][name]
        assert (scores["rows"], scores["left_out"]) == (len(kept), 200 - len(kept))
        assert scores["accuracy"] == pytest.approx(reference.accuracy_score(truth, answers))
        asked = {"labels": list(labels), "zero_division": 0}
        for key, average in (("weighted", "weighted"), ("macro", "macro")):
            wanted = reference.f1_score(truth, answers, average=average, **asked)
            assert scores[f"{key}_f1"] == pytest.approx(wanted)
        for key, score in (("precision", reference.precision_score), ("recall", reference.recall_score)):
            assert scores[f"{key}_weighted"] == pytest.approx(score(truth, answers, average="weighted", **asked))
        there = [i for i, answer in enumerate(answers) if answer in labels]
        confusion = reference.confusion_matrix([truth[i] for i in there], [answers[i] for i in there], labels=labels)
        assert scores["confusion"] == confusion.tolist()
        assert scores["invalid"] == pytest.approx(1 - len(there) / len(kept))
        assert scores["missing"] == answers.count("nothing") > 5
        major = max(labels, key=truth.count)
        assert scores["majority"]["label"] == major
        assert scores["majority"]["accuracy"] == pytest.approx(truth.count(major) / len(truth))


def test_what_cannot_be_read_is_wrong():
    right = target()
    answers = [written(right), "I am sorry.", "", written(right | {"strategy": "open questions"})]
    answers += [written(right | {"client_emotion": None}), written({"response": "Why is that?"})]
    found = support.evaluate([{"id": str(i), "target": right, "answer": answer} for i, answer in enumerate(answers)])
    shares = {name: scores["accuracy"] for name, scores in found["fields"].items()}
    assert shares == pytest.approx({"client_emotion": 2 / 6, "therapist_emotion": 3 / 6, "strategy": 2 / 6})
    assert [scores["missing"] for scores in found["fields"].values()] == [4, 3, 3]
    assert found["fields"]["strategy"]["invalid"] == pytest.approx(4 / 6)
    assert found["unparsable"] == 4
    assert found["responses"] == {"answers": 6, "distinct": 2, "mean_words": 4 * 3 / 6}


def test_a_field_that_targets_lack_is_left_out():
    records = [
        {"id": "a", "target": target(client=None), "answer": written(target(client=None))},
        {"id": "b", "target": target(client="", response=None), "answer": written(target(client="joy"))},
    ]
    found = support.evaluate(records)
    assert found["fields"]["client_emotion"] == {"rows": 0, "left_out": 2}
    assert found["fields"]["therapist_emotion"]["accuracy"] == 1
    assert found["unparsable"] == 0  # nothing was asked for
    assert found["responses"]["answers"] == 1
    assert "client_emotion: 2 rows left out, whose target has none" in support.table(found)


def test_the_table():
    records = [
        {"id": str(i), "target": target(client=client), "answer": written(target(client="joy", response=str(i % 2)))}
        for i, client in enumerate(["joy", "fear", "fear", None])
    ]
    lines = support.table(support.evaluate(records)).splitlines()
    assert lines[0].split() == ["accuracy", "weighted_f1", "macro_f1", "precision_weighted", "recall_weighted",
                                "invalid", "rows"]  # fmt: skip
    third = 1 / 3
    values = (third, 0.5 * third, 0.5 / 7, third * third, third, 0)  # precision 1/3 and recall 1 of joy, of 7 labels
    assert lines[1].split() == ["client_emotion", *(f"{value:.4f}" for value in values), "3"]
    assert lines[2].split()[:4] == ["majority", "(fear)", "0.6667", "0.5333"]
    assert lines[-3:] == [
        "0 of 4 answers lack a field: they are wrong there",
        "client_emotion: 1 rows left out, whose target has none",
        "responses: 2 distinct of 4, 1.0 words on average",
    ]


def test_other_labels():
    records = [
        {"id": "a", "target": target("calm", "calm", "Question"), "answer": written(target("Calm", "joy", "question"))}
    ]
    found = support.evaluate(records, ["calm", "joy"], ["Question", "Others"])
    assert [scores["accuracy"] for scores in found["fields"].values()] == [1, 0, 1]
    with pytest.raises(UserError) as error:
        support.evaluate(records)
    assert str(error.value) == f"a: client_emotion 'calm' is not one of {', '.join(EMOTIONS)}"
    with pytest.raises(UserError, match=r"^nothing to score: no answers$"):
        support.evaluate([])


def test_responses_are_compared_with_their_references(monkeypatch):
    seen = []
    monkeypatch.setattr(texts, "compare", lambda records, names: seen.append((records, names)) or {"bleu": 12.5})
    records = [
        {"id": "a", "target": target(), "answer": written(target(response="Why?\nTell me."))},
        {"id": "b", "target": target(response="Go on."), "answer": "Client's emotion: joy"},
        {"id": "c", "target": target(response=None), "answer": written(target())},
    ]
    found = support.evaluate(records, compared=["bleu", "rouge"])
    replies = [
        {"id": "a", "target": "Why is that?", "answer": "Why?\nTell me."},
        {"id": "b", "target": "Go on.", "answer": ""},
    ]
    assert seen == [(replies, ["bleu", "rouge"])]
    assert found["responses"]["metrics"] == {"bleu": 12.5}
    assert support.table(found).endswith("2 distinct of 2, 1.5 words on average, bleu 12.5000")
