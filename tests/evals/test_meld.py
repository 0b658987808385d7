"""MELD's features at hand, or made once by frozen encoders; what is known of a frozen classifier before training."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from common import dist
from common.config import UserError
from data import pairs
from data.features import StoreWriter
from data.meld import FOLDERS, LABELS, load_meld
from evals import speech
from evals.meld import MeldSource, known, read_splits, stores
from model.clap import ClapConfig
from model.encoders import hashtext
from model.encoders.logmel import LogMel
from model.meld import Meld, MeldConfig
from model.slm import SlmConfig
from tests.training import make_meld

DIMS = {"audio": 5, "text": 7}

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("words") / "meld", 12, 5, stores=False)


@pytest.fixture(scope="module")
def meld(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("meld") / "meld", 12, 5)


@pytest.fixture
def clips(words, tmp_path):
    """The words with a sound for every second utterance of train."""
    root = tmp_path / "clips"
    (root / FOLDERS["train"]).mkdir(parents=True)
    for path in words.glob("*.csv"):
        (root / path.name).write_bytes(path.read_bytes())
    for i, clip in enumerate(load_meld(root, lambda _: None)[:12]):
        path = root / FOLDERS["train"] / f"{clip.id.removeprefix('train_')}.mp4"
        if i % 2:
            soundfile.write(path, np.sin(np.arange(3200) * (0.1 + 0.01 * i)).astype(np.float32), 16000, format="WAV")
    return root


@pytest.fixture
def opened(tmp_path):
    """stores() of a data root: what is found, and what was said."""

    def call(root, made=None, workers=0, default=None, **fields):
        cfg = MeldSource(data_root=str(root), **({"features_root": str(tmp_path / "features")} | fields))
        said = []
        every = [clip for part in read_splits(cfg, lambda _: None).values() for clip in part]
        more = {} if default is None else {"default": default}
        found = stores(cfg, every, made or {}, workers, dist.Ranks(), said.append, **more)
        return SimpleNamespace(found=found, said=said)

    return call


@pytest.fixture
def refused(opened):
    def call(*args, **fields):
        with pytest.raises(UserError) as error:
            opened(*args, **fields)
        return str(error.value)

    return call


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded."""
    seen = []
    encode = hashtext.HashText.encode
    monkeypatch.setattr(hashtext.HashText, "encode", lambda self, x, *args: (seen.append(x), encode(self, x, *args))[1])
    return seen


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 3, 8])
def test_splits(words, limit):
    found = read_splits(MeldSource(data_root=str(words), limit=limit), lambda _: None)
    every = load_meld(words, lambda _: None)
    for split, part in found.items():
        expected = [clip.id for clip in every if clip.split == split]
        assert [clip.id for clip in part] == (expected[:limit] if limit else expected)
    assert list(found) == ["train", "valid", "test"]


# --- features at hand -------------------------------------------------------------------------------------------------


def test_the_data_roots_stores_are_read(meld, opened, encoded):
    found = opened(meld).found
    assert {m: (store.folder, store.dim) for m, store in found.items()} == {
        m: (meld / m, 32) for m in ("audio", "text")
    }
    made = {m: store.info for m, store in found.items()}
    assert list(opened(meld, made).found) == ["audio", "text"]
    assert list(opened(meld, {"text": made["text"]}).found) == ["text"]  # the rest stays unread
    assert not encoded


def test_stores_elsewhere(words, meld, opened):
    found = opened(words, stores={"text": str(meld / "text")}).found
    assert {m: store.folder for m, store in found.items()} == {"text": meld / "text"}


def test_features_made_otherwise_than_those_trained_on(meld, refused, opened):
    made = {m: store.info for m, store in opened(meld).found.items()}
    for key, value in {"encoder": "wav2vec", "pooling": "max", "dim": 9, "options": {"x": 1}}.items():
        line = refused(meld, made | {"text": made["text"] | {key: value}})
        here = made["text"].get(key)
        assert line == f"text: features have {key} {here}, the model was trained on {value}"
    assert refused(meld, {"stats": made["audio"]}) == f"{meld}: its stores have nothing of what the model reads (stats)"


def test_features_of_unknown_making(words, meld, refused, opened):
    """Stage 3 was trained on stores of another tool: nothing here can make them of MELD."""
    made = {m: store.info for m, store in opened(meld).found.items()}
    line = refused(words, made)
    assert line == "audio: 'mock_audio' is no encoder here: --stores audio=FOLDER names MELD's features"


# --- features made here -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [None, "counts"])
def test_words_are_encoded_once_and_kept(words, opened, encoded, tmp_path, pooling):
    fields = {"encoders": {"text": f"hashtext:{pooling}"}} if pooling else {}
    first = opened(words, **fields)
    every = load_meld(words, lambda _: None)
    assert encoded == [clip.text for clip in every]
    store = first.found["text"]
    assert [store.folder] == [*(tmp_path / "features").glob(f"hashtext-{pooling or 'ids'}-*")]
    for clip in every:
        assert torch.equal(store[clip.id], hashtext.HashText().encode(clip.text, pooling or "ids"))
    encoded.clear()
    again = opened(words, workers=2, **fields)
    assert not encoded
    assert again.said == [f"{store.folder}: {len(every)} clips, width {store.dim}, complete"]
    assert again.found["text"].ids == store.ids


def test_another_copy_with_other_words_is_embedded_anew(words, opened, encoded, tmp_path):
    opened(words)
    encoded.clear()
    other = shutil.copytree(words, tmp_path / "other")
    opened(other)
    assert len(encoded) == 22


def test_some_rows_first_and_the_rest_later(words, opened, encoded):
    opened(words, limit=2)
    assert len(encoded) == 6
    assert len(opened(words).found["text"]) == 22
    assert len(encoded) == 22


