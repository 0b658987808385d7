"""Sound and words of the same clips, with labels, in memory: what the speech pipeline learns from.

A data root is a folder with manifest.csv and, made by extract.py, the stores audio/ and text/.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import UserError, from_dict, opt
from data.dialogue import previous, same_speaker
from data.features import Store, is_store, open_features
from data.manifest import Clip, leak_check, read_manifest, split_by_group
from data.resident import Batch, Ragged, batches, gather, read

MODALITIES = ("audio", "text")
STREAMS = ("audio", "stats", "text")  # stats: a fixed vector of the sound beside its frames
SPLITS = ("train", "valid", "test")


@dataclass
class PairsConfig:
    data_root: str | None = opt(None, "folder with manifest.csv and the stores audio/ and text/", "--data-root")
    manifest: str | None = opt(None, "another list of clips than manifest.csv in data-root", "--manifest")
    stores: dict[str, str] = opt(
        {}, "audio, stats or text=feature store, where it is not in data-root; stats: vectors beside frames of sound",
        "--stores",
    )  # fmt: skip
    fold: str | None = opt(None, "test on this fold of the manifest, train on the others", "--fold")
    valid_share: float = opt(0.1, "share of train held out by group where there is no valid split", "--valid-share")
    test_share: float = opt(0.1, "the same for test, where there is neither a split nor a fold")
    split_seed: int = opt(0, "seed of both choices, the same for all seeds of training")
    max_frames: int = opt(1000, "frames or ids of a clip; what is longer is cut", "--max-frames")
    limit: int = opt(0, "most clips of a split; 0: all", "--limit")
    speaker_norm: bool = opt(
        False, "standardise sound by all clips of its speaker in the split, without looking at labels", "--speaker-norm"
    )


@dataclass
class Pairs:
    """N clips; features of a modality lie in its part, label -1 is unknown, clips of one script say the same words."""

    clips: list[Clip]
    label: Tensor  # (N,)
    script: Tensor  # (N,)
    parts: dict[str, Ragged]
    before: Tensor  # (N + 1, P) the utterances before one in its dialogue, latest first; N for none
    same: Tensor  # (N + 1, P) whether they are by the same speaker

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def device(self) -> torch.device:
        return self.label.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def to(self, device: torch.device) -> "Pairs":
        moved = {name: getattr(self, name).to(device) for name in ("label", "script", "before", "same")}
        return replace(self, **moved, parts={m: part.to(device) for m, part in self.parts.items()})

    def labelled(self) -> "Pairs":
        """The clips whose label is known."""
        return self._kept(self.label >= 0)

    def complete(self) -> "Pairs":
        """The clips that have every modality."""
        there = [(part.rows[:-1] < len(part.values) - 1).any(1) for part in self.parts.values()]
        return self._kept(torch.stack(there).all(0))

    def lacking(self) -> str:
        """How many clips lack a modality, in words; nothing where none does."""
        gone = {m: int((part.rows[:-1] == len(part.values) - 1).all(1).sum()) for m, part in self.parts.items()}
        return ", ".join(f"{n:,} of {len(self):,} clips have no {m}" for m, n in gone.items() if n)

    def _kept(self, keep: Tensor) -> "Pairs":
        if bool(keep.all()):
            return self
        if self.before.shape[1]:
            raise UserError(f"clip '{self.clips[int((~keep).nonzero()[0])].id}' cannot be left out of its dialogue")
        rows = keep.nonzero()[:, 0]
        ends = torch.cat([rows, rows.new_tensor([len(self)])])
        return replace(
            self, clips=[self.clips[i] for i in rows.tolist()], label=self.label[rows], script=self.script[rows],
            parts={m: Ragged(part.values, part.rows[ends]) for m, part in self.parts.items()},
            before=self.before[ends], same=self.same[ends],
        )  # fmt: skip

    def deal_labels(self, seed: int) -> None:
        """Gives every clip the label of another, drawn at random."""
        self.label = self.label[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]

    def deal_words(self, seed: int) -> None:
        """Gives every clip the words of another, drawn at random."""
        dealt = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        words = self.parts["text"]
        self.parts["text"] = Ragged(words.values, torch.cat([words.rows[:-1][dealt], words.rows[-1:]]))
        self.script = self.script[dealt]

    def ids(self, steps: Sequence[Tensor], step: int) -> list[str]:
        """The ids of the clips that a step took."""
        return [self.clips[i].id for i in steps[step].tolist()]

    def standardize(self, modalities: Sequence[str], transform: Callable[[str, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Replaces frames by transform(modality, frames) -> (frames, where there is one)."""
        for m in modalities:
            if m in self.parts:
                self.parts[m] = self.parts[m].map(partial(transform, m))

    def gather(self, index: Tensor) -> Batch:
        """Features (K, B, T, D), or ids (K, B, T), and masks (K, B, T) of the clips index (K, B); N stands for none."""
        return gather(self.parts, index)

    def batches(self, index: Tensor, size: int, steps: int, device: torch.device) -> Iterator[Batch]:
        """What gather() finds for each of `steps` pieces (K, size) of index (K, N), on `device`."""
        return batches(self.parts, index, size, steps, device)


