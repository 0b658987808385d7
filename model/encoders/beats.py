"""BEATs, an audio transformer over patches of a spectrogram: sound events as well as voices, 50 states a second."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import full_sha256, locate, read_state, read_tensors, weight_files
from model.encoders import Encoder, portable
from model.encoders.speech import PositionalConv, fold_weight_norm
from model.encoders.transformer import (
    Attention,
    Block,
    cast,
    check_config,
    hidden_states,
    load_renamed,
    mix,
    read_layers,
)

MELS, WINDOW, HOP = 128, 400, 160  # 25 ms windows every 10 ms
MEAN, DEVIATION = 15.41663, 6.55582  # of the log mel energies that it was trained on
PUBLISHED = "audio_tower.bin"  # VideoLLaMA2's file
TOWER = "audio_tower."  # before the names of a BEATs inside VideoLLaMA2

LAYER = r"encoder\.layers\.(\d+)\."
RULES = [
    (r"patch_embedding\.(.*)", r"patches.\1"),
    (r"layer_norm\.(.*)", r"project.0.\1"),
    (r"post_extract_proj\.(.*)", r"project.1.\1"),
    (r"encoder\.pos_conv\.0\.(.*)", r"position.\1"),
    (r"encoder\.layer_norm\.(.*)", r"norm.\1"),
    (r"encoder\.layers\.0\.self_attn\.relative_attention_bias\.(.*)", r"relative.\1"),
    (LAYER + r"self_attn\.(q|k|v|out)_proj\.(.*)", r"blocks.\1.attention.\2.\3"),
    (LAYER + r"self_attn\.(grep_linear\..*|grep_a)", r"blocks.\1.attention.\2"),
    (LAYER + r"self_attn_layer_norm\.(.*)", r"blocks.\1.norm1.\2"),
    (LAYER + r"(fc[12]\..*)", r"blocks.\1.\2"),
    (LAYER + r"final_layer_norm\.(.*)", r"blocks.\1.norm2.\2"),
]
# a classifier of AudioSet, and the first layer's table as the others repeat it
UNUSED = (r"predictor\..*", r"encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight")


@dataclass
class BeatsConfig:
    """The shape of a BEATs; the defaults are those of all that are published."""

    patch: int = 16
    features: int = 512
    width: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    kernel: int = 128
    groups: int = 16
    buckets: int = 320
    distance: int = 800

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], distance: int, where: Path) -> "BeatsConfig":
        """The shape that tensors under their published names have."""
        first = "encoder.layers.0."
        names = (
            "patch_embedding.weight",
            "encoder.pos_conv.0.weight",
            f"{first}fc1.weight",
            f"{first}self_attn.grep_a",
            f"{first}self_attn.relative_attention_bias.weight",
        )
        for name in names:
            if name not in tensors:
                raise UserError(f"{where}: not a BEATs: no {name} in {', '.join(list(tensors)[:3])}, ...")
        patches, position, fc1, gate, table = (tensors[name].shape for name in names)
        layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
        groups = position[0] // position[1]
        sizes = (patches[-1], patches[0], fc1[1], fc1[0], layers, gate[1], position[2], groups)
        return cls(*sizes, buckets=table[0], distance=distance)


class GatedAttention(Attention):
    """Attention whose queries say how much of the bias of places they take."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def gate(self, q: Tensor, bias: Tensor) -> Tensor:
        a, b = self.grep_linear(q).float().unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid().unbind(-2)
        return (a * (b * self.grep_a - 1) + 2) * bias


