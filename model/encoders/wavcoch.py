"""WavCoch, the tokeniser under AuriStream: waveform -> one of 8,192 cochlear codes every 5 ms.

Published are its numbers (first stage of 1,001 samples every 80, a convolutional encoder, the signs of 13 values as a
code), not its layer list. So the layers are read from the weights' own names and shapes, as one plain chain of 1-D
convolutions; what does not fit into the chain is refused by name. Shapes do not show the rest, which is assumed and
can be set in config.json: `hop` 80, `activation` relu (between layers), `padding` same (floor(samples / 80) codes, as
the current files do; "valid" is floor((samples - 1001) / 80) + 1, as the paper did), `msb_first` true (order of bits).
Whether the assumptions hold shows in AuriStream.nll on clean speech, far below ln 8192 = 9.01 if they do.
"""

import re
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from common.weights import find_weights, read_folder, read_json
from model.encoders import Encoder, listing, portable, sha256

BITS = 13
CODES = 2**BITS
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
PADDINGS = ("same", "valid")
CUDNN = threading.Lock()


@dataclass
class WavCochConfig:
    """A chain of convolutions: a first stage of `rows` filters over the waveform, then `layers`."""

    layers: list[tuple[int, int]]  # channels and kernel of each, the last has 13 channels
    window: int = 1001
    rows: int = 1002  # 501 cosines, then their sines
    magnitude: bool = False  # of each cosine with its sine, in place of both
    hop: int = 80
    activation: str = "relu"
    padding: str = "same"
    msb_first: bool = True


