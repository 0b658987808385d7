"""Free-form answers on EMER and on MER2024's open vocabulary, from the truth they are held against to the results."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from common.config import UserError
from data.features import replace_file
from evals import emer, judge, openset, texts
from evals.judge import JudgeConfig

TRUTHS = {"emer": ("gt-eng.csv", "gt-chi.csv", "final-EMER-reason.csv"), "mer-ov": ()}  # below data_root, as published


def find_truth(name: str, data_root: str | Path) -> Path | None:
    """The benchmark's published file of truths, where it lies in the data root."""
    return next((path for file in TRUTHS[name] if (path := Path(data_root, file)).is_file()), None)


class FreeForm:
    """Free-form answers on emer or mer-ov: the truth they are held against, and who judges."""

    def __init__(
        self, name: str, judged: JudgeConfig, truth: str | Path | None, synonyms: str | None, compared: list[str],
        seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        """`truth`: a file of descriptions or words; `compared`: text metrics beside the judge's scores."""
        texts.check(compared)
        self.name, self.compared = name, compared
        self.words = openset.Synonyms(synonyms)
        self.judge = judge.build(judged, device, seed, self.words)
        columns = emer.DESCRIPTIONS if name == "emer" else emer.WORDS
        self.truth = emer.read_truth(truth, columns) if truth else {}
        self.given = truth is not None
        self.captions: tuple[int, int] | None = None  # clips that have a truth, all clips

    def chosen(self, clips: list, limit: int) -> list[int]:
        """Places of the clips that have a truth: the file's, else the fine caption (emer) or the label (mer-ov)."""
        if not self.given:
            own = {clip.id: clip.captions.get("reason_v2") if self.name == "emer" else clip.label for clip in clips}
            self.truth = {id: text for id, text in own.items() if text}
        found = [i for i, clip in enumerate(clips) if clip.id in self.truth]
        if not found:
            raise UserError(f"none of the {len(clips)} clips has a true description (--truth FILE)")
        self.captions = len(found), len(clips)
        return found[:limit] if limit else found

    def finish(self, out: Path, settings: dict, records: list[dict], said: dict, say: Callable) -> None:
        """Scores answers and writes them; the answers are on disk before the judge is asked."""
        asked = len(records)
        records = emer.with_truth(records, self.truth)
        if len(records) < asked:
            say(f"{asked - len(records)} of {asked} answers have no true description and are left out")
        figures = texts.figures(records, said)
        captions = self.captions or (len(records), asked)
        figures |= dict(zip(("captions_found", "captions_wanted"), captions, strict=True))
        if self.compared:
            figures["metrics"] = texts.compare(records, self.compared)
        write(out, settings | {"texts": figures}, records)
        emer.write_answers(out / "answers.csv", records)
        if self.name == "emer":
            scores, records = emer.report(records, self.judge)
            shown = judge.table(scores)
        else:
            scores, records = openset.report(records, self.judge, self.words)
            shown = openset.table(scores)
        write(out, settings | scores | {"texts": figures}, records)
        if self.judge.usage is not None:
            shown += f"\n{self.judge.usage.line()}"
        say(f"{shown}\n{texts.line(figures)}\nwritten to {out}")


def write(out: Path, report: dict, records: list[dict]) -> None:
    """metrics.json and predictions.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "metrics.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(out / "predictions.jsonl", "".join(lines).encode())
