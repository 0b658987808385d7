"""States of AuriStream against float64, in windows and batches; which layouts its loader takes and refuses."""

import numpy as np
import pytest
import torch

from common.config import UserError
from model import encoders
from model.encoders.auristream import AuriStreamConfig, Gpt


@pytest.fixture(scope="module")
def load(weights):
    def load(**options):
        return encoders.load("auristream", str(weights / "auristream"), wavcoch=str(weights / "wavcoch"), **options)

    return load


def reference(state, ids, sign=-1, heads=2):
    """States before and after each block, [0] the embeddings, in float64."""
    state = {name: tensor.double().numpy() for name, tensor in state.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * state[f"transformer.{name}.weight"]

    x = state["transformer.wte.weight"][ids]
    states = [x]
    for i in range(4):
        part = {name.removeprefix(f"transformer.h.{i}."): tensor for name, tensor in state.items()}
        width = x.shape[1] // heads
        turns = np.exp(1j * sign * np.outer(np.arange(len(x)), 10000 ** (-np.arange(0, width, 2) / width)))
        rows = np.split(norm(x, f"h.{i}.norm1") @ part["attn.c_attn.weight"].T, 3 * heads, axis=1)
        out = []
        for h in range(heads):
            q, k, v = rows[h], rows[heads + h], rows[2 * heads + h]
            q, k = ((z[:, : width // 2] + 1j * z[:, width // 2 :]) * turns for z in (q, k))
            scores = (q @ k.conj().T).real / np.sqrt(width)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            attention = np.exp(scores - scores.max(1, keepdims=True))
            out.append(attention / attention.sum(1, keepdims=True) @ v)
        x = x + np.concatenate(out, 1) @ part["attn.c_proj.weight"].T
        hidden = norm(x, f"h.{i}.norm2") @ part["mlp.c_fc.weight"].T
        x = x + (hidden / (1 + np.exp(-hidden))) @ part["mlp.c_proj.weight"].T
        states.append(x)
    return states, norm


def test_states_match_the_formula(load, gpt):
    ids = torch.randint(0, 8192, (50,), generator=torch.Generator().manual_seed(0))
    for sign in (-1, 1):
        states, norm = reference(gpt.state_dict(), ids.numpy(), sign)
        last = norm(states[4], "ln_f")
        blocks = [norm(states[2], "h.2.norm1"), norm(states[3], "h.3.norm1")]
        for options, expected in (
            ({}, last),
            ({"layers": "4"}, last),
            ({"layers": "2"}, blocks[0]),
            ({"layers": "2-4"}, (blocks[0] + blocks[1] + last) / 3),
            ({"original": True}, states[4]),
        ):
            found = load(rope_sign=sign, **options).states(ids[None])[0]
            assert np.abs(found.numpy() - expected).max() < 1e-4
    right, wrong = (load(rope_sign=sign).states(ids[None]) for sign in (-1, 1))
    assert (right - wrong).abs().max() > 0.1


def test_same_alone_and_in_a_batch_of_sixteen(load, sound):
    """Lengths of 0.3 to 20 s; ids are equal, so only the order of sums differs."""
    auristream = load()
    auristream.window, auristream.past = 512, 64
    clips = [sound(seconds, seed) for seed, seconds in enumerate(np.geomspace(0.3, 20, 16))]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(clip) for clip in clips])[:, None]
    frames = auristream(batch, mask)
    lengths = auristream.lengths(mask.sum(1)).tolist()
    assert (lengths[0], lengths[-1], frames.shape[1]) == (60, 4000, 4000)
    for clip, row, length in zip(clips, frames, lengths, strict=True):
        alone = auristream.encode(clip, "frames")
        assert alone.shape == (length, 32)
        assert not row[length:].any()
        for how in ("stats", "mean"):
            together = auristream.pool(row[:length], how)
            assert torch.cosine_similarity(together, auristream.pool(alone, how), dim=0) > 1 - 1e-6


def test_windows_overlap_and_drop_their_warm_up(tmp_path, write, gpt, weights):
    folder = write(tmp_path, gpt.state_dict(), {"seq_len": 32})
    auristream = encoders.load("auristream", folder, wavcoch=str(weights / "wavcoch"))
    ids = torch.randint(0, 8192, (1, 75), generator=torch.Generator().manual_seed(3))
    frames = auristream.states(ids)[0]
    assert frames.shape == (75, 32)
    for start, first, last in ((0, 0, 32), (28, 32, 60), (56, 60, 75)):
        window = auristream.net(ids[:, start : start + 32], range(4, 5))[0]
        assert torch.allclose(frames[first:last], window[first - start : last - start], atol=1e-6)
    original = encoders.load("auristream", folder, wavcoch=str(weights / "wavcoch"), original="true")
    restarted = original.net(ids[:, 32:64], range(4, 5), raw=True)[0]
    assert torch.allclose(original.states(ids)[0, 32:64], restarted, atol=1e-6)


def test_windows_of_a_config_that_names_none(load):
    assert (load().window, load().past) == (4096, 512)
    original = load(original=True)
    assert (original.window, original.past) == (1024, 0)


def test_poolings(load, sound):
    auristream, x = load(), 0.02 * sound(0.5)
    frames = auristream.encode(x, "frames").double()
    stats = auristream.encode(x, "stats").double()
    samples = x.double()
    level = 20 * torch.stack([samples.square().mean().sqrt(), samples.abs().max()]).log10()
    expected = torch.cat([frames.mean(0), frames.std(0, correction=0), level])
    assert torch.allclose(stats, expected, atol=1e-4)
    assert len(stats) == auristream.out_dim("stats") == 66
    assert torch.allclose(auristream.encode(x, "mean").double(), frames.mean(0), atol=1e-5)
    original = load(original=True)
    assert original.poolings == ("mean", "frames")
    assert torch.allclose(original.encode(x, "mean").norm(), torch.tensor(1.0))
    assert auristream.encode(torch.zeros(8000), "stats")[-2:].tolist() == [-100, -100]


def test_level(load, sound):
    """Loud and soft clips come to one level and give one state; a hiss stays soft."""
    auristream, x = load(), sound(0.5)
    everywhere = torch.ones(1, len(x))
    assert auristream.level(x[None], everywhere).square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-5)
    assert torch.equal(auristream.encode(x, "mean"), auristream.encode(x / 4, "mean"))
    loud, soft = auristream.encode(x), auristream.encode(x / 4)
    assert (loud - soft)[-2:].tolist() == pytest.approx([20 * np.log10(4)] * 2, rel=1e-4)
    assert auristream.level(1e-4 * x[None], everywhere).abs().max() < 0.001
    peak = load(original=True).level(1e-4 * x[None], everywhere)
    assert peak.abs().max() == 1


def test_likelihood_of_the_next_code(load, sound, gpt):
    auristream, x = load(), sound(0.4)
    ids = auristream.wavcoch.encode(auristream.level(x[None], torch.ones(1, len(x)))[0]).long()
    states, norm = reference(gpt.state_dict(), ids.numpy())
    logits = norm(states[4], "ln_f") @ gpt.coch_head.weight.double().numpy().T
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert auristream.nll(x) == pytest.approx(-log[np.arange(len(ids) - 1), ids[1:]].mean(), rel=1e-4)


def test_parameter_counts():
    with torch.device("meta"):
        small, learned = Gpt(AuriStreamConfig()), Gpt(AuriStreamConfig(use_rope=False))
        large = Gpt(AuriStreamConfig(n_embd=1280, n_layer=48, n_head=20, n_inner=5120, use_rope=False))
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in (("small", small), ("learned", learned))}
    assert count == {"small": 97_536_768, "learned": 97_536_768 + 4096 * 768}
    assert sum(buffer.numel() for buffer in small.buffers()) == 384
    assert sum(p.numel() for p in small.parameters()) + 19 * 8192 * 768 == 217_074_816 - 384  # of 20 heads
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(970.06e6, rel=1e-4)


