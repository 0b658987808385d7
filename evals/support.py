"""Emotional support: the four fields of an answer, by a language model; their scores beside the commonest labels'."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from common import dist, metrics
from common.config import UserError
from common.log import table_lines
from common.shard import place
from data.mesc import EMOTIONS, STRATEGIES
from data.prompts import Encode, encode_answer
from data.support import FIELDS, GAP, PromptConfig, TurnSample, asked, fields, parse_answer
from data.turns import CLOSED, TurnData
from evals import texts
from evals.emotion import DecodeConfig, Follow, balanced, spelled
from model.combine import Ensemble
from model.mllm import Mllm, alike, pack
from model.tokenizer import Tokenizer

Counts = Mapping[str, Mapping[str, int]]  # field -> label -> how often it was trained
HELD = 64  # turns whose clips are in memory at a time
COLUMNS = ("accuracy", "weighted_f1", "macro_f1", "precision_weighted", "recall_weighted", "invalid")


class Answers:
    """Answers that are being written to samples, field by field."""

    def __init__(
        self, mllm: Mllm | Ensemble, tokenizer: Tokenizer, samples: Sequence[TurnSample], prompt: PromptConfig,
        batch_size: int,
    ) -> None:  # fmt: skip
        self.mllm, self.tokenizer, self.batch_size = mllm, tokenizer, batch_size
        self.samples = samples
        self.asked = [asked(sample.turn, prompt) for sample in samples]
        self.texts = [""] * len(samples)  # as far as they are written
        self.probabilities: list[dict[str, dict[str, float]]] = [{} for _ in samples]

    def score(self, name: str, labels: Sequence[str], counts: Mapping[str, int], balance: float) -> None:
        """Writes the likeliest of the labels, balanced by how often they were trained, into a field where asked for."""
        open_ = [i for i, names in enumerate(self.asked) if name in names]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        prompts = {}
        for i in open_:
            lines = [self._line(i, name, label) for label in labels]
            last = name == self.asked[i][-1]
            prompts[i], endings = continued(self.samples[i], lines, last, self.tokenizer.encode)
            groups[tuple(map(tuple, endings))].append(i)  # one, but for a tokenizer that joins across fields
        for endings, members in groups.items():
            for chosen in self._batches(members, prompts):
                batch = pack([prompts[i] for i in chosen], self.mllm.cfg, answers=False).to(place(self.mllm))
                found = balanced(self.mllm.score(batch, [*map(list, endings)]), labels, counts, balance)
                for i, row in zip(chosen, found.tolist(), strict=True):
                    self.probabilities[i][name] = dict(zip(labels, row, strict=True))
                    self.texts[i] = self._line(i, name, labels[max(range(len(row)), key=row.__getitem__)])

    def generate(self, cfg: DecodeConfig, seed: int, follow: Follow | None) -> None:
        """Writes what is still missing of each answer."""
        title = FIELDS["response"] + ":"
        begun = [self._before(i) + title if self.texts[i] else "" for i in range(len(self.samples))]
        prompts = {}
        for i, sample in enumerate(self.samples):
            said = self.tokenizer.encode(begun[i], specials=()) if begun[i] else []
            prompts[i] = replace(sample, pieces=[*sample.pieces, said])
        for chosen in self._batches(range(len(prompts)), prompts):
            batch = pack([prompts[i] for i in chosen], self.mllm.cfg, answers=False).to(place(self.mllm))
            generator = torch.Generator(place(self.mllm)).manual_seed(seed + chosen[0]) if cfg.temperature > 0 else None
            ids = self.mllm.generate(
                batch, cfg.max_new_tokens, **cfg.settings(), eos_id=self.tokenizer.eos_id, generator=generator,
                follow=follow and spelled(follow, batch.ids, self.tokenizer),
            )  # fmt: skip
            for i, row in zip(chosen, ids, strict=True):
                said = self.tokenizer.decode(row).strip()
                self.texts[i] = f"{begun[i]} {said}" if begun[i] else said

    def _before(self, i: int) -> str:
        """What is written of an answer, up to where the next field begins."""
        return self.texts[i] + GAP if self.texts[i] else ""

    def _line(self, i: int, name: str, label: str) -> str:
        return f"{self._before(i)}{FIELDS[name]}: {label}"

    def _batches(self, members: Sequence[int], prompts: dict[int, TurnSample]) -> Iterator[list[int]]:
        """Batches of samples that are alike in length."""

        def length(i: int) -> int:
            return sum(len(piece) if isinstance(piece, list) else 1 for piece in prompts[i].pieces)

        order = sorted(members, key=lambda i: (-length(i), i))
        return (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))


def continued(
    sample: TurnSample, texts: Sequence[str], last: bool, encode: Encode
) -> tuple[TurnSample, list[list[int]]]:
    """The sample with what all of the texts begin with behind its prompt, and how each of them goes on.

    Each text ends its line as answers do: another one follows, or with the `last` the end.
    """
    whole = [encode_answer(text, encode) if last else encode(text + GAP, specials=()) for text in texts]
    shared = min(alike(whole), min(map(len, whole)) - 1)
    return replace(sample, pieces=[*sample.pieces, whole[0][:shared]]), [ids[shared:] for ids in whole]


@torch.inference_mode()
def answer(
    mllm: Mllm | Ensemble, tokenizer: Tokenizer, samples: Sequence[TurnSample], prompt: PromptConfig, cfg: DecodeConfig,
    batch_size: int = 8, seed: int = 0, respond: bool = True, follow: Follow | None = None,
    counts: Counts | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record a sample: id, target and answer; with cfg.decode "score" the probabilities of the closed fields.

    Scored, each field is the likeliest label after the fields before it, and the response, unless `respond` is off, is
    generated after all of them; else all of the answer is generated. `follow` sees what is generated grow. `counts` are
    for cfg.balance.
    """
    answers = Answers(mllm, tokenizer, samples, prompt, batch_size)
    if cfg.decode == "score":
        for name in CLOSED:
            labels = prompt.strategies if name == "strategy" else prompt.emotions
            answers.score(name, labels, (counts or {}).get(name, {}), cfg.balance)
    if cfg.decode == "generate" or (respond and "response" in prompt.fields):
        answers.generate(cfg, seed, follow)
    records = []
    for sample, text, probabilities in zip(samples, answers.texts, answers.probabilities, strict=True):
        target = {name: told if name in prompt.fields else None for name, told in fields(sample.turn).items()}
        record = {"id": sample.id, "target": target, "answer": text}
        record |= {"probabilities": probabilities} if probabilities else {}
        records.append(record | {"prompt": sample.prompt, "clips": sample.turn.clips})
    return records


