import csv
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from common.config import UserError
from data.merr import load_merr
from data.mock import EMOTIONS, make_mock
from data.prompts import EMOTIONS6

TRAIN, TEST = 240, 72


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mock")
    make_mock(folder, TRAIN, TEST, odd=3, workers=2)
    return folder


def rows(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames (F, H, W, 3) in 0..1 and samples of a clip."""
    frames, blocks = [], [np.zeros(0)]
    with av.open(str(path)) as container:
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                blocks.append(frame.to_ndarray()[0])
    return np.stack(frames) / np.float32(255), np.concatenate(blocks)


def test_lists(root: Path) -> None:
    coarse, fine = (rows(root / f"MERR_{grain}_grained.txt") for grain in ("coarse", "fine"))
    test = rows(root / "relative_test3_NCEV.txt")
    assert (len(coarse), len(fine), len(test)) == (TRAIN, TRAIN, TEST)
    assert {len(row) for row in coarse} == {3}
    assert [row[:3] for row in fine] == coarse
    assert all(-1 <= float(row[3]) <= 1 for row in fine)
    assert {row[3] for row in test} == {"-10"}
    assert not {row[0] for row in coarse} & {row[0] for row in test}
    assert set(Counter(row[2] for row in coarse).values()) == {TRAIN // 6}
    assert Counter(row[2] for row in test) == dict.fromkeys(EMOTIONS6, TEST // 6)
    assert sorted(path.stem for path in (root / "video").iterdir()) == sorted(row[0] for row in coarse + test)


def test_clips_are_media(root: Path) -> None:
    for name, count, _ in rows(root / "MERR_coarse_grained.txt")[3:13]:
        frames, samples = decode(root / "video" / f"{name}.mp4")
        assert frames.shape == (int(count), 96, 96, 3)
        assert 1.1 < len(samples) / 16000 < 1.4
        assert 0.001 < np.abs(samples).max() <= 1


def test_load_merr_reads_it(root: Path) -> None:
    clips, listing = load_merr(root, "MERR_coarse_grained.txt", need_video=True, labels=EMOTIONS6)
    assert (listing.listed, listing.found, listing.skipped) == (TRAIN, TRAIN, [])
    assert all(clip.captions.keys() == {"reason", "reason_v2"} for clip in clips)
    assert [clip.id for clip in clips if clip.text is None] == ["sample_00000002"]
    assert all(clip.frame is not None and 0 <= clip.frame < 16 for clip in clips)
    tested, listing = load_merr(root, "relative_test3_NCEV.txt", need_video=True, labels=EMOTIONS6)
    assert listing.found == len(tested) == TEST
    assert all(clip.text and not clip.captions for clip in tested)


def test_odd_clips(root: Path) -> None:
    frames, samples = decode(root / "video" / "sample_00000000.mp4")
    assert len(frames) == 1
    assert len(samples) > 16000
    frames, samples = decode(root / "video" / "sample_00000001.mp4")
    assert len(frames) > 1
    assert len(samples) == 0
    assert "sample_00000002" not in {row["name"] for row in table(root / "transcription_en_all.csv")}
    cues = [tuple(row.values()) for row in table(root / "cues.csv")[:3]]
    assert [row[1:] for row in cues] == [("0", "1", "1"), ("1", "0", "1"), ("1", "1", "0")]


def test_captions_name_what_the_clip_shows(root: Path) -> None:
    coarse, fine = (json.loads((root / f"MERR_{grain}_grained.json").read_text()) for grain in ("coarse", "fine"))
    label = {row[0]: row[2] for row in rows(root / "MERR_coarse_grained.txt")}
    text = {row["name"]: row["sentence"] for row in table(root / "transcription_en_all.csv")}
    for row in table(root / "cues.csv")[3:TRAIN]:
        name = row["id"]
        face, tone = (EMOTIONS[label[name] if row[modality] == "1" else "neutral"] for modality in ("visual", "audio"))
        assert face.looks in coarse[name]["caption"]
        assert tone.sounds in coarse[name]["caption"]
        assert coarse[name]["caption"].endswith(text[name])
        assert fine[name]["smp_reason_caption"].split()[-1] == label[name]
        assert face.looks in fine[name]["smp_reason_caption"]


def test_cues_are_in_one_or_two_modalities(root: Path) -> None:
    cues = np.array([list(row.values())[1:] for row in table(root / "cues.csv")]).astype(int)
    assert set(cues[3:].sum(1)) == {1, 2}
    np.testing.assert_allclose(cues[3:].mean(0), 0.5, atol=0.03)


def test_test_sentences_are_new_but_their_words_are_not(root: Path) -> None:
    sentences = {row["name"]: row["sentence"] for row in table(root / "transcription_en_all.csv")}
    train = {text for name, text in sentences.items() if name.startswith("sample_")}
    test = {text for name, text in sentences.items() if name.startswith("samplenew_")}
    assert not train & test
    assert set(" ".join(test).split()) <= set(" ".join(train).split())


def statistics(frames: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, deviation and change of 16 x 16 grey cells; mean and deviation of a 40-band log spectrum."""
    cells = frames.reshape(len(frames), 16, 6, 16, 6, 3).mean((2, 4, 5)).reshape(len(frames), -1)
    windows = np.lib.stride_tricks.sliding_window_view(samples, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(windows)) ** 2
    edges = np.unique(np.geomspace(1, 200, 41).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], 1) + 1e-4)
    motion = np.abs(np.diff(cells, axis=0)).mean(0)
    return np.concatenate([cells.mean(0), cells.std(0), motion]), np.concatenate([bands.mean(0), bands.std(0)])


