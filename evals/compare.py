"""Evaluations side by side: what eval.py wrote of several models, on the clips all have, with paired intervals."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoint
from common.config import UserError
from common.weights import read_json
from data.manifest import jsonl_rows

METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
KEYS = ("id", "label", "prediction")  # of a record
JUDGED = ("judge", "openset")  # where a record holds scores of its own
DRAWS = 2000  # of the bootstrap
CHUNK = 2_000_000  # clips drawn at a time
SCORES = ("accuracy", "uar", "weighted_f1", "macro_f1")
# the score a benchmark is known by; the UAR, or else the first there is, for the others
MAIN = {"mer2023": "weighted_f1", "mer2024": "weighted_f1", "mer-ov": "score"}


@dataclass
class Evaluation:
    """What eval.py wrote of one model: metrics.json, and the records of predictions.jsonl by clip."""

    name: str
    folder: Path
    bench: str
    metrics: dict[str, Any]
    records: dict[str, dict[str, Any]]


@dataclass
class Comparison:
    """Evaluations on their common clips: labels as indices, len(labels) for an answer without one of them."""

    evaluations: list[Evaluation]
    ids: list[str]
    relabelled: int  # clips left out: they have another true label in another evaluation
    labels: list[str]  # those of every evaluation; empty where answers were not scored by label
    truth: np.ndarray  # (N,)
    answers: np.ndarray  # (M, N)
    folds: dict[str, np.ndarray]  # test fold -> its clips; all of them as "" where there is one or none
    means: dict[str, np.ndarray]  # score that is a mean over clips -> its values (M, N), NaN where one is not known

    @property
    def main(self) -> str:
        """The score that the evaluations are compared by."""
        wanted = MAIN.get(self.evaluations[0].bench, "uar")
        known = [*(SCORES if self.labels else ()), *self.means]
        return wanted if wanted in known else known[0]

    def records(self, clip: int) -> list[dict[str, Any]]:
        return [each.records[self.ids[clip]] for each in self.evaluations]

    def known(self, clip: int, key: str) -> Any:
        """What the first evaluation that knows it says of a clip."""
        return next((value for record in self.records(clip) if (value := record.get(key)) is not None), None)

    def drawn(self, seed: int) -> np.ndarray:
        """The main score (M, DRAWS) on clips drawn again, within each fold; all models on the same draws."""
        if self.main not in SCORES:
            return bootstrap_mean(self.means[self.main], seed)
        parts = [(self.truth[clips], self.answers[:, clips]) for clips in self.folds.values()]
        each = [bootstrap(*part, len(self.labels), seed + i)[self.main] for i, part in enumerate(parts)]
        return np.mean(each, 0)


# ---- reading


def find(places: Sequence[str], bench: str | None) -> list[Path]:
    """The evaluation folders meant by `places`: themselves, or a run's or checkpoint's newest of the same benchmark."""
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"--compare {place}: no such folder (an evaluation, a checkpoint or a run)")
    given = {place: Path(place) for place in places if (Path(place) / METRICS).is_file()}
    if bench is None and given:
        folder = next(iter(given.values()))
        bench = _bench(folder, read_json(folder / METRICS)) or None
    found: list[Path] = []
    for place in places:
        folder = given.get(place) or _newest(place, bench)
        bench = bench or folder.parent.name
        if folder.resolve() in [other.resolve() for other in found]:
            raise UserError(f"--compare {place}: {folder} is there twice")
        found.append(folder)
    return found


def _newest(place: str, bench: str | None) -> Path:
    path = Path(place)
    run, name = path, "*"
    if not (path / "eval").is_dir():
        try:
            chosen = checkpoint.resolve(path, prefer="best")
        except UserError:
            raise UserError(f"--compare {place}: neither {METRICS} nor a checkpoint is in it") from None
        run = checkpoint.run_of(chosen)
        name = chosen.name if (path / checkpoint.STATE).is_file() else "*"
    made = [
        file
        for file in run.glob(f"eval/*/*/{METRICS}")
        if bench in (None, file.parent.parent.name) and name in ("*", file.parent.name)
    ]
    if not made:
        on, option = (f" on {bench}", f" --bench {bench}") if bench else ("", "")
        raise UserError(f"--compare {place}: no evaluation{on}; make it: python eval.py --ckpt {place}{option}")
    return max(made, key=lambda file: file.stat().st_mtime_ns).parent


def _bench(folder: Path, metrics: dict[str, Any]) -> str:
    """The benchmark's name, "" where neither the scores nor their place tell it."""
    place = folder.resolve().parent
    return metrics.get("bench") or (place.name if place.parent.name == "eval" else "")


