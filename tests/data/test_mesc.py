import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import UserError
from data.history import history_text
from data.mesc import (
    COLUMNS,
    EMOTIONS,
    STRATEGIES,
    Config,
    Dialogue,
    Utterance,
    dialogue_turns,
    known,
    label,
    leaks,
    main,
    memory_text,
    mesc_dialogues,
    read_csv,
    read_published,
    read_turns,
    repeated,
    write_turns,
)

# As MultiMood's README prints it, trailing commas and all, with labels of the set.
SEED = """[
  {
    "Dialogue_ID": 0, 
    "Utterance": [
        "Utterance 1", 
        "Utterance 2"
    ],
    "Emotion": "neutral",
    "Strategy": "Open questions",
    "path_to_vid_user_most_recent": [
        "video01.mp4", 
        "video02.mp4"
    ], 

    "history_chat": [
      "hist 1", 
      "hist 2", 
      "hist 3", 
    ],

    "utt_user_most_recent":  [
        "Recent utterences"
    ], 

    "situation": "situation" , 

    "problem_type": "problem" ,  
  }
]
"""  # noqa: W291
RECORD = {
    "Dialogue_ID": 7,
    "Utterance": ["And then?"],
    "Emotion": "neutral",
    "Strategy": "Open question",
    "path_to_vid_user_most_recent": ["a.mp4"],
    "history_chat": [
        {"role": "user", "content": "I told you."},
        {"role": "assistant", "content": "Told me what?"},
    ],
    "utt_user_most_recent": ["She left.", "Last night."],
    "situation": "a separation",
    "problem_type": "Breakups",
    "get_emotion_user_most_recent": "Sadness ",
    "history_chat_mamba": "Client(anger) I told you. <MEM> Therapist(neutral) Told me what? <MEM> ",
}


def put(tmp_path, *records, name="train.jsonl"):
    path = tmp_path / name
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def refusal(tmp_path, *records):
    with pytest.raises(UserError) as error:
        read_turns(put(tmp_path, *records))
    return str(error.value).replace(f"{tmp_path}/", "")


def test_labels():
    assert (len(EMOTIONS), len(STRATEGIES)) == (7, 10)
    published = ["Open question", "open question", "Open questions ", "Communication Skills", "Self-disclosure"]
    published += ["Guiding the Pace and Depth of the Conversation", "Structuring the therapy", "Others", "Other"]
    assert [label(name, STRATEGIES, "") for name in published] == [
        *["open question"] * 3, "communication skills", "self-disclosure",
        "guiding the pace and depth of the conversation", "structuring the therapy", "others", "others",
    ]  # fmt: skip
    assert [label(name, EMOTIONS, "") for name in (" Joy", "undefined", "Undefined ", "", None)] == ["joy", *[None] * 4]
    assert all(label(name, EMOTIONS + STRATEGIES, "") == name for name in EMOTIONS + STRATEGIES)
    assert known("angry", EMOTIONS) is None


@pytest.mark.parametrize("value", ["angry", "neutral, joy", 3, ["joy"]])
def test_an_unknown_label_is_told_with_the_known_ones(value):
    with pytest.raises(UserError) as error:
        label(value, EMOTIONS, "f.jsonl:3: Emotion")
    assert str(error.value).startswith(f"f.jsonl:3: Emotion: unknown label {value!r} (")
    assert str(error.value).endswith("labels: anger, sadness, disgust, depression, neutral, joy, fear)")


