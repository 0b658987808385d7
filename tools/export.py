"""Turn a trained checkpoint into a file or folder for use elsewhere, and check that it gives the same logits.

torchscript   traced, for torch.jit.load in Python and C++; any batch size
torch_export  a graph for torch.export.load, AOTInductor and other compilers; any batch size
safetensors   a folder of weights and config.json, for model.fusion.load or other software
projectors    of train_clap.py: audio_proj and text_proj, weight and bias, as --clap-ckpt reads them; in the published
              layout where --out ends in .pt

peft          of train_llm.py: the LoRA adapters as PEFT reads them over their language model
huggingface   of train_llm.py: the language model with them merged, a folder for transformers
              both: with the projections of pictures and features beside, which a README.md in the folder explains

The inputs are raw features of one clip a row, (B, D) or (B, T, D) as in the training data; normalisation is part of
the model, and a row of zeros is a modality that is absent. Those of a language model are token ids.

$ python tools/export.py --ckpt out/mosei_fast --format torchscript
$ python tools/export.py projectors --ckpt out/clap_fast
$ python tools/export.py huggingface --ckpt out/stage2 --dtype float16
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
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint, dist
from common.config import UserError, opt, run
from common.weights import check_names, read_json, read_tensors

# format -> file or folder below the run's export/
FORMATS = {
    "torchscript": "torchscript.pt", "torch_export": "torch_export.pt2", "safetensors": "safetensors",
    "projectors": "clap_projectors.safetensors", "peft": "peft", "huggingface": "huggingface",
}  # fmt: skip
FOLDERS = ("safetensors", "peft", "huggingface")  # formats of more than one file
DTYPES = ("float32", "float16", "bfloat16")
FACTS = "config.json"  # beside the weights, or inside the file
MAP = ("weight", "bias")  # of a linear map
TOLERANCE = 1e-5  # largest difference of an output
LLM_TOLERANCE = 1e-4  # of a logit: merged weights are rounded once
BATCHES = (1, 5)  # rows of the batches that are compared
PROJECTIONS, MULTIMODAL = "projections.safetensors", "emotorch.json"  # beside an exported language model


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
    llm: str | None = opt(None, "other place of the frozen language model than in training", "--llm")
    dtype: str = opt("float32", "of the weights of huggingface; 16 bits are rounded", "--dtype", choices=DTYPES)


@dataclass
class Part:
    """What one system's checkpoint gives to export."""

    model: nn.Module
    shapes: dict[str, tuple[int | str, ...]]  # input -> shape of one row, in the order of the model's arguments
    draw: Callable[[int], list[tuple[Tensor, ...]]]  # batches of n rows that the file must agree on
    facts: dict[str, Any]  # what a user of the file must know
    said: str
    gives: str = "logits"
    load: Callable[..., nn.Module] | None = None  # the model again from a folder of weights and its facts
    tolerance: float = TOLERANCE