def ask(
    mllm: Mllm | Ensemble, tokenizer: Tokenizer, data: TurnData, cfg: DecodeConfig, here: dist.Ranks,
    batch_size: int = 8, seed: int = 0, limit: int = 0, respond: bool = True, workers: int = 0, progress: bool = False,
    counts: Counts | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The records of the turns; the ranks share the work and all get all of it."""
    was_training = mllm.training
    mllm.eval()
    count = min(limit or len(data), len(data))
    turns = range(here.rank, count, here.world)
    mine: list[dict[str, Any]] = []
    quiet = not (progress and here.main and sys.stderr.isatty())
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for at in tqdm(range(0, len(turns), HELD), cfg.decode, disable=quiet, leave=False):
            samples = list(pool.map(data.sample, turns[at : at + HELD]))
            prompt = data.cfg.prompt
            mine += answer(mllm, tokenizer, samples, prompt, cfg, batch_size, seed + at, respond, counts=counts)
    mllm.train(was_training)
    parts = dist.gather(mine)
    return [parts[i % here.world][i // here.world] for i in range(count)]


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
    responses: dict[str, Any] = {}
    if replies:
        figures = texts.figures(replies)
        responses = {name: figures[name] for name in ("answers", "distinct", "mean_words")}
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
    if said := found["responses"]:
        parts = [f"{said['distinct']} distinct of {said['answers']}", f"{said['mean_words']:.1f} words on average"]
        parts += [f"{name} {value:.4f}" for name, value in said.get("metrics", {}).items()]
        notes.append(f"responses: {', '.join(parts)}")
    return "\n".join([table_lines(rows), *notes])
