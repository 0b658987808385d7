"""Projectors of speech and text to one space, trained so that what belongs together lies together (CLAP).

K seeds side by side as in model/seeds.py. Sound comes as one vector a clip or as frames, words as one vector or as ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint
from common.config import UserError, from_dict, opt
from common.weights import read_tensors
from model.bag import Bag
from model.frames import FramePool
from model.seeds import Linear, Standardized, start, statistics

MODALITIES = ("audio", "text")
FILES = (".pt", ".pth", ".safetensors")  # endings of projectors in one file: the published ones, and tools/export.py's
OWNER = {"audio": "audio", "stats": "audio", "text": "text"}  # stream -> its modality; stats go with frames of sound
Sources = dict[str, dict[str, Any]]  # stream -> {"dim", "kind": dense or ids, "frames": more than one a clip}


@dataclass
class ClapConfig:
    proj_dim: int = opt(768, "width of the shared space", "--proj-dim")
    dropout: float = opt(0.1, "dropout of the projections while they train", share=True)
    temperature: float = opt(0.07, "what similarities are divided by at the start of training", "--temperature")
    max_scale: float = opt(100.0, "largest factor that training may give similarities")
    bag_dim: int = opt(128, "width that hashed words are embedded to")
    normalize: bool = opt(True, "standardise vectors by train-split statistics kept in the checkpoint", "--normalize")
    one_scale: bool = opt(False, "frames by one mean and deviation, so that a spectrum keeps its shape", "--one-scale")


class Fronts(Standardized):
    """What makes one vector of a clip's frames or ids; `widths` are those of the vectors."""

    def __init__(self, sources: Sources, bag_dim: int, normalize: bool, k: int, one_scale: bool = False) -> None:
        dense = {m: source["dim"] for m, source in sources.items() if source["kind"] == "dense"}
        super().__init__(dense, 5.0 if normalize else math.inf)
        self.sources, self.dense, self.one_scale = sources, list(dense), one_scale
        self.fronts = nn.ModuleDict()
        self.widths: dict[str, int] = {}
        for m, source in sources.items():
            width = source["dim"]
            if source["kind"] == "ids":
                self.fronts[m], width = Bag(k, source["dim"], bag_dim), bag_dim
            elif source["frames"]:
                self.fronts[m] = pool = FramePool(k, source["dim"])
                width = pool.out_dim
            self.widths[OWNER[m]] = self.widths.get(OWNER[m], 0) + width

    def learn_statistics(self, modality: str, values: Tensor, rows: Tensor) -> None:
        """What is fixed before training: of frames (S + 1, D) mean and deviation, of ids how many clips have each.

        `rows` (N + 1, T) says where the clips of the train split lie in `values`.
        """
        front = self.fronts[modality] if modality in self.fronts else None
        if isinstance(front, Bag):
            clips = torch.arange(len(rows))[:, None].expand_as(rows)
            there = rows < len(values) - 1
            pairs = torch.unique(torch.stack([clips[there], values[rows[there]].long()]), dim=1)
            front.set_texts(torch.bincount(pairs[1], minlength=self.sources[modality]["dim"]).float())
        elif math.isfinite(self.limit):
            mean, std = statistics(values[rows[rows < len(values) - 1]])
            if self.one_scale and front is not None:
                std = (std.square().mean() + mean.var(correction=0)).sqrt().expand_as(std)
                mean = mean.mean().expand_as(mean)
            self.set_statistics(modality, mean, std)

    def vectors(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> dict[str, Tensor]:
        """One vector (K, B, D) a clip and modality that x has, of standardised frames (K, B, T, D) or ids (K, B, T)."""
        made: dict[str, list[Tensor]] = {}
        for m in [m for m in self.sources if m in x]:
            vector = self.fronts[m](x[m], mask[m]) if m in self.fronts else x[m][:, :, 0]
            made.setdefault(OWNER[m], []).append(vector)
        return {m: torch.cat(parts, -1) for m, parts in made.items()}


class Clap(Fronts):
    """Fronts, and a linear projector a modality."""

    def __init__(self, cfg: ClapConfig, sources: Sources, seeds: Sequence[int]) -> None:
        super().__init__(sources, cfg.bag_dim, cfg.normalize, len(seeds), cfg.one_scale)
        self.cfg = cfg
        for m, width in self.widths.items():
            self.add_module(f"{m}_proj", Linear(len(seeds), width, cfg.proj_dim))
        self.drop = nn.Dropout(cfg.dropout)
        self.logit_scale = nn.Parameter(torch.zeros(len(seeds)))
        start(self, seeds)
        with torch.no_grad():
            self.logit_scale.fill_(-math.log(cfg.temperature))

    def project(self, modality: str, vectors: Tensor) -> Tensor:
        """Vectors (K, B, D) -> unit vectors (K, B, proj_dim)."""
        return F.normalize(self.drop(self.get_submodule(f"{modality}_proj")(vectors)), dim=-1, eps=1e-8)

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unit vectors (K, B, proj_dim) of each modality."""
        return {m: self.project(m, v) for m, v in self.vectors(x, mask).items()}

    def clamp_scale(self) -> None:
        """Keeps the factor of similarities between 1 and max_scale."""
        with torch.no_grad():
            self.logit_scale.clamp_(0.0, math.log(self.cfg.max_scale))


def info_nce(own: dict[str, Tensor], every: dict[str, Tensor], scripts: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (K,) of a rank's unit vectors `own` (K, b, d) against those of all ranks `every` (K, B, d).

    `scripts` are the clips' scripts (K, b) and (K, B): clips of one script are all right answers for each other, each
    with an equal share of the target. `scale` (K,) multiplies similarities. The sum over ranks is the mean over the B
    clips and both directions (Radford et al., 2021, with the targets of Khosla et al., 2020).
    """
    right = (scripts[0][:, :, None] == scripts[1][:, None]).float()
    right = right / right.sum(-1, keepdim=True)
    factor = scale[:, None, None]
    by_text = factor * (own["text"] @ every["audio"].mT)  # (K, b, B)
    if own["text"] is every["text"]:  # one process: the other direction is the columns of the same products
        ends = by_text.logsumexp(-1) + by_text.logsumexp(-2)
        pulled = (right + right.mT) * by_text
    else:
        by_audio = factor * (own["audio"] @ every["text"].mT)
        ends = by_text.logsumexp(-1) + by_audio.logsumexp(-1)
        pulled = right * (by_text + by_audio)
    return (ends.sum(1) - pulled.sum((1, 2))) / (2 * every["text"].shape[1])


def load(folder: Path, state: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Clap, str]:
    """The projectors of a checkpoint folder whose state.json is `state`, in eval mode; and their coverage."""
    model = Clap(from_dict(ClapConfig, state["config"]["model"]), state["sources"], state["seeds"])
    coverage = checkpoint.load_model(model, folder)
    return model.to(device).eval(), coverage


def original_projectors(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The published projector files, and tools/export.py's: {audio, text: {weight (768, 768), bias (768,)}}.

    Either clap_projectors.pt, {"audio_proj": {...}, "text_proj": {...}}, or the heads and training checkpoints, whose
    names are such as audio_proj.fc.weight; "module." and "fc." are optional. A .safetensors file has these names too.
    """
    found: dict[str, dict[str, Tensor]] = {m: {} for m in MODALITIES}
    for name, value in read_tensors(path, "model_state", nested=True).items():
        parts = [part for part in name.split(".") if part not in ("module", "clap", "fc")]
        modality = parts[0].removesuffix("_proj")
        if modality in found and len(parts) == 2 and parts[1] in ("weight", "bias"):
            found[modality][parts[1]] = value
    for m, part in found.items():
        missing = {"weight", "bias"} - set(part)
        if missing:
            raise UserError(f"{path}: no {m}_proj.{min(missing)}: not a file of CLAP projectors")
        if part["weight"].ndim != 2 or part["bias"].shape != part["weight"].shape[:1]:
            raise UserError(
                f"{path}: {m}_proj has shapes {tuple(part['weight'].shape)} and {tuple(part['bias'].shape)}"
            )
    return found


def load_original(model: Clap, path: str | Path) -> str:
    """The published projectors into every seed of `model`; returns what was loaded."""
    for m, part in original_projectors(path).items():
        projector = model.get_submodule(f"{m}_proj")
        assert isinstance(projector, Linear)
        if projector.weight.shape[1:] != part["weight"].shape:
            ours, theirs = tuple(projector.weight.shape[1:]), tuple(part["weight"].shape)
            raise UserError(f"{path}: {m}_proj is {theirs}, the features and --proj-dim here make it {ours}")
        with torch.no_grad():
            projector.weight.copy_(part["weight"].expand_as(projector.weight))
            projector.bias.copy_(part["bias"].expand_as(projector.bias))
    model.cfg.normalize, model.limit = False, math.inf  # they read embeddings as they are
    return "4/4 tensors of the projectors"


def check_same(model: Clap, path: str) -> None:
    """UserError unless the projectors of a checkpoint or of a published file are those of `model`."""
    if path.endswith(FILES):
        found = {
            f"{m}_proj.{name}": value for m, part in original_projectors(path).items() for name, value in part.items()
        }
    else:
        folder = checkpoint.resolve(path, prefer="best")
        found = {name: p[0] for name, p in read_tensors(folder / checkpoint.MODEL).items() if "_proj." in name}
    own = {name: p[0].flatten() for name, p in [*model.named_parameters(), *model.named_buffers()] if "_proj." in name}
    if not found:
        raise UserError(f"--clap-ckpt {path}: holds no projectors")
    for name, value in found.items():
        here, there = own.get(name, value.new_zeros(0)), value.flatten()
        if here.shape != there.shape or not torch.allclose(here, there, atol=1e-6):
            raise UserError(f"--clap-ckpt {path}: {name} is not the one that the classifier was trained with")
