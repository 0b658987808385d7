"""Projectors of speech and text: their loss written out, several ranks and seeds, and the published files."""

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.distributed as td
from torch.nn import functional as F

from common import checkpoint, dist
from common.config import UserError
from model import clap
from model.clap import Clap, ClapConfig, info_nce
from model.seeds import statistics

DIMS = {"audio": 5, "text": 7}
WIDTH = 6  # of the shared space


def sources(dims=DIMS, **kinds):
    """Vectors of these widths, one a clip; `kinds` says what else a modality is."""
    dense = {"kind": "dense", "frames": False}
    return {m: {"dim": dim, **(dense | kinds.get(m, {}))} for m, dim in dims.items()}


def build(seeds=(3,), dims=DIMS, **cfg):
    """A float64 model in eval mode whose biases are not zero."""
    model = Clap(ClapConfig(**({"proj_dim": WIDTH} | cfg)), sources(dims), seeds).eval()
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed + 1000)
        for p in model.parameters():
            p.data[i] += 0.2 * torch.randn(p[i].shape, generator=generator)
    return model.double()


def vectors(n=8, dims=DIMS, seed=0):
    """One vector (n, D) of each modality."""
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(n, dim, dtype=torch.float64, generator=generator) for m, dim in dims.items()}


def batch(model, x):
    """Features (K, B, 1, D) and masks (K, B, 1) of vectors (B, D), the same for every seed."""
    k = len(model.logit_scale)
    return (
        {m: value[None, :, None].expand(k, -1, -1, -1) for m, value in x.items()},
        {m: torch.ones(k, len(value), 1, dtype=torch.bool) for m, value in x.items()},
    )


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the model --------------------------------------------------------------------------------------------------------


def test_size_is_the_published_heads():
    model = Clap(ClapConfig(), sources({"audio": 768, "text": 768}), (1, 2))
    assert sum(p[0].numel() for p in model.parameters()) == 1_181_185
    assert model.cfg.proj_dim == 768


def test_a_projection_is_linear_then_of_length_one():
    model, x = build((3, 4)), vectors()
    found = model(*batch(model, x))
    for m, value in x.items():
        part = model.get_submodule(f"{m}_proj")
        for k in range(2):
            y = value @ part.weight[k].T + part.bias[k]
            close(found[m][k], y / y.square().sum(-1, keepdim=True).sqrt())


def test_dropout_is_before_the_length_and_only_while_training():
    model = build(dropout=0.5, proj_dim=500).train()
    x = vectors()["audio"][None]
    with torch.no_grad():
        z, whole = model.project("audio", x), model.eval().project("audio", x)
    close(z.norm(dim=-1), torch.ones(1, 8, dtype=torch.float64))
    kept = z != 0
    assert kept.double().mean() == pytest.approx(0.5, abs=0.05)
    ratio = torch.where(kept, z / whole, torch.nan)  # of each clip all that is kept is longer by one factor
    close(ratio.nan_to_num().amax(-1), ratio.nan_to_num(9.0).amin(-1))


def test_k_seeds_are_k_models():
    cfg, x = {"dropout": 0.0}, vectors()
    together = build((3, 4, 9), **cfg)
    z = together(*batch(together, x))
    for i, seed in enumerate((3, 4, 9)):
        alone = build((seed,), **cfg)
        for name, p in alone.named_parameters():
            assert torch.equal(p[0], together.get_parameter(name)[i]), name
        for m, value in alone(*batch(alone, x)).items():
            close(z[m][i], value[0])
    assert not torch.allclose(z["audio"][0], z["audio"][1])


def test_the_factor_of_similarities():
    model = Clap(ClapConfig(proj_dim=4, temperature=0.05, max_scale=50.0), sources(), (1, 2))
    close(model.logit_scale.detach().exp(), torch.tensor([20.0, 20.0]), 1e-5)
    model.logit_scale.data = torch.tensor([-0.3, 9.0])
    model.clamp_scale()
    close(model.logit_scale.detach().exp(), torch.tensor([1.0, 50.0]), 1e-5)


