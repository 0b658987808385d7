import json
import os
import pickle
import resource
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from common.config import UserError
from data import layouts, mosei
from data.features import FeatureStore
from data.manifest import Clip, read_manifest, write_manifest

SPLITS = {"train": 5, "valid": 2, "test": 3}
WIDTHS = {"text": 4, "audio": 3, "video": 2}


def rng(*key):
    return np.random.default_rng(list(key))


def message(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def frames(n, length, width, side, seed):
    """(n, length, width) with 1 to `length` frames each, zeros on one side; and the frames themselves."""
    padded, inside = np.zeros((n, length, width)), []
    for i in range(n):
        rows = rng(seed, i).normal(size=(1 + (seed + i) % length, width))
        inside.append(rows.astype(np.float32))
        padded[i, slice(0, len(rows)) if side == "back" else slice(length - len(rows), length)] = rows
    return padded, inside


def index_rows(n=6, **over):
    """Rows of the guide's JSON: two utterances a video."""
    rows = []
    for i in range(n):
        features = {f"{m}_features": rng(9, i).normal(size=width).tolist() for m, width in WIDTHS.items()}
        split = ("train", "train", "val", "test")[i // 2 % 4]
        rows.append({"video_id": f"v{i // 2}", **features, "label": i % 7 - 3, "split": split, **over})
    return rows


def index(folder, rows, name="mosei_index.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def dump(folder, data, name="data.pkl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(data, 4))
    return folder / name


def mmsa(aligned=False, side="back", splits=SPLITS):
    """An MMSA pickle, and the frames inside by (split, modality)."""
    data, inside = {}, {}
    for s, (split, n) in enumerate(splits.items()):
        lengths = {"text": 6, "audio": 6 if aligned else 11, "video": 6 if aligned else 9}
        part = {}
        for k, (m, width) in enumerate(WIDTHS.items()):
            seed = 100 * s if aligned else 100 * s + k
            part[m], inside[split, m] = frames(n, lengths[m], width, side, seed)
        mask = np.array([[1] * len(x) + [0] * (6 - len(x)) for x in inside[split, "text"]])
        part["text_bert"] = np.stack([101 * mask, mask, 0 * mask], 1).astype(np.float32)
        part["vision"] = part.pop("video")
        part["id"] = [f"{split}{i // 2}$_${10 - i}" for i in range(n)]  # clips in falling order
        part["raw_text"] = np.array([f"words {split} {i}" for i in range(n)])
        part["regression_labels"] = np.linspace(-3, 3, n)
        part["annotations"] = ["Neutral"] * n
        if not aligned:
            part["audio_lengths"] = [len(x) for x in inside[split, "audio"]]
            part["vision_lengths"] = [len(x) for x in inside[split, "video"]]
        data[split] = part
    return data, inside


def mult(ids, labels=None, side="front"):
    """A MulT pickle of one length, and the frames inside."""
    data, inside = {}, {}
    for s, (split, n) in enumerate(SPLITS.items()):
        part = {}
        for m, width in WIDTHS.items():
            part[m], inside[split, m] = frames(n, 6, width, side, 100 * s)
        part["vision"] = part.pop("video").astype(np.float32)
        part["labels"] = np.linspace(-3, 3, n).reshape(n, 1, 1) if labels is None else labels(n)
        part["id"] = ids(split, n)
        data[split] = part
    return data, inside


def mag(words, n=None):
    """MAG-BERT's tuples; `words`: (words, number of words) -> their first entry."""
    data = {}
    for split, count in (n or {"train": 3, "dev": 1, "test": 2}).items():
        data[split] = []
        for i in range(count):
            spoken = [f"w{k}" for k in range(2 + i)]
            visual, acoustic = (rng(3, i, width).normal(size=(2 + i, width)) for width in (2, 3))
            data[split].append(
                ((words(spoken), visual, acoustic, spoken), np.array([[1.5 - i]]), f"{split}v[{12 - i}]")
            )
    return data


def by_id(corpus):
    return {clip.id: i for i, clip in enumerate(corpus.clips)}


def check_frames(corpus, inside, id_of):
    """Every utterance has just the frames that were put inside."""
    rows = by_id(corpus)
    for (split, m), parts in inside.items():
        for i, x in enumerate(parts):
            assert np.array_equal(corpus.features[m][rows[id_of(split, i)]].astype(np.float32), x)


# --- the layouts ------------------------------------------------------------------------------------------------------


def test_the_guides_index(tmp_path):
    rows = index_rows(8)
    rows[1]["label"], rows[2]["label"] = 1.6666667, "-2"
    del rows[3]["audio_features"]
    rows[4]["video_features"] = [0.0] * WIDTHS["video"]
    path = index(tmp_path, rows)
    for place in (path, tmp_path):
        assert layouts.detect(place) == "json"
        corpus = layouts.read(place)
        assert [clip.id for clip in corpus.clips] == [f"v{i // 2}[{i % 2}]" for i in range(8)]
        assert [clip.group for clip in corpus.clips] == [f"v{i // 2}" for i in range(8)]
        assert [clip.split for clip in corpus.clips] == ["train"] * 4 + ["valid"] * 2 + ["test"] * 2
        assert [clip.label for clip in corpus.clips] == ["-3", "1.6666667", "-2", "0", "1", "2", "3", "-3"]
        assert corpus.label == "score"
        assert corpus.features["audio"][3] is None
        assert corpus.features["video"][4] is None  # zeros alone: no face was found
        for m in WIDTHS:
            assert np.array_equal(corpus.features[m][0], np.float32(rows[0][f"{m}_features"]))
        assert corpus.facts["features"]["audio"]["absent"] == 1
        assert corpus.facts["features"]["video"]["zero"] == 1


def test_utterances_of_a_video_keep_the_order_of_the_file(tmp_path):
    rows = index_rows(6, split="train")
    mixed = [rows[i] for i in (0, 2, 4, 1, 5, 3)]
    corpus = layouts.read(index(tmp_path, mixed))
    assert [clip.id for clip in corpus.clips] == ["v0[0]", "v0[1]", "v1[0]", "v1[1]", "v2[0]", "v2[1]"]
    assert corpus.features["text"][5][0] == np.float32(rows[5]["text_features"][0])


def test_ids_of_utterances_stay_and_name_their_videos(tmp_path):
    rows = [row | {"video_id": f"abc[{10 - i}]"} for i, row in enumerate(index_rows(3, split="train"))]
    corpus = layouts.read(index(tmp_path, rows))
    assert [(clip.id, clip.group) for clip in corpus.clips] == [(f"abc[{10 - i}]", "abc") for i in range(3)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": None}, "row 2: label None is not a finite number"),
        ({"label": float("nan")}, "row 2: label nan is not a finite number"),
        ({"label": "good"}, "row 2: label 'good' is not a finite number"),
        ({"split": "dev2"}, "row 2: split 'dev2' is not one of train, valid (val, dev) and test"),
        ({"video_id": None}, "row 2: video_id None is not a name"),
        ({"text_features": ["a"]}, "row 2: text_features: shape (1,) of <U1, expected numbers (D,) or (T, D)"),
        ({"text_features": [[1.0], [1.0, 2.0]]}, "row 2: text_features: rows of unequal lengths"),
        ({"audio_features": [1.0] * 5}, "row 2: audio has width 5, elsewhere 3"),
    ],
)
def test_a_bad_row_of_the_index_is_named(tmp_path, change, said):
    rows = index_rows(4, split="train")
    rows[1] |= change
    path = index(tmp_path, rows)
    assert message(layouts.read, path) == f"{path}: {said}"


def test_labels_are_clipped_and_classes_recognised(tmp_path):
    rows = index_rows(3, split="train")
    for row, label in zip(rows, (-3.5, 3.25, 1.0), strict=True):
        row["label"] = label
    corpus = layouts.read(index(tmp_path / "a", rows))
    assert ([clip.label for clip in corpus.clips], corpus.facts["clipped"]) == (["-3", "3", "1"], 2)
    for row, label in zip(rows, (0, 6, 3), strict=True):
        row["label"] = label
    corpus = layouts.read(index(tmp_path / "b", rows))
    assert ([clip.label for clip in corpus.clips], corpus.facts["clipped"]) == (["-3", "3", "0"], 0)
    assert corpus.facts["notes"] == ["labels are the classes 0 to 6: taken as scores -3 to 3"]


def test_npz_of_three_splits(tmp_path):
    arrays = {}
    for s, name in enumerate(("train", "val", "test")):
        arrays[name] = {f"{m}_features": rng(s, k).normal(size=(4, w)) for k, (m, w) in enumerate(WIDTHS.items())}
        arrays[name] |= {"labels": np.array([0, 6, 3, 2]), "sample_ids": np.array(["a[2]", "a[10]", "a[1]", "b[0]"])}
        arrays[name]["sample_ids"] = np.char.add(name, arrays[name]["sample_ids"])
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays[name])
    assert layouts.detect(tmp_path) == "npz"
    corpus = layouts.read(tmp_path)
    assert [clip.id for clip in corpus.clips[4:8]] == ["vala[1]", "vala[2]", "vala[10]", "valb[0]"]
    assert [clip.label for clip in corpus.clips[:4]] == ["0", "-3", "3", "-1"]  # of classes 0 to 6
    for m in WIDTHS:
        found = np.stack([corpus.features[m][i] for i in range(4, 8)])
        assert np.array_equal(found, arrays["val"][f"{m}_features"][[2, 0, 1, 3]])


