import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from common.config import UserError
from model.mamba import Compressor, Mamba, MambaConfig, selective_scan

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48, "state_size": 5,
    "time_step_rank": 3,
}  # fmt: skip
VARIANTS = {
    "two layers": {"num_hidden_layers": 2},
    "a wide state and three taps": {"state_size": 16, "conv_kernel": 3, "num_hidden_layers": 1},
    "rank and width by their defaults": {"hidden_size": 40, "time_step_rank": "auto", "expand": 3},
}
PUBLISHED = {  # state-spaces/mamba-370m-hf
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 2048, "d_model": 1024,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.1, "intermediate_size": 2048, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 48, "num_hidden_layers": 48, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 64, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    mamba = Mamba(MambaConfig(**(SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in mamba.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return mamba


def published(folder, causal=False, **changes):
    """A transformers model with weights far enough from zero that every term shows, saved to `folder`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(**({k: v for k, v in SMALL.items() if k != "intermediate_size"} | changes))
    torch.manual_seed(0)
    model = (transformers.MambaForCausalLM if causal else transformers.MambaModel)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def inputs(length, size=2, width=6, states=3, dtype=torch.float32, scale=1.0):
    """x, dt, A, B, C of a scan; dt up to about 3 times `scale`."""
    torch.manual_seed(length)
    x, dt = torch.randn(2, size, length, width, dtype=torch.float64)
    B, C = torch.randn(2, size, length, states, dtype=torch.float64)
    A = -torch.randn(width, states, dtype=torch.float64).exp()
    return [z.to(dtype).requires_grad_() for z in (x, F.softplus(dt) * scale, A, B, C)]


def step_by_step(x, dt, A, B, C):
    """The recurrence as the paper has it, in float64."""
    x, dt, A, B, C = (z.double() for z in (x, dt, A, B, C))
    h, y = torch.zeros(len(x), *A.shape, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None] * x[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, 1)


def error(found, wanted):
    """Largest difference as a share of the largest value."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize(("chunk", "span"), [(1, 1), (4, 1), (64, 1), (4, 4), (12, 3), (64, 8), (None, None)])
def test_the_scan_is_the_recurrence_in_chunks_of_any_size(chunk, span):
    given = inputs(37)
    wanted = step_by_step(*given)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weights).sum(), given)
    y = selective_scan(*given, chunk=chunk, span=span)
    assert y.dtype == torch.float32
    assert error(y, wanted) < 1e-5
    for ours, theirs in zip(torch.autograd.grad((y * weights).sum(), given), gradients, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_scan_on_a_gpu():
    given = inputs(300)
    wanted = step_by_step(*given)
    there = [z.detach().cuda().requires_grad_() for z in given]
    y = selective_scan(*there)
    assert error(y.cpu(), wanted) < 1e-4
    gradients = torch.autograd.grad(wanted.square().sum(), given)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), there), gradients, strict=True):
        assert error(ours.cpu(), theirs) < 1e-3


@pytest.mark.parametrize("span", [1, 2])
def test_gradients_of_the_scan_are_those_of_finite_differences(span):
    given = inputs(7, size=2, width=2, states=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, chunk=4, span=span), given)


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_long_sequences_stay_finite_and_exact(scale):
    """With steps so short that nothing is forgotten, and so long that factors underflow."""
    given = inputs(2048, size=1, scale=scale)
    wanted = step_by_step(*given)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weights).sum(), given)
    for span in (1, 16):
        y = selective_scan(*given, chunk=256, span=span)
        assert y.isfinite().all()
        assert error(y, wanted) < 1e-5
        for ours, theirs in zip(torch.autograd.grad((y * weights).sum(), given), gradients, strict=True):
            assert ours.isfinite().all()
            assert error(ours, theirs) < 1e-4


def test_the_scan_keeps_no_state_of_a_single_step():
    given = inputs(256, states=8)
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(*given, chunk=64, span=1)
    assert sum(z.numel() for z in kept) == sum(z.numel() for z in given) + 256 // 64 * 2 * 6 * 8


