"""Emotional support dialogues as MultiMood (AAAI-26) reads them, one record a therapist turn; MESC to such records.

$ python -m data.mesc --csv datasets/mesc/MESC.csv --val datasets/mesc/val.json --test datasets/mesc/test.json
"""

import functools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from common.config import UserError, opt, run
from data.history import history_text
from data.manifest import Clip, csv_rows, leak_check, nearest, read_text
from data.merr import Listing

EMOTIONS = ("anger", "sadness", "disgust", "depression", "neutral", "joy", "fear")  # of client and therapist alike
STRATEGIES = (
    "open question", "approval", "self-disclosure", "restatement", "interpretation", "advisement",
    "communication skills", "structuring the therapy", "guiding the pace and depth of the conversation", "others",
)  # fmt: skip
UNKNOWN = ("", "undefined")  # what the corpora write where there is no label
SPEAKERS = {
    "client": ("client", "user", "usr", "seeker", "speaker"),
    "therapist": ("therapist", "assistant", "sys", "supporter", "listener"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
CHAT = {"client": "user", "therapist": "assistant"}
COUNTS = {"train": 3_721, "val": 445, "test": 454}  # turns of the published files, to tell whole ones from cut ones
COLUMNS = ("Utterance", "Speaker", "Emotion", "Strategy", "Dialogue_ID", "Utterance_ID")
CLIENT_EMOTION, MEMORY = "get_emotion_user_most_recent", "history_chat_mamba"
NEEDED = ("Dialogue_ID", "Utterance", "Emotion", "Strategy", "utt_user_most_recent")
KEYS = (
    *NEEDED, "path_to_vid_user_most_recent", "history_chat", "situation", "problem_type", CLIENT_EMOTION, MEMORY,
    "get_cur_user_utt_vid_desc",  # of the published code's RL stages, not read here
)  # fmt: skip
TRAILING = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|,(?=\s*[\]}])', re.DOTALL)
SPACE = re.compile(r"\s*")
Row = tuple[int, object]  # line, and its JSON value, or the JSONDecodeError that it is


@dataclass
class Config:
    csv: str = opt("datasets/mesc/MESC.csv", "all utterances, as published")
    val: str = opt("datasets/mesc/val.json", "dialogues of the validation split, as published")
    test: str = opt("datasets/mesc/test.json", "dialogues of the test split, as published")
    train: str | None = opt(None, "train.json, if you have it: problem and situation of the training dialogues")
    out: str = opt("datasets/mesc", "folder for train.jsonl, val.jsonl and test.jsonl")


@dataclass
class Utterance:
    """What one side said; its emotion and strategy are None where they are unknown."""

    role: str  # "client" or "therapist"
    emotion: str | None
    text: str
    strategy: str | None = None


@dataclass
class Turn:
    """One turn of a therapist, to be written, and what comes before it; a label that is not known is None."""

    id: str
    dialogue: str
    split: str | None
    problem: str  # empty where it is not told, like the situation
    situation: str
    client: str  # what the client has just said; empty where the therapist opens the dialogue
    therapist: str  # the response
    client_emotion: str | None
    therapist_emotion: str | None
    strategy: str | None
    clips: list[str] = field(default_factory=list)  # of the client's turn, in its order, as the file names them
    history: list[Utterance] = field(default_factory=list)  # before the client's turn, the oldest first
    memory: str | None = None  # the history as the compressor reads it, where the file has it
    where: str = ""  # "file:line", for messages


@dataclass
class Dialogue:
    """A dialogue as a corpus has it, utterance by utterance."""

    id: str
    utterances: list[Utterance]
    clips: list[str] = field(default_factory=list)  # one an utterance, where there are any
    problem: str = ""
    situation: str = ""
    split: str | None = None
    where: str = ""


def label(value: object, names: Sequence[str], what: str) -> str | None:
    """The one of `names` that is meant, in any case, with or without plural; None for "undefined" and for nothing.

    UserError names `what` it is a label of, and the names.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in UNKNOWN):
        return None
    name = known(value, names) if isinstance(value, str) else None
    if name is None:
        match = nearest(str(value).strip().lower(), names)
        hint = f"nearest: {match}; " if match else ""
        raise UserError(f"{what}: unknown label {value!r} ({hint}labels: {', '.join(names)})")
    return name


def known(value: str, names: Sequence[str]) -> str | None:
    """The one of `names` that a text is, read as label() reads it; None if it is none of them."""
    return _names(tuple(names)).get(_stems(value))


@functools.cache
def _names(names: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    return {_stems(name): name for name in names}


def _stems(text: str) -> tuple[str, ...]:
    """Its words without a plural's s."""
    return tuple(word.removesuffix("s") for word in re.findall("[a-z]+", text.lower()))


