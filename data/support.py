"""Prompts and targets of emotional support: a dialogue as ChatML with slots for embeddings, and the four-line answer.

One function makes the prompt of a turn for training, for evaluation and for use: in the published code they differ.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from common.config import UserError, opt
from data.chat import chatml
from data.mesc import CHAT, EMOTIONS, STRATEGIES, Turn, Utterance
from data.prompts import Encode, Sample, Slot, encode_answer, encode_segments, join_texts

SLOTS = ("video", "audio", "history")
MODALITIES = (*SLOTS, "text")
LAYOUTS = ("clean", "original")
FIELDS = {
    "client_emotion": "Client's emotion",
    "therapist_emotion": "Therapist's emotion",
    "strategy": "Therapist's strategy",
    "response": "Therapist's response",
}
GAP = " \n"  # ends a line of the published answers
_TITLES = "|".join(f"(?P<{name}>{title})".replace("'", "['’]") for name, title in FIELDS.items())
HEADER = re.compile(rf"(?:{_TITLES})\s*:", re.IGNORECASE)
# The strategies that the published prompt explains, in words of ours.
MEANINGS = {
    "communication skills": "small talk, signs of listening and other ways to keep a good atmosphere",
    "advisement": "guidance, or possible ways out of what troubles the client",
    "structuring the therapy": "what the sessions aim at, how long they take, and their rules",
    "guiding the pace and depth of the conversation": "going slower or deeper, leaving a topic or coming back to it",
    "others": "anything else",
}
EXPERT = (
    "You are an experienced therapist who knows the psychology of emotions well. "
    "You see what clients feel, and you find the reply that helps them."
)
Segments = list[str | Slot]
Chat = Callable[[Sequence[tuple[str, Segments]]], Segments]
CHATML: Chat = functools.partial(chatml, system=None)


@dataclass
class PromptConfig:
    layout: str = opt(
        "clean", "clean: the closed lists and the fields; original: built like the published prompt", choices=LAYOUTS
    )
    system: bool = opt(True, "begin with a system message; off: clean says it to the user, original not at all")
    k_turn_history: int = opt(7, "latest exchanges of the history that become turns of the chat")
    history_labels: bool = opt(
        False, "these turns begin with their emotion or strategy, where the file tells it (the compressor reads "
        "emotions in any case)", "--history-labels",
    )  # fmt: skip
    context: bool = opt(True, "tell the problem and the situation, where the file has them", "--context")
    modalities: list[str] = opt(
        list(MODALITIES), "what the model is given; history: the compressed one and the chat's turns, text: the "
        "client's words, problem and situation", "--modalities", choices=MODALITIES,
    )  # fmt: skip
    fields: list[str] = opt(list(FIELDS), "what an answer tells", "--fields", choices=tuple(FIELDS))
    emotions: list[str] = opt(list(EMOTIONS), "the emotions to choose from")
    strategies: list[str] = opt(list(STRATEGIES), "the strategies to choose from")


@dataclass
class TurnSample(Sample):
    """The sample of a turn, and what was left out to make it fit."""

    turn: Turn
    dropped: int = 0  # exchanges of the history, of those that k_turn_history allows
    cut: int = 0  # words of the situation and of the client


def format_target(turn: Turn, wanted: Collection[str] = tuple(FIELDS)) -> str:
    """The answer as the model writes it, a line a field; a field that is not known has none."""
    known = {name: text for name, text in fields(turn).items() if text and name in wanted}
    return GAP.join(f"{FIELDS[name]}: {text.strip()}" for name, text in known.items())


def asked(turn: Turn, cfg: PromptConfig) -> list[str]:
    """The fields that are asked for: those that are known of the turn, all where its response is to be written."""
    return [name for name, text in fields(turn).items() if name in cfg.fields and (text or not turn.therapist)]


def parse_answer(text: str) -> dict[str, str | None]:
    """The fields of an answer by their names in FIELDS, None for what is missing; a response may have several lines.

    The published evaluation cuts a response at its first line, and leaves answers that lack a field out of its scores.
    """
    fields: dict[str, str | None] = dict.fromkeys(FIELDS)
    found = list(HEADER.finditer(text))
    for i, header in enumerate(found):
        name = header.lastgroup or ""
        if name == "response":
            fields[name] = text[header.end() :].strip() or None
            break
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        value = text[header.end() : end].strip().partition("\n")[0].strip()
        fields[name] = fields[name] or value or None
    return fields


def exchanges(history: Sequence[Utterance]) -> list[list[Utterance]]:
    """A history cut before each turn of the client: pairs of both sides, but what the therapist opens with is alone."""
    groups: list[list[Utterance]] = []
    for i, said in enumerate(history):
        if not groups or (said.role == "client" and history[i - 1].role == "therapist"):
            groups.append([])
        groups[-1].append(said)
    return groups


def messages(turn: Turn, cfg: PromptConfig, slots: Collection[str]) -> list[tuple[str, Segments]]:
    """(role, content) of the chat that asks for a turn; `slots` are those of SLOTS that have a value for it.

    It asks for asked(turn, cfg).
    """
    wanted = asked(turn, cfg)
    present = [name for name in SLOTS if name in slots and name in cfg.modalities]
    past = [said for group in _recent(turn, cfg) for said in group]
    chat: list[tuple[str, Segments]] = [(CHAT[said.role], [_said(said, cfg)]) for said in past]
    if cfg.layout == "original":
        lines, gap, task = _original(turn, cfg, present, wanted, len(past) > 0), " \n", EXPERT
    else:
        lines, gap, task = _clean(turn, cfg, present), "\n", _task(cfg, wanted)
        lines = lines if cfg.system else [[task], *lines]
    content = [piece for line in lines for piece in (*line, gap)][:-1]
    system: list[tuple[str, Segments]] = [("system", [task])] if cfg.system else []
    return [*system, *chat, ("user", join_texts(content))]


def segments(turn: Turn, cfg: PromptConfig, slots: Collection[str], chat: Chat = CHATML) -> Segments:
    """The prompt up to where the answer begins, as texts, each tokenised on its own, control tokens and slots."""
    return chat(messages(turn, cfg, slots))


def make_sample(
    turn: Turn,
    values: dict[str, Tensor],
    slots: Mapping[str, int],
    cfg: PromptConfig,
    encode: Encode,
    most: int,
    room: int = 0,
    chat: Chat = CHATML,
) -> TurnSample:
    """The sample of a turn in at most `most` positions: slots[name] a slot, and for the answer its own or `room`.

    What is too long loses the oldest exchanges of the history, then words at the end of the situation, then the
    client's oldest words; answer and slots stay whole. UserError: that is not enough. With one `room` for training and
    evaluation their prompts are the same, unless a true answer is longer.
    """
    encode = functools.cache(encode)
    target = format_target(turn, cfg.fields)
    answer = encode_answer(target, encode) if target else []

    def pieces(kept: dict[str, int]) -> list[list[int] | str]:
        return encode_segments(segments(_shortened(turn, cfg, kept), cfg, slots, chat), encode)

    def size(kept: dict[str, int]) -> int:
        positions = (slots[piece] if isinstance(piece, str) else len(piece) for piece in pieces(kept))
        return sum(positions) + max(len(answer), room)

    def fits(part: str, lost: int) -> bool:
        return size(kept | {part: whole[part] - lost}) <= most

    words = [len(text.split()) if "text" in cfg.modalities else 0 for text in (turn.situation, turn.client)]
    whole = {"history": len(_recent(turn, cfg)), "situation": words[0], "client": words[1]}
    kept = dict(whole)
    for part, count in whole.items():
        lost = 0 if fits(part, 0) else bisect_left(range(count + 1), True, 1, key=functools.partial(fits, part))
        kept[part] = max(count - lost, 0)
        if lost <= count:
            break
    else:
        raise UserError(
            f"{turn.where}: turn {turn.id} takes {size(kept)} positions without its history, its situation and what "
            f"the client says; --max-len is {most}"
        )
    shown = segments(_shortened(turn, cfg, kept), cfg, slots, chat)
    prompt = "".join(part if isinstance(part, str) else f"<{part.name}>" for part in shown)
    cut = sum(words) - kept["situation"] - kept["client"]
    dropped = whole["history"] - kept["history"]
    return TurnSample(turn.id, pieces(kept), answer, values, prompt, target, turn, dropped, cut)


def _shortened(turn: Turn, cfg: PromptConfig, kept: Mapping[str, int]) -> Turn:
    """The turn with so many exchanges of its history, the first words of the situation, the client's last words."""
    groups, situation, client = _recent(turn, cfg), turn.situation.split(), turn.client.split()
    return replace(
        turn,
        history=[said for group in groups[len(groups) - kept["history"] :] for said in group],
        situation=turn.situation if kept["situation"] == len(situation) else " ".join(situation[: kept["situation"]]),
        client=turn.client if kept["client"] == len(client) else " ".join(client[len(client) - kept["client"] :]),
    )


