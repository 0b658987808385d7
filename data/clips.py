"""Clips as instruction samples: which clips are in which split, their features, and the prompt and answer of each."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import UserError, opt
from data import prompts
from data.features import FeatureStore, NpyFolder, encode_clip, open_features
from data.manifest import Clip, group_of, leak_check, read_manifest, split_by_group
from data.media import Absent, MediaError
from data.merr import load_merr
from data.pairs import by_speaker, relative, speaker_statistics

VISUAL = ("image", "cls")  # the two slots one store of visual tokens fills
KNOWN_TESTS = (
    "relative_test3_NCEV.txt", "MER2024-noise_NCE.txt", "EMER_NCE.txt", "EMER_332_NCE.txt",
    "reltive_DFEW_set_1_test.txt",
)  # fmt: skip
CURRICULA = ("none", "modalities", "length", "both")
AUGMENTATIONS = ("question", "frame", "noise", "dropout", "streams", "words")
UNSAID = 0.5  # share of the words that the last of them leaves out


@dataclass
class DataConfig:
    data_root: str = opt("datasets/MERR", "folder of lists, captions, transcript and feature folders", "--data-root")
    image_path: str | None = opt(None, "folder of the videos; default: data_root/video", "--image-path")
    annotation_file: str = opt("MERR_coarse_grained.txt", "list of the training clips", "--annotation-file")
    manifest: str | None = opt(None, "a CSV or JSONL manifest instead of a MERR list", "--manifest")
    fold: str | None = opt(None, "manifest: the fold that is the test split", "--fold")
    valid_file: str | None = opt(None, "list or manifest of validation clips; default: a hold-out", "--valid-file")
    valid_share: float = opt(0.05, "share of the training clips held out, whole source videos or speakers")
    test_file: str | None = opt("relative_test3_NCEV.txt", "list or manifest of test clips", "--test-file")
    features_root: str = opt("features", "where feature stores are looked for, after data_root")
    task_pool: dict[str, float] = opt({"emotion": 1.0, "reason": 1.0}, "tasks and their weights", "--task-pool")
    labels: list[str] = opt(list(prompts.EMOTIONS9), "emotion labels, in the order the question names them")
    question: str = opt(
        "labels", "emotion question: offers the labels, the published nine or six; guide: asks openly; none",
        choices=prompts.ASKED,
    )  # fmt: skip
    prompt_layout: str = opt(
        "train", "order and spacing of the prompt; clean: single spaces, and targets as they are written",
        choices=prompts.LAYOUTS,
    )  # fmt: skip
    chat_template: bool = opt(True, "wrap the instruction in [INST] [/INST]")
    frame: str = opt(
        "first", "the frame of a clip that becomes visual tokens where they are made online",
        choices=("first", "middle", "peak"),
    )  # fmt: skip
    streams: list[str] = opt([], "use only these (text, image, cls, feature names); empty: all")
    curriculum: str = opt(
        "none", "begin with the clips of the fewest streams, the shortest descriptions, or both in this order",
        choices=CURRICULA,
    )  # fmt: skip
    curriculum_epochs: int = opt(5, "epochs after which the curriculum has reached all clips")
    curriculum_share: float = opt(0.25, "share of the clips that the curriculum begins with")
    replay: str | None = opt(None, "list or manifest of other clips to mix in, such as the previous stage's")
    replay_ratio: float = opt(0.1, "share of the samples that are replayed")
    replay_tasks: dict[str, float] = opt({"emotion": 1.0, "reason": 1.0}, "task_pool of the replayed clips")
    enable_augmentation: bool = opt(
        False, "while training: noise and gaps in features, streams and words left out, other questions and frames"
    )
    augmentation_prob: float = opt(0.5, "probability of each augmentation", span=(0.0, 1.0))
    augmentations: dict[str, float] = opt({}, "only these, each with its own probability", choices=AUGMENTATIONS)
    shuffle_labels: bool = opt(False, "control: permute the training labels among clips")
    max_bad: float = opt(0.01, "largest share of unreadable features")
    speaker_norm: bool = opt(
        False, "standardise utterance features by all clips of their speaker in the split, without looking at labels",
        "--speaker-norm",
    )  # fmt: skip
    speaker_swap: float = opt(
        0.0, "while training: probability that utterance features are moved to a voice between two other speakers' "
        "(nothing to do with --speaker-norm)",
    )  # fmt: skip

    @property
    def uses_text(self) -> bool:
        return not self.streams or "text" in self.streams

    def augment(self, known: Sequence[str] = AUGMENTATIONS) -> dict[str, float]:
        """The augmentations in use and their probabilities, in the order in which a sample draws them."""
        chosen = self.augmentations or dict.fromkeys(known, self.augmentation_prob)
        return {name: chosen[name] for name in AUGMENTATIONS if name in chosen and self.enable_augmentation}


@dataclass
class ClipSample(prompts.Sample):
    """The sample of a clip under the label that is trained, and what was asked."""

    label: str | None
    task: str
    path: str | None = None  # of the clip's media, and which part of it in seconds
    start: float | None = None
    end: float | None = None
    speaker: str | None = None


def make_sample(
    clip: Clip,
    values: dict[str, Tensor],
    cfg: DataConfig,
    encode: prompts.Encode,
    task: str,
    question: str,
    slots: Sequence[str],
    target: str | None = None,
    turns: Sequence[tuple[str, str]] = (),
) -> ClipSample:
    """The sample of one clip; a slot without a value, or a text that is not known, is left out of the prompt.

    `turns`: (question, answer) of what was asked about the clip before; the first question has the clip beside it.
    """
    features = [name for name in slots if name not in VISUAL and name in values]
    text = clip.text if cfg.uses_text else None
    asked = [*(prompts.parse_tagged(earlier) for earlier, _ in turns), (task, question)]
    segments = prompts.segments(
        *asked[0], text, features, image="image" in values, cls="cls" in values,
        layout=cfg.prompt_layout, chat_template=cfg.chat_template,
    )  # fmt: skip
    for (_, said), (tag, following) in zip(turns, asked[1:], strict=True):
        segments += prompts.next_turn(said, tag, following, cfg.chat_template)
    pieces = prompts.encode_segments(segments, encode)
    shown = "".join(segment if isinstance(segment, str) else f"<{segment.name}>" for segment in segments)
    answer = prompts.encode_answer(target, encode) if target is not None else []
    return ClipSample(
        clip.id, pieces, answer, values, shown, target or "", clip.label, task, clip.path, clip.start, clip.end,
        clip.speaker,
    )  # fmt: skip


class Features:
    """Streams of clips by slot: utterance features (1, width), visual tokens as image (N, width) and cls (1, width).

    All come from stores, but for visual tokens where an encoder is given that makes them `online`, from a clip's frame.
    `folders` names the stores whose folder is not called as the stream is.
    """

    def __init__(
        self, rows: dict[str, tuple[int, int]], visual: str | None, cfg: DataConfig, online: Any = None,
        folders: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.frame = rows, cfg.frame
        self.stores: dict[str, FeatureStore | NpyFolder] = {}
        self.online = {visual: online} if visual and online is not None else {}
        wanted = [name for name in rows if name not in VISUAL] + ([visual] if visual and not self.online else [])
        named = {name: (folders or {}).get(name, name) for name in wanted}
        places = {name: [Path(cfg.data_root, at), Path(cfg.features_root, at), Path(at)] for name, at in named.items()}
        if missing := [name for name in wanted if not any(place.is_dir() for place in places[name])]:
            looked = " and ".join(str(place) for place in places[missing[0]][:2])
            raise UserError(
                f"features {', '.join(missing)} not found (looked for {looked}); extract.py makes them from media"
            )
        for name in wanted:
            place = next(place for place in places[name] if place.is_dir())
            self.stores[name] = open_features(place, "frames" if name == visual else None)
        self.visual = visual
        self.keep = set(cfg.streams) or set(rows)
        self.broken: dict[tuple[str, str], str] = {}  # (stream, clip) -> what is wrong
        self.lose: Callable[[str], None] = lambda problem: None  # what happens at a clip that cannot be encoded online
        self.own: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # (stream, clip) -> its speaker's mean, deviation
        self.speaker_norm = cfg.speaker_norm
        self._check_widths()

    def _check_widths(self) -> None:
        for name, made in self.describe().items():
            rows, width = self.rows["image" if name == self.visual else name]
            if made["dim"] != width:
                raise UserError(f"features {name!r} are {made['dim']} wide, the model expects {width}")
            size = made.get("image_size")
            if name == self.visual and size is not None:
                tokens = made.get("tokens", (int(size) // 14) ** 2 + 1)
                if tokens != rows + 1:
                    raise UserError(
                        f"visual tokens {name!r} are made at --image-size {size}, {tokens} a picture; "
                        f"the model expects 1 + {rows}"
                    )

    def __call__(self, clip: Clip, frame: float | None = None) -> dict[str, Tensor]:
        """Slot -> (rows, width) float32; a stream that the clip lacks, or that is broken, is absent.

        `frame`, in [0, 1), says which of a clip's frames stands for it where there are several; None: the middle one.
        """
        values = {}
        for name in (*self.stores, *self.online):
            value = self._read(name, clip, frame)
            if value is not None and name == self.visual:
                values |= {"image": value[1:], "cls": value[:1]}
            elif value is not None:
                own = self.own.get((name, clip.id)) if self.speaker_norm else None
                values[name] = value if own is None else relative(value, *own)
        return {name: value for name, value in values.items() if name in self.keep}

    def slots(self, clip: Clip) -> list[str]:
        """The slots that the clip has a value for, as far as is known without reading it."""
        known = [name for name, store in self.stores.items() if clip.id in store]
        known += [name for name in self.online if clip.path is not None]
        known = [name for name in known if (name, clip.id) not in self.broken]
        slots = [slot for name in known for slot in (VISUAL if name == self.visual else (name,))]
        return [slot for slot in slots if slot in self.keep]

    def streams(self, clip: Clip) -> set[str]:
        """What the clip has of the streams in use: "visual", and names of features."""
        return {_stream(slot) for slot in self.slots(clip)}

    def _read(self, name: str, clip: Clip, frame: float | None = None) -> Tensor | None:
        """One stream of a clip; None, and noted in `broken`, when it is unreadable, misshapen or not finite."""
        id = clip.id
        if (name, id) in self.broken or (name in self.stores and id not in self.stores[name]):
            return None
        rows, width = self.rows["image" if name == self.visual else name]
        expected = (rows + 1, width) if name == self.visual else (1, width)
        try:
            if name in self.online:
                value = encode_clip(clip, self.online[name], "patches", self.frame if frame is None else frame)
            else:
                value = torch.atleast_2d(self.stores[name][id]).float()
            frames, rest = divmod(len(value), expected[0])
            fits = frames == 1 or (frames > 1 and name == self.visual)
            if value.shape[1:] != expected[1:] or rest or not fits:
                raise UserError(f"{name}: id {id!r} has shape {tuple(value.shape)}, the model expects {expected}")
            if not torch.isfinite(value).all():
                raise UserError(f"{name}: id {id!r} has non-finite values")
        except Absent:
            return None
        except (UserError, MediaError) as error:
            self.broken[name, id] = str(error)
            if name in self.online:
                self.lose(str(error))
            return None
        return value.chunk(frames)[frames // 2 if frame is None else int(frame * frames)]

    def only(self, streams: list[str]) -> "Features":
        view = copy.copy(self)
        view.keep = set(streams) or set(self.rows)
        return view

    def scan(self, clips: Sequence[Clip], max_bad: float, say: Callable[[str], None]) -> None:
        """Reads every utterance feature once; UserError when more than the share `max_bad` of clips is broken.

        Frames that are encoded online are too many to try: each that fails is said when it is met, and counted.
        """
        for clip in clips:
            for name in self.stores:
                if name != self.visual:
                    self._read(name, clip)
        if self.broken:
            bad = len({id for _, id in self.broken})
            line = f"{bad} of {len(clips)} clips have broken features, the first: {next(iter(self.broken.values()))}"
            if bad > max_bad * len(clips):
                raise UserError(f"{line}; more than --max-bad {max_bad:g}")
            say(f"{line}; these streams count as absent")
        self.lose = partial(self._lose, len(clips), max_bad, say)

    def _lose(self, clips: int, max_bad: float, say: Callable[[str], None], problem: str) -> None:
        bad = sum(name in self.online for name, _ in self.broken)
        if bad > max_bad * clips:
            raise UserError(
                f"{bad} of {clips} clips have no readable frame, the last: {problem}; --max-bad {max_bad:g}"
            )
        say(f"{problem}; its picture counts as absent")

    def learn_speakers(self, clips: Sequence[Clip]) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Speaker -> stream -> mean and deviation of the utterance features of all of the speaker's clips here.

        With --speaker-norm features of these clips are relative to them from now on.
        """
        option = "--speaker-norm" if self.speaker_norm else "--data.speaker-swap"
        voices: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for speaker, places in by_speaker(clips, option).items():
            voices[speaker] = {}
            for name in [name for name in self.stores if name != self.visual]:
                read = {clips[i].id: self._read(name, clips[i]) for i in places}
                found = {id: value for id, value in read.items() if value is not None}
                if found:
                    voices[speaker][name] = speaker_statistics(speaker, torch.cat(list(found.values())), option)
                    self.own |= {(name, id): voices[speaker][name] for id in found}
        return voices

    def describe(self) -> dict[str, dict]:
        """How each store was made, so that predict.py can make the same features of a new clip."""
        made = {name: store.info | {"dim": store.dim} for name, store in self.stores.items()}
        return made | {name: x.info("patches") | {"frame": self.frame} for name, x in self.online.items()}

    def check_made(self, before: dict[str, dict]) -> None:
        """UserError where other weights made a stream than in training, whose describe() is `before`."""
        for name, made in self.describe().items():
            then, now = (info.get("weights_sha256") for info in (before.get(name, {}), made))
            if then and now and then != now:
                raise UserError(f"features {name!r} are made with other weights of {made['encoder']} than in training")

    def statistics(self, clips: Sequence[Clip]) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of every slot's rows over clips, in float64."""
        sums: dict[str, list] = {}
        for clip in clips:
            for name, value in self(clip).items():
                value = value.double()
                total = sums.setdefault(name, [0, 0.0, 0.0])
                total[0] += len(value)
                total[1] = total[1] + value.sum(0)
                total[2] = total[2] + value.square().sum(0)
        return {
            name: ((total / n).float(), (square / n - (total / n) ** 2).clamp_min(0).sqrt().float())
            for name, (n, total, square) in sums.items()
        }