def names(folders: Sequence[Path]) -> list[str]:
    """Short unique names: of each path what the others do not share, without eval/<benchmark>/ if that will do."""
    whole = [list(folder.resolve().parts) for folder in folders]
    parts = [each[:-3] + each[-1:] if each[-3:-2] == ["eval"] else each for each in whole]
    if len(set(map(tuple, parts))) < len(parts):
        parts = whole
    if len(parts) > 1:
        shared = _alike(parts)
        ends = _alike([each[shared:][::-1] for each in parts])
        short = ["/".join(each[shared : len(each) - ends]) for each in parts]
        if all(short):  # else one path is the start or the end of another
            return short
        parts = [each[max(shared - 1, 0) :] for each in parts]
    return ["/".join(each if len(parts) > 1 else each[-1:]) for each in parts]


def _alike(rows: Sequence[Sequence[str]]) -> int:
    """How many elements all rows start with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def read(folders: Sequence[Path]) -> list[Evaluation]:
    """The evaluations in these folders; UserError names the file and the line that is not as eval.py writes it."""
    return [_read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]


def _read(folder: Path, name: str) -> Evaluation:
    metrics, records = read_json(folder / METRICS), {}
    by_label = "confusion" in metrics
    labels = metrics.get("labels")
    if by_label and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise UserError(f"{folder / METRICS}: no list of 'labels'")
    for number, record in jsonl_rows(folder / PREDICTIONS):
        where = f"{folder / PREDICTIONS}:{number}"
        for key in KEYS if by_label else KEYS[:1]:
            if not isinstance(record.get(key, ...), str | None if key != "id" else str):
                raise UserError(f"{where}: no {key!r}" if key not in record else f"{where}: {key!r} is not a text")
        if record["id"] in records:
            raise UserError(f"{where}: clip {record['id']!r} is there twice")
        records[record["id"]] = record
    if not records:
        raise UserError(f"{folder / PREDICTIONS}: no predictions")
    return Evaluation(name, folder, _bench(folder, metrics), metrics, records)


def align(evaluations: list[Evaluation]) -> Comparison:
    """The clips that every evaluation has with the same true label, in the first's order."""
    first = evaluations[0]
    shared = [id for id in first.records if all(id in each.records for each in evaluations)]
    if not shared:
        counts = ", ".join(f"{each.name} {len(each.records)}" for each in evaluations)
        raise UserError(f"--compare: no clip is in all of the evaluations ({counts} clips)")
    true = {id: [each.records[id].get("label") for each in evaluations] for id in shared}
    ids = same = [id for id in shared if all(label == true[id][0] for label in true[id])]
    known = [each.metrics["labels"] if "confusion" in each.metrics else [] for each in evaluations]
    labels = [label for label in known[0] if all(label in each for each in known)]
    if any(known):
        ids = [id for id in same if true[id][0] in labels]
    if not ids:
        raise UserError(f"--compare: the {len(shared)} common clips have no true label in common")
    place = {label: i for i, label in enumerate(labels)}
    truth = np.array([place[true[id][0]] if labels else 0 for id in ids])
    answers = np.array(
        [[place.get(_answer(each, id), len(labels)) if labels else 0 for id in ids] for each in evaluations]
    )
    means = _means(evaluations, ids)
    if not labels and not means:
        raise UserError(
            f"--compare: neither labels nor scores of clips in {first.folder / METRICS}: nothing to compare"
        )
    folds: dict[str, list[int]] = {}
    for i, id in enumerate(ids):
        folds.setdefault(str(first.records[id].get("fold", "")), []).append(i)
    folds = folds if len(folds) > 1 else {"": list(range(len(ids)))}
    by_fold = {fold: np.array(clips) for fold, clips in sorted(folds.items(), key=_fold)}
    return Comparison(evaluations, ids, len(shared) - len(same), labels, truth, answers, by_fold, means)


def _fold(item: tuple[str, Any]) -> tuple[int, str]:
    return len(item[0]), item[0]  # fold 2 before fold 10


def _answer(evaluation: Evaluation, id: str) -> str | None:
    """The label that counts as the answer: the original extraction takes neutral where it finds none."""
    answer = evaluation.records[id]["prediction"]
    return "neutral" if answer is None and evaluation.metrics.get("extract") == "original" else answer


def _means(evaluations: list[Evaluation], ids: list[str]) -> dict[str, np.ndarray]:
    """Scores that every evaluation holds clip by clip: values (M, N), NaN where a judge gave none."""
    held = [[clip_scores(each.records[id]) for id in ids] for each in evaluations]
    names = list(dict.fromkeys(name for record in held[0] for name in record))
    found = {name: np.array([[record.get(name, np.nan) for record in row] for row in held]) for name in names}
    return {name: values for name, values in found.items() if complete(values).size}