def _recent(turn: Turn, cfg: PromptConfig) -> list[list[Utterance]]:
    groups = exchanges(turn.history) if "history" in cfg.modalities else []
    return groups[max(len(groups) - cfg.k_turn_history, 0) :]


def fields(turn: Turn) -> dict[str, str | None]:
    """The values of FIELDS in their order, None where one is not known."""
    known = (turn.client_emotion, turn.therapist_emotion, turn.strategy, turn.therapist)
    return dict(zip(FIELDS, known, strict=True))


def _said(said: Utterance, cfg: PromptConfig) -> str:
    """An utterance of the history as a turn of the chat."""
    told = said.emotion if said.role == "client" else said.strategy
    return f"({told}) {said.text.strip()}" if cfg.history_labels and told else said.text.strip()


def _told(text: str, title: str, cfg: PromptConfig) -> list[Segments]:
    """A line of the prompt for one of the turn's texts, if there is one."""
    return [[f"{title}: {text.strip()}"]] if text.strip() and "text" in cfg.modalities else []


def _context(turn: Turn, cfg: PromptConfig) -> list[Segments]:
    """The lines for problem and situation."""
    lines = [*_told(turn.problem, "Problem", cfg), *_told(turn.situation, "Situation", cfg)]
    return lines if cfg.context else []


