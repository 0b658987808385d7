"""Llama's SentencePiece vocabulary, cut into segments as the slow tokenizer of transformers 4.30 does."""

import os
import re
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from common.config import UserError

PAD = "$$"  # the piece Emotion-LLaMA pads with


class Tokenizer:
    """Text to ids and back, from a tokenizer.model or the folder that holds it.

    `end` is the piece that ends an answer, for models that were trained to stop at another than </s> (llama2.c's stop
    at <s>); a literal </s> in text stands for it.
    """

    def __init__(self, path: str | os.PathLike, end: str = "</s>"):
        self.path = Path(path, "tokenizer.model") if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer: {self.path} not found")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer: {self.path} is not a SentencePiece model ({error})") from None
        self.bos_id: int = self.pieces.bos_id()
        self.eos_id: int = self.pieces.eos_id()
        self.unk_id: int = self.pieces.unk_id()
        self.pad_id: int = self.pieces.piece_to_id(PAD)  # unk where the vocabulary has no such piece
        self.vocab_size: int = self.pieces.vocab_size()
        ids = (i for i in (self.unk_id, self.bos_id, self.eos_id) if i >= 0)
        self.specials = {self.pieces.id_to_piece(i): i for i in ids}
        if end not in self.specials:
            raise UserError(f"end_sym {end!r} is not one of {', '.join(self.specials)}")
        self.eos_id = self.specials["</s>"] = self.specials[end]
        self._split = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    def encode(self, text: str) -> list[int]:
        """Ids of one segment, no BOS added. A literal <s>, </s> or <unk> is that token and starts a new segment."""
        ids: list[int] = []
        for part in filter(None, self._split.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; specials, and ids a padded model vocabulary has beyond ours, are skipped."""
        special = self.specials.values()
        return self.pieces.decode([i for i in ids if i not in special and 0 <= i < self.vocab_size])

    def save(self, folder: str | os.PathLike) -> None:
        """Copies tokenizer.model, so that the folder loads without the original."""
        os.makedirs(folder, exist_ok=True)
        shutil.copyfile(self.path, Path(folder, "tokenizer.model"))
