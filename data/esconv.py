"""ESConv (Liu et al., ACL 2021), support in text chats, to the records of data/mesc.py, under labels of its own.

$ python -m data.esconv --data-root datasets/esconv
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, opt, run
from data.mesc import Dialogue, Turn, dialogue_turns, json_rows, known, parse_dialogue, repeated, report, write_turns

EMOTIONS = (
    "anger", "anxiety", "depression", "disgust", "fear", "guilt", "jealousy", "nervousness", "pain", "sadness", "shame",
)  # fmt: skip
# Eight are the published ones; other editions tell greetings apart, or do not tell suggestions and information apart.
STRATEGIES = (
    "question", "restatement or paraphrasing", "reflection of feelings", "self-disclosure",
    "affirmation and reassurance", "providing suggestions", "information", "others",
    "providing suggestions or information", "greeting",
)  # fmt: skip
FORMER = {
    "restatement": "restatement or paraphrasing",
    "approval and reassurance": "affirmation and reassurance",
    "direct guidance": "providing suggestions",
}  # names that the guidelines of the first collection had
SPLITS = ("train", "valid", "test")


@dataclass
class Config:
    data_root: str = opt("datasets/esconv", "folder with train.txt, valid.txt and test.txt, or some of them")
    out: str | None = opt(None, "folder for train.jsonl, valid.jsonl and test.jsonl; default: data-root")


def read_esconv(path: str | Path, split: str | None = None) -> list[Dialogue]:
    """Dialogues of a list of ESConv, JSON Lines or ESConv.json; UserError names file and line.

    A client's emotion is the one that the dialogue is about, the same from its beginning to its end; a supporter's
    is unknown.
    """
    rows, _ = json_rows(path)
    dialogues = []
    for number, (line, row) in enumerate(rows):
        if isinstance(row, dict) and isinstance(row.get("dialog"), list):
            row = row | {"dialog": [_said(each, row.get("emotion_type")) for each in row["dialog"]]}
        id = f"{split or Path(path).stem}_{number}"
        dialogue = parse_dialogue(row, id, f"{path}:{line}", EMOTIONS, STRATEGIES)
        dialogue.split = split
        dialogues.append(dialogue)
    if not dialogues:
        raise UserError(f"{path}: no dialogues")
    return dialogues


def _said(value: object, emotion: object) -> object:
    """An utterance of either edition in the form that parse_dialogue() reads."""
    if not isinstance(value, dict):
        return value
    notes = value.get("annotation")
    strategy = value.get("strategy") or (notes.get("strategy") if isinstance(notes, dict) else None)
    name = known(strategy, tuple(FORMER)) if isinstance(strategy, str) else None
    theirs = value.get("speaker") in ("sys", "supporter", "listener")
    return {
        "text": value.get("text", value.get("content")),
        "speaker": value.get("speaker"),
        "emotion": None if theirs else emotion,
        "strategy": FORMER[name] if name else strategy,
    }


def main(cfg: Config) -> None:
    paths = {split: Path(cfg.data_root, f"{split}.txt") for split in SPLITS}
    found = {split: path for split, path in paths.items() if path.is_file()}
    if not found:
        raise UserError(f"{cfg.data_root}: none of {', '.join(path.name for path in paths.values())}")
    dialogues = [dialogue for split, path in found.items() for dialogue in read_esconv(path, split)]
    for same in repeated(dialogues):
        print(f"note: {' and '.join(f'{each.id} ({each.where})' for each in same)} have the same words; all are kept")
    for split in found:
        turns: list[Turn] = []
        for dialogue in dialogues:
            turns += [turn for turn in dialogue_turns(dialogue) if dialogue.split == split and turn.client]
        write_turns(Path(cfg.out or cfg.data_root, f"{split}.jsonl"), turns)
        print(report(split, turns))


if __name__ == "__main__":
    run(Config, main)
