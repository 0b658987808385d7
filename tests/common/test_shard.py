"""Sharded parameters against the module they were cut from, and their files against torch's own reader."""

import copy
import json
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from common import dist, optim, shard
from common.config import UserError

WIDTH = 5  # divides by no number of ranks here


class Layer(nn.Module):
    """A trained linear and a frozen one; remembers the dtypes that it computed with."""

    def __init__(self):
        super().__init__()
        self.trained, self.frozen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("scale", torch.full((2,), 0.5))
        self.seen = []

    def forward(self, x):
        self.seen = [self.trained.weight.dtype, self.frozen.weight.dtype, self.scale.shape]
        return x + self.frozen(torch.tanh(self.trained(x))) * self.scale.sum()


class Net(nn.Module):
    """Two layers below a head of one output, whose rows most ranks have none of."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.head.weight, self.head.bias).square().sum()

    def total(self, x):
        return float(self(x).detach())


def make(sharded=True, here=None, how="full", dtype=torch.float32):
    torch.manual_seed(0)
    net = Net()
    for layer in net.layers:
        layer.frozen.weight.data = layer.frozen.weight.data.T.contiguous().T  # as model/llm.py lays wide matrices
        layer.frozen.to(dtype)
    if sharded:
        shard.shard(net, net.layers, here, dtype, how == "full", entrances=("total",))
    return net, optim.build(net, optim.OptimConfig(lr=0.1))


def rows(n=12):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1))


def step(net, optimizer, batches, world, clip):
    """One optimiser step as train_llm.py takes it; its loss and gradient norm."""
    total = 0.0
    for batch in batches:
        loss = net(batch)
        (loss * world / 12).backward()
        total += float(loss.detach())
    norm = optim.grad_norm(optimizer, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def three_steps(how, folder):
    """Each rank's losses, gradient norms, whole weights; half of its rows come in a second micro-batch."""
    here = dist.ranks("cpu")
    dist.connect(here, sharded=True)
    net, optimizer = make(True, here, how)
    mine = rows().chunk(here.world)[here.rank]
    found = [step(net, optimizer, mine.chunk(2), here.world, 0.1) for _ in range(3)]
    asked = net.total(rows())
    gathered = [not shard.is_sharded(layer.trained.weight) for layer in net.layers]
    shard.release(net)
    assert all(map(shard.is_sharded, net.parameters()))
    held = sum(p.to_local().numel() for p in net.parameters())
    states = optim.state_tensors(net, optimizer)
    shard.write(folder / how, {**dict(net.named_parameters()), **dict(net.named_buffers()), **states})
    weights = {name: shard.whole(tensor.detach()) for name, tensor in [*net.named_parameters(), *states.items()]}
    return found, asked, gathered, held, weights


def read_again(like, folder):
    """Tensors of these shapes as torch.distributed.checkpoint reads them."""
    tensors = {name: torch.empty_like(value) for name, value in like.items()}
    reader = torch.distributed.checkpoint.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs alone
        torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize(("world", "how"), [(1, "full"), (2, "full"), (2, "grads"), (4, "full")])
def test_sharded_training_is_training(ranks, tmp_path, world, how):
    net, optimizer = make(False)
    expected = [step(net, optimizer, [rows()], 1, 0.1) for _ in range(3)]
    whole = {name: tensor.detach() for name, tensor in net.named_parameters()} | optim.state_tensors(net, optimizer)
    results = ranks(world, three_steps, how, tmp_path)
    assert sum(held for *_, held, _ in results) == sum(p.numel() for p in net.parameters())  # nothing is held twice
    for i in range(3):
        assert sum(found[i][0] for found, *_ in results) == pytest.approx(expected[i][0], abs=1e-5)
    for found, asked, gathered, _, weights in results:
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], abs=1e-5)
        assert asked == pytest.approx(net.total(rows()), abs=1e-5)
        assert gathered == [how == "grads"] * 2
        for name, value in whole.items():
            torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=1e-6)

    # the files: rows apart, read by any process, the same to torch's own reader
    parts = shard.Parts(tmp_path / how)
    assert {path.suffix for path in (tmp_path / how).iterdir()} == {".safetensors"}
    assert len(list((tmp_path / how).iterdir())) == world
    buffers = dict(net.named_buffers())
    assert set(parts) == {*whole, *buffers}
    assert parts.shapes == {name: tuple(value.shape) for name, value in (whole | buffers).items()}
    [again] = ranks(1, read_again, {**whole, **buffers}, tmp_path / how)
    for name in whole:
        assert torch.equal(parts[name], results[0][-1][name]), name
        assert torch.equal(again[name], parts[name]), name