def main(cfg: Config) -> None:
    if cfg.ckpt is None:
        raise UserError("--ckpt is needed: a run folder, its checkpoints/ or one checkpoint")
    folder = checkpoint.resolve(cfg.ckpt, prefer="best")
    state = checkpoint.read_state(folder)
    system = state.get("system")
    make, formats = SYSTEMS.get(system, (None, ()))
    if make is None or cfg.format not in formats:
        what = f"a checkpoint of system {system or 'llm'} cannot be exported as {cfg.format}"
        known = "; ".join(f"{name or 'llm'}: {', '.join(formats)}" for name, (_, formats) in SYSTEMS.items())
        raise UserError(f"{folder}: {what} ({known})")
    if cfg.dtype != "float32" and cfg.format != "huggingface":
        raise UserError(f"--dtype {cfg.dtype}: {cfg.format} is written as it was trained")
    part = make(folder, state, cfg, dist.ranks(cfg.device).device)
    out = _target(cfg, folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=out.parent) as made:
            WRITERS[cfg.format](part, Path(made, out.name))
            worst = difference(part, READERS[cfg.format](part, Path(made, out.name)))
            if not worst <= part.tolerance:  # not a number is wrong too
                raise UserError(f"{out}: not written, its {part.gives} differ by {worst:.3g} from the checkpoint's")
            _place(Path(made, out.name), out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
    takes = ", ".join(f"{name} ({', '.join(map(str, ('B', *shape)))})" for name, shape in part.shapes.items())
    print(f"{out}: {part.said}\ntakes {takes}\nmax |difference| of {part.gives}: {worst:.3g}")


@torch.no_grad()
def difference(part: Part, again: Callable[..., Tensor]) -> float:
    """Largest difference between the outputs of a model and those of its exported form, for batches of 1 and 5."""
    gaps = [(part.model(*x) - again(*x)).abs().max() for n in BATCHES for x in part.draw(n)]
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


class Told(nn.Module):
    """What a model of train_llm.py says to a few prompts. It is told once, so that the model may go."""

    def __init__(self, mllm: Any, tokenizer: Any, device: torch.device) -> None:
        super().__init__()
        self.mllm, self.tokenizer, self.device = mllm, tokenizer, device
        self.projections = {name: value.detach().cpu().clone() for name, value in mllm.projections.state_dict().items()}
        self.logits: dict[int, Tensor] = {}
        self.tell()

    @torch.no_grad()
    def tell(self) -> float:
        """Takes the model's logits; returns by how much they have changed."""
        before = self.logits
        self.logits = {n: self.mllm.llm(self.prompts(n)) for n in BATCHES}
        return max((float((self.logits[n] - old).abs().max()) for n, old in before.items()), default=0.0)

    def prompts(self, n: int) -> Tensor:
        """Ids (n, 16), the same in every call."""
        generator = torch.Generator().manual_seed(n)
        return torch.randint(self.mllm.llm.config.vocab_size, (n, 16), generator=generator).to(self.device)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[len(ids)]


def _llm(folder: Path, state: dict[str, Any], cfg: Config, device: torch.device) -> Part:
    """A language model of train_llm.py, whole or by its adapters, and the projections."""
    from model import lora, mllm

    made = state["config"]
    if cfg.format == "peft" and made["model"]["full"]:
        raise UserError(f"{folder}: was trained whole, so it has no adapters: --format huggingface")
    if cfg.format == "peft" and made["model"].get("lora_targets") == []:
        raise UserError(f"{folder}: its language model was not trained, so it has no adapters")
    few = made["model"].get("quant", "none")
    made["model"] |= {"quant": "none"} | ({"llm": cfg.llm} if cfg.llm else {})
    model, tokenizer, coverage = mllm.load(folder, state, device, torch.float32)
    told = Told(model, tokenizer, device)
    prompts = {n: told.prompts(n) for n in BATCHES}
    said = f"{cfg.format} of {folder} ({coverage})"
    if few != "none":
        said += f"; over the whole language model, though trained over {few}"
    if cfg.format == "huggingface":
        head = dict(lora.adapters(model.llm)).get("lm_head")
        if head is not None and model.llm.config.tie_word_embeddings:  # its update is none of the embeddings'
            head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)
            model.llm.config.tie_word_embeddings = False
        lora.merge_lora(model.llm)
        if cfg.dtype != "float32":
            for parameter in model.llm.parameters():
                parameter.data = parameter.data.to(getattr(torch, cfg.dtype)).float()
            said += f"; rounding to {cfg.dtype} moved its logits by up to {told.tell():.3g}"
    named = ("labels", "question", "prompt_layout", "chat_template", "streams", "speaker_norm")
    data = {name: made["data"].get(name) for name in named}
    facts = {"checkpoint": folder.name, "model": asdict(model.cfg), "data": data, "features": state["features"]}
    facts |= {"dtype": cfg.dtype, "base": (state["base"] or {}).get("name")}
    shapes = {"input_ids": ("T",)}
    return Part(told, shapes, lambda n: [(prompts[n],)], facts, said, tolerance=LLM_TOLERANCE)


SYSTEMS: dict[str | None, tuple[Callable[[Path, dict[str, Any], Config, torch.device], Part], tuple[str, ...]]] = {
    "mosei": (_mosei, ("torchscript", "torch_export", "safetensors")),
    "clap": (_clap, ("projectors",)),
    None: (_llm, ("peft", "huggingface")),
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


def _write_peft(part: Part, path: Path) -> None:
    from model.lora import save_peft

    save_peft(part.model.mllm.llm, path, part.facts["model"]["llm"])
    _write_beside(part, path, PEFT_README)


def _read_peft(part: Part, path: Path) -> Callable[..., Tensor]:
    from common.weights import find_weights
    from model.llm import Llama
    from model.lora import load_peft

    llm = Llama.from_pretrained(find_weights(part.facts["model"]["llm"]), torch.float32, part.model.device)
    load_peft(llm, path)
    return _read_beside(part, path, llm.eval())


def _write_huggingface(part: Part, path: Path) -> None:
    llm, tokenizer = part.model.mllm.llm, part.model.tokenizer
    llm.save_pretrained(path, getattr(torch, part.facts["dtype"]))
    tokenizer.save(path)
    ids = {"bos_token_id": llm.config.bos_token_id, "eos_token_id": tokenizer.eos_id}
    (path / "generation_config.json").write_text(json.dumps(ids, indent=1))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer.hub_config(), indent=1))
    _write_beside(part, path, MERGED_README)


