"""EMER: free-form explanations of an emotion, scored by a judge against the true description (Lian et al. 2023)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common.config import UserError
from data.features import replace_file
from data.manifest import csv_rows, jsonl_rows
from data.merr import FINE_FIELDS, read_captions
from evals.judge import QUESTIONS, Judge, Pair, Verdict, summary

NAMES = ("names", "name", "id")
# columns of the published files, English before Chinese: gt-eng.csv, final-EMER-reason.csv, the original scorer's input
DESCRIPTIONS = ("reasons", "english", "chi_reasons", "reason", "answer", "chinese", "reason_v2", "caption")
WORDS = ("openset", "emotions", "words", "label")


def read_columns(path: str | Path, wanted: Sequence[str]) -> dict[str, str]:
    """name -> the first of the `wanted` columns that a CSV has; empty cells are left out. UserError names the file."""
    found: dict[str, str] = {}
    for line, row in csv_rows(path, NAMES, fallback="gb18030"):
        name = next(row[each] for each in NAMES if each in row).strip()
        column = next((each for each in wanted if each in row), None)
        if column is None:
            raise UserError(f"{path}: none of the columns {', '.join(wanted)} (found: {', '.join(row)})")
        if name in found:
            raise UserError(f"{path}:{line}: {name!r} is listed again")
        found[name] = row[column].strip()
    return {name: text for name, text in found.items() if text and text.lower() != "nan"}


def read_truth(path: str | Path, wanted: Sequence[str] = DESCRIPTIONS) -> dict[str, str]:
    """name -> true description (or emotion words): a CSV, or a caption JSON in MERR's layout."""
    if str(path).endswith(".json"):
        found = {name: caption for name, (caption, _) in read_captions(path, (*FINE_FIELDS, "caption")).items()}
        return {name: caption for name, caption in found.items() if caption}
    return read_columns(path, wanted)


def read_answers(path: str | Path, wanted: Sequence[str] = DESCRIPTIONS) -> list[dict]:
    """Records of answers given before: an evaluation's predictions.jsonl, or a CSV such as names,chi_reasons."""
    if not str(path).endswith(".jsonl"):
        cells = read_columns(path, wanted)
        return [{"id": name, "answer": text, "task": "reason_v2", "target": ""} for name, text in cells.items()]
    records = []
    for number, record in jsonl_rows(path):
        if not isinstance(record.get("id"), str) or "answer" not in record:
            raise UserError(f"{path}:{number}: a record needs an id and an answer")
        records.append({"task": "reason_v2", "target": ""} | record | {"answer": str(record["answer"] or "")})
    if len({record["id"] for record in records}) < len(records):
        raise UserError(f"{path}: an id occurs twice")
    return records


def with_truth(records: Sequence[dict], truth: Mapping[str, str]) -> list[dict]:
    """The records whose clip has a description in `truth`, as their target; without any `truth` their own targets."""
    kept = [{**record, "target": truth.get(record["id"], "") if truth else record["target"]} for record in records]
    kept = [record for record in kept if record["target"]]
    if not kept:
        raise UserError(f"none of the {len(records)} answers has a true description (--truth FILE)")
    return kept


def report(records: Sequence[dict], judge: Judge) -> tuple[dict, list[dict]]:
    """The judge's scores of answers against their targets, and the records with its verdicts.

    UserError when the judge answered nothing at all; `dealt` are the scores of the same answers each given to the next
    clip, for a judge that costs nothing: what answers that fit no clip in particular would get.
    """
    pairs = [Pair(record["id"], record["target"], record["answer"]) for record in records]
    verdicts = judge.verdicts(pairs)
    scores = summary(pairs, verdicts, judge)
    if not any(scores[f"{question}_scored"] for question in QUESTIONS):
        problem = next(iter(scores["unanswered"][QUESTIONS[0]].values()))
        raise UserError(f"judge {judge.name}: none of the {len(pairs)} answers could be scored ({problem})")
    if judge.usage is not None:
        scores["judge_usage"] = asdict(judge.usage) | {"cost": judge.usage.cost}
    elif len(pairs) > 1:
        dealt = [
            Pair(pair.id, other.truth, pair.answer) for pair, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)
        ]
        found = summary(dealt, judge.verdicts(dealt), judge)
        scores["dealt"] = {name: value for name, value in found.items() if name.endswith(("0_10", "1_10"))}
    shown = [{**record, "judge": shown_verdict(judge, each)} for record, each in zip(records, verdicts, strict=True)]
    return scores, shown


def shown_verdict(judge: Judge, verdict: Verdict) -> dict:
    """A verdict as it stands in predictions.jsonl; scores are on 1 to 10."""
    found: dict = {"by": judge.name, "truth_words": verdict.truth_words, "answer_words": verdict.answer_words}
    for question in QUESTIONS:
        mark = getattr(verdict, question)
        found[question] = mark.score
        found[f"{question}_reason"] = mark.reason or mark.problem
    return found


def write_answers(path: Path, records: Sequence[dict]) -> None:
    """Answers as names,chi_reasons: what EMER's own scorer reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("names", "chi_reasons"))
    writer.writerows((record["id"], record["answer"]) for record in records)
    replace_file(path, text.getvalue().encode())