def test_what_is_fixed_before_training():
    parts = sources({"audio": 3, "text": 9}, audio={"frames": True}, text={"kind": "ids"})
    generator = torch.Generator().manual_seed(0)
    frames = torch.cat([torch.randn(20, 3, generator=generator) + 5, torch.zeros(1, 3)])
    ids = torch.tensor([4, 4, 1, 4, 7, 1, 1, 2, 0], dtype=torch.int32)
    rows = torch.tensor([[0, 1, 2], [3, 8, 8], [4, 5, 6], [8, 8, 8]])  # the ids of three clips; the 2 is of none
    for normalize in (True, False):
        model = Clap(ClapConfig(proj_dim=WIDTH, bag_dim=4, normalize=normalize), parts, (1, 2))
        # one clip of 15 frames; the other five are beyond what is read of a clip
        model.learn_statistics("audio", frames, torch.stack([torch.arange(15), torch.full((15,), 20)]))
        mean = frames[:15].double().mean(0) if normalize else torch.zeros(3).double()
        close(model.get_buffer("mean_audio").double(), mean, 1e-6)
        seen = []
        model.fronts["text"].set_texts = seen.append  # counts clips, not occurrences
        model.learn_statistics("text", ids, rows)
        assert [texts.tolist() for texts in seen] == [[0, 2, 0, 0, 2, 0, 0, 1, 0]]


