"""BERT and its word pieces against transformers on small random weights, alone and in batches."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from model import encoders
from model.encoders.bert import BertConfig, BertNet

WORDS = "so glad that you came to ##day no . ! ? , ' s h ##on ##est ##ly ca va cafe café Glad what 我 心 ##é na ##ive"
TEXTS = [
    "So glad that you came today!",
    "No.",
    "",
    "  HONESTLY,  what?\tÇa va\nna\u00efve café  CAFE\u0301 ",
    "我很开心 🙂 it's [SEP] [MASK] unaffable \x00 \u200b",
    "glad " * 300,
]


@pytest.fixture(scope="module")
def reference():
    from transformers import BertConfig, BertModel

    small = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**small, num_hidden_layers=4, max_position_embeddings=40)).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=1.3 * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def vocabulary():
    return {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS.split())])
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference, vocabulary):
    folder = tmp_path_factory.mktemp("weights") / "bert"
    reference.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return folder


@pytest.fixture(scope="module")
def load(folder):
    return lambda **options: encoders.load("bert", str(folder), **{"max_tokens": 40} | options)


def copy(folder, to, skip=()):
    return shutil.copytree(folder, to, ignore=lambda _, names: [name for name in names if name in skip])


def test_every_state_matches_transformers(load, reference):
    bert = load()
    layers = [load(layer=str(number)) for number in range(5)]
    for text in TEXTS:
        ids = bert.prepare(text)
        states = reference(ids[None], output_hidden_states=True).hidden_states
        assert 0.3 < states[-1].std() < 3
        for encoder, state in zip(layers, states, strict=True):
            assert (encoder.encode(text, "tokens") - state[0]).abs().max() <= 1e-4
        assert (bert.encode(text, "cls") - states[-1][0, 0]).abs().max() <= 1e-4
        assert (bert.encode(text, "mean") - states[-1][0].mean(0)).abs().max() <= 1e-4
        assert (load(layer="last4").encode(text, "tokens") - sum(states[1:])[0]).abs().max() <= 1e-4
        assert (load(layer="0-2").encode(text, "tokens") - sum(states[:3])[0] / 3).abs().max() <= 1e-4


def test_same_alone_and_in_a_batch(load, reference):
    bert, rough = load(), load(dtype="bf16")
    ids = [bert.prepare(text) for text in TEXTS]
    batch = pad_sequence(ids, batch_first=True, padding_value=999)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(each) for each in ids])[:, None]
    rows = bert(batch, mask)
    assert bert.lengths(mask.sum(1)).tolist() == [len(each) for each in ids]
    for each, row in zip(ids, rows, strict=True):
        assert (row[: len(each)] - bert(each[None])[0]).abs().max() <= 1e-5
        assert not row[len(each) :].any()
    expected = reference(batch * mask, attention_mask=mask.long()).last_hidden_state
    assert (rows - expected)[mask].abs().max() <= 1e-4
    found = rough(batch, mask)
    assert found.dtype == torch.float32
    assert 0 < (found - rows).norm() / rows.norm() < 0.02


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_ids_are_transformers_own(folder, tmp_path, vocabulary, given):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=vocabulary, **given)
    plain = copy(folder, tmp_path / "plain")
    (plain / "tokenizer_config.json").write_text(json.dumps(given))
    fast = copy(folder, tmp_path / "fast", skip=["vocab.txt"])
    tokenizer.save_pretrained(fast)
    assert (fast / "tokenizer.json").is_file()
    for found in (plain, fast):
        bert = encoders.load("bert", str(found), max_tokens=16)
        for text in TEXTS:
            expected = tokenizer(text, truncation=True, max_length=16)["input_ids"]
            assert bert.prepare(text).tolist() == expected
    assert (len(expected), expected[0], expected[-1]) == (16, 2, 3)


def test_models_with_heads_and_older_names(folder, tmp_path, load, reference):
    """bert-base-uncased as it was first published: a norm's gamma and beta, positions, the heads of its training."""
    from transformers import BertForPreTraining

    model = BertForPreTraining(reference.config)
    model.bert.load_state_dict(reference.state_dict())
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    old = copy(folder, tmp_path / "old", skip=["model.safetensors"])
    torch.save(state, old / "pytorch_model.bin")
    bert = encoders.load("bert", str(old), max_tokens=40)
    assert torch.equal(bert.encode(TEXTS[0], "tokens"), load().encode(TEXTS[0], "tokens"))
    assert bert.coverage == f"69/69 tensors, {len(state) - 69} not used"
    assert load().coverage == "69/69 tensors, 2 not used"  # the pooler's


def test_true_sizes():
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        nets = [BertNet(BertConfig()), BertNet(BertConfig(**large))]
    # the pooler, which is not read, makes 109,482,240 and 335,141,888 of them
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [108_891_648, 334_092_288]


def test_info_rebuilds_the_encoder(load):
    bert = load(layer="2", max_tokens=12)
    info = json.loads(json.dumps(bert.info("cls")))
    assert (info["dim"], info["max_tokens"], info["preprocess"]) == (
        48, 12, "bert: WordPiece, [CLS] and [SEP], 12 tokens at most",
    )  # fmt: skip
    assert list(info["weights_sha256"]) == ["config.json", "model.safetensors", "vocab.txt"]
    again = encoders.load(info["encoder"], **info["options"])
    assert torch.equal(again.encode(TEXTS[-1], "cls"), bert.encode(TEXTS[-1], "cls"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model.safetensors",
            {"embeddings.LayerNorm.bias": None},
            r"bert: 68/69 tensors match .* 1 missing: norm.bias$",
        ),
        (
            "model.safetensors",
            {"encoder.layer.9.x": torch.ones(1)},
            r"69/69 tensors .* 1 unexpected: encoder.layer.9.x$",
        ),
        ("config.json", {"model_type": "roberta"}, r"model_type 'roberta' is not supported \(only 'bert'\)$"),
        (
            "config.json",
            {"position_embedding_type": "relative_key"},
            r"position_embedding_type 'relative_key' is not sup",
        ),
        (
            "config.json",
            {"vocab_size": 20},
            r"1 tensors of the wrong shape: word.weight is \(50, 48\), not \(20, 48\)$",
        ),
        ("vocab.txt", None, r"bert: no tokenizer.json and no vocab.txt$"),
        (
            "vocab.txt",
            "\n".join(["[UNK]", "[CLS]", "[SEP]", *map(str, range(60))]),
            r"bert: the tokenizer has 6\d pieces, the model 50$",
        ),
        ("tokenizer.json", "{}", r"tokenizer.json: not a tokenizer \("),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, file, change, message):
    other = copy(folder, tmp_path / "bert")
    path = other / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        save_file({name: x for name, x in (load_file(path) | change).items() if x is not None}, path)
    with pytest.raises(UserError, match=message) as error:
        encoders.load("bert", str(other), max_tokens=40)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "41"}, r"^bert: max_tokens 41 is not from 3 to the model's 40$"),
        ({"max_tokens": "2"}, r"^bert: max_tokens 2 is not from 3"),
        ({"layer": "last5"}, r"^bert: layer 'last5' is not one of last, last4"),
        ({"dtype": "half"}, r"^bert: dtype 'half' is not one of fp32, bf16$"),
    ],
)
def test_wrong_options(load, options, message):
    with pytest.raises(UserError, match=message):
        load(**options)
