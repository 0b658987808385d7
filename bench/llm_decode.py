"""Speed of decoding and of label scoring beside transformers' generate: same weights, same prompts, one run.

Each variant has a process of its own that holds the model with its adapters merged; they take turns, each round gives
one value of every number, and the tables have the medians over rounds, and ratios of the same round.

ours                  model.generate.generate, on a GPU with CUDA graphs; in the last table score_labels, as eval.py
                      --decode score calls it
transformers          generate with sdpa and a cache, not compiled, prompts of a batch padded on the left
, compiled            ours with --compile-steps; theirs with a static cache and torch.compile of the whole model, which
                      a user writes; what compiling takes does not count
of the bandwidth      bytes of the weights that a step reads, and of the keys and values at its middle, over what the
                      machine copies in the same time (a batch of 1 cannot be faster)
scoring               9 labels of one to four tokens after each prompt, against generating the answer: 8 tokens in
                      batches of 8, and 20 one prompt at a time as Emotion-LLaMA's script does
checks                both give the same tokens; probabilities of labels equal those of transformers, one sequence at a
                      time

$ python bench/llm_decode.py
$ python bench/llm_decode.py --size 7b
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.llm_decode", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import numpy as np
import torch

from bench.llm_train import (
    ALPHA,
    RANK,
    SIZES,
    TARGETS,
    Apart,
    copy_rate,
    fill,
    hf_config,
    make_weights,
    ratio,
    unmeasured,
)  # fmt: skip
from bench.report import header, memory, publish, spread, turns
from common import dist
from common.config import UserError, opt, run

PEER = "transformers"
COMPILED, COMPILED_PEER = "ours, compiled", f"{PEER}, compiled"
LABELS, LONGEST = 9, 4  # of the scored answers: how many, and tokens of one at most
BATCH = 8  # prompts that are scored together
GENERATED = {"generate 8, batch 8": (BATCH, 8), "generate 20, batch 1": (1, 20)}  # prompts at a time, new tokens
LIMIT = 1e-5  # of the probabilities' difference in float32
COLUMNS = ("s", "new tokens/s", "of the bandwidth", "memory, MiB")


@dataclass(frozen=True)
class Case:
    """Prompts that are continued together."""

    batch: int
    lengths: tuple[int, int]  # of a prompt, least and most
    new: int


CASES: dict[str, dict[str, Case]] = {
    "tiny": {"alone": Case(1, (12, 12), 6), "ragged": Case(4, (4, 12), 6)},
    "small": {"alone": Case(1, (128, 128), 128), "ragged": Case(8, (40, 128), 128)},
    "7b": {"alone": Case(1, (128, 128), 128), "ragged": Case(32, (40, 128), 128)},
}
SCORED = {"tiny": 9, "small": 64, "7b": 64}  # prompts


@dataclass
class Config:
    size: str = opt("small", "of the model; 7b is Llama-2's, in bf16, and needs a GPU", "--size", choices=tuple(SIZES))
    tiny: bool = opt(False, "a smoke run of seconds: --size tiny, one round, nothing compiled", "--tiny")
    compiled: bool = opt(True, "decode by compiled steps too, either of the two", "--compiled")
    scoring: bool = opt(True, "score labels too", "--scoring")
    rounds: int = opt(4, "turns of each variant", "--rounds")
    checked: int = opt(4, "prompts whose probabilities are compared", "--checked")
    seed: int = opt(17, "of weights and prompts", "--seed")
    threads: int = opt(2, "threads of PyTorch", "--threads")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


@dataclass
class Job:
    """What a process needs to know."""

    size: str
    weights: str  # folder in transformers' layout; the 7B model is drawn where it is used
    device: torch.device
    threads: int
    seed: int


def draw(size: str, count: int, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    """Random sequences of that many tokens."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(lengths[0], lengths[1] + 1, count)
    return [generator.integers(3, SIZES[size]["vocab_size"], n).tolist() for n in sizes]


# --- the variants, each in a process of its own -----------------------------------------------------------------------


@dataclass
class Turn:
    seconds: float
    memory: float  # MiB
    share: float  # of the copy rate
    answer: Any