def test_the_form_of_the_guide(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(SEED)
    (turn,), listing = read_turns(path)
    assert (turn.id, turn.dialogue, turn.split, turn.where) == ("0_0", "0", "train", f"{path}:2")
    assert (turn.therapist, turn.client) == ("Utterance 1 Utterance 2", "Recent utterences")
    assert (turn.therapist_emotion, turn.strategy, turn.client_emotion) == ("neutral", "open question", None)
    assert (turn.problem, turn.situation) == ("problem", "situation")
    assert turn.clips == ["video01.mp4", "video02.mp4"]
    # the last one spoke before the client did
    assert [(said.role, said.text) for said in turn.history] == [
        ("therapist", "hist 1"), ("client", "hist 2"), ("therapist", "hist 3"),
    ]  # fmt: skip
    assert turn.memory is None
    assert memory_text(turn) == (
        "Therapist(unknown) hist 1 <MEM> Client(unknown) hist 2 <MEM> Therapist(unknown) hist 3 <MEM> "
    )
    assert str(listing) == (
        f"{path}: 1 listed, 1 used; 1 without get_emotion_user_most_recent: there the client's emotion is neither "
        "trained nor scored; 2 commas before a closing bracket, which JSON does not allow"
    )


def test_what_the_published_code_needs(tmp_path):
    turns, listing = read_turns(put(tmp_path, RECORD, "", RECORD | {"Dialogue_ID": 8}, RECORD))
    assert [turn.id for turn in turns] == ["7_0", "8_0", "7_1"]
    assert [turn.where.rpartition(":")[2] for turn in turns] == ["1", "3", "4"]
    turn = turns[0]
    assert (turn.client, turn.client_emotion) == ("She left. Last night.", "sadness")
    assert turn.history == [Utterance("client", None, "I told you."), Utterance("therapist", None, "Told me what?")]
    assert memory_text(turn) == RECORD["history_chat_mamba"]
    assert (listing.listed, listing.found, listing.skipped, listing.notes) == (3, 3, [], [])


def test_an_array_tells_the_lines_of_its_elements(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([RECORD, RECORD], indent=1))
    second = path.read_text().split("\n").index(" {", 2) + 1
    assert [turn.where for turn in read_turns(path)[0]] == [f"{path}:2", f"{path}:{second}"]
    assert read_turns(put(tmp_path, json.dumps([RECORD, RECORD])))[0][1].where.endswith(":1")


def test_commas_within_texts_stay(tmp_path):
    said = 'Well,] I said "no,}" and , } left,'
    (turn,), _ = read_turns(put(tmp_path, json.dumps(RECORD | {"Utterance": [said]})[:-1] + ",}"))
    assert turn.therapist == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Emotion": ["joy"]}, "Emotion: unknown label ['joy']"),
        ({"Emotion": "angry"}, "Emotion: unknown label 'angry' (nearest: anger; labels: anger, sadness, "),
        ({"Strategy": "advice"}, "Strategy: unknown label 'advice' ("),
        ({"Utterance": 3}, "Utterance: a list of texts expected, not a number"),
        ({"Utterance": ["a", None]}, "Utterance: a list of texts expected, null is in it"),
        ({"Utterance": [" "]}, "Utterance: at least one text expected"),
        ({"utt_user_most_recent": {}}, "utt_user_most_recent: a list of texts expected, not an object"),
        ({"situation": 1}, "situation: text expected, not a number"),
        ({"history_chat_mamba": []}, "history_chat_mamba: text expected, not a list"),
        ({"history_chat": "x"}, "history_chat: a list expected, not a text"),
        ({"history_chat": ["a", {}]}, "history_chat[0]: an object with role and content expected, or texts alone in"),
        ({"history_chat": [{"role": "user"}]}, "history_chat[0]: an object with role and content expected"),
        (
            {"history_chat": [{"role": "system", "content": ""}]},
            "history_chat[0]: unknown role 'system' (roles: user, assistant)",
        ),
        ({"Dialogue_ID": None}, "Dialogue_ID: a number expected, not null"),
        ({"get_emotion_user_most_recent": "sad"}, "get_emotion_user_most_recent: unknown label 'sad'"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path, change, said):
    answer = refusal(tmp_path, RECORD, RECORD | change)
    assert answer.startswith(f"train.jsonl:2: {said}")
    assert answer.endswith("; 1 of 2 records are bad, more than --max-bad 0.01")
    assert "\n" not in answer


def test_files_that_are_no_records(tmp_path):
    assert refusal(tmp_path, '{"a": ').startswith("train.jsonl:1: not JSON (Expecting value at column ")
    assert refusal(tmp_path, "3").startswith("train.jsonl:1: not a JSON object; 1 of 1")
    lacking = {key: value for key, value in RECORD.items() if key != "Strategy"}
    assert refusal(tmp_path, lacking).startswith("train.jsonl:1: no key 'Strategy' (found: Dialogue_ID, Utterance, ")
    assert refusal(tmp_path, "") == "train.jsonl: no turns"
    assert refusal(tmp_path, "[", "{}", "{}]") == "train.jsonl:3: not JSON (Expecting ',' or ']' at column 1)"
    assert refusal(tmp_path, "[{}") == "train.jsonl:2: not JSON (Expecting ',' or ']' at column 1)"
    assert refusal(tmp_path, "[{}] 3") == "train.jsonl:1: not JSON (Extra data at column 6)"
    assert refusal(tmp_path, "[") == "train.jsonl:2: not JSON (Expecting value at column 1)"


def test_a_bad_record_among_many_is_skipped_and_named(tmp_path):
    path = put(tmp_path, *[RECORD] * 99, RECORD | {"Emotion": "angry"})
    turns, listing = read_turns(path)
    assert len(turns) == 99
    assert str(listing).startswith(
        f"{path}: 100 listed, 99 used, 1 skipped (first: {path}:100: Emotion: unknown label 'angry' (nearest: anger; "
    )
    path = put(tmp_path, *[RECORD] * 97, "{", RECORD | {"Utterance": []}, 4)
    with pytest.raises(UserError, match=r"3 of 100 records are bad, more than --max-bad 0\.02$"):
        read_turns(path, max_bad=0.02)
    assert [why for _, why in read_turns(path, max_bad=0.03)[1].skipped] == [
        "not JSON (Expecting property name enclosed in double quotes at column 2)",
        "Utterance: at least one text expected",
        "not a JSON object",
    ]


def test_unused_keys_are_named(tmp_path):
    notes = read_turns(put(tmp_path, RECORD | {"situatoin": "x", "age": 3, "get_cur_user_utt_vid_desc": "y"}))[1].notes
    assert notes == ["keys not used: situatoin (nearest: situation), age"]


def test_labels_of_another_set(tmp_path):
    path = put(tmp_path, RECORD | {"Emotion": "undefined", "Strategy": "Hints", "get_emotion_user_most_recent": None})
    (turn,), _ = read_turns(path, emotions=["calm"], strategies=["hint"])
    assert (turn.therapist_emotion, turn.strategy, turn.client_emotion) == (None, "hint", None)


def test_turns_are_written_as_they_are_read(tmp_path):
    turns, _ = read_turns(put(tmp_path, RECORD, RECORD | {"Dialogue_ID": "b", "Utterance": "Eh\u2028bien ?\nOui."}))
    turns[0].history[1].emotion, turns[0].history[1].strategy = "joy", "approval"
    write_turns(tmp_path / "new" / "train.jsonl", turns)
    again, listing = read_turns(tmp_path / "new" / "train.jsonl")
    assert [replace(turn, where="") for turn in again] == [replace(turn, where="") for turn in turns]
    assert listing.notes == []
    first, second = map(json.loads, (tmp_path / "new/train.jsonl").read_text().strip().split("\n"))
    assert set(first) == set(RECORD)
    assert {key: type(value) for key, value in first.items()} == {key: type(value) for key, value in RECORD.items()}
    assert (first["Dialogue_ID"], second["Dialogue_ID"]) == (7, "b")
    assert second["Utterance"] == ["Eh\u2028bien ?\nOui."]


# dialogue, speaker, emotion, strategy, text; two dialogues are alike for four utterances
ROWS = [
    (0, "Client", "sadness", "undefined", "I told you."),
    (0, "Client", "anger", "undefined", "<i>Again</i>  and again."),
    (0, "Therapist", "neutral", "Open question", "Told me what?"),
    (0, "Therapist", "joy", "Approval", "Good."),
    (0, "Client", "fear", "undefined", "Nothing."),
    (0, "Therapist", "neutral", "Interpretation", "You are afraid."),
    (0, "Therapist", "neutral", "open question", "Are you?"),
    (0, "Therapist", "sadness", "Interpretation", "I think so."),
    (1, "Therapist", "neutral", "Restatement", "So you came."),
    (1, "Client", "joy", "undefined", "I did."),
    (1, "Therapist", "neutral", "Others", "Yes."),
    (2, "Client", "joy", "undefined", "Hello."),
    (2, "Therapist", "neutral", "Others", "Hello."),
    (3, "Client", "joy", "undefined", "Hello."),
    (3, "Therapist", "neutral", "Others", "Hello, you."),
]


def write_csv(folder, rows=ROWS, columns=COLUMNS):
    with open(folder / "MESC.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i, (dialogue, speaker, emotion, strategy, text) in enumerate(rows):
            number = i - [each[0] for each in rows].index(dialogue)
            writer.writerow([text, speaker, emotion, strategy, dialogue, number][: len(columns)])
    return folder / "MESC.csv"


def publish(folder, split, *dialogues, rows=ROWS):
    """A split's JSON file of these dialogues, as published: descriptions follow the words."""
    entries = []
    for number in dialogues:
        said = [
            {"text": f"{text} The speaker looks calm.", "speaker": "user", "emotion": emotion}
            if speaker == "Client"
            else {"text": f"{text} He nods.", "speaker": "sys", "emotion": emotion, "strategy": strategy}
            for dialogue, speaker, emotion, strategy, text in rows
            if dialogue == number
        ]
        entries.append({"problem_type": f"problem {number} ", "situation": f"situation {number}", "dialog": said})
    (folder / f"{split}.json").write_text(json.dumps(entries, indent=1))
    return folder / f"{split}.json"


def test_merged_turns(tmp_path):
    dialogue = read_csv(write_csv(tmp_path))[0]
    first, second = dialogue_turns(replace(dialogue, problem="p", situation="s", split="val"))
    assert (first.id, second.id, second.split, second.problem, second.situation) == ("0_0", "0_1", "val", "p", "s")
    assert (first.client, first.therapist) == ("I told you. Again and again.", "Told me what? Good.")
    assert (first.client_emotion, first.therapist_emotion) == ("anger", "joy")  # one each: what was said last
    assert first.strategy == "approval"
    assert first.clips == ["dia0_utt0.mp4", "dia0_utt1.mp4"]
    assert (first.history, first.memory) == ([], "")
    assert second.therapist == "You are afraid. Are you? I think so."
    assert (second.client_emotion, second.therapist_emotion, second.strategy) == ("fear", "neutral", "interpretation")
    assert second.clips == ["dia0_utt4.mp4"]
    assert second.history == [
        Utterance("client", "anger", "I told you. Again and again."),
        Utterance("therapist", "joy", "Told me what? Good.", "approval"),
    ]
    assert second.memory == history_text(
        [("Client", "anger", "I told you. Again and again."), ("Therapist", "joy", "Told me what? Good.")]
    )
    assert second.where.endswith("MESC.csv:2")


def test_a_therapist_who_opens_the_dialogue(tmp_path):
    opening, first = dialogue_turns(read_csv(write_csv(tmp_path))[1])
    assert (opening.id, opening.client, opening.client_emotion, opening.clips) == ("1_opening", "", None, [])
    assert (first.id, first.client, first.clips) == ("1_0", "I did.", ["dia1_utt1.mp4"])
    assert [said.text for said in first.history] == ["So you came."]


def test_dialogues_without_labels():
    said = [Utterance("client", None, "a"), Utterance("client", "joy", "b"), Utterance("therapist", None, "c")]
    (turn,) = dialogue_turns(Dialogue("x", said))
    assert (turn.client, turn.client_emotion, turn.therapist_emotion, turn.strategy) == ("a b", "joy", None, None)
    assert turn.clips == []


def test_splits_are_found_by_their_words(tmp_path):
    paths = write_csv(tmp_path), publish(tmp_path, "val", 3), publish(tmp_path, "test", 0)
    dialogues = mesc_dialogues(*paths)
    assert [(each.split, each.problem, each.situation) for each in dialogues] == [
        ("test", "problem 0", "situation 0"), ("train", "", ""), ("train", "", ""), ("val", "problem 3", "situation 3"),
    ]  # fmt: skip
    dialogues = mesc_dialogues(*paths, publish(tmp_path, "train", 1))
    assert [each.situation for each in dialogues] == ["situation 0", "situation 1", "", "situation 3"]


def test_splits_that_do_not_fit(tmp_path):
    whole, val = write_csv(tmp_path), publish(tmp_path, "val", 2)
    test = publish(tmp_path, "test", 1, 0, rows=[*ROWS[:7], (0, *ROWS[7][1:4], "Other words."), *ROWS[8:]])

    def refused():
        with pytest.raises(UserError) as error:
            mesc_dialogues(whole, val, test)
        return str(error.value).replace(f"{tmp_path}/", "")

    line = test.read_text().split("\n").index(" {", 2) + 1
    assert refused() == f"test.json:{line}: is not in MESC.csv"
    publish(tmp_path, "test", 1, 1)
    assert refused().endswith(": dialogue 1 is in test already")
    test.write_text("[]")
    assert refused() == "test.json: no dialogues"
    test.write_text('[{"dialog": [{"text": "a", "speaker": "me"}]}]')
    assert refused() == "test.json:1: dialog[0]: unknown speaker 'me' (speakers: user, sys)"
    test.write_text('[{"dialog": 3}]')
    assert refused() == "test.json:1: dialog: a list of utterances expected, not a number"


def test_the_published_form_by_itself(tmp_path):
    (dialogue,) = read_published(publish(tmp_path, "val", 0))
    assert (dialogue.id, dialogue.problem) == ("val_0", "problem 0")
    assert dialogue.utterances[0] == Utterance("client", "sadness", "I told you. The speaker looks calm.")
    assert dialogue.utterances[2].strategy == "open question"
    lines = tmp_path / "val.txt"
    lines.write_text(json.dumps(json.loads((tmp_path / "val.json").read_text())[0]) + "\n")
    assert read_published(lines)[0].utterances == dialogue.utterances


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (ROWS[:2], COLUMNS[:4], "MESC.csv:2: no column 'Dialogue_ID' (found: Utterance, Speaker, Emotion, Strategy)"),
        ([(0, "Paul", "joy", "", "a")], COLUMNS, "MESC.csv:2: unknown speaker 'Paul' (speakers: Client, Therapist)"),
        ([(0, "Client", "glad", "", "a")], COLUMNS, "MESC.csv:2: Emotion: unknown label 'glad' ("),
        ([("x", "Client", "joy", "", "a")], COLUMNS, "MESC.csv:2: utterance '0' of dialogue 'x': whole numbers expec"),
        ([*ROWS[8:9], *ROWS[:1], *ROWS[9:10]], COLUMNS, "MESC.csv:4: utterance 2 of dialogue 1 is out of order"),
        ([], COLUMNS, "MESC.csv: no utterances"),
    ],
)
def test_mistakes_of_the_csv_name_file_and_line(tmp_path, rows, columns, said):
    with pytest.raises(UserError) as error:
        read_csv(write_csv(tmp_path, rows, columns))
    assert str(error.value).replace(f"{tmp_path}/", "").startswith(said)


