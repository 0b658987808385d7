"""Emotion from speech and words: scores with both, with either alone, beside the majority and a linear probe."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import metrics, probe
from common.log import confusion_png, table_lines
from data.pairs import MODALITIES, Pairs
from model.clap import OWNER
from model.meld import Before
from model.seeds import masked_mean

BATCH = 256  # clips at a time
MAIN = ("accuracy", "uar", "weighted_f1", "macro_f1", "loss")
PROBED = 20_000  # clips that a linear probe learns from at most
COUNTS = 4096  # columns that hashed words are folded to for the probe


def read(
    data: Pairs, index: Tensor, only: str | None, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and masks of the clips index (K, B) on `device`; if `only` names a modality, the other is absent."""
    x, mask = data.gather(index.to(data.device))
    if only is not None:
        mask = {m: part if OWNER[m] == only else torch.zeros_like(part) for m, part in mask.items()}
    return {m: part.to(device) for m, part in x.items()}, {m: part.to(device) for m, part in mask.items()}


def forward(model: nn.Module, data: Pairs, index: Tensor, only: str | None = None) -> Tensor:
    """Logits (K, B, C) of the clips index (K, B), from one modality if `only` names it."""
    device = next(model.parameters()).device
    x, mask = read(data, index, only, device)
    if not data.before.shape[1]:
        return model(x, mask)
    index = index.to(data.device)
    before = data.before[index]  # (K, B, P)
    there, same = (before < len(data)).to(device), data.same[index].to(device)
    return model(x, mask, Before(*read(data, before.flatten(1), only, device), there, same))


@torch.inference_mode()
def predict(model: nn.Module, data: Pairs, seeds: int, only: str | None = None) -> Tensor:
    """Logits (K, N, C) on the CPU; the data must hold standardised features."""
    was_training = model.training
    model.eval()
    parts = [
        forward(model, data, i.expand(seeds, -1), only).float().cpu() for i in torch.arange(len(data)).split(BATCH)
    ]
    model.train(was_training)
    return torch.cat(parts, 1)


