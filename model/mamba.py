"""MultiMood's history compressor: a Mamba (Gu and Dao 2023) that turns each utterance of a history into one row.

The scan, the blocks and the readers of published weights are plain PyTorch, on any device.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common import checkpoint
from common.config import UserError
from common.weights import find_weights, identity, load_strict, model_files, read_json, read_tensors
from model.encoders.transformer import check_config, load_renamed
from model.llm import RMSNorm

MEM = "<MEM>"  # the token whose state sums an utterance up
INSIDE = ("mamba_compressor.", "projections.history.")  # before a compressor's names in a published MultiMood, in ours
PROJECTION = "memory_projection.pt"  # in a compressor's own folder
CHUNKS = {"cpu": (16, 1), "cuda": (128, 16)}  # (chunk, span): a CPU's cache holds few states, a GPU wants few calls


@dataclass
class MambaConfig:
    """The shape of a Mamba, by the field names of its published config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    state_size: int
    time_step_rank: int
    conv_kernel: int = 4
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def from_json(cls, file: Path) -> "MambaConfig":
        """From a config.json of any transformers generation. UserError on what this model does not compute."""
        given = read_json(file)
        computed: dict[str, tuple[Any, ...]] = {
            "hidden_act": ("silu",), "use_bias": (False,), "use_conv_bias": (True,), "residual_in_fp32": (True,),
            "rms_norm": (True,),
        }  # fmt: skip
        check_config(file, {"model_type": None} | given, {"model_type": ("mamba",), **computed})
        required = "vocab_size", "hidden_size", "num_hidden_layers", "state_size"
        if missing := [key for key in required if given.get(key) is None]:
            raise UserError(f"{file}: incomplete config, no {', '.join(missing)}")
        fields = {key: given[key] for key in cls.__dataclass_fields__ if given.get(key) is not None}
        fields.setdefault("intermediate_size", int(given.get("expand", 2) * given["hidden_size"]))
        if fields.get("time_step_rank", "auto") == "auto":
            fields["time_step_rank"] = math.ceil(given["hidden_size"] / 16)
        return cls(**fields)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], where: object) -> "MambaConfig":
        """The shape that tensors under their published names have; UserError where they are no Mamba's."""
        names = [f"layers.0.mixer.{name}" for name in ("A_log", "dt_proj.weight", "conv1d.weight")]
        names = ["embeddings.weight", *names]
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"{where}: not a Mamba: no {', '.join(missing)}")
        (vocab, width), (inner, states), (_, rank), (_, _, taps) = (tensors[name].shape for name in names)
        layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
        return cls(vocab, width, layers, inner, states, rank, taps)

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json."""
        return {"model_type": "mamba", **asdict(self)}


class Scan(torch.autograd.Function):
    """The recurrence of selective_scan(), of which the states between chunks are all that is kept.

    Every factor is an exp of something <= 0, and so is any product of factors: nothing overflows, however long or short
    the steps are. The backward pass makes the states of a chunk again, and runs the same recurrence from the end.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, span: int) -> Tensor:  # pyright: ignore
        """x, dt (T, S, E), A (N, E), B and C (T, S, N) -> (T, S, E)."""
        chunks, y = parts(len(x), chunk), torch.empty_like(x)
        starts = x.new_zeros(len(chunks) + 1, x.shape[1], *A.shape)
        for i, t in enumerate(chunks):
            a, states = factors(dt[t], A), outer(B[t], dt[t] * x[t])
            starts[i + 1] = recur(a, products(a, dt[t], A, span), states, starts[i], span)
            y[t] = rows(C[t], states)
        ctx.save_for_backward(x, dt, A, B, C, starts[:-1])
        ctx.chunk, ctx.span = chunk, span
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyright: ignore
        x, dt, A, B, C, starts = ctx.saved_tensors
        dx, ddt, dB, dC, dA = (torch.empty_like(z) for z in (x, dt, B, C, A))
        dA.zero_()
        later = torch.zeros_like(starts[0])  # gradient of the last state of a chunk that comes from the next one
        for t, start in reversed(list(zip(parts(len(x), ctx.chunk), starts, strict=True))):
            a, driven = factors(dt[t], A), dt[t] * x[t]
            h = outer(B[t], driven)
            recur(a, products(a, dt[t], A, ctx.span), h, start, ctx.span)
            dC[t] = columns(h, dy[t])
            # the gradient of each state is its own and what the next step, which is no step at the end, leaves of it
            g = outer(C[t], dy[t])
            next_a = F.pad(a[1:], (0, 0, 0, 0, 0, 0, 0, 1), value=1.0)
            next_dt = F.pad(dt[t][1:], (0, 0, 0, 0, 0, 1))
            recur(next_a, products(next_a, next_dt, A, ctx.span, back=True), g, later, ctx.span, back=True)
            later = a[0] * g[0]
            dB[t] = columns(g, driven)
            of_driven = rows(B[t], g)
            of_exponent = a.mul_(g)  # of dt A
            of_exponent[0] *= start
            of_exponent[1:] *= h[:-1]
            dA += (of_exponent * dt[t][:, :, None]).sum((0, 1))
            dx[t] = of_driven * dt[t]
            ddt[t] = of_driven * x[t] + of_exponent.mul_(A).sum(2)
        return dx, ddt, dA, dB, dC, None, None


