"""evals/page.py: what the page shows is what was measured, is text whatever was answered, and fits a telephone."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import eval as script
from common import checkpoint
from common.config import UserError
from data.mock import make_mock
from evals import compare, page
from tests.training import error, run

LABELS = ["happy", "sad", "angry", "neutral"]
CHROMIUM = shutil.which("chromium")
NAMES = ("steady", "lively", "spoken")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("mock")
    make_mock(root, 4, 2, seed=0, size=64, odd=0, workers=1)
    return sorted((root / "video").iterdir())


def written(folder, records, **more):
    """An evaluation as eval.py leaves it; its scores are of no concern here, they are computed again."""
    folder.mkdir(parents=True)
    confusion = [[0] * len(LABELS)] * len(LABELS)
    metrics = {"bench": "mer2023", "labels": LABELS, "decode": "score", "checkpoint": f"out/{folder.name}",
               "temperature": 0.0, "confusion": confusion, "precision_weighted": 0.123456}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | more))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def answers(seed, right, clips=60, videos=()):
    """Records of a model that is right this often; the true labels are the same for every seed."""
    truth, rng = np.random.default_rng(0).choice(4, clips, p=[0.4, 0.3, 0.2, 0.1]), np.random.default_rng(seed)
    records = []
    for i, label in enumerate(truth):
        p = rng.dirichlet(np.ones(4))
        said = int(label) if rng.random() < right else int(rng.integers(4))
        p[[said, p.argmax()]] = p[[p.argmax(), said]]
        prompt = (
            f"<s>[INST] <feature></feature> The person in video says: well, number {i}.  [emotion] Which one?  [/INST]"
        )
        records.append({
            "id": f"clip_{i}", "label": LABELS[label], "prediction": LABELS[said], "answer": LABELS[said],
            "probabilities": dict(zip(LABELS, p, strict=True)), "task": "emotion", "prompt": prompt,
            "target": LABELS[label], "path": str(videos[i % len(videos)]) if videos else None,
        })  # fmt: skip
    return records


def worded(records, seed=5):
    """The same answers as free text, each tenth of them without a label."""
    rng = np.random.default_rng(seed)
    told = []
    for record in records:
        record = {key: value for key, value in record.items() if key != "probabilities"}
        none = rng.random() < 0.1
        text = "<script>alert('x')</script> & \"nothing\"" if none else f"The person is {record['prediction']}."
        told.append(record | {"answer": text, "prediction": None if none else record["prediction"]})
    return told


@pytest.fixture(scope="module")
def three(tmp_path_factory, videos):
    """Three evaluations: two that score labels, one that writes; the middle one with media that are not here."""
    root = tmp_path_factory.mktemp("three")
    away = [record | {"path": None} for record in answers(2, 0.5)]
    figures = {
        "answers": 60,
        "distinct": 5,
        "mean_words": 3.84,
        "captions_found": 0,
        "captions_wanted": 0,
        "echo": 0.25,
    }
    return [
        written(root / NAMES[0], answers(1, 0.8, videos=videos)),
        written(root / NAMES[1], away, temperature=0.7),
        written(root / NAMES[2], worded(answers(3, 0.6)), decode="generate", texts=figures),
    ]


def made(tmp_path, folders, *argv):
    """The page that a command writes about these folders."""
    out = tmp_path / "report.html"
    assert run(script, ["--compare", *folders, "--out", out, *argv]) == 0
    return out.read_text(encoding="utf-8")


class Tables(HTMLParser):
    """The tables of a page: caption -> rows of cells' texts; every tag with its attributes; all text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.open = {}, [], "", []
        self.feed(text)
        self.close()
        assert not self.open, self.open  # every element that was opened is closed

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img", "wbr"):
            self.open.append(name)
        if name == "caption":
            self.caption = ""
        elif name == "tr":
            self.row = []
            self.tables[self.caption].append(self.row)
        elif name in ("th", "td"):
            self.row.append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name == "caption":
            self.tables[self.caption] = []

    def handle_data(self, data):
        self.text += "" if self.open and self.open[-1] == "style" else data
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.row[-1] += data


def by_name(rows):
    return {row[0]: row[1:] for row in rows}


