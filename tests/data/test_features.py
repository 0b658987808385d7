"""Feature stores: what goes in comes out, whatever dies in between."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save

from common.config import UserError
from data.features import (
    FeatureStore,
    Memory,
    NpyFolder,
    StoreWriter,
    decode_clip,
    encode_clip,
    open_features,
    write_npy,
)
from data.manifest import Clip
from data.media import NoAudio, NoText, NoVideo

INFO = {"encoder": "toy", "pooling": "stats", "dim": 3, "dtype": "float32"}


def write(folder, rows, finish=True, **options):
    writer = StoreWriter(folder, INFO, **options)
    for id, row in rows.items():
        writer.add(id, row)
    writer.close()
    if finish:
        writer.finish()
    return writer


def test_fixed_rows_over_several_shards(tmp_path):
    rows = {f"clip {i}": torch.randn(3) for i in range(7)}
    write(tmp_path / "s", rows, shard_rows=3)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "index.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors",
    ]  # fmt: skip
    store = FeatureStore(tmp_path / "s")
    assert store.ids == list(rows)
    assert (len(store), store.dim, store.info["encoder"]) == (7, 3, "toy")
    assert not {"ids", "shards"} & set(store.info)  # it goes into checkpoints
    assert all(torch.equal(store[id], row) for id, row in rows.items())
    assert "clip 6" in store
    assert "clip 7" not in store
    with safe_open(tmp_path / "s/shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("rows").shape == (3, 3)


def test_features_at_hand():
    frames, ids = {"a": torch.ones(2, 3), "b": torch.zeros(3)}, {"a": torch.arange(4), "b": torch.arange(0)}
    for values, kind, shapes in ((frames, "dense", [(2, 3), (1, 3)]), (ids, "ids", [(4,), (0,)])):
        store = Memory(values, 3, kind)
        parts, lengths = store.take(["a", "b"])
        assert [tuple(part.shape) for part in parts] == shapes
        assert lengths == [shape[0] for shape in shapes]
        assert (store.dim, store.info["kind"], "c" in store) == (3, kind, False)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_sequences_are_ragged(tmp_path, shape, dtype):
    lengths = [4, 0, 1, 9]
    rows = {str(n): torch.randint(-9, 9, (n, *shape)).to(dtype) for n in lengths}
    write(tmp_path, rows)
    store = FeatureStore(tmp_path)
    for id, row in rows.items():
        assert store[id].dtype == dtype
        assert torch.equal(store[id], row)
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("offsets").tolist() == [0, 4, 4, 5, 14]
        assert file.get_tensor("values").shape == (14, *shape)


def test_a_row_can_be_changed_without_changing_the_store(tmp_path):
    write(tmp_path, {"a": torch.zeros(3)})
    store = FeatureStore(tmp_path)
    store["a"].fill_(1)
    assert store["a"].tolist() == [0, 0, 0]
    assert FeatureStore(tmp_path)["a"].tolist() == [0, 0, 0]


def test_a_store_travels_to_a_worker_process(tmp_path):
    write(tmp_path, {"a": torch.arange(3.0)})
    store = FeatureStore(tmp_path)
    assert store["a"].tolist() == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(store))
    assert copy["a"].tolist() == [0, 1, 2]
    assert len(pickle.dumps(store)) < 2000


def test_restart_after_a_kill_keeps_whole_shards(tmp_path):
    rows = {str(i): torch.full((3,), float(i)) for i in range(10)}
    writer = StoreWriter(tmp_path, INFO, shard_rows=4)
    for id in list(rows)[:7]:
        writer.add(id, rows[id])  # 4 written, 3 pending when the process dies
    (tmp_path / "shard-00001.tmp").write_bytes(b"half a shard")
    with pytest.raises(UserError, match=r"extraction is unfinished; continue it with extract\.py --out .* --resume$"):
        open_features(tmp_path)

    again = StoreWriter(tmp_path, INFO, shard_rows=4)
    assert again.done == {"0", "1", "2", "3"}
    for id in rows.keys() - again.done:
        again.add(id, rows[id])
    assert again.finish() == 10
    store = open_features(tmp_path)
    assert sorted(store.ids) == sorted(rows)
    assert all(torch.equal(store[id], row) for id, row in rows.items())


def test_failed_write_leaves_nothing_behind_that_counts(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write(tmp_path, {"a": torch.zeros(3)})
    writer = StoreWriter(tmp_path, INFO)
    writer.add("b", torch.ones(3))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    monkeypatch.undo()
    assert FeatureStore(tmp_path).ids == ["a"]
    assert StoreWriter(tmp_path, INFO).done == {"a"}


def test_shards_are_written_in_any_order(tmp_path):
    writer = StoreWriter(tmp_path, INFO)
    writer.write(1, ["b"], [torch.ones(3)], [None])
    writer.write(2, [], [], [], {"d": ("empty file", True)})
    StoreWriter(tmp_path, INFO).write(0, ["a", "c"], [torch.zeros(3), torch.ones(3)], [None, None])
    writer = StoreWriter(tmp_path, INFO)
    assert writer.done == {"a", "b", "c"}
    assert [shard.skipped for shard in writer.shards] == [{}, {}, {"d": ("empty file", True)}]
    writer.add("e", torch.zeros(3))
    assert writer.finish() == 4
    assert FeatureStore(tmp_path).ids == ["a", "c", "b", "e"]


def test_the_same_clips_make_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, {id: torch.ones(3) for id in "xyz"}, shard_rows=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_stores_with_shards_of_ranks_are_read_and_continued(tmp_path):
    header = {"ids": json.dumps(["a", "b"]), "info": json.dumps(INFO)}
    (tmp_path / "shard-001-00000.safetensors").write_bytes(save({"rows": torch.ones(2, 3)}, header))
    (tmp_path / "index.json").write_text(
        json.dumps({**INFO, "shards": {"shard-001-00000.safetensors": 2}, "ids": ["a", "b"]})
    )
    assert FeatureStore(tmp_path)["b"].tolist() == [1, 1, 1]
    assert StoreWriter(tmp_path, INFO).done == {"a", "b"}
    write(tmp_path, {"c": torch.zeros(3)})
    assert FeatureStore(tmp_path).ids == ["a", "b", "c"]
    assert (tmp_path / "shard-00000.safetensors").exists()


def test_a_store_becomes_files_of_numpy(tmp_path):
    write(tmp_path / "s", {"a": torch.arange(3.0), "b.c": torch.ones(3)})
    store = FeatureStore(tmp_path / "s")
    write_npy(store, tmp_path / "UTT")
    folder = NpyFolder(tmp_path / "UTT")
    assert folder.ids == ["a", "b.c"]
    assert all(torch.equal(folder[id], store[id]) for id in store.ids)
    write(tmp_path / "odd", {"../a": torch.arange(3.0)})
    with pytest.raises(UserError, match=r"UTT: id '\.\./a' is no file name$"):
        write_npy(FeatureStore(tmp_path / "odd"), tmp_path / "UTT")


def test_resume_with_other_settings_is_refused(tmp_path):
    write(tmp_path, {"a": torch.zeros(3)})
    with pytest.raises(UserError, match=r"extracted with pooling stats, now frames; --overwrite starts again$"):
        StoreWriter(tmp_path, INFO | {"pooling": "frames"})


@pytest.mark.parametrize("rows", [[torch.ones(3)] * 3, [torch.ones(n, 3) for n in (2, 1, 4)]])
def test_lengths_are_kept_where_they_are_known(tmp_path, rows):
    writer = StoreWriter(tmp_path, INFO)
    for id, row, length in zip("abc", rows, (1.5, None, 300), strict=True):
        writer.add(id, row, length)
    writer.close()
    writer.add("d", torch.ones(3))
    writer.finish()
    store = FeatureStore(tmp_path)
    assert [store.length(id) for id in "abcd"] == [1.5, None, 300, None]
    assert all(torch.equal(store[id], row) for id, row in zip("abc", rows, strict=True))
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("lengths").dtype == torch.float32
    with safe_open(tmp_path / "shard-00001.safetensors", "pt") as file:
        assert set(file.keys()) == {"rows"}


def test_check_names_the_clip(tmp_path):
    write(tmp_path, {"a": torch.zeros(3), "b": torch.tensor([float("nan"), 1, float("inf")])})
    store = FeatureStore(tmp_path)
    store.check(["a"])
    with pytest.raises(UserError, match=r": id 'b' has 2 non-finite values$"):
        store.check()


def test_broken_stores(tmp_path):
    write(tmp_path / "s", {"a": torch.zeros(3)})
    (tmp_path / "s/shard-00000.safetensors").write_bytes(b"0123456789")
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: not a readable shard .*; --overwrite makes"):
        FeatureStore(tmp_path / "s")["a"]
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: not a readable shard .*; delete it and"):
        StoreWriter(tmp_path / "s", INFO)
    for content in ("{", "[]", json.dumps(INFO)):
        (tmp_path / "s/index.json").write_text(content)
        with pytest.raises(UserError, match=r"index\.json: not the index of a feature store"):
            FeatureStore(tmp_path / "s")


def test_npy_folder_of_utterance_vectors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=4).astype(np.float32), "b": rng.normal(size=(1, 4)), "c.d": np.arange(4)}
    for id, array in arrays.items():
        np.save(tmp_path / f"{id}.npy", array)
    store = open_features(tmp_path)
    assert isinstance(store, NpyFolder)
    assert (store.ids, store.dim, len(store)) == (["a", "b", "c.d"], 4, 3)
    assert store.info == {"encoder": tmp_path.name, "dim": 4, "dtype": "float32", "pooling": None}
    for id, array in arrays.items():
        assert store[id].dtype == torch.float32
        assert np.allclose(store[id].numpy(), array.reshape(4))
    assert "c" not in store
    assert store.length("a") is None


def test_npy_files_that_would_shift_rows_are_refused(tmp_path):
    frames = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", frames[0])
    np.save(tmp_path / "b.npy", frames)
    with pytest.raises(UserError, match=r": id 'b' has 3 rows, expected one utterance vector \(or pooling mean or"):
        open_features(tmp_path)["b"]
    assert open_features(tmp_path, "mean")["b"].tolist() == [4, 5, 6, 7]
    assert open_features(tmp_path, "frames")["b"].shape == (3, 4)
    assert open_features(tmp_path, "frames")["a"].shape == (1, 4)


def test_npy_files_that_are_no_features(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(4, np.float32))
    np.save(tmp_path / "wide.npy", np.zeros(5, np.float32))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 4), np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), np.float32))
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "zero.npy").write_bytes(b"")
    store = NpyFolder(tmp_path)
    for id, reason in (
        ("wide", "has width 5, 'a' has 4"),
        ("cube", r"has shape \(2, 2, 4\) of float32"),
        ("empty", r"has shape \(0, 4\) of float32"),
        ("object", r"is not a readable \.npy array"),
        ("text", r"is not a readable \.npy array"),
        ("zero", r"is not a readable \.npy array"),
    ):
        with pytest.raises(UserError, match=f": id '{id}' {reason}"):
            store[id]


def test_open_features_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^features not found: neither voice nor features/voice is a folder \(extract"):
        open_features("voice")
    write(tmp_path / "features" / "voice", {"a": torch.ones(3)})
    assert open_features("voice")["a"].tolist() == [1, 1, 1]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"^nothing: holds no \.npy files$"):
        open_features("nothing")


def test_clips_without_the_modality(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600, np.float32), 16000)
    audio = SimpleNamespace(modality="audio", sample_rate=8000)
    video = SimpleNamespace(modality="video", frames=lambda pooling: 4)
    text = SimpleNamespace(modality="text")
    clip = Clip("a", str(tmp_path / "a.wav"), text="  ")
    assert decode_clip(clip, audio, "stats").shape == (800,)
    with pytest.raises(NoVideo, match=r"a\.wav: no video stream$"):
        decode_clip(clip, video, "stats")
    with pytest.raises(NoText, match=r"^a: no text$"):
        decode_clip(clip, text, "ids")
    with pytest.raises(NoAudio, match=r"^b: no media file$"):
        decode_clip(Clip("b"), audio, "stats")


def test_encode_clip_reads_its_window_and_needs_no_gradient(tmp_path):
    samples = np.linspace(0, 0.5, 16000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    weight = torch.ones((), requires_grad=True)
    encoder = SimpleNamespace(modality="audio", sample_rate=16000, encode=lambda x, how: {"whole": x * weight}[how])
    features = encode_clip(Clip("a", str(tmp_path / "a.wav"), start=0.25, end=0.75), encoder, "whole")
    assert np.array_equal(features.numpy(), samples[4000:12000])
    assert not features.requires_grad


def test_the_frame_that_stands_for_a_clip(monkeypatch):
    asked = []
    frame = torch.zeros(2, 2, 3)
    monkeypatch.setattr("data.features.load_frame", lambda path, which, start, end: asked.append(which) or frame)
    encoder = SimpleNamespace(modality="video", frames=lambda pooling: 1)
    for clip in (Clip("a", "a.mp4", frame=7), Clip("b", "b.mp4")):
        for which in ("first", "middle", "peak"):
            assert decode_clip(clip, encoder, "patches", which).shape == (1, 2, 2, 3)
    assert asked == ["first", "middle", 7, "first", "middle", "middle"]
