"""Speed and memory of LoRA training beside transformers + peft: same weights, same samples, same order, one run.

Each variant of a case has a process of its own. They take turns, every turn begins with a step that does not count, and
each round gives one value of every number; the tables have the medians over rounds, and ratios of the same round.

ours                 model.mllm.pack and Mllm, in a process that has imported all that train_llm.py imports
transformers + peft  LlamaForCausalLM with sdpa and without a cache, its inputs_embeds padded to the longest of a batch;
                     projections of the visual slots and fused AdamW are the same
memory               peak of the timed steps above what the built model takes; on a GPU the peak of everything
useful FLOP/s        of what the samples need (real tokens, logits where there are labels, no gradient of frozen
                     weights), as a share of the rate of a large matmul in the same process
first step           seconds from the start of a process to the end of its first step

$ python bench/llm_train.py
$ python bench/llm_train.py --size 7b
$ python bench/llm_train.py --profile
"""

import os
import re
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.llm_train", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import header, memory, publish, spread, table, turns
from common import dist, optim
from common.config import UserError, opt, run

# what either variant needs besides is imported where it is built, for the time of its first step counts imports

PEER = "transformers + peft"
RANK, ALPHA, TARGETS = 64, 16, ["q_proj", "v_proj"]
PATCH, MERGE, WIDTH = 14, 4, 1408  # pixels of a patch, patches of a visual token, width of a patch: Emotion-LLaMA's
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176,
             "vocab_size": 500},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376,
              "vocab_size": 32_000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11_008,
           "vocab_size": 32_000},
}  # fmt: skip
LIMITS = {False: (1e-4, 1e-3), True: (1e-2, float("inf"))}  # relative, of losses and trained weights, by bf16
COLUMNS = (
    "s a step", "samples/s", "tokens/s", "memory, MiB", "useful FLOP/s over matmul's", "first step done after, s"
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a training step sees."""

    samples: int  # of a step
    lengths: tuple[int, int]  # tokens of a sample, least and most
    answers: tuple[int, int] | None = None  # labelled tokens at its end; None: all but the first
    image_size: int = 0  # pixels along a side of the picture whose tokens come first; 0: words only
    checkpointing: bool = False


CASES: dict[str, dict[str, Case]] = {
    "tiny": {
        "dense": Case(2, (24, 24)),
        "dense-checkpointing": Case(2, (24, 24), checkpointing=True),
        "ragged": Case(4, (24, 60), (4, 12), 56),
    },
    "small": {
        "dense": Case(4, (256, 256)),
        "dense-checkpointing": Case(4, (256, 256), checkpointing=True),
        "ragged": Case(8, (80, 420), (20, 120), 168),
    },
    "7b": {  # 12 samples have more than 4,096 tokens
        "ragged": Case(12, (300, 600), (20, 120), 448),
        "ragged-checkpointing": Case(12, (300, 600), (20, 120), 448, True),
        "1k-checkpointing": Case(2, (512, 512), (20, 120), 448, True),
    },
}


@dataclass
class Config:
    size: str = opt("small", "of the model; 7b is Llama-2's, in bf16, and needs a GPU", "--size", choices=tuple(SIZES))
    tiny: bool = opt(False, "a smoke run of seconds: --size tiny, one round of two steps", "--tiny")
    cases: list[str] = opt([], "which kinds of steps; none given: all of the size", "--cases")
    rounds: int = opt(4, "turns of each variant", "--rounds")
    steps: int = opt(4, "timed steps of a turn", "--steps")
    seed: int = opt(17, "of weights and samples", "--seed")
    threads: int = opt(2, "threads of PyTorch", "--threads")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    profile: bool = opt(False, "where the time of one step of ours goes, and no peer", "--profile")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


@dataclass
class Job:
    """What a process needs to know."""

    size: str
    case: str
    weights: str  # folder in transformers' layout; the 7B model is drawn where it is used
    device: torch.device
    threads: int
    steps: int  # in all
    seed: int


@dataclass
class Sample:
    """What model.mllm.pack reads."""

    id: str
    pieces: list[list[int] | str]
    answer: list[int]
    values: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        words = sum(len(piece) for piece in self.pieces if isinstance(piece, list))
        return words + sum(len(value) // (MERGE if name == "image" else 1) for name, value in self.values.items())

    @property
    def length(self) -> int:
        return len(self) + len(self.answer)


def draw(case: Case, vocab: int, steps: int, seed: int) -> list[list[Sample]]:
    """The samples of each step: random words, after a picture's patches and its CLS row where the case has them."""
    generator = np.random.default_rng(seed)
    patches = (case.image_size // PATCH) ** 2
    pictures = torch.randn(case.samples, patches + 1, WIDTH, generator=torch.Generator().manual_seed(seed))
    drawn: list[list[Sample]] = []
    for _ in range(steps):
        drawn.append([])
        for i in range(case.samples):
            values = {"image": pictures[i, 1:], "cls": pictures[i, :1]} if patches else {}
            taken = 1 + (patches // MERGE + 1 if patches else 0)
            length = int(generator.integers(case.lengths[0], case.lengths[1] + 1))
            answer = length - 1
            if case.answers is not None:
                answer = int(min(generator.integers(case.answers[0], case.answers[1] + 1), length - taken - 1))
            words = generator.integers(3, vocab, length - taken).tolist()
            split = len(words) - answer
            drawn[-1].append(Sample(str(i), [[1], *values, words[:split]], words[split:], values))
    return drawn


# --- the variants, each in a process of its own -----------------------------------------------------------------------


@dataclass
class Turn:
    """What a variant's steps of one round took."""

    seconds: float  # a step
    samples: float  # a second
    tokens: float  # a second
    memory: float  # MiB
    share: float  # of the matmul rate
    losses: list[float]  # of all its steps


class Trainer:
    """A model, its optimiser, and the samples of all steps."""

    model: Any

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.device, self.half = job, job.device, job.size == "7b"
        self.shape, self.case = SIZES[job.size], CASES[job.size][job.case]
        self.drawn = iter(draw(self.case, self.shape["vocab_size"], job.steps, job.seed))
        self.model = self.build().train()
        fill(self.model, lambda name, p: p.requires_grad and "lora_B" not in name)
        self.optimizer = optim.build(self.model, optim.OptimConfig(lr=1e-4))
        for p in self.model.parameters():
            p.sum()  # a weight may lie in a file until it is read
        self.built = memory("VmRSS")

    def build(self) -> nn.Module:
        raise NotImplementedError  # each variant its own

    def loss(self, samples: list[Sample]) -> Tensor:
        """Mean cross entropy over the labelled tokens."""
        raise NotImplementedError  # each variant its own

    def step(self, samples: list[Sample]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.loss(samples)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def first(self) -> tuple[float, float]:
        """Takes the first step; its loss, and when it was done."""
        return self.step(next(self.drawn)).item(), time.time()

    def turn(self, steps: int) -> Turn:
        losses = [self.step(next(self.drawn))]
        samples = [next(self.drawn) for _ in range(steps)]
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        began = time.perf_counter()
        losses += [self.step(each) for each in samples]
        self.wait()
        seconds = time.perf_counter() - began
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.empty_cache()  # the other variant's turn
        else:
            peak = memory("VmHWM") - self.built
        tokens = sum(sample.length for each in samples for sample in each)
        needed = sum(flops(self.shape, self.case, each) for each in samples)
        share = needed / seconds / matmul_rate(self.device, self.half)
        count = steps * self.case.samples
        return Turn(seconds / steps, count / seconds, tokens / seconds, peak, share, torch.stack(losses).tolist())

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def trained(self) -> dict[str, np.ndarray]:
        """What trains, by its name in ours."""
        named = self.model.named_parameters()
        return {own_name(name): p.detach().float().cpu().numpy() for name, p in named if p.requires_grad}


class Ours(Trainer):
    def build(self) -> nn.Module:
        import train_llm  # noqa: F401 (a training run imports no less)
        from model.llm import Llama, LlamaConfig
        from model.mllm import Mllm, MllmConfig

        dist.keep_memory(self.device)  # as train_llm.py does
        if self.half:
            with torch.device("meta"):
                llm = Llama(LlamaConfig.from_json(hf_config(self.shape))).bfloat16()
            fill(llm.to_empty(device=self.device))
        else:
            llm = Llama.from_pretrained(self.job.weights, device=self.device)
        self.cfg = MllmConfig(
            lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, lora_targets=TARGETS, features={}, visual_width=WIDTH,
            visual="drawn" if self.case.image_size else None, image_size=self.case.image_size, merge=MERGE,
            grad_checkpoint=self.case.checkpointing,
        )  # fmt: skip
        return Mllm(self.cfg, llm).to(self.device)

    def loss(self, samples: list[Sample]) -> Tensor:
        from model.mllm import pack

        batch = pack(samples, self.cfg)
        return self.model(batch.to(self.device)) / batch.targets


class Peer(Trainer):
    def build(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        if self.half:
            with self.device:
                config = LlamaConfig(**hf_config(self.shape))
                llm = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
            fill(llm)
        else:
            llm = LlamaForCausalLM.from_pretrained(
                self.job.weights, dtype=torch.float32, attn_implementation="sdpa"
            ).to(self.device)  # fmt: skip
        if self.case.checkpointing:
            llm.activation_checkpointing_enable({"use_reentrant": False})
        hidden = self.shape["hidden_size"]
        slots = {"image": WIDTH * MERGE, "cls": WIDTH} if self.case.image_size else {}
        adapted = get_peft_model(llm, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS))
        projections = nn.ModuleDict({name: nn.Linear(width, hidden) for name, width in slots.items()})
        return nn.ModuleDict({"llm": adapted, "projections": projections.to(self.device)})

    def loss(self, samples: list[Sample]) -> Tensor:
        longest = max(sample.length for sample in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        places: dict[str, list[int]] = {name: [] for name in samples[0].values}
        for i, sample in enumerate(samples):
            row: list[int] = []
            for piece in sample.pieces:
                if isinstance(piece, list):
                    row += piece
                    continue
                count = len(sample.values[piece]) // (MERGE if piece == "image" else 1)
                places[piece] += range(i * longest + len(row), i * longest + len(row) + count)
                row += [0] * count
            labels[i, len(row) : sample.length] = torch.tensor(sample.answer)
            ids[i, : sample.length] = torch.tensor(row + sample.answer)
            mask[i, : sample.length] = 1
        llm, projections = self.model["llm"], self.model["projections"]
        ids, labels, mask = (x.to(self.device) for x in (ids, labels, mask))
        x = llm.get_input_embeddings()(ids)
        for name, at in places.items():
            value = torch.stack([sample.values[name] for sample in samples]).to(self.device)
            rows = projections[name](value.reshape(-1, projections[name].in_features))
            x = x.flatten(0, 1).index_copy(0, torch.tensor(at, device=self.device), rows.to(x.dtype)).view_as(x)
        return llm(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss


def hf_config(shape: dict[str, Any]) -> dict[str, Any]:
    """A config.json of that shape; the end token is none that is drawn."""
    return {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 4096, **shape}


def make_weights(folder: Path, size: str, seed: int) -> None:
    """A random Llama in transformers' layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**hf_config(SIZES[size]))).save_pretrained(folder)


@torch.no_grad()
def fill(module: nn.Module, which: Callable[[str, nn.Parameter], bool] = lambda *_: True) -> None:
    """Draws the parameters by their names: the same in either variant. Frozen vectors, which are norms, are ones."""
    for name, p in module.named_parameters():
        if which(name, p):
            generator = torch.Generator(p.device).manual_seed(zlib.crc32(own_name(name).encode()))
            if p.ndim > 1 or "projections" in name:
                p.normal_(0.0, 0.02, generator=generator)
            else:
                p.fill_(1.0)


def own_name(name: str) -> str:
    """A parameter's name in ours, of its name in peft's."""
    return re.sub(r"base_model\.model\.|\.default|\.base_layer", "", name)


class Apart:
    """An object in a process of its own, which answers calls of its methods."""

    def __init__(self, kind: Callable[[Any], Any], job: Any) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.began = time.time()
        self.pool.submit(_hold, kind, job).result()

    def __call__(self, method: str, *args: Any) -> Any:
        return self.pool.submit(_answer, method, *args).result()

    def close(self) -> None:
        self.pool.shutdown()


_held: list[Any] = []


def _hold(kind: Callable[[Any], Any], job: Any) -> None:
    _held.append(kind(job))


def _answer(method: str, *args: Any) -> Any:
    return getattr(_held[0], method)(*args)


# --- what the machine and the work allow ------------------------------------------------------------------------------


def flops(shape: dict[str, Any], case: Case, samples: list[Sample]) -> float:
    """FLOPs that a step on these samples cannot do without, a multiply-add counted as two.

    Causal attention counts half of its square, backward twice its forward. With checkpointing the layers' forward
    counts twice, which is what the case asks for, but for its last product, which nothing in the backward needs.
    """
    d, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    lengths = [sample.length for sample in samples]
    tokens, labelled = sum(lengths), sum(len(sample.answer) for sample in samples)
    linears = tokens * (4 * d * d + 3 * d * inner)
    adapters = tokens * len(TARGETS) * 2 * d * RANK
    attention = sum(n * n for n in lengths) * d
    forward = layers * (linears + adapters + attention)
    backward = layers * (linears + 2 * adapters + 2 * attention)
    if not case.image_size:  # nothing trains below the first layer
        backward -= tokens * (3 * d * d + len(TARGETS) * d * RANK)
    if case.checkpointing:
        backward += forward - layers * tokens * d * inner
    head = 2 * labelled * d * shape["vocab_size"]
    slots = 2 * sum(value.numel() for sample in samples for value in sample.values.values()) * d
    return 2.0 * (forward + backward + head + slots)


def traffic(shape: dict[str, Any], case: Case, samples: list[Sample], half: bool) -> float:
    """Bytes that a step cannot but move.

    Frozen weights are read forward and backward, the activations that the gradients need (two norms' inputs, the
    adapters' input, q, k, v, the attention's output, gate and up of a layer; with checkpointing its input alone) are
    written and read, so are the logits; fused AdamW reads four and writes three numbers of each that trains.
    """
    d, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    tokens, labelled = (sum(n) for n in zip(*((s.length, len(s.answer)) for s in samples), strict=True))
    weights = layers * (4 * d * d + 3 * d * inner) + d * shape["vocab_size"]
    kept = tokens * layers * (d if case.checkpointing else 7 * d + 2 * inner)
    trained = layers * len(TARGETS) * 2 * d * RANK
    if case.image_size:
        trained += (MERGE + 1) * WIDTH * d
    return (2 if half else 4) * 2 * (weights + kept) + 4 * (2 * labelled * shape["vocab_size"] + 7 * trained)


def matmul_rate(device: torch.device, half: bool) -> float:
    """FLOP/s of a square matmul, the median of some."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if half else torch.float32) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written while copying, the median of some."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device)


def timed(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Seconds that it takes, after once that does not count."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return median(found[1:])


GROUPS = {
    "matmul": r"aten::(mm|addmm|bmm)$",
    "attention": r"attention|varlen",
    "loss": r"softmax|nll_loss|cross_entropy|logsumexp",
    "optimizer": r"adamw|Optimizer",
    "norm, rope, SwiGLU, residuals": r"rms_norm|aten::(mul|add|addcmul|silu|pow|mean|rsqrt|roll|sum|div|neg)",
    "copies": r"aten::(copy_|cat|clone|fill_|zero_|index|constant_pad|_?to_copy|stack|embedding)",
}  # what is none of these is "other"


def profile(job: Job) -> list[str]:
    """Lines of a table: the time of a step of ours by kinds of operations, and how far it is from the least."""
    from torch.autograd import DeviceType

    trainer = Ours(job)
    drawn = list(trainer.drawn)
    for samples in drawn[:-1]:
        seconds = timed(lambda samples=samples: trainer.step(samples), job.device, 1)
    cuda = job.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.step(drawn[-1])
        trainer.wait()
    spent = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel's time is that of the operation that launched it
            group = next((name for name, names in GROUPS.items() if re.search(names, event.key)), "other")
            spent[group] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    seconds = median(timed(lambda: trainer.step(drawn[-1]), job.device, 1) for _ in range(3))
    count, moved = flops(trainer.shape, trainer.case, drawn[-1]), traffic(trainer.shape, trainer.case, drawn[-1], cuda)
    rate, copied = matmul_rate(job.device, trainer.half), copy_rate(job.device)
    return [
        f"| {job.case}, one step of ours | s | share |", "|---|---|---|",
        *(f"| {name} | {s:.3g} | {s / sum(spent.values()):.1%} |" for name, s in spent.items()),
        f"| all, profiled | {sum(spent.values()):.3g} | |",
        f"| all, not profiled | {seconds:.3g} | |",
        f"| {count / 1e9:.4g} GFLOP at the {rate / 1e9:.4g} GFLOP/s of a matmul | {count / rate:.3g} | "
        f"{count / rate / seconds:.1%} of the step |",
        f"| {moved / 1e9:.3g} GB at the {copied / 1e9:.3g} GB/s of a copy | {moved / copied:.3g} | "
        f"{moved / copied / seconds:.1%} of the step |", "",
    ]  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def measure(job: Job, rounds: int, steps: int) -> list[str]:
    """Lines of the table of one case. UserError if the two do not train alike."""
    kinds: dict[str, type[Trainer]] = {"ours": Ours, PEER: Peer}
    apart: dict[str, Any] = {}
    found: dict[str, list[Turn]] = {name: [] for name in kinds}
    losses: dict[str, list[float]] = {}
    starts: dict[str, float] = {}
    try:
        for name, kind in kinds.items():
            apart[name] = Apart(kind, job)
            loss, done = apart[name]("first")
            losses[name], starts[name] = [loss], done - apart[name].began
        for name in turns(kinds, rounds, job.case):
            found[name].append(apart[name]("turn", steps))
            losses[name] += found[name][-1].losses
        trained = [apart[name]("trained") for name in kinds]
    finally:
        for each in apart.values():
            each.close()
    limits = LIMITS[job.size == "7b"]
    gap, drift = loss_gap(losses["ours"], losses[PEER], limits[0]), weight_gap(*trained, limits[1])
    return [
        f"| {job.case} | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", *rows(found, starts), "",
        f"{CASES[job.size][job.case]}; losses of {len(losses['ours'])} steps within {gap:.2g}, trained weights after "
        f"them within {drift:.2g}", "",
    ]  # fmt: skip


def rows(found: dict[str, list[Turn]], starts: dict[str, float]) -> list[str]:
    """A line of the table for each variant, and their ratios round by round."""

    def columns(each: list[Turn]) -> list[list[float]]:
        return [[getattr(t, key) for t in each] for key in ("seconds", "samples", "tokens", "memory", "share")]

    lines = []
    for name, each in found.items():
        lines.append(f"| {name} | {' | '.join(map(spread, columns(each)))} | {starts[name]:.3g} |")
    both = zip(*map(columns, found.values()), strict=True)
    ratios = [spread([ratio(a, b) for a, b in zip(ours, theirs, strict=True)]) for ours, theirs in both]
    return [*lines, f"| ours / theirs | {' | '.join(ratios)} | {starts['ours'] / starts[PEER]:.3g} |"]


def loss_gap(ours: list[float], theirs: list[float], limit: float) -> float:
    """The largest relative difference of two runs' losses. UserError above the limit."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    for i, gap in enumerate(gaps):
        if not gap <= limit:
            raise UserError(f"step {i}: loss {ours[i]:.7g}, {PEER} {theirs[i]:.7g}: they do not do the same work")
    return max(gaps)


def weight_gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], limit: float) -> float:
    """The largest difference of a trained tensor, as a share of its norm. UserError above the limit."""
    if ours.keys() != theirs.keys():
        raise UserError(f"these train in one of the two only: {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    gaps = {name: float(np.linalg.norm(ours[name] - w) / np.linalg.norm(w)) for name, w in theirs.items()}
    worst = max(gaps, key=gaps.__getitem__)
    if not gaps[worst] <= limit:
        raise UserError(f"{worst}: trained weights differ by {gaps[worst]:.2g}: they do not do the same work")
    return gaps[worst]


def ratio(ours: float, theirs: float) -> float:
    """Not a number beside nothing, as the memory of the smallest model may be."""
    return ours / theirs if theirs else float("nan")


def unmeasured(cases: list[str]) -> list[str]:
    """Lines of a table that says what only a GPU can show."""
    return table("--size 7b, needs a GPU", [(case, "not measured") for case in cases])


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    device = dist.ranks(cfg.device).device
    if cfg.tiny:
        cfg.size, cfg.rounds, cfg.steps = "tiny", 1, 2
    if cfg.size == "7b" and device.type != "cuda":
        raise UserError("--size 7b: needs a GPU")
    cases = cfg.cases or list(CASES[cfg.size])
    for case in cases:
        if case not in CASES[cfg.size]:
            raise UserError(f"--cases {case}: --size {cfg.size} has {', '.join(CASES[cfg.size])}")
    rounds = "" if cfg.profile else f", {cfg.rounds} rounds of {cfg.steps} steps; median (least to most)"
    what = f"{cfg.size}, r {RANK}{rounds}"
    lines = header("bench/llm_train.py", device, cfg.threads, what, ["transformers", "peft"])
    with TemporaryDirectory() as folder:
        if cfg.size != "7b":
            make_weights(Path(folder), cfg.size, cfg.seed)
        for case in cases:
            total = 3 if cfg.profile else 1 + cfg.rounds * (1 + cfg.steps)
            job = Job(cfg.size, case, folder, device, cfg.threads, total, cfg.seed)
            lines += profile(job) if cfg.profile else measure(job, cfg.rounds, cfg.steps)
    if device.type != "cuda" and not cfg.profile:
        lines += unmeasured(list(CASES["7b"]))
    publish(lines, cfg.write)


if __name__ == "__main__":
    run(Config, main)
