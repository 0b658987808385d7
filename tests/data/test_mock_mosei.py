import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.config import UserError
from data.mock_mosei import INDEX, WIDTHS, make_mock


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosei")
    assert make_mock(folder) == folder / INDEX
    return folder


@pytest.fixture(scope="module")
def index(root):
    return json.loads((root / INDEX).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cues(root):
    with (root / "cues.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(index):
    """Features of each modality, scores, and whether a row trains."""
    x = {m: np.array([item[f"{m}_features"] for item in index]) for m in WIDTHS}
    return x, np.array([item["label"] for item in index]), np.array([item["split"] == "train" for item in index])


def accuracy(x, y, train, rows=None):
    """Of a logistic regression on the rows that do not train, or on those of them where `rows` holds."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(x[train], y[train])
    test = ~train if rows is None else ~train & rows
    return (model.predict(x[test]) == y[test]).mean()


def test_layout_is_the_guides(index):
    keys = ["video_id", "text_features", "audio_features", "video_features", "label", "split"]
    assert all(list(item) == keys for item in index)
    for modality, width in (("text", 768), ("audio", 768), ("video", 25)):
        values = [item[f"{modality}_features"] for item in index]
        assert {len(each) for each in values} == {width}
        assert all(isinstance(each[0], float) and each == [round(value, 4) for value in each] for each in values[:9])
    assert all(type(item["label"]) is int for item in index)


def test_splits_hold_whole_videos_and_even_scores(index):
    assert Counter(item["split"] for item in index) == {"train": 420, "val": 90, "test": 90}
    assert [item["split"] for item in index] == ["train"] * 420 + ["val"] * 90 + ["test"] * 90
    videos = Counter(item["video_id"] for item in index)
    assert set(videos.values()) <= set(range(4, 11))
    assert len(set(videos.values())) > 3
    assert len({(item["video_id"], item["split"]) for item in index}) == len(videos)
    ids = [item["video_id"] for item in index]
    assert sum(a != b for a, b in itertools.pairwise(ids)) == len(videos) - 1  # utterances of a video in a row
    for split in ("train", "val", "test"):
        scores = Counter(item["label"] for item in index if item["split"] == split)
        assert set(scores) == set(range(-3, 4))
        assert max(scores.values()) - min(scores.values()) <= 1


def test_cues_name_one_or_two_modalities_a_row(index, cues):
    assert [int(row["row"]) for row in cues] == list(range(len(index)))
    carried = np.array([[int(row[m]) for m in WIDTHS] for row in cues])
    assert set(carried.sum(1)) == {1, 2}
    assert set(carried.flatten()) == {0, 1}
    assert np.abs(carried.mean(0) - 0.5).max() < 0.02


def test_no_modality_is_dead_and_all_together_are_better(index):
    x, y, train = tensors(index)
    alone = [accuracy(x[m], y, train) for m in WIDTHS]
    together = accuracy(np.concatenate([*x.values()], 1), y, train)
    assert all(0.3 < each < 0.65 for each in alone)
    assert 0.7 < together < 0.95
    assert together > max(alone) + 0.1


def test_a_modality_tells_the_score_where_it_carries_the_cue_only(index, cues):
    x, y, train = tensors(index)
    for m in WIDTHS:
        carries = np.array([row[m] == "1" for row in cues])
        assert accuracy(x[m], y, train, carries) > 0.6
        assert accuracy(x[m], y, train, ~carries) < 0.3  # chance is 1/7


def test_shuffled_scores_are_not_found(index):
    x, y, train = tensors(index)
    shuffled = np.random.default_rng(0).permutation(y)
    assert accuracy(np.concatenate([*x.values()], 1), shuffled, train) < 0.25


def test_neighbouring_scores_look_alike(index, cues):
    x, y, _ = tensors(index)
    for m in WIDTHS:
        carries = np.array([row[m] == "1" for row in cues])
        means = np.stack([x[m][carries & (y == score)].mean(0) for score in range(-3, 4)])
        distance = np.linalg.norm(means[:, None] - means, axis=-1)
        near, far = (np.mean([distance[i, i + gap] for i in range(7 - gap)]) for gap in (1, 4))
        assert near < 0.7 * far


def test_depends_on_the_seed_only(root, tmp_path):
    same = make_mock(tmp_path / "same", 600, 42)
    assert same.read_bytes() == (root / INDEX).read_bytes()
    assert (tmp_path / "same" / "cues.csv").read_bytes() == (root / "cues.csv").read_bytes()
    other = json.loads(make_mock(tmp_path / "other", 60, 1).read_text())
    first = json.loads(make_mock(tmp_path / "first", 60, 2).read_text())
    assert [item["text_features"] for item in other] != [item["text_features"] for item in first]


def test_what_one_seed_teaches_holds_for_another(index, tmp_path):
    x, y, train = tensors(index)
    other = tensors(json.loads(make_mock(tmp_path, 100, 7).read_text()))
    rows = np.concatenate([np.concatenate([*x.values()], 1)[train], np.concatenate([*other[0].values()], 1)])
    scores = np.concatenate([y[train], other[1]])
    assert accuracy(rows, scores, np.arange(len(rows)) < train.sum()) > 0.7


def test_sequences(tmp_path):
    index = json.loads(make_mock(tmp_path, 70, sequences=True).read_text())
    for m, width in WIDTHS.items():
        shapes = {np.array(item[f"{m}_features"]).shape for item in index}
        assert {length for length, _ in shapes} == {3, 4, 5, 6}
        assert {d for _, d in shapes} == {width}


@pytest.mark.parametrize("samples", [3, 4, 10, 27, 100, 601])
def test_any_size(tmp_path, samples):
    index = json.loads(make_mock(tmp_path, samples).read_text())
    assert len(index) == samples
    assert {item["split"] for item in index} == {"train", "val", "test"}
    assert len({(item["video_id"], item["split"]) for item in index}) == len({item["video_id"] for item in index})


def test_too_few(tmp_path):
    with pytest.raises(UserError, match="2 samples"):
        make_mock(tmp_path, 2)


@pytest.mark.parametrize("name", ["aligned_50.pkl", INDEX])
def test_a_folder_with_other_data_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("real")
    with pytest.raises(UserError, match=name):
        make_mock(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_older_mock_set_is_replaced(tmp_path):
    make_mock(tmp_path, 10)
    (tmp_path / ".store").mkdir()
    assert len(json.loads(Path(make_mock(tmp_path, 20)).read_text())) == 20