def test_the_command(tmp_path, capsys):
    whole = write_csv(tmp_path, [*ROWS[:13], (3, *ROWS[11][1:]), (3, *ROWS[12][1:])])
    places = {"val": str(publish(tmp_path, "val", 1)), "test": str(publish(tmp_path, "test", 0))}
    main(Config(csv=str(whole), **places, out=str(tmp_path / "new")))
    assert capsys.readouterr().out == (
        "note: dialogues 2 and 3 have the same words; all are kept, in train\n"
        f"{whole}: 4 dialogues, 15 utterances\n"
        "train: 2 turns of 2 dialogues; client: joy 2; therapist: neutral 2; strategies: others 2\n"
        "note: the published files make 3,721 turns\n"
        "note: 2 turns have neither problem nor situation; train.json tells them (--train)\n"
        "val: 1 turns of 1 dialogues; client: joy 1; therapist: neutral 1; strategies: others 1\n"
        "note: the published files make 445 turns\n"
        "note: 1 more turns open their dialogue and are left out\n"
        "test: 2 turns of 1 dialogues; client: anger 1, fear 1; therapist: joy 1, neutral 1; "
        "strategies: approval 1, interpretation 1\n"
        "note: the published files make 454 turns\n"
    )
    turns, listing = read_turns(tmp_path / "new/test.jsonl")
    made = dialogue_turns(mesc_dialogues(whole, places["val"], places["test"])[0])
    assert [replace(turn, where="") for turn in turns] == [replace(turn, where="") for turn in made]
    assert (turns[0].split, listing.notes) == ("test", [])
    assert [turn.id for turn in read_turns(tmp_path / "new/val.jsonl")[0]] == ["1_0"]
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_the_same_words_in_two_splits(tmp_path):
    rows = [*ROWS[:13], (3, *ROWS[11][1:]), (3, *ROWS[12][1:])]
    places = str(publish(tmp_path, "val", 3, rows=rows)), str(publish(tmp_path, "test", 0))
    with pytest.raises(UserError, match=r"dialogues 2 and 3 have the same words, but are in train and val$"):
        main(Config(str(write_csv(tmp_path, rows)), *places, out=str(tmp_path)))


