"""The classifier of projected speech and words: the published network, what is hidden, what is frozen, K seeds."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from common import checkpoint
from common.config import UserError
from model import slm
from model.clap import MODALITIES, ClapConfig
from model.slm import BLOCKS, Slm, SlmConfig, hide

DIMS = {"audio": 5, "text": 7}
WIDTH, HIDDEN, CLASSES = 6, 9, 4
FORMS = ("normalised", "original")


def sources(dims=DIMS):
    return {m: {"dim": dim, "kind": "dense", "frames": False} for m, dim in dims.items()}


def config(form="normalised", dims=(WIDTH, HIDDEN), **cfg):
    return SlmConfig(clap=ClapConfig(proj_dim=dims[0]), form=form, hidden_dim=dims[1], **cfg)


def build(form="normalised", seeds=(3,), dims=DIMS, **cfg):
    """A float64 model in eval mode; neither its biases nor its norms are those that it starts with."""
    model = Slm(config(form, **cfg), sources(dims), CLASSES, seeds).eval()
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed + 1000)
        for p in model.parameters():
            p.data[i] += 0.3 * torch.randn(p[i].shape, generator=generator)
    return model.double()


def inputs(k=1, n=8, seed=0, dims=DIMS):
    """Vectors (K, B, 1, D) and masks (K, B, 1) of each modality, the same for every seed; all are there."""
    generator = torch.Generator().manual_seed(seed)
    x = {m: torch.randn(n, 1, dim, dtype=torch.float64, generator=generator) for m, dim in dims.items()}
    return (
        {m: value.expand(k, *value.shape) for m, value in x.items()},
        {m: torch.ones(k, n, 1, dtype=torch.bool) for m in x},
    )


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the published network --------------------------------------------------------------------------------------------


def test_the_published_size():
    with torch.device("meta"):
        model = Slm(SlmConfig(form="original"), sources({"audio": 768, "text": 768}), 36, (1, 2))
        model.freeze_projectors()
        bare = sum(p[0].numel() for p in model.parameters() if p.requires_grad)
    assert bare == 6_332_452
    assert not list(model.clap.parameters())
    projectors = {name: b[0].numel() for name, b in model.named_buffers() if "_proj." in name}
    assert sum(projectors.values()) == 1_181_184


def published(tensors, x_a, x_t):
    """Logits (B, C) of the published network with weights as it names them."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()

    s_a, s_t = linear("clap.audio_proj", x_a), linear("clap.text_proj", x_t)
    s_a, s_t = (s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-8) for s in (s_a, s_t))
    q, k, v = linear("W_q", s_t), linear("W_k", s_a), linear("W_v", linear("prosody_lin", x_a))
    gate = 1 / (1 + torch.exp(-(q * k).sum(-1, keepdim=True) / s_a.shape[-1] ** 0.5))
    feat = torch.cat([gate * v, s_a, s_t, s_a * s_t, abs(s_a - s_t)], -1)
    hidden = linear("mlp.0", feat)
    return linear("mlp.3", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def tensors(seed=0, dims=DIMS, width=WIDTH, hidden=HIDDEN, classes=CLASSES):
    """Random weights of the published network."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "clap.audio_proj": (width, dims["audio"]), "clap.text_proj": (width, dims["text"]),
        "prosody_lin": (width, dims["audio"]), "W_q": (width, width), "W_k": (width, width), "W_v": (width, width),
        "mlp.0": (hidden, BLOCKS * width), "mlp.3": (classes, hidden),
    }  # fmt: skip
    made = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return made | {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}


def published_file(path, weights):
    """A checkpoint as the published training writes it."""
    torch.save({
        "model_state": {f"module.{name}": value for name, value in weights.items()},
        "optimizer_state": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": []},
        "epoch": 149, "global_step": 9, "val_acc": 0.5, "best_val_acc": 0.5, "config": {"num_emotions": CLASSES},
    }, path)  # fmt: skip
    return path


@pytest.mark.parametrize("frozen", [False, True])
def test_the_published_weights_give_the_published_logits(tmp_path, frozen):
    weights = tensors()
    path = published_file(tmp_path / "slm_stage3_best.pt", weights)
    model = Slm(config("original"), sources(), CLASSES, (3, 4)).eval()
    if frozen:
        model.freeze_projectors()
    assert slm.load_original(model, path) == "16/16 tensors of the SLM"
    model.double()
    x, mask = inputs(2)
    x = {m: (20 * value).float() for m, value in x.items()}
    out = model({m: model.clap.standardize(m, value)[0].double() for m, value in x.items()}, mask)
    assert out.shape == (2, 8, CLASSES)
    expected = published(weights, *(x[m][0, :, 0].double() for m in MODALITIES))
    for logits in out:
        close(logits, expected, 1e-6)  # F.normalize has no 1e-8 beside a length


def test_the_original_form_is_the_formula():
    model = build("original", (3, 4))
    x, mask = inputs(2)
    out = model(x, mask)
    for k in range(2):
        weights = {name: p[k, 0] if name.endswith("bias") else p[k] for name, p in model.named_parameters()}
        close(out[k], published(weights, *(x[m][k, :, 0] for m in MODALITIES)), 1e-6)


def test_bare_tensors_load_too(tmp_path):
    path = tmp_path / "slm.pt"
    torch.save(tensors(), path)
    model = Slm(config("original"), sources(), CLASSES, (3,))
    assert slm.load_original(model, path) == "16/16 tensors of the SLM"
    assert torch.equal(model.W_q.weight[0], tensors()["W_q.weight"])


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("normalised", {}, "16/30 tensors match the model; 14 missing: absent.audio, absent.text, direct.bias, ..."),
        ("original", {"W_q.weight": None}, "15/16 tensors match the model; 1 missing: W_q.weight"),
        ("original", {"head.weight": torch.ones(2)}, "16/16 tensors match the model; 1 unexpected: head.weight"),
        ("original", {"mlp.3.bias": torch.ones(36)},
         "1 tensors of the wrong shape: mlp.3.bias is (36,), not (4,)"),
        ("original", {"clap.text_proj.weight": torch.ones(6, 8)},
         "1 tensors of the wrong shape: clap.text_proj.weight is (6, 8), not (6, 7)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit(tmp_path, form, change, message):
    weights = {name: value for name, value in (tensors() | change).items() if value is not None}
    path = published_file(tmp_path / "slm.pt", weights)
    with pytest.raises(UserError) as error:
        slm.load_original(Slm(config(form), sources(), CLASSES, (3,)), path)
    assert str(error.value) == f"{path}: {message}"


# --- what is hidden ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gone", MODALITIES)
def test_an_absent_modality_is_not_read(form, gone):
    model = build(form, (3, 4))
    (x, mask), (other, _) = inputs(2), inputs(2, seed=1)
    mask[gone][:, 1:6] = False
    out = model(x, mask)
    close(model(x | {gone: other[gone]}, mask)[:, 1:6], out[:, 1:6])
    wild = x | {gone: torch.where(mask[gone][..., None], x[gone], torch.nan)}
    close(model(wild, mask), out)  # neither clips that lack it nor the others
    here = next(m for m in MODALITIES if m != gone)
    assert not torch.allclose(model(x | {here: other[here]}, mask)[:, 1:6], out[:, 1:6])
    assert not torch.allclose(model(*inputs(2))[:, 1:6], out[:, 1:6])  # it would have counted


@pytest.mark.parametrize("form", FORMS)
def test_clips_without_anything_are_alike(form):
    model = build(form)
    x, mask = inputs()
    out = model(x, {m: torch.zeros_like(part) for m, part in mask.items()})
    assert torch.isfinite(out).all()
    close(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("only", MODALITIES)
def test_data_of_one_modality(form, only):
    model = build(form, dims={only: DIMS[only]})
    x, mask = inputs(dims={only: DIMS[only]})
    out = model(x, mask)
    assert out.shape == (1, 8, CLASSES)
    assert torch.isfinite(out).all()
    assert out.std(1).min() > 1e-3  # and they are told apart
    model.train()(x, mask).sum().backward()
    grad = model.clap.get_submodule(f"{only}_proj").get_parameter("weight").grad
    assert grad is not None
    assert grad.any()


@pytest.mark.parametrize("chance", [0.15, 0.8, 1.0])
def test_hiding_takes_one_of_two(chance):
    there = {m: torch.ones(2, 20_000, 1, dtype=torch.bool) for m in MODALITIES}
    there["audio"][:, :5000] = False
    there["text"][:, 2500:7500] = False
    before = {m: part.clone() for m, part in there.items()}
    torch.manual_seed(0)
    left = hide(there, chance)
    assert all(torch.equal(there[m], before[m]) for m in MODALITIES)
    assert all(not (left[m] & ~there[m]).any() for m in MODALITIES)
    both = there["audio"] & there["text"]
    assert torch.equal(left["audio"] | left["text"], there["audio"] | there["text"])  # never all that there is
    assert all(torch.equal(left[m][~both], there[m][~both]) for m in MODALITIES)
    for m in MODALITIES:
        assert (~left[m][both]).double().mean() == pytest.approx(chance / 2, abs=0.015)


def test_modalities_are_hidden_while_training_only():
    model, hidden = build(modality_dropout=0.9, dropout=0.0), build(modality_dropout=0.0, dropout=0.0)
    for each in (model, hidden):
        each.clap.drop.p = 0.0
    x, mask = inputs(n=64)
    close(model(x, mask), hidden(x, mask))
    torch.manual_seed(0)
    out, full = model.train()(x, mask), hidden.train()(x, mask)
    changed = ~torch.isclose(out, full).all(-1)
    assert 0.7 < changed.double().mean() <= 1
    without = [hidden(x, mask | {m: torch.zeros_like(mask[m])}) for m in MODALITIES]
    for k, i in changed.nonzero().tolist():
        assert any(torch.allclose(out[k, i], each[k, i]) for each in without)


# --- what is frozen ---------------------------------------------------------------------------------------------------


def test_frozen_projectors_stay_as_they_are(tmp_path):
    model = build(modality_dropout=0.0, dropout=0.0)
    before = {name: p.detach().clone() for name, p in model.clap.named_parameters()}
    held = set(checkpoint.trainable_state(model)) | {"clap.logit_scale"}
    model.freeze_projectors()
    assert not list(model.clap.parameters())
    assert {name for name in held if "_proj." in name} == {
        f"clap.{m}_proj.{name}" for m in MODALITIES for name in ("weight", "bias")
    }
    assert set(checkpoint.trainable_state(model)) == held  # all of it is in a checkpoint
    x, mask = inputs(n=200)
    model.train()
    for _ in range(2):  # two steps: nothing is random here, and only the rest learns
        out = model(x, mask)
        assert torch.equal(model(x, mask), out)
        params = dict(model.named_parameters())
        grads = torch.autograd.grad(F.cross_entropy(out[0], torch.arange(200) % CLASSES), list(params.values()))
        for (name, p), grad in zip(params.items(), grads, strict=True):
            assert grad.any() or name.startswith("absent"), name
            p.data -= 0.1 * grad
    for name, value in before.items():
        assert torch.equal(model.clap.get_buffer(name), value)
    assert model.training
    assert not model.clap.training
    assert not model.eval().mlp.training
    close(model(x, mask), model.train()(x, mask))


def test_projectors_that_learn_have_dropout():
    model = build(modality_dropout=0.0, dropout=0.0).train()
    x, mask = inputs()
    out = model(x, mask)
    assert not torch.allclose(model(x, mask), out)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.clap.named_parameters() if "_proj" in name)
    assert not model.clap.logit_scale.requires_grad


# --- the normalised form ----------------------------------------------------------------------------------------------


def test_blocks_are_normalised_one_by_one():
    """Whatever their sizes in the original form, each block reaches the classifier with mean 0 and deviation 1."""
    cfg, k = {"modality_dropout": 0.0}, 2
    model, original = build("normalised", (3, 4), **cfg), build("original", (3, 4), **cfg)
    for name, p in original.named_parameters():
        p.data.copy_(model.get_parameter(name))
    x, mask = inputs(k)
    blocks = original.features(x, mask).unflatten(-1, (BLOCKS, WIDTH))
    expected = []
    assert model.norms is not None
    for i, norm in enumerate(model.norms):
        block = blocks[:, :, i]
        block = (block - block.mean(-1, keepdim=True)) / (block.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        scale, bias = norm.get_parameter("scale"), norm.get_parameter("bias")
        expected.append(block * scale[:, None] + bias[:, None])
    close(model.features(x, mask), torch.cat(expected, -1))


def test_the_direct_way_is_a_linear_layer_over_the_vectors():
    cfg = config("normalised")
    fresh = Slm(cfg, sources(), CLASSES, (3, 4)).eval().double()
    x, mask = inputs(2)
    mask["text"][:, 2] = False
    close(fresh(x, mask), fresh.mlp(fresh.features(x, mask)))  # to begin with nothing goes there
    model = build("normalised", (3, 4))
    assert model.direct is not None
    for k in range(2):
        vectors = torch.cat([x[m][k, :, 0] * mask[m][k] for m in MODALITIES], -1)
        straight = vectors @ model.direct.weight[k].T + model.direct.bias[k]
        close(model(x, mask)[k], model.mlp(model.features(x, mask))[k] + straight)


def test_dropout_of_what_is_read():
    model = build("normalised", input_dropout=0.5, dropout=0.0, modality_dropout=0.0)
    model.clap.drop.p = 0.0
    x, mask = inputs()
    close(model(x, mask), model(x, mask))
    model.train()
    assert not torch.allclose(model(x, mask), model(x, mask))


# --- seeds and checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_k_seeds_are_k_models(form):
    seeds = (3, 4, 9)
    together = build(form, seeds)
    out = together(*inputs(3))
    for i, seed in enumerate(seeds):
        alone = build(form, (seed,))
        for name, p in alone.named_parameters():
            assert torch.equal(p[0], together.get_parameter(name)[i]), name
        close(out[i], alone(*inputs())[0])
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_comes_back(tmp_path, form, frozen):
    model = build(form, (3, 4)).float()
    model.clap.set_statistics("audio", torch.randn(5), torch.rand(5) + 0.5)
    if frozen:
        model.freeze_projectors()
    state = {
        "step": 1, "config": {"model": asdict(model.cfg)}, "sources": model.clap.sources, "seeds": [3, 4],
        "labels": [f"label {i}" for i in range(CLASSES)], "frozen": frozen,
    }  # fmt: skip
    folder = checkpoint.save(tmp_path, "epoch_001", model.train(), {}, state, {})
    back, coverage = slm.load(folder, checkpoint.read_state(folder))
    tensors = len(checkpoint.trainable_state(model))
    assert coverage == f"{tensors}/{tensors} tensors"
    assert back.frozen == frozen
    assert not back.training
    model.eval()
    x, mask = inputs(2)
    raw = {m: value.float() for m, value in x.items()}
    ours, theirs = ({m: each.clap.standardize(m, value)[0] for m, value in raw.items()} for each in (model, back))
    assert torch.equal(back(theirs, mask), model(ours, mask))


def test_another_forms_checkpoint(tmp_path):
    model = Slm(config("normalised"), sources(), CLASSES, (3,))
    state = {"step": 1, "sources": sources(), "seeds": [3], "labels": ["a"] * CLASSES, "frozen": False}
    state |= {"config": {"model": asdict(model.cfg)}}
    folder = checkpoint.save(tmp_path, "epoch_001", model, {}, state, {})
    wrong = copy.deepcopy(state)
    wrong["config"]["model"]["form"] = "original"
    with pytest.raises(UserError, match="14 unexpected: absent"):
        slm.load(folder, wrong)
