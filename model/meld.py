"""Heads that turn stage 3's classifier, or vectors of sound and words, into MELD's seven emotions (stage 4).

K seeds side by side as in model/seeds.py.
"""

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
from model.clap import Fronts, Sources
from model.dialogue import Turns
from model.seeds import Linear, Norm, start
from model.slm import BLOCKS, Slm, SlmConfig, freeze, spread


@dataclass
class MeldConfig:
    mode: str = opt(
        "A", "A: a network over stage 3's features; B: a linear layer over its class scores", "--mode",
        choices=("A", "B"),
    )  # fmt: skip
    finetune: bool = opt(False, "train stage 3's classifier too, not only the head", "--finetune")
    hidden_dim: int = opt(
        1024, "width of the head's hidden layer; 0: hashed words speak for classes themselves", "--hidden-dim"
    )
    dropout: float = opt(0.2, "dropout before the last layer", "--dropout", share=True)
    context: int = opt(0, "utterances before this one whose emotions, as far as told, are weighed in", "--context")
    bag_dim: int = opt(16, "width that hashed words are embedded to")


@dataclass
class Before:
    """The P utterances before each of (K, B), laid out as more utterances (K, B * P), latest first."""

    x: dict[str, Tensor]
    mask: dict[str, Tensor]
    there: Tensor  # (K, B, P)
    same: Tensor  # (K, B, P) whether they are by the same speaker


class Meld(nn.Module):
    """Stage 3's classifier of `classes` classes, or without it the vectors of sound and words themselves; and a head.

    Features that do not train can be made once, by features(), and given instead as x["features"] (K, B, 1, F).
    """

    def __init__(
        self, cfg: MeldConfig, sources: Sources, labels: int, seeds: Sequence[int], stage3: SlmConfig | None = None,
        classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        k = len(seeds)
        self.cfg = cfg
        self.backbone: Slm | Fronts
        if stage3 is None:
            if cfg.mode == "B":
                raise UserError("--mode B reads stage 3's class scores: --stage3-ckpt names its checkpoint")
            self.backbone = Fronts(sources, cfg.bag_dim if cfg.hidden_dim else labels, True, k)
            if not cfg.hidden_dim:
                if self.backbone.dense:
                    raise UserError(f"--hidden-dim 0 reads hashed words only, and {self.backbone.dense[0]} is vectors")
                for front in self.backbone.fronts.values():
                    assert isinstance(front, Bag)
                    front.evenly()
            width = sum(self.backbone.widths.values())
        else:
            self.backbone = Slm(stage3, sources, classes, seeds if cfg.finetune else seeds[:1])
            width = BLOCKS * stage3.clap.proj_dim
        if cfg.mode == "B":
            self.adapter = Linear(k, classes, labels)
        elif not cfg.hidden_dim:
            if stage3 is not None:
                raise UserError("--hidden-dim 0 is for hashed words without stage 3")
            self.meld_head = nn.Identity()
        else:
            # the published head begins with a norm; a bag of few words shall stay shorter than one of many
            self.meld_head = nn.Sequential(
                nn.Identity() if stage3 is None else Norm(k, width), Linear(k, width, cfg.hidden_dim), nn.SiLU(),
                nn.Dropout(cfg.dropout), Linear(k, cfg.hidden_dim, labels),
            )  # fmt: skip
        self.turns = Turns(k, labels, cfg.context) if cfg.context else None
        if self.frozen:
            freeze(self.backbone)
            self.backbone.eval()
        start(self, seeds)  # after that: the frozen backbone has one seed

    @property
    def frozen(self) -> bool:
        """Whether everything before the head stays as it is."""
        return isinstance(self.backbone, Slm) and not self.cfg.finetune

    @property
    def fronts(self) -> Fronts:
        """What standardises the features that the model reads."""
        return self.backbone.clap if isinstance(self.backbone, Slm) else self.backbone

    def train(self, mode: bool = True) -> "Meld":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        """(K, B, F) what the head reads."""
        if isinstance(self.backbone, Fronts):
            vectors = self.backbone.vectors(x, mask)
            return torch.cat([v * mask[m].any(-1, keepdim=True) for m, v in vectors.items()], -1)
        shape = next(iter(mask.values())).shape[:2]
        if not self.cfg.finetune:  # one backbone for all seeds
            x, mask = ({m: part.flatten(0, 1)[None] for m, part in half.items()} for half in (x, mask))
        if self.cfg.mode == "B":
            features = F.normalize(self.backbone(x, mask), dim=-1, eps=1e-6)
        else:
            features = self.backbone.features(x, mask)
        return features.view(*shape, -1)

    def own(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        """Logits (K, B, labels) of utterances by themselves."""
        features = x["features"][:, :, 0] if "features" in x else self.features(x, mask)
        return self.adapter(features) if self.cfg.mode == "B" else self.meld_head(features)

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor], before: Before | None = None) -> Tensor:
        """Logits (K, B, labels), in the light of what was said before where it is given."""
        logits = self.own(x, mask)
        if self.turns is None or before is None:
            return logits
        with torch.no_grad():
            said = self.own(before.x, before.mask).unflatten(1, before.there.shape[1:])
        return self.turns(logits, said, before.there, before.same)


def load(folder: Path, state: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Meld, str]:
    """The model of a checkpoint folder whose state.json is `state`, in eval mode; and its coverage."""
    cfg = from_dict(MeldConfig, state["config"]["model"])
    stage3 = state["stage3"] and from_dict(SlmConfig, state["stage3"])
    model = Meld(cfg, state["sources"], len(state["labels"]), state["seeds"], stage3, state["classes"])
    coverage = checkpoint.load_model(model, folder)
    return model.to(device).eval(), coverage


def load_original(model: Meld, path: str | Path) -> str:
    """A published head of stage 4 (meld_slm_A_best.pt, meld_slm_B_best.pt) into every seed; returns what was loaded."""
    name = "adapter" if model.cfg.mode == "B" else "meld_head"
    own = {f"{name}.{inner}": p for inner, p in model.get_submodule(name).named_parameters()}
    own = {"meld_head.0.weight" if inner == "meld_head.0.scale" else inner: p for inner, p in own.items()}
    return spread(own, path, read_tensors(path, "trainable_state", nested=True), "tensors of the head")