class BeatsNet(nn.Module):
    """Normed spectrograms (B, F, 128) -> hidden states (B, T, D) of their patches, eight bands each 160 ms."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patches = nn.Conv2d(1, config.features, config.patch, config.patch, bias=False)
        self.project = nn.Sequential(nn.LayerNorm(config.features), nn.Linear(config.features, width))
        self.position = PositionalConv(width, config.kernel, config.groups)
        self.norm = nn.LayerNorm(width)
        self.relative = nn.Embedding(config.buckets, config.heads)
        alpha = (2 * config.layers) ** 0.25
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.inner, 1e-5, pre=False, alpha=alpha) for _ in range(config.layers)
        )
        for block in self.blocks:
            block.attention = GatedAttention(width, config.heads)

    def lengths(self, frames: Tensor) -> Tensor:
        """Patches of spectrograms of so many frames; frames at the end that fill no patch are not read."""
        return frames // self.config.patch * (MELS // self.config.patch)

    def states(self, x: Tensor, inside: Tensor | None = None) -> Iterator[Tensor]:
        """Hidden states, which see only the patches `inside` (B, T)."""
        x = self.patches(x[:, None].to(self.patches.weight.dtype))  # (B, features, time, 8)
        norm, linear = self.project
        x = linear(norm(x.flatten(2).transpose(1, 2).float()).to(linear.weight.dtype)).float()
        if inside is not None:
            x = x * inside[..., None]
        x = self.norm(x + self.position(x))
        return hidden_states(self.blocks, x, inside, self.bias(x.shape[1]))

    def bias(self, length: int) -> Tensor:
        """What attention adds to its logits for keys before and after a query (1, heads, T, T)."""
        places = torch.arange(length, device=self.relative.weight.device)
        offsets = torch.arange(1 - length, length, device=places.device)  # key less query
        values = self.relative(buckets(offsets, self.config.buckets, self.config.distance))  # (2 T - 1, heads)
        return values.T[:, places - places[:, None] + length - 1][None]


def buckets(offsets: Tensor, count: int, most: int) -> Tensor:
    """Numbers of offsets: half of them for either direction, one each for the near half, then logarithmic to `most`."""
    half = count // 2
    near, size = half // 2, offsets.abs()
    far = (size.clamp_min(1).float() / near).log() / math.log(most / near) * (half - near)
    return half * (offsets > 0) + torch.where(size < near, size, (near + far.long()).clamp_max(half - 1))


class Beats(Encoder):
    """Waveform at 16 kHz -> states of patches of 160 ms by 16 mel bands, in time, the eight bands of a time together.

    A clip shorter than a patch ends in silence; what fills no patch at the end of a longer one is not heard. `layer`
    and `dtype` are as for HuBERT. The folder holds Microsoft's .pt or VideoLLaMA2's audio_tower.bin, or is that file.
    """

    name, modality, batched = "beats", "audio", True
    hub = "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"
    sample_rate = 16000
    poolings = ("mean", "frames")
    preprocessing = "beats: 16 kHz, 128 log mel energies of 25 ms every 10 ms, less 15.41663, over 13.11164"

    def __init__(self, folder: str, layer: str = "last", dtype: str = "fp32") -> None:
        found = locate(folder, "beats weights")
        super().__init__(folder=portable(folder, found), layer=layer, dtype=dtype)
        file = _file(found)
        tensors, distance = _read(file)
        config = BeatsConfig.of(tensors, distance, file)
        self.dim = config.width
        self.layers = read_layers(layer, config.layers, self.name)
        with torch.device("meta"):
            self.net = BeatsNet(config)
        self.coverage = load_renamed(self.net, tensors, RULES, file, UNUSED)
        cast(self.net, dtype, self.name)
        self.least = WINDOW + (config.patch - 1) * HOP
        self.weights_sha256 = full_sha256(file)

    def prepare(self, x: Tensor) -> Tensor:
        """A waveform (S,) -> its normed spectrogram (F, 128), of one patch at least."""
        from torchaudio.compliance.kaldi import fbank

        x = F.pad(x, (0, max(self.least - len(x), 0)))
        mels = fbank(x[None] * 2**15, num_mel_bins=MELS, dither=0.0, window_type="povey")
        return (mels - MEAN) / (2 * DEVIATION)

    def lengths(self, frames: Tensor) -> Tensor:
        """Rows of clips whose spectrograms have so many frames."""
        return self.net.lengths(frames)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prepared clips (B, F, 128), mask (B, F) of their own frames -> (B, T, dim), zero after each clip's last."""
        if mask is None or mask.all():
            return mix(self.net.states(x), self.layers)
        rows = self.lengths(mask.sum(1))
        inside = torch.arange(int(self.lengths(torch.tensor(x.shape[1]))), device=x.device) < rows[:, None]
        return mix(self.net.states(x * mask[..., None], inside), self.layers) * inside[..., None]


def _file(place: Path) -> Path:
    """The file itself, VideoLLaMA2's in a folder, whose language model may lie beside it, or the only one there."""
    if (place / PUBLISHED).is_file():
        return place / PUBLISHED
    files = list(weight_files(place))
    if len(files) != 1:
        names = ", ".join(path.name for path in files[:3]) or "none"
        raise UserError(f"{place}: holds not one weight file of a BEATs but {len(files)}: {names}")
    return files[0]


def _read(file: Path) -> tuple[dict[str, Tensor], int]:
    """A file's tensors under their published names, weight norm folded, and how far its relative positions reach."""
    config: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        tensors = read_tensors(file)
    else:
        state = read_state(file)
        if not isinstance(state, dict):
            raise UserError(f"{file}: holds a {type(state).__name__}, not tensors by name")
        config, tensors = state.get("cfg", {}), state.get("model", state)
    inside = {name.partition(TOWER)[2]: tensor for name, tensor in tensors.items() if TOWER in name}
    published: dict[str, tuple[Any, ...]] = {
        "layer_norm_first": (False,), "deep_norm": (True,), "activation_fn": ("gelu",), "conv_bias": (False,),
        "relative_position_embedding": (True,), "gru_rel_pos": (True,),
    }  # fmt: skip
    check_config(file, config, published)
    return fold_weight_norm(inside or tensors), config.get("max_distance", BeatsConfig.distance)