def test_one_scale_keeps_the_shape_of_a_spectrum():
    parts = sources({"audio": 3, "stats": 3}, audio={"frames": True})
    model = Clap(ClapConfig(proj_dim=WIDTH, one_scale=True), parts, (1,))
    x = torch.randn(200, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([4.0, 5.0, 9.0])
    for m in parts:
        model.learn_statistics(m, torch.cat([x, torch.zeros(1, 3)]), torch.arange(200)[:, None])
    close(model.standardize("audio", x)[0], (x - x.mean()) / x.std(correction=0), 1e-5)
    close(model.standardize("stats", x)[0], (x - x.mean(0)) / x.std(0, correction=0), 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_standardised_by_the_train_split(normalize):
    model = build(normalize=normalize)
    x = {m: 3 * value.float() + 2 for m, value in vectors(400).items()}
    x["audio"][0, 0], x["audio"][1], x["audio"][2, 1] = 1e6, 0.0, torch.nan
    mean, std = statistics(x["audio"])
    rows = x["audio"].double()[torch.arange(400) != 1]  # a vector of zeros is none
    close(mean.double(), rows.nanmean(0), 1e-5)
    close(std.double(), (rows - rows.nanmean(0)).square().nanmean(0).sqrt(), 1e-4)
    if normalize:
        model.set_statistics("audio", mean, std)
    z, there = model.standardize("audio", x["audio"])
    assert there.tolist() == [i != 1 for i in range(400)]
    assert not z[1].any()
    assert z[2, 1] == 0  # no number: the mean
    assert z[0, 0] == (5.0 if normalize else 1e6)
    expected = ((x["audio"] - mean) / std).clamp(-5, 5) if normalize else x["audio"]
    close(z[3:], expected[3:].double() if z.dtype == torch.float64 else expected[3:], 1e-5)


def test_fronts_make_one_vector_of_frames_and_ids():
    parts = sources({"audio": 8, "text": 50}, audio={"frames": True}, text={"kind": "ids"})
    model = Clap(ClapConfig(proj_dim=WIDTH, bag_dim=10), parts, (1, 2)).eval()
    generator = torch.Generator().manual_seed(0)
    x = {"audio": torch.randn(2, 3, 9, 8, generator=generator), "text": torch.randint(50, (2, 3, 4))}
    z = model(x, {m: torch.ones(value.shape[:3], dtype=torch.bool) for m, value in x.items()})
    assert {m: tuple(value.shape) for m, value in z.items()} == {"audio": (2, 3, WIDTH), "text": (2, 3, WIDTH)}
    assert model.widths["text"] == 10


def test_statistics_of_the_sound_go_with_it():
    dims = {"audio": 5, "stats": 3, "text": 7}
    model = Clap(ClapConfig(proj_dim=WIDTH), sources(dims), (3, 4)).double().eval()
    x = vectors(dims=dims)
    assert model.widths == {"audio": 8, "text": 7}
    assert model.audio_proj.weight.shape == (2, WIDTH, 8)
    found = model.vectors(*batch(model, x))
    assert torch.equal(found["audio"][1], torch.cat([x["audio"], x["stats"]], -1))
    assert torch.equal(found["text"][1], x["text"])
    assert set(model(*batch(model, x))) == {"audio", "text"}


# --- the loss ---------------------------------------------------------------------------------------------------------


def unit(k, n, seed):
    x = torch.randn(k, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def test_the_loss_of_single_scripts_is_symmetric_cross_entropy():
    z, scale = {"audio": unit(2, 7, 0), "text": unit(2, 7, 1)}, torch.tensor([3.0, 11.0], dtype=torch.float64)
    script = torch.stack([torch.randperm(7), torch.arange(7)])
    found = info_nce(z, z, (script, script), scale)
    for k in range(2):
        logits, own = scale[k] * z["text"][k] @ z["audio"][k].T, torch.arange(7)
        close(found[k], (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


def looped(one, other, script, scale):
    """Mean over clips of the cross entropy with an equal share for each clip of the same script."""
    total = 0.0
    for i in range(len(one)):
        logits = [scale * sum(a * b for a, b in zip(one[i], row, strict=True)) for row in other]
        bottom = math.log(sum(math.exp(each) for each in logits))
        right = [logits[j] - bottom for j in range(len(other)) if script[j] == script[i]]
        total -= sum(right) / len(right)
    return total / len(one)


def test_clips_of_one_script_share_the_target():
    z, scale = {"audio": unit(2, 8, 2), "text": unit(2, 8, 3)}, torch.tensor([2.0, 9.0], dtype=torch.float64)
    script = torch.tensor([[0, 1, 0, 2, 3, 0, 3, 4], [5, 5, 5, 5, 5, 5, 5, 5]])
    found = info_nce(z, z, (script, script), scale).tolist()
    for k in range(2):
        words, voice = (z[m][k].tolist() for m in ("text", "audio"))
        s, factor = script[k].tolist(), float(scale[k])
        expected = (looped(words, voice, s, factor) + looped(voice, words, s, factor)) / 2
        assert found[k] == pytest.approx(expected, rel=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss():
    z, scale = {"audio": unit(1, 6, 4), "text": unit(1, 6, 5)}, torch.tensor([5.0], dtype=torch.float64)
    script = torch.tensor([[0, 1, 2, 0, 3, 1]])
    parts = [
        info_nce({m: value[:, rows] for m, value in z.items()}, z, (script[:, rows], script), scale)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    close(sum(parts), info_nce(z, z, (script, script), scale))


def test_the_loss_is_learnt():
    """Paired noise: projectors find what is shared, though each modality lies in its own basis."""
    model = Clap(ClapConfig(proj_dim=WIDTH, dropout=0.0), sources(), (3,))
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(60, 4, generator=generator)
    x = {m: said @ torch.randn(4, dim, generator=generator) for m, dim in DIMS.items()}
    script = torch.arange(60)[None]

    def step(lr):
        """One step of gradient descent; the share of words whose nearest voice was their own."""
        z = model(*batch(model, x))
        loss = info_nce(z, z, (script, script), model.logit_scale.exp()).sum()
        params = list(model.parameters())
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.data -= lr * grad
        model.clamp_scale()
        return ((z["text"] @ z["audio"].mT)[0].argmax(1) == script[0]).float().mean()

    shares = [step(0.1) for _ in range(150)]
    assert shares[0] < 0.2
    assert shares[-1] > 0.8


# --- several ranks ----------------------------------------------------------------------------------------------------

CLIPS = 12
SCRIPTS = torch.tensor([0, 1, 2, 0, 3, 4, 1, 5, 5, 6, 0, 7])  # clips of a script lie on both of two ranks


def gradients():
    """Loss and gradients, summed over ranks, of one step on the same clips, taken in turn by the ranks."""
    here = dist.setup("cpu")
    model = build((3, 4), dropout=0.0)
    x, mask = batch(model, vectors(CLIPS))
    shares = [torch.arange(rank, CLIPS, here.world) for rank in range(here.world)]
    rows = shares[here.rank]
    z = model({m: part[:, rows] for m, part in x.items()}, {m: part[:, rows] for m, part in mask.items()})
    every = {m: dist.gather_rows(part) for m, part in z.items()}
    scripts = SCRIPTS[rows].expand(2, -1), SCRIPTS[torch.cat(shares)].expand(2, -1)
    loss = info_nce(z, every, scripts, model.logit_scale.exp())
    loss.sum().backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    if here.world > 1:
        for value in found.values():
            td.all_reduce(value)
    return {name: value.numpy() for name, value in found.items()}


def test_two_ranks_have_the_gradients_of_one(ranks):
    (alone,) = ranks(1, gradients)
    for each in ranks(2, gradients):
        assert each.keys() == alone.keys()
        for name, value in alone.items():
            assert abs(value).max() > 1e-4, name
            assert abs(each[name] - value).max() < 1e-6, name


def test_gradients_are_those_of_the_formula():
    """The loss above in plain operations of autograd, of the second seed."""
    model, x = build((3, 4), dropout=0.0), vectors(CLIPS)
    weights = {name: p[1].detach().clone().requires_grad_() for name, p in model.named_parameters()}
    z = {}
    for m, value in x.items():
        y = value @ weights[f"{m}_proj.weight"].T + weights[f"{m}_proj.bias"][0]
        z[m] = y / y.norm(dim=-1, keepdim=True)
    logits = weights["logit_scale"].exp() * z["text"] @ z["audio"].T
    right = (SCRIPTS[:, None] == SCRIPTS).double()
    share = right / right.sum(1, keepdim=True)
    loss = -(share * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum() / (2 * CLIPS)
    loss.backward()
    found = gradients()
    assert found["loss"][1] == pytest.approx(loss.item(), rel=1e-6)
    for name, weight in weights.items():
        assert weight.grad is not None
        close(torch.as_tensor(found[name][1]), weight.grad, 1e-6)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path):
    model = Clap(ClapConfig(proj_dim=WIDTH, temperature=0.2), sources(), (3, 4))
    model.set_statistics("audio", torch.randn(5), torch.rand(5) + 0.5)
    state = {"step": 1, "config": {"model": asdict(model.cfg)}, "sources": model.sources, "seeds": [3, 4]}
    folder = checkpoint.save(tmp_path, "epoch_001", model, {}, state, {})
    back, coverage = clap.load(folder, checkpoint.read_state(folder))
    assert coverage == "9/9 tensors"
    assert not back.training
    raw = {m: value.float() for m, value in vectors().items()}
    model.eval()
    x, mask = batch(model, {m: model.standardize(m, value)[0] for m, value in raw.items()})
    again, _ = batch(back, {m: back.standardize(m, value)[0] for m, value in raw.items()})
    for m, z in model(x, mask).items():
        assert torch.equal(back(again, mask)[m], z)


def heads(seed=0, dims=DIMS, width=WIDTH):
    """The tensors of the published heads."""
    generator = torch.Generator().manual_seed(seed)
    drawn = partial(torch.randn, generator=generator)
    return {m: {"weight": drawn(width, dim), "bias": drawn(width)} for m, dim in dims.items()}


def layouts(parts):
    """The published projectors as each of their files has them."""
    flat = {f"{m}_proj.fc.{name}": value for m, part in parts.items() for name, value in part.items()}
    moments = {i: {"step": torch.tensor(9.0), "exp_avg": value} for i, value in enumerate(flat.values())}
    return {
        "export": {f"{m}_proj": {f"fc.{name}": value for name, value in part.items()} for m, part in parts.items()},
        "bare": {f"{m}_proj": part for m, part in parts.items()},
        "heads": flat | {"logit_scale": torch.tensor(0.01)},
        "training": {
            "model_state": {f"module.{name}": x for name, x in (flat | {"logit_scale": torch.tensor(0.01)}).items()},
            "optimizer_state": {"state": moments, "param_groups": [{"lr": 3e-6, "params": [0, 1, 2, 3]}]},
            "epoch": 19, "global_step": 5800, "config": {"batch_size": 4096, "lr": 3e-6},
        },
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["export", "bare", "heads", "training"])
def test_published_projectors(tmp_path, layout):
    parts, path = heads(), tmp_path / "clap.pt"
    torch.save(layouts(parts)[layout], path)
    found = clap.original_projectors(path)
    assert found.keys() == parts.keys()
    for m, part in parts.items():
        assert all(torch.equal(found[m][name], part[name]) for name in part)

    model = Clap(ClapConfig(proj_dim=WIDTH), sources(), (3, 4)).eval()
    assert clap.load_original(model, path) == "4/4 tensors of the projectors"
    raw = {m: 20 * value.float() for m, value in vectors().items()}
    x, mask = batch(model, {m: model.standardize(m, value)[0] for m, value in raw.items()})
    z = model(x, mask)
    for m, value in raw.items():
        y = value.double() @ parts[m]["weight"].double().T + parts[m]["bias"]
        for k in range(2):
            close(z[m][k].double(), y / y.norm(dim=-1, keepdim=True), 1e-5)
    assert not model.cfg.normalize  # so that a checkpoint of this model reads embeddings as they are, too


REFUSED = {
    "no weight": (lambda p: p["text_proj"].pop("fc.weight"), "no text_proj.weight: not a file of CLAP projectors"),
    "no bias": (lambda p: p["audio_proj"].pop("fc.bias"), "no audio_proj.bias: not a file of CLAP projectors"),
    "no text": (lambda p: p.pop("text_proj"), "no text_proj.bias: not a file of CLAP projectors"),
    "a vector": (lambda p: p["audio_proj"].update({"fc.weight": torch.ones(6)}), "audio_proj has shapes (6,) and (6,)"),
    "bias": (lambda p: p["text_proj"].update({"fc.bias": torch.ones(3)}), "text_proj has shapes (6, 7) and (3,)"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_file_that_is_no_projectors(tmp_path, problem):
    change, message = REFUSED[problem]
    content, path = layouts(heads())["export"], tmp_path / "clap.pt"
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        clap.original_projectors(path)
    assert str(error.value) == f"{path}: {message}"


def test_another_models_file(tmp_path):
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict(), path)
    with pytest.raises(UserError, match="bias: not a file of CLAP projectors"):
        clap.original_projectors(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(UserError, match="holds a Tensor, not tensors by name"):
        clap.original_projectors(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="not readable as tensors only"):
        clap.original_projectors(path)


@pytest.mark.parametrize(("dims", "width"), [({"audio": 5, "text": 8}, 6), ({"audio": 5, "text": 7}, 9)])
def test_projectors_of_another_size(tmp_path, dims, width):
    path = tmp_path / "clap.pt"
    torch.save(layouts(heads(dims=dims, width=width))["export"], path)
    model = Clap(ClapConfig(proj_dim=WIDTH), sources(), (3,))
    with pytest.raises(UserError) as error:
        clap.load_original(model, path)
    m = "text" if width == WIDTH else "audio"
    theirs, ours = (width, dims[m]), (WIDTH, DIMS[m])
    assert str(error.value) == f"{path}: {m}_proj is {theirs}, the features and --proj-dim here make it {ours}"
