"""MER2024's open vocabulary: emotion words of any wording, grouped by meaning, as sets (Lian et al. 2024, track OV)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from common.config import UserError
from data.manifest import read_text
from data.prompts import named, phrase

# One group a line, named by its first word. Written for this project: the challenge had a language model group words.
# Words that running text mostly uses for something else (content, kind, missing) are left out.
GROUPS = """
happy, happiness, happily, joy, joyful, joyous, joyfully, delighted, delight, glad, cheerful, cheerfulness, merry, elated, overjoyed, pleased, pleasant, pleasure, pleasurable
satisfied, satisfaction, contented, contentment, gratified, fulfilled
excited, excitement, thrilled, enthusiastic, enthusiasm, exhilarated
hopeful, hope, hoping, optimistic, optimism, anticipation, anticipating, expectant, expecting, looking forward, looking forward to, eager, eagerness
relaxed, relax, relaxation, carefree, at ease, comfortable
relieved, relief, reassured
calm, calmness, composed, composure, peaceful, peace, serene, serenity, tranquil
proud, pride, honored, honoured
confident, confidence, self-confident, assured
grateful, gratitude, thankful, thankfulness
loving, love, affection, affectionate, tender, tenderness, caring, care, fond, warm, warmth
friendly, friendliness, kindness, gentle, gentleness
admiring, admiration, admire, appreciation, appreciative, appreciate, respect, respectful
amused, amusement, humorous, humor, humour, funny, playful, teasing, laughing
surprised, surprise, surprising, astonished, astonishment, amazed, amazement, shocked, shock, stunned, startled, unexpected, incredulous, disbelief
curious, curiosity, interested, interest, intrigued, fascinated, fascination
confused, confusion, puzzled, puzzlement, perplexed, bewildered, bewilderment
doubtful, doubt, doubting, suspicious, suspicion, suspect, sceptical, skeptical, questioning, uncertain, uncertainty, unsure, distrust, hesitant, hesitation
worried, worry, worries, worrying, anxious, anxiety, nervous, nervousness, uneasy, unease, tense, tension, concerned, concern, apprehensive, apprehension, troubled, stressed, stress
afraid, fear, fearful, scared, frightened, terrified, terror, horrified, panic, panicked
sad, sadness, saddened, sorrow, sorrowful, unhappy, unhappiness, grief, grieving, heartbroken, heartbreak, melancholy, gloomy, dejected, tearful, upset
depressed, depression, hopeless, hopelessness, despair, despairing, desperate, pessimistic, pessimism
disappointed, disappointment, let down
helpless, helplessness, powerless
lonely, loneliness, isolated
hurt, pain, painful, suffering, distressed, distress, wronged
angry, anger, angered, angrily, mad, furious, fury, rage, enraged, irate, indignant, indignation, outraged
annoyed, annoyance, irritated, irritation, irritable, impatient, impatience
frustrated, frustration, exasperated
dissatisfied, dissatisfaction, discontent, discontented, displeased, displeasure, unsatisfied
accusing, accusation, accuse, blame, blaming, complaint, complaining, complain, reproach
hostile, hostility, hate, hatred, threatening, threat, aggressive
disgusted, disgust, repulsed, revulsion, repelled
contemptuous, contempt, disdain, disdainful, scorn, scornful, mockery, mocking, sarcastic, ironic, irony
jealous, jealousy, envious, envy
guilty, guilt, regret, regretful, remorse, remorseful, self-blame, apologetic
ashamed, shame, embarrassed, embarrassment, humiliated
shy, shyness, bashful, timid
bored, boredom, indifferent, indifference
tired, tiredness, exhausted, exhaustion, weary
nostalgic, nostalgia, longing
sympathetic, sympathy, compassion, compassionate, pity
determined, determination, resolute
serious, seriousness, solemn, grave
thoughtful, thinking, contemplation, contemplative, reflective, reflection, pensive
neutral, neutrality, emotionless, expressionless
positive, positivity, positive emotion, positive emotions
negative, negativity, negative emotion, negative emotions
"""  # noqa: E501 (a group is a line here as in a user's file)


class Judge(Protocol):
    """What report() needs of one of evals/judge.py."""

    name: str

    def words(self, texts: Sequence[str]) -> list[list[str] | None]: ...


class Synonyms:
    """Words and the group of meaning each stands for; a word of no group is a group of its own."""

    def __init__(self, path: str | Path | None = None) -> None:
        """`path`: a user's groups, one a line with commas between words; their words leave the groups built in."""
        self.groups: dict[str, str] = {}
        for text in (GROUPS, read_text(path) if path else ""):
            for line in text.splitlines():
                members = [word for part in line.split(",") if (word := _plain(part)) and not line.startswith("#")]
                self.groups |= dict.fromkeys(members, members[0] if members else "")
        self.phrases = self._phrases(self.groups)

    def meanings(self, word: str) -> set[str]:
        """The groups of one entry of a list: its own, else those of the words in it, else the entry itself."""
        word = _plain(word)
        if word in self.groups:
            return {self.groups[word]}
        return set(self.named(word)) or {word} - {""}

    def senses(self, words: Iterable[str]) -> set[str]:
        """The groups of the entries of a list."""
        return {group for word in words for group in self.meanings(word)}

    def know(self, words: Iterable[str]) -> None:
        """Takes words that mean nothing yet into the vocabulary of named(), each as a group of its own."""
        new = {group for word in words for group in self.meanings(word)} - set(self.groups.values())
        self.groups |= {group: group for group in new}
        self.phrases = self._phrases(self.groups)

    def named(self, text: str) -> list[str]:
        """The groups that a text names, once each, in its order; "not sad" does not name sad."""
        return list(dict.fromkeys(named(text, self.phrases)))

    def said(self, answer: str) -> list[str]:
        """The emotion words of an answer: the entries of a list, or the known words of running text."""
        found = listed(answer)
        return self.named(answer) if found is None else found

    def shared(self, truth: str, answer: str) -> tuple[float, list[str]]:
        """Ten times the F1 of the emotions that both texts name, and these emotions."""
        g, p = set(self.named(truth)), set(self.named(answer))
        return (20 * len(g & p) / (len(g) + len(p)) if g and p else 0.0), sorted(g & p)

    @staticmethod
    def _phrases(groups: Mapping[str, str]) -> dict[tuple[str, ...], str]:
        found = {phrase(word): group for word, group in groups.items() if phrase(word)}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))