def test_names_inside_attention_and_mlp_may_differ(tmp_path, write, gpt, weights, load):
    state = {}
    for name, tensor in gpt.state_dict().items():
        if name.endswith("c_attn.weight"):
            q, k, v = tensor.split(32)
            state |= {
                f"model.{name.replace('c_attn', part)}": x for part, x in (("k_proj", k), ("q_proj", q), ("v_proj", v))
            }
        elif "inv_freq" not in name:
            name = (
                name.replace("attn.c_proj", "attn.o_proj")
                .replace("mlp.c_fc", "mlp.up")
                .replace("mlp.c_proj", "mlp.down")
            )
            state[f"model.{name}"] = tensor
    state["model.future_heads.0.weight"] = torch.ones(8192, 32)
    folder = write(tmp_path, state, {"n_head": 2, "n_layer": 4})
    other = encoders.load("auristream", folder, wavcoch=str(weights / "wavcoch"))
    ids = torch.arange(40)[None]
    assert torch.allclose(other.states(ids), load().states(ids), atol=1e-6)


def test_learned_positions(tmp_path, write, gpt, weights):
    state = {name: tensor for name, tensor in gpt.state_dict().items() if "inv_freq" not in name}
    folder = write(tmp_path, state | {"transformer.wpe.weight": torch.randn(48, 32)}, {"n_head": 2})
    auristream = encoders.load("auristream", folder, wavcoch=str(weights / "wavcoch"))
    assert (auristream.window, auristream.past) == (48, 6)
    assert auristream.states(torch.arange(100)[None]).shape == (1, 100, 32)


