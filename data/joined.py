"""Several clips as if they were one: frames spread over all of them, and what is heard one clip after the other."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from data.media import SAMPLE_RATE, Absent, MediaError, NoAudio, count_frames, load_audio, load_frames, seconds

WINDOWS, WINDOW = 8, 2 * SAMPLE_RATE  # how many, and the samples of each
Failed = Callable[[Path, MediaError], None]  # is told which clip cannot be read, and why
T = TypeVar("T")


def join_frames(paths: Sequence[Path], n: int, failed: Failed) -> list[Tensor]:
    """`n` frames spread over clips, those of each clip (k, H, W, 3) uint8; where they have fewer, black ones follow.

    What cannot be read or has no picture is left out; if that is all, nothing comes back.
    """
    sizes = [(path, count) for path in paths if (count := _attempt(count_frames, path, failed))]
    places = spread([count for _, count in sizes], n)
    chosen = [(path, indices) for (path, _), indices in zip(sizes, places, strict=True) if indices]
    films = [(path, _attempt(partial(load_frames, indices=indices), path, failed)) for path, indices in chosen]
    if lost := {path for path, film in films if film is None}:  # the others are then seen longer
        return join_frames([path for path, _ in sizes if path not in lost], n, failed)
    found = [film for _, film in films if film is not None]
    if found and (lacking := n - sum(map(len, found))):
        found[-1] = F.pad(found[-1], (0, 0, 0, 0, 0, 0, 0, lacking))
    return found


def spread(counts: Sequence[int], n: int) -> list[list[int]]:
    """Which frames of each clip stand for all clips, of so many frames: the middles of n equal spans, or all up to n.

    VideoLLaMA2's rule, which counts spans from the first frame to the last one.
    """
    total = sum(counts)
    # round((span * i + span * (i + 1)) / 2) with span = (total - 1) / n, halves up
    wanted = range(total) if total <= n else [((total - 1) * (2 * i + 1) + n) // (2 * n) for i in range(n)]
    ends = accumulate(counts)
    return [[i - end + size for i in wanted if end - size <= i < end] for size, end in zip(counts, ends, strict=True)]


def join_sound(paths: Sequence[Path], failed: Failed) -> Tensor | None:
    """Mono samples (S,) at 16 kHz of clips, one after the other; None where none of them has sound.

    A clip without is silence as long as it lasts; one that cannot be read is left out.
    """
    parts, heard = [], False
    for path in paths:
        try:
            samples = load_audio(path)
            if not samples.isfinite().all():
                raise MediaError(f"{path}: samples that are not finite")
            parts.append(samples)
            heard = True
        except NoAudio:
            parts.append(torch.zeros(round((seconds(path) or 0) * SAMPLE_RATE)))
        except MediaError as error:
            failed(path, error)
    return torch.cat(parts) if heard else None


def windows(samples: Tensor) -> Tensor:
    """Eight windows of 2 s, spread over a sound (S,) and joined; of a shorter one all of it eight times.

    They begin at eighths of what is left after one window, so that the end is in none of them: VideoLLaMA2's rule.
    """
    spare = max(len(samples) - WINDOW, 0)
    return torch.cat([samples[i * spare // WINDOWS :][:WINDOW] for i in range(WINDOWS)])


def cut(samples: Tensor, length: int) -> Tensor:
    """The first `length` samples, with silence after the last one where there are fewer."""
    return F.pad(samples[:length], (0, max(length - len(samples), 0)))


def _attempt(read: Callable[[Path], T], path: Path, failed: Failed) -> T | None:
    try:
        return read(path)
    except Absent:
        return None
    except MediaError as error:
        failed(path, error)
        return None
