"""One HTML page, whole in itself, that shows evaluations side by side: scores, confusions and clips to look at."""

import base64
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from common import metrics
from common.config import UserError
from data import prompts
from data.media import Absent, MediaError, load_frame
from evals import compare
from evals.compare import DRAWS, SCORES, Comparison
from evals.emotion import DecodeConfig

DISAGREE, WRONG = 30, 10  # clips shown
WIDTH = 320  # pixels of a picture
DENSE = 12  # labels; the confusions of more have small cells
SHOWN = 9  # labels with a probability each, more: the true one and every model's first three
NAMES = {
    "accuracy": "accuracy", "uar": "UAR", "weighted_f1": "weighted F1", "macro_f1": "macro F1",
    "precision_weighted": "weighted precision", "score": "mean of both",
    # a judge's marks of clips; what metrics.json calls clue_overlap is common.metrics' count of words
    "clue_overlap": "clue overlap (1–10)", "label_overlap": "label overlap (1–10)",
}  # fmt: skip
SAME = {"war", "recall_weighted"}  # accuracy by other names
SETTINGS = {"clips", "answers", *(field.name for field in fields(DecodeConfig))}


@dataclass(frozen=True)
class Published:
    """Results of others as their papers print them."""

    what: str
    clips: int | None  # of its test set, where that is known
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


# specs: numbers printed in papers only, none that was read from memory or that a document contradicts
PUBLISHED = {
    "mer2023": Published("MER2023-SEMI", 834, ("weighted_f1",), (
        ("wav2vec 2.0, audio", (0.4028,)), ("VGGish, audio", (0.5481,)), ("HuBERT, audio", (0.8511,)),
        ("ResNet, video", (0.4132,)), ("MAE, video", (0.5547,)), ("VideoMAE, video", (0.6068,)),
        ("RoBERTa, text", (0.4061,)), ("BERT, text", (0.4360,)), ("MacBERT, text", (0.4632,)),
        ("MER2023 baseline, audio + video", (0.8675,)), ("MER2023 baseline, audio + video + text", (0.8640,)),
        ("Transformer, audio + video + text", (0.8853,)), ("FBP, audio + video + text", (0.8855,)),
        ("VAT, audio + video", (0.8911,)), ("Emotion-LLaMA, audio + video", (0.8905,)),
        ("Emotion-LLaMA, audio + video + text", (0.9036,)),
    )),
    "mer2024": Published("MER2024-NOISE", 1170, ("weighted_f1",), (
        ("Emotion-LLaMA", (0.8452,)), ("SZTU-CMU: Emotion-LLaMA with Conv-Attention", (0.8530,)),
    )),
    "emer": Published("EMER", 100, ("clue_overlap", "label_overlap"), (
        ("VideoChat-Text", (6.42, 3.94)), ("Video-LLaMA", (6.64, 4.89)), ("Video-ChatGPT", (6.95, 5.74)),
        ("PandaGPT", (7.14, 5.51)), ("VideoChat-Embed", (7.15, 5.65)), ("Valley", (7.24, 5.77)),
        ("Emotion-LLaMA", (7.83, 6.25)),
    )),
    "dfew": Published("DFEW", None, ("uar", "accuracy"), (("Emotion-LLaMA, zero-shot", (0.4559, 0.5937)),)),
}  # fmt: skip


# ---- HTML


class Html(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element; attribute names lose a last underscore and take dashes, those of None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items() if value is not None
    )  # fmt: skip
    body = "".join(each if isinstance(each, Html) else escape(str(each)) for each in inside)
    return Html(f"<{name}{given}>{body}" + ("" if name in ("img", "meta") else f"</{name}>"))


def row(name: object, *cells: object, kind: str | None = None) -> Html:
    """A table's row with its heading."""
    return tag("tr", tag("th", name, scope="row"), *(tag("td", each) for each in cells), class_=kind)


def header(*names: object) -> Html:
    """A table's row of column headings."""
    return tag("tr", *(tag("th", name, scope="col") for name in names))


def table(caption: str, head: Sequence[Html], *body: Sequence[Html], kind: str | None = None) -> Html:
    """A table of rows in a box of its own, which scrolls sideways where the screen is narrow."""
    parts = [tag("caption", tag("span", caption)), tag("thead", *head), *(tag("tbody", *rows) for rows in body if rows)]
    return tag("div", tag("table", *parts, class_=kind), class_="scroll", tabindex=0, role="region", aria_label=caption)


