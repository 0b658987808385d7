"""Which samples a step takes: the same for every split into batches, ranks and accumulation, and from any step on."""

import threading
import time

import pytest

from data.loader import Order, by_length, deal, permutation, window, windows


def flat(micro_batches):
    return [place for micro in micro_batches for place in micro]


RANKED = [7, 3, 18, 0, 11, 5, 16, 2, 9, 14, 1, 12, 6, 17, 4, 10, 15, 8, 13]
ORDERS = {
    "plain": Order(19, 5),
    "curriculum": Order(19, 5, RANKED, 0.25, 200),
    "replay": Order(19, 5, replay=4, ratio=0.1),
    "both": Order(19, 5, RANKED, 0.25, 200, replay=4, ratio=0.1),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("step", [0, 1, 7, 24, 25, 100])
def test_a_step_takes_the_same_samples_however_it_is_split(step, name):
    order = ORDERS[name]
    whole = flat(window(step, order, 8, 1, 0, 1))
    assert whole == [order(n) for n in range(8 * step, 8 * step + 8)]
    assert flat(window(step, order, 4, 2, 0, 1)) == whole
    assert flat(window(step, order, 2, 4, 0, 1)) == whole
    first, second = (flat(window(step, order, 4, 1, rank, 2)) for rank in (0, 1))
    assert first + second == whole
    ranks = [window(step, order, 2, 2, rank, 2) for rank in (0, 1)]
    assert [*ranks[0][0], *ranks[1][0], *ranks[0][1], *ranks[1][1]] == whole


def test_every_pass_takes_every_sample_once():
    taken = [place for step in range(19) for place in flat(window(step, Order(19, 5), 3, 1, 0, 1))]  # 57 = 3 passes
    for epoch in range(3):
        mine = [index for number, index in taken if number == epoch]
        assert sorted(mine) == list(range(19))
        assert mine == permutation(19, 5, epoch).tolist()
    assert [number for number, _ in taken] == [0] * 19 + [1] * 19 + [2] * 19
    orders = {tuple(permutation(19, seed, epoch)) for seed in (5, 6) for epoch in range(3)}
    assert len(orders) == 6


def test_a_batch_larger_than_the_data():
    taken = flat(window(0, Order(3, 0), 8, 1, 0, 1))
    assert [epoch for epoch, _ in taken] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_curriculum_begins_with_the_easy_clips_and_reaches_all():
    order, rank = Order(19, 5, RANKED, 0.25, 200), {index: at for at, index in enumerate(RANKED)}
    taken = [order(n) for n in range(200 + 3 * 19)]
    passes = {}
    for n, (epoch, index) in enumerate(taken):
        passes.setdefault(epoch, []).append((n, index))
    assert list(passes) == list(range(len(passes)))  # so no clip is drawn twice with the same randomness
    for numbered in passes.values():
        begin, pool = numbered[0][0], len(numbered)
        expected = round(19 * min(1, 0.25 + 0.75 * begin / 200))
        if begin + expected <= 200 or begin >= 200:
            assert pool == expected
            assert {rank[index] for _, index in numbered} == set(range(expected))  # the easiest, each once
        else:
            assert begin + pool == 200  # cut off where the curriculum ends
            assert {rank[index] for _, index in numbered} <= set(range(expected))
        assert {order.pool(n) for n, _ in numbered} == {expected}
    assert [order.pool(n) for n in (0, 4, 5, 200, 9999)] == [5, 5, 5, 19, 19]
    full = [epoch for epoch, numbered in passes.items() if numbered[0][0] >= 200]
    for epoch in full:  # the ordinary order
        assert [index for _, index in passes[epoch]] == permutation(19, 5, epoch).tolist()
    easy = [[index for _, index in passes[epoch]] for epoch in (0, 1)]
    assert sorted(easy[0]) == sorted(easy[1])
    assert easy[0] != easy[1]  # shuffled anew


def test_a_curriculum_ends_at_the_same_sample_with_replay():
    own = [place for place in map(ORDERS["both"], range(1000)) if place[1] < 19]
    assert own == [Order(19, 5, RANKED, 0.25, 180)(n) for n in range(900)]  # 20 of its 200 samples are replayed


def test_no_curriculum_is_the_ordinary_order():
    plain = [Order(19, 5)(n) for n in range(100)]
    assert [Order(19, 5, RANKED, 0.25, 0)(n) for n in range(100)] == plain
    assert [Order(19, 5, RANKED, 1.0, 38)(n)[0] for n in range(100)] == [epoch for epoch, _ in plain]


@pytest.mark.parametrize(("ratio", "period"), [(0.1, 10), (0.25, 4), (0.5, 2)])
def test_every_so_many_th_sample_is_replayed(ratio, period):
    order = Order(19, 5, replay=4, ratio=ratio)
    taken = [order(n) for n in range(400)]
    replayed = [(epoch, index - 19) for epoch, index in taken if index >= 19]
    assert [n for n, (_, index) in enumerate(taken) if index >= 19] == list(range(period - 1, 400, period))
    assert replayed == [Order(4, 5)(n) for n in range(400 // period)]  # passes over the replayed clips
    own = [place for place in taken if place[1] < 19]
    assert own == [Order(19, 5)(n) for n in range(len(own))]


def test_a_ratio_is_met_exactly():
    order = Order(19, 5, replay=7, ratio=0.3)
    assert [sum(order(n)[1] >= 19 for n in range(size)) for size in (10, 100, 1000)] == [3, 30, 300]


class Slow:
    """Samples that say who they are; the later ones are ready first."""

    def __init__(self, size):
        self.size, self.threads = size, set()

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        self.threads.add(threading.get_ident())
        time.sleep(0.0005 * (self.size - index))
        return epoch, index


@pytest.mark.parametrize("workers", [0, 3])
def test_reading_ahead_changes_nothing(workers):
    data, plan = Slow(11), [window(step, Order(11, 1), 2, 2, 0, 1) for step in range(9)]
    assert list(windows([data], plan, workers)) == plan
    assert (threading.get_ident() in data.threads) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_indices_of_a_part_follow_those_before_it(workers):
    class Named(Slow):
        def sample(self, index, epoch):
            return self.size, epoch, index

    order = Order(11, 1, replay=3, ratio=0.25)
    [[taken]] = windows([Named(11), Named(3)], [window(0, order, 24, 1, 0, 1)], workers)
    expected = [(3, epoch, index - 11) if index >= 11 else (11, epoch, index) for epoch, index in map(order, range(24))]
    assert taken == expected


def test_an_error_in_a_worker_reaches_the_loop():
    class Broken(Slow):
        def sample(self, index, epoch):
            raise ValueError(f"sample {index}")

    with pytest.raises(ValueError, match="sample "):
        next(windows([Broken(4)], [[[(0, 2)]]], 2))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most", [40, 60, 200, 10_000])
def test_micro_batches_keep_to_their_tokens_and_ranks_to_each_other(most, world):
    lengths = [7, 33, 20, 11, 40, 25, 9, 31, 18, 40, 12, 6]
    ranks = deal(lengths, most, world)
    assert sorted(i for micros in ranks for micro in micros for i in micro) == list(range(12))  # each once
    assert len({len(micros) for micros in ranks}) == 1  # FSDP's and DDP's ranks meet in every one
    sizes = [sum(lengths[i] for i in micro) for micros in ranks for micro in micros]
    assert 0 < min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= max(lengths)
    count = len(sizes) // world
    assert count == 1 or sum(lengths) > most * world * (count - 1) * 0.7  # hardly more than it takes


def test_a_sample_that_is_too_long_is_alone():
    assert deal([90, 5, 5, 5, 5], 20, 1) == [[[0], [1, 2, 3, 4]]]
    assert deal([90, 80, 70], 20, 1) == [[[0], [1], [2]]]
    assert deal([90, 80], 20, 2) == [[[0]], [[1]]]


@pytest.mark.parametrize("step", [0, 3])
def test_a_step_dealt_by_length_takes_the_samples_that_it_takes_by_number(step):
    order, asked = Order(19, 5, replay=4, ratio=0.1), []

    def length(epoch, index):
        asked.append((epoch, index))
        return 10 + index

    whole = [order(n) for n in range(8 * step, 8 * step + 8)]
    ranks = [by_length(step, order, length, 8, 60, rank, 2) for rank in (0, 1)]
    assert sorted(flat(ranks[0]) + flat(ranks[1])) == sorted(whole)
    assert asked == whole * 2  # every rank comes to the same plan by itself
    assert all(sum(10 + index for _, index in micro) <= 60 for micros in ranks for micro in micros)
