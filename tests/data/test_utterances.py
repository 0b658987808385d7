"""Utterances in memory: the levels of the field, ragged sequences against a loop, targets, splits by video."""

import json

import pytest
import torch

from common.config import UserError
from data.features import FeatureStore, StoreWriter
from data.manifest import EMOTIONS, Clip, write_manifest
from data.utterances import SCHEMES, level, load, load_splits

DIMS = {"text": 3, "audio": 2}


def store(folder, rows, dim):
    writer = StoreWriter(folder, {"encoder": "drawn", "dim": dim, "dtype": "float32"})
    for id, row in rows.items():
        writer.add(id, row)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Clips of three videos, and their frames: text vectors, ragged audio; some are lost, some broken, some missing."""
    root = tmp_path_factory.mktemp("parts")
    generator = torch.Generator().manual_seed(0)
    ids = ["a[0]", "b[0]", "a[1]", "c[0]", "a[2]", "b[1]"]
    clips = [Clip(id, label=str(i - 3), group=id[0]) for i, id in enumerate(ids)]
    text = {id: torch.randn(DIMS["text"], generator=generator) for id in ids}
    text["c[0]"] = torch.zeros(3)  # words without a vector
    del text["b[1]"]
    lengths = dict(zip(ids, (4, 1, 9, 2, 3, 6), strict=True))
    audio = {id: torch.randn(n, DIMS["audio"], generator=generator) for id, n in lengths.items()}
    audio["a[0]"][1] = 0  # a lost frame
    audio["a[1]"][8, 0] = torch.nan
    audio["c[0]"][:] = 0
    del audio["b[0]"]
    frames = {"text": text, "audio": audio}
    stores = {m: FeatureStore(store(root / m, rows, DIMS[m])) for m, rows in frames.items()}
    return clips, stores, frames


# --- levels -----------------------------------------------------------------------------------------------------------

# the table of the schemes, with thirds, sixths and quarters as annotators' means have them
LEVELS = [
    # score, half_even, half_away, cmu
    (-3.0, -3, -3, -3),
    (-7 / 3, -2, -2, -3),
    (-2.0, -2, -2, -2),
    (-1.5, -2, -2, -2),
    (-1 / 3, 0, 0, -1),
    (-0.5, 0, -1, -1),
    (-1 / 6, 0, 0, -1),
    (0.0, 0, 0, 0),
    (1 / 3, 0, 0, 1),
    (0.5, 0, 1, 1),
    (2 / 3, 1, 1, 1),
    (1.0, 1, 1, 1),
    (1.25, 1, 1, 2),
    (4 / 3, 1, 1, 2),
    (1.5, 2, 2, 2),
    (2.0, 2, 2, 2),
    (2.5, 2, 3, 3),
    (8 / 3, 3, 3, 3),
    (3.0, 3, 3, 3),
    (4.2, 3, 3, 3),
    (-9.0, -3, -3, -3),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels(scheme):
    scores = torch.tensor([row[0] for row in LEVELS])
    expected = [row[1 + SCHEMES.index(scheme)] for row in LEVELS]
    assert level(scores, scheme).tolist() == expected
    assert level(scores.double(), scheme).tolist() == expected
    assert level(-scores, scheme).tolist() == [-x for x in expected]  # none leans to a side


def test_cmu_levels_are_intervals():
    """Open below, closed above for the positive side, and mirrored; only 0 is neutral."""
    grid = torch.arange(-36, 37) / 12
    for score, found in zip(grid.tolist(), level(grid, "cmu").tolist(), strict=True):
        size = 0 if score == 0 else 1 if abs(score) <= 1 else 2 if abs(score) <= 2 else 3
        assert found == (size if score >= 0 else -size)


# --- frames -----------------------------------------------------------------------------------------------------------


def looped(clips, frames, dims, index, longest):
    """What gather gives, clip by clip and frame by frame."""
    x = {m: torch.zeros(*index.shape, longest[m], dims[m]) for m in dims}
    mask = {m: torch.zeros(*index.shape, longest[m], dtype=torch.bool) for m in dims}
    for k, row in enumerate(index.tolist()):
        for b, i in enumerate(row):
            for m in dims:
                if i == len(clips) or clips[i].id not in frames[m]:
                    continue
                for t, frame in enumerate(torch.atleast_2d(frames[m][clips[i].id])[: longest[m]]):
                    if any(value != 0 for value in frame.tolist()):
                        x[m][k, b, t], mask[m][k, b, t] = frame, True
    return x, mask


@pytest.mark.parametrize(("cut", "longest"), [(500, 9), (9, 9), (5, 5), (1, 1)])
def test_gather_is_the_loop(parts, cut, longest):
    clips, stores, frames = parts
    data = load(clips, "score", stores, cut)
    n = len(clips)
    assert len(data) == n
    index = torch.tensor([[0, 1, 2, 3, 4, 5, n], [5, n, 0, 0, 2, 1, 3]])
    x, mask = data.gather(index)
    expected = looped(clips, frames, DIMS, index, {"text": 1, "audio": longest})
    for m in DIMS:
        assert torch.equal(mask[m], expected[1][m])
        torch.testing.assert_close(x[m], expected[0][m], rtol=0, atol=0, equal_nan=True)
    assert not mask["text"][0, 3].any()  # a vector of zeros
    assert not mask["audio"][0, [1, 3, 6]].any()


def test_a_lost_frame_keeps_its_place(parts):
    clips, stores, frames = parts
    x, mask = load(clips, "score", stores, 500).gather(torch.tensor([[0]]))
    assert mask["audio"][0, 0].tolist() == [True, False, True, True, *[False] * 5]
    assert torch.equal(x["audio"][0, 0, :4], frames["audio"]["a[0]"])
    broken = load(clips, "score", stores, 500).gather(torch.tensor([[2]]))
    assert broken[1]["audio"].all()  # a frame with a NaN is a frame
    assert broken[0]["audio"].isnan().sum() == 1


def test_standardising_replaces_frames_in_place(parts):
    clips, stores, _ = parts
    data = load(clips, "score", stores, 500)
    index = torch.arange(len(clips) + 1)[None]
    before, mask = data.gather(index)

    def transform(values):
        """Twice the value, and frames whose first value is negative are none."""
        there = (values != 0).any(-1) & ~(values[:, 0] < 0)
        return torch.where(there[:, None], 2 * values, 0.0), there

    data.standardize("audio", transform)
    x, seen = data.gather(index)
    expected = mask["audio"] & ~(before["audio"][..., 0] < 0)
    assert torch.equal(seen["audio"], expected)
    assert expected.sum() < mask["audio"].sum()
    whole = torch.where(expected[..., None], 2 * before["audio"], 0.0)
    torch.testing.assert_close(x["audio"], whole, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x["text"], before["text"])


def test_moving_keeps_everything(parts):
    clips, stores, _ = parts
    data = load(clips, "score", stores, 500)
    moved = data.to(torch.device("meta"))
    assert moved.device.type == "meta"
    tensors = [moved.score, moved.emotions, moved.members, *moved.values.values(), *moved.rows.values()]
    assert all(x.device.type == "meta" for x in tensors)
    assert data.device.type == "cpu"


# --- videos and targets -----------------------------------------------------------------------------------------------


def test_members_are_videos_in_order(parts):
    clips, stores, _ = parts
    assert load(clips, "score", stores, 500).members.tolist() == [[0, 2, 4], [1, 5, 6], [3, 6, 6]]
    ids = ["v$_$2", "w$_$0", "v$_$10"]  # without a group, by id; rows are in order already
    data = load([Clip(id, label="0") for id in ids], "score", stores, 500)
    assert data.members.tolist() == [[0, 2], [1, 3]]


def labelled(parts, labels, kind="score"):
    clips = [Clip(f"x[{i}]", label=label) for i, label in enumerate(labels)]
    return load(clips, kind, parts[1], 500)


def test_targets_of_scores(parts):
    data = labelled(parts, ["-3", "-0.33333334", "0", "0.5", "1.3333334", None, "-0.0", "3"])
    assert data.targets("7", "half_even").tolist() == [0, 3, 3, 3, 4, -1, 3, 6, -1]
    assert data.targets("7", "half_away").tolist() == [0, 3, 3, 4, 4, -1, 3, 6, -1]
    assert data.targets("7", "cmu").tolist() == [0, 2, 3, 4, 5, -1, 3, 6, -1]
    assert data.targets("3", "half_even").tolist() == [0, 0, 1, 2, 2, -1, 1, 2, -1]
    assert data.targets("2", "half_even").tolist() == [0, 0, -1, 1, 1, -1, -1, 1, -1]
    scores = data.targets("regression", "half_even")
    torch.testing.assert_close(scores[:5], torch.tensor([-3, -1 / 3, 0, 0.5, 4 / 3]))
    assert scores.isnan().tolist() == [False] * 5 + [True] + [False] * 2 + [True]
    for head in ("7", "3", "2"):
        assert data.targets(head, "cmu").dtype == torch.long


def test_polarity(parts):
    data = labelled(parts, ["0", "1", None, "1"], "polarity")
    assert data.targets("2", "half_even").tolist() == [0, 1, -1, 1, -1]
    for head in ("7", "3", "regression"):
        with pytest.raises(UserError, match=f"--head {head}: the labels are only negative and positive here: --head 2"):
            data.targets(head, "half_even")
    assert data.targets("emotions", "half_even").isnan().all()


def test_scores_of_one_are_held_three_times_as_large(parts):
    data = labelled(parts, ["-1", "0.2", "0", "1", "-0.4"], "score1")
    torch.testing.assert_close(data.score, torch.tensor([-3.0, 0.6, 0.0, 3.0, -1.2]))
    assert data.targets("7", "half_even").tolist() == [0, 4, 3, 6, 2, -1]
    assert data.targets("7", "cmu").tolist() == [0, 4, 3, 6, 1, -1]


def test_targets_of_emotions(parts):
    strengths = dict(zip(EMOTIONS, (0.0, 0.33333334, 3.0, 0.0, 1.0, 0.0), strict=True))
    clips = [Clip("x", emotions=strengths), Clip("y", emotions={"sad": 0.0, "fear": 2.0}), Clip("z")]
    data = load(clips, "score", parts[1], 500)
    target = data.targets("emotions", "half_even")
    assert target[0].tolist() == [0, 1, 1, 0, 1, 0]
    assert target[1].isnan().tolist() == [True, False, True, True, True, False]
    assert target[1, [1, 5]].tolist() == [0, 1]
    assert target[2:].isnan().all()
    assert target.shape == (4, 6)
    assert (data.targets("7", "half_even") == -1).all()


def test_a_label_that_is_no_number(parts):
    clip = Clip("x", label="happy", where="rows.csv:7")
    with pytest.raises(UserError, match=r"rows\.csv:7: label 'happy' is not a number"):
        load([clip], "score", parts[1], 500)


# --- splits -----------------------------------------------------------------------------------------------------------


def converted(root, counts, kind="score", stores=("text", "audio")):
    """A converted folder with these numbers of videos a split, three utterances each."""
    root.mkdir(parents=True, exist_ok=True)
    clips = []
    for split, videos in counts.items():
        name = split or "none"
        ids = [(f"{name}{v}[{u}]", f"{name}{v}") for v in range(videos) for u in range(3)]
        clips += [Clip(id, label=str(len(id) % 3 - 1), split=split, group=video) for id, video in ids]
    write_manifest(root / "manifest.csv", clips)
    generator = torch.Generator().manual_seed(0)
    for m in stores:
        store(root / m, {clip.id: torch.randn(DIMS[m], generator=generator) for clip in clips}, DIMS[m])
    if kind:
        (root / "source.json").write_text(json.dumps({"format": "mmsa", "label": kind}))
    return root


def test_splits_as_they_are_given(tmp_path):
    said = []
    folder = converted(tmp_path / "d", {"train": 5, "valid": 2, "test": 3})
    splits = load_splits(folder, {}, 0.5, 0, 500, said.append)
    assert {name: len(part) for name, part in splits.items()} == {"train": 15, "valid": 6, "test": 9}
    for name, part in splits.items():
        assert {clip.split for clip in part.clips} == {name}
        assert list(part.values) == ["text", "audio"]
    assert said == []


@pytest.mark.parametrize("train", ["train", None])
def test_whole_videos_are_held_out_where_there_is_no_valid_split(tmp_path, train):
    folder = converted(tmp_path / "d", {train: 10, "test": 2})
    held = {}
    for seed in (0, 0, 1):
        said = []
        splits = load_splits(folder, {}, 0.3, seed, 500, said.append)
        assert said == [f"valid: 9 utterances of train held out by video (seed {seed})"]
        videos = {name: {clip.group for clip in part.clips} for name, part in splits.items()}
        assert not videos["train"] & videos["valid"]
        assert (len(videos["train"]), len(videos["valid"]), len(videos["test"])) == (7, 3, 2)
        assert len(splits["train"]) == 21
        assert held.setdefault(seed, videos["valid"]) == videos["valid"]
    assert held[0] != held[1]


def test_a_video_on_both_sides_is_said(tmp_path):
    folder = converted(tmp_path / "d", {"train": 3, "valid": 1, "test": 1})
    path = folder / "manifest.csv"
    lines = path.read_text().splitlines()
    moved = [line.replace(",test,test0", ",test,train1") if line.startswith("test0[1]") else line for line in lines]
    assert moved != lines
    path.write_text("\n".join(moved) + "\n")
    said = []
    load_splits(folder, {}, 0.1, 0, 500, said.append)
    assert said == ["leak: 1 videos are in both train and test, such as 'train1'"]


def test_a_split_may_be_empty(tmp_path):
    folder = converted(tmp_path / "d", {"train": 3, "valid": 1})
    test = load_splits(folder, {}, 0.1, 0, 500, print)["test"]
    assert len(test) == 0
    assert test.targets("7", "half_even").tolist() == [-1]
    assert test.targets("emotions", "half_even").shape == (1, 6)
    x, mask = test.gather(torch.tensor([[0]]))
    assert x["text"].shape == (1, 1, 1, 3)
    assert not mask["text"].any()
    assert test.members.dtype == torch.long


def test_stores_may_lie_elsewhere(tmp_path):
    folder = converted(tmp_path / "d", {"train": 3, "valid": 1, "test": 1}, stores=("text",))
    elsewhere = converted(tmp_path / "other", {"train": 3, "valid": 1, "test": 1}, stores=("audio",)) / "audio"
    assert list(load_splits(folder, {}, 0.1, 0, 500, print)["train"].values) == ["text"]
    train = load_splits(folder, {"audio": str(elsewhere)}, 0.1, 0, 500, print)["train"]
    assert {m: x.shape[1] for m, x in train.values.items()} == DIMS


def test_folders_that_hold_too_little(tmp_path):
    nothing = converted(tmp_path / "a", {"test": 2})
    with pytest.raises(UserError, match="a: no utterance of the train split"):
        load_splits(nothing, {}, 0.1, 0, 500, print)
    bare = converted(tmp_path / "b", {"train": 2, "valid": 1}, stores=())
    with pytest.raises(UserError, match="b: none of the stores text, audio, video"):
        load_splits(bare, {}, 0.1, 0, 500, print)
    single = converted(tmp_path / "c", {"train": 1})
    with pytest.raises(UserError, match="nothing can be held out: all 3 clips are of one group"):
        load_splits(single, {}, 0.1, 0, 500, print)
