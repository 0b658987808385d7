"""BEATs against its formulas in float64 and against WavLM's gated attention; alone and in batches; its files."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from model import encoders
from model.encoders.beats import BeatsConfig, BeatsNet, GatedAttention, buckets

SIZES = {"features": 24, "width": 32, "inner": 48, "layers": 3, "heads": 4, "kernel": 10, "groups": 4, "buckets": 12}
SECONDS = (0.01, 0.05, 0.3, 1.1, 3.0)  # the first two are shorter than a patch
CFG = {
    "layer_norm_first": False,
    "deep_norm": True,
    "max_distance": 30,
    "activation_fn": "gelu",
    "finetuned_model": True,
}


def published():
    """Random tensors under their published names, those that are not read too."""
    generator = torch.Generator().manual_seed(0)
    features, width, inner, heads = (SIZES[key] for key in ("features", "width", "inner", "heads"))
    shapes = {
        "patch_embedding.weight": (features, 1, 16, 16), "layer_norm.weight": (features,),
        "layer_norm.bias": (features,), "post_extract_proj.weight": (width, features),
        "post_extract_proj.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, 10), "encoder.pos_conv.0.weight_v": (width, width // 4, 10),
        "encoder.pos_conv.0.bias": (width,), "encoder.layer_norm.weight": (width,), "encoder.layer_norm.bias": (width,),
        "predictor.weight": (5, width), "predictor.bias": (5,),
    }  # fmt: skip
    for i in range(SIZES["layers"]):
        layer = f"encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{part}.weight": (width, width), f"{layer}self_attn.{part}.bias": (width,)}
        shapes |= {
            f"{layer}self_attn.grep_linear.weight": (8, width // heads), f"{layer}self_attn.grep_linear.bias": (8,),
            f"{layer}self_attn.grep_a": (1, heads, 1, 1), f"{layer}fc1.weight": (inner, width),
            f"{layer}self_attn.relative_attention_bias.weight": (SIZES["buckets"], heads), f"{layer}fc1.bias": (inner,),
            f"{layer}fc2.weight": (width, inner), f"{layer}fc2.bias": (width,),
        }  # fmt: skip
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
    state = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=generator)
        if "norm.weight" in name or "weight_g" in name or "grep_a" in name:
            state[name] = 1 + 0.2 * draw
        elif "relative" in name:
            state[name] = draw
        else:
            state[name] = draw * (0.2 if len(shape) == 1 else 1.3 * math.prod(shape[1:]) ** -0.5)
    table = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    return {name: state[table] if name.endswith("attention_bias.weight") else x for name, x in state.items()}


@pytest.fixture(scope="module")
def state():
    return published()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("beats")
    torch.save({"cfg": CFG, "model": state}, folder / "BEATs_iter3_plus.pt")
    return folder


@pytest.fixture(scope="module")
def load(folder):
    return lambda **options: encoders.load("beats", str(folder), **options)


def spectrogram(samples):
    """Kaldi's log mel energies (F, 128) of samples, less their mean and over twice their deviation, in float64."""

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    edges = np.linspace(mel(20.0), mel(8000.0), 130)
    bins = mel(np.arange(256) * 16000 / 512)  # Kaldi leaves the last one out
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.clip(np.minimum(rise, fall), 0, None)
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400] * 2**15
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)[:256]) ** 2
        rows.append(np.log(np.maximum(filters @ power, np.finfo(np.float32).eps)))
    return (np.array(rows) - 15.41663) / (2 * 6.55582)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def bucket(offset, count, most):
    half = count // 2
    if abs(offset) < half // 2:
        return half * (offset > 0) + abs(offset)
    far = math.log(abs(offset) / (half // 2)) / math.log(most / (half // 2)) * (half - half // 2)
    return half * (offset > 0) + min(half // 2 + int(far), half - 1)


def forward(state, mels):
    """Hidden states of a spectrogram (F, 128), [0] before the first layer, patch by patch in float64."""
    state = {name: x.double().numpy() for name, x in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embedding.weight"].reshape(-1, 256)
    corners = [(16 * i, 16 * j) for i in range(len(mels) // 16) for j in range(8)]
    x = np.array([kernel @ mels[i : i + 16, j : j + 16].reshape(-1) for i, j in corners])
    x = linear(norm(x, "layer_norm"), "post_extract_proj")
    v = state["encoder.pos_conv.0.weight_v"]
    weight = v / np.sqrt((v**2).sum((0, 1), keepdims=True)) * state["encoder.pos_conv.0.weight_g"]
    around, length, size = np.pad(x, ((5, 5), (0, 0))), len(x), 32 // 4
    place = np.zeros_like(x)
    for channel in range(32):
        group = channel // size * size
        for t in range(length):
            place[t, channel] = (around[t : t + 10, group : group + size] * weight[channel].T).sum()
    x = norm(x + gelu(place + state["encoder.pos_conv.0.bias"]), "encoder.layer_norm")

    table = state["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    bias = np.array([[table[bucket(j - i, 12, 30)] for j in range(length)] for i in range(length)])
    states = [x]
    for i in range(3):
        part, alpha, out = f"encoder.layers.{i}.", 6**0.25, []
        q, k, v = (linear(x, f"{part}self_attn.{letter}_proj") for letter in "qkv")
        for head in range(4):
            mine = slice(8 * head, 8 * head + 8)
            gate = linear(q[:, mine], f"{part}self_attn.grep_linear").reshape(length, 2, 4).sum(2)
            a, b = (1 / (1 + np.exp(-gate))).T
            factor = a * (b * state[f"{part}self_attn.grep_a"][0, head, 0, 0] - 1) + 2
            logits = q[:, mine] @ k[:, mine].T / np.sqrt(8) + factor[:, None] * bias[:, :, head]
            share = np.exp(logits - logits.max(1, keepdims=True))
            out.append(share / share.sum(1, keepdims=True) @ v[:, mine])
        attended = linear(np.concatenate(out, 1), f"{part}self_attn.out_proj")
        x = norm(alpha * x + attended, f"{part}self_attn_layer_norm")
        x = norm(alpha * x + linear(gelu(linear(x, f"{part}fc1")), f"{part}fc2"), f"{part}final_layer_norm")
        states.append(x)
    return states


def test_spectrogram_matches_the_formula(load, sound):
    for seconds in (0.175, 0.5):
        clip = sound(seconds)
        found, expected = load().prepare(clip), spectrogram(clip.double().numpy())
        assert found.shape == expected.shape
        assert np.abs(found.numpy() - expected).max() < 1e-3
    assert load().prepare(torch.zeros(16000)).unique().tolist() == pytest.approx(
        [(math.log(2**-23) - 15.41663) / 13.11164]
    )


def test_every_state_matches_the_formula(load, state, sound):
    mels = load().prepare(sound(1.0))
    states = forward(state, mels.double().numpy())
    assert len(states[-1]) == 48 == load().lengths(torch.tensor(len(mels)))
    assert 0.3 < states[-1].std() < 3
    for layer, expected in (
        *((str(number), each) for number, each in enumerate(states)),
        ("last", states[3]), ("1-3", sum(states[1:]) / 3), ("last4", sum(states)),
    ):  # fmt: skip
        found = load(layer=layer)(mels[None])[0]
        assert np.abs(found.numpy() - expected).max() <= 1e-4


def test_gated_bias_matches_wavlm():
    """WavLM's gate reads what queries are made from, BEATs' the queries: the same where the two are one."""
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    torch.manual_seed(0)
    theirs, ours = WavLMAttention(16, 2).eval(), GatedAttention(16, 2)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.q_proj.load_state_dict({"weight": torch.eye(16), "bias": torch.zeros(16)})
    names = {f"{letter}_proj": letter for letter in ("q", "k", "v", "out")}
    names |= {"gru_rel_pos_linear": "grep_linear", "gru_rel_pos_const": "grep_a"}
    state = {names[stem] + dot + rest: x for name, x in theirs.state_dict().items()
             for stem, dot, rest in [name.partition(".")] if stem in names}  # fmt: skip
    ours.load_state_dict(state)
    x = torch.randn(2, 850, 16)  # further apart than the most that is told apart
    places = torch.arange(850)
    table = theirs.rel_attn_embed.weight[buckets(places - places[:, None], 320, 800)].permute(2, 0, 1)
    with torch.no_grad():
        expected, _, bias = theirs(x)
        assert torch.equal(table, bias[:2])
        assert (ours(x, bias=table[None]) - expected).abs().max() <= 1e-4


def test_same_alone_and_in_a_batch(load, sound):
    beats = load()
    clips = [beats.prepare(sound(seconds, seed)) for seed, seconds in enumerate(SECONDS)]
    assert [len(clip) for clip in clips] == [16, 16, 28, 108, 298]
    batch = pad_sequence(clips, batch_first=True, padding_value=9.0)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(clip) for clip in clips])[:, None]
    rows = beats(batch, mask)
    lengths = beats.lengths(mask.sum(1)).tolist()
    assert lengths == [8, 8, 8, 48, 144]
    for clip, row, length in zip(clips, rows, lengths, strict=True):
        alone = beats(clip[None])[0]
        assert alone.shape == (length, 32)
        assert (row[:length] - alone).abs().max() <= 1e-5
        assert not row[length:].any()
    rough = load(dtype="bf16")(batch, mask)
    assert rough.dtype == torch.float32
    assert 0 < (rough - rows).norm() / rows.norm() < 0.02


def test_what_fills_no_patch(load, sound):
    """A short clip ends in silence, the end of a long one is not heard: a patch are 2,800 samples, then 2,560 each."""
    beats = load()
    silence = torch.zeros(2800)
    silence[:160] = sound(0.01)
    assert torch.equal(beats.encode(sound(0.01), "frames"), beats.encode(silence, "frames"))
    long = sound(0.6)
    assert torch.equal(beats.encode(long, "frames"), beats.encode(long[: 2800 + 2 * 2560], "frames"))
    assert len(beats.encode(long[: 2800 + 2560 - 1], "frames")) == 8
    assert len(beats.encode(long[: 2800 + 2560], "frames")) == 16
    assert torch.allclose(beats.encode(long, "mean"), beats.encode(long, "frames").mean(0))


def test_true_size():
    with torch.device("meta"):
        net = BeatsNet(BeatsConfig())
    count = sum(p.numel() for p in net.parameters())
    predictor, gains = 768 * 527 + 527, 128  # which classify AudioSet, and which the weight norm has
    assert count + predictor + gains == 90_717_055


@pytest.mark.parametrize("layout", ["flat", "whole", "parametrized", "safetensors"])
def test_layouts_of_weights(state, tmp_path, tmp_path_factory, sound, layout):
    """Those without a cfg have the published one."""
    folder, cfg = tmp_path_factory.mktemp("published"), CFG | {"max_distance": 800}
    torch.save({"cfg": cfg, "model": state}, folder / "BEATs.pt")
    beats, left = encoders.load("beats", str(folder)), {name: x for name, x in state.items() if "predictor" not in name}
    if layout == "safetensors":
        save_file({name: x.clone() for name, x in left.items()}, tmp_path / "model.safetensors")
    elif layout == "parametrized":
        stem = "encoder.pos_conv.0"
        gain, direction = left.pop(f"{stem}.weight_g"), left.pop(f"{stem}.weight_v")
        names = (f"{stem}.parametrizations.weight.original{i}" for i in (0, 1))
        torch.save({"model": left | dict(zip(names, (gain, direction), strict=True)), "cfg": cfg}, tmp_path / "a.pt")
    else:
        tower = {f"model.audio_tower.{name}": x for name, x in left.items()}
        tower |= {"model.mm_projector_a.weight": torch.ones(2)} if layout == "whole" else {}
        torch.save(tower, tmp_path / "audio_tower.bin")
        torch.save({}, tmp_path / "pytorch_model.bin")
    other = encoders.load("beats", str(tmp_path))
    assert torch.equal(other.encode(sound(1.0), "mean"), beats.encode(sound(1.0), "mean"))
    count = len(beats.net.state_dict())
    assert beats.coverage == f"{count}/{count} tensors, 4 not used"
    assert other.coverage == f"{count}/{count} tensors, 2 not used"


def test_a_file_and_the_folder_of_a_whole_model(state, folder, tmp_path, sound):
    """VideoLLaMA2's folder has the shards of its language model too."""
    torch.save({"cfg": CFG, "model": state}, tmp_path / "audio_tower.bin")
    for part in (1, 2):
        save_file({"model.norm.weight": torch.ones(2)}, tmp_path / f"model-0000{part}-of-00002.safetensors")
    expected = encoders.load("beats", str(folder)).encode(sound(1.0), "mean")
    for place in (tmp_path, tmp_path / "audio_tower.bin", folder / "BEATs_iter3_plus.pt"):
        found = encoders.load("beats", str(place))
        assert list(found.weights_sha256) == ["BEATs_iter3_plus.pt" if place.suffix == ".pt" else "audio_tower.bin"]
        assert torch.equal(found.encode(sound(1.0), "mean"), expected)


def test_info_rebuilds_the_encoder(load, sound):
    beats = load(layer="1-2", dtype="bf16")
    info = json.loads(json.dumps(beats.info("mean")))
    assert info["preprocess"].startswith("beats: 16 kHz, 128 log mel energies")
    assert list(info["weights_sha256"]) == ["BEATs_iter3_plus.pt"]
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(sound(0.3), "mean"), beats.encode(sound(0.3), "mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm.weight": None}, r"BEATs.pt: \d+/\d+ tensors match the model; 1 missing: project.0.weight$"),
        ({"patch_embedding.weight": None}, r"BEATs.pt: not a BEATs: no patch_embedding.weight in layer_norm.weight, "),
        ({"encoder.layers.2.fc2.bias": torch.ones(3)}, r"wrong shape: blocks.2.fc2.bias is \(3,\), not \(32,\)$"),
        ({"quantize.embedding.weight": torch.ones(3)}, r"BEATs.pt: .* 1 unexpected: quantize.embedding.weight$"),
        ({"cfg": CFG | {"deep_norm": False}}, r"BEATs.pt: deep_norm False is not supported \(only True\)$"),
        (
            {"cfg": CFG | {"layer_norm_first": True}},
            r"BEATs.pt: layer_norm_first True is not supported \(only False\)$",
        ),
    ],
)
def test_wrong_files(state, tmp_path, change, message):
    cfg = change.pop("cfg", CFG)
    model = {name: x for name, x in (state | change).items() if x is not None}
    torch.save({"cfg": cfg, "model": model}, tmp_path / "BEATs.pt")
    with pytest.raises(UserError, match=message) as error:
        encoders.load("beats", str(tmp_path))
    assert "\n" not in str(error.value)


def test_folders_of_none_or_two(tmp_path):
    with pytest.raises(UserError, match=r"holds not one weight file of a BEATs but 0: none$"):
        encoders.load("beats", str(tmp_path))
    for name in ("a.pt", "b.pt"):
        torch.save([1], tmp_path / name)
    with pytest.raises(UserError, match=r"holds not one weight file of a BEATs but 2: a.pt, b.pt$"):
        encoders.load("beats", str(tmp_path))
    (tmp_path / "b.pt").unlink()
    with pytest.raises(UserError, match=r"a.pt: holds a list, not tensors by name$"):
        encoders.load("beats", str(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a.pt: not readable as tensors only"):
        encoders.load("beats", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer": "4"},
            r"^beats: layer '4' is not one of last, last4 \(the sum of the last four\), a state from 0 to 3",
        ),
        ({"dtype": "fp64"}, r"^beats: dtype 'fp64' is not one of fp32, bf16$"),
    ],
)
def test_wrong_options(load, options, message):
    with pytest.raises(UserError, match=message):
        load(**options)
