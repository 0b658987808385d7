"""Published .pth checkpoints, written here in their exact key layout at toy width."""

import pytest
import torch

from common.config import UserError
from model.llm import Llama, LlamaConfig
from model.mllm import Mllm, MllmConfig
from model.published import load_published

FEATURES = ("mae_340_UTT", "maeV_399_UTT", "HL-UTT")


def make(seed=0):
    torch.manual_seed(seed)
    llm = Llama(LlamaConfig(32, 16, 24, 2, 4, 4, 4))
    widths = dict.fromkeys(FEATURES, 6)
    return Mllm(MllmConfig(lora_r=4, features=widths, visual_width=5, image_size=56), llm)


def published(mllm, default=""):
    """The model entry of the .pth that MiniGPT-4's runner writes for Emotion-LLaMA, filled with random numbers."""
    layer = "llama_model.base_model.model.model.layers.{}.self_attn."
    state = {}
    for i in range(2):
        for name in ("q_proj", "v_proj"):
            state[layer.format(i) + f"{name}.lora_A{default}.weight"] = torch.randn(4, 16)
            state[layer.format(i) + f"{name}.lora_B{default}.weight"] = torch.randn(16, 4)
        state[layer.format(i) + "rotary_emb.inv_freq"] = torch.randn(2)
    widths = {"llama_proj": 20, **{f"feats_llama_proj{k}": 6 for k in (1, 2, 3)}, "cls_tk_llama_proj": 5}
    for name, width in widths.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(16, width), torch.randn(16)
    state["attention.feats_prep.0.0.weight"] = torch.randn(3, 3)
    return state


@pytest.mark.parametrize("default", ["", ".default"])
def test_emotion_llama_loads_whole(tmp_path, default):
    mllm = make()
    state = published(mllm, default)
    torch.save({"model": state, "epoch": 29, "scaler": None}, tmp_path / "checkpoint_29.pth")
    assert load_published(mllm, tmp_path / "checkpoint_29.pth") == "8/8 LoRA tensors, 10/10 projection tensors"
    q = state[f"llama_model.base_model.model.model.layers.1.self_attn.q_proj.lora_A{default}.weight"]
    assert torch.equal(mllm.llm.model.layers[1].self_attn.q_proj.lora_A.weight, q)
    for k, name in enumerate(FEATURES, 1):
        assert torch.equal(mllm.projections[name].weight, state[f"feats_llama_proj{k}.weight"])
    assert torch.equal(mllm.projections["image"].bias, state["llama_proj.bias"])
    assert torch.equal(mllm.projections["cls"].weight, state["cls_tk_llama_proj.weight"])


def test_minigpt_v2_leaves_feature_projections_fresh(tmp_path):
    mllm = make()
    before = mllm.projections["HL-UTT"].weight.clone()
    state = {key: value for key, value in published(mllm).items() if "feats" not in key and "cls" not in key}
    torch.save({"model": state}, tmp_path / "minigptv2_checkpoint.pth")
    line = load_published(mllm, tmp_path / "minigptv2_checkpoint.pth")
    assert line == (
        "8/8 LoRA tensors, 2/10 projection tensors; fresh: projections of HL-UTT, cls, maeV_399_UTT, mae_340_UTT"
    )
    assert torch.equal(mllm.projections["HL-UTT"].weight, before)
    assert torch.equal(mllm.projections["image"].weight, state["llama_proj.weight"])


@pytest.mark.parametrize("change", ["drop a LoRA tensor", "drop one projection", "add a tensor", "another width"])
def test_a_partial_match_is_refused_and_changes_nothing(tmp_path, change):
    mllm = make()
    before = {name: value.clone() for name, value in mllm.state_dict().items()}
    state = published(mllm)
    key = next(key for key in state if "lora_B" in key)
    if change == "drop a LoRA tensor":
        del state[key]
    elif change == "drop one projection":
        del state["feats_llama_proj2.bias"]
    elif change == "add a tensor":
        state["visual_encoder.cls_token"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(16, 8)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        load_published(mllm, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in mllm.state_dict().items())
