"""Connectors between frozen towers and a language model, as VideoLLaMA2 (arXiv 2406.07476) and MultiMood publish them.

Patches of video go through a spatial-temporal convolution (STC) or, like those of sound, through linear layers. Modules
have their published names, so files load without a table of names.
"""

import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import check_names, check_shapes, locate, model_files, read_tensors

PADDING = {"stc_connector_v35": 0, "stc_connector": 1}  # of the sampler, where nothing else differs
AUDIO = ("linear", "mlp2x_gelu")  # connectors of sound
VIDEO = (*PADDING, *AUDIO)
DOWNSAMPLE = (2, 2, 2)  # frames, rows and columns that the sampler joins
NAME = re.compile(r"(?:(?:module|base_model|model)\.)*(mm_projector(?:_a)?)\.(.+)")
APART = ("mm_projector.bin", "mm_projector_a.bin", "non_lora_trainables.bin")  # files that hold projectors alone


class Unsuitable(UserError):
    """Connectors are of another kind or for another language model than those that they are loaded into."""


def connector(kind: str, width: int, hidden: int) -> nn.Module:
    """The connector of a published name from a tower's width to a language model's."""
    if kind in PADDING:
        return Stc(width, hidden, PADDING[kind])
    if kind == "linear":
        return Linear(width, hidden)
    if kind == "mlp2x_gelu":
        return Mlp(width, hidden)
    raise UserError(f"connector '{kind}' is not one of {', '.join(VIDEO)}")


def tokens(kind: str, frames: int, patches: int) -> int:
    """Tokens that a connector makes of so many frames of so many patches; UserError: they do not suit it."""
    return math.prod(sampled(frames, patches, PADDING[kind])) if kind in PADDING else patches


def sampled(frames: int, patches: int, padding: int, downsample: tuple[int, int, int] = DOWNSAMPLE) -> list[int]:
    """Frames, rows and columns after the sampler; what fills no box at an end is dropped."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f"STC reads squares of patches, not {patches} a frame (a class token must be left out)")
    sides = zip((frames, side, side), downsample, strict=True)
    left = [(size + 2 * padding - box) // box + 1 for size, box in sides]
    if min(left) < 1:
        boxes = " x ".join(map(str, downsample))
        raise UserError(f"STC joins {boxes} patches: {frames} frames of {side} x {side} are too few")
    return left


class Linear(nn.Linear):
    """Patches (B, N, C) -> tokens (B, N, D); of frames (B, T, N, C) the mean is taken first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(over_frames(x).to(self.weight.dtype))


