"""extract.py with encoders that have weights: killed, shared by ranks, over damaged files, on boxes of frames."""

import contextlib
import csv
import io
import signal
import time

import av
import numpy as np
import pytest
import soundfile
import torch

import extract
from common import config
from common.config import UserError
from data import extraction
from data.features import FeatureStore, NpyFolder
from data.media import load_audio, load_frames
from model import encoders
from tests.conftest import FORK
from tests.training import talking

HUBERT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32,
       "patch_size": 8}  # fmt: skip

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of a HuBERT and of a ViT-MAE, small and random."""
    import transformers as t

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    t.HubertModel(t.HubertConfig(**HUBERT)).save_pretrained(root / "hubert")
    t.ViTMAEModel(t.ViTMAEConfig(**VIT, mask_ratio=0.0)).save_pretrained(root / "vitmae")
    return root


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """A manifest of 200 clips of 0.1 to 1.2 seconds, five of which are damaged."""
    folder = tmp_path_factory.mktemp("voices")
    generator = np.random.default_rng(0)
    for i in range(200):
        soundfile.write(folder / f"v{i:03}.wav", generator.normal(0, 0.1, generator.integers(1600, 19200)), 16000)
    for name, content in (("v003", b""), ("v040", b"RIFF"), ("v041", bytes(999)), ("v122", b"RIFF" + bytes(60))):
        (folder / f"{name}.wav").write_bytes(content)
    (folder / "v199.wav").unlink()
    return manifest(folder, [(f"v{i:03}", f"v{i:03}.wav") for i in range(200)])


def manifest(folder, rows, columns=("id", "path")):
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "clips.csv"


def film(path, count=12):
    """White on the left, black on the right, brighter from frame to frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for i in range(count):
            image = np.full((48, 64, 3), 20 * i, np.uint8)
            image[:, :32] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


def run(*argv):
    extract.main(config.load(extract.Config, [str(arg) for arg in (*argv, "--device", "cpu")]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def slowly(*argv):
    """A run with slow decoding, so that there is something to find after a kill."""
    decode = extraction.decode_clip
    extraction.decode_clip = lambda *args: (time.sleep(0.02), decode(*args))[1]
    with contextlib.redirect_stdout(io.StringIO()):
        run(*argv)


def test_killed_at_random_and_resumed_the_store_is_the_same_to_the_byte(tmp_path, weights, voices, monkeypatch, capsys):
    argv = ["--encoder", "hubert", "--weights", weights / "hubert", "--pooling", "frames", "--manifest", voices]
    monkeypatch.setattr(extraction, "CHUNK", 20)  # small shards
    with pytest.raises(UserError, match=r"^5 of 200 clips are bad, more than --max-bad 0 \(listed in "):
        run(*argv, "--out", tmp_path / "strict", "--max-bad", 0)
    assert capsys.readouterr().out.startswith("hubert: 49/49 tensors, 1 not used\n")
    run(*argv, "--out", tmp_path / "whole", "--max-bad", 0.05)
    with open(tmp_path / "whole/skipped.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["v003", "v040", "v041", "v122", "v199"]
    out, moments = tmp_path / "store", np.random.default_rng(time.time_ns()).uniform(0, 0.2, 2)
    for moment in moments:
        made = len(list(out.glob("*.safetensors")))
        process = FORK.Process(target=slowly, args=[*argv, "--out", out, "--resume", "--max-bad", 0.05])
        process.start()
        while len(list(out.glob("*.safetensors"))) < made + 1:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL, moments
        assert not (out / "index.json").exists(), moments
    run(*argv, "--out", out, "--resume", "--max-bad", 0.05)
    assert contents(out) == contents(tmp_path / "whole"), moments

    store = FeatureStore(out)
    assert len(store) == 195
    assert store.info["preprocess"] == "hubert: 16 kHz, zero mean and unit variance a clip"
    encoder = encoders.load("hubert", str(weights / "hubert"))
    for id in store.ids[::20]:
        alone = encoder.encode(load_audio(voices.parent / f"{id}.wav"), "frames")
        torch.testing.assert_close(store[id], alone, atol=1e-5, rtol=0)


def test_two_processes_make_half_of_the_shards_each(ranks, tmp_path, weights, voices):
    argv = ["--encoder", "hubert", "--weights", weights / "hubert", "--manifest", voices, "--max-bad", "0.05"]
    run(*argv, "--out", tmp_path / "one", "--npy", tmp_path / "HL-UTT")
    (_, said), (_, other) = ranks(2, talking, run, *argv, "--out", tmp_path / "two")
    assert said.count("195 clips, width 48, ") == 1
    assert other == ""
    one, two = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("shard-*"))) == 2
    assert one.ids == two.ids
    assert all(torch.allclose(one[id], two[id], atol=1e-6, rtol=0) for id in one.ids)
    folder = NpyFolder(tmp_path / "HL-UTT")
    assert set(folder.ids) == set(one.ids)
    assert all(torch.equal(folder[id], one[id]) for id in one.ids)


def test_faces_are_cut_out_of_their_frames(tmp_path, weights):
    film(tmp_path / "a.mp4")
    columns = ("id", "path", "box", "frame")
    rows = [
        ("all", "a.mp4", "", 2), ("left", "a.mp4", "0,0,32,48", 2), ("right", "a.mp4", "32,0,90,48", 2),
        ("outside", "a.mp4", "64,0,80,48", 2), ("missing", "b.mp4", "", 2),
    ]  # fmt: skip
    clips = manifest(tmp_path, rows, columns)
    argv = ["--encoder", "vitmae", "--weights", weights / "vitmae", "--manifest", clips, "--max-bad", 1]
    run(*argv, "--options", "frames=4", "--out", tmp_path / "mean")
    store = FeatureStore(tmp_path / "mean")
    assert store.ids == ["all", "left", "right"]
    with open(tmp_path / "mean/skipped.csv", newline="") as file:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {"outside": "box 64,0,80,48 is outside the 64 x 48 frame", "missing": "not found"}
    assert "frame" not in store.info
    encoder = encoders.load("vitmae", str(weights / "vitmae"), frames=4)
    frames = load_frames(tmp_path / "a.mp4", 4)
    for id, part in (("all", frames), ("left", frames[:, :, :32]), ("right", frames[:, :, 32:])):
        torch.testing.assert_close(store[id], encoder.encode(part, "mean"), atol=1e-5, rtol=0)
    for which, number in (("first", 0), ("peak", 2)):
        run(*argv, "--pooling", "frame", "--frame", which, "--out", tmp_path / which)
        one = FeatureStore(tmp_path / which)
        assert one.info["frame"] == which
        frame = load_frames(tmp_path / "a.mp4", indices=[number])
        torch.testing.assert_close(one["right"], encoder.encode(frame[:, :, 32:], "frame"), atol=1e-5, rtol=0)


def test_mistakes_are_named(tmp_path, weights, voices):
    argv = ["--encoder", "hubert", "--weights", weights / "hubert", "--manifest", voices, "--out", tmp_path / "store"]
    with pytest.raises(UserError, match=r"^--tokens-per-batch: 0 is not above 0$"):
        run(*argv, "--tokens-per-batch", 0)
