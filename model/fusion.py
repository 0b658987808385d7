"""Fusion of text, audio and video features to sentiment; K seeds train side by side as a leading dimension.

Every weight is (K, ...) and every input (K, B, ...): one batched product trains K independent models.
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
from common.config import from_dict, opt
from common.weights import check_names, check_shapes, read_tensors
from model.seeds import Layer, Linear, Norm, Standardized, masked_mean, start

SENTIMENTS = (
    "strong_negative", "negative", "weak_negative", "neutral", "weak_positive", "positive", "strong_positive"
)  # fmt: skip
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
# head -> what its outputs are
HEADS: dict[str, tuple[str, ...]] = {
    "7": SENTIMENTS,
    "3": ("negative", "neutral", "positive"),
    "2": ("negative", "positive"),
    "regression": ("sentiment",),
    "emotions": EMOTIONS,
}
# model -> width, dropout and modality dropout where the config leaves them open; mlp's are the guide's
OPEN = {
    "mlp": (256, 0.3, 0.0),
    "xfuse": (128, 0.2, 0.3),
    "tfn": (32, 0.3, 0.1),
    "lmf": (64, 0.3, 0.1),
    "mult": (40, 0.2, 0.1),
}


@dataclass
class FusionConfig:
    model: str = opt("xfuse", "kind of fusion", "--model", choices=tuple(OPEN))
    head: str = opt("7", "classes of sentiment, its score, or six emotions", "--head", choices=tuple(HEADS))
    fusion_dim: int | None = opt(None, "width; default: the model's own", "--fusion-dim")
    layers: int = opt(2, "layers of xfuse and mult", "--layers")
    dropout: float | None = opt(None, "dropout; default: the model's own", "--dropout", share=True)
    modality_dropout: float | None = opt(
        None, "chance that a modality is hidden while training, at least one stays; default: the model's own",
        "--modality-dropout", share=True,
    )  # fmt: skip
    latents: int = opt(8, "tokens that xfuse compresses longer audio and video to")
    rank: int = opt(4, "rank of lmf's factors")
    unimodal: float = opt(0.2, "weight of xfuse's auxiliary loss on each modality alone")
    context: str = opt(
        "none", "video: an utterance is read with those before and after it in its video", "--context",
        choices=("none", "video"),
    )  # fmt: skip
    context_dropout: float = opt(
        0.5, "chance that an utterance is hidden while training with --context, so that those around it must tell",
        share=True,
    )  # fmt: skip
    normalize: bool = opt(True, "standardise by train-split statistics kept in the checkpoint", "--normalize")
    clip_sigma: float = opt(5.0, "standardised values are cut here")

    @property
    def width(self) -> int:
        return OPEN[self.model][0] if self.fusion_dim is None else self.fusion_dim

    @property
    def drop(self) -> float:
        return OPEN[self.model][1] if self.dropout is None else self.dropout

    @property
    def hide(self) -> float:
        return OPEN[self.model][2] if self.modality_dropout is None else self.modality_dropout

    @property
    def hide_whole(self) -> float:
        return self.context_dropout if self.context == "video" else 0.0


class Tokens(nn.Module):
    """Frames of one modality (K, B, T, D) -> tokens of width d; a clip without the modality is one learned token."""

    def __init__(self, k: int, dim: int, width: int, frames: int) -> None:
        super().__init__()
        self.project, self.norm = Linear(k, dim, width), Norm(k, width)
        self.absent = nn.Parameter(torch.zeros(k, 1, 1, width))
        self.places = nn.Parameter(torch.zeros(k, 1, frames, width)) if frames > 1 else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.project(x))
        if self.places is not None:
            h = h + self.places[:, :, : h.shape[2]]
        gone = ~mask.any(-1, keepdim=True)  # (K, B, 1)
        first = torch.arange(mask.shape[-1], device=mask.device) == 0
        return torch.where(gone[..., None], self.absent, h), mask | (gone & first)


class Mlp(nn.Module):
    """The guide's network over the concatenated means; a missing modality is zeros."""

    def __init__(self, k: int, dims: dict[str, int], frames: dict[str, int], cfg: FusionConfig, out: int) -> None:
        super().__init__()
        width = cfg.width
        self.fusion_layers = nn.Sequential(
            Linear(k, sum(dims.values()), width), nn.ReLU(), nn.Dropout(cfg.drop),
            Linear(k, width, width // 2), nn.ReLU(), nn.Dropout(0.65 * cfg.drop),
        )  # fmt: skip
        self.out_dim = width // 2

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.fusion_layers(torch.cat([masked_mean(x[m], mask[m]) for m in x], -1)), {}


class XFuse(nn.Module):
    """Text-led cross-modal transformer: text attends to itself and to a few latents of audio and video."""

    def __init__(self, k: int, dims: dict[str, int], frames: dict[str, int], cfg: FusionConfig, out: int) -> None:
        super().__init__()
        width, self.drop = cfg.width, nn.Dropout(cfg.drop)
        self.tokens = nn.ModuleDict({m: Tokens(k, dims[m], width, frames[m]) for m in dims})
        long = [m for m in dims if m != "text" and frames[m] > cfg.latents]
        self.latents = nn.ParameterDict({m: nn.Parameter(torch.zeros(k, 1, cfg.latents, width)) for m in long})
        self.compress = nn.ModuleDict({m: Layer(k, width, cfg.drop, cross=True) for m in long})
        self.layers = nn.ModuleList(Layer(k, width, cfg.drop, cross=True) for _ in range(cfg.layers))
        self.pool = Linear(k, width, 1)
        self.unimodal = nn.ModuleDict({m: Linear(k, width, out) for m in dims if cfg.unimodal})
        self.mix, self.norm = Linear(k, (width + 1) * len(dims), width), Norm(k, width)
        self.out_dim = width

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present = [mask[m].any(-1)[..., None].to(x[m].dtype) for m in x]
        h: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for m in x:
            h[m], seen[m] = self.tokens[m](x[m], mask[m])
            if m in self.latents:
                latents = self.latents[m].expand(-1, h[m].shape[1], -1, -1)
                h[m] = self.compress[m](latents, seen[m], h[m])
                seen[m] = seen[m].new_ones(h[m].shape[:3])
            h[m] = self.drop(h[m])
        lead = next(iter(x))  # text, unless the data have none
        alone = {m: masked_mean(h[m], seen[m]) for m in x}
        others = [m for m in x if m != lead]
        led, where = h[lead], torch.cat([seen[lead], *(seen[m] for m in others)], -1)
        for layer in self.layers:
            led = layer(led, where, torch.cat([led, *(h[m] for m in others)], 2))
        weight = self.pool(led)[..., 0].masked_fill(~seen[lead], -torch.inf).softmax(-1)  # (K, B, S)
        led = (weight[..., None] * led).sum(2)
        z = self.mix(self.drop(torch.cat([led, *(alone[m] for m in others), *present], -1)))
        return F.gelu(self.norm(z)), {m: head(alone[m]) for m, head in self.unimodal.items()}


class Tfn(nn.Module):
    """Tensor fusion (Zadeh et al., EMNLP 2017): the outer product of the modalities, each with a 1 appended."""

    def __init__(self, k: int, dims: dict[str, int], frames: dict[str, int], cfg: FusionConfig, out: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(cfg.drop)
        sizes = {m: cfg.width if m == "text" else max(4, cfg.width // 4) for m in dims}
        self.project = nn.ModuleDict({m: Linear(k, dims[m], sizes[m]) for m in dims})
        self.mix = Linear(k, math.prod(size + 1 for size in sizes.values()), 2 * cfg.width)
        self.out_dim = 2 * cfg.width

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        product = None
        for m in x:
            h = F.pad(self.drop(F.relu(self.project[m](masked_mean(x[m], mask[m])))), (0, 1), value=1.0)
            product = h if product is None else (product[..., None] * h[..., None, :]).flatten(2)
        assert product is not None
        return F.relu(self.mix(self.drop(product))), {}


class Lmf(nn.Module):
    """Low-rank fusion (Liu et al., ACL 2018): tensor fusion whose weight is a sum of `rank` products of factors."""

    def __init__(self, k: int, dims: dict[str, int], frames: dict[str, int], cfg: FusionConfig, out: int) -> None:
        super().__init__()
        self.rank, self.drop = cfg.rank, nn.Dropout(cfg.drop)
        self.project = nn.ModuleDict({m: Linear(k, dims[m], cfg.width) for m in dims})
        self.factors = nn.ModuleDict({m: Linear(k, cfg.width + 1, cfg.rank * cfg.width) for m in dims})
        self.mix = Linear(k, cfg.width, cfg.width)
        self.out_dim = cfg.width

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        product = None
        for m in x:
            h = F.pad(self.drop(F.relu(self.project[m](masked_mean(x[m], mask[m])))), (0, 1), value=1.0)
            h = self.factors[m](h).unflatten(-1, (self.rank, -1))  # (K, B, rank, d)
            product = h if product is None else product * h
        assert product is not None
        return F.relu(self.mix(self.drop(product.sum(2)))), {}


class MulT(nn.Module):
    """Crossmodal transformers (Tsai et al., ACL 2019) in every direction, with padding masked and pooled out."""

    def __init__(self, k: int, dims: dict[str, int], frames: dict[str, int], cfg: FusionConfig, out: int) -> None:
        super().__init__()
        width, n = cfg.width, len(dims)
        self.tokens = nn.ModuleDict({m: Tokens(k, dims[m], width, frames[m]) for m in dims})
        pairs = [f"{a}_{b}" for a in dims for b in dims if a != b]
        self.cross = nn.ModuleDict(
            {p: nn.ModuleList(Layer(k, width, cfg.drop, cross=True) for _ in range(cfg.layers)) for p in pairs}
        )
        self.memory = nn.ModuleDict({m: Layer(k, max(1, n - 1) * width, cfg.drop) for m in dims})
        self.drop = nn.Dropout(cfg.drop)
        total = n * max(1, n - 1) * width
        self.up, self.down = Linear(k, total, total), Linear(k, total, total)
        self.out_dim = total

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = {m: self.tokens[m](x[m], mask[m]) for m in x}
        pooled = []
        for a, (h, seen) in tokens.items():
            reads = []
            for b, (other, other_seen) in tokens.items():
                led = h
                if b != a:
                    layers = self.cross[f"{a}_{b}"]
                    assert isinstance(layers, nn.ModuleList)
                    for layer in layers:
                        led = layer(led, other_seen, other)
                reads += [led] if b != a or len(tokens) == 1 else []
            pooled.append(masked_mean(self.memory[a](torch.cat(reads, -1), seen), seen))
        z = torch.cat(pooled, -1)
        return z + self.down(self.drop(F.relu(self.up(z)))), {}


class Context(nn.Module):
    """What the utterances of a video (K, V, U, d) hear of each other: gated means of those before, and of those after.

    h_t = (1 - g_t) h_{t-1} + g_t v_t, gate and value of utterance t alone (minGRU: Feng et al., arXiv 2410.01201), half
    of the width in each direction. No gate waits for a state, so seven doublings compute all utterances at once.
    """

    SPANS = (1, 2, 4, 8, 16, 32, 64)  # utterances up to 127 away are heard

    def __init__(self, k: int, width: int, dropout: float) -> None:
        super().__init__()
        self.gate, self.value, self.drop = Linear(k, width, width), Linear(k, width, width), nn.Dropout(dropout)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z, size = self.drop(z), z.shape[2]
        gate = self.gate(z).sigmoid() * mask[..., None]  # what is not there lets everything through
        heard, kept = _turned(gate * self.value(z)), _turned(1 - gate)
        for span in self.SPANS:
            heard = heard + kept * F.pad(heard, (0, 0, span, 0))[:, :, :size]
            kept = kept * F.pad(kept, (0, 0, span, 0))[:, :, :size]
        return _turned(heard).tanh()


def _turned(x: Tensor) -> Tensor:
    """x (K, V, U, d) with the second half of d from the last utterance to the first."""
    forward, backward = x.tensor_split(2, -1)
    return torch.cat([forward, backward.flip(2)], -1)


KINDS: dict[str, Any] = {"mlp": Mlp, "xfuse": XFuse, "tfn": Tfn, "lmf": Lmf, "mult": MulT}


class Fusion(Standardized):
    """Standardisation, one of the fusions above, the video's context if asked for, and the head.

    `dims` and `frames` are width and longest sequence of each modality the data have.
    """

    def __init__(self, cfg: FusionConfig, dims: dict[str, int], frames: dict[str, int], seeds: Sequence[int]) -> None:
        super().__init__(dims, cfg.clip_sigma if cfg.normalize else math.inf)
        k, out = len(seeds), len(HEADS[cfg.head])
        self.cfg, self.dims, self.frames = cfg, dims, frames
        self.core = KINDS[cfg.model](k, dims, frames, cfg, out)
        self.context = Context(k, self.core.out_dim, cfg.drop) if cfg.context == "video" else None
        self.drop = nn.Dropout(cfg.drop if cfg.model != "mlp" else 0.0)  # mlp has its own
        self.classifier = Linear(k, self.core.out_dim, out)
        start(self, seeds)

    def logits(
        self, x: dict[str, Tensor], mask: dict[str, Tensor], videos: tuple[int, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (K, B, C), and xfuse's of each modality alone, of standardised frames (K, B, T, D) and masks.

        `videos` = (U, (K, B / U, U)): utterances come U to a video, where the mask holds.
        """
        z, alone = self.core(x, mask)
        if self.context is not None:
            size, there = videos if videos is not None else (1, z.new_ones(*z.shape[:2], 1, dtype=torch.bool))
            z = self.context(z.unflatten(1, (-1, size)), there).flatten(1, 2)
        return self.classifier(self.drop(z)), alone

    def forward(self, *features: Tensor | None) -> Tensor:
        """Raw (B, D) or (B, T, D) of text, audio and video -> logits (B, C), for K > 1 seeds (K, B, C).

        A modality that is None, or all zeros for a clip, is absent. With context all rows are one video, in order.
        """
        given = {m: x for m, x in zip(self.dims, features, strict=True) if x is not None}
        some = next(iter(given.values()))
        k = len(self.classifier.weight)
        x: dict[str, Tensor] = {}
        mask: dict[str, Tensor] = {}
        for m, dim in self.dims.items():
            value = given.get(m, some.new_zeros(some.shape[0], dim))
            value = value[:, None] if value.ndim == 2 else value
            standard, there = (part[:, : self.frames[m]] for part in _in_front(*self.standardize(m, value)))
            x[m], mask[m] = standard.expand(k, -1, -1, -1), there.expand(k, -1, -1)
        n = some.shape[0]  # not len(), which torch.export would take for a constant
        whole = (n, torch.ones(k, 1, n, dtype=torch.bool, device=some.device))
        out = self.logits(x, mask, whole if self.context is not None else None)[0]
        return out[0] if k == 1 else out


def _in_front(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Frames (B, T, D) and mask (B, T) turned so that each row's first frame is in place 0, as in training."""
    t = mask.shape[1]
    turn = (torch.arange(t, device=mask.device) + mask.int().argmax(1, keepdim=True)) % t
    return x.gather(1, turn[..., None].expand_as(x)), mask.gather(1, turn)


def probabilities(logits: Tensor, head: str) -> Tensor:
    """(..., C) probabilities of classes or of each emotion; a regression's score as it is."""
    if head == "regression":
        return logits
    return logits.sigmoid() if head == "emotions" else logits.softmax(-1)


def scores(logits: Tensor, head: str) -> Tensor:
    """Sentiment in [-3, 3] (...,): the regression's output, or the classes' expectation."""
    if head == "regression":
        return logits[..., 0]
    values = {"7": (-3, -2, -1, 0, 1, 2, 3), "3": (-1, 0, 1), "2": (-1, 1)}[head]
    return logits.softmax(-1) @ logits.new_tensor(values)


def known(target: Tensor) -> Tensor:
    """Where there is a target: a class index of 0 and up, or a score or set of emotions that is a number."""
    if not target.is_floating_point():
        return target >= 0
    return target.isfinite() if target.ndim < 3 else target.isfinite().all(-1)


def losses(logits: Tensor, target: Tensor, head: str, weight: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """Loss of each row (K, B), 0 where there is no target: cross entropy, smooth L1, mean binary cross entropy.

    `target` is (K, B) class indices or scores, or (K, B, 6) presence of emotions; `weight` holds the classes' weights,
    for emotions the positives'.
    """
    if head not in ("regression", "emotions"):
        each = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), weight, ignore_index=-1, reduction="none", label_smoothing=smoothing
        )  # fmt: skip
        return each.view(target.shape)
    there = known(target)
    target = torch.where(there if target.ndim < 3 else there[..., None], target, 0)
    if head == "regression":
        return F.smooth_l1_loss(logits[..., 0], target, reduction="none") * there
    each = F.binary_cross_entropy_with_logits(logits, target, weight=None, pos_weight=weight, reduction="none")
    return each.mean(-1) * there


def load(folder: Path, state: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Fusion, str]:
    """The model of a checkpoint folder whose state.json is `state`, all its seeds, in eval mode; and its coverage."""
    cfg = from_dict(FusionConfig, state["config"]["model"])
    model = Fusion(cfg, state["dims"], state["frames"], state["seeds"])
    coverage = checkpoint.load_model(model, folder)
    return model.to(device).eval(), coverage


def one_seed(model: Fusion, k: int) -> Fusion:
    """A model of its own with the weights of seed k."""
    single = Fusion(model.cfg, model.dims, model.frames, [0]).to(model.classifier.weight.device)
    with torch.no_grad():
        for p, whole in zip(single.parameters(), model.parameters(), strict=True):
            p.copy_(whole[k : k + 1])
        for buffer, same in zip(single.buffers(), model.buffers(), strict=True):
            buffer.copy_(same)
    return single.train(model.training)


def load_original(model: Fusion, path: str) -> str:
    """The weights of the training guide's best_model.pth into every seed of an mlp; returns what was loaded."""
    tensors = read_tensors(path, "model_state_dict")
    own = {name: p for name, p in model.named_parameters()}
    wanted = {name.removeprefix("core."): p for name, p in own.items()}
    check_names(path, wanted, tensors)
    check_shapes(path, {n: p[0, 0] if n.endswith("bias") else p[0] for n, p in wanted.items()},
                 {n: tuple(x.shape) for n, x in tensors.items()})  # fmt: skip
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(tensors[name].expand_as(p))
    model.cfg.normalize, model.limit = False, math.inf  # the guide's network reads features as they are
    return f"{len(tensors)}/{len(wanted)} tensors"
