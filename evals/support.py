"""Emotional support: scores of the four fields of an answer, each beside always giving its most frequent label."""

from collections.abc import Sequence
from typing import Any

from common import metrics
from common.config import UserError
from common.log import table_lines
from data.mesc import EMOTIONS, STRATEGIES
from data.support import parse_answer
from evals import texts

COLUMNS = ("accuracy", "weighted_f1", "macro_f1", "precision_weighted", "recall_weighted", "invalid")


def evaluate(
    records: Sequence[dict[str, Any]], emotions: Sequence[str] = EMOTIONS, strategies: Sequence[str] = STRATEGIES,
    compared: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Scores of {"id", "target": field -> truth, "answer": text}; `compared` are text metrics of evals/texts.py.

    Labels are compared in lower case. An answer without a field, or with none of its labels, is wrong there; a row
    whose target lacks a field, as the client's emotion before a first utterance, is left out of that field. The
    published evaluation leaves out the answers that it cannot read.
    """
    if not records:
        raise UserError("nothing to score: no answers")
    rows = [(record["id"], record["target"], parse_answer(record["answer"])) for record in records]
    lost = [any(truth.get(name) and said is None for name, said in answer.items()) for _, truth, answer in rows]
    fields: dict[str, dict[str, Any]] = {}
    for name, labels in (("client_emotion", emotions), ("therapist_emotion", emotions), ("strategy", strategies)):
        known = [(id, truth[name], answer[name]) for id, truth, answer in rows if truth.get(name)]
        fields[name] = {"rows": len(known), "left_out": len(rows) - len(known)}
        fields[name] |= _closed(name, known, [_label(label) for label in labels]) if known else {}
    replies = [
        {"id": id, "target": truth["response"], "answer": answer["response"] or ""}
        for id, truth, answer in rows
        if truth.get("response")
    ]
    figures = texts.figures(replies)
    responses: dict[str, Any] = {name: figures[name] for name in ("answers", "distinct", "mean_words")}
    responses |= {"metrics": texts.compare(replies, compared)} if compared else {}
    return {"records": len(records), "unparsable": sum(lost), "fields": fields, "responses": responses}


def _closed(name: str, rows: list[tuple[str, str, str | None]], labels: list[str]) -> dict[str, Any]:
    """Scores of (id, truth, answer) in a field of closed choice; `missing` counts the answers without it."""
    truths = [_label(truth) for _, truth, _ in rows]
    for (id, truth, _), label in zip(rows, truths, strict=True):
        if label not in labels:
            raise UserError(f"{id}: {name} {truth!r} is not one of {', '.join(labels)}")
    answers = [None if said is None else _label(said) for _, _, said in rows]
    scores = metrics.classification(truths, answers, labels)
    missing = sum(said is None for said in answers)
    return scores | {"missing": missing, "labels": labels, "majority": metrics.majority(truths, labels)}


def _label(text: str) -> str:
    return " ".join(text.lower().split())


def table(found: dict[str, Any]) -> str:
    """The scores as aligned text."""
    rows: list[Sequence[str]] = [("", *COLUMNS, "rows")]
    notes = [f"{found['unparsable']} of {found['records']} answers lack a field: they are wrong there"]
    for name, scores in found["fields"].items():
        if scores["rows"]:
            rows.append((name, *(f"{scores[column]:.4f}" for column in COLUMNS), str(scores["rows"])))
            major = scores["majority"]
            rows.append((f"  majority ({major['label']})", *(f"{major[column]:.4f}" for column in COLUMNS), ""))
        if scores["left_out"]:
            notes.append(f"{name}: {scores['left_out']} rows left out, whose target has none")
    said = found["responses"]
    parts = [f"{said['distinct']} distinct of {said['answers']}", f"{said['mean_words']:.1f} words on average"]
    parts += [f"{name} {value:.4f}" for name, value in said.get("metrics", {}).items()]
    return "\n".join([table_lines(rows), *notes, f"responses: {', '.join(parts)}"])
