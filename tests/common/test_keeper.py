"""Best epochs, early stopping and the plateau schedule of seeds that train side by side.

Saving and going on are tested with the scripts, by runs that are stopped and killed.
"""

import random

import pytest
import torch

from common.keeper import Rule, Watch, shuffled


def test_the_plateau_schedule_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3, min_lr=1e-3)
    rule = Rule("loss", plateau=(3, 0.5, 1e-3))
    watch = Watch(0.1)
    rng = random.Random(0)
    for epoch in range(1, 120):
        loss = 1 / (1 + epoch // 9) + 0.02 * rng.random()
        watch.update(rule, {"loss": loss}, epoch)
        theirs.step(loss)
        assert watch.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), epoch
    assert watch.lr == 1e-3


def test_early_stopping_counts_epochs_without_a_real_improvement():
    rule = Rule("loss", patience=2, min_delta=0.1)
    watch = Watch(0.1)
    seen = []
    for epoch, loss in enumerate([1.0, 0.95, 0.8, 0.79, 0.75], 1):
        seen.append((watch.update(rule, {"loss": loss}, epoch), watch.stopped))
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (watch.best, watch.epoch) == (0.8, 3)


def test_larger_is_better_but_for_losses_and_ranks():
    for metric, values, best in (("accuracy", [0.2, 0.5, 0.4], 2), ("median_rank", [9.0, 3.0, 4.0], 2)):
        watch = Watch(0.1)
        for epoch, value in enumerate(values, 1):
            watch.update(Rule(metric), {"loss": 1.0, metric: value}, epoch)
        assert watch.epoch == best


def test_without_a_metric_the_last_epoch_counts():
    watch = Watch(0.1)
    assert [watch.update(Rule("none", patience=1), {"loss": float(epoch)}, epoch) for epoch in (1, 2, 3)] == [True] * 3


def test_the_order_of_a_seed_is_its_own():
    both, alone = shuffled(9, [3, 4], 2), shuffled(9, [4], 2)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(alone, shuffled(9, [4], 3))
