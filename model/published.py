"""Emotion-LLaMA's and MiniGPT-v2's checkpoints as they are published: one .pth of adapters and projections."""

import re
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import coverage, trainable_state
from common.weights import check_names, check_shapes, read_tensors
from model.mllm import Mllm

IGNORED = re.compile(r"attention\.|.*rotary_emb\.inv_freq$")  # a head that was never called; a constant


def own_name(key: str, features: list[str]) -> str:
    """Published key -> ours; the k-th utterance feature is feats_llama_proj{k}."""
    key = key.removeprefix("module.")
    if found := re.fullmatch(r"(llama_proj|cls_tk_llama_proj|feats_llama_proj(\d+))\.(weight|bias)", key):
        name, number, leaf = found.groups()
        slot = {"llama_proj": "image", "cls_tk_llama_proj": "cls"}.get(name)
        if slot is None and 1 <= int(number) <= len(features):
            slot = features[int(number) - 1]
        return f"projections.{slot}.{leaf}" if slot else key
    key = re.sub(r"^llama_model\.(base_model\.model\.)?", "llm.", key)
    return re.sub(r"(lora_[AB])\.default\.", r"\1.", key)


@torch.no_grad()
def load_published(mllm: Mllm, path: str | Path) -> str:
    """Loads a published .pth and returns its coverage.

    MiniGPT-v2's file holds no feature and no CLS projection: those start fresh, and the coverage says so. Any other
    tensor that is missing, or one that has no place here, is a UserError.
    """
    own = trainable_state(mllm)
    found: dict[str, Tensor] = {}
    for key, tensor in read_tensors(path).items():
        if not IGNORED.match(key.removeprefix("module.")):
            found[own_name(key, list(mllm.cfg.features))] = tensor
    extra = {name for name in own if name.startswith("projections.") and not name.startswith("projections.image.")}
    fresh = extra if not extra & set(found) else set()
    wanted = {name: tensor for name, tensor in own.items() if name not in fresh}
    check_names(path, wanted, found)
    check_shapes(path, wanted, {name: tuple(tensor.shape) for name, tensor in found.items()})
    for name, tensor in found.items():
        own[name].copy_(tensor)
    slots = sorted({name.split(".")[1] for name in fresh})
    return coverage(list(found), list(own)) + (f"; fresh: projections of {', '.join(slots)}" if slots else "")