def naive(records):
    """Accuracy, UAR, weighted and macro F1, and recall and F1 by label, one formula at a time."""
    recall, f1, support = {}, {}, {}
    for label in LABELS:
        true = [r for r in records if r["label"] == label]
        said = [r for r in records if r["prediction"] == label]
        hits = [r for r in true if r["prediction"] == label]
        support[label] = len(true)
        recall[label] = len(hits) / len(true) if true else 0.0
        precision = len(hits) / len(said) if said else 0.0
        f1[label] = 2 * precision * recall[label] / (precision + recall[label]) if hits else 0.0
    n = len(records)
    present = [label for label in LABELS if support[label]]
    return {
        "accuracy": sum(r["prediction"] == r["label"] for r in records) / n,
        "uar": sum(recall[label] for label in present) / len(present),
        "weighted_f1": sum(f1[label] * support[label] for label in LABELS) / n,
        "macro_f1": sum(f1.values()) / len(LABELS),
    }, recall, f1, support  # fmt: skip


def read(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# ---- numbers


def test_the_scores_are_those_of_the_formulas(three, tmp_path):
    tables = Tables(made(tmp_path, three)).tables
    rows, classes = by_name(tables["Scores over the common clips"]), tables["Recall and F1 of every label"]
    for m, folder in enumerate(three):
        scores, recall, f1, support = naive(read(folder))
        assert rows[folder.name][:4] == [f"{value:.4f}" for value in scores.values()]
        for line in classes[2:]:
            own = line[2 + 2 * m : 4 + 2 * m]
            assert [line[1], *own] == [str(support[line[0]]), f"{recall[line[0]]:.4f}", f"{f1[line[0]]:.4f}"]
    invalid = sum(record["prediction"] is None for record in read(three[2])) / 60
    assert [rows[name][4] for name in NAMES] == ["0.0%", "0.0%", f"{invalid:.1%}"]
    constant = naive([record | {"prediction": "happy"} for record in read(three[0])])[0]
    assert rows["always happy"][:4] == [f"{value:.4f}" for value in constant.values()]


def test_confusions_are_counts(three, tmp_path):
    tables = Tables(made(tmp_path, three)).tables
    for folder in three:
        head, *rows = tables[f"Confusions of {folder.name}"]
        assert head == ["true", *LABELS, "no label"]
        for label, line in zip(LABELS, rows, strict=True):
            true = [record for record in read(folder) if record["label"] == label]
            for said, cell in zip([*LABELS, None], line[1:], strict=True):
                n = sum(record["prediction"] == said for record in true)
                assert cell == (f"{n}{n / len(true):.0%}" if n else "0")


def slow_draws(folders, score, seed):
    """The bootstrap as a loop: the same clips drawn for every model, scores by the plain formulas."""
    all_, rng = [read(folder) for folder in folders], np.random.default_rng(seed)
    rows = []
    for _ in range(compare.DRAWS):
        index = rng.integers(len(all_[0]), size=len(all_[0]))
        rows.append([naive([records[i] for i in index])[0][score] for records in all_])
    return np.array(rows).T


def test_intervals_are_those_of_a_slow_loop(three, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "DRAWS", 200)
    monkeypatch.setattr(compare, "CHUNK", 60 * 64)  # several rounds, the last one shorter
    data = compare.align(compare.read(compare.find(list(map(str, three)), None)))
    slow = {score: slow_draws(three, score, 7) for score in compare.SCORES}
    for score, drawn in compare.bootstrap(data.truth, data.answers, 4, 7).items():
        assert np.abs(drawn - slow[score]).max() < 1e-12, score
    rows = by_name(Tables(made(tmp_path, three, "--seed", 7)).tables["How sure is the weighted F1"])
    slow, first = slow["weighted_f1"], None
    for name, values, folder in zip(NAMES, slow, three, strict=True):
        value = naive(read(folder))[0]["weighted_f1"]
        low, high = np.quantile(values, (0.025, 0.975))
        assert rows[name][:2] == [f"{value:.4f}", f"{low:.4f} to {high:.4f}"]
        if first is not None:
            low, high = np.quantile(values - slow[0], (0.025, 0.975))
            shown = [f"{value - first:+.4f}", f"{low:+.4f} to {high:+.4f}"]
            assert rows[name][3:] == [text.replace("-", "−") for text in shown]
        first = value if first is None else first


def test_folds_are_averaged_and_drawn_within(tmp_path, monkeypatch):
    """As DFEW's protocol: the mean over test folds of each fold's score."""
    monkeypatch.setattr(compare, "DRAWS", 100)
    records = [record | {"fold": i % 3 + 1} for i, record in enumerate(answers(1, 0.6, 61))]
    folder = written(tmp_path / "one", records, bench="dfew")
    tables = Tables(made(tmp_path, [folder], "--published")).tables
    parts = {fold: [record for record in records if record["fold"] == fold] for fold in (1, 2, 3)}
    each = {fold: naive(part)[0] for fold, part in parts.items()}
    mean = {name: sum(scores[name] for scores in each.values()) / 3 for name in compare.SCORES}
    rows = by_name(tables["By fold"][2:])
    for fold, scores in each.items():
        assert rows[str(fold)] == [str(len(parts[fold])), f"{scores['uar']:.4f}", f"{scores['accuracy']:.4f}"]
    assert rows["mean of folds"] == ["61", f"{mean['uar']:.4f}", f"{mean['accuracy']:.4f}"]
    assert by_name(tables["Scores over the common clips, means of 3 folds"])["one"][:4] == [
        f"{value:.4f}" for value in mean.values()
    ]
    assert by_name(tables["DFEW"])["one"] == [f"{mean['uar']:.4f}", f"{mean['accuracy']:.4f}"]
    rngs = [np.random.default_rng(42 + i) for i in range(3)]
    slow = [
        np.mean([
            naive([part[i] for i in rng.integers(len(part), size=len(part))])[0]["uar"]
            for part, rng in zip(parts.values(), rngs, strict=True)
        ])
        for _ in range(100)
    ]  # fmt: skip
    low, high = np.quantile(slow, (0.025, 0.975))
    assert by_name(tables["How sure is the UAR"])["one"][:2] == [f"{mean['uar']:.4f}", f"{low:.4f} to {high:.4f}"]


def described(folder, seed, unanswered=()):
    """An EMER evaluation: no labels, a judge's marks from 1 to 10."""
    rng, records = np.random.default_rng(seed), []
    for i in range(30):
        clue, label = (float(mark) for mark in rng.integers(1, 11, 2))
        marks = {"clue_overlap": None if i in unanswered else clue, "label_overlap": label}
        marks |= {"truth_words": ["glad"], "answer_words": ["merry"]}
        text = f"The voice {'really ' * int(rng.integers(60))}rises."
        records.append({"id": f"clip_{i}", "label": None, "prediction": None, "answer": text, "task": "reason_v2",
                        "target": "The mouth smiles.", "path": None, "judge": marks})  # fmt: skip
    folder.mkdir()
    metrics = {"bench": "emer", "judge": "stand-in <judge>", "clue_overlap_0_10": 3.25, "clue_overlap_1_10": 4.0}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"dealt": {"clue_overlap_1_10": 2.125}}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_judged_descriptions(tmp_path, monkeypatch):
    """Means over the clips that all have a mark for, their interval, and the published rows."""
    monkeypatch.setattr(compare, "DRAWS", 300)
    folders = [described(tmp_path / "a", 1, {3}), described(tmp_path / "b", 2)]
    text = made(tmp_path, folders, "--published")
    tables, shown = Tables(text).tables, Tables(text).text
    marks = {
        name: np.array([[r["judge"][name] for i, r in enumerate(read(f)) if name[0] == "l" or i != 3] for f in folders])
        for name in ("clue_overlap", "label_overlap")
    }
    for m, folder in enumerate(folders):
        expected = [f"{marks[name][m].mean():.4f}" for name in marks]
        assert by_name(tables["Scores over the common clips"])[folder.name][:2] == expected
        assert by_name(tables["EMER"])[folder.name] == expected
        assert by_name(tables["As in each metrics.json, over all clips of the evaluation"])[folder.name][:2] == [
            "3.2500", "2.1250"
        ]  # fmt: skip
    rng = np.random.default_rng(42)
    slow = [np.diff(marks["clue_overlap"][:, rng.integers(29, size=29)].mean(1))[0] for _ in range(300)]
    low, high = np.quantile(slow, (0.025, 0.975))
    line = by_name(tables["How sure is the clue overlap (1–10)"])["b"]
    assert line[-1] == f"{low:+.4f} to {high:+.4f}".replace("-", "−")
    assert "Clips without a clue overlap (1–10) of some model: 1." in shown
    assert "Judge: stand-in <judge>." in shown
    assert by_name(tables["EMER"])["Emotion-LLaMA published, not measured here"] == ["7.83", "6.25"]
    gaps = np.abs(marks["clue_overlap"][0] - marks["clue_overlap"][1])
    first = next(rows for caption, rows in tables.items() if caption.startswith("Answers for"))
    one, other = (float(cell) for cell in by_name(first)["clue overlap (1–10)"])
    assert abs(one - other) == gaps.max()
    assert by_name(first)["emotion words"] == ["merry", "merry"]
    assert by_name(first)["in words"][0].startswith("The voice ")


