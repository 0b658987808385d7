"""Fusion models: the guide's network, formulas written out, PyTorch's own layers, and what must not change a clip."""

import itertools
from collections import OrderedDict
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import checkpoint
from common.config import UserError
from model import fusion
from model.fusion import HEADS, Fusion, FusionConfig
from model.seeds import Product, heads, statistics

DIMS = {"text": 7, "audio": 5, "video": 4}
FRAMES = {"text": 4, "audio": 11, "video": 9}  # audio and video are longer than xfuse's latents
KINDS = tuple(fusion.KINDS)
SEQUENCES = ("xfuse", "mult")  # where a frame's place counts
SEEDS = (5, 7, 42)
GUIDE = {"text": 768, "audio": 768, "video": 25}


def build(model, head="7", seeds=(5,), dims=DIMS, frames=FRAMES, **cfg):
    """A small float64 model in eval mode; neither its biases nor its statistics are those that it starts with."""
    made = Fusion(FusionConfig(model, head, fusion_dim=16, **cfg), dims, frames, seeds).eval()
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed + 1000)
        for p in made.parameters():
            p.data[i] += 0.2 * torch.randn(p[i].shape, generator=generator)
    generator = torch.Generator().manual_seed(1)
    for m, dim in dims.items():
        made.set_statistics(m, torch.randn(dim, generator=generator), 0.5 + torch.rand(dim, generator=generator))
    return made.double()


def clips(n=6, frames=FRAMES, dims=DIMS, seed=0):
    """Raw frames of each modality (n, T, D), ragged, one of them lost inside; clips 1 to 3 lack a modality each."""
    generator = torch.Generator().manual_seed(seed)
    x = {}
    for i, (m, dim) in enumerate(dims.items()):
        x[m] = 2 * torch.randn(n, frames[m], dim, generator=generator)
        for row in range(n):
            x[m][row, 1 + (row + i) % frames[m] :] = 0
        x[m][0, :3] = torch.randn(3, dim, generator=generator)
        x[m][0, 1] = 0
        x[m][1 + i] = 0
    return x


def standard(model, x):
    """Standardised frames and masks (K, B, ...) of raw ones (B, ...), the same for every seed."""
    k = len(model.classifier.weight)
    parts = {m: model.standardize(m, value) for m, value in x.items()}
    return (
        {m: frames.expand(k, *frames.shape) for m, (frames, _) in parts.items()},
        {m: there.expand(k, *there.shape) for m, (_, there) in parts.items()},
    )


def close(a, b, tolerance=None):
    tolerance = tolerance or (1e-9 if a.dtype == torch.float64 else 2e-5)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the guide's network ----------------------------------------------------------------------------------------------


class Guide(nn.Module):
    """The network of the training guide, as its checkpoints name it."""

    def __init__(self, dims=(768, 768, 25)):
        super().__init__()
        self.fusion_layers = nn.Sequential(
            nn.Linear(sum(dims), 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.195)
        )
        self.classifier = nn.Linear(128, 7)

    def forward(self, *x):
        return self.classifier(self.fusion_layers(torch.cat(x, -1)))


def guide_model(seeds=(42,), **cfg):
    return Fusion(FusionConfig(model="mlp", **cfg), GUIDE, dict.fromkeys(GUIDE, 1), seeds)