def test_autocast_leaves_the_scan_alone():
    given = inputs(21)
    wanted = selective_scan(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_scan(*given)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert torch.equal(given[0].grad, torch.autograd.grad(wanted.sum(), given[0])[0])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_states_and_gradients_equal_transformers(tmp_path, changes):
    theirs = published(tmp_path, **changes)
    ours = Mamba.from_pretrained(tmp_path)
    names = dict(theirs.named_parameters())
    assert ours.coverage == f"{len(names)}/{len(names)} tensors"
    assert set(names) == {name for name, _ in ours.named_parameters()}
    ids = torch.randint(0, 61, (2, 43))
    wanted, found = theirs(ids).last_hidden_state, ours(ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    assert max(error(p.grad, names[name].grad) for name, p in ours.named_parameters()) < 1e-4


def test_every_state_is_that_of_the_sequence_alone():
    mamba = small()
    alone = [torch.randint(0, 61, (1, n)) for n in (1, 3, 30, 17)]
    padded = torch.cat([F.pad(ids, (0, 30 - ids.shape[1]), value=7) for ids in alone])
    with torch.no_grad():
        together = mamba(padded)
        for ids, states in zip(alone, together, strict=True):
            torch.testing.assert_close(states[: ids.shape[1]], mamba(ids)[0], atol=1e-5, rtol=0)


def test_a_new_model_starts_as_the_paper_has_it():
    mixer = Mamba(MambaConfig(**SMALL)).layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 6).expand(48, 5))
    assert torch.equal(mixer.D, torch.ones(48))
    dt = F.softplus(mixer.dt_proj.bias.detach())
    assert 1e-3 <= float(dt.min()) < 5e-3
    assert 2e-2 < float(dt.max()) <= 1e-1


def test_the_published_size():
    with torch.device("meta"):
        mamba = Mamba(MambaConfig(50280, 1024, 48, 2048, 16, 64))
    assert sum(p.numel() for p in mamba.parameters()) == 371_516_416


def test_gradient_checkpointing_recomputes_every_layer_to_the_same_gradients():
    mamba, ids = small(), torch.randint(0, 61, (2, 9))
    calls = []
    for layer in mamba.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for mamba.grad_checkpoint in (False, True):
        calls.clear()
        mamba.train().zero_grad()
        mamba(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in mamba.parameters()])
        assert len(calls) == (6 if mamba.grad_checkpoint else 3)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)


def test_weights_in_bf16_carry_states_in_fp32(tmp_path, monkeypatch):
    published(tmp_path)
    half, ids = Mamba.from_pretrained(tmp_path, torch.bfloat16), torch.randint(0, 61, (1, 200))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    whole = Mamba.from_pretrained(tmp_path)
    whole.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    dtypes = set()

    def scan(*given):
        dtypes.update(z.dtype for z in given)
        return selective_scan(*given)

    monkeypatch.setattr("model.mamba.selective_scan", scan)
    with torch.no_grad():
        found, wanted = half(ids), whole(ids)
    assert found.dtype == torch.float32
    assert dtypes == {torch.float32}
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_a_causal_models_file_of_either_generation(tmp_path):
    theirs = published(tmp_path, causal=True)
    file, ids = tmp_path / "model.safetensors", torch.randint(0, 61, (1, 12))
    state = load_file(file)
    assert all(name.startswith("backbone.") for name in state)
    wanted = theirs.backbone(ids).last_hidden_state
    old = {name.replace("embeddings.", "embedding."): tensor for name, tensor in state.items()}
    save_file(old | {"lm_head.weight": torch.zeros(61, 24)}, file)
    ours = Mamba.from_pretrained(tmp_path)
    assert ours.coverage == f"{len(state)}/{len(state)} tensors, 1 not used"
    torch.testing.assert_close(ours(ids), wanted, atol=1e-4, rtol=0)
    assert not ours.training


def test_files_of_other_models_are_refused(tmp_path):
    published(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    refused = {
        "model_type": "mamba2", "hidden_act": "relu", "use_bias": True, "use_conv_bias": False,
        "residual_in_fp32": False, "rms_norm": False,
    }  # fmt: skip
    for key, value in refused.items():
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=rf"config.json: {key} {value!r} is not supported \(only"):
            Mamba.from_pretrained(tmp_path)
    file.write_text(json.dumps({"d_model": 24, "n_layer": 3, "ssm_cfg": {}}))  # of the original implementation
    with pytest.raises(UserError, match="model_type None is not supported"):
        Mamba.from_pretrained(tmp_path)
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "state_size"}))
    with pytest.raises(UserError, match="incomplete config, no state_size"):
        Mamba.from_pretrained(tmp_path)
    file.write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"tensors match the model; 10 missing: layers.3.mixer.A_log"):
        Mamba.from_pretrained(tmp_path)
    file.write_text(json.dumps(config | {"state_size": 6}))
    with pytest.raises(UserError, match=r"of the wrong shape: layers.0.mixer.A_log is \(48, 5\), not \(48, 6\)"):
        Mamba.from_pretrained(tmp_path)


