"""Turn a trained checkpoint into one file for use elsewhere, and check that the file gives the same logits.

torchscript   traced, for torch.jit.load in Python and C++; any batch size
torch_export  a graph for torch.export.load, AOTInductor and other compilers; any batch size
safetensors   a folder of weights and config.json, for model.fusion.load or other software
projectors    of train_clap.py: audio_proj and text_proj, weight and bias, as --clap-ckpt reads them; in the published
              layout where --out ends in .pt

The inputs are raw features of one clip a row, (B, D) or (B, T, D) as in the training data; normalisation is part of
the model, and a row of zeros is a modality that is absent.

$ python tools/export.py --ckpt out/mosei_fast --format torchscript
$ python tools/export.py projectors --ckpt out/clap_fast
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not tools/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "tools.export", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint, dist
from common.config import UserError, opt, run
from common.weights import read_json

# format -> file or folder below the run's export/
FORMATS = {
    "torchscript": "torchscript.pt", "torch_export": "torch_export.pt2", "safetensors": "safetensors",
    "projectors": "clap_projectors.safetensors",
}  # fmt: skip
FACTS = "config.json"  # beside the weights, or inside the file
MAP = ("weight", "bias")  # of a linear map
TOLERANCE = 1e-5  # largest difference of an output


@dataclass
class Config:
    ckpt: str | None = opt(None, "run folder, its checkpoints/ or one checkpoint; of a run the best", "--ckpt")
    format: str = opt(
        "torchscript", "form of the file; as the first word it needs no flag", "--format", choices=tuple(FORMATS)
    )
    out: str | None = opt(None, "file or folder to write; default: below export/ of the run", "--out")
    seed_index: str = opt(
        "best", "which of the checkpoint's seeds: best by valid score, a place from 0, or all (not of projectors)",
        "--seed-index",
    )  # fmt: skip
    device: str = opt("cpu", "device that the file will run on: traces may hold it", "--device")


@dataclass
class Part:
    """What one system's checkpoint gives to export."""

    model: nn.Module
    shapes: dict[str, tuple[int, ...]]  # input -> shape of one row, in the order of the model's arguments
    draw: Callable[[int], list[tuple[Tensor, ...]]]  # batches of n rows that the file must agree on
    facts: dict[str, Any]  # what a user of the file must know
    said: str
    gives: str = "logits"
    load: Callable[..., nn.Module] | None = None  # the model again from a folder of weights and its facts