def test_emotion_words_as_sets(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    pairs = [(0.5, 1.0), (0.0, 0.0), (1.0, 0.25)]
    (folder / "metrics.json").write_text(json.dumps({"bench": "mer-ov", "majority": {"label": "glad", "score": 0.125}}))
    (folder / "predictions.jsonl").write_text("".join(
        json.dumps({"id": str(i), "answer": "merry", "openset": {"truth": ["glad"], "said": ["merry"],
                                                                "set_accuracy": a, "set_recall": r}}) + "\n"
        for i, (a, r) in enumerate(pairs)
    ))  # fmt: skip
    rows = by_name(Tables(made(tmp_path, [folder])).tables["Scores over the common clips"])
    assert rows["sets"] == [f"{value:.4f}" for value in (0.5, 1.25 / 3, 2.75 / 6)] + ["3"]
    assert rows["always glad"] == ["–", "–", "0.1250", "3"]


def test_free_text_and_the_scores_of_metrics_json(three, tmp_path):
    tables = Tables(made(tmp_path, three)).tables
    said = [record["answer"] for record in read(three[2])]
    most = max(set(said), key=said.count)
    assert by_name(tables["Free text"]) == {
        "model": [
            "distinct answers",
            "mean words",
            "captions found",
            "echo the transcript",
            "most frequent",
            "which is",
        ],
        "spoken": ["5 of 60", "3.8", "–", "25.0%", f"{said.count(most) / 60:.1%}", most],
    }
    head, *rows = tables["As in each metrics.json, over all clips of the evaluation"]
    assert head == ["model", "weighted precision", "clips"]  # and not the temperature
    assert by_name(rows) == {name: ["0.1235", "60"] for name in NAMES}


def test_published_rows_are_marked_and_only_there_on_demand(three, tmp_path):
    shown = Tables(made(tmp_path, three)).text
    assert "published" not in shown.lower()
    parsed = Tables(made(tmp_path, three, "--published"))
    rows = by_name(parsed.tables["MER2023-SEMI"])
    assert [name for name in rows if name in NAMES] == list(NAMES)
    theirs = {name: cells for name, cells in rows.items() if name not in (*NAMES, "model")}
    assert len(theirs) == 16
    assert all(name.endswith(" published, not measured here") for name in theirs)
    assert theirs["Emotion-LLaMA, audio + video + text published, not measured here"] == ["0.9036"]
    assert "These are not the same clips" in parsed.text
    clips = [written(tmp_path / "mine", answers(1, 0.5), bench="clips")]
    assert "No published results are known for clips" in Tables(made(tmp_path, clips, "--published")).text


# ---- clips


def test_examples_first_those_that_one_model_gets_right(three, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "WRONG", 1)
    parsed = Tables(made(tmp_path, three))
    records = [{r["id"]: r for r in read(folder)} for folder in three]
    right = {id: sum(each[id]["prediction"] == each[id]["label"] for each in records) for id in records[0]}
    shown = [caption.removeprefix("Answers for ") for caption in parsed.tables if caption.startswith("Answers for ")]
    mixed, none = [id for id in right if 0 < right[id] < 3], [id for id in right if not right[id]]
    first, last = shown[: min(30, len(mixed))], shown[min(30, len(mixed)) :]
    assert len(none) > len(last) == 1
    assert set(last) <= set(none)
    assert set(first) <= set(mixed)
    assert len(mixed) > 20
    lone = sum(count == 1 for count in right.values())
    assert [right[id] == 1 for id in first] == [True] * lone + [False] * (len(first) - lone)
    groups = [
        (
            next(m for m, each in enumerate(records) if each[id]["prediction"] == each[id]["label"]),
            records[0][id]["label"],
        )
        for id in first[:lone]
    ]
    assert len(set(groups)) == len(set(groups[: len(set(groups))])) > 3  # who is right and which label take turns
    assert f"first the {lone} that exactly one gets right" in parsed.text
    assert f"1 of {len(none)} clips that no model gets right" in parsed.text
    for id in shown:
        rows = by_name(parsed.tables[f"Answers for {id}"])
        for m, each in enumerate(records):
            mark = "✓" if each[id]["prediction"] == each[id]["label"] else "✗"
            assert rows["answer"][m] == f"{each[id]['prediction'] or 'no label'} {mark}"
            p = each[id].get("probabilities")
            assert [rows[label][m] for label in LABELS] == [f"{p[label]:.0%}" if p else "–" for label in LABELS]
        assert f"well, number {id.removeprefix('clip_')}" in parsed.text


def test_frames_are_pictures_in_the_page(three, tmp_path, videos):
    import torch
    from torchvision.io import ImageReadMode, decode_image

    from data.media import load_frame

    parsed = Tables(made(tmp_path, three))
    pictures = [attributes for name, attributes in parsed.tags if name == "img"]
    shown = [caption.removeprefix("Answers for ") for caption in parsed.tables if caption.startswith("Answers for ")]
    assert [picture["alt"] for picture in pictures] == [f"Middle frame of {id}" for id in shown]
    for id, picture in zip(shown, pictures, strict=True):
        kind, content = picture["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        found = decode_image(
            torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8), ImageReadMode.RGB
        )
        path = videos[int(id.removeprefix("clip_")) % len(videos)]
        expected = load_frame(path, "middle").permute(2, 0, 1)
        assert (int(picture["width"]), int(picture["height"])) == (found.shape[2], found.shape[1]) == (64, 64)
        assert (found.float() - expected.float()).abs().mean() < 12