def guide_file(path, module, **metrics):
    """best_model.pth as the guide's trainer writes it, after a step of Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, weight_decay=1e-5)
    module(*(torch.ones(2, layer) for layer in GUIDE.values())).sum().backward()
    optimizer.step()
    config = {"text_dim": 768, "audio_dim": 768, "video_dim": 25, "fusion_dim": 256, "num_classes": 7,
              "dropout_rate": 0.3}  # fmt: skip
    torch.save({"epoch": 3, "model_state_dict": module.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
                "metrics": {"loss": 1.2, "accuracy": 0.5, **metrics}, "config": config}, path)  # fmt: skip
    return str(path)


def guide_input(n=5):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, dim, generator=generator) for dim in GUIDE.values()]


def test_mlp_has_the_guides_size_and_dropout():
    model = guide_model(seeds=SEEDS)
    assert sum(p[0].numel() for p in model.parameters()) == 433_671
    assert sum(p.numel() for p in model.parameters()) == 3 * 433_671
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == pytest.approx([0.3, 0.195, 0.0])
    for name, p in model.named_parameters():  # Xavier uniform, biases of zero
        if name.endswith("bias"):
            assert not p.any()
        else:
            bound = (6 / (p.shape[1] + p.shape[2])) ** 0.5
            assert 0.98 * bound < p.abs().max() <= bound


def test_the_guides_weights_give_the_guides_logits(tmp_path):
    torch.manual_seed(0)
    guide = Guide()
    model = guide_model(seeds=SEEDS)
    assert fusion.load_original(model, guide_file(tmp_path / "best_model.pth", guide)) == "6/6 tensors"
    expected = guide.eval()(*guide_input())
    out = model.eval()(*guide_input())
    assert out.shape == (3, 5, 7)
    for each in out:
        close(each, expected)
    text, _, video = guide_input()
    close(model(text, None, video)[1], guide(text, torch.zeros(5, 768), video))


def test_the_guides_weights_beside_numpy_scalars(tmp_path):
    """The guide's trainer keeps scikit-learn's scores as they come, which PyTorch's safe loader refuses by default."""
    guide = Guide()
    path = guide_file(tmp_path / "best_model.pth", guide, f1=np.float64(0.5), precision=np.float32(0.5))
    model = guide_model()
    assert fusion.load_original(model, path) == "6/6 tensors"
    close(model.eval()(*guide_input()), guide.eval()(*guide_input()))


def test_the_guides_weights_take_raw_features_of_any_size(tmp_path):
    """OpenFace's head pose is in millimetres, and the guide's network reads it as it is."""
    guide = Guide()
    model = guide_model()
    fusion.load_original(model, guide_file(tmp_path / "best_model.pth", guide))
    text, audio, video = guide_input()
    video[:, 19] = 600.0
    close(model.eval()(text, audio, video), guide.eval()(text, audio, video), 1e-4)


def test_weights_that_do_not_fit(tmp_path):
    def refused(model, content, match):
        path = tmp_path / "best_model.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=match) as caught:
            fusion.load_original(model, str(path))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    state = Guide().state_dict()
    model = guide_model()
    before = [p.clone() for p in model.parameters()]
    refused(model, {"model_state_dict": Guide((300, 74, 25)).state_dict()},
            r"1 tensors of the wrong shape: fusion_layers.0.weight is \(256, 399\), not \(256, 1561\)")  # fmt: skip
    less = OrderedDict((name, x) for name, x in state.items() if name != "classifier.bias")
    refused(model, {"model_state_dict": less}, "5/6 tensors match the model; 1 missing: classifier.bias")
    refused(model, {"model_state_dict": state | {"norm.weight": torch.ones(3)}}, "1 unexpected: norm.weight")
    refused(model, {"epoch": 3}, "0/6 tensors match the model; 6 missing")
    refused(guide_model(head="3"), {"model_state_dict": state}, r"classifier.bias is \(7,\), not \(3,\)")
    other = Fusion(FusionConfig(model="lmf"), GUIDE, dict.fromkeys(GUIDE, 1), [0])
    refused(other, {"model_state_dict": state}, "2/16 tensors match the model")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        fusion.load_original(model, str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(UserError, match=r"text\.pth: not readable as tensors only") as caught:
        fusion.load_original(model, str(tmp_path / "text.pth"))
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth"):
        fusion.load_original(guide_model(), str(tmp_path / "list.pth"))


# --- seeds side by side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)])
def test_gradients_of_linear_layers_side_by_side(frozen):
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 4), (3, 1, 5), (3, 6, 4))]
    for i, x in enumerate(given):
        x.requires_grad_(i not in frozen)
    assert torch.autograd.gradcheck(Product.apply, given)


