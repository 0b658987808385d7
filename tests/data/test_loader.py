"""Which samples a step takes: the same for every split into batches, ranks and accumulation, and from any step on."""

import threading
import time

import pytest

from data.loader import permutation, window, windows


def flat(micro_batches):
    return [place for micro in micro_batches for place in micro]


@pytest.mark.parametrize("step", [0, 1, 7, 100])
def test_a_step_takes_the_same_samples_however_it_is_split(step):
    whole = flat(window(step, 19, 5, 8, 1, 0, 1))
    assert len(whole) == 8
    assert flat(window(step, 19, 5, 4, 2, 0, 1)) == whole
    assert flat(window(step, 19, 5, 2, 4, 0, 1)) == whole
    first, second = (flat(window(step, 19, 5, 4, 1, rank, 2)) for rank in (0, 1))
    assert first + second == whole
    ranks = [window(step, 19, 5, 2, 2, rank, 2) for rank in (0, 1)]
    assert [*ranks[0][0], *ranks[1][0], *ranks[0][1], *ranks[1][1]] == whole


def test_every_pass_takes_every_sample_once():
    taken = [place for step in range(19) for place in flat(window(step, 19, 5, 3, 1, 0, 1))]  # 57 = 3 passes
    for epoch in range(3):
        mine = [index for number, index in taken if number == epoch]
        assert sorted(mine) == list(range(19))
        assert mine == permutation(19, 5, epoch).tolist()
    assert [number for number, _ in taken] == [0] * 19 + [1] * 19 + [2] * 19
    orders = {tuple(permutation(19, seed, epoch)) for seed in (5, 6) for epoch in range(3)}
    assert len(orders) == 6


def test_a_batch_larger_than_the_data():
    taken = flat(window(0, 3, 0, 8, 1, 0, 1))
    assert [epoch for epoch, _ in taken] == [0, 0, 0, 1, 1, 1, 2, 2]


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
    data, plan = Slow(11), [window(step, 11, 1, 2, 2, 0, 1) for step in range(9)]
    assert list(windows(data, range(9), 1, 2, 2, 0, 1, workers)) == plan
    assert list(windows(data, range(4, 9), 1, 2, 2, 0, 1, workers)) == plan[4:]  # as after a resume
    assert (threading.get_ident() in data.threads) == (workers == 0)


def test_an_error_in_a_worker_reaches_the_loop():
    class Broken(Slow):
        def sample(self, index, epoch):
            raise ValueError(f"sample {index}")

    with pytest.raises(ValueError, match="sample "):
        next(windows(Broken(4), range(2), 0, 1, 1, 0, 1, 2))
