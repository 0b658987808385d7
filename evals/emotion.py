"""Emotion recognition with the multimodal language model: score the labels, or read one from generated text."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import dist, metrics
from common.config import UserError, opt
from common.shard import place
from data.clips import ClipData, ClipSample
from data.prompts import DFEW7, EMOTIONS6, encode_answer, extract_label
from evals.openset import built_in
from model.combine import Ensemble
from model.mllm import Batch, Mllm, pack
from model.tokenizer import Tokenizer

# what MER2023's feature folders are called in MER2024
FOLDERS_2024 = {"mae_340_UTT": "mae_340_23_UTT", "maeV_399_UTT": "maeVideo_399_23_UTT", "HL-UTT": "HL_23_UTT"}


Follow = Callable[[str, str], bool]  # a sample's id, its answer so far -> whether it goes on


@dataclass(frozen=True)
class Benchmark:
    """What is asked of which clips; what is left out comes from the training run."""

    about: str
    task: str = "emotion"
    labels: tuple[str, ...] = ()  # that are scored
    asked: tuple[str, ...] = ()  # that the question names
    file: str | None = None  # list of clips below data_root
    folders: dict[str, str] = field(default_factory=dict)  # stream -> folder, where it is called otherwise


BENCHMARKS = {
    "mer2023": Benchmark("six labels of a MERR list", labels=EMOTIONS6),
    "mer2024": Benchmark(
        "six labels of MER2024-NOISE", labels=EMOTIONS6, asked=EMOTIONS6, file="MER2024-noise_NCE.txt",
        folders=FOLDERS_2024,
    ),
    "dfew": Benchmark("seven labels, five folds of DFEW, zero-shot", labels=DFEW7, asked=DFEW7),
    "emer": Benchmark("explanations scored by a judge", "reason_v2", file="EMER_NCE.txt"),
    "mer-ov": Benchmark("emotion words of any wording, as sets", "reason_v2", file="EMER_332_NCE.txt"),
    "clips": Benchmark("any manifest or list"),
}  # fmt: skip
METRICS = (  # what evaluate() and loss() give and a checkpoint can be chosen by
    "weighted_f1", "accuracy", "war", "uar", "macro_f1", "precision_weighted", "recall_weighted", "invalid",
    "clue_overlap", "label_overlap", "loss",
)  # fmt: skip
LOWER = ("loss", "invalid")  # of these the lower is the better
OF_DESCRIPTIONS = ("clue_overlap", "label_overlap")  # of these the answers are descriptions


@dataclass
class DecodeConfig:
    decode: str = opt(
        "score", "score: likelihood of each label; generate: free text", "--decode", choices=("score", "generate")
    )
    balance: float = opt(
        0.0, "score: divide a label's probability by its share of the training answers to this power; 0: leave it",
        "--balance",
    )  # fmt: skip
    extract: str = opt(
        "robust", "how a label is read from text (original: its last word)", choices=("robust", "original")
    )
    max_new_tokens: int = opt(500, "longest generated answer", "--max-new-tokens")
    num_beams: int = opt(1, "beam search width", "--num-beams")
    temperature: float = opt(0.0, "0: greedy", "--temperature")
    top_p: float = opt(1.0, "nucleus sampling: smallest set of tokens with this probability", "--top-p")
    repetition_penalty: float = opt(1.0, "above 1 discourages repeated tokens")
    cuda_graphs: bool = opt(False, "generate by replaying CUDA graphs, on a GPU", "--cuda-graphs")
    compile_steps: bool = opt(
        False, "generate by compiled steps: half a minute or more before the first; a CPU needs a C++ compiler",
        "--compile-steps",
    )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What model.generate.generate() is told of them."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty, "graphs": self.cuda_graphs,
            "compiled": self.compile_steps,
        }  # fmt: skip


def answer(
    mllm: Mllm | Ensemble,
    tokenizer: Tokenizer,
    samples: Sequence[ClipSample],
    labels: Sequence[str],
    cfg: DecodeConfig,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    follow: Follow | None = None,
    counts: Mapping[str, int] | None = None,
) -> list[dict]:
    """One record a sample: id, label, prediction (None: no label in the answer), answer; probabilities when scoring.

    `follow` sees answers grow while they are generated, without beams. `counts`: how often each label was trained, for
    cfg.balance.
    """
    order = sorted(
        range(len(samples)), key=lambda i: -sum(len(p) if isinstance(p, list) else 1 for p in samples[i].pieces)
    )
    candidates = [encode_answer(label, tokenizer.encode) for label in labels]
    records: dict[int, dict] = {}
    device = place(mllm)
    bar = tqdm(
        total=len(order), desc=cfg.decode, unit="clip", disable=not (progress and sys.stderr.isatty()), leave=False
    )
    for start in range(0, len(order), batch_size):  # neighbours in length share a batch
        chosen = order[start : start + batch_size]
        with torch.inference_mode():
            batch = pack([samples[i] for i in chosen], mllm.cfg, answers=False).to(device)
            if cfg.decode == "score":
                found = _score(balanced(mllm.score(batch, candidates), labels, counts or {}, cfg.balance), labels)
            else:
                found = _generate(mllm, tokenizer, batch, labels, cfg, seed + start, follow)
        for i, record in zip(chosen, found, strict=True):
            sample = samples[i]
            asked = {"task": sample.task, "prompt": sample.prompt, "target": sample.target, "path": sample.path}
            asked |= {"start": sample.start, "end": sample.end} if sample.start or sample.end else {}
            records[i] = {"id": sample.id, "label": sample.label, **record, **asked}
        bar.update(len(chosen))
    bar.close()
    return [records[i] for i in range(len(samples))]


def balanced(probabilities: Tensor, labels: Sequence[str], counts: Mapping[str, int], power: float) -> Tensor:
    """Probabilities (B, L) of labels over what share of the training answers they were, to a power; their sum is 1.

    Logit adjustment (Menon et al., ICLR 2021): what was common in training is else answered too often for any mean over
    classes. A label that was never trained is taken for one of mean frequency.
    """
    known = [counts[label] for label in labels if counts.get(label)]
    if not power or not known:
        return probabilities
    mean = sum(known) / len(known)
    weights = torch.tensor([(counts.get(label) or mean) / mean for label in labels], device=probabilities.device)
    return (probabilities.log() - power * weights.log()).softmax(-1)  # a power of a rare label's share may underflow


def check(cfg: DecodeConfig, counted: bool) -> None:
    """UserError where answers cannot be had as asked; `counted`: it is known how often labels were trained."""
    if not 0 <= cfg.balance < math.inf:
        raise UserError(f"--balance: {cfg.balance:g} is no power of 0 or more")
    if cfg.balance and cfg.decode != "score":
        raise UserError("--balance: generated answers have no probabilities of labels (--decode score)")
    if cfg.balance and not counted:
        raise UserError("--balance: the checkpoint does not tell how often each label was trained")
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile chooses
    if cfg.compile_steps and not (torch.cuda.is_available() or shutil.which(cxx)):
        raise UserError(f"--compile-steps: needs a C++ compiler, and there is no {cxx}")


def _score(probabilities: Tensor, labels: Sequence[str]) -> list[dict]:
    rows = probabilities.tolist()
    best = [max(range(len(labels)), key=row.__getitem__) for row in rows]
    return [
        {"prediction": labels[b], "answer": labels[b], "probabilities": dict(zip(labels, row, strict=True))}
        for b, row in zip(best, rows, strict=True)
    ]


def _generate(
    mllm: Mllm | Ensemble, tokenizer: Tokenizer, batch: Batch, labels: Sequence[str], cfg: DecodeConfig, seed: int,
    follow: Follow | None,
) -> list[dict]:  # fmt: skip
    generator = torch.Generator(batch.input_ids.device).manual_seed(seed) if cfg.temperature > 0 else None
    ids = mllm.generate(
        batch, cfg.max_new_tokens, **cfg.settings(), eos_id=tokenizer.eos_id, generator=generator,
        follow=follow and spelled(follow, batch.ids, tokenizer),
    )  # fmt: skip
    answers = [tokenizer.decode(row).strip() for row in ids]
    return [{"prediction": extract_label(text, labels, cfg.extract), "answer": text} for text in answers]


def spelled(follow: Follow, ids: Sequence[str], tokenizer: Tokenizer) -> Callable[[int, list[int]], bool]:
    """`follow` as model/generate.py calls it, for a batch of the samples `ids`."""

    def said(row: int, tokens: list[int]) -> bool:
        # a character whose bytes are not all there yet ends the text as a replacement character
        return follow(ids[row], tokenizer.decode(tokens).strip().rstrip("\ufffd"))

    return said


def score(records: list[dict], labels: Sequence[str], extract: str = "robust") -> dict:
    """Scores of records beside the majority class; `invalid` is the share of answers without a label of the list.

    With the original extraction an answer without a label counts as neutral, as the published numbers had it.
    """
    fallback = "neutral" if extract == "original" and "neutral" in labels else None
    truth = [record["label"] for record in records]
    predicted = [record["prediction"] if record["prediction"] is not None else fallback for record in records]
    scores = metrics.classification(truth, predicted, labels)
    scores["invalid"] = sum(record["prediction"] is None for record in records) / len(records)
    scores["clips"] = len(records)
    told = [(r["target"], r["answer"]) for r in records if r["task"] != "emotion" and r["target"]]
    if told:  # as the lexical judge of evals/judge.py counts them, 0 to 10
        scores["clue_overlap"] = sum(metrics.clue_overlap(*pair) for pair in told) / len(told)
        scores["label_overlap"] = sum(built_in().shared(*pair)[0] for pair in told) / len(told)
    return scores | {"majority": metrics.majority(truth, labels)}


def ask(
    mllm: Mllm | Ensemble,
    tokenizer: Tokenizer,
    data: ClipData,
    chosen: Sequence[int],
    labels: Sequence[str],
    cfg: DecodeConfig,
    here: dist.Ranks,
    batch_size: int = 8,
    task: str = "emotion",
    seed: int = 0,
    progress: bool = False,
    counts: Mapping[str, int] | None = None,
) -> list[dict]:
    """The records of the chosen clips; the ranks share the work and all get all of it."""
    was_training = mllm.training
    mllm.eval()
    samples = [data.sample(i, task=task) for i in chosen[here.rank :: here.world]]
    mine = answer(mllm, tokenizer, samples, labels, cfg, batch_size, seed, progress and here.main, counts=counts)
    mllm.train(was_training)
    parts = dist.gather(mine)
    return [parts[i % here.world][i // here.world] for i in range(len(chosen))]


def evaluate(
    mllm: Mllm | Ensemble,
    tokenizer: Tokenizer,
    data: ClipData,
    labels: Sequence[str],
    cfg: DecodeConfig,
    here: dist.Ranks,
    batch_size: int = 8,
    task: str = "emotion",
    seed: int = 0,
    limit: int = 0,
    progress: bool = False,
    counts: Mapping[str, int] | None = None,
) -> tuple[dict, list[dict]]:
    """Scores and records over the clips whose label is in `labels`; the ranks share the work and all get all of it."""
    chosen = [i for i, label in enumerate(data.labels) if label in labels]
    chosen = chosen[:limit] if limit else chosen
    if not chosen:
        raise UserError(f"none of the {len(data)} clips has one of the labels {', '.join(labels)}: nothing to score")
    records = ask(mllm, tokenizer, data, chosen, labels, cfg, here, batch_size, task, seed, progress, counts)
    return score(records, labels, cfg.extract), records


def over_folds(
    folds: dict[int, tuple[dict, list[dict]]], labels: Sequence[str], extract: str
) -> tuple[dict, list[dict]]:
    """The scores and records of several folds as one: the means of their scores, the sum of their confusions."""
    records = [{**record, "fold": fold} for fold, (_, found) in folds.items() for record in found]
    scores = score(records, labels, extract)
    each = [found for found, _ in folds.values()]
    for part, parts in ((scores, each), (scores["majority"], [found["majority"] for found in each])):
        part |= {
            name: sum(one[name] for one in parts) / len(parts)
            for name, value in part.items()
            if isinstance(value, float)
        }
    shown = ("uar", "war", "weighted_f1", "invalid", "clips")
    scores["folds"] = {
        fold: {name: found[name] for name in shown} | {"majority_uar": found["majority"]["uar"],
                                                      "majority_war": found["majority"]["war"]}
        for fold, (found, _) in folds.items()
    }  # fmt: skip
    return scores, records


def fold_table(scores: dict) -> str:
    """UAR and WAR of each fold and their means, beside the majority class."""
    lines = ["fold     uar     war  clips  majority: uar     war"]
    for fold, row in scores["folds"].items():
        lines.append(f"{fold:>4}  {row['uar']:.4f}  {row['war']:.4f}  {row['clips']:5d}         "
                     f"{row['majority_uar']:.4f}  {row['majority_war']:.4f}")  # fmt: skip
    majority = scores["majority"]
    lines.append(f"mean  {scores['uar']:.4f}  {scores['war']:.4f}  {scores['clips']:5d}         "
                 f"{majority['uar']:.4f}  {majority['war']:.4f}")  # fmt: skip
    return "\n".join(lines)


@torch.inference_mode()
def loss(mllm: Mllm, samples: Iterable[Any], here: dist.Ranks, batch_size: int, amp: Callable) -> float:
    """Mean cross entropy of an answer token, in nats, over those of all ranks' samples that have a target."""
    mine = (sample for sample in samples if sample.target)
    was_training = mllm.training
    mllm.eval()
    total, tokens = 0.0, 0
    while chosen := list(islice(mine, batch_size)):
        batch = pack(chosen, mllm.cfg).to(here.device)
        with amp():
            total += float(mllm(batch))
        tokens += batch.targets
    mllm.train(was_training)
    total, tokens = dist.all_sum(total, tokens, device=here.device)
    return total / max(tokens, 1)
