"""BERT: words in their context, of text cut into pieces of words."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import UserError
from common.weights import find_weights, read_folder, read_json
from model.encoders import Encoder, portable, sha256
from model.encoders.transformer import (
    ACTIVATIONS,
    Block,
    cast,
    hidden_states,
    load_renamed,
    mix,
    read_config,
    read_layers,
)

PREFIX = r"(?:bert\.)?"  # models with a head put the network under its name
LAYER = PREFIX + r"encoder\.layer\.(\d+)\."
RULES = [
    (PREFIX + r"embeddings\.LayerNorm\.(.*)", r"norm.\1"),
    (PREFIX + r"embeddings\.(word|position|token_type)_embeddings\.(.*)", r"\1.\2"),
    (LAYER + r"attention\.self\.(q|k|v)(?:uery|ey|alue)\.(.*)", r"blocks.\1.attention.\2.\3"),
    (LAYER + r"attention\.output\.dense\.(.*)", r"blocks.\1.attention.out.\2"),
    (LAYER + r"attention\.output\.LayerNorm\.(.*)", r"blocks.\1.norm1.\2"),
    (LAYER + r"intermediate\.dense\.(.*)", r"blocks.\1.fc1.\2"),
    (LAYER + r"output\.dense\.(.*)", r"blocks.\1.fc2.\2"),
    (LAYER + r"output\.LayerNorm\.(.*)", r"blocks.\1.norm2.\2"),
]
HEADS = (PREFIX + r"pooler\..*", PREFIX + r"embeddings\.position_ids", r"(?:cls|classifier|qa_outputs)\..*")
FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


@dataclass
class BertConfig:
    """The shape of a BERT, by the field names of its config.json; the defaults are those of the uncased base model."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, file: Path) -> "BertConfig":
        """From a config.json of transformers. UserError on what this network does not compute."""
        allowed = {
            "hidden_act": ("gelu", *ACTIVATIONS), "position_embedding_type": ("absolute",), "is_decoder": (False,),
        }  # fmt: skip
        return cls(**read_config(file, "bert", cls.__dataclass_fields__, allowed))


class BertNet(nn.Module):
    """Ids (B, T), mask (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps)
        shape = (width, config.num_attention_heads, config.intermediate_size, eps, config.hidden_act)
        self.blocks = nn.ModuleList(Block(*shape, pre=False) for _ in range(config.num_hidden_layers))

    def states(self, ids: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Hidden states of single texts, which are all of the first type."""
        x = self.word(ids) + self.token_type.weight[0] + self.position.weight[: ids.shape[1]]
        return hidden_states(self.blocks, self.norm(x), mask)


class Bert(Encoder):
    """Text -> the state of its first token [CLS], of all of them, or the mean of these.

    `layer` is last, last4 (the sum of the last four), one of the hidden states from 0, or the mean of a span such as
    4-10; `dtype` is what products are made in, fp32 or bf16. Longer texts end after `max_tokens`, [CLS] and [SEP] among
    them.
    """

    name, modality, batched = "bert", "text", True
    hub = "google-bert/bert-base-uncased"
    poolings = ("cls", "mean", "tokens")

    def __init__(self, folder: str, layer: str = "last", dtype: str = "fp32", max_tokens: int = 128) -> None:
        found = find_weights(folder, "bert weights")
        super().__init__(folder=portable(folder, found), layer=layer, dtype=dtype, max_tokens=max_tokens)
        config = BertConfig.from_json(found / "config.json")
        if not 2 < max_tokens <= config.max_position_embeddings:
            most = config.max_position_embeddings
            raise UserError(f"bert: max_tokens {max_tokens} is not from 3 to the model's {most}")
        self.dim = config.hidden_size
        self.layers = read_layers(layer, config.num_hidden_layers, self.name)
        with torch.device("meta"):
            self.net = BertNet(config)
        # the first models call the parameters of a norm so
        old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        names = re.compile("|".join(map(re.escape, old)))
        tensors = {names.sub(lambda m: old[m[0]], name): tensor for name, tensor in read_folder(found).items()}
        self.coverage = load_renamed(self.net, tensors, RULES, found, HEADS)
        cast(self.net, dtype, self.name)
        self.split = _splitter(found, max_tokens, config.vocab_size)
        self.preprocessing = f"bert: WordPiece, [CLS] and [SEP], {max_tokens} tokens at most"
        self.weights_sha256 = sha256(found, "config.json", *FILES)

    def prepare(self, x: str) -> Tensor:
        """A text -> the ids (T,) of its pieces."""
        return torch.tensor(self.split(x))

    def lengths(self, tokens: Tensor) -> Tensor:
        """Rows of texts that have so many tokens."""
        return tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ids (B, T), mask (B, T) of each text's own -> (B, T, dim), zero where the mask is false."""
        if mask is None or mask.all():
            return mix(self.net.states(x), self.layers)
        return mix(self.net.states(x * mask, mask), self.layers) * mask[..., None]

    def pool(self, rows: Tensor, how: str) -> Tensor:
        """States (T, dim) of one text -> themselves, the first (dim,), or their mean (dim,)."""
        return rows[0] if how == "cls" else super().pool(rows, how)


def _splitter(folder: Path, most: int, size: int) -> Callable[[str], list[int]]:
    """Text -> at most `most` ids, [CLS] and [SEP] among them, as the folder's tokenizer cuts it."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    fast, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if not (fast.is_file() or vocabulary.is_file()):
        raise UserError(f"{folder}: no tokenizer.json and no vocab.txt")
    try:
        if fast.is_file():
            tokenizer: Any = Tokenizer.from_file(str(fast))
        else:
            file = folder / "tokenizer_config.json"
            given = read_json(file) if file.is_file() else {}
            tokenizer = BertWordPieceTokenizer(
                str(vocabulary),
                lowercase=given.get("do_lower_case", True),
                strip_accents=given.get("strip_accents"),
                handle_chinese_chars=given.get("tokenize_chinese_chars", True),
            )
    except UserError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{fast if fast.is_file() else vocabulary}: not a tokenizer ({error})") from None
    if tokenizer.get_vocab_size() > size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.get_vocab_size():,} pieces, the model {size:,}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    return lambda text: tokenizer.encode(text).ids