def find_root(places: Sequence[str]) -> str | None:
    """The first of `places` that holds a manifest."""
    return next((place for place in places if Path(place, "manifest.csv").is_file()), None)


def find_data(
    cfg: PairsConfig, places: Sequence[str], fast: bool, make: Callable[[], Path], say: Callable[[str], None]
) -> None:
    """Fills in data_root where nothing names the data: one of `places`, or with --fast what `make` makes."""
    if cfg.data_root is not None or cfg.manifest is not None:
        return
    found = find_root(places)
    if found is None and not fast:
        raise UserError(
            f"no data: {' and '.join(f'{place}/manifest.csv' for place in places)} not found; --data-root names a "
            "folder with manifest.csv and the stores audio/ and text/, --fast needs none"
        )
    cfg.data_root = found or str(make())
    if found and fast and not cfg.limit:
        cfg.limit = 2000
        say(f"--fast: at most {cfg.limit} clips of each split of {found}")


def read_clips(cfg: PairsConfig, say: Callable[[str], None]) -> dict[str, list[Clip]]:
    """The clips of train, valid and test, held out as the config says where the manifest does not."""
    path = Path(cfg.manifest) if cfg.manifest else Path(str(cfg.data_root), "manifest.csv")
    if not path.is_file():
        raise UserError(f"{path} not found: --data-root names a folder with manifest.csv, --manifest another list")
    return split(read_manifest(path), cfg, str(path), say)


def split(clips: list[Clip], cfg: PairsConfig, name: str, say: Callable[[str], None]) -> dict[str, list[Clip]]:
    """The clips by split; what no split names is train."""
    if cfg.fold is not None:
        test = [clip for clip in clips if clip.fold == cfg.fold]
        if not test:
            folds = ", ".join(sorted({clip.fold for clip in clips if clip.fold})) or "none"
            raise UserError(f"{name}: no clips of fold {cfg.fold} (folds: {folds})")
        parts = {"train": [clip for clip in clips if clip.fold != cfg.fold], "valid": [], "test": test}
    else:
        parts = {which: [clip for clip in clips if (clip.split or "train") == which] for which in SPLITS}
        if not parts["test"] and cfg.test_share:
            parts["train"], parts["test"] = split_by_group(parts["train"], cfg.test_share, cfg.split_seed)
            say(f"test: {len(parts['test'])} clips of train held out by group (seed {cfg.split_seed})")
    if not parts["valid"] and cfg.valid_share:
        parts["train"], parts["valid"] = split_by_group(parts["train"], cfg.valid_share, cfg.split_seed)
        say(f"valid: {len(parts['valid'])} clips of train held out by group (seed {cfg.split_seed})")
    if cfg.limit:
        parts = {which: part[: cfg.limit] for which, part in parts.items()}
    if not parts["train"]:
        raise UserError(f"{name}: no clips to train on")
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if shared := leak_check(parts[a], parts[b]):
            say(f"leak: {len(shared)} groups are in both {a} and {b}, such as {shared[0]!r}")
    return parts


def open_stores(cfg: PairsConfig) -> dict[str, Store]:
    """The stores of the modalities that there are."""
    opened: dict[str, Store] = {}
    if wrong := sorted(set(cfg.stores) - set(STREAMS)):
        raise UserError(f"--stores: '{wrong[0]}' is not one of {', '.join(STREAMS)}")
    for m in STREAMS:
        place = cfg.stores.get(m) or (str(Path(cfg.data_root, m)) if cfg.data_root else m)
        if m in cfg.stores or is_store(Path(place)):
            opened[m] = open_features(place)
    if "stats" in opened and "audio" not in opened:
        raise UserError("--stores stats=...: vectors beside frames of sound, but there is no store audio/")
    if not opened:
        problem = "holds no store audio/ or text/ (extract.py makes one; --stores names others)"
        raise UserError(f"{cfg.data_root or '.'}: {problem}")
    return opened


def sources(stores: dict[str, Store], parts: dict[str, Ragged]) -> dict[str, dict[str, Any]]:
    """What a model must know of each modality: width, vectors or ids, and whether a clip has more than one."""
    return {
        m: {"dim": store.dim, "kind": store.info.get("kind", "dense"), "frames": parts[m].rows.shape[1] > 1}
        for m, store in stores.items()
    }


def classes(splits: dict[str, list[Clip]]) -> list[str]:
    """The labels of the train split, sorted."""
    return sorted({clip.label for clip in splits["train"] if clip.label is not None})