def _name(score: str) -> str:
    return NAMES.get(score) or score.replace("_0_10", " (0–10)").replace("_1_10", " (1–10)").replace("_", " ")


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:{sign}.4f}".replace("-", "−")


def _figure(value: float | None) -> str:
    """A number of any kind: counts as counts."""
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _best(values: Sequence[float | None]) -> list[Html]:
    """The numbers of a column as text, the highest in bold."""
    top = max((value for value in values if value is not None), default=None)
    return [tag("b" if value == top and len(values) > 1 else "span", _number(value)) for value in values]


# ---- the page


class Page:
    """The parts of the page about one comparison; `seed` is the bootstrap's."""

    def __init__(self, comparison: Comparison, seed: int) -> None:
        self.data, self.seed = comparison, seed
        self.models = [self._model(m) for m in range(len(comparison.evaluations))]
        self.truth = [comparison.labels[i] for i in comparison.truth] if comparison.labels else []
        # of each model: its scores over all clips, and fold by fold
        self.scores = [self._scores(answers, slice(None)) for answers in comparison.answers if comparison.labels]
        self.by_fold = [
            [self._scores(answers, clips) for clips in comparison.folds.values()]
            for answers in comparison.answers if comparison.labels
        ]  # fmt: skip

    def _model(self, m: int) -> Html:
        """A model's name, with its colour and with places where it may be broken."""
        name = escape(self.data.evaluations[m].name)
        for mark in "/+_":
            name = name.replace(mark, f"{mark}<wbr>")
        return tag("span", Html(name), class_=f"model m{m % 6}")

    def _scores(self, answers: np.ndarray, clips: Any) -> dict[str, Any]:
        said = [*self.data.labels, None]
        truth = [self.data.labels[i] for i in self.data.truth[clips]]
        return metrics.classification(truth, [said[i] for i in answers[clips]], self.data.labels)

    def value(self, m: int, score: str) -> float | None:
        """A score over the common clips, of several folds their mean; None for one that cannot be computed again."""
        if self.scores and score in self.scores[m]:
            return float(np.mean([fold[score] for fold in self.by_fold[m]]))
        if score in self.data.means:
            return float(compare.complete(self.data.means[score])[m].mean())
        return None

    def html(self, published: bool) -> str:
        """The whole page."""
        count, clips = len(self.models), len(self.data.ids)
        title = f"{count} model{'s' * (count > 1)} on {self.data.evaluations[0].bench or 'the same clips'}"
        chapters = {
            "Scores": [*self.headline(), *self.folds(), *self.intervals(), *self.others()],
            "Published results": self.published() if published else [],
            "Classes": self.classes(), "Confusions": self.confusions(), "Answers in words": self.words(),
            "Where the models disagree": self.disagreements(),
            "Where all are wrong" if self.scores else "The lowest scores": self.wrong(),
            "What was compared": self.compared(),
        }  # fmt: skip
        chapters = {name: parts for name, parts in chapters.items() if parts}
        links = [tag("a", name, href=f"#{_anchor(name)}") for name in chapters]
        about = tag("p", f"{clips:,} clips, answered by {'every model' if count > 1 else 'it'}.")
        whole = [
            tag("header", tag("h1", title), about, *self.notes(), tag("nav", *links, aria_label="Chapters")),
            tag("main", *(chapter(name, *parts) for name, parts in chapters.items())),
        ]  # fmt: skip
        head = [
            tag("meta", charset="utf-8"),
            tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("title", title), tag("style", Html(CSS)),
        ]  # fmt: skip
        return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), tag('body', *whole), lang='en')}\n"

    def notes(self) -> list[Html]:
        """What a reader must know before the numbers: how far the evaluations are of the same thing."""
        all_, notes = self.data.evaluations, []
        if len({each.bench for each in all_}) > 1:
            notes.append("Different benchmarks: " + ", ".join(f"{each.name} on {each.bench}" for each in all_) + ".")
        if any(len(each.records) != len(self.data.ids) for each in all_):
            had = ", ".join(f"{each.name} {len(each.records):,}" for each in all_)
            notes.append(f"Only common clips are compared: {len(self.data.ids):,}. Evaluated: {had}.")
        if self.data.relabelled:
            notes.append(f"Common clips left out, for their true labels differ: {self.data.relabelled:,}.")
        if self.data.labels and any(each.metrics["labels"] != self.data.labels for each in all_):
            common = ", ".join(self.data.labels)
            notes.append(f"Different labels were known; an answer outside the common ones is wrong: {common}.")
        return [tag("ul", *(tag("li", note) for note in notes), class_="notes")] if notes else []

    # ---- numbers

    def headline(self) -> list[Html]:
        """The main table: what is recomputed from the answers, beside what answers nothing."""
        shown = [*(SCORES if self.scores else ()), *self.data.means]
        columns = [_best([self.value(m, score) for m in range(len(self.models))]) for score in shown]
        if self.scores:
            columns.append([Html(f"{share:.1%}") for share in self._invalid()])
        clips = f"{len(self.data.ids):,}"
        rows = [row(model, *(column[m] for column in columns), clips) for m, model in enumerate(self.models)]
        base = self._baseline()
        cells = [_number(base.get(name)) for name in shown] + [f"{0:.1%}"] * bool(self.scores)
        last = [row(f"always {base['label']}", *cells, clips, kind="base")] if base else []
        head = header("model", *map(_name, shown), *(["invalid"] if self.scores else []), "clips")
        over = f", means of {len(self.data.folds)} folds" if len(self.data.folds) > 1 else ""
        notes = ["Invalid: answers without one of the labels; they count as wrong. "] if self.scores else []
        if self.scores and (
            neutral := [e.name for e in self.data.evaluations if e.metrics.get("extract") == "original"]
        ):
            notes = [f"Invalid: answers without one of the labels; of {', '.join(neutral)} they count as neutral. "]
        notes += ["The last row is the most frequent answer, always given. "] if base else []
        notes += [f"{left} They are left out of its mean. "] if (left := self._left()) else []
        notes += self._judges()
        return [table(f"Scores over the common clips{over}", [head], rows, last), tag("p", *notes)]

    def _invalid(self) -> list[float]:
        """The share of every model's answers that name none of the labels."""
        said = [[each.records[id]["prediction"] for id in self.data.ids] for each in self.data.evaluations]
        return [sum(answer not in self.data.labels for answer in row) / len(row) for row in said]

    def _baseline(self) -> dict[str, Any]:
        """The scores of always giving the most frequent answer; empty where they are not known."""
        if self.scores:
            parts = [[self.truth[i] for i in clips] for clips in self.data.folds.values()]
            label = metrics.majority(self.truth, self.data.labels)["label"]
            each = [metrics.classification(part, [label] * len(part), self.data.labels) for part in parts]
            return {"label": label} | {name: float(np.mean([one[name] for one in each])) for name in SCORES}
        first = self.data.evaluations[0]
        return first.metrics.get("majority", {}) if len(first.records) == len(self.data.ids) else {}

    def _left(self) -> str:
        """How many clips a judge gave no score."""
        left = {name: values.shape[1] - compare.complete(values).shape[1] for name, values in self.data.means.items()}
        return " ".join(f"Clips without a {_name(name)} of some model: {n:,}." for name, n in left.items() if n)

    def _judges(self) -> list[str]:
        """Who judged answers in words, where something did."""
        if not any({"judge", "clue_overlap"} & set(each.metrics) for each in self.data.evaluations):
            return []
        judges = [each.metrics.get("judge", "lexical, no language model") for each in self.data.evaluations]
        named = [str(judge.get("name", judge) if isinstance(judge, dict) else judge) for judge in judges]
        if len(set(named)) == 1:
            return [f"Judge: {named[0]}."]
        each = [f"{e.name}: {judge}" for e, judge in zip(self.data.evaluations, named, strict=True)]
        return [f"Judges, whose scores cannot be compared: {'; '.join(each)}."]

    def intervals(self) -> list[Html]:
        """The main score's interval of every model, and of its difference to the first model's."""
        drawn, main = self.data.drawn(self.seed), self.data.main
        values = [float(self.value(m, main) or 0) for m in range(len(self.models))]
        bounds = [compare.interval(each) for each in drawn]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        rows = []
        for m, model in enumerate(self.models):
            difference: list[object] = ["–", "–"]
            if m:
                gap = compare.interval(drawn[m] - drawn[0])
                sure = "b" if gap[0] > 0 or gap[1] < 0 else "span"
                text = " to ".join(_number(side, "+") for side in gap)
                difference = [tag(sure, _number(values[m] - values[0], "+")), tag(sure, text)]
            own = f"{bounds[m][0]:.4f} to {bounds[m][1]:.4f}"
            picture = _whisker(values[m], *bounds[m], low, high, m)
            rows.append(row(model, _number(values[m]), own, picture, *(difference if len(drawn) > 1 else [])))
        more = [f"difference to {self.data.evaluations[0].name}", "95 % interval"] if len(drawn) > 1 else []
        head = header("model", _name(main), "95 % interval", f"{low:.2f} to {high:.2f}", *more)
        note = f"Intervals: {DRAWS:,} bootstrap draws of the clips, seed {self.seed}, the same draws for every model. "
        bold = "A difference is bold where its interval leaves out 0." if more else ""
        return [table(f"How sure is the {_name(main)}", [head], rows), tag("p", note, bold)]

    def others(self) -> list[Html]:
        """The scores that only metrics.json knows."""
        known = {*SCORES, *SAME, *SETTINGS, *self.data.means, *(f"{name}_1_10" for name in self.data.means), "invalid"}
        found = []
        for each in self.data.evaluations:
            dealt = {f"{name}, answers swapped": value for name, value in each.metrics.get("dealt", {}).items()}
            numbers = {k: v for k, v in (each.metrics | dealt).items() if type(v) in (int, float)}
            found.append({name: value for name, value in numbers.items() if name not in known})
        shown = list(dict.fromkeys(name for each in found for name in each))
        if not shown:
            return []
        rows = [
            row(model, *(_figure(each.get(name)) for name in shown), f"{len(evaluation.records):,}")
            for model, each, evaluation in zip(self.models, found, self.data.evaluations, strict=True)
        ]
        lexical = {"clue_overlap": "clue overlap (0–10, lexical)"}
        head = header("model", *(lexical.get(name) or _name(name) for name in shown), "clips")
        return [table("As in each metrics.json, over all clips of the evaluation", [head], rows)]

    def folds(self) -> list[Html]:
        """UAR and accuracy by fold, where the clips belong to folds."""
        if not self.scores or len(self.data.folds) == 1:
            return []
        pairs = ("uar", "accuracy")
        rows = [
            row(fold, len(clips), *(_number(each[i][name]) for each in self.by_fold for name in pairs))
            for i, (fold, clips) in enumerate(self.data.folds.items())
        ]
        mean = [_number(self.value(m, name)) for m in range(len(self.models)) for name in pairs]
        last = row("mean of folds", f"{len(self.data.ids):,}", *mean, kind="sum")
        return [table("By fold", self._heads("fold", [_name(name) for name in pairs]), rows, [last])]

    def _heads(self, first: str, names: Sequence[str]) -> list[Html]:
        """Two rows of headings: every model over the same columns."""
        over = [tag("th", model, scope="colgroup", colspan=len(names)) for model in self.models]
        top = tag("tr", tag("th", first, scope="col", rowspan=2), tag("th", "clips", scope="col", rowspan=2), *over)
        return [top, tag("tr", *(tag("th", name, scope="col") for _ in self.models for name in names))]

    def published(self) -> list[Html]:
        """Published rows beside the models; a line where there are none for this benchmark."""
        bench = self.data.evaluations[0].bench
        if bench not in PUBLISHED:
            benches = ", ".join(PUBLISHED)
            return [tag("p", f"No published results are known for {bench or 'these clips'} (known: {benches}).")]
        known = PUBLISHED[bench]
        mark = tag("span", "published, not measured here", class_="mark")
        ours = [row(model, *(_number(self.value(m, name)) for name in known.columns))
                for m, model in enumerate(self.models)]  # fmt: skip
        theirs = [
            row(
                Html(f"{escape(name)} {mark}"),
                *(f"{value:.{4 if value < 1 else 2}f}" for value in values),
                kind="published",
            )
            for name, values in sorted(known.rows, key=lambda each: -each[1][0])
        ]
        clips = f" of {known.clips:,} clips" if known.clips else ""
        notes = [f"Published rows are what their authors measured on the test set{clips} of {known.what}; "
                 f"those above were measured here, on {len(self.data.ids):,} clips."]  # fmt: skip
        if known.clips and known.clips != len(self.data.ids):
            notes.append(" These are not the same clips, so the two kinds of rows are not comparable.")
        if bench == "emer":
            notes.append(" Their judge, gpt-3.5-turbo-16k-0613, is retired; another judge's scores are not comparable.")
        return [table(known.what, [header("model", *map(_name, known.columns))], ours, theirs), tag("p", *notes)]

    def classes(self) -> list[Html]:
        """Recall and F1 of every class."""
        if not self.scores:
            return []
        rows = []
        for label in self.data.labels:
            each = [scores["per_class"][label] for scores in self.scores]
            cells = zip(*(_best([one[name] for one in each]) for name in ("recall", "f1")), strict=True)
            rows.append(row(label, each[0]["support"], *(cell for pair in cells for cell in pair)))
        return [table("Recall and F1 of every label", self._heads("label", ["recall", "F1"]), rows)]

    def confusions(self) -> list[Html]:
        if not self.scores:
            return []
        invalid = any(scores["invalid"] for scores in self.scores)
        grids = [self._confusion(m, invalid) for m in range(len(self.models))]
        text = "Rows: the true label and its clips. Columns: the answer. Darker: a larger share of the row."
        wide = "grids wide" if len(self.data.labels) > DENSE else "grids"
        return [tag("p", text), tag("div", *grids, class_=wide)]

    def _confusion(self, m: int, invalid: bool) -> Html:
        counts, labels = np.asarray(self.scores[m]["confusion"]), self.data.labels
        support = np.bincount(self.data.truth, minlength=len(labels))
        if invalid:
            counts = np.column_stack([counts, support - counts.sum(1)])
        rows = []
        for label, line, n in zip(labels, counts.tolist(), support.tolist(), strict=True):
            cells = []
            for count in line:
                share = count / max(n, 1)
                text = [count, tag("small", f"{share:.0%}" if share >= 0.005 else "<1%")] if count else ["0"]
                strong = "full" if share > 0.7 else "some" if count else "none"
                cells.append(tag("td", *text, class_=strong, style=f"--share:{share:.3f}"))
            rows.append(tag("tr", tag("th", label, Html(f" <small>{n}</small>"), scope="row"), *cells))
        answers = [*labels, *(["no label"] if invalid else [])]
        head = tag(
            "tr", tag("th", "true", scope="col"), *(tag("th", tag("span", name), scope="col") for name in answers)
        )
        kind = "heat dense" if len(labels) > DENSE else "heat"
        grid = table(f"Confusions of {self.data.evaluations[m].name}", [head], rows, kind=kind)
        return tag("figure", tag("figcaption", self.models[m]), grid)

    def words(self) -> list[Html]:
        """How much is said, and how often the same, by models that answered in words; over all of their clips."""
        rows, all_ = [], [each.metrics.get("texts", {}) for each in self.data.evaluations]
        metrics_ = list(dict.fromkeys(name for found in all_ for name in found.get("metrics", {})))
        for model, found, each in zip(self.models, all_, self.data.evaluations, strict=True):
            said = [words for record in each.records.values() if (words := _words(record)) is not None]
            if not found or not said:
                continue
            [(most, times)] = Counter(said).most_common(1)
            told, echo = found.get("captions_wanted"), found.get("echo")
            cells = [
                f"{found.get('distinct', 0):,} of {found.get('answers', 0):,}", f"{found.get('mean_words', 0):.1f}",
                f"{found.get('captions_found', 0):,} of {told:,}" if told else "–",
                "–" if echo is None else f"{echo:.1%}",
                *(_number(found.get("metrics", {}).get(name)) for name in metrics_), f"{times / len(said):.1%}",
            ]  # fmt: skip
            rows.append(row(model, *cells, tag("q", _short(most))))
        head = header("model", "distinct answers", "mean words", "captions found", "echo the transcript",
                      *map(_name, metrics_), "most frequent", "which is")  # fmt: skip
        return [table("Free text", [head], rows, kind="text")] if rows else []

    def compared(self) -> list[Html]:
        """Which evaluations these are."""
        rows = []
        for model, each in zip(self.models, self.data.evaluations, strict=True):
            source = each.metrics.get("checkpoint") or each.metrics.get("answers_file") or str(each.folder)
            clips = f"{len(each.records):,}", f"{len(self.data.ids):,}"
            rows.append(row(model, each.bench or "–", each.metrics.get("decode", "–"), *clips, source))
        head = header("model", "benchmark", "decoding", "clips evaluated", "clips compared", "checkpoint")
        return [table("The evaluations", [head], rows, kind="text")]

    # ---- clips

    def disagreements(self) -> list[Html]:
        clips = compare.disagreements(self.data)
        if len(self.models) == 1:
            return []
        if not clips:
            return [tag("p", "Nowhere: on every clip all are right or all are wrong.")] if self.scores else []
        if not self.scores:
            return self._clips(clips, DISAGREE, "clips on which the scores differ; the largest differences first")
        right = (self.data.answers == self.data.truth).sum(0)
        lone = sum(int(right[i]) == 1 for i in clips)
        rule = f"clips on which some are right and some wrong, first the {lone:,} that exactly one gets right"
        rule = "clips that exactly one gets right" if lone == len(clips) else rule
        return self._clips(clips, DISAGREE, rule)

    def wrong(self) -> list[Html]:
        clips = compare.all_wrong(self.data)
        if not self.scores:
            return self._clips(clips, WRONG, "clips, the lowest scores first") if clips else []
        none = "no model gets right" if len(self.models) > 1 else "it gets wrong"
        return self._clips(clips, WRONG, f"clips that {none}") if clips else [tag("p", "Nowhere.")]

    def _clips(self, clips: list[int], most: int, which: str) -> list[Html]:
        shown = f"{min(most, len(clips))} of {len(clips):,}" if len(clips) > most else f"{len(clips)}"
        return [tag("p", f"{shown} {which}."), tag("div", *map(self._clip, clips[:most]), class_="clips")]

    def _clip(self, i: int) -> Html:
        """One clip: its frame, what is said in it, its label, and every model's answer."""
        data, records = self.data, self.data.records(i)
        id, prompt, label = data.ids[i], data.known(i, "prompt"), data.known(i, "label")
        text = prompts.spoken(prompt) if isinstance(prompt, str) else None
        facts = [tag("h3", id)]
        if text:
            facts.append(tag("p", tag("q", text), class_="said"))
        if label is not None:
            facts.append(tag("p", "true label: ", tag("strong", label)))
        if records[0].get("task", "emotion") != "emotion" and (target := data.known(i, "target")) not in (None, label):
            facts.append(tag("p", "true description: ", _folded(target)))
        truths, said = zip(*map(_emotion_words, records), strict=True)
        if any(truths):
            facts.append(tag("p", "its emotion words: ", next(filter(None, truths))))
        rows = []
        if self.scores:
            answers = [
                Html(f"{escape(_text(each['prediction']))} {self._verdict(m, i)}") for m, each in enumerate(records)
            ]
            rows.append(row("answer", *answers))
        told = [_words(record) for record in records]
        beyond = any(words not in (None, each.get("prediction")) for words, each in zip(told, records, strict=True))
        if beyond or not self.scores:
            rows.append(row("in words", *("–" if words is None else _folded(words) for words in told)))
        if any(said):
            rows.append(row("emotion words", *(words or "–" for words in said)))
        for name, values in data.means.items():
            rows.append(row(_name(name), *("–" if np.isnan(value) else f"{value:.2f}" for value in values[:, i])))
        rows += self._probabilities(records, label)
        head = tag("tr", tag("td"), *(tag("th", model, scope="col") for model in self.models))
        where = (data.known(i, name) for name in ("path", "start", "end"))
        return tag("article", _picture(id, *where), tag("div", *facts, class_="facts"),
                   table(f"Answers for {id}", [head], rows, kind="answers"), class_="clip")  # fmt: skip

    def _verdict(self, m: int, i: int) -> Html:
        right = self.data.answers[m, i] == self.data.truth[i]
        mark, kind = ("✓", "right") if right else ("✗", "wrong")
        return tag("span", mark, class_=kind, role="img", aria_label=kind)

    def _probabilities(self, records: Sequence[dict[str, Any]], label: object) -> list[Html]:
        """A bar of every label and model; of many labels the true one and each model's first three."""
        given = [record.get("probabilities") or {} for record in records]
        labels = list(dict.fromkeys(name for each in given for name in each))
        if len(labels) > SHOWN:
            first = {name for each in given for name in sorted(each, key=each.__getitem__, reverse=True)[:3]}
            labels = [name for name in labels if name in first or name == label]
        return [
            tag("tr", tag("th", name, scope="row"), *(self._bar(m, each.get(name)) for m, each in enumerate(given)),
                class_="true" if name == label else None)
            for name in labels
        ]  # fmt: skip

    def _bar(self, m: int, p: float | None) -> Html:
        if p is None:
            return tag("td", "–")
        bar = tag("span", class_=f"bar m{m % 6}", style=f"--share:{p:.3f}")
        return tag("td", bar, tag("span", f"{p:.0%}", class_="percent"))