class ClipData:
    """The samples of a list of clips; what is random in one is a function of (seed, pass over the data, clip id)."""

    def __init__(
        self,
        clips: list[Clip],
        features: Features,
        cfg: DataConfig,
        encode: prompts.Encode,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        self.features, self.cfg, self.encode, self.train, self.seed = features, cfg, encode, train, seed
        self.augment = cfg.augment() if train else {}
        self.blank: dict[str, Tensor] = {}  # slot -> (width,) what a coordinate that is dropped becomes; zero
        # with --speaker-norm all voices are one already
        self.swap = cfg.speaker_swap if train and not cfg.speaker_norm else 0.0
        self.voices = features.learn_speakers(clips) if cfg.speaker_norm or self.swap else {}
        self.clips, self.without_task = [], 0
        for clip in clips:
            if not train or self._tasks(clip):
                self.clips.append(clip)
            else:
                self.without_task += 1
        if not self.clips:
            raise UserError(f"no clip has a target for the tasks {', '.join(cfg.task_pool)}")
        self.labels = [clip.label for clip in self.clips]
        if train and cfg.shuffle_labels:
            order = np.random.default_rng(seed).permutation(len(self.labels))
            self.labels = [self.labels[i] for i in order]

    def __len__(self) -> int:
        return len(self.clips)

    def only(self, streams: list[str]) -> "ClipData":
        """The same clips seen through these streams alone; none given: all."""
        view = copy.copy(self)
        view.cfg = replace(self.cfg, streams=streams)
        view.features = self.features.only(streams)
        return view

    def _tasks(self, clip: Clip) -> dict[str, float]:
        has = {"emotion": clip.label is not None} | {task: True for task in clip.captions}
        return {task: weight for task, weight in self.cfg.task_pool.items() if has.get(task)}

    def easy_to_hard(self, how: str) -> list[tuple[tuple[int, ...], int]]:
        """(difficulty, index) of the clips by `how` of CURRICULA, equals by lot.

        Difficulty: the number of streams, the words of the longest description, or both in this order.
        """
        ranked = []
        for index, clip in enumerate(self.clips):
            streams = len(self.features.streams(clip)) + (clip.text is not None and self.cfg.uses_text)
            words = [len(clip.captions[task].split()) for task in self._tasks(clip) if task in clip.captions]
            measures = {"modalities": (streams,), "length": (max(words, default=0),)}
            difficulty = measures["modalities"] + measures["length"] if how == "both" else measures[how]
            ranked.append((difficulty, random.Random(f"{self.seed}/{clip.id}").random(), index))
        if how != "modalities" and not any(difficulty[-1] for difficulty, _, _ in ranked):
            tasks = ", ".join(self.cfg.task_pool)
            raise UserError(f"--data.curriculum {how}: no clip has a description for the tasks {tasks}")
        return [(difficulty, index) for difficulty, _, index in sorted(ranked)]

    def sample(self, index: int, epoch: int = 0, task: str | None = None, question: str | None = None) -> ClipSample:
        """Clip `index` as a sample; training draws task, question, augmentation; evaluation asks the first question."""
        clip, rng, asked = self._asked(index, epoch, task, question)
        clip, values = (clip, self.features(clip)) if rng is None else self._augmented(clip, rng)
        return self._made(clip, values, *asked)

    def tokens(self, index: int, epoch: int, places: Callable[..., int]) -> int:
        """Positions that sample() takes, whose slots take `places`, where augmentation leaves no stream out.

        Nothing is read for it.
        """
        clip, _, asked = self._asked(index, epoch)
        return self._made(clip, dict.fromkeys(self.features.slots(clip), torch.empty(0)), *asked).positions(places)

    def _asked(
        self, index: int, epoch: int, task: str | None = None, question: str | None = None
    ) -> tuple[Clip, random.Random | None, tuple[str, str, str | None]]:
        """A clip under the label that is trained, what else draws for it, and its task, question and target."""
        clip = self.clips[index]
        rng = random.Random(f"{self.seed}/{epoch}/{clip.id}") if self.train else None
        task = task or (prompts.choose(self._tasks(clip), rng) if rng is not None else "emotion")
        if question is None:
            paraphrase = rng is not None and self._draws("question", rng)
            question = prompts.pick_question(task, rng, self.cfg.labels, self.cfg.question, paraphrase)
        label = self.labels[index]
        raw = label if task == "emotion" else clip.captions.get(task)
        target = prompts.target(raw, self.cfg.prompt_layout) if raw is not None else None
        return replace(clip, label=label), rng, (task, question, target)

    def _made(self, clip: Clip, values: dict[str, Tensor], task: str, question: str, target: str | None) -> ClipSample:
        return make_sample(clip, values, self.cfg, self.encode, task, question, list(self.features.rows), target)

    def _draws(self, name: str, rng: random.Random) -> bool:
        return name in self.augment and rng.random() < self.augment[name]

    def _swapped(self, clip: Clip, values: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
        """Utterance features with the mean and deviation of a voice at a random place between two speakers'."""
        share, (one, other) = rng.random(), rng.choices([*self.voices.values()], k=2)
        values = dict(values)
        for name in values.keys() & one.keys() & other.keys():
            mean, spread = (torch.lerp(a, b, share) for a, b in zip(one[name], other[name], strict=True))
            moved = relative(values[name], *self.features.own[name, clip.id]) * spread.nan_to_num(posinf=0.0) + mean
            values[name] = moved.float()
        return values

    def _augmented(self, clip: Clip, rng: random.Random) -> tuple[Clip, dict[str, Tensor]]:
        """The clip and its values, with what AUGMENTATIONS its draws bring.

        Another frame; noise of a tenth of a feature's deviation; a tenth of its coordinates blanked; only some streams;
        fewer words.
        """
        frame = rng.random() if self._draws("frame", rng) else None
        values = self.features(clip, frame)
        if self.swap and rng.random() < self.swap:
            values = self._swapped(clip, values, rng)
        if self._draws("noise", rng):
            values = noisy(values, rng)
        if self._draws("dropout", rng):
            gaps = torch.Generator().manual_seed(rng.getrandbits(63))
            for name, v in values.items():
                kept = torch.rand(v.shape[-1], generator=gaps) >= 0.1
                values[name] = torch.where(kept, v, self.blank.get(name, torch.zeros(())))
        streams = sorted({_stream(name) for name in values} | ({"text"} if clip.text else set()))
        if len(streams) > 1 and self._draws("streams", rng):
            kept = some(streams, rng)
            values = {name: v for name, v in values.items() if _stream(name) in kept}
            clip = clip if "text" in kept else replace(clip, text=None)
        if clip.text and self._draws("words", rng):
            clip = replace(clip, text=thinned(clip.text, rng))
        return clip, values

    def coverage(self) -> str:
        """ "image 120/120, HL-UTT 118/120, text 97/120": how many clips have each stream; and --speaker-norm."""
        stores = {name: sum(clip.id in store for clip in self.clips) for name, store in self.features.stores.items()}
        stores |= {name: sum(clip.path is not None for clip in self.clips) for name in self.features.online}
        stores["text"] = sum(clip.text is not None for clip in self.clips)
        counts = ", ".join(f"{name} {count}/{len(self)}" for name, count in stores.items())
        return counts + ("; standardised by all clips of their speaker" if self.cfg.speaker_norm else "")

    def class_counts(self) -> dict[str, int]:
        return {label: self.labels.count(label) for label in self.cfg.labels}


def noisy(values: Mapping[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Values with noise of a tenth of the deviation of each."""
    noise = torch.Generator().manual_seed(rng.getrandbits(63))
    tenth = {name: 0.1 * v.std(correction=0) for name, v in values.items()}
    return {name: v + tenth[name] * torch.randn(v.shape, generator=noise) for name, v in values.items()}


def thinned(text: str, rng: random.Random) -> str:
    """The text without some of its words, each left out by itself; where none would stay, all of it."""
    return " ".join(word for word in text.split() if rng.random() >= UNSAID) or text


def some(streams: Sequence[str], rng: random.Random) -> list[str]:
    """At least one of two streams or more, but not all."""
    return rng.sample(streams, rng.randint(1, len(streams) - 1))


def _stream(slot: str) -> str:
    return "visual" if slot in VISUAL else slot


def read_list(cfg: DataConfig, file: str, say: Callable[[str], None]) -> list[Clip]:
    """Clips of a MERR list below data_root, or of a manifest; says how many of the listed ones were found."""
    if file.endswith((".csv", ".jsonl")):
        clips = read_manifest(file)
        _check_labels(clips, cfg.labels)
        return clips
    clips, listing = load_merr(cfg.data_root, file, cfg.image_path, labels=cfg.labels)
    say(str(listing))
    return clips


def _check_labels(clips: list[Clip], labels: Sequence[str]) -> None:
    for clip in clips:
        if clip.label is not None and clip.label not in labels:
            raise UserError(f"{clip.where}: unknown label {clip.label!r} (labels: {', '.join(labels)})")


def load_splits(cfg: DataConfig, seed: int, held_out: bool, say: Callable[[str], None]) -> dict[str, list[Clip]]:
    """train and valid clips (valid is empty unless given or `held_out`); UserError when valid is a known test set."""
    if cfg.valid_file and Path(cfg.valid_file).name in KNOWN_TESTS:
        raise UserError(f"--valid-file {cfg.valid_file}: that is a published test set; choose on other clips")
    everything: list[Clip] = []
    if cfg.manifest:
        everything = read_list(cfg, cfg.manifest, say)
        train = [c for c in everything if (c.split or "train") == "train" and not _is_test(c, cfg)]
        valid = [c for c in everything if c.split in ("valid", "dev", "val") and not _is_test(c, cfg)]
    else:
        train, valid = read_list(cfg, cfg.annotation_file, say), []
    if cfg.valid_file:
        valid = read_list(cfg, cfg.valid_file, say)
    elif held_out and not valid and cfg.valid_share > 0:
        train, valid = split_by_group(train, cfg.valid_share, seed)
        say(f"valid: {len(valid)} clips held out by source video or speaker (seed {seed})")
    if cfg.manifest and (shared := leak_check(train, [clip for clip in everything if _is_test(clip, cfg)])):
        say(f"leak: {len(shared)} groups are in both train and test, such as {shared[0]!r}")
    if shared := leak_check(train, valid):
        raise UserError(f"{len(shared)} groups are in both train and valid, such as {shared[0]!r}")
    return {"train": train, "valid": valid}


def _is_test(clip: Clip, cfg: DataConfig) -> bool:
    return clip.split == "test" or (cfg.fold is not None and clip.fold == cfg.fold)


def load_test(cfg: DataConfig, say: Callable[[str], None]) -> list[Clip]:
    """Test clips: test_file, or the manifest's test split or fold."""
    if cfg.manifest:
        clips = [clip for clip in read_list(cfg, cfg.manifest, say) if _is_test(clip, cfg)]
        if not clips:
            raise UserError(f"{cfg.manifest}: no test clips (a split column with 'test', or --fold)")
        return clips
    if not cfg.test_file:
        raise UserError("--test-file is not set")
    return read_list(cfg, cfg.test_file, say)


def load_replay(cfg: DataConfig, held_out: Sequence[Clip], say: Callable[[str], None]) -> list[Clip]:
    """The replayed clips, none of a test split or of a group in `held_out`."""
    if cfg.replay is None:
        return []
    if Path(cfg.replay).name in KNOWN_TESTS:
        raise UserError(f"--data.replay {cfg.replay}: that is a published test set")
    listed = read_list(cfg, cfg.replay, say)
    known = {group_of(clip) for clip in held_out}
    clips = [clip for clip in listed if (clip.split or "train") == "train" and not _is_test(clip, cfg)]
    clips = [clip for clip in clips if group_of(clip) not in known]
    if not clips:
        raise UserError(f"--data.replay {cfg.replay}: none of its {len(listed)} clips may be trained on")
    if len(clips) < len(listed):
        say(f"replay: {len(listed) - len(clips)} of {len(listed)} clips left out, which validation or test know")
    return clips


def check(cfg: DataConfig) -> None:
    """UserError for values that no type or list of choices rules out."""
    if not cfg.labels:
        raise UserError("--data.labels: none are given")
    if strange := [label for label in cfg.labels if label not in prompts.OFFERED.get(cfg.question, cfg.labels)]:
        names = ", ".join(strange)
        raise UserError(f"--data.question {cfg.question}: does not offer {names} of --data.labels")
    check_probabilities(cfg)
    if not 0 < cfg.curriculum_share <= 1:
        raise UserError(f"--data.curriculum-share: {cfg.curriculum_share:g} is not above 0 and at most 1")
    if cfg.curriculum_epochs < 0:
        raise UserError(f"--data.curriculum-epochs: {cfg.curriculum_epochs} is negative")
    if not 0 < cfg.replay_ratio < 1:
        raise UserError(f"--data.replay-ratio: {cfg.replay_ratio:g} is not between 0 and 1")


def check_probabilities(cfg: DataConfig) -> None:
    """UserError for augmentations that cannot be drawn."""
    if cfg.augmentations and not cfg.enable_augmentation:
        raise UserError("--data.augmentations: needs --data.enable-augmentation")
    probabilities = {"augmentation-prob": cfg.augmentation_prob, "speaker-swap": cfg.speaker_swap}
    for name, p in {**probabilities, **cfg.augmentations}.items():
        if not 0 <= p <= 1:
            name = f"augmentations {name}" if name in cfg.augmentations else name
            raise UserError(f"--data.{name}: {p:g} is no probability")


def label_gaps(cfg: DataConfig, clips: dict[str, list[Clip]]) -> list[str]:
    """Warnings about labels that no clip of clips["train"] has: those of the question, and of each other split."""
    trained = {clip.label for clip in clips["train"]}
    lines = []
    if absent := [label for label in prompts.OFFERED.get(cfg.question, cfg.labels) if label not in trained]:
        lines.append(f"warning: no training clip is labelled {', '.join(absent)}, of the labels the question offers")
    for split, others in clips.items():
        labels = [clip.label for clip in others]
        absent = [label for label in cfg.labels if label in labels and label not in trained]
        if absent:
            counts = ", ".join(f"{label} ({labels.count(label)})" for label in absent)
            lines.append(f"warning: {split} clips have labels that no training clip has: {counts}")
    return lines
