import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common import optim
from common.config import UserError
from common.optim import OptimConfig, lr_at
from model.mamba import MambaConfig, Mixer

ROOT = Path(__file__).parents[2]
TOTAL = 30_000  # 30 epochs of 1000 steps
STAGE1 = OptimConfig(lr=1e-5, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=1000)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-6), (500, 5.5e-6), (1000, 9.97535e-6), (10_000, 7.75e-6), (15_000, 5.5e-6), (29_999, 1.0000000e-6)],
)
def test_rate_of_stage_1(step, expected):
    assert lr_at(step, TOTAL, STAGE1) == pytest.approx(expected, rel=1e-6)


def test_rate_of_stage_2_is_constant():
    cfg = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=1000)
    assert {lr_at(step, TOTAL, cfg) for step in range(0, TOTAL, 250)} == {1e-6}


def test_a_line_from_step_0_on():
    cfg = OptimConfig(lr=4e-4, min_lr=1e-4, warmup_lr=0.0, warmup_steps=10, schedule="linear_warmup_linear")
    assert [lr_at(step, 100, cfg) for step in (5, 10, 50, 100)] == pytest.approx([2e-4, 3.7e-4, 2.5e-4, 1e-4])


def transformers_rates(schedule, steps, lr, **more):
    """Learning rates of transformers' scheduler of that name at each step."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(schedule, optimizer, **more)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warm", [0, 1, 7, 97])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_schedules_of_transformers_step_by_step(schedule, warm):
    """Its names with nothing else said: from 0 to lr, down to 0 at the last step, and no further."""
    cfg = OptimConfig(lr=2e-5, warmup_steps=warm, schedule=schedule)
    steps = {} if schedule == "constant" else {"num_warmup_steps": warm}
    steps |= {"num_training_steps": 97} if schedule in ("cosine", "linear") else {}
    expected = transformers_rates(schedule, 97, 2e-5, **steps)
    assert [lr_at(step, 97, cfg) for step in range(97)] == pytest.approx(expected, rel=1e-12, abs=1e-20)
    assert lr_at(120, 97, cfg) == (2e-5 if "constant" in schedule else 0.0)


def test_a_cosine_to_a_rate_above_0_is_transformers():
    cfg = OptimConfig(lr=2e-5, min_lr=3e-6, warmup_steps=9, schedule="cosine")
    more = {"num_warmup_steps": 9, "num_training_steps": 80, "scheduler_specific_kwargs": {"min_lr": 3e-6}}
    expected = transformers_rates("cosine_with_min_lr", 80, 2e-5, **more)
    assert [lr_at(step, 80, cfg) for step in range(80)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("ratio", "total"), [(0.03, 100), (0.03, 101), (0.1, 7), (0.5, 1), (1.0, 12)])
def test_the_warm_ups_share_of_the_steps_is_rounded_up(ratio, total):
    warm = math.ceil(ratio * total)
    expected = transformers_rates("cosine", total, 1e-3, num_training_steps=total, num_warmup_steps=warm)
    for steps in (None, 0):
        cfg = OptimConfig(lr=1e-3, warmup_steps=steps, warmup_ratio=ratio, schedule="cosine")
        assert [lr_at(step, total, cfg) for step in range(total)] == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_the_warm_up_where_nothing_is_said_of_it():
    lengths = {schedule: optim.warmup(5000, OptimConfig(schedule=schedule)) for schedule in optim.SCHEDULES}
    assert lengths == dict.fromkeys(optim.SCHEDULES, 0) | dict.fromkeys(optim.FROM_START, 1000)


def test_a_warm_up_given_in_two_ways():
    cfg = OptimConfig(warmup_steps=3, warmup_ratio=0.03)
    assert optim.warmup(100, cfg) == 3
    with pytest.raises(UserError) as error:
        optim.warmup(101, cfg)
    assert str(error.value) == (
        "--warmup-steps 3 and --warmup-ratio 0.03, which makes 4 of 101 steps: give one of them "
        "(--warmup-steps 0 leaves it to the ratio)"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"warmup_ratio": 1.5}, "--warmup-ratio: 1.5 is no share of the steps (0 to 1)"),
        ({"warmup_ratio": -0.1}, "--warmup-ratio: -0.1 is no share of the steps (0 to 1)"),
        ({"mm_projector_lr": -1.0}, "--mm-projector-lr -1: needs to be 0 or more, and --lr to be above 0"),
        ({"mm_projector_lr": 1.0, "lr": 0.0}, "--mm-projector-lr 1: needs to be 0 or more, and --lr to be above 0"),
        ({"lr_stages": {"5": 1e-5}}, "--optim.lr-stages: begins at epoch 5, not at 0"),
    ],
)
def test_rates_that_cannot_be(values, reason):
    with pytest.raises(UserError) as error:
        optim.check(OptimConfig(**values))
    assert str(error.value) == reason


@pytest.mark.parametrize("schedule", ["linear", "linear_warmup_linear", "linear_warmup_cosine", "cosine"])
def test_rate_stays_at_its_end_after_the_last_step(schedule):
    cfg = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=0, schedule=schedule)
    assert [lr_at(step, 100, cfg) for step in (100, 150)] == pytest.approx([1e-5, 1e-5])


def test_warm_up_edges():
    cfg = OptimConfig(lr=1e-3, warmup_lr=-1.0, warmup_steps=10, schedule="constant_with_warmup")
    assert [lr_at(step, 100, cfg) for step in (0, 9, 10)] == [1e-3] * 3  # below 0 means lr
    cfg = OptimConfig(lr=1e-3, warmup_lr=1e-2, warmup_steps=10, schedule="constant_with_warmup")
    assert lr_at(0, 100, cfg) == 1e-3  # never above lr
    assert lr_at(0, 100, OptimConfig(lr=1e-3, warmup_steps=0)) == 1e-3


def test_stages_replace_the_schedule_after_the_warm_up():
    """The guide's sub-stages of stage 2: 1e-5 in epochs 0 to 14, 5e-6 from epoch 15 on."""
    cfg = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=1000, lr_stages={"15": 5e-6, "0": 1e-5})
    steps = (0, 500, 1000, 7000, 14_999, 15_000, 29_999)
    expected = [1e-6, 5.5e-6, 1e-5, 1e-5, 1e-5, 5e-6, 5e-6]
    assert [lr_at(step, TOTAL, cfg, 1000) for step in steps] == pytest.approx(expected)
    assert optim.stages(cfg) == [(0, 1e-5), (15, 5e-6)]
    backwards = [lr_at(step, TOTAL, cfg, 1000) for step in reversed(steps)]  # of the step alone
    assert backwards == [lr_at(step, TOTAL, cfg, 1000) for step in steps][::-1]
    cfg.warmup_lr, cfg.warmup_steps = -1.0, 10
    assert lr_at(0, TOTAL, cfg, 1000) == 1e-5
    cfg.warmup_lr, cfg.schedule = 0.0, "constant"  # of which only the rates are replaced
    assert lr_at(5, TOTAL, cfg, 1000) == 5e-6


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ({"5": 1e-5}, "begins at epoch 5, not at 0"),
        ({"0": 1e-5, "x": 1e-6}, "'x' is no epoch"),
        ({"0": 1e-5, "-3": 1e-6}, "'-3' is no epoch"),
        ({"0": -1e-5}, "-1e-05 from epoch 0 is no learning rate"),
        ({"0": math.nan}, "nan from epoch 0 is no learning rate"),
    ],
)
def test_stages_that_are_none(stages, reason):
    with pytest.raises(UserError) as error:
        optim.stages(OptimConfig(lr_stages=stages))
    assert str(error.value) == f"--optim.lr-stages: {reason}"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3)
        self.ln_post = nn.Linear(3, 3, bias=False)  # a matrix, but of something that calls itself a norm
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return (self.frozen(self.ln_post(self.proj(x))) * self.scale).square().mean()


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def test_decay_groups():
    module = net()
    optimizer = optim.build(module, OptimConfig(lr=3e-4, weight_decay=0.07, beta2=0.95))
    names = {id(p): name for name, p in module.named_parameters()}
    groups = [([names[id(p)] for p in group["params"]], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(["unused", "proj.weight"], 0.07), (["scale", "proj.bias", "ln_post.weight"], 0.0)]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (3e-4, (0.9, 0.95), 1e-8, True)
    optim.set_lr(optimizer, 1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-5]
    assert len(optim.build(nn.Linear(2, 2, bias=False), OptimConfig()).param_groups) == 1


class Joined(nn.Module):
    """A decoder, a connector and a layer of a Mamba, by the names that they have in an Mllm."""

    def __init__(self):
        super().__init__()
        self.llm = nn.Linear(4, 4)
        self.projections = nn.ModuleDict({"video": nn.Linear(4, 4), "history": Mixer(MambaConfig(8, 4, 1, 2, 4, 1))})

    def forward(self, x):
        return self.projections["history"](self.projections["video"](self.llm(x))[None]).square().mean()


def test_connectors_have_a_rate_of_their_own_and_mambas_states_no_decay():
    torch.manual_seed(0)
    module, cfg = Joined(), OptimConfig(lr=1e-4, mm_projector_lr=5e-4, weight_decay=0.1)
    optimizer = optim.build(module, cfg)
    names = {id(p): name for name, p in module.named_parameters()}
    optim.set_lr(optimizer, 2e-5)
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    inside = {name: (2e-5, 0.1) for name in names.values() if name.startswith("projections.history.")}
    inside |= {name: (2e-5, 0.0) for name in inside if name.endswith(("bias", ".A_log", ".D"))}
    assert {"projections.history.A_log", "projections.history.D"} <= set(inside)
    assert found == inside | {
        "llm.weight": (2e-5, 0.1), "llm.bias": (2e-5, 0.0),
        "projections.video.weight": (pytest.approx(1e-4), 0.1), "projections.video.bias": (pytest.approx(1e-4), 0.0),
    }  # fmt: skip
    staged = optim.build(module, replace(cfg, lr_stages={"0": 1e-3}))
    optim.set_lr(staged, 1e-3)
    assert sorted({group["lr"] for group in staged.param_groups}) == pytest.approx([5e-4, 1e-3])


def test_a_run_with_a_rate_for_connectors_goes_on_as_if_unbroken():
    cfg = OptimConfig(lr=1e-2, mm_projector_lr=3e-2, warmup_ratio=0.3, schedule="cosine")

    def joined(seed):
        torch.manual_seed(seed)
        return Joined()

    unbroken, before, after = joined(0), joined(0), joined(1)
    train(unbroken, optim.build(unbroken, cfg), range(10), cfg)
    optimizer = optim.build(before, cfg)
    train(before, optimizer, range(4), cfg)
    after.load_state_dict(before.state_dict())
    resumed = optim.build(after, cfg)
    optim.load_state_tensors(after, resumed, optim.state_tensors(before, optimizer))
    train(after, resumed, range(4, 10), cfg)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    without = joined(0)
    plain = replace(cfg, mm_projector_lr=None)
    train(without, optim.build(without, plain), range(10), plain)
    assert not torch.equal(without.projections["video"].weight, unbroken.projections["video"].weight)


def test_update_is_the_formula_of_adamw():
    """Three steps against decoupled weight decay written out in float64 (Loshchilov & Hutter 2019, algorithm 2)."""
    module = nn.Linear(3, 2)
    cfg = OptimConfig(lr=1e-2, weight_decay=0.1, beta2=0.99)
    optimizer = optim.build(module, cfg)
    expected = {name: p.detach().double() for name, p in module.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = copy.deepcopy(first)
    for t in range(1, 4):
        for name, p in module.named_parameters():
            p.grad = torch.randn(p.shape)
            grad = p.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.99 * second[name] + 0.01 * grad**2
            expected[name] = expected[name] * (1 - 1e-2 * (0.1 if name == "weight" else 0.0))
            rate = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.99**t)).sqrt() + 1e-8)
            expected[name] = expected[name] - 1e-2 * rate
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (-1.0, 1.0), (100.0, 1.0), (6.5, 0.5)])
def test_gradients_are_clipped_to_the_global_norm(clip, factor):
    module = nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    module.bias.grad = torch.tensor([12.0, 0.0])
    optimizer = optim.build(module, OptimConfig())
    assert optim.grad_norm(optimizer, clip) == pytest.approx(13.0)
    torch.testing.assert_close(module.weight.grad, factor * torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(module.bias.grad, factor * torch.tensor([12.0, 0.0]))


def test_norm_without_clipping_leaves_infinite_gradients_as_they_are():
    module = nn.Linear(2, 1, bias=False)
    optimizer = optim.build(module, OptimConfig())
    assert optim.grad_norm(optimizer, 1.0) == 0.0  # no gradient yet
    module.weight.grad = torch.tensor([[math.inf, 1.0]])
    assert optim.grad_norm(optimizer, 0.0) == math.inf
    assert module.weight.grad.tolist() == [[math.inf, 1.0]]


def train(module, optimizer, steps, cfg=OptimConfig(lr=1e-2, warmup_steps=3)):  # noqa: B008
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        module(torch.randn(8, 4)).backward()
        optim.grad_norm(optimizer, 1.0)
        optim.set_lr(optimizer, lr_at(step, 10, cfg))
        optimizer.step()


def test_training_goes_on_from_saved_state_as_if_unbroken():
    unbroken = net()
    train(unbroken, optim.build(unbroken, OptimConfig()), range(10))

    before = net()
    optimizer = optim.build(before, OptimConfig())
    train(before, optimizer, range(4))
    tensors = {name: value.clone() for name, value in optim.state_tensors(before, optimizer).items()}
    trained = ("proj.weight", "proj.bias", "ln_post.weight", "scale")  # `unused` never got a gradient
    assert set(tensors) == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trained}

    after = net(seed=1)
    after.load_state_dict(before.state_dict())
    optimizer = optim.build(after, OptimConfig())
    optim.load_state_tensors(after, optimizer, dict(reversed(tensors.items())))
    for name, value in optim.state_tensors(after, optimizer).items():
        assert torch.equal(value, tensors[name])
        assert value.data_ptr() != tensors[name].data_ptr()  # a file mapped to memory is not trained in
    train(after, optimizer, range(4, 10))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name