def chapter(title: str, *inside: object) -> Html:
    return tag("section", tag("h2", title, id=_anchor(title)), *inside, aria_labelledby=_anchor(title))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _text(value: object) -> str:
    return "no label" if value is None else str(value)


def _words(record: dict[str, Any]) -> str | None:
    """An answer that was generated, not chosen among labels."""
    answer = record.get("answer")
    return answer if isinstance(answer, str) and not record.get("probabilities") else None


def _emotion_words(record: dict[str, Any]) -> tuple[str, str]:
    """The emotion words of the true description and of the answer, where something compared them."""
    sets, judged = record.get("openset") or {}, record.get("judge") or {}
    truth = sets.get("truth") or judged.get("truth_words") or []
    said = sets.get("said") or judged.get("answer_words") or []
    return ", ".join(truth), ", ".join(said)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()}…"


def _folded(text: str) -> Html:
    """A text that opens on demand where it is long."""
    if _short(text) == text:
        return tag("span", text)
    return tag("details", tag("summary", _short(text)), tag("p", text))


def _whisker(value: float, low: float, high: float, left: float, right: float, m: int) -> Html:
    """A model's interval as a line and its score as a dot, on a scale from `left` to `right`."""
    x = [6 + 188 * (each - left) / ((right - left) or 1) for each in (low, value, high)]
    return Html(
        f'<svg class="m{m % 6}" viewBox="0 0 200 16" width="200" height="16" role="img" aria-label="{low:.4f} to '
        f'{high:.4f}"><line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="8" y2="8"/><circle cx="{x[1]:.1f}" cy="8" r="5"/></svg>'
    )


