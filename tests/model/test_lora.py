import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import UserError
from model.llm import Llama, LlamaConfig
from model.lora import LoRALinear, adapters, add_lora, load_peft, lora_state, merge_lora, save_peft, unmerge_lora

QV = ["q_proj", "v_proj"]
IDS = torch.arange(24).view(2, 12)
NAME = "model.layers.0.self_attn.q_proj"


def small():
    torch.manual_seed(0)
    return Llama(LlamaConfig(61, 32, 48, 2, 4, 2, 8)).eval()


def trained(**options):
    """A model whose adapters do something."""
    llm = small()
    add_lora(llm, QV, r=4, alpha=16, **options)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return llm


def logits(llm):
    with torch.no_grad():
        return llm(IDS)


def test_fresh_adapters_change_nothing_and_alone_train():
    llm = small()
    before = logits(llm)
    assert add_lora(llm, QV, r=4, alpha=16, dropout=0.5) == 4
    assert torch.equal(logits(llm), before)  # born in eval mode like their base: no dropout
    assert {name for name, p in llm.named_parameters() if p.requires_grad} == set(lora_state(llm))
    assert add_lora(llm, ["mlp.down_proj"], r=2, alpha=2) == 2
    assert {name for name, p in llm.named_parameters() if p.requires_grad} == set(lora_state(llm))
    assert len(lora_state(llm)) == 12


def test_size_for_llama_2_7b():
    with torch.device("meta"):
        llm = Llama(LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128))
        assert llm.num_parameters() == 6_738_415_616
        assert add_lora(llm, QV, r=64, alpha=16, dropout=0.05) == 64
    state = lora_state(llm)
    assert len(state) == 128
    assert sum(t.numel() for t in state.values()) == 33_554_432


def test_initialisation_is_pefts():
    layer = LoRALinear(torch.nn.Linear(4096, 8), 64, 16)
    bound = 1 / math.sqrt(4096)  # kaiming uniform with a = sqrt(5)
    assert layer.lora_A.weight.abs().max() <= bound
    assert layer.lora_A.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B.weight.any()


