"""Emotion-LLaMA's questions, prompt layouts, answer processing and label extraction (Cheng et al., NeurIPS 2024)."""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from common.config import UserError

if TYPE_CHECKING:  # tools that make or list data need no PyTorch
    from torch import Tensor

LAYOUTS = ("train", "original_eval", "question_first", "clean")
ASKED = ("labels", "nine", "six", "guide", "none")  # what the emotion question offers: see pick_question
EMOTIONS9 = ("happy", "sad", "neutral", "angry", "worried", "surprise", "fear", "contempt", "doubt")
EMOTIONS6 = EMOTIONS9[:6]  # the labels of MER2023 and MER2024
OFFERED = {"nine": EMOTIONS9, "six": EMOTIONS6}
DFEW7 = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
_BY_ID = ("neutral", "angry", "happy", "sad", "worried", "surprise", "fear", "contempt", "doubt")
LABEL_IDS = {label: index for index, label in enumerate(_BY_ID)}


def emotion_question(labels: Iterable[str]) -> str:
    """The published question for a label, with these labels as the choice."""
    return f"Please determine which emotion label in the video represents: {', '.join(labels)}."


def label_questions(labels: Iterable[str]) -> tuple[str, ...]:
    """The published question and the paraphrases that the released code keeps for six labels, with any labels."""
    labels = list(labels)
    either = ", or ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
    return (
        emotion_question(labels),
        f"Identify the displayed emotion in the video: is it {either}?",
        f"Determine the emotional state shown in the video, choosing from {either}.",
        f"Please ascertain the specific emotion portrayed in the video, whether it be {either}.",
        f"Assess and label the emotion evident in the video: could it be {', '.join(labels)}?",
    )


_REASON = (
    "Please analyze all the clues in the video and reason out the emotional label of the person in the video.",
    "What is the emotional state of the person in the video? Please tell me the reason.",
    "What are the facial expressions and vocal tone used in the video? "
    "What is the intended meaning behind his words? Which emotion does this reflect?",
    "Please integrate information from various modalities to infer the emotional category of the person in the video.",
    "Could you describe the emotion-related features of the individual in the video? "
    "What emotional category do they fall into?",
)
# The pools of the released code; the *_guide pools are the examples its training guide shows.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "emotion": (emotion_question(EMOTIONS9),),
    "emotion6": label_questions(EMOTIONS6),
    "emotion_guide": (
        "What is the emotion expressed in this video?",
        "Identify the primary emotion shown.",
        "Classify the emotional state.",
    ),
    "reason": _REASON,
    "reason_v2": _REASON,
    "reason_guide": (
        "What are the facial expressions and vocal tone used? What emotion does this reflect?",
        "Analyze the multimodal cues and explain the emotion.",
        "Why is this person experiencing this emotion?",
    ),
    "caption": (
        "Please describe the details of the expression and tone the video.",
        "Can you provide a description of the facial expression and tone shown by the person in the video?",
        "Could you outline the facial expressions and vocal tones displayed in the video?",
        "Detail the expressions and tone used in the video.",
        "Explain the visual and auditory expressions captured in the video.",
        "Provide an analysis of the expressions and tone featured in the video.",
    ),
}


@dataclass(frozen=True)
class Slot:
    """A place in the prompt that embeddings fill: "image", "cls" or the name of an utterance feature."""

    name: str


class Special(str):
    """A control token in the prompt, by its literal; in any other text the same characters are a text."""


BOS, EOS = Special("<s>"), Special("</s>")
Encode = Callable[..., list[int]]  # a tokenizer's: (text, specials) -> ids


@dataclass
class Sample:
    """A prompt, its answer and their wording: token ids and names of slots, whose values are (rows, ...)."""

    id: str
    pieces: list[list[int] | str]
    answer: list[int]
    values: "dict[str, Tensor]"
    prompt: str
    target: str

    def positions(self, places: Callable[..., int]) -> int:
        """Positions that prompt and answer take, a slot places(name, value) of them."""
        prompt = (places(piece, self.values[piece]) if isinstance(piece, str) else len(piece) for piece in self.pieces)
        return sum(prompt) + len(self.answer)


