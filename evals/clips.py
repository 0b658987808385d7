"""Emotion-LLaMA's side of train_llm.py: clips that it trains on, and how they score a checkpoint."""

import csv
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import config, dist, metrics
from common.config import UserError
from common.log import Logger, confusion_image
from data.clips import (
    ClipData,
    ClipSample,
    Features,
    check,
    label_gaps,
    load_replay,
    load_splits,
    load_test,
    make_sample,
)  # fmt: skip
from data.features import StoreWriter, encode_clip
from data.manifest import Clip
from data.merr import load_merr
from data.mock import make_mock
from data.prompts import Encode, emotion_question, pick_question, segments, target
from evals import emotion, sizes, texts
from model.encoders import load as load_encoder
from model.mllm import Mllm, load_visual
from model.tokenizer import Tokenizer
from model.toy import make_toy_llm

LOGGED = ("loss", "accuracy", "uar", "weighted_f1", "macro_f1", "clue_overlap", "label_overlap", "invalid")
FAST_CLIPS = (600, 120)  # train and test
# --fast: everything is made on the spot (data/mock.py, model/toy.py), nothing is downloaded
FAST = {
    "model.full": True, "model.features": {"face": 0, "voice": 0}, "model.normalize": True, "model.visual": "patches",
    "model.image_size": 56, "model.grad_checkpoint": False, "data.task_pool": {"emotion": 1.0},
    "data.valid_share": 0.12,
    "data.labels": ["happy", "sad", "neutral", "angry", "worried", "surprise"], "data.enable_augmentation": True,
    "data.augmentations": {"noise": 0.6, "streams": 0.6}, "optim.lr": 1.5e-3, "optim.min_lr": 1e-4,
    "optim.warmup_lr": 1e-4, "optim.warmup_steps": 20, "epochs": 15,
    "precision": "fp32", "num_workers": 0, "log_every": 10, "evaluate": True, "eval_every": 5, "save_every": 5,
    "save_best": True, "test": True, "decode.max_new_tokens": 8, "eval_batch_size": 32,
}  # fmt: skip