def test_state_before_the_first_step_is_empty():
    module = net()
    optimizer = optim.build(module, OptimConfig())
    assert optim.state_tensors(module, optimizer) == {}
    optim.load_state_tensors(module, optimizer, {})
    assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("other.weight", lambda state: {f"{key}.other.weight": state["exp_avg.scale"] for key in ("step", "exp_avg")}),
        ("frozen.weight", lambda state: {"exp_avg.frozen.weight": torch.zeros(3, 3)}),
        ("scale", lambda state: {"exp_avg.scale": torch.zeros(2)}),
        ("scale", lambda state: {"max_exp_avg_sq.scale": torch.zeros(3)}),
    ],
    ids=["unknown", "frozen", "shape", "key"],
)
def test_state_of_something_else_is_refused(name, change):
    module = net()
    optimizer = optim.build(module, OptimConfig())
    train(module, optimizer, range(1))
    tensors = optim.state_tensors(module, optimizer)
    tensors |= change(tensors)
    keys = ", ".join(sorted(full.partition(".")[0] for full in tensors if full.partition(".")[2] == name))
    with pytest.raises(UserError) as error:
        optim.load_state_tensors(module, optimizer, tensors)
    assert str(error.value) == f"optimiser state of {name!r} ({keys}) does not fit what trains here"


def test_state_in_part_is_refused():
    module = net()
    optimizer = optim.build(module, OptimConfig())
    train(module, optimizer, range(1))
    tensors = optim.state_tensors(module, optimizer)
    del tensors["step.scale"]
    with pytest.raises(UserError, match=r"^optimiser state of 'scale' \(exp_avg, exp_avg_sq\) does not fit"):
        optim.load_state_tensors(module, optimizer, tensors)


def test_a_training_step_imports_no_compiler():
    code = """
import sys, torch
from common import optim
from model.llm import Llama, LlamaConfig
from model.mllm import HeadLoss
with torch.device("meta"):
    Llama(LlamaConfig(8, 4, 4, 1, 1, 1, 4))
llm = Llama(LlamaConfig(8, 4, 4, 1, 1, 1, 4)).train()
llm.grad_checkpoint = 1
optimizer = optim.build(llm, optim.OptimConfig())
words = torch.arange(4)
(llm(words[None]).sum() + HeadLoss.apply(llm.head, llm.embed(words), words)).backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_steps_are_those_of_torchs_own():
    weights = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = kind([p], lr=0.1, weight_decay=0.3, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            p.square().sum().backward()
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(weights[0], weights[1])