def encode_segments(segments: Iterable[str | Slot], encode: Encode) -> list[list[int] | str]:
    """Ids of each text and special, and the names of the slots."""
    ids: list[list[int] | str] = []
    for piece in segments:
        specials = (piece,) if isinstance(piece, Special) else ()
        ids.append(piece.name if isinstance(piece, Slot) else encode(piece, specials=specials))
    return ids


def encode_answer(text: str, encode: Encode) -> list[int]:
    """Ids of an answer and of the token that ends it."""
    return [*encode(text, specials=()), *encode(EOS, specials=(EOS,))]


def segments(
    task: str,
    question: str,
    text: str | None,
    slots: Iterable[str],
    image: bool = True,
    cls: bool = True,
    layout: str = "train",
    chat_template: bool = True,
) -> list[str | Slot]:
    """The prompt as texts, each tokenised on its own, and slots; `text` is what the person says.

    "train" is the layout the released model was trained with; "original_eval" is the one its published scores were
    measured with: two BOS, all embeddings inside <video>, the literal <FeatureHere>. "question_first" ends with the
    embeddings: without a chat template the answer starts on the last of them, which spares a small model the search.
    "clean" is "train" without its doubled spaces and full stops.
    """
    head, tail = ("[INST] ", " [/INST]") if chat_template else ("", "")
    if layout == "clean" and text is not None:
        text = " ".join(text.split()).removesuffix(".")
    ends = layout == "clean" and (text or "").endswith(("!", "?", "…"))
    said = "" if text is None else f"The person in video says: {text}{'' if ends else '.'} "
    rest = f"</feature> {said} [{task}] {question} {tail}"  # the doubled spaces are in the released prompts
    visual = [Slot("image")] if image else []
    features = [*map(Slot, slots), *([Slot("cls")] if cls else [])]
    if layout == "original_eval":
        pieces = [BOS, BOS, f"{head}<video>", *visual, *features, f"</video> <feature><FeatureHere>{rest}"]
    elif layout == "question_first":
        pieces = [BOS, f"{head}{said}[{task}] {question} <video>", *visual, "</video> <feature>", *features, tail]
    elif layout == "clean":
        asked = f"</feature> {said}[{task}] {question}{tail}"
        pieces = [BOS, f"{head}<video>", *visual, "</video> <feature>", *features, asked]
    else:
        pieces = [BOS, f"{head}<video>", *visual, "</video> <feature>", *features, rest]
    return join_texts([piece for piece in pieces if piece])


def next_turn(answer: str, task: str, question: str, chat_template: bool = True) -> list[str]:
    """What follows a prompt in a conversation, as Llama 2 chat has it: the answer to it, and the next question."""
    asked = f"[INST] [{task}] {question} [/INST]" if chat_template else f"[{task}] {question}"
    return [f"{answer} ", EOS, BOS, asked]


def target(text: str, layout: str) -> str:
    """A training target: as it is written in the layout "clean", else as the released code processes it."""
    return text if layout == "clean" else process_answer(text)


def spoken(prompt: str) -> str | None:
    """What the person says, from a prompt of any layout; None where it is not told."""
    found = re.search(rf"The person in video says: (.*?)\.? +\[(?:{'|'.join(QUESTIONS)})\] ", prompt, re.DOTALL)
    return found and found[1]


