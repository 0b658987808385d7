"""The connectors beside timm's RegNet stages and a float64 reference by published names; published files, written here.

The names and shapes of PUBLISHED are spelled out from the checkpoints' key lists, not read off the modules.
"""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.config import UserError
from model.stc import AUDIO, VIDEO, Linear, Mlp, Stc, connector, load_projectors, stage, tokens

WIDTH, HIDDEN, SOUND = 12, 16, 10


def stc_shapes(width=WIDTH, hidden=HIDDEN, depth=4):
    """Names and shapes of a published STC connector's tensors, after mm_projector."""
    shapes = {}

    def norm(name, conv):
        shapes[f"{name}.conv.weight"] = conv
        shapes[f"{name}.bn.weight"] = shapes[f"{name}.bn.bias"] = (hidden,)

    for part, block in itertools.product(("s1", "s2"), range(1, depth + 1)):
        given = width if (part, block) == ("s1", 1) else hidden
        inner = round(given / 4)
        stem = f"{part}.b{block}"
        norm(f"{stem}.conv1", (hidden, given, 1, 1))
        norm(f"{stem}.conv2", (hidden, 1, 3, 3))
        norm(f"{stem}.conv3", (hidden, hidden, 1, 1))
        shapes |= {f"{stem}.se.fc1.weight": (inner, hidden, 1, 1), f"{stem}.se.fc1.bias": (inner,),
                   f"{stem}.se.fc2.weight": (hidden, inner, 1, 1), f"{stem}.se.fc2.bias": (hidden,)}  # fmt: skip
    norm("s1.b1.downsample", (hidden, width, 1, 1))
    shapes |= {"sampler.0.weight": (hidden, hidden, 2, 2, 2), "sampler.0.bias": (hidden,)}
    return shapes | {f"readout.{name}": shape for name, shape in mlp_shapes(hidden, hidden).items()}


def mlp_shapes(width=SOUND, hidden=HIDDEN):
    return {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}


def linear_shapes(width=SOUND, hidden=HIDDEN):
    return {"weight": (hidden, width), "bias": (hidden,)}


