import json
import sys

import h5py
import numpy as np
import pytest

from common.config import UserError
from data import csd, layouts

VIDEOS = ("aa", "bb", "cc", "dd")


def write(path, name, tracks):
    """A .csd file; tracks: video -> (features (n, D), intervals (n, 2))."""
    with h5py.File(path, "w") as file:
        for video, (features, intervals) in tracks.items():
            group = file.create_group(f"{name}/data/{video}")
            group.create_dataset("features", data=features, compression="gzip", compression_opts=9)
            group.create_dataset("intervals", data=intervals)
        metadata = file.create_group(f"{name}/metadata")
        text = metadata.create_dataset("root name", (1,), dtype=h5py.special_dtype(vlen=str))
        text[0] = json.dumps(name)


def frames(rng, step, width, end=20.0):
    """Frames all along a video, some of them out of order, one that lasts long, one before the start."""
    starts = np.arange(-0.4875, end, step)
    intervals = np.stack([starts, starts + step], 1)
    intervals[len(intervals) // 2, 1] += 3.0
    order = np.arange(len(starts))
    order[5:9] = order[5:9][::-1]
    return rng.normal(size=(len(starts), width)), intervals[order]


def corpus(folder, seed=0, labels=7):
    """The .csd files of four videos with a few segments each; what was written, by file."""
    rng = np.random.default_rng(seed)
    made = {"words": {}, "vectors": {}, "COVAREP": {}, "FACET 4.2": {}, "All Labels": {}}
    for video in VIDEOS:
        times = np.sort(rng.uniform(0, 19, size=(40, 2)), 0)
        times = np.stack([times[:, 0], times[:, 0] + rng.uniform(0.01, 0.6, size=40)], 1)
        words = np.array([[f"w{i}".encode() if i % 7 else b"sp"] for i in range(40)])
        made["words"][video] = (words, times)
        vectors = rng.normal(size=(40, 5))
        vectors[::7] = 0
        made["vectors"][video] = (vectors, times)
        made["COVAREP"][video] = frames(rng, 0.01, 4)
        made["FACET 4.2"][video] = frames(rng, 1 / 30, 3)
        starts = np.array([8.0, 0.0, 13.1, 25.0])  # not in order; one without words or frames
        intervals = np.stack([starts, starts + np.array([4.5, 7.9, 3.3, 2.0])], 1)
        values = np.concatenate(
            [rng.integers(-9, 10, size=(4, 1)) / 3, rng.integers(0, 10, size=(4, labels - 1)) / 3], 1
        )
        made["All Labels"][video] = (values, intervals)
    made["COVAREP"]["aa"][0][:, 2] = np.nan
    made["COVAREP"]["bb"][0][rng.integers(0, 2000, size=300), 1] = -np.inf
    names = {"words": "TimestampedWords", "vectors": "TimestampedWordVectors", "FACET 4.2": "VisualFacet42"}
    roots = {"vectors": "glove_vectors"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tracks in made.items():
        file = folder / f"CMU_MOSEI_{names.get(name, name.removeprefix('All '))}.csd"
        write(file, roots.get(name, name), tracks)
    (folder / "cmu_mosei_std_folds.py").write_text(
        "standard_train_fold=['aa', 'bb', 'zz']\nstandard_valid_fold=['cc']\nstandard_test_fold=[]\n"
        f"open({str(folder / 'made')!r}, 'w')\n"
    )
    return made


def meets(a, b):
    return min(a[1], b[1]) - max(a[0], b[0]) > 1e-5


def clamp(intervals):
    return [(max(start, 0.0), end) for start, end in intervals]


def brute(made, video, segment, name):
    """What a segment holds of a file: the mean of the frames of each of its words, one after the other."""
    words, times = made["words"][video]
    times = clamp(times)
    spoken = [i for i in np.argsort([start for start, _ in times], kind="stable") if words[i, 0] != b"sp"]
    spoken = [times[i] for i in spoken if meets(times[i], segment)] or [segment]
    values, intervals = made[name][video]
    intervals = clamp(intervals)
    rows = []
    for word in spoken:
        inside = [values[i] for i in range(len(values)) if meets(intervals[i], word)]
        row = np.zeros(values.shape[1])
        for column in range(values.shape[1]) if inside else []:
            cells = [float(x[column]) for x in inside if np.isfinite(x[column])]
            row[column] = sum(cells) / len(cells) if cells else np.nan
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_words_frames_and_labels_against_a_plain_loop(tmp_path, seed):
    made = corpus(tmp_path, seed)
    assert layouts.detect(tmp_path) == "csd"
    found = layouts.read(tmp_path)
    assert not (tmp_path / "made").exists()  # the list of folds is read, not executed
    order = [(video, row) for video in ("aa", "bb", "cc") for row in (1, 0, 2, 3)]  # by start
    assert [clip.id for clip in found.clips] == [f"{video}[{row}]" for video, row in order]
    assert [clip.split for clip in found.clips] == ["train"] * 8 + ["valid"] * 4
    absent = 0
    for i, (video, row) in enumerate(order):
        clip, (labels, intervals) = found.clips[i], made["All Labels"][video]
        assert (clip.group, clip.start, clip.end) == (video, *intervals[row])
        assert float(clip.label or "nan") == pytest.approx(labels[row, 0], abs=1e-6)
        assert list(clip.emotions.values()) == labels[row, 1:].tolist()
        words, times = made["words"][video]
        said = [words[k, 0].decode() for k in range(40) if meets(times[k], intervals[row]) and words[k, 0] != b"sp"]
        assert clip.text == (" ".join(said) or None)
        for m, name in (("text", "vectors"), ("audio", "COVAREP"), ("video", "FACET 4.2")):
            wanted, features = brute(made, video, intervals[row], name), found.features[m][i]
            if features is None:
                assert not wanted.any()
                absent += 1
            else:
                assert features.dtype == np.float32
                np.testing.assert_allclose(features, wanted, rtol=1e-6, atol=1e-6)
    assert absent == 9  # the segment beyond the end of each video
    assert np.isnan(found.features["audio"][0][:, 2]).all()  # no finite cell there
    assert np.isfinite(found.features["audio"][4]).all()  # -inf is left out of the means
    notes = found.facts["notes"]
    assert "4 segments of 1 videos are in no fold: excluded" in notes
    assert "1 videos of the folds have no labels" in notes
    assert any(note.startswith("audio: ") and "non-finite cells left out of the means" in note for note in notes)


def test_without_words_the_frames_stay(tmp_path):
    made = corpus(tmp_path)
    (tmp_path / "CMU_MOSEI_TimestampedWords.csd").unlink()
    (tmp_path / "CMU_MOSEI_TimestampedWordVectors.csd").unlink()
    found = layouts.read(tmp_path)
    assert list(found.features) == ["audio", "video"]
    values, intervals = made["FACET 4.2"]["aa"]
    starts = np.array([start for start, _ in clamp(intervals)])
    for i, row in enumerate((1, 0, 2)):
        segment = made["All Labels"]["aa"][1][row]
        rows = [k for k in np.argsort(starts, kind="stable") if meets((starts[k], intervals[k, 1]), segment)]
        assert np.array_equal(found.features["video"][i], values[rows].astype(np.float32))
    assert found.features["video"][3] is None


def test_vectors_alone_say_where_the_words_are(tmp_path):
    corpus(tmp_path)
    with_words = layouts.read(tmp_path)
    (tmp_path / "CMU_MOSEI_TimestampedWords.csd").unlink()
    found = layouts.read(tmp_path)
    assert found.clips[0].text is None
    for m in ("text", "audio", "video"):  # the pauses are rows of zeros
        np.testing.assert_array_equal(found.features[m][1], with_words.features[m][1])


def test_mosi_has_one_column_of_labels(tmp_path):
    corpus(tmp_path, labels=1)
    found = layouts.read(tmp_path)
    assert found.clips[0].emotions == {}
    assert found.clips[0].label is not None


def test_folds_of_a_table_and_of_the_list_that_fits(tmp_path):
    corpus(tmp_path)
    (tmp_path / "cmu_mosi_std_folds.py").write_text("standard_train_fold=['x', 'y']\nstandard_test_fold=['aa']\n")
    assert {clip.split for clip in layouts.read(tmp_path).clips} == {"train", "valid"}
    (tmp_path / "cmu_mosei_std_folds.py").unlink()
    rows = ["aa,0,0,1,0", "aa,1,1,2,0", "bb,0,0,1,2", "cc,0,0,1,1", "dd,0,0,1,3"]
    table = "".join(f"{i},{row}\n" for i, row in enumerate(rows))
    (tmp_path / "CMU_MOSEI_Labels.csv").write_text(",file,index,start,end,split\n" + table)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    found = layouts.read(tmp_path)
    splits = {clip.group: clip.split for clip in found.clips}
    assert splits == {"aa": "train", "cc": "valid", "bb": "test"}
    assert "4 segments of 1 videos are in no fold: excluded" in found.facts["notes"]


def message(folder):
    with pytest.raises(UserError) as error:
        layouts.read(folder)
    return str(error.value).replace(f"{folder}", "F")


def test_what_is_missing_is_said(tmp_path):
    corpus(tmp_path)
    folds = tmp_path / "cmu_mosei_std_folds.py"
    text = folds.read_text()
    folds.write_text("standard_train_fold = make()\n")
    assert message(tmp_path).startswith("F/cmu_mosei_std_folds.py: not a list of folds (")
    folds.unlink()
    said = "F: no list of folds knows its videos: put cmu_mosei_std_folds.py of https://github.com/CMU-MultiComp-Lab/"
    assert message(tmp_path).startswith(said)
    folds.write_text(text)
    labels = tmp_path / "CMU_MOSEI_Labels.csd"
    content = labels.read_bytes()
    labels.write_bytes(b"version https://git-lfs")
    assert message(tmp_path).startswith("F/CMU_MOSEI_Labels.csd: not a computational sequence (")
    labels.unlink()
    assert message(tmp_path) == "F: no labels among the .csd files (CMU_MOSEI_Labels.csd)"
    labels.write_bytes(content)
    for path in tmp_path.glob("*.csd"):
        if path != labels:
            path.unlink()
    assert message(tmp_path) == "F: no .csd file of text, audio or video features"


def test_one_of_several_files_is_used_and_named(tmp_path):
    made = corpus(tmp_path)
    write(tmp_path / "CMU_MOSEI_VisualOpenFace2.csd", "OpenFace_2", made["COVAREP"])
    write(tmp_path / "CMU_MOSEI_TimestampedPhones.csd", "phones", made["words"])
    write(tmp_path / "what.csd", "what", made["words"])
    found = layouts.read(tmp_path)
    assert found.features["video"][0].shape[1] == 3
    assert "video: FACET 4.2 (not used: OpenFace_2)" in found.facts["notes"]
    assert "what.csd: neither words, labels nor features by its name: not used" in found.facts["notes"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("All Labels", "labels"), ("Opinion Segment Labels", "labels"), ("CMU_MOSEI_LabelsSentiment", "labels"),
        ("glove_vectors", "text"), ("CMU_MOSI_TimestampedWordVectors_1.1", "text"), ("words", "words"),
        ("CMU_MOSEI_TimestampedWords", "words"), ("phones", "phones"), ("COVAREP", "audio"), ("OpenSMILE", "audio"),
        ("FACET 4.2", "video"), ("OpenFace_2", "video"), ("FACET_4.1", "video"), ("CMU_MOSI_VisualFacet_4.1", "video"),
    ],
)  # fmt: skip
def test_roles_by_name(name, role):
    found = csd._role(name)
    assert found is not None
    assert found[0] == role


def test_intervals_that_touch_do_not_meet():
    starts, ends = np.array([1.0, 2.0]), np.array([2.0, 2.000001])
    others, until = np.array([0.0, 1.5, 2.0, 3.0]), np.array([1.000001, 1.8, 4.0, 5.0])
    assert [pairs.tolist() for pairs in csd.meeting(starts, ends, others, until)] == [[0], [1]]
    none = np.zeros(0)
    assert [len(pairs) for pairs in csd.meeting(starts, ends, none, none)] == [0, 0]
    assert [len(pairs) for pairs in csd.meeting(none, none, others, until)] == [0, 0]


def test_without_h5py_the_message_says_what_to_install(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError) as error:
        layouts.read(tmp_path)
    assert str(error.value) == "reading .csd needs h5py: pip install -r requirements-extra.txt"
