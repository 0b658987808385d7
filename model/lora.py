"""Low-rank adapters (LoRA, Hu et al. 2021) on named linears, and the files PEFT reads and writes."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.config import UserError
from common.weights import check_names, check_shapes, read_json, read_tensors
from model.quant import LINEARS, QuantLinear

PREFIX = "base_model.model."  # of every key in PEFT's files


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable fp32 update: base(x) + scaling * B(A(dropout(x)))."""

    _unmerged: Tensor | None

    def __init__(self, base: nn.Linear | QuantLinear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if r <= 0:
            raise UserError(f"lora_r: {r} is not positive")
        device = base.weight.device if isinstance(base, nn.Linear) else base.device
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        self.register_buffer("_unmerged", None, persistent=False)  # the base weight while merged
        self.train(base.training)  # a fresh module is born in train mode

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.weight.dtype)
        return y + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling).to(y.dtype)

    def delta(self) -> Tensor:
        """The update of the base weight, fp32 (out, in)."""
        return self.lora_B.weight @ self.lora_A.weight * self.scaling


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """Name -> adapter."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def add_lora(module: nn.Module, targets: list[str], r: int, alpha: float, dropout: float = 0.0) -> int:
    """Wrap every linear whose name is, or ends in, one of `targets`; returns how many.

    In `module` only adapters stay trainable.
    """
    inside = tuple(f"{name}." for name in adapters(module))
    linears = {n: m for n, m in module.named_modules() if isinstance(m, LINEARS) and not n.startswith(inside)}
    for target in targets:
        if not any(_ends_in(name, target) for name in linears):
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise UserError(f"lora_targets: no linear is called '{target}' (there are: {there})")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(inside) and ".lora_" in name)
    chosen = {name: linear for name, linear in linears.items() if any(_ends_in(name, t) for t in targets)}
    for name, linear in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, LoRALinear(linear, r, alpha, dropout))
    return len(chosen)


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Add every update to its base weight: no adapter cost at inference. The base weight is kept for unmerge_lora."""
    for adapter in adapters(module).values():
        if not adapter.merged:
            if not isinstance(adapter.base, nn.Linear):
                raise UserError("adapters cannot be merged into a base of few bits: load it without --quant")
            weight = adapter.base.weight
            adapter._unmerged = weight.data
            weight.data = (weight.float() + adapter.delta()).to(weight.dtype)


def unmerge_lora(module: nn.Module) -> None:
    """Undo merge_lora, to the bit."""
    for adapter in adapters(module).values():
        if adapter._unmerged is not None:
            assert isinstance(adapter.base, nn.Linear)
            adapter.base.weight.data, adapter._unmerged = adapter._unmerged, None


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """Name -> adapter tensor, e.g. model.layers.0.self_attn.q_proj.lora_A.weight."""
    state = {}
    for name, adapter in adapters(module).items():
        state[f"{name}.lora_A.weight"] = adapter.lora_A.weight.detach()
        state[f"{name}.lora_B.weight"] = adapter.lora_B.weight.detach()
    return state


@torch.no_grad()
def load_peft(module: nn.Module, path: str | os.PathLike) -> str:
    """Load adapters in any published spelling from a PEFT folder or one file; returns the coverage in words.

    A module without adapters gets those of the folder's adapter_config.json. Anything but a full match is a UserError.
    """
    path = Path(path)
    file = _adapter_file(path)
    state = {_own_name(name): tensor for name, tensor in read_tensors(file).items() if ".lora_" in name}
    if not state:
        raise UserError(f"{file}: holds no LoRA tensors")
    config = _read_config(file.parent / "adapter_config.json")
    if config and not adapters(module):
        names = {name.rsplit(".lora_", 1)[0] for name in state}
        add_lora(module, sorted(names), config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    unmerge_lora(module)
    own = lora_state(module)
    check_names(file, own, state)
    check_shapes(file, own, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for adapter in adapters(module).values() if config else ():
        if not math.isclose(adapter.scaling, config["lora_alpha"] / config["r"]):
            raise UserError(f"{file}: lora_alpha / r = {config['lora_alpha']} / {config['r']}, not {adapter.scaling:g}")
    for name, weight in own.items():
        weight.copy_(state[name])
    return f"{len(own)}/{len(own)} LoRA tensors"


def _own_name(key: str) -> str:
    """PEFT, old PEFT and Emotion-LLaMA spellings -> ours."""
    key = re.sub(r"^(module\.)?(llama_model\.)?(base_model\.model\.)?", "", key)
    return re.sub(r"(lora_[AB])\.default\.", r"\1.", key)


def _adapter_file(path: Path) -> Path:
    places = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin")] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"LoRA weights not found (looked for {', '.join(map(str, places))})")


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file) if file.is_file() else {}
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(key):
            raise UserError(f"{file}: {key} is not supported")
    return config


def save_peft(module: nn.Module, folder: str | os.PathLike, base_name: str = "") -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT lays them out, with the base model's name."""
    found = adapters(module)
    if not found:
        raise ValueError("the module has no LoRA adapters to save")
    first = next(iter(found.values()))
    leaves = {name.rsplit(".", 1)[-1] for name in found}
    bare = {name.rsplit(".", 1)[-1] for name, m in module.named_modules() if isinstance(m, LINEARS)}
    r, alpha = first.lora_A.out_features, first.scaling * first.lora_A.out_features
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": sorted(found if leaves & bare else leaves),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    os.makedirs(folder, exist_ok=True)
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {PREFIX + name: tensor.contiguous() for name, tensor in lora_state(module).items()}
    save_file(state, Path(folder, "adapter_model.safetensors"), {"format": "pt"})
