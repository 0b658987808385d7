"""extract.py from raw media to a store: what is skipped, what is an error, and that an interruption costs nothing."""

import contextlib
import csv
import hashlib
import os
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import extract
from common import config
from common.config import UserError
from data import extraction
from data.features import FeatureStore, open_features
from data.media import load_audio
from model import encoders
from tests.conftest import FORK
from tests.training import talking


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*argv):
    extract.main(config.load(extract.Config, [str(arg) for arg in argv]))


def tones(folder, count, seconds=0.3):
    """A manifest of `count` clips that differ in pitch."""
    time_axis = np.arange(int(16000 * seconds)) / 16000
    for i in range(count):
        soundfile.write(folder / f"tone{i}.wav", 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * time_axis), 16000)
    return manifest(folder, [(f"tone{i}", f"tone{i}.wav", f"words {i}") for i in range(count)])


def manifest(folder, rows, name="clips.csv"):
    with open(folder / name, "w", newline="") as file:
        csv.writer(file).writerows([("id", "path", "text"), *rows])
    return folder / name


def skipped(store):
    with open(store / "skipped.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_clip_is_encoded_in_order(tmp_path, capsys, workers):
    out = tmp_path / "store"
    run("--manifest", tones(tmp_path, 12), "--out", out, "--num-workers", workers)
    store = FeatureStore(out)
    assert store.ids == [f"tone{i}" for i in range(12)]
    encoder = encoders.load("logmel")
    for id in ("tone0", "tone11"):
        assert torch.allclose(store[id], encoder.encode(load_audio(tmp_path / f"{id}.wav"), "stats"), atol=1e-6)
    assert {key: store.info[key] for key in ("encoder", "pooling", "dim", "dtype", "weights_sha256")} == {
        "encoder": "logmel", "pooling": "stats", "dim": 504, "dtype": "float32", "weights_sha256": None,
    }  # fmt: skip
    assert f"{out}: 12 clips, width 504, " in capsys.readouterr().out
    assert not (out / "skipped.csv").exists()


def test_ragged_stores_of_frames_and_ids(tmp_path):
    clips = tones(tmp_path, 2)
    run("--encoder", "logmel", "--pooling", "frames", "--manifest", clips, "--out", tmp_path / "a")
    run("--encoder", "hashtext", "--manifest", clips, "--out", tmp_path / "t")
    assert FeatureStore(tmp_path / "a")["tone1"].shape == (27, 64)
    ids = FeatureStore(tmp_path / "t")["tone1"]
    assert torch.equal(ids, encoders.load("hashtext").encode("words 1"))
    assert ids.dtype == torch.int32


def test_weights_and_options_reach_the_encoder(tmp_path):
    layers = {"bank.weight": torch.randn(8, 1, 201), "code.weight": torch.randn(13, 8, 1)}
    (tmp_path / "net").mkdir()
    save_file(layers, tmp_path / "net/model.safetensors")
    clips, out = tones(tmp_path, 2), tmp_path / "store"
    run("--encoder", "wavcoch", "--weights", tmp_path / "net", "--manifest", clips, "--out", out)
    store = FeatureStore(out)
    encoder = encoders.load(store.info["encoder"], **store.info["options"])
    assert torch.equal(store["tone1"], encoder.encode(load_audio(tmp_path / "tone1.wav")))
    digest = hashlib.sha256((tmp_path / "net/model.safetensors").read_bytes()).hexdigest()
    assert store.info["weights_sha256"] == {"model.safetensors": digest}
    options = ("--options", f"wavcoch={tmp_path / 'net'},layers=2-3,original=yes")
    with pytest.raises(
        UserError, match=r"net: not an AuriStream: no transformer.wte.weight in bank.weight, code.weight"
    ):
        run("--encoder", "auristream", "--weights", tmp_path / "net", *options, "--manifest", clips, "--out", out / "a")


def test_patches_of_the_peak_frame_in_a_merr_folder(tmp_path):
    (tmp_path / "video").mkdir()
    with av.open(str(tmp_path / "video/sample_1.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (0, 0, 0, 0, 240, 0):
            image = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    (tmp_path / "MERR_coarse_grained.txt").write_text("sample_1 6 happy\n")
    (tmp_path / "MERR_coarse_grained.json").write_text('{"sample_1": {"caption": "a smile", "peak_index": "4"}}')
    argv = ("--encoder", "framestats", "--pooling", "patches", "--image-size", 56, "--data-root", tmp_path)
    levels = {}
    for frame in ("first", "peak"):
        run(*argv, "--frame", frame, "--out", tmp_path / frame)
        store = open_features(tmp_path / frame)
        assert store["sample_1"].shape == (17, 12)
        assert (store.info["image_size"], store.info["frame"]) == (56, frame)
        levels[frame] = store["sample_1"].mean().item()
    assert levels["peak"] - levels["first"] > 2


def test_bad_clips_are_skipped_and_missing_modalities_are_not_bad(tmp_path, capsys):
    tones(tmp_path, 20)
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "empty.wav").write_bytes(b"")
    with av.open(str(tmp_path / "silent.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    odd = ["cut.mp4", "nan.wav", "empty.wav", "lost.wav", "silent.png"]
    rows = [(f"tone{i}", f"tone{i}.wav", "") for i in range(20)] + [(Path(name).stem, name, "") for name in odd]
    clips = manifest(tmp_path, [*rows, ("unseen", "", "only words")])
    out = tmp_path / "store"

    message = r"^4 of 26 clips are bad, more than --max-bad 0\.01 \(listed in \S*skipped\.csv\); the others are kept: "
    with pytest.raises(UserError, match=message):
        run("--manifest", clips, "--out", out)
    reasons = {row["id"]: row["reason"] for row in skipped(out)}
    assert reasons == {
        "cut": "Invalid data found when processing input",
        "nan": "non-finite features",
        "empty": "empty file",
        "lost": "not found",
        "silent": "no audio stream",
        "unseen": "unseen: no media file",
    }
    assert skipped(out)[0]["path"] == str(tmp_path / "cut.mp4")
    with pytest.raises(UserError, match="extraction is unfinished"):
        open_features(out)

    capsys.readouterr()
    run("--manifest", clips, "--out", out, "--resume", "--max-bad", 0.2)
    assert "skipped 4 bad clips and 2 without the modality" in capsys.readouterr().out
    assert len(open_features(out)) == 20
    assert "nan" not in open_features(out)

    for name in odd[:4]:
        soundfile.write(tmp_path / Path(name).with_suffix(".wav"), np.ones(8000) * 0.1, 16000)
    mended = manifest(tmp_path, [(id, path.replace(".mp4", ".wav"), text) for id, path, text in rows])
    run("--manifest", mended, "--out", out, "--resume")
    assert len(open_features(out)) == 24
    assert [row["id"] for row in skipped(out)] == ["silent"]


def test_existing_store_needs_a_decision(tmp_path):
    out = tmp_path / "store"
    run("--manifest", tones(tmp_path, 3), "--out", out)
    (out / "notes.txt").write_text("not ours")
    with pytest.raises(UserError, match=r"holds a store: --resume goes on with it, --overwrite replaces it, --out DIR"):
        run("--manifest", tones(tmp_path, 4), "--out", out)
    with pytest.raises(UserError, match=r"extracted with pooling stats, now frames; --overwrite starts again$"):
        run("--manifest", tones(tmp_path, 4), "--out", out, "--resume", "--pooling", "frames")
    run("--manifest", tones(tmp_path, 4), "--out", out, "--resume")
    assert len(FeatureStore(out)) == 4
    run("--manifest", tones(tmp_path, 2), "--out", out, "--overwrite", "--pooling", "frames")
    assert FeatureStore(out).ids == ["tone0", "tone1"]
    assert (out / "notes.txt").exists()


def test_mistakes_are_named(tmp_path):
    clips = tones(tmp_path, 1)
    for argv, message in (
        ([], r"^give one of --manifest FILE and --data-root DIR$"),
        (["--manifest", clips, "--data-root", tmp_path], r"^give one of --manifest FILE and --data-root DIR$"),
        (["--manifest", tmp_path / "no.csv"], r"no\.csv not found$"),
        (["--manifest", clips, "--encoder", "mel"], r"^--encoder: 'mel' is not one of logmel, framestats, hash"),
        (["--manifest", clips, "--pooling", "mean"], r"^--pooling: 'mean' is not one of stats, frames \(logmel\)$"),
        (["--manifest", clips, "--image-size", 56], r"^encoder logmel has no option image_size \(options: none\)$"),
        (["--manifest", clips, "--weights", "x"], r"^encoder logmel has no weights to load from x$"),
        (
            ["--manifest", clips, "--encoder", "wavcoch"],
            r"^wavcoch weights 'TuKoResearch/WavCochV8192' not found .*hf down",
        ),
        (
            ["--manifest", clips, "--encoder", "framestats", "--options", "frames=few"],
            r"^encoder framestats: frames: 'few' is not an int$",
        ),
        (["--manifest", clips, "--encoder", "framestats"], r"^none of the 1 clips has what framestats reads \(see "),
    ):
        with pytest.raises(UserError, match=message):
            run(*argv, "--out", tmp_path / "store")


def slowly(output, *argv):
    """A run that makes each clip a shard of its own, so that there is something to find after a kill."""
    decode = extraction.decode_clip
    extraction.CHUNK, extraction.decode_clip = 1, lambda *args: (time.sleep(0.1), decode(*args))[1]
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        run(*argv)


def test_killed_or_stopped_runs_continue(tmp_path):
    clips, out, whole = tones(tmp_path, 40), tmp_path / "store", tmp_path / "whole"
    run("--manifest", clips, "--out", whole)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        shards = len(list(out.glob("*.safetensors")))
        argv = [tmp_path / "said", "--manifest", clips, "--out", out, "--num-workers", 1, "--resume"]
        process = FORK.Process(target=slowly, args=argv)
        process.start()
        while len(list(out.glob("*.safetensors"))) < shards + 3:
            assert process.is_alive()
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == code
        printed = (tmp_path / "said").read_text()
        assert printed == ("" if code else f"stopped; the same command with --resume continues {out}\n")
        assert not (out / "index.json").exists()
    run("--manifest", clips, "--out", out, "--resume")
    store, reference = FeatureStore(out), FeatureStore(whole)
    assert sorted(store.ids) == sorted(reference.ids)
    assert all(torch.equal(store[id], reference[id]) for id in store.ids)


def test_ranks_share_the_work(ranks, tmp_path):
    clips, out = tones(tmp_path, 7), tmp_path / "store"
    manifest(tmp_path, [*((f"tone{i}", f"tone{i}.wav", "") for i in range(7)), ("lost", "lost.wav", "")])
    run("--manifest", clips, "--out", tmp_path / "one", "--max-bad", 0.2)
    (_, said), (_, other) = ranks(2, talking, run, "--manifest", clips, "--out", out, "--max-bad", 0.2)
    assert said.count("7 clips, width 504") == 1
    assert other == ""
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    store, one = FeatureStore(out), FeatureStore(tmp_path / "one")
    assert sorted(store.ids) == sorted(one.ids)
    assert all(torch.equal(store[id], one[id]) for id in one.ids)
    assert [row["id"] for row in skipped(out)] == ["lost"]
