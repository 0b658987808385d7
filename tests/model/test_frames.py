"""Learned pooling of frames: what must not change a clip's vector, and what training may change in a clip."""

import pytest
import torch

from model import frames
from model.frames import FramePool, augment
from model.seeds import start

LENGTHS = (1, 2, 37, 64, 101)


def build(seeds=(5,), dim=64, **kwargs):
    """A pool in eval mode whose scales and biases are not those that it starts with."""
    pool = FramePool(len(seeds), dim, **kwargs)
    start(pool, seeds)
    with torch.no_grad():
        for i, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed + 1000)
            for p in pool.parameters():
                p[i] += 0.1 * torch.randn(p[i].shape, generator=generator)
    return pool.eval()


def clips(k=1, dim=64, lengths=LENGTHS, seed=0):
    """Ragged frames (K, B, T, D) and their mask (K, B, T); padding is zeros."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).expand(k, -1, -1)
    return torch.randn(k, len(lengths), max(lengths), dim, generator=generator) * mask[..., None], mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 13, 1])
def test_a_clip_alone_is_as_in_any_batch(dim):
    pool = build(dim=dim)
    x, mask = clips(dim=dim)
    together = pool(x, mask)
    assert together.shape == (1, len(LENGTHS), pool.out_dim)
    for i, n in enumerate(LENGTHS):
        close(pool(x[:, i : i + 1, :n], mask[:, i : i + 1, :n]), together[:, i : i + 1])
    longer = torch.nn.functional.pad(x, (0, 0, 0, 31)), torch.nn.functional.pad(mask, (0, 31))
    close(pool(*longer), together)


def test_what_is_masked_does_not_count():
    pool = build()
    x, mask = clips()
    close(pool(torch.where(mask[..., None], x, 7.0), mask), pool(x, mask))
    mask = mask.clone()
    mask[:, -1, 20:23] = False  # lost inside
    other = torch.where(mask[..., None], x, -3.0)
    close(pool(other, mask), pool(x * mask[..., None], mask))


def test_a_clip_without_frames_is_finite_in_both_modes():
    pool = build()
    x, mask = torch.zeros(1, 2, 9, 64), torch.zeros(1, 2, 9, dtype=torch.bool)
    for training in (False, True):
        out = pool.train(training)(x, mask)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in pool.parameters())


def test_seeds_together_are_as_each_alone():
    seeds = (5, 7, 42)
    x, mask = clips(k=3)
    x = x * torch.tensor([1.0, 0.5, 2.0])[:, None, None, None]
    together = build(seeds)(x, mask)
    for i, seed in enumerate(seeds):
        close(build((seed,))(x[i : i + 1], mask[i : i + 1]), together[i : i + 1])
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_every_weight_learns_and_seeds_do_not_touch_each_other():
    pool = build((1, 2)).train()
    x, mask = clips(k=2)
    pool(x, mask)[0].square().sum().backward()
    for name, p in pool.named_parameters():
        assert p.grad[0].abs().max() > 0, name
        assert not p.grad[1].any(), name


def test_it_learns_which_way_the_pitch_goes():
    torch.manual_seed(0)
    pool, head = build(channels=(4, 8, 8)).train(), torch.nn.Linear(FramePool(1, 64, (4, 8, 8)).out_dim, 2)
    time, band = torch.arange(60), torch.arange(64)
    height = torch.stack([20 + 0.4 * time, 44 - 0.4 * time])  # the same places, in the other order
    x = torch.exp(-0.1 * (band - height[..., None]).square()).repeat(8, 1, 1)[None]
    y, mask = torch.arange(2).repeat(8), torch.ones(1, 16, 60, dtype=torch.bool)
    optimizer = torch.optim.AdamW([*pool.parameters(), *head.parameters()], 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(pool(x, mask)[0]), y).backward()
        optimizer.step()
    assert (head(pool.eval()(x, mask)[0]).argmax(-1) == y).all()


def test_augmentation_is_for_training_only():
    pool = build()
    x, mask = clips()
    close(pool(x, mask), pool(x, mask))
    pool.train()
    assert not torch.allclose(pool(x, mask), pool(x, mask), atol=1e-2)


def test_augment_keeps_clips_within_their_frames():
    torch.manual_seed(0)
    before, inside = clips(k=2, lengths=(1, 40, 300, 600))
    kept = before.clone()
    x, mask = augment(before, inside)
    assert torch.equal(before, kept)
    assert x.shape == (2, 4, frames.CROP, 64)
    assert mask.shape == x.shape[:3]
    assert not x[~mask].any()
    n = mask.sum(-1)
    assert (n[:, 0] == 1).all()
    assert ((n[:, 1] >= 40 / 1.2) & (n[:, 1] <= 40 * 1.2)).all()
    assert (n[:, 3] == frames.CROP).all()
    assert (mask.int().diff(dim=-1) <= 0).all()  # padding comes last


def test_augment_without_change_is_the_clip(monkeypatch):
    for name in ("SPEED", "SHIFT", "GAIN", "TIMES", "BANDS"):
        monkeypatch.setattr(frames, name, 0.0)
    x, mask = clips()
    new, seen = augment(x, mask)
    assert torch.equal(seen, mask)
    close(new, x)