def loss_of(model, head, x, mask, target):
    logits, alone = model.logits(x, mask, (3, torch.ones(len(target), 2, 3, dtype=torch.bool)))
    parts = [logits, *alone.values()]
    return sum(fusion.losses(part, target, head, None).mean(1).sum() for part in parts), parts


def targets(head, k, n):
    generator = torch.Generator().manual_seed(2)
    if head == "regression":
        return torch.randn(k, n, generator=generator)
    if head == "emotions":
        return torch.randint(0, 2, (k, n, 6), generator=generator).float()
    return torch.randint(0, len(HEADS[head]), (k, n), generator=generator)


@pytest.mark.parametrize(
    ("kind", "head", "context"),
    [*((k, h, "none") for k, h in itertools.product(KINDS, HEADS)), *((k, "7", "video") for k in KINDS)],
)
def test_a_seed_among_others_is_what_it_is_alone(kind, head, context):
    fresh = [Fusion(FusionConfig(kind, head, context=context), DIMS, FRAMES, s) for s in (SEEDS, SEEDS[1:2])]
    for whole, single in zip(*(model.parameters() for model in fresh), strict=True):
        assert torch.equal(whole[1], single[0])
    together = build(kind, head, SEEDS, context=context)
    x, mask = standard(together, clips())
    # every seed has a batch of its own
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    x = {m: torch.stack([value[k][order[k]] for k in range(3)]) for m, value in x.items()}
    mask = {m: torch.stack([value[k][order[k]] for k in range(3)]) for m, value in mask.items()}
    target = targets(head, 3, 6)
    loss, parts = loss_of(together, head, x, mask, target)
    loss.backward()
    raw = together(*clips().values())
    assert raw.shape == (3, 6, len(HEADS[head]))
    assert not torch.allclose(raw[0], raw[1], atol=1e-3)
    for k, seed in enumerate(SEEDS):
        single = build(kind, head, (seed,), context=context)
        own = [{m: value[k : k + 1] for m, value in part.items()} for part in (x, mask)]
        loss, outs = loss_of(single, head, *own, target[k : k + 1])
        loss.backward()
        for a, b in zip(parts, outs, strict=True):
            close(a[k], b[0])
        for (name, whole), p in zip(together.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(
                whole.grad[k], p.grad[0], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
        close(raw[k], single(*clips().values()))
        picked = fusion.one_seed(together, k)
        close(raw[k].float(), picked(*clips().values()), 1e-4)  # in float32, as models are
        assert not picked.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded_whole(kind, tmp_path):
    model = build(kind, "regression", SEEDS).float()
    state = {"config": {"model": asdict(model.cfg)}, "dims": DIMS, "frames": FRAMES, "seeds": list(SEEDS), "step": 0}
    folder = checkpoint.save(tmp_path, "epoch_001", model, {}, state, {})
    loaded, coverage = fusion.load(folder, checkpoint.read_state(folder))
    names = len(list(model.parameters())) + 2 * len(DIMS)
    assert coverage == f"{names}/{names} tensors"
    assert torch.equal(loaded(*clips().values()), model(*clips().values()))


# --- what must not change a clip --------------------------------------------------------------------------------------


def padded(x, n, front=False):
    """Frames (B, T, D) with n frames of zeros."""
    return F.pad(x, (0, 0, n, 0) if front else (0, 0, 0, n))


@pytest.mark.parametrize("seeds", [(5,), SEEDS], ids=["one seed", "three"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_behind_changes_nothing(kind, seeds):
    model = build(kind, seeds=seeds)
    x = {m: value[:, : FRAMES[m] // 2] for m, value in clips().items()}
    expected = model(*x.values())
    for m in DIMS:
        for n in (1, FRAMES[m] - FRAMES[m] // 2):
            close(model(*(padded(value, n) if name == m else value for name, value in x.items())), expected)
    # and it is seen that a frame more is not nothing
    more = {m: torch.cat([value, torch.ones(6, 1, DIMS[m])], 1) for m, value in x.items()}
    assert not torch.allclose(model(*more.values()), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_in_front_changes_nothing(kind):
    model = build(kind)
    x = {m: value[:, : FRAMES[m] // 2] for m, value in clips().items()}
    expected = model(*x.values())
    for m in DIMS:
        close(model(*(padded(value, 2, front=True) if name == m else value for name, value in x.items())), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_beyond_the_longest_of_training_changes_nothing(kind):
    model = build(kind)
    x = clips()
    close(model(*(padded(value, 3) for value in x.values())), model(*x.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_under_a_mask_changes_nothing(kind):
    """Masked frames of other values, as a hidden modality has them before they are zeroed."""
    model = build(kind, context="video")
    x, mask = standard(model, clips())
    noise = {m: torch.where(mask[m][..., None], value, 9.0) for m, value in x.items()}
    close(model.logits(noise, mask)[0], model.logits(x, mask)[0])


@pytest.mark.parametrize("seeds", [(5,), SEEDS], ids=["one seed", "three"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_batch_changes_nothing(kind, seeds):
    model = build(kind, seeds=seeds)
    x = clips()
    expected = model(*x.values())
    for row in range(6):
        close(model(*(value[row : row + 1] for value in x.values())), expected[..., row : row + 1, :])
    order = [3, 0, 5, 1]
    close(model(*(value[order] for value in x.values())), expected[..., order, :])


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_modality_is_none_or_zeros(kind):
    model = build(kind)
    x = clips()
    full = model(*x.values())
    for gone in DIMS:
        left = [None if m == gone else value for m, value in x.items()]
        expected = model(*left)
        zeros = [torch.zeros_like(value) if m == gone else value for m, value in x.items()]
        close(model(*zeros), expected)
        vector = [torch.zeros(6, DIMS[m]) if m == gone else value for m, value in x.items()]
        close(model(*vector), expected)
        had = x[gone].flatten(1).any(1)
        assert (expected - full)[had].abs().amax(1).min() > 1e-3
        close(expected[~had], full[~had])
    # nothing at all is an answer too
    nothing = model(*(torch.zeros(2, dim) for dim in DIMS.values()))
    assert nothing.isfinite().all()
    close(nothing[0], nothing[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [("text",), ("audio", "video"), ("text", "video")], ids="+".join)
def test_fewer_modalities(kind, dims):
    """Without text audio leads; every modality still counts."""
    dims = {m: DIMS[m] for m in dims}
    model = build(kind, dims=dims, frames={m: FRAMES[m] for m in dims})
    x = {m: value for m, value in clips().items() if m in dims}
    out = model(*x.values())
    for m in dims:
        other = model(*(value.flip(-1) if name == m else value for name, value in x.items()))
        assert (other - out).abs().amax(1)[4:].min() > 1e-3  # rows 4 and 5 have all three


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_order_of_frames_counts(kind):
    model = build(kind)
    x = clips()
    out = model(*x.values())
    for m in DIMS:
        turned = {name: value.clone() for name, value in x.items()}
        turned[m][0, :3] = turned[m][0, :3].flip(0)
        assert not torch.allclose(model(*turned.values())[0], out[0], atol=1e-4)


def test_xfuse_judges_each_modality_alone():
    model = build("xfuse", seeds=SEEDS)
    x, mask = standard(model, clips())
    _, alone = model.logits(x, mask)
    assert list(alone) == list(DIMS)
    for m in DIMS:
        others = {n: value if n == m else torch.zeros_like(value) for n, value in x.items()}
        _, again = model.logits(others, {n: value & (n == m) for n, value in mask.items()})
        close(again[m], alone[m])
        assert alone[m].shape == (3, 6, 7)
    assert build("xfuse", unimodal=0.0).logits(*standard(build("xfuse"), clips()))[1] == {}


# --- standardisation --------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled():
    """A model whose text has known statistics; columns 2 and 3 are constant in training."""
    model = Fusion(FusionConfig("mlp", clip_sigma=4.0), DIMS, FRAMES, [0])
    mean, std = torch.arange(7.0), torch.tensor([1.0, 2.0, 0.0, 1e-7, 1.0, 0.5, 3.0])
    model.set_statistics("text", mean, std)
    return model, mean, std


def test_standardised_values(scaled):
    model, mean, std = scaled
    x = torch.randn(2, 3, 7)
    out, mask = model.standardize("text", x)
    live = [0, 1, 4, 5, 6]
    expected = ((x.double() - mean) / std)[..., live].clamp(-4, 4)
    torch.testing.assert_close(out[..., live].double(), expected, rtol=1e-5, atol=1e-6)
    assert not out[..., [2, 3]].any()  # constant columns say nothing, whatever they hold
    assert mask.all()
    assert not model.standardize("text", torch.full((1, 7), 1e30))[0][..., [2, 3]].any()
    half = model.standardize("text", x.half())[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, out, rtol=0, atol=1e-2)


def test_standardised_values_are_cut(scaled):
    model, mean, _ = scaled
    x = mean + torch.tensor([1e30, -1e30, 0, 0, 3.9, -3.9, 0])
    assert model.standardize("text", x[None])[0][0].tolist() == pytest.approx([4, -4, 0, 0, 3.9, -4, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_becomes_the_mean(scaled, value):
    model, mean, _ = scaled
    x = torch.randn(2, 7) + 5
    broken = x.clone()
    broken[0, [1, 2]] = value
    expected = x.clone()
    expected[0, [1, 2]] = mean[[1, 2]]
    out, mask = model.standardize("text", broken)
    assert torch.equal(out, model.standardize("text", expected)[0])
    assert mask.all()
    whole, there = model.standardize("text", torch.full((1, 7), value))
    assert there.all()  # a frame all of them is a mean frame, not an absent one
    assert not whole.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_that_is_no_number_is_a_mean_frame(kind):
    model = build(kind)
    x = clips()
    broken = {m: value.clone() for m, value in x.items()}
    for m in DIMS:
        broken[m][4, 0] = torch.nan
        x[m][4, 0] = model.get_buffer(f"mean_{m}")
    out = model(*broken.values())
    assert out.isfinite().all()
    close(out, model(*x.values()))


def test_absent_frames_stay_zeros(scaled):
    model, _, _ = scaled
    x = torch.randn(1, 4, 7)
    x[0, 1:3] = 0
    out, mask = model.standardize("text", x)
    assert mask.tolist() == [[True, False, False, True]]
    assert not out[0, 1:3].any()
    x[0, 1, 6] = 1e-30  # the smallest value makes it a frame
    assert model.standardize("text", x)[1].tolist() == [[True, True, False, True]]


def test_without_normalize_values_stay():
    model = Fusion(FusionConfig("mlp", normalize=False), DIMS, FRAMES, [0])
    x = 100 * torch.randn(3, 2, 7)
    x[0, 0, 0] = torch.nan
    out, _ = model.standardize("text", x)
    assert torch.equal(out, x.nan_to_num())


def test_statistics_are_of_the_frames_there_are():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(50, 4, generator=generator) + torch.tensor([1.0, 100.0, 0.0, -5.0])
    x[:, 2] = 2.5
    x[::5] = 0  # padding and lost frames
    x[1, 0], x[2, 0], x[3, 3] = torch.nan, -torch.inf, torch.inf
    frames = x[(x != 0).any(1)].double().numpy()
    frames[~np.isfinite(frames)] = np.nan
    mean, std = statistics(x)
    np.testing.assert_allclose(mean, np.nanmean(frames, 0), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(frames, 0), rtol=1e-6, atol=1e-9)
    alike = statistics(torch.cat([x, torch.zeros(500, 4)]))
    assert torch.equal(alike[0], mean)
    assert torch.equal(alike[1], std)
    model = Fusion(FusionConfig("mlp"), {"text": 4}, {"text": 1}, [0])
    model.set_statistics("text", mean, std)
    out = model.standardize("text", x)[0]
    assert not out[:, 2].any()


# --- layers against PyTorch's and against formulas --------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_a_layer_is_pytorchs_encoder_layer(k):
    width, b, t = 32, 4, 6
    layer = fusion.Layer(k, width, 0.3).eval()
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    x = torch.randn(k, b, t, width, generator=generator)
    mask = torch.rand(k, b, t, generator=generator) < 0.6
    mask[..., 2] = True
    out = layer(x, mask)
    assert layer.attention.heads == heads(width) == 4
    for i in range(k):
        plain = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.3, "gelu", batch_first=True, norm_first=True).eval()
        a = layer.attention
        plain.load_state_dict({
            "self_attn.in_proj_weight": torch.cat([a.q.weight[i], a.kv.weight[i]]),
            "self_attn.in_proj_bias": torch.cat([a.q.bias[i, 0], a.kv.bias[i, 0]]),
            "self_attn.out_proj.weight": a.out.weight[i], "self_attn.out_proj.bias": a.out.bias[i, 0],
            "linear1.weight": layer.up.weight[i], "linear1.bias": layer.up.bias[i, 0],
            "linear2.weight": layer.down.weight[i], "linear2.bias": layer.down.bias[i, 0],
            "norm1.weight": layer.norm.scale[i], "norm1.bias": layer.norm.bias[i],
            "norm2.weight": layer.norm_ff.scale[i], "norm2.bias": layer.norm_ff.bias[i],
        })  # fmt: skip
        with torch.enable_grad():  # PyTorch's fast path zeroes what is masked
            expected = plain(x[i], src_key_padding_mask=~mask[i])
        close(out[i], expected, 1e-4)


@pytest.mark.parametrize(("width", "expected"), [(1, 1), (8, 1), (16, 2), (40, 1), (64, 8), (128, 8), (96, 4)])
def test_heads_divide_the_width(width, expected):
    assert heads(width) == expected
    assert width % expected == 0


def means(model, x):
    """Float64 means of a clip's standardised frames, zeros without any."""
    out = {}
    for m, value in x.items():
        frames, there = model.standardize(m, value)
        out[m] = torch.stack([f[t].double().mean(0) if t.any() else f[0].double() * 0
                              for f, t in zip(frames, there, strict=True)])  # fmt: skip
    return out


def linear(layer, k, x):
    return x @ layer.weight[k].double().T + layer.bias[k, 0].double()


def test_mlp_is_its_formula():
    model = build("mlp", seeds=SEEDS)
    x = clips()
    h = torch.cat(list(means(model, x).values()), -1)
    for k in range(3):
        z = linear(model.core.fusion_layers[0], k, h).relu()
        z = linear(model.core.fusion_layers[3], k, z).relu()
        close(model(*x.values())[k], linear(model.classifier, k, z))


def test_tfn_is_an_outer_product():
    model = build("tfn", seeds=SEEDS)
    x = clips()
    one = torch.ones(6, 1, dtype=torch.float64)
    for k in range(3):
        h = {m: linear(model.core.project[m], k, value).relu() for m, value in means(model, x).items()}
        t, a, v = (torch.cat([value, one], 1) for value in h.values())
        assert (t.shape[1], a.shape[1], v.shape[1]) == (17, 5, 5)
        product = torch.einsum("bi,bj,bl->bijl", t, a, v).flatten(1)
        z = linear(model.core.mix, k, product).relu()
        close(model(*x.values())[k], linear(model.classifier, k, z))


def test_lmf_is_a_tensor_of_low_rank():
    model = build("lmf", seeds=SEEDS, rank=3)
    x = clips()
    one = torch.ones(6, 1, dtype=torch.float64)
    for k in range(3):
        h, factors = [], []
        for m, value in means(model, x).items():
            h.append(torch.cat([linear(model.core.project[m], k, value).relu(), one], 1))
            factor = model.core.factors[m].weight[k].double().clone()  # (rank * d, width + 1)
            factor[:, -1] += model.core.factors[m].bias[k, 0].double()  # a bias is the weight of the 1
            factors.append(factor.view(3, 16, 17))
        tensor = torch.einsum("roi,roj,rol->oijl", *factors)
        fused = torch.einsum("oijl,bi,bj,bl->bo", tensor, *h)
        z = linear(model.core.mix, k, fused).relu()
        close(model(*x.values())[k], linear(model.classifier, k, z))


# --- the utterances of a video ----------------------------------------------------------------------------------------


def video_logits(model, x, mask, size, there=None):
    k, b = next(iter(mask.values())).shape[:2]
    there = torch.ones(k, b // size, size, dtype=torch.bool) if there is None else there
    return model.logits(x, mask, (size, there))[0]


@pytest.mark.parametrize("seeds", [(5,), SEEDS], ids=["one seed", "three"])
@pytest.mark.parametrize("kind", KINDS)
def test_context_stays_inside_a_video(kind, seeds):
    model = build(kind, seeds=seeds, context="video")
    x, mask = standard(model, clips())
    out = video_logits(model, x, mask, 3)
    x = {m: value.clone() for m, value in x.items()}
    for m in DIMS:
        x[m][:, 4] = x[m][:, 4].flip(-1)
    other = video_logits(model, x, mask, 3)
    close(other[:, :3], out[:, :3])
    assert (other - out)[:, 3:].abs().amax(-1).min() > 1e-4  # reaches the utterance itself and both neighbours


@pytest.mark.parametrize("kind", KINDS)
def test_raw_rows_are_one_video_with_context(kind):
    model = build(kind, context="video")
    x = clips()
    out = model(*x.values())
    close(out, video_logits(model, *standard(model, x), 6)[0])
    assert not torch.allclose(model(*(value[:3] for value in x.values())), out[:3], atol=1e-4)
    alone = model(*(value[:1] for value in x.values()))
    close(alone, model.logits(*standard(model, {m: value[:1] for m, value in x.items()}))[0][0])


def test_the_order_of_utterances_counts():
    model = build("mlp", context="video")
    x, mask = standard(model, clips())
    out = video_logits(model, x, mask, 6)
    order = [4, 2, 0, 5, 3, 1]
    turned = [{m: value[:, order] for m, value in part.items()} for part in (x, mask)]
    assert not torch.allclose(video_logits(model, *turned, 6), out[:, order], atol=1e-4)


def test_padding_of_a_video_changes_nothing():
    model = build("mlp", seeds=SEEDS, context="video")
    x, mask = standard(model, clips())
    expected = video_logits(model, {m: v[:, :4] for m, v in x.items()}, {m: v[:, :4] for m, v in mask.items()}, 4)
    there = (torch.arange(6) < 4).expand(3, 1, 6)
    close(video_logits(model, x, mask, 6, there)[:, :4], expected)


@pytest.mark.parametrize("seeds", [(5,), SEEDS], ids=["one seed", "three"])
def test_context_is_a_gated_mean_of_what_came_before_and_of_what_comes_after(seeds):
    """One utterance after the other in float64; one that is not there, be it in the middle, passes by."""
    k, size, width = len(seeds), 128, 6
    context = fusion.Context(k, width, 0.2).eval()
    generator = torch.Generator().manual_seed(0)
    for p in context.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    context.gate.bias.data -= 5.0  # the first utterance is still heard by the last
    z = torch.randn(k, 2, size, width, generator=generator)
    mask = torch.ones(k, 2, size, dtype=torch.bool)
    mask[:, 1, 100:] = mask[:, 1, 40:43] = False
    out = context(z, mask).double()
    for i, video in itertools.product(range(k), range(2)):
        x = z[i, video].double()
        gate, value = linear(context.gate, i, x).sigmoid(), linear(context.value, i, x)
        for part, places in ((slice(0, 3), range(size)), (slice(3, 6), range(size)[::-1])):
            state = torch.zeros(3, dtype=torch.float64)
            for u in places:
                if mask[i, video, u]:
                    state = (1 - gate[u, part]) * state + gate[u, part] * value[u, part]
                close(out[i, video, u, part], state.tanh(), 1e-5)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", ["7", "3", "2"])
def test_loss_of_classes(head, weighted, smoothing):
    classes = len(HEADS[head])
    logits = torch.randn(2, 5, classes, requires_grad=True)
    target = torch.randint(0, classes, (2, 5))
    target[0, 1] = target[1, 4] = -1
    weight = torch.linspace(0.5, 2, classes) if weighted else None
    loss = fusion.losses(logits, target, head, weight, smoothing)
    for k, b in itertools.product(range(2), range(5)):
        y = int(target[k, b])
        if y < 0:
            assert loss[k, b] == 0
            continue
        log_p = logits[k, b].double().log_softmax(0)
        w = torch.ones(classes) if weight is None else weight
        soft = (1 - smoothing) * torch.eye(classes)[y] + smoothing / classes
        assert loss[k, b].item() == pytest.approx(-(soft * w * log_p).sum().item(), abs=1e-5)
    loss.sum().backward()
    assert not logits.grad[0, 1].any()
    assert logits.grad[0, 0].any()


def test_loss_of_scores():
    logits = (3 * torch.randn(2, 5, 1)).requires_grad_()
    target = torch.randn(2, 5)
    target[0, 1] = torch.nan
    loss = fusion.losses(logits, target, "regression", None)
    gap = (logits[..., 0] - target).abs().detach()
    expected = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5)
    expected[0, 1] = 0
    torch.testing.assert_close(loss.detach(), expected)
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 1].any()


@pytest.mark.parametrize("weight", [None, torch.linspace(1, 4, 6)])
def test_loss_of_emotions(weight):
    logits = torch.randn(2, 5, 6, requires_grad=True)
    target = torch.randint(0, 2, (2, 5, 6)).float()
    target[0, 1] = torch.nan
    target[1, 2, 3] = torch.nan  # one unknown emotion makes the row unknown
    loss = fusion.losses(logits, target, "emotions", weight)
    p = logits.detach().double().sigmoid()
    positive = torch.ones(6) if weight is None else weight
    expected = -(positive * target * p.log() + (1 - target) * (1 - p).log()).mean(-1)
    expected[0, 1] = expected[1, 2] = 0
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 1].any()
    assert not logits.grad[1, 2].any()


def test_known_targets():
    assert fusion.known(torch.tensor([[0, -1, 6]])).tolist() == [[True, False, True]]
    assert fusion.known(torch.tensor([[0.0, torch.nan, -3.0]])).tolist() == [[True, False, True]]
    assert fusion.known(torch.tensor([[[0.0, 1.0], [torch.nan, 1.0]]])).tolist() == [[True, False]]


def test_scores_are_expectations():
    logits = torch.randn(2, 4, 7)
    p = logits.double().softmax(-1)
    expected = sum(p[..., i] * (i - 3) for i in range(7))
    torch.testing.assert_close(fusion.scores(logits, "7").double(), expected, rtol=1e-5, atol=1e-6)
    sure = torch.tensor([[50.0, 0, 0], [0, 50, 0], [0, 0, 50]])
    assert fusion.scores(sure, "3").tolist() == pytest.approx([-1, 0, 1])
    assert fusion.scores(sure[:, [0, 2]], "2").tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert fusion.scores(torch.tensor([[2.5], [-4.0]]), "regression").tolist() == [2.5, -4.0]


def test_probabilities():
    logits = torch.randn(3, 4, 6)
    torch.testing.assert_close(fusion.probabilities(logits, "emotions"), 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(fusion.probabilities(logits, "7"), logits.exp() / logits.exp().sum(-1, keepdim=True))
    assert torch.equal(fusion.probabilities(logits, "regression"), logits)