def score(logits: Tensor, label: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of one seed's logits (N, C) over the clips of known label (N,)."""
    there = label >= 0
    logits, label = logits[there].double(), label[there].cpu()
    answers, truth = ([labels[i] for i in side.tolist()] for side in (logits.argmax(1), label))
    p = logits.softmax(1)
    return {
        "clips": len(label),
        "loss": float(F.cross_entropy(logits, label)),
        "top5": float((logits.topk(min(5, len(labels)), 1).indices == label[:, None]).any(1).double().mean()),
        "calibration_error": metrics.calibration_error(p.max(1).values, p.argmax(1) == label),
        **metrics.classification(truth, answers, labels),
    }


Views = dict[str, tuple[Pairs, str | None]]  # what the model is given -> data, and the one modality if not all


def views(data: Pairs) -> Views:
    """Everything together, as "fused" where there are two modalities; and each modality alone."""
    present = [m for m in MODALITIES if m in data.parts]
    return (
        {"fused": (data, None), **{m: (data, m) for m in present}} if len(present) > 1 else {present[0]: (data, None)}
    )


def evaluate(model: nn.Module, given: Views, labels: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Scores of each seed by what the model was given; the first of them is all that there is."""
    return {
        way: [score(one, data.label.cpu(), labels) for one in predict(model, data, seeds, only)]
        for way, (data, only) in given.items()
    }


def summary(each: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and (population) standard deviation over seeds of every number."""
    names = [name for name, value in each[0].items() if isinstance(value, float)]
    return {
        name: {"mean": float(np.mean([s[name] for s in each])), "std": float(np.std([s[name] for s in each]))}
        for name in names
    }


def report(
    model: nn.Module, splits: dict[str, Pairs], labels: Sequence[str], seeds: int, split: str,
    say: Callable[[str], None], note: str = "", given: Views | None = None,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """All that is measured on a split, printed as a table; and the logits (K, N, C) it was measured on.

    `given` is what the model reads where that is not the split itself; `note` goes with the table.
    """
    given = given or views(splits[split])
    first = next(iter(given))
    logits = {way: predict(model, data, seeds, only) for way, (data, only) in given.items()}
    each = {way: [score(one, given[way][0].label.cpu(), labels) for one in part] for way, part in logits.items()}
    truth, train = ([labels[i] for i in splits[name].label.tolist() if i >= 0] for name in (split, "train"))
    found: dict[str, Any] = {
        "split": split, "clips": each[first][0]["clips"], "labels": list(labels), "note": note, "per_seed": each[first],
        "scores": {way: summary(scores) for way, scores in each.items()},
        "majority": metrics.majority(truth, labels, train),
        "linear": linear(splits, split, labels),
    }  # fmt: skip
    total = np.sum([s["confusion"] for s in each[first]], 0)
    found["confusion"] = total.tolist()
    found["confused"] = confused(total, labels)
    say(table(found))
    return found, logits[first]


def confused(total: np.ndarray, labels: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often, with the share of the true class."""
    wrong = [
        (int(total[i, j]), i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j and total[i, j]
    ]  # fmt: skip
    return [
        {"true": labels[i], "said": labels[j], "times": n, "share": float(n / total[i].sum())}
        for n, i, j in sorted(wrong, reverse=True)[:most]
    ]


def linear(splits: dict[str, Pairs], split: str, labels: Sequence[str]) -> dict[str, Any]:
    """The scores of logistic regression on fixed statistics of what the model reads, its penalty chosen on valid."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in {"train", "valid", split} if len(splits["valid"]) else {"train", split}:
        data = splits[name]
        there = (data.label >= 0).cpu().nonzero()[:, 0]
        if name == "train" and len(there) > PROBED:
            there = there[torch.randperm(len(there), generator=torch.Generator().manual_seed(0))[:PROBED]]
        parts[name] = pooled(data, there), data.label.cpu()[there]
    x, y = parts["train"]
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    parts = {name: ((x - mean) / std, y) for name, (x, y) in parts.items()}
    fits = {
        c: probe.fit(*parts["train"], len(labels), c) for c in ((1e-4, 1e-3, 1e-2) if len(splits["valid"]) else (1e-2,))
    }
    if len(fits) > 1:
        x, y = parts["valid"]
        losses = {c: float(F.cross_entropy(x @ weight.T + bias, y)) for c, (weight, bias) in fits.items()}
        fits = {c: fits[c] for c in [min(losses, key=lambda c: losses[c])]}
    [(c, (weight, bias))] = fits.items()
    x, y = parts[split]
    return score(x @ weight.T + bias, y, labels) | {"c": c, "clips": len(parts["train"][0])}


def pooled(data: Pairs, index: Tensor) -> Tensor:
    """(N, D): mean and deviation of frames, vectors as they are, and logarithms of how often hashed words occur."""
    rows = []
    for part in index.split(BATCH):
        x, mask = data.gather(part[None].to(data.device))
        row = []
        for m, value in x.items():
            if value.ndim == 3:  # ids (1, B, T)
                counts = torch.zeros(len(part), COUNTS).scatter_add_(
                    1, value[0].long().cpu() % COUNTS, mask[m][0].float().cpu()
                )
                row.append(counts.log1p())
                continue
            mean = masked_mean(value, mask[m])
            row.append(mean[0].cpu())
            if value.shape[2] > 1:
                spread = masked_mean((value - mean[:, :, None]).square(), mask[m]).sqrt()
                row.append(spread[0].cpu())
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def table(found: dict[str, Any]) -> str:
    """The report as aligned text."""
    seeds = len(found["per_seed"])
    rows: list[Sequence[str]] = [("", *MAIN)]
    for i, (way, scores) in enumerate(found["scores"].items()):
        name = (
            f"model, {seeds} seed{'s' * (seeds > 1)}{', ' + way if len(found['scores']) == 1 else ''}"
            if not i
            else f"only {way}"
        )
        rows.append((name, *(f"{scores[n]['mean']:.4f}" for n in MAIN)))
        if seeds > 1:
            rows.append(("  std over seeds", *(f"{scores[n]['std']:.4f}" for n in MAIN)))
    rows.append(("linear probe", *(f"{found['linear'][n]:.4f}" for n in MAIN)))
    major = found["majority"]
    rows.append((f"majority ({major['label']})", *(f"{major[n]:.4f}" if n in major else "" for n in MAIN)))
    per_class = [each["per_class"] for each in found["per_seed"]]
    names = ("precision", "recall", "f1")
    classes: list[Sequence[str]] = [("class", *names, "support")]
    largest = sorted(found["labels"], key=lambda label: -per_class[0][label]["support"])
    for label in largest:
        cells = (f"{np.mean([part[label][n] for part in per_class]):.4f}" for n in names)
        classes.append((label, *cells, str(per_class[0][label]["support"])))
    lines = [f"{found['split']}: {found['clips']} clips{'; ' + found['note'] if found['note'] else ''}"]
    lines += [table_lines(rows), "", table_lines(classes)]
    if found["confused"]:
        pairs = [f"{p['true']} for {p['said']} {p['share']:.0%}" for p in found["confused"][:5]]
        lines += ["", f"most often confused, of the true class: {', '.join(pairs)}"]
    return "\n".join(lines)


def write(out: Path, found: dict[str, Any], logits: Tensor, data: Pairs) -> None:
    """metrics.json, predictions.jsonl (one line a clip, mean over seeds) and confusion.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    labels = found["labels"]
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for clip, p in zip(data.clips, logits.softmax(-1).mean(0).tolist(), strict=True):
            best = max(range(len(p)), key=p.__getitem__)
            probabilities = {label: round(value, 6) for label, value in zip(labels, p, strict=True)}
            record = {"id": clip.id, "label": clip.label, "prediction": labels[best], "probabilities": probabilities}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    title = found["split"] + (f", {len(found['per_seed'])} seeds" if len(found["per_seed"]) > 1 else "")
    confusion_png(found["confusion"], labels, out / "confusion.png", title)
