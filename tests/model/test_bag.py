"""Bags of hashed n-grams: the formula written out, seeds side by side, padding, and the same gradient twice."""

import torch

from model.bag import LIFT, POWER, Bag
from model.seeds import start

BUCKETS, DIM = 50, 6


def build(k=1, seed=0):
    """A float64 bag of k seeds whose weights and n-gram frequencies are random."""
    bag = Bag(k, BUCKETS, DIM)
    start(bag, range(seed, seed + k))
    bag.bias.data += torch.arange(DIM)
    bag.set_texts(torch.randint(0, 200, (BUCKETS,), generator=torch.Generator().manual_seed(9)))
    return bag.double()


def texts(k=1, b=5, longest=12):
    """Ids (k, b, longest) and where they are; the first text has none, and some n-grams come twice."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, BUCKETS, (k, b, longest), generator=generator)
    ids[:, :, 1] = ids[:, :, 0]
    length = torch.randint(2, longest + 1, (k, b, 1), generator=generator)
    length[:, 0] = 0
    return ids, torch.arange(longest) < length


def test_weighted_counts_times_the_table():
    bag, (ids, mask) = build(), texts()
    frequency = torch.randint(0, 200, (BUCKETS,), generator=torch.Generator().manual_seed(9)).double()
    counts = torch.zeros(5, BUCKETS, dtype=torch.float64)
    for row, (text, there) in enumerate(zip(ids[0], mask[0], strict=True)):
        for gram in text[there]:
            counts[row, gram] += 1
    scaled = counts / counts.sum(1, keepdim=True).clamp_min(1) ** POWER
    expected = (scaled * (frequency.clamp_min(1) / 50) ** LIFT) @ bag.table[0] + bag.bias[0]
    torch.testing.assert_close(bag(ids, mask)[0], expected, rtol=1e-6, atol=1e-8)  # the buffer was float32


def test_seeds_side_by_side_are_single_models():
    many, (ids, mask) = build(3), texts(3)
    for i in range(3):
        alone = build(1, seed=i)
        torch.testing.assert_close(alone(ids[i : i + 1], mask[i : i + 1])[0], many(ids, mask)[i])


def test_padding_and_its_ids_do_not_matter():
    bag, (ids, mask) = build(2), texts(2)
    padded = torch.nn.functional.pad(ids.masked_fill(~mask, 7), (0, 4), value=11)
    torch.testing.assert_close(bag(padded, torch.nn.functional.pad(mask, (0, 4))), bag(ids, mask))


def test_a_text_without_words_is_the_bias():
    bag, (ids, mask) = build(2), texts(2)
    assert torch.equal(bag(ids, mask)[:, :1], bag.bias)
    nothing = torch.empty(2, 3, 0, dtype=torch.int64)
    assert torch.equal(bag(nothing, nothing.bool()), bag.bias.expand(-1, 3, -1))


def test_a_rare_n_gram_weighs_less():
    bag = build()
    bag.set_texts(torch.arange(BUCKETS))
    assert bag.weight[0] == bag.weight[1] < bag.weight[2] < bag.weight[49]


def test_gradients_are_the_same_twice_and_reach_only_what_was_read():
    bag, (ids, mask) = build(2), texts(2)
    grads = []
    for _ in range(2):
        bag.zero_grad()
        bag(ids, mask).square().sum().backward()
        assert bag.table.grad is not None
        grads.append(bag.table.grad.clone())
    assert torch.equal(*grads)
    for i in range(2):
        read = torch.zeros(BUCKETS, dtype=torch.bool)
        read[ids[i][mask[i]]] = True
        assert torch.equal(grads[0][i].abs().sum(-1) > 0, read)


def test_evenly_counts_grow_by_their_logarithm_and_rare_n_grams_weigh_the_same():
    bag, (ids, mask) = build(), texts()
    bag.evenly()
    bag.set_texts(torch.arange(BUCKETS))
    assert bool((bag.weight == 1).all())
    expected = bag.bias[0].expand(5, -1).clone()
    for row, (text, there) in enumerate(zip(ids[0], mask[0], strict=True)):
        grams, times = text[there].unique(return_counts=True)
        scale = max(int(there.sum()), 1) ** -POWER
        expected[row] += ((1 + times.double().log()) * scale) @ bag.table[0, grams]
    torch.testing.assert_close(bag(ids, mask)[0], expected, rtol=1e-6, atol=1e-8)  # weights were float32
