"""The synthetic sets of the speech pipeline: what they hold, what can be learnt from each modality, and where."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from common import probe
from common.config import UserError
from data.features import open_features
from data.manifest import group_of, read_manifest
from data.meld import LABELS, load_meld
from data.mock_speech import DIM, EMOTIONS, KINDS, SIZES, make_mock
from model.seeds import statistics

MODALITIES = ("audio", "text")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {kind: make_mock(tmp_path_factory.mktemp("mock") / kind, kind) for kind in KINDS}


def read(folder, kind):
    return read_manifest(folder / "manifest.csv") if kind == "lines" else load_meld(folder, lambda _: None)


def features(folder, clips):
    """Both embeddings (N, DIM) of clips, standardised over those of train, and their labels."""
    x = {}
    for m in MODALITIES:
        store = open_features(folder / m)
        x[m] = torch.stack([store[clip.id] for clip in clips])
        mean, std = statistics(x[m][[clip.split == "train" for clip in clips]])
        x[m] = (x[m] - mean) / std
    return x, torch.tensor([EMOTIONS.index(clip.label) for clip in clips])


def accuracy(x, y, train, test):
    weight, bias = probe.fit(x[train], y[train], len(EMOTIONS), 1e-3)
    return float(((x[test] @ weight.T + bias).argmax(1) == y[test]).double().mean())


def content(folder):
    """Lists and indices as they are, and embeddings: safetensors puts its header in no fixed order."""
    files = [path for path in folder.rglob("*") if path.suffix in (".csv", ".json")]
    stores = {m: open_features(folder / m) for m in MODALITIES}
    return (
        {path.relative_to(folder): path.read_bytes() for path in files},
        {m: [store[id].tolist() for id in store.ids] for m, store in stores.items()},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_clip_has_both_embeddings(roots, kind):
    clips = read(roots[kind], kind)
    for split, size in SIZES[kind].items():
        part = [clip for clip in clips if clip.split == split]
        assert size <= len(part) <= size + 1
        assert {clip.label for clip in part} == set(EMOTIONS if kind == "lines" else LABELS)
    for m in MODALITIES:
        store = open_features(roots[kind] / m)
        assert store.ids == [clip.id for clip in clips]
        assert store.dim == DIM
        assert store[clips[0].id].shape == (DIM,)
        store.check()
    assert open_features(roots["lines"] / "text").info.keys() == open_features(roots["meld"] / "text").info.keys()


def test_lines_are_said_by_one_or_two_voices_of_one_split(roots):
    clips = read(roots["lines"], "lines")
    scripts = {split: Counter(clip.text for clip in clips if clip.split == split) for split in SIZES["lines"]}
    assert set(scripts["train"].values()) == {1, 2}
    assert set(scripts["valid"].values()) == set(scripts["test"].values()) == {1}
    assert not set(scripts["train"]) & set(scripts["valid"])
    assert not (set(scripts["train"]) | set(scripts["valid"])) & set(scripts["test"])
    own = {}
    for clip in clips:
        own.setdefault(group_of(clip), []).append(clip)
    for part in own.values():
        assert len({clip.text for clip in part}) == len({clip.label for clip in part}) == 1
        assert len({clip.speaker for clip in part}) == len(part)
    assert len({clip.speaker for clip in clips}) > 5
    shares = Counter(clip.label for clip in clips if clip.split == "train")
    assert set(shares) == set(EMOTIONS)
    assert max(shares.values()) <= 2 * min(shares.values())


def test_meld_has_dialogues_and_its_own_shares(roots):
    clips = read(roots["meld"], "meld")
    sizes = Counter(clip.dialogue for clip in clips)
    assert set(sizes.values()) <= set(range(1, 11))
    assert len({(clip.dialogue, clip.split) for clip in clips}) == len(sizes)
    shares = Counter(clip.label for clip in clips)
    assert shares["neutral"] / len(clips) == pytest.approx(0.47, abs=0.04)
    assert shares["fear"] < shares["joy"] / 2
    assert all(clip.speaker for clip in clips)


def test_both_modalities_tell_the_label_and_together_more(roots):
    clips = read(roots["lines"], "lines")
    x, y = features(roots["lines"], clips)
    train, test = (torch.tensor([clip.split in part for clip in clips]) for part in (("train",), ("valid", "test")))
    alone = [accuracy(x[m], y, train, test) for m in MODALITIES]
    both = torch.cat([*x.values()], 1)
    together = accuracy(both, y, train, test)
    assert all(0.3 < each < 0.93 for each in alone)
    assert 0.65 < together < 1
    assert together > max(alone) + 0.04
    dealt = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert accuracy(both, dealt, train, test) < 0.2  # guessing: 1 of 12


def test_cues_of_one_set_serve_the_other(roots):
    """Mean embeddings of a label in the acted lines are near to those of the same label in the series."""
    centres = {}
    for kind in KINDS:
        clips = read(roots[kind], kind)
        x, y = features(roots[kind], clips)
        for m in MODALITIES:
            means = torch.stack([x[m][y == EMOTIONS.index(label)].mean(0) for label in LABELS])
            centres[kind, m] = F.normalize(means - means.mean(0), dim=-1)
    for m in MODALITIES:
        near = centres["lines", m] @ centres["meld", m].T
        assert near.diagonal().min() > 0.4
        assert near.argmax(1).tolist() == list(range(len(LABELS)))
    # in a basis of its own for each modality
    across = centres["lines", "audio"] @ centres["lines", "text"].T
    assert across.diagonal().abs().max() < 0.4


def test_voice_and_words_share_what_is_said(roots):
    """Beside the label: two voices with one script are nearer to each other than those with others of its label."""
    clips = read(roots["lines"], "lines")
    x, y = features(roots["lines"], clips)
    first = [i for i in range(len(clips) - 1) if clips[i].text == clips[i + 1].text]
    for m in MODALITIES:
        a, b = (F.normalize(x[m][[i + step for i in first]], dim=-1) for step in (0, 1))
        similarity = a @ b.T
        alike = y[first][:, None] == y[first]
        alike.fill_diagonal_(False)
        assert similarity.diagonal().mean() > similarity[alike].mean() + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(roots, tmp_path, kind):
    same, other = (content(make_mock(tmp_path / str(seed), kind, seed)) for seed in (17, 18))
    assert same == content(roots[kind])
    assert all(same[1][m][0] != other[1][m][0] for m in MODALITIES)


def test_a_whole_set_is_left_alone(roots):
    before = {path: path.stat().st_mtime_ns for path in roots["lines"].rglob("*")}
    assert make_mock(roots["lines"], "lines", seed=5) == roots["lines"]
    assert {path: path.stat().st_mtime_ns for path in roots["lines"].rglob("*")} == before


@pytest.mark.parametrize("name", ["manifest.csv", "audio/index.json", "else.txt"])
def test_a_folder_with_something_else_is_refused(tmp_path, name):
    path = tmp_path / "mock" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError) as error:
        make_mock(tmp_path / "mock", "lines")
    assert str(error.value) == f"{tmp_path}/mock: holds something else than a whole mock set; name an empty folder"
    assert path.read_text() == "{}"
