"""Several checkpoints of one recipe as one model: the mean of their weights, or of what they predict."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import UserError, from_dict
from common.options import text
from common.shard import shapes
from common.weights import check_names, check_shapes
from model import mllm
from model.generate import generate_together
from model.mllm import Batch, Mllm, MllmConfig
from model.tokenizer import FILES, Tokenizer

WAYS = ("weights", "predictions")
# what members must have in common besides the weights that did not train: their shape, and how a clip becomes a prompt
SHAPE = ("full", "quant", "lora_r", "lora_alpha", "lora_targets", "features", "feature_tokens", "normalize", "visual",
         "visual_width", "image_size", "merge", "end_sym", "max_len")  # fmt: skip
# with what holds for checkpoints that do not say
PROMPT = {"labels": [], "prompt_layout": "train", "chat_template": True, "streams": [], "question": "labels",
          "speaker_norm": False}  # fmt: skip


class Ensemble(nn.Module):
    """Models that answer together, by the mean of their probabilities; to evals/emotion.py they are one Mllm."""

    def __init__(self, members: Sequence[Mllm]) -> None:
        super().__init__()
        self.members: Sequence[Mllm] = nn.ModuleList(members)  # type: ignore[assignment]
        self.cfg = members[0].cfg

    def score(self, batch: Batch, candidates: list[list[int]]) -> Tensor:
        """Mean probability of each candidate answer to each prompt among all of them, fp32 (B, L)."""
        return torch.stack([member.score(batch, candidates) for member in self.members]).mean(0)

    def generate(self, batch: Batch, max_new_tokens: int, **settings: Any) -> list[list[int]]:
        """New tokens of each prompt, at every step by the mean of the members' next-token probabilities."""
        models = [(member.llm, member.prompts(batch)) for member in self.members]
        return generate_together(models, max_new_tokens, **settings)


def load(
    folders: Sequence[Path], states: Sequence[dict[str, Any]], how: str, device: torch.device, dtype: torch.dtype
) -> tuple[Mllm | Ensemble, Tokenizer, str]:
    """One model of several checkpoint folders, whose state.json are `states`, in eval mode; and its coverage."""
    for folder, state in zip(folders[1:], states[1:], strict=True):
        check_same(folders[0], states[0], folder, state)
    parts = [checkpoint.read(folder) for folder in folders]
    for folder, part in zip(folders, parts, strict=True):
        check_names(folder, parts[0], part)
        check_shapes(folder, parts[0], shapes(part))
    if how == "weights":
        state = copy.deepcopy(states[0])
        for name in ("lora_r", "lora_alpha"):  # the rank of a mean of K updates; alpha / r, their scaling, stays
            state["config"]["model"][name] *= len(folders)
        model, tokenizer, covered = mllm.load(folders[0], state, device, dtype, mean(parts))
    else:
        first, tokenizer, covered = mllm.load(folders[0], states[0], device, dtype, parts[0])
        members = [first, *(sibling(first) for _ in parts[1:])]
        for member, folder, part in zip(members[1:], folders[1:], parts[1:], strict=True):
            checkpoint.load_tensors(member, part, str(folder))
        model = Ensemble(members).eval()
    return model, tokenizer, covered


def check_same(first: Path, one: dict[str, Any], second: Path, two: dict[str, Any]) -> None:
    """UserError, which names the first difference, unless two checkpoints can be combined."""
    pair = f"{second} does not combine with {first}"
    if two.get("system") != one.get("system"):
        raise UserError(f"{pair}: it is a checkpoint of {two.get('system') or 'a language model'}")
    shapes = [from_dict(MllmConfig, state["config"]["model"]) for state in (one, two)]
    settings = [(f"model.{name}", *(getattr(shape, name) for shape in shapes)) for name in SHAPE]
    for name, default in PROMPT.items():
        settings.append((f"data.{name}", *(state["config"]["data"].get(name, default) for state in (one, two))))
    for name, a, b in settings:
        if a != b or (isinstance(a, dict) and list(a) != list(b)):  # features stand in the prompt in this order
            raise UserError(f"{pair}: {name} is {text(b)}, not {text(a)}")
    for name, made in one["features"].items():
        if two["features"].get(name) != made:
            raise UserError(f"{pair}: features {name!r} were made another way")
    if (two["base"] or {}).get("files") != (one["base"] or {}).get("files"):
        raise UserError(f"{pair}: it was trained on other weights of the language model")
    for file in ("llm_config.json", *FILES):  # beside the tensors of a checkpoint, and one of FILES
        here, there = (folder / file for folder in (first, second))
        if here.is_file() != there.is_file() or (here.is_file() and here.read_bytes() != there.read_bytes()):
            raise UserError(f"{pair}: it has another {file}")


def mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of checkpoints' tensors, taken in float64; of low-rank updates B_k A_k the mean of the products.

    The mean of A_k times the mean of B_k would be another update. A_k one below the other and B_k / K side by side
    give sum_k (B_k / K) A_k: the mean exactly, of rank K r, under the scaling of the members.
    """
    combined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name.endswith(".lora_A.weight"):
            combined[name] = torch.cat(tensors)
        elif name.endswith(".lora_B.weight"):
            combined[name] = torch.cat(tensors, 1) / len(parts)
        else:
            combined[name] = torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)
    return combined


def sibling(first: Mllm) -> Mllm:
    """A copy that shares what a checkpoint does not hold: the frozen language model is in memory once."""
    own = checkpoint.trainable_state(first)
    tensors = [*first.named_parameters(), *first.named_buffers()]
    return copy.deepcopy(first, {id(tensor): tensor for name, tensor in tensors if name not in own})
