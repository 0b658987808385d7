"""HuBERT and wav2vec 2.0 against transformers on small random weights, alone and in batches; which files they take."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from model import encoders
from model.encoders.speech import SpeechConfig, SpeechNet

# 16 channels a group: with fewer, oneDNN's bf16 convolution of an even kernel is wrong on a CPU with AMX; the published
# models have 48 to 80
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 11,
}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KINDS = {
    "hubert-base": {},
    "hubert-large": {**STABLE, "num_conv_pos_embeddings": 9, "feat_proj_layer_norm": False},
    "wav2vec2-base": {},
    "wav2vec2-large": STABLE,
}
SECONDS = (0.01, 0.05, 0.3, 1.1, 3.0)  # the first is shorter than a frame's 25 ms


def classes(kind, *parts):
    import transformers

    stem = "Hubert" if kind.startswith("hubert") else "Wav2Vec2"
    return [getattr(transformers, f"{stem}{part}") for part in parts]


def drawn(model):
    """The model with weights that make states of about 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "original0" in name:  # the length of weights per place, of frames that are about 1
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.3 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def references():
    found = {}
    for kind, changes in KINDS.items():
        config, model = classes(kind, "Config", "Model")
        found[kind] = drawn(model(config(**SMALL | changes)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, references):
    from transformers import Wav2Vec2FeatureExtractor

    root = tmp_path_factory.mktemp("speech")
    for kind, model in references.items():
        model.save_pretrained(root / kind)
        Wav2Vec2FeatureExtractor(do_normalize="large" in kind).save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def load(folders):
    return lambda kind, **options: encoders.load(kind.partition("-")[0], str(folders / kind), **options)


def changed(folders, to, kind="hubert-base", **config):
    """A copy of a folder with changes to its config.json."""
    shutil.copytree(folders / kind, to)
    given = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(given))
    return to


