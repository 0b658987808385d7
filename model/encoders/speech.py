"""The network of wav2vec 2.0 and HuBERT: convolutions over the waveform, then a transformer; 50 states a second."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import find_weights, read_folder, read_json
from model.encoders import Encoder, portable, sha256
from model.encoders.transformer import (
    ACTIVATIONS,
    Block,
    cast,
    hidden_states,
    load_renamed,
    mix,
    read_config,
    read_layers,
)

PREFIX = r"(?:(?:hubert|wav2vec2)\.)?"  # fine-tuned models put the network under its name
CONVS, LAYERS = PREFIX + r"feature_extractor\.conv_layers\.(\d+)\.", PREFIX + r"encoder\.layers\.(\d+)\."
RULES = [
    (CONVS + r"conv\.(.*)", r"convs.\1.conv.\2"),
    (CONVS + r"layer_norm\.(.*)", r"convs.\1.norm.\2"),
    (PREFIX + r"feature_projection\.layer_norm\.(.*)", r"project.0.\1"),
    (PREFIX + r"feature_projection\.projection\.(.*)", r"project.1.\1"),
    (PREFIX + r"encoder\.pos_conv_embed\.conv\.(.*)", r"position.\1"),
    (PREFIX + r"encoder\.layer_norm\.(.*)", r"norm.\1"),
    (LAYERS + r"attention\.(q|k|v|out)_proj\.(.*)", r"blocks.\1.attention.\2.\3"),
    (LAYERS + r"layer_norm\.(.*)", r"blocks.\1.norm1.\2"),
    (LAYERS + r"feed_forward\.intermediate_dense\.(.*)", r"blocks.\1.fc1.\2"),
    (LAYERS + r"feed_forward\.output_dense\.(.*)", r"blocks.\1.fc2.\2"),
    (LAYERS + r"final_layer_norm\.(.*)", r"blocks.\1.norm2.\2"),
]
HEADS = (
    PREFIX + r"masked_spec_embed",
    r"(?:lm_head|projector|classifier|quantizer|project_q|project_hid)\..*",
    r"layer_weights",
)
WEIGHT_NORMS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


@dataclass
class SpeechConfig:
    """The shape of a network, by the field names of its config.json; the defaults are those of the base models."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False

    @classmethod
    def from_json(cls, file: Path, kind: str) -> "SpeechConfig":
        """From the config.json of a model of this kind. UserError on what this network does not compute."""
        allowed = {
            "hidden_act": ("gelu", *ACTIVATIONS),
            "feat_extract_activation": ("gelu", *ACTIVATIONS),
            "feat_extract_norm": ("group", "layer"),
            "conv_pos_batch_norm": (False,),
            "add_adapter": (False,),
            "adapter_attn_dim": (None,),
        }
        config = cls(**read_config(file, kind, cls.__dataclass_fields__, allowed))
        sizes = [len(each) for each in (config.conv_dim, config.conv_kernel, config.conv_stride)]
        if len({*sizes}) > 1 or not sizes[0]:
            raise UserError(f"{file}: conv_dim, conv_kernel and conv_stride have {sizes} layers")
        return config


class Conv(nn.Module):
    """One convolution over time and its norm: over each clip's frames (group), each frame's channels (layer), or none.

    (B, C, T) -> (B, C', T'); `counts` (B,) are the clips' own frames among T', all of them where None.
    """

    def __init__(self, config: SpeechConfig, number: int) -> None:
        super().__init__()
        width = config.conv_dim[number]
        sizes = (config.conv_dim[number - 1] if number else 1, width, config.conv_kernel[number])
        self.conv = nn.Conv1d(*sizes, config.conv_stride[number], bias=config.conv_bias)
        self.norm = None
        if config.feat_extract_norm == "layer":
            self.norm = nn.LayerNorm(width)
        elif number == 0:
            self.norm = nn.GroupNorm(width, width)
        self.act = ACTIVATIONS[config.feat_extract_activation]

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        x = self.conv(x.to(self.conv.weight.dtype))
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.transpose(1, 2).float()).transpose(1, 2)
        elif self.norm is not None and counts is None:
            x = self.norm(x.float())
        elif self.norm is not None and counts is not None:
            x = x.float()
            for i, count in enumerate(counts.tolist()):  # what follows a clip must not count in its mean and variance
                x[i, :, :count] = self.norm(x[i : i + 1, :, :count])[0]
        return self.act(x)


class PositionalConv(nn.Conv1d):
    """A wide convolution of x (B, T, D), zero around each clip, that tells frames from their place -> (B, T, D)."""

    def __init__(self, width: int, kernel: int, groups: int, act: str = "gelu") -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=groups)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x.transpose(1, 2).to(self.weight.dtype))
        return self.act(found[..., : x.shape[1]]).transpose(1, 2)  # an even kernel gives a frame too many


