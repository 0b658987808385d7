"""Ragged features in memory against loops over clips and frames: vectors, frames, ids, what is cut, lost or missing."""

import threading

import pytest
import torch

from data import resident
from data.features import StoreWriter, open_features
from data.resident import Ragged, batches, gather, read

DIM = 3
IDS = ["a", "b", "c", "d", "e", "f"]


def drawn(kind, seed=0):
    """id -> features of all clips but e, as a store holds them; some frames are lost, one is broken."""
    generator = torch.Generator().manual_seed(seed)
    lengths = dict(zip(IDS, (4, 1, 9, 2, 3, 6) if kind in ("frames", "ids") else [1] * 6, strict=True))
    if kind.startswith("ids"):
        lengths = dict.fromkeys(IDS, 5) if kind == "ids alike" else lengths
        x = {id: torch.randint(2**30, (n,), dtype=torch.int32, generator=generator) for id, n in lengths.items()}
        x["a"][1] = 0  # an id like any other
    else:
        x = {id: torch.randn(n, DIM, generator=generator) for id, n in lengths.items()}
        x["d"][:] = 0  # lost
        if kind == "frames":
            x["a"][1] = 0
            x["c"][8, 0] = torch.nan
        if kind == "vectors":
            x = {id: row[0] for id, row in x.items()}
    del x["e"]
    return x


def store(folder, x, shard_rows=4096):
    ids = next(iter(x.values())).dtype == torch.int32
    info = {"encoder": "drawn", "kind": "ids", "dim": 2**30} if ids else {"encoder": "drawn", "dim": DIM}
    writer = StoreWriter(folder, info, shard_rows=shard_rows)
    for id, row in x.items():
        writer.add(id, row)
    writer.finish()
    return open_features(folder)


def looped(x, ids, index, cut):
    """What gather gives, clip by clip and frame by frame."""
    dense = next(iter(x.values())).dtype != torch.int32
    clips = [torch.atleast_2d(x[id]) if dense and id in x else x.get(id, torch.zeros(0)) for id in ids]
    longest = max(1, min(cut, *[max(map(len, clips))]))
    found = torch.zeros(*index.shape, longest, DIM) if dense else torch.zeros(*index.shape, longest, dtype=torch.int32)
    mask = torch.zeros(*index.shape, longest, dtype=torch.bool)
    for k, row in enumerate(index.tolist()):
        for b, i in enumerate(row):
            for t, frame in enumerate(clips[i][:longest] if i < len(ids) else []):
                if not dense or any(value != 0 for value in frame.tolist()):
                    found[k, b, t], mask[k, b, t] = frame, True
    return found, mask


@pytest.mark.parametrize("shard_rows", [2, 4096])
@pytest.mark.parametrize("cut", [1, 5, 9, 1000])
@pytest.mark.parametrize("kind", ["vectors", "rows", "frames", "ids", "ids alike"])
def test_gather_is_the_loop(tmp_path, kind, cut, shard_rows):
    x = drawn(kind)
    part = read(IDS, store(tmp_path, x, shard_rows), cut)
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [5, 6, 0, 0, 2, 1, 4]])  # 6: none
    found, mask = part.gather(index)
    expected = looped(x, IDS, index, cut)
    assert torch.equal(mask, expected[1])
    assert found.dtype == expected[0].dtype
    torch.testing.assert_close(found, expected[0], rtol=0, atol=0, equal_nan=True)
    assert mask.any()
    assert not mask[0, 4].any()  # the store lacks it
    assert not mask[0, 6].any()


