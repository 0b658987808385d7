"""Packing, projections and loss of the multimodal model, against formulas and Emotion-LLaMA's published prompt."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common import checkpoint, config
from common.config import UserError
from data.clips import DataConfig, make_sample
from data.manifest import Clip
from data.prompts import QUESTIONS
from model import mllm
from model.llm import Llama, LlamaConfig
from model.lora import add_lora
from model.mllm import IGNORE_INDEX, HeadLoss, Mllm, MllmConfig, Projection, pack
from model.tokenizer import Tokenizer
from tests.qwen import make_qwen

# 16 patches of width 3, four of them a token
SMALL = MllmConfig(features={"face": 6, "voice": 5}, visual="eva", visual_width=3, image_size=56, lora_r=2)
SHAPE = LlamaConfig(50, 16, 24, 2, 4, 2, 4)
VALUES = {"image": (16, 3), "cls": (1, 3), "face": (1, 6), "voice": (1, 5)}


def sample(id, pieces, answer, seed=0):
    """A sample whose slots hold noise."""
    noise = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(*VALUES[name], generator=noise) for name in pieces if isinstance(name, str)}
    return SimpleNamespace(id=id, pieces=pieces, answer=answer, values=values)


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = Mllm(SMALL, Llama(SHAPE))
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return built


FULL = sample("full", [[1], [5, 6], "image", [7], "face", "voice", "cls", [8, 9]], [10, 11, 2], seed=1)
POOR = sample("poor", [[1], [5, 6, 7], "voice", [8]], [12, 2], seed=2)


def test_pack_lays_samples_out_back_to_back():
    batch = pack([FULL, POOR], SMALL)
    assert batch.ids == ["full", "poor"]
    assert batch.lengths == [16, 8]
    #                                  image               face voice cls    answer
    first = [1, 5, 6, *[0] * 4, 7, *[0] * 3, 8, 9, 10, 11, 2]
    assert batch.input_ids.tolist() == [*first, 1, 5, 6, 7, 0, 8, 12, 2]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [*[ignored] * 13, 10, 11, 2, *[ignored] * 6, 12, 2]
    assert batch.positions.tolist() == [*range(16), *range(8)]
    assert batch.targets == 5
    places = {name: at.tolist() for name, (at, _) in batch.slots.items()}
    assert places == {"image": [3, 4, 5, 6], "face": [8], "voice": [9, 20], "cls": [10]}
    assert torch.equal(batch.slots["voice"][1], torch.stack([FULL.values["voice"], POOR.values["voice"]]))
    assert batch.slots["image"][1].shape == (1, 16, 3)


def test_prompts_alone():
    batch = pack([FULL, POOR], SMALL, answers=False)
    assert batch.lengths == [13, 6]
    assert batch.targets == 0
    assert batch.slots["voice"][0].tolist() == [9, 17]


def test_answers_are_cut_and_prompts_are_not():
    assert pack([FULL], replace(SMALL, max_txt_len=2)).labels[-2:].tolist() == [10, 11]
    assert pack([FULL], replace(SMALL, max_len=14)).lengths == [14]
    assert pack([FULL], replace(SMALL, max_len=13)).targets == 0
    with pytest.raises(UserError) as error:
        pack([POOR, FULL], replace(SMALL, max_len=12))
    assert str(error.value) == "clip full: its prompt has 13 tokens, --max-len is 12"


@pytest.mark.parametrize("normalize", [False, True])
def test_projection_is_a_linear_of_four_patches(normalize):
    torch.manual_seed(0)
    layer, value = Projection(3, 16, merge=4, normalize=normalize), torch.randn(2, 16, 3) * 5 + 1
    mean, scale = torch.zeros(3), torch.ones(3)
    if normalize:
        mean, std = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([5.0, 4.0, 0.5])
        layer.mean.copy_(mean)
        layer.std.copy_(std)
        scale = std.double() * 3**0.5  # a standardised row of width 3 has length 3 ** 0.5
    weight, bias = layer.weight.double(), layer.bias.double()
    rows = []
    for picture in (value.double() - mean) / scale:
        for first in range(0, 16, 4):
            strip = torch.cat([picture[first + i] for i in range(4)])  # (4 * 3,)
            rows.append(weight @ strip + bias)
    torch.testing.assert_close(layer(value).double(), torch.stack(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(value.bfloat16()), layer(value.bfloat16().float()))  # fp32 inside


def test_a_feature_may_become_several_tokens():
    cfg = replace(SMALL, feature_tokens=2)
    torch.manual_seed(0)
    model = Mllm(cfg, Llama(SHAPE))
    batch = pack([POOR, FULL], cfg, answers=False)
    places = {name: at.tolist() for name, (at, _) in batch.slots.items()}
    assert places == {"voice": [4, 5, 17, 18], "image": [10, 11, 12, 13], "face": [15, 16], "cls": [19]}
    assert batch.lengths == [7, 15]
    linear, embedded = model.projections["voice"], model.embed(batch)[0]
    for at, each in ((4, POOR), (17, FULL)):
        both = linear.weight @ each.values["voice"][0] + linear.bias  # (2 * 16,): one token after the other
        torch.testing.assert_close(embedded[at : at + 2].flatten(), both)


def test_slots_take_the_places_of_their_projections(model):
    batch = pack([FULL, POOR], SMALL)
    embedded = model.embed(batch)[0]
    expected = model.llm.model.embed_tokens.weight[batch.input_ids].clone()
    for start, each in ((0, FULL), (16, POOR)):
        at = start
        for piece in each.pieces:
            if isinstance(piece, str):
                linear = model.projections[piece]
                rows = each.values[piece].reshape(-1, linear.in_features) @ linear.weight.T + linear.bias
                expected[at : at + len(rows)] = rows
                at += len(rows)
            else:
                at += len(piece)
    torch.testing.assert_close(embedded, expected)
    prompts = model.prompts(pack([FULL, POOR], SMALL, answers=False))
    torch.testing.assert_close(torch.cat(prompts), torch.cat([expected[:13], expected[16:22]]))


def test_the_loss_sums_over_the_answers_of_each_sample(model, monkeypatch):
    model.eval()
    batch = pack([FULL, POOR], SMALL)
    x, total = model.embed(batch)[0], torch.zeros((), dtype=torch.float64)
    for start, n, answer in ((0, 16, FULL.answer), (16, 8, POOR.answer)):
        logits = model.llm(inputs_embeds=x[start : start + n][None])[0].double()
        for i, token in enumerate(answer):
            total += logits[n - len(answer) + i - 1].logsumexp(0) - logits[n - len(answer) + i - 1, token]
    torch.testing.assert_close(model(batch).double(), total, atol=1e-4, rtol=1e-6)
    monkeypatch.setattr(mllm, "CHUNK", 2)  # 5 labels in three pieces
    torch.testing.assert_close(model(batch).double(), total, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("kind", ["frozen", "trained", "adapted"])
def test_gradients_of_the_heads_loss_are_cross_entropys(kind, monkeypatch):
    monkeypatch.setattr(mllm, "CHUNK", 3)
    torch.manual_seed(0)
    llm = Llama(SHAPE).requires_grad_(kind == "trained")
    if kind == "adapted":
        add_lora(llm, ["lm_head"], r=2, alpha=4)
        torch.nn.init.normal_(llm.lm_head.lora_B.weight)
    weights = [p for p in llm.lm_head.parameters() if p.requires_grad]
    hidden = torch.randn(8, 16, requires_grad=True)
    hidden.data[4] *= 3000  # the label's probability is no float
    labels = torch.randint(0, SHAPE.vocab_size, (8,))
    loss = HeadLoss.apply(llm.head, hidden, labels, *weights)
    wanted = F.cross_entropy(llm.head(hidden), labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    assert loss > 100
    with torch.no_grad():
        torch.testing.assert_close(HeadLoss.apply(llm.head, hidden, labels), wanted)
    found = torch.autograd.grad(loss / 7, (hidden, *weights))
    for gradient, right in zip(found, torch.autograd.grad(wanted / 7, (hidden, *weights)), strict=True):
        torch.testing.assert_close(gradient, right)


def test_a_sample_is_blind_to_its_neighbours(model):
    model.eval()
    together = model(pack([FULL, POOR], SMALL))
    torch.testing.assert_close(together, model(pack([FULL], SMALL)) + model(pack([POOR], SMALL)))


def test_a_beginning_that_samples_share_is_computed_once(model, monkeypatch):
    """The same loss and gradients as alone; what lies behind the beginning is of different lengths."""
    start = [[1], [5, 6, 7, 9, 11, 13, 15, 17, 19, 21, 23]]
    samples = [
        sample("a", [*start, "voice"], [10, 11, 2], seed=3),
        sample("b", [*start, "voice"], [12, 2], seed=4),
        sample("c", [*start, "face", "voice", [8]], [12, 2], seed=5),
        sample("d", [*start], [14, 2], seed=6),
    ]
    assert pack(samples[:3], SMALL).shared == 12
    assert pack(samples, SMALL).shared == 11  # an answer starts on a token of its own sample
    assert pack([FULL, POOR], SMALL).shared == 3
    model.llm.eval()
    seen, hidden = [], model.llm.hidden
    monkeypatch.setattr(model.llm, "hidden", lambda x, *rest: seen.append(x.shape[1]) or hidden(x, *rest))
    found = {}
    for how, parts in (("once", [samples]), ("alone", [[each] for each in samples])):
        model.zero_grad()
        loss = sum(model(pack(part, SMALL)) for part in parts)
        loss.backward()
        found[how] = loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert seen == [11 + 5 + 4 + 6 + 3, 16, 15, 17, 14]
    torch.testing.assert_close(found["once"], found["alone"], rtol=1e-4, atol=1e-5)


def test_idle_projections_have_a_gradient_of_zero(model):
    model(pack([POOR], SMALL)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"image", "cls", "face", "voice", "lora_A", "lora_B"}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (".lora_" in name or "voice" in name), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_whole_language_model_trains_on_request():
    full = Mllm(replace(SMALL, full=True), Llama(SHAPE))
    assert all(parameter.requires_grad for parameter in full.parameters())
    assert not any("lora" in name for name, _ in full.named_parameters())


def test_statistics_of_a_constant_feature_divide_by_no_zero():
    model = Mllm(replace(SMALL, normalize=True), Llama(SHAPE))
    model.set_statistics({"face": (torch.arange(6.0), torch.tensor([2.0] * 5 + [0.0]))})
    value = torch.arange(6.0)[None, None].repeat(1, 1, 1)
    assert torch.isfinite(model.projections["face"](value + 1)).all()
    torch.testing.assert_close(model.projections["face"](value)[0], model.projections["face"].bias)
    assert {"projections.face.mean", "projections.face.std"} < set(checkpoint.trainable_state(model))


@pytest.mark.parametrize(("size", "merge"), [(50, 4), (56, 3)])
def test_a_picture_that_does_not_divide(size, merge):
    with pytest.raises(UserError) as error:
        Mllm(replace(SMALL, image_size=size, merge=merge), Llama(SHAPE))
    assert str(error.value) == f"--image-size {size}: needs a multiple of 14 whose patches divide by {merge}"


# ---- a checkpoint gives the model back


@pytest.mark.parametrize("full", [False, True])
def test_a_checkpoint_gives_the_model_back(merr, tmp_path, full):
    from common.weights import identity

    base = tmp_path / "base"
    base.mkdir()
    for file in (merr.root / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    cfg = replace(SMALL, llm=str(base), full=full, normalize=True)
    device = torch.device("cpu")
    model, tokenizer = mllm.build(cfg, torch.float32, device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().set_statistics({"voice": (torch.ones(5), torch.full((5,), 2.0))})
    known = {"step": 1, "config": {"model": config.to_dict(cfg)}, "base": None if full else identity(base)}
    files = mllm.checkpoint_files(model, tokenizer)
    folder = checkpoint.save(tmp_path / "run", "epoch_001", model, {}, known, files)
    batch = pack([FULL, POOR], cfg)
    expected = model(batch)

    again, words, coverage = mllm.load(folder, known, device, torch.float32)
    assert "16/16 projection tensors" in coverage
    assert not again.training
    assert torch.equal(again(batch), expected)
    assert words.encode("we leave") == tokenizer.encode("we leave")

    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    if full:  # the whole model is in the checkpoint
        assert torch.equal(mllm.load(folder, known, device, torch.float32)[0](batch), expected)
    else:
        with pytest.raises(UserError) as error:
            mllm.load(folder, known, device, torch.float32)
        assert str(error.value) == f"{folder}: was trained on other weights of {base} than those found here"


@pytest.mark.parametrize(
    ("asked", "told", "kind"),
    [
        ("qwen2", "videollama2_qwen2", "qwen2"),
        ("videollama2_qwen2", "videollama2_qwen2", "qwen2"),
        ("videollama2_qwen2", "qwen2", "qwen2"),  # as MultiMood's own command does
        ("auto", "videollama2_qwen2", "qwen2"),
        ("llama", "qwen2", "qwen2"),
        ("llama", "videollama2_qwen2", "qwen2"),
        ("videollama2_qwen2", "llama", "llama"),
        ("llama", "llama", "llama"),
    ],
)
def test_the_type_of_the_language_model(tmp_path, asked, told, kind):
    make_qwen(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": told}))
    if kind == "llama":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.bias")}
        save_file(tensors, tmp_path / "model.safetensors")
    cfg = replace(SMALL, llm=str(tmp_path), model_type=asked)
    if asked == "auto" or asked.endswith(kind):
        model, _ = mllm.build(cfg, torch.float32, torch.device("cpu"))
        assert model.llm.config.attention_bias == (kind == "qwen2")
    else:
        with pytest.raises(UserError) as error:
            mllm.build(cfg, torch.float32, torch.device("cpu"))
        assert str(error.value) == f"--model-type {asked}: {config} is of a {kind} (auto takes what there is)"


def test_a_checkpoint_of_another_type_is_refused(tmp_path):
    (tmp_path / "llm_config.json").write_text(json.dumps(LlamaConfig(8, 4, 4, 1, 1, 1, 4).to_json()))
    cfg = replace(SMALL, llm="not/there", full=True, model_type="qwen2")
    with pytest.raises(UserError, match=r"^--model-type qwen2: .*llm_config\.json is of a llama"):
        mllm.build(cfg, torch.float32, torch.device("cpu"), tmp_path)


def test_a_tokenizer_of_another_model(tmp_path):
    make_qwen(tmp_path, spare=-1)
    with pytest.raises(UserError) as error:
        mllm.build(replace(SMALL, llm=str(tmp_path)), torch.float32, torch.device("cpu"))
    assert str(error.value) == f"{tmp_path}/vocab.json: 403 tokens, the language model has 402"


# ---- the published prompt, token for token


@pytest.fixture(scope="module")
def llama_vocabulary():
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    return Path(os.environ["EMOTORCH_DATA"], "llama", "tokenizer.model")


SENTENCE, QUESTION = "Oh my god, you scared me", QUESTIONS["reason"][2]
# the dataset's instruction and the conversation template of the released code, with their placeholders
INSTRUCTION = (
    "<video><VideoHere></video> <feature><FeatureHere></feature> "
    f"The person in video says: {SENTENCE}. "
    f" [reason] {QUESTION} "
)
TEMPLATE = f"[INST] {INSTRUCTION} [/INST]"
ANSWER = "raised brows and an open mouth, so the emotion is surprise"
UTTERANCES = ("mae_340_UTT", "maeV_399_UTT", "HL-UTT")
WIDE = {"image": (1024, 1408), "cls": (1, 1408)} | dict.fromkeys(UTTERANCES, (1, 1024))


def packed(path, layout, answers):
    values = {name: torch.zeros(shape) for name, shape in WIDE.items()}
    tokenizer, cfg = Tokenizer(path), MllmConfig()
    made = make_sample(
        Clip("sample_00000003", text=SENTENCE), values, DataConfig(prompt_layout=layout), tokenizer.encode,
        "reason", QUESTION, list(cfg.rows()), ANSWER,
    )  # fmt: skip
    return pack([made], cfg, answers)


def places(batch):
    return {name: at.tolist() for name, (at, _) in batch.slots.items()}


def test_the_training_sequence_of_emotion_llama(llama_vocabulary):
    from sentencepiece import SentencePieceProcessor

    encode = SentencePieceProcessor(model_file=str(llama_vocabulary)).encode
    before, rest = TEMPLATE.split("<VideoHere>")
    between, after = rest.split("<FeatureHere>")
    prompt = [1, *encode(before), *[0] * 256, *encode(between), *[0] * 4, *encode(after)]
    answer = [*encode(ANSWER), 2]
    batch = packed(llama_vocabulary, "train", answers=True)
    assert batch.input_ids.tolist() == prompt + answer
    assert batch.labels.tolist() == [-100] * len(prompt) + answer
    assert batch.positions.tolist() == list(range(len(prompt) + len(answer)))
    image = 1 + len(encode(before))
    features = image + 256 + len(encode(between))
    assert places(batch) == {
        "image": list(range(image, image + 256)), "mae_340_UTT": [features], "maeV_399_UTT": [features + 1],
        "HL-UTT": [features + 2], "cls": [features + 3],
    }  # fmt: skip
    assert encode(before)[0] == 518  # "▁["
    assert prompt[-4:] == [518, 29914, 25580, 29962]  # "▁[/INST]"


def test_the_evaluation_sequence_of_emotion_llama(llama_vocabulary):
    from sentencepiece import SentencePieceProcessor

    encode = SentencePieceProcessor(model_file=str(llama_vocabulary)).encode
    before, after = TEMPLATE.split("<VideoHere>")  # and <FeatureHere> stays, as text
    prompt = [1, 1, *encode(before), *[0] * 260, *encode(after)]
    batch = packed(llama_vocabulary, "original_eval", answers=False)
    assert batch.input_ids.tolist() == prompt
    assert batch.targets == 0
    image = 2 + len(encode(before))
    expected = {"image": list(range(image, image + 256))}
    expected |= {name: [image + 256 + i] for i, name in enumerate((*UTTERANCES, "cls"))}
    assert places(batch) == expected


def test_how_many_layers_are_recomputed():
    layers = SHAPE.num_hidden_layers
    assert [MllmConfig(checkpointed_layers=n).recomputed(layers) for n in (0, 1)] == [layers, 1]
    assert MllmConfig(checkpointed_layers=1, grad_checkpoint=False).recomputed(layers) == 0
    for n in (-1, layers + 1):
        with pytest.raises(UserError, match=f"^--checkpointed-layers: {n} of a language model of {layers} layers$"):
            MllmConfig(checkpointed_layers=n).recomputed(layers)
