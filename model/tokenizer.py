"""Text to ids and back: Llama's SentencePiece vocabulary and Qwen2's byte-level BPE."""

import base64
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from common.config import UserError
from common.weights import read_json

PAD = "$$"  # the piece Emotion-LLaMA pads with
FILES = ("tokenizer.model", "tokenizer.json")  # one of these is in a checkpoint
# how Qwen2 cuts text before it merges bytes: words with the sign before them, digits one by one, signs, line ends
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # in this order after the vocabulary
# what tokenizer.json says of an added token beside its id and its text
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


class Tokenizer:
    """Llama's vocabulary, from a tokenizer.model or the folder that holds it.

    It is cut into segments as the slow tokenizer of transformers 4.30 does. `end` is the piece that ends an answer, for
    models that were trained to stop at another than </s> (llama2.c's stop at <s>); a literal </s> in text stands for
    it.
    """

    bos_id: int  # -1: none
    eos_id: int
    unk_id: int
    pad_id: int
    vocab_size: int
    specials: dict[str, int]  # literal -> id

    def __init__(self, path: str | os.PathLike, end: str = "</s>"):
        self.path = Path(path, "tokenizer.model") if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer: {self.path} not found")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer: {self.path} is not a SentencePiece model ({error})") from None
        self.bos_id = self.pieces.bos_id()
        self.eos_id = self.pieces.eos_id()
        self.unk_id = self.pieces.unk_id()
        self.pad_id = self.pieces.piece_to_id(PAD)  # unk where the vocabulary has no such piece
        self.vocab_size = self.pieces.vocab_size()
        ids = (i for i in (self.unk_id, self.bos_id, self.eos_id) if i >= 0)
        self.specials = {self.pieces.id_to_piece(i): i for i in ids}
        if end not in self.specials:
            raise UserError(f"end_sym {end!r} is not one of {', '.join(self.specials)}")
        self.eos_id = self.specials["</s>"] = self.specials[end]

    def encode(self, text: str, specials: Collection[str] | None = None) -> list[int]:
        """Ids of one segment, no BOS added; `specials` are the literals in it that are control tokens, all by default.

        Such a token starts a new segment. What people wrote is to be encoded with none: it may hold any literal.
        """
        names = self.specials if specials is None else specials
        if unknown := [name for name in names if name not in self.specials]:
            raise UserError(f"tokenizer: {self.path} has no {unknown[0]}")
        if not names:
            return self._segment(text)
        ids: list[int] = []
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        for part in filter(None, re.split(f"({'|'.join(longest_first)})", text)):
            ids += [self.specials[part]] if part in names else self._segment(part)
        return [i for i in ids if i >= 0]  # a BOS that the vocabulary does not have is none

    def add(self, name: str) -> int:
        """The id of a special, which is the next free one where the vocabulary does not have it."""
        if name not in self.specials:
            self.specials[name] = self.vocab_size
            self.vocab_size += 1
        return self.specials[name]

    def _segment(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; specials, and ids a padded model vocabulary has beyond ours, are skipped."""
        special = self.specials.values()
        return self._text([i for i in ids if i not in special and 0 <= i < self.vocab_size])

    def _text(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def files(self) -> dict[str, bytes]:
        """What a folder needs to load without the original: name -> content."""
        return {"tokenizer.model": self.path.read_bytes()}

    def hub_config(self) -> dict[str, Any]:
        """The tokenizer_config.json with which transformers cuts text alike."""
        pieces = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id}
        names = {name: self.pieces.id_to_piece(id) for name, id in pieces.items() if id >= 0}
        # without its class transformers 5 cuts words otherwise
        return {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **names}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files(), so that the folder loads without the original."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files().items():
            Path(folder, name).write_bytes(content)


class ByteTokenizer(Tokenizer):
    """Qwen2's and Qwen2.5's vocabulary, which has no BOS and no unknown piece.

    From a tokenizer.json, a vocab.json with merges.txt beside it, a tiktoken file (base64 token and rank a line), or
    the folder that holds one. CHATML is added where the file has none of it. A literal </s> in text stands for `end`,
    by default <|im_end|>; a literal <s> for no token at all.
    """

    def __init__(self, path: str | os.PathLike, end: str = "</s>"):
        self.path = _find(Path(path))
        if not self.path.is_file():
            raise UserError(f"tokenizer: {self.path} not found")
        try:
            self.backend, self.added = _load(self.path)
            self.specials = {entry["content"]: entry["id"] for entry in self.added}
        except UserError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"tokenizer: {self.path} is no byte-level BPE ({error})") from None
        self.bos_id = self.unk_id = -1
        self.vocab_size = 1 + max([*self.backend.get_vocab().values(), *self.specials.values()], default=-1)
        self.pad_id, _, self.eos_id = map(self.add, CHATML)
        if end not in {"</s>", *self.specials}:
            raise UserError(f"end_sym {end!r} is not one of {', '.join(self.specials)}")
        self.eos_id = self.specials.get(end, self.eos_id)
        self.specials |= {"<s>": self.bos_id, "</s>": self.eos_id}

    def add(self, name: str) -> int:
        """The id of a special, which is the next free one where the vocabulary does not have it."""
        if name not in self.specials:
            known = self.backend.token_to_id(name)
            self.specials[name] = self.vocab_size if known is None else known
            self.added.append({"id": self.specials[name], "content": name, **PLAIN})
            self.vocab_size = max(self.vocab_size, self.specials[name] + 1)
        return self.specials[name]

    def _segment(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, whichever file this was read from."""
        told = json.loads(self.backend.to_str())
        told["added_tokens"] = sorted(self.added, key=lambda entry: entry["id"])
        return {"tokenizer.json": json.dumps(told, ensure_ascii=False).encode()}

    def hub_config(self) -> dict[str, Any]:
        """The tokenizer_config.json with which transformers cuts text alike."""
        names = {id: name for name, id in self.specials.items() if name not in ("<s>", "</s>")}
        ends = {"eos_token": names[self.eos_id], "pad_token": names[self.pad_id], "unk_token": None, "bos_token": None}
        return {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, **ends}


def load_tokenizer(path: str | os.PathLike, end: str = "</s>") -> Tokenizer:
    """The tokenizer of a file or a folder, by what lies there; `end` as Tokenizer has it."""
    path = Path(path)
    if path.is_dir():
        sentencepiece = (path / "tokenizer.model").is_file()
    else:
        sentencepiece = path.suffix not in (".json", ".txt", ".tiktoken")
    return Tokenizer(path, end) if sentencepiece else ByteTokenizer(path, end)


def _find(path: Path) -> Path:
    """The file of a folder that holds the vocabulary."""
    if not path.is_dir():
        return path.with_name("vocab.json") if path.name == "merges.txt" else path
    for name in ("tokenizer.json", "vocab.json"):
        if (path / name).is_file():
            return path / name
    if ranks := sorted(path.glob("*.tiktoken")):
        return ranks[0]
    raise UserError(f"tokenizer: {path} has no {', '.join(FILES)}, vocab.json with merges.txt or .tiktoken file")


def _load(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What merges bytes, of tokenizers, and the added tokens as tokenizer.json lists them; it knows none of these."""
    from tokenizers import Tokenizer, models

    if path.suffix == ".json" and path.name != "vocab.json":
        told = read_json(path)
        kinds = [(told.get(part) or {}).get("type") for part in ("model", "decoder")]
        if kinds != ["BPE", "ByteLevel"]:
            raise UserError(f"tokenizer: {path} is no byte-level BPE")
        added, told["added_tokens"] = told.get("added_tokens") or [], []
        backend = Tokenizer.from_str(json.dumps(told))
        backend.no_truncation()
        backend.no_padding()
        return backend, added
    if path.suffix == ".tiktoken":
        model, added = models.BPE(*_from_ranks(path)), []
    else:
        merges = path.with_name("merges.txt")
        if not merges.is_file():
            raise UserError(f"tokenizer: {merges} not found")
        model, added = models.BPE.from_file(str(path), str(merges)), _added(path.parent)
    return byte_level(model), added


def byte_level(model: Any) -> Any:
    """What cuts text as Qwen2 does and merges bytes by a BPE model of tokenizers, trained or still to be trained."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def _added(folder: Path) -> list[dict[str, Any]]:
    """The tokens that tokenizer_config.json adds to vocab.json; Qwen2.5 has 22."""
    file = folder / "tokenizer_config.json"
    entries = read_json(file).get("added_tokens_decoder") or {} if file.is_file() else {}
    return [{"id": int(id), **entry} for id, entry in entries.items()]


def _from_ranks(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tiktoken file, in the letters that stand for bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"tokenizer: {path}: line {number} is no base64 token and rank") from None
    letters = dict(_letters())

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = _merged(token, rank, ranks)
            if len(halves) != 2:
                raise UserError(f"tokenizer: {path}: token {rank} is not made of two others")
            merges.append((spelled(halves[0]), spelled(halves[1])))
    return {spelled(token): rank for token, rank in ranks.items()}, merges


def _merged(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that a token's bytes are merged to by the ranks below `limit`: the last merge of the token itself."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _letters() -> Iterator[tuple[int, str]]:
    """GPT-2's letter of each byte: itself where it is printable Latin-1, else one above it."""
    above = 256
    for byte in range(256):
        if chr(byte).isprintable() and byte != 32:
            yield byte, chr(byte)
        else:
            yield byte, chr(above)
            above += 1