def _read_huggingface(part: Part, path: Path) -> Callable[..., Tensor]:
    from model.llm import Llama

    return _read_beside(part, path, Llama.from_pretrained(path, torch.float32, part.model.device))


def _write_beside(part: Part, path: Path, readme: str) -> None:
    """What makes a language model multimodal, beside it, and a README.md; the model may then go."""
    save_file(part.model.projections, path / PROJECTIONS, {"format": "pt"})
    (path / MULTIMODAL).write_text(json.dumps(part.facts, indent=1))
    slots = dict.fromkeys(name.split(".")[0] for name in part.model.projections)
    text = readme.format(checkpoint=part.facts["checkpoint"], base=part.facts["model"]["llm"], path="this folder")
    text += BESIDE_README.format(slots=", ".join(slots) or "none")
    (path / "README.md").write_text(text)
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir():  # save_file makes files that only their owner may read
        file.chmod(0o666 & ~mask)
    part.model.mllm = None  # the check reads another of its size


def _read_beside(part: Part, path: Path, llm: nn.Module) -> Callable[..., Tensor]:
    """`llm`, where the projections are whole too."""
    found = read_tensors(path / PROJECTIONS)
    check_names(path / PROJECTIONS, part.model.projections, found)
    if wrong := [name for name, value in part.model.projections.items() if not torch.equal(found[name], value)]:
        raise UserError(f"{path / PROJECTIONS}: {wrong[0]} was not written as it is")
    return llm


PEFT_README = """# LoRA adapters of {checkpoint}

adapter_config.json and adapter_model.safetensors are what PEFT reads, over the language model it was trained on:

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = peft.PeftModel.from_pretrained(base, "{path}")
"""
MERGED_README = """# The language model of {checkpoint}

Its trained weights are part of it; the base was {base}.

    model = AutoModelForCausalLM.from_pretrained("{path}")
"""
BESIDE_README = """
That is the language model alone. What turns pictures and features of a clip into embeddings for it is in
projections.safetensors, slots {slots}: <slot>.weight (out, in) and <slot>.bias (out). A slot's rows x give
x @ weight.T + bias, which are `feature_tokens` embeddings each; of "image" `merge` neighbouring rows are first joined
to one. Where a slot has mean and std, x is (x - mean) / (std * sqrt(width)) first. emotorch.json says the rest: the
slots' widths, `merge`, which encoders made the rows, the labels of the question and the layout of the prompt.
"""
WRITERS: dict[str, Callable[[Part, Path], None]] = {
    "torchscript": _write_torchscript,
    "torch_export": _write_torch_export,
    "safetensors": _write_safetensors,
    "projectors": _write_projectors,
    "peft": _write_peft,
    "huggingface": _write_huggingface,
}
READERS: dict[str, Callable[[Part, Path], Callable[..., Tensor]]] = {
    "torchscript": _read_torchscript,
    "torch_export": _read_torch_export,
    "safetensors": _read_safetensors,
    "projectors": _read_projectors,
    "peft": _read_peft,
    "huggingface": _read_huggingface,
}


# --- places -----------------------------------------------------------------------------------------------------------


def _target(cfg: Config, folder: Path) -> Path:
    """What to write; UserError where it would not fit the format."""
    of_run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    out = Path(cfg.out or of_run / "export" / FORMATS[cfg.format])
    wants_folder = cfg.format in FOLDERS
    if out.exists() and out.is_dir() != wants_folder:
        raise UserError(f"--out: {out} is a {'file' if wants_folder else 'folder'}, {cfg.format} writes the other")
    if cfg.format == "torch_export" and out.suffix != ".pt2":
        raise UserError(f"--out: {out} must end in .pt2, which torch.export.load expects")
    if cfg.format == "projectors" and out.suffix not in (".safetensors", ".pt"):
        raise UserError(f"--out: {out} must end in .safetensors or .pt, which --clap-ckpt reads")
    return out


def _place(made: Path, out: Path) -> None:
    """Moves what was made to its place; what else lies in a folder stays, but for weights that were cut otherwise."""
    if made.is_file():
        made.replace(out)
        return
    out.mkdir(exist_ok=True)
    for old in out.glob("model*.safetensors*"):  # an index of earlier shards would be believed
        if not (made / old.name).exists():
            old.unlink()
    for file in made.iterdir():
        file.replace(out / file.name)


if __name__ == "__main__":
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--format")
    run(Config, main)