def memory_text(turn: Turn) -> str:
    """The history as MultiMood's compressor reads it: the file's own text, or else made of what was said."""
    return _memory(turn.history) if turn.memory is None else turn.memory


def _memory(history: Iterable[Utterance]) -> str:
    return history_text((said.role.capitalize(), said.emotion or "unknown", said.text) for said in history)


def read_turns(
    path: str | Path, max_bad: float = 0.01, emotions: Sequence[str] = EMOTIONS, strategies: Sequence[str] = STRATEGIES,
    answered: bool = True,
) -> tuple[list[Turn], Listing]:  # fmt: skip
    """Turns of a JSON array or of JSON Lines, and what became of the records; the file's name is their split.

    Unless they are `answered`, the therapist's words and labels need not be there. A record that cannot be used is
    skipped. UserError: they are more than the share `max_bad`, or nothing is left.
    """
    path = Path(path)
    rows, commas = json_rows(path)
    turns: list[Turn] = []
    skipped, counts, strange = [], Counter(), {}
    for line, row in rows:
        where = f"{path}:{line}"
        try:
            turn = _turn(row, emotions, strategies, answered)
        except UserError as error:
            skipped.append((where, str(error)))
            continue
        turn.id, turn.split, turn.where = f"{turn.dialogue}_{counts[turn.dialogue]}", path.stem, where
        counts[turn.dialogue] += 1
        turns.append(turn)
        strange |= {key: None for key in _object(row) if key not in KEYS}
    if len(skipped) > max_bad * len(rows):
        bad = f"{len(skipped):,} of {len(rows):,} records are bad, more than --max-bad {max_bad:g}"
        raise UserError(f"{': '.join(skipped[0])}; {bad}")
    if not turns:
        raise UserError(f"{path}: no turns")
    notes = []
    if silent := sum(turn.client_emotion is None for turn in turns):
        notes.append(f"{silent:,} without {CLIENT_EMOTION}: there the client's emotion is neither trained nor scored")
    if commas:
        notes.append(f"{commas:,} commas before a closing bracket, which JSON does not allow")
    if strange:
        hints = [f"{key} (nearest: {match})" if (match := nearest(key, KEYS)) else key for key in strange]
        notes.append(f"keys not used: {', '.join(hints)}")
    return turns, Listing(str(path), len(rows), len(turns), skipped, notes=notes)