def prepare_fast(cfg: Any) -> Any:
    """Makes clips, features, tokenizer and language model of --fast in the run folder; the config that uses them."""
    out = Path(cfg.out or "out/llm_fast")
    cfg = config.preset(cfg, FAST | {
        "out": str(out), "model.llm": str(out / "base"), "data.data_root": str(out / "mock"),
        "data.features_root": str(out / "features"), "batch_size": max(1, 8 // int(os.environ.get("WORLD_SIZE", 1))),
    })  # fmt: skip
    encoders = {
        "face": (load_encoder("framestats"), "stats"), "voice": (load_encoder("logmel"), "stats"),
        "patches": (load_encoder("framestats", image_size=cfg.model.image_size), "patches"),
    }  # fmt: skip
    width = {name: encoder.out_dim(pooling) for name, (encoder, pooling) in encoders.items()}
    cfg.model.features, cfg.model.visual_width = {"face": width["face"], "voice": width["voice"]}, width["patches"]
    if (out / "base" / "config.json").exists() and cfg.resume:
        return cfg
    shutil.rmtree(out, ignore_errors=True)
    print(f"--fast: drawing and speaking {sum(FAST_CLIPS)} synthetic clips below {out / 'mock'}")
    make_mock(out / "mock", *FAST_CLIPS, seed=cfg.seed, workers=2)
    clips = [clip for file in (cfg.data.annotation_file, "relative_test3_NCEV.txt")
             for clip in load_merr(out / "mock", file)[0]]  # fmt: skip
    for name, (encoder, pooling) in encoders.items():
        writer = StoreWriter(out / "features" / name, encoder.info(pooling))
        with ThreadPoolExecutor(2) as pool:
            for clip, value in zip(
                clips, pool.map(partial(encode_clip, encoder=encoder, pooling=pooling), clips), strict=True
            ):
                writer.add(clip.id, value)
        writer.close()
        writer.finish()
    question = emotion_question(cfg.data.labels)
    known = [clip for clip in clips if clip.id.startswith("sample_")]  # the test clips' sentences stay unseen
    written = [
        "".join(part for part in segments("emotion", question, clip.text, []) if isinstance(part, str))
        for clip in known
    ]
    make_toy_llm(
        out / "base", [*written, *(caption for clip in known for caption in clip.captions.values())], seed=cfg.seed
    )
    return cfg


STAND_IN = Clip(
    "stand_in", text="I really did not expect to see you here.", label="surprise",
    captions={
        "reason": "The raised brows and the open mouth in the video show surprise, and the voice goes up at the end.",
        "reason_v2": "Raised brows, an open mouth and a rising voice: the person did not expect this, it is surprise.",
    },
)  # fmt: skip


class ClipTask:
    """Clips of MERR's layout or of a manifest: what train_llm.py trains on, chooses by and reads at the end."""

    METRICS, LOWER = emotion.METRICS, emotion.LOWER
    prepare_fast = staticmethod(prepare_fast)
    splits: dict[str, list[Clip]]
    tested: list[Clip]
    features: Features
    trained: list[ClipData]

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.data = cfg, cfg.data
        self.valid: ClipData | None = None

    def opens(self, device: torch.device, say: Callable[[str], None]) -> list[Callable[[], object]]:
        """What may go wrong before any connection is opened, each a call; they read lists and open stores."""
        cfg, data = self.cfg, self.data

        def read() -> None:
            self.splits = load_splits(data, cfg.seed, cfg.evaluate, say)

        def stores() -> None:
            self.features = Features(cfg.model.rows(), cfg.model.visual, data, load_visual(cfg.model, device))

        def test() -> None:  # a missing list must not end a run after its training
            self.tested = load_test(data, say) if cfg.test else []

        unread = partial(config.without, cfg, ("support", "model.towers"), "clips")
        return [unread, read, stores, test, lambda: check(data), self._check]

    def _check(self) -> None:
        """UserError where validation cannot give what a checkpoint is to be chosen by."""
        if self.cfg.evaluate and self.cfg.metric in emotion.OF_DESCRIPTIONS and self.task == "emotion":
            raise UserError(f"--metric {self.cfg.metric}: --data.task-pool has no task with descriptions")

    @property
    def labels(self) -> list[str]:
        return self.data.labels

    @property
    def task(self) -> str:
        """What the validation clips are asked: their emotion where that is trained, else the heaviest other task.

        A metric of descriptions asks for those.
        """
        others = {task: weight for task, weight in self.data.task_pool.items() if task != "emotion"}
        if len(others) < len(self.data.task_pool) and self.cfg.metric not in emotion.OF_DESCRIPTIONS:
            return "emotion"
        return max(others, key=lambda task: others[task], default="emotion")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How often each label is trained, under the name of its task."""
        return {"emotion": self.trained[0].class_counts()}

    def parts(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[ClipData]:
        """What is trained on: the run's own clips, and perhaps replayed ones."""
        cfg, data, features = self.cfg, self.data, self.features
        tested = self.tested
        if not tested:
            with suppress(UserError):  # it is only compared with, and need not be here
                tested = load_test(data, lambda _: None)
        replayed = load_replay(data, [*self.splits["valid"], *tested], say)
        features.scan(self.splits["train"] + replayed, data.max_bad, say)
        parts = []
        if replayed:  # before our own clips: some may be both, and --speaker-norm is by the last that knew them
            other = replace(data, task_pool=data.replay_tasks)
            parts = [ClipData(replayed, features, other, tokenizer.encode, train=True, seed=cfg.seed)]
        train = ClipData(self.splits["train"], features, data, tokenizer.encode, train=True, seed=cfg.seed)
        say(f"train: {len(train)} clips ({train.coverage()}); classes {train.class_counts()}")
        for part in parts:
            share = f"{data.replay_ratio:.0%} of the samples"
            say(f"replay: {len(part)} clips of {data.replay} ({part.coverage()}), {share}")
        for line in label_gaps(data, {"train": train.clips, "valid": self.splits["valid"], "test": tested}):
            say(line)
        if train.augment:
            say(f"augmentation: {', '.join(f'{name} {p:g}' for name, p in train.augment.items())}")
        if self.splits["valid"]:
            self.valid = ClipData(self.splits["valid"], features, data, tokenizer.encode)
        described = self.valid is None or any(self.task in clip.captions for clip in self.valid.clips)
        if cfg.evaluate and cfg.metric in emotion.OF_DESCRIPTIONS and not described:
            raise UserError(f"--metric {cfg.metric}: no validation clip has a description for the task {self.task}")
        self.trained = [train, *parts]
        return self.trained

    def fit(self, mllm: Mllm, say: Callable[[str], None]) -> None:
        """Gives a new model what it must know of the training clips before its first step."""
        if self.cfg.model.normalize:
            mllm.set_statistics(self.features.statistics(self.trained[0].clips))

    def follow(self, mllm: Mllm) -> None:
        """Takes from the model, once it is loaded, what the training clips must know of it."""
        for part in self.trained:
            part.blank = mllm.means()

    def describe(self) -> dict[str, dict]:
        """How the streams are made, for the checkpoint."""
        return self.features.describe()

    def validate(
        self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, amp: Callable, log: Logger, step: int
    ) -> dict[str, Any]:
        """Scores of the validation clips, logged beside the majority class."""
        cfg, valid, labels = self.cfg, self.valid, self.labels
        assert valid is not None
        decode = cfg.decode if self.task == "emotion" else replace(cfg.decode, decode="generate")
        scores, records = emotion.evaluate(
            mllm, tokenizer, valid, labels, decode, here, cfg.eval_batch_size, self.task, cfg.seed, cfg.eval_limit,
            counts=self.counts["emotion"],
        )  # fmt: skip
        mine = (valid.sample(i, task=self.task) for i in range(here.rank, len(valid), here.world))
        scores["loss"] = emotion.loss(mllm, mine, here, cfg.eval_batch_size, amp)
        numbers = {f"valid/{key}": scores[key] for key in (*LOGGED, cfg.metric) if key in scores}
        numbers["valid/majority_weighted_f1"] = scores["majority"]["weighted_f1"]
        found = texts.figures(records, {clip.id: clip.text for clip in valid.clips})
        log(step, **numbers, **{"valid/distinct_answers": found["distinct"]})
        log.figure("valid/confusion", confusion_image(scores["confusion"], labels), step)
        log.say(f"  {self.task}: {texts.line(found)}")
        for record in records[:3]:
            line = f"{record['id']}: {record['label']} -> {record['answer']!r}"
            log.say(f"  sample {line}")
            log.text("valid/samples", line, step)
        return scores

    def test(self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, say: Callable[[str], None]) -> dict[str, Any]:
        """Scores on the test split by both ways of decoding; --fast also with one kind of stream at a time."""
        cfg = self.cfg
        test = ClipData(self.tested, self.features, self.data, tokenizer.encode)
        runs = {"score": [], "generate": []}
        cues: dict[str, set[str]] = {}
        if cfg.fast:
            runs |= {"visual only": ["image", "cls", "face"], "audio only": ["voice"], "text only": ["text"]}
            with open(Path(self.data.data_root) / "cues.csv") as file:
                rows = list(csv.DictReader(file))
            cues = {row.pop("id"): {kind for kind, has in row.items() if has == "1"} for row in rows}
        results = {}
        for name, streams in runs.items():
            settings = replace(cfg.decode, decode="generate" if name == "generate" else "score")
            part = test.only(streams) if streams else test  # not only([]), which would undo --data.streams
            scores, records = emotion.evaluate(
                mllm, tokenizer, part, self.labels, settings, here, cfg.eval_batch_size, seed=cfg.seed,
                counts=self.counts["emotion"],
            )  # fmt: skip
            carrying = [r["prediction"] == r["label"] for r in records if name.split()[0] in cues.get(r["id"], ())]
            on = ""
            if carrying:
                scores["accuracy_on_carriers"] = sum(carrying) / len(carrying)
                on = f"  on the {len(carrying)} clips with that cue {scores['accuracy_on_carriers']:.4f}"
            results[name] = scores
            say(f"test, {name:<11}: {metrics.line(scores)}{on}")
        say(metrics.table(results["score"], results["score"]["majority"]))
        return results

    def dry_run(self, say: Callable[[str], None]) -> None:
        """Prints what the run would cost; uses a clip of the data where they are here."""
        try:
            clip = load_splits(self.data, self.cfg.seed, False, lambda _: None)["train"][0]
        except UserError:
            clip = None
        model, data = self.cfg.model, self.data
        source = f"clip {clip.id}" if clip else "a stand-in clip (the data are not here)"
        clip = clip or STAND_IN
        task = next((t for t in data.task_pool if t == "emotion" or t in clip.captions), "emotion")
        raw = clip.label if task == "emotion" else clip.captions[task]
        values = {name: torch.empty(rows, device="meta") for name, rows in model.rows().items()}
        question, answer = pick_question(task, None, data.labels, data.question), target(raw or "", data.prompt_layout)

        def sample(encode: Encode) -> ClipSample:
            return make_sample(clip, values, data, encode, task, question, list(values), answer)

        sizes.report(model, self.cfg.batch_size, sample, f"{source}, task {task}", say)
