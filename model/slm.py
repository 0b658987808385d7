"""The speech pipeline's emotion classifier over projected speech and text ("SLM"), and its heads for MELD.

K seeds side by side as in model/seeds.py. With form "original" it is the published network, to the parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import UserError, from_dict, opt
from common.weights import check_names, check_shapes, read_tensors
from model.clap import MODALITIES, Clap, ClapConfig, Sources
from model.seeds import Linear, Norm, start

BLOCKS = 5  # of width proj_dim in the features that are classified


@dataclass
class SlmConfig:
    clap: ClapConfig = field(default_factory=ClapConfig)
    form: str = opt(
        "normalised", "original: the published network; normalised: every block of features has a norm", "--form",
        choices=("normalised", "original"),
    )  # fmt: skip
    hidden_dim: int = opt(1024, "width of the hidden layer", "--hidden-dim")
    dropout: float = opt(0.1, "dropout before the last layer", "--dropout", share=True)
    input_dropout: float = opt(0.0, "dropout of what fronts make of sound and words", "--input-dropout", share=True)
    modality_dropout: float = opt(
        0.15, "chance that sound or words are hidden while training, never both", "--modality-dropout", share=True
    )


class Slm(nn.Module):
    """A gate weighs what the voice says by how it agrees with the words; both, their product and distance are read."""

    frozen = False

    def __init__(self, cfg: SlmConfig, sources: Sources, classes: int, seeds: Sequence[int]) -> None:
        super().__init__()
        k, d = len(seeds), cfg.clap.proj_dim
        self.cfg = cfg
        self.clap = Clap(cfg.clap, sources, seeds)
        self.prosody_lin = Linear(k, self.clap.widths.get("audio", d), d)
        self.W_q, self.W_k, self.W_v = Linear(k, d, d), Linear(k, d, d), Linear(k, d, d)
        self.mlp = nn.Sequential(
            Linear(k, BLOCKS * d, cfg.hidden_dim),
            nn.GELU(),
            nn.Dropout(cfg.dropout),
            Linear(k, cfg.hidden_dim, classes),
        )
        original = cfg.form == "original"
        self.norms = None if original else nn.ModuleList(Norm(k, d) for _ in range(BLOCKS))
        # what stands for a modality that is not there: learned directions, zeros in the original
        self.absent = None if original else nn.ParameterDict({m: torch.zeros(k, 1, d) for m in MODALITIES})
        # what a linear probe would see, straight to the classes: small data need no more
        self.direct = None if original else Linear(k, sum(self.clap.widths.values()), classes)
        self.drop = nn.Dropout(cfg.input_dropout)
        start(self, seeds)
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)
        constant(self.clap, "logit_scale")  # of the contrastive loss only

    def freeze_projectors(self) -> None:
        """Turns the projectors into buffers, which stay as they are and are still in every checkpoint."""
        freeze(self.clap)
        self.frozen = True
        self.clap.eval()

    def train(self, mode: bool = True) -> "Slm":
        super().train(mode)
        if self.frozen:
            self.clap.eval()  # no dropout of what does not learn
        return self

    def features(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        """(K, B, 5 proj_dim): gated voice, voice, words, their product and distance, of frames or ids and masks."""
        return self._blocks(*self._read(x, mask))

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        """Logits (K, B, classes)."""
        vectors, there = self._read(x, mask)
        logits = self.mlp(self._blocks(vectors, there))
        if self.direct is None:
            return logits
        seen = [
            torch.where(there[m], vectors[m], 0.0) if m in vectors else logits.new_zeros(*logits.shape[:2], width)
            for m, width in self.clap.widths.items()
        ]
        return logits + self.direct(torch.cat(seen, -1))

    def _read(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A vector (K, B, D) of each modality that x has, and where there is any (K, B, 1) of both."""
        some = next(iter(mask.values()))
        none = some.new_zeros(*some.shape[:2], 1)
        there = {m: mask[m].any(-1, keepdim=True) if m in mask else none for m in MODALITIES}
        if self.training and self.cfg.modality_dropout:
            there = hide(there, self.cfg.modality_dropout)
        return {m: self.drop(v) for m, v in self.clap.vectors(x, mask).items()}, there

    def _blocks(self, vectors: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
        s: dict[str, Tensor] = {}
        for m in MODALITIES:
            absent = self.W_q.weight.new_zeros(self.cfg.clap.proj_dim) if self.absent is None else self.absent[m]
            s[m] = torch.where(there[m], self.clap.project(m, vectors[m]) if m in vectors else 0.0, absent)
        voice = self.prosody_lin(vectors["audio"]) if "audio" in vectors else torch.zeros_like(s["audio"])
        agreement = (self.W_q(s["text"]) * self.W_k(s["audio"])).sum(-1, keepdim=True) / math.sqrt(voice.shape[-1])
        gated = agreement.sigmoid() * self.W_v(torch.where(there["audio"], voice, 0.0))
        blocks = [gated, s["audio"], s["text"], s["audio"] * s["text"], (s["audio"] - s["text"]).abs()]
        if self.norms is not None:
            blocks = [norm(block) for norm, block in zip(self.norms, blocks, strict=True)]
        return torch.cat(blocks, -1)


def freeze(module: nn.Module) -> None:
    """Turns all parameters of a module into buffers of the same names, which checkpoints still hold."""
    for part in module.modules():
        for name, _ in list(part.named_parameters(recurse=False)):
            constant(part, name)


def constant(module: nn.Module, name: str) -> None:
    """Turns one parameter of a module into a buffer."""
    value = module.get_parameter(name).detach().clone()
    delattr(module, name)
    module.register_buffer(name, value)


def hide(there: dict[str, Tensor], chance: float) -> dict[str, Tensor]:
    """Hides one of two modalities that are both there, each with half of the chance."""
    draw = torch.rand(next(iter(there.values())).shape, device=next(iter(there.values())).device)
    both = torch.stack(list(there.values())).all(0)
    gone = {"audio": draw < chance / 2, "text": draw > 1 - chance / 2}
    return {m: part & ~(both & gone[m]) for m, part in there.items()}


def load(folder: Path, state: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Slm, str]:
    """The classifier of a checkpoint folder whose state.json is `state`, in eval mode; and its coverage."""
    model = Slm(from_dict(SlmConfig, state["config"]["model"]), state["sources"], len(state["labels"]), state["seeds"])
    if state["frozen"]:
        model.freeze_projectors()
    coverage = checkpoint.load_model(model, folder)
    return model.to(device).eval(), coverage


def original(path: str | Path) -> tuple[Slm, int, str]:
    """The published classifier of stage 3 as its file has it, one seed in eval mode; its classes, and its coverage."""
    tensors = {name.removeprefix("module."): value for name, value in read_tensors(path, "model_state").items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if value.ndim == 2}
    needs = ("clap.audio_proj.weight", "clap.text_proj.weight", "mlp.0.weight", "mlp.3.weight")
    if lacking := [name for name in needs if name not in shapes]:
        raise UserError(f"{path}: no {lacking[0]}: not a checkpoint of stage 3")
    (d, audio), (_, text) = (shapes[name] for name in needs[:2])
    cfg = SlmConfig(
        ClapConfig(proj_dim=d, normalize=False), "original", shapes["mlp.0.weight"][0], modality_dropout=0.0
    )
    sources = {m: {"dim": dim, "kind": "dense", "frames": False} for m, dim in (("audio", audio), ("text", text))}
    classes = shapes["mlp.3.weight"][0]
    model = Slm(cfg, sources, classes, [0])
    return model.eval(), classes, load_original(model, path)


def copy(model: nn.Module, other: nn.Module) -> None:
    """The weights of a classifier's first seed into every seed of another of the same shape."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, value in [*other.named_parameters(), *other.named_buffers()]:
            seeded = value.ndim > 1 or name.endswith("logit_scale")  # not statistics, nor weights of hashed words
            value.copy_(own[name][:1].expand_as(value) if seeded else own[name])


def load_original(model: Slm, path: str | Path) -> str:
    """A published stage-3 checkpoint into every seed of a model of form "original"; returns what was loaded."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    # what contrastive training alone needs, and the statistics that the published network has not
    own = {name: p for name, p in own.items() if not name.startswith("clap.") or "_proj." in name}
    loaded = spread(own, path, read_tensors(path, "model_state"), "tensors of the SLM")
    model.clap.cfg.normalize, model.clap.limit = False, math.inf  # it reads embeddings as they are
    return loaded


def spread(own: Mapping[str, Tensor], path: str | Path, tensors: dict[str, Tensor], what: str) -> str:
    """Copies tensors without a seed dimension into every seed of `own`, strictly; returns what was loaded."""
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    check_names(path, own, tensors)
    one = {name: p[0, 0] if p.ndim == 3 and name.endswith("bias") else p[0] for name, p in own.items()}
    check_shapes(path, one, {name: tuple(value.shape) for name, value in tensors.items()})
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name].expand_as(p))
    return f"{len(tensors)}/{len(own)} {what}"
