import os

import pytest

from bench import loops


def test_lines_of_the_table():
    times = {"floor": [(8.0, 1.0)], "ours": [(10.0, 2.0)], "DataLoader, 0 workers": [(20.0, 5.0)]}
    head, _, *lines, end = loops.rows("model", times)
    assert head == f"| model | {' | '.join(loops.COLUMNS)} |"
    assert end == ""
    assert [line.split("|")[2:-1] for line in lines] == [
        [" 8 (8 to 8) ", *["  "] * 6],
        [" 10 (10 to 10) ", " 0.2 (0.2 to 0.2) ", " 1 (1 to 1) ", " 0.1 (0.1 to 0.1) ", " 1 (1 to 1) ", " 1 ", " 1 "],
        [" 20 (20 to 20) ", " 0.6 (0.6 to 0.6) ", " 4 (4 to 4) ", " 0.2 (0.2 to 0.2) ", " 2 (2 to 2) ", " 6 ", " 4 "],
    ]


def test_the_medians_are_of_rounds():
    times = {"floor": [(8.0, 1.0), (6.0, 1.5)], "ours": [(9.0, 0.5), (8.0, 1.5)], "DataLoader": [(12.0, 3.0)] * 2}
    *_, ours, peer, _ = loops.rows("model", times)
    assert ours.split("|")[4] == " -0.25 (-0.5 to 0) "
    assert peer.split("|")[7:-1] == [" 3.33 ", " ours is not above the floor's "]  # (4 + 6) / (1 + 2)


class Still:
    """A clock without a model."""

    def __init__(self):
        self.marks = []

    def wait(self):
        pass

    def ms(self):
        return float(len(self.marks))


def variant(name, seen, steps, turns=loops.TURNS):
    clock = Still()

    def epoch(count, tick):
        for i in range(count):
            seen.append(f"{name}{i}")
            clock.marks.append(0)
            tick()

    return loops.Variant(clock, epoch, steps, turns)


def test_an_epoch_goes_on_where_it_was_and_whole_ones_are_not_interrupted():
    seen = []
    epochs = [loops.Epoch(variant("a", seen, 5, 2)), loops.Epoch(variant("b", seen, 3, 1))]
    for epoch in (0, 1, 0, 0):
        assert not epochs[epoch].over
        epochs[epoch].turn()
    assert seen == ["a0", "a1", "b0", "b1", "b2", "a2", "a3", "a4"]
    assert all(epoch.over for epoch in epochs)
    whole, rest = epochs[0].times()
    assert whole == epochs[0].ms / 5 > 0
    assert rest == (epochs[0].ms - 5) / 5


def test_each_variant_has_all_its_steps_after_a_few_to_warm_up():
    seen = []
    found = loops.alternate({name: variant(name, seen, 70) for name in "ab"})
    assert list(found) == ["a", "b"]
    for name in "ab":
        own = [step for step in seen if step[0] == name]
        assert own == [f"{name}{i}" for i in (*range(17), *range(70))]
    turns = [name for name, before in zip(seen[34:], ["", *seen[34:]], strict=False) if name[0] != before[:1]]
    assert len(turns) > 20  # they do take turns


def test_what_fails_in_a_turn_is_raised():
    def epoch(steps, tick):
        tick()
        if steps > 1:  # not yet while warming up
            raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        loops.alternate({"a": loops.Variant(Still(), epoch, 4)})


def test_every_round_is_a_process_of_its_own():
    found = loops.rounds(2, "", a_variant)
    assert list(found) == ["a"]
    assert len(found["a"]) == 2
    pids = {round(4 * (whole - rest)) for whole, rest in found["a"]}
    assert len(pids | {os.getpid()}) == 3


def a_variant():
    """Its clock says the process's number."""
    one = variant("a", [], 4)
    one.clock.ms = os.getpid
    return {"a": one}
