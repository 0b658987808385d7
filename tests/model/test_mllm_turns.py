"""Slots of video, sound and history in the multimodal model, against transformers' Qwen2 on embeddings by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import checkpoint
from common.config import UserError
from model import mllm
from model.llm import Llama, LlamaConfig
from model.mamba import Compressor, Mamba, MambaConfig
from model.mllm import IGNORE_INDEX, Mllm, MllmConfig, pack
from model.towers import TowerConfig
from tests.qwen import make_qwen

MARK = 48  # <MEM>
TOWERS = TowerConfig(
    vision_tower="framestats", mm_projector_type="stc_connector_v35", num_frames=4, patches=25, vision_width=6,
    audio_tower="logmel", mm_projector_a_type="linear", audio_tokens=3, audio_width=5, mamba_compressor="mamba",
)  # fmt: skip
CFG = MllmConfig(features={}, visual=None, lora_r=2, towers=TOWERS, grad_checkpoint=False)
SHAPE = LlamaConfig(50, 16, 24, 2, 4, 2, 4, attention_bias=True)
MAMBA = MambaConfig(49, 8, 2, 16, 4, 2)
PLACES = {"video": 2 * 2 * 2, "audio": 3}


def history(turns, seed):
    """Ids of so many utterances, each with its mark."""
    noise = torch.Generator().manual_seed(seed)
    said = [
        torch.randint(0, MARK, (int(n) + 1,), generator=noise) for n in torch.randint(1, 5, (turns,), generator=noise)
    ]
    return torch.cat([part for text in said for part in (text, torch.tensor([MARK]))])


def sample(id, pieces, answer, turns=0):
    noise = torch.Generator().manual_seed(len(id))
    values = {"video": torch.randn(4, 25, 6, generator=noise), "audio": torch.randn(3, 5, generator=noise)}
    values |= {"history": history(turns, len(id))} if turns else {}
    used = {name: value for name, value in values.items() if name in pieces}
    return SimpleNamespace(id=id, pieces=pieces, answer=answer, values=used)


SAMPLES = [
    sample("all", [[1, 2], "video", "audio", [3], "history", [4, 5]], [6, 7, 2], turns=3),
    sample("none", [[1, 2], [3, 8, 9]], [7, 2]),
    sample("long history", [[1, 2], "history", [4]], [9, 10, 11, 2], turns=20),
    sample("voice", [[1, 2, 3], "audio", "history", [5]], [12, 2], turns=1),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = Mllm(CFG, Llama(SHAPE), Compressor(Mamba(MAMBA), 16, MARK))
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return built


def test_places_and_values_of_the_slots():
    batch = pack(SAMPLES, CFG)
    assert batch.lengths == [2 + 8 + 3 + 1 + 3 + 2 + 3, 7, 2 + 20 + 1 + 4, 3 + 3 + 1 + 1 + 2]
    assert batch.slots["video"][0].tolist() == list(range(2, 10))
    assert batch.slots["video"][1].shape == (1, 4, 25, 6)
    third, fourth = sum(batch.lengths[:2]), sum(batch.lengths[:3])
    assert batch.slots["audio"][0].tolist() == [10, 11, 12, *range(fourth + 3, fourth + 6)]
    assert batch.slots["history"][0].tolist() == [14, 15, 16, *range(third + 2, third + 22), fourth + 6]
    assert [len(ids) for ids in batch.slots["history"][1]] == [
        len(s.values["history"]) for s in SAMPLES if "history" in s.values
    ]
    assert batch.to(torch.device("cpu")).slots["history"][1] is batch.slots["history"][1]


def by_hand(model, chosen):
    """Each sample's embeddings (T, D), connectors and compressor asked one value at a time, and its labels."""
    embeddings, labels = [], []
    for each in chosen:
        rows = []
        for piece in each.pieces:
            if isinstance(piece, list):
                rows.append(model.llm.embed(torch.tensor(piece)))
            elif piece == "history":
                rows += model.projections["history"]([each.values["history"].tolist()])
            else:
                rows.append(model.projections[piece](each.values[piece][None])[0])
        prompt = sum(map(len, rows))
        rows.append(model.llm.embed(torch.tensor(each.answer)))
        embeddings.append(torch.cat(rows))
        labels.append(torch.tensor([IGNORE_INDEX] * prompt + each.answer))
    return embeddings, labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_loss_is_that_of_padded_batches_of_transformers(model, tmp_path, side):
    transformers = pytest.importorskip("transformers")
    from model.lora import merge_lora

    model.eval()
    with torch.no_grad():
        packed = model(pack(SAMPLES, CFG)).item()
        apart = [model(pack([each], CFG)).item() for each in SAMPLES]
        embeddings, labels = by_hand(model, SAMPLES)
    assert sum(apart) == pytest.approx(packed, abs=1e-5 * abs(packed))
    merge_lora(model.llm)
    model.llm.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    qwen = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    longest = max(map(len, embeddings))

    def padded(rows, value):
        room = [longest - len(row) for row in rows]
        sides = [(n, 0) if side == "left" else (0, n) for n in room]
        widths = [(0, 0, *pad) if rows[0].ndim == 2 else pad for pad in sides]
        return torch.stack([F.pad(row, width, value=value) for row, width in zip(rows, widths, strict=True)])

    mask = padded([torch.ones(len(row)) for row in labels], 0).long()
    with torch.no_grad():
        logits = qwen(
            inputs_embeds=padded(embeddings, 0.0), attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        ).logits  # fmt: skip
    targets = padded(labels, IGNORE_INDEX)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert packed == pytest.approx(loss.item(), rel=1e-5)