def parts(steps: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, steps)) for start in range(0, steps, size)]


def factors(dt: Tensor, A: Tensor) -> Tensor:
    """What steps of length dt (T, S, E) leave of the states, A (N, E) -> (T, S, N, E)."""
    return torch.mul(dt[:, :, None], A).exp_()


def products(a: Tensor, dt: Tensor, A: Tensor, span: int, back: bool = False) -> Tensor:
    """Of the factors a of dt, those of each span of steps up to each one, or from each one on."""
    if span == 1:
        return a
    spans = dt.unflatten(0, (-1, span))
    spans = spans.flip(1).cumsum(1).flip(1) if back else spans.cumsum(1)
    return factors(spans.flatten(0, 1), A)


def outer(n: Tensor, e: Tensor) -> Tensor:
    """(T, S, N), (T, S, E) -> (T, S, N, E)."""
    return n[..., None] * e[:, :, None]


def rows(n: Tensor, states: Tensor) -> Tensor:
    """(T, S, N), (T, S, N, E) -> (T, S, E)."""
    return (n[:, :, None] @ states)[:, :, 0]


def columns(states: Tensor, e: Tensor) -> Tensor:
    """(T, S, N, E), (T, S, E) -> (T, S, N)."""
    return (states @ e[..., None])[..., 0]


def recur(a: Tensor, whole: Tensor, b: Tensor, h: Tensor, span: int, back: bool = False) -> Tensor:
    """h = a[t] h + b[t] in place of every b[t], or from the last to the first; returns the h that comes last.

    Spans of steps advance side by side, each from zero; then each one after the other gets what the one before hands
    on, of which `whole`, the products of a within a span, says how much arrives.
    """
    order = range(span)[::-1] if back else range(span)
    a, whole, b = (z.unflatten(0, (-1, span)) for z in (a, whole, b))
    side_a, side_b = a.unbind(1), b.unbind(1)
    for before, now in pairwise(order):
        side_b[now].addcmul_(side_a[now], side_b[before])
    spans = list(zip(whole, b, strict=True))
    for arrives, states in spans[::-1] if back else spans:
        states.addcmul_(arrives, h)
        h = states[order[-1]]
    return h


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int | None = None, span: int | None = None
) -> Tensor:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t] from h = 0, y[t] = C[t] h[t] (Mamba, section 3.2), differentiable.

    x and dt >= 0 (S, T, E), A < 0 (E, N), B and C (S, T, N) -> y (S, T, E), in fp32 or more whatever autocast says. The
    states of `chunk` steps exist at a time, spans of `span` steps of them side by side; chunk is a multiple of span.
    """
    if chunk is None or span is None:
        chunk, span = CHUNKS.get(x.device.type, CHUNKS["cuda"])
    length = x.shape[1]
    x, dt, B, C = (z.transpose(0, 1) for z in (x, dt, B, C))
    if missing := -length % span:  # steps of no length at the end change nothing
        x, dt, B, C = (F.pad(z, (0, 0, 0, 0, 0, missing)) for z in (x, dt, B, C))
    with torch.autocast(x.device.type, enabled=False):
        y: Any = Scan.apply(x, dt, A.T.contiguous(), B, C, chunk, span)
    return y[:length].transpose(0, 1)


class Mixer(nn.Module):
    """The selective state space layer."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        width, inner, states, rank = (
            config.hidden_size, config.intermediate_size, config.state_size, config.time_step_rank
        )  # fmt: skip
        self.split = [rank, states, states]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        dt = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()  # section 3.6
        self.dt_proj.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt

    def forward(self, x: Tensor) -> Tensor:
        """(S, T, D) -> (S, T, D)."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.convolve(u.float()))
        dt, B, C = self.x_proj(u.to(x.dtype)).split(self.split, -1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias.float())
        y = selective_scan(u, dt, -self.A_log.float().exp(), B.float(), C.float()) + self.D.float() * u
        return self.out_proj((y * F.silu(z.float())).to(x.dtype))

    def convolve(self, u: Tensor) -> Tensor:
        """Each channel of u (S, T, E) with its own taps over this step and those before."""
        assert self.conv1d.bias is not None
        taps = self.conv1d.weight[:, 0].float().unbind(1)
        past = F.pad(u, (0, 0, len(taps) - 1, 0))
        y = self.conv1d.bias.float()
        for i, tap in enumerate(taps):
            y = torch.addcmul(y, past[:, i : i + u.shape[1]], tap)
        return y


class Block(nn.Module):
    """Norm and mixer around which x goes on in fp32."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x).to(self.norm.weight.dtype))


