"""EmbeddingGemma against transformers on small random weights; its tokenizer and head against their own formulas."""

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from common.config import UserError
from model import encoders
from model.encoders.embeddinggemma import PROMPTS, Gemma, GemmaConfig

TEXTS = [
    "I am so glad that you came today, really glad.",
    "No.",
    "  Two  spaces, and a tail ",
    "",
    "Why would you even say that? Why, why, why?",
    "Das ist schön; ça va? 我很开心 🙂\nnew line\ttab",
    "a" * 90,
]


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model as Gemma's: BPE with byte fallback, no space put before a text, its spaces kept."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] + TEXTS[4:6] + list(PROMPTS.values())), model_writer=model, model_type="bpe",
        vocab_size=420, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def reference():
    from transformers import Gemma3TextConfig, Gemma3TextModel

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=192, intermediate_size=160, num_hidden_layers=7, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=24, sliding_window=8, max_position_embeddings=64,
        use_bidirectional_attention=True, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3TextModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.05 if "embed" in name else 0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference, pieces):
    folder = tmp_path_factory.mktemp("gemma")
    reference.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces)
    for part, shape in (("2_Dense", (768, 192)), ("3_Dense", (192, 768))):
        (folder / part).mkdir()
        save_file({"linear.weight": torch.randn(shape) * shape[1] ** -0.5}, folder / part / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def gemma(folder):
    return encoders.load("embeddinggemma", str(folder))


def copy(folder, to, skip=()):
    return shutil.copytree(folder, to, ignore=lambda _, names: [name for name in names if name in skip])


def padded(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 512, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids, mask


def test_states_match_transformers_beyond_the_window(gemma, reference):
    lengths = (64, 33, 9, 1)
    ids, mask = padded(lengths)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    found = gemma(ids, mask)
    assert expected.abs().max() > 1
    assert max((found[mask] - expected[mask]).abs().max(), found[~mask].abs().max()) <= 1e-4
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = reference(input_ids=ids[row : row + 1, :length]).last_hidden_state
        assert (gemma(ids[row : row + 1, :length]) - alone).abs().max() <= 1e-4


def test_configs_of_other_generations_mean_the_same(folder, tmp_path, gemma):
    ids, mask = padded((40, 12))
    expected = gemma(ids, mask)
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["sliding_window"], "rope_parameters" in saved, "layer_types" in saved) == (8, True, True)
    older = {key: value for key, value in saved.items() if key not in ("rope_parameters", "layer_types")}
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    for i, pattern in enumerate(({"sliding_window_pattern": 6}, {"_sliding_window_pattern": 6}, {})):
        other = copy(folder, tmp_path / str(i))
        (other / "config.json").write_text(json.dumps(older | pattern))
        assert torch.equal(encoders.load("embeddinggemma", str(other))(ids, mask), expected)
    for change in ({"sliding_window_pattern": 3}, {"sliding_window": 6}, {"rope_local_base_freq": 1e5}):
        (other / "config.json").write_text(json.dumps(older | change))
        assert (encoders.load("embeddinggemma", str(other))(ids, mask) - expected).abs().max() > 1e-3


def test_names_with_a_prefix(folder, tmp_path, gemma):
    other = copy(folder, tmp_path / "prefixed")
    state = load_file(folder / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, other / "model.safetensors")
    ids, mask = padded((20, 3))
    assert torch.equal(encoders.load("embeddinggemma", str(other))(ids, mask), gemma(ids, mask))


def test_head_is_both_dense_maps(gemma, folder):
    ids, mask = padded((40, 7, 2))
    first, second = (
        load_file(folder / part / "model.safetensors")["linear.weight"].double() for part in ("2_Dense", "3_Dense")
    )
    states = gemma(ids, mask).double()
    mean = torch.stack([row[:n].mean(0) for row, n in zip(states, (40, 7, 2), strict=True)])
    whole = mean @ first.T @ second.T
    assert (gemma.embed(ids, mask) - torch.nn.functional.normalize(whole)).abs().max() < 1e-6
    short = encoders.load("embeddinggemma", str(folder), dim="128")
    assert (short.embed(ids, mask) - torch.nn.functional.normalize(whole[:, :128])).abs().max() < 1e-6
    assert (short.out_dim("sentence"), short.out_dim("tokens")) == (128, 192)
    assert short.encode("hello").shape == (128,)
    assert short.encode("hello", "tokens").shape[1] == 192


def test_ids_are_the_tokenizer_s_own_between_bos_and_eos(folder, tmp_path, pieces, gemma):
    from transformers import GemmaTokenizer

    own = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocabulary = {own.id_to_piece(i): i for i in range(own.vocab_size())}
    merges = [(piece[:i], piece[i:]) for piece in vocabulary if own.is_unknown(vocabulary[piece]) is False
              for i in range(1, len(piece)) if piece[:i] in vocabulary and piece[i:] in vocabulary
              and not own.is_byte(vocabulary[piece]) and not own.is_control(vocabulary[piece])]  # fmt: skip
    merges.sort(key=lambda pair: (vocabulary["".join(pair)], vocabulary[pair[0]], vocabulary[pair[1]]))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<unk>"}
    fast = GemmaTokenizer(vocab=vocabulary, merges=merges, **names)
    other = copy(folder, tmp_path / "fast", skip=["tokenizer.model"])
    fast.backend_tokenizer.save(str(other / "tokenizer.json"))
    plain = encoders.load("embeddinggemma", str(folder), prompt="none")
    quick = encoders.load("embeddinggemma", str(other))
    for text in TEXTS:
        assert plain.ids(text) == [2, *own.encode(text)[:62], 1]
        prompted = "task: classification | query: " + text
        expected = [2, *fast(prompted, add_special_tokens=False)["input_ids"][:62], 1]
        assert gemma.ids(text) == quick.ids(text) == expected
    assert torch.equal(gemma.encode(TEXTS[0]), quick.encode(TEXTS[0]))
    assert not torch.equal(gemma.encode(TEXTS[0]), plain.encode(TEXTS[0]))


def test_long_texts_are_cut_to_the_model_s_positions(gemma):
    ids = gemma.ids("glad " * 200)
    assert (len(ids), ids[0], ids[-1]) == (64, 2, 1)
    assert gemma.encode("glad " * 200, "tokens").shape == (64, 192)


def test_same_alone_and_in_a_batch_of_sixteen(gemma):
    texts = [" ".join(TEXTS[0].split()[: 1 + i]) * (1 + i % 5) for i in range(16)]
    lengths = [len(gemma.ids(text)) for text in texts]
    assert max(lengths) > 2 * min(lengths)
    together, states = gemma.embed(texts), gemma(texts)
    for text, vector, row, length in zip(texts, together, states, lengths, strict=True):
        assert torch.cosine_similarity(gemma.encode(text), vector, dim=0) > 1 - 1e-6
        assert (gemma.encode(text, "tokens") - row[:length]).abs().max() < 1e-4
        assert not row[length:].any()


def test_published_sizes():
    config = GemmaConfig()
    with torch.device("meta"):
        whole = Gemma(config)
    assert sum(p.numel() for p in whole.body.parameters()) == 302_863_104
    assert sum(p.numel() for p in whole.parameters()) == 307_581_696
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17, 23]