def test_the_published_config_gives_the_published_shape(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED))
    assert MambaConfig.from_json(file) == MambaConfig(50280, 1024, 48, 2048, 16, 64)
    needed = "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "state_size"
    bare = {key: PUBLISHED[key] for key in needed}
    for expand, inner in (({}, 2048), ({"expand": 3}, 3072)):
        file.write_text(json.dumps(bare | {"time_step_rank": "auto"} | expand))
        assert MambaConfig.from_json(file) == MambaConfig(50280, 1024, 48, inner, 16, 64)


def test_new_rows_of_the_embedding_are_spread_as_the_old_ones():
    mamba = small(vocab_size=400)
    with torch.no_grad():
        mamba.embeddings.weight.mul_(torch.linspace(0.1, 3, 24)).add_(torch.linspace(-2, 2, 24))
    old, ids = mamba.embeddings.weight.detach().clone(), torch.randint(0, 400, (1, 9))
    wanted = mamba(ids)
    assert mamba.grow(400) == mamba.grow(61) == 0
    assert mamba.coverage == ""
    assert mamba.grow(2400) == 2000
    assert mamba.coverage == "; 2,000 of 2,400 embedding rows are new"
    assert mamba.config.vocab_size == 2400
    table = mamba.embeddings.weight
    assert table.requires_grad
    assert torch.equal(table[:400], old)
    assert torch.equal(mamba(ids), wanted)
    torch.testing.assert_close(table[400:].mean(0), old.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(table[400:].std(0), old.std(0), atol=0.02, rtol=0.1)
    assert len(table[400:].unique(dim=0)) == 2000


def compressor(**changes):
    torch.manual_seed(1)
    return Compressor(small(**changes), width=10, mem_id=60).eval()


HISTORIES = [[5, 60, 7, 8, 60, 9], [1, 2, 3], [], [60], [4] * 20 + [60, 60] + [3] * 5 + [60]]


def test_rows_are_the_projected_states_at_the_marks():
    ours = compressor()
    with torch.no_grad():
        memory = ours(HISTORIES)
        assert [tuple(rows.shape) for rows in memory] == [(2, 10), (0, 10), (0, 10), (1, 10), (3, 10)]
        for ids, rows in zip(HISTORIES, memory, strict=True):
            if 60 in ids:
                states = ours.mamba(torch.tensor([ids]))[0]
                at = [i for i, token in enumerate(ids) if token == 60]
                wanted = states[at] @ ours.memory_projection.weight.T + ours.memory_projection.bias
                torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)
                torch.testing.assert_close(ours([ids])[0], rows, atol=1e-5, rtol=0)


def test_all_of_a_compressor_learns_from_its_rows():
    ours = compressor()
    torch.cat(ours(HISTORIES)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())


def test_histories_without_marks_give_no_rows():
    ours = compressor().bfloat16()
    memory = ours([[1, 2], []])
    assert [tuple(rows.shape) for rows in memory] == [(0, 10), (0, 10)]
    assert {rows.dtype for rows in [*memory, *ours([[1, 60]])]} == {torch.bfloat16}
    assert ours([]) == []


