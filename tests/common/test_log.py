"""What a run writes: terminal lines, log.jsonl, TensorBoard, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.log import Logger, confusion_image, confusion_png, curves_png
from tests.conftest import drawn


@pytest.fixture(autouse=True)
def _drawn():
    with drawn():
        yield


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_line_and_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path, True, tensorboard=False)
    log(7, **{"loss": torch.tensor(0.123456), "lr": 1e-5, "valid/uar": np.float64(0.5), "n": 3, "answer": "añ\nb"})
    log(12000, loss=1234.5678, lr=2.5e-5, n=4)
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step       7  loss 0.1235     lr 1e-05      valid/uar 0.5        n 3",
        "step   12000  loss 1235       lr 2.5e-05    n 4",
    ]
    first, second = records(tmp_path)
    assert first.pop("loss") == pytest.approx(0.123456)
    assert first == {"step": 7, "lr": 1e-5, "valid/uar": 0.5, "n": 3, "answer": "añ\nb"}
    assert second == {"step": 12000, "loss": 1234.5678, "lr": 2.5e-5, "n": 4}


def test_records_are_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Logger(tmp_path, True, tensorboard=False)(1, loss=float("nan"), norm=float("inf"))
    assert records(tmp_path) == [{"step": 1, "loss": None, "norm": None}]
    assert capsys.readouterr().out.split() == ["step", "1", "loss", "nan", "norm", "inf"]


def test_appends_to_an_existing_log(tmp_path: Path) -> None:
    Logger(tmp_path, True, tensorboard=False)(1, loss=1.0)
    Logger(tmp_path, True, tensorboard=False)(2, loss=2.0)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path / "run", False)
    log(1, loss=1.0)
    log.say("hello")
    log.figure("confusion", np.zeros((3, 4, 4), np.uint8), 1)
    log.text("sample", "text", 1)
    log.truncate(0)
    with log.bar(10, 0, "train") as bar:
        bar.update()
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_folder_only_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(None, True)
    log(1, loss=1.0)
    log.truncate(0)
    log.close()
    assert capsys.readouterr().out == "step       1  loss 1\n"


def test_truncate_forgets_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    log = Logger(tmp_path, True, tensorboard=False)
    for step in (1, 2, 3):
        log(step, loss=1.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    log.truncate(2)
    log(3, loss=5.0)
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_lines_go_above_an_open_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    log = Logger(None, True)
    bar = log.bar(10, 4, "train")
    assert not bar.disable
    bar.set_postfix(loss="0.1")
    log.say("a line")
    log.close()
    shown = capsys.readouterr()
    assert shown.out == "a line\n"
    assert "train:  40%" in shown.err
    assert "loss=0.1" in shown.err


def test_no_bar_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(None, True)
    log.bar(10, 0, "train").update()
    log.close()
    assert capsys.readouterr().err == ""


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Logger(tmp_path, True)
    log(5, **{"loss": 0.25, "valid/uar": 0.5, "answer": "happy"})
    log.figure("valid/confusion", confusion_image([[3, 1], [0, 4]], ["a", "b"]), 5)
    log.text("valid/samples", "an answer", 5)
    log.close()
    resumed = Logger(tmp_path, True)
    resumed.truncate(4)
    resumed(6, loss=0.125)
    resumed.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["scalars"]) == ["train/loss", "valid/uar"]
    assert tags["images"] == ["valid/confusion"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(6, 0.125)]  # step 5 is purged


def test_confusion_picture_shows_the_shares() -> None:
    image = confusion_image([[8, 0], [0, 0]], ["yes", "no"])
    assert image.dtype == np.uint8
    assert image.shape[0] == 3
    pixels = image.reshape(3, -1).T.astype(int)
    dark = (np.abs(pixels - (8, 48, 107)).sum(1) < 12).mean()  # the end of the colour map: 100 %
    pale = (np.abs(pixels - (247, 251, 255)).sum(1) < 6).mean()  # its start: 0 %
    assert dark > 0.05
    assert pale > 2.5 * dark  # three cells against one, text inside


@pytest.mark.parametrize("n", [1, 2, 24])
def test_confusion_png(tmp_path: Path, n: int) -> None:
    confusion_png(np.eye(n, dtype=int).tolist(), [f"a_long_label_{i}" for i in range(n)], tmp_path / "c.png", "title")
    header = (tmp_path / "c.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert 200 < int.from_bytes(header[16:20]) < 5000


def test_curves_png(tmp_path: Path) -> None:
    history = [{"epoch": n, "Train/Loss": 1 / n, "Val/Loss": 2 / n, "Val/F1": 0.1 * n} for n in (1, 2, 3)]
    sizes = []
    for names in (["Loss"], ["Loss", "F1"]):
        curves_png(history, tmp_path / "c.png", names)
        header = (tmp_path / "c.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append((int.from_bytes(header[16:20]), int.from_bytes(header[20:24])))
    assert sizes == [(525, 480), (1050, 480)]  # a panel each