class SpeechNet(nn.Module):
    """Waveforms (B, S) -> hidden states (B, T, D)."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.convs = nn.ModuleList(Conv(config, number) for number in range(len(config.conv_dim)))
        features = config.conv_dim[-1]
        normed = config.feat_proj_layer_norm
        self.project = nn.Sequential(
            nn.LayerNorm(features, config.layer_norm_eps) if normed else nn.Identity(), nn.Linear(features, width)
        )
        kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        self.position = PositionalConv(width, kernel, groups, config.feat_extract_activation)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        shape = (width, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps, config.hidden_act)
        self.blocks = nn.ModuleList(
            Block(*shape, pre=config.do_stable_layer_norm) for _ in range(config.num_hidden_layers)
        )
        hops = accumulate(config.conv_stride[:-1], mul, initial=1)  # samples between the inputs of each convolution
        self.window = 1 + sum((kernel - 1) * hop for kernel, hop in zip(config.conv_kernel, hops, strict=True))

    def counts(self, samples: Tensor) -> list[Tensor]:
        """After each convolution, the frames of clips that have so many samples, at least a window's."""
        found = [samples.clamp_min(self.window)]
        for kernel, hop in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            found.append((found[-1] - kernel) // hop + 1)
        return found[1:]

    def states(self, x: Tensor, samples: Tensor | None = None) -> Iterator[Tensor]:
        """Hidden states of clips that have so many samples (B,), or all of x; a frame after a clip's last is noise."""
        x = F.pad(x, (0, max(self.window - x.shape[1], 0)))[:, None]
        counts = [None] * len(self.convs) if samples is None else self.counts(samples)
        for conv, count in zip(self.convs, counts, strict=True):
            x = conv(x, count)
        norm, linear = self.project
        x = linear(norm(x.transpose(1, 2).float()).to(linear.weight.dtype)).float()
        inside = None if counts[-1] is None else torch.arange(x.shape[1], device=x.device) < counts[-1][:, None]
        if inside is not None:
            x = x * inside[..., None]
        x = x + self.position(x)
        if self.config.do_stable_layer_norm:
            return hidden_states(self.blocks, x, inside, norm=self.norm)
        return hidden_states(self.blocks, self.norm(x), inside)


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every pair of gain and direction, under either of torch's names for them, as one weight."""
    found = dict(tensors)
    for gain, direction in WEIGHT_NORMS:
        for stem in [name.removesuffix(gain) for name in found if name.endswith(gain)]:
            if stem + direction in found:
                g, v = found.pop(stem + gain).float(), found.pop(stem + direction).float()
                dims = [dim for dim, size in enumerate(g.shape) if size == 1]
                found[f"{stem}.weight"] = v * (g / v.norm(dim=dims, keepdim=True))
    return found


class Speech(Encoder):
    """Waveform at 16 kHz -> states of 50 frames a second; a clip shorter than a frame's 25 ms ends in silence.

    `layer` is last, last4 (the sum of the last four), one of the hidden states from 0, or the mean of a span such as
    4-10; `dtype` is what products are made in, fp32 or bf16; `seconds` are what is heard of a longer clip.
    """

    modality, batched = "audio", True
    sample_rate = 16000
    poolings = ("mean", "frames")

    def __init__(self, folder: str, layer: str = "last", dtype: str = "fp32", seconds: float | None = None) -> None:
        found = find_weights(folder, f"{self.name} weights")
        super().__init__(folder=portable(folder, found), layer=layer, dtype=dtype, seconds=seconds)
        if seconds is not None and not seconds > 0:
            raise UserError(f"{self.name}: seconds {seconds:g} is not above 0")
        config = SpeechConfig.from_json(found / "config.json", self.name)
        self.dim = config.hidden_size
        self.layers = read_layers(layer, config.num_hidden_layers, self.name)
        self.samples = None if seconds is None else round(seconds * self.sample_rate)
        self.normalize = _normalizes(found / "preprocessor_config.json", self.sample_rate)
        with torch.device("meta"):
            self.net = SpeechNet(config)
        self.coverage = load_renamed(self.net, fold_weight_norm(read_folder(found)), RULES, found, HEADS)
        cast(self.net, dtype, self.name)
        self.net.convs[0].float()  # for norms make what rounding adds to a waveform as loud as its quiet bands
        self.preprocessing = f"{self.name}: 16 kHz" + (", zero mean and unit variance a clip" * self.normalize)
        self.weights_sha256 = sha256(found, "config.json", "preprocessor_config.json")

    def prepare(self, x: Tensor) -> Tensor:
        """A waveform (S,) as the model was trained on it."""
        x = x[: self.samples]
        return (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt() if self.normalize else x

    def lengths(self, samples: Tensor) -> Tensor:
        """Frames of clips that have so many samples; the shortest clip has one."""
        return self.net.counts(samples)[-1]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prepared waveforms (B, S), mask (B, S) of their own samples -> (B, T, dim), zero after each clip's last."""
        if mask is None or mask.all():
            return mix(self.net.states(x), self.layers)
        samples = mask.sum(1)
        x = mix(self.net.states(x * mask, samples), self.layers)
        return x * (torch.arange(x.shape[1], device=x.device) < self.lengths(samples)[:, None])[..., None]


def _normalizes(file: Path, rate: int) -> bool:
    """Whether clips are brought to zero mean and unit variance, as they are where no file says otherwise."""
    given = read_json(file) if file.is_file() else {}
    if given.get("sampling_rate", rate) != rate:
        raise UserError(f"{file}: sampling_rate {given['sampling_rate']} is not supported (only {rate})")
    return bool(given.get("do_normalize", True))