def clip_scores(record: dict[str, Any]) -> dict[str, float]:
    """What a judge or the comparison of sets says of one answer; the set metric's score is the mean of its two."""
    parts = [record[key] for key in JUDGED if isinstance(record.get(key), dict)]
    found = {name: float(value) for part in parts for name, value in part.items() if isinstance(value, int | float)}
    if {"set_accuracy", "set_recall"} <= set(found):
        found["score"] = (found["set_accuracy"] + found["set_recall"]) / 2
    return found


# ---- scores


def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The scores (...) of common.metrics.classification from many counts (..., K, K + 1), truth by answer or none."""
    k = counts.shape[-2]
    hits = np.diagonal(counts[..., :k], axis1=-2, axis2=-1)
    support, given = counts.sum(-1), counts[..., :k].sum(-2)
    n, f1 = support.sum(-1), 2 * hits / np.maximum(support + given, 1)
    return {
        "accuracy": hits.sum(-1) / n,
        "uar": (hits / np.maximum(support, 1)).sum(-1) / (support > 0).sum(-1),
        "weighted_f1": (f1 * support).sum(-1) / n,
        "macro_f1": f1.mean(-1),
    }


def _drawn(n: int, seed: int) -> Iterator[np.ndarray]:
    """DRAWS rows of n clips with replacement, some rows at a time."""
    rng, step = np.random.default_rng(seed), max(1, CHUNK // n)
    for start in range(0, DRAWS, step):
        yield rng.integers(n, size=(min(step, DRAWS - start), n))


def bootstrap(truth: np.ndarray, answers: np.ndarray, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Every score (M, DRAWS) of the answers (M, N), all models on the same draws of clips."""
    codes, cells = truth * (classes + 1) + answers, classes * (classes + 1)
    drawn: list[list[dict[str, np.ndarray]]] = []
    for index in _drawn(len(truth), seed):
        rows = cells * np.arange(len(index))[:, None]
        flat = [np.bincount((code[index] + rows).ravel(), minlength=cells * len(index)) for code in codes]
        drawn.append([scores(counts.reshape(-1, classes, classes + 1)) for counts in flat])
    return {
        name: np.stack([np.concatenate([part[m][name] for part in drawn]) for m in range(len(codes))])
        for name in SCORES
    }


def bootstrap_mean(values: np.ndarray, seed: int) -> np.ndarray:
    """Means (M, DRAWS) of values (M, N), all models on the same draws of the clips that have all values."""
    values = complete(values)
    return np.concatenate([values[:, index].mean(-1) for index in _drawn(values.shape[1], seed)], 1)


def complete(values: np.ndarray) -> np.ndarray:
    """The columns of values (M, N) without NaN."""
    return values[:, np.isfinite(values).all(0)]


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """What 95 % of the draws lie between."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


# ---- examples


def disagreements(comparison: Comparison) -> list[int]:
    """Clips that some models get right and some wrong, first those of one right model; who and which label take turns.

    Where no labels were scored: from the largest difference of the main score to the smallest.
    """
    if not comparison.labels:
        gap = np.nan_to_num(np.ptp(comparison.means[comparison.main], 0))
        return [int(i) for i in np.argsort(-gap, kind="stable") if gap[i] > 0]
    right = comparison.answers == comparison.truth
    count = right.sum(0)
    mixed = [int(i) for i in np.flatnonzero((count > 0) & (count < len(right)))]
    turn = _turns(mixed, [(right[:, i].tobytes(), comparison.truth[i]) for i in mixed])
    return sorted(mixed, key=lambda i: (count[i] != 1, turn[i]))


def all_wrong(comparison: Comparison) -> list[int]:
    """Clips that no model gets right, the labels taking turns; no labels scored: those of the lowest best score."""
    if not comparison.labels:
        best = comparison.means[comparison.main].max(0)  # NaN, which is sorted to the end, where one is not known
        return [int(i) for i in np.argsort(best, kind="stable") if np.isfinite(best[i])]
    wrong = [int(i) for i in np.flatnonzero((comparison.answers != comparison.truth).all(0))]
    turn = _turns(wrong, [comparison.truth[i] for i in wrong])
    return sorted(wrong, key=turn.__getitem__)


def _turns(clips: list[int], groups: Sequence[Hashable]) -> dict[int, int]:
    """How many clips of the same group come before each."""
    seen: Counter[Hashable] = Counter()
    turns = {}
    for clip, group in zip(clips, groups, strict=True):
        turns[clip] = seen[group]
        seen[group] += 1
    return turns
