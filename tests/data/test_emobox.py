import csv
import os
from pathlib import Path

import pytest

from common.config import UserError
from data.emobox import EMOTIONS, Config, emobox_clips, identical_files, main
from data.manifest import leak_check, read_manifest


def write_list(path, ids):
    path.write_text("".join(f"{id}\t{EMOTIONS[int(id[6:8]) - 1].title()}\n" for id in ids))


@pytest.fixture
def sets(tmp_path):
    """Twelve actors, two a fold, two clips each."""
    actors = {fold: [f"{2 * fold - 1:02}", f"{2 * fold:02}"] for fold in range(1, 7)}
    ids = {fold: [f"03-01-0{e}-01-0{e - 4}-01-{a}" for a in actors[fold] for e in (5, 6)] for fold in actors}
    (tmp_path / "folds").mkdir()
    for fold in ids:
        write_list(tmp_path / f"folds/ravdess_test_fold_{fold}.txt", ids[fold])
        rest = [id for other in ids if other != fold for id in ids[other]]
        write_list(tmp_path / f"folds/ravdess_train_fold_{fold}.txt", rest)
        for id in ids[fold]:
            path = tmp_path / f"audio/Actor_{id[-2:]}/{id}.{'wav' if fold % 2 else 'flac'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(id)
    return tmp_path / "audio", tmp_path / "folds"


def message(sets):
    with pytest.raises(UserError) as error:
        emobox_clips(*sets)
    return str(error.value).replace(f"{sets[1]}/", "").replace(str(sets[0]), "AUDIO").replace(str(sets[1]), "FOLDS")


def test_clips(sets):
    clips = emobox_clips(*sets)
    assert len(clips) == 24
    assert [clip.id for clip in clips] == sorted(clip.id for clip in clips)
    last = clips[-1]
    assert (last.id, last.label, last.fold, last.speaker) == ("03-01-06-01-02-01-12", "fearful", "6", "Actor_12")
    assert last.text == "Dogs are sitting by the door"
    assert last.path == str(sets[0] / "Actor_12/03-01-06-01-02-01-12.flac")
    assert last.where.endswith("ravdess_test_fold_6.txt:4")


def test_songs_and_other_files_are_not_looked_at(sets):
    (sets[0] / "Actor_01/03-02-05-01-01-01-01.wav").touch()  # channel 02 is song
    (sets[0] / "Actor_01/03-01-05-01-01-01-01.txt").touch()
    assert len(emobox_clips(*sets)) == 24


def test_a_second_copy_deeper_down_is_not_used(sets):
    copy = sets[0] / "audio_speech_actors_01-24/Actor_01/03-01-05-01-01-01-01.wav"  # as in a common download
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert emobox_clips(*sets)[0].path == str(sets[0] / "Actor_01/03-01-05-01-01-01-01.wav")


def test_list_mistakes(sets):
    folds = sets[1]
    good = (folds / "ravdess_test_fold_2.txt").read_text()

    def say(text):
        (folds / "ravdess_test_fold_2.txt").write_text(text)
        return message(sets)

    first = "03-01-05-01-01-01-01\tAngry\n"
    assert say(first + good) == (
        f"ravdess_test_fold_2.txt:1: '{first[:20]}' is a test clip of ravdess_test_fold_1.txt:1 as well"
    )
    assert say(good.replace("Angry", "Sad", 1)) == (
        "ravdess_test_fold_2.txt:1: label 'sad', but '03-01-05-01-01-01-03' is angry"
    )
    assert say("JE-n23\tn\n") == "ravdess_test_fold_2.txt:1: 'JE-n23' is not a RAVDESS file name"
    assert say("a b c\n") == "ravdess_test_fold_2.txt:1: 3 columns; a row is: id label"
    assert say(good.split("\n", 1)[1]) == (
        "ravdess_train_fold_1.txt: not the rest of fold 1: 1 clips differ (first: 03-01-05-01-01-01-03)"
    )
    (folds / "ravdess_test_fold_2.txt").unlink()
    assert message(sets) == "ravdess_test_fold_2.txt not found"


def test_a_speaker_on_both_sides(sets):
    tests = {fold: (sets[1] / f"ravdess_test_fold_{fold}.txt").read_text().split("\n")[:-1] for fold in range(1, 7)}
    tests[2].append(tests[1].pop())
    for fold in tests:
        (sets[1] / f"ravdess_test_fold_{fold}.txt").write_text("\n".join(tests[fold]))
        rest = [row for other in tests if other != fold for row in tests[other]]
        (sets[1] / f"ravdess_train_fold_{fold}.txt").write_text("\n".join(rest))
    assert message(sets) == "ravdess_train_fold_1.txt: Actor_02 is in train and test of fold 1"


def test_files_and_lists_must_agree(sets):
    gone = sets[0] / "Actor_01/03-01-05-01-01-01-01.wav"
    gone.rename(gone.with_name("03-01-05-01-01-02-01.wav"))
    assert message(sets) == "AUDIO: 1 of 24 listed clips have no file (first: 03-01-05-01-01-01-01)"
    gone.touch()
    assert message(sets) == "FOLDS: 1 clips are in no test list (first: 03-01-05-01-01-02-01)"
    with pytest.raises(UserError, match=r"^audio folder nowhere not found$"):
        emobox_clips("nowhere", sets[1])


def test_manifest_and_identical_files(sets, tmp_path, capsys):
    one, two = sorted(sets[0].rglob("*-01-12.flac"))
    two.write_bytes(one.read_bytes())
    main(Config(audio=str(sets[0]), folds=str(sets[1]), out=str(tmp_path / "m.csv")))
    assert capsys.readouterr().out == (
        f"{tmp_path}/m.csv: 24 clips, 12 speakers, 2 labels, 6 folds\n"
        f"note: {one.stem} and {two.stem} are the same recording; all are kept\n"
    )
    clips = read_manifest(tmp_path / "m.csv")
    assert [vars(clip) | {"where": ""} for clip in clips] == [
        vars(clip) | {"where": ""} for clip in emobox_clips(*sets)
    ]


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA is not set")
def test_the_published_set():
    audio = Path(os.environ["EMOTORCH_DATA"]) / "audio"
    clips = emobox_clips(audio / "ravdess16k", audio / "emobox_folds/ravdess")
    assert (len(clips), len({clip.speaker for clip in clips}), {clip.label for clip in clips}) == (
        1440,
        24,
        set(EMOTIONS),
    )
    for fold in "123456":
        test = [clip for clip in clips if clip.fold == fold]
        assert len(test) == 240
        assert leak_check(test, [clip for clip in clips if clip.fold != fold]) == []
    assert identical_files(clips) == [["03-01-03-01-02-01-07", "03-01-03-01-02-02-07"]]
    words = {"kids": "Kids are talking by the door", "dogs": "Dogs are sitting by the door"}
    with open(audio / "ravdess16k/metadata.csv", newline="") as file:
        facts = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    for clip in clips:
        row = facts[clip.id]
        assert (clip.label, clip.text) == (row["emotion"], words[row["statement"]])
        assert clip.speaker == f"Actor_{int(row['actor']):02}"