def _picture(id: str, path: str | None, start: float | None = None, end: float | None = None) -> Html:
    """The clip's middle frame as a data URI, or why there is none."""
    try:
        if not path:
            raise Absent("no media named")
        content, size = as_jpeg(load_frame(path, "middle", start, end))
    except MediaError as error:
        reason = str(error).removeprefix(f"{path}: ")
        named = f" ({Path(path).name})" if path else ""
        return tag("figure", tag("p", f"No picture: {reason}{named}"), class_="absent")
    return tag("figure", tag("img", src=content, alt=f"Middle frame of {id}", width=size[1], height=size[0]))


def as_jpeg(frame: torch.Tensor) -> tuple[str, list[int]]:
    """A frame (H, W, 3) uint8 as a data URI, no side longer than WIDTH, and its height and width."""
    from torchvision.io import encode_jpeg

    scale = min(1.0, WIDTH / max(frame.shape[:2]))
    size = [max(1, round(side * scale)) for side in frame.shape[:2]]
    pixels = frame.permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)
    content = base64.b64encode(bytes(torch.as_tensor(encode_jpeg(small, quality=80)).tolist())).decode()
    return f"data:image/jpeg;base64,{content}", size


def write(path: Path, comparison: Comparison, published: bool, seed: int) -> Path:
    """The page about `comparison` at `path`, whole or not at all."""
    content = Page(comparison, seed).html(published)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--out {path}: {error.strerror}") from None
    return path