def test_leaks_are_of_one_number_and_one_beginning(tmp_path):
    records = [
        RECORD,
        RECORD | {"history_chat": [], "utt_user_most_recent": ["I told you."]},
        RECORD | {"Dialogue_ID": 8},
    ]
    turns, _ = read_turns(put(tmp_path, *records))
    assert leaks(turns[:1], turns[1:2]) == ["7 (I told you.)"]
    assert leaks(turns[:1], turns[2:]) == []
    other, _ = read_turns(put(tmp_path, RECORD | {"history_chat": ["Who are you?", "Me?"]}))
    assert leaks(turns, other) == []


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA is not set")
def test_the_published_files():
    root = Path(os.environ["EMOTORCH_DATA"], "mesc")
    dialogues = mesc_dialogues(root / "MESC.csv", root / "val.json", root / "test.json")
    assert (len(dialogues), sum(len(each.utterances) for each in dialogues)) == (1_019, 28_762)
    turns = {name: [] for name in ("train", "val", "test")}
    for each in dialogues:
        turns[each.split] += dialogue_turns(each)
    assert {name: len(said) for name, said in turns.items()} == {"train": 3_803, "val": 452, "test": 460}
    answers = {name: [turn for turn in said if turn.client] for name, said in turns.items()}
    assert {name: len(said) for name, said in answers.items()} == {"train": 3_721, "val": 445, "test": 454}
    everything = [turn for said in answers.values() for turn in said]
    assert len({turn.id for turn in everything}) == 4_620
    assert sum(len(turn.clips) > 5 for turn in everything) == 823
    assert all(turn.client_emotion and turn.therapist_emotion and turn.strategy for turn in everything)
    assert not any(leaks(answers[a], answers[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    assert [[each.id for each in same] for same in repeated(dialogues)] == [["192", "193"]]
    labels = [turn.strategy for turn in answers["test"]], [turn.client_emotion for turn in answers["test"]]
    assert [max(map(each.count, each)) for each in labels] == [181, 180]  # what always saying one label scores