def filled(shapes, seed=0):
    """Random tensors that keep what they are applied to about as large as it was; biases and norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / (math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 2)
        for name, shape in shapes.items()
    }


def make(kind="stc_connector_v35", seed=0):
    """A connector with random numbers in all of its tensors."""
    made = connector(kind, WIDTH, HIDDEN)
    shapes = {"linear": linear_shapes(WIDTH), "mlp2x_gelu": mlp_shapes(WIDTH)}.get(kind) or stc_shapes()
    made.load_state_dict(filled(shapes, seed))
    return made.requires_grad_(False)


def video(b=2, t=4, side=5, seed=3):
    return torch.randn(b, t, side * side, WIDTH, generator=torch.Generator().manual_seed(seed))


# --- what they compute ---


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def norm(x, weight, bias):
    """Over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    return x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def conv_norm(x, state, name):
    """x (n, H, W, C): a 1 x 1 convolution, or the sum of nine shifted pictures."""
    weight = state[f"{name}.conv.weight"]
    if weight.shape[-1] == 1:
        y = x @ weight[:, :, 0, 0].T
    else:
        n, height, width, channels = x.shape
        around = x.new_zeros(n, height + 2, width + 2, channels)
        around[:, 1:-1, 1:-1] = x
        places = itertools.product(range(3), range(3))
        y = sum(around[:, i : i + height, j : j + width] * weight[:, 0, i, j] for i, j in places)
    return norm(y, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"])


def block(x, state, name):
    y = silu(conv_norm(silu(conv_norm(x, state, f"{name}.conv1")), state, f"{name}.conv2"))
    gate = y.mean((1, 2))
    for fc, act in (("fc1", silu), ("fc2", torch.sigmoid)):
        gate = act(gate @ state[f"{name}.se.{fc}.weight"][:, :, 0, 0].T + state[f"{name}.se.{fc}.bias"])
    y = conv_norm(y * gate[:, None, None], state, f"{name}.conv3")
    short = conv_norm(x, state, f"{name}.downsample") if f"{name}.downsample.conv.weight" in state else x
    return silu(y + short)


def sample(x, state, padding):
    """x (B, T, H, W, D): boxes of 2 x 2 x 2, of what is left of zeros all around where they are padded."""
    b, *sizes, d = x.shape
    around = x.new_zeros(b, *(size + 2 * padding for size in sizes), d)
    around[:, padding:, padding:, padding:][:, : sizes[0], : sizes[1], : sizes[2]] = x
    t, height, width = (size // 2 for size in around.shape[1:4])
    y = state["sampler.0.bias"]
    for i, j, k in itertools.product(range(2), repeat=3):
        corner = around[:, i::2, j::2, k::2][:, :t, :height, :width]
        y = y + corner @ state["sampler.0.weight"][:, :, i, j, k].T
    return silu(y)


def mlp(x, state, start=""):
    x = gelu(x @ state[f"{start}0.weight"].T + state[f"{start}0.bias"])
    return x @ state[f"{start}2.weight"].T + state[f"{start}2.bias"]


def reference(x, state, padding):
    """The STC connector in float64, x (B, T, N, C)."""
    state = {name: tensor.double() for name, tensor in state.items()}
    b, t, n, _ = x.shape
    x = x.double().reshape(b * t, math.isqrt(n), math.isqrt(n), -1)
    for i in range(1, 5):
        x = block(x, state, f"s1.b{i}")
    x = sample(x.unflatten(0, (b, t)), state, padding)
    t = x.shape[1]
    x = x.flatten(0, 1)
    for i in range(1, 5):
        x = block(x, state, f"s2.b{i}")
    return mlp(x.reshape(b, -1, x.shape[-1]), state, "readout.")


@pytest.mark.parametrize("frames", [2, 4, 5])
@pytest.mark.parametrize("kind", ["stc_connector_v35", "stc_connector"])
def test_stc_matches_the_formula(kind, frames):
    net, x = make(kind), video(t=frames)
    expected = reference(x, net.state_dict(), 0 if kind == "stc_connector_v35" else 1)
    assert 0.3 < expected.std() < 3
    found = net(x)
    assert found.shape == expected.shape == (2, tokens(kind, frames, 25), HIDDEN)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("width", "small"), [(WIDTH, 1.0), (HIDDEN, 1.0), (WIDTH, 0.01)])
def test_a_stage_matches_timm(width, small):
    """Its names too; `small` convolutions, whose variance is about that of the norms' epsilon."""
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    torch.manual_seed(0)
    theirs = RegStage(4, width, HIDDEN, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d).eval()
    for name, parameter in theirs.named_parameters():
        scale = small if ".conv.weight" in name else 1.0
        nn.init.normal_(parameter, std=scale / (parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 2))
    ours = stage(width, HIDDEN, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, width, 6, 7)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 0.3
        assert (ours(x) - expected).abs().max() <= 1e-5


def test_linear_layers_read_the_mean_of_frames_and_rows_of_sound():
    x = video()
    for kind in AUDIO:
        made = connector(kind, WIDTH, HIDDEN)
        state = {name: tensor.double() for name, tensor in made.state_dict().items()}
        for given, rows in ((x, x.double().mean(1)), (x[:, 0], x[:, 0].double())):
            expected = mlp(rows, state) if kind == "mlp2x_gelu" else rows @ state["weight"].T + state["bias"]
            assert made(given).shape == (2, 25, HIDDEN)
            assert (made(given) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", VIDEO)
def test_a_clip_is_the_same_alone_and_in_a_batch(kind):
    net, x = make(kind), video(b=3)
    together = net(x)
    for clip, rows in zip(x, together, strict=True):
        assert (net(clip[None])[0] - rows).abs().max() <= 1e-5
    assert (together[0] - together[1]).abs().max() > 0.1


def test_frames_see_each_other_in_boxes_of_two_only():
    """v35's first token frame is of frames 0 and 1, and the fifth frame of five is dropped."""
    net, x = make(), video(b=1, t=5)
    other = x.clone()
    other[:, 2:] += 1
    assert torch.equal(net(x)[:, :4], net(other)[:, :4])
    assert not torch.equal(net(x)[:, 4:], net(other)[:, 4:])
    other = x.clone()
    other[:, 4] += 1
    assert torch.equal(net(x), net(other))
    v1 = make("stc_connector")
    assert not torch.equal(v1(x), v1(other))


@pytest.mark.parametrize("kind", VIDEO)
def test_weights_in_bf16_take_features_in_fp32(kind):
    net, x = make(kind), video()
    exact, rough = net(x), net.bfloat16()(x)
    assert rough.dtype == torch.bfloat16
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("kind", VIDEO)
def test_every_parameter_learns(kind):
    torch.manual_seed(0)
    net = connector(kind, WIDTH, HIDDEN)
    net(video()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_channels_stay_last_in_memory():
    net, x = make(), video()
    seen = []
    for part in net.modules():
        if isinstance(part, nn.LayerNorm | nn.Conv3d | nn.Linear):
            part.register_forward_pre_hook(lambda module, given: seen.append((module, given[0])))
    net(x)
    assert len(seen) == 25 + 1 + 2
    for module, given in seen:
        rows = given.movedim(1, -1) if isinstance(module, nn.Conv3d) else given
        assert rows.is_contiguous(), module


# --- sizes ---


@pytest.mark.parametrize(
    ("hidden", "millions"),
    [(3584, {"s1": 119.7, "sampler": 102.8, "s2": 128.7, "readout": 25.7, "": 376.9}), (1536, {"": 71.9})],
)
def test_true_size(hidden, millions):
    with torch.device("meta"):
        net = connector("stc_connector_v35", 1152, hidden)
        patches = torch.empty(1, 16, 729, 1152)
        sound = [connector(kind, 768, hidden) for kind in AUDIO]
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == stc_shapes(1152, hidden)
    for part, count in millions.items():
        assert round(sum(p.numel() for p in net.get_submodule(part).parameters()) / 1e6, 1) == count
    assert net(patches).shape == (1, 1352, hidden)
    assert sum(p.numel() for p in sound[0].parameters()) == 769 * hidden
    assert sum(p.numel() for p in sound[1].parameters()) == (769 + hidden + 1) * hidden
    assert sound[1](torch.empty(2, 1496, 768, device="meta")).shape == (2, 1496, hidden)


@pytest.mark.parametrize(
    ("kind", "frames", "count"),
    [
        ("stc_connector_v35", 16, 1352),
        ("stc_connector_v35", 8, 676),
        ("stc_connector_v35", 9, 676),
        ("stc_connector_v35", 2, 169),
        ("stc_connector", 16, 9 * 14 * 14),
        ("stc_connector", 8, 5 * 14 * 14),
        ("stc_connector", 7, 4 * 14 * 14),
        ("stc_connector", 1, 14 * 14),
        ("linear", 16, 729),
        ("mlp2x_gelu", 1, 729),
    ],
)
def test_tokens_of_so400m(kind, frames, count):
    with torch.device("meta"):
        made = connector(kind, 1152, 8)(torch.empty(1, frames, 729, 1152))
    assert made.shape == (1, count, 8)
    assert tokens(kind, frames, 729) == count


def test_options_of_the_stc_connector():
    net = Stc(WIDTH, HIDDEN, depth=2, mlp_depth=3, downsample=(1, 2, 2))
    assert net(video(t=3)).shape == (2, 3 * 2 * 2, HIDDEN)
    assert {"s2.b2.conv3.bn.bias", "readout.4.bias"} <= set(net.state_dict())
    assert not [name for name in net.state_dict() if "b3" in name or "readout.6" in name]


def test_what_suits_no_connector():
    with pytest.raises(UserError) as error:
        connector("qformer", WIDTH, HIDDEN)
    assert str(error.value) == (
        "connector 'qformer' is not one of stc_connector_v35, stc_connector, linear, mlp2x_gelu"
    )
    for count, x in ((730, torch.zeros(1, 2, 730, WIDTH)), (577, torch.zeros(1, 2, 577, WIDTH))):
        for ask in (lambda x=x: make()(x), lambda count=count: tokens("stc_connector", 2, count)):
            with pytest.raises(UserError, match=rf"^STC reads squares of patches, not {count} a frame \(a class token"):
                ask()
    for ask in (lambda: make()(video(t=1)), lambda: tokens("stc_connector_v35", 1, 25)):
        with pytest.raises(UserError, match=r"^STC joins 2 x 2 x 2 patches: 1 frames of 5 x 5 are too few$"):
            ask()


# --- published files ---

VIDEO_PART = {f"mm_projector.{name}": tensor for name, tensor in filled(stc_shapes(), 1).items()}
AUDIO_PART = {f"mm_projector_a.{name}": tensor for name, tensor in filled(mlp_shapes(), 2).items()}
PARTS = VIDEO_PART | AUDIO_PART
COVERED = "113/113 STC tensors, 4/4 mlp2x_gelu tensors"
# what stands beside projectors in a whole checkpoint
REST = {
    "model.embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.ones(3, 2),
    "model.vision_tower.vision_tower.vision_model.post_layernorm.weight": torch.ones(2),
    "model.audio_tower.layer_norm.weight": torch.ones(2),
    "model.mamba_compressor.memory_projection.weight": torch.ones(2, 2),
}  # fmt: skip


def prefixed(prefix, tensors):
    return {prefix + name: tensor.half() for name, tensor in tensors.items()}


def write(file, tensors):
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)


def shards(folder, tensors, single, count=3):
    """Writes a sharded checkpoint and its index; the names of its files in order."""
    stem, suffix = single.split(".")
    names = sorted(tensors)
    files = [f"{stem}-{i + 1:05}-of-{count:05}.{suffix}" for i in range(count)]
    placed = {name: files[i * count // len(names)] for i, name in enumerate(names)}
    for file in files:
        write(folder / file, {name: tensors[name] for name in names if placed[name] == file})
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return files


def fresh():
    torch.manual_seed(9)
    return connector("stc_connector_v35", WIDTH, HIDDEN), connector("mlp2x_gelu", SOUND, HIDDEN)


def holds(module, part):
    """Whether a module has what PARTS say, which files hold in fp16."""
    state = module.state_dict()
    stem = f"{part}."
    published = {name.removeprefix(stem): tensor for name, tensor in PARTS.items() if name.startswith(stem)}
    same = [torch.equal(state[name], tensor.half().float()) for name, tensor in published.items()]
    return state.keys() == published.keys() and all(same)


LAYOUTS = {
    "apart": lambda folder, tensors: [
        write(folder / f"{part}.bin", {name: t for name, t in tensors.items() if f"{part}." in name})
        for part in ("mm_projector", "mm_projector_a")
    ],
    "the video's file holds both": lambda folder, tensors: write(folder / "mm_projector.bin", tensors),
    "one safetensors": lambda folder, tensors: write(folder / "model.safetensors", tensors | REST),
    "one bin": lambda folder, tensors: write(folder / "pytorch_model.bin", tensors | REST),
    "shards of safetensors": lambda folder, tensors: shards(folder, tensors | REST, "model.safetensors"),
    "shards of bin": lambda folder, tensors: shards(folder, tensors | REST, "pytorch_model.bin"),
}


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "base_model.model.model.", "base_model.", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(tmp_path, layout, prefix):
    LAYOUTS[layout](tmp_path, prefixed(prefix, PARTS))
    stc, sound = fresh()
    assert load_projectors(tmp_path, stc, sound) == COVERED
    assert holds(stc, "mm_projector")
    assert holds(sound, "mm_projector_a")


def test_what_was_trained_beside_lora(tmp_path):
    write(tmp_path / "adapter_model.safetensors", {"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(1)})
    write(tmp_path / "non_lora_trainables.bin", prefixed("base_model.model.model.", PARTS) | REST)
    stc, sound = fresh()
    assert load_projectors(tmp_path, stc, sound) == COVERED
    assert holds(stc, "mm_projector")
    assert holds(sound, "mm_projector_a")


def test_one_of_two_and_a_file_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "lab" / "video").mkdir(parents=True)
    write(tmp_path / "weights" / "lab" / "video" / "mm_projector.bin", prefixed("model.", PARTS))
    for place in ("lab/video", "weights/lab/video/mm_projector.bin"):
        stc, sound = fresh()
        before = {name: tensor.clone() for name, tensor in sound.state_dict().items()}
        assert load_projectors(place, stc) == "113/113 STC tensors"
        assert holds(stc, "mm_projector")
        assert all(torch.equal(tensor, before[name]) for name, tensor in sound.state_dict().items())
        assert load_projectors(place, audio=sound) == "4/4 mlp2x_gelu tensors"
        assert holds(sound, "mm_projector_a")


def test_a_whole_checkpoint_counts_before_files_apart(tmp_path):
    """VideoLLaMA2.1-7B-AV's folder holds both; what the checkpoint does not hold comes from the files."""
    files = shards(tmp_path, prefixed("model.", VIDEO_PART) | REST, "model.safetensors")
    write(tmp_path / "mm_projector.bin", prefixed("model.", {name: t + 1 for name, t in VIDEO_PART.items()}))
    write(tmp_path / "mm_projector_a.bin", prefixed("model.", AUDIO_PART))
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"not read, for nothing is missing any more")
    stc, sound = fresh()
    assert load_projectors(tmp_path, stc, sound) == COVERED
    assert holds(stc, "mm_projector")
    assert holds(sound, "mm_projector_a")
    (tmp_path / files[0]).unlink()
    with pytest.raises(UserError, match=rf"{files[0]}: missing, but model.safetensors.index.json names it$"):
        load_projectors(tmp_path, stc)


def test_shards_without_projectors_are_not_read(tmp_path):
    """Of a language model of 15 GB."""
    others = {f"a.{i}": torch.ones(2) for i in range(len(PARTS))}
    first, _ = shards(tmp_path, others | prefixed("model.", PARTS), "pytorch_model.bin", 2)
    (tmp_path / first).write_bytes(b"not tensors")
    stc, sound = fresh()
    with pytest.raises(UserError, match=r"00001-of-00002.bin: not readable as tensors only"):
        load_projectors(tmp_path / first, stc)
    assert load_projectors(tmp_path, stc, sound) == COVERED


def test_another_dtype_and_frozen_modules(tmp_path):
    write(tmp_path / "mm_projector.bin", prefixed("model.", PARTS))
    stc, sound = (module.bfloat16().requires_grad_(False) for module in fresh())
    load_projectors(tmp_path, stc, sound)
    assert stc.readout[2].weight.dtype == torch.bfloat16
    assert torch.equal(sound[0].bias, AUDIO_PART["mm_projector_a.0.bias"].half().bfloat16())
    assert not any(p.requires_grad for p in stc.parameters())


def other(shapes, stem="mm_projector."):
    """An edit of a file: this part of it anew."""
    return lambda state: (
        {name: t for name, t in state.items() if f".{stem}" not in name} | prefixed(f"model.{stem}", filled(shapes))
    )


def without(word):
    return lambda state: {name: tensor for name, tensor in state.items() if word not in name}


REFUSED = {
    "another language model": (
        other(stc_shapes(hidden=24)),
        "x.bin: its mm_projector is for a language model of width 24, not 16",
    ),
    "another language model's audio": (
        other(mlp_shapes(hidden=24), "mm_projector_a."),
        "x.bin: its mm_projector_a is for a language model of width 24, not 16",
    ),
    "another tower": (
        other(stc_shapes(width=20)),
        "x.bin: its mm_projector: 5 tensors of the wrong shape: s1.b1.conv1.conv.weight is (16, 20, 1, 1), "
        "not (16, 12, 1, 1), s1.b1.se.fc1.weight is (5, 16, 1, 1), not (3, 16, 1, 1), "
        "s1.b1.se.fc1.bias is (5,), not (3,), ...",
    ),
    "an MLP": (other(mlp_shapes(WIDTH)), "x.bin: its mm_projector is mlp2x_gelu, not STC"),
    "a linear layer of sound": (
        other(linear_shapes(), "mm_projector_a."),
        "x.bin: its mm_projector_a is linear, not mlp2x_gelu",
    ),
    "another projector": (
        other({"query_tokens": (2, 3)}),
        "x.bin: its mm_projector is unknown, not STC",
    ),
    "fewer blocks": (
        other(stc_shapes(depth=3)),
        "x.bin: its mm_projector: 87/113 tensors match the model; 26 missing: s1.b4.conv1.bn.bias, "
        "s1.b4.conv1.bn.weight, s1.b4.conv1.conv.weight, ...",
    ),
    "a tensor is missing": (
        without("sampler.0.bias"),
        "x.bin: its mm_projector: 112/113 tensors match the model; 1 missing: sampler.0.bias",
    ),
    "a deeper MLP of sound": (
        lambda state: state | prefixed("model.mm_projector_a.", {"4.weight": torch.ones(16, 16)}),
        "x.bin: its mm_projector_a: 4/4 tensors match the model; 1 unexpected: 4.weight",
    ),
    "no video": (
        without(".mm_projector."),
        "x.bin: holds no mm_projector, which whole checkpoints do, or mm_projector.bin, mm_projector_a.bin, "
        "non_lora_trainables.bin",
    ),
    "no audio": (
        without(".mm_projector_a."),
        "x.bin: holds no mm_projector_a, which whole checkpoints do, or mm_projector.bin, mm_projector_a.bin, "
        "non_lora_trainables.bin",
    ),
    "one tensor in two spellings": (
        lambda state: state | prefixed("module.", {"mm_projector.readout.0.bias": torch.ones(16)}),
        "x.bin: two tensors are mm_projector.readout.0.bias, in two spellings",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_anything_else_is_refused_in_one_line_and_changes_nothing(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    edit, line = REFUSED[change]
    torch.save(edit(prefixed("model.", PARTS) | REST), "x.bin")
    modules = fresh()
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    with pytest.raises(UserError) as error:
        load_projectors("x.bin", *modules)
    assert str(error.value) == line
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_a_folder_without_projectors(tmp_path):
    stc, _ = fresh()
    with pytest.raises(UserError, match=r": holds no mm_projector, which whole checkpoints do"):
        load_projectors(tmp_path, stc)
    shards(tmp_path, {f"layers.{i}": torch.ones(1) for i in range(3)}, "model.safetensors")
    with pytest.raises(UserError, match=r": holds no mm_projector, which whole checkpoints do"):
        load_projectors(tmp_path, stc)
    with pytest.raises(UserError, match=r"^projectors 'lab/none' not found"):
        load_projectors("lab/none", stc)


def test_classes_by_name():
    kinds = {kind: type(connector(kind, 4, 4)) for kind in VIDEO}
    assert kinds == {"stc_connector_v35": Stc, "stc_connector": Stc, "linear": Linear, "mlp2x_gelu": Mlp}