class Chain(nn.Module):
    """Waveforms (B, S) -> 13 values a code (B, L, 13); a first stage like a Fourier transform, then the layers."""

    def __init__(self, config: WavCochConfig) -> None:
        super().__init__()
        self.config = config
        self.fourier = nn.Conv1d(1, config.rows, config.window, config.hop)
        widths = [config.rows // 2 if config.magnitude else config.rows, *(channels for channels, _ in config.layers)]
        self.encoder = nn.ModuleList(
            nn.Conv1d(width, channels, kernel)
            for width, (channels, kernel) in zip(widths[:-1], config.layers, strict=True)
        )

    def lengths(self, samples: Tensor) -> Tensor:
        """Codes of clips that have so many samples; the shortest clip has one."""
        config = self.config
        least = config.window if config.padding == "valid" else config.hop
        return 1 + (samples.clamp_min(least) - least) // config.hop

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if config.padding == "same":
            x = F.pad(x, (0, max(config.hop - x.shape[1], 0)))
            around = config.window - config.hop
            x = F.pad(x, (around // 2, around - around // 2))
        x = F.pad(x, (0, max(config.window - x.shape[1], 0)))
        x = self.fourier(x[:, None])  # (B, rows, L)
        if config.magnitude:
            x = x.unflatten(1, (2, -1)).square().sum(1).sqrt()
        for i, ((_, kernel), layer) in enumerate(zip(config.layers, self.encoder, strict=True)):
            size = kernel - 1
            x = layer(F.pad(ACTIVATIONS[config.activation](x) if i else x, (size // 2, size - size // 2)))
        return x.transpose(1, 2)


class WavCoch(Encoder):
    """Waveform at 16 kHz, at the level it has -> cochlear codes, 200 a second; in fp32, for a code is made of signs."""

    name, modality, kind = "wavcoch", "audio", "ids"
    hub = "TuKoResearch/WavCochV8192"
    sample_rate = 16000
    dim, dtype = CODES, "int32"
    poolings = ("ids",)
    weights: Tensor

    def __init__(self, folder: str) -> None:
        found = find_weights(folder, "wavcoch weights")
        super().__init__(folder=portable(folder, found))
        self.chain, weights = read_chain(found)
        self.register_buffer("weights", weights)
        self.weights_sha256 = sha256(found, "config.json")

    def lengths(self, samples: Tensor) -> Tensor:
        """Codes of clips that have so many samples."""
        return self.chain.lengths(samples)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waveforms (B, S), mask (B, S) of their own samples -> codes (B, L) int32, -1 after each clip's last."""
        counts = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
        # clip by clip: a value that is almost zero changes its sign with the order that a larger product is summed in
        rows = [self.encode(row[:count]) for row, count in zip(x, counts, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=-1)

    def encode(self, x: Tensor, pooling: str = "ids") -> Tensor:
        """One waveform (S,) -> codes (L,) int32 from 0 to 8,191."""
        with exact(x.device):
            bits = self.chain(x[None].float())[0] > 0  # (L, 13)
        return (bits * self.weights).sum(1, dtype=torch.int32)


@contextmanager
def exact(device: torch.device):
    """Full fp32: no autocast, and no TF32 in cuDNN, whose switch is one for all threads."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(CUDNN)
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        yield


def read_chain(folder: Path) -> tuple[Chain, Tensor]:
    """The chain in a folder's safetensors, and what each of its bits is worth; UserError names what has no place."""
    found = read_folder(folder)
    # the decoder makes cochleagrams of codes, in training only
    left = {name: found[name] for name in sorted(found, key=_natural) if "decod" not in name.lower()}
    banks = [name for name, tensor in left.items() if tensor.ndim == 3 and tensor.shape[1] == 1]
    window = max((left[name].shape[2] for name in banks), default=1)
    banks = [name for name in banks if left[name].shape[2] == window]
    if window == 1 or len(banks) > 2:
        first = ", ".join(list(found)[:3])
        raise UserError(f"{folder}: not a WavCoch: {len(banks)} filter banks over the waveform in {first}, ...")
    banks.sort(key=lambda name: bool(re.search("imag|sin", name.lower())))
    bank = [torch.cat(parts) for parts in zip(*(_take(left, name) for name in banks), strict=True)]
    rows = len(bank[0])
    worth = _take_worth(left)
    layers = _take_layers(left, {rows, rows // 2})
    for name in [name for name, tensor in left.items() if tensor.ndim > 1 and tensor.shape[1] == BITS]:
        _take(left, name)  # leads from the code to the decoder
    if left or not layers or len(layers[-1][0]) != BITS:
        lost = listing(f"{name} {(*tensor.shape,)}" for name, tensor in left.items()) or "none"
        end = len(layers[-1][0]) if layers else rows
        problem = f"no chain of convolutions to {BITS} bits, it ends at {end} channels; unplaced: {lost}"
        raise UserError(f"{folder}: {problem}")

    config = WavCochConfig([(len(weight), weight.shape[2]) for weight, _ in layers], window, rows)
    config.magnitude = layers[0][0].shape[1] != rows
    _assume(folder / "config.json", config)
    with torch.device("meta"):
        chain = Chain(config)
    modules = [chain.fourier, *chain.encoder]
    for module, (weight, bias) in zip(modules, [bank, *layers], strict=True):
        module.load_state_dict({"weight": weight.float(), "bias": bias.float()}, assign=True)
    order = worth if worth is not None else 2 ** torch.arange(BITS - 1, -1, -1)
    return chain, order if config.msb_first else order.flip(0)


def _natural(name: str) -> list[tuple[int, str]]:
    """Names in the order that a person gives them: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _take(left: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight (C, D, kernel) and bias (C,) of a layer, zero where it has none; both leave `left`."""
    weight = left.pop(name)
    beside = name.removesuffix("weight") + "bias"
    found = beside in left and left[beside].shape == weight.shape[:1]
    bias = left.pop(beside) if found else weight.new_zeros(len(weight))
    return weight if weight.ndim == 3 else weight[..., None], bias


def _take_worth(left: dict[str, Tensor]) -> Tensor | None:
    """The powers of two that quantisers keep beside their layers, if this one does."""
    powers = [2.0**i for i in range(BITS)]
    for name, tensor in left.items():
        if tensor.shape == (BITS,) and sorted(tensor.tolist()) == powers:
            return left.pop(name).long()
    return None


def _take_layers(left: dict[str, Tensor], width: set[int]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases from `width` channels to the 13 bits, by name among those that fit, the bits last."""
    layers: list[tuple[Tensor, Tensor]] = []
    while width != {BITS}:
        fits = [name for name, tensor in left.items() if tensor.ndim in (2, 3) and tensor.shape[1] in width]
        if not fits:
            break
        layers.append(_take(left, min(fits, key=lambda name: len(left[name]) == BITS)))
        width = {len(layers[-1][0])}
    return layers


def _assume(file: Path, config: WavCochConfig) -> None:
    """What shapes do not show, from config.json where it says so."""
    given = read_json(file) if file.is_file() else {}
    for key, allowed in (("activation", tuple(ACTIVATIONS)), ("padding", PADDINGS), ("msb_first", (True, False))):
        value = given.get(key, getattr(config, key))
        if value not in allowed:
            raise UserError(f"{file}: {key} {value!r} is not one of {', '.join(map(str, allowed))}")
        setattr(config, key, value)
    config.hop = given.get("hop", config.hop)
    if not (isinstance(config.hop, int) and 0 < config.hop <= config.window):
        raise UserError(f"{file}: hop {config.hop!r} is not a number of samples from 1 to the window's {config.window}")