@cache
def built_in() -> Synonyms:
    """The groups without a user's."""
    return Synonyms()


def _plain(word: str) -> str:
    return " ".join(word.lower().strip(" \t'\"`.!?[](){}").split())


def listed(text: str) -> list[str] | None:
    """The words of a list such as "['happy', 'at ease']" or "happy, at ease"; None for running text."""
    bare = text.strip()
    parts = [word for part in re.split(r"[,;/\n，、；]", bare.strip("[]")) if (word := _plain(part))]
    if bare.startswith("[") and bare.endswith("]"):
        return parts
    return parts if all(len(part.split()) <= 3 for part in parts) and not re.search(r"[.!?:]\s", bare) else None


def overlap(truth: set[str], said: set[str]) -> tuple[float, float]:
    """|G & P| / |P| and |G & P| / |G|; both 0 where nothing is said."""
    shared = len(truth & said)
    return (shared / len(said) if said else 0.0), (shared / len(truth) if truth else 0.0)


def score(truths: Sequence[set[str]], said: Sequence[set[str]]) -> dict[str, float]:
    """Accuracy and recall of the sets averaged over samples, and the mean of both, the challenge's score."""
    if not truths:
        raise UserError("nothing to score: no samples")
    pairs = [overlap(truth, words) for truth, words in zip(truths, said, strict=True)]
    accuracy, recall = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {"set_accuracy": accuracy, "set_recall": recall, "score": (accuracy + recall) / 2}


def report(records: Sequence[dict], judge: Judge, synonyms: Synonyms) -> tuple[dict, list[dict]]:
    """Scores beside always saying the commonest word, and the records with their groups.

    The judge says which emotion words an answer holds; answers that it did not read are listed and left out.
    """
    truths = [synonyms.said(record["target"]) for record in records]
    if empty := [record["id"] for record, words in zip(records, truths, strict=True) if not words]:
        raise UserError(f"mer-ov: {empty[0]!r} has no emotion word to compare with ({len(empty)} such clips)")
    synonyms.know(word for words in truths for word in words)
    said = judge.words([record["answer"] for record in records])
    rows = [
        (record, synonyms.senses(truth), synonyms.senses(words))
        for record, truth, words in zip(records, truths, said, strict=True)
        if words is not None
    ]
    unanswered = [record["id"] for record, words in zip(records, said, strict=True) if words is None]
    if not rows:
        raise UserError(f"judge {judge.name}: the emotion words of none of the {len(records)} answers could be read")
    g, p = [truth for _, truth, _ in rows], [words for _, _, words in rows]
    counts = Counter(group for groups in g for group in sorted(groups))
    commonest = max(counts, key=lambda group: counts[group])
    scores: dict = {"judge": judge.name} | score(g, p) | {"clips": len(rows), "answers": len(records)}
    scores |= {"mean_words": sum(map(len, p)) / len(p), "nothing_said": sum(not words for words in p)}
    scores |= {"unanswered": unanswered, "majority": {"label": commonest} | score(g, [{commonest}] * len(g))}
    shown = []
    for record, truth, words in rows:
        accuracy, recall = overlap(truth, words)
        found = {"truth": sorted(truth), "said": sorted(words), "set_accuracy": accuracy, "set_recall": recall}
        shown.append({**record, "openset": found})
    return scores, shown


def table(scores: dict) -> str:
    """The scores beside the majority's, and who was left out."""
    majority = scores["majority"]
    beside = f"majority ({majority['label']})"
    lines = [f"words read by: {scores['judge']}", f"{'':<12}    model  {beside}"]
    for name in ("set_accuracy", "set_recall", "score"):
        lines.append(f"{name:<12}  {scores[name]:7.4f}  {majority[name]:{len(beside)}.4f}")
    lines.append(
        f"{scores['clips']} of {scores['answers']} answers scored, {scores['mean_words']:.1f} words each, "
        f"{scores['nothing_said']} without any"
    )
    if scores["unanswered"]:
        lines.append(f"unanswered: {', '.join(scores['unanswered'])}")
    return "\n".join(lines)
