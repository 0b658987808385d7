"""extract() as the scripts call it: what is done is opened, what is missing is made, and nothing is done twice."""

import json
import os
import re
import shutil
import signal
import socket
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from common import dist
from common.config import UserError
from data import extraction
from data.extraction import clear, extract
from data.features import FeatureStore, StoreWriter, open_features, shard_files
from data.manifest import Clip
from data.media import load_audio
from model.encoders import Encoder

HERE = dist.Ranks()

pytestmark = pytest.mark.usefixtures("signals")


class Toy:
    """Encodes sound by its mean, or text by its length, and remembers what it was given."""

    sample_rate = 16000

    def __init__(self, modality="audio"):
        self.modality, self.seen = modality, []

    def info(self, pooling):
        return {"encoder": "toy", "pooling": pooling, "dim": 1, "sides": (1, 2), "weights_sha256": None}

    def encode(self, x, pooling):
        self.seen.append(len(x))
        return x.mean()[None] if self.modality == "audio" else torch.tensor([float(len(x))])


@pytest.fixture
def clips(tmp_path):
    """Four clips of 0.1 to 0.4 seconds."""
    for i in range(1, 5):
        soundfile.write(tmp_path / f"{i}.wav", np.full(1600 * i, 0.1 * i, np.float32), 16000, subtype="FLOAT")
    return [Clip(str(i), str(tmp_path / f"{i}.wav"), "word " * i) for i in range(1, 5)]