def write_turns(path: str | Path, turns: Iterable[Turn]) -> None:
    """One JSON record a line, in the form that read_turns() and the published code read."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        for turn in turns:
            file.write(json.dumps(_record(turn), ensure_ascii=False) + "\n")
    os.replace(partial, path)


def leaks(a: Iterable[Turn], b: Iterable[Turn]) -> list[str]:
    """The dialogues that are on both sides: those of one number and one beginning, as files may count from 0 each."""

    def groups(turns: Iterable[Turn]) -> list[Clip]:
        first = ((turn, turn.history[0].text if turn.history else turn.client or turn.therapist) for turn in turns)
        return [Clip(turn.id, group=f"{turn.dialogue} ({opening[:60]})") for turn, opening in first]

    return leak_check(groups(a), groups(b))


def json_rows(path: str | Path) -> tuple[list[Row], int]:
    """The elements of a JSON array, or the lines of JSON Lines, and how many trailing commas were overlooked.

    UserError: a JSON array is broken. A broken line is for the caller to judge.
    """
    text = read_text(path)
    whole = TRAILING.sub(lambda match: match[1] or " ", text) if re.search(r",\s*[\]}]", text) else text
    commas = text.count(",") - whole.count(",")
    if whole.lstrip().startswith("["):
        try:
            return list(_elements(whole)), commas
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: {_not_json(error)}") from None
    return [(number, _value(line)) for number, line in enumerate(whole.split("\n"), 1) if line.strip()], commas


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not JSON ({error.msg} at column {error.colno})"


def _value(line: str) -> object:
    try:
        return json.loads(line, parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        return error


def _elements(text: str) -> Iterator[Row]:
    """(line, value) of each element of a JSON array that is the whole text."""

    def skip(at: int) -> int:
        match = SPACE.match(text, at)
        return match.end() if match else at

    decoder = json.JSONDecoder(parse_constant=lambda name: None)
    at, line, counted = skip(skip(0) + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield line, value
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if skip(at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, skip(at + 1))


def _object(row: object) -> dict[str, Any]:
    if isinstance(row, json.JSONDecodeError):
        raise UserError(_not_json(row))
    if not isinstance(row, dict):
        raise UserError("not a JSON object")
    return row


def _turn(value: object, emotions: Sequence[str], strategies: Sequence[str], answered: bool) -> Turn:
    row = _object(value)
    if not answered:
        row = {"Utterance": [], "Emotion": None, "Strategy": None} | row
    if lacking := [key for key in NEEDED if key not in row]:
        raise UserError(f"no key '{lacking[0]}' (found: {', '.join(row)})")
    dialogue = row["Dialogue_ID"]
    if isinstance(dialogue, bool) or not isinstance(dialogue, int | str) or dialogue == "":
        raise UserError(f"Dialogue_ID: a number expected, not {_kind(dialogue)}")
    therapist = " ".join(_texts(row, "Utterance"))
    if answered and not therapist:
        raise UserError("Utterance: at least one text expected")
    return Turn(
        id="",
        dialogue=str(dialogue),
        split=None,
        problem=_text(row, "problem_type") or "",
        situation=_text(row, "situation") or "",
        client=" ".join(_texts(row, "utt_user_most_recent")),
        therapist=therapist,
        client_emotion=label(row.get(CLIENT_EMOTION), emotions, CLIENT_EMOTION),
        therapist_emotion=label(row["Emotion"], emotions, "Emotion"),
        strategy=label(row["Strategy"], strategies, "Strategy"),
        clips=_texts(row, "path_to_vid_user_most_recent"),
        history=_history(row.get("history_chat"), emotions, strategies),
        memory=_text(row, MEMORY),
    )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, bool | None):
        return json.dumps(value)
    kinds = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if not isinstance(value, str | None):
        raise UserError(f"{key}: text expected, not {_kind(value)}")
    return value if value is None or key == MEMORY else value.strip()


def _texts(row: dict[str, Any], key: str) -> list[str]:
    """A list of texts, without empty ones; a text alone is a list of one."""
    value = row.get(key)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UserError(f"{key}: a list of texts expected, not {_kind(value)}")
    if wrong := [each for each in value if not isinstance(each, str)]:
        raise UserError(f"{key}: a list of texts expected, {_kind(wrong[0])} is in it")
    return [text.strip() for text in value if text.strip()]


def _history(entries: object, emotions: Sequence[str], strategies: Sequence[str]) -> list[Utterance]:
    """What was said, from objects with role and content; plain texts are by turns, the last one the therapist's."""
    if entries is not None and not isinstance(entries, list):
        raise UserError(f"history_chat: a list expected, not {_kind(entries)}")
    history = []
    entries = entries or []
    plain = all(isinstance(entry, str) for entry in entries)
    for i, entry in enumerate(entries):
        what = f"history_chat[{i}]"
        if plain:
            entry = {"role": "therapist" if (len(entries) - i) % 2 else "client", "content": entry}
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise UserError(f"{what}: an object with role and content expected, or texts alone in all of history_chat")
        text = entry["content"].strip()
        history.append(_said(entry, what, "role", "user, assistant", text, emotions, strategies))
    return history


def _said(
    row: dict[str, Any], what: str, who: str, names: str, text: str, emotions: Sequence[str], strategies: Sequence[str]
) -> Utterance:
    """What one side says, with its labels; row[who] tells the side, as one of ROLES (`names`: those for a message)."""
    role = ROLES.get(str(row.get(who)).strip().lower())
    if role is None:
        raise UserError(f"{what}: unknown {who} {row.get(who)!r} ({who}s: {names})")
    emotion, strategy = label(row.get("emotion"), emotions, what), label(row.get("strategy"), strategies, what)
    return Utterance(role, emotion, text, strategy)


def _record(turn: Turn) -> dict[str, Any]:
    """A turn under the published keys; what the plain form lacks, labels of the history, stands beside them."""
    history = []
    for said in turn.history:
        labels = {"emotion": said.emotion, "strategy": said.strategy}
        known = {name: value for name, value in labels.items() if value is not None}
        history.append({"role": CHAT[said.role], "content": said.text} | known)
    return {
        "Dialogue_ID": int(turn.dialogue) if turn.dialogue.isdecimal() else turn.dialogue,
        "Utterance": [turn.therapist],
        "Emotion": turn.therapist_emotion or "undefined",
        "Strategy": turn.strategy or "undefined",
        "path_to_vid_user_most_recent": turn.clips,
        "history_chat": history,
        "utt_user_most_recent": [turn.client] if turn.client else [],
        "situation": turn.situation,
        "problem_type": turn.problem,
        CLIENT_EMOTION: turn.client_emotion or "undefined",
        MEMORY: memory_text(turn),
    }


