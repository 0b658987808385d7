"""The vision transformer that picture and film encoders share; each family's module shows what differs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import UserError
from common.weights import full_sha256, locate, read_folder, read_tensors, weight_files
from model.encoders import Encoder, pictures, portable, sha256
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

# names in the files of transformers' ViT models, of its CLIP models, and of the authors of MAE, VideoMAE and EVA
PREFIX = r"(?:vit\.|videomae\.)?"
LAYER = PREFIX + r"encoder\.layer\.(\d+)\."
VIT = (
    (PREFIX + r"embeddings\.cls_token", "cls"),
    (PREFIX + r"embeddings\.position_embeddings", "position"),
    (PREFIX + r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch.\1"),
    (LAYER + r"attention\.attention\.(q|k|v)(?:uery|ey|alue)\.(.*)", r"blocks.\1.attention.\2.\3"),
    (LAYER + r"attention\.attention\.(q|v)_bias", r"blocks.\1.attention.\2.bias"),
    (LAYER + r"attention\.output\.dense\.(.*)", r"blocks.\1.attention.out.\2"),
    (LAYER + r"layernorm_before\.(.*)", r"blocks.\1.norm1.\2"),
    (LAYER + r"layernorm_after\.(.*)", r"blocks.\1.norm2.\2"),
    (LAYER + r"intermediate\.dense\.(.*)", r"blocks.\1.fc1.\2"),
    (LAYER + r"output\.dense\.(.*)", r"blocks.\1.fc2.\2"),
    (PREFIX + r"layernorm\.(.*)", r"norm.\1"),
)
TOWER = r"(?:vision_model\.)?"
TOWER_LAYER = TOWER + r"encoder\.layers\.(\d+)\."
CLIP = (
    (TOWER + r"embeddings\.class_embedding", "cls"),
    (TOWER + r"embeddings\.position_embedding\.weight", "position"),
    (TOWER + r"embeddings\.patch_embedding\.(.*)", r"patch.\1"),
    (TOWER_LAYER + r"self_attn\.(q|k|v|out)_proj\.(.*)", r"blocks.\1.attention.\2.\3"),
    (TOWER_LAYER + r"layer_(norm[12]\..*)", r"blocks.\1.\2"),
    (TOWER_LAYER + r"mlp\.(.*)", r"blocks.\1.\2"),
)
AUTHORS = (
    ("cls_token", "cls"),
    ("pos_embed", "position"),
    (r"patch_embed\.proj\.(.*)", r"patch.\1"),
    (r"blocks\.(\d+)\.attn\.(q|k|v)\.(.*)", r"blocks.\1.attention.\2.\3"),
    (r"blocks\.(\d+)\.attn\.(q|v)_bias", r"blocks.\1.attention.\2.bias"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.(.*)", r"blocks.\1.\2"),
)


@dataclass
class VitConfig:
    """The shape of a vision transformer, by the field names of config.json as far as it says; the defaults are base."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 1
    tubelet_size: int = 0  # frames of a patch of film; 0: the network reads pictures
    use_mean_pooling: bool = False  # of tokens without a final norm, by a classifier
    class_token: bool = True
    patch_bias: bool = True
    biases: tuple[bool, bool, bool, bool] = (True, True, True, True)  # of queries, keys, values and output
    learned: bool = True  # whether the file holds the positions; if not they are waves

    @property
    def tokens(self) -> int:
        """Of a picture or a film."""
        times = self.num_frames // self.tubelet_size if self.tubelet_size else 1
        return times * (self.image_size // self.patch_size) ** 2 + self.class_token


class VitNet(nn.Module):
    """Pictures (n, 3, H, W), or films (n, 3, F, H, W), -> hidden states (n, T, D).

    A class token comes first where there is one, then the patches in raster order, those of a film frame by frame.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, side, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        if config.tubelet_size:
            box = (config.tubelet_size, side, side)
            self.patch = nn.Conv3d(3, width, box, box, bias=config.patch_bias)
        else:
            self.patch = nn.Conv2d(3, width, side, side, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.zeros(1, width)) if config.class_token else None
        self.position = nn.Parameter(torch.zeros(config.tokens, width)) if config.learned else None
        self.first: nn.Module = nn.Identity()
        shape = (width, config.num_attention_heads, config.intermediate_size, eps, config.hidden_act)
        self.blocks = nn.ModuleList(Block(*shape, biases=config.biases) for _ in range(config.num_hidden_layers))
        self.norm: nn.Module = nn.Identity() if config.use_mean_pooling else nn.LayerNorm(width, eps)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """Hidden states, the last one after the final norm."""
        x = self.patch(x.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2).float()
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        x = x + (waves(x.shape[1], x.shape[2], x.device) if self.position is None else self.position)
        return hidden_states(self.blocks, self.first(x), norm=self.norm)


def waves(count: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions (count, width): sines and, at odd places, cosines of ever lower frequency."""
    at = torch.arange(width, device=device)
    angles = torch.arange(count, device=device)[:, None] * 1e4 ** (-(at - at % 2).double() / width)
    return torch.where(at % 2 == 0, angles.sin(), angles.cos()).float()


def read_authors(place: Path, start: str = "") -> tuple[Path, dict[str, Tensor]]:
    """The one weight file at `place`, and its tensors by their authors' names, less a `start` before some of them.

    Queries, keys and values come apart; positions (1, T, D) become (T, D). UserError: not one file, or no such model.
    """
    files = list(weight_files(place))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3]) or "none"
        raise UserError(f"{place}: holds no config.json, and not one weight file but {len(files)}: {names}")
    tensors = {name.removeprefix(start): tensor for name, tensor in read_tensors(files[0]).items()}
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            first = ", ".join(list(tensors)[:3]) or "nothing"
            raise UserError(f"{files[0]}: not laid out as its authors' file: no {name} in {first}, ...")
    found = {}
    for name, tensor in flat(tensors).items():
        names = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
        found |= zip(names, tensor.chunk(len(names)), strict=False)
    return files[0], found


def flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with class token and positions as (T, D), where files have them as (D,), (1, T, D) or (T, D)."""
    ends = ("cls_token", "class_embedding", "pos_embed", "embeddings.position_embeddings")
    return {name: part.reshape(-1, part.shape[-1]) if name.endswith(ends) else part for name, part in tensors.items()}


def authors_shape(tensors: Mapping[str, Tensor], head: int | None = None) -> dict[str, Any]:
    """Fields of the VitConfig that read_authors()'s tensors have; heads are `head` wide."""
    width, side = tensors["patch_embed.proj.weight"].shape[0], tensors["patch_embed.proj.weight"].shape[-1]
    if head is None:
        head = 80 if width == 1280 else 64
    shape = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "num_attention_heads": max(width // head, 1),
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.weight"]),
        "layer_norm_eps": 1e-6,
        "patch_size": side,
    }
    if "pos_embed" in tensors:
        shape["image_size"] = side * math.isqrt(len(tensors["pos_embed"]) - 1)
    return shape


class Vit(Encoder):
    """Frames -> the tokens of each; pooled to the mean of a vector of each frame (of `frames` in a clip), to these
    vectors, to that of one frame, or to the tokens of one frame (a class token, if there is one, then its patches).

    `layer` is last (after the model's final norm), one of the hidden states from 0 or from the end (-2), or the mean
    of a span such as 4-10; `dtype` is what products are made in, fp32 or bf16.
    """

    modality, batched = "video", True
    poolings = ("mean", "frames", "patches", "frame")
    shape = VitConfig()  # where config.json says nothing
    family: str  # model_type in config.json
    part: str | None = None  # of config.json, in a model of more than pictures
    rules: tuple[tuple[str, str], ...] = VIT
    unused: tuple[str, ...] = ()
    resizing: str  # a function of pictures
    mode = "bicubic"
    statistics: str

    def __init__(self, folder: str, layer: str, dtype: str, **own: Any) -> None:
        place = self.locate(folder)
        super().__init__(folder=portable(folder, place), layer=layer, dtype=dtype, **own)
        self.count = own.get("frames", 1)
        if self.count < 1:
            raise UserError(f"{self.name}: frames {self.count} is not above 0")
        self.config, tensors = self.read(place)
        self.dim, self.size = self.config.hidden_size, self.config.image_size
        self.layers = read_layers(layer, self.config.num_hidden_layers, self.name)
        with torch.device("meta"):
            self.net = self.network(self.config)
        self.coverage = load_renamed(self.net, tensors, self.rules, place, self.unused)
        cast(self.net, dtype, self.name)
        told = (place / "config.json").is_file()
        self.weights_sha256 = sha256(place, "config.json") if told else full_sha256(place)
        self.preprocessing = f"{self.name}: {self.resizing} to {self.size} x {self.size} {self.mode}"
        self.preprocessing += f", mean and deviation {self.statistics}"

    def locate(self, folder: str) -> Path:
        """Where the weights are: a folder, or a file."""
        return locate(folder, f"{self.name} weights")

    def read(self, place: Path) -> tuple[VitConfig, dict[str, Tensor]]:
        """The shape and the tensors of a model in a folder of transformers."""
        acts = (self.shape.hidden_act, *ACTIVATIONS)
        allowed = {"hidden_act": acts, "num_channels": (3,), "qkv_bias": (True,), "qv_bias": (True,)}
        names = VitConfig.__dataclass_fields__
        fields = read_config(place / "config.json", self.family, names, allowed, self.part)
        return replace(self.shape, **fields), flat(read_folder(place))

    @staticmethod
    def network(config: VitConfig) -> VitNet:
        """The network of this shape."""
        return VitNet(config)

    def info(self, pooling: str) -> dict[str, Any]:
        """How features are made; of patches also the picture's side in pixels and how many tokens it becomes."""
        size = {"image_size": self.size, "tokens": self.config.tokens} if pooling == "patches" else {}
        return super().info(pooling) | size

    def frames(self, pooling: str) -> int:
        """How many frames of a clip `pooling` reads."""
        return 1 if pooling in ("patches", "frame") else self.count

    def prepare(self, x: Tensor) -> Tensor:
        """Frames (n, H, W, 3) uint8 -> (n, 3, S, S) as the model was trained on them."""
        resize = getattr(pictures, self.resizing)
        return pictures.scale(resize(x.permute(0, 3, 1, 2), self.size, self.mode), self.statistics)

    def lengths(self, frames: Tensor) -> Tensor:
        """Rows of clips that have so many frames."""
        return frames * self.config.tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prepared frames (B, n, 3, S, S), mask (B, n) of each clip's own -> the tokens of frame after frame.

        (B, n * T, dim), zero after each clip's last.
        """
        if mask is None or mask.all():
            return mix(self.net.states(x.flatten(0, 1)), self.layers).unflatten(0, x.shape[:2]).flatten(1, 2)
        tokens = mix(self.net.states(x[mask]), self.layers)
        rows = tokens.new_zeros(*mask.shape, *tokens.shape[1:])
        rows[mask] = tokens
        return rows.flatten(1, 2)

    def film(self, clips: Sequence[Tensor]) -> Tensor:
        """Frames (n, H, W, 3) uint8 of clips, one clip after the other -> patches of each (frames, N, dim), on the CPU.

        A class token is left out.
        """
        x = torch.cat([self.prepare(frames) for frames in clips]).to(next(self.parameters()).device)
        return mix(self.net.states(x), self.layers)[:, int(self.config.class_token) :].cpu()

    def pool(self, rows: Tensor, how: str) -> Tensor:
        """Rows (n * T, dim) of one clip -> tokens (T, dim) of its first frame, (dim,), or a vector each (n, dim)."""
        tokens = rows.unflatten(0, (-1, self.config.tokens))
        if how == "patches":
            return tokens[0]
        vectors = self.vectors(tokens)
        return vectors if how == "frames" else vectors.mean(0)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Tokens (n, T, dim) of frames -> what stands for each (n, dim): its class token."""
        return tokens[:, 0]