class Decoder:
    """A model with merged adapters, and what it is asked."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.device, self.half = job, job.device, job.size == "7b"
        self.llm: Any = self.build()
        self.built = memory("VmRSS")
        self.known: set[str] = set()  # cases that were generated before

    def build(self) -> Any:
        raise NotImplementedError  # each variant its own

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The likeliest tokens, exactly `new` of them."""
        raise NotImplementedError  # each variant its own

    def score(self, prompts: list[list[int]], labels: list[list[int]]) -> np.ndarray:
        """Probabilities (B, L) of the labels."""
        raise NotImplementedError  # each variant its own

    def turn(self, method: str, *args: Any) -> Turn:
        """What `method` takes, and what it answers; the share counts as if it were a generation."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        began = time.perf_counter()
        answer = getattr(self, method)(*args)  # lists and arrays: nothing is left to wait for
        seconds = time.perf_counter() - began
        peak = memory("VmHWM") - self.built
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        return Turn(seconds, peak, 0.0, answer)

    def case(self, name: str, prompts: list[list[int]]) -> Turn:
        """A generation, after one that does not count: a short one, but the first time, when programs are compiled."""
        new = CASES[self.job.size][name].new
        self.generate(prompts, 2 if name in self.known else new)
        self.known.add(name)
        turn = self.turn("generate", prompts, new)
        turn.share = step_bytes(SIZES[self.job.size], prompts, new, self.half) * new / turn.seconds
        turn.share /= copy_rate(self.device)
        return turn

    def generate_all(self, prompts: list[list[int]], batch: int, new: int) -> None:
        for i in range(0, len(prompts), batch):
            self.generate(prompts[i : i + batch], new)


class Ours(Decoder):
    compiled = False

    def build(self) -> Any:
        from model.llm import Llama, LlamaConfig
        from model.lora import add_lora, merge_lora

        if self.half:
            with torch.device("meta"):
                llm = Llama(LlamaConfig.from_json(hf_config(SIZES[self.job.size]))).bfloat16()
            fill(llm.to_empty(device=self.device))
        else:
            llm = Llama.from_pretrained(self.job.weights, device=self.device)
        add_lora(llm, TARGETS, RANK, ALPHA)
        fill(llm, lambda name, p: p.requires_grad)
        merge_lora(llm)
        return llm.eval()

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        from model.generate import generate

        return generate(self.llm, prompts, new, eos_id=[], graphs=self.device.type == "cuda", compiled=self.compiled)

    def score(self, prompts: list[list[int]], labels: list[list[int]]) -> np.ndarray:
        from model.generate import score_labels

        batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        return torch.cat([score_labels(self.llm, batch, labels) for batch in batches]).softmax(1).cpu().numpy()


class Compiled(Ours):
    compiled = True


class Peer(Decoder):
    cache: str | None = None  # of generate's kinds; none: one that grows

    def build(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        if self.half:
            with self.device:
                config = LlamaConfig(**hf_config(SIZES[self.job.size]))
                llm = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
            fill(llm)
        else:
            llm = LlamaForCausalLM.from_pretrained(
                self.job.weights, dtype=torch.float32, attn_implementation="sdpa"
            ).to(self.device)  # fmt: skip
        adapted = get_peft_model(llm, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
        fill(adapted, lambda name, p: p.requires_grad)
        merged: Any = adapted.merge_and_unload()
        merged.generation_config.eos_token_id, merged.generation_config.pad_token_id = None, 0
        return merged.eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        found = self.llm.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True,
            cache_implementation=self.cache,
        )  # fmt: skip
        return found[:, longest:].tolist()

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], labels: list[list[int]]) -> np.ndarray:
        """One sequence at a time, without a cache."""
        scores = torch.zeros(len(prompts), len(labels))
        for i, prompt in enumerate(prompts):
            for j, label in enumerate(labels):
                logits = self.llm(torch.tensor([prompt + label], device=self.device)).logits[0, len(prompt) - 1 : -1]
                target = torch.tensor(label, device=self.device)[:, None]
                scores[i, j] = logits.float().log_softmax(-1).gather(1, target).sum()
        return scores.softmax(1).numpy()


class CompiledPeer(Peer):
    cache = "static"

    def build(self) -> Any:
        llm = super().build()
        if self.device.type != "cuda":  # where generate compiles the step of a static cache itself
            llm.forward = torch.compile(llm.forward)
        return llm


def step_bytes(shape: dict[str, Any], prompts: list[list[int]], new: int, half: bool) -> float:
    """Bytes that a step in the middle of a generation cannot but read: linears, head, keys and values."""
    d, layers = shape["hidden_size"], shape["num_hidden_layers"]
    weights = layers * (4 * d * d + 3 * d * shape["intermediate_size"]) + d * shape["vocab_size"]
    cached = 2 * layers * d * (sum(map(len, prompts)) + len(prompts) * new / 2)
    return (2 if half else 4) * (weights + cached)


# --- the report -------------------------------------------------------------------------------------------------------


def decoding(variants: dict[str, Any], job: Job, rounds: int) -> list[str]:
    """Lines of a table for each kind of batch. UserError if the two do not give the same tokens."""
    lines = []
    for name, case in CASES[job.size].items():
        prompts = draw(job.size, case.batch, case.lengths, job.seed)
        found: dict[str, list[Turn]] = {variant: [] for variant in variants}
        for variant in turns(variants, rounds, name):
            found[variant].append(variants[variant]("case", name, prompts))
        ours = [variant for variant in variants if PEER not in variant]
        same = min(
            same_tokens(found[variant][0].answer, found[PEER][0].answer, exact=job.size != "7b") for variant in ours
        )
        count = case.batch * case.new
        columns = {
            variant: [[t.seconds for t in each], [count / t.seconds for t in each], [t.share for t in each],
                      [t.memory for t in each]]
            for variant, each in found.items()
        }  # fmt: skip
        pairs = [(variant, PEER) for variant in variants if variant != PEER]
        pairs += [(COMPILED, COMPILED_PEER)] if COMPILED in variants else []
        ratios = {
            f"{one} / {other}": [[ratio(a, b) for a, b in zip(*both, strict=True)]
                                 for both in zip(columns[one], columns[other], strict=True)]
            for one, other in pairs
        }  # fmt: skip
        lines += [
            f"| {name}: {case.batch} of {case.lengths[0]} to {case.lengths[1]}, {case.new} new | "
            f"{' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|",
            *(f"| {variant} | {' | '.join(map(spread, each))} |" for variant, each in columns.items()),
            *(f"| {pair} | {' | '.join(map(spread, each))} |" for pair, each in ratios.items()), "",
            f"the same tokens: {same:.1%}", "",
        ]  # fmt: skip
    return lines


def scoring(variants: dict[str, Any], job: Job, rounds: int, checked: int) -> list[str]:
    """Lines of the table of label scoring. UserError if the probabilities are not those of one sequence at a time."""
    prompts = draw(job.size, SCORED[job.size], CASES[job.size]["ragged"].lengths, job.seed)
    labels = draw(job.size, LABELS, (1, LONGEST), job.seed + 1)
    found: dict[str, list[float]] = {"ours": [], **{name: [] for name in GENERATED}}
    probabilities = variants["ours"]("turn", "score", prompts, labels).answer
    alone = variants[PEER]("turn", "score", prompts[:checked], labels).answer
    gap = probability_gap(probabilities[:checked], alone, LIMIT if job.size != "7b" else float("inf"))
    for name in turns(found, rounds, "scoring"):
        if name == "ours":
            found[name].append(variants["ours"]("turn", "score", prompts, labels).seconds)
        else:
            found[name].append(variants[PEER]("turn", "generate_all", prompts, *GENERATED[name]).seconds)
    lines = [f"| {LABELS} labels, {len(prompts)} prompts | s | times ours |", "|---|---|---|"]
    for name, each in found.items():
        ratios = [a / b for a, b in zip(each, found["ours"], strict=True)]
        who = name if name == "ours" else f"{PEER}, {name}"
        lines.append(f"| {who} | {spread(each)} | {spread(ratios)} |")
    return [*lines, "", f"probabilities of {checked} prompts within {gap:.2g} of one sequence at a time", ""]


def same_tokens(ours: list[list[int]], theirs: list[list[int]], exact: bool = True) -> float:
    """The share of rows that are the same. UserError if they should all be."""
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    if exact and not all(same):
        i = same.index(False)
        raise UserError(f"prompt {i}: ours continues {ours[i]}, {PEER} {theirs[i]}: they do not do the same work")
    return sum(same) / len(same)


def probability_gap(ours: np.ndarray, theirs: np.ndarray, limit: float) -> float:
    """The largest difference. UserError above the limit."""
    gap = float(np.abs(ours - theirs).max())
    if not gap <= limit:
        raise UserError(f"probabilities differ by {gap:.2g} from those of one sequence at a time")
    return gap


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    device = dist.ranks(cfg.device).device
    if cfg.tiny:
        cfg.size, cfg.rounds, cfg.compiled = "tiny", 1, False
    if cfg.size == "7b" and device.type != "cuda":
        raise UserError("--size 7b: needs a GPU")
    what = f"{cfg.size}, {cfg.rounds} rounds; median (least to most)"
    lines = header("bench/llm_decode.py", device, cfg.threads, what, ["transformers", "peft"])
    with TemporaryDirectory() as folder:
        if cfg.size != "7b":
            make_weights(Path(folder), cfg.size, cfg.seed)
        job = Job(cfg.size, folder, device, cfg.threads, cfg.seed)
        kinds: dict[str, type[Decoder]] = {"ours": Ours, PEER: Peer}
        if cfg.compiled:
            kinds |= {COMPILED: Compiled, COMPILED_PEER: CompiledPeer}
        variants = {name: Apart(kind, job) for name, kind in kinds.items()}
        try:
            lines += decoding(variants, job, cfg.rounds)
            if cfg.scoring:
                lines += scoring(variants, job, cfg.rounds, cfg.checked)
        finally:
            for each in variants.values():
                each.close()
    if device.type != "cuda":
        lines += unmeasured([*CASES["7b"], "scoring"])
    publish(lines, cfg.write)


if __name__ == "__main__":
    run(Config, main)