def _task(cfg: PromptConfig, asked: Sequence[str]) -> str:
    lines = ["Answer the client as a therapist."]
    if {"client_emotion", "therapist_emotion"} & set(asked):
        lines.append(f"Emotions: {', '.join(cfg.emotions)}")
    if "strategy" in asked:
        lines.append(f"Strategies: {', '.join(cfg.strategies)}")
    return "\n".join([*lines, "Format:", *(f"{FIELDS[name]}:" for name in asked)])


def _clean(turn: Turn, cfg: PromptConfig, slots: Sequence[str]) -> list[Segments]:
    """The lines of the user's message."""
    shown: list[Segments] = [[f"{name.capitalize()}: ", Slot(name)] for name in slots]
    return [
        *_context(turn, cfg),
        *shown,
        *_told(turn.client, "Client", cfg),
    ]


def _original(turn: Turn, cfg: PromptConfig, slots: Sequence[str], asked: Sequence[str], chat: bool) -> list[Segments]:
    """The lines of the user's message, in the published order; sound follows the picture without a word between."""
    seen: list[Slot] = [Slot(name) for name in slots if name != "history"]
    choices = {
        "client_emotion": f"the client's emotion, one of: {', '.join(cfg.emotions)}",
        "therapist_emotion": f"your own emotion, one of: {', '.join(cfg.emotions)}",
        "strategy": f"your strategy, one of: {', '.join(cfg.strategies)}",
    }
    chosen = [f"- {choice}" for name, choice in choices.items() if name in asked]
    meanings = [f"- {name}: {MEANINGS[name]}" for name in cfg.strategies if name in MEANINGS and "strategy" in asked]
    lines: list[Segments] = [["[CONTEXT]"]]
    lines += _context(turn, cfg)
    if chat:
        lines.append(["What both have said so far stands above."])
    lines.append(["[CURRENT CONTEXT]"])
    if seen:
        lines.append(["Client's video: ", *seen])
    if "history" in slots:
        lines.append(["Chat history: ", Slot("history")])
    lines += _told(turn.client, "Client utterance", cfg)
    steps = [
        "You are the therapist of this client, and it is your turn to speak. Take these steps one after the other.",
        "Step 1: Understand the client. Look at the face and the body, listen to the voice, weigh the words, and think "
        "of all that came before them.",
        *(["Step 2: Choose", *chosen] if chosen else []),
        *(["Some of the strategies mean:", *meanings] if meanings else []),
        "Step 3: Think of a reply with empathy. Say what is true, put the client's safety first, keep private what is "
        "private, and stay within the ethics of your profession.",
        "Step 4: Ask yourself what your words will do to the client, and take up some of the client's own words.",
        "Write nothing but the lines of this format.",
        "[OUTPUT FORMAT]",
        *(f"{FIELDS[name]}:" for name in asked),
    ]
    return [*lines, *([step] for step in steps)]
