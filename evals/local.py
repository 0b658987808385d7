"""A language model of this machine as a judge: a checkpoint of ours, or a plain Llama or Qwen2 folder."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from common import checkpoint
from common.config import UserError
from common.weights import find_weights, identity
from data.chat import chatml, llama2
from data.prompts import encode_segments
from evals.chat import Reply, Turns
from model import mllm
from model.generate import generate
from model.llm import Llama
from model.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

BATCH = 8
LONGEST = 200  # tokens of a reply


class Local:
    """Replies greedily, in the chat layout of Llama 2 or Qwen2; loaded when first asked."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.state: dict | None = None
        if any((Path(name) / part).exists() for part in (checkpoint.STATE, "checkpoints", "last", "best")):
            self.folder = checkpoint.resolve(name, prefer="best")
            self.state = checkpoint.read_state(self.folder)
            if self.state.get("system") not in (None, "llm"):
                raise UserError(f"--judge-model {name}: a checkpoint of {self.state['system']} answers no questions")
        else:
            self.folder = find_weights(name, "judge")
        made = json.dumps(identity(checkpoint.place(self.folder) if self.state else self.folder), sort_keys=True)
        self.name = f"local: {name}"
        self.identity = hashlib.sha256(made.encode()).hexdigest()
        self.loaded: tuple[Llama, Tokenizer] | None = None

    def _load(self) -> tuple[Llama, Tokenizer]:
        if self.loaded is None and self.state is not None:
            model, tokenizer, _ = mllm.load(self.folder, self.state, self.device, self.dtype)
            self.loaded = model.llm, tokenizer
        elif self.loaded is None:
            llm = Llama.from_pretrained(self.folder, self.dtype, str(self.device)).eval()
            self.loaded = llm, load_tokenizer(self.folder)
        return self.loaded

    def complete(self, conversations: Sequence[Turns]) -> Iterator[tuple[int, Reply]]:
        """(place, reply) of each conversation, long ones first."""
        if not conversations:
            return
        llm, tokenizer = self._load()
        prompts = [prompt(turns, tokenizer) for turns in conversations]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            ids = generate(llm, [prompts[i] for i in chosen], LONGEST, eos_id=tokenizer.eos_id)
            for i, new in zip(chosen, ids, strict=True):
                yield i, Reply(tokenizer.decode(new).strip(), len(prompts[i]), len(new))


def prompt(turns: Turns, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation that ends with the user's turn."""
    layout = chatml if isinstance(tokenizer, ByteTokenizer) else llama2
    messages = [("assistant" if i % 2 else "user", [text]) for i, text in enumerate(turns)]
    pieces = encode_segments(layout(messages), tokenizer.encode)
    return [i for ids in pieces if isinstance(ids, list) for i in ids]
