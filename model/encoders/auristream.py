"""AuriStream, a speech model of 100 M parameters: a GPT over the cochlear codes of WavCoch, 200 a second.

Published are its sizes, its outer names and its arithmetic, not the names inside attention and MLP: the loader places
those by shape (and q, k, v by letter) and refuses by name what has no place. Taken from its line of code rather than
from its file: the sense in which rotary positions turn (`rope_sign` -1, against Hugging Face's 1), and, unless its
config.json says otherwise (`rope_theta`, `norm_eps`, `attn_scale`), base 10,000, eps 1e-6 and factor 1. `nll` on
clean speech tells: right settings lie far below any wrong one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import find_weights, read_folder, read_json
from model.encoders import Encoder, listing, portable, sha256
from model.encoders.wavcoch import CODES, WavCoch
from model.llm import RMSNorm, rotate

OVERLAP = 8  # a window starts an eighth of itself before the last one ends, so that its frames have a past
LEVEL, MOST = 0.05, 10.0  # root mean square that clips are brought to, and the largest gain for that
SILENCE = 1e-5  # amplitude whose level, -100 dB, is the lowest
WINDOW, ORIGINAL_WINDOW = 4096, 1024  # codes, where config.json has no seq_len
WTE, WPE, NORM, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "coch_head.weight"


@dataclass
class AuriStreamConfig:
    """The shape of an AuriStream; the defaults are those of the 100 M model with rotary positions."""

    vocab_size: int = CODES
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    seq_len: int = WINDOW
    use_rope: bool = True
    rope_theta: float = 10000.0
    rope_sign: int = -1
    norm_eps: float = 1e-6
    attn_scale: float = 1.0


def frequencies(config: AuriStreamConfig) -> Tensor:
    """Radians a position (Dh / 2,) of rotary positions."""
    width = config.n_embd // config.n_head
    return config.rope_theta ** (-torch.arange(0, width, 2) / width)


class Rotary(nn.Module):
    """Angles of rotary positions, from frequencies that the file stores."""

    inv_freq: Tensor

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.sign = config.rope_sign
        self.register_buffer("inv_freq", frequencies(config))

    def forward(self, x: Tensor) -> Tensor:
        """Turn x (B, T, H, Dh)."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * self.inv_freq.float()  # (T, 1, Dh / 2)
        cos, sin = angles.cos(), self.sign * angles.sin()
        return rotate(x, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.rotary = Rotary(config) if config.use_rope else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, Dh) each
        q, k, v = (part.transpose(1, 2) for part in (self.rotary(q), self.rotary(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices around SiLU."""

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.scale = config.attn_scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """What lies under the `transformer.` prefix of the published names."""

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.use_rope else nn.Embedding(config.seq_len, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


class Gpt(nn.Module):
    """Codes (B, T) -> states (B, T, D) of some blocks; `coch_head` scores the next code."""

    def __init__(self, config: AuriStreamConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.coch_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, blocks: range, raw: bool = False) -> Tensor:
        """Mean of the states after `blocks`, counted from 1, each normed as its next reader norms it unless `raw`."""
        parts = self.transformer
        readers = [*(block.get_submodule("norm1") for block in parts.h[1:]), parts.ln_f]
        x = parts.wte(ids)
        if parts.wpe is not None:
            x = x + parts.wpe.weight[: ids.shape[1]]
        total = torch.zeros_like(x)
        for number, (block, norm) in enumerate(zip(parts.h, readers, strict=True), 1):
            x = block(x)
            if number in blocks:
                total = total + (x if raw else norm(x))
            if number + 1 == blocks.stop:
                break
        return total / len(blocks)


class AuriStream(Encoder):
    """Waveform at 16 kHz -> states of 768 values, 200 a second; every frame has heard what came before it only.

    `layers`: ln_f, the states that predict the next code; or the mean of blocks, such as 4-10, each as normed by the
    block after it. Clips are brought to one level; statistics end in the level that they had, in dB. `original` is the
    published way: the last block without a norm, clips at full peak, windows without a past, a mean of unit length.
    """

    name, modality = "auristream", "audio"
    hub = "TuKoResearch/AuriStream100M_RoPE_librilight"
    sample_rate = 16000

    def __init__(
        self,
        folder: str,
        wavcoch: str = "TuKoResearch/WavCochV8192",
        layers: str = "ln_f",
        original: bool = False,
        rope_sign: int = -1,
    ) -> None:
        if rope_sign not in (-1, 1):
            raise UserError(f"auristream: rope_sign {rope_sign} is not -1 or 1")
        found = find_weights(folder, "auristream weights")
        codes = WavCoch(wavcoch)
        given = {"wavcoch": codes.options["folder"], "layers": layers, "original": original, "rope_sign": rope_sign}
        super().__init__(folder=portable(folder, found), **given)
        self.net = read_gpt(found, rope_sign, ORIGINAL_WINDOW if original else WINDOW)
        self.wavcoch = codes
        self.config, self.original = self.net.config, original
        self.dim = self.config.n_embd
        self.poolings = ("mean", "frames") if original else ("stats", "mean", "frames")
        self.blocks = _blocks(layers, self.config.n_layer, original)
        self.window = self.config.seq_len
        self.past = 0 if original else self.window // OVERLAP
        self.weights_sha256 = sha256(found, "config.json") | {
            f"wavcoch/{name}": value for name, value in (codes.weights_sha256 or {}).items()
        }

    def out_dim(self, pooling: str) -> int:
        """768, or 1,538 for statistics: mean, deviation, root mean square and peak in dB."""
        return 2 * self.dim + 2 if pooling == "stats" else self.dim

    def lengths(self, samples: Tensor) -> Tensor:
        """Frames of clips that have so many samples."""
        return self.wavcoch.lengths(samples)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waveforms (B, S), mask (B, S) of their own samples -> (B, T, 768), zero after each clip's last frame."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
        ids = self.wavcoch(self.level(x, mask), mask)  # (B, T)
        inside = ids >= 0
        # codes after a clip's last are heard by none of its own frames
        return self.states(ids.clamp_min(0)) * inside[..., None]

    def level(self, x: Tensor, mask: Tensor) -> Tensor:
        """Waveforms (B, S) at the level that codes are made from; in fp64, so that padding changes no bit of it."""
        x = x * mask
        rms, peak = _levels(x, mask)
        if self.original:
            return (x / peak.where(peak > 0, 1).float()[:, None]).clamp(-1, 1)
        return x * (LEVEL / rms.clamp_min(LEVEL / MOST)).float()[:, None]

    def states(self, ids: Tensor) -> Tensor:
        """Codes (B, T) -> (B, T, 768) in windows that overlap; a window's frames with too short a past are dropped."""
        parts, start = [], 0
        while True:
            frames = self.net(ids[:, start : start + self.window], self.blocks, raw=self.original)
            parts.append(frames[:, self.past if start else 0 :])
            if start + self.window >= ids.shape[1]:
                return torch.cat(parts, 1)
            start += self.window - self.past

    def pool(self, frames: Tensor, how: str) -> Tensor:
        """Frames (T, 768) of one clip -> themselves, their mean (768,), or mean and deviation over time (1536,)."""
        if how == "frames":
            return frames
        mean = frames.mean(0)
        if how == "mean":
            return F.normalize(mean, dim=0) if self.original else mean
        return torch.cat([mean, frames.std(0, correction=0)])

    def encode(self, x: Tensor, pooling: str = "stats") -> Tensor:
        """One waveform (S,) -> (1538,), (768,) or (T, 768)."""
        pooled = self.pool(self(x[None])[0], pooling)
        if pooling != "stats":
            return pooled
        levels = torch.cat(_levels(x[None], torch.ones_like(x[None])))
        return torch.cat([pooled, 20 * levels.clamp_min(SILENCE).log10().float()])

    def nll(self, x: Tensor) -> float:
        """Mean negative log-likelihood in nats of each code of one waveform (S,) after the ones before it."""
        ids = self.wavcoch(self.level(x[None], torch.ones_like(x[None]))).long()[:, : self.window]
        last = self.config.n_layer
        logits = self.net.coch_head(self.net(ids, range(last, last + 1)))  # (1, T, 8192)
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()


def _levels(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and peak (B,) of waveforms that are zero outside their mask, in fp64."""
    x = x.double()
    return (x.square().sum(1) / mask.sum(1)).sqrt(), x.abs().amax(1)


def _blocks(layers: str, last: int, original: bool) -> range:
    """The blocks that `layers` names, counted from 1."""
    if original and layers != "ln_f":
        raise UserError(f"auristream: original reads the last block, not layers {layers}")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", f"{last}" if layers == "ln_f" else layers)
    first, end = (int(part) for part in (match[1], match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= end <= last:
        raise UserError(f"auristream: layers '{layers}' is not ln_f, a block from 1 to {last}, or a span such as 4-10")
    return range(first, end + 1)


def read_gpt(folder: Path, rope_sign: int = -1, window: int = WINDOW) -> Gpt:
    """The model in a folder's safetensors; UserError names all that it lacks and all that has no place in it."""
    found = read_folder(folder)
    stem = next((name.removesuffix(WTE) for name in found if name.endswith(WTE)), None)
    if stem is None:
        raise UserError(f"{folder}: not an AuriStream: no {WTE} in {', '.join(list(found)[:3])}, ...")
    table = found[stem + WTE]
    placed: dict[str, Tensor] = {}
    lost: list[str] = []
    for name, tensor in found.items():
        place = _place(name.removeprefix(stem), tensor.shape, table.shape[1])
        if place is not None and place not in placed:
            placed[place] = tensor
        elif not ("head" in name and tensor.shape == table.shape):  # those predict codes further ahead
            lost.append(f"{name} {(*tensor.shape,)}")
    for stem in [name.removesuffix("q") for name in placed if name.endswith(".attn.q")]:
        if all(stem + letter in placed for letter in "qkv"):
            placed[f"{stem}c_attn.weight"] = torch.cat([placed.pop(stem + letter) for letter in "qkv"])

    config = _config(folder / "config.json", placed, rope_sign, window)
    with torch.device("meta"):
        net = Gpt(config)
    wanted = net.state_dict()
    placed |= {name: frequencies(config) for name in wanted if name.endswith("inv_freq") and name not in placed}
    missing = [f"{name} {(*tensor.shape,)}" for name, tensor in wanted.items() if name not in placed]
    lost += [f"{name} {(*tensor.shape,)}" for name, tensor in placed.items() if name not in wanted]
    pairs = [(name, (*placed[name].shape,), (*wanted[name].shape,)) for name in wanted if name in placed]
    wrong = [f"{name} is {shape}, not {right}" for name, shape, right in pairs if shape != right]
    said = (("missing", missing), ("unplaced", lost), ("of another shape", wrong))
    problems = [f"{kind}: {listing(names)}" for kind, names in said if names]
    if problems:
        raise UserError(f"{folder}: not an AuriStream as published; {'; '.join(problems)}")
    net.load_state_dict({name: placed[name].float() for name in wanted}, assign=True)
    return net


def _place(name: str, shape: torch.Size, width: int) -> str | None:
    """Where a tensor belongs, by its outer name and its shape; q, k and v apart have places of their own."""
    if name in (WTE, WPE, NORM, HEAD):
        return name
    match = re.fullmatch(r"(transformer\.h\.\d+\.)(norm[12]|attn|mlp)\.(.+)", name)
    if match is None:
        return None
    block, part, inner = match.groups()
    if part.startswith("norm"):
        return name if inner == "weight" else None
    if part == "attn" and inner.endswith("inv_freq"):
        return f"{block}attn.rotary.inv_freq"
    if not inner.endswith("weight"):
        return None
    if part == "mlp":
        tall, wide = (len(shape) == 2 and shape[side] > width == shape[1 - side] for side in (0, 1))
        return f"{block}mlp.c_fc.weight" if tall else f"{block}mlp.c_proj.weight" if wide else None
    if shape == (3 * width, width):
        return f"{block}attn.c_attn.weight"
    letter = re.search(r"(?:^|\.)(?:c_|w)?([qkv])(?:_?proj|uery|ey|alue)?\.weight$", inner)
    if shape == (width, width):
        return f"{block}attn.{letter[1]}" if letter else f"{block}attn.c_proj.weight"
    return None


def _config(file: Path, placed: dict[str, Tensor], rope_sign: int, window: int) -> AuriStreamConfig:
    """The shape of the model that these tensors are, with what config.json adds to them."""
    given = read_json(file) if file.is_file() else {}
    vocabulary, width = placed[WTE].shape
    blocks = [int(match[1]) for name in placed if (match := re.match(r"transformer\.h\.(\d+)\.", name))]
    config = AuriStreamConfig(vocabulary, width, given.get("n_layer", max(blocks, default=-1) + 1), rope_sign=rope_sign)
    first = "transformer.h.0."
    config.n_head = given.get("n_head", max(width // 64, 1))
    if (stored := placed.get(f"{first}attn.rotary.inv_freq")) is not None:
        config.n_head = width // (2 * len(stored))
    config.n_inner = len(placed.get(f"{first}mlp.c_fc.weight", ())) or 4 * width
    config.use_rope = WPE not in placed
    config.seq_len = given.get("seq_len", window) if config.use_rope else len(placed[WPE])
    for key in ("rope_theta", "norm_eps", "attn_scale"):
        setattr(config, key, given.get(key, getattr(config, key)))
    if width % config.n_head:
        raise UserError(f"{file}: n_head {config.n_head} does not divide n_embd {width}")
    if vocabulary < CODES:
        raise UserError(f"{file.parent}: knows {vocabulary:,} codes, the tokeniser has {CODES:,}")
    return config
