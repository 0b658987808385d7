"""Cochlear codes against a float64 formula, and what the loader makes of the names and shapes that it finds."""

import numpy as np
import pytest
import torch

from common.config import UserError
from model import encoders


def reference(state, x, magnitude=False):
    """Codes of one waveform, in float64 loops over layers and frames."""
    state = {name: tensor.double().numpy() for name, tensor in state.items()}

    def conv(x, name, stride=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        starts = range(0, x.shape[1] - weight.shape[2] + 1, stride)
        return np.stack([np.einsum("oik,ik->o", weight, x[:, i : i + weight.shape[2]]) + bias for i in starts], 1)

    around = 201 - 80
    x = conv(np.pad(x.double().numpy(), (around // 2, around - around // 2))[None], "fourier", 80)
    if magnitude:
        x = np.hypot(*np.split(x, 2))
    for i in range(3):
        size = state[f"encoder.{i}.weight"].shape[2] - 1
        x = conv(np.pad(np.maximum(x, 0) if i else x, ((0, 0), (size // 2, size - size // 2))), f"encoder.{i}")
    return (x > 0).T @ (2 ** np.arange(12, -1, -1)), np.abs(x).min()


def test_codes_are_the_signs_of_the_chain(weights, chain, sound):
    wavcoch = encoders.load("wavcoch", str(weights / "wavcoch"))
    ids = wavcoch.encode(sound(0.5))
    expected, margin = reference(chain.state_dict(), sound(0.5))
    assert margin > 1e-6  # no sign is a matter of rounding
    assert ids.tolist() == expected.tolist()
    assert ids.dtype == torch.int32
    assert len(set(ids.tolist())) > 20
    assert (wavcoch.info("ids")["kind"], wavcoch.info("ids")["dim"]) == ("ids", 8192)


def test_same_codes_alone_and_in_a_padded_batch(weights, sound):
    wavcoch = encoders.load("wavcoch", str(weights / "wavcoch"))
    clips = [sound(seconds, seed) for seed, seconds in enumerate((0.3, 2.0, 0.002, 0.71))]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(clip) for clip in clips])[:, None]
    rows = wavcoch(batch, mask)
    lengths = wavcoch.lengths(mask.sum(1))
    assert lengths.tolist() == [60, 400, 1, 142]
    for clip, row, length in zip(clips, rows, lengths.tolist(), strict=True):
        assert row[:length].tolist() == wavcoch.encode(clip).tolist()
        assert (row[length:] == -1).all()
        assert row[:length].min() >= 0


def test_autocast_has_no_say_in_codes(weights, sound):
    wavcoch = encoders.load("wavcoch", str(weights / "wavcoch"))
    with torch.autocast("cpu", torch.bfloat16):
        ids = wavcoch.encode(sound(2))
    assert torch.equal(ids, wavcoch.encode(sound(2)))


@pytest.mark.parametrize(
    ("padding", "counts"),
    [
        ("same", {80000: 1000, 16000: 200, 8000: 100, 13056: 163, 13399: 167, 79: 1, 1: 1}),
        ("valid", {80000: 988, 1001: 1, 1080: 1, 1081: 2, 1: 1}),
    ],
)
def test_lengths_of_both_published_conventions(tmp_path, write, padding, counts):
    tensors = {"conv.0.weight": torch.randn(4, 1, 1001), "conv.1.weight": torch.randn(13, 4, 3)}
    wavcoch = encoders.load("wavcoch", write(tmp_path, tensors, {"padding": padding}))
    for samples, count in counts.items():
        assert wavcoch.lengths(torch.tensor(samples)) == count
        assert wavcoch.encode(torch.randn(samples)).shape == (count,)


def renamed(state, names):
    return {new: state[old] for old, new in names.items()}


def test_layers_are_found_by_shape_under_other_names(tmp_path, write, chain, sound):
    state, x = chain.state_dict(), sound(0.4)
    plain = encoders.load("wavcoch", write(tmp_path / "a", state)).encode(x)
    cos, sin = state["fourier.weight"].split(20)
    other = renamed(state, {"encoder.0.weight": "net.conv.2.weight", "encoder.0.bias": "net.conv.2.bias"})
    other |= {"net.conv.10.weight": state["encoder.1.weight"][..., 0], "net.conv.10.bias": state["encoder.1.bias"]}
    other |= {
        "quantizer.project_in.weight": state["encoder.2.weight"],
        "quantizer.project_in.bias": state["encoder.2.bias"],
    }
    other |= {"quantizer.project_out.weight": torch.ones(24, 13), "quantizer.project_out.bias": torch.ones(24)}
    other |= {"quantizer.mask": 2 ** torch.arange(12, -1, -1)}
    other |= {"decoder.0.weight": torch.ones(24, 24, 3), "decoder.norm.weight": torch.ones(24)}
    other |= {"stft.sin_weight": sin, "stft.cos_weight": cos}
    other["stft.bias"] = state["fourier.bias"]
    with pytest.raises(UserError, match=r"it ends at 13 channels; unplaced: stft.bias \(40,\)$"):
        encoders.load("wavcoch", write(tmp_path / "b", other))
    del other["stft.bias"]
    found = encoders.load("wavcoch", write(tmp_path / "c", other))
    state = state | {"fourier.bias": torch.zeros(40)}
    assert torch.equal(found.encode(x), encoders.load("wavcoch", write(tmp_path / "d", state)).encode(x))
    assert found.encode(x).shape == plain.shape


def test_magnitude_where_the_first_layer_reads_half_the_filters(tmp_path, write, chain, sound):
    state = chain.state_dict()
    state["encoder.0.weight"] = state["encoder.0.weight"][:, :20].contiguous()
    expected, margin = reference(state, sound(0.3), magnitude=True)
    assert margin > 1e-6
    assert encoders.load("wavcoch", write(tmp_path, state)).encode(sound(0.3)).tolist() == expected.tolist()


def test_order_of_bits(tmp_path, write, chain, sound):
    state, x = chain.state_dict(), sound(0.3)
    high = encoders.load("wavcoch", write(tmp_path / "a", state)).encode(x)
    turned = [int(f"{id:013b}"[::-1], 2) for id in high.tolist()]
    low = encoders.load("wavcoch", write(tmp_path / "b", state, {"msb_first": False}))
    stored = encoders.load("wavcoch", write(tmp_path / "c", state | {"lfq.mask": 2 ** torch.arange(13)}))
    assert low.encode(x).tolist() == stored.encode(x).tolist() == turned


def test_refusals_are_one_line(tmp_path, write, chain):
    state = chain.state_dict()
    cases = {
        "lacks a layer": (
            {name: tensor for name, tensor in state.items() if "encoder.1" not in name},
            {},
            "no chain of convolutions to 13 bits, it ends at 24 channels; unplaced: "
            "encoder.2.bias (13,), encoder.2.weight (13, 16, 1)",
        ),
        "has a norm": (
            state | {"encoder.norm.weight": torch.ones(24)},
            {},
            "no chain of convolutions to 13 bits, it ends at 13 channels; unplaced: encoder.norm.weight (24,)",
        ),
        "another model": (
            {"embed_tokens.weight": torch.ones(8, 4)},
            {},
            "not a WavCoch: 0 filter banks over the waveform in embed_tokens.weight, ...",
        ),
    }
    for name, (tensors, config, message) in cases.items():
        folder = write(tmp_path / name, tensors, config)
        with pytest.raises(UserError) as error:
            encoders.load("wavcoch", folder)
        assert str(error.value) == f"{folder}: {message}"
    folder = write(tmp_path / "padding", state, {"padding": "full"})
    with pytest.raises(UserError, match=r"config.json: padding 'full' is not one of same, valid$"):
        encoders.load("wavcoch", folder)
    with pytest.raises(
        UserError, match=r"get them with: hf download TuKoResearch/WavCochV8192 --local-dir weights/TuKo"
    ):
        encoders.load("wavcoch")
