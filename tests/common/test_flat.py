"""K seeds in one tensor: the same training as K plain modules with PyTorch's own optimiser and clipping."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.flat import Flat, places, set_lrs
from common.optim import load_state_tensors, state_tensors
from model.fusion import Linear, Norm

K, LR, DECAY, CLIP = 3, 3e-2, 0.3, 2.0


class Net(nn.Module):
    """K small networks side by side; vectors are declared between the matrices."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(K, 5))
        self.first, self.norm, self.last = Linear(K, 4, 5), Norm(K, 5), Linear(K, 5, 2)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, x):
        return self.last(self.norm(self.first(x).tanh() * self.scale[:, None]))


class Plain(nn.Module):
    """The network of seed k with PyTorch's own layers."""

    def __init__(self, net, k):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)
        self.scale = nn.Parameter(net.scale[k].detach().clone())
        pairs = {"first.weight": net.first.weight, "first.bias": net.first.bias[:, 0], "norm.weight": net.norm.scale,
                 "norm.bias": net.norm.bias, "last.weight": net.last.weight, "last.bias": net.last.bias[:, 0],
                 "scale": net.scale}  # fmt: skip
        self.load_state_dict({name: p[k].detach().clone() for name, p in pairs.items()})

    def forward(self, x):
        return self.last(self.norm(self.first(x).tanh() * self.scale))


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(K, 6, 4, generator=generator), torch.randn(K, 6, 2, generator=generator)
    return x, y * torch.tensor([0.1, 1.0, 10.0])[:, None, None]  # some seeds are clipped, some not


