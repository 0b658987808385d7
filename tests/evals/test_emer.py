"""EMER: its files in every published layout, reports with who was left out, a language model here as judge."""

import csv
import json

import pytest
import torch

from common.config import UserError
from evals import emer, local
from evals.chat import Cache
from evals.judge import JudgeConfig, Lexical, Mark, Verdict, build
from evals.local import Local
from evals.openset import Synonyms
from model.generate import generate
from model.llm import Llama
from model.tokenizer import Tokenizer, load_tokenizer
from model.toy import make_toy_llm
from tests.qwen import make_qwen

CPU = torch.device("cpu")


def save(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("header", "rows", "expected"),
    [
        (["names", "chi_reasons"], [["a", "low voice, sad"], ["b", ""], ["c", "nan"]], {"a": "low voice, sad"}),
        (["names", "emotions", "subtitles", "reasons"], [["a", "sad", "no", "low\nvoice"]], {"a": "low\nvoice"}),
        (["names", "chinese", "english"], [["a", "声音低", "low voice"]], {"a": "low voice"}),
        (["id", "caption"], [["a", "x"]], {"a": "x"}),
    ],
)
def test_columns_of_the_published_files(tmp_path, header, rows, expected):
    assert emer.read_truth(save(tmp_path / "gt.csv", header, *rows)) == expected


def test_other_truths(tmp_path):
    (tmp_path / "gt.csv").write_bytes("names,chi_reasons\na,声音低\n".encode("gb18030"))
    assert emer.read_truth(tmp_path / "gt.csv") == {"a": "声音低"}
    entries = {"a": {"smp_reason_caption": "low voice"}, "b": {"caption": "coarse"}, "c": {"text": "no"}}
    (tmp_path / "fine.json").write_text(json.dumps(entries))
    assert emer.read_truth(tmp_path / "fine.json") == {"a": "low voice", "b": "coarse"}
    words = save(tmp_path / "ov.csv", ["name", "openset"], ["a", "['sad', 'low']"], ["b", "[]"])
    assert emer.read_truth(words, emer.WORDS) == {"a": "['sad', 'low']", "b": "[]"}


def test_answers_given_before(tmp_path):
    records = [{"id": "a", "answer": "sad", "target": "low voice", "label": "sad", "task": "reason_v2"},
               {"id": "b", "answer": None}]  # fmt: skip
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    found = emer.read_answers(tmp_path / "predictions.jsonl")
    assert found == [records[0], {"id": "b", "answer": "", "target": "", "task": "reason_v2"}]
    emer.write_answers(tmp_path / "answers.csv", [{"id": "a", "answer": 'low, "sad"\nvoice'}])
    [again] = emer.read_answers(tmp_path / "answers.csv")
    assert (again["id"], again["answer"]) == ("a", 'low, "sad"\nvoice')
    with open(tmp_path / "answers.csv", newline="") as file:
        assert next(csv.reader(file)) == ["names", "chi_reasons"]


def test_mistakes(tmp_path):
    for name, text, read, line in (
        ("a.csv", "names,x\na,b\n", emer.read_truth,
         f"none of the columns {', '.join(emer.DESCRIPTIONS)} (found: names, x)"),
        ("b.csv", "x,reasons\na,b\n", emer.read_truth, None),
        ("c.csv", "names,reasons\na,b\na,c\n", emer.read_truth, "'a' is listed again"),
        ("d.jsonl", '{"id": "a"}\n', emer.read_answers, "a record needs an id and an answer"),
        ("e.jsonl", "{\n", emer.read_answers, "not JSON"),
        ("f.jsonl", '{"id": "a", "answer": "x"}\n' * 2, emer.read_answers, "an id occurs twice"),
        (None, "", emer.read_answers, "not found"),
    ):  # fmt: skip
        path = tmp_path / (name or "gone.csv")
        if name:
            path.write_text(text)
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(str(path))
        assert (line or "no column") in str(error.value)


def records(*answers):
    truths = ["the brow is furrowed, he is angry", "bright eyes show that she is happy", "a low voice, sad"]
    return [{"id": f"c{i}", "answer": a, "target": t} for i, (a, t) in enumerate(zip(answers, truths, strict=False))]


