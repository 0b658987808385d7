import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from common.config import UserError
from data.dialogue import previous
from data.manifest import read_manifest
from data.meld import COUNTS, FOLDERS, LABELS, Config, load_meld, main

HEADER = ("Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "Season", "Episode",
          "StartTime", "EndTime")  # fmt: skip
TRAIN = [("Hey.", "Ross", "neutral", 0, 0), ("Hi!", "Rachel", "joy", 0, 1), ("Go!", "Ross", "anger", 2, 0)]


def row(text, speaker, emotion, dialogue, utterance):
    return (1, text, speaker, emotion, "neutral", dialogue, utterance, 8, 21, "00:16:16,059", "00:16:21,731")


def write_list(path, rows, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([HEADER, *(row(*each) for each in rows)])


@pytest.fixture
def root(tmp_path):
    write_list(tmp_path / "train_sent_emo.csv", TRAIN)
    write_list(tmp_path / "dev_sent_emo.csv", [("Ew.", "All", "disgust", 0, 0)])
    write_list(tmp_path / "test_sent_emo.csv", [("Oh.", "Joey", "sadness", 0, 0), ("What?!", "Joey", "surprise", 0, 1)])
    return tmp_path


def cut(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.mp4").touch()


def load(root):
    said = []
    return load_meld(root, said.append), said


def test_words_alone(root):
    clips, said = load(root)
    assert said == [f"{root}: no clips, only words"]
    assert [(clip.id, clip.text, clip.speaker, clip.label, clip.split, clip.dialogue) for clip in clips] == [
        ("train_dia0_utt0", "Hey.", "Ross", "neutral", "train", "train_dia0"),
        ("train_dia0_utt1", "Hi!", "Rachel", "joy", "train", "train_dia0"),
        ("train_dia2_utt0", "Go!", "Ross", "anger", "train", "train_dia2"),
        ("dev_dia0_utt0", "Ew.", "All", "disgust", "valid", "dev_dia0"),
        ("test_dia0_utt0", "Oh.", "Joey", "sadness", "test", "test_dia0"),
        ("test_dia0_utt1", "What?!", "Joey", "surprise", "test", "test_dia0"),
    ]
    assert {clip.path for clip in clips} == {None}
    assert clips[2].where == f"{root}/train_sent_emo.csv:4"


def test_utterances_come_in_the_order_of_speaking(root):
    write_list(root / "train_sent_emo.csv", [(f"{d} {u}", "Ross", "joy", d, u) for d in (10, 9) for u in (11, 2, 0)])
    clips, _ = load(root)
    assert [clip.text for clip in clips[:6]] == ["9 0", "9 2", "9 11", "10 0", "10 2", "10 11"]
    assert previous(clips, 2)[:6].tolist() == [[-1, -1], [0, -1], [1, 0], [-1, -1], [3, -1], [4, 3]]


@pytest.mark.parametrize(
    ("lists", "folders"),
    [
        ("", "{folder}"),
        ("data/MELD", "MELD.Raw/{folder}"),  # the repository, with the archive beside it
        ("MELD.Raw", "MELD.Raw/{split}/{folder}"),
        ("MELD.Raw/{split}", "MELD.Raw/{split}/{folder}"),
        ("MELD-RAW/MELD.Raw/{split}", "MELD-RAW/MELD.Raw/{split}/{folder}"),
    ],
)
def test_clips_and_lists_in_the_usual_places(root, lists, folders):
    for split, folder in FOLDERS.items():
        place = root / lists.format(split=split)
        place.mkdir(parents=True, exist_ok=True)
        (root / f"{split}_sent_emo.csv").rename(place / f"{split}_sent_emo.csv")
        cut(root / folders.format(split=split, folder=folder), "dia0_utt0", "dia0_utt1", "dia2_utt0")
    clips, said = load(root)
    assert said == []
    expected = [folders.format(split=split, folder=FOLDERS[split]) for split in ("train", "train", "train", "dev")]
    assert [clip.path for clip in clips[:4]] == [
        str(root / folder / name)
        for folder, name in zip(
            expected, ("dia0_utt0.mp4", "dia0_utt1.mp4", "dia2_utt0.mp4", "dia0_utt0.mp4"), strict=True
        )
    ]


def test_missing_clips_are_counted_and_unlisted_ones_ignored(root):
    cut(root / "train_splits", "dia0_utt0", "dia0_utt9", "dia60_utt0", "final_videos_testdia0_utt1")
    cut(root / "dev_splits_complete", "dia0_utt0")
    clips, said = load(root)
    assert len(clips) == 6
    assert [clip.id for clip in clips if clip.path] == ["train_dia0_utt0", "dev_dia0_utt0"]
    assert said == [f"{root}: 4 of 6 utterances have no clip (first: train_dia0_utt1)"]


def test_damaged_and_wrongly_cut_clips(root):
    write_list(root / "train_sent_emo.csv", [("No.", "Ross", "neutral", 125, 3), ("Hi!!", "Ross", "joy", 309, 0)])
    write_list(root / "dev_sent_emo.csv", [("Well?", "Phoebe", "neutral", 110, 7)])
    write_list(root / "test_sent_emo.csv", [("Oh", "Joey", "joy", 38, 4), ("What?", "Phoebe", "disgust", 220, 0)])
    cut(root / "train_splits", "dia125_utt3", "dia309_utt0")
    cut(root / "output_repeated_splits_test", "dia38_utt4", "dia220_utt0")
    clips, said = load(root)
    assert said == []  # two clips are known to be lost
    found = {clip.id: (clip.path is not None, clip.start, clip.end) for clip in clips}
    assert found == {
        "train_dia125_utt3": (False, None, None),
        "train_dia309_utt0": (True, None, 10),
        "dev_dia110_utt7": (False, None, None),
        "test_dia38_utt4": (True, 1.9, 5),
        "test_dia220_utt0": (True, 232, None),
    }


@pytest.mark.parametrize(
    ("written", "encoding"),
    [
        ("It\u2019s  \u201cfine\u201d\u2026 caf\u00e9", "utf-8"),
        ("It\u2019s  \u201cfine\u201d\u2026 caf\u00e9", "utf-8-sig"),
        ("It\u2019s  \u201cfine\u201d\u2026 caf\u00e9", "cp1252"),
        ("It\x92s  \x93fine\x94\x85 caf\u00e9", "utf-8"),
        ('It\'s \n "fine"... caf\u00e9', "utf-8"),
    ],
)
def test_all_copies_say_the_same(root, written, encoding):
    write_list(root / "train_sent_emo.csv", [(written, "Ross\u2019 mom", "Neutral", 0, 0)], encoding)
    clip = load(root)[0][0]
    assert (clip.text, clip.speaker, clip.label) == ('It\'s "fine"... caf\u00e9', "Ross' mom", "neutral")


def test_mistakes_name_file_and_line(root):
    file = root / "dev_sent_emo.csv"

    def say(rows):
        write_list(file, rows)
        with pytest.raises(UserError) as error:
            load(root)
        return str(error.value).removeprefix(f"{file}")

    good = ("Ew.", "All", "disgust", 3, 0)
    emotions = f"emotions: {', '.join(LABELS)})"
    assert say([good, ("Ew.", "All", "angry", 3, 1)]) == f":3: unknown emotion 'angry' (nearest: anger; {emotions}"
    assert say([good, ("Ew.", "All", "", 3, 1)]) == f":3: unknown emotion '' ({emotions}"
    assert say([good, ("Ew.", "All", "fear", "x", 1)]) == ":3: Dialogue_ID 'x' is not a whole number"
    assert say([good, ("Ew.", "All", "fear", 3, "1.5")]) == ":3: Utterance_ID '1.5' is not a whole number"
    assert say([good, good]) == f":3: utterance 0 of dialogue 3 again (first: {file}:2)"
    assert say([]) == ": no utterances"
    file.write_text("Utterance,Speaker,Dialogue_ID,Utterance_ID\nEw.,All,3,0\n")
    with pytest.raises(UserError, match=r":2: no column 'Emotion' \(found: Utterance, Speaker, Dialogue_ID, Utteranc"):
        load(root)
    file.write_bytes(b"Utterance,Emotion\nE\x81w.,fear\n")
    with pytest.raises(UserError, match=r"dev_sent_emo\.csv: not UTF-8 text \(byte 19\)$"):
        load(root)
    file.unlink()
    with pytest.raises(UserError, match=r"dev_sent_emo\.csv not found, nor below \S+ in MELD\.Raw/, data/MELD/, ME"):
        load(root)


def test_manifest(root, capsys):
    cut(root / "train_splits", "dia0_utt0", "dia0_utt1", "dia2_utt0")
    cut(root / "dev_splits_complete", "dia0_utt0")
    cut(root / "output_repeated_splits_test", "dia0_utt0", "dia0_utt1")
    main(Config(data_root=str(root)))
    out = root / "manifest.csv"
    assert capsys.readouterr().out == (
        f"{out}: 6 utterances of 4 dialogues, 6 with a clip\n"
        "train: 3 (published: 9,989); anger 1, disgust 0, fear 0, joy 1, neutral 1, sadness 0, surprise 0\n"
        "valid: 1 (published: 1,109); anger 0, disgust 1, fear 0, joy 0, neutral 0, sadness 0, surprise 0\n"
        "test: 2 (published: 2,610); anger 0, disgust 0, fear 0, joy 0, neutral 0, sadness 1, surprise 1\n"
    )
    assert [vars(clip) | {"where": ""} for clip in read_manifest(out)] == [
        vars(clip) | {"where": ""} for clip in load(root)[0]
    ]


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA is not set")
def test_the_published_lists():
    clips, _ = load(Path(os.environ["EMOTORCH_DATA"]) / "meld")
    table = {split: Counter(clip.label for clip in clips if clip.split == split) for split in COUNTS}
    assert {split: counts.total() for split, counts in table.items()} == COUNTS
    assert {split: [counts[name] for name in LABELS] for split, counts in table.items()} == {
        "train": [1109, 271, 268, 1743, 4710, 683, 1205],
        "valid": [153, 22, 40, 163, 470, 111, 150],
        "test": [345, 68, 50, 402, 1256, 208, 281],
    }
    assert [round((4710 / table["train"][name]) ** 0.5, 2) for name in LABELS] == [
        2.06, 4.17, 4.19, 1.64, 1.00, 2.63, 1.98,
    ]  # fmt: skip
    dialogues = {split: len({clip.dialogue for clip in clips if clip.split == split}) for split in COUNTS}
    assert dialogues == {"train": 1038, "valid": 114, "test": 280}
    assert len({clip.speaker for clip in clips if clip.split == "train"}) == 260
    assert len({clip.id for clip in clips}) == len(clips)
    assert not any(set(clip.text) & set("‘’“”…\x92") for clip in clips)
    assert sum(clip.start is not None or clip.end is not None for clip in clips) == 3
    index = previous(clips, 1)[:, 0]
    assert (index < 0).sum() == sum(dialogues.values())
    assert all(clips[i].dialogue == clips[j].dialogue for i, j in enumerate(index.tolist()) if j >= 0)
