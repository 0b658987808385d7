"""Figures of free-form answers that show at a glance whether a model says anything of its own."""

import importlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

from common.config import UserError

# option -> the package it needs; all are optional (requirements-extra.txt)
PACKAGES = {"bleu": "sacrebleu", "rouge": "rouge_score", "meteor": "nltk", "bleu_published": "nltk"}
INSTALL = "pip install -r requirements-extra.txt"
GRAM = 3  # words that must stand together for a part of an answer to count as taken from the transcript


def words(text: str) -> list[str]:
    """Lower-case words and numbers; of Chinese text the characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))


def echoes(answer: str, transcript: str | None) -> bool:
    """Whether more than half of an answer's words stand in stretches of three words or more of the transcript.

    A transcript of fewer words is looked for as a whole.
    """
    said, told = words(transcript or ""), words(answer)
    n = min(GRAM, len(said))
    if not n:
        return False
    grams = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
    taken = {at + j for at in range(len(told) - n + 1) if tuple(told[at : at + n]) in grams for j in range(n)}
    return 2 * len(taken) > len(told)


def figures(records: Sequence[dict], transcripts: Mapping[str, str | None] | None = None) -> dict:
    """Distinct answers, their mean length in words, captions found, and the share that echoes what is said in the clip.

    `captions` counts the records of a captioning task whose clip has a reference; `echo` is None where no clip's
    transcript is known.
    """
    told = [record["answer"].strip() for record in records]
    asked = [record for record in records if record.get("task") != "emotion"]
    heard = {id: text for id, text in (transcripts or {}).items() if words(text or "")}
    pairs = [(record["answer"], heard[record["id"]]) for record in records if record["id"] in heard]
    return {
        "answers": len(told),
        "distinct": len(set(told)),
        "mean_words": sum(len(words(answer)) for answer in told) / max(len(told), 1),
        "captions_found": sum(bool(record.get("target")) for record in asked),
        "captions_wanted": len(asked),
        "echo": sum(echoes(*pair) for pair in pairs) / len(pairs) if pairs else None,
        "with_transcript": len(pairs),
    }


def line(found: dict) -> str:
    """Figures in one line."""
    parts = [f"{found['distinct']} distinct of {found['answers']}", f"{found['mean_words']:.1f} words on average"]
    if found["captions_wanted"]:
        parts.append(f"captions found {found['captions_found']}/{found['captions_wanted']}")
    if found["echo"] is not None:
        parts.append(f"{found['echo']:.1%} of {found['with_transcript']} echo the transcript")
    parts += [f"{name} {value:.4f}" for name, value in found.get("metrics", {}).items()]
    return f"answers: {', '.join(parts)}"


def check(names: Sequence[str]) -> None:
    """UserError unless the packages of these text metrics are installed."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise UserError(f"--text-metrics {name} needs {PACKAGES[name].replace('_', '-')}: {INSTALL}") from None


def compare(records: Sequence[dict], names: Sequence[str]) -> dict[str, float]:
    """BLEU (0 to 100), ROUGE-1, -2 and -L and METEOR (0 to 1) of the records that have a target.

    bleu is BLEU-4 of the whole corpus, bleu1 to bleu3 are those of shorter n-grams. bleu_published (0 to 1) is what
    MultiMood reports as BLEU-2: the mean over sentences, with weights of 0.99 and 0.01.
    """
    pairs = [(record["target"], record["answer"]) for record in records if record.get("target")]
    if names and not pairs:
        raise UserError(f"--text-metrics {names[0]}: no answer has a reference to be compared with")
    check(names)
    scores: dict[str, float] = {}
    for name in names:
        scores |= COMPARE[name](pairs)
    return scores


def _bleu(pairs: list[tuple[str, str]]) -> dict[str, float]:
    sacrebleu = importlib.import_module("sacrebleu")
    references, answers = [truth for truth, _ in pairs], [answer for _, answer in pairs]
    orders = {"bleu": 4, "bleu1": 1, "bleu2": 2, "bleu3": 3}
    return {
        name: sacrebleu.BLEU(max_ngram_order=order).corpus_score(answers, [references]).score
        for name, order in orders.items()
    }


def _bleu_published(pairs: list[tuple[str, str]]) -> dict[str, float]:
    nltk, bleu = (importlib.import_module(name) for name in ("nltk", "nltk.translate.bleu_score"))
    try:
        cut = [[nltk.word_tokenize(text.lower()) for text in pair] for pair in pairs]
    except LookupError:
        raise UserError("--text-metrics bleu_published needs punkt: python -m nltk.downloader punkt_tab") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of answers without a pair of words in common
        found = [bleu.sentence_bleu([truth], answer, weights=(0.99, 0.01)) for truth, answer in cut]
    return {"bleu_published": sum(found) / len(found)}


def _rouge(pairs: list[tuple[str, str]]) -> dict[str, float]:
    rouge = importlib.import_module("rouge_score.rouge_scorer")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge.RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(truth, answer) for truth, answer in pairs]
    return {kind.lower(): sum(each[kind].fmeasure for each in found) / len(found) for kind in kinds}


def _meteor(pairs: list[tuple[str, str]]) -> dict[str, float]:
    meteor = importlib.import_module("nltk.translate.meteor_score")
    try:
        found = [meteor.single_meteor_score(words(truth), words(answer)) for truth, answer in pairs]
    except LookupError:
        raise UserError("--text-metrics meteor needs WordNet: python -m nltk.downloader wordnet") from None
    return {"meteor": sum(found) / len(found)}


COMPARE: dict[str, Callable[[list[tuple[str, str]]], dict[str, float]]] = {
    "bleu": _bleu,
    "rouge": _rouge,
    "meteor": _meteor,
    "bleu_published": _bleu_published,
}
