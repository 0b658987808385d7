"""The vision encoders against transformers on small random weights, and what all of them have in common."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import UserError
from model import encoders
from model.encoders import pictures
from model.encoders.clip import Clip
from model.encoders.eva import Eva
from model.encoders.siglip import Siglip
from model.encoders.videomae import VideoMae
from model.encoders.vit import VitConfig
from model.encoders.vitmae import VitMae

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80,
         "image_size": 32, "patch_size": 8}  # fmt: skip
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
           "decoder_intermediate_size": 32}  # fmt: skip
TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KINDS = ("vitmae", "vitmae_bare", "videomae", "videomae_bare", "clip", "clip_bare", "siglip", "siglip_bare")
FRAMES = ("vitmae", "clip", "siglip")


def reference(kind):
    """A model of transformers with weights that none of its parts could do without."""
    import transformers as t

    picture, pre = {**SMALL, **DECODER}, kind in ("vitmae", "videomae")
    if kind.startswith("vitmae"):
        config = t.ViTMAEConfig(**picture, mask_ratio=0.0)
        model = t.ViTMAEForPreTraining(config) if pre else t.ViTMAEModel(config)
    elif kind.startswith("videomae"):
        config = t.VideoMAEConfig(**picture, num_frames=4, use_mean_pooling=not pre)
        model = t.VideoMAEForPreTraining(config) if pre else t.VideoMAEModel(config)
    elif kind.endswith("bare"):
        name = "CLIP" if kind.startswith("clip") else "Siglip"
        model = getattr(t, f"{name}VisionModel")(getattr(t, f"{name}VisionConfig")(**SMALL))
    else:
        name = "CLIP" if kind == "clip" else "Siglip"
        words = {"bos_token_id": 0, "eos_token_id": 1, **TEXT}
        model = getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(text_config=words, vision_config=SMALL))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        spread = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.5 if "position" in name else spread)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vit")
    for kind in KINDS:
        reference(kind).save_pretrained(root / kind)
    return root


def tower(kind):
    model = reference(kind)
    for part in ("vit", "videomae", "vision_model"):
        model = getattr(model, part, model)
    return model


def load(folders, kind, **options):
    return encoders.load(kind.removesuffix("_bare"), str(folders / kind), **options)


def pixels(*shape, seed=0):
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def clip_of(frames, height=40, width=50):
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_transformers(folders, kind):
    film = kind.startswith("videomae")
    x = pixels(2, 4) if film else pixels(2)
    # noise that rises along a picture keeps all its patches, and in their order
    sorted_noise = {"noise": torch.arange(16.0).expand(2, -1)} if kind.startswith("vitmae") else {}
    model = tower(kind)
    if "mask_ratio" in vars(model.config):
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = model(pixel_values=x, output_hidden_states=True, **sorted_noise)
    states = [*expected.hidden_states[:-1], expected.last_hidden_state]
    encoder = load(folders, kind, layer="last")
    assert len(states) == 4
    for number, state in enumerate(states):
        each = load(folders, kind, layer=str(number))
        found = each(x if film else x[:, None])
        assert found.shape == state.shape
        assert state.abs().max() > 1
        assert (found - state).abs().max() <= 1e-4
    tokens = encoder(x if film else x[:, None])[0]
    vector = states[-1][0].mean(0) if film or "siglip" in kind else states[-1][0, 0]
    if "clip" in kind:
        vector = expected.pooler_output[0] if "siglip" not in kind else vector
    assert (encoder.pool(tokens, "mean") - vector).abs().max() <= 1e-4


def test_layers_from_the_end_and_means(folders):
    x = pixels(1, 1)
    states = [load(folders, "siglip", layer=str(number))(x) for number in range(4)]
    assert torch.equal(load(folders, "siglip")(x), states[2])
    assert torch.equal(load(folders, "siglip", layer="-1")(x), states[3])
    assert (load(folders, "siglip", layer="1-2")(x) - (states[1] + states[2]) / 2).abs().max() < 1e-6


@pytest.mark.parametrize("kind", FRAMES)
def test_same_frame_alone_and_in_any_batch(folders, kind):
    encoder = load(folders, kind)
    x, counts = pixels(3, 5), torch.tensor([5, 2, 1])
    rows = encoder.lengths(counts)
    batch = encoder(x, torch.arange(5) < counts[:, None])
    for clip, found, count, length in zip(x, batch, counts.tolist(), rows.tolist(), strict=True):
        assert length == count * (16 + (kind != "siglip"))
        frames = torch.cat([encoder(frame[None, None])[0] for frame in clip[:count]])
        assert (found[:length] - frames).abs().max() <= 1e-5
        assert not found[length:].any()


def test_same_film_alone_and_in_a_batch(folders):
    encoder = load(folders, "videomae")
    x = pixels(3, 4)
    batch = encoder(x, torch.ones(3, 4, dtype=torch.bool))
    for film, found in zip(x, batch, strict=True):
        assert (found - encoder(film[None])[0]).abs().max() <= 1e-5
    assert encoder.lengths(torch.tensor([4, 4])).tolist() == [32, 32]


@pytest.mark.parametrize("kind", FRAMES)
def test_poolings(folders, kind):
    encoder = load(folders, kind, frames="3")
    assert [encoder.frames(pooling) for pooling in encoder.poolings] == [3, 3, 1, 1]
    clip = clip_of(3)
    vectors = encoder.encode(clip, "frames")
    assert vectors.shape == (3, 48)
    assert (encoder.encode(clip, "mean") - vectors.mean(0)).abs().max() < 1e-6
    assert (encoder.encode(clip[1:2], "frame") - vectors[1]).abs().max() < 1e-5
    tokens = encoder.encode(clip[1:2], "patches")
    assert tokens.shape == ((16, 48) if kind == "siglip" else (17, 48))
    assert (encoder.pool(tokens, "frame") - vectors[1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["clip", "clip_bare", "siglip", "siglip_bare"])
def test_film_is_the_patches_that_transformers_gives(folders, kind):
    """hidden_states[-2] of every frame, less a class token; of clips one after the other, each prepared on its own."""
    encoder = load(folders, kind, layer="-2", aspect="squash")
    clips = [clip_of(3), clip_of(2, 64, 32)]
    x = torch.cat([encoder.prepare(clip) for clip in clips])
    with torch.no_grad():
        expected = tower(kind)(pixel_values=x, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if "clip" in kind else expected
    film = encoder.film(clips)
    assert film.shape == expected.shape == (5, 16, 48)
    assert (film - expected).abs().max() <= 1e-4
    patches = encoder.encode(clips[1], "patches")[-16:]  # the one frame that this pooling has
    assert (film[3] - patches).abs().max() <= 1e-5


def test_poolings_of_films(folders):
    encoder = load(folders, "videomae")
    clip = clip_of(4)
    tokens = encoder(encoder.prepare(clip)[None])[0]
    times = encoder.encode(clip, "frames")
    assert (encoder.frames("mean"), times.shape) == (4, (2, 48))
    assert (times[1] - tokens[16:].mean(0)).abs().max() < 1e-6
    assert (encoder.encode(clip, "mean") - tokens.mean(0)).abs().max() < 1e-6


def test_vectors_of_faces_as_mer2023_made_them(folders):
    encoder = load(folders, "vitmae", vector="mean", normalize="false")
    clip = clip_of(2)
    plain = encoder.prepare(clip)
    assert plain.min() >= 0
    assert plain.max() <= 1
    assert (encoder.prepare(clip[:, :, :, :1].expand(-1, -1, -1, 3)).std(1) < 1e-6).all()
    tokens = encoder.encode(clip[:1], "patches")
    assert (encoder.encode(clip[:1], "frame") - tokens[1:].mean(0)).abs().max() < 1e-6
    assert encoder.info("mean")["preprocess"] == "vitmae: squash to 32 x 32 bilinear, mean and deviation none"
    usual = load(folders, "vitmae").info("mean")["preprocess"]
    assert usual == "vitmae: squash to 32 x 32 bilinear, mean and deviation ImageNet"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_aspect(folders, kind):
    clip = clip_of(1, 20, 60)
    padded, squashed = (load(folders, kind, aspect=aspect) for aspect in ("pad", "squash"))
    usual = load(folders, kind)
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in pictures.STATISTICS[padded.statistics])
    grey = (127 / 255 - mean) / deviation
    assert (padded.prepare(clip)[0, :, :8] - grey).abs().max() < 0.02
    assert (squashed.prepare(clip)[0, :, :8] - grey).abs().max() > 0.2
    assert torch.equal(usual.prepare(clip), squashed.prepare(clip)) == (kind == "siglip")
    statistics = {"clip": "CLIP", "siglip": "halves"}[kind]
    said = f"{kind}: pad to 32 x 32 bicubic, mean and deviation {statistics}"
    assert padded.info("patches")["preprocess"] == said
    assert encoders.load(kind, **padded.info("patches")["options"]).resizing == "pad"
    assert ("aspect" in usual.info("patches")) == (kind == "siglip")  # as in stores from before there was a choice
    with pytest.raises(UserError, match=rf"^{kind}: aspect 'fit' is not one of .*squash, pad$"):
        load(folders, kind, aspect="fit")


@pytest.mark.parametrize("kind", ["vitmae", "videomae", "clip", "siglip"])
def test_bf16_is_close(folders, kind):
    x = pixels(2, 4)
    exact, rough = load(folders, kind, layer="last")(x), load(folders, kind, layer="last", dtype="bf16")(x)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02


def test_info_rebuilds_the_encoder(folders):
    encoder = load(folders, "clip", frames=2, layer="-2")
    info = json.loads(json.dumps(encoder.info("patches")))
    assert (info["dim"], info["pooling"], info["layer"]) == (48, "patches", "-2")
    assert info["preprocess"] == "clip: crop to 32 x 32 bicubic, mean and deviation CLIP"
    assert list(info["weights_sha256"]) == ["config.json", "model.safetensors"]
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(clip_of(1), "patches"), encoder.encode(clip_of(1), "patches"))
    assert encoder.coverage == "55/55 tensors, 23 not used"


AUTHORS = (
    (r"^embeddings.patch_embeddings.projection", "patch_embed.proj"),
    (r"^embeddings.cls_token", "cls_token"),
    (r"^embeddings.position_embeddings", "pos_embed"),
    (r"^encoder.layer.", "blocks."),
    (r"attention.attention.([qv])_bias", r"attn.\1_bias"),
    (r"attention.output.dense", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate.dense", "mlp.fc1"),
    (r"output.dense", "mlp.fc2"),
    (r"^layernorm", "norm"),
)


def as_authors(tensors, prefix):
    """Tensors of transformers by the names that the authors gave them, queries, keys and values as one."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        for old, new in AUTHORS:
            name = re.sub(old, new, name)
        found[name] = tensor
    for name in [name for name in found if ".attention.attention.query." in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return found


@pytest.mark.parametrize("kind", ["vitmae", "videomae"])
def test_files_of_their_authors(tmp_path, kind):
    import transformers as t

    shape = {**SMALL, **DECODER, "hidden_size": 128, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    if kind == "vitmae":
        model = t.ViTMAEForPreTraining(t.ViTMAEConfig(**shape))
    else:
        # the names do not tell the size of films, so it is the published one
        shape |= {"image_size": 224, "patch_size": 32, "num_hidden_layers": 2}
        model = t.VideoMAEForPreTraining(t.VideoMAEConfig(**shape, use_mean_pooling=False))
    model.save_pretrained(tmp_path / "folder")
    prefix = "vit." if kind == "vitmae" else "videomae."
    whole = load_file(tmp_path / "folder/model.safetensors")
    tensors = as_authors({name: part for name, part in whole.items() if name.startswith(prefix)}, prefix)
    if kind == "videomae":
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    unread = {"vitmae": "decoder_embed.weight", "videomae": "decoder.blocks.0.norm1.weight"}[kind]
    tensors |= {"mask_token": torch.zeros(1, 1, 16), unread: torch.zeros(16)}
    torch.save({"model": tensors, "epoch": 340}, tmp_path / "checkpoint-340.pth")
    given, own = (encoders.load(kind, str(tmp_path / name)) for name in ("folder", "checkpoint-340.pth"))
    clip = clip_of(16 if kind == "videomae" else 2)
    assert (own.encode(clip, "frames") - given.encode(clip, "frames")).abs().max() < 1e-4
    assert own.coverage.endswith(" tensors, 2 not used")
    assert list(own.info("mean")["weights_sha256"]) == ["checkpoint-340.pth"]
    (tmp_path / "folder/config.json").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: not laid out as its authors' file: no patch_embed.proj.w"):
        encoders.load(kind, str(tmp_path / "folder"))


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("cls", "shape", "parameters", "tokens"),
    [
        (VitMae, VitConfig(**LARGE), 303_301_632, 197),
        (VideoMae, replace(VideoMae.shape, **LARGE, use_mean_pooling=False), 303_860_736, 1568),
        (Clip, replace(Clip.shape, **LARGE, patch_size=14), 303_179_776, 257),
        (Eva, Eva.shape, 986_975_872, 1025),
        (Eva, replace(Eva.shape, image_size=224), 985_894_528, 257),
    ],
)  # fmt: skip
def test_published_sizes(cls, shape, parameters, tokens):
    with torch.device("meta"):
        net = cls.network(shape)
        size = shape.image_size
        x = torch.empty(1, 3, 16, size, size) if cls is VideoMae else torch.empty(1, 3, size, size)
        first = next(net.states(x))
    assert (count(net), shape.tokens) == (parameters, tokens)
    assert first.shape == (1, tokens, shape.hidden_size)


def test_published_size_of_siglip():
    """428.2 M are published with the head, which is not read: attention of one query, a norm and an MLP."""
    width, inner = 1152, 4304
    shape = replace(Siglip.shape, hidden_size=width, num_hidden_layers=27, num_attention_heads=16,
                    intermediate_size=inner, image_size=384, patch_size=14)  # fmt: skip
    with torch.device("meta"):
        net = Siglip.network(shape)
    head = width + 4 * (width**2 + width) + 2 * width + 2 * width * inner + inner + width
    assert (count(net), count(net) + head, shape.tokens) == (412_987_248, 428_225_600, 729)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("clip", {}, {"layer": "4"}, r"^clip: layer '4' is not one of last, .* a state from 0 to 3"),
        ("clip", {}, {"layer": "-5"}, r"^clip: layer '-5' is not one of last"),
        ("clip", {}, {"dtype": "fp16"}, r"^clip: dtype 'fp16' is not one of fp32, bf16$"),
        ("clip", {}, {"frames": 0}, r"^clip: frames 0 is not above 0$"),
        ("vitmae", {}, {"vector": "max"}, r"^vitmae: vector 'max' is not one of cls, mean$"),
        ("siglip", {}, {"aspect": "crop"}, r"^siglip: aspect 'crop' is not one of squash, pad$"),
        ("clip", {"model_type": "siglip_vision_model"}, {}, r"config.json: model_type 'siglip_vision_model' is not su"),
        ("vitmae", {"num_channels": 1}, {}, r"config.json: num_channels 1 is not supported \(only 3\)$"),
        ("videomae", {"qv_bias": False}, {}, r"config.json: qv_bias False is not supported \(only True\)$"),
        ("siglip", {"hidden_act": "silu"}, {}, r"config.json: hidden_act 'silu' is not supported \(only 'gelu_pyto"),
        ("siglip", {"num_hidden_layers": 2}, {}, r"siglip: 37/37 tensors match the model; 16 unexpected: blocks.2.att"),
        ("vitmae", {"image_size": 64}, {}, r"vitmae: 1 tensors of the wrong shape: position is \(17, 48\), not \(65,"),
        ("clip", {"post_layernorm.bias": None}, {}, r"clip: 54/55 tensors match the model; 1 missing: pooled.bias$"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(folders, tmp_path, kind, changes, options, message):
    bare = folders / (kind if kind in ("vitmae", "videomae") else f"{kind}_bare")
    folder = tmp_path / kind
    folder.mkdir()
    tensors, config = load_file(bare / "model.safetensors"), json.loads((bare / "config.json").read_text())
    gone = [name for name in tensors if name in changes]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {} if gone else config | changes))
    with pytest.raises(UserError, match=message) as error:
        encoders.load(kind, str(folder), **options)
    assert "\n" not in str(error.value)


def test_absent_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(UserError, match=r"hf download google/siglip-so400m-patch14-384 --local-dir \S+$"):
        encoders.load("siglip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^empty/config.json: No such file or directory$"):
        encoders.load("clip", "empty")
    with pytest.raises(UserError, match=r"^empty: holds no config.json, and not one weight file but 0: none$"):
        encoders.load("vitmae", "empty")
