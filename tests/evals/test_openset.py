"""Open-vocabulary sets: grouping of words, and the scores against the formula written out in float64."""

import random

import numpy as np
import pytest

from common.config import UserError
from evals import openset
from evals.judge import Lexical
from evals.openset import Synonyms, listed


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_formula_s(seed):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(8)]
    truths = [set(rng.sample(words, rng.randint(1, 5))) for _ in range(40)]
    said = [set(rng.sample(words, rng.randint(0, 5))) for _ in range(40)]
    accuracy = np.array([len(g & p) / len(p) if p else 0.0 for g, p in zip(truths, said, strict=True)], np.float64)
    recall = np.array([len(g & p) / len(g) for g, p in zip(truths, said, strict=True)], np.float64)
    found = openset.score(truths, said)
    assert found["set_accuracy"] == pytest.approx(accuracy.mean(), abs=1e-12)
    assert found["set_recall"] == pytest.approx(recall.mean(), abs=1e-12)
    assert found["score"] == pytest.approx((accuracy.mean() + recall.mean()) / 2, abs=1e-12)


def test_an_empty_prediction_counts_0():
    assert openset.score([{"sad"}, {"sad"}], [set(), {"sad"}])["score"] == 0.5


def test_words_are_grouped_by_meaning():
    words = Synonyms()
    assert words.senses(["Joyful", "happy", " HAPPINESS. "]) == {"happy"}
    assert words.senses(["angry/displeased"]) == {"angry", "dissatisfied"}
    assert words.senses(["slightly anxious", "negative emotions"]) == {"worried", "negative"}
    assert words.senses(["hungry", "hungry"]) == {"hungry"}  # of no group: one of its own
    assert words.senses(["", "[]"]) == set()
    groups = [line.split(", ") for line in openset.GROUPS.strip().splitlines()]
    members = [word for group in groups for word in group]
    assert len(members) == len(set(members))
    assert all(words.senses([word]) == {group[0]} for group in groups for word in group)


def test_a_users_groups(tmp_path):
    (tmp_path / "groups.txt").write_text("# mine\nfurious, hangry , seething\n\nblue,sad\n")
    words = Synonyms(tmp_path / "groups.txt")
    assert words.senses(["hangry", "furious", "mad"]) == {"furious", "angry"}
    assert words.senses(["sad", "sorrow"]) == {"blue", "sad"}
    assert words.named("She seems hangry and blue") == ["furious", "blue"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['happy', 'at ease']", ["happy", "at ease"]),
        ('["don\'t believe", "doubt"]', ["don't believe", "doubt"]),
        ("[]", []),
        ("happy, sad", ["happy", "sad"]),
        ("Happy.", ["happy"]),
        ("开心，难过", ["开心", "难过"]),
        ("the person in the video is sad", None),
        ("sad. the voice is low", None),
    ],
)
def test_a_list_is_told_from_running_text(text, expected):
    assert listed(text) == expected


def test_words_of_running_text():
    words = Synonyms()
    assert words.said("he is not sad but worried. his voice is angry and he looks mad") == ["worried", "angry"]
    assert words.said("his brow is low, and he looks crestfallen today") == []
    words.know(["crestfallen", "happy"])  # what the truths of the set name is looked for, too
    assert words.said("his brow is low, and he looks crestfallen today") == ["crestfallen"]


def record(id, answer, target):
    return {"id": id, "answer": answer, "target": target}


def test_a_report_stands_beside_the_commonest_word():
    words = Synonyms()
    records = [
        record("a", "He is glad and excited about it.", "['happy', 'joy']"),
        record("b", "", "sad"),
        record("c", "sorrow", "['sad', 'disappointed']"),
    ]
    scores, shown = openset.report(records, Lexical(words), words)
    assert [(r["openset"]["truth"], r["openset"]["said"]) for r in shown] == [
        (["happy"], ["excited", "happy"]), (["sad"], []), (["disappointed", "sad"], ["sad"]),
    ]  # fmt: skip
    assert scores["set_accuracy"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert scores["set_recall"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert scores["majority"]["label"] == "sad"
    assert scores["majority"]["score"] == pytest.approx((2 / 3 + (1 + 1 / 2) / 3) / 2)
    assert (scores["clips"], scores["nothing_said"], scores["unanswered"]) == (3, 1, [])
    assert "majority (sad)" in openset.table(scores)
    assert "lexical" in openset.table(scores)


def test_what_a_judge_did_not_read_is_left_out():
    class Half:
        name = "half"

        def words(self, texts):
            return [["sad"], None][: len(texts)]

    words = Synonyms()
    scores, shown = openset.report([record("a", "x", "sad"), record("b", "y", "sad")], Half(), words)
    assert (scores["clips"], scores["answers"], scores["unanswered"], scores["score"]) == (1, 2, ["b"], 1.0)
    assert [r["id"] for r in shown] == ["a"]
    with pytest.raises(UserError) as error:
        openset.report([record("a", "x", "he sits at the big table")], Half(), words)
    assert str(error.value) == "mer-ov: 'a' has no emotion word to compare with (1 such clips)"