def test_an_empty_split_is_no_mistake(tmp_path):
    for name, n in (("train", 2), ("test", 0)):
        np.savez(tmp_path / f"{name}.npz", text_features=np.ones((n, 3)), labels=np.ones(n))
    assert len(layouts.read(tmp_path).clips) == 2


def test_npz_with_unequal_columns_is_not_truncated(tmp_path):
    arrays = {"text_features": np.ones((4, 2)), "audio_features": np.ones((3, 2)), "labels": np.ones(4)}
    np.savez(tmp_path / "train.npz", **arrays)
    said = message(layouts.read, tmp_path)
    assert said == f"{tmp_path}/train.npz: columns of unequal lengths: text 4, audio 3, labels 4"


def test_one_npz_is_all_for_training(tmp_path):
    labels = np.array([-3, 2, 0], dtype=np.int32)
    arrays = {"text": np.ones((3, 300)), "audio": np.ones((3, 74)), "vision": np.ones((3, 25)), "labels": labels}
    np.savez(tmp_path / "data.npz", **arrays, sample_ids=np.array(["a", "b", None], dtype=object))
    for place in (tmp_path, tmp_path / "data.npz"):
        corpus = layouts.read(place)
        assert [(clip.split, clip.label) for clip in corpus.clips] == [("train", "-3"), ("train", "2"), ("train", "0")]
        assert {m: corpus.features[m][0].shape for m in corpus.features} == {
            "text": (300,),
            "audio": (74,),
            "video": (25,),
        }
        assert [clip.id for clip in corpus.clips] == ["a", "b", "train-2"]


