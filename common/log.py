"""Run logs: aligned lines on the terminal, log.jsonl, TensorBoard, and pictures of confusion matrices."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class Logger:
    """The log of a run in `out` (None: terminal only); on ranks that are not `main` every call does nothing."""

    def __init__(self, out: str | Path | None, main: bool, tensorboard: bool = True):
        self.main = main
        self.path = Path(out, "log.jsonl") if out and main else None
        self._tensorboard = Path(out, "tensorboard") if out and main and tensorboard else None
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None
        self._bar: tqdm | None = None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, **scalars: Any) -> None:
        """Log numbers of a step (tensors of one element too); texts go to log.jsonl only."""
        if not self.main:
            return
        record = {name: value.item() if hasattr(value, "item") else value for name, value in scalars.items()}
        numbers = {name: value for name, value in record.items() if not isinstance(value, str)}
        self.say("  ".join([f"step {step:>7}", *(f"{name} {_number(value):<9}" for name, value in numbers.items())]))
        self.record(step, **record)

    def record(self, step: int, **record: Any) -> None:
        """The same without a line on the terminal."""
        if self.path:
            # JSON has no NaN and no infinity
            strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **strict}, ensure_ascii=False) + "\n")
        if writer := self._events():
            for name, value in record.items():
                if not isinstance(value, str):
                    writer.add_scalar(name if "/" in name or name[0].isupper() else f"train/{name}", value, step)

    def say(self, text: str) -> None:
        """Print a plain line, above the progress bar when one is open."""
        if not self.main:
            return
        if self._bar is not None and not self._bar.disable:
            tqdm.write(text.rstrip())
        else:
            print(text.rstrip(), flush=True)

    def figure(self, name: str, picture: Any, step: int) -> None:
        """A matplotlib figure or a (3, H, W) uint8 array to TensorBoard."""
        if not (writer := self._events()):
            return
        if isinstance(picture, np.ndarray):
            writer.add_image(name, picture, step)
        else:
            writer.add_figure(name, picture, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """The distribution of a tensor to TensorBoard."""
        if writer := self._events():
            writer.add_histogram(name, values, step)

    def hparams(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Settings beside their final scores to TensorBoard's table of runs."""
        if writer := self._events():
            writer.add_hparams(settings, scores, run_name=".")

    def text(self, name: str, text: str, step: int) -> None:
        """A text to TensorBoard."""
        if writer := self._events():
            writer.add_text(name, text, step)

    def bar(self, total: int, initial: int = 0, desc: str = "") -> tqdm:
        """A progress bar with time left; silent off the terminal and on other ranks."""
        silent = not (self.main and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=initial, desc=desc, disable=silent, leave=False, dynamic_ncols=True)
        return self._bar

    def truncate(self, step: int) -> None:
        """Forget what a run that resumes at `step` will log again: records of later steps and a line cut short."""
        self._purge = step + 1
        if not (self.path and self.path.exists()):
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        new = self.path.with_suffix(".tmp")
        new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(new, self.path)

    def close(self) -> None:
        """Close the progress bar and flush TensorBoard."""
        if self._bar is not None:
            self._bar.close()
        if self._writer:
            self._writer.close()

    def _events(self) -> "SummaryWriter | None":
        if self._tensorboard and not self._writer:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard), purge_step=self._purge)
        return self._writer


def table_lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def confusion_png(matrix: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw a confusion matrix (rows: truth) to a PNG file, coloured by the share of its row."""
    _confusion(matrix, labels, title).savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)


def confusion_image(matrix: Sequence[Sequence[int]], labels: Sequence[str], title: str = "") -> np.ndarray:
    """A confusion matrix as a (3, H, W) uint8 picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(_confusion(matrix, labels, title))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy()  # (H, W, 4) -> (3, H, W)


def curves_png(history: Sequence[dict[str, float]], path: str | Path, names: Sequence[str]) -> None:
    """Scores of training and validation by epoch, from records with keys such as Train/Loss and Val/Loss."""
    _curves(history, names).savefig(path, dpi=150)


def _curves(history: Sequence[dict[str, float]], names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(names), 3.2), layout="constrained")
    epochs = [point["epoch"] for point in history]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for side, colour in (("Train", "#8aa4bf"), ("Val", "#c2410c")):
            if f"{side}/{name}" in history[0]:
                values = [point[f"{side}/{name}"] for point in history]
                axes.plot(epochs, values, color=colour, label=side, marker=".")
        axes.set_title(name, loc="left")
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.grid(color="#d5dde5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


def _confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> "Figure":
    from matplotlib.figure import Figure

    counts = np.asarray(matrix)
    support = counts.sum(1, keepdims=True)
    share = counts / np.maximum(support, 1)
    n, names = len(labels), [str(label) for label in labels]
    cell = 1.1 - 0.6 * min(1.0, (n - 2) / 18)  # inches: large cells for few labels
    font = min(11.0, 72 * cell / 4.6)  # "100%" fills three quarters of a cell
    side = n * cell
    figure = Figure(figsize=(side + 2.4, side + 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        percent, ink = f"{share[i, j]:.0%}", "white" if share[i, j] > 0.5 else "#1f2d3d"
        percent = percent if share[i, j] >= 0.005 else "<1%"
        axes.text(j, i, f"{counts[i, j]}\n{percent}", ha="center", va="center", color=ink, fontsize=font)
    axes.set_xticks(range(n), names, rotation=0 if max(map(len, names)) * 0.09 < cell else 90)
    axes.set_yticks(range(n), [f"{name}  ({total})" for name, total in zip(names, support[:, 0], strict=True)])
    axes.set_xticks(np.arange(n - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#d5dde5", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("#d5dde5")
    axes.set_xlabel("Predicted", labelpad=8)
    axes.set_ylabel("True", labelpad=8)
    axes.set_title(title, loc="left")
    return figure


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _step(line: str) -> float:
    """The step of a log record; later than any for a line that is not one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