def load(
    clips: Sequence[Clip], stores: dict[str, Store], labels: Sequence[str], cfg: PairsConfig, context: int = 0
) -> Pairs:
    """Features and labels of `clips`, in their order; labels that are not among `labels` are unknown."""
    for m, store in stores.items():
        if clips and not any(clip.id in store for clip in clips):
            raise UserError(f"{store.folder}: {m} of none of the {len(clips):,} clips, such as '{clips[0].id}'")
    parts = {m: read([clip.id for clip in clips], store, cfg.max_frames) for m, store in stores.items()}
    if cfg.speaker_norm:
        sound = "stats" if "stats" in parts else "audio"  # statistics gain from it, frames hardly
        if sound not in parts or stores[sound].info.get("kind") == "ids":
            raise UserError("--speaker-norm: there is no sound to standardise")
        standardize_speakers(parts[sound], clips)
    return assemble(clips, parts, labels, context)


def assemble(clips: Sequence[Clip], parts: dict[str, Ragged], labels: Sequence[str], context: int = 0) -> Pairs:
    """Clips and their features, with their labels, scripts and what was said before each."""
    numbers = {label: i for i, label in enumerate(labels)}
    words = [" ".join((clip.text or clip.id).casefold().split()) for clip in clips]
    scripts = {text: i for i, text in enumerate(dict.fromkeys(words))}
    before = previous(clips, context)
    same = torch.cat([same_speaker(clips, before), torch.zeros(1, context, dtype=torch.bool)])
    before = torch.cat([before, torch.full((1, context), -1)])
    return Pairs(
        list(clips),
        torch.tensor([numbers.get(clip.label or "", -1) for clip in clips]),
        torch.tensor([scripts[text] for text in words]),
        parts,
        torch.where(before < 0, len(clips), before),
        same,
    )


def reopen(
    state: dict[str, Any], moved: dict[str, Any], labels: Sequence[str], say: Callable[[str], None]
) -> dict[str, Pairs]:
    """The splits that a checkpoint's run read, from its place or, with `moved` fields of the config, another."""
    made = state["config"]["data"] | moved
    if "data_root" in moved and "manifest" not in moved:
        made["manifest"] = None
    cfg = from_dict(PairsConfig, made)
    clips, opened = read_clips(cfg, say), open_stores(cfg)
    for m, info in state["features"].items():
        if m not in opened:
            raise UserError(f"{cfg.data_root}: no store {m}/, which the checkpoint reads (--stores)")
        for key in ("encoder", "pooling", "dim"):
            here, there = opened[m].info.get(key), info.get(key)
            if here != there:
                raise UserError(f"{opened[m].folder}: {key} is {here}, the checkpoint was trained on {there}")
    if not clips["test"]:
        raise UserError(f"{cfg.manifest or cfg.data_root}: no test clips")
    opened = {m: opened[m] for m in state["features"]}  # and what has come since is not read
    return {name: load(part, opened, labels, cfg) for name, part in clips.items()}


def standardize_speakers(part: Ragged, clips: Sequence[Clip]) -> None:
    """Gives the frames of every speaker mean 0 and deviation 1, over all of that speaker's clips."""
    none = len(part.values) - 1
    part.values = part.values.clone()
    for speaker, members in by_speaker(clips).items():
        rows = part.rows[members].flatten()
        rows = rows[rows < none]
        frames = part.values[rows]
        part.values[rows] = relative(frames, *speaker_statistics(speaker, frames))


def by_speaker(clips: Sequence[Clip], option: str = "--speaker-norm") -> dict[str, list[int]]:
    """Where the clips of each speaker are; UserError for a clip that names none."""
    whose: dict[str, list[int]] = {}
    for i, clip in enumerate(clips):
        if clip.speaker is None:
            raise UserError(f"{option}: clip '{clip.id}' names no speaker")
        whose.setdefault(clip.speaker, []).append(i)
    return whose


def speaker_statistics(speaker: str, frames: Tensor, option: str = "--speaker-norm") -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,), float64, of the finite values of a speaker's frames (n, D); one frame is a UserError.

    The deviation of a column that does not vary is infinite, so that its relative value is 0.
    """
    if len(frames) == 1:
        raise UserError(f"{option}: speaker {speaker} has one vector, which cannot be compared with others")
    frames = frames.double()
    finite = frames.isfinite()
    n = finite.sum(0).clamp_min(1)
    mean = torch.where(finite, frames, 0.0).sum(0) / n
    spread = (torch.where(finite, frames - mean, 0.0).square().sum(0) / n).sqrt()
    return mean, torch.where(spread > 1e-6, spread, torch.inf)


def relative(frames: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Frames in deviations from their speaker's mean."""
    return ((frames.double() - mean) / spread).float()