def test_object_arrays_of_npz_execute_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/made",)

    np.savez(tmp_path / "train.npz", text=np.ones((1, 2)), labels=np.ones(1), x=np.array([Attack()], dtype=object))
    assert "train.npz: refused to load posix.system" in message(layouts.read, tmp_path)
    assert not (tmp_path / "made").exists()


def npy_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for s, n in (("train", 6), ("test", 4)):
        rows = np.arange(n)
        arrays = {m: rng(len(s), k).normal(size=(n, w)).astype("f4") for k, (m, w) in enumerate(WIDTHS.items())}
        arrays |= {"y": (rows >= n // 2).astype(int), "group": rows % 2, "position": n - rows}
        arrays["video"][1] = 0
        for name, array in arrays.items():
            np.save(folder / f"{name}_{s}.npy", array)
    return folder


def test_a_folder_of_npy(tmp_path):
    folder = npy_folder(tmp_path)
    assert layouts.detect(folder) == "npy"
    corpus = layouts.read(folder)
    assert corpus.label == "polarity"
    # rows are sorted by class; position restores their order
    ids = [f"train-0[{i}]" for i in (2, 4, 6)] + [f"train-1[{i}]" for i in (1, 3, 5)]
    assert [clip.id for clip in corpus.clips[:6]] == ids
    assert [clip.label for clip in corpus.clips[:3]] == ["1", "0", "0"]
    assert corpus.clips[6].group == "test-0"  # groups are numbered in each split
    assert corpus.features["video"][5] is None
    assert np.array_equal(corpus.features["text"][0], np.load(folder / "text_train.npy")[4])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("side", ["front", "back"])
def test_mmsa_pickles(tmp_path, aligned, side):
    data, inside = mmsa(aligned, side)
    path = dump(tmp_path, data)
    assert layouts.detect(path) == layouts.detect(tmp_path) == "mmsa"
    corpus = layouts.read(path)
    assert corpus.label == "score"
    assert corpus.facts["padding"] == dict.fromkeys(WIDTHS, side)
    assert [clip.id for clip in corpus.clips[:5]] == [
        "train0$_$9", "train0$_$10", "train1$_$7", "train1$_$8", "train2$_$6"
    ]  # fmt: skip
    assert corpus.clips[0].group == "train0"
    assert corpus.clips[0].text == "words train 1"
    assert corpus.clips[0].label == "-1.5"
    check_frames(corpus, inside, lambda split, i: f"{split}{i // 2}$_${10 - i}")


def test_zero_frames_inside_stay(tmp_path):
    data, inside = mmsa()
    data["train"]["audio"][3, :2] = 0  # lost at the start: the given length says that they are no padding
    inside["train", "audio"][3][:2] = 0
    data["train"]["vision"][4] = 0
    inside["train", "video"].pop()
    corpus = layouts.read(dump(tmp_path, data))
    check_frames(corpus, inside, lambda split, i: f"{split}{i // 2}$_${10 - i}")
    assert corpus.features["video"][by_id(corpus)["train2$_$6"]] is None
    assert corpus.facts["features"]["video"]["zero"] == 1
    assert corpus.facts["features"]["audio"]["lost"] == 2
    assert corpus.facts["padding"]["audio"] == "back"


def test_aligned_modalities_stay_aligned(tmp_path):
    data, inside = mult(lambda split, n: [f"{split}v[{i}]" for i in range(n)])
    n = next(i for i, x in enumerate(inside["train", "text"]) if len(x) > 2)
    length = len(inside["train", "text"][n])
    data["train"]["vision"][n, 6 - length : 6 - length + 2] = 0  # the face is lost in the first two words
    corpus = layouts.read(dump(tmp_path, data))
    video = corpus.features["video"][by_id(corpus)[f"trainv[{n}]"]]
    assert len(video) == length
    assert not video[:2].any()
    assert video[2:].any()


def test_sims_is_recognised_by_its_labels(tmp_path):
    data, _ = mmsa()
    for part in data.values():
        part["regression_labels"] = (part["regression_labels"] / 3).tolist()
        part["regression_labels_T"] = part["regression_labels"]
    corpus = layouts.read(dump(tmp_path, data))
    assert corpus.label == "score1"
    assert [clip.label for clip in corpus.clips[:2]] == ["-0.5", "-1"]


def test_unequal_columns_of_a_pickle(tmp_path):
    data, _ = mmsa()
    data["valid"]["regression_labels"] = data["valid"]["regression_labels"][:1]
    said = message(layouts.read, dump(tmp_path, data))
    assert said.startswith(f"{tmp_path}/data.pkl: valid: columns of unequal lengths: text 2, audio 2, video 2, ")
    assert "regression_labels 1" in said


@pytest.mark.parametrize("kind", [str, bytes])
def test_mult_ids_of_video_and_times(tmp_path, kind):
    def ids(split, n):
        rows = [[f"{split}v", f"{5.0 * (n - i) - 5.4:.2f}", f"{5.0 * (n - i):.2f}"] for i in range(n)]
        return np.array(rows) if kind is str else np.array(rows).astype("S")

    data, inside = mult(ids)
    path = dump(tmp_path, data)
    assert layouts.detect(path) == "mult"
    corpus = layouts.read(path)
    assert [clip.id for clip in corpus.clips[:5]] == [f"trainv[{i}]" for i in range(5)]
    assert (corpus.clips[0].start, corpus.clips[0].end) == (0.0, 5.0)  # of -0.4
    assert corpus.clips[1].start == pytest.approx(4.6)
    assert corpus.facts["padding"] == dict.fromkeys(WIDTHS, "front")
    check_frames(corpus, inside, lambda split, i: f"{split}v[{SPLITS[split] - 1 - i}]")


def test_mult_labels_of_emotions(tmp_path):
    names = lambda split, n: [f"{split}v[{i}]" for i in range(n)]  # noqa: E731
    data, _ = mult(names, lambda n: np.arange(6 * n).reshape(n, 6) % 2)
    corpus = layouts.read(dump(tmp_path / "a", data))
    assert corpus.clips[0].label is None
    assert corpus.clips[0].emotions == {"happy": 0, "sad": 1, "anger": 0, "surprise": 1, "disgust": 0, "fear": 1}
    data, _ = mult(names, lambda n: np.tile([[[-1.5, 0, 1, 2, 3, 0, 0.5]]], (n, 1, 1)))
    corpus = layouts.read(dump(tmp_path / "b", data))
    assert corpus.clips[0].label == "-1.5"
    assert corpus.clips[0].emotions == {"happy": 0, "sad": 1, "anger": 2, "surprise": 3, "disgust": 0, "fear": 0.5}
    data, _ = mult(names, lambda n: np.zeros((n, 4, 2)))
    assert "train: labels have shape (5, 4, 2) of float64" in message(layouts.read, dump(tmp_path / "c", data))


def test_mag_pickles(tmp_path):
    data = mag(lambda spoken: spoken)
    path = dump(tmp_path, data)
    assert layouts.detect(path) == "mag"
    corpus = layouts.read(path)
    assert [(clip.id, clip.split, clip.label) for clip in corpus.clips] == [
        ("trainv[10]", "train", "-0.5"), ("trainv[11]", "train", "0.5"), ("trainv[12]", "train", "1.5"),
        ("devv[12]", "valid", "1.5"), ("testv[11]", "test", "0.5"), ("testv[12]", "test", "1.5"),
    ]  # fmt: skip
    assert corpus.clips[0].text == "w0 w1 w2 w3"
    assert list(corpus.features) == ["audio", "video"]
    assert corpus.facts["notes"] == ["text is absent in 6 utterances: words or their numbers, no vectors"]
    assert np.array_equal(corpus.features["video"][0], data["train"][2][0][1])
    assert np.array_equal(corpus.features["audio"][2], data["train"][0][0][2])


def test_misa_keeps_a_pickle_a_split(tmp_path):
    for split, rows in mag(lambda spoken: rng(1).normal(size=(len(spoken), 4))).items():
        dump(tmp_path, rows, f"{split}.pkl")
    assert layouts.detect(tmp_path) == "mag"
    corpus = layouts.read(tmp_path)
    assert [clip.split for clip in corpus.clips] == ["train"] * 3 + ["valid"] + ["test"] * 2
    assert corpus.features["text"][0].shape == (4, 4)
    assert layouts.detect(tmp_path / "train.pkl") == "mag"
    ids = layouts.read(dump(tmp_path / "ids", mag(lambda spoken: np.arange(len(spoken)))))
    assert "text" not in ids.features
    assert ids.clips[0].text == "w0 w1 w2 w3"


def test_non_finite_values_are_kept_and_counted(tmp_path):
    data, _ = mmsa()
    data["train"]["audio"][2, 0, 1] = -np.inf
    data["train"]["audio"][3, 0, 1:] = np.nan
    corpus = layouts.read(dump(tmp_path, data))
    assert corpus.facts["features"]["audio"]["non_finite"] == {"cells": 3, "utterances": 2, "columns": [1, 2]}
    folder = mosei.open_corpus(tmp_path, lambda text: None)
    store = FeatureStore(folder / "audio")
    assert store["train1$_$8"][0, 1] == -np.inf
    assert np.isnan(store["train1$_$7"].numpy()[0, 1:]).all()


# --- what is found where ----------------------------------------------------------------------------------------------


def test_nothing_there_names_the_train_split_and_a_way_out(tmp_path):
    advice = "; make some with: python tools/download_mosei.py --mock"
    missing = tmp_path / "none"
    said = f"no index file or data for the train split in {missing}{advice}"
    assert (
        message(mosei.open_corpus, missing)
        == message(layouts.read, missing)
        == message(layouts.detect, missing)
        == said
    )
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.json").write_text('{"a": 1}')
    said = f"no index file or data for the train split in {tmp_path} (it holds a.json, notes.txt){advice}"
    assert message(mosei.open_corpus, tmp_path) == said
    path = index(tmp_path / "b", index_rows(4, split="test"))
    said = f"no index file or data for the train split in {path} (test 4){advice}"
    assert message(layouts.read, path) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}', "JSON, but not a list of objects with video_id, text_features,"),
        (b'[{"video_id": "a", ', ":1: not JSON ("),
        (b"", "the file is empty"),
        (b"hello there", "not a readable pickle ("),
        (b"\x89HDF\r\n\x1a\n", "give the folder of the .csd files"),
        (b"\x93NUMPY", "give the folder of the .npy files"),
        (b"PK\x03\x04 broken", "not readable as .npz"),
        (pickle.dumps({"a": 1, "b": 2}), "a dict of a, b, not one of the known pickles (MMSA, "),
        (pickle.dumps({"train": [1, 2]}), "train row 0: not ((words, visual, acoustic), label, segment)"),
        (pickle.dumps({"train": [], "test": {}}), "a dict of train, test, not one of the known pickles"),
        (pickle.dumps({"train": {"labels": [1], "text": np.ones((1, 2)), "id": [["v", "a", "2"]]}}), "id 'a' is not a"),
        (
            pickle.dumps({"train": {"labels": 1.0, "text": np.ones((1, 2))}}),
            "labels is a float, not a column of values",
        ),
        (pickle.dumps({"train": {"labels": [1], "id": ["a"]}}), "no text, audio or video features (found: labels, id)"),
        (pickle.dumps([1, 2]), "a list, not one of the known pickles (MMSA, "),
    ],
)
def test_files_that_are_none_of_the_layouts(tmp_path, content, said):
    path = tmp_path / "file"
    path.write_bytes(content)
    found = message(layouts.read, path)
    assert found.startswith(f"{path}:")
    assert said in found