def train(net, flat, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        flat.backward(F.mse_loss(net(x), y, reduction="none").mean((1, 2)))
        flat.clip(CLIP)
        optimizer.step()


def plain_run(module, k, steps, lrs):
    """n steps of AdamW with decayed matrices, and how many of them were clipped."""
    matrices = [p for p in module.parameters() if p.ndim == 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    clipped = 0
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.mse_loss(module(x[k]), y[k]).backward()
        clipped += bool(nn.utils.clip_grad_norm_(module.parameters(), CLIP) > CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        optimizer.step()
    return clipped


def test_training_is_that_of_plain_modules():
    net = Net()
    alone = [Plain(net, k) for k in range(K)]
    flat = Flat(net)
    optimizer = flat.adamw(LR, DECAY)
    rates = [LR / (1 + step) for step in range(8)]
    for step in range(8):
        set_lrs(optimizer, [rates[step] * (k + 1) for k in range(K)])
        train(net, flat, optimizer, [step])
    clipped = [plain_run(module, k, range(8), [r * (k + 1) for r in rates]) for k, module in enumerate(alone)]
    assert 0 < sum(clipped) < 8 * K  # both kinds of step happened
    now = [Plain(net, k) for k in range(K)]  # of the trained weights
    for k in range(K):
        for (name, p), other in zip(alone[k].named_parameters(), now[k].parameters(), strict=True):
            torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_matrices_decay_and_nothing_else():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    flat = Flat(net)
    flat.adamw(LR, DECAY).step()  # gradients of zero: only decay moves anything
    for name, p in net.named_parameters():
        factor = 1 - LR * DECAY if name in ("first.weight", "last.weight") else 1.0
        torch.testing.assert_close(p, before[name] * factor, rtol=1e-6, atol=0)


def test_values_and_gradients_are_views():
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    x, y = batch(0)
    expected = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    flat = Flat(net)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    size = sum(p[0].numel() for p in net.parameters())
    assert flat.values.shape == flat.grads.shape == (K, size)
    assert flat.parts["decayed_0"].numel() == 4 * 5 + 5 * 2
    for _ in range(2):  # the second in place of the first
        flat.backward(F.mse_loss(net(x), y))
        for p, grad in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
    flat.grads.mul_(2)  # what changes there is what the parameters see
    for p, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    kept = flat.values.clone()
    flat.values.zero_()
    assert not any(p.any() for p in net.parameters())
    flat.values.copy_(kept)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    flat.backward(net.last(net.first(x)).square().sum())  # what had no part in the loss has a gradient of zero
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == ["scale", "norm.scale", "norm.bias"]


def test_gradients_of_weights_are_written_in_place(monkeypatch):
    net = Net()
    flat = Flat(net)
    found = {}
    grad_of = torch.autograd.grad

    def grad(loss, parameters, **options):
        grads = grad_of(loss, parameters, **options)
        found.update({id(p): g.data_ptr() for p, g in zip(parameters, grads, strict=True)})
        return grads

    monkeypatch.setattr(torch.autograd, "grad", grad)
    x, y = batch(0)
    flat.backward(F.mse_loss(net(x), y))
    placed = {name for name, p in net.named_parameters() if found[id(p)] == p.grad.data_ptr()}
    assert placed == {"first.weight", "last.weight"}
    assert not places


def test_a_weight_used_twice_has_the_sum_of_both_gradients():
    torch.manual_seed(0)
    net = nn.ModuleDict({"same": Linear(K, 4, 4)})
    nn.init.normal_(net["same"].weight)
    x = torch.randn(K, 6, 4)
    flat = Flat(net)
    flat.backward(net["same"](net["same"](x).tanh()).square().mean((1, 2)))
    weight, bias = (p.detach().double().requires_grad_() for p in net.parameters())
    h = (x.double() @ weight.mT + bias).tanh() @ weight.mT + bias
    expected = torch.autograd.grad(h.square().mean((1, 2)).sum(), [weight, bias])
    for p, each in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.double(), each, rtol=1e-5, atol=1e-7)


def test_an_error_on_the_way_back_leaves_no_places():
    net = Net()
    flat = Flat(net)
    loss = net(batch(0)[0]).square().sum()
    flat.backward(loss)
    with pytest.raises(RuntimeError, match="a second time"):
        flat.backward(loss)
    assert not places


def test_the_step_is_that_of_torchs_optimiser():
    net = Net()
    flat = Flat(net)
    optimizer = flat.adamw(LR, DECAY)
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in flat.parts.items()}
    groups = [{"params": [p], "weight_decay": DECAY * name.startswith("decayed")} for name, p in theirs.items()]
    other = torch.optim.AdamW(groups, lr=LR, fused=True)
    for step in range(4):
        rates = [LR / (1 + step), LR, LR * (step != 2)]
        set_lrs(optimizer, rates)
        set_lrs(other, rates)
        x, y = batch(step)
        flat.backward(F.mse_loss(net(x), y, reduction="none").mean((1, 2)))
        for name, p in theirs.items():
            p.grad = flat.parts[name].grad.clone()
        optimizer.step()
        other.step()
        for name, p in theirs.items():
            assert torch.equal(p, flat.parts[name]), (step, name)
    for name, value in state_tensors(nn.ParameterDict(theirs), other).items():
        assert torch.equal(value, state_tensors(flat.parts, optimizer)[name]), name


@pytest.mark.parametrize("most", [0.0, 0.4])
def test_each_seed_is_clipped_alone(most):
    net = Net()
    flat = Flat(net)
    flat.grads[0, 0], flat.grads[1, :4], flat.grads[2, 3] = 0.3, 0.3, -8.0
    before = flat.grads.clone()
    norms = flat.clip(most)
    assert norms.tolist() == pytest.approx([0.3, 0.6, 8.0])
    for k, norm in enumerate(norms.tolist()):
        factor = most / norm if 0 < most < norm else 1.0
        torch.testing.assert_close(flat.grads[k], before[k] * factor, rtol=1e-5, atol=0)


def test_a_rate_of_zero_freezes_one_seed():
    net = Net()
    flat = Flat(net)
    optimizer = flat.adamw(LR, DECAY)
    train(net, flat, optimizer, range(2))
    before = flat.values.clone()
    set_lrs(optimizer, [LR, 0.0, LR])
    train(net, flat, optimizer, range(2, 5))
    assert torch.equal(flat.values[1], before[1])
    assert (flat.values[0] != before[0]).all()
    assert (flat.values[2] != before[2]).all()


def test_a_resumed_optimizer_goes_on_bit_for_bit():
    net = Net()
    flat = Flat(net)
    optimizer = flat.adamw(LR, DECAY)
    train(net, flat, optimizer, range(3))
    tensors = {name: value.clone() for name, value in state_tensors(flat.parts, optimizer).items()}
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, flat, optimizer, range(3, 6))

    other = Net()
    for name, p in other.named_parameters():
        p.data.copy_(weights[name])
    again = Flat(other)
    restarted = again.adamw(LR, DECAY)
    load_state_tensors(again.parts, restarted, copy.deepcopy(tensors))
    assert all(int(tensors[f"step.{name}"]) == 3 for name in again.parts)
    train(other, again, restarted, range(3, 6))
    assert torch.equal(again.values, flat.values)

    cold = Net()
    for name, p in cold.named_parameters():
        p.data.copy_(weights[name])
    forgetful = Flat(cold)
    train(cold, forgetful, forgetful.adamw(LR, DECAY), range(3, 6))
    assert not torch.equal(forgetful.values, flat.values)  # the moments matter
    assert flat.values.isfinite().all()
