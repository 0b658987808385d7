import json
import os
from pathlib import Path

import pytest

from common.config import UserError
from data.esconv import EMOTIONS, STRATEGIES, Config, main, read_esconv
from data.mesc import dialogue_turns, read_turns

ABOUT = {"emotion_type": "anxiety", "problem_type": "job crisis", "situation": "I may lose my job."}
SAID = [
    ("sys", "Hello !", "Question", []),
    ("usr", "Hi .", None, None),
    ("usr", "I am worried .", None, None),
    ("sys", "Why ?", "Question", []),
    ("usr", "My boss left .", None, None),
    ("sys", "Mine too .", "Self-disclosure", []),
    ("sys", "It passed .", "Others", []),
]
SPLIT = ABOUT | {
    "dialog": [{"speaker": who, "text": text} | ({"strategy": how} if how else {}) for who, text, how, _ in SAID]
}
# ESConv.json and FailedESConv.json name the sides and the strategies otherwise
SIDES = {"usr": "seeker", "sys": "supporter"}
WHOLE = ABOUT | {
    "dialog": [
        {"speaker": SIDES[who], "content": f"{text}\n", "annotation": {"strategy": how} if how else {"feedback": "4"}}
        for who, text, how, _ in SAID
    ]
}


def put(folder, name, *dialogues):
    (folder / name).write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))


def test_turns(tmp_path):
    put(tmp_path, "valid.txt", SPLIT)
    (dialogue,) = read_esconv(tmp_path / "valid.txt", "valid")
    opening, first, second = dialogue_turns(dialogue)
    assert (opening.client, first.id, second.id, second.split) == ("", "valid_0_0", "valid_0_1", "valid")
    assert (second.problem, second.situation) == ("job crisis", "I may lose my job.")
    assert (first.client, first.therapist, first.strategy) == ("Hi . I am worried .", "Why ?", "question")
    assert (second.therapist, second.strategy) == ("Mine too . It passed .", "others")  # one each: the last
    assert {(turn.client_emotion, turn.therapist_emotion) for turn in (first, second)} == {("anxiety", None)}
    assert [(said.role, said.emotion) for said in second.history] == [
        ("therapist", None), ("client", "anxiety"), ("therapist", None),
    ]  # fmt: skip


def test_both_editions_say_the_same(tmp_path):
    put(tmp_path, "valid.txt", SPLIT)
    (tmp_path / "ESConv.json").write_text(json.dumps([WHOLE]))
    assert read_esconv(tmp_path / "ESConv.json")[0].utterances == read_esconv(tmp_path / "valid.txt")[0].utterances


@pytest.mark.parametrize(
    ("written", "strategy"),
    [
        ("Questions", "question"),
        ("Other", "others"),
        ("Greetings", "greeting"),
        ("Restatement", "restatement or paraphrasing"),
        ("Approval and Reassurance", "affirmation and reassurance"),
        ("Direct Guidance", "providing suggestions"),
        ("Providing Suggestions or Information", "providing suggestions or information"),
    ],
)
def test_names_of_strategies(tmp_path, written, strategy):
    put(tmp_path, "a.txt", ABOUT | {"dialog": [{"speaker": "sys", "text": "a", "strategy": written}]})
    assert read_esconv(tmp_path / "a.txt")[0].utterances[0].strategy == strategy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"emotion_type": "bored"}, "dialog[1]: unknown label 'bored' ("),
        ({"dialog": [{"speaker": "sys", "text": "a", "strategy": "Hints"}]}, "dialog[0]: unknown label 'Hints' ("),
        ({"dialog": [{"speaker": "sys", "text": None}]}, "dialog[0]: an object with text and speaker expected"),
        ({"dialog": ["a"]}, "dialog[0]: an object with text and speaker expected"),
        ({"dialog": []}, "dialog: a list of utterances expected, not a list"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, change, said):
    put(tmp_path, "a.txt", SPLIT, SPLIT | change)
    with pytest.raises(UserError) as error:
        read_esconv(tmp_path / "a.txt")
    assert str(error.value).startswith(f"{tmp_path}/a.txt:2: {said}")


def test_the_command(tmp_path, capsys):
    put(tmp_path, "valid.txt", SPLIT)
    put(tmp_path, "test.txt", SPLIT, ABOUT | {"dialog": SPLIT["dialog"][1:4]})
    main(Config(data_root=str(tmp_path), out=str(tmp_path / "new")))
    assert capsys.readouterr().out == (
        f"note: valid_0 ({tmp_path}/valid.txt:1) and test_0 ({tmp_path}/test.txt:1) have the same words; all are kept\n"
        "valid: 2 turns of 1 dialogues; client: anxiety 2; therapist: unknown 2; strategies: question 1, others 1\n"
        "test: 3 turns of 2 dialogues; client: anxiety 3; therapist: unknown 3; strategies: question 2, others 1\n"
    )
    turns, _ = read_turns(tmp_path / "new/test.jsonl", emotions=EMOTIONS, strategies=STRATEGIES)
    assert [(turn.id, turn.client_emotion, turn.therapist_emotion, turn.strategy) for turn in turns] == [
        ("test_0_0", "anxiety", None, "question"),
        ("test_0_1", "anxiety", None, "others"),
        ("test_1_0", "anxiety", None, "question"),
    ]
    with pytest.raises(UserError, match=r"/new: none of train\.txt, valid\.txt, test\.txt$"):
        main(Config(data_root=str(tmp_path / "new")))
    put(tmp_path, "train.txt")
    with pytest.raises(UserError, match=r"train\.txt: no dialogues$"):
        main(Config(data_root=str(tmp_path)))


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA is not set")
def test_the_published_files():
    root = Path(os.environ["EMOTORCH_DATA"], "esconv")
    for name, dialogues, turns in (("valid.txt", 195, 2_156), ("test.txt", 195, 2_295), ("FailedESConv.json", 196, 0)):
        read = read_esconv(root / name)
        assert len(read) == dialogues
        made = [turn for each in read for turn in dialogue_turns(each) if turn.client]
        assert turns in (0, len(made))
        assert all(turn.client_emotion in EMOTIONS and turn.strategy in STRATEGIES for turn in made)