def in_half_precision():
    here = dist.ranks("cpu")
    dist.connect(here, sharded=True)
    net, optimizer = make(True, here, "full", torch.bfloat16)
    held = {(p.dtype, p.requires_grad) for p in net.parameters()}
    mine = rows().chunk(here.world)[here.rank]
    with torch.autocast("cpu", torch.bfloat16):
        net(mine).mul(here.world / 12).backward()
    grads = [shard.whole(p.grad) for group in optimizer.param_groups for p in group["params"]]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        asked = net.total(rows())
    return held, [layer.seen for layer in net.layers], grads, asked


def test_layers_compute_in_half_precision_over_float32_weights(ranks):
    """bf16 carries 8 bits; gradients are those of autocast over float32 weights, without its copies."""
    net, optimizer = make(False, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        net(rows()).mul(1 / 12).backward()
        expected = net.total(rows())
    reference = [p.grad for group in optimizer.param_groups for p in group["params"]]
    for held, seen, grads, asked in ranks(2, in_half_precision):
        assert held == {(torch.float32, True), (torch.bfloat16, False)}
        assert seen == [[torch.bfloat16, torch.bfloat16, (2,)]] * 2
        assert asked == pytest.approx(expected, rel=0.02)
        for gradient, value in zip(grads, reference, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - value).norm() < 0.02 * value.norm()


def loaded(folder):
    """Weights and optimiser state that this many ranks read, put together again."""
    here = dist.ranks("cpu")
    dist.connect(here, sharded=True)
    net, optimizer = make(True, here)
    parts = shard.Parts(folder)
    for name, parameter in net.named_parameters():
        shard.fill(parameter, parts[name])
    known = {name: parts[name] for name in parts if name.partition(".")[0] in ("step", "exp_avg", "exp_avg_sq")}
    optim.load_state_tensors(net, optimizer, known)
    states = optim.state_tensors(net, optimizer)
    kinds = {name.partition(".")[0]: shard.is_sharded(value) for name, value in states.items()}
    return kinds, {name: shard.whole(value.detach()) for name, value in [*net.named_parameters(), *states.items()]}


def test_rows_are_dealt_out_again_for_another_number_of_ranks(ranks, tmp_path):
    *_, saved = ranks(2, three_steps, "full", tmp_path)[0]
    for world in (1, 3):
        for kinds, found in ranks(world, loaded, tmp_path / "full"):
            assert kinds == {"step": False, "exp_avg": True, "exp_avg_sq": True}
            assert all(torch.equal(found[name], saved[name]) for name in saved)
            assert len(found) == len(saved)


def written(folder, limit):
    shard.FILE = limit
    here = dist.ranks("cpu")
    dist.connect(here, sharded=True)
    shard.write(folder, {f"t{i}": torch.full((4,), float(i)) for i in range(6)})


def test_a_file_holds_so_many_bytes(ranks, tmp_path):
    ranks(1, written, tmp_path, 32)
    assert len(list(tmp_path.iterdir())) == 3
    assert {name: int(value[0]) for name, value in shard.Parts(tmp_path).items()} == {f"t{i}": i for i in range(6)}


def part(path, info, **tensors):
    save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(info)} if info is not None else None)


def test_parts_that_do_not_fit_together(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    part(second, {"x": {"saved_offsets": [2, 0]}}, x=torch.ones(2, 3))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: rows 0 to 2 of x are missing")):
        shard.Parts(tmp_path)
    part(first, {"x": {"saved_offsets": [0, 0]}}, x=torch.zeros(2, 3))
    assert shard.Parts(tmp_path)["x"].sum(1).tolist() == [0, 0, 3, 3]
    for info in (None, {}, {"x": {}}, {"x": {"saved_offsets": 3}}):
        part(first, info, x=torch.zeros(2, 3))
        with pytest.raises(UserError, match=re.escape(f"{first}: does not say which rows it holds")):
            shard.Parts(tmp_path)
    first.write_bytes(second.read_bytes()[:20])
    with pytest.raises(UserError, match=re.escape(f"{first}: not a readable safetensors file")):
        shard.Parts(tmp_path)


def test_what_is_not_sharded_stays_as_it_is():
    net, _ = make(False)
    before = copy.deepcopy(net.state_dict())
    shard.release(net)
    assert shard.place(net) == torch.device("cpu")
    assert not any(map(shard.is_sharded, net.parameters()))
    head = net.head.weight
    assert shard.whole(head) is head
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    twin = shard.like(before["head.weight"], head)
    assert torch.equal(twin, head)
    assert twin.data_ptr() != before["head.weight"].data_ptr()
    shard.fill(head, torch.zeros_like(head))
    assert head.abs().max() == 0