@pytest.mark.parametrize("kind", ["frames", "ids alike"])
def test_clips_in_any_order(tmp_path, kind):
    x = drawn(kind)
    opened = store(tmp_path, x, shard_rows=3)
    for order in (["f", "c", "a"], ["b", "e"], ["c", "c", "d"], ["e"], []):
        index = torch.arange(len(order) + 1)[None]
        found, mask = read(order, opened, 7).gather(index)
        expected = looped(x, [*order, "none"], index, 7)
        assert torch.equal(mask, expected[1])
        torch.testing.assert_close(found, expected[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["vectors", "frames", "ids"])
def test_no_clips_can_be_gathered(tmp_path, kind):
    opened = store(tmp_path, drawn(kind))
    for ids in (IDS, []):
        found, mask = read(ids, opened, 7).gather(torch.zeros(2, 0, dtype=torch.long))
        assert mask.shape[:2] == (2, 0)
        assert found.shape[:2] == (2, 0)


def test_ids_stay_whole_numbers(tmp_path):
    """float32 ends at 2 ** 24."""
    x = {"a": torch.tensor([2**24 + 1, 2**31 - 1], dtype=torch.int32), "b": torch.tensor([3], dtype=torch.int32)}
    found, _ = read(["a", "b"], store(tmp_path, x), 7).gather(torch.tensor([[0, 1]]))
    assert found.tolist() == [[[2**24 + 1, 2**31 - 1], [3, 0]]]


def test_half_precision_is_read_as_single(tmp_path):
    x = {id: row.half() for id, row in drawn("frames").items()}
    found, _ = read(IDS, store(tmp_path, x), 9).gather(torch.tensor([[0]]))
    assert found.dtype == torch.float32
    assert torch.equal(found[0, 0, :4], x["a"].float())


def test_map_replaces_frames_and_drops_some(tmp_path):
    x = drawn("frames")
    part = read(IDS, store(tmp_path, x), 9)
    index = torch.arange(7)[None]
    before, mask = part.gather(index)
    values, rows = part.values.clone(), part.rows.clone()

    def transform(frames):
        """Twice the value, and frames whose first value is negative are none."""
        there = (frames != 0).any(-1) & ~(frames[:, 0] < 0)
        return torch.where(there[:, None], 2 * frames, 0.0), there

    after, seen = part.map(transform).gather(index)
    assert torch.equal(seen, mask & ~(before[..., 0] < 0))
    assert 0 < seen.sum() < mask.sum()
    expected = torch.where(seen[..., None], 2 * before, 0.0)
    torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(part.values, values, rtol=0, atol=0, equal_nan=True)  # the part is as it was
    assert torch.equal(part.rows, rows)


def test_size_and_device():
    part = Ragged(torch.zeros(11, 3), torch.zeros(5, 2, dtype=torch.long))
    assert part.nbytes == 11 * 3 * 4 + 5 * 2 * 8
    moved = part.to(torch.device("meta"))
    assert (moved.values.device.type, moved.rows.device.type) == ("meta", "meta")


@pytest.mark.parametrize("cores", [0, 1000], ids=["busy", "spare"])
@pytest.mark.parametrize("chunk", [1, 300, 2**20])
@pytest.mark.parametrize("kind", ["vectors", "frames", "ids"])
def test_batches_are_what_gather_finds_for_each_step(tmp_path, monkeypatch, kind, chunk, cores):
    monkeypatch.setattr(resident, "GATHERED", chunk)
    monkeypatch.setattr(resident.os, "cpu_count", lambda: cores)
    parts = {m: read(IDS, store(tmp_path / m, drawn(kind, seed)), 5) for seed, m in enumerate(("audio", "text"))}
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(IDS) + 1, (2, 13), generator=generator)
    # a batch is good until the next is asked for
    found = [
        [{m: part.clone() for m, part in half.items()} for half in batch]
        for batch in batches(parts, index, 3, 7, torch.device("cpu"))
    ]
    assert [batch[1]["text"].shape[1] for batch in found] == [3, 3, 3, 3, 1, 0, 0]
    for first, batch in zip(range(0, 21, 3), found, strict=True):
        for own, other in zip(batch, gather(parts, index[:, first : first + 3]), strict=True):
            assert list(own) == ["audio", "text"]
            for m in own:
                torch.testing.assert_close(own[m], other[m], rtol=0, atol=0, equal_nan=True)


def test_batches_are_gathered_ahead_by_a_thread_that_ends(tmp_path, monkeypatch):
    """One step ahead, not the whole epoch; what goes wrong there is raised here."""
    monkeypatch.setattr(resident, "GATHERED", 1)
    monkeypatch.setattr(resident.os, "cpu_count", lambda: torch.get_num_threads() + 1)
    parts, seen, ahead = {"m": read(IDS, store(tmp_path, drawn("rows")), 5)}, [], threading.Event()

    def noted(parts, index, out=None):
        seen.append((int(index), threading.current_thread()))
        if index == 1:
            ahead.set()
        return gather(parts, index, out)

    monkeypatch.setattr(resident, "gather", noted)
    found = batches(parts, torch.tensor([[0, 1, 2, 99]]), 1, 4, torch.device("cpu"))
    next(found)
    assert ahead.wait(10)
    assert [i for i, _ in seen] == [0, 1]
    next(found)
    next(found)
    with pytest.raises(IndexError):
        next(found)
    left = batches(parts, torch.zeros(1, 3).long(), 1, 3, torch.device("cpu"))
    next(left)
    left.close()
    threads = {thread for _, thread in seen}
    monkeypatch.setattr(resident.os, "cpu_count", torch.get_num_threads)  # none to spare
    seen.clear()
    assert len(list(batches(parts, torch.zeros(1, 3).long(), 1, 3, torch.device("cpu")))) == 3
    assert {thread for _, thread in seen} == {threading.main_thread()}
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_gather_takes_the_place_of_an_earlier_one(tmp_path):
    part = read(IDS, store(tmp_path, drawn("frames")), 5)
    first, second = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, len(IDS)], [0, 2]])
    expected = part.gather(second)
    place = part.gather(first)
    addresses = [x.data_ptr() for x in place]
    found = part.gather(second, place)
    assert [x.data_ptr() for x in found] == addresses
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    for own, other in zip(place, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cores", [0, 1000], ids=["busy", "spare"])
def test_batches_lie_in_the_same_memory(tmp_path, monkeypatch, cores):
    """Two places with a thread, which fills one while the other is in use."""
    monkeypatch.setattr(resident, "GATHERED", 1)
    monkeypatch.setattr(resident.os, "cpu_count", lambda: cores)
    parts = {"m": read(IDS, store(tmp_path, drawn("rows")), 5)}
    index = torch.zeros(1, 8).long()
    places = [x["m"].data_ptr() for x, _ in batches(parts, index, 1, 8, torch.device("cpu"))]
    turns = 2 if cores else 1
    assert len(set(places)) == turns
    assert places == places[:turns] * (8 // turns)