@pytest.fixture
def run(tmp_path):
    """extract() into a store with a new encoder; the store, the samples that the encoder read and what was said."""

    def call(clips, encoder=None, pooling="stats", **options):
        encoder, said = encoder or Toy(), []
        store = extract(clips, encoder, pooling, tmp_path / "store", HERE, say=said.append, **options)
        return SimpleNamespace(store=store, seen=encoder.seen, said=said)

    return call


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_call_opens_what_the_first_made(clips, run, tmp_path, workers):
    first = run(clips, workers=workers)
    assert sorted(first.seen) == ([] if workers else [1600, 3200, 4800, 6400])  # else other processes saw them
    assert first.said[0].startswith(f"{tmp_path / 'store'}: 4 clips, width 1, ")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    second = run(clips, workers=workers)
    assert (second.seen, second.said) == ([], [f"{tmp_path / 'store'}: 4 clips, width 1, complete"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == files
    for store in (first.store, second.store):
        assert store.ids == ["1", "2", "3", "4"]
        assert store["3"].item() == pytest.approx(0.3)
        assert [store.length(id) for id in store.ids] == pytest.approx([0.1, 0.2, 0.3, 0.4])


class Doomed(Toy):
    """Notes which process encodes; the longest clip kills it."""

    def __init__(self, folder, patience=0.0):
        super().__init__()
        self.folder, self.patience = folder, patience

    def encode(self, x, pooling):
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(self.patience)
        if len(x) == 6400 and not self.patience:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(x, pooling)


def test_a_decoding_process_that_dies_is_said_in_one_line(clips, run, tmp_path):
    with pytest.raises(UserError, match=r"^a process that decodes clips was killed.*\(now 1\).*--resume"):
        run(clips, Doomed(tmp_path), workers=1)
    assert len(run(clips).store) == 4


def test_processes_that_decode_end_with_a_parent_that_was_killed(clips, tmp_path):
    def work():
        extract(clips, Doomed(tmp_path, 0.3), "stats", tmp_path / "store", HERE, workers=2, say=lambda line: None)

    parent = get_context("fork").Process(target=work)
    parent.start()
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    children = [Path("/proc", path.stem) for path in tmp_path.glob("*.pid")]
    while any(child.exists() and " Z " not in (child / "stat").read_text() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_what_is_missing_is_made(clips, run):
    run(clips[:2])
    assert run(clips[1:2]).seen == []
    more = run(clips)
    assert more.seen == [4800, 6400]
    assert sorted(more.store.ids) == ["1", "2", "3", "4"]


def test_shards_that_no_index_lists_are_taken_up(clips, run, tmp_path):
    run(clips[:2])
    writer = StoreWriter(tmp_path / "store", Toy().info("stats"))
    writer.add("3", torch.ones(1))
    writer.add("4", torch.ones(1))
    writer.close()  # and then the process was killed
    again = run(clips)
    assert again.seen == []
    assert len(again.store) == 4


def test_a_store_made_in_another_way_is_refused(clips, run):
    run(clips)
    with pytest.raises(UserError, match=r"extracted with pooling stats, now mean; --overwrite starts again$"):
        run(clips, pooling="mean")
    assert run(clips).seen == []


def test_text_has_no_length_in_seconds(clips, run):
    store = run(clips, Toy("text")).store
    assert store["2"].item() == 10
    assert store.length("2") is None


def test_clips_without_a_file_are_listed_once(clips, run, tmp_path):
    clips.append(Clip("5", text="unheard"))
    first = run(clips)
    assert first.said[0].startswith("skipped 0 bad clips and 1 without the modality")
    listing = (tmp_path / "store/skipped.csv").read_text().splitlines()
    assert listing == ["id,path,reason", "5,,5: no media file"]
    second = run(clips)
    assert (second.seen, len(second.said)) == ([], 1)


def test_damaged_clips_are_tried_again(clips, run, tmp_path):
    samples = (tmp_path / "2.wav").read_bytes()
    (tmp_path / "2.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"^1 of 4 clips are bad, more than --max-bad 0\.01 \(listed in "):
        run(clips)
    assert len(run(clips, max_bad=0.5).store) == 3
    (tmp_path / "2.wav").write_bytes(samples)
    mended = run(clips)
    assert mended.seen == [3200]
    assert len(mended.store) == 4
    assert not (tmp_path / "store/skipped.csv").exists()


def test_a_stop_ends_before_the_shard_does(clips, run, tmp_path):
    class Interrupted(Toy):
        def encode(self, x, pooling):
            if len(self.seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(x, pooling)

    before = signal.getsignal(signal.SIGINT)
    stopped = run(clips, Interrupted())
    assert stopped.store is None
    assert stopped.said == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(UserError, match=r"extraction is unfinished"):
        open_features(tmp_path / "store")
    assert run(clips).seen == [1600, 3200, 4800, 6400]


def test_the_callers_stop_stays_in_place(clips, run):
    stop = dist.Stop()
    handler = signal.getsignal(signal.SIGTERM)
    assert len(run(clips[:1], stop=stop).store) == 1
    assert signal.getsignal(signal.SIGTERM) == handler
    stop.requested = True
    assert run(clips, stop=stop).store is None


def test_two_processes_do_not_fill_one_store(clips, run, tmp_path):
    lock = tmp_path / "store/.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    with pytest.raises(UserError, match=r"store is in use by process \d+"):
        run(clips)
    lock.unlink()
    run(clips)
    assert not lock.exists()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    assert len(run(clips).store) == 4  # reading takes no lock


def test_clear_leaves_what_is_not_of_the_store(clips, run, tmp_path):
    run([*clips, Clip("5")])
    (tmp_path / "store/notes.txt").write_text("not ours")
    clear(tmp_path / "store")
    assert os.listdir(tmp_path / "store") == ["notes.txt"]
    clear(tmp_path / "nothing")


def shared(clips, folder):
    here, encoder, said = dist.setup("cpu"), Toy(), []
    stores = [extract(clips, encoder, "stats", folder, here, say=said.append) for _ in range(2)]
    return encoder.seen, len(said), [store.ids for store in stores]


def test_ranks_share_the_work_and_all_get_the_store(clips, ranks, tmp_path):
    (seen, said, ids), (other, silent, same) = ranks(2, shared, clips, tmp_path / "store")
    assert (seen, other) == ([1600, 3200], [4800, 6400])
    assert (said, silent) == (2, 0)
    assert ids == same == [["1", "2", "3", "4"]] * 2
    assert len(FeatureStore(tmp_path / "store")) == 4


# --- clips that are encoded together ----------------------------------------------------------------------------------

HOP = 160


class Sums(Encoder):
    """Rows of 10 ms that hold their own sum and the clip's so far; remembers the batches that it was given."""

    name, modality, batched, dim = "sums", "audio", True, 2
    sample_rate = 16000
    poolings = ("mean", "frames")

    def __init__(self, slow=0.0):
        super().__init__()
        self.seen, self.slow = [], slow
        self.scale = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.scale.weight, 0.5)

    def prepare(self, x):
        return x - x.mean()

    def lengths(self, samples):
        return samples // HOP

    def forward(self, x, mask=None):
        counts = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1)
        self.seen.append(self.lengths(counts).tolist())
        time.sleep(self.slow)
        steps = x[:, : x.shape[1] // HOP * HOP].unflatten(1, (-1, HOP)).sum(2)
        rows = torch.stack([steps, steps.cumsum(1)], 2) * self.scale.weight
        return rows + (torch.arange(rows.shape[1]) >= self.lengths(counts)[:, None])[..., None] * 99  # of no clip


def voices(folder, count, seed=0):
    """Clips of 0.02 to 0.5 seconds of noise."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        samples = generator.normal(0, 0.1, generator.integers(320, 8000)).astype(np.float32)
        soundfile.write(folder / f"v{i:03}.wav", samples, 16000, subtype="FLOAT")
    return [Clip(f"v{i:03}", str(folder / f"v{i:03}.wav")) for i in range(count)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def small(monkeypatch):
    """Shards of 16 clips."""
    monkeypatch.setattr(extraction, "CHUNK", 16)


@pytest.mark.parametrize("pooling", ["mean", "frames"])
def test_ragged_batches_equal_single_clips(run, tmp_path, pooling):
    clips = voices(tmp_path, 40)
    encoder = Sums()
    store = run(clips, encoder, pooling, tokens=200).store
    assert store.ids == [clip.id for clip in clips]
    assert max(map(len, encoder.seen)) > 4
    for clip in clips:
        alone = encoder.encode(load_audio(clip.path), pooling)
        torch.testing.assert_close(store[clip.id], alone, atol=1e-5, rtol=0)
        assert store.length(clip.id) == pytest.approx(soundfile.info(clip.path).duration)


def test_batches_keep_to_their_tokens_and_hold_little_padding(run, tmp_path):
    clips = voices(tmp_path, 40)
    encoder = Sums()
    run(clips, encoder, tokens=100)
    sizes = [(len(rows), max(rows), sum(rows)) for rows in encoder.seen]
    assert sum(n for n, *_ in sizes) == 40
    assert len(sizes) < 20
    assert all(n * most <= 100 for n, most, _ in sizes)
    assert all(n * most - total <= 0.2 * n * most for n, most, total in sizes)
    alone = Sums()
    extract(clips, alone, "mean", tmp_path / "alone", HERE, tokens=1, say=str)
    assert [len(rows) for rows in alone.seen] == [1] * 40


def test_neither_workers_nor_threads_change_a_byte(tmp_path, small):
    clips = voices(tmp_path, 40)
    clips[7].path = str(tmp_path / "lost.wav")
    stores = []
    for workers in (0, 1, 3):
        folder = tmp_path / f"{workers}"
        extract(clips, Sums(), "frames", folder, HERE, workers=workers, max_bad=1, say=str)
        stores.append(contents(folder))
    assert {*stores[0]} == {"index.json", "plan.json", "skipped.csv", *(f"shard-0000{i}.safetensors" for i in range(3))}
    assert stores[0] == stores[1] == stores[2]


def endless(clips, folder):
    extraction.CHUNK = 4
    extract(clips, Sums(slow=0.02), "frames", folder, HERE, workers=2, tokens=100, max_bad=0.2, say=str)


def test_killed_twice_the_store_is_the_same_to_the_byte(tmp_path, monkeypatch):
    clips = voices(tmp_path, 40)
    (tmp_path / "v005.wav").write_bytes(b"RIFF")
    monkeypatch.setattr(extraction, "CHUNK", 4)
    extract(clips, Sums(), "frames", tmp_path / "whole", HERE, tokens=100, max_bad=0.2, say=str)
    shards, finished = 0, {}
    for _ in range(2):
        process = get_context("fork").Process(target=endless, args=(clips, tmp_path / "store"))
        process.start()
        while len(made := list((tmp_path / "store").glob("shard-*.safetensors"))) < shards + 2:
            assert process.is_alive()
            time.sleep(0.005)
        process.kill()
        process.join()
        shards = len(made)
        assert not (tmp_path / "store/index.json").exists()
        assert all(path.stat().st_mtime_ns == finished[path] for path in finished)
        finished = {path: path.stat().st_mtime_ns for path in made}
    extract(clips, Sums(), "frames", tmp_path / "store", HERE, tokens=100, max_bad=0.2, say=str)
    assert all(path.stat().st_mtime_ns == finished[path] for path in finished)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert "v005" in (tmp_path / "store/skipped.csv").read_text()  # it failed before a kill


def halves(clips, folder):
    extraction.CHUNK = 8
    here, encoder = dist.setup("cpu"), Sums()
    extract(clips, encoder, "frames", folder, here, tokens=100, say=str)
    return sum(map(len, encoder.seen))


def test_two_ranks_make_what_one_makes(tmp_path, ranks, monkeypatch):
    clips = voices(tmp_path, 40)
    assert sorted(ranks(2, halves, clips, tmp_path / "two")) == [16, 24]
    monkeypatch.setattr(extraction, "CHUNK", 8)
    one = extract(clips, Sums(), "frames", tmp_path / "one", HERE, tokens=100, say=str)
    two = FeatureStore(tmp_path / "two")
    assert one.ids == two.ids
    assert all(torch.allclose(one[id], two[id], atol=1e-6, rtol=0) for id in one.ids)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_plan_outlives_the_number_of_ranks(tmp_path, ranks, monkeypatch):
    """Two ranks finish what one began, in its shards."""
    clips = voices(tmp_path, 40)
    monkeypatch.setattr(extraction, "CHUNK", 5)
    extract(clips, Sums(), "frames", tmp_path / "one", HERE, tokens=100, say=str)
    (tmp_path / "store").mkdir()
    for name in ("plan.json", "shard-00000.safetensors", "shard-00003.safetensors"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "store")
    assert sum(ranks(2, halves, clips, tmp_path / "store")) == 30
    assert contents(tmp_path / "one") == contents(tmp_path / "store")


def test_a_list_that_joins_later_goes_into_shards_of_its_own(run, tmp_path, small):
    clips = voices(tmp_path, 40)
    first = contents(run(clips[:20], Sums(), "frames").store.folder)
    assert json.loads(first["plan.json"])["parts"][0]["clips"] == 20
    encoder = Sums()
    store = run([*clips[10:35], *clips[38:]], encoder, "frames").store
    assert sum(map(len, encoder.seen)) == 17
    assert store.ids == [clip.id for clip in [*clips[:35], *clips[38:]]]
    after = contents(store.folder)
    assert [part["first"] for part in json.loads(after["plan.json"])["parts"]] == [0, 2]
    assert all(after[name] == first[name] for name in first if name.startswith("shard"))


def test_what_one_list_left_unfinished_does_not_come_twice(run, tmp_path, small):
    clips = voices(tmp_path, 40)
    store = run(clips, Sums(), "frames").store.folder
    (store / "shard-00001.safetensors").unlink()
    (store / "index.json").unlink()
    run(clips[20:30], Sums(), "frames")
    store = run(clips, Sums(), "frames").store
    assert sorted(store.ids) == [clip.id for clip in clips]
    assert sorted(path.name for path in shard_files(store.folder)) == [f"shard-0000{i}.safetensors" for i in range(4)]


def test_clips_that_stay_bad_do_not_add_shards(run, tmp_path):
    clips = [*voices(tmp_path, 4), Clip("lost", str(tmp_path / "lost.wav")), Clip("none")]
    run(clips, Sums(), max_bad=0.5)
    before = contents(tmp_path / "store")
    encoder = Sums()
    again = run(clips, encoder, max_bad=0.5)
    assert encoder.seen == []
    assert again.said[0].startswith("skipped 1 bad clips and 1 without the modality")
    assert contents(tmp_path / "store") == before
    shutil.copy(clips[0].path, tmp_path / "lost.wav")
    store = run(clips, Sums(), max_bad=0).store
    assert torch.equal(store["lost"], store["v000"])
    assert len(shard_files(store.folder)) == 2


def test_damaged_files_are_named_and_do_not_touch_the_others(run, tmp_path):
    clips = voices(tmp_path, 200)
    odd = ("v010", "v050", "v051", "v120", "v199")
    for id in odd[:4]:
        (tmp_path / f"{id}.wav").write_bytes(b"RIFF" + bytes(40))
    soundfile.write(tmp_path / "v199.wav", np.full(4000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"^5 of 200 clips are bad, more than --max-bad 0 \(listed in "):
        run(clips, Sums(), "frames", max_bad=0)
    store = run(clips, Sums(), "frames", max_bad=0.03).store
    assert store.ids == [clip.id for clip in clips if clip.id not in odd]
    listing = (tmp_path / "store/skipped.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in listing] == list(odd)
    assert listing[4].endswith(",non-finite features")
    store.check()


def test_texts_of_any_length_go_together(run):
    class Letters(Sums):
        modality = "text"

        def prepare(self, x):
            return torch.tensor([ord(letter) for letter in x])

        def lengths(self, tokens):
            return tokens

        def forward(self, x, mask=None):
            self.seen.append([x.shape[1]] if mask is None else mask.sum(1).tolist())
            return x[..., None].float().expand(-1, -1, 2)

    encoder = Letters()
    store = run([Clip(str(i), text="a" * (1 + 7 * i % 12)) for i in range(12)], encoder, "frames", tokens=24).store
    assert [len(store[str(i)]) for i in range(12)] == [1 + 7 * i % 12 for i in range(12)]
    assert encoder.seen[0] == [12, 11]
    assert store.length("3") is None


def test_wide_rows_make_small_shards():
    size = extraction.chunk_size
    assert size({"dim": 1024}, "mean") == 512
    assert size({"dim": 1408}, "patches") < 64
    assert size({"dim": 2**16, "kind": "ids"}, "ids") == 512
    assert size({"dim": 10**9}, "mean") == 1


def test_a_broken_plan_is_named(run, clips, tmp_path):
    run(clips[:2])
    (tmp_path / "store/plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json: not the plan of an extraction .*; delete it and --resume$"):
        run(clips)


def test_progress_tells_clips_sound_and_time_left(run, clips, monkeypatch):
    monkeypatch.setattr(extraction, "LINE", 0)
    said = run(clips).said
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"store: 1 of 4 clips, {number} clips/s, {number} hours of sound/s, {number} minutes left", said[0]
    )
    assert re.search(rf"4 clips, width 1, {number} clips/s, {number} hours of sound/s$", said[-1])
