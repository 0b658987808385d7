"""CMU-MOSEI and its kin: scores beside a constant and a linear probe, by modality, with frames missing; intervals."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import metrics, probe
from common.config import UserError
from common.log import confusion_png, table_lines
from data.utterances import Utterances, level
from model.fusion import HEADS, Fusion, known, losses, masked_mean, probabilities, scores

DRAWS = 1000  # of the bootstrap
RATES = tuple(i / 10 for i in range(10))
MISSING_SEEDS = (1111, 1112, 1113)  # as LNLN tests
BATCH = 2048  # frames of one modality, times seeds, at a time
MAIN = {  # the columns of a table
    "classes": ("accuracy", "uar", "weighted_f1", "loss"),
    "score": ("acc2_has0", "acc2_non0", "f1_non0", "acc5", "acc7", "mae", "corr"),
    "emotions": ("wa", "weighted_f1", "accuracy", "loss"),
}


def columns(head: str, kind: str) -> tuple[str, ...]:
    """The main scores of a head on labels of a kind."""
    if head == "emotions":
        return MAIN["emotions"]
    ordered = MAIN["score"] if kind != "polarity" and head in ("7", "regression") else ()
    return (() if head == "regression" else MAIN["classes"]) + ordered


def standardize(data: Utterances, model: Fusion, only: Sequence[str] = ()) -> None:
    """Brings the data's features to the model's scale; modalities that they lack, or not in `only`, become absent."""
    if strange := sorted(set(only) - set(model.dims)):
        raise UserError(f"stream {strange[0]!r} is not one of {', '.join(model.dims)}")
    for m, dim in model.dims.items():
        found = data.values.get(m)
        if found is None or (only and m not in only):
            data.values[m] = torch.zeros(1, dim)
            data.rows[m] = torch.zeros(len(data) + 1, 1, dtype=torch.long)
        elif found.shape[1] != dim:
            raise UserError(f"{m} has width {found.shape[1]} in the data, {dim} in the checkpoint")
        data.rows[m] = data.rows[m][:, : model.frames[m]]
        data.standardize(m, partial(model.standardize, m))
    data.values, data.rows = ({m: part[m] for m in model.dims} for part in (data.values, data.rows))


@torch.inference_mode()
def predict(
    model: Fusion, data: Utterances, only: Sequence[str] | None = None, missing: float = 0.0, seed: int = 0
) -> Tensor:
    """Logits (K, N, C) on the CPU; with `only` these modalities, with a share `missing` of all frames left out.

    The data must hold standardised frames. A modality of one frame an utterance goes missing as a whole.
    """
    was_training = model.training
    model.eval()
    k, n = len(model.classifier.weight), len(data)
    generator = torch.Generator().manual_seed(seed)
    by_video = model.context is not None
    longest = data.members.shape[1] if by_video else 1
    units = data.members if by_video else torch.arange(n, device=data.device)[:, None]  # (videos or utterances, U)
    frames = max(rows.shape[1] for rows in data.rows.values())
    size = max(1, BATCH // (k * longest * max(1, frames // 8)))
    first = data.values[next(iter(data.values))]
    out = first.new_zeros(k, n + 1, len(HEADS[model.cfg.head]))
    for chosen in units.split(size):
        index = chosen.flatten()[None]  # (1, B)
        x, mask = data.gather(index)
        for m in x:
            if missing:
                gone = torch.rand(mask[m].shape, generator=generator).to(mask[m].device) < missing
                mask[m] = mask[m] & ~gone
            if only is not None and m not in only:
                mask[m] = torch.zeros_like(mask[m])
            x[m] = torch.where(mask[m][..., None], x[m], 0.0).expand(k, -1, -1, -1)
            mask[m] = mask[m].expand(k, -1, -1)
        videos = (longest, (chosen < n).expand(k, -1, -1)) if by_video else None
        out[:, index[0]] = model.logits(x, mask, videos)[0]
    model.train(was_training)
    return out[:, :n].cpu()


def score(logits: Tensor, data: Utterances, head: str, scheme: str) -> dict[str, Any]:
    """Scores of one model's logits (N, C) over the utterances with a target."""
    target = data.targets(head, scheme)[:-1].cpu()
    truth = data.score.cpu()
    there = known(target[None])[0]
    logits, target, truth = logits[there].double(), target[there], truth[there]
    wanted = target.double() if target.is_floating_point() else target
    out: dict[str, Any] = {"clips": len(target), "loss": float(losses(logits[None], wanted[None], head, None).mean())}
    if head == "emotions":
        return out | metrics.emotions(target.bool(), logits > 0, HEADS[head])
    if head == "regression":
        levels = (level(target, scheme) + 3).long(), (level(logits[:, 0], scheme) + 3).long()
        names = HEADS["7"]
    else:
        levels, names = (target, logits.argmax(1)), HEADS[head]
        p = probabilities(logits, head)
        out["calibration_error"] = metrics.calibration_error(p.max(1).values, p.argmax(1) == target)
    out |= metrics.classification(*([names[i] for i in side] for side in levels), labels=names)
    out["kappa"] = metrics.kappa(out["confusion"])
    if data.kind != "polarity" and head in ("7", "regression"):
        out |= metrics.sentiment(truth, scores(logits, head))
    return out