def test_cues_are_recognisable_and_rest_says_nothing(root: Path) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    pipeline = pytest.importorskip("sklearn.pipeline")
    text = pytest.importorskip("sklearn.feature_extraction.text")
    lists = {
        "train": rows(root / "MERR_coarse_grained.txt")[3:],  # not the odd ones
        "test": rows(root / "relative_test3_NCEV.txt"),
    }
    label = {row[0]: row[2] for split in lists.values() for row in split}
    seen = {name: statistics(*decode(root / "video" / f"{name}.mp4")) for name in label}
    sentences = {row["name"]: row["sentence"] for row in table(root / "transcription_en_all.csv")}
    words = text.CountVectorizer(ngram_range=(1, 2)).fit([sentences[row[0]] for row in lists["train"]])
    features = {
        "visual": {name: visual for name, (visual, _) in seen.items()},
        "audio": {name: audio for name, (_, audio) in seen.items()},
        "text": {name: words.transform([sentences[name]]).toarray()[0] for name in label},
    }
    cues = {row["id"]: row for row in table(root / "cues.csv")}
    for modality, feature in features.items():
        for carries in ("1", "0"):
            x, y = {}, {}
            for split, part in lists.items():
                names = [name for name, *_ in part if cues[name][modality] == carries]
                x[split], y[split] = [feature[name] for name in names], [label[name] for name in names]
            probe = pipeline.make_pipeline(
                preprocessing.StandardScaler(), linear_model.LogisticRegression(C=0.1, max_iter=1000)
            )
            accuracy = probe.fit(x["train"], y["train"]).score(x["test"], y["test"])
            if carries == "1":
                assert accuracy >= 0.94, modality  # 34 of 36
            else:
                assert accuracy <= 0.36, modality  # chance 1/6 and three deviations


def test_same_arguments_draw_the_same_set(tmp_path: Path) -> None:
    make_mock(tmp_path / "a", 6, 2, seed=3)
    make_mock(tmp_path / "b", 6, 2, seed=3, workers=3)
    make_mock(tmp_path / "c", 6, 2, seed=4)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 8 + 9
    for file in files:
        first, second, other = (tmp_path / folder / file for folder in "abc")
        if file.suffix == ".mp4":
            for one, two in zip(decode(first), decode(second), strict=True):
                np.testing.assert_array_equal(one, two)
            assert not np.array_equal(decode(first)[0][0], decode(other)[0][0])
        else:
            assert first.read_bytes() == second.read_bytes()


def test_every_label_can_be_drawn(tmp_path: Path) -> None:
    make_mock(tmp_path, train=len(EMOTIONS), test=0, size=56, labels=tuple(EMOTIONS))
    assert {row[2] for row in rows(tmp_path / "MERR_coarse_grained.txt")} == set(EMOTIONS)
    assert decode(tmp_path / "video" / "sample_00000000.mp4")[0].shape[1:] == (56, 56, 3)


def test_another_codec_shows_the_same(tmp_path: Path) -> None:
    for codec in ("mpeg4", "h264"):
        make_mock(tmp_path / codec, 1, 0, size=64, codec=codec)
        with av.open(str(tmp_path / codec / "video" / "sample_00000000.mp4")) as container:
            assert container.streams.video[0].codec_context.name == codec
    one, two = (decode(tmp_path / codec / "video" / "sample_00000000.mp4")[0] for codec in ("mpeg4", "h264"))
    assert np.abs(one.astype(float) - two).mean() < 8


def test_unknown_label(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^mock set: unknown label 'joy' \(labels: neutral, happy, sad, .*disgust\)$"):
        make_mock(tmp_path, 1, 1, labels=("happy", "joy"))


def test_real_data_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "MERR_coarse_grained.txt").write_text("sample_00000003 43 happy\n")
    with pytest.raises(UserError, match=r"holds files that are not a mock set; name an empty folder$"):
        make_mock(tmp_path, 1, 1)
    assert (tmp_path / "MERR_coarse_grained.txt").read_text() == "sample_00000003 43 happy\n"


def test_a_mock_set_can_be_made_again(tmp_path: Path) -> None:
    make_mock(tmp_path, 2, 1)
    make_mock(tmp_path, 1, 1, seed=1)
    assert len(rows(tmp_path / "MERR_coarse_grained.txt")) == 1