def process_answer(text: str, max_words: int = 200) -> str:
    """A training target as LAVIS' blip_caption writes it: lower case, most punctuation out, at most max_words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:max_words])


_FORMS = (
    ("happy", "happiness", "happily", "joy", "joyful", "joyous", "cheerful", "delighted"),
    ("sad", "sadness", "saddened", "sorrow", "sorrowful"),
    ("angry", "anger", "angered", "angrily", "furious"),
    ("worried", "worry", "worrying", "anxious", "anxiety"),
    ("surprise", "surprised", "astonished", "astonishment"),
    ("fear", "fearful", "afraid", "scared", "frightened"),
    ("disgust", "disgusted"),
    ("contempt", "contemptuous", "disdain"),
    ("doubt", "doubtful", "doubting"),
    ("neutral", "neutrality"),
    ("calm", "calmness"),
    ("excited", "excitement"),
    ("frustrated", "frustration"),
)
_NEGATIONS = frozenset("not no never neither nor without cannot than instead lack lacks lacking hardly".split())
# What may stand between a negation and the label it denies; "only" must not: "not only sad".
_BETWEEN = frozenset(
    "a an the any of at all or being be been feel feeling feels felt seem to look looking appear show showing shows "
    "express expressing sign signs trace traces hint evidence indication very really particularly especially so too "
    "that much longer necessarily truly entirely".split()
)


def extract_label(answer: str, labels: Iterable[str], how: str = "robust") -> str | None:
    """The label an answer names, None if it names none of `labels`.

    "original" takes the last whitespace-separated word as it is, like the released evaluation. "robust" ignores case
    and punctuation, knows other forms of a label's word, and takes the last label that is not negated.
    """
    labels = list(labels)
    if how == "original":
        last = answer.split()[-1:]
        return last[0] if last and last[0] in labels else None
    found = named(answer, _phrases(labels))
    return found[-1] if found else None


def named(text: str, phrases: dict[tuple[str, ...], str]) -> list[str]:
    """What the phrases in a text stand for, in its order, without those that it denies; longer phrases come first."""
    words, starts = _words(text), {words[0] for words in phrases if words}
    found, denied, at = [], False, 0
    while at < len(words):
        same = (each for each in phrases if each and tuple(words[at : at + len(each)]) == each)
        hit = next(same, None) if words[at] in starts else None
        if hit is not None:
            found += [] if denied else [phrases[hit]]
            at += len(hit)
        else:
            denied = _negates(words[at]) or (denied and words[at] in _BETWEEN)
            at += 1
    return found


def choose(weights: dict[str, float], rng: random.Random) -> str:
    """Draw a name with probability in proportion to its weight."""
    if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
        raise UserError(f"weights {weights}: none may be negative and one must be above 0")
    return rng.choices(list(weights), list(weights.values()))[0]


def pick_question(
    task: str,
    rng: random.Random | None = None,
    labels: Iterable[str] = EMOTIONS9,
    offered: str = "labels",
    paraphrase: bool = False,
) -> str:
    """A question of the task, drawn by rng; the first of its pool without one.

    The emotion question offers `labels`, or the published nine or six; "guide" asks the training guide's examples. Its
    paraphrases are drawn only when asked for. "none" leaves the tag [emotion] alone.
    """
    if offered == "none" and task == "emotion":
        return ""
    if offered == "guide":
        pool = QUESTIONS["emotion_guide" if task == "emotion" else "reason_guide"]
    elif task == "emotion":
        pool = label_questions(OFFERED.get(offered, labels))
        return rng.choice(pool[1:]) if rng and paraphrase else pool[0]
    elif task not in QUESTIONS:
        raise UserError(f"task '{task}' has no questions (tasks: {', '.join(QUESTIONS)})")
    else:
        pool = QUESTIONS[task]
    return rng.choice(pool) if rng else pool[0]


def parse_tagged(question: str) -> tuple[str, str]:
    """Split "[reason] Why?" into ("reason", "Why?"); a question without a tag is a reason question."""
    match = re.fullmatch(r"\s*\[(\w+)\]\s*(.*)", question, re.DOTALL)
    return (match[1], match[2]) if match else ("reason", question)


def join_texts(pieces: Iterable[str | Slot]) -> list[str | Slot]:
    """Make one text of those that stand side by side; what has no text between is tokenised as one."""
    joined: list[str | Slot] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if _is_text(piece) and _is_text(before):
            joined[-1] = before + piece
        else:
            joined.append(piece)
    return joined


def _is_text(piece: str | Slot | None) -> TypeGuard[str]:
    return isinstance(piece, str) and not isinstance(piece, Special)


def phrase(text: str) -> tuple[str, ...]:
    """The words of a text as named() compares them."""
    return tuple(_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?]", text.lower().replace("\u2019", "'"))


def _phrases(labels: list[str]) -> dict[tuple[str, ...], str]:
    """Word sequences that name a label, the longest first; a label's own words come before other forms."""
    phrases = {phrase(label): label for label in labels}
    for label in labels:
        for form in next((forms for forms in _FORMS if label.lower() in forms), ()):
            phrases.setdefault((form,), label)
    return dict(sorted(phrases.items(), key=lambda item: -len(item[0])))


def _negates(word: str) -> bool:
    return word in _NEGATIONS or word.endswith("n't")