def dialogue_turns(dialogue: Dialogue) -> list[Turn]:
    """The therapist's turns: what one side says in a row is one turn, with the label that most of it has.

    Of labels that are as frequent the one said last stands for the turn.
    """
    turns: list[Turn] = []
    spoken: list[Utterance] = []
    shown: list[str] = []
    numbered = 0
    for role, run_of in groupby(zip_longest(dialogue.utterances, dialogue.clips), key=lambda pair: pair[0].role):
        said, clips = zip(*run_of, strict=True)
        text = " ".join(one.text for one in said)
        turn = Utterance(role, _most([one.emotion for one in said]), text, _most([one.strategy for one in said]))
        if role == "client":
            shown = [clip for clip in clips if clip]
        else:
            client = spoken[-1] if spoken else Utterance("client", None, "")
            turns.append(
                Turn(
                    id=f"{dialogue.id}_{numbered}" if spoken else f"{dialogue.id}_opening",
                    dialogue=dialogue.id,
                    split=dialogue.split,
                    problem=dialogue.problem,
                    situation=dialogue.situation,
                    client=client.text,
                    therapist=text,
                    client_emotion=client.emotion,
                    therapist_emotion=turn.emotion,
                    strategy=turn.strategy,
                    clips=shown,
                    history=spoken[:-1],
                    memory=_memory(spoken[:-1]),
                    where=dialogue.where,
                )
            )
            numbered += len(spoken) > 0
        spoken.append(turn)
    return turns


def _most(labels: list[str | None]) -> str | None:
    given = [name for name in labels[::-1] if name is not None]
    return max(given, key=given.count, default=None)