def padded(clips):
    """Clips in a batch whose padding must not matter, and the mask of their own samples."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = pad_sequence(clips, batch_first=True, padding_value=9.0)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_matches_transformers(kind, load, references, folders, sound):
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folders / kind)
    layers = [load(kind, layer=str(number)) for number in range(5)]
    for seconds in (0.025, 0.05, 1.13):
        clip = sound(seconds)
        inputs = extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt").input_values
        states = references[kind](inputs, output_hidden_states=True).hidden_states
        last = references[kind](inputs).last_hidden_state
        assert 0.3 < last.std() < 3
        for encoder, state in zip(layers, [*states[:-1], last], strict=True):
            found = encoder.encode(clip, "frames")
            assert found.shape == state[0].shape
            assert (found - state[0]).abs().max() <= 1e-4
    for layer, expected in (
        ("last", last[0]),
        ("1-3", sum(states[1:4])[0] / 3),
        ("last4", (sum(states[1:4]) + last)[0]),
    ):
        assert (load(kind, layer=layer).encode(clip, "frames") - expected).abs().max() <= 1e-4
    assert (load(kind).encode(clip, "mean") - last[0].mean(0)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_same_alone_and_in_a_batch(kind, load, sound):
    """The group norm of base models sees a clip's own frames only; transformers' does not."""
    encoder = load(kind)
    clips = [encoder.prepare(sound(seconds, seed)) for seed, seconds in enumerate(SECONDS)]
    batch, mask = padded(clips)
    frames = encoder(batch, mask)
    lengths = encoder.lengths(mask.sum(1)).tolist()
    assert lengths == [1, 2, 14, 54, 149]
    for clip, row, length in zip(clips, frames, lengths, strict=True):
        alone = encoder(clip[None])[0]
        assert alone.shape == (length, encoder.dim)
        assert (row[:length] - alone).abs().max() <= 1e-5
        assert not row[length:].any()
    same = torch.stack([clips[3], clips[3].flip(0)])
    assert (encoder(same, torch.ones_like(same, dtype=torch.bool))[0] - encoder(clips[3][None])[0]).abs().max() <= 1e-5
    short, mask = padded([clips[0][:100], clips[0]])  # nothing in the batch fills a frame
    assert (encoder(short, mask)[0] - encoder(clips[0][None, :100])[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_close(kind, load, sound):
    exact, rough = load(kind), load(kind, dtype="bf16")
    clips = [exact.prepare(sound(seconds, seed)) for seed, seconds in enumerate(SECONDS)]
    batch, mask = padded(clips)
    expected, found = exact(batch, mask), rough(batch, mask)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_clips_are_prepared_as_the_folder_says(load, folders, tmp_path, sound):
    clip = 0.1 * sound(0.5) + 0.3
    plain, normed = load("hubert-base"), load("hubert-large")
    assert torch.equal(plain.prepare(clip), clip)
    x = clip.double()
    expected = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    assert (normed.prepare(clip) - expected).abs().max() < 1e-5
    assert torch.isfinite(normed.encode(torch.zeros(8000), "mean")).all()
    assert plain.info("mean")["preprocess"] == "hubert: 16 kHz"
    assert normed.info("mean")["preprocess"] == "hubert: 16 kHz, zero mean and unit variance a clip"
    first = load("wav2vec2-large", seconds="0.2")
    assert torch.equal(first.encode(clip, "mean"), load("wav2vec2-large").encode(clip[:3200], "mean"))
    (changed(folders, tmp_path / "silent") / "preprocessor_config.json").unlink()
    assert encoders.load("hubert", str(tmp_path / "silent")).normalize


def test_true_sizes():
    """What transformers counts, less the embedding of hidden frames and the gains of the weight norm (128)."""
    for kind, changes, count in (
        ("hubert", {}, 94_371_712), ("hubert", {**LARGE, **STABLE}, 315_438_720),
        ("wav2vec2", {}, 94_371_712), ("wav2vec2", {**LARGE, **STABLE}, 315_438_720),
    ):  # fmt: skip
        config, model = classes(kind, "Config", "Model")
        with torch.device("meta"):
            net, reference = SpeechNet(SpeechConfig(**changes)), model(config(**changes))
        assert sum(p.numel() for p in reference.parameters()) == count
        assert sum(p.numel() for p in net.parameters()) == count - net.config.hidden_size - 128
        assert net.window == 400


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("hubert-base", "ForCTC"),
        ("hubert-large", "ForSequenceClassification"),
        ("wav2vec2-base", "ForPreTraining"),
        ("wav2vec2-large", "ForCTC"),
    ],
)
def test_fine_tuned_models_and_older_names(kind, head, load, references, folders, tmp_path, sound):
    """A head, the network under its name, weight norm as weight_g and weight_v, pickled rather than safetensors."""
    model = classes(kind, head)[0](references[kind].config)
    model.get_submodule(kind.partition("-")[0]).load_state_dict(references[kind].state_dict())
    state = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("weight_g") for name in state)
    folder = changed(folders, tmp_path / "tuned", kind)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    tuned = encoders.load(kind.partition("-")[0], str(folder))
    clip = sound(0.3)
    assert torch.equal(tuned.encode(clip, "frames"), load(kind).encode(clip, "frames"))
    count = len(tuned.net.state_dict())
    unused = len(state) - count - 1  # gain and direction are one of ours
    assert tuned.coverage == f"{count}/{count} tensors, {unused} not used"
    assert list(tuned.weights_sha256) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]


def test_info_rebuilds_the_encoder(load, sound):
    hubert = load("hubert-large", layer="1-2", dtype="bf16")
    info = json.loads(json.dumps(hubert.info("frames")))
    assert (info["encoder"], info["dim"], info["dtype"], info["layer"]) == ("hubert", 64, "float32", "1-2")
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(sound(0.3), "mean"), hubert.encode(sound(0.3), "mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer_norm.bias": None}, r"copy: 80/81 tensors match the model; 1 missing: norm.bias$"),
        ({"encoder.layers.1.layer_norm.bias": torch.ones(3)}, r"shape: blocks.1.norm1.bias is \(3,\), not \(64,\)$"),
        ({"encoder.adapter.weight": torch.ones(3)}, r"81/81 tensors match the model; 1 unexpected: encoder.adapter.w"),
        (
            {"encoder.pos_conv_embed.conv.parametrizations.weight.original0": None},
            r"80/81 tensors .* 1 missing: position.weight; 1 unexpected: position.parametrizations.weight.original1$",
        ),
    ],
)
def test_wrong_tensors(folders, tmp_path, change, message):
    folder = changed(folders, tmp_path / "copy")
    state = load_file(folder / "model.safetensors") | change
    save_file({name: x for name, x in state.items() if x is not None}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        encoders.load("hubert", str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "wavlm"}, r"config.json: model_type 'wavlm' is not supported \(only 'hubert'\)$"),
        ({"hidden_act": "swish"}, r"hidden_act 'swish' is not supported \(only 'gelu', "),
        ({"feat_extract_norm": "batch"}, r"feat_extract_norm 'batch' is not supported \(only 'group', 'layer'\)$"),
        ({"conv_pos_batch_norm": True}, r"conv_pos_batch_norm True is not supported \(only False\)$"),
        ({"adapter_attn_dim": 16}, r"adapter_attn_dim 16 is not supported \(only None\)$"),
        ({"conv_kernel": [10, 3]}, r"conv_dim, conv_kernel and conv_stride have \[7, 2, 7\] layers$"),
        ({"num_attention_heads": 5}, r"num_attention_heads 5 does not divide hidden_size 64$"),
        ({"num_hidden_layers": 5}, r"copy: 81/97 tensors match the model; 16 missing: "),
    ],
)
def test_configs_of_other_models(folders, tmp_path, change, message):
    folder = changed(folders, tmp_path / "copy", **change)
    with pytest.raises(UserError, match=message) as error:
        encoders.load("hubert", str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer": "5"},
            r"^hubert: layer '5' is not one of last, last4 \(the sum of the last four\), a state from 0 to 4",
        ),
        ({"layer": "3-2"}, r"^hubert: layer '3-2' is not one of"),
        ({"layer": "-6"}, r"^hubert: layer '-6' is not one of"),
        ({"dtype": "fp16"}, r"^hubert: dtype 'fp16' is not one of fp32, bf16$"),
        ({"seconds": "0"}, r"^hubert: seconds 0 is not above 0$"),
    ],
)
def test_wrong_options(load, options, message):
    with pytest.raises(UserError, match=message):
        load("hubert-base", **options)


def test_folders_of_something_else(folders, tmp_path):
    with pytest.raises(UserError, match=r"wav2vec2-base/config.json: model_type 'wav2vec2' is not supported"):
        encoders.load("hubert", str(folders / "wav2vec2-base"))
    folder = changed(folders, tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(
        UserError, match=r"preprocessor_config.json: sampling_rate 8000 is not supported \(only 16000\)$"
    ):
        encoders.load("hubert", str(folder))
    (folder / "preprocessor_config.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"copy: no model.safetensors and no pytorch_model.bin, nor an index of either$"
    ):
        encoders.load("hubert", str(folder))