def test_refusals_are_one_line_and_complete(tmp_path, write, gpt, weights):
    state, qkv = gpt.state_dict(), "transformer.h.1.attn.c_attn.weight"
    down, heads = (
        "transformer.h.3.mlp.c_proj.weight",
        {f"transformer.h.{i}.attn.q_norm.weight": torch.ones(16) for i in range(4)},
    )
    cases = (
        ("missing", {name: tensor for name, tensor in state.items() if name != down}, f"missing: {down} (32, 64)"),
        ("transposed", state | {qkv: torch.ones(32, 96)}, f"missing: {qkv} (96, 32); unplaced: {qkv} (32, 96)"),
        ("shape", state | {"transformer.ln_f.weight": torch.ones(31)},
         "of another shape: transformer.ln_f.weight is (31,), not (32,)"),
        ("unknown", state | heads, f"unplaced: {', '.join(f'{name} (16,)' for name in heads)}"),
    )  # fmt: skip
    for name, tensors, message in cases:
        folder = write(tmp_path / name, tensors)
        with pytest.raises(UserError) as error:
            encoders.load("auristream", folder, wavcoch=str(weights / "wavcoch"))
        assert str(error.value) == f"{folder}: not an AuriStream as published; {message}"
    biases = {f"transformer.h.{i}.mlp.{part}.bias": torch.ones(1) for i in range(4) for part in ("a", "b", "c")}
    with pytest.raises(
        UserError, match=r"unplaced: transformer.h.\*.mlp.a.bias \(1,\), transformer.h.\*.mlp.b.bias \(1,\), "
    ):
        encoders.load("auristream", write(tmp_path / "many", state | biases), wavcoch=str(weights / "wavcoch"))
    with pytest.raises(
        UserError, match=r"wavcoch: not an AuriStream: no transformer.wte.weight in encoder.0.bias, enc"
    ):
        encoders.load("auristream", str(weights / "wavcoch"), wavcoch=str(weights / "wavcoch"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "9"}, r"^auristream: layers '9' is not ln_f, a block from 1 to 4, or a span such as 4-10$"),
        ({"layers": "mix"}, r"^auristream: layers 'mix' is not ln_f, a block"),
        ({"layers": "2", "original": "yes"}, r"^auristream: original reads the last block, not layers 2$"),
        ({"rope_sign": "0"}, r"^auristream: rope_sign 0 is not -1 or 1$"),
        ({"rope_sign": "left"}, r"^encoder auristream: rope_sign: 'left' is not an int$"),
        ({"layer": "2"}, r"^encoder auristream has no option layer \(options: wavcoch, layers, original, rope_sign\)$"),
    ],
)
def test_wrong_options(load, options, message):
    with pytest.raises(UserError, match=message):
        load(**options)


def test_info_rebuilds_the_encoder_under_hub_names(tmp_path, monkeypatch, write, gpt, chain, sound):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights/TuKoResearch/AuriStream100M_RoPE_librilight", gpt.state_dict())
    write(tmp_path / "weights/TuKoResearch/WavCochV8192", chain.state_dict())
    auristream = encoders.load(
        "auristream", str(tmp_path / "weights/TuKoResearch/AuriStream100M_RoPE_librilight"), layers="2-3"
    )
    info = auristream.info("stats")
    assert info["options"] == {
        "folder": "TuKoResearch/AuriStream100M_RoPE_librilight", "wavcoch": "TuKoResearch/WavCochV8192",
        "layers": "2-3", "original": False, "rope_sign": -1,
    }  # fmt: skip
    files = ("config.json", "model.safetensors")
    assert list(info["weights_sha256"]) == [*files, *(f"wavcoch/{file}" for file in files)]
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(sound(0.2)), auristream.encode(sound(0.2)))
    write(tmp_path / "weights/TuKoResearch/WavCochV8192", chain.state_dict() | {"fourier.bias": torch.ones(40)})
    changed = encoders.load(info["encoder"], **info["options"]).info("stats")["weights_sha256"]
    assert [name for name in changed if changed[name] != info["weights_sha256"][name]] == ["wavcoch/model.safetensors"]