def test_all_that_connects_learns_and_what_has_no_value_gets_a_gradient_of_zero(model):
    model(pack(SAMPLES, CFG)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projections.parameters())
    model.zero_grad(set_to_none=True)
    model(pack([SAMPLES[1]], CFG)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projections.parameters())


def published(folder):
    """A tiny Qwen2 whose vocabulary has room for a mark, and a tiny Mamba, as they are published."""
    make_qwen(folder / "qwen")
    shape = MambaConfig(40, 8, 2, 16, 4, 2)
    torch.manual_seed(3)
    mamba = Mamba(shape)
    from safetensors.torch import save_file

    (folder / "mamba").mkdir()
    save_file(
        {f"backbone.{name}": t.contiguous() for name, t in mamba.state_dict().items()},
        folder / "mamba" / "model.safetensors",
    )
    (folder / "mamba" / "config.json").write_text(json.dumps(shape.to_json()))
    return MllmConfig(
        llm=str(folder / "qwen"), features={}, visual=None, lora_r=2, grad_checkpoint=False,
        towers=replace(TOWERS, mamba_compressor=str(folder / "mamba")),
    )  # fmt: skip


def saved(built, tokenizer, cfg, root):
    from common.config import to_dict
    from common.weights import identity
    from model.mamba import compressor_identity

    frozen = cfg.towers.frozen_compressor
    state = {
        "config": {"model": to_dict(cfg)}, "base": identity(cfg.llm), "step": 1,
        "compressor": compressor_identity(frozen) if frozen else None,
    }  # fmt: skip
    folder = checkpoint.save(
        root / "checkpoints", "epoch_001", built, {}, state, mllm.checkpoint_files(built, tokenizer)
    )
    return folder, checkpoint.read_state(folder)