def constant(train: Utterances, data: Utterances, head: str, scheme: str) -> dict[str, Any]:
    """The scores of always answering the train split's most frequent class, or median, or emotions most often there."""
    target = train.targets(head, scheme)[:-1].cpu()
    if head == "emotions":
        logits = torch.where(torch.nanmean(target, 0) > 0.5, 1.0, -1.0)
    elif head == "regression":
        logits = torch.nanmedian(target)[None]
    else:
        counts = torch.bincount(target[target >= 0], minlength=len(HEADS[head])).double()
        logits = (counts / counts.sum()).clamp_min(1e-9).log()  # the train split's shares are the best constant
    return score(logits.expand(len(data), -1), data, head, scheme)


def linear(train: Utterances, valid: Utterances, test: Utterances, head: str, scheme: str) -> dict[str, Any]:
    """The scores of a linear model on the mean of each modality's frames, its penalty chosen on valid."""
    x, target = pooled(train), train.targets(head, scheme)[:-1].cpu()
    fits = {
        c: probe.fit_head(x, target, head == "regression", head == "emotions", len(HEADS[head]), c)
        for c in (1e-4, 1e-3, 1e-2, 1e-1)
    }
    losses_ = {c: score(pooled(valid) @ w.T + b, valid, head, scheme)["loss"] for c, (w, b) in fits.items()}
    best = min(losses_, key=lambda c: losses_[c])
    weight, bias = fits[best]
    return score(pooled(test) @ weight.T + bias, test, head, scheme) | {"c": best}


def pooled(data: Utterances) -> Tensor:
    """(N, sum of widths) means of each modality's standardised frames, zeros where there are none."""
    parts = []
    for index in torch.arange(len(data), device=data.device).split(BATCH):
        x, mask = data.gather(index[None])
        parts.append(torch.cat([masked_mean(x[m], mask[m])[0] for m in x], -1).cpu())
    return torch.cat(parts)


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of modalities but the empty one, single ones first."""
    return [part for size in range(1, len(modalities) + 1) for part in combinations(modalities, size)]


def summary(each: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and (population) standard deviation over seeds of every number."""
    names = [name for name, value in each[0].items() if isinstance(value, float)]
    return {
        name: {"mean": float(np.mean([s[name] for s in each])), "std": float(np.std([s[name] for s in each]))}
        for name in names
    }


def intervals(logits: Tensor, data: Utterances, head: str, scheme: str) -> dict[str, tuple[float, float]]:
    """95 % bootstrap interval of every number, over DRAWS draws of whole videos and of one of the seeds each."""
    rng = np.random.default_rng(0)
    there = known(data.targets(head, scheme)[None])[0]  # the last row, for padding, is never known
    # a video without a target can decide nothing, and draws of those alone could not be scored
    videos = [row[row < len(data)].cpu() for row in data.members if there[row].any()]
    drawn: list[dict[str, Any]] = []
    for _ in range(DRAWS):
        index = torch.cat([videos[i] for i in rng.integers(len(videos), size=len(videos))])
        part = Utterances([], data.kind, data.score.cpu()[index], data.emotions.cpu()[index], {}, {}, data.members)
        drawn.append(score(logits[rng.integers(len(logits))][index], part, head, scheme))
    names = [name for name, value in drawn[0].items() if isinstance(value, float)]
    return {name: tuple(float(q) for q in np.quantile([d[name] for d in drawn], (0.025, 0.975))) for name in names}  # type: ignore[return-value]