class Mlp(nn.Sequential):
    """Linear layers with GELU between them; patches and frames as for Linear."""

    def __init__(self, width: int, hidden: int, depth: int = 2) -> None:
        later = [(nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(depth - 1)]
        super().__init__(nn.Linear(width, hidden), *(layer for pair in later for layer in pair))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(over_frames(x).to(next(self.parameters()).dtype))


def over_frames(x: Tensor) -> Tensor:
    return x.mean(1) if x.ndim == 4 else x


class Stc(nn.Module):
    """Convolutions in each frame, one that joins boxes of frames, rows and columns, convolutions again, and an MLP."""

    def __init__(
        self, width: int, hidden: int, padding: int = 0, depth: int = 4, mlp_depth: int = 2,
        downsample: tuple[int, int, int] = DOWNSAMPLE,
    ) -> None:  # fmt: skip
        super().__init__()
        self.padding, self.downsample = padding, downsample
        self.s1 = stage(width, hidden, depth)
        self.sampler = nn.Sequential(nn.Conv3d(hidden, hidden, downsample, downsample, padding), nn.SiLU())
        self.s2 = stage(hidden, hidden, depth)
        self.readout = Mlp(hidden, hidden, mlp_depth)

    def forward(self, x: Tensor) -> Tensor:
        """Patches (B, T, N, C) of a square in raster order -> (B, tokens, D) in the order of time, rows and columns."""
        b, t, n, _ = x.shape
        after, side = sampled(t, n, self.padding, self.downsample)[0], math.isqrt(n)
        x = x.to(next(self.parameters()).dtype)
        # channels stay last in memory from here on, so that norms and changes of shape copy nothing
        x = self.s1(x.unflatten(2, (side, side)).flatten(0, 1).movedim(-1, 1))  # (B * T, D, H, W)
        x = self.sampler(x.unflatten(0, (b, t)).transpose(1, 2))  # (B, D, T', H', W')
        x = self.s2(x.transpose(1, 2).flatten(0, 1))  # (B * T', D, H', W')
        return self.readout(x.movedim(1, -1).unflatten(0, (b, after)).flatten(1, 3))


def stage(width: int, hidden: int, depth: int) -> nn.Sequential:
    """Bottlenecks b1, b2, ..., of which the first widens."""
    return nn.Sequential(OrderedDict((f"b{i + 1}", Bottleneck(hidden if i else width, hidden)) for i in range(depth)))


class Bottleneck(nn.Module):
    """RegNet-Y's block (arXiv 2003.13678) with layer norms, groups of one channel and no narrower middle."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, kernel=3, groups=hidden)
        self.se = SqueezeExcite(hidden, round(0.25 * width))
        self.conv3 = ConvNorm(hidden, hidden)
        self.downsample = nn.Identity() if width == hidden else ConvNorm(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, H, W) -> (n, hidden, H, W)."""
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.silu(self.conv3(self.se(y)) + self.downsample(x))


class ConvNorm(nn.Module):
    """A convolution without a bias, then a layer norm over its channels, "bn" where it is published."""

    def __init__(self, width: int, hidden: int, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, hidden, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(hidden, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    """Every channel times a gate that all channels' means over the picture decide."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


def load_projectors(path: str | os.PathLike, video: nn.Module | None = None, audio: nn.Module | None = None) -> str:
    """Loads the given connectors strictly from published files; returns the coverage ("113/113 STC tensors").

    `path` is a hub name, a folder or a file: a whole checkpoint, mm_projector.bin and mm_projector_a.bin, or what was
    trained beside LoRA. UserError: not there, or for another model; then nothing has been loaded.
    """
    place = locate(os.fspath(path), "projectors")
    given = {"mm_projector": video, "mm_projector_a": audio}
    modules = {part: module for part, module in given.items() if module is not None}
    found = read_projectors(place, set(modules))
    for part, module in modules.items():
        if part not in found:
            raise UserError(f"{place}: holds no {part}, which whole checkpoints do, or {', '.join(APART)}")
        check_projector(f"{place}: its {part}", module.state_dict(), found[part])
    said = []
    for part, module in modules.items():
        module.load_state_dict(found[part])
        said.append(f"{len(found[part])}/{len(module.state_dict())} {layout(found[part])} tensors")
    return ", ".join(said)


def read_projectors(place: Path, wanted: set[str]) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors by the names that follow the part's; a whole checkpoint counts before files apart."""
    found: dict[str, dict[str, Tensor]] = {}
    for files in _sources(place):
        here: dict[str, dict[str, Tensor]] = {}
        for file in files:
            matches = ((NAME.fullmatch(key), tensor) for key, tensor in read_tensors(file).items())
            for part, name, tensor in ((match[1], match[2], tensor) for match, tensor in matches if match):
                if name in here.setdefault(part, {}):
                    raise UserError(f"{place}: two tensors are {part}.{name}, in two spellings")
                here[part][name] = tensor
        found = here | found
        if wanted <= set(found):
            break
    return found


def _sources(place: Path) -> Iterator[list[Path]]:
    """The files of a whole checkpoint that may hold projectors, then each file apart."""
    if place.is_file():
        yield [place]
        return
    if any(place.glob("model*.safetensors*")) or any(place.glob("pytorch_model*.bin*")):
        yield model_files(place, NAME.fullmatch)
    yield from ([place / name] for name in APART if (place / name).is_file())


def check_projector(where: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """UserError where a file's projector is of another type, for another language model, or not all of one."""
    if layout(found) != layout(own):
        raise Unsuitable(f"{where} is {layout(found)}, not {layout(own)}")
    last = list(own)[-1]  # the bias of what writes tokens
    if last in found and found[last].numel() != own[last].numel():
        widths = f"{found[last].numel()}, not {own[last].numel()}"
        raise Unsuitable(f"{where} is for a language model of width {widths}")
    check_names(where, own, found)
    check_shapes(where, own, {name: tuple(tensor.shape) for name, tensor in found.items()})


def layout(names: Mapping[str, Tensor]) -> str:
    """What the names of a projector's tensors say that it is."""
    marks = {"s1.": "STC", "0.": "mlp2x_gelu", "weight": "linear"}
    return next((kind for mark, kind in marks.items() if any(name.startswith(mark) for name in names)), "unknown")
