"""DFEW (Jiang et al., ACM MM 2020): the five published folds over 11,697 clips of seven emotions."""

import re
from pathlib import Path

from common.config import UserError
from data.manifest import Clip, read_text
from data.merr import load_merr
from data.prompts import DFEW7

FOLDS = (1, 2, 3, 4, 5)
NAME = "DFEW_set_{fold}_{split}.txt"


def read_split(path: str | Path) -> list[tuple[int, str, int]]:
    """(line, clip, class) of each row `clip frames class` of a list."""
    rows, names = [], set()
    for line, text in enumerate(read_text(path).split("\n"), 1):
        cells = text.split()
        if not cells:
            continue
        if len(cells) != 3 or not re.fullmatch(r"\d+", cells[1]) or not re.fullmatch(r"[0-7]", cells[2]):
            raise UserError(f"{path}:{line}: a row is: clip frames class, with a class of 0 to 7")
        name = Path(cells[0]).name
        if name in names:
            raise UserError(f"{path}:{line}: {name!r} is listed again")
        names.add(name)
        rows.append((line, name, int(cells[2])))
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def first_class(root: str | Path) -> int:
    """What happy, the first class, is numbered: 1 as DFEW's own labels have it, or 0 as common copies of its lists do.

    Told by all lists of the folder together: 7 classes from 1 have a 7 and no 0, from 0 a 0 and no 7.
    """
    files = sorted(Path(root).glob(NAME.format(fold="[1-5]", split="*")))
    classes = {int(found) for file in files for found in re.findall(r"\s(\d)[ \t\r]*$", read_text(file), re.MULTILINE)}
    if (0 in classes) == (7 in classes):
        shown = ", ".join(map(str, sorted(classes)))
        raise UserError(f"{root}: the lists' classes are {shown}; expected 1 to 7, or 0 to 6")
    return int(7 in classes)


def load_dfew(
    root: str | Path, fold: int, split: str = "test", image_path: str | None = None
) -> tuple[list[Clip], dict[str, int]]:
    """Clips of one fold's list, with video and transcript as far as they lie below root, and how many have each label.

    UserError: no such list, or one whose classes are not DFEW's.
    """
    path = Path(root, NAME.format(fold=fold, split=split))
    if not path.is_file():
        raise UserError(f"{path} not found (--data-root names the folder of DFEW's lists and features)")
    listed, first = read_split(path), first_class(root)
    rows = [(line, name, DFEW7[number - first]) for line, name, number in listed]
    clips, _ = load_merr(root, path.name, image_path, rows=rows)
    return clips, {label: sum(row[2] == label for row in rows) for label in DFEW7}
