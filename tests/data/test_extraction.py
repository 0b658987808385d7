"""extract() as the scripts call it: what is done is opened, what is missing is made, and nothing is done twice."""

import json
import os
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from common import dist
from common.config import UserError
from data.extraction import clear, extract
from data.features import FeatureStore, StoreWriter, open_features
from data.manifest import Clip

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
    assert sorted(first.seen) == [1600, 3200, 4800, 6400]
    assert first.said[0].startswith(f"{tmp_path / 'store'}: 4 clips, width 1, ")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    second = run(clips, workers=workers)
    assert (second.seen, second.said) == ([], [f"{tmp_path / 'store'}: 4 clips, width 1, complete"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == files
    for store in (first.store, second.store):
        assert store.ids == ["1", "2", "3", "4"]
        assert store["3"].item() == pytest.approx(0.3)
        assert [store.length(id) for id in store.ids] == pytest.approx([0.1, 0.2, 0.3, 0.4])


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


def test_a_stop_keeps_what_is_done(clips, run, tmp_path):
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
    assert run(clips).seen == [4800, 6400]


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
    assert (seen, other) == ([1600, 4800], [3200, 6400])
    assert (said, silent) == (2, 0)
    assert ids == same == [["1", "3", "2", "4"]] * 2
    assert len(FeatureStore(tmp_path / "store")) == 4