def test_info_rebuilds_the_encoder(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "weights/google/embeddinggemma-300m"
    copy(folder, place)
    gemma = encoders.load("embeddinggemma", dim=128, prompt="none")
    info = gemma.info("sentence")
    assert info["options"] == {"folder": "google/embeddinggemma-300m", "prompt": "none", "dim": 128}
    assert (info["dim"], info["pooling"], info["kind"]) == (128, "sentence", "dense")
    files = ["2_Dense/model.safetensors", "3_Dense/model.safetensors", "config.json", "model.safetensors"]
    assert list(info["weights_sha256"]) == [*files, "tokenizer.model"]
    again = encoders.load(info["encoder"], **json.loads(json.dumps(info["options"])))
    assert torch.equal(again.encode("so glad"), gemma.encode("so glad"))
    assert encoders.load("embeddinggemma", str(folder)).info("tokens")["options"]["folder"] == str(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", {"norm.weight": None}, r"gemma: 92/93 tensors match the model; 1 missing: norm.weight$"),
        ("model.safetensors", {"norm.weight": torch.ones(3)}, r"wrong shape: norm.weight is \(3,\), not \(192,\)$"),
        ("2_Dense/model.safetensors", {"linear.bias": torch.ones(768)}, r"2_Dense: .* 1 unexpected: linear.bias$"),
        ("3_Dense/model.safetensors", None, r"3_Dense: no model.safetensors and no pytorch_model.bin"),
        (
            "config.json",
            {"model_type": "llama"},
            r"config.json: model_type 'llama' is not supported \(only 'gemma3_text'",
        ),
        ("config.json", {"use_bidirectional_attention": None}, r"use_bidirectional_attention False is not supported"),
        ("config.json", {"rope_scaling": {"rope_type": "linear"}}, r"config.json: rope type 'linear' is not supported"),
        ("config.json", {"head_dim": None, "num_hidden_layers": None}, r"incomplete config, no num_hidden_layers$"),
        (
            "config.json",
            {"layer_types": ["chunked_attention"]},
            r"layer_types other than full_attention and sliding_att",
        ),
        ("config.json", None, r"config.json: No such file or directory$"),
        ("tokenizer.model", None, r"gemma: no tokenizer.model and no tokenizer.json$"),
        ("tokenizer.model", b"no", r"tokenizer.model: not a SentencePiece model \("),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, file, change, message):
    other = copy(folder, tmp_path / "gemma")
    path = other / file
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        before = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        after = {key: value for key, value in (before | change).items() if value is not None}
        save_file(after, path) if path.suffix == ".safetensors" else path.write_text(json.dumps(after))
    with pytest.raises(UserError, match=message) as error:
        encoders.load("embeddinggemma", str(other))
    assert "\n" not in str(error.value)


def test_wrong_options_and_absent_weights(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^embeddinggemma: prompt 'emotion' is not one of none, classification, simil"):
        encoders.load("embeddinggemma", str(folder), prompt="emotion")
    with pytest.raises(UserError, match=r"^embeddinggemma: dim 256 is not one of 128$"):
        encoders.load("embeddinggemma", str(folder), dim=256)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    message = r"hf download google/embeddinggemma-300m --local-dir \S+ \(gated: accept the licence first\)$"
    with pytest.raises(UserError, match=message):
        encoders.load("embeddinggemma")