def main(cfg: Config) -> None:
    if cfg.ckpt is None:
        raise UserError("--ckpt is needed: a run folder, its checkpoints/ or one checkpoint")
    folder = checkpoint.resolve(cfg.ckpt, prefer="best")
    state = checkpoint.read_state(folder)
    system = state.get("system")
    make, formats = SYSTEMS.get(system, (None, ()))
    if make is None or cfg.format not in formats:
        what = f"a checkpoint of system {system or 'unknown'} cannot be exported as {cfg.format}"
        known = "; ".join(f"{name}: {', '.join(formats)}" for name, (_, formats) in SYSTEMS.items())
        raise UserError(f"{folder}: {what} ({known})")
    part = make(folder, state, cfg, dist.ranks(cfg.device).device)
    out = _target(cfg, folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=out.parent) as made:
            WRITERS[cfg.format](part, Path(made, out.name))
            worst = difference(part, READERS[cfg.format](part, Path(made, out.name)))
            if not worst <= TOLERANCE:  # not a number is wrong too
                raise UserError(f"{out}: not written, its {part.gives} differ by {worst:.3g} from the checkpoint's")
            _place(Path(made, out.name), out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
    takes = ", ".join(f"{name} ({', '.join(map(str, ('B', *shape)))})" for name, shape in part.shapes.items())
    print(f"{out}: {part.said}\ntakes {takes}\nmax |difference| of {part.gives}: {worst:.3g}")


@torch.no_grad()
def difference(part: Part, again: Callable[..., Tensor]) -> float:
    """Largest difference between the outputs of a model and those of its exported form, for batches of 1 and 5."""
    gaps = [(part.model(*x) - again(*x)).abs().max() for n in (1, 5) for x in part.draw(n)]
    return float(torch.stack(gaps).max())  # NaN stays NaN


# --- systems ----------------------------------------------------------------------------------------------------------


def _mosei(folder: Path, state: dict[str, Any], cfg: Config, device: torch.device) -> Part:
    """A model of train_mosei.py: one seed with logits (B, C), or all K with (K, B, C)."""
    from model import fusion

    model, coverage = fusion.load(folder, state, device)
    seeds, chosen = state["seeds"], _seed(state, cfg.seed_index)
    if chosen is not None:
        seeds = [seeds[chosen]]
        model = fusion.one_seed(model, chosen)
    facts = {name: state[name] for name in ("system", "dims", "frames", "labels")}
    facts |= {"seeds": seeds, "config": {"model": asdict(model.cfg)}, "checkpoint": folder.name}
    shapes = {m: (dim,) if model.frames[m] == 1 else (model.frames[m], dim) for m, dim in model.dims.items()}

    def draw(n: int) -> list[tuple[Tensor, ...]]:
        """Rows like the training data, then with each modality absent and, of sequences, the second half."""
        x = []
        for m, shape in shapes.items():
            mean, std = model.get_buffer(f"mean_{m}"), model.get_buffer(f"std_{m}")
            # a column that never varied has an infinite deviation
            x.append(mean + torch.where(std.isfinite(), std, 1.0) * torch.randn(n, *shape, device=device))
            if len(shape) == 2:
                x[-1][0, (shape[0] + 1) // 2 :] = 0
        absent = [tuple(torch.zeros_like(v) if i == gone else v for i, v in enumerate(x)) for gone in range(len(x))]
        return [tuple(x), *absent]

    def load(place: Path, found: dict[str, Any]) -> nn.Module:
        return fusion.load(place, found, device)[0]

    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    said = f"{model.cfg.model}, {which} of {folder} ({coverage}), logits of {', '.join(state['labels'])}"
    return Part(model.requires_grad_(False), shapes, draw, facts, said, load=load)


def _seed(state: dict[str, Any], wanted: str) -> int | None:
    """The place of the seed to export: the one with the best valid score, or what the user asks for; None for all."""
    count, metric = len(state["seeds"]), state["config"]["metric"]
    if wanted == "all":
        return None
    if wanted == "best":
        worst = float("inf") if metric in ("loss", "mae") else -float("inf")
        found = [worst if watch["best"] is None else watch["best"] for watch in state["watches"]]
        return found.index(min(found) if worst > 0 else max(found))
    if not wanted.isdecimal() or int(wanted) >= count:
        raise UserError(f"--seed-index: {wanted!r} is not best, all or 0 to {count - 1} (this checkpoint's seeds)")
    return int(wanted)


class Projectors(nn.Module):
    """One seed's projectors of train_clap.py: raw embeddings (B, D) of sound and words -> unit vectors (2, B, W)."""

    def __init__(self, clap: Any, seed: int) -> None:
        super().__init__()
        self.clap, self.seed = clap, seed

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        made = []
        for m, x in (("audio", audio), ("text", text)):
            x, _ = self.clap.standardize(m, x)
            made.append(self.clap.project(m, x.expand(len(self.clap.logit_scale), *x.shape))[self.seed])
        return torch.stack(made)

    def linear(self) -> dict[str, dict[str, Tensor]]:
        """Weight and bias of each modality's map of raw embeddings: standardisation is a linear map too."""
        made = {}
        for m in ("audio", "text"):
            weight, bias = (self.clap.get_parameter(f"{m}_proj.{name}")[self.seed].double() for name in MAP)
            weight = weight / self.clap.get_buffer(f"std_{m}")
            bias = bias[0] - weight @ self.clap.get_buffer(f"mean_{m}").double()
            made[m] = {"weight": weight.float().cpu(), "bias": bias.float().cpu()}
        return made


def _clap(folder: Path, state: dict[str, Any], cfg: Config, device: torch.device) -> Part:
    """One seed's projectors, where they read one vector of sound and one of words."""
    from model import clap

    model, coverage = clap.load(folder, state, device)
    if set(model.sources) != set(clap.MODALITIES) or model.fronts:
        raise UserError(f"{folder}: frames and hashed words go through more than a linear map; only --ckpt holds that")
    chosen = _seed(state, cfg.seed_index)
    if chosen is None:
        raise UserError("--seed-index all: a file of projectors holds those of one seed")
    shapes = {m: (model.widths[m],) for m in clap.MODALITIES}

    def draw(n: int) -> list[tuple[Tensor, ...]]:
        """Rows like the training data, none so far out that it is cut."""
        x = []
        for m, shape in shapes.items():
            mean, std = model.get_buffer(f"mean_{m}"), model.get_buffer(f"std_{m}")
            # a column that never varied has an infinite deviation
            noise = torch.randn(n, *shape, device=device).clamp(-4, 4)
            x.append(mean + torch.where(std.isfinite(), std, 1.0) * noise)
        return [tuple(x)]

    facts = {"system": "clap", "seed": state["seeds"][chosen], "checkpoint": folder.name, "features": state["features"]}
    said = f"projectors, seed {facts['seed']} of {folder} ({coverage})"
    if model.cfg.normalize:
        said += f"; they standardise too, but do not cut embeddings beyond {model.limit:g} deviations as the run does"
    return Part(Projectors(model, chosen).requires_grad_(False), shapes, draw, facts, said, gives="unit vectors")


SYSTEMS: dict[str, tuple[Callable[[Path, dict[str, Any], Config, torch.device], Part], tuple[str, ...]]] = {
    "mosei": (_mosei, ("torchscript", "torch_export", "safetensors")),
    "clap": (_clap, ("projectors",)),
}


# --- formats ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _write_torchscript(part: Part, path: Path) -> None:
    with warnings.catch_warnings():
        # the number of seeds and the rank of each input are fixed on purpose; other sizes are checked after reading
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(part.model, part.draw(1)[0], check_trace=False)
        torch.jit.save(traced, path, _extra_files={FACTS: json.dumps(part.facts)})


def _read_torchscript(part: Part, path: Path) -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


@torch.no_grad()
def _write_torch_export(part: Part, path: Path) -> None:
    import torch.export

    batch = torch.export.Dim("batch", min=1)
    # two rows: a size of one would be taken for a constant
    x = part.draw(2)[0]
    program = torch.export.export(part.model, x, dynamic_shapes=(tuple({0: batch} for _ in x),))
    torch.export.save(program, path, extra_files={FACTS: json.dumps(part.facts)})


def _read_torch_export(part: Part, path: Path) -> Callable[..., Tensor]:
    import torch.export

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's own, and nobody writes
        return torch.export.load(path).module()


def _write_safetensors(part: Part, path: Path) -> None:
    path.mkdir()
    tensors = {name: value.contiguous().cpu() for name, value in part.model.state_dict().items()}
    # save_file would make the file readable for its owner only
    (path / checkpoint.MODEL).write_bytes(save(tensors))
    (path / FACTS).write_text(json.dumps(part.facts, indent=1))


def _read_safetensors(part: Part, path: Path) -> Callable[..., Tensor]:
    assert part.load is not None
    return part.load(path, read_json(path / FACTS))


def _write_projectors(part: Part, path: Path) -> None:
    maps = part.model.linear()
    if path.suffix == ".safetensors":
        tensors = {f"{m}_proj.{name}": value for m, one in maps.items() for name, value in one.items()}
        path.write_bytes(save(tensors, {FACTS: json.dumps(part.facts)}))
    else:
        torch.save({f"{m}_proj": one for m, one in maps.items()}, path)


def _read_projectors(part: Part, path: Path) -> Callable[..., Tensor]:
    from model.clap import original_projectors

    maps = original_projectors(path)

    def project(audio: Tensor, text: Tensor) -> Tensor:
        both = ((maps["audio"], audio.cpu()), (maps["text"], text.cpu()))
        made = torch.stack([F.normalize(F.linear(x, one["weight"], one["bias"]), dim=-1) for one, x in both])
        return made.to(audio.device)

    return project


WRITERS: dict[str, Callable[[Part, Path], None]] = {
    "torchscript": _write_torchscript,
    "torch_export": _write_torch_export,
    "safetensors": _write_safetensors,
    "projectors": _write_projectors,
}
READERS: dict[str, Callable[[Part, Path], Callable[..., Tensor]]] = {
    "torchscript": _read_torchscript,
    "torch_export": _read_torch_export,
    "safetensors": _read_safetensors,
    "projectors": _read_projectors,
}


# --- places -----------------------------------------------------------------------------------------------------------


def _target(cfg: Config, folder: Path) -> Path:
    """What to write; UserError where it would not fit the format."""
    of_run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    out = Path(cfg.out or of_run / "export" / FORMATS[cfg.format])
    wants_folder = cfg.format == "safetensors"
    if out.exists() and out.is_dir() != wants_folder:
        raise UserError(f"--out: {out} is a {'file' if wants_folder else 'folder'}, {cfg.format} writes the other")
    if cfg.format == "torch_export" and out.suffix != ".pt2":
        raise UserError(f"--out: {out} must end in .pt2, which torch.export.load expects")
    if cfg.format == "projectors" and out.suffix not in (".safetensors", ".pt"):
        raise UserError(f"--out: {out} must end in .safetensors or .pt, which --clap-ckpt reads")
    return out


def _place(made: Path, out: Path) -> None:
    """Moves what was made to its place; what else lies in a folder stays."""
    if made.is_file():
        made.replace(out)
        return
    out.mkdir(exist_ok=True)
    for file in made.iterdir():
        file.replace(out / file.name)


if __name__ == "__main__":
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--format")
    run(Config, main)