def parse_dialogue(
    value: object, id: str, where: str, emotions: Sequence[str] = EMOTIONS, strategies: Sequence[str] = STRATEGIES
) -> Dialogue:
    """A dialogue of the form {problem_type, situation, dialog: [{text, speaker, emotion, strategy}]}."""
    try:
        row = _object(value)
        if not (isinstance(row.get("dialog"), list) and row["dialog"]):
            raise UserError(f"dialog: a list of utterances expected, not {_kind(row.get('dialog'))}")
        said = [_utterance(each, f"dialog[{i}]", emotions, strategies) for i, each in enumerate(row["dialog"])]
        problem, situation = (_text(row, key) or "" for key in ("problem_type", "situation"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Dialogue(id, said, problem=problem, situation=situation, where=where)


def _utterance(value: object, what: str, emotions: Sequence[str], strategies: Sequence[str]) -> Utterance:
    if not (isinstance(value, dict) and isinstance(value.get("text"), str)):
        raise UserError(f"{what}: an object with text and speaker expected")
    return _said(value, what, "speaker", "user, sys", _line(value["text"]), emotions, strategies)


def read_published(path: str | Path) -> list[Dialogue]:
    """Dialogues of val.json, test.json or their .txt forms, whose texts end with what a machine saw and heard."""
    rows, _ = json_rows(path)
    if not rows:
        raise UserError(f"{path}: no dialogues")
    return [parse_dialogue(row, f"{Path(path).stem}_{i}", f"{path}:{line}") for i, (line, row) in enumerate(rows)]


def read_csv(path: str | Path) -> list[Dialogue]:
    """All dialogues of MESC.csv; the clip of utterance 7 of dialogue 12 is called dia12_utt7.mp4."""
    dialogues: dict[str, Dialogue] = {}
    last = ("", -1)
    for line, row in csv_rows(path, COLUMNS):
        where = f"{path}:{line}"
        if lacking := [name for name in COLUMNS if name not in row]:
            raise UserError(f"{where}: no column '{lacking[0]}' (found: {', '.join(row)})")
        id, number = row["Dialogue_ID"].strip(), row["Utterance_ID"].strip()
        if not (id.isdecimal() and number.isdecimal()):
            raise UserError(f"{where}: utterance '{number}' of dialogue '{id}': whole numbers expected")
        if (id in dialogues) != (id == last[0]) or int(number) <= (last[1] if id == last[0] else -1):
            raise UserError(f"{where}: utterance {number} of dialogue {id} is out of order")
        last = (id, int(number))
        role = ROLES.get(row["Speaker"].strip().lower())
        if role is None:
            raise UserError(f"{where}: unknown speaker '{row['Speaker']}' (speakers: Client, Therapist)")
        emotion = label(row["Emotion"], EMOTIONS, f"{where}: Emotion")
        strategy = label(row["Strategy"], STRATEGIES, f"{where}: Strategy")
        dialogue = dialogues.setdefault(id, Dialogue(id, [], where=where))
        dialogue.utterances.append(Utterance(role, emotion, _line(row["Utterance"]), strategy))
        dialogue.clips.append(f"dia{id}_utt{number}.mp4")
    if not dialogues:
        raise UserError(f"{path}: no utterances")
    return list(dialogues.values())


def _line(text: str) -> str:
    """An utterance in one line, without the tags of subtitles."""
    return " ".join(re.sub(r"</?i>", "", text).split())


def mesc_dialogues(
    csv: str | Path, val: str | Path, test: str | Path, train: str | Path | None = None
) -> list[Dialogue]:
    """MESC's dialogues with their splits: those of val.json and test.json, found by their words; train is the rest.

    Problem and situation are in the published splits only, so without `train` no training dialogue has them.
    UserError: a dialogue of a split is not in the CSV, or is in two splits.
    """
    dialogues = read_csv(csv)
    lengths: dict[int, list[Dialogue]] = defaultdict(list)
    for dialogue in dialogues:
        lengths[len(dialogue.utterances)].append(dialogue)
    for split, path in (("val", val), ("test", test), ("train", train)):
        for published in read_published(path) if path else []:
            same = [each for each in lengths[len(published.utterances)] if _begin(published, each)]
            free = next((each for each in same if each.split is None), None)
            if free is None:
                problem = f"dialogue {same[0].id} is in {same[0].split} already" if same else f"is not in {csv}"
                raise UserError(f"{published.where}: {problem}")
            free.split, free.problem, free.situation = split, published.problem, published.situation
    for dialogue in dialogues:
        dialogue.split = dialogue.split or "train"
    return dialogues


def _begin(longer: Dialogue, dialogue: Dialogue) -> bool:
    """Whether each utterance of the one begins with the other's."""
    pairs = zip(longer.utterances, dialogue.utterances, strict=True)
    return all(a.role == b.role and a.text.startswith(b.text) for a, b in pairs)


def repeated(dialogues: Iterable[Dialogue]) -> list[list[Dialogue]]:
    """Dialogues of the same words."""
    words: dict[tuple[str, ...], list[Dialogue]] = defaultdict(list)
    for dialogue in dialogues:
        words[tuple(said.text for said in dialogue.utterances)].append(dialogue)
    return [same for same in words.values() if len(same) > 1]


def report(split: str, turns: Sequence[Turn]) -> str:
    """ "val: 445 turns of 102 dialogues; client: ...; therapist: ...; strategies: ..." """
    parts = [f"{split}: {len(turns):,} turns of {len({turn.dialogue for turn in turns}):,} dialogues"]
    names = {"client": "client_emotion", "therapist": "therapist_emotion", "strategies": "strategy"}
    for title, name in names.items():
        counts = Counter(getattr(turn, name) or "unknown" for turn in turns)
        parts.append(f"{title}: " + ", ".join(f"{value} {count:,}" for value, count in counts.most_common()))
    return "; ".join(parts)


def main(cfg: Config) -> None:
    dialogues = mesc_dialogues(cfg.csv, cfg.val, cfg.test, cfg.train)
    for same in repeated(dialogues):
        numbers, splits = " and ".join(each.id for each in same), " and ".join(sorted({str(x.split) for x in same}))
        if " and " in splits:
            raise UserError(f"{cfg.csv}: dialogues {numbers} have the same words, but are in {splits}")
        print(f"note: dialogues {numbers} have the same words; all are kept, in {splits}")
    spoken = sum(len(dialogue.utterances) for dialogue in dialogues)
    print(f"{cfg.csv}: {len(dialogues):,} dialogues, {spoken:,} utterances")
    for split, published in COUNTS.items():
        turns = [turn for each in dialogues if each.split == split for turn in dialogue_turns(each)]
        answers = [turn for turn in turns if turn.client]
        write_turns(Path(cfg.out, f"{split}.jsonl"), answers)
        print(report(split, answers))
        if len(answers) != published:
            print(f"note: the published files make {published:,} turns")
        if len(answers) < len(turns):
            print(f"note: {len(turns) - len(answers):,} more turns open their dialogue and are left out")
        if silent := sum(not turn.situation for turn in answers):
            print(f"note: {silent:,} turns have neither problem nor situation; train.json tells them (--train)")


if __name__ == "__main__":
    run(Config, main)
