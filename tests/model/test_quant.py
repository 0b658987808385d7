"""Linears in few bits against formulas in float64, and under adapters."""

import math

import pytest
import torch
from torch import nn

from common.checkpoint import trainable_state
from common.config import UserError
from model.generate import generate
from model.llm import Llama, LlamaConfig
from model.lora import add_lora, merge_lora
from model.quant import BITS, KINDS, nf4_levels

IDS = torch.arange(24).view(2, 12)
# as printed in the appendix of QLoRA (Dettmers et al. 2023)
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def linear(out=48, inside=64, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inside, out, bias=bias)
    nn.init.normal_(layer.weight, std=0.05)
    layer.weight.data[3] *= 20  # a row of outliers
    layer.weight.data[5] = 0
    return layer


def small(**fields):
    torch.manual_seed(0)
    return Llama(LlamaConfig(61, 64, 128, 2, 4, 2, 16, **fields)).eval()


def reference(kind, weight):
    """The weight that is computed with, in float64 and one block at a time."""
    if kind == "int8":
        rows = []
        for row in weight.double():
            scale = max(row.abs().max().item(), 1e-12) / 127
            rows.append(torch.tensor([round(value / scale) * scale for value in row.tolist()], dtype=torch.float64))
        return torch.stack(rows)
    blocks = weight.double().reshape(-1, 64)
    largest = blocks.abs().amax(1)
    mean, values = largest.mean().item(), []
    for first in range(0, len(largest), 256):
        rest = largest[first : first + 256] - mean
        step = max(rest.abs().max().item(), 1e-12) / 127
        for block, part in zip(blocks[first : first + 256], rest.tolist(), strict=True):
            scale = round(part / step) * step + mean
            values += [scale * min(LEVELS, key=lambda level, x=x: abs(level * scale - x)) for x in block.tolist()]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def test_levels_are_the_published_ones():
    assert nf4_levels().tolist() == pytest.approx(LEVELS, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_the_formulas(kind):
    layer = linear(out=300)  # 300 blocks: more than one group of scales
    packed = KINDS[kind](layer)
    torch.testing.assert_close(packed.weight().double(), reference(kind, layer.weight.detach()), atol=1e-6, rtol=1e-5)
    assert (packed.weight()[5] == 0).all()
    size = 8 * sum(packed.get_buffer(name).nbytes for name in packed.names) / layer.weight.numel()
    # 300 rows of 64; 300 blocks, whose scales fill two groups of 256
    assert size == pytest.approx({"int8": 8 + 32 / 64, "nf4": 4 + (512 * 8 + 3 * 32) / 19200}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_that_weight(kind):
    layer = linear()
    packed, x = KINDS[kind](layer), torch.randn(5, 7, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = packed(x)
    assert max(saved) <= layer.weight.numel()
    assert all(packed.get_buffer(name).dtype != torch.float32 or packed.get_buffer(name).numel() <= 48
               for name in packed.names)  # fmt: skip
    again = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(again, packed.weight(), layer.bias)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, again.grad)
    assert packed.bias.grad is not None
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qwen", [False, True])
def test_a_model_read_in_few_bits_has_the_logits_of_its_weights(tmp_path, kind, qwen):
    llm = small(attention_bias=qwen, tie_word_embeddings=qwen)
    for layer in llm.model.layers:
        for leaf in "qkv" if qwen else "":
            nn.init.normal_(layer.self_attn.get_submodule(f"{leaf}_proj").bias)
    llm.save_pretrained(tmp_path)
    read = Llama.from_pretrained(tmp_path, quant=kind)
    assert sum(isinstance(module, KINDS[kind]) for module in read.modules()) == 14
    assert not any(parameter.is_meta for parameter in read.parameters())
    with torch.no_grad():
        for name, module in read.named_modules():
            if isinstance(module, KINDS[kind]):
                llm.get_submodule(name).weight.copy_(module.weight())
        torch.testing.assert_close(read(IDS), llm(IDS))
    assert generate(read, IDS, 6) == generate(llm, IDS, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_train_over_few_bits_as_over_that_weight(tmp_path, kind, recompute):
    small().save_pretrained(tmp_path)
    packed, plain = Llama.from_pretrained(tmp_path, quant=kind), small()
    for name, module in packed.named_modules():
        if isinstance(module, KINDS[kind]):
            plain.get_submodule(name).weight.data = module.weight()
    generate(packed, IDS, 2)  # what inference leaves behind must not end up in a gradient
    gradients = []
    for llm in (packed, plain):
        assert add_lora(llm, ["q_proj", "v_proj", "down_proj"], r=4, alpha=8) == 6
        torch.manual_seed(1)
        for adapter in trainable_state(llm).values():
            nn.init.normal_(adapter, std=0.1)
        llm.grad_checkpoint = len(llm.model.layers) if recompute else 0
        llm.train()
        nn.functional.cross_entropy(llm(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in llm.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)
    assert not any("codes" in name for name in packed.state_dict())
    with pytest.raises(
        UserError, match=r"^adapters cannot be merged into a base of few bits: load it without --quant$"
    ):
        merge_lora(packed)


def test_errors_shrink_with_bits():
    weight = linear().weight.detach()
    worst = {kind: float((KINDS[kind](linear()).weight() - weight).norm() / weight.norm()) for kind in KINDS}
    assert worst["int8"] < 0.01 < worst["nf4"] < 0.11
    assert math.isclose(BITS["nf4"], 4.13, abs_tol=0.01)


def test_a_weight_that_does_not_divide():
    with pytest.raises(UserError, match=r"^nf4: a weight of \(3, 20\) does not divide into blocks of 64$"):
        KINDS["nf4"](nn.Linear(20, 3))
