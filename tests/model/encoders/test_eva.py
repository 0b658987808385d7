"""EVA's file against transformers' BLIP-2 tower, whose attention has the same biases; its size, its refusals."""

import json

import pytest
import torch

from common.config import UserError
from model import encoders
from model.encoders.eva import stretch

WIDTH, DEPTH, SIDE = 176, 39, 4


@pytest.fixture(scope="module")
def reference():
    """BLIP-2's tower for pictures of 4 x 4 patches, with weights that none of its parts could do without."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 96}
    model = Blip2VisionModel(Blip2VisionConfig(**shape, image_size=14 * SIDE, patch_size=14)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        spread = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.5 if "position" in name else spread)
    for layer in model.encoder.layers:
        layer.self_attn.qkv.bias.data[WIDTH : 2 * WIDTH] = 0
    return model


@pytest.fixture(scope="module")
def tensors(reference):
    """Its weights by the names of eva_vit_g.pth, which has one more block and a head."""
    embeddings = reference.embeddings
    found = {
        "cls_token": embeddings.class_embedding,
        "pos_embed": embeddings.position_embedding,
        "patch_embed.proj.weight": embeddings.patch_embedding.weight,
        "patch_embed.proj.bias": embeddings.patch_embedding.bias,
    }
    for number, layer in enumerate([*reference.encoder.layers, reference.encoder.layers[0]]):
        parts = {"norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "mlp.fc1": layer.mlp.fc1,
                 "mlp.fc2": layer.mlp.fc2, "attn.proj": layer.self_attn.projection}  # fmt: skip
        found |= {
            f"blocks.{number}.{name}.{leaf}": tensor
            for name, part in parts.items()
            for leaf, tensor in part.named_parameters()
        }
        query, _, value = layer.self_attn.qkv.bias.chunk(3)
        attention = {"q_bias": query, "v_bias": value, "qkv.weight": layer.self_attn.qkv.weight}
        found |= {f"blocks.{number}.attn.{name}": tensor for name, tensor in attention.items()}
    found |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.ones(WIDTH), "head.weight": torch.ones(5, WIDTH)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("eva") / "eva_vit_g.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def eva(file):
    return encoders.load("eva", str(file), image_size=56)


def frames(count=1, height=60, width=90):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_same_as_transformers_at_its_size_and_at_twice_that(file, reference, side):
    eva = encoders.load("eva", str(file), image_size=14 * side)
    x = torch.randn(2, 3, 14 * side, 14 * side, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        expected = reference(x, output_hidden_states=True, interpolate_pos_encoding=side != SIDE).hidden_states
    state = encoders.load("eva", str(file), image_size=14 * side, layer="20")(x[:, None])
    assert (state - expected[20]).abs().max() <= 1e-4
    normed = torch.nn.functional.layer_norm(expected[DEPTH], (WIDTH,), eps=1e-5)
    found = eva(x[:, None])
    assert found.shape == (2, 1 + side**2, WIDTH)
    assert (found - normed).abs().max() <= 1e-4


def test_positions_are_stretched_as_pictures(tensors):
    ramp = torch.arange(16.0).view(4, 4).flatten()[:, None].expand(-1, 3)
    made = stretch(torch.cat([torch.full((1, 3), 9.0), ramp]), 8)
    grid = made[1:, 0].view(8, 8)
    assert made.shape == (65, 3)
    assert (made[0] == 9).all()
    assert torch.allclose(grid[3:5, 3:5].mean(), torch.tensor(7.5), atol=1e-5)
    assert (grid.diff(dim=1) > 0).all()
    assert torch.allclose((grid[4] - grid[3])[2:6], torch.tensor(2.0), atol=0.5)
    square = tensors["pos_embed"][0]
    assert stretch(square, SIDE) is square


def test_one_picture_is_a_class_token_and_patches(file):
    eva = encoders.load("eva", str(file), image_size="112")
    assert (eva.poolings[0], eva.frames("patches"), eva.frames("mean")) == ("patches", 1, 16)
    clip = frames()
    assert eva.prepare(clip).shape == (1, 3, 112, 112)
    tokens = eva.encode(clip, "patches")
    assert tokens.shape == (65, WIDTH)
    assert torch.equal(eva.encode(clip, "frame"), tokens[0])
    info = json.loads(json.dumps(eva.info("patches")))
    assert (info["image_size"], info["dim"]) == (112, WIDTH)
    assert info["preprocess"] == "eva: squash to 112 x 112 bicubic, mean and deviation CLIP"
    assert list(info["weights_sha256"]) == ["eva_vit_g.pth"]
    again = encoders.load("eva", **info["options"])
    assert torch.equal(again.encode(clip, "patches"), tokens)
    assert eva.coverage == "589/589 tensors, 18 not used"


def test_the_same_in_a_batch_and_nearly_in_bf16(file, eva):
    x = torch.randn(2, 3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    found = eva(x, torch.tensor([[True] * 3, [True, False, False]]))
    for clip, rows, count in zip(x, found, (3, 1), strict=True):
        alone = torch.cat([eva(frame[None, None])[0] for frame in clip[:count]])
        assert (rows[: 17 * count] - alone).abs().max() <= 1e-5
        assert not rows[17 * count :].any()
    rough = encoders.load("eva", str(file), image_size=56, dtype="bf16")(x[:1])
    assert 0 < (rough - found[:1]).norm() / found[:1].norm() < 0.02


def test_where_the_file_is_found(file, eva, tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        encoders.load("eva")
    looked = "eva weights 'eva_vit_g.pth' not found (looked in eva_vit_g.pth, weights/eva_vit_g.pth)"
    url = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
    assert str(error.value) == f"{looked}; they are published at {url}"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/eva_vit_g.pth").symlink_to(file)
    (tmp_path / "weights/other.pth").touch()
    here = encoders.load("eva", image_size=56)
    assert here.info("patches")["options"]["folder"] == "eva_vit_g.pth"
    there = encoders.load("eva", "weights", image_size=56)
    expected = eva.encode(frames(), "frame")
    assert torch.equal(here.encode(frames(), "frame"), expected)
    assert torch.equal(there.encode(frames(), "frame"), expected)
    assert there.weights_sha256 == eva.weights_sha256
    half = {"model": {name: tensor.half() for name, tensor in tensors.items()}}
    torch.save(half, tmp_path / "half.pth")
    again = encoders.load("eva", "half.pth", image_size=56)
    assert (again.encode(frames(), "frame") - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 100, r"^eva: image_size: 100 is not a multiple of 14$"),
        ({}, 0, r"^eva: image_size: 0 is not a multiple of 14$"),
        ({"blocks.38.mlp.fc1.bias": None}, 56, r"x.pth: 588/589 tensors match .*; 1 missing: blocks.38.fc1.bias$"),
        ({"pos_embed": None}, 56, r"x.pth: 588/589 tensors match the model; 1 missing: position$"),
        ({"pos_embed": torch.zeros(1, 16, WIDTH)}, 56, r"wrong shape: position is \(16, 176\), not \(17, 176\)$"),
        ({"blocks.0.attn.k_bias": torch.zeros(WIDTH)}, 56, r"x.pth: 589/589 .*; 1 unexpected: blocks.0.attn.k_bias$"),
        ({"patch_embed.proj.weight": None}, 56, r"x.pth: not laid out as its authors' file: no patch_embed.proj.w"),
        ({"patch_embed.proj.weight": torch.zeros(192, 3, 14, 14)}, 56, r"x.pth: not EVA's: no heads of 88 in a width"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(tensors, tmp_path, changes, size, message):
    changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    torch.save(changed, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        encoders.load("eva", str(tmp_path / "x.pth"), image_size=size)
    assert "\n" not in str(error.value)
