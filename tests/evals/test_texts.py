"""Figures of answers: what is generic, what echoes, and the optional metrics against their own packages."""

import importlib
import math
import subprocess
import sys

import pytest

from common.config import UserError
from evals import texts


def test_figures():
    records = [
        {"id": "a", "answer": "he is sad", "target": "low voice", "task": "reason_v2"},
        {"id": "b", "answer": " he is sad ", "target": "", "task": "reason_v2"},
        {"id": "c", "answer": "we really must leave today, he says", "target": "x", "task": "reason_v2"},
        {"id": "d", "answer": "", "target": "x", "task": "reason_v2"},
    ]
    said = {"a": "I do not know", "c": "We really must leave today.", "d": "well well well", "b": None}
    found = texts.figures(records, said)
    assert found == {
        "answers": 4, "distinct": 3, "mean_words": (3 + 3 + 7 + 0) / 4, "captions_found": 3, "captions_wanted": 4,
        "echo": 1 / 3, "with_transcript": 3,
    }  # fmt: skip
    assert texts.line(found) == (
        "answers: 3 distinct of 4, 3.2 words on average, captions found 3/4, 33.3% of 3 echo the transcript"
    )
    labels = texts.figures([{"id": "a", "answer": "sad", "target": "sad", "task": "emotion"}])
    assert (labels["captions_wanted"], labels["echo"]) == (0, None)
    assert texts.line(labels) == "answers: 1 distinct of 1, 1.0 words on average"


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        ("Oh my!", "oh my", True),
        ("oh my, the brow is raised high", "oh my", False),  # two words of seven
        ("I never wanted to go there", "I never wanted to go there. Never!", True),
        ("I was there and never went to see the wanted man", "I never wanted to go there", False),  # words, no stretch
        ("我真的很生气", "我真的很生气啊", True),
        ("anything", "", False),
        ("anything", None, False),
    ],
)
def test_an_echo_is_a_stretch_of_the_transcript(answer, said, expected):
    assert texts.echoes(answer, said) is expected


def test_without_the_packages_the_message_says_what_to_install():
    for name, package in (
        ("bleu", "sacrebleu"),
        ("rouge", "rouge-score"),
        ("meteor", "nltk"),
        ("bleu_published", "nltk"),
    ):
        code = (
            f"import sys; sys.modules['{package.replace('-', '_')}'] = None\nfrom common.config import UserError\n"
            f"from evals import texts\ntry:\n    texts.check(['{name}'])\nexcept UserError as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == f"--text-metrics {name} needs {package}: pip install -r requirements-extra.txt\n"


def records(*pairs):
    return [{"id": str(i), "target": truth, "answer": answer} for i, (truth, answer) in enumerate(pairs)]


def test_nothing_to_compare_with():
    with pytest.raises(UserError) as error:
        texts.compare(records(("", "he is sad")), ["bleu"])
    assert str(error.value) == "--text-metrics bleu: no answer has a reference to be compared with"
    assert texts.compare(records(("", "he is sad")), []) == {}


PAIRS = [("the voice is low and slow", "the voice is low and slow"), ("he raises his brows in surprise", "sad")]


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert texts.compare(records(PAIRS[0]), ["bleu"])["bleu"] == pytest.approx(100)
    assert 0 < texts.compare(records(*PAIRS), ["bleu"])["bleu"] < 100
    # 5 of 5 words and 3 of 4 pairs of words, one of 3 triples and none of 2 fours, which counts as a half; too short
    found = texts.compare(records(("the cat sat on the mat", "the cat on the mat")), ["bleu"])
    for n, name in enumerate(("bleu1", "bleu2", "bleu3", "bleu"), 1):
        shares = (1, 3 / 4, 1 / 3, 1 / 4)[:n]
        assert found[name] == pytest.approx(100 * math.exp(1 - 6 / 5) * math.prod(shares) ** (1 / n)), name


def test_bleu_as_published(monkeypatch):
    nltk = pytest.importorskip("nltk")
    try:
        nltk.word_tokenize("he")
    except LookupError:
        with pytest.raises(UserError) as error:
            texts.compare(records(*PAIRS), ["bleu_published"])
        assert str(error.value) == "--text-metrics bleu_published needs punkt: python -m nltk.downloader punkt_tab"
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    found = texts.compare(
        records(("the cat sat on the mat", "The cat on the mat"), ("he is sad", "")), ["bleu_published"]
    )
    assert found == {"bleu_published": pytest.approx(math.exp(1 - 6 / 5) * (3 / 4) ** 0.01 / 2)}


def test_rouge():
    pytest.importorskip("rouge_score")
    assert texts.compare(records(*PAIRS), ["rouge"]) == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougel": 0.5})
    # 5 and 6 words: 5 in common, 3 pairs of words of 4 and 5, the longest common row of 5
    found = texts.compare(records(("the cat sat on the mat", "the cat on the mat")), ["rouge"])
    assert found == pytest.approx({"rouge1": 10 / 11, "rouge2": 6 / 9, "rougel": 10 / 11})


def test_meteor():
    pytest.importorskip("nltk")
    try:
        importlib.import_module("nltk.corpus").wordnet.ensure_loaded()
    except LookupError:
        with pytest.raises(UserError) as error:
            texts.compare(records(*PAIRS), ["meteor"])
        assert str(error.value) == "--text-metrics meteor needs WordNet: python -m nltk.downloader wordnet"
        pytest.skip("nltk's WordNet is not here: only its message was checked")
    assert 0.4 < texts.compare(records(*PAIRS), ["meteor"])["meteor"] < 0.6