def test_as_stage_3_was_trained(words, opened, encoded):
    made = {"text": hashtext.HashText().info("counts")}
    assert opened(words, made).found["text"].info["pooling"] == "counts"
    assert len(encoded) == 22


def test_what_nobody_asked_for_is_as_the_default_says(words, opened):
    counts = {"text": {"encoder": "hashtext", "pooling": "counts"}}
    assert opened(words, default=counts).found["text"].info["pooling"] == "counts"


def test_encoders_win_over_stores(meld, opened, encoded):
    assert list(opened(meld, encoders={"text": "hashtext"}).found) == ["text"]
    assert encoded


def test_sound_of_the_clips_that_there_are(clips, opened):
    """Those that lack it are passed over; words are of all."""
    wanted = {"audio": "logmel:frames", "text": "hashtext"}
    first = opened(clips, encoders=wanted)
    frames = first.found["audio"]
    ids = [clip.id for clip in load_meld(clips, lambda _: None)[1:12:2]]
    assert frames.ids == ids
    assert frames[ids[0]].shape == (LogMel().lengths(torch.tensor(3200)), 64)
    assert len(first.found["text"]) == 22
    made = {m: store.info for m, store in first.found.items()}
    again = opened(clips, made)
    assert all("complete" in line for line in again.said)
    assert list(again.found) == ["audio", "text"]


def test_statistics_beside_frames(clips, opened):
    made = {"audio": LogMel().info("frames"), "stats": LogMel().info("stats"), "text": hashtext.HashText().info("ids")}
    found = opened(clips, made).found
    assert {m: store.dim for m, store in found.items()} == {"audio": 64, "stats": 504, "text": hashtext.BUCKETS}


def test_without_clips_only_words_are_read(words, opened, refused):
    made = {"audio": LogMel().info("stats"), "text": hashtext.HashText().info("ids")}
    found = opened(words, made)
    assert list(found.found) == ["text"]
    assert found.said[0] == f"{words} holds no clips: only words are read"
    line = refused(words, {"audio": made["audio"]})
    assert line == f"{words} holds no clips, and the model reads nothing else"
    line = refused(words, encoders={"audio": "logmel", "text": "hashtext"})
    assert line == f"--encoders audio=logmel: {words} holds no clips"


@pytest.mark.parametrize(
    ("encoders", "line"),
    [
        ({"text": "hashtext:mean"}, "--encoders text=hashtext:mean: poolings are ids, counts"),
        ({"text": "logmel"}, "--encoders text=logmel: logmel reads audio"),
        ({"audio": "hashtext"}, "--encoders audio=hashtext: hashtext reads text"),
        ({"words": "hashtext"}, "--encoders: 'words' is not one of audio, stats, text"),
        ({"text": "hashtxt"}, "text: 'hashtxt' is no encoder here: --stores text=FOLDER names MELD's features"),
    ],
)
def test_encoders_that_are_none(words, refused, encoders, line):
    assert refused(words, encoders=encoders) == line


def test_another_encoder_than_stage_3s(words, refused):
    made = {"text": hashtext.HashText().info("ids")}
    line = refused(words, made, encoders={"text": "hashtext:counts"})
    assert line == "text: features have pooling counts, the model was trained on ids"


# --- what is known before training ------------------------------------------------------------------------------------


def build(frozen=True, mode="A", context=0):
    sources = {m: {"dim": dim, "kind": "dense", "frames": False} for m, dim in DIMS.items()}
    cfg = MeldConfig(mode=mode, finetune=not frozen, hidden_dim=9, context=context)
    model = Meld(cfg, sources, len(LABELS), (3, 4), SlmConfig(ClapConfig(proj_dim=6), hidden_dim=9), 4)
    for name, value in model.backbone.named_buffers():
        if not name.startswith(("clap.mean", "clap.std")):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.fixture
def data(words, tmp_path):
    """Drawn vectors of the train split; every fifth utterance has no words, every seventh no sound."""
    clips = read_splits(MeldSource(data_root=str(words)), lambda _: None)["train"]
    for m, dim in DIMS.items():
        writer = StoreWriter(tmp_path / m, {"encoder": "drawn", "pooling": "mean", "dim": dim})
        for i, clip in enumerate(clips):
            if i % (5 if m == "text" else 7):
                writer.add(clip.id, torch.randn(dim))
        writer.finish()
    cfg = pairs.PairsConfig(data_root=str(tmp_path))
    return lambda context: pairs.load(clips, pairs.open_stores(cfg), LABELS, cfg, context)


@pytest.mark.parametrize("batch", [4, 256])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("mode", ["A", "B"])
def test_known_features_give_the_models_logits(data, monkeypatch, mode, context, batch):
    monkeypatch.setattr(speech, "BATCH", batch)
    model, split = build(mode=mode, context=context), data(context)
    given, plain = known(model, split), speech.views(split)
    assert list(given) == list(plain) == ["fused", "audio", "text"]
    read = []
    monkeypatch.setattr(model.backbone, "forward", lambda *_: read.append(1))
    monkeypatch.setattr(model.backbone, "features", lambda *_: read.append(1))
    found = {way: speech.predict(model, part, 2, only) for way, (part, only) in given.items()}
    assert not read  # the classifier is not asked again
    monkeypatch.undo()
    for way, (part, only) in plain.items():
        torch.testing.assert_close(found[way], speech.predict(model, part, 2, only), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["audio"], found["text"])


def test_nothing_is_known_of_what_learns(data):
    split = data(0)
    given = known(build(frozen=False), split)
    assert {way: (part is split, only) for way, (part, only) in given.items()} == {
        "fused": (True, None), "audio": (True, "audio"), "text": (True, "text"),
    }  # fmt: skip