def test_a_large_frame_becomes_320_pixels(monkeypatch):
    import torch

    monkeypatch.setattr(
        page, "load_frame", lambda path, which, start, end: torch.full((720, 1280, 3), 90, dtype=torch.uint8)
    )
    assert 'width="320" height="180"' in page._picture("x", "any.mp4")


def test_media_that_are_not_here(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    records = answers(2, 0.2, 8)
    for record, path in zip(records, ["/gone/a.mp4", None, tmp_path / "broken.mp4"] * 3, strict=False):
        record["path"] = path and str(path)
    text = Tables(made(tmp_path, [written(tmp_path / "one", records)])).text
    assert "No picture: not found (a.mp4)" in text
    assert "No picture: no media named" in text
    assert re.search(r"No picture: .*\(broken.mp4\)", text)
    assert "/gone" not in text


def test_of_many_labels_the_first_three_and_the_true_one(tmp_path):
    labels = [f"label {i}" for i in range(20)]
    p = {label: (i + 1) / 210 for i, label in enumerate(labels)}
    records = [{"id": "a", "label": "label 0", "prediction": "label 19", "probabilities": p},
               {"id": "b", "label": "label 1", "prediction": "label 1", "probabilities": p}]  # fmt: skip
    tables = Tables(made(tmp_path, [written(tmp_path / "one", records, labels=labels)])).tables
    assert [line[0] for line in tables["Answers for a"][2:]] == ["label 0", "label 17", "label 18", "label 19"]


# ---- what is compared


def test_only_common_clips_with_the_same_label(three, tmp_path):
    first, records = shutil.copytree(three[0], tmp_path / "steady"), answers(4, 0.5)[10:50]
    records[0]["label"] = next(label for label in LABELS if label != records[0]["label"])
    more = [records[1] | {"id": "another"}]
    folder = written(tmp_path / "part", records + more, bench="clips", labels=[*LABELS[::-1], "fear"])
    parsed = Tables(made(tmp_path, [first, folder]))
    assert "Only common clips are compared: 39. Evaluated: steady 60, part 41." in parsed.text
    assert "Common clips left out, for their true labels differ: 1." in parsed.text
    assert "Different benchmarks: steady on mer2023, part on clips." in parsed.text
    assert f"an answer outside the common ones is wrong: {', '.join(LABELS)}." in parsed.text
    rows = by_name(parsed.tables["Scores over the common clips"])
    ids = {record["id"] for record in records[1:]}
    for name, all_ in (("steady", read(three[0])), ("part", records)):
        scores = naive([record for record in all_ if record["id"] in ids])[0]
        assert rows[name] == [*(f"{value:.4f}" for value in scores.values()), "0.0%", "39"]


def test_the_original_extraction_takes_neutral_for_no_label(tmp_path):
    records = worded(answers(3, 0.6))
    folder = written(tmp_path / "one", records, extract="original")
    rows = by_name(Tables(made(tmp_path, [folder])).tables["Scores over the common clips"])
    scores = naive([record | {"prediction": record["prediction"] or "neutral"} for record in records])[0]
    invalid = sum(record["prediction"] is None for record in records) / len(records)
    assert rows["one"] == [*(f"{value:.4f}" for value in scores.values()), f"{invalid:.1%}", "60"]
    assert invalid > 0


def test_names_are_what_the_others_do_not_share(tmp_path):
    def names(*paths):
        return compare.names([tmp_path / path for path in paths])

    assert names("a/eval/mer2023/epoch_010", "b/eval/mer2023/epoch_010") == ["a", "b"]
    assert names("a/eval/mer2023/epoch_010", "a/eval/mer2023/epoch_020") == ["epoch_010", "epoch_020"]
    assert names("a/eval/mer2023/x", "a/eval/mer2024/x") == ["mer2023", "mer2024"]
    assert names("a/eval/mer2023/x+y-weights", "b/eval/mer2023/x", "text") == ["a/x+y-weights", "b/x", "text"]
    assert names("runs/a", "runs/a/eval/mer2023/x") == ["a", "a/x"]
    assert names("runs/a/eval/mer2023/x") == ["x"]


def test_runs_and_checkpoints_mean_their_newest_evaluation(tmp_path):
    """Of the benchmark of the first evaluation that is given; --bench names another."""
    source, records = tmp_path / "run", answers(1, 0.5, 9)
    for epoch in (1, 2):
        folder = source / "checkpoints" / f"epoch_{epoch:03}"
        folder.mkdir(parents=True)
        (folder / checkpoint.STATE).write_text(json.dumps({"step": epoch}))
        (folder / checkpoint.MODEL).touch()
    (source / "checkpoints" / "best").symlink_to("epoch_001")
    best = source / "checkpoints" / "epoch_001"
    assert error_of(source) == f"no evaluation; make it: python eval.py --ckpt {source}"

    own = written(script.place(script.Config(), best, "mer2023"), records)  # where eval.py puts it
    places = (source, source / "checkpoints", best, source / "checkpoints" / "best")
    assert [compare.find([str(place)], None) for place in places] == [[own]] * 4
    assert error_of(source / "checkpoints" / "epoch_002").startswith("no evaluation; ")
    newer = written(source / "eval" / "mer2023" / "epoch_001+epoch_002-weights", records)
    other = written(source / "eval" / "clips" / "epoch_001", records, bench="clips")
    assert compare.find([str(source)], "mer2023") == [newer]
    assert compare.find([str(source)], None) == [other]
    assert compare.find([str(best)], "mer2023") == [own]
    assert compare.find([str(own), str(source)], None) == [own, newer]
    assert error_of(best, "emer") == f"no evaluation on emer; make it: python eval.py --ckpt {best} --bench emer"
    assert run(script, ["--compare", best, source, "--bench", "mer2023", "--out", tmp_path / "page.html"]) == 0
    tables = Tables((tmp_path / "page.html").read_text()).tables
    assert [line[0] for line in tables["The evaluations"]] == ["model", "epoch_001", "epoch_001+epoch_002-weights"]


def error_of(place, bench=None):
    with pytest.raises(UserError) as caught:
        compare.find([str(place)], bench)
    return str(caught.value).removeprefix(f"--compare {place}: ")


def test_mistakes(three, tmp_path, capsys):
    def line(*argv):
        return error(script, [*argv, "--out", tmp_path / "report.html"], capsys)

    def spoiled(name, file, text):
        folder = shutil.copytree(three[0], tmp_path / name)
        (folder / file).write_text(text)
        return folder

    good = (three[0] / "predictions.jsonl").read_text()
    gone, empty = tmp_path / "gone", tmp_path / "empty"
    empty.mkdir()
    assert line("--compare", gone) == f"--compare {gone}: no such folder (an evaluation, a checkpoint or a run)"
    assert line("--compare", empty) == f"--compare {empty}: neither metrics.json nor a checkpoint is in it"
    assert line("--compare", three[0], three[0]).endswith(f"{three[0]} is there twice")
    assert line("--published") == "--published needs --compare"
    assert line("--compare", three[0], "--ckpt", "x") == "--compare and --ckpt: give one of them"
    folder = spoiled("a", "metrics.json", '{"labels":\n [}')
    assert line("--compare", folder).startswith(f"{folder / 'metrics.json'}: not JSON (")
    assert "line 2" in line("--compare", folder)
    folder = spoiled("b", "predictions.jsonl", good.replace('"id"', "id", 3).replace("{id", '{"id"', 2))
    assert line("--compare", folder).startswith(f"{folder / 'predictions.jsonl'}:3: not JSON (")
    folder = spoiled(
        "c", "predictions.jsonl", good.replace('"prediction"', '"said"', 2).replace('"said"', '"prediction"', 1)
    )
    assert line("--compare", folder) == f"{folder / 'predictions.jsonl'}:2: no 'prediction'"
    folder = spoiled("d", "predictions.jsonl", good + good.splitlines()[4])
    assert line("--compare", folder) == f"{folder / 'predictions.jsonl'}:61: clip 'clip_4' is there twice"
    folder = spoiled("e", "predictions.jsonl", "\n")
    assert line("--compare", folder) == f"{folder / 'predictions.jsonl'}: no predictions"
    folder = spoiled("f", "metrics.json", '{"confusion": []}')
    assert line("--compare", folder) == f"{folder / 'metrics.json'}: no list of 'labels'"
    folder = spoiled("g", "metrics.json", '{"bench": "emer"}')
    assert line("--compare", folder).startswith("--compare: neither labels nor scores of clips in ")
    folder = spoiled("h", "predictions.jsonl", good.replace("clip_", "other_"))
    expected = "--compare: no clip is in all of the evaluations (steady 60, h 60 clips)"
    assert re.sub(r"[\w/-]*/(steady|h) ", r"\1 ", line("--compare", three[0], folder)) == expected
    (folder / "predictions.jsonl").unlink()
    assert line("--compare", folder) == f"{folder / 'predictions.jsonl'} not found"
    assert not (tmp_path / "report.html").exists()
    assert error(script, ["--compare", three[0], "--out", empty], capsys) == f"--out {empty}: Is a directory"
    assert list(tmp_path.glob(".tmp*")) == []


# ---- the page itself


def test_whatever_was_answered_is_text(tmp_path):
    """In an answer, a label, an id, a path, a checkpoint's name, what is said, and the folder's name."""
    evil = "<script>alert(1)</script><img src=http://x.example/y.png onerror='alert(2)'>\"&amp;"
    records = worded(answers(1, 0.5, 12))
    label = records[0]["label"]
    for record in records:
        record["prompt"] = f"The person in video says: {evil}.  [emotion] Which?"
        for key in ("label", "prediction"):
            record[key] = evil if record[key] == label else record[key]
    records[0]["id"], records[0]["path"] = evil, f"/{evil}.mp4"
    labels = [evil if each == label else each for each in LABELS]
    texts = {"answers": 12, "distinct": 2, "metrics": {evil: 0.5}}
    folder = written(tmp_path / "<i>a&b", records, labels=labels, bench=evil, checkpoint=evil, decode=evil, texts=texts)
    text = made(tmp_path, [folder], "--published")
    parsed = Tables(text)
    assert {name for name, _ in parsed.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article", "figure",
        "figcaption", "h1", "h2", "h3", "p", "a", "ul", "li", "div", "span", "b", "strong", "small", "q", "table",
        "caption", "thead", "tbody", "tr", "th", "td", "wbr", "svg", "line", "circle", "details", "summary",
    }  # fmt: skip
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.text.count(evil) > 10


def test_nothing_is_loaded_from_elsewhere(three, tmp_path):
    text = made(tmp_path, three, "--published")
    parsed = Tables(text)
    for name, attributes in parsed.tags:
        assert name not in ("script", "link", "iframe", "object", "embed", "base")
        for key in ("src", "href", "srcset", "poster", "action", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,")), (name, attributes)
    assert "http" not in re.sub(r'base64,[^"]*', "", text).replace("http-equiv", "")
    assert not re.search(r"@import|url\(|javascript:", text)
    links = {attributes["href"].removeprefix("#") for name, attributes in parsed.tags if name == "a"}
    assert links == {attributes["id"] for name, attributes in parsed.tags if name == "h2"}


def test_tables_and_pictures_say_what_they_are(three, tmp_path):
    text = made(tmp_path, three, "--published")
    parsed = Tables(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert text.count("<table") == text.count("<caption>") == len(parsed.tables)  # each its own, and none twice
    assert all("scope" in attributes or name != "th" for name, attributes in parsed.tags)
    assert all(attributes.get("alt") for name, attributes in parsed.tags if name == "img")
    assert all(attributes.get("aria-label") for name, attributes in parsed.tags if attributes.get("role") == "img")
    assert [name for name, _ in parsed.tags].count("h1") == 1


def test_it_is_the_same_page_again_and_whole_or_not_there(three, tmp_path, monkeypatch, capsys):
    first = made(tmp_path, three)
    assert capsys.readouterr().out == f"written to {tmp_path / 'report.html'}\n"
    assert made(tmp_path, three) == first

    def full(self, text, **_):
        with open(self, "w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    line = error(script, ["--compare", *three[:1], "--out", tmp_path / "report.html"], capsys)
    assert line == f"--out {tmp_path / 'report.html'}: No space left on device"
    monkeypatch.undo()
    assert (tmp_path / "report.html").read_text() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser_nothing_is_wider_than_the_window(three, tmp_path):
    """The page in two frames side by side, as wide as a desktop's window and as a telephone."""
    from torchvision.io import decode_image

    report = made(tmp_path, three, "--published")
    widths, high, wrapper, picture = (1280, 400), 3000, tmp_path / "wrapper.html", tmp_path / "page.png"
    frames = [
        f'<iframe srcdoc="{html.escape(report)}" style="border:0;width:{width}px;height:{high}px"></iframe>'
        for width in widths
    ]
    wrapper.write_text(f"""<!DOCTYPE html><body style="margin:0;display:flex">{"".join(frames)}<script>
        onload = () => {{ const pages = [...document.querySelectorAll("iframe")].map(each => each.contentDocument);
          document.body.dataset.widths = pages.map(page => page.documentElement.scrollWidth);
          document.body.dataset.tables = pages.map(page => page.querySelectorAll("table").length); }}</script>""")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={sum(widths)},{high}",
    ]  # fmt: skip
    done = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    body = re.search(r'<body[^>]*data-widths="([\d,]+)" data-tables="([\d,]+)"', done.stdout)
    assert body, done.stderr
    assert [int(width) for width in body[1].split(",")] == list(widths)
    assert body[2] == f"{report.count('<table')},{report.count('<table')}"
    subprocess.run(
        [*command, f"--screenshot={picture}", wrapper.as_uri()], capture_output=True, timeout=120, check=True
    )
    shot = decode_image(str(picture))[:3]
    assert shot.shape == (3, high, sum(widths))
    for part in shot.split(widths, 2):
        rows = part.flatten(1).view(3, high, -1).float().std(2).amax(0)  # of every row of pixels
        assert (rows > 0).float().mean() > 0.5