def test_forward_and_gradients_follow_the_formula():
    layer = LoRALinear(torch.nn.Linear(6, 5), 2, 8)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 6)
    y = layer(x)
    w, b = layer.base.weight.double(), layer.base.bias.double()
    wanted = x.double() @ w.T + b + x.double() @ (4 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()).T
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=0)
    y.sum().backward()
    assert layer.base.weight.grad is None
    expected = 4 * torch.ones(5, 3) @ x @ layer.lora_A.weight.detach().T
    torch.testing.assert_close(layer.lora_B.weight.grad, expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    layer = LoRALinear(torch.nn.Linear(6, 5).train(), 2, 8, dropout=0.5)
    x = torch.randn(200, 6)
    assert torch.equal(layer(x), layer.base(x))  # B is zero, whatever is dropped
    torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_stay_fp32_over_bf16_and_under_autocast():
    llm = small().bfloat16()
    add_lora(llm, QV, r=4, alpha=16)
    assert {t.dtype for t in lora_state(llm).values()} == {torch.float32}
    llm.train()(IDS).sum().backward()
    gradients = [p.grad for p in llm.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        llm(IDS).sum().backward()


def test_merge_equals_adapters_and_unmerge_is_exact():
    llm = trained()
    weight = adapters(llm)[NAME].base.weight.clone()
    apart = logits(llm)
    assert (apart - logits(small())).abs().max() > 0.01
    merge_lora(llm)
    merge_lora(llm)  # twice is once
    torch.testing.assert_close(logits(llm), apart, atol=1e-5, rtol=0)
    assert not torch.equal(adapters(llm)[NAME].base.weight, weight)
    unmerge_lora(llm)
    assert torch.equal(adapters(llm)[NAME].base.weight, weight)
    assert torch.equal(logits(llm), apart)


def test_whole_model_is_saved_merged_only(tmp_path):
    llm = trained()
    with pytest.raises(ValueError, match="merge the LoRA adapters"):
        llm.save_pretrained(tmp_path)
    merge_lora(llm)
    llm.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(Llama.from_pretrained(tmp_path)), logits(llm), atol=0, rtol=0)


def spelled(state, style):
    if style == "llama_model.":
        return {f"llama_model.base_model.model.{name}": t for name, t in state.items()}
    if style == "default":
        return {f"base_model.model.{name.replace('.weight', '.default.weight')}": t for name, t in state.items()}
    return {f"{style}{name}": t for name, t in state.items()}


@pytest.mark.parametrize("style", ["", "base_model.model.", "default", "llama_model.", "module."])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pth"])
def test_every_published_spelling_loads(tmp_path, style, kind):
    source, target = trained(), small()
    add_lora(target, QV, r=4, alpha=16)
    state = {name: t.contiguous() for name, t in spelled(lora_state(source), style).items()}
    file = tmp_path / f"adapter_model.{kind}"
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "bin":
        torch.save(state, file)
    else:  # an Emotion-LLaMA checkpoint
        stray = {"llama_proj.weight": torch.zeros(2), "llama_model.base_model.model.rotary_emb.inv_freq": torch.ones(2)}
        torch.save({"model": state | stray, "optimizer": {}, "config": {"run": {}}, "scaler": None, "epoch": 29}, file)
    assert load_peft(target, tmp_path if kind != "pth" else file) == "8/8 LoRA tensors"
    assert torch.equal(logits(target), logits(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{NAME}.lora_B.weight"), f"7/8 tensors match the model; 1 missing: {NAME}.lora_B.weight"),
        (
            lambda s: s.update({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
            "8/8 tensors match the model; 1 unexpected: model.layers.9.self_attn.q_proj.lora_A.weight",
        ),
        (
            lambda s: s.update({f"{NAME}.lora_A.weight": torch.zeros(8, 32)}),
            f"1 tensors of the wrong shape: {NAME}.lora_A.weight is (8, 32), not (4, 32)",
        ),
        (lambda s: s.clear() or s.update({"llama_proj.weight": torch.zeros(1)}), "holds no LoRA tensors"),
    ],
)
def test_partial_adapters_are_refused_and_nothing_is_loaded(tmp_path, change, message):
    llm = trained()
    before = logits(llm)
    state = {name: torch.ones_like(t) for name, t in lora_state(llm).items()}
    change(state)
    file = tmp_path / "adapter.safetensors"
    save_file(state, file)
    with pytest.raises(UserError) as error:
        load_peft(llm, file)
    assert str(error.value) == f"{file}: {message}"
    assert torch.equal(logits(llm), before)


def test_load_refuses_another_scaling_and_unsupported_kinds(tmp_path):
    llm = trained()
    save_peft(llm, tmp_path)
    other = small()
    add_lora(other, QV, r=4, alpha=32)
    with pytest.raises(UserError) as error:
        load_peft(other, tmp_path)
    assert str(error.value) == f"{tmp_path}/adapter_model.safetensors: lora_alpha / r = 16 / 4, not 8"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match=r"adapter_config.json: use_dora is not supported"):
        load_peft(llm, tmp_path)


def test_unreadable_adapter_files(tmp_path):
    llm = trained()
    with pytest.raises(UserError, match=r"LoRA weights not found \(looked for .*adapter_model.safetensors, .*\.bin\)"):
        load_peft(llm, tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.pth: not readable as tensors only"):
        load_peft(llm, tmp_path / "bad.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.safetensors: not a readable safetensors file"):
        load_peft(llm, tmp_path / "bad.safetensors")
    torch.save({"model": UserError}, tmp_path / "code.pth")  # a pickle that names a class
    with pytest.raises(UserError, match=r"code.pth: not readable as tensors only"):
        load_peft(llm, tmp_path / "code.pth")


def test_add_lora_errors():
    with pytest.raises(UserError) as error:
        add_lora(small(), ["q_proj", "query"], r=4, alpha=16)
    assert str(error.value) == (
        "lora_targets: no linear is called 'query' "
        "(there are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)"
    )
    with pytest.raises(UserError, match="lora_r: 0 is not positive"):
        add_lora(small(), QV, r=0, alpha=16)


def peft_model(folder):
    """The same base in transformers, wrapped by PEFT with weights that do something."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    small().save_pretrained(folder)
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=QV, lora_dropout=0.1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_import_from_peft_gives_its_logits(tmp_path):
    theirs = peft_model(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    llm = small()  # without adapters: the folder says what to add
    assert load_peft(llm, tmp_path / "adapter") == "8/8 LoRA tensors"
    assert adapters(llm)[NAME].dropout.p == 0.1
    with torch.no_grad():
        torch.testing.assert_close(llm(IDS), theirs(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [QV, [NAME, "down_proj"]])
def test_peft_loads_our_export(tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    small().save_pretrained(tmp_path / "base")
    llm = small()
    add_lora(llm, targets, r=4, alpha=16, dropout=0.05)
    for weight in lora_state(llm).values():
        torch.nn.init.normal_(weight, std=0.3)
    save_peft(llm, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 16, 0.05)
    assert config.base_model_name_or_path == str(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, llm(IDS), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