def report(
    model: Fusion, splits: dict[str, Utterances], scheme: str, say: Callable[[str], None], split: str = "test"
) -> tuple[dict[str, Any], Tensor]:
    """All that is measured on a split, printed as a table, and the logits (K, N, C) it was measured on."""
    head, data = model.cfg.head, splits[split]
    logits = predict(model, data)
    each = [score(one, data, head, scheme) for one in logits]
    bounds = intervals(logits, data, head, scheme)
    found: dict[str, Any] = {
        "split": split,
        "scheme": scheme,
        "head": head,
        "clips": each[0]["clips"],
        "per_seed": each,
    }
    found["scores"] = {name: value | {"ci95": bounds[name]} for name, value in summary(each).items()}
    found["constant"] = constant(splits["train"], data, head, scheme)
    found["linear"] = linear(splits["train"], splits["valid"], data, head, scheme)
    found["modalities"] = {
        "+".join(only): summary([score(one, data, head, scheme) for one in predict(model, data, only)])
        for only in subsets(list(model.dims))[:-1]
    }
    found["missing"] = {
        str(rate): summary(
            [score(one, data, head, scheme) for s in MISSING_SEEDS for one in predict(model, data, None, rate, s)]
        )
        for rate in RATES
    }
    say(table(found, columns(head, data.kind), len(logits)))
    return found, logits


def table(found: dict[str, Any], names: Sequence[str], seeds: int) -> str:
    """The report as aligned text."""
    rows = [("", *names)]
    full = found["scores"]
    rows.append((f"model, {seeds} seed{'s' * (seeds > 1)}", *(f"{full[n]['mean']:.4f}" for n in names)))
    if seeds > 1:
        rows.append(("  std over seeds", *(f"{full[n]['std']:.4f}" for n in names)))
    rows.append(("  95 % from", *(f"{full[n]['ci95'][0]:.4f}" for n in names)))
    rows.append(("       to", *(f"{full[n]['ci95'][1]:.4f}" for n in names)))
    rows.append(("linear probe", *(f"{found['linear'][n]:.4f}" for n in names)))
    rows.append(("constant", *(f"{found['constant'][n]:.4f}" for n in names)))
    rows += [(f"only {m}", *(f"{s[n]['mean']:.4f}" for n in names)) for m, s in found["modalities"].items()]
    rows += [
        (f"{float(r):.0%} missing", *(f"{s[n]['mean']:.4f}" for n in names))
        for r, s in found["missing"].items() if float(r) > 0
    ]  # fmt: skip
    return f"{found['split']}: {found['clips']} utterances\n" + table_lines(rows)


def write(out: Path, found: dict[str, Any], logits: Tensor, data: Utterances) -> None:
    """metrics.json, predictions.csv (one row an utterance, mean over seeds) and confusion.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    head = found["head"]
    p = probabilities(logits, head).mean(0)
    names = HEADS[head]
    target = data.targets(head, found["scheme"])[:-1].cpu()
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "video", "label", "prediction", *names])
        for clip, row, true in zip(data.clips, p.tolist(), target.tolist(), strict=True):
            if head in ("regression", "emotions"):
                label = clip.label or "" if head == "regression" else _present(true, names)
                answer = f"{row[0]:.4f}" if head == "regression" else _present(row, names)
            else:
                label = "" if true < 0 else names[true]
                answer = names[max(range(len(row)), key=row.__getitem__)]
            writer.writerow([clip.id, clip.group or "", label, answer, *(f"{x:.6f}" for x in row)])
    if head != "emotions":
        total = np.sum([each["confusion"] for each in found["per_seed"]], 0)
        labels = HEADS["7"] if head == "regression" else names
        title = f"{found['split']}" + (f", {len(logits)} seeds" if len(logits) > 1 else "")
        confusion_png(total.tolist(), labels, out / "confusion.png", title)


def _present(values: Sequence[float], names: Sequence[str]) -> str:
    return "+".join(name for name, value in zip(names, values, strict=True) if not math.isnan(value) and value > 0.5)
