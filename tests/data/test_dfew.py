"""DFEW's five folds: classes from 0 and from 1, and the counts of the real lists."""

import os
from pathlib import Path

import pytest

from common.config import UserError
from data.dfew import FOLDS, first_class, load_dfew, read_split
from data.prompts import DFEW7

# clips of each label in happy, sad, neutral, angry, surprise, disgust, fear; the copy at hand counts its classes from 0
TEST = {
    1: (489, 379, 534, 435, 294, 29, 181),
    2: (489, 379, 534, 435, 294, 29, 181),
    3: (489, 379, 534, 435, 294, 29, 180),
    4: (489, 379, 534, 434, 294, 29, 180),
    5: (489, 378, 533, 434, 293, 29, 180),
}
ALL = (2445, 1894, 2669, 2173, 1469, 145, 902)


def make(root, shift=1, drop=()):
    """Five folds over 35 clips, one of each label in every test list."""
    root.mkdir(exist_ok=True)
    rows = [(f"{i:05d}", 10 + i, i % 7) for i in range(35) if i % 7 not in drop]
    for fold in FOLDS:
        for split in ("train", "test"):
            chosen = [row for row in rows if (int(row[0]) // 7 == fold - 1) == (split == "test")]
            lines = [f"{name} {frames} {number + shift}" for name, frames, number in chosen]
            (root / f"DFEW_set_{fold}_{split}.txt").write_text("\n".join([*lines, ""]))
    return root


@pytest.mark.parametrize("shift", [0, 1])
def test_classes_from_0_and_from_1(tmp_path, shift):
    root = make(tmp_path / "dfew", shift)
    (root / "video").mkdir()
    (root / "video" / "00007.mp4").touch()
    (root / "transcription_en_all.csv").write_text("name,sentence\n00008,oh no\n")
    assert first_class(root) == shift
    clips, counts = load_dfew(root, 2)
    assert [clip.id for clip in clips] == [f"{i:05d}" for i in range(7, 14)]
    assert [clip.label for clip in clips] == list(DFEW7)
    assert counts == dict.fromkeys(DFEW7, 1)
    assert (clips[0].path, clips[1].text) == (str(root / "video" / "00007.mp4"), "oh no")


def test_the_folder_not_one_list_tells_where_classes_begin(tmp_path):
    root = make(tmp_path / "dfew", 1)
    kept = [line for line in (root / "DFEW_set_1_test.txt").read_text().splitlines() if not line.endswith(" 7")]
    (root / "DFEW_set_1_test.txt").write_text("\n".join(kept))
    assert [clip.label for clip in load_dfew(root, 1)[0]] == list(DFEW7[:6])


def test_mistakes(tmp_path):
    root = make(tmp_path / "dfew", 1, drop=(6,))
    for change, line in (
        (list, f"{root}: the lists' classes are 1, 2, 3, 4, 5, 6; expected 1 to 7, or 0 to 6"),
        (lambda: (root / "DFEW_set_3_test.txt").unlink(), f"{root}/DFEW_set_3_test.txt not found (--data-root names "
         "the folder of DFEW's lists and features)"),
        (lambda: (root / "DFEW_set_3_test.txt").write_text("00001 3 8\n"),
         f"{root}/DFEW_set_3_test.txt:1: a row is: clip frames class, with a class of 0 to 7"),
        (lambda: (root / "DFEW_set_3_test.txt").write_text("00001 3 1\n00001 3 1\n"),
         f"{root}/DFEW_set_3_test.txt:2: '00001' is listed again"),
        (lambda: (root / "DFEW_set_3_test.txt").write_text("\n"), f"{root}/DFEW_set_3_test.txt: no rows"),
    ):  # fmt: skip
        change()
        with pytest.raises(UserError) as error:
            load_dfew(root, 3)
        assert str(error.value) == line


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA is not set: no real lists here")
def test_the_published_lists():
    root = Path(os.environ["EMOTORCH_DATA"]) / "dfew_splits"
    tested = []
    for fold in FOLDS:
        clips, counts = load_dfew(root, fold)
        assert tuple(counts.values()) == TEST[fold]
        assert [clip.label for clip in clips].count("fear") == TEST[fold][-1]
        others = load_dfew(root, fold, "train")[1]
        assert tuple(counts[label] + others[label] for label in DFEW7) == ALL
        names = [
            name for split in ("train", "test") for _, name, _ in read_split(root / f"DFEW_set_{fold}_{split}.txt")
        ]
        assert len(names) == len(set(names)) == 11_697
        tested += [clip.id for clip in clips]
    assert len(tested) == len(set(tested)) == 11_697  # every clip is tested once
