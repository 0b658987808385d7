"""Previous utterances: the sum written out, absent ones, and seeds side by side."""

import torch
from torch.nn import functional as F

from model.dialogue import Turns

K, B, REACH, CLASSES = 2, 4, 3, 5


def build(k=K):
    turns = Turns(k, CLASSES, REACH).double().eval()
    turns.maps.data.normal_(generator=torch.Generator().manual_seed(1))
    return turns


def batch():
    """Logits, previous logits, where there are any (the first row has none), and whose they are."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(K, B, CLASSES, generator=generator, dtype=torch.float64)
    previous = torch.randn(K, B, REACH, CLASSES, generator=generator, dtype=torch.float64)
    mask = torch.arange(REACH) < torch.tensor([0, 1, 2, 3])[:, None]
    return logits, previous, mask.expand(K, -1, -1), torch.rand(K, B, REACH, generator=generator) < 0.5


def test_each_previous_utterance_adds_its_map():
    turns, (logits, previous, mask, same) = build(), batch()
    out = turns(logits, previous, mask, same)
    for k in range(K):
        for b in range(B):
            expected = logits[k, b].clone()
            for p in range(REACH):
                if mask[k, b, p]:
                    table = turns.maps[k, p, int(same[k, b, p])]
                    expected += previous[k, b, p].softmax(0) @ table[:-1] + table[-1]
            torch.testing.assert_close(out[k, b], expected)


def test_what_is_not_there_does_not_matter():
    turns, (logits, previous, mask, same) = build(), batch()
    other = torch.where(mask[..., None], previous, 100.0)
    assert torch.equal(turns(logits, previous, mask, same), turns(logits, other, mask, same | ~mask))
    assert torch.equal(turns(logits, previous, mask, same)[:, 0], logits[:, 0])


def test_seeds_do_not_mix_and_previous_utterances_are_not_trained_through():
    turns, (logits, previous, mask, same) = build(), batch()
    previous.requires_grad_()
    logits.requires_grad_()
    F.cross_entropy(turns(logits, previous, mask, same)[0], torch.zeros(B, dtype=torch.int64)).backward()
    assert previous.grad is None
    assert turns.maps.grad is not None
    assert turns.maps.grad[0].any()
    assert not turns.maps.grad[1].any()


def test_training_leaves_them_out_of_half_of_the_utterances():
    turns = build(1).train()
    torch.manual_seed(3)
    n = 400
    logits, previous = torch.zeros(1, n, CLASSES).double(), torch.randn(1, n, REACH, CLASSES).double()
    there = torch.ones(1, n, REACH, dtype=torch.bool)
    moved = (turns(logits, previous, there, there) != 0).any(-1)
    assert 0.4 < moved.double().mean() < 0.6