def test_a_checkpoint_holds_the_compressor_and_a_later_run_starts_from_it(tmp_path):
    cfg, cpu = published(tmp_path), torch.device("cpu")
    built, tokenizer = mllm.build(cfg, torch.float32, cpu)
    mark = tokenizer.specials["<MEM>"]
    assert built.projections["history"].mem_id == mark == tokenizer.vocab_size - 1
    assert built.projections["history"].mamba.config.vocab_size == tokenizer.vocab_size
    assert "rows are new" in built.projections["history"].coverage
    for parameter in built.projections.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder, state = saved(built, tokenizer, cfg, tmp_path / "run")
    (tmp_path / "mamba").rename(tmp_path / "gone")  # its weights are all in the checkpoint
    again, same, covered = mllm.load(folder, state, cpu, torch.float32)
    assert same.specials["<MEM>"] == mark
    assert "projection tensors" in covered
    for (name, one), two in zip(
        built.projections.state_dict().items(), again.projections.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name

    later = replace(
        cfg, towers=replace(cfg.towers, mamba_compressor=str(tmp_path / "run"), freeze_mamba_compressor=True)
    )
    third, tokenizer = mllm.build(later, torch.float32, cpu)
    compressor = third.projections["history"]
    assert all(
        torch.equal(p, q)
        for p, q in zip(compressor.parameters(), built.projections["history"].parameters(), strict=True)
    )
    training = {name for name, p in compressor.named_parameters() if p.requires_grad}
    assert training == {"memory_projection.weight", "memory_projection.bias"}
    folder, state = saved(third, tokenizer, later, tmp_path / "later")
    fourth, _, _ = mllm.load(folder, state, cpu, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(fourth.parameters(), third.parameters(), strict=True))
    state["compressor"]["files"] = {}
    with pytest.raises(UserError) as error:
        mllm.load(folder, state, cpu, torch.float32)
    assert str(error.value) == f"{folder}: was trained with another compressor than {tmp_path / 'run'} found here"


def test_a_new_mamba_cannot_stay_as_it_is(tmp_path):
    cfg = published(tmp_path)
    cfg.towers.freeze_mamba_compressor = True
    with pytest.raises(UserError) as error:
        mllm.build(cfg, torch.float32, torch.device("cpu"))
    assert str(error.value) == (
        f"--freeze-mamba-compressor: {tmp_path / 'mamba'} is no trained compressor: its rows for the language model's "
        "tokens are new"
    )


@pytest.mark.parametrize(("frames", "block"), [(16, 2848), (8, 2172)])
def test_the_published_size(frames, block):
    """specs: VideoLLaMA2.1-7B-AV's Qwen2 with STC, one linear of sound and mamba-370m, nothing of it in memory."""
    towers = TowerConfig(vision_tower="siglip", audio_tower="beats", num_frames=frames, mamba_compressor="mamba")
    cfg = MllmConfig(features={}, visual=None, full=True, towers=towers)
    qwen = LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, rms_norm_eps=1e-6, rope_theta=1e6, attention_bias=True)
    with torch.device("meta"):
        mamba = Mamba(MambaConfig(151647, 1024, 48, 2048, 16, 64))
        built = Mllm(cfg, Llama(qwen), Compressor(mamba, 3584, 151646))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in built.projections.items()}
    assert sum(p.numel() for p in built.llm.parameters()) == 7_615_616_512
    assert round(counts["video"] / 1e6, 1) == 376.9
    assert counts["audio"] == 768 * 3584 + 3584
    assert counts["history"] == sum(p.numel() for p in mamba.parameters()) + 1024 * 3584 + 3584
    assert math.isclose(counts["history"] - 151647 * 1024 + 50280 * 1024 - 1024 * 3584 - 3584, 371.5e6, rel_tol=1e-3)
    assert cfg.places("video") + cfg.places("audio") == block
    assert cfg.places("history", torch.tensor([5, 9, 6, 7, 9])) == 2


def test_standardised_connectors_of_video_and_sound():
    cfg = replace(CFG, normalize=True, towers=replace(TOWERS, mamba_compressor=None))
    torch.manual_seed(0)
    built = Mllm(cfg, Llama(SHAPE))
    mean, std = torch.arange(5.0), torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5])
    built.set_statistics({"audio": (mean, std), "video": (torch.zeros(6), torch.ones(6))})
    value = SAMPLES[0].values["audio"]
    part = built.projections["audio"]
    rows = (value.double() - mean) / std / 5**0.5
    expected = rows @ part.connector.weight.double().T + part.connector.bias.double()
    torch.testing.assert_close(part(value[None])[0].double(), expected, atol=1e-6, rtol=1e-5)
    assert built.projections["video"](SAMPLES[0].values["video"][None]).shape == (1, 8, 16)
    assert {"projections.audio.mean", "projections.video.std"} <= checkpoint.trainable_state(built).keys()


@torch.no_grad()
def test_tokens_are_tallied_as_one_sample_after_the_other_has_them(model):
    model.eval()
    likeliest = []
    for each in SAMPLES:
        (embeddings,), (labels,) = by_hand(model, [each])
        logits = model.llm(inputs_embeds=embeddings[None])[0]
        likeliest.append(int(logits[int((labels == IGNORE_INDEX).sum()) - 1].argmax()))
    # two of the answers begin as the model would have it
    chosen = [
        SimpleNamespace(**vars(each) | {"answer": [token, *each.answer[1:]] if i < 2 else each.answer})
        for i, (each, token) in enumerate(zip(SAMPLES, likeliest, strict=True))
    ]
    hits, loss = 0, 0.0
    for embeddings, labels in zip(*by_hand(model, chosen), strict=True):
        logits = model.llm(inputs_embeds=embeddings[None])[0, :-1]
        hits += int((logits.argmax(1) == labels[1:]).sum())
        loss += F.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum").item()
    batch = pack(chosen, CFG)
    found = model.tally(batch)
    assert 2 <= hits < batch.targets
    assert int(found[1]) == hits
    assert float(found[0]) == pytest.approx(loss, rel=1e-5)
    assert float(found[0]) == pytest.approx(float(model(batch)), rel=1e-6)