def test_the_content_counts_not_the_name(tmp_path):
    path = dump(tmp_path, mmsa()[0], "renamed.json")
    assert layouts.detect(path) == "mmsa"
    (tmp_path / "x.pkl").write_text(json.dumps(index_rows()))
    assert layouts.detect(tmp_path / "x.pkl") == "json"


def test_several_files_need_a_name(tmp_path):
    dump(tmp_path, mmsa()[0], "aligned_50.pkl")
    dump(tmp_path, mmsa()[0], "unaligned_50.pkl")
    said = f"{tmp_path}: 2 files may be a corpus: aligned_50.pkl, unaligned_50.pkl; name one of them"
    assert message(layouts.detect, tmp_path) == said
    index(tmp_path, index_rows())
    assert layouts.detect(tmp_path) == "json"
    index(tmp_path, index_rows(), "other.json")
    assert "2 files may be an index: mosei_index.json, other.json" in message(layouts.detect, tmp_path)
    np.savez(tmp_path / "val.npz")
    np.savez(tmp_path / "valid.npz")
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert message(layouts.read, tmp_path) == f"{tmp_path}: both val and valid: which is the valid split?"


def test_a_users_manifest_is_the_same_form(tmp_path):
    clips = [Clip("a", text="x", label="1.5", split="train"), Clip("b", label="-2", split="dev", emotions={"sad": 2.0})]
    write_manifest(tmp_path / "manifest.csv", clips)
    (tmp_path / "audio").mkdir()
    np.save(tmp_path / "audio/a.npy", np.ones(5, dtype=np.float32))
    assert layouts.detect(tmp_path) == layouts.detect(tmp_path / "manifest.csv") == "store"
    assert mosei.open_corpus(tmp_path) == mosei.open_corpus(tmp_path / "manifest.csv") == tmp_path
    corpus = layouts.read(tmp_path)
    assert [clip.split for clip in layouts.read_rows(tmp_path)] == ["train", "valid"]
    assert corpus.label == layouts.label_kind(tmp_path) == "score"
    assert corpus.features["audio"][0].tolist() == [1.0] * 5
    assert corpus.features["audio"][1] is None
    write_manifest(tmp_path / "manifest.csv", [Clip("a", label="1"), Clip("b", label="0")])
    assert layouts.label_kind(tmp_path) == "polarity"
    write_manifest(tmp_path / "manifest.csv", [Clip("a", label="happy")])
    assert message(layouts.read_rows, tmp_path) == f"{tmp_path}/manifest.csv:2: label 'happy' is not a finite number"


