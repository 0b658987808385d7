"""Utterances of one split in memory: features of every modality back to back, gathered by index on the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.config import UserError
from data.features import FeatureStore, NpyFolder, is_store, open_features
from data.layouts import MODALITIES, label_kind, read_rows
from data.manifest import EMOTIONS, Clip, group_of, leak_check, split_by_group
from data.resident import Batch, Ragged, batches, gather, read

SCHEMES = ("half_even", "half_away", "cmu")


def level(score: Tensor, scheme: str) -> Tensor:
    """Scores in [-3, 3] -> seven levels -3 to 3.

    half_even rounds as the field does (MMSA), half_away rounds halves away from zero, cmu is the CMU Multimodal SDK's
    binning: away from zero to the next whole number.
    """
    score = score.clamp(-3, 3)
    if scheme == "half_even":
        return score.round()
    size = score.abs()
    return score.sign() * ((size + 0.5).floor() if scheme == "half_away" else size.ceil())


@dataclass
class Utterances:
    """N utterances of V videos, at most U in one; frames of a modality lie back to back, one of zeros at their end."""

    clips: list[Clip]
    kind: str  # of the labels: "score" (-3..3), "score1" (-1..1, held three times as large) or "polarity"
    score: Tensor  # (N,), NaN where not known
    emotions: Tensor  # (N, 6), NaN where not known
    values: dict[str, Tensor]  # modality -> (S + 1, D)
    rows: dict[str, Tensor]  # modality -> (N + 1, T), where each frame is in values; S for none
    members: Tensor  # (V, U), the utterances of each video in order; N for none

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def device(self) -> torch.device:
        return self.members.device

    def to(self, device: torch.device) -> "Utterances":
        moved = {name: getattr(self, name).to(device) for name in ("score", "emotions", "members")}
        parts = {name: {m: x.to(device) for m, x in getattr(self, name).items()} for name in ("values", "rows")}
        return replace(self, **moved, **parts)

    @property
    def parts(self) -> dict[str, Ragged]:
        return {m: Ragged(values, self.rows[m]) for m, values in self.values.items()}

    def gather(self, index: Tensor) -> Batch:
        """Frames (K, B, T, D) and masks (K, B, T) of the utterances index (K, B); N stands for none."""
        return gather(self.parts, index)

    def batches(self, index: Tensor, size: int, steps: int, device: torch.device) -> Iterator[Batch]:
        """What gather() finds for each of `steps` pieces (K, size) of index (K, N), on `device`."""
        return batches(self.parts, index, size, steps, device)

    def targets(self, head: str, scheme: str) -> Tensor:
        """(N + 1,) class indices (-1: none) or scores (NaN: none), (N + 1, 6) presence of emotions (NaN: none).

        With two classes an utterance of score 0 is neither. The last row is for padding.
        """
        if head == "emotions":
            known = self.emotions.isfinite()
            return _pad(torch.where(known, (self.emotions > 0).float(), torch.nan), torch.nan)
        if self.kind == "polarity" and head != "2":
            raise UserError(f"--head {head}: the labels are only negative and positive here: --head 2")
        if head == "regression":
            return _pad(self.score, torch.nan)
        score = self.score.nan_to_num()
        classes = {"7": level(score, scheme) + 3, "3": score.sign() + 1, "2": (score > 0).float()}[head]
        known = self.score.isfinite() & ((score != 0) if head == "2" else True)
        return _pad(torch.where(known, classes, -1.0).long(), -1)

    def standardize(self, modality: str, transform: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Replaces a modality's frames by transform(frames) -> (frames, where there is one)."""
        part = Ragged(self.values[modality], self.rows[modality]).map(transform)
        self.values[modality], self.rows[modality] = part.values, part.rows


def _pad(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, x.new_full((1, *x.shape[1:]), value)])


def load_splits(
    folder: Path, stores: dict[str, str], valid_share: float, seed: int, max_frames: int, say: Callable[[str], None]
) -> dict[str, Utterances]:
    """train, valid and test of a converted folder; without a valid split whole videos of train are held out.

    `stores`: modality -> feature store, where they are not in the folder under the modality's name.
    """
    clips, kind = read_rows(folder), label_kind(folder)
    splits = {name: [clip for clip in clips if (clip.split or "train") == name] for name in ("train", "valid", "test")}
    if not splits["train"]:
        raise UserError(f"{folder}: no utterance of the train split")
    if not splits["valid"]:
        splits["train"], splits["valid"] = split_by_group(splits["train"], valid_share, seed)
        say(f"valid: {len(splits['valid'])} utterances of train held out by video (seed {seed})")
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if shared := leak_check(splits[a], splits[b]):
            say(f"leak: {len(shared)} videos are in both {a} and {b}, such as {shared[0]!r}")
    opened = {
        m: open_features(stores.get(m, str(folder / m))) for m in MODALITIES if m in stores or is_store(folder / m)
    }
    for m, store in opened.items():
        if store.info.get("kind") == "ids":
            problem = f"{store.folder} holds ids of {store.info['encoder']}, fusion takes vectors"
            raise UserError(f"{m}: {problem}: extract it with --pooling counts")
    if not opened:
        raise UserError(f"{folder}: none of the stores {', '.join(MODALITIES)}")
    return {name: load(part, kind, opened, max_frames) for name, part in splits.items()}


def load(clips: Sequence[Clip], kind: str, stores: dict[str, FeatureStore | NpyFolder], max_frames: int) -> Utterances:
    """The utterances of `clips`, in their order."""
    parts = {m: read([clip.id for clip in clips], store, max_frames) for m, store in stores.items()}
    values, rows = ({m: getattr(part, name) for m, part in parts.items()} for name in ("values", "rows"))
    nan = float("nan")
    factor = 3 if kind == "score1" else 1
    score = torch.tensor([nan if clip.label is None else _score(clip, kind) * factor for clip in clips])
    emotions = torch.tensor([[clip.emotions.get(e, nan) for e in EMOTIONS] for clip in clips]).view(-1, len(EMOTIONS))
    videos: dict[str, list[int]] = {}
    for i, clip in enumerate(clips):
        videos.setdefault(group_of(clip), []).append(i)
    longest = max(map(len, videos.values()), default=1)
    members = torch.tensor([[*v, *[len(clips)] * (longest - len(v))] for v in videos.values()], dtype=torch.long).view(
        -1, longest
    )
    return Utterances(list(clips), kind, score, emotions, values, rows, members)


def _score(clip: Clip, kind: str) -> float:
    try:
        value = float(clip.label or "")
    except ValueError:
        raise UserError(f"{clip.where or clip.id}: label {clip.label!r} is not a number") from None
    return 2 * value - 1 if kind == "polarity" else value
