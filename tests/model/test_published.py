"""Published .pth checkpoints, written here in their exact key layout at toy width."""

import pytest
import torch

from common.config import UserError
from model.llm import Llama, LlamaConfig
from model.mllm import Mllm, MllmConfig
from model.published import PublishedConfig, load_published

FEATURES = ("mae_340_UTT", "maeV_399_UTT", "HL-UTT")
BODY = "llama_model.base_model.model.model.layers"


def make(seed=0):
    torch.manual_seed(seed)
    llm = Llama(LlamaConfig(32, 16, 24, 2, 4, 4, 4))
    widths = dict.fromkeys(FEATURES, 6)
    return Mllm(MllmConfig(lora_r=4, features=widths, visual_width=5, image_size=56), llm)


def layout(hidden=16, layers=2, rank=4, image=20, features=(6, 6, 6), cls=5, default="", seed=1):
    """The model entry of the .pth that MiniGPT-4's runner writes for Emotion-LLaMA, filled with random numbers.

    Beside what is used: peft's and transformers' buffers of the time, and every tensor of the head that is not called.
    """
    torch.manual_seed(seed)
    state = {}
    for i in range(layers):
        for name in ("q_proj", "v_proj"):
            state[f"{BODY}.{i}.self_attn.{name}.lora_A{default}.weight"] = 0.3 * torch.randn(rank, hidden)
            state[f"{BODY}.{i}.self_attn.{name}.lora_B{default}.weight"] = 0.3 * torch.randn(hidden, rank)
        state[f"{BODY}.{i}.self_attn.rotary_emb.inv_freq"] = torch.randn(2)
    widths = {"llama_proj": image, **{f"feats_llama_proj{k}": n for k, n in enumerate(features, 1)},
              "cls_tk_llama_proj": cls}  # fmt: skip
    for name, width in widths.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(hidden, width), torch.randn(hidden)
    head = {f"feats_prep.{i}.{j}": (4, 6) for i in range(7) for j in (0, 3)}
    head |= {"attention_mlp.0": (4, 8), "attention_mlp.3": (4, 4), "fc_att": (7, 4), "fc_out": (6, 4)}
    for name, shape in head.items():
        state[f"attention.{name}.weight"], state[f"attention.{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return state


def released(base, shape):
    """layout() for the language model in a folder and a PublishedConfig's fields."""
    config = LlamaConfig.from_json(base / "config.json")
    return layout(config.hidden_size, config.num_hidden_layers, shape["lora_r"], 4 * shape["visual_width"],
                  tuple(shape["features"].values()), shape["visual_width"])  # fmt: skip


COVERED = "8/8 LoRA tensors, 10/10 projection tensors"
LEFT = "36 attention.* (a head that was never called)", "2 rotary_emb.inv_freq (constants)"
WRAPPED = {
    "whole": lambda state: {
        "model": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
                                      "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "params": [0]}]},
        "config": {"run": {"task": "image_text_pretrain", "seed": 42}, "model": {"arch": "minigpt_v2"}},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}, "epoch": 29,
    },
    "trimmed": lambda state: {"model": state},
    "bare": lambda state: state,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."], ids=["", "ddp"])
@pytest.mark.parametrize("default", ["", ".default"], ids=["peft02", "peft03"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_emotion_llama_loads_whole(tmp_path, default, prefix, wrap):
    mllm, state = make(), layout(default=default)
    torch.save(wrap({prefix + key: tensor for key, tensor in state.items()}), tmp_path / "checkpoint_29.pth")
    said = load_published(mllm, tmp_path / "checkpoint_29.pth")
    covered, _, ignored = said.partition("; ignored: ")
    assert covered == COVERED
    assert sorted(ignored.split(", ")) == sorted(LEFT)
    for i, layer in enumerate(mllm.llm.model.layers):
        for name in ("q_proj", "v_proj"):
            adapter = layer.self_attn.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                published = state[f"{BODY}.{i}.self_attn.{name}.{part}{default}.weight"]
                assert torch.equal(adapter.get_submodule(part).weight, published)
    for k, name in enumerate(FEATURES, 1):
        assert torch.equal(mllm.projections[name].weight, state[f"feats_llama_proj{k}.weight"])
        assert torch.equal(mllm.projections[name].bias, state[f"feats_llama_proj{k}.bias"])
    assert torch.equal(mllm.projections["image"].bias, state["llama_proj.bias"])
    assert torch.equal(mllm.projections["cls"].weight, state["cls_tk_llama_proj.weight"])


def test_minigpt_v2_leaves_feature_projections_fresh(tmp_path):
    mllm, state = make(), layout()
    before = mllm.projections["HL-UTT"].weight.clone()
    kept = {key: value for key, value in state.items() if "lora_" in key or key.startswith("llama_proj")}
    torch.save({"model": kept}, tmp_path / "minigptv2_checkpoint.pth")
    line = load_published(mllm, tmp_path / "minigptv2_checkpoint.pth")
    assert line == (
        "8/8 LoRA tensors, 2/10 projection tensors; fresh: projections of HL-UTT, cls, maeV_399_UTT, mae_340_UTT"
    )
    assert torch.equal(mllm.projections["HL-UTT"].weight, before)
    assert torch.equal(mllm.projections["image"].weight, state["llama_proj.weight"])


def test_the_merged_weights_are_pefts(tmp_path):
    """base + (alpha / r) B A, with the published 16 / 64 scaled to this rank."""
    mllm, state = make(), layout()
    torch.save({"model": state}, tmp_path / "x.pth")
    load_published(mllm, tmp_path / "x.pth")
    adapter = mllm.llm.model.layers[1].self_attn.v_proj
    a, b = (state[f"{BODY}.1.self_attn.v_proj.{part}.weight"] for part in ("lora_A", "lora_B"))
    torch.testing.assert_close(adapter.delta(), b @ a * (16 / 4))


def without(*words):
    return lambda state: {key: t for key, t in state.items() if not any(word in key for word in words)}


def plain_llama(state):
    llm = Llama(LlamaConfig(32, 16, 24, 2, 4, 4, 4))
    return llm.state_dict()


MOSEI = {"text_proj.weight": (8, 6), "audio_proj.weight": (8, 6), "fusion.0.weight": (4, 8), "classifier.bias": (7,)}
EVA = {"cls_token": (1, 1, 5), "pos_embed": (1, 257, 5), "blocks.0.attn.q_bias": (5,), "blocks.0.norm1.weight": (5,)}
FOREIGN = "x.pth: not Emotion-LLaMA's or MiniGPT-v2's: no LoRA of a llama_model in "
REFUSED = {
    "a LoRA tensor is missing": (
        without("layers.1.self_attn.v_proj.lora_B"),
        "x.pth: 17/18 tensors match the model; 1 missing: llm.model.layers.1.self_attn.v_proj.lora_B.weight",
    ),
    "no queries": (
        without("q_proj"),
        "x.pth: 14/18 tensors match the model; 4 missing: llm.model.layers.0.self_attn.q_proj.lora_A.weight, "
        "llm.model.layers.0.self_attn.q_proj.lora_B.weight, llm.model.layers.1.self_attn.q_proj.lora_A.weight, ...",
    ),
    "half of the layers": (without("layers.1."), "x.pth: LoRA of 1 layers, the language model has 2"),
    "more layers": (lambda _: layout(layers=3), "x.pth: LoRA of 3 layers, the language model has 2"),
    "another rank": (lambda _: layout(rank=8), "x.pth: LoRA of rank 8, the model's is 4"),
    "another width": (
        lambda _: layout(hidden=24, rank=4),
        "x.pth: 18 tensors of the wrong shape: llm.model.layers.0.self_attn.q_proj.lora_A.weight is (4, 24), "
        "not (4, 16), llm.model.layers.0.self_attn.q_proj.lora_B.weight is (24, 4), not (16, 4), "
        "llm.model.layers.0.self_attn.v_proj.lora_A.weight is (4, 24), not (4, 16), ...",
    ),
    "one projection is missing": (
        without("feats_llama_proj2.bias"),
        "x.pth: 17/18 tensors match the model; 1 missing: projections.maeV_399_UTT.bias",
    ),
    "a fourth feature": (
        lambda _: layout(features=(6, 6, 6, 6)),
        "x.pth: 18/18 tensors match the model; 2 unexpected: feats_llama_proj4.bias, feats_llama_proj4.weight",
    ),
    "a tensor too many": (
        lambda state: state | {"visual_encoder.cls_token": torch.zeros(1)},
        "x.pth: 18/18 tensors match the model; 1 unexpected: visual_encoder.cls_token",
    ),
    "one tensor in two spellings": (
        lambda state: state | {"module.llama_proj.bias": torch.zeros(16)},
        "x.pth: two tensors are projections.image.bias, in two spellings",
    ),
    "EVA": (
        lambda _: {key: torch.zeros(shape) for key, shape in EVA.items()},
        FOREIGN + "cls_token, pos_embed, blocks.0.attn.q_bias, ...",
    ),
    "a plain Llama": (
        plain_llama,
        FOREIGN + "model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight, ...",
    ),
    "a MOSEI net": (
        lambda _: {key: torch.zeros(shape) for key, shape in MOSEI.items()},
        FOREIGN + "text_proj.weight, audio_proj.weight, fusion.0.weight, ...",
    ),
    "no tensors": (lambda _: {"epoch": 3}, FOREIGN + "nothing"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_anything_else_is_refused_in_one_line_and_changes_nothing(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    mllm, (edit, line) = make(), REFUSED[change]
    before = {name: value.clone() for name, value in mllm.state_dict().items()}
    torch.save({"model": edit(layout())}, "x.pth")
    with pytest.raises(UserError) as error:
        load_published(mllm, "x.pth")
    assert str(error.value) == line
    assert all(torch.equal(value, before[name]) for name, value in mllm.state_dict().items())


def test_the_published_shape_is_the_recipes_default():
    shape, recipe = PublishedConfig(), MllmConfig()
    assert {name: getattr(recipe, name) for name in vars(shape)} == vars(shape)
    assert (shape.lora_r, shape.lora_alpha, list(shape.features)) == (64, 16, list(FEATURES))
    made = shape.made()
    assert list(made) == [*FEATURES, "eva_vit_g"]
    assert made["HL-UTT"]["encoder"] == "hubert"
    assert made["eva_vit_g"] == {"encoder": "eva", "options": {"image_size": 448}, "pooling": "patches",
                                 "frame": "first"}  # fmt: skip
    assert PublishedConfig(visual=None, features={"x": 3}).made() == {"x": {}}
