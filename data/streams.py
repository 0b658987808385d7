"""What a client's turn looks and sounds like, made of its clips by frozen encoders whenever it is read."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from common.config import UserError
from data.joined import Failed, cut, join_frames, join_sound, windows
from data.media import SAMPLE_RATE, MediaError, present
from data.mesc import Turn

KEPT = 2**30  # bytes of values in memory
FOLDERS = ("video_data", "videos", "video")  # of clips, beside a file of turns
OPTIONS = {  # what says the shape of a slot
    "video": ("--num-frames", "--model.towers.patches", "--model.towers.vision-width"),
    "audio": ("--model.towers.audio-tokens", "--model.towers.audio-width"),
}


def clip_folder(turns: str | Path, given: str | None = None) -> Path:
    """The folder of the clips that a file of turns names: as `given`, or the first of FOLDERS beside the file."""
    places = [Path(given)] if given else [Path(turns).parent / name for name in FOLDERS]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        looked = ", ".join(map(str, places))
        raise UserError(f"{turns}: the folder of its clips was not found (looked for {looked}); --vid-folder names it")
    return found


class TurnStreams:
    """Values for the slots of a turn, from the latest clips that it names, as if these were joined.

    "video" are patches of frames (num_frames, N, C) by the `eye`; "audio" are tokens (M, C) by the `ear`, which hears
    so many seconds, silence after a shorter sound; one that makes statistics hears no such silence. `shapes` are those
    that the model expects. Clips are named by their files in `folder`, or by absolute paths. UserError: an encoder's
    values have another shape.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], eye: Any = None, ear: Any = None, *,
        num_k_vid: int = 5, num_frames: int = 8, audio_seconds: float = 30.0, audio_windows: bool = False,
    ) -> None:  # fmt: skip
        length = round(audio_seconds * SAMPLE_RATE)
        least = {"--num-k-vid": num_k_vid, "--num-frames": num_frames, "--model.towers.audio-seconds": length}
        if wrong := [option for option, value in least.items() if value < 1]:
            raise UserError(f"{wrong[0]}: must be above 0")
        self.folder, self.length = folder, length
        self.num_k_vid, self.num_frames = num_k_vid, num_frames
        self.audio_seconds, self.audio_windows = audio_seconds, audio_windows
        self.encoders = {name: encoder for name, encoder in (("video", eye), ("audio", ear)) if encoder is not None}
        self.broken: dict[tuple[str, Path], str] = {}  # (slot, clip) -> what is wrong
        self.lost: set[tuple[str, str]] = set()  # turns of whose clips none can be read, for one slot at least
        self.named, self.most = 0, math.inf  # turns that name clips, and how many of them may be lost
        self.say: Callable[[str], None] = lambda line: None
        self.kept: dict[tuple[str, ...], Tensor | None] = {}
        self.room = KEPT
        self.lock = Lock()  # turns are read by several threads
        self._check_shapes(shapes)

    @torch.no_grad()
    def _check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        blank = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        wrong, self.shapes = [], {}
        for name, encoder in self.encoders.items():
            if name == "video":
                found = (self.num_frames, *encoder.film([blank]).shape[1:])
            else:
                found = tuple(torch.atleast_2d(encoder.encode(torch.zeros(self.length), pooling(encoder))).shape)
            self.shapes[name], expected = found, tuple(shapes[name])
            sizes = zip(OPTIONS[name], found, expected, strict=True)
            if flags := [f"{option} {size}" for option, size, other in sizes if size != other]:
                wrong.append(f"{encoder.name} makes {name} {found}, the model expects {expected}: {' '.join(flags)}")
        if wrong:
            raise UserError("; ".join(wrong))

    @torch.no_grad()  # not inference mode: what connects the values to words is trained
    def __call__(self, turn: Turn, wanted: Collection[str] = ("video", "audio")) -> dict[str, Tensor]:
        """Slot -> value, float32 on the CPU; one that no clip has, or that none can be read for, is absent."""
        values = {name: self._value(name, turn) for name in self.encoders if name in wanted}
        return {name: value for name, value in values.items() if value is not None}

    def _value(self, name: str, turn: Turn) -> Tensor | None:
        """A slot's value, which is kept while KEPT has room: small ones are made once, not once a pass."""
        key = (name, *turn.clips[-self.num_k_vid :])
        if key not in self.kept:
            value = self._read(name, turn)
            with self.lock:
                self.room -= 0 if value is None else value.nbytes
            if self.room < 0:
                return value
            self.kept[key] = value
        return self.kept[key]

    def _read(self, name: str, turn: Turn) -> Tensor | None:
        clips = self._clips(turn)
        left = [clip for clip in clips if (name, clip) not in self.broken]
        value = (self._video if name == "video" else self._audio)(left, partial(self._fail, name))
        if clips and all((name, clip) in self.broken for clip in clips):
            self.lost.add((turn.where, turn.id))
            self._check_lost(f"the last: {self.broken[name, clips[-1]]}")
        return value

    def _video(self, clips: list[Path], failed: Failed) -> Tensor | None:
        frames = join_frames(clips, self.num_frames, failed)
        return self.encoders["video"].film(frames) if frames else None

    def _audio(self, clips: list[Path], failed: Failed) -> Tensor | None:
        sound = join_sound(clips, failed)
        if sound is None:
            return None
        heard = windows(sound) if self.audio_windows else sound
        ear = self.encoders["audio"]
        if pooling(ear) == "stats":
            return torch.atleast_2d(ear.encode(heard[: self.length], "stats"))
        return ear.encode(cut(heard, self.length), "frames")

    def _clips(self, turn: Turn) -> list[Path]:
        """The latest clips of a turn, in its order."""
        return [self.folder / name for name in turn.clips[-self.num_k_vid :]]

    def slots(self, turn: Turn) -> list[str]:
        """The slots that the turn has a value for, as far as its clips' files tell; the same in every process."""
        return list(self.encoders) if any(_absent(clip) is None for clip in self._clips(turn)) else []

    def scan(self, turns: Sequence[Turn], max_bad: float, say: Callable[[str], None]) -> None:
        """Looks for the files of all clips; UserError when more than the share `max_bad` of turns with clips has none.

        Decoding all of them would take too long: a clip that cannot be read is said when it is met, and a turn that
        loses all of its clips so is counted then.
        """
        named = [turn for turn in turns if turn.clips and self.encoders]
        clips = dict.fromkeys(clip for turn in named for clip in self._clips(turn))
        gone = {clip: problem for clip in clips if (problem := _absent(clip))}
        self.broken |= {(name, clip): problem for clip, problem in gone.items() for name in self.encoders}
        self.lost = {(turn.where, turn.id) for turn in named if gone.keys() >= set(self._clips(turn))}
        self.named, self.most, self.say = len(named), max_bad * len(named), say
        if gone:
            line = f"{len(gone):,} of {len(clips):,} clips are not there, the first: {next(iter(gone.values()))}"
            self._check_lost(f"{line}; --vid-folder names their folder")
            say(f"{line}; they are left out")

    def _fail(self, name: str, clip: Path, error: MediaError) -> None:
        with self.lock:
            said = any((other, clip) in self.broken for other in self.encoders)
            self.broken[name, clip] = str(error)
        if not said:
            self.say(f"{error}; its {name} is left out")

    def _check_lost(self, why: str) -> None:
        if len(self.lost) > self.most:
            turns = f"{len(self.lost):,} of {self.named:,} turns have lost all of their clips"
            raise UserError(f"{turns}, --max-bad allows {int(self.most):,}: {why}")

    def describe(self) -> dict[str, dict[str, Any]]:
        """How the values of each slot are made."""
        sound = {"audio_seconds": self.audio_seconds, "audio_windows": self.audio_windows}
        made = {}
        for name, encoder in self.encoders.items():
            how, own = ("patches", {"num_frames": self.num_frames}) if name == "video" else (pooling(encoder), sound)
            made[name] = encoder.info(how) | own | {"num_k_vid": self.num_k_vid, "shape": list(self.shapes[name])}
        return made

    def check_made(self, before: dict[str, dict[str, Any]]) -> None:
        """UserError where other weights make a slot than in training, whose describe() is `before`."""
        for name, made in self.describe().items():
            then, now = (info.get("weights_sha256") for info in (before.get(name, {}), made))
            if then and now and then != now:
                raise UserError(f"{name} is made with other weights of {made['encoder']} than in training")


def pooling(ear: Any) -> str:
    """How an encoder's rows of a sound become its tokens."""
    return "stats" if "stats" in ear.poolings else "frames"


def _absent(clip: Path) -> str | None:
    """Why there is nothing to read in a clip's place, if so."""
    try:
        present(clip)
    except MediaError as error:
        return str(error) if clip.suffix else f"{error} (clips are named with their extension, such as .mp4)"
    return None
