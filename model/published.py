"""Emotion-LLaMA's and MiniGPT-v2's checkpoints as they are published: one .pth of adapters and projections.

Such a file does not say what model it belongs to; a YAML does, and eval.py and predict.py then take it as it is:
$ python eval.py --ckpt Emotion_LLaMA.pth --cfg configs/original/emotion_llama.yaml --llm weights/Llama-2-7b-chat-hf
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import coverage, trainable_state
from common.config import UserError, opt
from common.shard import fill
from common.weights import check_names, check_shapes, read_tensors
from model.mllm import Mllm, MllmConfig, build
from model.tokenizer import Tokenizer

IGNORED = {
    "attention.* (a head that was never called)": re.compile(r"attention\.(feats_prep|attention_mlp|fc_att|fc_out)\."),
    "rotary_emb.inv_freq (constants)": re.compile(r".+\.rotary_emb\.inv_freq$"),
}
LAYER = re.compile(r"llm\.model\.layers\.(\d+)\..*lora_")
OWN = MllmConfig()  # the published model's shape


@dataclass
class PublishedConfig:
    """What a .pth does not say of its model."""

    lora_r: int = opt(OWN.lora_r, "of a published .pth, as all of these: LoRA rank")
    lora_alpha: int = opt(OWN.lora_alpha, "LoRA alpha")
    features: dict[str, int] = opt(OWN.features, "utterance features as feats_llama_proj counts them, name=width")
    visual: str | None = opt(OWN.visual, "store of visual tokens")
    visual_encoder: str | None = opt(None, "make visual tokens from the videos with this encoder, in place of a store")
    visual_weights: str | None = opt(None, "folder or file of its weights; default: where they are published")
    visual_options: dict[str, str] = opt({}, "its options, a=1,b=2")
    visual_width: int = opt(OWN.visual_width, "width of a visual token")
    image_size: int = opt(OWN.image_size, "side of the picture in pixels")

    def made(self) -> dict[str, dict]:
        """How each stream was made, where an encoder here can make it; the authors made the others with their own."""
        made: dict[str, dict] = {
            name: {"encoder": "hubert", "pooling": "mean"} if name == "HL-UTT" else {} for name in self.features
        }
        if self.visual:
            options = {"image_size": self.image_size, **self.visual_options}
            options |= {"folder": self.visual_weights} if self.visual_weights else {}
            encoder = self.visual_encoder or "eva"
            made[self.visual] = {"encoder": encoder, "options": options, "pooling": "patches", "frame": "first"}
        return made


def load(
    path: Path, shape: PublishedConfig, llm: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Mllm, Tokenizer, str]:
    """A .pth on its language model (default: Llama-2-7b-chat's place), in eval mode, with its loading coverage."""
    cfg = MllmConfig(llm=llm or OWN.llm, **vars(shape))
    mllm, tokenizer = build(cfg, dtype, device)
    covered = load_published(mllm, path)
    return mllm.eval(), tokenizer, f"{mllm.llm.coverage} of the language model, {covered}"


def own_name(key: str, features: list[str]) -> str:
    """Published key, less DDP's prefix -> ours; the k-th utterance feature is feats_llama_proj{k}."""
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
    """Loads a published .pth and returns its coverage, with what was ignored by name and number.

    MiniGPT-v2's file holds no feature and no CLS projection: those start fresh, and the coverage says so. Any other
    tensor that is missing, or one that has no place here, is a UserError.
    """
    own = trainable_state(mllm)
    found, ignored = read_published(path, list(mllm.cfg.features))
    check_adapters(mllm, path, found)
    extra = {name for name in own if name.startswith("projections.") and not name.startswith("projections.image.")}
    fresh = extra if not extra & set(found) else set()
    wanted = {name: tensor for name, tensor in own.items() if name not in fresh}
    check_names(path, wanted, found)
    check_shapes(path, wanted, {name: tuple(tensor.shape) for name, tensor in found.items()})
    for name, tensor in found.items():
        fill(own[name], tensor)
    slots = sorted({name.split(".")[1] for name in fresh})
    said = [coverage(list(found), list(own))]
    said += [f"fresh: projections of {', '.join(slots)}"] * bool(slots)
    left_out = [f"{count} {what}" for what, count in ignored.items()]
    said += [f"ignored: {', '.join(left_out)}"] * bool(left_out)
    return "; ".join(said)


def read_published(path: str | Path, features: list[str]) -> tuple[dict[str, Tensor], Counter[str]]:
    """The tensors of a .pth by our names, and how many were left out by what they are."""
    found: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    for key, tensor in read_tensors(path).items():
        key = key.removeprefix("module.")
        kinds = [what for what, pattern in IGNORED.items() if pattern.match(key)]
        name = own_name(key, features)
        if name in found:
            raise UserError(f"{path}: two tensors are {name}, in two spellings")
        ignored.update(kinds)
        found |= {} if kinds else {name: tensor}
    return found, ignored


def check_adapters(mllm: Mllm, path: str | Path, found: dict[str, Tensor]) -> None:
    """UserError where a file is of another model altogether, of other layers or of another rank."""
    layers = {match[1] for name in found if (match := LAYER.match(name))}
    there = mllm.llm.config.num_hidden_layers
    if not layers:
        first = ", ".join([*list(found)[:3], *["..."] * (len(found) > 3)]) or "nothing"
        raise UserError(f"{path}: not Emotion-LLaMA's or MiniGPT-v2's: no LoRA of a llama_model in {first}")
    if len(layers) != there:
        raise UserError(f"{path}: LoRA of {len(layers)} layers, the language model has {there}")
    ranks = {len(tensor) for name, tensor in found.items() if name.endswith(".lora_A.weight")}
    if ranks != {mllm.cfg.lora_r}:
        raise UserError(f"{path}: LoRA of rank {', '.join(map(str, sorted(ranks)))}, the model's is {mllm.cfg.lora_r}")
