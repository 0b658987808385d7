"""A small model of Qwen2's kind in the published layout, its byte-level vocabulary fitted to a few sentences."""

import json
import os

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data.history import MEM
from model.llm import Llama, LlamaConfig
from model.tokenizer import ByteTokenizer

CORPUS = [
    "the client says that nobody listens to her", "Client's emotion: sadness ", "Therapist's strategy: open question ",
    "you are a helpful assistant", "system user assistant", "I'm not angry, they're late again!", "我真的很生气 你好",
    "12 34  56", "naïve café élan", "the face in the video looks happy",
]  # fmt: skip
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # other tests fork


def make_vocabulary(folder, size=400):
    """Writes vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")


def make_tokenizer(folder):
    """The tokenizer of such a vocabulary, with the mark of the history compressor."""
    make_vocabulary(folder)
    made = ByteTokenizer(folder)
    made.add(MEM)
    return made


def theirs(folder):
    """transformers' tokenizer of such a vocabulary."""
    from transformers import AddedToken, Qwen2Tokenizer

    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL[1:]])
    return tokenizer


def make_qwen(folder, spare=8):
    """Writes a random model beside its vocabulary, with `spare` rows of embeddings beyond the control tokens."""
    make_vocabulary(folder)
    rows = len(json.loads((folder / "vocab.json").read_text())) + 3 + spare
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(rows, 32, 48, 2, 4, 2, 8, rope_theta=1e6, tie_word_embeddings=True, attention_bias=True,
                            bos_token_id=rows - spare - 3, eos_token_id=rows - spare - 1))  # fmt: skip
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    llm.save_pretrained(folder)