# --- conversion -------------------------------------------------------------------------------------------------------


def test_conversion_keeps_every_value(tmp_path):
    data, inside = mmsa()
    data["train"]["audio"][2, 0] = 0
    inside["train", "audio"][2][0] = 0  # a lost frame inside
    path = dump(tmp_path, data)
    lines = []
    folder = mosei.open_corpus(path, lines.append)
    assert folder == tmp_path / "data.pkl.store"
    assert lines[0].startswith(f"{path}: 10 utterances (mmsa) converted to {folder} in ")
    read, kept = layouts.read(path), layouts.read(folder)
    assert [vars(clip) | {"where": ""} for clip in kept.clips] == [vars(clip) | {"where": ""} for clip in read.clips]
    assert (kept.format, kept.label, kept.facts) == (read.format, read.label, read.facts)
    check_frames(kept, inside, lambda split, i: f"{split}{i // 2}$_${10 - i}")
    assert FeatureStore(folder / "audio").dim == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.pkl", "data.pkl.store"]
    lines.clear()
    assert mosei.open_corpus(path, lines.append) == folder
    assert lines == []  # nothing to do


def test_conversion_is_remade_when_the_source_changes(tmp_path):
    path = index(tmp_path, index_rows(4, split="train"))
    folder = mosei.open_corpus(tmp_path, lambda text: None)
    assert folder == tmp_path / ".store"
    assert len(read_manifest(folder / "manifest.csv")) == 4
    stat = path.stat()
    index(tmp_path, index_rows(6, split="train"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size alone differs
    assert len(read_manifest(mosei.open_corpus(tmp_path, lambda text: None) / "manifest.csv")) == 6
    rows = index_rows(6, split="train")
    rows[0]["label"] = -2
    index(tmp_path, rows)
    assert read_manifest(mosei.open_corpus(tmp_path, lambda text: None) / "manifest.csv")[0].label == "-2"
    assert [entry.name for entry in tmp_path.glob("*.tmp")] == []
    path.unlink()  # what was converted is enough
    assert mosei.open_corpus(tmp_path) == folder
    assert layouts.detect(tmp_path) == "store"


def test_an_interrupted_conversion_leaves_nothing_and_the_old_one(tmp_path):
    corpus = layouts.read(index(tmp_path / "source", index_rows(6)))
    folder = tmp_path / "out/store"

    class Interrupting(layouts.Lazy):
        def __getitem__(self, i):
            if i == 4:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    whole = corpus.features
    corpus.features = whole | {"video": Interrupting(6, whole["video"].__getitem__)}
    with pytest.raises(KeyboardInterrupt):
        mosei.convert(corpus, folder)
    assert list(folder.parent.iterdir()) == []
    corpus.features = whole
    mosei.convert(corpus, folder)
    before = (folder / "manifest.csv").stat().st_mtime_ns
    corpus.features = whole | {"video": Interrupting(6, whole["video"].__getitem__)}
    with pytest.raises(KeyboardInterrupt):
        mosei.convert(corpus, folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["store"]
    assert (folder / "manifest.csv").stat().st_mtime_ns == before


def test_what_a_kill_left_behind_goes_after_a_while(tmp_path):
    corpus = layouts.read(index(tmp_path / "source", index_rows(6)))
    old, other = tmp_path / "store.1.new.tmp", tmp_path / "store.2.new.tmp"
    for folder in (old, other):
        (folder / "text").mkdir(parents=True)
    os.utime(old, (0, 0))
    mosei.convert(corpus, tmp_path / "store")
    assert not old.exists()
    assert other.exists()  # another process may be at it


def test_a_place_that_cannot_be_written(tmp_path):
    path = index(tmp_path, index_rows(6))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        said = message(mosei.open_corpus, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said == (
        f"{path}.store: the converted data cannot be written (File too large); copy the data to a place that can be "
        "and name it with --data-dir"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# --- the report -------------------------------------------------------------------------------------------------------


def report(path):
    lines = []
    mosei.inspect(path, lines.append)
    return lines


def test_the_report_of_clean_data(tmp_path):
    data, _ = mmsa()
    lines = report(dump(tmp_path, data))
    assert lines[0] == f"{tmp_path}/data.pkl: mmsa, 10 utterances, labels -3 to 3 (score)"
    assert lines[1].split() == ["split", "utterances", "videos", "min", "mean", "max", *"-3 -2 -1 0 1 2 3".split()]
    balance = ["20.0%", "20.0%", "0.0%", "20.0%", "0.0%", "20.0%", "20.0%"]  # 1.5 rounds to 2
    assert lines[2].split() == ["train", "5", "3", "-3.000", "0.000", "3.000", *balance]
    assert "CMU's bins put 0.0% of the labels in another class" in lines[5]
    text = next(line for line in lines if line.startswith("text ")).split()
    assert text[:4] == ["text", "4", "float64", "back"]
    assert text[5:] == ["0", "0", "0.0%", "0.0%", "0.0%"]
    assert "duplicates (same words and features): none" in lines
    assert "videos in more than one split: none" in lines


def test_the_report_of_what_is_wrong(tmp_path):
    rows = index_rows(8)
    rows[1] = rows[0] | {"label": 2}
    rows[6] |= {name: rows[2][name] for name in layouts.INDEX}
    rows[7]["video_id"] = "v0"
    rows[0]["label"] = 7.5
    rows[3]["audio_features"][1] = float("inf")
    del rows[5]["text_features"]
    lines = report(index(tmp_path, rows))
    said = (
        "duplicates (same words and features): 1 within train (v0[0] = v0[1]), 1 across train and test (v1[0] = v3[0])"
    )
    assert said in lines
    assert "videos in more than one split: 1 in train and test (v0)" in lines
    assert "labels outside of the range: 1 (clipped)" in lines
    assert "audio: 1 non-finite values in 1 utterances, columns 1" in lines
    assert next(line for line in lines if line.startswith("text ")).split()[-3:] == ["0.0%", "50.0%", "0.0%"]


def test_the_report_says_when_videos_are_samples(tmp_path):
    rows = [row | {"video_id": f"v{i}"} for i, row in enumerate(index_rows(6))]
    lines = report(index(tmp_path, rows))
    assert "every video has one utterance: these may be whole videos with the label of their first segment" in lines


def test_the_report_of_a_converted_folder_and_of_classes(tmp_path):
    folder = mosei.open_corpus(npy_folder(tmp_path / "npy"), lambda text: None)
    lines = report(folder)
    assert lines[0].endswith("npy, 10 utterances, labels 0 negative, 1 positive (polarity)")
    assert lines[2].split() == ["train", "6", "2", "0.000", "0.500", "1.000", "50.0%", "50.0%"]
    assert next(line for line in lines if line.startswith("video ")).split()[-3:] == ["2", "16.7%", "25.0%"]


@pytest.mark.filterwarnings("ignore:.data.mosei. found in sys.modules")
def test_the_command_prints_the_report(tmp_path, monkeypatch, capsys):
    path = index(tmp_path, index_rows())
    monkeypatch.setattr(sys, "argv", ["mosei.py", "--data-dir", str(path)])
    runpy.run_module("data.mosei", run_name="__main__")
    assert capsys.readouterr().out.splitlines() == report(path)
    monkeypatch.setattr(sys, "argv", ["mosei.py", "--data-dir", str(tmp_path / "no")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("data.mosei", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("mosei.py: error: no index file or data for the train split in ")


DATA = os.environ.get("EMOTORCH_DATA")


@pytest.mark.skipif(not DATA, reason="EMOTORCH_DATA, a folder with mosi_feats, is not set")
def test_real_mosi(tmp_path):
    source = Path(str(DATA)) / "mosi_feats"
    shutil.copytree(source, tmp_path / "mosi", copy_function=shutil.copyfile)
    (tmp_path / "mosi").chmod(0o755)
    folder = mosei.open_corpus(tmp_path / "mosi", lambda text: None)
    clips = layouts.read_rows(folder)
    splits = {name: [clip for clip in clips if clip.split == name] for name in ("train", "test")}
    assert {name: len(part) for name, part in splits.items()} == {"train": 1447, "test": 752}
    assert {name: len({clip.group for clip in part}) for name, part in splits.items()} == {"train": 62, "test": 31}
    group, position, y = (np.load(source / f"{name}_train.npy") for name in ("group", "position", "y"))
    audio, store = np.load(source / "audio_train.npy"), FeatureStore(folder / "audio")
    label = {clip.id: clip.label for clip in clips}
    for i in range(0, 1447, 97):
        id = f"train-{group[i]}[{position[i]}]"
        assert label[id] == str(y[i])
        assert np.array_equal(store[id].numpy(), audio[i])