class Mamba(nn.Module):
    """Token ids to hidden states. No state depends on what comes later, so padding on the right changes none."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.coverage = ""  # of the files it was loaded from
        self.grad_checkpoint = False  # recompute each layer in the backward pass
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Mamba":
        """A published or saved model, from a folder or a hub name (see find_weights), in eval mode."""
        folder = find_weights(folder, "mamba weights")
        with torch.device("meta"):
            mamba = cls(MambaConfig.from_json(folder / "config.json"))
        mamba.coverage = load_strict(mamba, folder, dtype, device, ("lm_head.weight",), rename=own_name)
        return mamba.eval()

    @torch.no_grad()
    def grow(self, vocab: int) -> int:
        """Rows for `vocab` tokens at least: new ones are drawn with the mean and deviation of each column of the old.

        Returns how many are new, and says so in the coverage.
        """
        old = self.embeddings.weight
        new = max(vocab - len(old), 0)
        if new:
            deviation, mean = torch.std_mean(old.float(), 0)
            drawn = torch.randn(new, old.shape[1], device=old.device) * deviation + mean
            table = torch.cat([old, drawn.to(old.dtype)])
            self.embeddings = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
            self.config.vocab_size = vocab
            self.coverage += f"; {new:,} of {vocab:,} embedding rows are new"
        return new

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (S, T) -> fp32 states (S, T, D) after the final norm."""
        x = self.embeddings(ids).float()
        recompute = self.grad_checkpoint and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            run: Any = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False) if recompute else layer
            x = run(x)
        return self.norm_f(x)


def own_name(name: str) -> str:
    """Ours for a name of a hub file, which is a causal model's, and may be of the first generation."""
    name = name.removeprefix("backbone.")
    return "embeddings.weight" if name == "embedding.weight" else name


def checkpoint_folder(path: Path) -> Path | None:
    """The checkpoint that a run folder, or a checkpoint of one, stands for; None for anything else."""
    if (path / "checkpoints").is_dir() or (path / checkpoint.STATE).is_file():
        return checkpoint.resolve(path, prefer="best")
    return None


def compressor_identity(path: str | os.PathLike) -> dict[str, Any]:
    """What tells a compressor's weights from others."""
    where = Path(path) if Path(path).is_file() else find_weights(path, "compressor weights")
    files = identity(checkpoint_folder(where) or where)["files"]
    inner = identity(where / "mamba")["files"] if (where / "mamba").is_dir() else {}
    return {"name": str(path), "files": files | {f"mamba/{name}": value for name, value in inner.items()}}


