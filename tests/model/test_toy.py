"""The tiny models that are made on the spot: other readers of the published layouts compute the same from them."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from model.llm import Llama
from model.mamba import Compressor, Mamba
from model.tokenizer import CHATML, Tokenizer, load_tokenizer
from model.toy import make_toy_llm, make_toy_mamba, make_toy_qwen2

SENTENCES = ["Client(anger) Yes. <MEM> Therapist(neutral) I see. <MEM> ", "I am so sad about the exam.", "Go on."]
TEXTS = [*SENTENCES, "It's naïve: 12 cafés!\n", "<|im_start|>user\n"]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # other tests fork


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy_llm(root / "llama", SENTENCES, hidden=32, layers=2)
    make_toy_qwen2(root / "qwen2", SENTENCES, hidden=32, layers=2)
    make_toy_mamba(root / "mamba", 300, width=40)
    return root


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_language_model_is_the_one_that_transformers_reads(folders, kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders / kind).eval()
    ours = Llama.from_pretrained(folders / kind)
    assert theirs.config.model_type == kind
    ids = torch.tensor([load_tokenizer(folders / kind).encode(SENTENCES[1])])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert ours(ids).std() > 0.1


def test_the_qwen2_is_one(folders):
    config = json.loads((folders / "qwen2" / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"], config["tie_word_embeddings"]) == ("qwen2", 1e6, True)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    names = set(load_file(folders / "qwen2" / "model.safetensors"))
    assert {f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"} <= names
    assert not {"model.layers.1.self_attn.o_proj.bias", "lm_head.weight"} & names
    tokenizer = load_tokenizer(folders / "qwen2")
    assert [tokenizer.specials[name] for name in CHATML] == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.pad_id, tokenizer.eos_id)
    assert config["vocab_size"] > tokenizer.add("<MEM>")  # a row is left for it


def test_its_tokens_are_those_of_transformers_and_fit_the_sentences(folders):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders / "qwen2" / "tokenizer.json"))
    ours = load_tokenizer(folders / "qwen2")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text.replace("<|im_start|>", "")
    assert len(ours.encode("<|im_start|>user\n")) < len(ours.encode("<|im_start|>user\n", specials=()))
    assert len(ours.encode(SENTENCES[1])) == 8  # one a word
    assert len(ours.encode("zzzz")) == 4


def test_llamas_vocabulary_is_sentencepieces(folders):
    tokenizer = load_tokenizer(folders / "llama")
    assert type(tokenizer) is Tokenizer
    assert tokenizer.decode(tokenizer.encode(SENTENCES[1])) == SENTENCES[1]


def test_the_mamba_is_the_one_that_transformers_reads(folders):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaModel.from_pretrained(folders / "mamba").eval()
    ours = Mamba.from_pretrained(folders / "mamba")
    ids = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert all(name.startswith("backbone.") for name in load_file(folders / "mamba" / "model.safetensors"))
    assert json.loads((folders / "mamba" / "config.json").read_text())["model_type"] == "mamba"


def test_a_compressor_begins_with_it(folders):
    compressor = Compressor.from_pretrained(folders / "mamba", width=32, vocab=301, mem_id=300)
    rows = compressor([[5, 6, 300, 7, 300], [], [8, 300]])
    assert [len(each) for each in rows] == [2, 0, 1]
    assert "1 of 301 embedding rows are new" in compressor.coverage


def test_a_mark_tells_what_came_before_it(folders):
    """A mamba with PyTorch's own initialisation says little else than that there is a mark."""
    toy = Mamba.from_pretrained(folders / "mamba")

    @torch.no_grad()
    def told(mamba):
        rows = mamba(torch.tensor([[1, emotion, 2, 3, 4, 299] for emotion in range(10, 60)]))[:, -1]
        return rows.var(0).sum() / rows.mean(0).square().sum()

    assert told(toy) > 1e4 * told(Mamba(toy.config))


def test_the_seed_decides(folders, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        make_toy_qwen2(tmp_path / name, SENTENCES, seed, hidden=32, layers=2)
        make_toy_mamba(tmp_path / name / "mamba", 300, width=40, seed=seed)
    for file, folder in (("model.safetensors", "qwen2"), ("mamba/model.safetensors", "."), ("tokenizer.json", "qwen2")):
        made = (folders / folder / file).read_bytes()
        assert (tmp_path / "same" / file).read_bytes() == made
        assert ((tmp_path / "other" / file).read_bytes() == made) == (file == "tokenizer.json")
