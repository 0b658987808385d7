"""Text as hashed n-grams of words and characters: ids for an EmbeddingBag, or their counts; without weights."""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.encoders import Encoder

BUCKETS = 2**16
COUNTS = 1024  # columns that the buckets are folded to where a model wants vectors
# a word with its apostrophes, one Chinese character (written without spaces), or one mark that carries feeling
TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:['\u2019][^\W\u3400-\u9fff]+)*|[!?]")


class HashText(Encoder):
    """Text -> bucket ids of its words, word pairs, and runs of 3 to 5 characters within words."""

    name, modality, kind = "hashtext", "text", "ids"
    dim, dtype = BUCKETS, "int32"
    poolings = ("ids", "counts")

    def out_dim(self, pooling: str) -> int:
        """Width of a row after `pooling`; of ids the size of their table."""
        return COUNTS if pooling == "counts" else BUCKETS

    def info(self, pooling: str) -> dict[str, Any]:
        """How features are made; counts are a vector of floats, ids are not."""
        dense = {"kind": "dense", "dtype": "float32"} if pooling == "counts" else {}
        return super().info(pooling) | dense

    def forward(self, x: Sequence[str], mask: Tensor | None = None) -> list[Tensor]:
        """Texts -> one (T,) int32 tensor each; ragged, so there is nothing to mask."""
        return [self.encode(text) for text in x]

    def encode(self, x: str, pooling: str = "ids") -> Tensor:
        """One text -> (T,) int32 in the text's order, T is 0 without any word; or log(1 + counts) (1024,) float32."""
        words = TOKEN.findall(x.lower())
        grams = [*words, *map(" ".join, pairwise(words))]
        for word in words:
            marked = f"<{word}>"  # the ends of a word are part of its runs
            grams += [f"#{marked[i : i + n]}" for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
        ids = torch.tensor([zlib.crc32(gram.encode()) % BUCKETS for gram in grams], dtype=torch.int32)
        return torch.bincount(ids % COUNTS, minlength=COUNTS).float().log1p() if pooling == "counts" else ids