def test_a_report_has_a_control_where_it_is_free():
    same = records("the brow is furrowed, he is angry", "bright eyes show that she is happy")
    scores, shown = emer.report(same, Lexical(Synonyms()))
    assert (scores["clue_overlap_0_10"], scores["label_overlap_1_10"]) == (10, 10)
    assert scores["dealt"] == {f"{question}_{scale}": end for question in ("clue_overlap", "label_overlap")
                               for scale, end in (("1_10", 1), ("0_10", 0))}  # fmt: skip
    assert shown[0]["judge"] == {
        "by": Lexical.name, "truth_words": ["angry"], "answer_words": ["angry"], "clue_overlap": 10,
        "clue_overlap_reason": "content words shared", "label_overlap": 10,
        "label_overlap_reason": "emotion words shared: angry",
    }  # fmt: skip
    one = records("one answer for all of them", "one answer for all of them", "one answer for all of them")
    scores, _ = emer.report(one, Lexical(Synonyms()))
    assert scores["clue_overlap_0_10"] == scores["dealt"]["clue_overlap_0_10"]


class Silent:
    """Answers no question, or one."""

    name, usage = "silent", None

    def __init__(self, score=None):
        self.score = score

    def verdicts(self, pairs):
        return [Verdict(Mark(self.score, problem="no reply"), Mark(problem="no reply")) for _ in pairs]


def test_a_judge_that_says_nothing():
    with pytest.raises(UserError) as error:
        emer.report(records("x", "y"), Silent())
    assert str(error.value) == "judge silent: none of the 2 answers could be scored (no reply)"
    scores, shown = emer.report(records("x"), Silent(4.0))
    assert scores["label_overlap_1_10"] is None
    assert shown[0]["judge"]["label_overlap_reason"] == "no reply"


def test_whose_truth_is_known():
    given = [{"id": "a", "answer": "x", "target": "own"}, {"id": "b", "answer": "y", "target": ""}]
    assert [r["target"] for r in emer.with_truth(given, {})] == ["own"]
    assert [(r["id"], r["target"]) for r in emer.with_truth(given, {"b": "told"})] == [("b", "told")]
    with pytest.raises(UserError) as error:
        emer.with_truth(given, {"c": "told"})
    assert str(error.value) == "none of the 2 answers has a true description (--truth FILE)"


# ---- a language model of this machine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "llama"
    make_toy_llm(folder, ["[INST] What does the person feel? [/INST] a score of 7", "sad, happy"], hidden=32, layers=1)
    return folder


def test_a_local_judge_of_qwen2_s_kind_is_asked_in_its_own_layout(tmp_path, monkeypatch):
    make_qwen(tmp_path)
    monkeypatch.setattr(local, "LONGEST", 4)
    tokenizer = load_tokenizer(tmp_path)
    written = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nfeel?<|im_end|>\n"
    asked = tokenizer.encode(f"{written}<|im_start|>assistant\n")
    assert local.prompt(("feel?",), tokenizer) == asked
    following = tokenizer.encode("odd<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")
    assert local.prompt(("feel?", "odd", "again"), tokenizer) == [*asked, *following]
    [(_, reply)] = Local(str(tmp_path), CPU).complete([("feel?",)])
    assert (reply.tokens_in, reply.problem) == (len(asked), "")


def test_a_local_judge_replies_as_the_model_does(llama, monkeypatch):
    monkeypatch.setattr(local, "LONGEST", 12)
    monkeypatch.setattr(local, "BATCH", 2)
    made = Local(str(llama), CPU)
    turns = [("What does the person feel?",), ("feel?", "odd", "again"), ("a score",)]
    replies = dict(made.complete(turns))
    llm, tokenizer = Llama.from_pretrained(llama), Tokenizer(llama)
    written = "<s>[INST] feel? [/INST] odd </s><s>[INST] again [/INST]"
    assert local.prompt(turns[1], tokenizer) == tokenizer.encode(written)
    for i, each in enumerate(turns):
        ids = local.prompt(each, tokenizer)
        [new] = generate(llm, [ids], 12, eos_id=tokenizer.eos_id)
        assert replies[i].text == tokenizer.decode(new).strip()
        assert (replies[i].tokens_in, replies[i].tokens_out) == (len(ids), len(new))


def test_a_local_judges_replies_are_kept(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LONGEST", 4)
    cfg = JudgeConfig(kind="local", model=str(llama), cache=str(tmp_path / "cache.jsonl"))
    first = build(cfg, CPU, 0, Synonyms())
    found = first.words(["he weeps", "she laughs"])
    assert len(Cache(tmp_path / "cache.jsonl").replies) == first.usage.requests >= 2
    monkeypatch.setattr(Local, "_load", None)  # not even loaded
    again = build(cfg, CPU, 0, Synonyms())
    assert again.words(["he weeps", "she laughs"]) == found
    assert again.usage.requests == 0
    assert again.name == f"local: {llama}"


def test_no_such_judge(tmp_path):
    with pytest.raises(UserError) as error:
        Local(str(tmp_path / "gone"), CPU)
    assert "judge" in str(error.value)
    assert "not found" in str(error.value)