class Compressor(nn.Module):
    """Histories to one row of the language model's width for each <MEM> in them (MultiMood's MambaCompressor)."""

    def __init__(self, mamba: Mamba, width: int, mem_id: int) -> None:
        """`width` of the language model, `mem_id` of <MEM> in its tokenizer; dtype and device are those of mamba."""
        super().__init__()
        like = mamba.embeddings.weight
        self.mem_id, self.coverage = mem_id, mamba.coverage
        self.fresh = False  # rows of its mamba were never trained
        self.mamba = mamba
        self.memory_projection = nn.Linear(like.shape[1], width, dtype=like.dtype, device=like.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        width: int,
        vocab: int,
        mem_id: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Compressor":
        """Trained, from a folder of its own, a MultiMood's or a run of ours, or new on a Mamba; in eval mode.

        A Mamba, of a folder or a hub name, gets a fresh projection and rows for the `vocab` tokens of the language
        model's tokenizer with <MEM>. UserError: there is none of these, or one for another tokenizer or width.
        """
        where = Path(path) if Path(path).is_file() else find_weights(path, "compressor weights")
        config = where / "config.json"
        if (where / PROJECTION).is_file():
            compressor = cls._of_folder(where, width, mem_id, dtype, device)
        elif config.is_file() and read_json(config).get("model_type") == "mamba":
            mamba = Mamba.from_pretrained(where, dtype, device)
            grown = mamba.grow(vocab)
            compressor = cls(mamba, width, mem_id)
            compressor.fresh = grown > 0
            compressor.coverage += "; memory_projection is new"
        elif (run := checkpoint_folder(where)) is not None:
            compressor = cls._of_tensors(checkpoint.read(run), run, width, mem_id).to(device, dtype)
        else:
            files = [where] if where.is_file() else model_files(where)
            tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
            compressor = cls._of_tensors(tensors, where, width, mem_id).to(device, dtype)
        has = compressor.mamba.config.vocab_size
        if has < vocab:
            raise UserError(f"{where}: made for another tokenizer: it knows {has:,} tokens, not {vocab:,}")
        return compressor.eval()

    @classmethod
    def _of_folder(
        cls, folder: Path, width: int, mem_id: int, dtype: torch.dtype, device: torch.device | str
    ) -> "Compressor":
        """Of mamba/, memory_projection.pt and config.json."""
        made = read_json(folder / "config.json").get("mem_token_id", mem_id)
        if made != mem_id:
            raise UserError(f"{folder}: made for another tokenizer: its <MEM> is token {made}, not {mem_id}")
        compressor = cls(Mamba.from_pretrained(folder / "mamba", dtype, device), width, mem_id)
        projection, file = compressor.memory_projection, folder / PROJECTION
        covered = load_renamed(projection, read_tensors(file), [], file)
        projection.to(device)
        compressor.coverage += f" of mamba, {covered} of memory_projection"
        return compressor

    @classmethod
    def _of_tensors(cls, whole: Mapping[str, Tensor], where: Path, width: int, mem_id: int) -> "Compressor":
        """Of those of the tensors of a whole model, or of what was trained beside its adapters, that are its own."""
        inside = [(name.partition(mark)[2], name) for name in whole for mark in INSIDE if mark in name]
        tensors = {own: whole[name] for own, name in inside}
        if not tensors:
            known = f"a Mamba, a folder with mamba/ and {PROJECTION}, a run of ours, or a MultiMood with {INSIDE[0]}*"
            raise UserError(f"{where}: holds no compressor, which is {known}")
        inner = {name.removeprefix("mamba."): tensor for name, tensor in tensors.items() if name.startswith("mamba.")}
        with torch.device("meta"):
            compressor = cls(Mamba(MambaConfig.of(inner, where)), width, mem_id)
        compressor.coverage = load_renamed(compressor, tensors, [], where)
        return compressor

    def forward(self, histories: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token ids of histories -> (number of <MEM>, width) of each, none for one without; see data/history.py."""
        weight, known = self.memory_projection.weight, self.mamba.config.vocab_size
        marks = [[i for i, token in enumerate(ids) if token == self.mem_id] for ids in histories]
        # nothing looks ahead, so what follows a last mark need not be read
        read = [torch.tensor(ids[: at[-1] + 1]) for ids, at in zip(histories, marks, strict=True) if at]
        if not read:
            return [weight.new_zeros(0, len(weight)) for _ in histories]
        ids = pad_sequence(read, batch_first=True)
        if not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise ValueError(f"a history has tokens from {int(ids.min())} to {int(ids.max())}, known are {known}")
        offsets = range(0, ids.numel(), ids.shape[1])
        places = [start + i for start, at in zip(offsets, filter(None, marks), strict=True) for i in at]
        states = self.mamba(ids.to(weight.device)).flatten(0, 1)
        memory = states.index_select(0, torch.tensor(places).to(weight.device))
        return list(self.memory_projection(memory.to(weight.dtype)).split([len(at) for at in marks]))
