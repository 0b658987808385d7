import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common.config import UserError
from model.llm import MANY, Causal, Linear, Llama, LlamaConfig, Normed, Packed, RMSNorm, SwiGLU, signed_wavelengths

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head_dim over hidden / heads": {"head_dim": 16, "rope_theta": 500000.0},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6},
}


def small(**changes):
    torch.manual_seed(0)
    return Llama(LlamaConfig(**(SMALL | changes))).eval()


def reference(**changes):
    """A transformers model with weights far enough from zero that every term shows."""
    transformers = pytest.importorskip("transformers")
    shape = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, **SMALL, **changes}
    kind = shape.pop("model_type", "llama")
    config = transformers.AutoConfig.for_model(kind, attn_implementation="eager", **shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers_both_ways(tmp_path, changes):
    theirs = reference(**changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 97, (2, 41))
    with torch.no_grad():
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours(ids), wanted, atol=1e-4, rtol=0)
        ours.save_pretrained(tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, wanted, atol=1e-5, rtol=0)
    assert again.dtype == torch.float32
    assert ours.num_parameters() == theirs.num_parameters()
    assert LlamaConfig.from_json(ours.config.to_json()) == ours.config


def test_attention_and_rope_follow_the_formula():
    """One head, one layer, MLP switched off, in float64 by the RoFormer paper's complex rotation."""
    llm = small(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8).double()
    torch.nn.init.zeros_(llm.model.layers[0].mlp.down_proj.weight)
    x, positions = torch.randn(5, 32, dtype=torch.float64), torch.tensor([3, 4, 9, 70, 71])
    attention = llm.model.layers[0].self_attn

    def norm(y):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(y):
        angle = positions.double()[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        y = torch.complex(y[:, :4], y[:, 4:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((y.real, y.imag), -1)

    q, k, v = (norm(x) @ p.weight.T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = (turned(q) @ turned(k).T / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    wanted = norm(x + scores.softmax(-1) @ v @ attention.o_proj.weight.T)
    with torch.no_grad():
        torch.testing.assert_close(llm.hidden(x[None], Causal(), positions[None])[0], wanted, atol=1e-6, rtol=0)


def test_positions_are_relative_and_unbounded():
    llm = small()
    ids = torch.randint(0, 97, (1, 12))
    with torch.no_grad():
        near = llm(ids)
        far = llm(ids, positions=torch.arange(12)[None] + 3000)
    torch.testing.assert_close(far, near, atol=2e-4, rtol=0)


@pytest.mark.parametrize("heads", [4, 2])
def test_packed_equals_padded_and_alone_with_gradients(heads):
    llm = small(num_key_value_heads=heads)
    lengths = [1, 7, 12, 3]
    documents = [torch.randint(0, 97, (1, n)) for n in lengths]
    packed = llm(torch.cat(documents, 1), lengths=lengths)
    packed.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}
    llm.zero_grad()
    padded = llm(torch.cat([F.pad(document, (0, 12 - document.shape[1])) for document in documents]))
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(packed[0], padded[real], atol=1e-5, rtol=0)
    padded[real].square().sum().backward()
    for name, parameter in llm.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)
    for part, document in zip(packed.split(lengths, 1), documents, strict=True):
        torch.testing.assert_close(part, llm(document), atol=1e-5, rtol=0)


def test_packed_input_must_be_one_row_of_that_length():
    llm, ids = small(), torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="lengths sum to 6, but the packed input is 2 x 6"):
        llm(ids, lengths=[2, 4])
    with pytest.raises(ValueError, match="lengths sum to 5, but the packed input is 1 x 6"):
        llm(ids[:1], lengths=[2, 3])


def test_varlen_kernel_gets_bounds_and_repeated_key_heads(monkeypatch):
    """The CUDA path, with the kernel replaced by its definition."""
    import torch.nn.attention.varlen as varlen

    def kernel(q, k, v, bounds, same, longest, also, *, window_size):
        assert q.shape == k.shape == v.shape == (10, 4, 8)
        assert bounds.dtype == same.dtype == torch.int32
        assert (bounds.tolist(), longest, also, window_size) == ([0, 3, 10], 7, 7, (-1, 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        owner = torch.bucketize(torch.arange(10), bounds, right=True)
        seen = (owner[:, None] == owner).tril()
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    attend = Packed([3, 7])
    torch.testing.assert_close(attend._varlen(q, k, v), attend(0, q, k, v), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_varlen_on_a_gpu():
    q, k, v = (torch.randn(1, h, 50, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    wanted = Packed([20, 30])(0, q.float(), k.float(), v.float())
    torch.testing.assert_close(Packed([20, 30])(0, q, k, v).float(), wanted, atol=2e-2, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (7,), (8, 1), (16,), (2, 24), (49,)])
@pytest.mark.parametrize("out", [96, 97, MANY])
def test_a_linear_is_the_same_for_any_number_of_rows(rows, out, bias):
    torch.manual_seed(0)
    linear, x = Linear(32, out, bias), torch.randn(*rows, 32)
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None).float()
    torch.testing.assert_close(linear(x), wanted, atol=1e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), wanted, atol=1e-6, rtol=0)
        assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 8, 16, 48])
def test_attention_finds_each_head_together_in_memory(rows):
    llm, strides = small(), []

    def attend(layer, q, k, v):
        strides.append([x.stride(-1) for x in (q, k, v)])
        return Causal()(layer, q, k, v)

    with torch.no_grad():
        llm.hidden(torch.randn(rows, 1, 32), attend, torch.full((rows, 1), 5))
    assert strides == [[1, 1, 1]] * 3


def test_training_after_decoding_has_the_gradients_of_training_alone():
    """What is kept of the rotary angles must not be bound to the mode in which it was first computed."""
    llm, ids, found = small(), torch.randint(0, 97, (1, 9)), []
    for first in (torch.enable_grad, torch.inference_mode):
        signed_wavelengths.cache_clear()
        with first():
            llm(ids)
        llm.zero_grad()
        llm(ids).square().mean().backward()
        found.append([p.grad.clone() for p in llm.parameters()])
    for alone, after in zip(*found, strict=True):
        assert torch.equal(alone, after)


def test_swiglu_has_the_gradients_of_its_formula_and_keeps_its_inputs_alone():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    torch.testing.assert_close(SwiGLU.apply(gate, up), gate * gate.sigmoid() * up)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        SwiGLU.apply(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_rms_norm_has_the_gradients_of_its_formula_and_keeps_no_product():
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (7,)))
    epsilon = torch.tensor(0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(Normed.apply, (x, weight, epsilon))
    assert torch.autograd.gradcheck(Normed.apply, (x, weight.detach(), epsilon))
    wanted = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(Normed.apply(x, weight, epsilon), wanted)
    module, x, kept = RMSNorm(7, 0.1), torch.randn(2, 3, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        module(x)
    assert kept == [(2, 3, 7), (7,), (2, 3, 1)]


def test_logits_are_float32_whatever_the_weights_are():
    llm = small().bfloat16()
    with torch.no_grad():
        assert llm.head(torch.randn(1, 2, 32).bfloat16()).dtype == torch.float32


def test_gradient_checkpointing_recomputes_layers_to_the_same_gradients():
    llm, ids = small(), torch.randint(0, 97, (2, 9))
    calls = []
    for layer in llm.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for llm.grad_checkpoint in (0, 3, 2):
        calls.clear()
        llm.train().zero_grad()
        llm(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in llm.parameters() if p.grad is not None])
        assert len(calls) == 3 + llm.grad_checkpoint
    for plain, *recomputed in zip(*gradients, strict=True):
        for found in recomputed:
            torch.testing.assert_close(found, plain, atol=0, rtol=0)


def test_compiled_parts_compute_what_they_did():
    from torch._dynamo.utils import counters

    llm, found = small().train(), []
    counters.clear()
    batches = [torch.randint(0, 97, (1, n)) for n in (9, 12, 17)]
    for compiled in (False, True):
        if compiled:
            llm.compile_parts(backend="aot_eager")
        llm.zero_grad()
        outputs = [llm(ids) for ids in batches]
        sum(output.square().mean() for output in outputs).backward()
        found.append([*outputs, *(p.grad.clone() for p in llm.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 6  # not one a layer, nor one a length
    with torch.no_grad():  # other products on a CPU
        for ids, output in zip(batches, outputs, strict=True):
            torch.testing.assert_close(llm(ids), output.detach(), atol=1e-5, rtol=1e-5)


def test_dtype_and_stray_buffers_on_load(tmp_path):
    llm = small(tie_word_embeddings=True)
    llm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert "lm_head.weight" not in state
    extra = {"lm_head.weight": torch.zeros(97, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | extra, file)
    loaded = Llama.from_pretrained(tmp_path, torch.bfloat16)
    assert loaded.coverage == f"{len(state)}/{len(state)} tensors, 2 not used"
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, llm.lm_head.weight.bfloat16())
    assert not loaded.training
    ids = torch.randint(0, 97, (1, 9))
    with torch.no_grad():
        assert (loaded(ids) - llm(ids)).abs().max() < 0.02
    file.unlink()  # the weights are a copy: the file may go while they are in use
    loaded(ids)


def test_load_reports_missing_weights(tmp_path):
    llm = small()
    llm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"29/30 tensors match the model; 1 missing: model.norm.weight"):
        Llama.from_pretrained(tmp_path)


def test_load_refuses_a_shard_that_is_missing_and_another_models_layers(tmp_path):
    llm = small()
    llm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert Llama.from_pretrained(tmp_path).coverage == f"{len(state)}/{len(state)} tensors"
    (tmp_path / "model.safetensors").unlink()
    half = len(state) // 2
    shards = {"a.safetensors": list(state)[:half], "b.safetensors": list(state)[half:]}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    index = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert Llama.from_pretrained(tmp_path).coverage == f"{len(state)}/{len(state)} tensors"
    changed = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 4}
    whole = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"tensors match the model; \d+ missing: model.layers.3") as error:
        Llama.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(whole)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors: missing, but model.safetensors.index.json names it"):
        Llama.from_pretrained(tmp_path)


def test_the_language_model_of_a_videollama2(tmp_path):
    """Its files hold towers and connectors too, and its config.json says more than a Qwen2's."""
    llm = small(attention_bias=True)
    llm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    config |= {"model_type": "videollama2_qwen2", "architectures": ["Videollama2Qwen2ForCausalLM"],
               "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "stc_connector_v35",
               "num_frames": 16, "use_sliding_window": False, "sliding_window": 131072}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    others = ["mm_projector.s1.b1.conv1.conv.weight", "mm_projector.readout.0.weight", "mm_projector_a.weight",
              "vision_tower.vision_tower.vision_model.post_layernorm.weight", "audio_tower.patch_embedding.weight",
              "audio_tower.layer_norm.weight", "mamba_compressor.memory_projection.weight"]  # fmt: skip
    parts = {f"model.{name}": torch.ones(2) for name in others}
    save_file(state | parts, tmp_path / "model.safetensors")
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.coverage == (
        f"{len(state)}/{len(state)} tensors, left aside: 2 of model.mm_projector, 1 of model.mm_projector_a, 1 of "
        "model.vision_tower, 2 of model.audio_tower, 1 of model.mamba_compressor"
    )
    ids = torch.randint(0, 97, (1, 9))
    assert torch.equal(loaded(ids), llm(ids))
    assert loaded.config == llm.config
    (tmp_path / "model.safetensors").unlink()
    torch.save(state | parts, tmp_path / "pytorch_model.bin")  # as MultiMood's own trainer saves it
    again = Llama.from_pretrained(tmp_path)
    assert again.coverage == loaded.coverage
    assert torch.equal(again(ids), llm(ids))
    save_file(state | parts | {"model.adapter.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected: model\.adapter\.weight"):  # nothing is left aside by chance
        Llama.from_pretrained(tmp_path)


def test_config_of_every_transformers_generation(tmp_path):
    old = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    old |= {"model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "float16", "pretraining_tp": 1}
    config = LlamaConfig.from_json(old)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)
    assert LlamaConfig.from_json(old | {"rope_theta": 1000000, "rope_scaling": None}).rope_theta == 1e6
    new = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert LlamaConfig.from_json(new).rope_theta == 500000.0
    assert LlamaConfig.from_json(old | {"model_type": "qwen2"}).attention_bias
    assert LlamaConfig.from_json(old | {"eos_token_id": [7, 8]}).eos_token_id == [7, 8]
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert LlamaConfig.from_json(old | {"model_type": "qwen2"}).eos_token_id is None
    assert LlamaConfig.from_json(old | {"bos_token_id": None}).bos_token_id is None
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert LlamaConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"},
         "config: model_type 'mistral' is not supported (only 'llama', 'qwen2', 'videollama2_qwen2')"),
        ({"hidden_act": "gelu"}, "config: hidden_act 'gelu' is not supported (only 'silu')"),
        ({"rope_scaling": {"type": "linear"}}, "config: rope type 'linear' is not supported (only 'default')"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "config: rope type 'llama3' is not supported (only 'default')"),
        ({"attention_bias": True}, "config: attention_bias True is not supported (only False)"),
        ({"hidden_size": None}, "config: incomplete config, no hidden_size"),
    ],
)  # fmt: skip
def test_config_that_would_compute_something_else(changes, message):
    given = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"model_type": "llama"}
    with pytest.raises(UserError) as error:
        LlamaConfig.from_json(given | changes)
    assert str(error.value) == message


def test_a_published_model_continues_its_published_story():
    """stories260K of llama2.c, plain forward passes without a cache."""
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    data = Path(os.environ["EMOTORCH_DATA"], "llama")
    llm = Llama.from_pretrained(data / "stories260K")
    assert llm.num_parameters() == 260_032
    ids = torch.tensor([[int(i) for i in (data / "stories260K_greedy_ids.txt").read_text().split()]])
    with torch.no_grad():
        assert torch.equal(llm(ids)[0, :-1].argmax(-1), ids[0, 1:])