# nothing may be loaded and nothing may run, whatever an answer holds
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CSS = """
:root { color-scheme: light dark; --back: #f6f7f9; --box: #fff; --ink: #18212d; --soft: #526071; --line: #dbe0e7;
  --heat: 31 95 191; --full: #fff; --right: #17703f; --wrong: #b02a22; --mark: #eef2f8;
  --m0: #1f5fbf; --m1: #b8520a; --m2: #17803f; --m3: #7a3db0; --m4: #b0246a; --m5: #0d7377; }
@media (prefers-color-scheme: dark) {
  :root { --back: #10151b; --box: #181f28; --ink: #e4e9f0; --soft: #a2adbb; --line: #313b48;
    --heat: 45 103 205; --full: #fff; --right: #6fd39a; --wrong: #ff9a90; --mark: #222c39;
    --m0: #7db0ff; --m1: #ffab66; --m2: #6fd08c; --m3: #c99bf5; --m4: #ff8fc0; --m5: #5fcfd0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 16px 64px; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", sans-serif; }
h1 { margin: 0 0 4px; font-size: 28px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 20px; line-height: 1.3; }
h3 { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 75ch; }
header p, section > p, .notes { color: var(--soft); overflow-wrap: anywhere; }
.notes { margin: 8px 0; padding-left: 20px; max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 16px; padding-top: 12px;
  border-top: 1px solid var(--line); }
a { color: var(--m0); }
.scroll { overflow-x: auto; width: fit-content; min-width: min(100%, 560px); max-width: 100%; margin: 12px 0;
  background: var(--box); border: 1px solid var(--line); border-radius: 8px; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--m0); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { padding: 10px 12px; text-align: left; font-weight: 600; border-bottom: 1px solid var(--line); }
caption span { display: inline-block; position: sticky; left: 12px; max-width: min(100%, calc(100vw - 58px)); }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; }
tbody th, thead tr:first-child th:first-child, .text th, .text td { text-align: left; }
tbody tr { border-top: 1px solid var(--line); }
th[scope=colgroup] { border-left: 1px solid var(--line); text-align: center; }
tbody th { min-width: 130px; max-width: 260px; white-space: normal; overflow-wrap: break-word; }
tbody th, thead tr:first-child th:first-child { position: sticky; left: 0; z-index: 1; background: var(--box); }
b { font-weight: 700; }
.sum { font-weight: 600; }
.base, .published { color: var(--soft); }
.published th { font-weight: 400; max-width: none; }
.mark { display: inline-block; padding: 0 8px; border: 1px solid var(--line); border-radius: 9px; font-size: 12px;
  background: var(--mark); white-space: nowrap; }
.text td:last-child { min-width: 280px; white-space: normal; overflow-wrap: anywhere; }
.m0 { --own: var(--m0); } .m1 { --own: var(--m1); } .m2 { --own: var(--m2); }
.m3 { --own: var(--m3); } .m4 { --own: var(--m4); } .m5 { --own: var(--m5); }
.model { color: var(--ink); font-weight: 600; }
.model::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 7px; border-radius: 50%;
  background: var(--own); }
svg { display: block; margin-top: 4px; }
svg line { stroke: var(--own); stroke-width: 3; stroke-linecap: round; }
svg circle { fill: var(--own); stroke: var(--box); stroke-width: 2; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.grids figure, .clip figure { margin: 0; min-width: 0; }
.grids .scroll { width: auto; min-width: 0; margin: 6px 0 0; }
.heat caption, .answers caption { position: absolute; width: 1px; height: 1px; padding: 0; border: 0; overflow: hidden;
  clip-path: inset(50%); }
.heat { table-layout: fixed; min-width: 300px; }
.heat th, .heat td { padding: 4px 2px; text-align: center; font-size: 13px; line-height: 1.25; }
.heat thead th span { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.heat th:first-child { width: 88px; min-width: 0; padding-left: 8px; text-align: left; overflow-wrap: anywhere; }
.heat td { height: 38px; vertical-align: middle; background: rgb(var(--heat) / var(--share)); }
.heat small { display: block; font-size: 11px; }
.heat th small { color: var(--soft); }
.heat .full { color: var(--full); }
.heat .none { color: var(--soft); }
.wide { grid-template-columns: minmax(0, 1fr); }
.wide .scroll { width: fit-content; }
.dense { table-layout: auto; }
.dense th:first-child { width: auto; padding-right: 8px; white-space: nowrap; overflow-wrap: normal; }
.dense tbody th small { display: inline; }
.dense td { min-width: 26px; height: 24px; }
.dense td small { display: none; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.clip { display: grid; grid-template-columns: 148px minmax(0, 1fr); gap: 4px 16px; align-content: start; padding: 14px;
  background: var(--box); border: 1px solid var(--line); border-radius: 8px; }
.clip img { display: block; width: 100%; height: auto; border-radius: 5px; }
.clip .absent { display: grid; place-items: center; min-height: 96px; padding: 8px; border: 1px dashed var(--line);
  border-radius: 5px; color: var(--soft); font-size: 13px; text-align: center; overflow-wrap: anywhere; }
.clip .scroll { grid-column: 1 / -1; width: auto; min-width: 0; margin: 8px 0 0; border-radius: 5px; }
.facts p { margin: 4px 0 0; overflow-wrap: anywhere; }
.said { color: var(--soft); }
.answers th, .answers td { padding: 3px 10px; font-size: 13px; }
.answers td { min-width: 104px; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.answers thead th { text-align: left; max-width: 180px; white-space: normal; }
.answers thead td { min-width: 0; }
.answers tbody th { min-width: 84px; text-align: left; color: var(--soft); }
.answers tbody tr { border-top: 0; }
.answers tbody tr:first-child { border-top: 1px solid var(--line); }
.answers .true th { color: var(--ink); font-weight: 700; }
.bar { display: inline-block; width: calc(var(--share) * (100% - 44px)); min-width: 1px; height: 9px; margin-right: 6px;
  border-radius: 2px; background: var(--own); }
.percent { font-size: 12px; }
.right { color: var(--right); font-weight: 700; }
.wrong { color: var(--wrong); font-weight: 700; }
details summary { cursor: pointer; }
"""