def test_a_compressor_in_bf16_learns():
    ours = compressor().bfloat16()
    torch.cat(ours(HISTORIES)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("token", [-100, 61])
def test_tokens_that_are_not_known_are_named(token):
    with pytest.raises(ValueError, match=rf"tokens from .*{token}.*, known are 61"):
        compressor()([[1, token, 60]])


def test_a_new_compressor_on_a_mamba(tmp_path):
    published(tmp_path, causal=True)
    ours = Compressor.from_pretrained(tmp_path, width=10, vocab=80, mem_id=79, dtype=torch.bfloat16)
    assert ours.coverage == "32/32 tensors; 19 of 80 embedding rows are new; memory_projection is new"
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert not ours.training
    assert ours([[1, 79, 3, 79]])[0].shape == (2, 10)
    assert Compressor.from_pretrained(tmp_path, width=10, vocab=50, mem_id=49).mamba.config.vocab_size == 61


def own_folder(folder, **config):
    """A compressor as the published training code saves it: a transformers model, a torch file, a config."""
    theirs = published(folder / "mamba")
    torch.manual_seed(2)
    projection = torch.nn.Linear(24, 10)
    torch.save(projection.state_dict(), folder / "memory_projection.pt")
    made = {"llm_input_size": 10, "mamba_hidden_size": 24, "mem_token_id": 60} | config
    (folder / "config.json").write_text(json.dumps(made))
    return lambda ids: projection(theirs(torch.tensor([ids])).last_hidden_state)[0]


def test_a_compressor_of_its_own_folder(tmp_path):
    theirs = own_folder(tmp_path)
    ours = Compressor.from_pretrained(tmp_path, width=10, vocab=61, mem_id=60)
    assert ours.coverage == "32/32 tensors of mamba, 2/2 tensors of memory_projection"
    assert not ours.training
    with torch.no_grad():
        torch.testing.assert_close(ours([[5, 60, 7, 60]])[0], theirs([5, 60, 7, 60])[[1, 3]], atol=1e-4, rtol=0)
    half = Compressor.from_pretrained(tmp_path, 10, 61, 60, torch.bfloat16, "meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, "meta")}


def test_folders_of_other_compressors_are_refused(tmp_path):
    own_folder(tmp_path)
    with pytest.raises(UserError, match="made for another tokenizer: its <MEM> is token 60, not 59"):
        Compressor.from_pretrained(tmp_path, width=10, vocab=61, mem_id=59)
    with pytest.raises(UserError, match="made for another tokenizer: it knows 61 tokens, not 70"):
        Compressor.from_pretrained(tmp_path, width=10, vocab=70, mem_id=60)
    with pytest.raises(UserError, match=r"projection.pt: 2 .* wrong shape: weight is \(10, 24\), not \(12, 24\)"):
        Compressor.from_pretrained(tmp_path, width=12, vocab=61, mem_id=60)
    torch.save({"weight": torch.zeros(10, 24)}, tmp_path / "memory_projection.pt")
    with pytest.raises(UserError, match=r"memory_projection.pt: 1/2 tensors match the model; 1 missing: bias"):
        Compressor.from_pretrained(tmp_path, width=10, vocab=61, mem_id=60)
    with pytest.raises(UserError, match=r"compressor weights 'nobody/nothing' not found .*hf download nobody/nothing"):
        Compressor.from_pretrained("nobody/nothing", width=10, vocab=61, mem_id=60)


def whole_model(state):
    inside = {f"model.mamba_compressor.{name}": tensor for name, tensor in state.items()}
    return inside | {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3), "lm_head.weight": torch.ones(61, 3)}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards", "file"])
def test_a_compressor_inside_a_multimood(tmp_path, kind):
    theirs = compressor()
    state = whole_model(theirs.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videollama2_qwen2", "hidden_size": 10}))
    path = tmp_path
    if kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif kind == "file":
        path = tmp_path / "non_lora_trainables.bin"
        torch.save({f"base_model.model.{name}": tensor for name, tensor in state.items()}, path)
    else:
        index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(index.values()):
            torch.save({name: state[name] for name in state if index[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    ours = Compressor.from_pretrained(path, width=10, vocab=61, mem_id=60)
    assert ours.coverage == "34/34 tensors"
    assert ours.mamba.config == theirs.mamba.config
    with torch.no_grad():
        for found, wanted in zip(ours(HISTORIES), theirs(HISTORIES), strict=True):
            assert torch.equal(found, wanted)
    half = Compressor.from_pretrained(path, 10, 61, 60, torch.bfloat16, "meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, "meta")}


def test_models_without_a_whole_compressor_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"

    def load():
        Compressor.from_pretrained(tmp_path, width=10, vocab=61, mem_id=60)

    save_file({"model.norm.weight": torch.ones(3)}, file)
    with pytest.raises(UserError, match="holds no compressor, which is a Mamba, a folder with mamba/ and"):
        load()
    state = whole_model(compressor().state_dict())
    save_file({name: tensor for name, tensor in state.items() if "dt_proj" not in name}, file)
    with pytest.raises(UserError, match=r"not a Mamba: no layers.0.mixer.dt_proj.weight"):
        load()
    del state["model.mamba_compressor.memory_projection.bias"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"33/34 tensors match the model; 1 missing: memory_projection.bias"):
        load()
    file.unlink()
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin"):
        load()
